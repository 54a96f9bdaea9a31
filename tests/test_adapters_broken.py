"""Broken, foreign and hostile adapter files: each is one sentence that names the file, and nothing is executed."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import R, load_base, logits, make_base, make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
)

from loralib.adapt import ROLES, adapt
from loralib.adapters.exports import export_lora, export_merged
from loralib.adapters.own import load_adapter
from loralib.adapters.peft import export_peft
from loralib.adapters.start import load_lora, read_adapter
from loralib.errors import InputError
from loralib.layers import GatedLinear, LoRALinear, SVDLinear
from loralib.loading import load


class Executed:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(__file__).parent / "executed"),)


def damaged(folder: Path, how: str) -> None:
    file, config = folder / "adapter.safetensors", folder / "adapter.json"
    state, told = load_file(file), json.loads(config.read_text())
    name = next(iter(told["ranks"]))
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        file.unlink()
    elif how == "cut weights":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "cut config":
        config.write_bytes(config.read_bytes()[:-7])
    elif how == "config is a list":
        config.write_text("[]")
    elif how == "deep config":
        config.write_text("[" * 100_000)
    elif how == "newer":
        config.write_text(json.dumps(told | {"format_version": 99}))
    elif how == "scaling is a text":
        config.write_text(json.dumps(told | {"scaling": told["scaling"] | {name: "2"}}))
    elif how == "scaling is infinite":
        config.write_text(json.dumps(told | {"scaling": told["scaling"] | {name: float("inf")}}))
    elif how == "another run's config":
        config.write_text(json.dumps(told | {"ranks": {name: 4}}))
    elif how == "the config of another step":
        config.write_text(json.dumps(told | {"ranks": told["ranks"] | {name: told["ranks"][name] - 1}}))
    elif how == "another head":
        config.write_text(json.dumps(told | {"head": []}))
    elif how == "a pickle":
        torch.save({"x": Executed()}, file)
    else:
        state[f"{name}.lora_A"] = {
            "one dimension": torch.zeros(24), "integers": torch.zeros(R, 24, dtype=torch.long),
            "not finite": torch.full((R, 24), float("nan")),
            "another rank": torch.zeros(R + 1, 24), "no rank": torch.zeros(0, 24),
        }[how]  # fmt: skip
        save_file(state, file)


@pytest.mark.parametrize(
    "how",
    ["no config", "no weights", "cut weights", "cut config", "config is a list", "deep config", "newer", "a pickle",
     "scaling is a text", "scaling is infinite", "another run's config", "the config of another step", "another head",
     "one dimension", "integers", "not finite", "another rank", "no rank"],
)  # fmt: skip
def test_a_damaged_adapter_is_one_sentence_that_names_the_file(tmp_path: Path, how: str) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    damaged(tmp_path / "run", how)
    with pytest.raises(InputError, match=r"run|adapter\.(json|safetensors)") as refused:
        export_lora(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500 + len(str(tmp_path)) * 2
    assert not (tmp_path / "out").exists() and not (Path(__file__).parent / "executed").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"base_model": "x" * 5000}, "base_model of 5000 characters"),
        ({"base_model": "a\0b"}, "base_model of 3 characters"),
        ({"base_model": ["a"]}, "names no base_model"),
        ({"lora_alpha": float("inf")}, "lora_alpha' = 'inf'"),
        ({"lora_dropout": "a lot"}, "lora_dropout' = 'a lot'"),
        ({"lora_r": 1e12}, r"lora_r 1e\+12, and its factors have rank 4"),
    ],
)
def test_a_strange_value_in_adapter_json_is_one_sentence(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    file = tmp_path / "run" / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for use in (
        lambda run: export_merged(run, tmp_path / "out", layer=LoRALinear),
        lambda run: load(run, layer=LoRALinear),
    ):
        with pytest.raises(InputError, match=said) as refused:
            use(tmp_path / "run")
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_mixed_precision_is_read_and_floats_of_eight_bits_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    trained = make_run(tmp_path / "run", base, "adalora")
    file = tmp_path / "run" / "adapter.safetensors"
    state = load_file(file)
    save_file({k: t.bfloat16() if k.endswith("lora_A") else t for k, t in state.items()}, file)
    for export in (export_lora, export_peft, export_merged):
        export(tmp_path / "run", tmp_path / export.__name__)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export_merged").eval()
    assert merged.dtype == torch.float32 and (logits(merged) - logits(trained)).abs().max() < 0.05
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        save_file({k: t.to(dtype) if k.endswith("lora_A") else t for k, t in state.items()}, file)
        model = load_base(base, 3)
        adapt(model, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
        with pytest.raises(InputError, match="in float8_.*cannot be read here"):
            export_lora(tmp_path / "run", tmp_path / "out")
        with pytest.raises(InputError, match="in float8_.*cannot be read here"):
            load_adapter(model, tmp_path / "run")


def test_a_merged_export_of_an_older_run_says_what_its_outputs_are(tmp_path: Path) -> None:
    """Runs of 409de3b wrote no problem_type, and a base model's own may be another."""
    base = make_base(tmp_path / "base", "bert")
    for labels, kind in ((1, "regression"), (3, "single_label_classification")):
        run = tmp_path / str(labels)
        make_run(run, base, num_labels=labels)
        names = None if labels == 1 else ["a", "b", "c"]
        for file, change in (("config.json", {"problem_type": None}), ("adapter.json", {"label_names": names})):
            (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | change))
        export_merged(run, tmp_path / f"{labels}-merged")
        config = AutoConfig.from_pretrained(tmp_path / f"{labels}-merged")
        assert config.problem_type == kind and (names is None or list(config.id2label.values()) == names)


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_nothing_in_a_pickle_is_executed(tmp_path: Path, suffix: str) -> None:
    for number, content in enumerate([{"x": Executed()}, Executed(), [1], {"x": 1}, {3: torch.zeros(1)}]):
        torch.save(content, tmp_path / f"{number}.{suffix}")
        with pytest.raises(InputError, match=rf"{number}\.{suffix}"):
            read_adapter(tmp_path / f"{number}.{suffix}")
    assert not (Path(__file__).parent / "executed").exists()


class Good:
    """The files of a good adapter in this project's format and in PEFT's, and a model that takes it."""

    files: dict[str, dict[str, bytes]]
    model: nn.Module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder / "own", make_base(folder / "base", "bert"), "sora")
    export_peft(folder / "own", folder / "peft")
    good = Good()
    good.files = {kind: {p.name: p.read_bytes() for p in (folder / kind).iterdir()} for kind in ("own", "peft")}
    good.model = load_base(folder / "base", 3)
    adapt(good.model, GatedLinear, list(ROLES), r=R, lora_alpha=12.0)
    return good


def mutated(content: bytes, data: Any) -> bytes:
    """Bytes set, cut off, put in or taken out, preferably in the first ones: headers are the tender part."""
    value = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        end = min(len(value), data.draw(st.sampled_from([200, 5000, len(content)])))
        at = data.draw(st.integers(0, max(end - 1, 0)))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "delete"]))
        if change == "set":
            value[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif change == "cut":
            del value[at:]
        elif change == "insert":
            value[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del value[at : at + data.draw(st.integers(1, 8))]
    return bytes(value)


def other_value(content: bytes, data: Any) -> bytes:
    """JSON with one entry replaced by any value, or taken out; one level down where there is one."""
    whole = json.loads(content)
    place = whole
    key = data.draw(st.sampled_from(sorted(place)))
    if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    anything = st.recursive(
        leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=3)
    )
    if data.draw(st.booleans()):
        place[key] = data.draw(anything)
    else:
        del place[key]
    return json.dumps(whole).encode()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_adapters_load_or_are_refused(good: Good, tmp_path: Path, data: Any) -> None:
    """An adapter that loads into a model and goes out again, or one sentence; never another error."""
    kind = data.draw(st.sampled_from(["own", "peft"]))
    files = dict(good.files[kind])
    config = "adapter.json" if kind == "own" else "adapter_config.json"
    if data.draw(st.booleans()):
        files[config] = other_value(files[config], data)
    else:
        name = data.draw(st.sampled_from(sorted(files)))
        files[name] = mutated(files[name], data)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        for file, value in files.items():
            Path(folder, file).write_bytes(value)
        for use in (
            lambda: load_lora(good.model, folder),
            lambda: export_lora(folder, Path(folder, "lora")),
            lambda: export_peft(folder, Path(folder, "for-peft")),
        ):
            try:
                use()
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 600

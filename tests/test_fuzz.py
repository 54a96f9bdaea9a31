"""Hostile and broken files: one sentence each time, never a hang, a traceback of another kind, or code that runs.

Everything the project reads itself: tables, adapters, method state, checkpoints, results, config files. Real files are
cut, have bytes changed, doubled or swapped; hypothesis makes the rest up. The seeds are fixed, so a failure repeats.
"""

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loralib.adapters.own import load_adapter, load_method_state, load_trained, save_adapter, save_method_state
from loralib.adapters.reading import read_state
from loralib.errors import InputError
from loralib.glue.arguments import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, parse
from loralib.glue.data import load
from loralib.training.manifest import MANIFEST, last_checkpoint, read_manifest

MADE_UP = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` broken versions of a file."""
    draw = random.Random(seed)
    for number in range(count):
        data = bytearray(content)
        kind = number % 6
        place = draw.randrange(len(data)) if data else 0
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == 2:
            data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 40)))
        elif kind == 3:
            end = min(len(data), place + draw.randint(1, 200))
            data[place:place] = data[place:end] * draw.randint(1, 5)
        elif kind == 4:
            data[place : place + draw.randint(1, 100)] = b""
        else:
            data[place : place + 8] = draw.choice(
                [b"\0" * 8, b"\xff" * 8, b"\xef\xbb\xbf", b'"', b"\r", b"\t\t\t", b"{" * 2000]
            )
        yield bytes(data)


def one_sentence(read: Callable[[], Any]) -> bool:
    """Whether `read` refused its input; anything but InputError is the test's failure."""
    try:
        read()
    except InputError as error:
        message = str(error)
        assert 20 < len(message) < 1200 and "\n" not in message, repr(message)
        return True
    return False


# ---- tables ----


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small file of each format, with what trips readers up."""
    texts = ['He said " no .', "plain, with a comma", "NA", "caf\u00e9 \u2028 \U0001f600", "a space ", 'C:\\new "x"']
    rows = [{"sentence": t, "label": i % 2} for i, t in enumerate(texts * 3)]
    folder = tmp_path_factory.mktemp("tables")
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(folder / "t.parquet")
    quoted = "\n".join('"{}",{}'.format(r["sentence"].replace('"', '""'), r["label"]) for r in rows)
    return {
        "tsv": "\n".join(["sentence\tlabel", *(f"{r['sentence']}\t{r['label']}" for r in rows)]).encode(),
        "csv": f"sentence,label\n{quoted}\n".encode(),
        "jsonl": "\n".join(json.dumps(r) for r in rows).encode(),
        "json": json.dumps(rows).encode(),
        "parquet": (folder / "t.parquet").read_bytes(),
    }


def load_table(path: Path) -> None:
    data = load(task_name="sst2", train_file=str(path), do_train=True, do_eval=False, do_predict=False)
    assert data.train is not None and len(data.train) > 0 and set(data.train["label"]) <= {0, 1}


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json", "parquet"])
def test_broken_tables(suffix: str, tables: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(tables[suffix])
    load_table(path)
    refused = 0
    for content in mutations(tables[suffix], 60):
        path.write_bytes(content)
        refused += one_sentence(lambda: load_table(path))
    assert refused >= 15


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
@MADE_UP
@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
)
def test_made_up_tables(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"train.{suffix}"
    header = {"tsv": b"sentence\tlabel\n", "csv": b"sentence,label\n", "jsonl": b""}[suffix]
    for data in (content, header + content):
        path.write_bytes(data)
        one_sentence(lambda: load_table(path))


# ---- adapters, method state, checkpoints ----


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An AdaLoRA trainer after two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    args = runs.arguments(folder, max_steps=5, save_steps=2, per_device_train_batch_size=8)
    trainer = runs.trainer("adalora", args, runs.rows(16), modules=["query"])
    trainer.train()
    return trainer


def test_broken_adapters(run: Any, tmp_path: Path) -> None:
    """Weights may be changed to others; keys, shapes and the format may not."""
    save_adapter(run.model, tmp_path, run.adapter)
    for name in ("adapter.safetensors", "adapter.json"):
        content = (tmp_path / name).read_bytes()
        refused = 0
        for broken in mutations(content[:4000] if name.endswith("s") else content, 40):
            (tmp_path / name).write_bytes(broken + content[4000:] if name.endswith("s") else broken)
            refused += one_sentence(lambda: load_adapter(run.model, tmp_path))
            refused += one_sentence(lambda: load_trained(run.model, read_state(tmp_path), "x", head_may_differ=True))
        (tmp_path / name).write_bytes(content)
        assert refused >= 20 or name == "adapter.json"
    load_adapter(run.model, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter.bin", "adapter.safetensors"])
def test_a_pickle_runs_no_code(name: str, run: Any, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Bomb(mark))),
        lambda path: torch.save(Bomb(mark), path),
        lambda path: torch.save({"lora_A": Bomb(mark)}, path),
        lambda path: path.write_bytes(pickle.dumps({"a": [1] * 10}, protocol=0)),
        lambda path: torch.save({"a": {"b": torch.ones(1)}}, path),
        lambda path: torch.save([torch.ones(1)], path),
    ):
        write(tmp_path / name)
        assert one_sentence(lambda: load_adapter(run.model, tmp_path / name))
    assert not mark.exists()


def test_broken_method_state(run: Any, tmp_path: Path) -> None:
    allocator = run.method_state["allocator"]
    save_method_state({"allocator": allocator.state_dict()}, tmp_path)
    path = tmp_path / "method_state.safetensors"
    content = path.read_bytes()
    refused = 0
    for broken in mutations(content[:3000], 60):
        path.write_bytes(broken + content[3000:])
        refused += one_sentence(lambda: allocator.load_state_dict(load_method_state(tmp_path).get("allocator", {})))
    assert refused >= 20
    path.unlink()
    assert one_sentence(lambda: load_method_state(tmp_path))


def test_broken_checkpoints_fall_back_to_the_one_before(run: Any, tmp_path: Path) -> None:
    """Whatever happens to the newest, the hash or the manifest tells, and the older one is found."""
    folder = Path(run.args.output_dir)
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(folder / name, tmp_path / name)
    refused = 0
    for name in (MANIFEST, "optimizer.pt", "trainer_state.json", "method_state.safetensors"):
        path = tmp_path / "checkpoint-4" / name
        content = path.read_bytes()
        for broken in mutations(content, 24):
            path.write_bytes(broken)
            if one_sentence(lambda: read_manifest(tmp_path / "checkpoint-4")):
                refused += 1
                assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
            else:  # white space in the manifest, say, or a value that resuming compares
                assert name == MANIFEST or broken == content
        path.write_bytes(content)
    assert refused >= 80
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MANIFESTS = st.fixed_dictionaries(
    {},
    optional={
        "version": VALUES | st.just(1),
        "step": VALUES | st.just(4),
        "settings": VALUES | st.just({}),
        "progress": VALUES | st.just({"losses": [0.0]}),
        "files": VALUES | st.dictionaries(st.text(max_size=5), st.just({"bytes": 3, "sha256": "x"}), max_size=2),
    },
)


@MADE_UP
@given(manifest=VALUES | MANIFESTS)
def test_made_up_manifests(manifest: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
    (tmp_path / "checkpoint-1" / MANIFEST).write_text(json.dumps(manifest))
    one_sentence(lambda: read_manifest(tmp_path / "checkpoint-1"))
    last_checkpoint(tmp_path)


def test_names_that_look_like_checkpoints(tmp_path: Path) -> None:
    for name in (
        "checkpoint-",
        "checkpoint-x",
        "checkpoint--1",
        "checkpoint-1\n2",
        "checkpoint-\u0663",
        "checkpoint-5",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99999999999999999999999").write_text("a file")
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "missing") is None


# ---- config files ----

CLASSES = (ModelArguments, DataArguments, LoRAArguments, GlueTrainingArguments)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_broken_config_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    config = {
        "model_name_or_path": "m",
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 0.001,
        "lora_r": 8,
        "lora_alpha": 16,
        "apply_lora": True,
        "use_cpu": True,
        "report_to": "none",
        "seed": 3,
    }
    content = json.dumps(config, indent=1).encode()
    path.write_bytes(content)
    parse(CLASSES, [str(path)])
    refused = 0
    for broken in mutations(content, 90):
        path.write_bytes(broken)
        refused += one_sentence(lambda: parse(CLASSES, [str(path)]))
    assert refused >= 40


@MADE_UP
@given(
    config=st.dictionaries(
        st.sampled_from(["learning_rate", "lora_r", "seed", "apply_lora", "lora_module", "x"]), VALUES
    )
)
def test_made_up_config_values(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    usual = {"model_name_or_path": "m", "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    path.write_text(json.dumps(usual | config))
    one_sentence(lambda: parse(CLASSES, [str(path)]))


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]\n")
    assert one_sentence(lambda: parse(CLASSES, [str(path)]))
    assert not (tmp_path / "ran").exists()


# ---- results files ----


def swapped(value: Any, draw: random.Random) -> Any:
    """The same JSON with one part, anywhere in it, replaced by another kind of value."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        copy = value.copy()
        key = draw.choice(sorted(copy)) if isinstance(copy, dict) else draw.randrange(len(copy))
        copy[key] = swapped(copy[key], draw)
        return copy
    return draw.choice([None, "x", -1, 1e400, [], {}, [1], {"a": [{}]}, True, [[None]], float("nan"), 10**30])


def test_broken_results_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is made all the same, from the runs that are whole, and it names the one that is not."""
    from loralib.report import page

    monkeypatch.setattr(page, "draw", lambda *a: ([], []))  # seconds each
    epochs = [
        {"eval_accuracy": 0.5 + e / 10, "eval_f1": 0.6, "eval_loss": 0.7, "rank_total": 9, "epoch": e, "step": 4 * e}
        for e in (1, 2)
    ]
    results = {
        "version": 1,
        "status": "finished",
        "method": "lora",
        "task": "mrpc",
        "seed": 1,
        "command": ["run_glue.py"],
        "arguments": {"seed": 1, "lora_r": 8, "model_name_or_path": "m", "reg_orth_coef": 0.0},
        "effective_batch": 32,
        "steps": 8,
        "parameters": {"trainable": 5, "lora": 4, "remaining": 4, "modules": {"q": {"rank": 2, "trainable": 4}}},
        "metrics": {"eval_accuracy": 0.7, "eval_f1": 0.6, "train_runtime": 3.0},
        "history": [{"loss": 0.7, "epoch": 0.5, "step": 2}, *epochs],
        "wall_seconds": 3.5,
    }
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "run.json").write_text(json.dumps(results | {"arguments": {"seed": 2, "lora_r": 8}}))
    (tmp_path / "broken").mkdir()
    path = tmp_path / "broken" / "run.json"
    draw = random.Random(0)
    contents = [json.dumps(swapped(results, draw)).encode() for _ in range(150)]
    for number, content in enumerate([*contents, *mutations(json.dumps(results, indent=1).encode(), 60)]):
        path.write_bytes(content)
        for selection in ("last", "best"):
            page.report(tmp_path, tmp_path / "out", selection)
        assert "lora" in (tmp_path / "out" / "report.md").read_text(), number

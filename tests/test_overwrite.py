"""--overwrite_output_dir removes an earlier run, never what the run reads, and never what a link leads to."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralib.errors import InputError
from loralib.glue.folder import check_inputs_stay


@pytest.fixture
def place(tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> Path:
    """A folder with a model, data, tables and an earlier run, each with names that a run would remove."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    shutil.copytree(mrpc_dir, tmp_path / "data" / "mrpc")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "vocab.json").write_text(
        "".join(f'{{"sentence": "a {i}", "label": {i % 2}}}\n' for i in range(8))
    )
    for name in ("run", "run/checkpoint-1", "run/stage-0", "tables", "data/mrpc"):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in ("adapter.json", "run.json"):
            (tmp_path / name / file).write_text("{}")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | str]:
    """Content of every file, target of every link."""
    return {
        str(p): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if (p.is_symlink() or p.is_file()) and p.name != ".lock"
    }


@pytest.fixture
def call(place: Path, entry_point: Any) -> Callable[..., Any]:
    """call(flag=value, ...): a LoRA run that overwrites its output_dir; paths are given below `place`."""

    def run(folder: str = "AdaLoRA", **flags: Any) -> Any:
        usual = {
            "model_name_or_path": place / "model", "dataset_name": place / "data" / "mrpc", "do_train": True,
            "max_steps": 1, "max_seq_length": 16, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "apply_lora": True, "lora_r": 2, "lora_alpha": 4, "overwrite_output_dir": True,
        }  # fmt: skip
        if folder == "RM-LoRA":
            usual["random_rank"] = 1
        usual |= flags
        return entry_point(folder).main([str(x) for k, v in usual.items() if v is not None for x in (f"--{k}", v)])

    return run


@pytest.mark.parametrize("folder", ["AdaLoRA", "SoRA", "RM-LoRA"])
@pytest.mark.parametrize(
    ("output", "flags", "said"),
    [
        ("model", {}, "is what this run reads, --model_name_or_path"),
        ("model/../model/.", {}, "is what this run reads, --model_name_or_path"),
        ("model/run", {}, "lies in what this run reads, --model_name_or_path"),
        (".", {}, "holds what this run reads, --model_name_or_path"),
        ("data", {}, "holds what this run reads, --dataset_name"),
        ("data/mrpc", {}, "is what this run reads, --dataset_name"),
        ("data/mrpc/out", {}, "lies in what this run reads, --dataset_name"),
        ("run", {"lora_path": "run"}, "is what this run reads, --lora_path"),
        ("run", {"lora_path": "run/adapter.json"}, "holds what this run reads, --lora_path"),
        ("run", {"lora_path": "run/checkpoint-1"}, "holds what this run reads, --lora_path"),
        ("run/stage-0", {"lora_path": "run"}, "lies in what this run reads, --lora_path"),
        ("run", {"tokenizer_name": "run"}, "--tokenizer_name"),
        ("run", {"config_name": "run/checkpoint-1"}, "--config_name"),
        ("tables", {"dataset_name": None, "train_file": "tables/vocab.json"}, "holds .* --train_file"),
        ("tables", {"validation_file": "tables/run.json"}, "holds .* --validation_file"),
        ("tables", {"test_file": "data/../tables/run.json"}, "holds .* --test_file"),
    ],
)
def test_inputs_are_not_removed(folder: str, output: str, flags: Any, said: str, call: Any, place: Path) -> None:
    before = everything(place)
    paths = {k: v and place / v for k, v in flags.items()}
    with pytest.raises(InputError, match=f"^output_dir .* would be cleared .*{said}.*: name another --output_dir.$"):
        call(folder, output_dir=f"{place}/{output}", **paths)
    assert everything(place) == before


def test_links_lead_to_inputs(call: Any, place: Path) -> None:
    (place / "out").mkdir()
    (place / "alias").symlink_to(place / "model")
    (place / "out" / "checkpoint-3").symlink_to(place / "model")
    (place / "farm").mkdir()
    for file in (place / "model").iterdir():
        (place / "farm" / file.name).symlink_to(file)
    before = everything(place)
    for output, flags, said in (
        ("alias", {}, "is what"),
        ("model", {"model_name_or_path": place / "alias"}, "is what"),
        ("alias/run", {}, "lies in"),
        ("out", {"model_name_or_path": place / "out" / "checkpoint-3"}, "holds"),
        ("model", {"model_name_or_path": place / "farm"}, "holds"),
    ):
        with pytest.raises(InputError, match=said):
            call(output_dir=place / output, **flags)
    assert everything(place) == before


def test_paths_as_people_write_them(call: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "model")
    monkeypatch.setenv("HOME", str(place))
    before = everything(place)
    for model, output in ((".", "../model"), ("~/model", "."), ("../model", "~/model"), ("../model", "run")):
        with pytest.raises(InputError, match="--model_name_or_path"):
            call(model_name_or_path=model, output_dir=output)
    assert everything(place) == before


def test_the_file_of_flags_stays(place: Path, entry_point: Any) -> None:
    file = place / "run" / "config.json"
    file.write_text(f'{{"model_name_or_path": "{place / "model"}", "output_dir": "{place / "run"}", "do_train": true}}')
    with pytest.raises(InputError, match="holds what this run reads, the file of flags"):
        entry_point("AdaLoRA").main([str(file), "--overwrite_output_dir", "--task_name", "mrpc"])
    assert file.exists()


def test_neighbours_are_free(place: Path) -> None:
    """A folder beside an input, a table in the working folder, and names of the hub are not a reason to refuse."""
    (place / "models").mkdir()
    (place / "out").mkdir()

    class Flags:
        model_name_or_path, dataset_name, train_file = str(place / "model"), "glue", str(place / "table.csv")

    Path(Flags.train_file).write_text("")
    for output in ("models", "out"):
        check_inputs_stay(str(place / output), [Flags()])


def test_links_are_removed_as_links(call: Any, place: Path) -> None:
    """Only the links of an earlier run's names; what they lead to stays, and the run itself works."""
    kept = place / "kept"
    shutil.copytree(place / "run", kept)
    out = place / "out"
    out.mkdir()
    for name in ("checkpoint-7", "runs", "stage-0"):
        (out / name).symlink_to(kept)
    (out / "run.json").symlink_to(kept / "run.json")
    (out / "adapter.json").symlink_to(place / "nowhere")
    (out / "checkpoint-8" / "deep").mkdir(parents=True)
    (out / "checkpoint-8" / "deep" / "link").symlink_to(kept)
    (out / "mine").symlink_to(kept)
    before = everything(kept)
    call(output_dir=out)
    assert everything(kept) == before
    assert [p.name for p in out.iterdir() if p.is_symlink()] == ["mine"]
    assert (out / "adapter.json").is_file() and not (out / "checkpoint-8").exists()

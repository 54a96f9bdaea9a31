"""SoRA's schedule: a finished stage is taken again only as what it was, and each stage has a record of its own."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file

from loralib.errors import InputError, RunDiverged
from loralib.training.lock import lock, unlock


@pytest.fixture(scope="module")
def flags(tiny_model_dir: Path, mrpc_dir: Path) -> list[str]:
    """Three stages of eight steps, without a folder."""
    values = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "lora_r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "lora_module": "query,value",
        "sparse_lambda": 0.1,
        "sparse_lambda_2": 0.001,
        "lambda_schedule": "linear",
        "max_lambda": 0.003,
        "lambda_num": 3,
        "num_train_epochs": 1,
        "seed": 5,
        "max_seq_length": 16,
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": "True",
    }
    return ["--do_train", "--do_eval", "--apply_lora", "--train_sparse", *(f"--{k}={v}" for k, v in values.items())]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def finished(flags: list[str], entry_point: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "run"
    entry_point("SoRA").main([*flags, f"--output_dir={folder}"])
    return folder


@pytest.fixture
def killed(finished: Path, tmp_path: Path) -> Path:
    """What a kill in the last stage leaves, before its first checkpoint: two finished stages."""
    for name in ("stage-0", "stage-1"):
        shutil.copytree(finished / name, tmp_path / "run" / name)
    return tmp_path / "run"


def same(folder: Path, other: Path) -> bool:
    a, b = (load_file(f / "adapter.safetensors") for f in (folder, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_stage_that_diverges_is_the_divergence_of_the_run(
    flags: list[str], entry_point: Any, finished: Path, tmp_path: Path
) -> None:
    """Sweeps and reports look into the run's folder; the same command with a lower learning rate starts anew there."""
    argv = [*flags, f"--output_dir={tmp_path}", "--save_strategy=no"]
    with pytest.raises(RunDiverged):
        entry_point("SoRA").main([*argv, "--learning_rate=1e30", "--max_grad_norm=0"])
    whole = record(tmp_path)
    assert whole["status"] == "diverged" and whole["seed"] == 5 and whole["arguments"]["learning_rate"] == 1e30
    assert whole["arguments"]["output_dir"] == str(tmp_path)
    entry_point("SoRA").main(argv)
    assert record(tmp_path)["status"] == "finished" and same(tmp_path, finished)


def test_each_stage_has_its_own_arguments_and_seconds(finished: Path) -> None:
    first, second, whole = record(finished / "stage-0"), record(finished / "stage-1"), record(finished)
    assert [r["arguments"]["seed"] for r in (first, second, whole)] == [5, 6, 5]
    assert [r["seed"] for r in (first, second, whole)] == [5, 6, 5]
    assert first["arguments"]["output_dir"].endswith("stage-0") and whole["arguments"]["output_dir"].endswith("run")
    assert first["settings"]["learning_rate"] == first["arguments"]["learning_rate"]
    assert whole["total_seconds"] == whole["wall_seconds"]  # of one process, stages included
    assert second["wall_seconds"] + first["wall_seconds"] <= whole["wall_seconds"]
    assert [point["lambda"] for point in whole["stages"]] == pytest.approx([0.001, 0.002, 0.003])
    assert [point["seconds"] for point in whole["stages"]][:2] == [
        first["metrics"]["train_runtime"],
        second["metrics"]["train_runtime"],
    ]


def test_finished_stages_are_taken(
    killed: Path, finished: Path, flags: list[str], entry_point: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = [(killed / f"stage-{k}" / "run.json").read_bytes() for k in (0, 1)]
    with caplog.at_level(logging.INFO, logger="loralib"):
        entry_point("SoRA").main([*flags, f"--output_dir={killed}"])
    assert "stage-0 is finished" in caplog.text and "stage-1 is finished" in caplog.text
    assert "method: sora, stage 3 of 3 (the run's own folder)" in caplog.text
    assert before == [(killed / f"stage-{k}" / "run.json").read_bytes() for k in (0, 1)]
    assert same(killed, finished) and len(record(killed)["stages"]) == 3
    whole, stages = record(killed), [record(killed / f"stage-{k}") for k in (0, 1)]
    earlier = whole["total_seconds"] - whole["wall_seconds"]
    assert earlier == pytest.approx(sum(stage["total_seconds"] for stage in stages), abs=0.01)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--learning_rate=0.02", "learning_rate was 5e-05, is 0.02"),
        ("--seed=6", "seed was 5, is 6"),
        ("--sparse_lambda_2=0.0015", "sparse_lambda_2 was 0.001, is 0.0015"),
        ("--max_train_samples=48", "max_train_samples was None, is 48"),
        ("--num_train_epochs=2", "num_train_epochs was 1.0, is 2.0"),
        ("--lambda_num=4", "lambda_num was 3, is 4"),
    ],
)
@pytest.mark.parametrize("older", [False, True], ids=["now", "of 409de3b"])
def test_stages_of_other_settings_are_refused(
    change: str, named: str, older: bool, killed: Path, flags: list[str], entry_point: Any
) -> None:
    """Also those whose record has only the flags of the whole run, as 409de3b wrote it."""
    if older:
        for number in (0, 1):
            old = record(killed / f"stage-{number}")
            del old["settings"], old["adapter_sha256"]
            old["arguments"] |= {"seed": 5}
            (killed / f"stage-{number}" / "run.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="stage .*stage-0 belongs to a run with other settings") as caught:
        entry_point("SoRA").main([*flags, change, f"--output_dir={killed}"])
    assert named in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "a list", "a folder", "another adapter", "no adapter"])
def test_a_damaged_stage_is_run_again(
    damage: str, killed: Path, finished: Path, flags: list[str], entry_point: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """From its last checkpoint, to the same end; no traceback, and the log says so."""
    file, adapter = killed / "stage-1" / "run.json", killed / "stage-1" / "adapter.safetensors"
    text = file.read_text()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
        with pytest.raises(InputError, match="run.json is a folder"):
            entry_point("SoRA").main([*flags, f"--output_dir={killed}"])
        return
    if damage == "another adapter":
        content = adapter.read_bytes()
        adapter.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no adapter":
        adapter.unlink()
    else:
        file.write_text({"empty": "", "cut": text[:99], "a list": "[]"}[damage])
    entry_point("SoRA").main([*flags, f"--output_dir={killed}"])
    assert "the stage is run again" in caplog.text and "method: sora, stage 2 of 3 (folder stage-1)" in caplog.text
    assert same(killed, finished) and record(killed / "stage-1")["status"] == "finished"


def test_a_stage_whose_checkpoints_are_damaged_is_refused(killed: Path, flags: list[str], entry_point: Any) -> None:
    (killed / "stage-1" / "run.json").unlink()
    for file in killed.glob("stage-1/checkpoint-*/optimizer.pt"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="stage-1 holds no whole checkpoint .* give --overwrite_output_dir"):
        entry_point("SoRA").main([*flags, f"--output_dir={killed}"])


def hold(folder: str, ready: str) -> None:
    import time

    lock(folder)
    Path(ready).touch()
    time.sleep(60)


def test_a_stage_that_another_process_holds_is_refused(
    killed: Path, flags: list[str], entry_point: Any, tmp_path: Path
) -> None:
    holder = runs.start(hold, str(killed / "stage-1"), str(tmp_path / "ready"))
    while not (tmp_path / "ready").exists():
        assert holder.is_alive()
    try:
        with pytest.raises(InputError, match="stage-1 is in use by another run"):
            entry_point("SoRA").main([*flags, f"--output_dir={killed}"])
    finally:
        holder.kill()
        unlock(killed)

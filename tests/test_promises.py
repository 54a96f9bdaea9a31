"""After each kind of early end, runs the command that the message recommends. Also: which folders are accepted.

Every result is compared bit for bit with that of an undisturbed run.
"""

import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file

from loralib.errors import InputError, RunDiverged
from loralib.glue.folder import UNFINISHED
from loralib.training.lock import open_lock


@pytest.fixture(scope="module")
def usual(tiny_model_dir: Path, mrpc_dir: Path) -> list[str]:
    """Flags of a short run of eight steps, without its folder."""
    values = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "lora_r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "lora_module": "query",
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 2,
        "max_seq_length": 16,
        "report_to": "none",
        "disable_tqdm": "True",
    }
    return ["--do_train", "--do_eval", "--apply_lora", *(f"--{k}={v}" for k, v in values.items())]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def losses(folder: Path) -> list[float]:
    return [log["loss"] for log in record(folder)["history"] if "loss" in log]


def same(folder: Path, other: Path) -> None:
    """Both are finished, with equal adapters and losses, and neither folder is marked as unfinished."""
    a, b = (load_file(f / "adapter.safetensors") for f in (folder, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses(folder) == losses(other)
    assert record(folder)["status"] == "finished" and not (folder / UNFINISHED).exists()


@pytest.fixture(scope="module")
def straight(usual: list[str], entry_point: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    entry_point("AdaLoRA").main([*usual, f"--output_dir={folder / 'run'}"])
    return folder / "run"


def ended(kind: str, argv: list[str], log: Path) -> int | None:
    """Exit status of a run that ends early in the way `kind` before any checkpoint."""
    folder = Path(next(word for word in argv if word.startswith("--output_dir")).partition("=")[2])
    if kind == "disk":
        return runs.finished(runs.start(limited, "AdaLoRA", argv, str(log)))
    if kind == "final save":
        return runs.finished(runs.start(killed_in_final_save, "AdaLoRA", argv, str(log)))
    process = runs.start(slow, "AdaLoRA", argv, str(log))
    until = time.time() + 60
    while not (folder / UNFINISHED).exists():
        assert process.is_alive() and time.time() < until, log.read_text()[-2000:]
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.pid is not None
    signals = {"kill": process.kill, "term": process.terminate}
    signals[kind]() if kind in signals else interrupt(process.pid)
    return runs.finished(process)


def interrupt(pid: int) -> None:
    os.kill(pid, signal.SIGINT)


def limited(entry: str, argv: list[str], log: str) -> None:
    """Files may not grow beyond 11 KiB: less than a random state takes, or the tokenizer; more than the log."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (11 << 10, 11 << 10))
    runs.enter(entry, argv, log)


def killed_in_final_save(entry: str, argv: list[str], log: str) -> None:
    from transformers import DebertaV2Config

    stock = DebertaV2Config.save_pretrained

    def save(self: Any, folder: Any, **kwargs: Any) -> None:
        stock(self, folder, **kwargs)
        signal.raise_signal(signal.SIGKILL)

    DebertaV2Config.save_pretrained = save  # type: ignore[method-assign]
    runs.enter(entry, argv, log)


def slow(entry: str, argv: list[str], log: str) -> None:
    """Long enough to be hit in the first steps."""
    from loralib.trainer import LoRATrainer

    # A shell that starts the tests in its background lets them ignore Ctrl-C, and they hand that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    stock = LoRATrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return stock(self, *args, **kwargs)

    LoRATrainer.training_step = training_step  # type: ignore[method-assign]
    runs.enter(entry, argv, log)


ADVICE = {
    "disk": "the same command starts over",
    "final save": "",
    "kill": "",
    "interrupt": "The same command goes on from the last checkpoint, or starts over if there is none",
    "term": "the same command goes on from the last good checkpoint",
}


@pytest.mark.parametrize("save", ["steps", "no"])
@pytest.mark.parametrize(("kind", "advice"), ADVICE.items())
def test_the_same_command_after_an_early_end(
    kind: str, advice: str, save: str, usual: list[str], straight: Path, entry_point: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = [*usual, f"--output_dir={folder}", f"--save_strategy={save}"]
    status = ended(kind, argv, tmp_path / "log")
    expected = {"disk": 3, "final save": -9, "kill": -9, "interrupt": 130, "term": 143}
    text = (tmp_path / "log").read_text()
    assert status == expected[kind], text[-2000:]
    assert advice in text and "Traceback" not in text
    entry_point("AdaLoRA").main(argv)
    same(folder, straight)


@pytest.mark.parametrize("flags", [["--overwrite_output_dir"], ["--resume_from_checkpoint"]], ids=str)
def test_flags_that_would_lose_the_last_checkpoint_are_to_be_left_out(
    flags: list[str], usual: list[str], straight: Path, entry_point: Any, tmp_path: Path
) -> None:
    """The command with --overwrite_output_dir starts over, the one that names a checkpoint goes back to that."""
    folder = tmp_path / "run"
    argv = [*usual, f"--output_dir={folder}"]
    if flags == ["--resume_from_checkpoint"]:
        shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("checkpoint-8", "run.json"))
        more = [f"{flags[0]}={folder / 'checkpoint-4'}"]
    else:
        more = flags
    assert ended("term", [*argv, *more, "--save_steps=100"], tmp_path / "log") == 143
    text = (tmp_path / "log").read_text()
    advice = f"the same command without {flags[0]} goes on from the last good checkpoint, {folder}/checkpoint-"
    assert advice in text, text[-2000:]
    step = text.partition(advice)[2].split(".")[0]
    entry_point("AdaLoRA").main(argv)
    assert (folder / f"checkpoint-{step}").is_dir()  # which a run that starts over removes
    same(folder, straight)


def test_a_full_disk_under_tensorboard_is_a_sentence(usual: list[str], entry_point: Any, tmp_path: Path) -> None:
    """Its writer is a thread of its own, for whose errors Python prints a traceback."""
    argv = [*usual, f"--output_dir={tmp_path / 'run'}", "--report_to=tensorboard", "--logging_steps=1"]
    status = runs.finished(runs.start(no_events, "AdaLoRA", argv, str(tmp_path / "log")))
    text = (tmp_path / "log").read_text()
    assert status in (0, 3) and "Traceback" not in text, text[-3000:]
    assert "a file of logs could not be written" in text and "No space left on device" in text
    entry_point("AdaLoRA").main(argv)
    assert record(tmp_path / "run")["status"] == "finished"


def no_events(entry: str, argv: list[str], log: str) -> None:
    """No more than the first of TensorBoard's files can be written to."""
    import errno
    import sys

    opened = 0

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal opened
        if event == "open" and "tfevents" in str(arguments[0]) and set(str(arguments[1])) & set("wa"):
            opened += 1
            if opened > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(audited)
    runs.enter(entry, argv, log)


def test_what_a_diverged_run_says(usual: list[str], entry_point: Any, tmp_path: Path) -> None:
    """Without a checkpoint, a lower learning rate is enough; with one, the flag in the message clears the folder."""
    argv = [*usual, f"--output_dir={tmp_path / 'run'}", "--max_grad_norm=0"]
    entry_point("AdaLoRA").main([*argv, f"--output_dir={tmp_path / 'straight'}"])
    for save, flag in (("no", []), ("steps", ["--overwrite_output_dir"])):
        with pytest.raises(RunDiverged, match="start over with --overwrite_output_dir and a lower --learning_rate"):
            entry_point("AdaLoRA").main([*argv, f"--save_strategy={save}", "--save_steps=1", "--learning_rate=1e30"])
        assert record(tmp_path / "run")["status"] == "diverged"
        entry_point("AdaLoRA").main([*argv, *flag])
        same(tmp_path / "run", tmp_path / "straight")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval_strategy=steps", "--eval_steps=1", "--heldout_split=0"],  # noticed by an evaluation before a log
        ["--max_steps=1"],  # by the evaluation at the end: the loss was finite, and its only step was too long
        ["--max_steps=1", "--do_eval=no", "--do_predict"],
    ],
)
def test_nan_outputs_of_a_model_that_was_trained_are_a_divergence(
    flags: list[str], usual: list[str], entry_point: Any, tmp_path: Path
) -> None:
    """As bad input (status 2) a sweep would try that run again with each call, and a tuning would never choose."""
    argv = [*usual, f"--output_dir={tmp_path}", "--max_grad_norm=0", "--learning_rate=1e30", "--warmup_steps=0"]
    with pytest.raises(RunDiverged, match=r"outputs are NaN in \d+ of \d+ rows after step \d: start over with"):
        entry_point("AdaLoRA").main([*argv, "--save_strategy=no", "--logging_steps=100", *flags])
    assert record(tmp_path)["status"] == "diverged"


def test_damaged_checkpoints_are_never_trained_over(
    usual: list[str], straight: Path, entry_point: Any, tmp_path: Path
) -> None:
    """Whatever else is in the folder; and the reason is in the sentence."""
    for left in (["checkpoint-4"], ["checkpoint-4", "checkpoint-8", "run.json"]):
        folder = tmp_path / str(len(left))
        folder.mkdir()
        for name in left:
            source = straight / name
            shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
        for file in folder.glob("checkpoint-*/optimizer.pt"):
            file.write_bytes(file.read_bytes()[:-1])
        before = sorted(p.name for p in folder.rglob("*"))
        with pytest.raises(InputError, match="no whole checkpoint .*optimizer.pt has .* give --overwrite_output_dir"):
            entry_point("AdaLoRA").main([*usual, f"--output_dir={folder}"])
        assert sorted(p.name for p in folder.rglob("*") if p.name != ".lock") == before


def test_a_folder_that_no_unfinished_run_left_is_refused_untouched(
    usual: list[str], straight: Path, entry_point: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A pretrained model, other people's files, the results of an evaluation, a finished run without checkpoints."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    flags = [word for word in usual if word != "--do_train"]
    entry_point("AdaLoRA").main([*flags, f"--lora_path={straight}", f"--output_dir={tmp_path / 'evaluated'}"])
    shutil.copytree(straight, tmp_path / "finished", ignore=shutil.ignore_patterns("checkpoint-*"))
    for name in ("model", "other", "evaluated", "finished"):
        before = {p: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file() and p.name != ".lock"}
        with pytest.raises(InputError, match="no checkpoint to resume from: name another folder"):
            entry_point("AdaLoRA").main([*usual, f"--output_dir={tmp_path / name}"])
        assert before == {p: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("name", [".lock", ".sweep.lock"])
def test_a_lock_file_that_is_a_link_is_refused(name: str, usual: list[str], entry_point: Any, tmp_path: Path) -> None:
    """Its target stays as it is, whether symbolic or hard, and so does a pipe."""
    target = tmp_path / "diary"
    for number, make in enumerate(
        (os.symlink, os.link, lambda _, path: os.mkfifo(path), lambda _, path: os.mkdir(path))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        target.write_text("dear diary")
        make(target, folder / name)
        with pytest.raises(InputError, match="is a link or no plain file.* remove it"):
            if name == ".lock":
                entry_point("AdaLoRA").main([*usual, f"--output_dir={folder}"])
            else:
                open_lock(folder / name)  # as the guard of a sweep's run does
        assert target.read_text() == "dear diary"


def test_a_worker_that_is_killed_is_reported(
    usual: list[str], straight: Path, entry_point: Any, tmp_path: Path
) -> None:
    argv = [*usual, f"--output_dir={tmp_path / 'run'}", "--dataloader_num_workers=1"]
    assert runs.finished(runs.start(kill_worker, "AdaLoRA", argv, str(tmp_path / "log"))) == 3
    text = (tmp_path / "log").read_text()
    assert re.search("error: a process that loads data ended .*the same command goes on from .*checkpoint-4", text), (
        text
    )
    assert "Traceback" not in text and record(tmp_path / "run")["status"] == "failed"
    entry_point("AdaLoRA").main(argv)
    same(tmp_path / "run", straight)


def kill_worker(entry: str, argv: list[str], log: str) -> None:
    """Kill the worker of the loader once checkpoint-4 is written."""
    import multiprocessing

    from loralib.trainer import LoRATrainer

    stock = LoRATrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= 5:
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                time.sleep(0.1)
        return stock(self, *args, **kwargs)

    LoRATrainer.training_step = training_step  # type: ignore[method-assign]
    runs.enter(entry, argv, log)

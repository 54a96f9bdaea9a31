"""What goes wrong in a run is noticed, said in a sentence, and costs no more than it must."""

import errno
import json
import logging
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, TrainerCallback

import loralib.training.checkpoints
import loralib.training.trainer
from loralib.adapt import factors
from loralib.adapters.reading import read_state
from loralib.adapters.writing import disk_errors, new_folder
from loralib.errors import InputError, RunDiverged, RunError
from loralib.glue.folder import UNFINISHED
from loralib.glue.tables import read_file
from loralib.jsonfile import read_json
from loralib.report.tuning import read_record
from loralib.training.lock import lock, unlock
from loralib.training.manifest import last_checkpoint

TRAIN = runs.rows(24)


def make(method: str, folder: Path, train: Any = TRAIN, **changes: Any) -> Any:
    usual = {"max_steps": 8, "save_steps": 2, "logging_steps": 4}
    return runs.trainer(method, runs.arguments(folder, **(usual | changes)), train, runs.rows(3), dropout=0.0)


# ---- not finite ----


class Poison(TrainerCallback):
    """Makes a gradient infinite or a parameter NaN before an optimizer step."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and self.what == "loss":
            model.classifier.bias.data.fill_(float("nan"))
        if state.global_step == self.step - 1 and self.what == "gradient":
            self.hook = model.classifier.bias.register_hook(lambda g: g * float("inf"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_at_the_next_save_without_a_bad_checkpoint(what: str, tmp_path: Path) -> None:
    run = make("svd-lora", tmp_path, logging_steps=100)
    run.add_callback(Poison(3, what))
    with pytest.raises(RunDiverged) as caught:
        run.train()
    message = str(caught.value)
    assert "at step 3 (noticed at step 4, learning rate 0.00" in message
    assert f"the last good checkpoint is {tmp_path}/checkpoint-2." in message
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_not_finite_stops_at_the_next_log(tmp_path: Path) -> None:
    run = make("lora", tmp_path, save_strategy="no", logging_steps=2)
    run.add_callback(Poison(5, "loss"))
    with pytest.raises(RunDiverged, match="at step 5 .noticed at step 6.*no checkpoint was written before"):
        run.train()


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: reading a number off the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Reads.count += str(func).startswith(("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["svd-lora", "adalora", "sora", "rm-lora-v2"])
def test_guards_do_not_read_the_device_between_logs(method: str, tmp_path: Path) -> None:
    run = make(method, tmp_path, save_strategy="no", logging_steps=100, max_steps=6)
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(Reads.count)

    run.add_callback(Count())
    with Reads():
        run.train()
    assert seen[4] - seen[1] == 0, seen


# ---- warnings ----


def test_all_ranks_zero_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No gradient reaches the factors, so all triplets score 0 and fall together."""
    run = make("adalora", tmp_path, save_strategy="no", logging_steps=1)
    for name, p in run.model.named_parameters():
        if "lora_" in name:
            p.register_hook(lambda g: g * 0)
    run.penalty, run.method.penalty_coef = None, 0.0
    with caplog.at_level(logging.WARNING, logger="loralib"):
        run.train()
    assert "the rank of every matrix is 0" in caplog.text


def test_all_gates_zero_warns_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make("sora", tmp_path, save_strategy="no", logging_steps=1, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="loralib"):
        run.train()
        assert "gate" not in caplog.text
        run = make("sora", tmp_path, save_strategy="no", logging_steps=1, max_steps=1)
        for gate in factors(run.model).between:
            gate.data.mul_(1e-3)
        run.train()
    assert "step 1: every gate is 0" in caplog.text


@pytest.mark.parametrize("steps", [12, 4])
def test_nothing_moves_warns(steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loralib"):
        make("lora", tmp_path, save_strategy="no", max_steps=steps).train()
        assert "moved" not in caplog.text
        make("lora", tmp_path, save_strategy="no", max_steps=steps, learning_rate=0.0).train()
    assert f"no trainable parameter has changed by step {min(steps, 10)}: learning_rate is 0" in caplog.text


# ---- odd sizes ----


@pytest.mark.parametrize("method", ["adalora", "sora", "rm-lora-v1"])
def test_auto_find_batch_size_starts_over(method: str, tmp_path: Path) -> None:
    """Batches of 6 and 5 run out of memory in their third step; then it is as if 4 had been asked for."""
    straight = make(method, tmp_path / "a", per_device_train_batch_size=4, max_steps=-1, num_train_epochs=2)
    straight.train()
    found = make(
        method,
        tmp_path / "b",
        per_device_train_batch_size=6,
        max_steps=-1,
        num_train_epochs=2,
        auto_find_batch_size=True,
    )
    if "allocator" in found.method_state:  # the schedule of the batch that is found
        found.method_state["allocator"].warmups = straight.method_state["allocator"].warmups
    stock = found.training_step
    sizes = []

    def training_step(model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        sizes.append(len(inputs["labels"]))
        if found.state.global_step == 2 and sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return stock(model, inputs, *args)

    found.training_step = training_step
    (tmp_path / "b" / "checkpoint-99").mkdir(parents=True)  # not of this run
    found.train()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(
        ["checkpoint-99", *(f"checkpoint-{s}" for s in range(2, 13, 2))]
    )
    assert sizes[:7] == [6] * 3 + [5] * 3 + [4]
    a, b = runs.result(straight), runs.result(found)
    assert runs.differences(a, b) == []
    if "allocator" in found.method_state:
        assert found.method_state["allocator"].total_step == found.state.global_step == 12


def test_a_lack_of_memory_after_a_resume_is_reported(tmp_path: Path) -> None:
    make("lora", tmp_path, auto_find_batch_size=True).train()
    run = make("lora", tmp_path, auto_find_batch_size=True)

    def training_step(*args: Any) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run.training_step = training_step
    with pytest.raises(RunError, match="the batch of .*checkpoint-2 does not fit into memory any more"):
        run.train(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (24, {"max_steps": 5}, 5),
        (24, {"num_train_epochs": 1.5}, 9),  # six steps per epoch
        (24, {"num_train_epochs": 0.4}, 3),  # 2.4, rounded up
        (3, {"num_train_epochs": 2}, 2),  # fewer rows than a batch
        (1, {"num_train_epochs": 1}, 1),
        (22, {"num_train_epochs": 1, "gradient_accumulation_steps": 4}, 2),  # four batches and two
        (22, {"num_train_epochs": 1, "dataloader_drop_last": True}, 5),
    ],
)
def test_number_of_steps(rows: int, changes: dict[str, Any], steps: int, tmp_path: Path) -> None:
    run = make("svd-lora", tmp_path, runs.rows(rows), **({"max_steps": -1, "save_strategy": "no"} | changes))
    assert run.total_steps() == steps
    assert run.train().global_step == steps


def test_nothing_left_of_the_data_is_refused(tmp_path: Path) -> None:
    run = make("lora", tmp_path, runs.rows(3), dataloader_drop_last=True, max_steps=-1, num_train_epochs=1)
    with pytest.raises(InputError, match="3 training rows fill no batch of 4 and --dataloader_drop_last"):
        run.train()


def test_one_class_and_one_row_of_evaluation(tmp_path: Path) -> None:
    same = [row | {"labels": 1} for row in TRAIN]
    run = make("adalora", tmp_path, same, save_strategy="no", logging_steps=1)
    run.train()
    losses = [log["task_loss"] for log in run.state.log_history if "task_loss" in log]
    assert losses[-1] < losses[0]
    assert run.evaluate(runs.rows(1))["eval_loss"] > 0


# ---- disk ----


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the files in turn."""
    names = ["adapter.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "checkpoint.json"]

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in names:
        run = make("lora", tmp_path / name, save_total_limit=1)

        class Fill(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, name: str = name, **kwargs: Any) -> None:
                if state.global_step == 4:
                    stock = torch.save

                    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
                        full() if Path(path).name == name else stock(value, path, *args, **kwargs)

                    monkeypatch.setattr(torch, "save", save)
                    if name == "adapter.safetensors":
                        monkeypatch.setattr(loralib.training.trainer, "save_adapter", full)
                    if name == "trainer_state.json":
                        monkeypatch.setattr(type(state), "save_to_json", full)
                    if name == "checkpoint.json":
                        monkeypatch.setattr(loralib.training.checkpoints, "write_manifest", full)

        run.add_callback(Fill())
        with pytest.raises(
            RunError, match="step 4 could not be written.*No space left on device.*goes on from .*checkpoint-2"
        ):
            run.train()
        assert [p.name for p in (tmp_path / name).glob("checkpoint-*")] == ["checkpoint-2"]
        assert last_checkpoint(tmp_path / name) == tmp_path / name / "checkpoint-2"
        monkeypatch.undo()


def limited(folder: str, argv: list[str], log: str) -> None:
    """An entry point in a process whose files may not grow beyond 12 KiB, so that the real writers fail."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 10, 12 << 10))
    runs.enter(folder, argv, log)


def test_the_real_writers_fail_with_a_sentence(usual: list[str], tmp_path: Path) -> None:
    argv = [*usual, f"--output_dir={tmp_path / 'run'}", "--logging_strategy=no"]
    assert runs.finished(runs.start(limited, "AdaLoRA", argv, str(tmp_path / "log"))) == 3
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert "error: the checkpoint of step 1 could not be written" in text and "no checkpoint was written before" in text
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("full", [Exception, SafetensorError, RuntimeError], ids=lambda e: e.__name__)
def test_a_disk_that_is_full_at_the_end_is_reported(
    full: type[Exception], usual: list[str], entry_point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writers of the last files have exceptions of their own; tokenizers' is plain Exception."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise full("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(RunError, match="run could not be written to .No space left on device.*goes on from the last"):
        entry_point("AdaLoRA").main([*usual, f"--output_dir={tmp_path / 'run'}"])
    monkeypatch.undo()
    entry_point("AdaLoRA").main([*usual, f"--output_dir={tmp_path / 'run'}"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


NOT_OF_THE_DISK = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: device-side assert triggered"),
    NotImplementedError("Cannot copy out of meta tensor; no data!"),
    SafetensorError("Error while serializing: invalid shape"),
]


@pytest.mark.parametrize("error", NOT_OF_THE_DISK, ids=lambda e: type(e).__name__)
def test_another_error_in_saving_is_not_reported_as_one_of_the_disk(error: Exception, tmp_path: Path) -> None:
    """Neither by a checkpoint, which is removed, nor by the result, nor by an export."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    run = make("lora", tmp_path / "run")
    run._save_optimizer_and_scheduler = fail
    with pytest.raises(type(error)) as caught:
        run.train()
    assert caught.value is error and not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(type(error)), disk_errors():
        fail()
    with pytest.raises(type(error)), new_folder(tmp_path / "export"):
        fail()
    assert not (tmp_path / "export").exists()


def test_what_the_libraries_raise_when_they_cannot_write_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """The real writers, into a folder that is missing; into a full one in the test with limited files."""
    gone, tensor = tmp_path / "gone", torch.zeros(3)
    tokenizer = Tokenizer(WordLevel({"a": 0}, "a"))
    for write in (
        lambda: torch.save(tensor, gone / "a"),
        lambda: save_file({"a": tensor}, gone / "a"),
        lambda: tokenizer.save(str(gone / "a")),
        lambda: (gone / "a").write_text("a"),
    ):
        with pytest.raises(OSError, match="(?i)no such file|does not exist"), disk_errors():
            write()


@pytest.mark.parametrize(("number", "way"), [(errno.ENOSPC, "make room, and"), (errno.EROFS, "make it writable, and")])
def test_a_checkpoint_that_cannot_be_written_names_the_way_out(number: int, way: str, tmp_path: Path) -> None:
    run = make("lora", tmp_path)

    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    run._save_optimizer_and_scheduler = fail
    with pytest.raises(RunError, match=f"step 2 could not be written to .*checkpoint-2 .*{way} the same command"):
        run.train()


def test_an_error_of_the_system_that_names_no_file_does_not_blame_the_output_folder(
    usual: list[str], entry_point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("loralib.training.trainer.LoRATrainer.training_step", fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        entry_point("AdaLoRA").main([*usual, f"--output_dir={tmp_path / 'run'}"])


@pytest.fixture
def usual(tiny_model_dir: Path, mrpc_dir: Path) -> list[str]:
    """Flags of a short run, without its folder."""
    values = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "lora_r": 2,
        "lora_alpha": 4,
        "lora_module": "query",
        "max_steps": 2,
        "save_steps": 1,
        "max_seq_length": 16,
        "report_to": "none",
        "disable_tqdm": "True",
    }
    return ["--do_train", "--apply_lora", *(f"--{k}={v}" for k, v in values.items())]


@pytest.mark.parametrize("writer", ["card.write_card", "_write_to_board"])
def test_a_disk_that_is_full_after_the_record_costs_no_more_than_a_warning(
    writer: str, usual, entry_point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"loralib.glue.train.{writer}", full)
    with caplog.at_level(logging.WARNING, logger="loralib"):
        entry_point("AdaLoRA").main([*usual, "--output_dir", str(tmp_path / "run")])
    assert "the run is finished and recorded, but the model card or TensorBoard's results" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert not (tmp_path / "run" / UNFINISHED).exists()


def test_a_folder_that_takes_no_files_is_refused_before_anything_is_loaded(usual, entry_point, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file: name a folder"):
        entry_point("AdaLoRA").main([*usual, f"--output_dir={tmp_path / 'file'}"])
    with pytest.raises(InputError, match="cannot be written to .Not a directory.: name a folder"):
        entry_point("AdaLoRA").main([*usual, f"--output_dir={tmp_path / 'file' / 'run'}"])
    with pytest.raises(InputError, match="cannot be written to"):
        entry_point("AdaLoRA").main([*usual, "--output_dir=/proc/self/run"])


@pytest.mark.parametrize("name", ["a b", "日本 é", "two\nlines", "-dash", "checkpoint-7", "100%"])
def test_odd_names_of_folders(name: str, usual, entry_point, tmp_path: Path) -> None:
    folder = tmp_path / name
    entry_point("AdaLoRA").main([*usual, f"--output_dir={folder}"])
    (folder / "run.json").unlink()
    entry_point("AdaLoRA").main([*usual, f"--output_dir={folder}"])  # goes on from its end
    assert json.loads((folder / "run.json").read_text())["steps"] == 2


# ---- two runs, one folder ----


def hold(folder: str, ready: str) -> None:
    lock(folder)
    Path(ready).write_text(str(os.getpid()))
    time.sleep(60)


def test_the_second_run_in_a_folder_is_refused_until_the_first_is_gone(usual, entry_point, tmp_path: Path) -> None:
    """Also when the first is killed: the kernel lets go of its lock."""
    folder, ready = tmp_path / "run", tmp_path / "ready"
    holder = runs.start(hold, str(folder), str(ready))
    while not ready.exists() or not ready.read_text():
        time.sleep(0.01)
    argv = [*usual, f"--output_dir={folder}"]
    with pytest.raises(InputError, match=f"in use by another run .process {ready.read_text()} on .*wait for its end"):
        entry_point("AdaLoRA").main(argv)
    holder.kill()
    holder.join()
    entry_point("AdaLoRA").main(argv)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    lock(folder)  # the run let go of it, and one process may take it twice
    lock(folder)
    unlock(folder)


def test_what_a_run_leaves_that_was_killed_before_its_first_checkpoint(usual, entry_point, tmp_path: Path) -> None:
    """TensorBoard files, a lock, half a checkpoint: the same command starts over. Anything else is refused."""
    folder = tmp_path / "run"
    (folder / "runs").mkdir(parents=True)
    (folder / ".lock").write_text("process 1 on nowhere\n")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"PK")
    entry_point("AdaLoRA").main([*usual, f"--output_dir={folder}"])
    assert json.loads((folder / "run.json").read_text())["steps"] == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no checkpoint"):
        entry_point("AdaLoRA").main([*usual, f"--output_dir={other}"])
    entry_point("AdaLoRA").main([*usual, f"--output_dir={other}", "--overwrite_output_dir"])
    assert (other / "thesis.tex").exists()


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter, a table and the record of a tuning: the message names the system's reason and no other."""
    for name in ("adapter.safetensors", "adapter.json", "rows.csv", "tuning.json"):
        (tmp_path / name).write_text("{}")

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, denied)
    monkeypatch.setattr("loralib.adapters.reading.load_file", denied)
    for read in (
        lambda: read_state(tmp_path / "adapter.safetensors"),
        lambda: read_json(tmp_path / "adapter.json"),
        lambda: read_file(tmp_path / "rows.csv", None, "train"),
        lambda: read_record(tmp_path / "tuning.json"),
    ):
        with pytest.raises(InputError, match=r"cannot be (read|opened) \(Permission denied\): make it readable\.$"):
            read()

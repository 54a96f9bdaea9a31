"""A run that was stopped, however it was stopped, ends as the run that was not: bitwise, or it says why it cannot."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from loralib.errors import InputError, RunInterrupted
from loralib.glue.flags import GlueTrainingArguments
from loralib.training.manifest import (
    MANIFEST,
    last_checkpoint,
    parse_manifest,
    read_manifest,
    rotate,
    write_manifest,
)
from loralib.training.sampling import check_loading

# Three steps per epoch: 22 rows in batches of 4, the last of 2, accumulated by twos. Eight steps end within the third.
STEPS = {"num_train_epochs": 3.0, "max_steps": 8, "gradient_accumulation_steps": 2, "save_steps": 1}
TRAIN, EVALUATION = runs.rows(22), runs.rows(9)
SETTINGS: dict[str, dict[str, Any]] = {
    "evaluation per epoch": {"eval_strategy": "epoch"},
    "length grouping": {"train_sampling_strategy": "group_by_length", "logging_strategy": "epoch"},
    "evaluation per step": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "logging_first_step": True,
    },
}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make(method: str, folder: Path, **changes: Any) -> Any:
    mine = {k: changes.pop(k) for k in ("lora_r", "resample", "modules") if k in changes}
    args = runs.arguments(folder, **(STEPS | changes))
    return runs.trainer(method, args, TRAIN, EVALUATION, compute_metrics=accuracy, **mine)


def check_resumes(method: str, folder: Path, points: list[int], **changes: Any) -> None:
    straight = make(method, folder / "straight", **changes)
    straight.train()
    expected = runs.result(straight)
    assert any("loss" in log for log in expected["history"])
    for step in points:
        resumed = make(method, folder / "resumed", **(changes | {"save_strategy": "no"}))
        resumed.train(str(folder / "straight" / f"checkpoint-{step}"))
        assert runs.differences(expected, runs.result(resumed)) == [], f"resumed at step {step}"


# 2: within an epoch, between two logs; 3: the last step of an epoch, before its evaluation; 6: and of AdaLoRA's final
# phase; 8: nothing is left to train, in the middle of an epoch.
@pytest.mark.parametrize("method", runs.METHODS)
def test_a_resumed_run_equals_the_straight_one(method: str, tmp_path: Path) -> None:
    check_resumes(method, tmp_path, [2, 3, 6, 8], eval_strategy="epoch")


@pytest.mark.parametrize("setting", ["length grouping", "evaluation per step"])
def test_resume_is_exact_with_other_samplers_and_strategies(setting: str, tmp_path: Path) -> None:
    check_resumes("rm-lora-v2", tmp_path, [4, 6, 7], resample="epoch", **SETTINGS[setting])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", runs.METHODS)
def test_from_every_step_in_every_setting(method: str, setting: str, tmp_path: Path) -> None:
    for resample in ("step", "epoch") if method.startswith("rm-lora") else ("step",):
        check_resumes(method, tmp_path / resample, list(range(1, 9)), resample=resample, **SETTINGS[setting])


def test_penalty_and_train_loss_are_those_of_the_whole_run(tmp_path: Path) -> None:
    """The sums behind the logs, checked against a run that logs every step."""
    every = make("svd-lora", tmp_path / "every", logging_steps=1)
    every.train()
    steps = [log for log in every.state.log_history if "loss" in log]
    make("svd-lora", tmp_path / "a", logging_steps=4).train()
    resumed = make("svd-lora", tmp_path / "b", logging_steps=4)
    resumed.train(str(tmp_path / "a" / "checkpoint-3"))
    log = next(log for log in resumed.state.log_history if log.get("step") == 4)
    for name in ("orth_regu_loss", "loss", "task_loss"):
        assert log[name] == pytest.approx(sum(s[name] for s in steps[:4]) / 4, rel=1e-5)
    train_loss = resumed.state.log_history[-1]["train_loss"]
    assert train_loss == pytest.approx(sum(s["loss"] for s in steps) / 8, rel=1e-5)


def test_early_stopping_stays_stopped(tmp_path: Path) -> None:
    """The best metric is that of step 1: with patience 1 the run ends at step 2, also when its end is run again."""

    def run(folder: Path, checkpoint: Path | None) -> Any:
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_constant", "greater_is_better": True}
        trainer = make("lora", folder, eval_strategy="steps", eval_steps=1, **best)
        trainer.compute_metrics = lambda prediction: {"constant": 1.0}
        trainer.add_callback(EarlyStoppingCallback(1))
        trainer.train(str(checkpoint) if checkpoint else None)
        return trainer

    straight = run(tmp_path / "straight", None)
    assert straight.state.global_step == 2
    again = run(tmp_path / "straight", tmp_path / "straight" / "checkpoint-2")
    assert again.state.global_step == 2
    assert runs.differences(runs.result(straight), runs.result(again)) == []


# ---- how rows are loaded ----

# Of each dataloader and accelerator setting a value that is not the default, and what it is: exact, or refused in every
# run (refused) or with several processes (refused there). A slow value is tried in the slow tests.
LOADING: dict[str, tuple[Any, str]] = {
    "dataloader_drop_last": (True, "exact"),
    "dataloader_num_workers": (2, "exact"),
    "dataloader_pin_memory": (False, "exact"),
    "dataloader_persistent_workers": (True, "exact"),
    "dataloader_prefetch_factor": (3, "exact"),
    "dataloader_multiprocessing_context": ("fork", "exact"),
    "dataloader_in_order": (False, "refused"),
    "split_batches": (True, "refused there"),
    "dispatch_batches": (True, "refused there"),
    "even_batches": (False, "refused there"),
    "use_seedable_sampler": (False, "refused"),
    "non_blocking": (True, "exact"),
    "gradient_accumulation_kwargs": ({"sync_each_batch": True}, "refused"),
    "use_configured_state": (True, "refused"),
}
WORKERS = ("persistent_workers", "prefetch_factor", "multiprocessing_context")


def loading(name: str) -> dict[str, Any]:
    value = LOADING[name][0]
    if not name.startswith("dataloader_"):
        return {"accelerator_config": {name: value}}
    return {name: value} | ({"dataloader_num_workers": 1} if name.endswith(WORKERS) else {})


def test_every_setting_of_loading_stands_in_the_table() -> None:
    """In the one above, and in docs/running.md."""
    fields = [f.name for f in dataclasses.fields(TrainingArguments) if f.name.startswith("dataloader_")]
    fields += [f.name for f in dataclasses.fields(AcceleratorConfig)]
    assert sorted(fields) == sorted(LOADING)
    says = {"exact": "exact", "refused": "refused", "refused there": "exact; refused with several processes"}
    rows = []
    for name, (value, state) in LOADING.items():
        flag = f"`--{name} {value}`" if name.startswith("dataloader_") else f"`{json.dumps({name: value})}`"
        rows.append(f"| {flag} | {says[state]} |")
    table = "\n".join(rows)
    assert table in (runs.ROOT / "docs" / "running.md").read_text(), table


def test_each_repair_of_exact_resume_is_marked_and_listed() -> None:
    """docs/running.md has a row for each comment "exact resume:" in the code."""
    code = [file.read_text() for file in (runs.ROOT / "loralib" / "training").glob("*.py")]
    page = (runs.ROOT / "docs" / "running.md").read_text()
    rows = page.split("| the stock Trainer | here |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) == sum(text.count("# exact resume: ") for text in code) >= 10


@pytest.mark.parametrize("name", [name for name, (_, state) in LOADING.items() if state != "refused"])
def test_ways_of_loading_resume_exactly(name: str, tmp_path: Path) -> None:
    """Within an epoch and at its end, with evaluations, whose loaders may have workers that stay too."""
    check_resumes("lora", tmp_path, [2, 3, 6], eval_strategy="epoch", **loading(name))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_resume_is_exact_with_workers_that_import_everything_again(context: str, tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": context}
    check_resumes("lora", tmp_path, [3], eval_strategy="epoch", **workers)


@pytest.mark.parametrize("name", [name for name, (_, state) in LOADING.items() if state != "exact"])
def test_ways_of_loading_that_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if LOADING[name][1] == "refused there":
        check_loading(runs.arguments(tmp_path, **loading(name)))
        monkeypatch.setattr(GlueTrainingArguments, "world_size", 2)
    with pytest.raises(InputError, match=f"{name}.* is not supported: .*; leave it out"):
        check_loading(runs.arguments(tmp_path, **loading(name)))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("lora", {}, "method was 'adalora', is 'lora'"),
        ("adalora", {"lora_r": 6}, "lora_r was 4, is 6"),
        ("adalora", {"modules": ["query", "value"]}, "modules: 12 then, 4 now, without deberta.encoder.layer.0"),
        ("adalora", {"max_steps": 12}, "max_steps was 8, is 12"),
        ("adalora", {"learning_rate": 0.02, "seed": 4}, "learning_rate was 0.01, is 0.02; seed was 3, is 4"),
        ("adalora", {"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4, is 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    method: str, changes: dict[str, Any], named: str, adalora_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="belongs to a run with other settings") as caught:
        make(method, tmp_path, **changes).train(str(adalora_run / "checkpoint-4"))
    assert named in str(caught.value)


def test_a_checkpoint_of_another_pretrained_model_or_other_rows_is_refused(adalora_run: Path, tmp_path: Path) -> None:
    """Of the same name and sizes: nothing else would tell."""
    run = make("adalora", tmp_path)
    with torch.no_grad():
        run.model.deberta.encoder.layer[0].output.dense.weight.mul_(1.1)
    with pytest.raises(InputError, match="checkpoint-4 was trained on another pretrained model"):
        run.train(str(adalora_run / "checkpoint-4"))
    run = make("adalora", tmp_path)
    run.train_dataset = [TRAIN[0] | {"labels": 1 - TRAIN[0]["labels"]}, *TRAIN[1:]]
    with pytest.raises(InputError, match="train_data was '"):
        run.train(str(adalora_run / "checkpoint-4"))


def test_a_checkpoint_of_more_processes_is_refused_with_the_reason(adalora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(adalora_run / "checkpoint-4", tmp_path / "checkpoint-4")
    manifest = read_manifest(tmp_path / "checkpoint-4")
    manifest["settings"]["world_size"] = 2
    write_manifest(tmp_path / "checkpoint-4", {name: manifest[name] for name in ("step", "settings", "progress")})
    with pytest.raises(InputError, match="world_size was 2, is 1.*would deal other rows"):
        make("adalora", tmp_path).train(str(tmp_path / "checkpoint-4"))


@pytest.fixture(scope="module")
def adalora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an AdaLoRA run with checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("adalora")
    make("adalora", folder, save_steps=4).train()
    return folder


def test_what_a_method_needs_is_in_the_checkpoint_without_pickle(adalora_run: Path) -> None:
    state = load_file(adalora_run / "checkpoint-4" / "method_state.safetensors")
    assert sum(k.startswith("allocator/importance.") for k in state) == 3 * 12
    manifest = json.loads((adalora_run / "checkpoint-4" / MANIFEST).read_text())
    assert manifest["version"] == 2 and manifest["step"] == 4
    assert sum(json.loads((adalora_run / "checkpoint-4" / "adapter.json").read_text())["ranks"].values()) <= 48


def test_every_damage_is_noticed_and_the_checkpoint_before_is_taken(
    adalora_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each file of the newest checkpoint in turn is missing, cut, or has one bit changed."""
    names = sorted(p.name for p in (adalora_run / "checkpoint-8").iterdir())
    assert {MANIFEST, "adapter.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        for damage in ("missing", "cut", "bit"):
            folder = tmp_path / f"{damage}-{name}"
            shutil.copytree(adalora_run, folder)
            path = folder / "checkpoint-8" / name
            content = path.read_bytes()
            if damage == "missing":
                path.unlink()
            elif damage == "cut":
                path.write_bytes(content[: len(content) // 2])
            else:
                middle = len(content) // 2
                path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="loralib"):
                assert last_checkpoint(folder) == folder / "checkpoint-4"
            assert "checkpoint-8 is " in caplog.text and (name in caplog.text), caplog.text


def test_every_bit_of_the_manifest_is_vouched_for(adalora_run: Path) -> None:
    folder = adalora_run / "checkpoint-4"
    content = (folder / MANIFEST).read_bytes()
    assert parse_manifest(folder, content)["step"] == 4
    taken = []
    for place in range(len(content)):
        for bit in range(8):
            flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
            with contextlib.suppress(InputError):
                parse_manifest(folder, flipped)
                taken.append((place, bit))
    assert len(content) > 2000 and taken == []


def test_newer_format_is_refused(adalora_run: Path, tmp_path: Path) -> None:
    """With or without a checksum of this format's kind."""
    manifest = json.loads((adalora_run / "checkpoint-4" / MANIFEST).read_text())
    manifest["version"] = 3
    (tmp_path / "checkpoint-4").mkdir()
    before = json.dumps({k: v for k, v in manifest.items() if k != "own_sha256"}, indent=1).removesuffix("\n}")
    whole = before + f',\n "own_sha256": "{hashlib.sha256(before.encode()).hexdigest()}"\n}}\n'
    for text in (before + "\n}", whole):
        (tmp_path / "checkpoint-4" / MANIFEST).write_text(text)
        with pytest.raises(InputError, match="format 3, this code reads up to 2"):
            read_manifest(tmp_path / "checkpoint-4")


def test_a_checkpoint_is_hashed_once(adalora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked for; and again when a file of it changes, even if only its content changes."""
    shutil.copytree(adalora_run, tmp_path / "run")
    hashed = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: hashed.append(Path(file.name).name) or real(file, name)
    )
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-8"
    make("adalora", tmp_path / "run").train(str(tmp_path / "run" / "checkpoint-8"))
    files = read_manifest(tmp_path / "run" / "checkpoint-8")["files"]
    assert sorted(hashed) == sorted(files)
    optimizer = tmp_path / "run" / "checkpoint-8" / "optimizer.pt"
    content, before = optimizer.read_bytes(), optimizer.stat()
    optimizer.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
    os.utime(optimizer, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_older_checkpoints_go_only_after_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    import loralib.training.checkpoints

    write = loralib.training.checkpoints.write_manifest

    def observed(folder: Path, content: Any) -> None:
        seen[folder.name] = sorted(p.name for p in folder.parent.glob("checkpoint-*") if (p / MANIFEST).exists())
        write(folder, content)

    monkeypatch.setattr(loralib.training.checkpoints, "write_manifest", observed)
    make("lora", tmp_path, save_steps=2, save_total_limit=1).train()
    assert seen == {f"checkpoint-{s}": [f"checkpoint-{s - 2}"] if s > 2 else [] for s in (2, 4, 6, 8)}
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_clock_that_was_set_back_loses_no_checkpoint(tmp_path: Path) -> None:
    """Older checkpoints are those of lower steps, whatever their times say."""
    make("lora", tmp_path, save_steps=2, max_steps=4).train()
    for step in (10, 9):
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))  # the newest steps look oldest
    rotate(tmp_path / "checkpoint-10", 2, str(tmp_path / "checkpoint-2"))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-2"]


def test_half_written_checkpoints_do_not_count_towards_the_limit(tmp_path: Path) -> None:
    """A killed run has left three of them, one beyond the newest: none takes the place of a good one."""
    make("lora", tmp_path, save_steps=2).train()
    for step in (3, 5, 90):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_text("cut off")
    rotate(tmp_path / "checkpoint-8", None, None)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 7  # without a limit nothing is removed
    rotate(tmp_path / "checkpoint-8", 3, None)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    (tmp_path / "checkpoint-9").mkdir()
    rotate(tmp_path / "checkpoint-8", 2, str(tmp_path / "checkpoint-4"))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


def test_what_is_being_removed_is_renamed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed in the middle of a removal leaves no half checkpoint, and the next run clears up."""
    make("lora", tmp_path, save_steps=2).train()

    class Killed(BaseException):
        pass

    def die(path: Path, **kwargs: Any) -> None:
        if Path(path).exists():
            (Path(path) / "optimizer.pt").unlink()
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(Killed):
        rotate(tmp_path / "checkpoint-8", 2, None)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert [p.name for p in tmp_path.glob(".*")] == [".checkpoint-2.removed"]
    make("lora", tmp_path, save_steps=2).train(str(tmp_path / "checkpoint-8"))
    assert list(tmp_path.glob(".*")) == []


def test_steps_of_logs_saves_and_evaluations_may_change_on_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The new ones hold from the checkpoint on, and the log says so. Logs and saves change no parameter; an evaluation
    draws from the random state."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 4}
    straight = make("lora", tmp_path / "a", logging_steps=4, **evaluation)
    straight.train()
    same = make("lora", tmp_path / "c", logging_steps=1, save_steps=3, **evaluation)
    same.train(str(tmp_path / "a" / "checkpoint-4"))
    ends = runs.result(same)["state"], runs.result(straight)["state"]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    changed = make("lora", tmp_path / "b", logging_steps=1, save_steps=3, **(evaluation | {"eval_steps": 2}))
    with caplog.at_level(logging.INFO, logger="loralib"):
        changed.train(str(tmp_path / "a" / "checkpoint-4"))
    assert sorted(p.name for p in (tmp_path / "b").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert [log["step"] for log in changed.state.log_history if "loss" in log] == [4, 5, 6, 7, 8]
    assert [log["step"] for log in changed.state.log_history if "eval_loss" in log] == [4, 6, 8]
    for name, before, now in (("logging", 4, 1), ("eval", 4, 2), ("save", 1, 3)):
        assert f"{name}_steps was {before} until the checkpoint and is {now} from here on" in caplog.text


# ---- SIGTERM ----


class Terminate(TrainerCallback):
    """A cluster's pre-emption, which comes while a step is computed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [2, 3, 8])  # within an epoch, at its end (evaluated first), at the very end
def test_sigterm_finishes_the_step_and_saves(step: int, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    straight = make("sora", tmp_path / "straight", eval_strategy="epoch", save_strategy="no")
    straight.train()
    stopped = make("sora", tmp_path / "stopped", eval_strategy="epoch", save_strategy="no")
    stopped.add_callback(Terminate(step))
    with pytest.raises(
        RunInterrupted, match=f"after step {step} of 8: the same command goes on from .*checkpoint-{step}"
    ):
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make("sora", tmp_path / "stopped", eval_strategy="epoch", save_strategy="no")
    resumed.train(str(tmp_path / "stopped" / f"checkpoint-{step}"))
    assert runs.differences(runs.result(straight), runs.result(resumed)) == []


# ---- killed ----


@pytest.fixture(scope="module")
def flags(tiny_model_dir: Path, mrpc_dir: Path) -> list[str]:
    values = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "lora_type": "svd",
        "target_rank": 2,
        "init_warmup": 2,
        "final_warmup": 3,
        "mask_interval": 2,
        "reg_orth_coef": 0.1,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "max_seq_length": 32,
        "logging_steps": 3,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": "True",
    }
    return ["--do_train", "--do_eval", "--apply_lora", "--apply_adalora", *(f"--{k}={v}" for k, v in values.items())]


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    clock = ("_runtime", "_per_second")
    history = [{k: v for k, v in log.items() if not k.endswith(clock)} for log in record["history"]]
    for stage in record.get("stages", []):
        history.append({k: v for k, v in stage.items() if k not in ("metrics", "seconds")})
    return load_file(folder / "adapter.safetensors"), history


def run_and_kill(flags: list[str], folder: Path, kills: int, seed: int, entry: str = "AdaLoRA") -> dict[str, int]:
    """Kill a run `kills` times by SIGKILL, half of them at an operation on a checkpoint's file, half at any moment."""
    draw = random.Random(seed)
    count = folder / "operations"
    runs.finished(runs.start(time.sleep, 0))  # the server that processes are forked from is there
    began = time.time()
    status = runs.finished(
        runs.start(runs.enter, entry, [*flags, f"--output_dir={folder / 'straight'}"], f"{folder}/log", 0, str(count))
    )
    assert status == 0, (folder / "log").read_text()[-3000:]
    seconds, operations = time.time() - began, int(count.read_text())
    tensors, history = outcome(folder / "straight")
    done = {"file": 0, "clock": 0, "finished": 0}
    while (killed := done["file"] + done["clock"]) < kills or not done["finished"]:
        output = folder / f"killed-{done['finished']}"
        die_at = draw.randint(1, operations) if killed < kills and done["file"] <= done["clock"] else 0
        process = runs.start(runs.enter, entry, [*flags, f"--output_dir={output}"], f"{folder}/log", die_at)
        if killed < kills and not die_at:
            process.join(draw.uniform(0.1, 0.9) * seconds)
            process.kill()
        status = runs.finished(process)
        assert status in (0, -signal.SIGKILL), (folder / "log").read_text()[-3000:]
        if status:
            done["file" if die_at else "clock"] += 1
            continue
        done["finished"] += 1
        found, logs = outcome(output)
        assert all(torch.equal(found[k], tensors[k]) for k in tensors) and logs == history
    return done


def test_killed_three_times(flags: list[str], tmp_path: Path) -> None:
    run_and_kill(flags, tmp_path, 3, seed=1)


@pytest.mark.slow
def test_killed_twenty_times(flags: list[str], tmp_path: Path) -> None:
    print(run_and_kill(flags, tmp_path, 20, seed=2))
    assert "half-written" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_killed_in_a_schedule_of_stages(flags: list[str], tmp_path: Path) -> None:
    """SoRA's thresholds, each a run of its own that goes on from the one before."""
    drop = (
        "target_rank",
        "init_warmup",
        "final_warmup",
        "mask_interval",
        "lora_type",
        "reg_orth_coef",
        "apply_adalora",
    )
    kept = [f for f in flags if f.split("=")[0].lstrip("-") not in drop]
    schedule = {"lambda_schedule": "linear", "sparse_lambda_2": 0.01, "max_lambda": 0.04, "lambda_num": 3}
    kept += [
        "--train_sparse",
        *(f"--{k}={v}" for k, v in schedule.items()),
        "--lambda_epochs=1",
        "--num_train_epochs=1",
    ]
    print(run_and_kill(kept, tmp_path, 10, seed=3, entry="SoRA"))


@pytest.mark.slow
def test_killed_at_each_operation_on_a_checkpoint(flags: list[str], tmp_path: Path) -> None:
    """Every one of the operations that write and rotate two checkpoints, in turn."""
    flags = [*flags, "--max_steps=6", "--save_total_limit=1", "--init_warmup=1", "--final_warmup=1"]
    arguments = [*flags, f"--output_dir={tmp_path / 'straight'}"]
    assert runs.finished(runs.start(runs.enter, "AdaLoRA", arguments, f"{tmp_path}/log", 0, f"{tmp_path}/n")) == 0
    operations = int((tmp_path / "n").read_text())
    tensors, history = outcome(tmp_path / "straight")
    for die_at in range(1, operations + 1):
        arguments = [*flags, f"--output_dir={tmp_path / str(die_at)}"]
        process = runs.start(runs.enter, "AdaLoRA", arguments, f"{tmp_path}/log", die_at)
        assert runs.finished(process) == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
        again = runs.finished(runs.start(runs.enter, "AdaLoRA", arguments, f"{tmp_path}/log"))
        assert again == 0, (die_at, (tmp_path / "log").read_text()[-3000:])
        found, logs = outcome(tmp_path / str(die_at))
        assert all(torch.equal(found[k], tensors[k]) for k in tensors) and logs == history, die_at
    print(operations)


@pytest.mark.parametrize("loaders", [0, 2])
def test_sigterm_ends_the_command_with_143_and_it_goes_on(loaders: int, flags: list[str], tmp_path: Path) -> None:
    """Also if every process of the run gets the signal, as some clusters send it. None of them stays."""
    workers = [f"--dataloader_num_workers={loaders}", "--dataloader_persistent_workers=True"] if loaders else []
    arguments = [*flags, *workers, f"--output_dir={tmp_path / 'run'}", "--num_train_epochs=500", "--save_strategy=no"]
    process = runs.start(runs.enter, "AdaLoRA", arguments, str(tmp_path / "log"))
    deadline = time.time() + 60
    while "'loss'" not in (text := (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
        assert process.is_alive() and time.time() < deadline, text[-3000:]
        time.sleep(0.02)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) == 1 + loaders
    for member in reversed(family):
        member.terminate()
    assert runs.finished(process, 60) == 143
    assert not psutil.wait_procs(family, timeout=10)[1]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted" and record["steps"] > 0
    advice = f"the same command goes on from the last good checkpoint, {tmp_path}/run/checkpoint-{record['steps']}."
    assert advice in (tmp_path / "log").read_text()


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_the_method_measures_each_step_that_is_logged_by_its_number(strategy: str, tmp_path: Path) -> None:
    """The first one too, with --logging_first_step. No step is known beforehand to be logged as an epoch's last."""
    run = make("lora", tmp_path, logging_strategy=strategy, logging_first_step=True, save_strategy="no")
    measured: list[int] = []
    run.method.before_step = lambda step, epoch=0, measure=False: measured.extend([step + 1] if measure else [])
    run.train()
    logged = [e["step"] for e in run.state.log_history if "loss" in e]
    assert logged[0] == 1 and measured == (logged if strategy == "steps" else [1])

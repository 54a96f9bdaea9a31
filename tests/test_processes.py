"""Two processes compute what one does with the same global batch: parameters, logs, evaluation, files, resuming.

Two gloo processes run all cases once for the module; the same cases in this one process are what they are held against.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from loralib.errors import RunDiverged, RunInterrupted
from loralib.training.sampling import LengthGroupedSampler

# 43 rows and a global batch of 8: the last one of an epoch has 3 rows, all for the first process.
TRAIN, EVALUATION = runs.rows(43), runs.rows(9)
STEPS = 20
EXACT: dict[str, dict[str, Any]] = {m: {"method": m} for m in runs.METHODS} | {
    "accumulated": {"method": "svd-lora", "gradient_accumulation_steps": 2},
    "class weights": {"method": "lora", "gradient_accumulation_steps": 2, "class_weights": [0.5, 3.0]},
    "dropping the last batch": {"method": "lora", "dataloader_drop_last": True},
}


def make(case: dict[str, Any], folder: Path, processes: int, **changes: Any) -> Any:
    args = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "eval_strategy": "epoch",
        **{k: v for k, v in case.items() if k not in ("method", "class_weights")},
        **changes,
    }
    if processes > 1:
        args["ddp_backend"] = "gloo"

    def metrics(prediction: Any) -> dict[str, float]:
        labels = prediction.label_ids.tolist()
        return {"rows": len(labels), "in_order": labels == [row["labels"] for row in EVALUATION]}

    args = runs.arguments(folder, **args)
    exact = {"dropout": 0.0, "dtype": torch.float64, "class_weights": case.get("class_weights")}
    return runs.trainer(case["method"], args, TRAIN, EVALUATION, compute_metrics=metrics, **exact)


class Record(TrainerCallback):
    """What must be the same on every rank in each step: which singular values, gates and masked gradients are 0."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.steps: list[str] = []
        self.directions = ""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last callback: it sees the gradients as the optimizer will."""
        named = self.run.model.named_parameters()
        kept = [p.grad.ne(0).any(1 if n.endswith("A") else 0) for n, p in named if n.endswith(("lora_A", "lora_B"))]
        self.directions = "".join(str(int(x)) for k in kept for x in k)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        small = [p for n, p in self.run.model.named_parameters() if n.endswith(("lora_E", "lora_gate"))]
        found = "".join(str(int(x)) for p in small for x in p.detach().view(-1).ne(0))
        self.steps.append(found + self.directions)


def conclude(run: Any) -> dict[str, Any]:
    clock = ("_runtime", "_per_second")
    return {"history": [{k: v for k, v in log.items() if not k.endswith(clock)} for log in run.state.log_history]}


def tensors(run: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}


def rows_seen(run: Any, epochs: int) -> list[list[int]]:
    """Train, and note which rows enter the loss in each epoch, by their position in TRAIN."""
    position = {tuple(row["input_ids"]): i for i, row in enumerate(TRAIN)}
    seen: list[list[int]] = [[] for _ in range(epochs)]
    stock = run.training_step

    def training_step(model: nn.Module, inputs: Any, *args: Any) -> Any:
        own = inputs.get("own_rows", (len(inputs["input_ids"]), 0))[0]
        for ids in inputs["input_ids"][:own].tolist():
            seen[int(run.state.epoch)].append(position[tuple(i for i in ids if i)])
        return stock(model, inputs, *args)

    run.training_step = training_step
    run.train()
    return seen


def worker(rank: int, port: int, folder: str) -> None:
    """All cases in one of the two processes."""
    out = Path(folder)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(out / f"log-{rank}", "w")  # noqa: SIM115 - until the process ends
    written: list[str] = []
    watched = str(out / "watched")

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (writes or event in ("os.mkdir", "os.rename", "os.remove")) and str(arguments[0]).startswith(watched):
            written.append(f"{event} {Path(str(arguments[0])).name}")

    sys.addaudithook(audited)
    found: dict[str, Any] = {}
    for name, case in EXACT.items():
        run = make(case, out / "unused", 2)
        record = Record(run)
        run.add_callback(record)
        run.train()
        found[name] = conclude(run) | {"steps": record.steps}
        found[name]["unused parameters"] = run.model_wrapped.find_unused_parameters
        save_file(tensors(run), out / f"{name}-{rank}.safetensors")
    for strategy in ("random", "group_by_length"):
        run = make({"method": "lora"}, out / "unused", 2, train_sampling_strategy=strategy, max_steps=18)
        found[strategy] = rows_seen(run, 3)
    # resuming: within an epoch, with dropout-free float64 bitwise
    settings = {"save_strategy": "steps", "save_steps": 8, "train_sampling_strategy": "group_by_length"}
    straight = make(EXACT["adalora"], out / "watched", 2, **settings)
    straight.train()
    resumed = make(EXACT["adalora"], out / "unused", 2, **(settings | {"save_strategy": "no"}))
    resumed.train(str(out / "watched" / "checkpoint-8"))
    found["resumed"] = runs.differences(runs.result(straight), runs.result(resumed))
    found["written"] = written
    # only the second process gets SIGTERM, then only it has a NaN loss: both end together
    stopped = make(EXACT["lora"], out / "stopped", 2)
    if rank == 1:
        stopped.add_callback(Terminate())
    try:
        stopped.train()
    except RunInterrupted as error:
        found["stopped"] = str(error)
    diverged = make(EXACT["lora"], out / "diverged", 2)
    if rank == 1:
        poison(diverged, step=4)
    try:
        diverged.train()
    except RunDiverged as error:
        found["diverged"] = str(error)
    (out / f"found-{rank}.json").write_text(json.dumps(found))


class Terminate(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def poison(run: Any, step: int) -> None:
    """From `step` on the reported loss of this process is NaN."""
    stock = run.training_step

    def training_step(*args: Any) -> torch.Tensor:
        loss = stock(*args)
        if run.state.global_step >= step:
            run._watch(loss * float("nan"))
        return loss

    run.training_step = training_step


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the two processes and what each found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [runs.start(worker, rank, port, str(folder)) for rank in range(2)]
    statuses = [runs.finished(process, 240) for process in processes]
    logs = "".join((folder / f"log-{rank}").read_text()[-4000:] for rank in range(2))
    assert statuses == [0, 0], logs
    return folder, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", EXACT)
def test_equal_to_one_process(name: str, two: Any, tmp_path: Path) -> None:
    """20 steps in float64 over three and a half epochs with an uneven end: within 1e-9, logs too."""
    folder, found = two
    alone = make(EXACT[name], tmp_path, 1)
    alone.train()
    for rank in range(2):
        other = load_file(folder / f"{name}-{rank}.safetensors")
        assert other.keys() == tensors(alone).keys()
        for key, value in tensors(alone).items():
            assert (value - other[key]).abs().max() <= 1e-9, key
    for mine, theirs in zip(conclude(alone)["history"], found[0][name]["history"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"total_flos"}:
            assert theirs[key] == pytest.approx(mine[key], abs=1e-6), key


@pytest.mark.parametrize("name", ["adalora", "sora", "rm-lora-v1", "rm-lora-v2"])
def test_ranks_gates_and_masks_are_the_same_on_both(name: str, two: Any) -> None:
    _, (first, second) = two
    assert len(first[name]["steps"]) == STEPS and len(set(first[name]["steps"])) > 2
    assert first[name]["steps"] == second[name]["steps"]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_every_row_once_an_epoch(strategy: str, two: Any) -> None:
    _, (first, second) = two
    orders = []
    for epoch in range(3):
        seen = first[strategy][epoch] + second[strategy][epoch]
        assert Counter(seen) == Counter(range(len(TRAIN)))
        orders.append(first[strategy][epoch])
    assert orders[0] != orders[1] != orders[2]


def test_grouping_puts_like_lengths_together() -> None:
    """It draws only from seed and epoch, whatever the global generator does."""
    draw = random.Random(0)
    lengths = [draw.randrange(5, 100) for _ in range(640)]

    def spread(rows: list[int]) -> float:
        parts = [[lengths[r] for r in rows[i : i + 16]] for i in range(0, 640, 16)]
        return sum(max(part) - min(part) for part in parts) / len(parts)

    sampler = LengthGroupedSampler(lengths, 16, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(640)) and len(sampler) == 640
    assert spread(first) < spread(draw.sample(range(640), 640)) / 3
    torch.manual_seed(5)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(lengths, 16, seed=2)) != first


def test_evaluation_gathers_every_row_once_in_order(two: Any) -> None:
    _, found = two
    logs = [log for log in found[0]["lora"]["history"] if "eval_rows" in log]
    assert logs and all(log["eval_rows"] == 9 and log["eval_in_order"] for log in logs)


def test_only_the_first_process_writes(two: Any) -> None:
    """The second writes only its random state, which torch does outside of Python."""
    folder, (first, second) = two
    assert any("adapter.safetensors" in name for name in first["written"])
    assert [w for w in second["written"] if not w.startswith("os.mkdir checkpoint-")] == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in (folder / "watched" / "checkpoint-8").iterdir()}


def test_two_processes_resume_bitwise(two: Any) -> None:
    _, found = two
    assert [f["resumed"] for f in found] == [[], []]


def test_sigterm_to_one_process_ends_both_at_the_same_step(two: Any) -> None:
    folder, (first, second) = two
    assert first["stopped"] == second["stopped"]
    assert "after step 4 of 20" in first["stopped"] and (folder / "stopped" / "checkpoint-4").is_dir()


def test_nan_in_one_process_ends_both(two: Any) -> None:
    folder, (first, second) = two
    assert first["diverged"] == second["diverged"] and "at step 5 (noticed at step 6" in first["diverged"]
    assert not list((folder / "diverged").glob("checkpoint-*"))


def test_no_search_for_unused_parameters(two: Any) -> None:
    _, found = two
    assert {f[name]["unused parameters"] for f in found for name in EXACT} == {False}


@pytest.mark.parametrize("method", ["svd-lora", "adalora", "sora", "rm-lora-v1"])
def test_data_parallel_counts_penalty_gates_and_importance_once(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nn.DataParallel around the model, as the stock Trainer puts it there for several GPUs.

    Replicas compute; the module itself holds the parameters that penalty, allocator, mask and optimizer see. Without a
    GPU the wrapper has one replica, so the run equals the plain one bitwise; tests/test_gpu.py has more.
    """
    plain = make({"method": method}, tmp_path, 1)
    plain.train()
    wrapped = make({"method": method}, tmp_path, 1)
    monkeypatch.setattr(wrapped, "_wrap_model", lambda model, training=True, dataloader=None: nn.DataParallel(model))
    wrapped.train()
    assert isinstance(wrapped.model_wrapped, nn.DataParallel)
    assert runs.differences(runs.result(plain), runs.result(wrapped)) == []


@pytest.mark.slow
def test_torchrun_by_command_line(tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> None:
    """Stopped by SIGTERM to torchrun, started again, and equal to the straight run."""
    values = runs.LONG_RUN | {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "train_sampling_strategy": "group_by_length",
        "pad_to_max_length": "False",
    }
    flags = [f"--{k}={v}" for k, v in values.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(runs.ROOT / "AdaLoRA" / "run_glue.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT)}

    def record(name: str) -> dict[str, Any]:
        return json.loads((tmp_path / name / "run.json").read_text())

    def begin(name: str) -> subprocess.Popen[bytes]:
        log = open(tmp_path / f"{name}.log", "ab")  # noqa: SIM115 - the process keeps it
        return subprocess.Popen([*command, f"--output_dir={tmp_path / name}"], env=environment, stdout=log, stderr=log)

    straight = begin("straight")
    stopped = begin("stopped")
    while "'loss'" not in (tmp_path / "stopped.log").read_text():
        assert stopped.poll() is None, (tmp_path / "stopped.log").read_text()[-3000:]
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) != 0
    assert record("stopped")["status"] == "interrupted" and 0 < record("stopped")["steps"] < 150
    assert straight.wait(300) == 0
    assert begin("stopped").wait(300) == 0
    assert record("stopped")["status"] == "finished" and record("stopped")["world_size"] == 2
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(a[k], b[k]) for k in a)

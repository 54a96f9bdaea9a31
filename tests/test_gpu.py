"""What only a CUDA device can show: fp16 with its scaler, bf16, exact resume, waiting, nccl, several replicas.

    python -m pytest -m gpu tests/test_gpu.py

Needs what training needs, no data and no network. With two or more GPUs, nccl and DataParallel run on two of them. With
one, nccl runs with one rank, two gloo processes share the GPU, and DataParallel puts two replicas on it.
"""

import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from transformers import TrainerCallback

from loralib.kernels.prepare import prepare_one_by_one

pytestmark = pytest.mark.gpu
LOW_RANK = [m for m in runs.METHODS if m != "full"]
TRAIN = runs.rows(43)
EXACT = {"dropout": 0.0, "dtype": torch.float64, "train_sampling_strategy": "sequential"}


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device, and torch finds none here")


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the stock Trainer sees several GPUs in one process, it uses nn.DataParallel."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(method: str, folder: Path | str, **changes: Any) -> Any:
    other = {k: changes.pop(k) for k in ("dropout", "dtype") if k in changes}
    usual = {
        "use_cpu": False,
        "max_steps": 20,
        "save_strategy": "no",
        "logging_steps": 5,
        "per_device_train_batch_size": 8,
    }
    return runs.trainer(method, runs.arguments(folder, **(usual | changes)), TRAIN, runs.rows(9), **other)


def losses(run: Any) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def trained(run: Any) -> dict[str, Tensor]:
    return {n: p.detach().cpu() for n, p in run.model.named_parameters() if p.requires_grad}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


class Skips(TrainerCallback):
    """Holds what a step that the scaler skips must leave alone against what there was before it."""

    def __init__(self, run: Any) -> None:
        self.run, self.skipped, self.broken, self.moved = run, 0, [], 0

    def state(self) -> dict[str, Tensor]:
        found = {n: p.detach().clone() for n, p in self.run.model.named_parameters() if p.requires_grad}
        for piece in self.run.method_state.values():
            found |= {k: v.clone() for k, v in piece.state_dict().items()}
        return found

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self.state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        changed = [k for k, v in self.state().items() if k in self.before and not torch.equal(v, self.before[k])]
        if self.run.accelerator.optimizer_step_was_skipped:
            self.skipped += 1
            # a mask that is due applies all the same (ledger A7)
            self.broken += [k for k in changed if not k.endswith("lora_E") and k != "threshold"]
        else:
            self.moved += bool(changed)


@pytest.mark.parametrize("method", runs.METHODS)
def test_fp16_trains_and_skipped_steps_change_nothing(method: str, one_gpu: None, tmp_path: Path) -> None:
    run = make(method, tmp_path, fp16=True, logging_steps=1)
    run.accelerator.scaler._init_scale = 2.0**27  # so large that the first steps overflow
    watch = Skips(run)
    run.add_callback(watch)
    run.train()
    print(f"{method}: {watch.skipped} steps skipped")
    assert all(0 < loss < 3 for loss in losses(run)), losses(run)
    assert 0 < watch.skipped < 20 and not watch.broken and watch.moved == 20 - watch.skipped, vars(watch)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("method", runs.METHODS)
def test_half_precision_follows_float32(method: str, half: str, one_gpu: None, tmp_path: Path) -> None:
    both = [make(method, tmp_path, dropout=0.0, **precision) for precision in ({}, {half: True})]
    for run in both:
        run.train()
    assert losses(both[1]) == pytest.approx(losses(both[0]), abs=0.1)


@pytest.mark.parametrize("half", ["", "bf16", "fp16"])
@pytest.mark.parametrize("method", LOW_RANK)
def test_layers_prepared_at_once_and_one_by_one(method: str, half: str, one_gpu: None, tmp_path: Path) -> None:
    """The same, to the rounding of sums."""
    both = [make(method, tmp_path, dropout=0.0, **({half: True} if half else {})) for _ in range(2)]
    prepare_one_by_one(both[1].model)
    for run in both:
        run.train()
    assert losses(both[1]) == pytest.approx(losses(both[0]), abs=1e-4)


@pytest.mark.parametrize("half", ["", "fp16"])
@pytest.mark.parametrize("method", runs.METHODS)
def test_a_resumed_run_is_the_straight_one(
    method: str, half: str, one_gpu: None, deterministic: None, tmp_path: Path
) -> None:
    """Bitwise, where the GPU's own kernels are: deterministic ones are asked for."""
    precision = {half: True} if half else {}
    straight = make(method, tmp_path / "straight", save_strategy="steps", save_steps=5, **precision)
    straight.train()
    for step in (5, 10):
        resumed = make(method, tmp_path / f"resumed-{step}", **precision)
        resumed.train(str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert runs.differences(runs.result(straight), runs.result(resumed)) == []


class WarnWhereItWaits(TrainerCallback):
    """torch says where the CPU waits for the GPU, in two steps that log, save and evaluate nothing."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn" if state.global_step in (11, 12) else "default")


@pytest.mark.parametrize("method", LOW_RANK)
def test_nothing_of_ours_waits_between_logs(method: str, one_gpu: None, tmp_path: Path) -> None:
    run = make(method, tmp_path, logging_steps=100)
    run.add_callback(WarnWhereItWaits())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    torch.cuda.set_sync_debug_mode("default")
    places = {(Path(w.filename), w.lineno) for w in caught if "synchroniz" in str(w.message)}
    found = sorted(f"{path.parent.name}/{path.name}:{line}" for path, line in places)
    print(f"{method}: {found}")
    ours = runs.ROOT / "loralib"
    assert not [path for path, _ in places if ours in path.parents], found


# ---- processes and replicas ----


def worker(rank: int, size: int, backend: str, port: int, folder: str) -> None:
    """One process of several: all methods, one after the other."""
    device = rank % torch.cuda.device_count()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(device), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results = {}
    for method in runs.METHODS:
        run = make(method, f"{folder}/unused", per_device_train_batch_size=8 // size, ddp_backend=backend, **EXACT)
        run.train()
        results[method] = trained(run)
    torch.save(results, f"{folder}/{backend}-{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each method trains in one process on one GPU, in float64."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        for method in runs.METHODS:
            run = make(method, tmp_path_factory.mktemp("alone"), **EXACT)
            run.train()
            found[method] = trained(run)
    return found


@pytest.mark.parametrize(("backend", "size"), [("nccl", 1), ("nccl", 2), ("gloo", 2)])
def test_processes_equal_one(backend: str, size: int, alone: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """20 steps in float64. nccl takes one process per GPU, so with one GPU its second process is left out."""
    if backend == "nccl":
        size = min(size, torch.cuda.device_count())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, (size, backend, port, str(tmp_path)), nprocs=size)
    for rank in range(size):
        found = torch.load(tmp_path / f"{backend}-{size}-{rank}.pt", weights_only=True)
        worst = {method: largest_difference(alone[method], found[method]) for method in runs.METHODS}
        print(f"{backend}, {size} processes, rank {rank}: {worst}")
        assert max(worst.values()) < 1e-9, worst


@pytest.mark.parametrize("method", runs.METHODS)
def test_two_replicas_equal_one(
    method: str, alone: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The global batch on two replicas: penalty, gates and importance count once, or parameters would differ."""
    ids = [0, 1] if torch.cuda.device_count() >= 2 else [0, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = make(method, tmp_path, **EXACT)
    run._wrap_model = lambda model, training=True, dataloader=None: nn.DataParallel(model, device_ids=ids)
    run.train()
    assert largest_difference(alone[method], trained(run)) < 1e-9

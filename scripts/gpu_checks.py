"""Checks that need a GPU: fp16 with its scaler, bf16, nccl, several processes or replicas on the GPUs, exact resume.

    python scripts/gpu_checks.py

Needs what training needs, no data and no network; a minute or two on one GPU. One line a check; exit status 1 if one
fails. With two or more GPUs, nccl and DataParallel run on two of them; with one, two gloo processes share it, nccl runs
with one rank, and DataParallel puts two replicas on it.
"""

import json
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import runs
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from transformers import TrainerCallback

from loralib.kernels.prepare import prepare_one_by_one

LOW_RANK = [m for m in runs.METHODS if m != "full"]
TRAIN = runs.rows(43)


def make(method: str, folder: str, **changes: Any) -> Any:
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


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[k].cpu() - b[k].cpu()).abs().max().item() for k in a)


def trained(run: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().cpu() for n, p in run.model.named_parameters() if p.requires_grad}


def one_gpu(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """The stock Trainer would use nn.DataParallel where it sees several GPUs."""

    def checked(folder: str) -> Any:
        stock = torch.cuda.device_count
        torch.cuda.device_count = lambda: 1
        try:
            return check(folder)
        finally:
            torch.cuda.device_count = stock

    checked.__name__ = check.__name__
    return checked


class Skips(TrainerCallback):
    """Holds what a step that the scaler skips must leave alone against what there was before it."""

    def __init__(self, run: Any) -> None:
        self.run, self.skipped, self.broken, self.moved = run, 0, [], 0

    def state(self) -> dict[str, torch.Tensor]:
        found = {n: p.detach().clone() for n, p in self.run.model.named_parameters() if p.requires_grad}
        if "allocator" in self.run.method_state:
            found |= {k: v.clone() for k, v in self.run.method_state["allocator"].state_dict().items()}
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


@one_gpu
def check_fp16_trains_and_skipped_steps_change_nothing(folder: str) -> str:
    said = []
    for method in runs.METHODS:
        run = make(method, folder, fp16=True, logging_steps=1)
        run.accelerator.scaler._init_scale = 2.0**27  # so large that the first steps overflow
        watch = Skips(run)
        run.add_callback(watch)
        run.train()
        assert all(0 < loss < 3 for loss in losses(run)), (method, losses(run))
        assert 0 < watch.skipped < 20 and not watch.broken and watch.moved == 20 - watch.skipped, (method, vars(watch))
        said.append(f"{method} {watch.skipped}")
    return f"skipped steps: {', '.join(said)}"


@one_gpu
def check_half_precision_follows_float32(folder: str) -> str:
    worst = 0.0
    for method in runs.METHODS:
        full = make(method, folder, dropout=0.0)
        full.train()
        for half in ("bf16", "fp16"):
            run = make(method, folder, dropout=0.0, **{half: True})
            run.train()
            worst = max(worst, *(abs(a - b) for a, b in zip(losses(full), losses(run), strict=True)))
            assert worst < 0.1, (method, half, losses(full), losses(run))
    return f"largest difference of a logged loss: {worst:.2g}"


@one_gpu
def check_layers_together(folder: str) -> str:
    """What layers prepare together is what each prepares alone, to the rounding of sums."""
    worst = 0.0
    for method in LOW_RANK:
        for half in ({}, {"bf16": True}, {"fp16": True}):
            both = [make(method, folder, dropout=0.0, **half) for _ in range(2)]
            prepare_one_by_one(both[1].model)
            for run in both:
                run.train()
            worst = max(worst, *(abs(a - b) for a, b in zip(*map(losses, both), strict=True)))
            assert worst < 1e-4, (method, half, *map(losses, both))
    return f"largest difference of a logged loss: {worst:.2g}"


@one_gpu
def check_resume(folder: str) -> str:
    """Bitwise where the GPU's own kernels are: deterministic ones are asked for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for method in runs.METHODS:
        for precision in ({}, {"fp16": True}):
            where = f"{folder}/{method}-{len(precision)}"
            straight = make(method, where, save_strategy="steps", save_steps=5, **precision)
            straight.train()
            for step in (5, 10):
                resumed = make(method, f"{where}-resumed", **precision)
                resumed.train(f"{where}/checkpoint-{step}")
                found = runs.differences(runs.result(straight), runs.result(resumed))
                assert not found, (method, precision, step, found[:3])
    torch.use_deterministic_algorithms(False)
    return f"{len(runs.METHODS)} methods in float32 and fp16, from steps 5 and 10: bitwise"


@one_gpu
def check_no_synchronisation_between_logs(folder: str) -> str:
    """torch says where the CPU waits for the GPU; in a step without a log, save or evaluation it should not."""
    found = {}
    for method in LOW_RANK:
        run = make(method, folder, logging_steps=100)

        class Count(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                torch.cuda.set_sync_debug_mode("warn" if state.global_step in (11, 12) else "default")

        run.add_callback(Count())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train()
        torch.cuda.set_sync_debug_mode("default")
        places = {(Path(w.filename), w.lineno) for w in caught if "synchroniz" in str(w.message)}
        found[method] = sorted(f"{path.parent.name}/{path.name}:{line}" for path, line in places)
        assert not [place for place in found[method] if place.startswith("loralib/")], found
    return f"in two steps: {found}"


def worker(rank: int, size: int, backend: str, port: int, folder: str) -> None:
    device = rank % torch.cuda.device_count()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(device), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results = {}
    for method in runs.METHODS:
        changes = {"dropout": 0.0, "dtype": torch.float64, "train_sampling_strategy": "sequential"}
        run = make(method, f"{folder}/unused", per_device_train_batch_size=8 // size, ddp_backend=backend, **changes)
        run.train()
        results[method] = trained(run)
    torch.save(results, f"{folder}/{backend}-{size}-{rank}.pt")
    dist.destroy_process_group()


@one_gpu
def alone(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for method in runs.METHODS:
        run = make(method, folder, dropout=0.0, dtype=torch.float64, train_sampling_strategy="sequential")
        run.train()
        found[method] = trained(run)
    return found


def check_processes(folder: str) -> str:
    two = torch.cuda.device_count() >= 2
    cases = [("nccl", 2)] if two else [("nccl", 1), ("gloo", 2)]
    reference = alone(folder)
    said = []
    for backend, size in cases:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.spawn(worker, (size, backend, port, folder), nprocs=size)
        for rank in range(size):
            found = torch.load(f"{folder}/{backend}-{size}-{rank}.pt", weights_only=True)
            worst = {m: largest_difference(reference[m], found[m]) for m in runs.METHODS}
            assert max(worst.values()) < 1e-9, worst
        said.append(f"{backend} x {size}: {json.dumps({m: float(f'{w:.1g}') for m, w in worst.items()})}")
    return f"float64, 20 steps, largest difference of a parameter: {'; '.join(said)}"


def check_data_parallel(folder: str) -> str:
    """The global batch on two replicas: penalty, gates and importance count once, or parameters would differ."""
    ids = [0, 1] if torch.cuda.device_count() >= 2 else [0, 0]
    reference = alone(folder)
    worst = {}
    stock = torch.cuda.device_count
    torch.cuda.device_count = lambda: 1
    try:
        for method in runs.METHODS:
            run = make(method, folder, dropout=0.0, dtype=torch.float64, train_sampling_strategy="sequential")
            run._wrap_model = lambda model, training=True, dataloader=None: nn.DataParallel(model, device_ids=ids)
            run.train()
            worst[method] = largest_difference(reference[method], trained(run))
    finally:
        torch.cuda.device_count = stock
    assert max(worst.values()) < 1e-9, worst
    return f"devices {ids}, float64, 20 steps: {max(worst.values()):.1g}"


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    import transformers

    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    print(
        f"{torch.cuda.device_count()} x {', '.join(names)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    failed = 0
    checks = [
        check_fp16_trains_and_skipped_steps_change_nothing,
        check_half_precision_follows_float32,
        check_layers_together,
        check_resume,
        check_no_synchronisation_between_logs,
        check_processes,
        check_data_parallel,
    ]
    for check in checks:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"ok      {check.__name__}: {check(folder)}", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED  {check.__name__}\n{traceback.format_exc()[-2500:]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The soak: runs with random flags that users use, disturbed at random, end bit for bit as the undisturbed run.

    bash scripts/test.sh -m soak                                  twenty minutes on two cores
    SOAK_MINUTES=60 SOAK_SEED=7 bash scripts/test.sh -m soak -s   longer, and from another seed on

A trial draws flags from its seed, runs them once to the end, and once more in another folder, where up to four
processes are disturbed: by SIGKILL at any moment or at an operation on a file of a checkpoint, SIGTERM, Ctrl-C, a disk
that is full, a dataloader worker that is killed, a clock that was set back. After each the printed advice is followed,
which is the same command each time. Every failure is reported with the seed of its trial, which draws the same again.
"""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file

LORA = ["--apply_lora", "--lora_r=3", "--lora_alpha=6", "--lora_dropout=0.1"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "lora": ("AdaLoRA", LORA),
    "lora-orth": ("AdaLoRA", [*LORA, "--reg_orth_coef=0.1"]),
    "adalora": (
        "AdaLoRA",
        [*LORA, "--apply_adalora", "--lora_type=svd", "--target_rank=1", "--init_warmup=1", "--final_warmup=2"]
        + ["--mask_interval=2", "--reg_orth_coef=0.1"],
    ),
    "sora": ("SoRA", [*LORA, "--train_sparse", "--sparse_lambda=0.1", "--sparse_lambda_2=0.002"]),
    "sora in stages": (
        "SoRA",
        [*LORA, "--train_sparse", "--sparse_lambda=0.1", "--sparse_lambda_2=0.001", "--lambda_schedule=linear"]
        + ["--max_lambda=0.004", "--lambda_num=3", "--lambda_epochs=1"],
    ),
    "rm-lora-v1": ("RM-LoRA", [*LORA, "--lora_type=v1", "--random_rank=1", "--reg_orth_coef=0.1"]),
    "rm-lora-v2": ("RM-LoRA", [*LORA, "--lora_type=v2", "--random_rank=1", "--mask_resample=epoch"]),
    "full": ("AdaLoRA", []),
}
# Each is left out half of the time.
FLAGS: dict[str, list[Any]] = {
    "per_device_train_batch_size": [4, 7, 16],
    "gradient_accumulation_steps": [2, 3],
    "warmup_ratio": [0.1],
    "weight_decay": [0.01],
    "lr_scheduler_type": ["cosine", "constant", "polynomial"],
    "label_smoothing_factor": [0.1],
    "max_grad_norm": [0.5, 0],
    "optim": ["adamw_torch"],
    "eval_strategy": ["epoch", "steps"],
    "eval_steps": [3],
    "eval_on_start": [True],
    "logging_first_step": [True],
    "logging_steps": [1, 3, 5],
    "save_total_limit": [1, 2],
    "group_by_length": [True],
    "padding": ["longest", "unpadded"],
    "dataloader_num_workers": [1, 2],
    "dataloader_drop_last": [True],
    "bf16": [True],
    "gradient_checkpointing": [True],
    "cls_dropout": [0.2],
    "data_seed": [5],
    "heldout_split": [1],
    "max_train_samples": [41],
    "report_to": ["tensorboard"],
}
KINDS = ("kill", "kill at a file", "term", "interrupt", "full disk", "full at a file", "worker", "clock")
PATIENCE = 1800  # seconds; a machine may be busy with other work
_starting = threading.Lock()


def draw_flags(draw: random.Random, model: Path, data: Path) -> tuple[str, str, list[str]]:
    """Name of a method, folder of its entry point, and flags without a folder."""
    name = draw.choice(list(METHODS))
    entry, own = METHODS[name]
    values = {k: draw.choice(v) for k, v in FLAGS.items() if draw.random() < 0.5 or k == "logging_steps"}
    values["save_strategy"] = draw.choice(["steps", "steps", "steps", "epoch", "no"])
    if values["save_strategy"] == "steps":
        values["save_steps"] = draw.choice([1, 2, 3, 5])
    if values.get("eval_strategy") == values["save_strategy"] == "epoch" and draw.random() < 0.5:
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    if values.get("dataloader_num_workers") and draw.random() < 0.3:
        values["dataloader_prefetch_factor"] = 3
    if draw.random() < 0.3:
        values["max_steps"] = draw.choice([7, 12])
    values |= {"learning_rate": draw.choice([1e-3, 1e-2]), "seed": draw.randrange(1000), "max_seq_length": 24}
    values |= {"model_name_or_path": model, "dataset_name": data, "num_train_epochs": 2, "disable_tqdm": True}
    values["use_cpu"] = True
    values.setdefault("report_to", "none")
    return name, entry, ["--do_train", "--do_eval", *own, *(f"--{k}={v}" for k, v in values.items())]


def disturbed(entry: str, argv: list[str], log: str, fault: str, number: int) -> None:
    """An entry point with a fault in its own process: full disks, and a clock that is slow by an hour."""
    if fault == "full disk":  # but not for the log
        written = subprocess.Popen(["sh", "-c", 'cat >> "$0"', log], stdin=subprocess.PIPE)
        assert written.stdin is not None
        log = f"/dev/fd/{written.stdin.fileno()}"
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    elif fault == "interrupt":  # what is started in a shell's background ignores Ctrl-C otherwise
        signal.signal(signal.SIGINT, signal.default_int_handler)
    elif fault == "clock":
        real = time.time
        time.time = lambda: real() - 3600
    elif fault == "full at a file":
        folder = next(word.partition("=")[2] for word in argv if word.startswith("--output_dir"))
        done = 0

        def audited(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wx")
            if (writes or event == "os.mkdir") and str(arguments[0]).startswith(folder):
                done += 1
                if done >= number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        sys.addaudithook(audited)
    runs.enter(entry, argv, log)


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Trained tensors, and every number of the record that does not depend on the clock."""
    record = json.loads((folder / "run.json").read_text())
    if record["status"] != "finished":
        raise AssertionError(f"status is {record['status']}")
    file = folder / "adapter.safetensors"
    state = load_file(file if file.exists() else folder / "model.safetensors")
    clock = re.compile(r".*(_runtime|_per_second)")

    def timeless(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if not clock.fullmatch(k)}

    numbers = [timeless(log) for log in record["history"]] + [timeless(record["metrics"]), record["steps"]]
    for stage in record.get("stages", []):
        numbers.append({k: v for k, v in stage.items() if k not in ("metrics", "seconds")} | timeless(stage["metrics"]))
    return state, numbers


class Trial:
    """One seed: its flags, its disturbances, and what came of it."""

    def __init__(self, seed: int, folder: Path, model: Path, data: Path) -> None:
        self.seed, self.folder, self.log = seed, folder, folder / "log"
        self.draw = random.Random(seed)
        self.method, self.entry, self.flags = draw_flags(self.draw, model, data)
        self.happened: Counter[str] = Counter()
        self.reason = ""
        folder.mkdir(parents=True)

    def start(self, name: str, target: Any = runs.enter, *more: Any) -> Any:
        """A process of this trial's command in the folder `name`."""
        self.argv = [*self.flags, f"--output_dir={self.folder / name}"]
        with _starting:
            return runs.start(target, self.entry, self.argv, str(self.log), *more)

    def disturb(self, kind: str, seconds: float, operations: int) -> int | None:
        """Run the command with one disturbance; the exit status."""
        wait = self.draw.uniform(0.05, 0.95) * seconds
        if kind == "kill at a file":
            process = self.start("run", runs.enter, self.draw.randint(1, max(operations, 1)))
        elif kind == "full disk":
            process = self.start("run", disturbed, kind, self.draw.choice([3, 6, 12, 24]) << 10)
        elif kind == "full at a file":
            process = self.start("run", disturbed, kind, self.draw.randint(1, 40))
        elif kind == "clock":
            for path in (self.folder / "run").glob("**/checkpoint-*"):
                moment = self.draw.uniform(0, 2 * time.time())
                os.utime(path, (moment, moment))
            process = self.start("run", disturbed, kind, 0)
            process.join(wait)
            process.kill()
        else:
            process = self.start("run", disturbed, kind, 0)
            if kind == "kill":
                process.join(wait)
                process.kill()
            else:
                self.wait_for_training(process, 0 if kind == "worker" else wait)
                while kind == "worker" and process.is_alive() and not children(process.pid):
                    time.sleep(0.005)
                targets = children(process.pid) if kind == "worker" else [process.pid]
                number = {"term": signal.SIGTERM, "interrupt": signal.SIGINT, "worker": signal.SIGKILL}[kind]
                for pid in targets[:1]:
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        break
        return runs.finished(process, PATIENCE)

    def wait_for_training(self, process: Any, seconds: float) -> None:
        """Until the run has begun to train, and up to `seconds` more."""
        marker = f"{self.folder / 'run'}"
        until = time.time() + PATIENCE
        while process.is_alive() and time.time() < until and not list(Path(marker).glob("**/.unfinished")):
            time.sleep(0.02)
        process.join(self.draw.uniform(0, 0.7) * seconds)

    def run(self) -> str:
        """equal, refused (by the undisturbed run, before it trains), or what went wrong."""
        count = self.folder / "operations"
        began = time.time()
        status = runs.finished(self.start("straight", runs.enter, 0, str(count)), PATIENCE)
        seconds = time.time() - began
        if status == 2 and not list((self.folder / "straight").glob("**/.unfinished")):
            said = self.log.read_text(errors="replace").strip().splitlines()
            self.reason = said[-1] if said else ""
            return "refused"
        if status != 0:
            return f"the undisturbed run ended with {status}"
        expected = outcome(self.folder / "straight")
        allowed = {"kill": {0, -9}, "kill at a file": {0, -9}, "clock": {0, -9}, "term": {0, 143, -15}}
        allowed |= {"interrupt": {0, 130}, "full disk": {0, 3}, "full at a file": {0, 2, 3}, "worker": {0, 3}}
        disturbances = self.draw.randint(1, 4)
        for _ in range(disturbances):
            workers = any(flag.startswith("--dataloader_num_workers") for flag in self.flags)
            kind = self.draw.choice(KINDS if workers else [k for k in KINDS if k != "worker"])
            before = self.log.stat().st_size
            status = self.disturb(kind, seconds, int(count.read_text()))
            time.sleep(0.5 if kind == "full disk" else 0)  # until what the run said is in the log
            said = self.log.read_bytes()[before:].decode(errors="replace")
            if status not in allowed[kind]:
                return f"after {kind} the run ended with {status}"
            # Not counted: what torch logs of an exception that it caught, what Python prints of a Ctrl-C in a
            # destructor, and what its thread that hands tensors over prints when the other end is gone.
            lines = said.splitlines()
            uncaught = lines.count("Traceback (most recent call last):")
            uncaught -= sum(line.startswith("Exception ignored in") for line in lines)
            uncaught -= sum("resource_sharer.py" in line and line.endswith("_serve") for line in lines)
            if uncaught > 0 and kind not in ("kill", "clock"):
                return f"{kind} ended in a traceback"
            self.happened[kind if status else "not hit"] += 1
            if status in (3, 143) and "the same command" not in said:
                return f"{kind} gave no advice"
            if status == 0:
                break
        else:
            status = runs.finished(self.start("run"), PATIENCE)
            if status != 0:
                return f"the same command ended with {status} after {dict(self.happened)}"
        state, numbers = outcome(self.folder / "run")
        differing = [k for k in expected[0] if not torch.equal(state[k], expected[0][k])]
        if differing or state.keys() != expected[0].keys():
            return f"{len(differing)} tensors differ after {dict(self.happened)}, {differing[:1]}"
        if numbers != expected[1]:
            pairs = [(a, b) for a, b in zip(numbers, expected[1], strict=False) if a != b]
            return f"numbers differ after {dict(self.happened)}: {str(pairs[:1])[:500]}"
        return "equal"


@pytest.mark.soak
def test_soak(tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> None:
    end = time.time() + 60 * float(os.environ.get("SOAK_MINUTES", "20"))
    first = int(os.environ.get("SOAK_SEED", "0"))
    trials = int(os.environ.get("SOAK_TRIALS", "0")) or 10**9
    runs.finished(runs.start(time.sleep, 0))  # the server that processes are forked from is there
    found: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    failures: list[str] = []
    seeds = iter(range(first, first + trials))

    def work() -> None:
        while time.time() < end and (seed := next(seeds, None)) is not None:
            trial = Trial(seed, tmp_path / str(seed), tiny_model_dir, mrpc_dir)
            try:
                result = trial.run()
            except Exception as error:  # a folder without a record, say
                result = f"{type(error).__name__}: {error}"
            with _starting:
                kinds.update(trial.happened)
                found["trials"] += 1
                if result == "refused":
                    print(f"refused, seed {seed}: {trial.reason[:200]}", flush=True)
                found[result if result in ("equal", "refused") else "failed"] += 1
                if result not in ("equal", "refused"):
                    failures.append(f"seed {seed} ({trial.method}): {result}\n  {' '.join(trial.argv)}")
                    print(failures[-1], flush=True)
                    print("  " + trial.log.read_text(errors="replace")[-1500:].replace("\n", "\n  "), flush=True)
            shutil.rmtree(trial.folder)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work) for _ in range(2)]:
            future.result()
    kills = sum(kinds.values()) - kinds["not hit"]
    print(
        f"\ntrials {found['trials']}, kills {kills}, equal {found['equal']}, refused {found['refused']}, "
        f"failed {found['failed']}; {dict(kinds)}"
    )
    assert not failures, "\n".join(failures)
    assert found["equal"] > 0

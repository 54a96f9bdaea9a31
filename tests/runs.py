"""A tiny run of every method without command line or data files, and processes to run and to kill.

What the tests of resuming, processes, precision and faults share. Processes are forked from a server that has imported
everything and computed nothing, so that one costs milliseconds in place of the ten seconds of an import.
"""

import gc
import importlib.util
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from adapter_runs import V3
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification
from transformers.utils import logging as transformers_logging

from loralib.glue.arguments import GlueTrainingArguments, command
from loralib.methods import Method, adalora, full_fine_tuning, lora, rm_lora, sora
from loralib.trainer import LoRATrainer

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("lora", "lora-orth", "svd-lora", "adalora", "sora", "rm-lora-v1", "rm-lora-v2", "full")
SIX = ["query", "key", "value", "intermediate", "layer.output", "attention.output"]

gc.collect()
gc.freeze()  # the stock Trainer collects garbage at each start, which looks at every object of the imported libraries


class Padder:
    """Stands for a tokenizer where a batch is padded."""

    model_input_names = ("input_ids", "attention_mask")

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(f["input_ids"]) for f in features)
        ids = [f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features]
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids).ne(0).long()}
        return batch | {"labels": torch.tensor([f["labels"] for f in features])}


class Calls(TorchDispatchMode):
    """Counts the operations that reach the device, by name without overload."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def rows(count: int, fixed_length: int | None = None) -> list[dict[str, Any]]:
    """Token ids of different lengths; the label tells whether token 5 is among them. Every row is unlike the others."""
    draw = random.Random(7)
    found: list[dict[str, Any]] = []
    for number in range(count):
        ids = [draw.randrange(4, 40) for _ in range((fixed_length or draw.randrange(5, 16)) - 2)] + [
            40 + number % 50,
            2,
        ]
        found.append({"input_ids": ids, "labels": int(5 in ids)})
    return found


def arguments(folder: Path | str, **changes: Any) -> GlueTrainingArguments:
    """Training arguments on the CPU; `changes` win."""
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.01,
        "weight_decay": 0.01,
        "warmup_steps": 2,
        "logging_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "seed": 3,
    }
    return GlueTrainingArguments(**(usual | changes))


# An AdaLoRA run of two processes on the CPU, long enough to be stopped in between. Model, data and folder are missing.
LONG_RUN = {
    "do_train": True, "do_eval": True, "apply_lora": True, "apply_adalora": True, "lora_type": "svd", "lora_r": 4,
    "lora_alpha": 8, "target_rank": 2, "init_warmup": 5, "final_warmup": 10, "mask_interval": 2, "max_steps": 150,
    "learning_rate": 0.01, "max_seq_length": 32, "logging_steps": 10, "save_steps": 1000, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "ddp_backend": "gloo", "per_device_train_batch_size": 4,
}  # fmt: skip


def choose(
    method: str, model: torch.nn.Module, modules: list[str], seed: int, resample: str = "step", **settings: Any
) -> Method:
    """The method of that name, put into the model."""
    svd = {"target_rank": 2, "mask_interval": 1, "log_every": 10**9, "reg_orth_coef": 0.1}
    mask = {"random_rank": 2, "mask_resample": resample, "seed": seed, "reg_orth_coef": 0.1}
    gates = {"threshold": 0.02, "sparse_lambda": 0.1}
    if method == "full":
        return full_fine_tuning(model)
    if method == "adalora":
        return adalora(model, modules, **svd, **settings)
    if method == "sora":
        return sora(model, modules, **gates, **settings)
    if method.startswith("rm-lora"):
        return rm_lora(model, modules, version=method[-2:], **mask, **settings)
    coef = 0.0 if method == "lora" else 0.1
    return lora(model, modules, reg_orth_coef=coef, triplets=method == "svd-lora", **settings)


def trainer(
    method: str,
    args: GlueTrainingArguments,
    train: Any,
    evaluation: Any = None,
    *,
    lora_r: int = 4,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    resample: str = "step",
    modules: list[str] | None = None,
    class_weights: list[float] | None = None,
    compute_metrics: Callable[..., dict[str, float]] | None = None,
) -> LoRATrainer:
    """A fresh trainer of a fresh model; the same arguments give the same one."""
    transformers_logging.set_verbosity_error()
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    config = DebertaV2Config(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, position_buckets=8, **V3,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), dropout),
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification(config).to(dtype)
    chosen = choose(method, model, modules or SIX, args.seed, resample, r=lora_r, lora_alpha=8, lora_dropout=dropout)
    parts: dict[str, Any] = {}
    if chosen.factors is not None:
        parts["adapter"] = {"method": method, "lora_r": lora_r, "lora_alpha": 8}
        parts["settings"] = {"lora_r": lora_r, "mask_resample": resample}
    run = LoRATrainer(
        method=chosen,
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=Padder(),
        compute_metrics=compute_metrics,
        class_weights=class_weights,
        **parts,
    )
    if method == "adalora":  # the warm-ups follow from the length of the run
        allocator: Any = chosen.state["allocator"]
        allocator.warmups = (run.total_steps() // 4, run.total_steps() // 4)
    quiet = [c for c in run.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"]
    run.callback_handler.callbacks = quiet
    return run


def result(run: LoRATrainer) -> dict[str, Any]:
    """All that a run ends with and that does not depend on the clock: parameters, buffers and logs."""
    clock = ("_runtime", "_per_second")
    return {
        "state": {k: v.clone() for k, v in run.model.state_dict().items()},
        "history": [{k: v for k, v in log.items() if not k.endswith(clock)} for log in run.state.log_history],
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of tensors that are not bitwise the same, and log entries that differ."""
    found = [k for k in a["state"].keys() | b["state"].keys() if not torch.equal(a["state"][k], b["state"][k])]
    if a["history"] != b["history"]:
        found += [f"{x} / {y}" for x, y in zip(a["history"], b["history"], strict=False) if x != y] or [
            "number of logs"
        ]
    return found


# ---- processes ----


def start(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A process that runs `target`, a function of a module of tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs"])
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
    before = os.environ.get("PYTHONPATH")
    # for the server, which is started with the first process
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, before] if before else paths)
    try:
        process = context.Process(target=target, args=arguments)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def finished(process: multiprocessing.process.BaseProcess, seconds: float = 120) -> int | None:
    """Exit status of a process; it is killed, and None returned, when it takes longer than `seconds`."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def entry_module(folder: str) -> ModuleType:
    """The module of an entry point, by its folder."""
    spec = importlib.util.spec_from_file_location(f"run_{folder.replace('-', '_')}", ROOT / folder / "run_glue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def enter(folder: str, argv: list[str], log: str, die_at: int = 0, count_to: str | None = None) -> None:
    """Run an entry point as `python FOLDER/run_glue.py ARGV` does, with what it prints in `log`.

    Args:
        die_at: kill this process at the n-th operation on a file of a checkpoint, a half-written file included.
        count_to: a file that gets the number of such operations.
    """
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a user's process: loaders of data are its own children
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    done = 0

    def happened(path: Any, cut: bool = False) -> None:
        nonlocal done
        if "checkpoint-" not in str(path):
            return
        done += 1
        if done == die_at:
            if cut:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            happened(arguments[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            happened(arguments[0])

    def then(write: Callable[..., Any], position: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            value = write(*args, **kwargs)
            happened(args[position], cut=True)
            return value

        return wrapped

    if die_at or count_to:
        sys.addaudithook(audited)
        torch.save = then(torch.save, 1)  # writes outside of Python
    sys.argv = [f"{folder}/run_glue.py", *argv]

    def main() -> None:
        entry_module(folder).main()
        if count_to:
            Path(count_to).write_text(str(done))

    command(main)

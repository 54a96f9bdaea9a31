"""`run.json`: the record of a run."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from loralib.adapt import parameters
from loralib.adapters.writing import write_json
from loralib.glue.machine import git_commit, hardware, versions
from loralib.jsonfile import find_json
from loralib.secrets import hide, is_secret
from loralib.training.trainer import LoRATrainer

if TYPE_CHECKING:
    from loralib.glue.run import Run

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RUN_VERSION = 1


def write_run(run: Run, trainer: LoRATrainer, method: str, task: str, status: str, metrics: dict[str, Any]) -> None:
    """Write `run.json`, which the report reads. An evaluation does not replace the record of a training."""
    training = run.training
    if not training.do_train and _is_of_a_training(record_of(Path(training.output_dir))):
        logger.info(
            "%s is unchanged: it is the record of the training. The results of this run are beside it", RUN_FILE
        )
        return
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    seconds = time.time() - run.started
    record = {
        "version": RUN_VERSION,
        "status": status,
        "method": method,
        "task": task,
        "seed": training.seed,
        "command": run.command,
        "arguments": {k: v for part in run.arguments for k, v in flags_of(part).items()},
        "commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "world_size": training.world_size,
        "effective_batch": trainer.get_total_train_batch_size(training),
        "steps": trainer.state.global_step,
        "parameters": parameters(trainer.model),
        "metrics": metrics,
        "history": trainer.state.log_history,
        "wall_seconds": round(seconds, 3),
        "total_seconds": round(seconds + run.seconds_before + trainer.seconds_before, 3),
        **run.facts,
        **summaries(trainer),
    }
    write_json(Path(training.output_dir) / RUN_FILE, hide(run.finish_record(record)), default=str)


def summaries(trainer: LoRATrainer) -> dict[str, Any]:
    """The facts that the trainer's callbacks tell in their `summary()`."""
    callbacks = trainer.callback_handler.callbacks
    return {k: v for c in callbacks if hasattr(c, "summary") for k, v in c.summary().items()}


def record_of(folder: Path) -> dict[str, Any]:
    """The `run.json` of a folder; {} if there is none, or the file is not a record."""
    return find_json(folder / RUN_FILE) or {}


def flags_of(part: Any) -> dict[str, Any]:
    """The flags of one argument dataclass, without access tokens."""
    if isinstance(part, transformers.TrainingArguments):
        values = part.to_dict()
    else:
        values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    return {k: v for k, v in values.items() if not is_secret(k)}


def _is_of_a_training(record: dict[str, Any]) -> bool:
    arguments = record.get("arguments")
    return isinstance(arguments, dict) and arguments.get("do_train") is True

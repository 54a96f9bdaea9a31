"""Trains a run in several stages, each from where the one before has ended, and records the curve over the stages.

Each stage k but the last is a run of its own in `output_dir/stage-k`, with checkpoints, results and `run.json`. This
record keeps the settings that decide the stage's numbers, and the SHA-256 of its adapter. A finished stage is used
again only if both are the same. The last stage is the run itself. Each stage has its own optimizer, warm-up and
schedule, and shuffles with seed + k.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralib.adapters.own import load_adapter
from loralib.adapters.reading import ADAPTER_FILE
from loralib.errors import RunDiverged
from loralib.glue.assemble import begin_and_announce, load_starting_adapter, trainer_arguments, trainer_with
from loralib.glue.data import GlueData
from loralib.glue.folder import clear_output_dir, reserve, whole_checkpoint
from loralib.glue.record import RUN_FILE, flags_of, record_of, write_run
from loralib.glue.run import Run
from loralib.glue.train import train_and_report
from loralib.methods import Method
from loralib.training.lock import unlock
from loralib.training.manifest import sha256_of
from loralib.training.settings import check_settings
from loralib.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)


def train_in_stages(
    run: Run,
    methods: Sequence[Method],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: GlueData,
    epochs: float | None,
) -> dict[str, Any]:
    """Train a model with one method after the other, each from where the one before has ended.

    Args:
        methods: the method of each stage, all on the same model; a single one makes an ordinary run.
        epochs: epochs of every stage but the first; None: those of the run.

    Returns:
        The final metrics of the last stage.
    """
    load_starting_adapter(run, model)
    arguments = trainer_arguments(run, data, tokenizer, run.data_args, model)
    *earlier, last = methods
    if earlier:
        logger.info("%s", lengths(run.training, len(methods), epochs))
    before = 0.0
    for number, method in enumerate(earlier):
        stage = start_stage(run, number, run.training.num_train_epochs if number == 0 else epochs)
        trainer = trainer_with(stage, method, arguments | {"args": stage.training}, data.task)
        if take_finished_stage(stage, trainer):
            done = record_of(Path(stage.training.output_dir))
            before += done.get("total_seconds", done.get("wall_seconds", 0.0))
        else:
            begin_and_announce(stage, trainer, method, _title(method, number, len(methods)))
            try:
                train_and_report(stage, trainer, data)
            except RunDiverged as error:
                if run.training.should_save:  # sweeps and reports read the record of the whole
                    write_run(run, trainer, method.name, data.task.name, error.status, {})
                raise
            before += trainer.seconds_before
    if earlier:
        run = last_stage(run, len(earlier), epochs, tuple(last.facts()))
        run.seconds_before = before
    trainer = trainer_with(run, last, arguments | {"args": run.training}, data.task)
    begin_and_announce(run, trainer, last, _title(last, len(earlier), len(methods)) if earlier else "")
    metrics = train_and_report(run, trainer, data)
    if earlier:
        show_stages(run)
    return metrics


def _title(method: Method, number: int, count: int) -> str:
    """What the log calls stage `number`, which is 0 for the first; the folders count from 0, too."""
    where = f"folder stage-{number}" if number < count - 1 else "the run's own folder"
    return f"{method.name}, stage {number + 1} of {count} ({where})"


def lengths(training: Any, count: int, epochs: float | None) -> str:
    """A sentence about how long the stages of a schedule train."""
    if training.max_steps > 0:
        first = f"{training.max_steps} steps"
        return (
            f"{count} stages: the first trains for {first}, each other for {f'{epochs:g} epochs' if epochs else first}"
        )
    length = epochs or training.num_train_epochs
    total = training.num_train_epochs + length * (count - 1)
    return (
        f"{count} stages: the first trains for {training.num_train_epochs:g} epochs, each other for {length:g}; "
        f"{total:g} epochs in all"
    )


def start_stage(run: Run, number: int, epochs: float | None) -> Run:
    """The run of stage `number`, in its own locked folder, going on from its last checkpoint if there is one.

    Args:
        epochs: epochs of the stage; None: those of the run.

    Raises:
        InputError: the folder's checkpoints are damaged, or another process holds it.
    """
    clear_output_dir(run)
    folder = Path(run.training.output_dir) / f"stage-{number}"
    off: dict[str, Any] = {"do_predict": False, "push_to_hub": False}
    if run.training.logging_dir is not None:  # the steps of all stages begin at 0
        off["logging_dir"] = str(Path(run.training.logging_dir, f"stage-{number}"))
    off |= {"early_stopping_patience": None, "early_stopping_threshold": None}  # every stage has its full length
    training = _with_epochs(run.training, number, epochs, output_dir=str(folder), **off)
    reserve(folder, training)
    found = whole_checkpoint(folder)
    return dataclasses.replace(
        run,
        arguments=tuple(training if part is run.training else part for part in run.arguments),
        training=training,
        checkpoint=str(found) if found else None,
        started=time.time(),
    )


def last_stage(run: Run, number: int, epochs: float | None, keys: tuple[str, ...]) -> Run:
    """The run of the last stage, in the folder of the whole; its `run.json` gets the curve over all ("stages").

    Args:
        number: stages before this one.
        keys: entries of each stage's `run.json` that the curve holds beside its metrics, steps and seconds.
    """
    out = Path(run.training.output_dir)

    def with_curve(record: dict[str, Any]) -> dict[str, Any]:
        curve = []
        for stage in [*(record_of(out / f"stage-{k}") for k in range(number)), record]:
            metrics = {k: v for k, v in stage.get("metrics", {}).items() if k.startswith("eval_")}
            point = {k: stage.get(k) for k in (*keys, "steps")}
            curve.append({**point, "metrics": metrics, "seconds": stage.get("metrics", {}).get("train_runtime")})
        return record | {"seed": run.training.seed, "stages": curve}

    return dataclasses.replace(run, training=_with_epochs(run.training, number, epochs), finish_record=with_curve)


def _with_epochs(training: Any, number: int, epochs: float | None, **changes: Any) -> Any:
    if number > 0:
        changes |= {"seed": training.seed + number, "num_train_epochs": epochs or training.num_train_epochs}
        if epochs is not None:
            changes["max_steps"] = -1
    return dataclasses.replace(training, **changes)


def take_finished_stage(run: Run, trainer: LoRATrainer) -> bool:
    """Load the adapter of a stage that an earlier process finished, and return True.

    Otherwise return False: the stage will be trained, and its record will store its settings.

    Raises:
        InputError: the stage was trained with other settings.
    """
    folder = Path(run.training.output_dir)
    settings = trainer.numeric_settings()
    run.finish_record = partial(_with_settings, folder, settings)
    record = record_of(folder)
    if record.get("status") != "finished":
        if (folder / RUN_FILE).exists() and not record:
            logger.warning("%s cannot be read: the stage is run again", folder / RUN_FILE)
        return False
    _check_stage_settings(folder, record, settings, run)
    kept = record.get("adapter_sha256")
    if not (folder / ADAPTER_FILE).is_file() or kept not in (None, sha256_of(folder / ADAPTER_FILE)):
        logger.warning("%s is not what the stage wrote: the stage is run again", folder / ADAPTER_FILE)
        return False
    load_adapter(trainer.model, folder)
    logger.info("%s is finished: going on from its result", folder)
    if run.training.process_index == 0:
        unlock(folder)
    return True


def _with_settings(folder: Path, settings: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    adapter = folder / ADAPTER_FILE
    return record | {"settings": settings, "adapter_sha256": sha256_of(adapter) if adapter.is_file() else None}


def _check_stage_settings(folder: Path, record: dict[str, Any], settings: dict[str, Any], run: Run) -> None:
    saved = record.get("settings")
    if isinstance(saved, dict):
        check_settings(folder, saved, settings, "stage")
        return
    # Older records have the flags of the whole run, which later stages with epochs of their own do not share.
    own = {k: v for part in run.arguments for k, v in flags_of(part).items()} | {"seed": run.training.seed}
    own = json.loads(json.dumps(own, default=str))
    before = {**record.get("arguments", {}), "seed": record.get("seed")}
    names = settings.keys() & before.keys() & own.keys()
    if own.get("lambda_epochs") is not None and folder.name != "stage-0":
        names -= {"num_train_epochs", "max_steps"}
    check_settings(folder, {n: before[n] for n in names}, {n: own[n] for n in names}, "stage")


def show_stages(run: Run) -> None:
    """Put the curve over all stages into TensorBoard, where it is on."""
    if not run.training.should_save or "tensorboard" not in run.training.report_to:
        return
    from torch.utils.tensorboard import SummaryWriter

    out = Path(run.training.output_dir)
    with SummaryWriter(str(Path(run.training.logging_dir or out / "runs", "stages"))) as writer:
        for number, point in enumerate(record_of(out).get("stages", [])):
            for name, value in (point | point["metrics"]).items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"Stages/{name}", value, number)

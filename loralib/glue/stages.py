"""A run in several stages, each trained from where the last one ended: folders, skipping, and the curve over stages.

Stage k but the last lives in `output_dir/stage-k` as a run of its own, with its checkpoints, results and `run.json`.
The last stage is the run itself. Each stage has its own optimizer, warm-up and schedule, and shuffles by seed + k.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralib.adapters.own import load_adapter
from loralib.glue.data import GlueData
from loralib.glue.folder import clear_output_dir
from loralib.glue.record import RUN_FILE
from loralib.glue.run import Run, describe, load_start, train_and_report, trainer_of, trainer_parts
from loralib.methods import Method
from loralib.training.manifest import last_checkpoint
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
    """Train a model with one method after the other, each from where the last one ended; one method is one plain run.

    Args:
        methods: of each stage, on one and the same model.
        epochs: epochs of every stage but the first; None: those of the run.

    Returns:
        The final metrics of the last stage.
    """
    load_start(run, model)
    parts = trainer_parts(run, data, tokenizer, run.arguments[1], model)
    *earlier, last = methods
    for number, method in enumerate(earlier):
        stage = start_stage(run, number, run.training.num_train_epochs if number == 0 else epochs)
        trainer = trainer_of(stage, method, parts | {"args": stage.training}, data.task)
        if not take_finished_stage(stage, trainer):
            describe(stage, trainer, method, f"{method.name}, stage {number} of {len(methods)}")
            train_and_report(stage, trainer, data)
    if earlier:
        run = last_stage(run, len(earlier), epochs, tuple(last.facts()))
    trainer = trainer_of(run, last, parts | {"args": run.training}, data.task)
    describe(run, trainer, last)
    metrics = train_and_report(run, trainer, data)
    if earlier:
        show_stages(run)
    return metrics


def start_stage(run: Run, number: int, epochs: float | None) -> Run:
    """The run of stage `number`, in its own folder, going on from its last checkpoint if there is one.

    Args:
        epochs: epochs of the stage; None: those of the run.
    """
    clear_output_dir(run)
    folder = Path(run.training.output_dir) / f"stage-{number}"
    training = _with_epochs(run.training, number, epochs, output_dir=str(folder), do_predict=False, push_to_hub=False)
    found = last_checkpoint(folder)
    return dataclasses.replace(run, training=training, checkpoint=str(found) if found else None)


def last_stage(run: Run, number: int, epochs: float | None, keys: tuple[str, ...]) -> Run:
    """The run of the last stage, in the folder of the whole; its `run.json` gets the curve over all ("stages").

    Args:
        number: stages before this one.
        keys: entries of each stage's `run.json` that the curve holds beside its metrics and steps.
    """
    out = Path(run.training.output_dir)

    def with_curve(record: dict[str, Any]) -> dict[str, Any]:
        curve = []
        for stage in [*(_read(out / f"stage-{k}") for k in range(number)), record]:
            metrics = {k: v for k, v in stage["metrics"].items() if k.startswith("eval_")}
            curve.append({**{k: stage[k] for k in keys}, "metrics": metrics, "steps": stage["steps"]})
        return record | {"stages": curve}

    return dataclasses.replace(run, training=_with_epochs(run.training, number, epochs), complete=with_curve)


def _with_epochs(training: Any, number: int, epochs: float | None, **changes: Any) -> Any:
    if number > 0:
        changes |= {"seed": training.seed + number, "num_train_epochs": epochs or training.num_train_epochs}
        if epochs is not None:
            changes["max_steps"] = -1
    return dataclasses.replace(training, **changes)


def take_finished_stage(run: Run, trainer: LoRATrainer) -> bool:
    """Load the adapter of a stage that an earlier process finished; False where there is none."""
    folder = Path(run.training.output_dir)
    if not (folder / RUN_FILE).is_file() or _read(folder).get("status") != "finished":
        return False
    load_adapter(trainer.model, folder)
    logger.info("%s is finished: going on from its result", folder)
    return True


def show_stages(run: Run) -> None:
    """Put the curve over all stages into TensorBoard, where it is on."""
    if not run.training.should_save or "tensorboard" not in run.training.report_to:
        return
    from torch.utils.tensorboard import SummaryWriter

    out = Path(run.training.output_dir)
    with SummaryWriter(str(out / "runs" / "stages")) as writer:
        for number, point in enumerate(_read(out)["stages"]):
            for name, value in (point | point["metrics"]).items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"Stages/{name}", value, number)


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))

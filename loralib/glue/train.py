"""What a run does with its trainer: train, evaluate, predict, and write the results."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from loralib.adapters.writing import DiskError
from loralib.errors import RunDiverged, RunError, path_of
from loralib.glue import card
from loralib.glue.board import BoardCallback
from loralib.glue.data import GlueData
from loralib.glue.evaluation import HELDOUT, EvaluationCallback
from loralib.glue.folder import is_within, mark_finished, mark_unfinished
from loralib.glue.machine import forget_peak_memory, peak_memory
from loralib.glue.metrics import NaNOutputs, one_class, to_labels, to_scores
from loralib.glue.predictions import has_labels, write_predictions, write_submission
from loralib.glue.record import write_run
from loralib.glue.run import Run
from loralib.glue.stopping import early_stopping
from loralib.training.guards import worker_deaths, writing_threads
from loralib.training.lock import unlock
from loralib.training.manifest import the_same_command
from loralib.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)

# Errors of the system that a write to an open file raises; they name no path.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


def train_and_report(run: Run, trainer: LoRATrainer, data: GlueData, method: str | None = None) -> dict[str, Any]:
    """Train, evaluate and predict as the flags say, then write `run.json` and the model card.

    Callbacks with a `summary()` add facts to `run.json`. The folder is unlocked before `--push_to_hub` sends it.

    Args:
        method: short name of the method for the report; by default that of the trainer's `Method`.

    Returns:
        The final metrics.

    Raises:
        RunError: the run could not go on; `run.json` says why.
    """
    if method is None:
        assert trainer.method is not None
        method = trainer.method.name
    metrics: dict[str, Any] = {}
    try:
        if run.training.do_train:
            mark_unfinished(run.training)
        with worker_deaths(run.training), writing_threads(), divergences(run, trainer):
            _train_and_evaluate(run, trainer, data, metrics)
        if run.training.should_save:
            write_run(run, trainer, method, data.task.name, "finished", metrics)
            if run.training.do_train:
                mark_finished(run.training)
        _write_beside_the_record(run, trainer, metrics)
    except RunError as error:
        if run.training.should_save:
            with suppress(OSError):  # the disk may be full
                write_run(run, trainer, method, data.task.name, error.status, metrics)
                _write_to_board(trainer, metrics, succeeded=False)
        raise
    except OSError as error:
        path, output_dir = path_of(error), run.training.output_dir
        if path is None and not (isinstance(error, DiskError) or error.errno in _OF_DISKS):
            raise
        if path is None or is_within(path, output_dir):
            blamed = f"output_dir {output_dir} could not be written to ({error}): check its disk"
        else:
            blamed = f"{path} could not be used ({error.strerror}): make it usable"
        raise RunError(f"{blamed}, and {the_same_command(run.training)}.") from error
    finally:
        unlock(run.training.output_dir)
    if run.training.push_to_hub:
        card.push(trainer)
    return metrics


@contextmanager
def divergences(run: Run, trainer: LoRATrainer) -> Iterator[None]:
    """NaN outputs of a model that this run trains are the run's divergence; of any other model they are bad input."""
    try:
        yield
    except NaNOutputs as error:
        if not run.training.do_train:
            raise
        raise RunDiverged(
            f"{error.seen} after step {trainer.state.global_step}: start over {RunDiverged.way_out}."
        ) from error


def _write_beside_the_record(run: Run, trainer: LoRATrainer, metrics: dict[str, Any]) -> None:
    """The model card and TensorBoard's results. The run is finished without them, so a full disk costs a warning."""
    try:
        if run.training.should_save and run.training.do_train:
            card.write_card(run.training.output_dir)
        _write_to_board(trainer, metrics)
    except OSError as error:
        what = path_of(error) or f"the model card or TensorBoard's results in {run.training.output_dir}"
        logger.warning("the run is finished and recorded, but %s could not be written (%s)", what, error.strerror)


def _write_to_board(trainer: LoRATrainer, metrics: dict[str, Any], succeeded: bool = True) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, BoardCallback):
            callback.write_results(metrics, succeeded)


def _train_and_evaluate(run: Run, trainer: LoRATrainer, data: GlueData, metrics: dict[str, Any]) -> None:
    training = run.training
    trainer.add_callback(EvaluationCallback(trainer, data.evals.get(HELDOUT)))
    if (stopping := early_stopping(trainer)) is not None:
        trainer.add_callback(stopping)
    if training.do_train:
        trainer.add_callback(BoardCallback(trainer, run.arguments, data.task, run.started))
        forget_peak_memory()
        result = trainer.train(resume_from_checkpoint=run.checkpoint)
        run.facts["peak_memory"] = peak_memory(training.device)
        trainer.save_model(_internal_call=True)  # any other call would send the folder to the hub now
        trainer.save_state()
        train_metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
        trainer.log_metrics("train", train_metrics)
        trainer.save_metrics("train", train_metrics)
        metrics |= train_metrics
    if training.do_eval:
        run.facts["one_class"] = _scores_of_one_class(data)
        evaluation: dict[str, Any] = {}
        for name, split in data.evals.items():
            if name == HELDOUT:  # the callback has evaluated it beside the other half
                continue
            values = trainer.evaluate(split) | {"eval_samples": len(split)}
            trainer.log_metrics("eval", values)
            evaluation |= {f"{k}_mm": v for k, v in values.items()} if name == "mnli-mm" else values
        trainer.save_metrics("eval", evaluation)
        rate = evaluation.get("eval_samples_per_second")
        run.facts |= {} if rate is None else {"evaluation_rows_per_second": rate}
        metrics |= evaluation
    if training.do_predict:
        metrics |= _predict(run, trainer, data)


def _scores_of_one_class(data: GlueData) -> dict[str, float]:
    """What answering the most frequent class for every row scores, as `eval_*` and `heldout_*`."""
    halves = {"eval": next(iter(data.evals.values()), None), HELDOUT: data.evals.get(HELDOUT)}
    return {
        f"{half}_{name}": score
        for half, rows in halves.items()
        if rows is not None
        for name, score in one_class(data.task, rows["label"]).items()
    }


def _predict(run: Run, trainer: LoRATrainer, data: GlueData) -> dict[str, float]:
    """Write the predictions of each test split, and compute its metrics where it has usable labels."""
    found: dict[str, float] = {}
    for name, split in data.tests.items():
        labelled = has_labels(split)
        if labelled:
            logger.info("%s, test: all %d rows have a label, so predict_* metrics are computed", name, len(split))
        else:
            logger.info(
                "%s: the test split has no usable labels: predictions of %d rows only, no metrics", name, len(split)
            )
        output = trainer.predict(split if labelled else split.remove_columns("label"), metric_key_prefix="predict")
        values = {**(output.metrics or {}), "predict_samples": len(split)}
        trainer.log_metrics("predict", values)
        found |= {f"{k}_mm": v for k, v in values.items()} if name == "mnli-mm" else values
        labels = to_labels(output.predictions, data.task)
        if run.training.should_save:
            scores = to_scores(output.predictions, data.task) if run.data_args.predict_scores else None
            write_predictions(run.training.output_dir, name, labels, data.task, scores)
            if run.submission is not None:
                write_submission(run.submission, name, labels, data.task)
    trainer.save_metrics("predict", found)
    return found

"""Early stopping: the stock callback, which also respects AdaLoRA's budget and survives a resume here."""

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers import EarlyStoppingCallback

from loralib.errors import InputError
from loralib.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)


def early_stopping(trainer: LoRATrainer) -> "EarlyStopping | None":
    """The callback that the flags ask for, or None. It counts only evaluations at the method's target budget."""
    args = trainer.args
    if args.early_stopping_patience is None or not args.do_train:
        return None
    asked = [piece.at_target for piece in trainer.method_state.values() if hasattr(piece, "at_target")]

    def counts(step: int) -> bool:
        return all(at_target(step) for at_target in asked)

    return EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold or 0.0, counts)


def check_early_stopping(trainer: LoRATrainer) -> None:
    """If the flags ask for early stopping, log which evaluations it will count.

    Raises:
        InputError: no evaluation of the run can count.
    """
    stopping, total = early_stopping(trainer), trainer.total_steps() if trainer.args.do_train else 0
    if stopping is None:
        return
    first = next((step for step in range(total + 1) if stopping.counts(step)), None)
    if first is None:
        raise InputError(
            f"--early_stopping_patience counts only evaluations at the target budget, and none of the {total} steps "
            "reaches it: raise --final_warmup, or leave early stopping out."
        )
    logger.info(
        "early stopping: after %d evaluation(s) in a row that do not improve %s%s",
        stopping.early_stopping_patience,
        trainer.args.metric_for_best_model,
        f", counted from step {first} on, where the budget is the target" if first else "",
    )
    if not trainer.args.load_best_model_at_end:
        logger.warning(
            "early stopping without --load_best_model_at_end: the result is the model of the last step, not the best"
        )


class EarlyStopping(EarlyStoppingCallback):
    """The stock callback, with three differences.

    - It compares with the best evaluation that counts; the stock one compares with the best of all, although those from
      before AdaLoRA's final phase have another budget.
    - Counter and best value are restored from a checkpoint.
    - An evaluation after the training does not count.

    Args:
        early_stopping_patience: the run stops after this many evaluations in a row without improvement.
        early_stopping_threshold: an improvement must be larger than this.
        counts: counts(step) tells whether an evaluation after this number of optimizer steps counts.
    """

    def __init__(
        self, early_stopping_patience: int, early_stopping_threshold: float, counts: Callable[[int], bool]
    ) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.counts = counts
        self.best: float | None = None
        self.training = False
        self.stopped_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training, self.stopped_at = True, None
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        kept = (saved[0] if isinstance(saved, list) else saved or {}).get("attributes", {})
        self.early_stopping_patience_counter = kept.get("early_stopping_patience_counter", 0)
        self.best = kept.get("best")
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            # The run had stopped, and only its end is repeated.
            self.stopped_at = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not self.training or not self.counts(state.global_step):
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and self.early_stopping_patience_counter >= self.early_stopping_patience:
            self.stopped_at = state.global_step
            logger.info(
                "early stopping at step %d of %d: %d evaluation(s) in a row did not improve %s, whose best is %s",
                state.global_step,
                state.max_steps,
                self.early_stopping_patience_counter,
                args.metric_for_best_model,
                self.best,
            )

    def check_metric_value(self, args: Any, state: Any, control: Any, metric_value: float) -> None:
        super().check_metric_value(args, SimpleNamespace(best_metric=self.best), control, metric_value)
        improves = self.best is None or (
            metric_value > self.best if args.greater_is_better else metric_value < self.best
        )
        if improves and not math.isnan(metric_value):
            self.best = float(metric_value)

    def state(self) -> dict[str, Any]:
        """The entries for a checkpoint's trainer_state.json."""
        stock = super().state()
        return stock | {"attributes": stock["attributes"] | {"best": self.best}}

    def summary(self) -> dict[str, Any]:
        """Facts for run.json: the step at which the run was stopped (None if it was not), and the best value."""
        return {"early_stopping": {"stopped_at": self.stopped_at, "best": self.best}}

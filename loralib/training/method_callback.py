"""The one callback that lets the stock Trainer train with any `Method`: each hook is one of the method's places."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from loralib.methods import Method

logger = logging.getLogger(__name__)


class MethodCallback(TrainerCallback):
    """Calls a `Method` between clipping and the optimizer's step and right after it, and logs what it reports.

    The penalty is part of the loss and no callback can add it: `LoRATrainer` does.

    Args:
        method: the method.
        add_scalars: takes numbers by name to TensorBoard, at the current step; None: they are not written.
    """

    def __init__(self, method: Method, add_scalars: Callable[[Mapping[str, float]], Any] | None = None) -> None:
        self.method, self.add_scalars = method, add_scalars

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.begin(state.max_steps)  # the true number, also after auto_find_batch_size

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = args.logging_strategy == "steps" and (state.global_step + 1) % state.logging_steps == 0
        self.method.before_step(state.global_step, epoch=int(state.epoch or 0), measure=logged)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        skipped = getattr(optimizer, "step_was_skipped", False)  # accelerate's wrapper knows; the hook comes anyway
        self.method.after_step(state.global_step, gradients_valid=not skipped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.method.log_every and state.global_step % self.method.log_every == 0:
            self._write(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        if not self.method.log_every:
            self._write(state)
        if (complaint := self.method.complaint()) is not None:
            logger.warning("step %d: %s", state.global_step, complaint)

    def _write(self, state: Any) -> None:
        if self.add_scalars is not None and state.is_world_process_zero:
            self.add_scalars(self.method.scalars())

    def summary(self) -> dict[str, Any]:
        """What run.json says of the method."""
        return self.method.facts()

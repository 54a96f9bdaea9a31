"""The callback with which the stock Trainer trains any `Method`: it calls the method from the Trainer's hooks."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from loralib.errors import InputError
from loralib.methods import Method

logger = logging.getLogger(__name__)

# Key of the method's state in the optimizer's state. Entries that belong to no parameter are saved and loaded uncast.
STATE = "loralib_method"


class MethodCallback(TrainerCallback):
    """Calls a `Method` right before and right after the optimizer's step, and writes its numbers to TensorBoard.

    The state of the method is kept inside the optimizer's state. So every checkpoint of a stock Trainer holds it, and
    resuming restores it bit by bit. The penalty is part of the loss, so that a callback cannot add it; `WithPenalty`
    does. `WithPenalty` and `LoRATrainer` add this callback themselves.

    Args:
        method: the method.
        add_scalars: writes numbers by name to TensorBoard, at the current step; None: they are not written.
        penalty_in_loss: whether the trainer, or your own `compute_loss`, adds the penalty (`method.loss()`).
        keep_state: whether to keep the state inside the optimizer's; False if the trainer writes it to a file.
    """

    def __init__(
        self,
        method: Method,
        add_scalars: Callable[[Mapping[str, float]], Any] | None = None,
        *,
        penalty_in_loss: bool = False,
        keep_state: bool = True,
    ) -> None:
        self.method, self.add_scalars = method, add_scalars
        self.penalty_in_loss, self.keep_state = penalty_in_loss, keep_state

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Tell the method how many steps the run has; on resume, restore its state.

        Raises:
            InputError: the trainer does not add the penalty to the loss, has another optimizer than the method needs or
                one without the factors, or resumes from a checkpoint without the method's state; or the method's
                schedule does not fit.
        """
        method = self.method
        if method.penalty is not None and method.penalty_coef and not self.penalty_in_loss:
            raise InputError(
                f"{method.name} has a penalty, which no callback can add to the loss: use class MyTrainer(WithPenalty, "
                "YourTrainer) with method= and without this callback, or add method.loss() in your compute_loss and "
                "pass MethodCallback(method, penalty_in_loss=True)."
            )
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        own = {id(p) for group in method.own_groups for p in group["params"]}
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if method.needs_optimizer and not (isinstance(inner, method.optimizer_class) and own <= held):
            raise InputError(
                f"{method.name} needs an optimizer of its own, {method.optimizer_class.__name__}: give the trainer "
                "optimizers=(method.optimizer(lr), None)."
            )
        of = method.factors
        if held and of is not None and not any(id(p) in held for p in (*of.A, *of.B, *of.between)):
            raise InputError(
                f"the trainer's optimizer holds none of the factors of {method.name}: adapt the model before you make "
                "an optimizer for it, and give the trainer the adapted model itself."
            )
        method.begin(state.max_steps)  # with auto_find_batch_size this is the true number, too
        if self.keep_state and method.state and state.global_step:
            saved = optimizer.state.get(STATE)
            if saved is None:
                raise InputError(
                    f"the checkpoint of step {state.global_step} holds no state of {method.name} in its optimizer's, "
                    "so no run can go on from it: it was written without MethodCallback, or only the model was saved."
                )
            for name, piece in method.state.items():
                piece.load_state_dict(saved[name])
        elif self.keep_state:
            for piece in method.state.values():
                piece.restart()  # an earlier training may have left something

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.penalty_in_loss and self.method.forgotten("penalty"):
            raise InputError(
                f"the penalty of {self.method.name} was not computed in this step: call super().training_step in a "
                "training_step of your own, and add method.loss() in a loss of your own."
            )
        logged = state.global_step == 0 and args.logging_first_step
        logged = logged or (args.logging_strategy == "steps" and (state.global_step + 1) % state.logging_steps == 0)
        self.method.before_step(state.global_step, epoch=int(state.epoch or 0), measure=logged)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.method.called.clear()
        skipped = getattr(optimizer, "step_was_skipped", False)  # the hook is called for skipped steps, too
        self.method.after_step(state.global_step, gradients_valid=not skipped)
        if self.keep_state and self.method.state:
            optimizer.state[STATE] = {name: piece.state_dict() for name, piece in self.method.state.items()}

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
        """The method's facts for run.json."""
        return self.method.facts()

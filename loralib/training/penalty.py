"""A mixin with which any subclass of the stock Trainer trains a `Method`, penalty included."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from loralib.errors import InputError
from loralib.methods import Method
from loralib.training.method_callback import MethodCallback


class PenaltyState:
    """The penalty of the current accumulation group, and the sum since the last log, which stays on the device."""

    def __init__(self, device: torch.device) -> None:
        self.now: tuple[Tensor, list[nn.Parameter], list[Tensor]] | None = None  # value, parameters, gradients
        self.sum = torch.zeros((), device=device)
        self.steps = 0

    def add(self, value: Tensor) -> None:
        """Count the penalty (a scalar) of one optimizer step."""
        self.sum += value
        self.steps += 1

    def take(self) -> float:
        """Return the mean since the last log, and start again."""
        mean = (self.sum / self.steps).item()
        self.restore({})
        return mean

    def progress(self) -> dict[str, Any]:
        """The sums that a checkpoint keeps."""
        return {"penalty_sum": self.sum.item(), "penalty_steps": self.steps}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Set the sum to what a checkpoint holds, or to 0."""
        self.now = None
        self.sum.fill_(progress.get("penalty_sum", 0.0))
        self.steps = progress.get("penalty_steps", 0)


def _optimizer(method: Method, trainer: Any) -> torch.optim.Optimizer:
    """Make the method's optimizer with the settings of the trainer's flags."""
    args = trainer.args
    return method.optimizer(
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        args.weight_decay,
        decayed=set(trainer.get_decay_parameter_names(trainer.model)),
    )


class WithPenalty(Trainer):
    """Gives a subclass of the stock Trainer everything that a `Method` needs: penalty, optimizer, callback and state.

    Put it first among the bases; the class needs nothing else:

        class MyTrainer(WithPenalty, SFTTrainer):
            pass

        trainer = MyTrainer(model=model, args=args, train_dataset=rows, method=rm_lora(model, ...))

    Args:
        args, kwargs: arguments of the other base.
        method: the method to train, with its penalty. If it needs an optimizer of its own (SoRA), that is made too;
            otherwise the flags choose the optimizer. The four arguments below are for a variant without a `Method`.
        penalty: returns a scalar from the model's factors. Its gradient is added at the end of each accumulation group,
            before clipping, exactly as if `penalty_coef * penalty()` were part of every micro-batch's loss.
        penalty_coef: weight of the penalty; with 0 it is not computed (ledger L7).
        penalty_name: name under which the unweighted penalty is logged.
        make_optimizer: makes the optimizer from the trainer; None: the flags choose a stock one.

    Raises:
        InputError: `callbacks` holds a `MethodCallback`, so that the method would act twice.
    """

    # The stock annotations allow None, for a Trainer without a model; this one has a model.
    args: Any
    model: Any
    optimizer: Any

    # Whether the state of the method is kept inside the optimizer's state; False if a subclass writes it to a file.
    state_in_optimizer = True

    def __init__(
        self,
        *args: Any,
        method: Method | None = None,
        penalty: Callable[[], Tensor] | None = None,
        penalty_coef: float = 0.0,
        penalty_name: str = "penalty",
        make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        **kwargs: Any,
    ) -> None:
        if method is not None:
            penalty, penalty_coef, penalty_name = method.penalty, method.penalty_coef, method.penalty_name
            if method.needs_optimizer:
                make_optimizer = partial(_optimizer, method)
        super().__init__(*args, **kwargs)
        self.method = method
        if method is not None:
            if any(isinstance(callback, MethodCallback) for callback in self.callback_handler.callbacks):
                raise InputError(
                    "with method= the trainer adds a MethodCallback itself: leave yours out of callbacks=, or "
                    "leave out method=."
                )
            keeps = self.state_in_optimizer
            self.add_callback(MethodCallback(method, self.add_scalars, penalty_in_loss=True, keep_state=keeps))
        self.penalty = penalty if penalty_coef else None
        self.penalty_coef, self.penalty_name = penalty_coef, penalty_name
        self.make_optimizer = make_optimizer
        self._penalties = PenaltyState(self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.make_optimizer is not None:
            self.optimizer = self.make_optimizer(self)
        return super().create_optimizer(model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.penalty is not None:
            if self._penalties.now is None:  # once is enough: parameters do not change within a group
                self._penalties.now = self._differentiate(self.penalty)
            value, parameters, gradients = self._penalties.now
            loss = loss + self.penalty_coef * value / self.current_gradient_accumulation_steps
            if self.accelerator.sync_gradients:
                # The last backward is over, and the processes have averaged their gradients. The penalty's gradient is
                # the same on all of them, so it is added here and counts once.
                scaler = self.accelerator.scaler
                if scaler is not None:
                    gradients = list(torch._foreach_mul(gradients, scaler._scale))
                for p in parameters:
                    if p.grad is None:  # the forward has not used this parameter
                        p.grad = torch.zeros_like(p)
                own: list[Any] = [p.grad for p in parameters]
                torch._foreach_add_(own, gradients, alpha=self.penalty_coef)
                self._penalties.add(value)
                self._penalties.now = None
        return loss

    def _differentiate(self, penalty: Callable[[], Tensor]) -> tuple[Tensor, list[nn.Parameter], list[Tensor]]:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        with torch.autocast(self.args.device.type, enabled=False):
            value = penalty()
            gradients = torch.autograd.grad(value, trainable, allow_unused=True)
        pairs = [(p, g) for p, g in zip(trainable, gradients, strict=True) if g is not None]
        return value.detach(), [p for p, _ in pairs], [g for _, g in pairs]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._penalties.steps:
            mean = self._penalties.take()
            logs["task_loss"] = logs["loss"] - self.penalty_coef * mean
            logs[self.penalty_name] = mean
        elif "loss" in logs:
            logs["task_loss"] = logs["loss"]
        super().log(logs, start_time)

    def add_scalars(self, values: Mapping[str, float]) -> None:
        """Write values to TensorBoard under exactly these names, at the current step, if TensorBoard is on."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in values.items():
                    callback.tb_writer.add_scalar(name, value, self.state.global_step)

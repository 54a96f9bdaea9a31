"""The stock Trainer plus what adapters need: a penalty beside the task loss, small checkpoints, a watch on the loss.

No loop is copied: everything here is an override or a callback of the stock Trainer, and no method is named.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from loralib.errors import RunError
from loralib.export import load_adapter, load_method_state, save_adapter, save_method_state


class Stateful(Protocol):
    """A method's piece whose state belongs into a checkpoint (an allocator, say)."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None: ...


def task_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over classes, or mean squared error for one output; in float32.

    The stock DeBERTa model computes the same inside its forward, where picking the labelled rows costs a graph break
    and a synchronisation.

    Args:
        logits: (batch, classes), or (batch, 1) for regression.
        labels: (batch,).
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.view(-1).float(), labels.view(-1).float())
    return F.cross_entropy(logits.float(), labels.view(-1), label_smoothing=label_smoothing)


class LoRATrainer(Trainer):
    """Trainer of an adapted (or, without `adapter`, of a fully fine-tuned) sequence classifier.

    Args:
        penalty: returns a scalar from the model's factors; its gradient enters at the end of each accumulation group,
            before clipping, exactly as if `penalty_coef * penalty()` were part of every micro-batch's loss.
        penalty_coef: weight of the penalty; with 0 it is not computed (ledger L7).
        penalty_name: name under which the unweighted penalty is logged.
        make_optimizer: builds the run's one optimizer from the trainer, instead of the stock choice by flags.
        adapter: facts for the adapter's config file (method, r, alpha, ...); None for full fine-tuning.
        method_state: pieces whose state a checkpoint keeps, by name.
        kwargs: as the stock Trainer.
    """

    def __init__(
        self,
        *,
        penalty: Callable[[], Tensor] | None = None,
        penalty_coef: float = 0.0,
        penalty_name: str = "penalty",
        make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        adapter: dict[str, Any] | None = None,
        method_state: dict[str, Stateful] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # DeBERTa's forward takes **kwargs, which the Trainer reads as "divides its loss itself"; ours does not.
        self.model_accepts_loss_kwargs = False
        self.penalty = penalty if penalty_coef else None
        self.penalty_coef, self.penalty_name = penalty_coef, penalty_name
        self.make_optimizer = make_optimizer
        self.adapter = adapter
        self.method_state = method_state or {}
        self._penalty_now: tuple[Tensor, list[nn.Parameter], list[Tensor]] | None = None
        self._penalty_sum = torch.zeros((), device=self.args.device)
        self._penalty_steps = 0
        self._first_bad_step = torch.full((), -1, dtype=torch.long, device=self.args.device)

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.make_optimizer is not None:
            self.optimizer = self.make_optimizer(self)
        return super().create_optimizer(model)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, by the Trainer's own rule."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = task_loss(outputs["logits"], inputs["labels"], self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.penalty is not None:
            if self._penalty_now is None:  # parameters stay the same within a group: once is enough
                self._penalty_now = self._differentiate(self.penalty)
            value, parameters, gradients = self._penalty_now
            loss = loss + self.penalty_coef * value / self.current_gradient_accumulation_steps
            if self.accelerator.sync_gradients:
                # After the last backward: processes have averaged their gradients, and the penalty's, the same on all
                # of them, counts once.
                scaler = self.accelerator.scaler
                if scaler is not None:
                    gradients = torch._foreach_mul(gradients, scaler._scale)
                torch._foreach_add_([p.grad for p in parameters], gradients, alpha=self.penalty_coef)
                self._penalty_sum += value
                self._penalty_steps += 1
                self._penalty_now = None
        step = self.state.global_step
        unset = (self._first_bad_step < 0) & ~torch.isfinite(loss)
        self._first_bad_step = torch.where(unset, step, self._first_bad_step)
        return loss

    def _differentiate(self, penalty: Callable[[], Tensor]) -> tuple[Tensor, list[nn.Parameter], list[Tensor]]:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        with torch.autocast(self.args.device.type, enabled=False):
            value = penalty()
            gradients = torch.autograd.grad(value, trainable, allow_unused=True)
        pairs = [(p, g) for p, g in zip(trainable, gradients, strict=True) if g is not None]
        return value.detach(), [p for p, _ in pairs], [g for _, g in pairs]

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train:
            self.check_finite()
        if "loss" in logs and self._penalty_steps:
            mean = (self._penalty_sum / self._penalty_steps).item()
            logs["task_loss"] = logs["loss"] - self.penalty_coef * mean
            logs[self.penalty_name] = mean
            self._penalty_sum.zero_()
            self._penalty_steps = 0
        elif "loss" in logs:
            logs["task_loss"] = logs["loss"]
        super().log(logs, start_time)

    def add_scalars(self, values: Mapping[str, float]) -> None:
        """Write values to TensorBoard under these very names, at the current step, where TensorBoard is on."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in values.items():
                    callback.tb_writer.add_scalar(name, value, self.state.global_step)

    def check_finite(self) -> None:
        """Stop the run when a loss was not finite.

        The flag is kept on the device and read only here, where one logs or saves.

        Raises:
            RunError: names the first step in question and the last good checkpoint.
        """
        first = int(self.accelerator.gather(self._first_bad_step.view(1)).max())
        if first >= 0:
            raise RunError(
                f"the loss became NaN or infinite at step {first + 1} (noticed at step {self.state.global_step}, "
                f"learning rate {self._get_learning_rate():.3g}): {self._last_good_checkpoint()}; lower "
                "--learning_rate, warm up, or use bf16 or float32 instead of fp16."
            )

    def _last_good_checkpoint(self) -> str:
        from transformers.trainer_utils import get_last_checkpoint

        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        return f"the last good checkpoint is {last}" if last else "no checkpoint was written before"

    # ---- files ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.adapter is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, folder, self.adapter)
        self.model.config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.method_state:
            save_method_state({k: v.state_dict() for k, v in self.method_state.items()}, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.method_state:
            states = load_method_state(checkpoint)
            for name, piece in self.method_state.items():
                piece.load_state_dict(states.get(name, {}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.adapter is None:
            super()._load_best_model()
        else:
            load_adapter(self.model, self.state.best_model_checkpoint)

"""Stops a run at the next log or checkpoint after a value that is not finite, and warns when no parameter moves."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from loralib.errors import RunDiverged, RunError
from loralib.training.manifest import last_checkpoint, the_same_command

logger = logging.getLogger(__name__)


@contextmanager
def worker_deaths(args: Any) -> Iterator[None]:
    """Raise RunError, not torch's RuntimeError, when a process that loads data dies, perhaps because memory ran out."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or isinstance(error, RunError):
            raise
        said = " ".join(str(error).split())[:200].rstrip(". ")
        raise RunError(
            f"a process that loads data ended ({said}): give it more memory or lower "
            f"--dataloader_num_workers, and {the_same_command(args)}."
        ) from error


@contextmanager
def writing_threads() -> Iterator[None]:
    """Log one sentence, in place of a traceback, when a thread that writes (TensorBoard's) meets a full disk."""

    def said(failed: threading.ExceptHookArgs) -> None:
        if isinstance(failed.exc_value, OSError):
            logger.warning("a file of logs could not be written (%s)", failed.exc_value)
        else:
            before(failed)

    before, threading.excepthook = threading.excepthook, said
    try:
        yield
    finally:
        threading.excepthook = before


class Guards(Trainer):
    """Keeps every loss and gradient norm on the device, and checks them whenever the run logs or saves.

    So a step costs no synchronisation. Until the check the run trains on; the message names the first bad step.
    """

    # The stock annotations allow None, for a Trainer without model or data; this one has both.
    args: Any
    model: Any
    train_dataset: Any
    processing_class: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._watched: list[tuple[int, Tensor]] = []  # (step, scalar on the device) since the last check
        self.add_callback(MovementWatch(self))
        if self.args.fp16 and self.args.device.type == "cpu":
            logger.warning("--fp16 has no effect on the CPU, this run computes in float32: --bf16 works there.")

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything that trains."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def _watch(self, value: Tensor) -> None:
        """Keep a loss or norm of this step. A check looks at all of them, so that a step costs nothing."""
        self._watched.append((self.state.global_step, value.detach()))
        # In case the run does not log or save. A step has a value for each micro-batch, and the norm.
        if len(self._watched) >= 2000:
            self.check_finite()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # With an fp16 scaler an infinite norm is normal: the scaler skips the step.
        if isinstance(norm, Tensor) and self.accelerator.scaler is None:
            self._watch(norm)
        return norm

    def check_finite(self) -> None:
        """Stop the run when a loss or gradient norm was not finite.

        The values stay on the device and are read only here, whenever the run logs or saves.

        Raises:
            RunDiverged: the message names the first such step and the last good checkpoint. All processes raise it.
        """
        never = 2**62
        first = torch.full((1,), never, device=self.args.device)
        if self._watched:
            steps = torch.tensor([step for step, _ in self._watched], device=self.args.device)
            finite = torch.isfinite(torch.stack([value.to(self.args.device) for _, value in self._watched]))
            first = torch.where(finite, never, steps).min().view(1)
            self._watched = []
        step = int(self.accelerator.gather(first).min())
        if step < never:
            last = last_checkpoint(self.args.output_dir)
            raise RunDiverged(
                f"the loss or its gradient became NaN or infinite at step {step + 1} (noticed at step "
                f"{self.state.global_step}, learning rate {self._get_learning_rate():.3g}): start over "
                f"{RunDiverged.way_out}; "
                f"{f'the last good checkpoint is {last}' if last else 'no checkpoint was written before'}."
            )


class MovementWatch(TrainerCallback):
    """Warns when no trainable parameter moved in the first `STEPS` steps."""

    STEPS = 10

    def __init__(self, trainer: Guards) -> None:
        self.trainer = trainer

    def _norms(self) -> Tensor:
        return torch.stack(torch._foreach_norm([p.detach() for _, p in self.trainer.trainable()]))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check_at = min(state.global_step + self.STEPS, state.max_steps)
        self.norms = self._norms()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.check_at:
            if torch.equal(self.norms, self._norms()) and state.is_world_process_zero:
                logger.warning(
                    "no trainable parameter has changed by step %d: learning_rate is %g, max_grad_norm %g, fp16 %s",
                    state.global_step,
                    args.learning_rate,
                    args.max_grad_norm,
                    args.fp16,
                )

"""On SIGTERM, which clusters send before they take a machine back, a run finishes its step and writes a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from loralib.errors import RunInterrupted
from loralib.training.checkpoints import Checkpoints
from loralib.training.manifest import the_same_command


class StopOnSigterm(Checkpoints):
    """All processes stop after the same step when any of them gets SIGTERM."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._stop_requested = False
        self._votes: Any = None  # a process group on the CPU, for several processes

    @contextmanager
    def sigterm_stops(self) -> Iterator[None]:
        if self.args.world_size > 1 and self._votes is None:
            self._votes = dist.new_group(backend="gloo")  # on the CPU, voting waits for no GPU
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
            yield
            return

        def request(number: int, frame: Any) -> None:
            self._stop_requested = True

        self._stop_requested = False
        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def _agree_to_stop(self) -> bool:
        """Whether any process was asked to stop. All processes get the same answer at the same step."""
        if self._votes is not None:
            vote = torch.tensor(int(self._stop_requested))
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._votes)
            return bool(vote)
        return self._stop_requested

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not self._agree_to_stop() or self._awaits_end_of_epoch():
            return
        if not (self._saved and self._saved[-1].name == f"checkpoint-{self.state.global_step}"):
            self._save_checkpoint(model, trial)
        raise RunInterrupted(
            f"stopped by SIGTERM after step {self.state.global_step} of {self.state.max_steps}: "
            f"{the_same_command(self.args)}."
        )

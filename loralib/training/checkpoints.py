"""Writes checkpoints so that a killed run or a full disk leaves the last good one."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from loralib.adapters.own import load_method_state, save_method_state
from loralib.adapters.writing import disk_errors, way_out
from loralib.errors import RunError
from loralib.methods import Stateful
from loralib.training.guards import Guards
from loralib.training.manifest import remove_checkpoint, rotate, the_same_command, write_manifest
from loralib.training.settings import argument_settings, evaluations_decide


class RunningSums(Protocol):
    """Sums from which the next log is made; a checkpoint keeps them as JSON values."""

    def progress(self) -> dict[str, Any]: ...

    def restore(self, progress: Mapping[str, Any]) -> None: ...


class Checkpoints(Guards):
    """Writes checkpoints. A checkpoint is valid as soon as it has its manifest; only then are older ones removed."""

    def __init__(
        self,
        *,
        settings: Mapping[str, Any] | None = None,
        method_state: dict[str, Stateful] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = dict(settings or {})
        self.method_state = method_state or {}
        self.running_sums: list[RunningSums] = []
        self._epoch_over = False
        self._save_due = False
        self._saved: list[Path] = []  # checkpoints that this process has written since training began
        self._train_began = time.time()

    def numeric_settings(self) -> dict[str, Any]:
        """Every setting that decides the run's numbers, as JSON values."""
        own = self.settings | argument_settings(self.args)
        own |= {"train_rows": len(self.train_dataset), "train_data": _sample(self.train_dataset)}
        if evaluations_decide(self.args) and isinstance(self.eval_dataset, Sized) and len(self.eval_dataset):
            own |= {"eval_rows": len(self.eval_dataset)}
            if not isinstance(self.eval_dataset, dict):
                own |= {"eval_data": _sample(self.eval_dataset)}
        return json.loads(json.dumps(own, default=str))

    def _progress(self) -> dict[str, Any]:
        """What a resumed run needs beside the files of the stock Trainer, as JSON values.

        - losses: for each process, the sum of its losses since the last log.
        - total_loss: the sum of the losses that have been logged; logged_step: the step of the last log.
        - seconds: duration of the training so far.
        - finished: whether no step is left.
        - what the `running_sums` add (penalty_sum, penalty_steps).
        """
        own = {name: value for sums in self.running_sums for name, value in sums.progress().items()}
        return own | {
            "losses": self.accelerator.gather(self._tr_loss.view(1)).tolist(),
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": time.time() - self._train_began,
            "finished": bool(self.control.should_training_stop or self.state.global_step >= self.state.max_steps),
        }

    def _awaits_end_of_epoch(self) -> bool:
        """Whether a checkpoint must wait for the evaluation and the log at the end of the epoch."""
        # exact resume: a resumed run begins with the next epoch, so it would leave out this evaluation.
        ends = self.control.should_training_stop or float(self.state.epoch or 0).is_integer()
        return ends and not self._epoch_over

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer, schedule and method state. The stock method fails in some versions of transformers for
        several processes on the CPU."""
        if checkpoint is None:
            return
        for name, piece in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            piece.load_state_dict(torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True))
        if self.method_state:
            states = load_method_state(checkpoint)
            for name, piece in self.method_state.items():
                piece.load_state_dict(states.get(name, {}))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.method_state:
            save_method_state({k: v.state_dict() for k, v in self.method_state.items()}, output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and then its manifest, with which it counts; after that, remove older ones."""
        if self._awaits_end_of_epoch():
            self._save_due = True
            return
        self._save_due = False
        self.check_finite()
        progress = self._progress()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save and folder.exists():  # of a killed run, or from beyond the one that is resumed
                remove_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            with _no_half_checkpoint(folder), disk_errors():
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    content = {"step": self.state.global_step, "settings": self.numeric_settings()}
                    write_manifest(folder, content | {"progress": progress})
        except OSError as error:
            raise RunError(
                f"the checkpoint of step {self.state.global_step} could not be written to {folder} "
                f"({' '.join(str(error).split())[:200]}): {way_out(error)}, and {the_same_command(self.args)}."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self._saved.append(folder)
        if self.args.should_save:
            rotate(folder, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # no process may end the run while the first one still writes


def _sample(rows: Any) -> str:
    """A digest of the first, the middle and the last row."""
    some = json.dumps([rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})], sort_keys=True, default=str)
    return hashlib.sha256(some.encode()).hexdigest()[:12]


@contextmanager
def _no_half_checkpoint(folder: Path) -> Iterator[None]:
    """Remove a checkpoint whose writing fails."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise

"""Exact resume: on the CPU, a run that goes on from a checkpoint ends bit-identical to an uninterrupted one.

A comment that begins with "exact resume:" marks each place, here and in `checkpoints` and `sampling`, where the stock
Trainer would break this; docs/running.md lists them. This module overrides methods of the stock Trainer, private ones
too, and copies no loop.
"""

import logging
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from loralib.errors import InputError, RunError
from loralib.training.manifest import last_checkpoint, read_manifest, remove_checkpoint, remove_leftovers
from loralib.training.sampling import Sampling
from loralib.training.settings import check_settings
from loralib.training.sigterm import StopOnSigterm

logger = logging.getLogger(__name__)


class ExactResume(StopOnSigterm, Sampling):
    """A stock Trainer with exact resume, crash-safe checkpoints and guards. The model need not be adapted.

    Its bases have one subject each: `StopOnSigterm` (signals), `Checkpoints` (files), `Guards` (values that are not
    finite, parameters that do not move) and `Sampling` (rows).

    Args:
        settings: the settings beside `args` that decide the run's numbers (the method's flags, the data), as JSON
            values. A checkpoint with other settings is refused.
        method_state: the pieces whose state a checkpoint keeps, by name.
        kwargs: arguments of the stock Trainer.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._resumed: tuple[str, dict[str, Any]] | None = None  # checkpoint and its progress
        self._initial: dict[str, Any] | None = None  # where auto_find_batch_size begins again
        self._finished = False
        self.seconds_before = 0.0  # of training, up to the checkpoint that is resumed
        self.add_callback(Boundaries(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the stock method does. On SIGTERM, finish the step, save a checkpoint and raise.

        Raises:
            InputError: the checkpoint is incomplete, or the run has other settings than it; the message names them.
            RunDiverged: a loss or gradient is not finite.
            RunInterrupted: SIGTERM came.
            RunError: a checkpoint could not be written.
        """
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir)
            if found is None:
                raise InputError(f"output_dir {self.args.output_dir} holds no complete checkpoint to resume from.")
            resume_from_checkpoint = str(found)
        self._resumed = None
        if resume_from_checkpoint:
            manifest = read_manifest(Path(resume_from_checkpoint))
            check_settings(Path(resume_from_checkpoint), manifest["settings"], self.numeric_settings())
            if "optimizer.pt" not in manifest["files"]:
                raise InputError(
                    f"checkpoint {resume_from_checkpoint} holds only the model (--save_only_model), so no run can go "
                    "on from it: start over with --overwrite_output_dir."
                )
            self._resumed = (str(resume_from_checkpoint), manifest["progress"])
        self._initial = None
        with self.sigterm_stops():
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.auto_find_batch_size:  # the loop is entered again with a smaller batch
            if self._initial is None:
                self._initial = {
                    "parameters": {n: p.detach().cpu().clone() for n, p in self.trainable()},
                    "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
                    "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                }
            else:
                self.start_over()
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(max_steps, *args, **kwargs)
        names = ("logging_steps", "eval_steps", "save_steps")
        before = {name: getattr(self.state, name) for name in names}
        # exact resume: the intervals are those of this run's flags; the stock Trainer would keep the checkpoint's.
        self.state.compute_steps(self.args, max_steps)
        for name in names:
            if self._resumed is not None and before[name] != (now := getattr(self.state, name)):
                logger.info("%s was %s until the checkpoint and is %s from here on", name, before[name], now)
        return found

    def start_over(self) -> None:
        """Restore parameters and random states from before the first step, and remove optimizer and checkpoints.

        Raises:
            RunError: the attempt went on from a checkpoint, which a smaller batch cannot continue.
        """
        if self._resumed is not None:
            raise RunError(
                f"the batch of {self._resumed[0]} does not fit into memory any more: free memory, or start over with "
                "--overwrite_output_dir."
            )
        assert self._initial is not None
        logger.warning("the batch does not fit into memory: starting over with a smaller one")
        with torch.no_grad():
            for name, p in self.trainable():
                p.copy_(self._initial["parameters"][name])
                p.grad = None
        python, numpy, cpu = self._initial["random"]
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self._initial["cuda"]:
            torch.cuda.set_rng_state_all(self._initial["cuda"])
        self.optimizer = self.lr_scheduler = None
        for piece in self.method_state.values():
            piece.restart()
        for folder in self._saved:
            if folder.exists():
                remove_checkpoint(folder)

    def begin(self) -> None:
        """Set the running sums to 0 or, on resume, to the checkpoint's. Training begins with this."""
        self._watched = []
        self._finished = self._save_due = False
        self._saved = []
        self._train_began = time.time()
        if self.args.should_save:
            remove_leftovers(self.args.output_dir)
        for sums in self.running_sums:
            sums.restore(self._resumed[1] if self._resumed else {})
        if self._resumed is None:
            return
        checkpoint, progress = self._resumed
        # exact resume: the next logged loss is a mean over steps before and after the checkpoint, as is the penalty.
        self._tr_loss.fill_(progress["losses"][self.args.process_index])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["logged_step"]
        # exact resume: train_loss, train_runtime and the speeds cover the whole run.
        self._initial_global_step = 0
        self.seconds_before = progress["seconds"]
        self._train_began -= self.seconds_before
        self._finished = progress["finished"]
        if self._finished:
            # exact resume: the stock Trainer restores the random states only when it enters an epoch.
            self._load_rng_state(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Load as the stock method does. This also loads checkpoints written with numpy 1 under numpy 2, which renamed
        a function, and the other way round."""
        # exact resume: the stock Trainer refuses such a file.
        rebuild: Any = np.ndarray.__reduce__(np.zeros(1))[0]
        paths = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
        with torch.serialization.safe_globals([(rebuild, path) for path in paths]):
            super()._load_rng_state(checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._epoch_over = False
        if self._finished:  # exact resume: the stock loop would make one more step.
            self.control.should_training_stop = True
            return
        if self._length_sampler is not None:
            self._length_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # exact resume: --eval_on_start evaluates once, not at a restart.
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # The stock Trainer would add only this process's own share.
        self._tr_loss = self.accelerator.gather(self._tr_loss.view(1)).mean()
        return super()._finalize_training(trial, num_train_samples, min(start_time, self._train_began))

    def total_steps(self) -> int:
        """The number of optimizer steps of the whole run, computed by the stock Trainer."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]


class Boundaries(TrainerCallback):
    """Tells the trainer when training begins and when an epoch has ended."""

    def __init__(self, trainer: ExactResume) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._epoch_over = True
        if self.trainer._save_due:
            control.should_save = True

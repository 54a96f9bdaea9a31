"""A stock Trainer whose runs are not lost and not silently wrong; it knows nothing of adapters.

- A run that goes on from a checkpoint ends bitwise as if it had not been stopped, whenever that was; the places where
  the stock Trainer does not hold that are marked "exact resume".
- A checkpoint counts once it is complete; SIGTERM saves one; a full disk keeps the last good one.
- A loss or gradient that is not finite stops the run, and parameters that do not move are said.
- Several processes count every row once.

No loop is copied: all of it is overrides and one callback.
"""

import hashlib
import json
import logging
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import rotate_checkpoints

from loralib.checkpoint import check_settings, last_checkpoint, read_manifest, write_manifest
from loralib.errors import InputError, RunDiverged, RunError, RunInterrupted

logger = logging.getLogger(__name__)

# Stock arguments that decide a run's numbers: a checkpoint is only resumed with the same ones.
NUMERIC_ARGUMENTS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "auto_find_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "n_gpu",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "neftune_noise_alpha",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "bf16",
    "fp16",
)
OWN_ROWS = "own_rows"  # of a batch's first rows: how many count, and their share in the mean over all processes


class RunTrainer(Trainer):
    """The stock Trainer with exact resume, complete checkpoints, and a watch on the run.

    Args:
        settings: what decides the run's numbers beside `args` (the method's flags, the data): plain JSON values. A
            checkpoint with other ones is refused.
        kwargs: as the stock Trainer.
    """

    # The stock annotations are unions with None that hold for a Trainer without a model or data.
    args: Any
    model: Any
    train_dataset: Any
    processing_class: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *, settings: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = dict(settings or {})
        self._watched: list[tuple[int, Tensor]] = []  # (step, scalar on the device) since the last look
        self._resumed: tuple[str, dict[str, Any]] | None = None  # checkpoint and its progress
        self._initial: dict[str, Any] | None = None  # for auto_find_batch_size
        self._length_sampler: LengthGroupedSampler | None = None
        self._stop_requested = False
        self._votes: Any = None  # a process group on the CPU
        self._finished = False
        self._epoch_over = False
        self._save_due = False
        self._saved: list[Path] = []  # checkpoints since training began
        self._train_began = time.time()
        self.add_callback(RunWatch(self))
        if self.args.fp16 and self.args.device.type == "cpu":
            logger.warning("--fp16 has no effect on the CPU, this run computes in float32: --bf16 works there.")

    # ---- from start to end ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock `train`; on SIGTERM it finishes the step, saves a checkpoint and raises.

        Raises:
            InputError: the checkpoint is incomplete, or of a run with other settings; the message names them.
            RunDiverged: a loss or gradient is not finite.
            RunInterrupted: SIGTERM.
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
                    f"checkpoint {resume_from_checkpoint} holds the model alone (--save_only_model), so no run can go "
                    "on from it: start over with --overwrite_output_dir."
                )
            self._resumed = (str(resume_from_checkpoint), manifest["progress"])
        self._initial = None
        if self.args.world_size > 1 and self._votes is None:
            self._votes = dist.new_group(backend="gloo")  # agreeing to stop costs no synchronisation of the GPU
        with self._sigterm():
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def numeric_settings(self) -> dict[str, Any]:
        """All that decides the run's numbers, as JSON values."""
        own = self.settings | {name: getattr(self.args, name) for name in NUMERIC_ARGUMENTS}
        rows = self.train_dataset
        some = json.dumps([rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})], sort_keys=True, default=str)
        own |= {"train_rows": len(rows), "train_data": hashlib.sha256(some.encode()).hexdigest()[:12]}
        return json.loads(json.dumps(own, default=str))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.auto_find_batch_size:  # the loop is entered again with a smaller batch
            if self._initial is None:
                self._initial = {
                    "parameters": {n: p.detach().cpu().clone() for n, p in self._trainable()},
                    "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
                    "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                }
            else:
                self.start_over()
        return super()._inner_training_loop(*args, **kwargs)

    def start_over(self) -> None:
        """Go back to before the first step: parameters, random states, optimizer, and no checkpoint of the attempt.

        Raises:
            RunError: the attempt went on from a checkpoint, whose steps a smaller batch cannot continue.
        """
        if self._resumed is not None:
            raise RunError(
                f"the batch of {self._resumed[0]} does not fit into memory any more: free some, or start over with "
                "--overwrite_output_dir."
            )
        assert self._initial is not None
        logger.warning("the batch does not fit into memory: starting over with a smaller one")
        with torch.no_grad():
            for name, p in self._trainable():
                p.copy_(self._initial["parameters"][name])
                p.grad = None
        python, numpy, cpu = self._initial["random"]
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self._initial["cuda"]:
            torch.cuda.set_rng_state_all(self._initial["cuda"])
        self.optimizer = self.lr_scheduler = None
        for folder in self._saved:
            shutil.rmtree(folder, ignore_errors=True)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def begin(self) -> None:
        """Set the running sums to 0 or to what the checkpoint holds (exact resume); called when training begins."""
        self._watched = []
        self._finished = self._save_due = False
        self._saved = []
        self._train_began = time.time()
        if self._resumed is None:
            return
        checkpoint, progress = self._resumed
        self._tr_loss.fill_(progress["losses"][self.args.process_index])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["logged_step"]
        self._initial_global_step = 0  # train_loss is the mean over the whole run ...
        self._train_began -= progress["seconds"]  # ... and so are its seconds
        self._finished = progress["finished"]
        if self._finished:
            self._load_rng_state(checkpoint)  # the stock Trainer does so only where it enters an epoch

    def _progress(self) -> dict[str, Any]:
        return {
            "losses": self.accelerator.gather(self._tr_loss.view(1)).tolist(),
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": time.time() - self._train_began,
            "finished": bool(self.control.should_training_stop or self.state.global_step >= self.state.max_steps),
        }

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._epoch_over = False
        if self._finished:  # the stock loop would make one step more
            self.control.should_training_stop = True
            return
        if self._length_sampler is not None:
            self._length_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # --eval_on_start: not at every restart
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # the stock Trainer would add this process's own share
        self._tr_loss = self.accelerator.gather(self._tr_loss.view(1)).mean()
        return super()._finalize_training(trial, num_train_samples, min(start_time, self._train_began))

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, by the Trainer's own rule."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    # ---- SIGTERM ----

    @contextmanager
    def _sigterm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread only
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
        """Whether any process was asked to stop; all answer the same at the same step."""
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
            f"stopped by SIGTERM after step {self.state.global_step} of {self.state.max_steps}; "
            f"{self._last_good_checkpoint()}, from which the same command goes on."
        )

    # ---- data ----

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        if len(dataloader) == 0:
            rows, batch = len(self.train_dataset), self._train_batch_size * args.world_size
            raise InputError(
                f"{rows} training rows fill no batch of {batch} and --dataloader_drop_last leaves them out: drop the "
                "flag or lower --per_device_train_batch_size."
            )
        return super().set_initial_training_values(args, dataloader)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """As stock, but length grouping draws from (seed, epoch): the same on every process and after a resume."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        names = self.processing_class.model_input_names if self.processing_class is not None else ["input_ids"]
        table = hasattr(dataset, "column_names")  # a Dataset reads one column much faster than its rows
        lengths = [len(ids) for ids in (dataset[names[0]] if table else (row[names[0]] for row in dataset))]
        if min(lengths) == max(lengths):
            logger.warning(
                "all rows have length %d, so grouping by length does nothing: --pad_to_max_length False", lengths[0]
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._length_sampler = LengthGroupedSampler(lengths, self.get_total_train_batch_size(self.args), seed)
        return self._length_sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As stock, but the last batch of an epoch counts every row once when several processes share it.

        Each gets a full batch there, filled up with rows from the epoch's start. These are marked here and left out of
        the loss, which is weighted so that the average over processes is the mean over the rows that are left.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        args = self.args
        left = len(self.train_dataset) % (self._train_batch_size * args.world_size)
        ends = self.accelerator.gradient_state.end_of_dataloader
        uneven = left and not args.dataloader_drop_last and args.train_sampling_strategy != "batch_rebalance"
        if args.world_size > 1 and uneven and ends and batches:
            own = min(max(left - args.process_index * self._train_batch_size, 0), self._train_batch_size)
            batches[-1][OWN_ROWS] = (own, own * args.world_size / left)
        return batches, items

    # ---- values that are not finite ----

    def _watch(self, value: Tensor) -> None:
        """Keep a loss or norm of this step; looked at together, so a step costs no operation and no waiting."""
        self._watched.append((self.state.global_step, value.detach()))
        if len(self._watched) >= 2000:  # where nothing is logged or saved
            self.check_finite()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # an fp16 scaler meets infinity and skips the step
        if isinstance(norm, Tensor) and self.accelerator.scaler is None:
            self._watch(norm)
        return norm

    def check_finite(self) -> None:
        """Stop the run when a loss or gradient norm was not finite.

        The values are kept on the device and read only here, where one logs or saves.

        Raises:
            RunDiverged: names the first step in question and the last good checkpoint; on all processes together.
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
            raise RunDiverged(
                f"the loss or its gradient became NaN or infinite at step {step + 1} (noticed at step "
                f"{self.state.global_step}, learning rate {self._get_learning_rate():.3g}): "
                f"{self._last_good_checkpoint()}; lower --learning_rate, warm up, or use bf16 or float32, not fp16."
            )

    def _last_good_checkpoint(self) -> str:
        last = last_checkpoint(self.args.output_dir)
        return f"the last good checkpoint is {last}" if last else "no checkpoint was written before"

    # ---- checkpoints ----

    def _awaits_end_of_epoch(self) -> bool:
        """Whether a checkpoint has to wait until the end of the epoch has evaluated and logged (exact resume)."""
        ends = self.control.should_training_stop or float(self.state.epoch or 0).is_integer()
        return ends and not self._epoch_over

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As stock, for what this project trains with; older versions cannot load for several processes on the CPU."""
        if checkpoint is not None:
            for name, piece in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
                piece.load_state_dict(torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint; it counts once its manifest is there, and only then older ones are removed."""
        if self._awaits_end_of_epoch():
            self._save_due = True
            return
        self._save_due = False
        self.check_finite()
        progress = self._progress()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save and folder.exists():  # what a killed run left
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                content = {"step": self.state.global_step, "settings": self.numeric_settings(), "progress": progress}
                write_manifest(folder, content)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError on a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise RunError(
                f"the checkpoint of step {self.state.global_step} could not be written to {folder} "
                f"({' '.join(str(error).split())[:200]}): {self._last_good_checkpoint()}; make room, and the same "
                "command goes on from it."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self._saved.append(folder)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=str(folder.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
            )
        self.accelerator.wait_for_everyone()  # nobody ends a run while the first process still writes


class LengthGroupedSampler(Sampler[int]):
    """Rows of about equal length together: the stock rule (shuffle, then sort within large groups), drawn from
    (seed, epoch) instead of the global generator, so that every process and every resumed run draws the same order.

    Args:
        lengths: of every row.
        batch_size: rows of one optimizer step over all processes.
        seed: the run's.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.epoch) % 2**63)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=draw))


class RunWatch(TrainerCallback):
    """The trainer's own places in the stock loop; and a warning when nothing moves in the first steps."""

    STEPS = 10

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def _norms(self) -> Tensor:
        return torch.stack(torch._foreach_norm([p.detach() for _, p in self.trainer._trainable()]))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()
        self.check_at = min(state.global_step + self.STEPS, state.max_steps)
        self.norms = self._norms()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.check_at:
            if torch.equal(self.norms, self._norms()) and state.is_world_process_zero:
                logger.warning(
                    "no trainable parameter moved until step %d: learning_rate is %g, max_grad_norm %g, fp16 %s",
                    state.global_step,
                    args.learning_rate,
                    args.max_grad_norm,
                    args.fp16,
                )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._epoch_over = True
        if self.trainer._save_due:
            control.should_save = True

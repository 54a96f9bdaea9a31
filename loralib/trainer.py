"""The stock Trainer plus what adapters need: a penalty beside the task loss, small checkpoints, a watch on the run.

No loop is copied: everything here is an override or a callback of the stock Trainer, and no method is named. A run that
goes on from a checkpoint ends bitwise as if it had not been stopped; the four places where the stock Trainer does not
hold that are marked "exact resume".
"""

import json
import logging
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import rotate_checkpoints

from loralib.adapt import adapted_layers
from loralib.checkpoint import check_settings, last_checkpoint, read_manifest, write_manifest
from loralib.errors import InputError, RunDiverged, RunError, RunInterrupted
from loralib.export import load_adapter, load_method_state, save_adapter, save_method_state

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


class Stateful(Protocol):
    """A method's piece whose state belongs into a checkpoint (an allocator, say)."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None: ...

    def restart(self) -> None: ...


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
        settings: what decides the run's numbers beside `args` (the method's flags, the data): plain JSON values. A
            checkpoint with other ones is refused.
        kwargs: as the stock Trainer.
    """

    # The stock annotations are unions with None that hold for a Trainer without a model or data.
    args: Any
    model: Any
    train_dataset: Any
    processing_class: Any

    def __init__(
        self,
        *,
        penalty: Callable[[], Tensor] | None = None,
        penalty_coef: float = 0.0,
        penalty_name: str = "penalty",
        make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        adapter: dict[str, Any] | None = None,
        method_state: dict[str, Stateful] | None = None,
        settings: Mapping[str, Any] | None = None,
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
        self.settings = dict(settings or {})
        self._penalty_now: tuple[Tensor, list[nn.Parameter], list[Tensor]] | None = None
        self._penalty_sum = torch.zeros((), device=self.args.device)
        self._penalty_steps = 0
        self._watched: list[tuple[int, Tensor]] = []  # (step, scalar on the device) since the last look
        self._resumed: tuple[str, dict[str, Any]] | None = None  # checkpoint and its progress, until training begins
        self._initial: dict[str, Any] | None = None  # for auto_find_batch_size
        self._length_sampler: LengthGroupedSampler | None = None
        self._stop_requested = False
        self._votes: Any = None  # a process group on the CPU
        self._finished = False
        self._epoch_over = False
        self._save_due = False
        self._saved_step = -1
        self._train_began = time.time()
        self.add_callback(RunWatch(self))
        if self.args.fp16 and self.args.device.type == "cpu":
            logger.warning("--fp16 has no effect on the CPU, this run computes in float32: --bf16 works there.")

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.make_optimizer is not None:
            self.optimizer = self.make_optimizer(self)
        return super().create_optimizer(model)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, by the Trainer's own rule."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    # ---- run ----

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
        """All that decides the run's numbers, as JSON values: method, adapted modules, flags, data size."""
        own: dict[str, Any] = {"method": (self.adapter or {}).get("method", "full"), **self.settings}
        own |= {name: getattr(self.args, name) for name in NUMERIC_ARGUMENTS}
        own["modules"] = [name for name, _ in adapted_layers(self.model)]
        own["train_rows"] = len(self.train_dataset)
        return json.loads(json.dumps(own, default=str))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.auto_find_batch_size:  # the loop is entered again with a smaller batch
            trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            cuda = torch.cuda.is_available()
            if self._initial is None:
                self._initial = {
                    "parameters": {n: p.detach().cpu().clone() for n, p in trainable.items()},
                    "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
                    "cuda": torch.cuda.get_rng_state_all() if cuda else None,
                }
            else:
                logger.warning("the batch does not fit into memory: starting over with a smaller one")
                with torch.no_grad():
                    for n, p in trainable.items():
                        p.copy_(self._initial["parameters"][n])
                        p.grad = None
                python, numpy, cpu = self._initial["random"]
                random.setstate(python)
                np.random.set_state(numpy)
                torch.set_rng_state(cpu)
                if cuda:
                    torch.cuda.set_rng_state_all(self._initial["cuda"])
                self.optimizer = self.lr_scheduler = None
                for piece in self.method_state.values():
                    piece.restart()
        return super()._inner_training_loop(*args, **kwargs)

    def begin(self) -> None:
        """Set the running sums to 0 or to what the checkpoint holds (exact resume); called when training begins."""
        self._penalty_now = None
        self._penalty_sum.zero_()
        self._penalty_steps = 0
        self._watched = []
        self._finished = self._save_due = False
        self._saved_step = -1
        self._train_began = time.time()
        if self._resumed is None:
            return
        checkpoint, progress = self._resumed
        self._tr_loss.fill_(progress["losses"][self.args.process_index])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["logged_step"]
        self._penalty_sum.fill_(progress["penalty_sum"])
        self._penalty_steps = progress["penalty_steps"]
        self._initial_global_step = 0  # train_loss is the mean over the whole run ...
        self._train_began -= progress["seconds"]  # ... and so are its seconds
        self._saved_step = self.state.global_step
        self._finished = progress["finished"]
        if self._finished:
            self._load_rng_state(checkpoint)  # the stock Trainer does so only where it enters an epoch

    def _progress(self) -> dict[str, Any]:
        return {
            "losses": self.accelerator.gather(self._tr_loss.view(1)).tolist(),
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "penalty_sum": self._penalty_sum.item(),
            "penalty_steps": self._penalty_steps,
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

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not self._agree_to_stop() or self._awaits_end_of_epoch():
            return
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
        raise RunInterrupted(
            f"stopped by SIGTERM after step {self.state.global_step} of {self.state.max_steps}; "
            f"{self._last_good_checkpoint()}, from which the same command goes on."
        )

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # --eval_on_start: not at every restart
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._tr_loss = self.accelerator.gather(
            self._tr_loss.view(1)
        ).mean()  # the stock Trainer adds its own share alone
        return super()._finalize_training(trial, num_train_samples, min(start_time, self._train_began))

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
        lengths = [len(row[names[0]]) for row in dataset]
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
        shared = (
            args.world_size > 1 and not args.dataloader_drop_last and args.train_sampling_strategy != "batch_rebalance"
        )
        if shared and left and ends and batches:
            own = min(max(left - args.process_index * self._train_batch_size, 0), self._train_batch_size)
            batches[-1][OWN_ROWS] = (own, own * args.world_size / left)
        return batches, items

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**{k: v for k, v in inputs.items() if k not in ("labels", OWN_ROWS)})
        logits, labels = outputs["logits"], inputs["labels"]
        if OWN_ROWS in inputs:
            own, share = inputs[OWN_ROWS]
            loss = (
                task_loss(logits[:own], labels[:own], self.args.label_smoothing_factor) * share
                if own
                else logits.sum() * 0
            )
        else:
            loss = task_loss(logits, labels, self.args.label_smoothing_factor)
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
                    gradients = list(torch._foreach_mul(gradients, scaler._scale))
                own: list[Any] = [p.grad for p in parameters]
                torch._foreach_add_(own, gradients, alpha=self.penalty_coef)
                self._penalty_sum += value
                self._penalty_steps += 1
                self._penalty_now = None
        self._watch(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if (
            isinstance(norm, Tensor) and self.accelerator.scaler is None
        ):  # an fp16 scaler meets infinity and skips the step
            self._watch(norm)
        return norm

    def _watch(self, value: Tensor) -> None:
        """Keep a loss or norm of this step; looked at together, so a step costs no operation and no waiting."""
        self._watched.append((self.state.global_step, value.detach()))
        if len(self._watched) >= 2000:  # where nothing is logged or saved
            self.check_finite()

    def _differentiate(self, penalty: Callable[[], Tensor]) -> tuple[Tensor, list[nn.Parameter], list[Tensor]]:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        with torch.autocast(self.args.device.type, enabled=False):
            value = penalty()
            gradients = torch.autograd.grad(value, trainable, allow_unused=True)
        pairs = [(p, g) for p, g in zip(trainable, gradients, strict=True) if g is not None]
        return value.detach(), [p for p, _ in pairs], [g for _, g in pairs]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, but several processes count each row once in the loss, as they do in the metrics."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        loss = next((name for name in output.metrics if name.endswith("_loss")), None)
        if self.args.world_size > 1 and loss and isinstance(output.predictions, np.ndarray):
            logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
            output.metrics[loss] = task_loss(logits, labels, self.args.label_smoothing_factor).item()
        return output

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

    # ---- files ----

    def _awaits_end_of_epoch(self) -> bool:
        """Whether a checkpoint has to wait until the end of the epoch has evaluated and logged (exact resume)."""
        ends = self.control.should_training_stop or float(self.state.epoch or 0).is_integer()
        return ends and not self._epoch_over

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
        self._saved_step = self.state.global_step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=str(folder.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
            )
        self.accelerator.wait_for_everyone()  # nobody ends a run while the first process still writes

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.adapter is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder, self.adapter)
        self.model.config.save_pretrained(folder)
        # Once, with the result: DeBERTa-v3's takes 11 MB, more than the adapter, and no checkpoint needs it.
        if self.processing_class is not None and folder == Path(self.args.output_dir):
            self.processing_class.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: --push_to_hub sends the finished run once, at its end."""

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
            load_adapter(self.model, str(self.state.best_model_checkpoint))


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

    def __init__(self, trainer: LoRATrainer) -> None:
        self.trainer = trainer

    def _norms(self) -> list[Tensor]:
        return list(torch._foreach_norm([p.detach() for p in self.trainer.model.parameters() if p.requires_grad]))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()
        self.check_at = min(state.global_step + self.STEPS, state.max_steps)
        self.norms = self._norms()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.check_at:
            moved = any(
                a != b
                for a, b in zip(torch.stack(self.norms).tolist(), torch.stack(self._norms()).tolist(), strict=True)
            )
            if not moved and state.is_world_process_zero:
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

"""Deals rows to steps: every row once in an epoch, with any number of processes and after a resume."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from loralib.errors import InputError
from loralib.masking import stream

logger = logging.getLogger(__name__)

# A batch may have this entry, (real_rows, weight): only its first rows are real. The mean of their losses is multiplied
# by the weight, so that averaging over the processes gives the mean over all real rows.
OWN_ROWS = "own_rows"


def check_loading(args: TrainingArguments) -> None:
    """Refuse settings with which a resumed run could not deal the same rows, or with which a row could count twice.

    Raises:
        InputError: names the setting and the reason.
    """
    config: Any = args.accelerator_config
    several = args.world_size > 1
    for wrong, setting, reason in (
        (not args.dataloader_in_order, "dataloader_in_order False", "batches would come in the order of the workers"),
        (not config.use_seedable_sampler, _OF + "use_seedable_sampler false", "a resumed run could not shuffle alike"),
        (config.gradient_accumulation_kwargs, _OF + "gradient_accumulation_kwargs", _ACCUMULATION),
        (config.split_batches and several, _OF + "split_batches", _SHARES),
        (config.dispatch_batches and several, _OF + "dispatch_batches", _SHARES),
        (not config.even_batches and several, _OF + "even_batches false", _SHARES),
    ):
        if wrong:
            raise InputError(f"--{setting} is not supported: {reason}; leave it out.")


_OF = "accelerator_config with "
_ACCUMULATION = "--gradient_accumulation_steps says how batches are accumulated"
_SHARES = "with several processes rows of an epoch's last batch would count twice or not at all"


def _only_the_run_ends_me(then: Callable[[int], None] | None, worker_id: int) -> None:
    """In a process that loads data: ignore each SIGTERM but that of the run.

    Clusters send SIGTERM to all processes of a run. The run then finishes its step, for which it needs its loaders.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it waits for the thread

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    if then is not None:
        then(worker_id)


class Sampling(Trainer):
    """Deals the training rows.

    - Rows that only fill up the last batch of an epoch, with several processes, have no weight in the loss.
    - Grouping by length draws from (seed, epoch), so that a resumed run draws the same order.
    """

    args: Any
    train_dataset: Any
    processing_class: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_loading(self.args)
        self._length_sampler: LengthGroupedSampler | None = None

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        if len(dataloader) == 0:
            rows, batch = len(self.train_dataset), self._train_batch_size * args.world_size
            raise InputError(
                f"{rows} training rows fill no batch of {batch} and --dataloader_drop_last leaves them out: drop the "
                "flag or lower --per_device_train_batch_size."
            )
        return super().set_initial_training_values(args, dataloader)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Make the stock loader, but keep all rows in metrics and predictions despite --dataloader_drop_last.

        Whenever workers are started, the loader draws a seed for them from the global random state. Persistent workers
        (--dataloader_persistent_workers) start once in a run, but again on resume, so their seed has its own generator.
        """
        drop = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop and kwargs.get("is_training", False)
        try:
            loader: Any = super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop
        if self.args.dataloader_persistent_workers:
            # exact resume: a resumed run must draw nothing from the global state that an uninterrupted one did not.
            loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        inner = loader.base_dataloader
        if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
            inner.worker_init_fn = partial(_only_the_run_ends_me, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Make the stock sampler, but let length grouping draw from (seed, epoch), the same on every process."""
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
        # exact resume: the stock sampler draws from the global random state.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._length_sampler = LengthGroupedSampler(lengths, self.get_total_train_batch_size(self.args), seed)
        return self._length_sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch batches as the stock method does, and mark the real rows of an epoch's last batch.

        With several processes the stock loader fills this batch up with rows from the beginning of the epoch. The entry
        `OWN_ROWS` lets the loss leave them out.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        args = self.args
        left = len(self.train_dataset) % (self._train_batch_size * args.world_size)
        ends = self.accelerator.gradient_state.end_of_dataloader
        # batch_rebalance deals rows to the processes itself, in batches of different sizes, and fills none up.
        uneven = left and not args.dataloader_drop_last and args.train_sampling_strategy != "batch_rebalance"
        if args.world_size > 1 and uneven and ends and batches:
            real_rows = min(max(left - args.process_index * self._train_batch_size, 0), self._train_batch_size)
            batches[-1][OWN_ROWS] = (real_rows, real_rows * args.world_size / left)
        return batches, items


class LengthGroupedSampler(Sampler[int]):
    """Puts rows of about equal length together, as the stock sampler does: shuffle, then sort within large groups.

    It draws from (seed, epoch) instead of the global generator, so that every process and every resumed run draws the
    same order.

    Args:
        lengths: the length of every row.
        batch_size: rows of one optimizer step over all processes.
        seed: the seed of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = stream(self.seed, self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=draw))

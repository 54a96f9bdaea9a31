"""Begins a run: logging, checks of the flags, the output folder, the trained head if there is one, seed and data."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from transformers import set_seed

from loralib.errors import InputError
from loralib.glue.caches import use_writable_caches
from loralib.glue.data import GlueData, load
from loralib.glue.evaluation import split_heldout
from loralib.glue.flags import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments
from loralib.glue.folder import check_inputs_stay, must_clear, prepare_output_dir
from loralib.glue.heads import in_order_of_head, trained_head
from loralib.glue.parsing import flag_files
from loralib.glue.predictions import check_submission
from loralib.glue.training_flags import check_compiler, warn_of
from loralib.training.sampling import check_loading

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the steps of an entry point share.

    arguments: the dataclasses of flags: model, data, method, training.
    training: the last of them.
    checkpoint: the checkpoint to resume from; None for a fresh start.
    submission: the folder of `--glue_submission`.
    command: the command line, for the record.
    clear: whether the output folder is still to be cleared of an earlier run.
    started: the time at which the run began, in seconds since 1970.
    seconds_before: training seconds of earlier stages and processes.
    finish_record: adds entries to the record before it is written.
    facts: further entries of the record.
    """

    arguments: tuple[Any, ...]
    training: GlueTrainingArguments
    checkpoint: str | None
    submission: str | None
    command: list[str]
    clear: bool = False
    started: float = field(default_factory=time.time)
    seconds_before: float = 0.0
    finish_record: Callable[[dict[str, Any]], dict[str, Any]] = dict
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def model_args(self) -> ModelArguments:
        found: ModelArguments = self.arguments[0]
        return found

    @property
    def data_args(self) -> DataArguments:
        found: DataArguments = self.arguments[1]
        return found

    @property
    def lora_args(self) -> LoRAArguments:
        found: LoRAArguments = self.arguments[2]
        return found


def start(
    training: GlueTrainingArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoRAArguments,
    argv: Sequence[str] | None = None,
) -> Run:
    """Set up logging, check the flags, prepare the output folder and set the seed. Call it first.

    Args:
        argv: the flags; None: those of the process.

    Raises:
        InputError: flags contradict each other, or the output folder cannot be used.
    """
    _set_up_logging(training)
    use_writable_caches()
    _check_flags(training, model_args, lora_args)
    command = sys.argv if argv is None else [sys.argv[0], *argv]
    with training.main_process_first(desc="output folder"):
        checkpoint = prepare_output_dir(training)
        clear = must_clear(training, checkpoint)
        if clear and not training.overwrite_output_dir:
            logger.warning("%s: a run ended here before its first checkpoint; it starts over", training.output_dir)
    if clear:
        check_inputs_stay(training.output_dir, (model_args, data_args, lora_args), flag_files(command[1:]))
    _find_head(training, model_args, lora_args, checkpoint)
    set_seed(training.seed)
    arguments = (model_args, data_args, lora_args, training)
    return Run(arguments, training, checkpoint, data_args.glue_submission, list(command), clear)


def _set_up_logging(training: GlueTrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", handlers=[logging.StreamHandler()]
    )
    level = logging.INFO if training.should_log else logging.WARNING
    logging.getLogger("loralib").setLevel(level)
    transformers.utils.logging.set_verbosity(training.get_process_log_level())
    datasets.utils.logging.set_verbosity_warning()


def _check_flags(training: GlueTrainingArguments, model_args: ModelArguments, lora_args: LoRAArguments) -> None:
    """Refuse flags that cannot work together, and warn of flags without an effect."""
    for line in training.taken_from_launcher:
        logger.info("%s", line)
    for line in warn_of(training) if training.do_train else []:
        logger.warning("%s", line)
    check_compiler(training)
    check_loading(training)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and training.world_size == 1:
        raise InputError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes and each would train by itself: there are not as "
            "many GPUs; on the CPU give --use_cpu, else start one process for each GPU (--nproc_per_node)."
        )
    if training.auto_find_batch_size and training.world_size > 1:
        raise InputError(
            f"--auto_find_batch_size works in one process, here are {training.world_size}: if one of them ran out of "
            "memory, the others would wait for it; set --per_device_train_batch_size."
        )
    if not (training.do_train or training.do_eval or training.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict.")
    if not lora_args.apply_lora and (lora_args.lora_r or lora_args.lora_alpha):
        logger.warning("--lora_r or --lora_alpha is given without --apply_lora: this is full fine-tuning")
    if training.early_stopping_patience is not None and not training.do_train:
        logger.warning("--early_stopping_patience has no effect without --do_train")
    if not training.do_train and lora_args.apply_lora and not lora_args.lora_path:
        logger.warning(
            "neither --do_train nor --lora_path is given: the low-rank factors are untrained and add nothing"
        )
    if not training.do_train and model_args.ignore_mismatched_sizes:
        raise InputError("--ignore_mismatched_sizes needs --do_train: layers with fresh weights give random answers.")
    there = transformers.integrations.get_available_reporting_integrations()
    for name in training.report_to:
        if name not in ("none", "all") and name not in there:
            raise InputError(
                f"--report_to {name}: no such package is installed here: choose from {', '.join([*there, 'none'])}, or "
                "install it."
            )


def _find_head(
    training: GlueTrainingArguments, model_args: ModelArguments, lora_args: LoRAArguments, checkpoint: str | None
) -> None:
    """Set `model_args.head` to the head that was trained before, wherever the run takes it from."""
    model_args.head = trained_head(model_args, lora_args.lora_path, checkpoint if training.do_train else None)
    if not training.do_train and lora_args.lora_path and model_args.head is None:
        raise InputError(
            f"neither lora_path {lora_args.lora_path} nor {model_args.model_name_or_path} holds a trained head, so the "
            "answers would be random: give an adapter with its head, or train by --do_train."
        )
    if not training.do_train and model_args.head is None:
        logger.warning(
            "%s has no trained head and nothing trains: the answers are random", model_args.model_name_or_path
        )


def load_data(training: GlueTrainingArguments, model_args: ModelArguments, data_args: DataArguments) -> GlueData:
    """The splits that the run needs, and the task."""
    known = model_args.head.as_task() if model_args.head is not None and not training.do_train else None
    with training.main_process_first(desc="data"):
        data = load(
            task_name=data_args.task_name,
            dataset_name=data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            train_file=data_args.train_file,
            validation_file=data_args.validation_file,
            test_file=data_args.test_file,
            train_split=data_args.train_split,
            validation_split=data_args.validation_split,
            test_split=data_args.test_split,
            text_column=data_args.text_column,
            text_column_2=data_args.text_column_2,
            label_column=data_args.label_column,
            label_type=data_args.label_type,
            unlabelled=data_args.unlabelled,
            do_train=training.do_train,
            do_eval=training.do_eval,
            do_predict=training.do_predict,
            max_train_samples=data_args.max_train_samples,
            max_eval_samples=data_args.max_eval_samples,
            max_predict_samples=data_args.max_predict_samples,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
            known=known,
        )
    if data_args.predict_scores and not training.do_predict:
        raise InputError("--predict_scores needs --do_predict: it adds columns to the file of predictions.")
    if model_args.head is not None:
        data = in_order_of_head(data, model_args.head, training.do_train)
    if data_args.glue_submission:
        check_submission(data_args.glue_submission, data.task, training.do_predict)
    if data_args.heldout_split is not None and training.do_eval:
        split_heldout(data, data_args.heldout_split)
    return data

"""One run from its flags to its results: start, load the data, make the trainer, train and report."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from loralib.adapt import parameters
from loralib.errors import InputError, RunError, path_of
from loralib.glue import card
from loralib.glue.board import BoardCallback
from loralib.glue.caches import use_writable_caches
from loralib.glue.class_weights import class_weights
from loralib.glue.data import GlueData, load
from loralib.glue.flags import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments
from loralib.glue.folder import (
    check_inputs_stay,
    clear_output_dir,
    is_within,
    mark_finished,
    mark_unfinished,
    prepare_output_dir,
    starts_clear,
)
from loralib.glue.heads import agree, trained_head
from loralib.glue.machine import forget_peak_memory, peak_memory
from loralib.glue.metrics import compute_metrics, metric_names, to_labels, to_scores
from loralib.glue.model import adapter_config, load_lora_path
from loralib.glue.parsing import flag_files
from loralib.glue.predictions import check_submission, has_labels, write_predictions, write_submission
from loralib.glue.record import write_run
from loralib.glue.stopping import check_early_stopping, early_stopping
from loralib.glue.tasks import Task
from loralib.glue.tokens import check_vocabulary, collator, pad_on_the_right, row_length, tokenize
from loralib.glue.training_flags import check_compiler, warn_of
from loralib.glue.watch import HELDOUT, WatchCallback, split_heldout
from loralib.kernels.deberta import unpad
from loralib.methods import Method
from loralib.training.guards import worker_deaths, writing_threads
from loralib.training.lock import unlock
from loralib.training.manifest import the_same_command
from loralib.training.sampling import check_loading
from loralib.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What belongs to one run: its arguments, data, start time, the checkpoint that it goes on from, and whether its
    folder is still to be cleared of an earlier run."""

    arguments: tuple[Any, ...]
    training: GlueTrainingArguments
    checkpoint: str | None
    submission: str | None
    command: list[str]
    clear: bool = False
    started: float = field(default_factory=time.time)
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict  # adds to the record before it is written
    facts: dict[str, Any] = field(default_factory=dict)  # of the run itself, for its record


def start(
    training: GlueTrainingArguments,
    model: ModelArguments,
    data: DataArguments,
    lora: LoRAArguments,
    argv: Sequence[str] | None = None,
) -> Run:
    """Logging, output folder, seed. Call it first. `argv`: the flags, where they are not those of the process."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", handlers=[logging.StreamHandler()]
    )
    level = logging.INFO if training.should_log else logging.WARNING
    logging.getLogger("loralib").setLevel(level)
    transformers.utils.logging.set_verbosity(training.get_process_log_level())
    datasets.utils.logging.set_verbosity_warning()
    use_writable_caches()
    for line in training.taken_from_launcher:
        logger.info("%s", line)
    for line in warn_of(training) if training.do_train else []:
        logger.warning("%s", line)
    check_compiler(training)
    check_loading(training)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and training.world_size == 1:
        raise InputError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes and each would train alone: there are not as many "
            "GPUs; on the CPU give --use_cpu, else start one process for each GPU (--nproc_per_node)."
        )
    if training.auto_find_batch_size and training.world_size > 1:
        raise InputError(
            f"--auto_find_batch_size works in one process, here are {training.world_size}: one that runs out of memory "
            "alone would leave the others waiting; set --per_device_train_batch_size."
        )
    if not (training.do_train or training.do_eval or training.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict.")
    if not lora.apply_lora and (lora.lora_r or lora.lora_alpha):
        logger.warning("--lora_r or --lora_alpha is given without --apply_lora: this is full fine-tuning")
    if training.early_stopping_patience is not None and not training.do_train:
        logger.warning("--early_stopping_patience has no effect without --do_train")
    if not training.do_train and lora.apply_lora and not lora.lora_path:
        logger.warning(
            "neither --do_train nor --lora_path is given: the low-rank factors are untrained and add nothing"
        )
    if not training.do_train and model.ignore_mismatched_sizes:
        raise InputError("--ignore_mismatched_sizes needs --do_train: layers that start anew would answer at random.")
    there = transformers.integrations.get_available_reporting_integrations()
    for name in training.report_to:
        if name not in ("none", "all") and name not in there:
            raise InputError(
                f"--report_to {name}: no such package is installed here: choose from {', '.join([*there, 'none'])}, or "
                "install it."
            )
    command = sys.argv if argv is None else [sys.argv[0], *argv]
    with training.main_process_first(desc="output folder"):
        checkpoint = prepare_output_dir(training)
        clear = starts_clear(training, checkpoint)
        if clear and not training.overwrite_output_dir:
            logger.warning("%s: a run ended here before its first checkpoint; it starts anew", training.output_dir)
    if clear:
        check_inputs_stay(training.output_dir, (model, data, lora), flag_files(command[1:]))
    model.head = trained_head(model, lora.lora_path, checkpoint if training.do_train else None)
    if not training.do_train and lora.lora_path and model.head is None:
        raise InputError(
            f"lora_path {lora.lora_path} holds no head and {model.model_name_or_path} has none: nothing that could "
            "answer was trained; give an adapter with its head, or train by --do_train."
        )
    if not training.do_train and model.head is None:
        logger.warning("%s has no trained head and nothing trains: the answers are random", model.model_name_or_path)
    set_seed(training.seed)
    return Run((model, data, lora, training), training, checkpoint, data.glue_submission, list(command), clear)


def load_data(training: GlueTrainingArguments, model: ModelArguments, args: DataArguments) -> GlueData:
    """The splits that the run needs, and the task."""
    known = model.head.as_task() if model.head is not None and not training.do_train else None
    with training.main_process_first(desc="data"):
        data = load(
            task_name=args.task_name,
            dataset_name=args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            train_file=args.train_file,
            validation_file=args.validation_file,
            test_file=args.test_file,
            train_split=args.train_split,
            validation_split=args.validation_split,
            test_split=args.test_split,
            text_column=args.text_column,
            text_column_2=args.text_column_2,
            label_column=args.label_column,
            label_type=args.label_type,
            unlabelled=args.unlabelled,
            do_train=training.do_train,
            do_eval=training.do_eval,
            do_predict=training.do_predict,
            max_train_samples=args.max_train_samples,
            max_eval_samples=args.max_eval_samples,
            max_predict_samples=args.max_predict_samples,
            cache_dir=model.cache_dir,
            token=model.token,
            known=known,
        )
    if args.predict_scores and not training.do_predict:
        raise InputError("--predict_scores needs --do_predict: it adds columns to the file of predictions.")
    if model.head is not None:
        data = agree(data, model.head, training.do_train)
    if args.glue_submission:
        check_submission(args.glue_submission, data.task, training.do_predict)
    if args.heldout_split is not None and training.do_eval:
        split_heldout(data, args.heldout_split)
    return data


def trainer_parts(
    run: Run, data: GlueData, tokenizer: PreTrainedTokenizerBase, args: DataArguments, model: PreTrainedModel
) -> dict[str, Any]:
    """The arguments of `LoRATrainer` that every method shares."""
    if run.training.push_to_hub and run.training.process_index == 0:
        card.make_repository(run.training)
    _check_best_metric(run.training, data.task)
    fixed = args.padding == "fixed"
    if args.padding == "unpadded":
        attention = run.arguments[0].attention
        if attention != "fast" or not unpad(model):
            raise InputError(
                f"--padding unpadded needs a DeBERTa-v2 or v3 model without convolution and --attention fast, here are "
                f"{type(model).__name__} and {attention}: use --padding longest."
            )

    pad_on_the_right(tokenizer)
    length = row_length(args.max_seq_length, data.task, tokenizer, model)

    def tokenized(split: Dataset) -> Dataset:
        return tokenize(split, data.task, tokenizer, length, fixed, overwrite_cache=args.overwrite_cache)

    with run.training.main_process_first(desc="tokenising"):
        train = tokenized(data.train) if data.train is not None else None
        for splits in (data.evals, data.tests):
            splits.update({name: tokenized(split) for name, split in splits.items()})
    check_vocabulary(
        tokenizer, model, [s for s in (train, *data.evals.values(), *data.tests.values()) if s is not None]
    )
    run.facts["sequence_length"] = length
    weights = class_weights(run.training.class_weights, data)
    weighted: dict[str, Any] = {}
    if weights is not None:
        run.facts["class_weights"] = dict(zip(data.task.label_names or (), weights, strict=True))
        weighted = {"class_weights": weights}
    return {
        "model": model,
        "args": run.training,
        "train_dataset": train,
        "eval_dataset": next(iter(data.evals.values()), None),
        "processing_class": tokenizer,
        "data_collator": collator(tokenizer, length, fixed, model),
        "compute_metrics": compute_metrics(data.task),
        "settings": _settings(run, data.task) | weighted,
        **weighted,
    }


def make_trainer(
    run: Run, method: Method, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: GlueData
) -> LoRATrainer:
    """The trainer of a method on the run's data; what it is about to do is logged."""
    load_start(run, model)
    trainer = trainer_of(run, method, trainer_parts(run, data, tokenizer, run.arguments[1], model), data.task)
    describe(run, trainer, method)
    return trainer


def load_start(run: Run, model: PreTrainedModel) -> None:
    """Let an adapted model start from the adapter of `--lora_path`, where that is given."""
    lora = run.arguments[2]
    if lora.lora_path:
        load_lora_path(model, lora.lora_path)


def trainer_of(run: Run, method: Method, parts: dict[str, Any], task: Task) -> LoRATrainer:
    """A trainer from the `trainer_parts`, with the facts for `adapter.json`."""
    model, _, lora, _ = run.arguments
    adapter = None
    if method.factors is not None:
        layer = getattr(lora, "lora_type", "sparse" if method.factors.between else "frd")
        adapter = adapter_config(method.name, lora, model, task, layer=layer)
    return LoRATrainer(method=method, adapter=adapter, **parts)


def describe(run: Run, trainer: LoRATrainer, method: Method, title: str = "") -> None:
    """Log what will happen. The method refuses a number of steps that it cannot work with.

    Args:
        title: what the log calls the method; its name where not given.
    """
    plan = ""
    if run.training.do_train:
        method.begin(trainer.total_steps())
        plan = method.plan(trainer.total_steps())
    adapted = method.factors.names if method.factors else []
    announce(run, trainer, title or method.name, adapted, *filter(None, [plan]))


def train_and_report(run: Run, trainer: LoRATrainer, data: GlueData) -> dict[str, Any]:
    """Train, evaluate, predict as the flags say, and write `run.json`. Returns the final metrics."""
    assert trainer.method is not None
    return finish(run, trainer, data, trainer.method.name)


def _check_best_metric(training: GlueTrainingArguments, task: Task) -> None:
    """The stock Trainer would find out at the first evaluation, hours later perhaps."""
    wanted = training.metric_for_best_model
    known = ["loss", *metric_names(task)]
    if training.do_train and wanted is not None and wanted.removeprefix("eval_") not in known:
        raise InputError(f"metric_for_best_model is {wanted!r}, for {task.name} it must be one of {', '.join(known)}.")


def _settings(run: Run, task: Task) -> dict[str, Any]:
    """Flags that decide the run's numbers: a checkpoint is only resumed with the same ones."""
    model, data, lora, _ = run.arguments
    own = {k: v for k, v in vars(lora).items() if k not in ("lora_path", "tb_writter_loginterval")}
    own |= {k: getattr(data, k) for k in ("max_seq_length", "padding", "max_train_samples")}
    # the folder may move, its name is what one recognises
    own |= {"label_names": None if task.label_names is None else ", ".join(task.label_names)}
    own |= {"task": task.name, "model": Path(model.model_name_or_path).name}
    if run.training.early_stopping_patience is not None:
        names = ("early_stopping_patience", "early_stopping_threshold", "metric_for_best_model", "greater_is_better")
        own |= {name: getattr(run.training, name) for name in names}
    return own | {"cls_dropout": model.cls_dropout, "attention": model.attention}


def announce(run: Run, trainer: LoRATrainer, method: str, adapted: list[str], *lines: str) -> None:
    """Clear the folder where that was asked for, and say what will happen, in a few lines (ledger D4, D5)."""
    check_early_stopping(trainer)
    clear_output_dir(run)
    args, counts = run.training, parameters(trainer.model)
    logger.info("method: %s", method)
    kinds = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in adapted})
    if adapted:
        logger.info("adapted: %d matrices (%s)", len(adapted), ", ".join(kinds))
    logger.info(
        "trainable parameters: %s of %s, %.3f %% (low-rank %s, head %s)",
        *(f"{counts[k]:,}" for k in ("trainable", "total")),
        100 * counts["trainable"] / counts["total"],
        *(f"{counts[k]:,}" for k in ("lora", "head")),
    )
    if "frozen" in counts:
        logger.info("frozen factors: %s elements, which do not train and are saved with the adapter", counts["frozen"])
    if args.do_train:
        processes = args.world_size if args.n_gpu <= 1 else args.n_gpu
        logger.info(
            "effective batch: %d = %d per device x %d device(s) x %d accumulated; %d optimizer steps in all",
            effective_batch(args),
            args.per_device_train_batch_size,
            processes,
            args.gradient_accumulation_steps,
            trainer.total_steps(),
        )
        warmup = args.get_warmup_steps(trainer.total_steps())
        if warmup >= trainer.total_steps():
            logger.warning(
                "the learning rate is still rising at the end: the warm-up of %d steps reaches the %d steps of the "
                "run; lower --warmup_steps (below 1 it is a fraction of the steps) or train longer",
                warmup,
                trainer.total_steps(),
            )
    if args.n_gpu > 1:
        logger.warning(
            "one process drives %d GPUs (nn.DataParallel): the effective batch is %d, and step-based settings see "
            "fewer steps; 'torchrun --nproc_per_node %d' is faster, CUDA_VISIBLE_DEVICES=0 keeps the batch of one GPU",
            args.n_gpu,
            effective_batch(args),
            args.n_gpu,
        )
    for line in lines:
        logger.info("%s", line)


def effective_batch(args: GlueTrainingArguments) -> int:
    """Rows of one optimizer step over all devices."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def finish(run: Run, trainer: LoRATrainer, data: GlueData, method: str) -> dict[str, Any]:
    """Train, evaluate, predict as the flags say, and write `run.json`.

    Args:
        method: short name of the method for the report; callbacks that have a `summary()` add the method's own facts.

    Returns:
        The final metrics.
    """
    metrics: dict[str, Any] = {}
    try:
        if run.training.do_train:
            mark_unfinished(run.training)
        with worker_deaths(run.training.output_dir), writing_threads():
            _train_and_evaluate(run, trainer, data, metrics)
        if run.training.should_save:
            write_run(run, trainer, method, data.task.name, "finished", metrics)
            if run.training.do_train:
                mark_finished(run.training)
            if run.training.do_train:
                card.write_card(run.training.output_dir)
        _finish_board(trainer, metrics)
    except RunError as error:
        if run.training.should_save:
            with suppress(OSError):  # the disk may be full
                write_run(run, trainer, method, data.task.name, error.status, metrics)
                _finish_board(trainer, metrics, succeeded=False)
        raise
    except OSError as error:
        path, output_dir = path_of(error), run.training.output_dir
        if path is None or is_within(path, output_dir):
            blamed = f"output_dir {output_dir} could not be written to ({error}): see to its disk"
        else:
            blamed = f"{path} could not be used ({error.strerror}): see to it"
        raise RunError(f"{blamed}, and {the_same_command(output_dir)}.") from error
    finally:
        unlock(run.training.output_dir)
    if run.training.push_to_hub:
        card.push(trainer)
    return metrics


def _finish_board(trainer: LoRATrainer, metrics: dict[str, Any], succeeded: bool = True) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, BoardCallback):
            callback.finish(metrics, succeeded)


def _train_and_evaluate(run: Run, trainer: LoRATrainer, data: GlueData, metrics: dict[str, Any]) -> None:
    args = run.training
    trainer.add_callback(WatchCallback(trainer, data.evals.get(HELDOUT)))
    if (stopping := early_stopping(trainer)) is not None:
        trainer.add_callback(stopping)
    if args.do_train:
        trainer.add_callback(BoardCallback(trainer, run.arguments, data.task, run.started))
        forget_peak_memory()
        result = trainer.train(resume_from_checkpoint=run.checkpoint)
        run.facts["peak_memory"] = peak_memory(args.device)
        trainer.save_model(_internal_call=True)  # any other call would send the folder to the hub here and now
        trainer.save_state()
        train_metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
        trainer.log_metrics("train", train_metrics)
        trainer.save_metrics("train", train_metrics)
        metrics |= train_metrics
    if args.do_eval:
        evaluation: dict[str, Any] = {}
        for name, split in data.evals.items():
            if name == HELDOUT:  # the callback evaluates it whenever the other half is
                continue
            values = trainer.evaluate(split) | {"eval_samples": len(split)}
            trainer.log_metrics("eval", values)
            evaluation |= {f"{k}_mm": v for k, v in values.items()} if name == "mnli-mm" else values
        trainer.save_metrics("eval", evaluation)
        rate = evaluation.get("eval_samples_per_second")
        run.facts |= {} if rate is None else {"evaluation_rows_per_second": rate}
        metrics |= evaluation
    if args.do_predict:
        metrics |= _predict(run, trainer, data)


def _predict(run: Run, trainer: LoRATrainer, data: GlueData) -> dict[str, float]:
    """Predictions of each test split on disk; its metrics too, where it has labels that can be used."""
    found: dict[str, float] = {}
    for name, split in data.tests.items():
        labelled = has_labels(split)
        if labelled:
            logger.info("%s, test: all %d rows have a label, so predict_* metrics are computed", name, len(split))
        else:
            logger.info("%s, test: without labels that can be used, %d rows are predicted alone", name, len(split))
        output = trainer.predict(split if labelled else split.remove_columns("label"), metric_key_prefix="predict")
        values = {**(output.metrics or {}), "predict_samples": len(split)}
        trainer.log_metrics("predict", values)
        found |= {f"{k}_mm": v for k, v in values.items()} if name == "mnli-mm" else values
        labels = to_labels(output.predictions, data.task)
        if run.training.should_save:
            scores = to_scores(output.predictions, data.task) if run.arguments[1].predict_scores else None
            write_predictions(run.training.output_dir, name, labels, data.task, scores)
            if run.submission is not None:
                write_submission(run.submission, name, labels, data.task)
    trainer.save_metrics("predict", found)
    return found

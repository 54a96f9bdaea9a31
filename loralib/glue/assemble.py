"""The trainer of a run: its arguments, made from the flags, the data and the model, and the log of what it will do."""

import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralib.adapt import parameters
from loralib.errors import InputError
from loralib.glue import card
from loralib.glue.class_weights import class_weights
from loralib.glue.data import GlueData
from loralib.glue.flags import DataArguments, GlueTrainingArguments
from loralib.glue.folder import clear_output_dir
from loralib.glue.metrics import compute_metrics, metric_names
from loralib.glue.model import adapter_settings, load_lora_path
from loralib.glue.run import Run
from loralib.glue.stopping import check_early_stopping
from loralib.glue.tasks import Task
from loralib.glue.tokens import check_vocabulary, collator, pad_on_the_right, row_length, tokenize
from loralib.kernels.deberta import unpad
from loralib.methods import Method
from loralib.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)


def make_trainer(
    run: Run, method: Method, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: GlueData
) -> LoRATrainer:
    """Make the trainer of a method on the run's data, and log what it is about to do."""
    load_starting_adapter(run, model)
    arguments = trainer_arguments(run, data, tokenizer, run.data_args, model)
    trainer = trainer_with(run, method, arguments, data.task)
    begin_and_announce(run, trainer, method)
    return trainer


def load_starting_adapter(run: Run, model: PreTrainedModel) -> None:
    """If `--lora_path` is given, load its adapter into an adapted model."""
    if run.lora_args.lora_path:
        load_lora_path(model, run.lora_args.lora_path)


def trainer_with(run: Run, method: Method, arguments: dict[str, Any], task: Task) -> LoRATrainer:
    """A trainer of this method from the `trainer_arguments`, with the facts that `adapter.json` will hold."""
    adapter = None
    if method.factors is not None:
        adapter = adapter_settings(method.name, run.lora_args, run.model_args, task)
    return LoRATrainer(method=method, adapter=adapter, **arguments)


def begin_and_announce(run: Run, trainer: LoRATrainer, method: Method, title: str = "") -> None:
    """Tell the method how many steps it will train, clear the output folder (`clear_and_log`), log what will happen.

    Args:
        title: what the log calls the method; by default its name.

    Raises:
        InputError: the method cannot work with this number of steps.
    """
    plan = ""
    if run.training.do_train:
        method.begin(trainer.total_steps())
        plan = method.plan(trainer.total_steps())
    adapted = method.factors.names if method.factors else []
    clear_and_log(run, trainer, title or method.name, adapted, *filter(None, [plan]))


def trainer_arguments(
    run: Run, data: GlueData, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, model: PreTrainedModel
) -> dict[str, Any]:
    """Tokenise the splits and collect the arguments of `LoRATrainer` that every method shares.

    With `--push_to_hub` this also creates the repository, and with `--padding unpadded` it makes the model's attention
    skip padding. The tokenised training split is returned. Those for evaluation and prediction
    replace the texts in `data`.

    Raises:
        InputError: the flags ask for what the model, the tokenizer or the data cannot do.
    """
    if run.training.push_to_hub and run.training.process_index == 0:
        card.make_repository(run.training)
    _check_best_metric(run.training, data.task)
    fixed = data_args.padding == "fixed"
    if data_args.padding == "unpadded":
        attention = run.model_args.attention
        if attention != "fast" or not unpad(model):
            raise InputError(
                f"--padding unpadded needs a DeBERTa-v2 or v3 model without convolution and --attention fast, here are "
                f"{type(model).__name__} and {attention}: use --padding longest."
            )

    pad_on_the_right(tokenizer, model)
    length = row_length(data_args.max_seq_length, data.task, tokenizer, model)

    def tokenized(split: Dataset) -> Dataset:
        return tokenize(split, data.task, tokenizer, length, fixed, overwrite_cache=data_args.overwrite_cache)

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
        "settings": _deciding_settings(run, data.task) | weighted,
        **weighted,
    }


def _check_best_metric(training: GlueTrainingArguments, task: Task) -> None:
    """Refuse an unknown metric now: the stock Trainer would do so at the first evaluation, perhaps hours later."""
    wanted = training.metric_for_best_model
    known = ["loss", *metric_names(task)]
    if training.do_train and wanted is not None and wanted.removeprefix("eval_") not in known:
        raise InputError(f"metric_for_best_model is {wanted!r}, for {task.name} it must be one of {', '.join(known)}.")


# Flags that a resumed run may change, with the reason. A checkpoint compares every other flag of the model, the data,
# the low-rank factors and the method.
NOT_COMPARED = {
    "model_name_or_path": "compared by its last name, as `model`, since the folder may move",
    "token": "opens the hub",
    "cache_dir": "a place",
    "trust_remote_code": "without it, a model with code of its own does not load",
    "ignore_mismatched_sizes": "without it, a model of other sizes does not load",
    "glue_submission": "a place",
    "predict_scores": "writes more of the same predictions",
    "overwrite_cache": "has no effect on values",
    "max_predict_samples": "cuts the predictions at the end",
    "tb_writter_loginterval": "decides when numbers are logged",
    "pad_to_max_length": "the older name of --padding, which is compared",
    **dict.fromkeys(
        ("tokenizer_name", "use_fast_tokenizer", "dataset_name", "dataset_config_name", "train_file", "train_split",
         "text_column", "text_column_2", "label_column", "unlabelled"),
        "compared by what it leads to, the tokens of training rows and their number (`train_data`, `train_rows`)",
    ),
    **dict.fromkeys(("task_name", "label_type"), "compared by what they lead to, `task` and `label_names`"),
    **dict.fromkeys(
        ("validation_file", "validation_split", "max_eval_samples", "heldout_split"),
        "compared by the rows to choose by (`eval_data`, `eval_rows`), where evaluations decide; otherwise they choose "
        "what is measured",
    ),
    **dict.fromkeys(("test_file", "test_split"), "choose the rows that are predicted at the end"),
}  # fmt: skip
_PLACES = ("config_name", "lora_path")  # folders that may move, so only their last names are compared


def deciding_flags(*parts: Any) -> dict[str, Any]:
    """The flags of these dataclasses that decide a run's numbers, all but `NOT_COMPARED`."""
    own = {f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.init}
    return {
        name: Path(value).name if name in _PLACES and value else value
        for name, value in own.items()
        if name not in NOT_COMPARED
    }


def _deciding_settings(run: Run, task: Task) -> dict[str, Any]:
    """The settings that decide the run's numbers. A checkpoint is resumed only if they are the same."""
    own = deciding_flags(run.model_args, run.data_args, run.lora_args)
    own |= {"label_names": None if task.label_names is None else ", ".join(task.label_names)}
    own |= {"task": task.name, "model": Path(run.model_args.model_name_or_path).name}
    if run.training.early_stopping_patience is not None:
        names = ("early_stopping_patience", "early_stopping_threshold", "metric_for_best_model", "greater_is_better")
        own |= {name: getattr(run.training, name) for name in names}
    return own


def clear_and_log(run: Run, trainer: LoRATrainer, method: str, adapted: list[str], *lines: str) -> None:
    """If `run.clear` is set, clear the output folder; then log in a few lines what will happen (ledger D4, D5).

    Args:
        method: what the log calls the method.
        adapted: names of the adapted matrices.
        lines: further lines for the log.
    """
    check_early_stopping(trainer)
    clear_output_dir(run)
    training, counts = run.training, parameters(trainer.model)
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
    if training.do_train:
        processes = training.world_size if training.n_gpu <= 1 else training.n_gpu
        logger.info(
            "effective batch: %d = %d per device x %d device(s) x %d accumulated; %d optimizer steps in all",
            effective_batch(training),
            training.per_device_train_batch_size,
            processes,
            training.gradient_accumulation_steps,
            trainer.total_steps(),
        )
        warmup = training.get_warmup_steps(trainer.total_steps())
        if warmup >= trainer.total_steps():
            logger.warning(
                "the learning rate is still rising at the end: the warm-up of %d steps reaches the %d steps of the "
                "run; lower --warmup_steps (below 1 it is a fraction of the steps) or train longer",
                warmup,
                trainer.total_steps(),
            )
    if training.n_gpu > 1:
        logger.warning(
            "one process drives %d GPUs (nn.DataParallel): the effective batch is %d, and step-based settings see "
            "fewer steps; 'torchrun --nproc_per_node %d' is faster, CUDA_VISIBLE_DEVICES=0 keeps the batch of one GPU",
            training.n_gpu,
            effective_batch(training),
            training.n_gpu,
        )
    for line in lines:
        logger.info("%s", line)


def effective_batch(training: GlueTrainingArguments) -> int:
    """Rows of one optimizer step over all devices."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size

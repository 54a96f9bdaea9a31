"""Loads the pretrained model, its tokenizer and the adapter to start from, and collects facts for adapter.json."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loralib.adapt import backbone_of, is_head
from loralib.adapters.names import places_in
from loralib.adapters.start import load_lora
from loralib.errors import InputError
from loralib.glue.flags import LoRAArguments, ModelArguments
from loralib.glue.heads import cannot_be_loaded, head_of_model, is_folder
from loralib.glue.machine import versions
from loralib.glue.tasks import Task
from loralib.kernels.deberta import use_fast_attention

logger = logging.getLogger(__name__)


def load_model(args: ModelArguments, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pretrained classifier, in float32, and its tokenizer.

    Raises:
        InputError: the folder is missing, the hub cannot be reached, or a file does not fit.
    """
    name = os.path.expanduser(args.model_name_or_path)
    for value in (name, args.config_name, args.tokenizer_name):
        if value and is_folder(value) and not Path(value).expanduser().is_dir():
            raise InputError(
                f"the model folder {value} does not exist: give an existing folder or a model's name on the hub."
            )
    common = {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }
    own_head = head_of_model(args)
    keeps_head = own_head is None or _same_outputs(own_head.label_names, task) and not own_head.unsupported
    try:
        config = AutoConfig.from_pretrained(args.config_name or name, **common)
        set_labels(config, task.label_names, task.name)
        if args.cls_dropout is not None:
            _set_cls_dropout(config, args.cls_dropout)
        tokenizer = AutoTokenizer.from_pretrained(
            args.tokenizer_name or name, use_fast=args.use_fast_tokenizer, **common
        )
        if tokenizer.pad_token is None:  # decoders have none
            tokenizer.pad_token = tokenizer.eos_token
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            raise InputError(
                f"the tokenizer of {args.tokenizer_name or name} knows no words, since its vocabulary (spm.model, "
                "tokenizer.json or vocab.txt) is missing there: download it again, or give --tokenizer_name."
            )
        # This must be set before the model is built, because RoBERTa counts positions from it.
        config.pad_token_id = tokenizer.pad_token_id
        # The model is float32 even if its file is not: the hub's DeBERTa-v3 is in half precision (ledger G2).
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes or not keeps_head,
            output_loading_info=True,
            **common,
        )
        if not keeps_head:
            _renew_output(model, found["mismatched_keys"], args)
    except InputError:
        raise
    except Exception as error:  # each file format has its own exceptions
        raise cannot_be_loaded(name, error) from error
    if args.attention == "fast" and config.model_type == "deberta-v2":
        use_fast_attention(model)
    return model, tokenizer


def set_labels(config: Any, names: tuple[str, ...] | None, task: str | None = None) -> None:
    """Write into a config the names of the outputs, or that they are a regression.

    transformers' pipeline reads `problem_type`; without it, the output of a regression would go through a sigmoid.
    """
    config.num_labels = 1 if names is None else len(names)
    if names is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "regression" if names is None else "single_label_classification"
    if task is not None:
        config.finetuning_task = task


def _same_outputs(names: tuple[str, ...] | None, task: Task) -> bool:
    """Whether a head with these names has the task's outputs in the task's order."""
    if names is None or task.label_names is None:
        return names is None and task.label_names is None
    return places_in(task.label_names, names) == list(range(len(names)))


def _renew_output(model: Any, mismatched: Iterable[Any], args: ModelArguments) -> None:
    """Give fresh weights to the last layer of the head.

    Args:
        mismatched: keys of weights that are fresh already, because they have another shape.

    Raises:
        InputError: one of these keys lies outside the head, and --ignore_mismatched_sizes is off.
    """
    prefix, _ = backbone_of(model)
    keys = sorted(key if isinstance(key, str) else key[0] for key in mismatched)
    foreign = [key for key in keys if not is_head(key, prefix)]
    if foreign and not args.ignore_mismatched_sizes:
        raise InputError(
            f"the weights of {args.model_name_or_path} do not fit its config: {foreign[0]!r} has another shape; "
            "--ignore_mismatched_sizes gives fresh weights to such layers."
        )
    if keys:
        return
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear) and is_head(name, prefix) and module.out_features == model.config.num_labels:
            fresh = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            model._init_weights(fresh)
            module.load_state_dict(fresh.state_dict())
            return


def _set_cls_dropout(config: Any, value: float) -> None:
    names = ("cls_dropout", "classifier_dropout", "seq_classif_dropout")
    known = [n for n in names if hasattr(config, n)] or (
        ["cls_dropout"] if config.model_type.startswith("deberta") else []
    )
    if not known:
        raise InputError(
            f"cls_dropout is {value}, but models of type {config.model_type} have no classifier dropout: leave it out."
        )
    setattr(config, known[0], value)


def load_lora_path(model: nn.Module, path: str) -> None:
    """Start from the adapter of `--lora_path`. Warnings name what could not be copied as it is, such as a head."""
    lines = load_lora(model, path)
    logger.info("loaded the adapter %s", path)
    for line in lines:
        logger.warning("the adapter %s: %s", path, line)


def snapshot_commit(model: ModelArguments) -> str | None:
    """The commit of the hub's model in the cache, because a branch moves; None if the model is not in the cache."""
    try:
        file = try_to_load_from_cache(
            model.model_name_or_path, "config.json", cache_dir=model.cache_dir, revision=model.model_revision
        )
    except ValueError:  # it is not a name on the hub
        return None
    parts = Path(file).parts if isinstance(file, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def adapter_settings(method: str, lora: LoRAArguments, model: ModelArguments, task: Task) -> dict[str, Any]:
    """The settings of the run that `adapter.json` keeps."""
    base = os.path.expanduser(model.model_name_or_path)
    return {
        "method": method,
        "lora_r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "lora_module": lora.lora_module,
        "base_model": os.path.abspath(base) if Path(base).is_dir() else base,
        "base_model_revision": None if Path(base).is_dir() else snapshot_commit(model) or model.model_revision,
        "task": task.name,
        "label_names": task.label_names,
        "versions": versions(),
    }

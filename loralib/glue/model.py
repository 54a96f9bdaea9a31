"""The pretrained model and its tokenizer, the adapter it starts from, and the facts that go beside a trained one."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loralib.adapters.start import load_lora
from loralib.errors import InputError
from loralib.glue.flags import LoRAArguments, ModelArguments
from loralib.glue.machine import versions
from loralib.glue.tasks import Task
from loralib.kernels.deberta import use_fast_attention

logger = logging.getLogger(__name__)


def load_model(args: ModelArguments, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained classifier, in float32, and its tokenizer.

    Raises:
        InputError: folder missing, hub not reachable, or files that do not fit.
    """
    name = os.path.expanduser(args.model_name_or_path)
    for value in (name, args.config_name, args.tokenizer_name):
        if (
            value
            and (value.startswith(("/", ".", "~")) or value.count("/") > 1)
            and not Path(value).expanduser().is_dir()
        ):
            raise InputError(
                f"the model folder {value} does not exist: give an existing folder or a model's name on the hub."
            )
    common = {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }
    labels: dict[str, Any] = {"num_labels": task.num_labels}
    if task.label_names is not None:
        labels |= {
            "id2label": dict(enumerate(task.label_names)),
            "label2id": {label: i for i, label in enumerate(task.label_names)},
        }
    try:
        config = AutoConfig.from_pretrained(args.config_name or name, **labels, **common)
        if args.cls_dropout is not None:
            _set_cls_dropout(config, args.cls_dropout)
        tokenizer = AutoTokenizer.from_pretrained(
            args.tokenizer_name or name, use_fast=args.use_fast_tokenizer, **common
        )
        if tokenizer.pad_token is None:  # decoder models have none
            tokenizer.pad_token = tokenizer.eos_token
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            raise InputError(
                f"the tokenizer of {args.tokenizer_name or name} knows no words, since its vocabulary (spm.model, "
                "tokenizer.json or vocab.txt) is missing there: download it again, or give --tokenizer_name."
            )
        config.pad_token_id = tokenizer.pad_token_id  # before the model is built: RoBERTa counts positions by it
        # float32 whatever the file holds: the hub's DeBERTa-v3 is stored in half precision (ledger G2)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **common
        )
    except InputError:
        raise
    except Exception as error:  # the libraries raise whatever their file formats do
        if Path(name).is_dir():
            where, way = "", " (is every file whole, none half downloaded or a git-lfs pointer?)"
        else:
            where, way = " (no such folder here, so the hub was asked; it may not have been reachable)", ""
        what = " ".join(str(error).split())[:500] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # the message would advise to run whatever the file holds
            what = "its weights are not a file of tensors"
        if "ignore_mismatched_sizes" in what:
            what = (
                "some layers have other sizes than the task's head and the config ask for, see above: "
                "--ignore_mismatched_sizes starts them anew"
            )
            way = ""
        raise InputError(f"the model {name} cannot be loaded{where}: {what}{way}") from error
    if args.attention == "fast" and config.model_type == "deberta-v2":
        use_fast_attention(model)
    return model, tokenizer


def _set_cls_dropout(config: Any, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"cls_dropout is {value}, it must lie in 0 to 1, below 1.")
    names = ("cls_dropout", "classifier_dropout", "seq_classif_dropout")
    known = [n for n in names if hasattr(config, n)] or (
        ["cls_dropout"] if config.model_type.startswith("deberta") else []
    )
    if not known:
        raise InputError(
            f"cls_dropout {value} has no place in a model of type {config.model_type}: leave the flag out."
        )
    setattr(config, known[0], value)


def load_lora_path(model: nn.Module, path: str) -> None:
    """Start from the adapter of `--lora_path`; what was not simply copied (a differing head, say) is logged."""
    lines = load_lora(model, path)
    logger.info("loaded the adapter %s", path)
    for line in lines:
        logger.warning("the adapter %s: %s", path, line)


def adapter_config(method: str, lora: LoRAArguments, model: ModelArguments, task: Task, layer: str) -> dict[str, Any]:
    """Facts that `adapter.json` keeps beside the weights."""
    base = os.path.expanduser(model.model_name_or_path)
    return {
        "method": method,
        "layer": layer,
        "lora_r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "lora_module": lora.lora_module,
        "base_model": os.path.abspath(base) if Path(base).is_dir() else base,
        "base_model_revision": None if Path(base).is_dir() else model.model_revision,
        "task": task.name,
        "label_names": task.label_names,
        "versions": versions(),
    }

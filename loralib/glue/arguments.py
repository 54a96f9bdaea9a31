"""Command line shared by the entry points: dataclasses of flags, and how they are parsed and refused."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from accelerate.utils import DynamoBackend
from transformers import HfArgumentParser, TrainingArguments

from loralib.errors import InputError, RunError


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that becomes a flag with a help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which pretrained model."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Folder of a pretrained model, or its name on the hub."})
    config_name: str | None = flag(None, "Config, if it is not that of the model.")
    tokenizer_name: str | None = flag(None, "Tokenizer, if it is not that of the model.")
    cache_dir: str | None = flag(None, "Where downloads from the hub are kept.")
    use_fast_tokenizer: bool = flag(True, "Use the fast tokenizer where the model has one.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the hub.")
    token: str | None = flag(None, "Access token for the hub.")
    trust_remote_code: bool = flag(False, "Run code that comes with the model. Off: only models of transformers.")
    ignore_mismatched_sizes: bool = flag(False, "Start a head of another size anew instead of refusing the model.")
    cls_dropout: float | None = flag(None, "Dropout before the classifier; the model's own where not given.")
    attention: str = flag(
        "fast",
        "DeBERTa's attention: 'fast' computes what the 'stock' code does with less work.",
        choices=["fast", "stock"],
    )


@dataclass
class DataArguments:
    """Which data."""

    _argument_group_name = "data"

    task_name: str | None = flag(None, "GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli, ax.")
    dataset_name: str | None = flag(None, "Folder with the data, or a data set's name on the hub.")
    dataset_config_name: str | None = flag(None, "Configuration of the data set on the hub.")
    max_seq_length: int = flag(128, "Longer rows are cut to this many tokens.")
    pad_to_max_length: bool = flag(True, "Pad every row to max_seq_length; False: to the longest row of its batch.")
    padding: str | None = flag(
        None,
        "fixed: every row to max_seq_length; longest: to the longest row of its batch, rounded up to 8; unpadded: as "
        "longest, and DeBERTa computes real tokens only outside of its attention. Default: fixed, or longest with "
        "--pad_to_max_length False.",
        choices=["fixed", "longest", "unpadded"],
    )
    overwrite_cache: bool = flag(False, "Tokenise anew even where a cached result exists.")
    max_train_samples: int | None = flag(None, "Use only this many rows for training.")
    max_eval_samples: int | None = flag(None, "Use only this many rows for evaluation.")
    max_predict_samples: int | None = flag(None, "Use only this many rows for prediction.")
    train_file: str | None = flag(None, "Training rows as csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = flag(None, "Validation rows, same format.")
    test_file: str | None = flag(None, "Test rows, same format.")
    heldout_split: int | None = flag(
        None, "Seed: split the validation rows in halves, one to choose by (eval_*) and one to report (heldout_*)."
    )
    glue_submission: str | None = flag(None, "Folder for files as the GLUE server wants them (with --do_predict).")

    def __post_init__(self) -> None:
        if self.max_seq_length < 1:
            raise InputError(f"max_seq_length is {self.max_seq_length}, it must be 1 or more.")
        if self.heldout_split is not None and self.heldout_split < 0:
            raise InputError(f"heldout_split is {self.heldout_split}, the seed of the split: it must be 0 or more.")
        if self.padding is None:
            self.padding = "fixed" if self.pad_to_max_length else "longest"


@dataclass
class LoRAArguments:
    """What every low-rank method needs."""

    _argument_group_name = "LoRA"

    apply_lora: bool = flag(False, "Train low-rank factors and the head; without it everything is fine-tuned.")
    lora_r: int | None = flag(None, "r: rank of each matrix (initial rank for AdaLoRA and SoRA).")
    lora_alpha: float | None = flag(None, "alpha: numerator of the scaling alpha / r.")
    lora_module: str = flag(
        "query,key,value,intermediate,layer.output,attention.output",
        "Which layers to adapt: names from query, key, value, intermediate, layer.output, attention.output, or "
        "suffixes of module names, separated by commas; 'all-linear' means every linear layer of the backbone.",
    )
    lora_dropout: float = flag(0.0, "Dropout on the input of the low-rank path.")
    lora_path: str | None = flag(
        None, "Adapter to start from: folder of a run, PEFT LoRA folder, or state dict of the released code."
    )

    def __post_init__(self) -> None:
        if not self.apply_lora:
            if self.lora_path:
                raise InputError("--lora_path needs --apply_lora: an adapter is loaded into low-rank factors.")
            return
        if self.lora_r is None or self.lora_alpha is None:
            name = "lora_r" if self.lora_r is None else "lora_alpha"
            raise InputError(
                f"--apply_lora needs --{name}: a number of 1 or more (--lora_r) or above 0 (--lora_alpha)."
            )
        if self.lora_r < 1:
            raise InputError(f"lora_r is {self.lora_r}, it must be 1 or more.")
        if self.lora_alpha <= 0:
            raise InputError(f"lora_alpha is {self.lora_alpha}, it must be above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}, it must lie in 0 to 1, below 1.")
        if not self.modules:
            raise InputError("lora_module is empty: name the layers to adapt, separated by commas.")

    @property
    def modules(self) -> list[str]:
        """`lora_module` as a list."""
        return [m.strip() for m in self.lora_module.split(",") if m.strip()]

    @property
    def layer_settings(self) -> dict[str, Any]:
        """What an adapted layer takes from the flags."""
        return {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}


# Least values of stock arguments. TrainingArguments takes others as they are: they would fail, or nothing would train,
# once data and model are loaded.
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "logging_steps": 0,
}


@dataclass
class GlueTrainingArguments(TrainingArguments):
    """The stock TrainingArguments, the names that they lost, and defaults that suit adapters."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    if TYPE_CHECKING:  # after __post_init__
        output_dir: str = ""
        report_to: list[str] = []

    # Names that are gone from transformers and that people still type, with the meaning they had.
    evaluation_strategy: str | None = flag(None, "Older name of eval_strategy.")
    overwrite_output_dir: bool = flag(
        False, "Remove the files of an earlier run in output_dir; without it a run there is resumed."
    )
    group_by_length: bool = flag(False, "Older name of --train_sampling_strategy group_by_length.")
    warmup_ratio: float | None = flag(None, "Share of the steps for warm-up; now a warmup_steps below 1.")
    logging_dir: str | None = flag(None, "Folder of the TensorBoard files; default: runs/ in output_dir.")
    no_cuda: bool = flag(False, "Older name of use_cpu.")

    # The stock filter hides a NaN loss and synchronises at each step; the trainer watches the loss itself.
    logging_nan_inf_filter: bool = flag(False, "Hide NaN and infinite losses in the logs (not advised).")
    # All trainable parameters take part in each step and no buffer changes.
    ddp_find_unused_parameters: bool | None = flag(False, "Passed to DistributedDataParallel.")
    ddp_broadcast_buffers: bool | None = flag(False, "Passed to DistributedDataParallel.")

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise InputError("--output_dir is missing: the folder for checkpoints and results.")
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise InputError(f"warmup_ratio is {self.warmup_ratio}, it must lie in 0 to 1, below 1.")
            if self.warmup_ratio:
                self.warmup_steps = self.warmup_ratio
        if self.no_cuda:
            self.use_cpu = True
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}, it must be {least} or more.")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must lie in 0 to 1, below 1.")
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise InputError(f"{name} is {getattr(self, name)}, it must lie in 0 to {2**32 - 1}.")
        if self.do_train and self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise InputError(f"num_train_epochs is {self.num_train_epochs}, it must be above 0, or give --max_steps.")
        if self.torch_compile_mode is not None:
            from torch._inductor import list_mode_options  # takes seconds to import

            _refuse_choice("torch_compile_mode", self.torch_compile_mode, list(list_mode_options()))
        if self.torch_compile_backend is not None:
            backends = [backend.value.lower() for backend in DynamoBackend if backend != DynamoBackend.NO]
            _refuse_choice("torch_compile_backend", self.torch_compile_backend.lower(), backends)
        super().__post_init__()
        if self.device.type == "cpu":  # nothing to pin for; the loader would warn
            self.dataloader_pin_memory = False


def _refuse_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}, it must be one of {', '.join(choices)}.")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside each flag, the description's lines as they are."""


class _Parser(HfArgumentParser):
    """Raises a sentence where argparse would print all flags."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}; --help lists all flags.")


def make_parser(*classes: Any, description: str = "") -> HfArgumentParser:
    """The parser of an entry point, its flags grouped by dataclass."""
    usage = "%(prog)s FLAGS\n       %(prog)s FILE.json | FILE.yaml"
    return _Parser(list(classes), description=description, usage=usage, formatter_class=_Help)


def parse(classes: Sequence[type], argv: Sequence[str] | None = None, description: str = "") -> tuple[Any, ...]:
    """Flags, or one .json or .yaml file in their place, as instances of `classes`.

    Raises:
        InputError: an unknown flag or a bad value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(*classes, description=description)
    try:
        if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
            aliases = {
                a.lstrip("-"): f.name
                for c in classes
                for f in dataclasses.fields(c)
                for a in f.metadata.get("aliases", ())
            }
            values = {aliases.get(name, name): value for name, value in _read_config(Path(argv[0])).items()}
            known = [f.name for c in classes for f in dataclasses.fields(c) if f.init]
            _refuse_unknown([k for k in values if k not in known], known)
            _check_types(classes, values)
            return _finite(parser.parse_dict(values))
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        known = [option for action in parser._actions for option in action.option_strings]
        _refuse_unknown([u for u in unknown if u.startswith("-")] or unknown, known)
        return _finite(parsed)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # a stock argument class refuses a value
        raise InputError(" ".join(str(error).split())) from error


def _finite(parsed: Sequence[Any]) -> tuple[Any, ...]:
    """`parsed`, refused where a number is NaN or infinite: it would poison a run or pass for a huge value."""
    for part in parsed:
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if isinstance(value, float) and not math.isfinite(value) and f.name != "max_grad_norm":
                raise InputError(f"{f.name} is {value}, it must be a finite number.")
    return tuple(parsed)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise InputError(f"the file {path} does not exist: give a .json or .yaml file, or flags.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold one mapping of flag names to values.")
    return values


def _refuse_unknown(unknown: Sequence[str], known: Sequence[str]) -> None:
    if unknown:
        name = str(unknown[0]).split("=")[0][:80]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else "--help lists all flags."
        raise InputError(f"{name} is not a flag of this program: {hint}")


def _check_types(classes: Sequence[type], values: dict[str, Any]) -> None:
    """A file bypasses argparse: text that means a number (YAML's "1e-3") becomes one, other mismatches are refused."""
    import typing

    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name not in values or values[f.name] is None:
                continue
            kinds = [t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None)]
            value = values[f.name]
            if value is False and str in kinds and bool not in kinds:
                value = values[f.name] = "no"  # what YAML makes of `save_strategy: no`
            try:
                if kinds == [float] and isinstance(value, str | int) and not isinstance(value, bool):
                    values[f.name] = float(value)
                elif kinds == [int] and (isinstance(value, bool) or int(value) != float(value)):
                    raise ValueError
                elif kinds == [int]:
                    values[f.name] = int(value)
                elif kinds == [bool] and not isinstance(value, bool):
                    raise ValueError
                elif kinds == [str] and not isinstance(value, str):
                    raise ValueError
            except (TypeError, ValueError) as error:
                raise InputError(f"{f.name} is {value!r}, it must be of type {kinds[0].__name__}.") from error
            choices = f.metadata.get("choices")
            if choices and values[f.name] not in choices:
                raise InputError(f"{f.name} is {value!r}, it must be one of {', '.join(map(str, choices))}.")


def command(main: Callable[[], Any]) -> NoReturn:
    """Run an entry point's `main`: what ends a run as one sentence has its own exit status (2, 3, 130 or 143)."""
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
        print(
            f"{Path(sys.argv[0]).name}: stopped by Ctrl-C; the same command goes on from the last checkpoint (SIGTERM "
            "would have written one).",
            file=sys.stderr,
        )
    except (InputError, RunError) as error:
        status = error.exit_status
        rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        # Once is enough for what all processes refuse; but a machine may lack a file, and one process find a full disk.
        if rank == 0 or local_rank == 0 or type(error) is RunError:
            process = f"process {rank}: " if rank else ""
            print(f"{Path(sys.argv[0]).name}: {process}error: {error}", file=sys.stderr)
    sys.exit(status)

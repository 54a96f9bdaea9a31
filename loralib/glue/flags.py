"""The flags that all entry points share, as dataclasses. Each class refuses values that cannot work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from loralib.errors import InputError
from loralib.glue.launched import take_launcher_settings
from loralib.glue.training_flags import check_optimizer_and_schedule, check_raw_flags
from loralib.secrets import is_secret


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that becomes a flag with a help text."""
    return field(default=default, metadata={"help": help, **metadata})


LONGEST_ROW = 1_000_000  # tokens; more would not fit into memory
LARGEST_RANK = 65_536  # more than any layer of an encoder has inputs or outputs
LARGEST_ALPHA, SMALLEST_SCALING = 1e9, 1e-30  # the scaling alpha / r and its products stay within float32


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
    ignore_mismatched_sizes: bool = flag(
        False, "Give fresh weights to layers of another size instead of refusing the model."
    )
    cls_dropout: float | None = flag(None, "Dropout before the classifier; without the flag, the model's own.")
    attention: str = flag(
        "fast",
        "DeBERTa's attention: 'fast' computes what the 'stock' code does with less work.",
        choices=["fast", "stock"],
    )
    # The trained head, which `start` finds before the data is read. It is not a flag.
    head: Any = field(default=None, init=False, repr=False)  # heads.TrainedHead | None

    def __post_init__(self) -> None:
        if self.cls_dropout is not None and not 0 <= self.cls_dropout < 1:
            raise InputError(f"cls_dropout is {self.cls_dropout}, it must be at least 0 and below 1.")


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
    overwrite_cache: bool = flag(False, "Tokenise again even where a cached result exists.")
    max_train_samples: int | None = flag(None, "Use only this many rows for training.")
    max_eval_samples: int | None = flag(None, "Use only this many rows for evaluation.")
    max_predict_samples: int | None = flag(None, "Use only this many rows for prediction.")
    train_file: str | None = flag(None, "Training rows as csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = flag(None, "Validation rows, same format.")
    test_file: str | None = flag(None, "Test rows, same format.")
    text_column: str | None = flag(None, "Column of the text; by default it is found by its name or its words.")
    text_column_2: str | None = flag(None, "Column of the second text, for pairs of texts.")
    label_column: str | None = flag(None, "Column of the labels; by default `label`.")
    label_type: str | None = flag(
        None,
        "What labels are: classes or numbers of a regression. By default, floats (0.0, 1.0, 2.5) are a regression, and "
        "words and whole numbers are classes.",
        choices=["classes", "regression"],
    )
    unlabelled: str = flag(
        "refuse",
        "What happens to training and validation rows without a label (nothing, NaN, -1): refuse the data, or drop "
        "them.",
        choices=["refuse", "drop"],
    )
    train_split: str | None = flag(None, "Name of the split to train on, in the data of --dataset_name.")
    validation_split: str | None = flag(None, "Name of the split to evaluate on.")
    test_split: str | None = flag(None, "Name of the split to predict.")
    heldout_split: int | None = flag(
        None, "Seed of a split of the validation rows into halves: eval_* for choices, heldout_* for the report."
    )
    predict_scores: bool = flag(
        False, "Add to each prediction the probability of every class, or the output of a regression."
    )
    glue_submission: str | None = flag(None, "Folder for files as the GLUE server wants them (with --do_predict).")

    def __post_init__(self) -> None:
        if not 1 <= self.max_seq_length <= LONGEST_ROW:
            raise InputError(f"max_seq_length is {self.max_seq_length}, it must lie in 1 to {LONGEST_ROW}.")
        if self.heldout_split is not None and self.heldout_split < 0:
            raise InputError(f"heldout_split is {self.heldout_split}, the seed of the split: it must be 0 or more.")
        if self.text_column_2 is not None and self.text_column in (None, self.text_column_2):
            raise InputError(
                f"text_column_2 is {self.text_column_2!r} and text_column is {self.text_column!r}: name two columns."
            )
        if self.padding is None:
            self.padding = "fixed" if self.pad_to_max_length else "longest"


@dataclass
class LoRAArguments:
    """The settings that every low-rank method needs."""

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
        if self.lora_r > LARGEST_RANK:
            raise InputError(f"lora_r is {self.lora_r}, it must be at most {LARGEST_RANK}.")
        if not 0 < self.lora_alpha <= LARGEST_ALPHA:
            raise InputError(f"lora_alpha is {self.lora_alpha}, it must be above 0 and at most {LARGEST_ALPHA:.0e}.")
        scaling = self.lora_alpha / self.lora_r
        if scaling < SMALLEST_SCALING:
            raise InputError(f"lora_alpha / lora_r is {scaling:.3g}, it must be {SMALLEST_SCALING:.0e} or more.")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}, it must be at least 0 and below 1.")
        if not self.modules:
            raise InputError("lora_module is empty: name the layers to adapt, separated by commas.")

    @property
    def modules(self) -> list[str]:
        """`lora_module` as a list."""
        return [m.strip() for m in self.lora_module.split(",") if m.strip()]

    @property
    def layer_settings(self) -> dict[str, Any]:
        """The flags that are arguments of an adapted layer."""
        return {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}


# Least values of stock arguments. TrainingArguments accepts lower ones, with which a run fails, or trains nothing, once
# data and model are loaded.
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "logging_steps": 0,
}


@dataclass
class GlueTrainingArguments(TrainingArguments):
    """The stock TrainingArguments, flags that they no longer have, and defaults that suit adapters."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    if TYPE_CHECKING:  # after __post_init__
        output_dir: str = ""
        report_to: list[str] = []

    # Names that transformers has dropped and people still type. They keep their meaning.
    evaluation_strategy: str | None = flag(None, "Older name of eval_strategy.")
    overwrite_output_dir: bool = flag(
        False, "Remove the files of an earlier run in output_dir; without it a run there is resumed."
    )
    group_by_length: bool = flag(False, "Older name of --train_sampling_strategy group_by_length.")
    warmup_ratio: float | None = flag(None, "Share of the steps for warm-up; now a warmup_steps below 1.")
    logging_dir: str | None = flag(None, "Folder of the TensorBoard files; default: runs/ in output_dir.")
    no_cuda: bool = flag(False, "Older name of use_cpu.")

    class_weights: list[str] | None = flag(
        None,
        "Weight of each class in the training loss: 'balanced' (rows / (classes x rows of the class)), or one number "
        "per class in the order of the label names; evaluation losses are not weighted.",
    )

    early_stopping_patience: int | None = flag(
        None,
        "Stop after this many evaluations in a row that do not improve metric_for_best_model. AdaLoRA: only "
        "evaluations at the target budget count. SoRA's schedule: only those of the last stage.",
    )
    early_stopping_threshold: float | None = flag(None, "An improvement must be more than this; the default is 0.")

    # The stock filter hides a NaN loss and synchronises at each step. The trainer checks the loss itself.
    logging_nan_inf_filter: bool = flag(False, "Hide NaN and infinite losses in the logs (not advised).")
    # All trainable parameters take part in each step and no buffer changes.
    ddp_find_unused_parameters: bool | None = flag(False, "Passed to DistributedDataParallel.")
    ddp_broadcast_buffers: bool | None = flag(False, "Passed to DistributedDataParallel.")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise InputError("--output_dir is missing: the folder for checkpoints and results.")
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise InputError(f"warmup_ratio is {self.warmup_ratio}, it must be at least 0 and below 1.")
            if self.warmup_ratio:
                self.warmup_steps = self.warmup_ratio
        if self.no_cuda:
            self.use_cpu = True
        self.taken_from_launcher = take_launcher_settings(self)
        check_raw_flags(self)
        if not {"LOCAL_RANK", "RANK"} & os.environ.keys():
            self.ddp_backend = None  # a single process would wait for others
        for name, least in LEAST.items():
            if getattr(self, name) is not None and not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}, it must be {least} or more.")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 0 and below 1.")
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
            self.torch_compile_backend = self.torch_compile_backend.lower()
            _refuse_choice("torch_compile_backend", self.torch_compile_backend, backends)
        if self.greater_is_better is None and self.metric_for_best_model in ("mse", "eval_mse"):
            self.greater_is_better = False  # the stock rule knows this only of losses
        super().__post_init__()
        check_optimizer_and_schedule(self)
        self._check_early_stopping()
        if self.device.type == "cpu":  # the loader would warn that there is no GPU to pin memory for
            self.dataloader_pin_memory = False

    def __getstate__(self) -> dict[str, Any]:
        """The content of training_args.bin: everything but access tokens."""
        return {name: None if is_secret(name) else value for name, value in vars(self).items()}

    def _check_early_stopping(self) -> None:
        """Refuse with a sentence what the stock callback refuses by assert."""
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        if patience is None:
            if threshold is not None:
                raise InputError("--early_stopping_threshold needs --early_stopping_patience, a number of evaluations.")
            return
        if patience < 1:
            raise InputError(f"early_stopping_patience is {patience}, it must be 1 or more.")
        if threshold is not None and threshold < 0:
            raise InputError(f"early_stopping_threshold is {threshold}, it must be 0 or more.")
        if not self.do_train:
            return
        if self.eval_strategy == "no":
            raise InputError("--early_stopping_patience needs evaluations: give --eval_strategy epoch or steps.")
        if self.metric_for_best_model is None:
            raise InputError(
                "--early_stopping_patience needs --metric_for_best_model, the name of a score or loss; "
                "--load_best_model_at_end without it takes the loss."
            )


def _refuse_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}, it must be one of {', '.join(choices)}.")

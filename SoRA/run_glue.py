"""Fine-tune a pretrained encoder on GLUE with SoRA (arXiv 2311.11696): gates that prune low-rank directions.

SoRA: --apply_lora --train_sparse --sparse_lambda_2 ...
With --lambda_schedule the threshold rises from stage to stage (Algorithm 1). Each stage goes on from the one before.
Without --train_sparse this is plain LoRA, without --apply_lora full fine-tuning.
"""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec("loralib") is None:  # a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not Path(str(importlib.util.find_spec("loralib").origin)).with_name("adapt.py").is_file():
    sys.exit(
        "error: the package 'loralib' found here is another one (Microsoft's): run 'pip uninstall loralib', then "
        f"'pip install -e {Path(__file__).resolve().parents[1]}', or use another environment."
    )

from loralib.adapt import adapt
from loralib.errors import InputError, check_at_least
from loralib.glue.flags import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, flag
from loralib.glue.model import load_model
from loralib.glue.parsing import command, parse
from loralib.glue.run import load_data, start
from loralib.glue.stages import train_in_stages
from loralib.layers import GatedLinear
from loralib.methods import Method, full_fine_tuning, lora, sora
from loralib.sparse import lambda_stages


@dataclass
class SoRAArguments(LoRAArguments):
    """SoRA. Symbols are those of arXiv 2311.11696."""

    _argument_group_name = "SoRA"

    train_sparse: bool = flag(False, "Add a gate to each low-rank direction, and prune gates to 0; off: plain LoRA.")
    sparse_lambda: float = flag(0.0, "lambda of eq. 5: weight of the gates' L1 norm in the loss.")
    sparse_lambda_2: float = flag(0.0, "eta lambda of eq. 7: threshold of the proximal step after each optimizer step.")
    lambda_schedule: str | None = flag(
        None,
        "Algorithm 1: raise the threshold over stages. linear: it is evenly spaced; log_linear: its exp is evenly "
        "spaced; exp_linear: its log is evenly spaced.",
        choices=["linear", "log_linear", "exp_linear"],
    )
    max_lambda: float | None = flag(None, "Threshold of the last stage; that of the first is sparse_lambda_2.")
    lambda_num: int | None = flag(None, "n: number of stages, the first included.")
    lambda_epochs: float | None = flag(None, "Epochs of each later stage; by default num_train_epochs.")
    sparse_lr: float | None = flag(None, "eta of the gates: their learning rate; by default learning_rate.")
    as_released: bool = flag(False, "Shrink as the released code does: gates below twice the threshold become 0, too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, sparse_lambda=self.sparse_lambda, sparse_lambda_2=self.sparse_lambda_2)
        if self.sparse_lr is not None and self.sparse_lr <= 0:
            raise InputError(f"sparse_lr is {self.sparse_lr}, it must be above 0.")
        if self.train_sparse and not self.apply_lora:
            raise InputError("--train_sparse needs --apply_lora: the gates stand between low-rank factors.")
        scheduled = [name for name in ("max_lambda", "lambda_num", "lambda_epochs") if getattr(self, name) is not None]
        if self.lambda_schedule is None:
            if scheduled:
                raise InputError(f"--{scheduled[0]} belongs to a schedule: give --lambda_schedule, or leave it out.")
            return
        if not self.train_sparse:
            raise InputError("--lambda_schedule needs --train_sparse: without gates there is no threshold to raise.")
        if self.max_lambda is None or self.lambda_num is None:
            missing = "max_lambda" if self.max_lambda is None else "lambda_num"
            raise InputError(f"--lambda_schedule {self.lambda_schedule} needs --{missing}.")
        if self.lambda_epochs is not None and self.lambda_epochs <= 0:
            raise InputError(f"lambda_epochs is {self.lambda_epochs}, it must be above 0.")
        self.thresholds()

    def thresholds(self) -> list[float]:
        """The thresholds of the stages, first to last. Without a schedule there is one stage."""
        if self.lambda_schedule is None:
            return [self.sparse_lambda_2]
        return lambda_stages(self.lambda_schedule, self.sparse_lambda_2, self.max_lambda, self.lambda_num)


def check_optimizer(flags: SoRAArguments, training: GlueTrainingArguments) -> None:
    """Refuse an optimizer that cannot apply the gates' threshold."""
    optim = getattr(training.optim, "value", training.optim)
    if flags.train_sparse and optim not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(f"--optim {optim} cannot be used with --train_sparse: the gates need SoRA's own AdamW.")


def choose_methods(model: Any, flags: SoRAArguments, do_train: bool) -> list[Method]:
    """Adapt the model, and make one Method for each stage. A run without a schedule has one stage."""
    if not flags.apply_lora:
        return [full_fine_tuning(model)]
    if not flags.train_sparse:
        logging.getLogger("loralib.run_glue").info("train_sparse is off: plain LoRA without gates")
        return [lora(model, flags.modules, **flags.layer_settings)]
    adapt(model, GatedLinear, flags.modules, **flags.layer_settings)
    numbers = {name: getattr(flags, name) for name in ("sparse_lambda", "sparse_lr", "as_released")}
    thresholds = flags.thresholds() if do_train else [flags.sparse_lambda_2]
    return [sora(model, threshold=threshold, **numbers) for threshold in thresholds]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the flags, load data and model, adapt, train and report. Return the final metrics."""
    classes = (ModelArguments, DataArguments, SoRAArguments, GlueTrainingArguments)
    model_args, data_args, flags, training = parse(classes, argv, __doc__)
    check_optimizer(flags, training)
    run = start(training, model_args, data_args, flags, argv)
    data = load_data(training, model_args, data_args)
    model, tokenizer = load_model(model_args, data.task)
    methods = choose_methods(model, flags, training.do_train)
    return train_in_stages(run, methods, model, tokenizer, data, flags.lambda_epochs)


if __name__ == "__main__":
    command(main)

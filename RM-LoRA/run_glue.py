"""Fine-tune a pretrained encoder on GLUE with RM-LoRA (arXiv 2407.12074): random masks on the factors' gradients.

RM-LoRA: --apply_lora --lora_type v1 --random_rank ... --reg_orth_coef ...
Without --apply_lora everything is fine-tuned.
"""

import importlib.util
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

from loralib.errors import InputError, check_at_least
from loralib.glue.assemble import make_trainer
from loralib.glue.flags import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, flag
from loralib.glue.model import load_model
from loralib.glue.parsing import command, parse
from loralib.glue.run import load_data, start
from loralib.glue.train import train_and_report
from loralib.methods import Method, full_fine_tuning, rm_lora


@dataclass
class RMLoRAArguments(LoRAArguments):
    """RM-LoRA. Symbols are those of arXiv 2407.12074."""

    _argument_group_name = "RM-LoRA"

    lora_type: str = flag("v1", "v1: one draw for the rows of A and the columns of B; v2: a draw for each.")
    random_rank: int | None = flag(None, "Directions of each matrix that receive a gradient, 1 to lora_r.")
    reg_orth_coef: float = flag(0.0, "lambda: weight of the orthogonality penalty.")
    mask_resample: str = flag("step", "Draw again at each optimizer step, or at each epoch.", choices=["step", "epoch"])
    as_released: bool = flag(
        False, "Mask as the released code does: do not mask the first step; later also zero the head's gradient."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_type not in ("v1", "v2"):
            raise InputError(
                f"lora_type is {self.lora_type!r}, it must be v1 or v2 here (frd and svd: AdaLoRA/run_glue.py)."
            )
        check_at_least(0, reg_orth_coef=self.reg_orth_coef)
        if self.apply_lora and not 1 <= (self.random_rank or 0) <= self.lora_r:
            raise InputError(
                f"random_rank is {self.random_rank}, it must lie in 1 to {self.lora_r} (lora_r): give --random_rank, "
                "the number of directions that receive a gradient."
            )


def choose_method(model: Any, flags: RMLoRAArguments, seed: int) -> Method:
    """Make the method that the flags ask for, and put it into the model."""
    if not flags.apply_lora:
        return full_fine_tuning(model)
    return rm_lora(
        model,
        flags.modules,
        random_rank=flags.random_rank,
        version=flags.lora_type,
        reg_orth_coef=flags.reg_orth_coef,
        mask_resample=flags.mask_resample,
        seed=seed,
        as_released=flags.as_released,
        **flags.layer_settings,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the flags, load data and model, adapt, train and report. Return the final metrics."""
    classes = (ModelArguments, DataArguments, RMLoRAArguments, GlueTrainingArguments)
    model_args, data_args, flags, training = parse(classes, argv, __doc__)
    run = start(training, model_args, data_args, flags, argv)
    data = load_data(training, model_args, data_args)
    model, tokenizer = load_model(model_args, data.task)
    method = choose_method(model, flags, training.seed)
    trainer = make_trainer(run, method, model, tokenizer, data)
    return train_and_report(run, trainer, data)


if __name__ == "__main__":
    command(main)

"""Fine-tune a pretrained encoder on GLUE with RM-LoRA (arXiv 2407.12074): random masks on the factors' gradients.

RM-LoRA: --apply_lora --lora_type v1 --random_rank ... --reg_orth_coef ...
Without --apply_lora everything is fine-tuned.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if importlib.util.find_spec("loralib") is None:  # a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not Path(str(importlib.util.find_spec("loralib").origin)).with_name("adapt.py").is_file():
    sys.exit(
        "error: the package 'loralib' found here is another one (Microsoft's): run 'pip uninstall loralib', then "
        f"'pip install -e {Path(__file__).resolve().parents[1]}', or use an environment of its own."
    )

from loralib.adapt import adapt, factors
from loralib.errors import InputError
from loralib.glue import flow
from loralib.glue.arguments import (
    DataArguments,
    GlueTrainingArguments,
    LoRAArguments,
    ModelArguments,
    command,
    flag,
    parse,
)
from loralib.layers import LoRALinear
from loralib.masking import MaskCallback, RandomMask
from loralib.regularizer import svd_penalty
from loralib.trainer import LoRATrainer


@dataclass
class RMLoRAArguments(LoRAArguments):
    """RM-LoRA. Symbols are those of arXiv 2407.12074."""

    _argument_group_name = "RM-LoRA"

    lora_type: str = flag("v1", "v1: one draw for the rows of A and the columns of B; v2: a draw for each.")
    random_rank: int | None = flag(None, "Directions of each matrix that receive a gradient, 1 to lora_r.")
    reg_orth_coef: float = flag(0.0, "lambda: weight of the orthogonality penalty.")
    mask_resample: str = flag("step", "Draw anew at each optimizer step, or at each epoch.", choices=["step", "epoch"])
    as_released: bool = flag(
        False, "Mask as the released code does: not at the first step, later the head's gradient too."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_type not in ("v1", "v2"):
            raise InputError(
                f"lora_type is {self.lora_type!r}, it must be v1 or v2 here (frd and svd: AdaLoRA/run_glue.py)."
            )
        if self.reg_orth_coef < 0:
            raise InputError(f"reg_orth_coef is {self.reg_orth_coef}, it must be 0 or more.")
        if self.apply_lora and not 1 <= (self.random_rank or 0) <= self.lora_r:
            raise InputError(
                f"random_rank is {self.random_rank}, it must lie in 1 to {self.lora_r} (lora_r): give --random_rank, "
                "the number of directions that receive a gradient."
            )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, load data and model, adapt, train, report. Returns the final metrics."""
    classes = (ModelArguments, DataArguments, RMLoRAArguments, GlueTrainingArguments)
    model_args, data_args, lora, training = parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)

    adapted, adapter, penalty = [], None, None
    method, lines = "full", []
    if lora.apply_lora:
        method = f"rm-lora-{lora.lora_type}"
        adapted = adapt(model, LoRALinear, lora.modules, **lora.layer_settings)
        adapter = flow.adapter_config(method, lora, model_args, data.task, layer=lora.lora_type)
        penalty = partial(svd_penalty, *factors(model))
        if lora.lora_path:
            flow.load_lora_path(model, lora.lora_path)
        lines.append(
            f"mask: {lora.random_rank} of {lora.lora_r} directions a matrix, drawn anew at each {lora.mask_resample}"
        )

    trainer = LoRATrainer(
        penalty=penalty,
        penalty_coef=lora.reg_orth_coef,
        penalty_name="orth_regu_loss",
        adapter=adapter,
        **flow.trainer_parts(run, data, tokenizer, data_args, model),
    )
    if lora.apply_lora:
        mask = RandomMask(model, lora.random_rank, lora.lora_type, training.seed)
        trainer.add_callback(MaskCallback(trainer, mask, lora.mask_resample, lora.as_released))
    flow.announce(run, trainer, method, adapted, *lines)
    return flow.finish(run, trainer, data, method)


if __name__ == "__main__":
    command(main)

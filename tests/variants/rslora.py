"""Rank-stabilised LoRA on GLUE (arXiv 2312.03732): the product of the factors is scaled by alpha / sqrt(r).

python tests/variants/rslora.py --apply_lora --lora_r 8 --lora_alpha 16 ... (flags of LoRA, model, data and training)
"""

import math
from collections.abc import Sequence
from typing import Any

from loralib.adapt import adapt
from loralib.glue import flow
from loralib.glue.arguments import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, command, parse
from loralib.layers import LoRALinear
from loralib.trainer import LoRATrainer


class RSLoRALinear(LoRALinear):
    """y = x W^T + b + alpha / sqrt(r) x A^T B^T (arXiv 2312.03732, theorem 3.2)."""

    @property
    def scaling(self) -> float:
        return self.lora_alpha / math.sqrt(self.r)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, load data and model, adapt, train, report. Returns the final metrics."""
    classes = (ModelArguments, DataArguments, LoRAArguments, GlueTrainingArguments)
    model_args, data_args, lora, training = parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)
    adapted = adapt(model, RSLoRALinear, lora.modules, **lora.layer_settings)
    adapter = flow.adapter_config("rslora", lora, model_args, data.task, layer="rslora")
    trainer = LoRATrainer(adapter=adapter, **flow.trainer_parts(run, data, tokenizer, data_args, model))
    flow.announce(run, trainer, "rslora", adapted)
    return flow.finish(run, trainer, data, "rslora")


if __name__ == "__main__":
    command(main)

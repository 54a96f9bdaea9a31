"""Rank-stabilised LoRA on GLUE (arXiv 2312.03732): python tests/variants/rslora.py --apply_lora --lora_r 8 ..."""

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
    classes = (ModelArguments, DataArguments, LoRAArguments, GlueTrainingArguments)
    model_args, data_args, lora, training = parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)
    method = "rslora" if lora.apply_lora else "full"
    adapted = adapt(model, RSLoRALinear, lora.modules, **lora.layer_settings) if lora.apply_lora else []
    adapter = flow.adapter_settings(method, lora, model_args, data.task) if lora.apply_lora else None
    if lora.lora_path:
        flow.load_lora_path(model, lora.lora_path)
    trainer = LoRATrainer(adapter=adapter, **flow.trainer_arguments(run, data, tokenizer, data_args, model))
    flow.clear_and_log(run, trainer, method, adapted)
    return flow.train_and_report(run, trainer, data, method)


if __name__ == "__main__":
    command(main)

"""LoRA+ on GLUE, with two learning rates: python tests/variants/loraplus_glue.py --lora_r 8 --lora_alpha 16 ..."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from loraplus import two_rates

from loralib.adapt import adapt
from loralib.glue import arguments, flow
from loralib.layers import LoRALinear
from loralib.trainer import LoRATrainer


@dataclass
class LoRAPlusArguments(arguments.LoRAArguments):
    apply_lora: bool = arguments.flag(True, "LoRA+: this entry point has nothing else.")
    rate_ratio: float = arguments.flag(16.0, "How many times as fast as A's the factors B learn.")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    classes = (arguments.ModelArguments, arguments.DataArguments, LoRAPlusArguments, arguments.GlueTrainingArguments)
    model_args, data_args, lora, training = arguments.parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)
    adapted = adapt(model, LoRALinear, lora.modules, **lora.layer_settings)
    if lora.lora_path:
        flow.load_lora_path(model, lora.lora_path)
    adapter = flow.adapter_settings("loraplus", lora, model_args, data.task)
    parts = flow.trainer_arguments(run, data, tokenizer, data_args, model)
    trainer = LoRATrainer(make_optimizer=partial(two_rates, lora.rate_ratio), adapter=adapter, **parts)
    flow.clear_and_log(run, trainer, "loraplus", adapted)
    return flow.train_and_report(run, trainer, data, "loraplus")


if __name__ == "__main__":
    arguments.command(main)

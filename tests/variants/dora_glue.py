"""DoRA on GLUE, with a penalty, a callback and a flag of its own: python tests/variants/dora_glue.py --lora_r 8 ..."""

from collections.abc import Sequence
from dataclasses import dataclass

from dora import DoRALinear
from dora_length import LengthChange

from loralib.adapt import adapt
from loralib.glue import arguments, flow
from loralib.trainer import LoRATrainer


@dataclass
class DoRAArguments(arguments.LoRAArguments):
    apply_lora: bool = arguments.flag(True, "DoRA: this entry point has nothing else.")
    length_coef: float = arguments.flag(0.0, "Weight of the penalty on rows whose length changes.")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    classes = (arguments.ModelArguments, arguments.DataArguments, DoRAArguments, arguments.GlueTrainingArguments)
    model_args, data_args, lora, training = arguments.parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)
    adapted = adapt(model, DoRALinear, lora.modules, **lora.layer_settings)
    if lora.lora_path:
        flow.load_lora_path(model, lora.lora_path)
    adapter = flow.adapter_settings("dora", lora, model_args, data.task)
    change = LengthChange(model)
    parts = flow.trainer_arguments(run, data, tokenizer, data_args, model)
    trainer = LoRATrainer(penalty=change, penalty_coef=lora.length_coef, adapter=adapter, **parts)
    trainer.add_callback(change)
    flow.clear_and_log(run, trainer, "dora", adapted)
    return flow.train_and_report(run, trainer, data, "dora")


if __name__ == "__main__":
    arguments.command(main)

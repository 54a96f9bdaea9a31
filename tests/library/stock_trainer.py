"""AdaLoRA in the stock Trainer: the method's callback, and its optimizer, go into the stock constructor."""

from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments

import loralib


def train(model: PreTrainedModel, args: TrainingArguments, **data: Any) -> loralib.Method:
    """`data`: train_dataset, data_collator and whatever else the Trainer takes."""
    method = loralib.adalora(model, ["query", "value"], r=4, lora_alpha=8, target_rank=2, final_warmup=2)
    optimizer = method.optimizer(lr=args.learning_rate)  # SoRA needs its own; for the others it may be left out
    callbacks = [loralib.MethodCallback(method)]
    Trainer(model=model, args=args, callbacks=callbacks, optimizers=(optimizer, None), **data).train()
    loralib.save_adapter(model, args.output_dir)
    return method

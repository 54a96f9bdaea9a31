"""AdaLoRA in a loop of accelerate's, with gradient accumulation."""

from typing import Any

from accelerate import Accelerator

import loralib


def train(model: Any, batches: Any, accelerator: Accelerator) -> loralib.Method:
    method = loralib.adalora(model, ["query", "value"], r=4, lora_alpha=8, target_rank=2, final_warmup=2)
    model, optimizer, batches = accelerator.prepare(model, method.optimizer(lr=1e-2), batches)
    method.begin(-(-len(batches) // accelerator.gradient_accumulation_steps))
    for number, batch in enumerate(batches):
        step = number // accelerator.gradient_accumulation_steps
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss + method.loss())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                method.before_step(step)
            optimizer.step()
            if accelerator.sync_gradients:
                method.after_step(step, gradients_valid=not optimizer.step_was_skipped)
            optimizer.zero_grad()
    return method

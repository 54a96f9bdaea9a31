"""RM-LoRA on a model that PEFT has adapted: PEFT keeps layers and files, this project masks and penalises."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

import loralib


class PenaltyTrainer(loralib.WithPenalty, Trainer):
    pass


def train(model: PreTrainedModel, args: TrainingArguments, **data: Any) -> PeftModel:
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, use_rslora=True, target_modules=["query", "value"])
    adapted = get_peft_model(model, config)
    method = loralib.rm_lora(adapted, random_rank=2, version="v2", reg_orth_coef=0.1)
    PenaltyTrainer(model=adapted, args=args, method=method, **data).train()
    adapted.save_pretrained(args.output_dir)
    return adapted

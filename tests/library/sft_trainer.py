"""RM-LoRA with its penalty in TRL's SFTTrainer: one mixin brings callback, optimizer, penalty and state."""

from typing import Any

from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

import loralib


class PenaltySFTTrainer(loralib.WithPenalty, SFTTrainer):
    pass


def train(model: PreTrainedModel, args: SFTConfig, **data: Any) -> loralib.Method:
    """`model`: a decoder, adapted before the trainer takes it. Its own output layer stays frozen."""
    method = loralib.rm_lora(model, ["q_proj", "v_proj"], r=4, lora_alpha=8, random_rank=2, reg_orth_coef=0.1)
    PenaltySFTTrainer(model=model, args=args, method=method, **data).train()
    loralib.merge(model)  # a plain decoder again, with other weights
    model.save_pretrained(args.output_dir)
    return method

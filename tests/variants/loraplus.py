"""LoRA+ (arXiv 2402.12354) as an optimizer: the factors B learn faster than the factors A."""

from typing import Any

import torch


def two_rates(ratio: float, trainer: Any) -> torch.optim.Optimizer:
    """AdamW with `ratio` times the learning rate for B and, as in the released code, for vectors.

    Schedules scale both rates.
    """
    args, decayed = trainer.args, set(trainer.get_decay_parameter_names(trainer.model))
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            groups.setdefault((name.endswith("lora_B") or p.ndim == 1, name in decayed), []).append(p)
    rate, decay = args.learning_rate, args.weight_decay
    settings = [
        {"params": ps, "lr": rate * (ratio if fast else 1), "weight_decay": decay if decays else 0.0}
        for (fast, decays), ps in groups.items()
    ]
    return torch.optim.AdamW(settings, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)

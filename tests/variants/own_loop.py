"""loralib without Trainer and GLUE: adapt a module, train it in your own loop, save the adapter, merge it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralib.adapt import adapt
from loralib.export import merge, save_adapter
from loralib.layers import LoRALinear


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], folder: str) -> None:
    """`model` maps rows (batch, in) to (batch, classes); a batch is such rows and their labels (batch,)."""
    adapt(model, LoRALinear, ["all-linear"], r=4, lora_alpha=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for x, labels in batches:
        F.cross_entropy(model(x), labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, folder, {"method": "lora", "lora_r": 4, "lora_alpha": 8})
    merge(model)  # a plain model again, with other weights

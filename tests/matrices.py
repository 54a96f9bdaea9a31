"""Adapted matrices with values that are not zero, for the tests of layers and of what works on them."""

import torch
from torch import nn

from loralib.layers import LoRALinear


def randomised(layer: LoRALinear) -> LoRALinear:
    """All of the layer's own parameters drawn again, so that no factor is zero."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def make(kind: type[LoRALinear], n: int = 5, m: int = 7, r: int = 3, dtype: torch.dtype = torch.float64) -> LoRALinear:
    return randomised(kind(nn.Linear(n, m, dtype=dtype), r=r, lora_alpha=6))


class Model(nn.Module):
    """Some adapted matrices of different shapes."""

    def __init__(self, kind: type[LoRALinear], r: int = 4) -> None:
        super().__init__()
        sizes = [(6, 5), (6, 5), (5, 9), (9, 6)]
        self.layers = nn.ModuleList(make(kind, n, m, r) for n, m in sizes)

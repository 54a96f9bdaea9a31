"""DoRA (arXiv 2402.09353) as a layer: what LoRA learns is the direction of each output row, a vector its length."""

from typing import Any

import torch
from torch import Tensor, nn

from loralib.layers import LoRALinear


class DoRALinear(LoRALinear):
    """y = x W'^T + b with W' = m (W + s B A) / |W + s B A|, s = alpha / r, one norm for each output row (eq. 5).

    m (out,) starts at |W|, so a fresh layer equals the one it replaces. The norm is a constant in the backward (4.3).
    """

    lora_magnitude: nn.Parameter

    def add_parameters(self, **like: Any) -> None:
        self.lora_magnitude = nn.Parameter(torch.empty(self.out_features, **like))

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        self.lora_magnitude.data = self.weight.detach().norm(dim=1)

    def row_factor(self) -> Tensor:
        """m / |W + s B A|, (out,)."""
        return self.lora_magnitude / (self.weight + super().delta_weight()).detach().norm(dim=1)

    def delta_weight(self) -> Tensor:
        return self.row_factor().unsqueeze(1) * (self.weight + super().delta_weight()) - self.weight

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = super().forward(x)
        bias = 0 if self.bias is None else self.bias
        return ((y - bias) * self.row_factor() + bias).to(y.dtype)

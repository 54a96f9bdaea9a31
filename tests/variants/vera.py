"""VeRA (arXiv 2310.11454) as a layer: frozen random factors that all layers share, and two trained vectors in each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralib.layers import LoRALinear


class VeRALinear(LoRALinear):
    """y = x W^T + b + b_v * (B (d * (A x))), d (r,) and b_v (out,) trained (eq. 2). lora_alpha has no meaning here.

    All layers of one width hold the same A, and all of one height the same B.
    """

    frozen = shared = ("lora_A", "lora_B")
    between = "lora_d"

    @property
    def scaling(self) -> float:
        return 1.0

    def add_parameters(self, **like: Any) -> None:
        self.lora_d = nn.Parameter(torch.empty(self.r, **like))
        self.lora_vector = nn.Parameter(torch.empty(self.out_features, **like))

    def reset_lora_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A)
        nn.init.kaiming_uniform_(self.lora_B)
        nn.init.constant_(self.lora_d, 0.1)
        nn.init.zeros_(self.lora_vector)

    def delta_weight(self) -> Tensor:
        return self.lora_vector.unsqueeze(1) * super().delta_weight()

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        u = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A) * self.lora_d
        return F.linear(x, self.weight, self.bias) + self.lora_vector * F.linear(u, self.lora_B)

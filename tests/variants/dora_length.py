"""A penalty and a callback for DoRA, in one class: how far the lengths of the rows have moved."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from loralib.adapt import adapted_layers


class LengthChange(TrainerCallback):
    """Mean over all rows of (m - |W|)^2. Called, it is a penalty; as a callback it adds a fact to run.json."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [layer for _, layer in adapted_layers(model)]
        self.start: Tensor | None = None  # (rows), on the device that the first call finds

    def __call__(self) -> Tensor:
        if self.start is None:
            self.start = torch.cat([layer.weight.detach().norm(dim=1) for layer in self.layers])
        return (torch.cat([layer.lora_magnitude for layer in self.layers]) - self.start).square().mean()

    def summary(self) -> dict[str, float]:
        return {"length_change": self().item()}

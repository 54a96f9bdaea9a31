"""SoRA in a plain loop of PyTorch's, for any module of linear layers."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

import loralib


def train(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> loralib.Method:
    """`model` maps rows (batch, in) to (batch, classes); a batch is such rows and their labels (batch,)."""
    method = loralib.sora(model, ["all-linear"], r=4, lora_alpha=8, threshold=1e-3, sparse_lambda=0.1)
    optimizer = method.optimizer(lr=1e-2)
    method.begin(len(batches))
    for step, (rows, labels) in enumerate(batches):
        (F.cross_entropy(model(rows), labels) + method.loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    return method

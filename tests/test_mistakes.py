"""What users of the library get wrong, and modules that do not call their layers: nothing of it stays silent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_library import ALPHA, MODULES, PenaltyTrainer, R, arguments, bert, parts, put_in
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import loralib
from loralib.errors import InputError
from loralib.methods import Method

SIZES: dict[str, Any] = {"r": R, "lora_alpha": ALPHA}


# ---- torch's own transformer ----


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 2))


def test_torchs_encoder_layer_uses_its_adapters_in_evaluation() -> None:
    """Its fast path for evaluation takes the weights of its layers and does not call them."""
    model, rows = encoder(), torch.randn(2, 5, 16)
    method = loralib.lora(model, ["all-linear"], **SIZES)
    assert method.factors is not None
    for b in method.factors.B:
        nn.init.normal_(b)
    wanted = model.train()(rows).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(rows), wanted)
        loralib.merge(model)
        torch.testing.assert_close(model(rows), wanted)


def test_a_layer_that_is_never_called_is_not_adapted() -> None:
    """nn.MultiheadAttention takes the weight of its out_proj: a factor there has no effect and no gradient."""
    method = loralib.lora(model := encoder(), "all-linear", **SIZES)
    assert method.factors is not None
    model(torch.randn(2, 5, 16)).sum().backward()
    assert len(method.factors.names) == 5 and all(b.grad is not None for b in method.factors.B)
    with pytest.raises(InputError, match="'out_proj' matches no linear layer"):
        loralib.lora(encoder(), ["out_proj"], **SIZES)

"""What users of the library get wrong, and modules that do not call their layers: nothing of it stays silent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import make_base, make_run
from test_library import ALPHA, R
from torch import nn
from transformers import BertForTokenClassification

import loralib
from loralib.errors import InputError

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


# ---- predict ----


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", make_base(tmp_path / "base", "bert"))
    return tmp_path / "run"


@pytest.mark.parametrize("texts", [["a b", ("a b", "c d")], [("a b", "c d"), "a b"]])
def test_texts_and_pairs_in_one_list_are_refused(texts: Any, run: Path) -> None:
    """The second text of a pair was left out if the batch began with a single text."""
    with pytest.raises(InputError, match="text 1 is .*: give texts alone or pairs alone"):
        loralib.predict(run, texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, it must be 1 or more"),
        ({"batch_size": -1}, "batch_size is -1, it must be 1 or more"),
        ({"max_length": 0}, "max_length is 0, it must lie in 3 to 40"),
        ({"max_length": 41}, "max_length is 41, it must lie in 3 to 40"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings: dict[str, int], message: str, run: Path) -> None:
    with pytest.raises(InputError, match=message):
        loralib.predict(run, ["a b"], **settings)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_a_long_text_is_cut_to_the_models_positions(family: str, tmp_path: Path) -> None:
    """RoBERTa's table has a row for each token and one more for each index up to that of padding."""
    make_run(tmp_path / "run", make_base(tmp_path / "base", family))
    model, tokenizer = loralib.load(tmp_path / "run")
    tokenizer.model_max_length = int(1e30)  # as in folders that do not state it
    (long,) = loralib.predict(model, ["a b " * 100], tokenizer)
    positions = 39 if family == "roberta" else 40
    assert long == loralib.predict(model, ["a b " * 100], tokenizer, max_length=positions)[0]


def test_a_token_classifier_gives_no_label_of_a_text(run: Path) -> None:
    model, tokenizer = loralib.load(run)
    with pytest.raises(InputError, match="BertForTokenClassification gives no label for a text"):
        loralib.predict(BertForTokenClassification(model.config), ["a b"], tokenizer)

"""Putting layers into a model: what is replaced, what trains, what is counted."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from loralib.adapt import ALL_LINEAR, adapt, adapted_layers, backbone_of, factors, match_modules, parameters, ranks
from loralib.adapters.exports import merge
from loralib.errors import InputError
from loralib.layers import GatedLinear, LoRALinear, SVDLinear

CONFIG = BertConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50,
    max_position_embeddings=40,
)  # fmt: skip


def bert() -> nn.Module:
    return BertForSequenceClassification(CONFIG).eval()


def test_a_fresh_adapter_changes_no_output_and_keeps_every_parameter_in_its_place() -> None:
    ids = torch.randint(0, 50, (3, 7))
    for layer in (LoRALinear, SVDLinear, GatedLinear):
        model = bert()
        before, names = model(input_ids=ids).logits, {n: p for n, p in model.named_parameters()}
        adapted = adapt(model, layer, [ALL_LINEAR], r=2, lora_alpha=4.0)
        assert len(adapted) == 12 and adapted == [n for n, _ in adapted_layers(model)]
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-6)
        after = dict(model.named_parameters())
        assert all(after[n] is p for n, p in names.items())


def test_names_may_overlap_and_come_in_the_order_of_the_model() -> None:
    model = bert()
    names = match_modules(model, ["value", "query", "attention.self.query", "query"])
    assert [n.rpartition(".")[2] for n in names] == ["query", "value"] * 2


@pytest.mark.parametrize("wanted", ["q_proj", "dense2", "uery", "pooler", "classifier", "pooler.dense", ""])
def test_what_matches_no_layer_of_the_backbone_is_refused_with_what_could(wanted: str) -> None:
    with pytest.raises(InputError) as refused:
        match_modules(bert(), ["query", wanted])
    said = str(refused.value)
    for name in (repr(wanted), "BertForSequenceClassification", "query, key, value", "all-linear", "output.dense"):
        assert name in said
    assert "pooler." not in said.partition("choose from")[2] and "classifier" not in said.partition("choose from")[2]


def test_a_backbone_without_linear_layers_is_refused() -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10, n_positions=8)
    with pytest.raises(InputError, match=r"GPT2ForSequenceClassification has no linear layer \(nn.Linear\)"):
        match_modules(GPT2ForSequenceClassification(config), ["all-linear"])


def test_adapting_twice_is_refused() -> None:
    model = bert()
    adapt(model, LoRALinear, ["query"], r=2, lora_alpha=4.0)
    with pytest.raises(InputError, match=r"adapted already \(bert.encoder.layer.0.attention.self.query\)"):
        adapt(model, LoRALinear, ["value"], r=2, lora_alpha=4.0)


def test_a_model_without_a_head_trains_only_its_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert backbone_of(model) == ("", model)
    assert adapt(model, LoRALinear, ["2"], r=1, lora_alpha=1.0) == ["2"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"2.lora_A", "2.lora_B"}
    assert parameters(model)["head"] == 0


def test_a_layer_that_stands_in_two_places_is_adapted_in_both_and_counted_once() -> None:
    shared = nn.Linear(5, 5)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(5, 5)})
    adapt(model, LoRALinear, ["a", "c"], r=2, lora_alpha=4.0)
    assert model["a"] is model["b"] and isinstance(model["b"], LoRALinear)
    counts = parameters(model)
    assert counts["lora"] == counts["trainable"] == counts["remaining"] == 2 * 2 * (5 + 5)
    assert counts["total"] == 2 * (25 + 5) + counts["lora"]
    assert list(counts["modules"]) == ["a", "c"]
    merge(model)
    assert model["a"] is model["b"] and type(model["b"]) is nn.Linear


def test_tied_weights_are_counted_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(5, 5, bias=False), "b": nn.Linear(5, 5, bias=False)})
    model["b"].weight = model["a"].weight
    adapt(model, SVDLinear, [ALL_LINEAR], r=2, lora_alpha=4.0)
    assert parameters(model)["total"] == 25 + 2 * 2 * (5 + 5 + 1)
    assert model["a"].weight is model["b"].weight


def test_counts_are_exact_by_module_and_in_sum() -> None:
    model = bert()
    adapt(model, SVDLinear, ["query", "intermediate"], r=3, lora_alpha=4.0)
    layers = dict(adapted_layers(model))
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.lora_E[:] = 1.0
            layer.lora_E[:i] = 0.0
    counts = parameters(model)
    sizes = {"query": (16, 16), "dense": (16, 24)}
    for i, (name, count) in enumerate(counts["modules"].items()):
        n, m = sizes[name.rpartition(".")[2]]
        assert count == {"trainable": 3 * (n + m + 1), "rank": max(3 - i, 0), "remaining": max(3 - i, 0) * (n + m)}
    assert ranks(model) == {name: count["rank"] for name, count in counts["modules"].items()}
    assert counts["lora"] == sum(c["trainable"] for c in counts["modules"].values())
    assert counts["head"] == (16 * 16 + 16) + (16 * 2 + 2)  # pooler and classifier
    assert counts["trainable"] == counts["lora"] + counts["head"]
    assert counts["total"] == sum(p.numel() for p in bert().parameters()) + counts["lora"]


def test_factors_come_in_the_order_of_the_model() -> None:
    model = bert()
    adapt(model, LoRALinear, [ALL_LINEAR], r=2, lora_alpha=4.0)
    of = factors(model)
    assert of.names == [name for name, _ in adapted_layers(model)] and of.between == []
    assert all(a is layer.lora_A for a, (_, layer) in zip(of.A, adapted_layers(model), strict=True))
    assert all(b is layer.lora_B for b, (_, layer) in zip(of.B, adapted_layers(model), strict=True))
    assert factors(of) is of and of.ranks() == dict.fromkeys(of.names, 2)
    with pytest.raises(InputError, match="has no adapted layer"):
        factors(bert())

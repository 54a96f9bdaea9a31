"""What all adapted layers prepare together: the numbers of layers left alone, of the weights as they are now."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2ForSequenceClassification

from loralib.adapt import ROLES, adapt, adapted_layers
from loralib.deberta import use_fast_attention
from loralib.layers import GatedLinear, LoRALinear, SVDLinear

KINDS = [LoRALinear, SVDLinear, GatedLinear]
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
BATCH = {"input_ids": torch.arange(1, 21).view(2, 10)}


def deberta(kind: type[LoRALinear], **settings: Any) -> Any:
    """An adapted model, no factor of which is zero."""
    torch.manual_seed(0)
    attention = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **attention))
    use_fast_attention(model)
    adapt(model, kind, list(ROLES), r=3, lora_alpha=6, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def without(model: Any) -> Any:
    """A copy whose layers are left alone."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if hook.__module__ == "loralib.together"]:
                del hooks[number]
    return model


def step(model: Any, dtype: torch.dtype | None = torch.bfloat16) -> list[Tensor]:
    """Logits, and the gradient of every parameter that has one."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(**BATCH).logits
    logits.float().square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(found: list[Tensor], reference: list[Tensor]) -> bool:
    return len(found) == len(reference) and all(map(torch.equal, found, reference))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_layers_left_alone(kind: type[LoRALinear], dtype: torch.dtype | None) -> None:
    model = deberta(kind, lora_dropout=0.1)
    plain = without(model)
    for _ in range(2):
        found, reference = step(model, dtype), step(plain, dtype)
        assert same(found, reference)
        assert all((layer.kept is not None) == (dtype is not None) for _, layer in adapted_layers(model))
        assert all(layer.kept is None for _, layer in adapted_layers(plain))
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        with torch.no_grad():
            for a, b in zip(model.parameters(), plain.parameters(), strict=True):
                if a.grad is not None:
                    a.sub_(0.01 * a.grad)
                    b.sub_(0.01 * b.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = deberta(SVDLinear)
    reference = step(without(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert same(step(model), reference)


def in_place(layer: LoRALinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def new_storage(layer: LoRALinear) -> None:
    layer.weight.data = layer.weight.data * 2


def new_parameter(layer: LoRALinear) -> None:
    layer.weight = nn.Parameter(layer.weight.data * 2, requires_grad=False)


def loaded(layer: LoRALinear) -> None:
    layer.load_state_dict(layer.state_dict() | {"weight": layer.weight * 2})


def behind_autograd(layer: LoRALinear) -> None:
    layer.eval()
    layer.weight.data.mul_(2)  # no version counter sees this
    layer.train()


@pytest.mark.parametrize("change", [in_place, new_storage, new_parameter, loaded, behind_autograd])
def test_a_kept_weight_follows_its_layer(change: Callable[[LoRALinear], None]) -> None:
    model = deberta(LoRALinear)
    step(model)
    _, layer = next(adapted_layers(model))
    kept = layer.kept
    step(model)
    assert kept is not None and layer.kept is kept  # not cast again
    change(layer)
    assert same(step(model), step(without(model)))
    assert layer.kept is not kept


def test_nothing_is_left_after_a_forward_not_even_a_failed_one() -> None:
    model = deberta(LoRALinear)
    step(model)
    layers = [layer for _, layer in adapted_layers(model)]
    assert all(layer.prepared is None for layer in layers)
    layers[-1].forward = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**BATCH)
    assert all(layer.prepared is None for layer in layers)


def test_evaluation_keeps_nothing() -> None:
    model = deberta(LoRALinear)
    step(model)
    layers = [layer for _, layer in adapted_layers(model)]
    assert all(layer.kept is not None for layer in layers)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**BATCH)
    assert all(layer.kept is None for layer in layers)


def test_a_model_goes_round_pickle_and_deepcopy() -> None:
    model = deberta(SVDLinear)
    reference = step(model)
    assert same(step(copy.deepcopy(model)), reference)
    assert same(step(pickle.loads(pickle.dumps(model))), reference)
    assert same(step(model), reference)


def replica(model: nn.Module) -> nn.Module:
    """What nn.DataParallel runs on a further GPU, made as torch.nn.parallel.replicate makes it: without parameters."""
    modules = list(model.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        for name, child in module._modules.items():
            if child is not None:
                copies[id(module)]._modules[name] = copies[id(child)]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                copies[id(module)]._parameters.pop(name, None)
                setattr(copies[id(module)], name, parameter.clone())
    return copies[id(model)]


def test_a_replica_of_data_parallel() -> None:
    model = deberta(SVDLinear)
    reference = step(model)
    kept = [layer.kept for _, layer in adapted_layers(model)]
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = replica(model)(**BATCH).logits
        logits.float().square().sum().backward()
        assert same([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], reference)
    assert all(layer.prepared is None for _, layer in adapted_layers(model))
    assert [layer.kept for _, layer in adapted_layers(model)] == kept


def test_layers_that_take_no_part_and_weights_that_train() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    adapt(model, SVDLinear, list(ROLES), r=3, lora_alpha=6)
    model.bert.encoder.layer = model.bert.encoder.layer[:]  # the same layers, in a list that we shorten below
    model.bert.unused = nn.ModuleList([copy.deepcopy(model.bert.encoder.layer[0])])
    _, layer = next(adapted_layers(model))
    layer.weight.requires_grad = layer.bias.requires_grad = True
    model.train()
    found = step(model)
    assert same(found, step(without(model)))
    assert layer.weight.grad is not None and layer.kept is None
    assert all(p.grad is None for p in model.bert.unused.parameters())


def test_a_variant_may_ignore_it() -> None:
    class Doubled(LoRALinear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight + 2 * self.lora_B @ self.lora_A, self.bias)

    model = deberta(Doubled)
    assert same(step(model), step(without(model)))


def test_compiled_layers_are_left_alone() -> None:
    model = deberta(LoRALinear)
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    reference = step(model)
    compiled = copy.deepcopy(model)
    compiled.deberta.forward = torch.compile(compiled.deberta.forward, backend="aot_eager", fullgraph=True)
    whole = copy.deepcopy(model)
    whole.forward = torch.compile(whole.forward, backend="aot_eager", fullgraph=True)
    for each in (compiled, whole):
        for found, wanted in zip(step(each), reference, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))

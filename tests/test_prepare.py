"""What all adapted layers prepare together: the numbers of layers left alone, of the weights as they are now."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import runs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2ForSequenceClassification

from loralib.adapt import ROLES, adapt, adapted_layers
from loralib.adapters.exports import merge
from loralib.kernels.deberta import use_fast_attention
from loralib.kernels.prepare import prepare_at_once, prepare_one_by_one
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


def deberta(kind: type[LoRALinear], stock: bool = False, **settings: Any) -> Any:
    """An adapted model, no factor of which is zero. stock: attention as released, its positions by the same layers."""
    torch.manual_seed(0)
    attention = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **attention, share_att_key=stock))
    if not stock:
        use_fast_attention(model)
    adapt(model, kind, list(ROLES), r=3, lora_alpha=6, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def without(model: Any) -> Any:
    """A copy whose layers are left alone."""
    model = copy.deepcopy(model)
    prepare_one_by_one(model)
    assert not any(
        h.__module__ == "loralib.kernels.prepare" for m in model.modules() for h in m._forward_pre_hooks.values()
    )
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


def calls(model: Any, dtype: torch.dtype | None = torch.bfloat16) -> Counter[str]:
    with runs.Calls() as found:
        step(model, dtype)
    return found.count


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_layers_left_alone(kind: type[LoRALinear], dtype: torch.dtype | None) -> None:
    model = deberta(kind, lora_dropout=0.1)
    plain = without(model)
    for _ in range(2):
        assert same(step(model, dtype), step(plain, dtype))
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        with torch.no_grad():
            for a, b in zip(model.parameters(), plain.parameters(), strict=True):
                if a.grad is not None:
                    a.sub_(0.01 * a.grad)
                    b.sub_(0.01 * b.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_it_saves_operations(kind: type[LoRALinear]) -> None:
    model = deberta(kind)
    together, alone = calls(model), calls(without(model))
    # weight, bias, A and B of twelve layers; the gradients of their factors
    assert alone["_to_copy"] - together["_to_copy"] == 12 * 6 and together["_foreach_copy_"] == 2
    together, alone = calls(model, None), calls(without(model), None)
    if kind is LoRALinear:
        assert together == alone
    else:  # matrices of two shapes in place of twelve; a product each way, and one for the diagonals' gradients
        assert alone["mul"] - together["mul"] == 3 * (12 - 2)


def test_a_layer_used_twice_sums_its_gradients_in_full_precision() -> None:
    """DeBERTa's stock attention projects hidden states and positions by the same layers."""
    model = deberta(SVDLinear, stock=True)
    assert same(step(model), step(without(model)))


def test_nothing_is_computed_for_frozen_factors() -> None:
    model = deberta(SVDLinear)
    for p in model.deberta.encoder.layer[0].parameters():
        p.requires_grad = False
    for _, layer in adapted_layers(model):
        layer.lora_A.requires_grad = False
    plain = without(model)
    assert same(step(model), step(plain))
    for name in ("mm", "addmm", "bmm"):
        assert calls(model)[name] == calls(plain)[name]


class Own(SVDLinear):
    """A diagonal that depends on the input of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().float().mean()
        return super().forward(x)

    def diagonal(self) -> Tensor:
        return self.lora_E.view(-1) * self.seen


class Computed(GatedLinear):
    """A diagonal that is computed only from parameters."""

    def diagonal(self) -> Tensor:
        return torch.sigmoid(self.lora_gate).view(-1)


class Level(LoRALinear):
    """A diagonal without parameters that is set during the forward, as DyLoRA's ranks."""

    level = 3

    def diagonal(self) -> Tensor:
        return (torch.arange(self.r) < self.level).float()


class Routed(SVDLinear):
    """A diagonal that is a view of a parameter, chosen during the forward."""

    level = 1

    def add_parameters(self, **like: Any) -> None:
        super().add_parameters(**like)
        self.lora_T = nn.Parameter(torch.ones(5, self.r, **like))

    def diagonal(self) -> Tensor:
        return self.lora_T[self.level]


class Doubled(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + 2 * self.lora_B @ self.lora_A, self.bias)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", [Own, Computed, Doubled, Level, Routed])
def test_variants_are_left_alone(kind: type[LoRALinear], dtype: torch.dtype | None) -> None:
    model = deberta(kind)
    for each in (model, plain := without(model)):
        output = each.deberta.encoder.layer[0].output
        forward, level = output.forward, count(1)

        def leveled(*args: Any, output: Any = output, forward: Any = forward, level: Any = level) -> Tensor:
            output.dense.level = next(level)
            return forward(*args)

        output.forward = leveled
    for _ in range(2):
        assert same(step(model, dtype), step(plain, dtype))


def change_factors(module: Any, args: Any) -> None:
    with torch.no_grad():
        for _, layer in adapted_layers(module):
            layer.lora_A.mul_(1.5)


@pytest.mark.parametrize("place", ["deberta", "deberta.encoder.layer.1", "deberta.encoder.layer.1.output.dense"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_forward_hook_may_change_factors(place: str, dtype: torch.dtype | None) -> None:
    model = deberta(SVDLinear)
    for each in (model, plain := without(model)):
        each.get_submodule(place).register_forward_pre_hook(change_factors)
    for _ in range(2):
        assert same(step(model, dtype), step(plain, dtype))


def test_a_layer_with_its_own_forward_is_left_alone() -> None:
    model = deberta(LoRALinear)
    for each in (model, plain := without(model)):
        dense = each.deberta.encoder.layer[1].output.dense

        def noisy(x: Tensor, dense: Any = dense, forward: Any = dense.forward) -> Tensor:
            change_factors(dense, x)
            return forward(x)

        dense.forward = noisy
    for _ in range(2):
        assert same(step(model), step(plain))


def test_another_precision_within_a_forward() -> None:
    model = deberta(LoRALinear)
    for each in (model, plain := without(model)):
        for block, settings in zip(
            each.deberta.encoder.layer, ({"dtype": torch.float16}, {"enabled": False}), strict=True
        ):

            def other(x: Tensor, residual: Tensor, forward: Any = block.output.forward, how: Any = settings) -> Tensor:
                with torch.autocast("cpu", **how):
                    return forward(x.float(), residual)

            block.output.forward = other
    assert same(step(model), step(plain))


def test_factors_of_another_precision_than_the_weights() -> None:
    model = deberta(SVDLinear)
    for _, layer in adapted_layers(model):
        layer.weight.data = layer.weight.data.half()
    assert same(step(model), step(without(model)))


def test_matrices_of_one_shape_that_take_no_part() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    model = nn.Sequential(Body())
    adapt(model, SVDLinear, ["all-linear"], r=3, lora_alpha=6)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            model(torch.randn(4, 8)).float().sum().backward()
    assert model[0].unused.lora_A.grad is None and model[0].a.lora_A.grad is not None


@pytest.mark.parametrize("kind", [*KINDS, Computed])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointing_by_hand(kind: type[LoRALinear], dtype: torch.dtype | None) -> None:
    """Nothing tells the layers that they will be computed again."""
    model = deberta(kind)
    reference = step(without(model), dtype)
    for block in model.deberta.encoder.layer:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert same(step(model, dtype), reference)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = deberta(SVDLinear)
    reference = step(without(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert same(step(model), reference)
    assert calls(model)["_foreach_copy_"] == 0  # each layer's copies live as long as the layer needs them


def in_place(layer: LoRALinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def behind_autograd(layer: LoRALinear) -> None:
    layer.weight.data.mul_(2)  # no version counter sees this


def new_storage(layer: LoRALinear) -> None:
    layer.weight.data = layer.weight.data * 2


def loaded(layer: LoRALinear) -> None:
    layer.load_state_dict(layer.state_dict() | {"weight": layer.weight * 2})


@pytest.mark.parametrize("change", [in_place, behind_autograd, new_storage, loaded])
def test_frozen_weights_are_those_of_now(change: Callable[[LoRALinear], None]) -> None:
    model = deberta(LoRALinear)
    before = step(model)
    _, layer = next(adapted_layers(model))
    change(layer)
    after = step(model)
    assert same(after, step(without(model))) and not same(after, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_forward(error: type[BaseException]) -> None:
    model = deberta(SVDLinear)
    step(model)
    layers = [layer for _, layer in adapted_layers(model)]
    assert all(layer.prepared is None for layer in layers)

    def fail(*args: Any) -> Tensor:
        raise error

    block = model.deberta.encoder.layer[0].output
    forward, block.forward = block.forward, fail
    with pytest.raises(error):
        step(model)
    assert (layers[-1].prepared is None) == (error is RuntimeError)  # no hook runs after an interrupt
    model.eval()
    assert all(layer.prepared is None for layer in layers)
    model.train()
    with pytest.raises(error):
        step(model)
    block.forward = forward
    outputs = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # still in training mode
        for layer in layers:
            layer.lora_A.mul_(2)
        for _ in range(2):
            torch.manual_seed(1)
            outputs.append(model(**BATCH).logits)
            prepare_one_by_one(model)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_mode_without_gradients(off: Any) -> None:
    model = deberta(SVDLinear)
    reference = step(without(model))
    with off(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**BATCH)
    assert same(step(model), reference)


def test_gradients_switched_on_within_a_forward() -> None:
    model = deberta(SVDLinear)
    output = model.deberta.encoder.layer[0].output
    forward, outputs = output.forward, []

    def recorded(*args: Any) -> Tensor:
        with torch.enable_grad():
            outputs.append(forward(*args))
        return outputs[-1].detach()

    output.forward = recorded
    with torch.no_grad():
        model(**BATCH)
    (outputs[0] ** 2).sum().backward()
    assert all(p.grad is not None for p in (output.dense.lora_A, output.dense.lora_B, output.dense.lora_E))


def test_hooks_neither_pile_up_nor_stay() -> None:
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES))
    for _ in range(2):
        adapt(model, LoRALinear, list(ROLES), r=3, lora_alpha=6)
        prepare_at_once(model)
        assert len(model.deberta._forward_pre_hooks) == len(model.deberta._forward_hooks) == 1
        merge(model)
        assert not model.deberta._forward_pre_hooks and not model.deberta._forward_hooks
        assert not model.deberta._forward_hooks_always_called


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
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = replica(model)(**BATCH).logits
        logits.float().square().sum().backward()
        assert same([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], reference)
    assert all(layer.prepared is None for _, layer in adapted_layers(model))


def test_layers_that_take_no_part_and_weights_that_train() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    adapt(model, SVDLinear, list(ROLES), r=3, lora_alpha=6)
    model.bert.unused = nn.ModuleList([copy.deepcopy(model.bert.encoder.layer[0])])
    _, layer = next(adapted_layers(model))
    layer.weight.requires_grad = layer.bias.requires_grad = True
    model.train()
    found = step(model)
    assert same(found, step(without(model)))
    assert layer.weight.grad is not None
    assert all(p.grad is None for p in model.bert.unused.parameters())


def test_compiled_forwards() -> None:
    model = deberta(LoRALinear)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    reference = step(model)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = copy.deepcopy(model)
    compiled.deberta.forward = torch.compile(compiled.deberta.forward, backend="aot_eager", fullgraph=True)
    whole = copy.deepcopy(model)
    whole.forward = torch.compile(whole.forward, backend=backend, fullgraph=True)
    for each in (compiled, whole):
        for found, wanted in zip(step(each), reference, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    names = {
        str(node.target) for graph in graphs for m in graph.modules() for node in getattr(m, "graph", graph.graph).nodes
    }
    assert any("linear" in name or "addmm" in name for name in names), names
    assert not any("foreach_copy" in name for name in names), names

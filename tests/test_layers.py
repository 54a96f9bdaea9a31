"""The layers against their formulas, written out with plain operations."""

import copy
from typing import Any

import pytest
import runs
import torch
from matrices import make
from torch import nn
from torch.nn import functional as F

import loralib.kernels.low_rank
from loralib.kernels.low_rank import autocast_dtype, product
from loralib.layers import GatedLinear, LoRALinear, SVDLinear

LAYERS = [LoRALinear, SVDLinear, GatedLinear]


def formula(layer: LoRALinear, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """The equations of the papers, written out."""
    z = x if z is None else z
    y = F.linear(x, layer.weight, layer.bias)
    if isinstance(layer, SVDLinear):
        return y + 6 / (layer.r + 1e-5) * z @ (layer.lora_A * layer.lora_E).T @ layer.lora_B.T
    if isinstance(layer, GatedLinear):
        return y + 6 / layer.r * ((z @ layer.lora_A.T) * layer.lora_gate[0]) @ layer.lora_B.T
    return y + 6 / layer.r * z @ layer.lora_A.T @ layer.lora_B.T


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,)])
@pytest.mark.parametrize("weight_trains", [False, True])
def test_layer_is_its_formula(kind: type[LoRALinear], shape: tuple[int, ...], weight_trains: bool) -> None:
    layer = make(kind)
    layer.weight.requires_grad = layer.bias.requires_grad = weight_trains
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    weights = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    y, expected = layer(x), formula(layer, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad((y * weights).sum(), wanted)
    for grad, reference in zip(grads, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_passes_gradcheck(kind: type[LoRALinear]) -> None:
    layer = make(kind)
    layer.weight.requires_grad = False
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    named = {n: p for n, p in layer.named_parameters() if p.requires_grad}

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(named, values, strict=True)), x)

    torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in named.values())))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("biased", [False, True])
def test_large_float32_layer_is_its_formula_in_float64(kind: type[LoRALinear], biased: bool) -> None:
    """Large products take another kernel than small ones, which must not mind strides."""
    torch.manual_seed(0)
    layer = kind(nn.Linear(256, 384, bias=biased), r=3, lora_alpha=6, init_std=0.5)
    nn.init.normal_(layer.lora_B)
    layer.weight.requires_grad = False
    exact = copy.deepcopy(layer).double()
    x = torch.randn(256, 96).t()  # strides of a transposed tensor
    assert x.shape[0] * layer.weight.numel() >= loralib.kernels.low_rank._ONEDNN_FROM
    results = []
    for each, value in ((layer, x), (exact, x.double())):
        value = value.clone().requires_grad_()
        y = each(value) if each is layer else formula(exact, value)
        wanted = [value, each.lora_A, each.lora_B]
        spread = torch.autograd.grad(y.sum(), wanted, retain_graph=True)  # the gradient of y has strides of 0
        results.append([y, *spread, *torch.autograd.grad(y.square().sum(), wanted)])
    for found, reference in zip(*results, strict=True):
        assert (found - reference).abs().max() <= 2e-6 * reference.abs().max()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
def test_large_products_of_frozen_weights_take_onednn_without_a_graph_break() -> None:
    layer = LoRALinear(nn.Linear(256, 384), r=3, lora_alpha=6)
    layer.weight.requires_grad = layer.bias.requires_grad = False
    x = torch.randn(96, 256, requires_grad=True)
    with runs.Calls() as calls:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x[:10])
    assert calls.count["_linear_pointwise"] == 2  # forward and gradient of x, both large
    assert torch._dynamo.explain(layer)(x).graph_break_count == 0
    compiled, targets = torch.compile(layer, backend=lambda graph, _: seen(graph)), []

    def seen(graph: Any) -> Any:
        targets.extend(str(node.target) for m in graph.modules() for node in getattr(m, "graph", graph.graph).nodes)
        return graph

    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)
    # inductor fails on it where the weight is not a constant
    assert targets and not any("_linear_pointwise" in target for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product_of_every_kind(dtype: torch.dtype) -> None:
    x, weight = torch.randn(96, 256, dtype=dtype), torch.randn(256, 384, dtype=dtype).t()
    biases = [
        None,
        torch.randn(384, dtype=dtype),
        torch.randn(768, dtype=dtype)[::2],
        torch.ones(1, dtype=dtype).expand(384),
    ]
    for bias in biases:
        with torch.no_grad():
            found = product(x, weight, bias)
        torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=0.02, atol=1e-4)
    x.requires_grad_()
    product(x, weight).sum().backward()  # where gradients are recorded it has one
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=0.02, atol=0.5)


def test_second_derivatives_are_refused() -> None:
    layer = make(LoRALinear)
    (gradient,) = torch.autograd.grad(layer(torch.randn(4, 5).double()).square().sum(), layer.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_only_on_the_low_rank_path(kind: type[LoRALinear]) -> None:
    layer = make(kind)
    layer.lora_dropout = 0.5
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    expected = formula(layer, x, F.dropout(x, 0.5))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    wanted = [x, layer.lora_A, layer.lora_B]
    for grad, reference in zip(
        torch.autograd.grad(y.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-10)
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(kind: type[LoRALinear]) -> None:
    layer = make(kind, dtype=torch.float32)
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), formula(layer, x), rtol=0.05, atol=0.2)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and torch.isfinite(layer.lora_A.grad).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_fresh_layer_equals_the_linear_and_takes_over_its_parameters(kind: type[LoRALinear]) -> None:
    linear = nn.Linear(5, 7, dtype=torch.float64)
    layer = kind(linear, r=3, lora_alpha=6)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert torch.equal(layer(x), linear(x))
    assert torch.count_nonzero(layer.delta_weight()) == 0


def test_initialisation_and_keys() -> None:
    """Ledger L2: A ~ N(0, 0.02), B = 0; svd: both drawn and E = 0; gates ~ N(0, 1)."""
    torch.manual_seed(0)
    linear = nn.Linear(400, 300)
    lora, svd, gated = (kind(linear, r=50, lora_alpha=1) for kind in LAYERS)
    assert lora.lora_A.std().item() == pytest.approx(0.02, rel=0.05) and not lora.lora_B.any()
    assert svd.lora_B.std().item() == pytest.approx(0.02, rel=0.05) and not svd.lora_E.any()
    assert gated.lora_gate.std().item() == pytest.approx(1, rel=0.4) and gated.lora_gate.all()
    shapes = {k: tuple(v.shape) for layer in (svd, gated) for k, v in layer.state_dict().items()}
    assert shapes == {
        "weight": (300, 400),
        "bias": (300,),
        "lora_A": (50, 400),
        "lora_B": (300, 50),
        "lora_E": (50, 1),
        "ranknum": (1,),
        "lora_gate": (1, 50),
    }
    assert svd.ranknum.item() == 50


@pytest.mark.parametrize("kind", LAYERS)
def test_delta_weight_is_what_the_layer_adds(kind: type[LoRALinear]) -> None:
    layer = make(kind)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))


@pytest.mark.parametrize("kind", LAYERS)
def test_functorch_sees_plain_operations(kind: type[LoRALinear]) -> None:
    """torch.func cannot look into the fused product: gradients of each row, and second derivatives."""
    layer = make(kind)
    x, names = torch.randn(4, 5, dtype=torch.float64), list(layer.adapter_parameters())
    values = tuple(getattr(layer, name).detach() for name in names)

    def loss(values: tuple[torch.Tensor, ...], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), row).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for i in range(4):
        expected = torch.autograd.grad(formula(layer, x[i : i + 1]).square().sum(), [getattr(layer, n) for n in names])
        for one, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(one[i], reference, rtol=0, atol=1e-10)
    second = torch.func.hessian(lambda b: loss((values[0], b, *values[2:]), x[:1]))(values[1])
    reference = torch.autograd.functional.hessian(
        lambda b: torch.func.functional_call(Written(layer), {"layer.lora_B": b}, x[:1]).square().sum(), values[1]
    )
    torch.testing.assert_close(second, reference, rtol=0, atol=1e-10)


class Written(nn.Module):
    """A layer whose forward is the formula of this file."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return formula(self.layer, x)


def test_a_layer_says_what_is_the_adapters_and_what_stands_between() -> None:
    for kind, between in zip(LAYERS, (None, "lora_E", "lora_gate"), strict=True):
        layer = make(kind)
        assert layer.between == between
        assert set(layer.adapter_parameters()) == {"lora_A", "lora_B", *([between] if between else [])}
        d = layer.diagonal()
        assert d is None if between is None else torch.equal(d, getattr(layer, between).flatten())


def test_autocast_is_off_on_a_device_that_it_does_not_know() -> None:
    layer = make(SVDLinear, dtype=torch.float32).to("meta")
    assert autocast_dtype(layer.weight) is None and layer(torch.empty(2, 5, device="meta")).shape == (2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(torch.empty(1)) == torch.bfloat16

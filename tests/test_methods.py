"""Layers, penalties, allocator, mask, threshold and optimizer against naive derivations from the equations."""

import copy
import math
from typing import Any

import pytest
import runs
import torch
from torch import nn
from torch.nn import functional as F

import loralib.kernels.low_rank
from loralib.allocator import RankAllocator
from loralib.errors import InputError
from loralib.kernels.low_rank import product
from loralib.layers import GatedLinear, LoRALinear, SVDLinear
from loralib.masking import RandomMask
from loralib.methods import rm_lora
from loralib.regularizer import frd_penalty, svd_penalty
from loralib.sparse import (
    SparseAdamW,
    gate_l1,
    lambda_stages,
    released_threshold_,
    soft_threshold_,
)

LAYERS = [LoRALinear, SVDLinear, GatedLinear]


def randomised(layer: LoRALinear) -> LoRALinear:
    """All of the layer's own parameters drawn anew, so that no factor is zero."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def make(kind: type[LoRALinear], n: int = 5, m: int = 7, r: int = 3, dtype: torch.dtype = torch.float64) -> LoRALinear:
    return randomised(kind(nn.Linear(n, m, dtype=dtype), r=r, lora_alpha=6))


def formula(layer: LoRALinear, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """The equations of the papers, written out."""
    z = x if z is None else z
    y = F.linear(x, layer.weight, layer.bias)
    if isinstance(layer, SVDLinear):
        return y + 6 / (layer.r + 1e-5) * z @ (layer.lora_A * layer.lora_E).T @ layer.lora_B.T
    if isinstance(layer, GatedLinear):
        return y + 6 / layer.r * ((z @ layer.lora_A.T) * layer.lora_gate[0]) @ layer.lora_B.T
    return y + 6 / layer.r * z @ layer.lora_A.T @ layer.lora_B.T


# ---- layers ----


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
    # inductor fails on it where the weight is no constant
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
def test_dropout_is_on_the_low_rank_path_alone(kind: type[LoRALinear]) -> None:
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


# ---- penalties ----


def mixed_factors(dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    sizes = [(5, 7), (5, 7), (9, 5), (6, 6)]
    A = [torch.randn(3, n, dtype=dtype, requires_grad=True) for n, _ in sizes]
    B = [torch.randn(m, 3, dtype=dtype, requires_grad=True) for _, m in sizes]
    return A, B


def naive_svd(A: list[torch.Tensor], B: list[torch.Tensor]) -> torch.Tensor:
    terms = [a @ a.T - torch.eye(len(a), dtype=a.dtype) for a in A]
    terms += [b.T @ b - torch.eye(b.shape[1], dtype=b.dtype) for b in B]
    return sum(t.square().sum().sqrt() for t in terms) / len(terms)


def naive_frd(A: list[torch.Tensor], B: list[torch.Tensor]) -> torch.Tensor:
    terms = []
    for vectors in [*A, *(b.T for b in B)]:
        d = len(vectors)
        pairs = [(i, j) for i in range(d) for j in range(d) if i != j]
        cosines = [F.cosine_similarity(vectors[i], vectors[j], dim=0, eps=0).abs() for i, j in pairs]
        terms.append(sum(cosines) / (d * d - d))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("penalty", "naive"), [(svd_penalty, naive_svd), (frd_penalty, naive_frd)])
def test_penalty_is_the_naive_one(penalty, naive) -> None:
    """Ledger L5 and L6, over matrices of different shapes."""
    A, B = mixed_factors()
    value, expected = penalty(A, B), naive(A, B)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for grad, reference in zip(torch.autograd.grad(value, A + B), torch.autograd.grad(expected, A + B), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", [svd_penalty, frd_penalty])
def test_penalty_at_zero_factors_has_finite_gradients(penalty, dtype: torch.dtype) -> None:
    """Ledger L6: B = 0 is where every LoRA run starts; half precision is computed in float32."""
    A = [torch.randn(3, 5).to(dtype).requires_grad_()]
    B = [torch.zeros(7, 3, dtype=dtype, requires_grad=True)]
    value = penalty(A, B)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(value) and torch.isfinite(A[0].grad).all() and torch.isfinite(B[0].grad).all()


def test_orthonormal_factors_have_no_penalty() -> None:
    A = [torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q.T.contiguous().requires_grad_()]
    B = [torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q.contiguous().requires_grad_()]
    for penalty in (svd_penalty, frd_penalty):
        value = penalty(A, B)
        assert value.item() < 1e-12
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, A + B))


def test_frd_penalty_of_one_direction_is_zero() -> None:
    A, B = [torch.randn(1, 5, requires_grad=True)], [torch.randn(7, 1, requires_grad=True)]
    value = frd_penalty(A, B)
    value.backward()
    assert value.item() == 0 and torch.isfinite(A[0].grad).all()


def test_gate_l1_is_the_mean_magnitude() -> None:
    """Ledger S2."""
    gates = [torch.randn(1, 3), torch.randn(1, 5)]
    expected = (gates[0].abs().sum() + gates[1].abs().sum()) / 8
    torch.testing.assert_close(gate_l1(gates), expected)


# ---- allocator ----


class Model(nn.Module):
    """Some adapted matrices of different shapes."""

    def __init__(self, kind: type[LoRALinear], r: int = 4) -> None:
        super().__init__()
        sizes = [(6, 5), (6, 5), (5, 9), (9, 6)]
        self.layers = nn.ModuleList(make(kind, n, m, r) for n, m in sizes)


class NaiveAllocator:
    """Equations 7 to 11 of arXiv 2303.10512 as ledger A1 to A5 read them, one number at a time."""

    def __init__(
        self, model: Model, total_step: int, target: int, ti: int, tf: int, interval: int, beta: float
    ) -> None:
        self.layers, self.T, self.target, self.ti, self.tf = list(model.layers), total_step, target, ti, tf
        self.interval, self.beta = interval, beta
        self.average: dict[tuple[int, str, int, int], float] = {}
        self.uncertainty: dict[tuple[int, str, int, int], float] = {}

    def step(self, step: int) -> None:
        if 0 < step < self.T - self.tf:
            for index, layer in enumerate(self.layers):
                for kind in ("lora_A", "lora_B", "lora_E"):
                    p = getattr(layer, kind)
                    for i in range(p.shape[0]):
                        for j in range(p.shape[1]):
                            key = (index, kind, i, j)
                            now = abs(p[i, j].item() * p.grad[i, j].item())
                            average = self.beta * self.average.get(key, 0.0) + (1 - self.beta) * now
                            self.average[key] = average
                            spread = abs(now - average)
                            self.uncertainty[key] = (
                                self.beta * self.uncertainty.get(key, 0.0) + (1 - self.beta) * spread
                            )
        total = sum(layer.r for layer in self.layers)
        if step <= self.ti:
            return
        if step > self.T - self.tf:
            budget = self.target
        else:
            share = 1 - (step - self.ti) / (self.T - self.tf - self.ti)
            budget = int(self.target + (total - self.target) * share**3)
            if step % self.interval:
                return
        scores = {}
        s = lambda *key: self.average[key] * self.uncertainty[key]  # noqa: E731
        for index, layer in enumerate(self.layers):
            n, m = layer.in_features, layer.out_features
            for i in range(layer.r):
                row = sum(s(index, "lora_A", i, j) for j in range(n)) / n
                column = sum(s(index, "lora_B", j, i) for j in range(m)) / m
                scores[index, i] = s(index, "lora_E", i, 0) + row + column
        threshold = sorted(scores.values())[total - budget - 1]
        for (index, i), score in scores.items():
            if score <= threshold:
                self.layers[index].lora_E.data[i, 0] = 0.0


def test_allocator_is_the_naive_one() -> None:
    """Ledger A1 to A5 over a whole run: warm-up, falling budget, final phase."""
    torch.manual_seed(1)
    model = Model(SVDLinear)
    twin = copy.deepcopy(model)
    T, ti, tf, interval = 30, 4, 6, 3
    settings = {"init_warmup": ti, "final_warmup": tf, "mask_interval": interval, "total_step": T}
    allocator = RankAllocator(model, target_rank=2, beta1=0.8, beta2=0.8, **settings)
    naive = NaiveAllocator(twin, T, 8, ti, tf, interval, 0.8)
    masked = []
    for step in range(T):
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
            mine.data -= 0.05 * mine.grad
            its.data -= 0.05 * its.grad
        masked.append(allocator.step(step))
        naive.step(step)
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, its), step
    assert sum(allocator.ranks().values()) == 8 == allocator.budget
    assert masked == [s > T - tf or (s > ti and s % interval == 0) for s in range(T)]


def test_warm_ups_of_the_budget_as_fractions() -> None:
    """Below 1 they are fractions of all steps, whatever number of steps a run turns out to have."""
    settings = {"target_rank": 1, "mask_interval": 1}
    fractions = RankAllocator(Model(SVDLinear), init_warmup=0.1, final_warmup=0.25, **settings)
    for total, first, last in ((40, 4, 10), (200, 20, 50), (30, 3, 8)):
        steps = RankAllocator(Model(SVDLinear), init_warmup=first, final_warmup=last, total_step=total, **settings)
        fractions.begin(total)
        assert [fractions.schedule(k) for k in range(total)] == [steps.schedule(k) for k in range(total)]
    with pytest.raises(InputError, match="init_warmup 10 "):
        RankAllocator(Model(SVDLinear), init_warmup=0.5, final_warmup=0.5, total_step=20, **settings)


def test_allocator_lets_ties_fall_together() -> None:
    model = Model(SVDLinear)
    settings = {"init_warmup": 0, "final_warmup": 1, "mask_interval": 1, "total_step": 10}
    allocator = RankAllocator(model, target_total_rank=15, target_rank=None, **settings)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    allocator.step(9 + 1)  # final phase, no importance at all: every score is 0
    assert sum(allocator.ranks().values()) == 0


def test_allocator_skipped_step_keeps_importance_but_masks() -> None:
    """Ledger A7."""
    model = Model(SVDLinear)
    settings = {"init_warmup": 0, "final_warmup": 2, "mask_interval": 1, "total_step": 10}
    allocator = RankAllocator(model, target_rank=1, **settings)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    allocator.step(1)
    before = [t.clone() for t in allocator.importance + allocator.uncertainty]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    assert allocator.step(2, gradients_valid=False)
    after = allocator.importance + allocator.uncertainty
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sum(allocator.ranks().values()) <= allocator.budget


def test_allocator_state_goes_round() -> None:
    model = Model(SVDLinear)
    settings = {"init_warmup": 0, "final_warmup": 2, "mask_interval": 1, "total_step": 10}
    one = RankAllocator(model, target_rank=1, **settings)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    one.step(1)
    other = RankAllocator(model, target_rank=1, **settings)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.scores(), other.scores()) and torch.equal(one.threshold, other.threshold)
    broken = one.state_dict()
    broken.pop("importance.layers.0.lora_A")
    with pytest.raises(InputError, match=r"importance\.layers\.0\.lora_A"):
        other.load_state_dict(broken)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_rank": 4}, "target_rank is 4, it must lie in 1 to 3"),
        ({"target_rank": None}, "needs a budget"),
        ({"target_rank": None, "target_total_rank": 16}, "target_total_rank is 16, it must lie in 1 to 15"),
        ({"target_rank": 2, "target_total_rank": 9}, "2 x 4 matrices = 8 disagrees with target_total_rank 9"),
        ({"init_warmup": 5, "final_warmup": 5}, r"init_warmup 5 \+ final_warmup 5 must stay below the total of 10"),
    ],
)
def test_allocator_refuses(settings: dict, said: str) -> None:
    """Ledger A6."""
    usual = {"target_rank": 2, "init_warmup": 1, "final_warmup": 1, "mask_interval": 1, "total_step": 10}
    with pytest.raises(InputError, match=said):
        RankAllocator(Model(SVDLinear), **(usual | settings))


# ---- mask ----


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_mask_keeps_random_rank_directions(version: str) -> None:
    """Ledger R4: v1 shares a draw between A and B, v2 does not."""
    model = Model(LoRALinear)
    mask = RandomMask(model, 2, version, seed=3)
    seen = set()
    for key in range(20):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        mask.apply(key)
        rows = [layer.lora_A.grad for layer in model.layers]
        columns = [layer.lora_B.grad.T for layer in model.layers]
        for grad in rows + columns:
            assert all(d.min() == d.max() for d in grad)  # whole directions
            assert sum(int(d.any()) for d in grad) == 2
        same = [torch.equal(a[:, 0], b[:, 0]) for a, b in zip(rows, columns, strict=True)]
        assert all(same) if version == "v1" else True
        seen.add(tuple(same))
        assert all(layer.weight.grad.all() for layer in model.layers)
    assert len(seen) == 1 if version == "v1" else len(seen) > 1


def test_mask_depends_on_seed_and_key_alone() -> None:
    """Ledger R5: the same for the same (seed, step), whatever was drawn before and whatever torch's generator did."""
    model = Model(LoRALinear)
    one, two = RandomMask(model, 2, "v2", seed=3), RandomMask(model, 2, "v2", seed=3)
    for key in range(5):
        one.draw(key)
    torch.manual_seed(99)
    assert torch.equal(one.draw(7), two.draw(7))
    assert not torch.equal(one.draw(7), one.draw(8))
    assert not torch.equal(one.draw(7), RandomMask(model, 2, "v2", seed=4).draw(7))


def test_mask_draws_every_direction_about_equally() -> None:
    mask = RandomMask(Model(LoRALinear), 1, "v1", seed=0)
    share = torch.stack([mask.draw(key)[0] for key in range(2000)]).mean(0)  # (matrices, r)
    assert (share - 0.25).abs().max() < 0.05


def test_masked_direction_still_moves_by_momentum() -> None:
    """Ledger R6: a zero gradient enters Adam."""
    model = Model(LoRALinear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    mask = RandomMask(model, 1, "v1", seed=0)
    moved = []
    for key in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        mask.apply(key)
        before = model.layers[0].lora_A.detach().clone()
        optimizer.step()
        moved.append((model.layers[0].lora_A != before).any(1).sum().item())
    assert moved[0] == 1 and moved[-1] > 1


# ---- SoRA ----


def test_soft_threshold_minimises_its_objective() -> None:
    """Ledger S1: argmin over q of (q - p)^2 / 2 + L |q|, found on a grid."""
    p = torch.tensor([-3.0, -1.0, -0.6, -0.5, -0.2, 0.0, 0.3, 0.5, 0.7, 1.2], dtype=torch.float64)
    grid = torch.arange(-4, 4, 0.001, dtype=torch.float64)
    expected = grid[((grid[:, None] - p) ** 2 / 2 + 0.5 * grid[:, None].abs()).argmin(0)]
    values = p.clone()
    soft_threshold_([values], 0.5)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-3)
    assert (values == 0).sum() == 5


def test_released_threshold_is_three_edits_in_sequence() -> None:
    """Ledger S1, released column: L < |p| < 2L ends at 0 and |p| = L survives."""
    L = 0.5
    p = [-1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5]

    def edits(x: float) -> float:
        if x > L:
            x = x - L
        if x < -L:
            x = x + L
        return 0.0 if abs(x) < L else x

    values = torch.tensor(p, dtype=torch.float64)
    released_threshold_([values], L)
    assert values.tolist() == [edits(x) for x in p]
    assert values.tolist() == [-1.0, -0.5, 0, -0.5, 0, 0, 0, 0.5, 0, 0.5, 1.0]


def test_sparse_adamw_is_torch_adamw_with_a_shifted_eps() -> None:
    """Ledger S4: torch's AdamW with eps / sqrt(1 - b2^t) at step t, decay moved behind the step."""
    p = nn.Parameter(torch.randn(6, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    mine = SparseAdamW([p], lr=0.01, eps=1e-3, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=0.0)
    for t in range(1, 8):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        theirs.param_groups[0]["eps"] = 1e-3 / math.sqrt(1 - 0.999**t)
        mine.step()
        theirs.step()
        q.data.mul_(1 - 0.01 * 0.1)
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_sparse_adamw_thresholds_its_gate_group_alone() -> None:
    weight, gate = nn.Parameter(torch.full((3,), 0.01)), nn.Parameter(torch.tensor([0.01, 1.0, -1.0]))
    optimizer = SparseAdamW([{"params": [weight]}, {"params": [gate], "threshold": 0.1}], lr=0.0)
    weight.grad, gate.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.01] * 3)
    assert gate.tolist() == pytest.approx([0.0, 0.9, -0.9])


def test_sparse_adamw_state_goes_round() -> None:
    p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    one, two = SparseAdamW([p], lr=0.1), SparseAdamW([q], lr=0.1)
    gradients = [torch.randn(4, dtype=torch.float64) for _ in range(4)]
    for step, gradient in enumerate(gradients):
        p.grad = gradient
        one.step()
        if step == 1:
            two.load_state_dict(copy.deepcopy(one.state_dict()))
            q.data.copy_(p.data)
        elif step > 1:
            q.grad = gradient
            two.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("schedule", "start", "middle"),
    [
        ("linear", 0.0, 0.5),
        ("log_linear", 0.0, math.log((1 + math.e) / 2)),
        ("exp_linear", 0.01, 0.1),  # geometric mean
    ],
)
def test_lambda_stages(schedule: str, start: float, middle: float) -> None:
    """Ledger S8."""
    stages = lambda_stages(schedule, start, 1.0, 3)
    assert stages == pytest.approx([start, middle, 1.0])
    long = lambda_stages(schedule, start, 1.0, 9)
    assert len(long) == 9 and long == sorted(long) and len(set(long)) == 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("exp_linear", 0.0, 1.0, 3), "exp_linear cannot start at sparse_lambda_2 = 0"),
        (("linear", 0.5, 0.5, 3), r"max_lambda is 0.5, it must lie above"),
        (("linear", 0.0, 1.0, 1), "lambda_num is 1"),
        (("log_linear", 0.0, 1000.0, 3), "max_lambda is 1000.0"),
        (("cubic", 0.0, 1.0, 3), "one of linear, log_linear, exp_linear"),
    ],
)
def test_lambda_stages_refuses(arguments: tuple, said: str) -> None:
    with pytest.raises(InputError, match=said):
        lambda_stages(*arguments)


def test_rm_lora_as_released() -> None:
    """Ledger R1, R2 and R3: which steps are masked and what becomes of the head, by flag."""
    model = Model(LoRALinear)
    model.head = nn.Linear(3, 2, dtype=torch.float64)
    for layer in model.layers:
        layer.weight.requires_grad = layer.bias.requires_grad = False

    def masked(as_released: bool, step: int) -> tuple[int, bool]:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        rm_lora(model, random_rank=1, as_released=as_released).before_step(step)
        return int(model.layers[0].lora_A.grad.any(1).sum()), bool(model.head.weight.grad.any())

    assert masked(False, 0) == (1, True) == masked(False, 1)
    assert masked(True, 0) == (4, True)
    assert masked(True, 1) == (1, False)

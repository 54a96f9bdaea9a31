"""AdaLoRA's allocator against its equations, one number at a time."""

import copy
import math

import pytest
import torch
from matrices import Model

from loralib.adapt import Factors, factors
from loralib.allocator import RankAllocator
from loralib.errors import InputError
from loralib.layers import GatedLinear, LoRALinear, SVDLinear


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
    assert one.kept_ranks() == other.kept_ranks() == one.ranks() and sum(one.ranks().values()) < one.total_rank
    assert other.budget == one.budget < one.total_rank
    zeros = torch.stack([e.detach().squeeze(1) == 0 for e in one.E])
    assert torch.equal(other.state_dict()["masked"], zeros)  # the places, not only how many
    older = {k: v for k, v in one.state_dict().items() if k not in ("masked", "budget")}
    # commit 409de3b wrote the number of values that were kept; before it nothing, and importance is as at the mask
    for state in (older | {"kept": (~zeros).sum(1)}, older):
        other.restart()
        other.load_state_dict(state)
        assert other.kept_ranks() == one.ranks() and other.budget == other.total_rank
    broken = one.state_dict()
    broken.pop("importance.layers.0.lora_A")
    with pytest.raises(InputError, match=r"importance\.layers\.0\.lora_A"):
        other.load_state_dict(broken)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_rank": 4}, "target_rank must be between 1 and 3, .*it is 4"),
        ({"target_rank": None}, "needs a budget"),
        ({"target_rank": None, "target_total_rank": 16}, "target_total_rank must be between 1 and 15, .*it is 16"),
        ({"target_rank": 2, "target_total_rank": 9}, "2 x 4 matrices = 8 disagrees with target_total_rank 9"),
        ({"init_warmup": 5, "final_warmup": 5}, r"init_warmup 5 \+ final_warmup 5 must stay below the total of 10"),
        ({"init_warmup": 1.5}, "init_warmup is 1.5, it must be a whole number of steps, or a fraction below 1"),
        ({"final_warmup": float("inf")}, "final_warmup is inf, it must be a whole number of steps"),
        ({"final_warmup": float("nan")}, "final_warmup is nan, it must be 0 or more"),
        ({"mask_interval": 1.5}, "mask_interval is 1.5, it must be a whole number of steps"),
        ({"beta1": float("nan")}, "beta1 is nan, it must lie between 0 and 1"),
    ],
)
def test_a_budget_outside_its_range_is_refused(settings: dict, said: str) -> None:
    """Ledger A6."""
    usual = {"target_rank": 2, "init_warmup": 1, "final_warmup": 1, "mask_interval": 1, "total_step": 10}
    with pytest.raises(InputError, match=said):
        RankAllocator(Model(SVDLinear), **(usual | settings))


def test_allocator_of_factors_from_elsewhere() -> None:
    """The same numbers from lists of factors as from a model that holds them."""
    model = Model(SVDLinear)
    of = factors(model)
    twin = Factors(of.names, *([p.detach().clone().requires_grad_() for p in ps] for ps in (of.A, of.B, of.between)))
    settings = {"target_rank": 2, "init_warmup": 0, "final_warmup": 2, "mask_interval": 1}
    both = RankAllocator(model, total_step=8, **settings), RankAllocator(twin, **settings)
    both[1].begin(8)
    for step in range(8):
        for mine, its in zip((*of.A, *of.B, *of.between), (*twin.A, *twin.B, *twin.between), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        for allocator in both:
            allocator.step(step)
    assert torch.equal(both[0].scores(), both[1].scores()) and of.ranks() == twin.ranks() == both[1].ranks()
    sizes = [a.shape[1] + b.shape[0] + 1 for a, b in zip(of.A, of.B, strict=True)]
    left = [int(kept.sum()) for kept in both[0].scores() > both[0].threshold]
    assert both[0].remaining_parameters() == sum(r * n for r, n in zip(left, sizes, strict=True)) > 0


def test_allocator_needs_triplets_of_one_rank_and_the_number_of_steps() -> None:
    plan = {"target_rank": 1, "init_warmup": 0, "final_warmup": 1, "mask_interval": 1}
    for kind in (LoRALinear, GatedLinear):
        with pytest.raises(InputError, match="needs triplets"):
            RankAllocator(Model(kind), **plan)
    ranks = (2, 3)
    mixed = Factors(
        ["a", "b"],
        [torch.randn(r, 4) for r in ranks],
        [torch.randn(4, r) for r in ranks],
        [torch.randn(r, 1) for r in ranks],
    )
    with pytest.raises(InputError, match="matrices of one rank"):
        RankAllocator(mixed, **plan)
    with pytest.raises(RuntimeError, match=r"call begin\(total_step\)"):
        RankAllocator(Model(SVDLinear), **plan).step(0)

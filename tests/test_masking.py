"""RM-LoRA's mask: which directions stay, and what the draws depend on."""

import pytest
import torch
from matrices import Model

from loralib.adapt import Factors
from loralib.errors import InputError
from loralib.layers import LoRALinear
from loralib.masking import RandomMask


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


def test_mask_depends_only_on_seed_and_key() -> None:
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


def test_mask_of_factors_from_elsewhere() -> None:
    """Lists of factors, here of different ranks: each matrix keeps its share, and nothing of the smaller is lost."""
    A = [torch.randn(r, 6, requires_grad=True) for r in (2, 5, 3)]
    B = [torch.randn(7, r, requires_grad=True) for r in (2, 5, 3)]
    mask = RandomMask(Factors(["a", "b", "c"], A, B), 2, "v2", seed=1)
    kept = torch.zeros(5)
    for key in range(60):
        for p in A + B:
            p.grad = torch.ones_like(p)
        mask.apply(key)
        assert [int(a.grad.any(1).sum()) for a in A] == [int(b.grad.any(0).sum()) for b in B] == [2, 2, 2]
        kept += A[1].grad[:, 0]
    assert (kept > 10).all()


@pytest.mark.parametrize(
    ("random_rank", "version", "said"),
    [(0, "v1", "between 1 and 4"), (5, "v1", "between 1 and 4"), (2, "v3", "v1 or v2")],
)
def test_a_random_rank_or_version_outside_its_range_is_refused(random_rank: int, version: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        RandomMask(Model(LoRALinear), random_rank, version, seed=0)

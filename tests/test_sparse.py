"""SoRA's threshold, L1 term, optimizer and schedule against the equations and torch's own AdamW."""

import copy
import math

import pytest
import torch
from torch import nn

from loralib.errors import InputError
from loralib.sparse import SparseAdamW, gate_l1, lambda_stages, released_threshold_, soft_threshold_


def test_gate_l1_is_the_mean_magnitude() -> None:
    """Ledger S2."""
    gates = [torch.randn(1, 3), torch.randn(1, 5)]
    expected = (gates[0].abs().sum() + gates[1].abs().sum()) / 8
    torch.testing.assert_close(gate_l1(gates), expected)


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


def test_sparse_adamw_thresholds_only_its_gate_group() -> None:
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
        (("linear", 0.5, 0.5, 3), r"max_lambda must be above .*it is 0.5"),
        (("linear", 0.0, 1.0, 1), "lambda_num is 1"),
        (("log_linear", 0.0, 1000.0, 3), "max_lambda is 1000.0"),
        (("cubic", 0.0, 1.0, 3), "one of linear, log_linear, exp_linear"),
    ],
)
def test_a_lambda_schedule_outside_its_range_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(InputError, match=said):
        lambda_stages(*arguments)


def test_the_threshold_under_its_earlier_name() -> None:
    """Programs and optimizer files of earlier versions call it sparse_lambda, in a group and in a state dict."""
    gates = [nn.Parameter(torch.tensor([0.01, 1.0, -1.0])) for _ in range(2)]
    old = SparseAdamW([{"params": [gates[0]], "sparse_lambda": 0.1}], lr=0.0)
    new = SparseAdamW([{"params": [gates[1]], "threshold": 0.3}], lr=0.0)
    state = old.state_dict()
    for group in state["param_groups"]:
        group["sparse_lambda"] = group.pop("threshold")
    new.load_state_dict(state)
    for gate, optimizer in zip(gates, (old, new), strict=True):
        gate.grad = torch.ones(3)
        optimizer.step()
        assert gate.tolist() == pytest.approx([0.0, 0.9, -0.9])
        assert "sparse_lambda" not in optimizer.param_groups[0]

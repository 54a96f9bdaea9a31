"""The penalties against the equations, one pair of directions at a time."""

import pytest
import torch
from torch.nn import functional as F

from loralib.regularizer import frd_penalty, svd_penalty


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

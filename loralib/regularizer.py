"""Orthogonality penalties of low-rank factors, computed for all matrices of one shape at once, in float32 or better.

The directions are the rows of `lora_A` (r, in) and the columns of `lora_B` (out, r). Both penalties are means over all
factors.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def _stacks(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> list[Tensor]:
    """Every lora_A and every lora_B^T, in one stack (n, r, in or out) for each shape."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for rows in [*lora_A, *(b.t() for b in lora_B)]:
        groups.setdefault(rows.shape, []).append(rows)
    stacks = [torch.stack(group) for group in groups.values()]
    return [s.float() if s.dtype in (torch.float16, torch.bfloat16) else s for s in stacks]


@cache
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The unit matrix (size, size). It is made once."""
    return torch.eye(size, dtype=dtype, device=device)


def svd_penalty(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> Tensor:
    """Mean over all factors of ||A A^T - I||_F and ||B^T B - I||_F, not squared (ledger L5).

    The AdaLoRA paper (arXiv 2303.10512, eq. 4) squares the norms; the released code does not.

    Args:
        lora_A: tensors (r, in); lora_B: tensors (out, r).

    Returns:
        A scalar, float32 for half-precision factors, else of their dtype.
    """
    norms = []
    for rows in _stacks(lora_A, lora_B):
        residual = torch.baddbmm(_identity(rows.shape[1], rows.dtype, rows.device), rows, rows.transpose(1, 2), beta=-1)
        norms.append(torch.linalg.vector_norm(residual, dim=(1, 2)))
    return torch.cat(norms).mean()


def frd_penalty(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> Tensor:
    """Mean over all factors of the mean absolute cosine between different directions of a factor (ledger L6).

    For the Gram matrix G of d directions g_i this is (sum - trace) / (d^2 - d) of |G_ij| / (|g_i| |g_j| + 1e-30). A
    single direction (r = 1) gives 0. The gradients are finite at B = 0.

    Args, Returns: as `svd_penalty`.
    """
    means = []
    for rows in _stacks(lora_A, lora_B):
        gram = torch.bmm(rows, rows.transpose(1, 2))
        d = gram.shape[-1]
        squares = gram.diagonal(dim1=1, dim2=2)  # (n, d)
        # sqrt has an infinite gradient at 0. For a direction of length 0 it is taken of 1, and the result is set back
        # to 0, so that no gradient flows.
        norms = squares.masked_fill(squares == 0, 1.0).sqrt().masked_fill(squares == 0, 0.0)
        cosines = gram.abs() / (norms.unsqueeze(2) * norms.unsqueeze(1) + 1e-30)
        off_diagonal = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
        means.append(off_diagonal / max(d * d - d, 1))
    return torch.cat(means).mean()

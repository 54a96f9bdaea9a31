"""Adapted linear layers: a frozen weight plus a trainable product of two low-rank factors.

Every layer is an `nn.Linear` whose parameters keep their place and name (`weight`, `bias`); what it adds carries the
names of the released state dicts: `lora_A` (r, in), `lora_B` (out, r), `lora_E` (r, 1), `ranknum` (1,),
`lora_gate` (1, r). A variant of one's own is a subclass of `LoRALinear`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# MKL, which torch.mm calls for float32 on a CPU, leaves half of what AMD's processors can do; oneDNN does not.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_FROM = 2**21  # multiplications; below, its call costs more than it saves


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (n, in), weight (out, in) and bias (out,), by the fastest kernel at hand.

    oneDNN's has no derivative: where gradients are recorded it stays out, and under torch.compile, whose code generator
    takes it for constant weights alone.
    """
    large = x.shape[0] * weight.numel() >= _ONEDNN_FROM and not torch.compiler.is_compiling()
    if large and _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled():
        bias = None if bias is None else bias.contiguous()  # its strides are not looked at
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products in on the device of `x`; None where it is off or unknown, as on meta."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


class _LowRankProduct(torch.autograd.Function):
    """y = x W^T + b + s z A^T B^T in one node, where z is x or a dropped-out copy of it.

    Plain autograd would spend a scaling, an addition and a full-size temporary on each of forward and backward; here
    the low-rank product is accumulated into the base product (`addmm` with alpha), and the same for the gradient of x.
    Nothing is computed for an input that needs no gradient, the frozen weight above all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (n, in)
        z: Tensor | None,  # (n, in), None: the same as x
        weight: Tensor,  # (out, in)
        bias: Tensor | None,  # (out,)
        lora_A: Tensor,  # (r, in)
        lora_B: Tensor,  # (out, r)
        scaling: float,
    ) -> Tensor:  # (n, out)
        y = product(x, weight, bias)
        u = (x if z is None else z).mm(lora_A.t())  # (n, r)
        y.addmm_(u, lora_B.t(), alpha=scaling)
        ctx.save_for_backward(x, z, weight, lora_A, lora_B, u)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable  # what it saves of its own products would count as constants
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # g: (n, out)
        x, z, weight, lora_A, lora_B, u = ctx.saved_tensors
        s = ctx.scaling
        need_x, need_z, need_weight, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        grad_x = grad_z = grad_weight = grad_bias = grad_A = grad_B = None
        # `addmm` with beta 0 ignores its first argument: a product and its scaling in one operation
        if need_B:
            grad_B = torch.addmm(lora_B, g.t(), u, beta=0, alpha=s)
        if need_x or need_z or need_A:
            v = g.mm(lora_B)  # (n, r)
            if need_A:
                grad_A = torch.addmm(lora_A, v.t(), x if z is None else z, beta=0, alpha=s)
            if need_z:
                grad_z = torch.addmm(z, v, lora_A, beta=0, alpha=s)
            if need_x:
                grad_x = product(g, weight.t())
                if z is None:
                    grad_x.addmm_(v, lora_A, alpha=s)
        if need_weight:
            grad_weight = g.t().mm(x)
        if need_bias:
            grad_bias = g.sum(0)
        return grad_x, grad_z, grad_weight, grad_bias, grad_A, grad_B, None


class ScaledRows(torch.autograd.Function):
    """k matrices A (r, in) and then k diagonals d (r,), all of one shape -> k matrices of rows d_i A_i, (r, in).

    It copies what its backward needs and saves no tensor: a layer that is computed again under gradient checkpointing
    must save as many as before, whether or not `loralib.together` did this part for it.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        k = len(tensors) // 2
        ctx.A, ctx.d = torch.stack(tensors[:k]), torch.stack(tensors[k:]).unsqueeze(2)
        ctx.set_materialize_grads(False)
        rows = (ctx.A * ctx.d).unbind()
        needed = [a or d for a, d in zip(ctx.needs_input_grad[:k], ctx.needs_input_grad[k:], strict=True)]
        ctx.mark_non_differentiable(*(row for row, need in zip(rows, needed, strict=True) if not need))
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [i for i, g in enumerate(grads) if g is not None]
        if not there:
            return (None,) * (2 * len(grads))
        A, d = (ctx.A, ctx.d) if len(there) == len(grads) else (ctx.A[there], ctx.d[there])
        g = torch.stack([g for g in grads if g is not None])
        found: list[Tensor | None] = [None] * (2 * len(grads))
        for i, of_A, of_d in zip(there, (g * d).unbind(), (g * A).sum(2).unbind(), strict=True):
            found[i], found[len(grads) + i] = of_A, of_d
        return tuple(found)


class LoRALinear(nn.Linear):
    """LoRA (arXiv 2106.09685, eq. 3), the `frd` layer: y = x W^T + b + (alpha / r) x A^T B^T.

    Takes over the parameters of `linear` (the same objects, so nothing is copied and names stay). A ~ N(0, init_std),
    B = 0, so a fresh layer equals the linear it replaces (ledger L2, L3). Freezing is `adapt`'s business.

    Args:
        linear: the layer to adapt, (in -> out).
        r: rank, 1 or more.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropout on the input of the low-rank path alone (ledger L4).
        init_std: standard deviation of the initial factors.
    """

    # Name of the parameter of r numbers that stands between the factors, None where nothing does.
    between: str | None = None
    # What loralib.together prepared for one use of the layer: autocast's dtype; weight, bias, A with the diagonal, B.
    prepared: tuple[torch.dtype | None, Sequence[Any]] | None = None

    def __init__(
        self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, init_std: float = 0.02
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.r, self.lora_alpha, self.lora_dropout, self.init_std = r, lora_alpha, lora_dropout, init_std
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **like))
        self.add_parameters(**like)
        self.reset_lora_parameters()

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product (ledger L3)."""
        return self.lora_alpha / self.r

    def add_parameters(self, **like: Any) -> None:
        """Hook of a variant: register what it trains beside A and B. `like`: device and dtype."""

    def reset_lora_parameters(self) -> None:
        """Draw fresh factors (ledger L2)."""
        nn.init.normal_(self.lora_A, std=self.init_std)
        nn.init.zeros_(self.lora_B)

    def diagonal(self) -> Tensor | None:
        """What stands between the factors, (r,), or None for ones."""
        return None if self.between is None else getattr(self, self.between).view(-1)

    def delta_weight(self) -> Tensor:
        """The update that the adapter adds to `weight`, (out, in)."""
        d = self.diagonal()
        return self.scaling * (self.lora_B @ (self.lora_A if d is None else d.unsqueeze(1) * self.lora_A))

    def train(self, mode: bool = True) -> "LoRALinear":
        self.prepared = None  # left over where a forward was interrupted
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        dtype, prepared = autocast_dtype(x), None
        if not torch.compiler.is_compiling():  # for this use alone: gradients of several are summed in full precision
            prepared, self.prepared = self.prepared, None
        if prepared is not None and prepared[0] == dtype:
            weight, bias, lora_A, lora_B = prepared[1]
        else:
            d = self.diagonal()
            lora_A = self.lora_A if d is None else ScaledRows.apply(self.lora_A, d)[0]
            parts = self.weight, self.bias, lora_A, self.lora_B
            weight, bias, lora_A, lora_B = (p if p is None or dtype is None else p.to(dtype) for p in parts)
        x = x if dtype is None else x.to(dtype)
        rows = x.reshape(-1, self.in_features)
        dropped = F.dropout(rows, self.lora_dropout) if self.training and self.lora_dropout > 0 else None
        y = _LowRankProduct.apply(rows, dropped, weight, bias, lora_A, lora_B, self.scaling)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"


class SVDLinear(LoRALinear):
    """AdaLoRA's triplets (arXiv 2303.10512, eq. 3), the `svd` layer: y = x W^T + b + alpha / (r + 1e-5) x (E A)^T B^T.

    E = 0 and A, B ~ N(0, init_std) at the start. E (r, 1) holds the singular values; the allocator zeroes some of
    them. `ranknum` (1,) is r and stays so whatever is pruned (ledger L3).
    """

    between = "lora_E"
    lora_E: nn.Parameter

    def add_parameters(self, **like: Any) -> None:
        self.lora_E = nn.Parameter(torch.empty(self.r, 1, **like))
        self.register_buffer("ranknum", torch.full((1,), float(self.r), **like))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r + 1e-5)

    def reset_lora_parameters(self) -> None:
        nn.init.normal_(self.lora_A, std=self.init_std)
        nn.init.normal_(self.lora_B, std=self.init_std)
        nn.init.zeros_(self.lora_E)


class GatedLinear(LoRALinear):
    """SoRA's gated factors (arXiv 2311.11696, eq. 4): y = x W^T + b + (alpha / r) (x A^T * gate) B^T.

    gate (1, r) ~ N(0, 1), A ~ N(0, init_std), B = 0 at the start (ledger L2). The optimizer's threshold zeroes gates.
    """

    between = "lora_gate"
    lora_gate: nn.Parameter

    def add_parameters(self, **like: Any) -> None:
        self.lora_gate = nn.Parameter(torch.empty(1, self.r, **like))

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        nn.init.normal_(self.lora_gate)

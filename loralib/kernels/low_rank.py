"""The product of an adapted layer in few operations: one node for base and low-rank part, no copy of the output.

`LoRALinear.forward` calls `forward`. The other functions are its pieces; `loralib.kernels.prepare` and
`loralib.kernels.deberta` use them too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# For float32 on a CPU torch.mm calls MKL, which reaches half of the speed of AMD's processors. oneDNN reaches it all.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_FROM = 2**21  # multiplications; for fewer, the call costs more than it saves


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (n, in), weight (out, in) and bias (out,), by the fastest kernel at hand.

    oneDNN's kernel has no derivative, so it is not used where gradients are recorded. Nor is it used under
    torch.compile, whose code generator accepts it for constant weights only.
    """
    large = x.shape[0] * weight.numel() >= _ONEDNN_FROM and not torch.compiler.is_compiling()
    if large and _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled():
        bias = None if bias is None else bias.contiguous()  # the kernel ignores its strides
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products on the device of `x`; None where it is off, or on meta.

    This does not ask torch's `is_autocast_available`, which older versions of torch.compile cannot trace.
    """
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


class _LowRankProduct(torch.autograd.Function):
    """y = x W^T + b + s z A^T B^T in one node, where z is x, or x after dropout.

    In forward and in backward, plain autograd would need a scaling, an addition and a temporary of the output's size.
    Here `addmm` with alpha adds the low-rank product to the base product in place; the gradient of x is made in the
    same way. No gradient is computed that is not needed, above all none of the frozen weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (n, in)
        z: Tensor | None,  # (n, in); None: x itself
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
    @once_differentiable  # a second derivative would treat the saved products as constants
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # g: (n, out)
        x, z, weight, lora_A, lora_B, u = ctx.saved_tensors
        s = ctx.scaling
        need_x, need_z, need_weight, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        grad_x = grad_z = grad_weight = grad_bias = grad_A = grad_B = None
        # `addmm` with beta 0 ignores its first argument: this is a product and its scaling in one operation.
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
    """Takes k matrices A (r, in), then k diagonals d (r,), and returns k matrices (r, in) with the rows d_i A_i.

    It keeps copies of its inputs as attributes and does not call `save_for_backward`. The reason is gradient
    checkpointing, which computes a layer a second time in the backward, and requires the second forward to save as many
    tensors as the first one. In the first, `loralib.kernels.prepare` may have scaled the rows of all layers at once,
    outside of the checkpointed part; in the second, the layer scales its own rows. The numbers agree, because neither
    forward saves a tensor.
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


def forward(layer: Any, x: Tensor) -> Tensor:
    """Compute what `layer`, a `LoRALinear`, makes of x (..., in): (..., out), in autocast's dtype if that is on.

    If `loralib.kernels.prepare` has prepared the casts and scaled rows of this layer, they are used. They serve one use
    of the layer only, so that the gradients of several uses are summed in full precision.
    """
    dtype, prepared = autocast_dtype(x), None
    if not torch.compiler.is_compiling():
        prepared, layer.prepared = layer.prepared, None
    if prepared is not None and prepared[0] == dtype:
        weight, bias, lora_A, lora_B = prepared[1]
    else:
        d = layer.diagonal()
        lora_A = layer.lora_A if d is None else ScaledRows.apply(layer.lora_A, d)[0]
        parts = layer.weight, layer.bias, lora_A, layer.lora_B
        weight, bias, lora_A, lora_B = (p if p is None or dtype is None else p.to(dtype) for p in parts)
    x = x if dtype is None else x.to(dtype)
    rows = x.reshape(-1, layer.in_features)
    dropped = F.dropout(rows, layer.lora_dropout) if layer.training and layer.lora_dropout > 0 else None
    y: Tensor = _LowRankProduct.apply(rows, dropped, weight, bias, lora_A, lora_B, layer.scaling)
    return y.view(*x.shape[:-1], layer.out_features)

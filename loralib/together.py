"""What every adapted layer needs in a forward, computed for all layers at once.

Left alone, each layer multiplies its diagonal into A, and under autocast casts weight, bias and factors; autograd then
does the same for each gradient. On twelve layers these are 216 operations of a step of AdaLoRA or SoRA, and 432 more
under autocast, where LoRA has 1,300 in all. Here matrices of one shape are multiplied together, factors and their
gradients are cast together, and the casts of frozen weights are kept, which costs their size in half precision. The
numbers are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralib.layers import LoRALinear, autocast_dtype


def prepare_together(model: nn.Module) -> None:
    """Let the parts of `model` that hold adapted layers prepare these before each of their forwards in training.

    The hooks are on the children and not on `model` itself: accelerate opens autocast inside the forward of that one.
    In evaluation, under torch.compile, which merges operations itself, and under gradient checkpointing, which would
    find another layer when it computes again, each layer does it alone.
    """
    for child in model.children():
        if sum(isinstance(m, LoRALinear) for m in child.modules()) > 1:
            child.register_forward_pre_hook(_prepare)
            child.register_forward_hook(_forget, always_call=True)


def _prepare(module: Any, args: Any) -> None:
    if torch.compiler.is_compiling() or not module.training:
        return
    layers: list[LoRALinear] = []
    for m in module.modules():
        if isinstance(m, LoRALinear):
            layers.append(m)
        elif getattr(m, "gradient_checkpointing", False):
            return
    if not layers:
        return
    first = layers[0].weight
    layers = [layer for layer in layers if layer.weight.device == first.device and layer.weight.dtype == first.dtype]
    dtype, diagonals = autocast_dtype(first), [layer.diagonal() for layer in layers]
    if dtype is None and all(d is None for d in diagonals):
        return

    ready: dict[int, Tensor] = {}  # A of each layer as its product takes it, by place
    shapes: dict[torch.Size, list[int]] = {}
    for i, d in enumerate(diagonals):
        if d is not None:
            shapes.setdefault(layers[i].lora_A.shape, []).append(i)
    for places in shapes.values():
        pairs = [layers[i].lora_A for i in places] + [diagonals[i] for i in places]
        ready.update(zip(places, _ScaledRows.apply(dtype, *pairs), strict=True))
    plain = [i for i, d in enumerate(diagonals) if d is None]
    factors = [layers[i].lora_A for i in plain] + [layer.lora_B for layer in layers]
    if dtype is not None:
        factors = _Cast.apply(dtype, *factors)
    ready.update(zip(plain, factors, strict=False))
    for i, (layer, B) in enumerate(zip(layers, factors[len(plain) :], strict=True)):
        layer.prepared = dtype, [*_frozen(layer, dtype), ready[i], B]
    module.prepared_layers = layers


def _forget(module: Any, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for layer in module.__dict__.pop("prepared_layers", ()):
            layer.prepared = None


def _frozen(layer: LoRALinear, dtype: torch.dtype | None) -> Sequence[Tensor | None]:
    """Weight and bias in `dtype`; kept as long as the layer holds the same ones, unchanged."""
    own = [layer.weight, layer.bias]
    if dtype is None:
        return own
    if any(p is not None and p.requires_grad for p in own):
        return [None if p is None else p.to(dtype) for p in own]
    state = [dtype, *((p.device, p.data_ptr(), p._version) for p in own if p is not None)]
    if layer.kept is None or layer.kept[0] != state:
        layer.kept = (state, [None if p is None else p.to(dtype) for p in own])
    return layer.kept[1]


class _ScaledRows(torch.autograd.Function):
    """k matrices A (r, in) and then k diagonals d (r,), all of one shape -> k matrices of rows d_i A_i, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        k = len(tensors) // 2
        A, d = torch.stack(tensors[:k]), torch.stack(tensors[k:]).unsqueeze(2)
        ctx.save_for_backward(A, d)
        ctx.set_materialize_grads(False)
        rows = A * d
        return (rows if dtype is None else rows.to(dtype)).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        A, d = ctx.saved_tensors
        there = [i for i, g in enumerate(grads) if g is not None]
        if len(there) < len(grads):
            A, d = A[there], d[there]
        g: Tensor = torch.stack([g for g in grads if g is not None]).to(A.dtype)
        found: list[Tensor | None] = [None] * (2 * len(grads))
        for i, of_A, of_d in zip(there, (g * d).unbind(), (g * A).sum(2).unbind(), strict=True):
            found[i], found[len(grads) + i] = of_A, of_d
        return None, *found


class _Cast(torch.autograd.Function):
    """Tensors of one dtype and device -> copies in another dtype; the gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return _cast(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        back = iter(_cast([g for g in grads if g is not None], ctx.dtype))
        return None, *(None if g is None else next(back) for g in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    pieces = torch.cat([t.reshape(-1) for t in tensors]).to(dtype).split([t.numel() for t in tensors])
    return tuple(piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True))

"""Under autocast, the casts of all adapted layers in a few operations for each forward.

Left alone, every layer casts its weight, bias and factors anew in each forward, and autograd casts each gradient back:
on twelve layers 432 of LoRA's 1,830 operations in a step. Here the frozen weights are cast once and kept, which costs
their size in half precision, and the factors of all layers are cast together, as are their gradients. The numbers are
the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralib.layers import LoRALinear, autocast_dtype


def share_casts(model: nn.Module) -> None:
    """Let the parts of `model` that hold adapted layers prepare the casts of these before each of their forwards.

    The hooks are on the children and not on `model` itself: accelerate opens autocast inside the forward of that one.
    """
    for child in model.children():
        if sum(isinstance(m, LoRALinear) for m in child.modules()) > 1:
            child.register_forward_pre_hook(_prepare)
            child.register_forward_hook(_forget, always_call=True)


def _prepare(module: Any, args: Any) -> None:
    """Give each adapted layer its `casts`. In evaluation, and in a compiled forward, layers cast for themselves."""
    if torch.compiler.is_compiling() or not module.training:
        return
    adapted = (m for m in module.modules() if isinstance(m, LoRALinear))
    first = next(adapted, None)
    if first is None or (dtype := autocast_dtype(first.weight)) is None:
        return
    device = first.weight.device
    layers = [m for m in (first, *adapted) if m.weight.device == device and m.weight.dtype == torch.float32]
    if not layers:
        return
    trained = [[layer.lora_A, layer.lora_B, layer.diagonal()] for layer in layers]
    cast = iter(_Cast.apply(dtype, *(t for parts in trained for t in parts if t is not None)))
    for layer, parts in zip(layers, trained, strict=True):
        layer.casts = [*_frozen(layer, dtype), *(None if t is None else next(cast) for t in parts)]
    module.layers_with_casts = layers


def _forget(module: Any, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for layer in module.__dict__.pop("layers_with_casts", ()):
            layer.casts = None


def _frozen(layer: LoRALinear, dtype: torch.dtype) -> list[Tensor | None]:
    """Weight and bias in `dtype`; kept as long as the layer holds the same ones, unchanged."""
    own = [layer.weight, layer.bias]
    if any(p is not None and p.requires_grad for p in own):
        return [None if p is None else p.to(dtype) for p in own]
    state = [dtype, *((p.device, p.data_ptr(), p._version) for p in own if p is not None)]
    if layer.kept is None or layer.kept[0] != state:
        layer.kept = (state, [None if p is None else p.to(dtype) for p in own])
    return layer.kept[1]


class _Cast(torch.autograd.Function):
    """Tensors of one dtype and device -> copies in another dtype; the gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return _together(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [g for g in grads if g is not None]
        back = iter(_together(there, ctx.dtype) if there else ())
        return None, *(None if g is None else next(back) for g in grads)


def _together(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    pieces = torch.cat([t.reshape(-1) for t in tensors]).to(dtype).split([t.numel() for t in tensors])
    return tuple(piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True))

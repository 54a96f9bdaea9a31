"""What every adapted layer needs in a forward, computed for all layers at once.

Left alone, each layer multiplies its diagonal into A, and under autocast casts weight, bias and factors; autograd then
does the same for each gradient. On twelve layers these are about 200 operations of a step of AdaLoRA or SoRA, and 430
more under autocast, where LoRA has 1,400 besides. Here matrices of one shape are multiplied together, and everything is
cast together, as are the gradients. The arithmetic is the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralib.layers import LoRALinear, ScaledRows, autocast_dtype


def work_together(model: nn.Module) -> None:
    """Let the parts of `model` that hold adapted layers prepare these before each of their forwards in training.

    The hooks are on the children and not on `model` itself: accelerate opens autocast inside the forward of that one.
    Left alone are layers in evaluation, layers that torch.compile sees, layers with a forward or forward pre-hooks of
    their own, and diagonals that are computed: these may depend on what happens during the forward.
    """
    for child in model.children():
        adapted = sum(isinstance(m, LoRALinear) for m in child.modules())
        if adapted > 1 and _prepare not in child._forward_pre_hooks.values():
            child.register_forward_pre_hook(_prepare)
            child.register_forward_hook(_forget, always_call=True)


def work_alone(model: nn.Module) -> None:
    """Take the hooks of `work_together` away."""
    for module in model.modules():
        hooks: Any
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if hook in (_prepare, _forget)]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)


def _prepare(module: Any, args: Any) -> None:
    if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
        return
    layers = [m for m in module.modules() if type(m).forward is LoRALinear.forward and not m._forward_pre_hooks]
    diagonals = [layer.diagonal() for layer in layers]
    adapted = [
        (layer, d)
        for layer, d in zip(layers, diagonals, strict=True)
        if (layer.weight.device, layer.weight.dtype) == (layers[0].weight.device, layers[0].weight.dtype)
        and (d is None or d.is_leaf or (d._base is not None and d._base.is_leaf))
    ]
    if not adapted:
        return

    shapes: dict[torch.Size, list[tuple[LoRALinear, Tensor]]] = {}
    for layer, d in adapted:
        if d is not None:
            shapes.setdefault(layer.lora_A.shape, []).append((layer, d))
    rows: dict[LoRALinear, Tensor] = {}
    for group in shapes.values():
        scaled = ScaledRows.apply(*(layer.lora_A for layer, _ in group), *(d for _, d in group))
        rows.update(zip((layer for layer, _ in group), scaled, strict=True))

    dtype = autocast_dtype(layers[0].weight)
    layers = list(rows) if dtype is None else [layer for layer, _ in adapted]
    parts = [[layer.weight, layer.bias, rows.get(layer, layer.lora_A), layer.lora_B] for layer in layers]
    if dtype is not None:
        cast = iter(_Cast.apply(dtype, *(t for own in parts for t in own if t is not None)))
        parts = [[None if t is None else next(cast) for t in own] for own in parts]
    module.prepared_layers = layers
    for layer, own in zip(layers, parts, strict=True):
        layer.prepared = dtype, own


def _forget(module: Any, args: Any, output: Any) -> None:
    """No layer that took no part in this forward keeps anything for the next."""
    if not torch.compiler.is_compiling():
        for layer in module.__dict__.pop("prepared_layers", ()):
            layer.prepared = None


class _Cast(torch.autograd.Function):
    """Tensors of one dtype and device -> copies in another dtype; the gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        copies = _cast(tensors, dtype)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(copy for copy, need in zip(copies, needed, strict=True) if not need))
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        back = iter(_cast([g for g in grads if g is not None], ctx.dtype))
        return None, *(None if g is None else next(back) for g in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    if not tensors:
        return ()
    sizes = [t.numel() for t in tensors]
    pieces = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)
    copies = tuple(piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True))
    torch._foreach_copy_(copies, tuple(tensors))
    return copies

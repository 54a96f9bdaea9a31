"""Scales and casts the factors of all adapted layers together before a forward in training. The arithmetic is the same.

By itself, each layer multiplies its diagonal into A, and under autocast it casts weight, bias and factors. Autograd
then does the same for each gradient. A step of a model of twelve layers takes about 1,300 operations; these would be
200 more for AdaLoRA and SoRA, and another 430 under autocast. Here matrices of one shape are scaled together,
everything is cast together, and so are the gradients. This takes some 20 operations.

All layers prepare themselves, one by one,

- in evaluation, and where no gradients are recorded;
- under torch.compile, which merges operations itself;
- under transformers' gradient checkpointing, which is there to save memory: copies that are made at once live long;
- where any module inside has a forward pre-hook, because it may change factors.

A single layer prepares itself

- if it has a `forward` or a `diagonal` of its own, or a parametrization;
- if its weight and factors differ in dtype or device from each other, or from those of the first layer.

If your forward changes factors in another way, call `prepare_one_by_one`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralib.kernels.low_rank import ScaledRows, autocast_dtype
from loralib.layers import LoRALinear


def prepare_at_once(model: nn.Module) -> None:
    """Let each part of `model` that holds several adapted layers prepare them before each of its forwards in training.

    The hooks are on the children and not on `model` itself, because accelerate opens autocast inside the forward of
    `model`. A second call changes nothing.
    """
    for child in model.children():
        adapted = sum(isinstance(m, LoRALinear) for m in child.modules())
        if adapted > 1 and _prepare not in child._forward_pre_hooks.values():
            child.register_forward_pre_hook(_prepare)
            child.register_forward_hook(_forget, always_call=True)


def prepare_one_by_one(model: nn.Module) -> None:
    """Undo `prepare_at_once`: each layer prepares itself when it is used, and frees the copies after its backward.

    Gradient checkpointing of your own needs this to save as much memory as it can. If it selects which operations are
    computed again, it fails without this.
    """
    for module in model.modules():
        hooks: Any
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if hook in (_prepare, _forget)]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)


def _prepare(module: Any, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    _forget(module, args, None)  # an interrupted forward may have left something
    if not (module.training and torch.is_grad_enabled()):
        return
    layers: list[LoRALinear] = []
    for m in module.modules():
        if getattr(m, "gradient_checkpointing", False) or any(h is not _prepare for h in m._forward_pre_hooks.values()):
            return
        if isinstance(m, LoRALinear) and _is_stock(m):
            layers.append(m)
    kinds = [{(t.device, t.dtype) for t in (layer.weight, layer.lora_A, layer.lora_B)} for layer in layers]
    layers = [layer for layer, kind in zip(layers, kinds, strict=True) if kind == kinds[0] and len(kind) == 1]
    if not layers:
        return

    shapes: dict[torch.Size, list[tuple[LoRALinear, Tensor]]] = {}
    for layer in layers:
        if (d := layer.diagonal()) is not None:
            shapes.setdefault(layer.lora_A.shape, []).append((layer, d))
    rows: dict[LoRALinear, Tensor] = {}
    for group in shapes.values():
        scaled = ScaledRows.apply(*(layer.lora_A for layer, _ in group), *(d for _, d in group))
        rows.update(zip((layer for layer, _ in group), scaled, strict=True))

    dtype = autocast_dtype(layers[0].weight)
    if dtype is None:
        layers = list(rows)
    parts = [[layer.weight, layer.bias, rows.get(layer, layer.lora_A), layer.lora_B] for layer in layers]
    if dtype is not None and dtype != layers[0].weight.dtype:
        cast = iter(_Cast.apply(dtype, *(t for own in parts for t in own if t is not None)))
        parts = [[None if t is None else next(cast) for t in own] for own in parts]
    module.prepared_layers = layers
    for layer, own in zip(layers, parts, strict=True):
        layer.prepared = dtype, own


def _is_stock(layer: LoRALinear) -> bool:
    """Whether the layer computes what `LoRALinear` computes, from its parameters as they are."""
    own_forward = getattr(layer.forward, "__func__", None) is not LoRALinear.forward
    own_diagonal = type(layer).diagonal is not LoRALinear.diagonal
    return not (own_forward or own_diagonal or hasattr(layer, "parametrizations"))


def _forget(module: Any, args: Any, output: Any) -> None:
    """Remove what was prepared for layers that this forward did not use."""
    if not torch.compiler.is_compiling():
        for layer in module.__dict__.pop("prepared_layers", ()):
            layer.prepared = None


class _Cast(torch.autograd.Function):
    """Copies tensors of one dtype and device in another dtype, and the gradients back in the first."""

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

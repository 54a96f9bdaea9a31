"""Starts a run from an adapter: `--lora_path` reads one of any format and puts it into a freshly adapted model."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loralib.adapt import adapted_layers, backbone_of, is_head, is_lora
from loralib.adapters.names import places_in
from loralib.adapters.own import load_trained, other_backbone, read_own
from loralib.adapters.peft import PEFT_CONFIG, read_peft
from loralib.adapters.reading import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PEFT_FILES,
    Adapter,
    output_layer,
    read_state,
    shape_of,
    split_state,
)
from loralib.errors import InputError
from loralib.layers import DIAGONALS, START, LoRALinear


def read_adapter(path: str | Path) -> Adapter:
    """Read this project's adapter folder, a PEFT LoRA folder, or a state dict of the released code.

    Raises:
        InputError: the adapter is missing, cut off or foreign; the message names file and key.
    """
    path = Path(path).expanduser()
    folder = path.parent if path.is_file() else path
    named = None if path.is_dir() else path.name  # a file beside its config stands for the folder
    if named in (None, ADAPTER_FILE) and ((folder / ADAPTER_CONFIG).is_file() or (path / ADAPTER_FILE).is_file()):
        return read_own(folder)
    if named in (None, *PEFT_FILES) and (folder / PEFT_CONFIG).is_file():
        return read_peft(folder)
    matrices, rest = split_state(read_state(path), path)
    return Adapter(path, {}, matrices, {}, rest)


def load_lora(model: nn.Module, path: str | Path) -> list[str]:
    """Start a freshly adapted model from an adapter; afterwards it computes what the adapter was trained to compute.

    - A matrix of a smaller rank fills the first directions; the others stay fresh and add nothing yet.
    - A different scaling is folded into the factors.
    - A head that is missing, of other shapes or for other labels stays fresh.
    - A head for the same labels in another order is brought into the model's order (`model.config.id2label`).

    Args:
        model: a model just adapted by `adapt`.
        path: a path for `read_adapter`.

    Returns:
        One line for the log for each thing that was not simply copied.

    Raises:
        InputError: the adapter does not fit; the message names file, key and both shapes.
    """
    adapter = read_adapter(path)
    source = f"lora_path {adapter.source}"
    layers = dict(adapted_layers(model))
    held_matrices = set(adapter.matrices) | set(adapter.config.get("ranks", ()))
    unknown = sorted(held_matrices - set(layers))
    if unknown and unknown[0] in dict(model.named_modules()) and is_head(unknown[0], backbone_of(model)[0]):
        raise InputError(f"{source} adapts {unknown[0]!r}, a part of the head, which trains as a whole here.")
    if unknown or not held_matrices:
        held = f"adapts {unknown[0]!r}, which this run does not" if unknown else "holds no lora_A and lora_B"
        way = "set --lora_module and the model as they were"
        if not held_matrices and adapter.rest:
            way = "a whole model is given as --model_name_or_path"
        raise InputError(f"{source} {held}: {way}.")
    state = _in_the_models_order(adapter, _rest_that_fits(model, adapter, source), model)
    fresh, smaller, scalings = 0, 0, set()
    for name, layer in layers.items():
        own = {key: p.detach() for key, p in layer.named_parameters(recurse=False) if is_lora(key)}
        own |= {key: b for key, b in layer.named_buffers(recurse=False) if key in START}
        tensors = adapter.matrices.get(name)
        if tensors is None:
            if adapter.complete and adapter.config.get("ranks", {}).get(name) != 0:
                raise InputError(f"{source} lacks the key {f'{name}.lora_A'!r}: set --lora_module as it was.")
            fresh += 1
            state |= {f"{name}.{key}": value for key, value in own.items()}
            continue
        r, scaling = tensors["lora_A"].shape[0], adapter.scaling.get(name)
        _refuse_unfit(source, name, layer, own, tensors, exact=scaling is None)
        smaller += r < layer.r
        ratio = 1.0 if scaling is None else scaling / layer.scaling
        if scaling is not None and not math.isclose(ratio, 1.0, rel_tol=1e-12):
            scalings.add((scaling, layer.scaling))
        else:
            ratio = 1.0
        diagonal = next((key for key in DIAGONALS if key in own), None)
        if diagonal is not None:  # it is a row or a column; plain factors mean ones
            values = tensors.get(diagonal, torch.ones(r, dtype=tensors["lora_A"].dtype))
            tensors = tensors | {diagonal: values.reshape((1, r) if own[diagonal].shape[0] == 1 else (r, 1))}
        if START[0] in own and START[0] not in tensors:  # it was trained on the unchanged weight
            tensors = tensors | dict(zip(START, (tensors["lora_A"] * 0, tensors["lora_B"] * 0), strict=True))
        for key in tensors:
            scaled = ratio != 1.0 and key in (diagonal or "lora_B", START[1])
            value = tensors[key] * ratio if scaled else tensors[key]
            state[f"{name}.{key}"] = _padded(value, own[key]) if r < layer.r else value
    kept = load_trained(model, state, source, head_may_differ=True)
    lines = []
    if other_backbone(adapter.config, adapter.rest, model):
        lines.append("it was trained on another pretrained model: --model_name_or_path has other weights")
    if kept:
        lines.append(
            f"its head is missing, of other shapes or for other labels, so these get fresh values: {', '.join(kept)}"
        )
    if fresh:
        lines.append(f"{fresh} of {len(layers)} matrices have rank 0 there or are missing: they get fresh values")
    if smaller:
        lines.append(
            f"{smaller} of {len(layers)} matrices have a lower rank there: further directions get fresh values"
        )
    for theirs, ours in sorted(scalings)[:1]:
        lines.append(
            f"the adapter's scaling {theirs:g} differs from this run's {ours:g}: its factors take in the ratio"
        )
    return lines


def _in_the_models_order(adapter: Adapter, head: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The head with its outputs in the order of the model's labels, without the last layer if the labels differ."""
    labels, named = adapter.config.get("label_names"), getattr(getattr(model, "config", None), "id2label", None)
    last = output_layer(head)
    if not labels or not named or len(labels) != len(named) or last is None:
        return head
    places = places_in([str(named[i]) for i in sorted(named)], labels)
    if places is None:
        return {key: value for key, value in head.items() if key not in last}
    return head | {key: head[key][places] for key in last}


def _refuse_unfit(
    source: str,
    name: str,
    layer: LoRALinear,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    exact: bool,
) -> None:
    a, b = tensors["lora_A"], tensors["lora_B"]
    if a.shape[1] != layer.in_features or b.shape[0] != layer.out_features:
        raise InputError(
            f"{source} has shapes {shape_of(a)} and {shape_of(b)} for lora_A and lora_B of {name!r}, this run needs "
            f"{shape_of(own['lora_A'])} and {shape_of(own['lora_B'])}: it was trained on another model."
        )
    if a.shape[0] > layer.r or (exact and a.shape[0] != layer.r):
        raise InputError(
            f"{source} has shape {shape_of(a)} for {f'{name}.lora_A'!r}, this run needs {shape_of(own['lora_A'])}: "
            f"set --lora_r {a.shape[0]}{'' if exact else ' or more'}."
        )
    extra = sorted(set(tensors) - set(own))
    if extra:
        raise InputError(
            f"{source} holds {f'{name}.{extra[0]}'!r}, which the layer {type(layer).__name__} of this run lacks: "
            "use the entry point and --lora_type that trained it, or fold it: scripts/export_adapter.py --to lora."
        )


def _padded(value: Tensor, fresh: Tensor) -> Tensor:
    """`fresh` with `value` in its first rows and columns; `value` itself if it does not fit in there."""
    if value.ndim != fresh.ndim or any(a > b for a, b in zip(value.shape, fresh.shape, strict=True)):
        return value
    full = fresh.clone()
    full[tuple(slice(n) for n in value.shape)] = value
    return full


def _rest_that_fits(model: nn.Module, adapter: Adapter, source: str) -> dict[str, Tensor]:
    """The head in the file.

    Raises:
        InputError: the file also holds a backbone, and that is not the model's own.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    head = {}
    for key, value in adapter.rest.items():
        frozen = own.get(key)
        if frozen is None or frozen.requires_grad:
            head[key] = value
            continue
        if frozen.shape != value.shape:
            raise InputError(
                f"{source} has shape {tuple(value.shape)} for {key!r}, this run needs {tuple(frozen.shape)}."
            )
        theirs, ours = value.float(), frozen.detach().cpu().to(value.dtype).float()
        if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
            raise InputError(
                f"{source} holds another backbone than --model_name_or_path ({key!r} differs by up to "
                f"{(ours - theirs).abs().max().item():.3g}): name the pretrained model that it was trained on."
            )
    return head

"""Adapters as files: this project's own format, and state dicts of the released code."""

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralib.adapt import adapted_layers, is_lora, ranks
from loralib.errors import InputError

ADAPTER_FILE = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"
METHOD_STATE = "method_state.safetensors"
FORMAT_VERSION = 1


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained (factors and head) and `ranknum`, by the released keys; never the frozen backbone."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, layer in adapted_layers(model):
        state |= {f"{name}.{key}": buffer for key, buffer in layer.named_buffers(recurse=False)}
    return state


def save_adapter(model: nn.Module, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write `adapter.safetensors` and `adapter.json`.

    Args:
        model: the adapted model.
        folder: an existing folder.
        config: facts about the adapter (method, r, alpha, modules, base model, ...); ranks are added.
    """
    folder = Path(folder)
    state = {name: t.contiguous().cpu() for name, t in adapter_state(model).items()}
    save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt", "version": str(FORMAT_VERSION)})
    full = {"version": FORMAT_VERSION, **config, "ranks": ranks(model)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(full, indent=2) + "\n")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, of a .bin file (read without executing anything), or of a folder with one.

    Raises:
        InputError: nothing there, or not readable; the message names the file.
    """
    path = Path(path).expanduser()
    file = path
    if path.is_dir():
        names = (ADAPTER_FILE, "model.safetensors", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise InputError(f"lora_path {path} holds no adapter: it must hold one of {', '.join(names)}.")
        file = found[0]
    if not file.is_file():
        raise InputError(f"lora_path {path} does not exist: give a .safetensors or .bin file, or a folder with one.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{file} cannot be read as a state dict ({type(error).__name__}): is it cut off?") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{file} does not hold a state dict of tensors.")
    return state


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load a trained adapter and head into an adapted model; everything must be there and fit.

    Raises:
        InputError: missing or unknown keys, or other shapes; the message names file, key and both shapes.
    """
    load_trained(model, read_state(path), str(path), head_may_differ=False)


def load_trained(model: nn.Module, state: Mapping[str, Tensor], source: str, head_may_differ: bool) -> list[str]:
    """Copy `state` into the model's parameters and buffers.

    Args:
        head_may_differ: a head that is missing or has other shapes keeps its fresh values.

    Returns:
        Names of trainable parameters that kept their values.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    needed = adapter_state(model)
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise InputError(
            f"{source} holds {len(unknown)} unknown key(s), the first is {unknown[0]!r}: its modules or its layer type "
            "are not those of this run (--lora_module, --lora_type)."
        )
    kept = []
    for name in needed:
        found = state.get(name)
        if found is not None and found.shape == own[name].shape:
            continue
        if head_may_differ and not is_lora(name) and not name.endswith("ranknum"):
            kept.append(name)
        elif name.endswith("ranknum") and found is None:
            continue  # a constant of the layer
        elif found is None:
            raise InputError(f"{source} lacks the key {name!r}: its modules are not those of this run (--lora_module).")
        else:
            raise InputError(
                f"{source} has shape {tuple(found.shape)} for {name!r}, this run needs {tuple(own[name].shape)}: "
                "set --lora_r and the model as they were."
            )
    with torch.no_grad():
        for name, value in state.items():
            if name not in kept:
                if value.shape != own[name].shape:
                    raise InputError(
                        f"{source} has shape {tuple(value.shape)} for {name!r}, this run needs {tuple(own[name].shape)}."
                    )
                own[name].copy_(value)
    return kept


def save_method_state(states: Mapping[str, Mapping[str, Tensor]], folder: str | Path) -> None:
    """Write the state of a method's pieces, `{piece: {key: tensor}}`, to `method_state.safetensors`."""
    flat = {f"{piece}/{key}": t.contiguous().cpu() for piece, state in states.items() for key, t in state.items()}
    save_file(flat, Path(folder) / METHOD_STATE, metadata={"version": str(FORMAT_VERSION)})


def load_method_state(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read what `save_method_state` wrote.

    Raises:
        InputError: the file is missing or cut off.
    """
    file = Path(folder) / METHOD_STATE
    if not file.is_file():
        raise InputError(f"checkpoint {folder} lacks {METHOD_STATE}: it is not one of this method, so it can't be resumed.")
    try:
        flat = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is cut off or not a safetensors file.") from error
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        piece, _, name = key.partition("/")
        states.setdefault(piece, {})[name] = tensor
    return states

"""The reader of foreign files: state dicts and JSON objects become an `Adapter`. No file can make it execute code."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from loralib.adapt import is_lora
from loralib.errors import InputError
from loralib.jsonfile import read_json
from loralib.layers import DIAGONALS

ADAPTER_FILE = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Floats of fewer bits need scales, which a state dict does not hold.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OUTPUT_LAYER = re.compile(r"(?:^|\.)(?:classifier|score|out_proj|logits_proj)\.weight$")


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter's files.

    source: the file or folder, for messages.
    config: the content of adapter.json; {} if there is none.
    matrices: by module name lora_A (r, in), lora_B (out, r) and what the layer adds.
    scaling: by module name; files of the released code do not tell it, so it is missing for their matrices.
    rest: the head; for a file that holds the whole model also the backbone.
    complete: whether the files name every adapted matrix. One of rank 0 has no tensors; `config["ranks"]` has it.
    """

    source: Path
    config: dict[str, Any]
    matrices: dict[str, dict[str, Tensor]]
    scaling: dict[str, float]
    rest: dict[str, Tensor]
    complete: bool = True


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, of a .bin or .pt file (weights_only), or of a folder with one.

    Raises:
        InputError: the file is missing or cannot be read; the message names it.
    """
    path = Path(path).expanduser()
    file = path
    if path.is_dir():
        names = (ADAPTER_FILE, *PEFT_FILES, "model.safetensors", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise InputError(f"{path} holds no adapter: it must hold one of {', '.join(names)}.")
        file = found[0]
    if not file.is_file():
        raise InputError(f"{path} does not exist: give a .safetensors or .bin file, or a folder with one.")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken or hostile file can make the reader raise anything
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{file} cannot be opened ({error.strerror}): make it readable.") from error
        raise InputError(
            f"{file} cannot be read as a state dict of tensors ({type(error).__name__}): it is cut off, or another "
            "kind of file; give a .safetensors file, or a .bin file that holds only tensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{file} does not hold a state dict: it must map names to tensors and hold nothing else.")
    for key, value in state.items():
        if (value.is_floating_point() or value.is_complex()) and value.dtype not in FLOATS:
            raise InputError(
                f"{file} has {key!r} in {str(value.dtype).removeprefix('torch.')}, which cannot be read here: write it "
                "in float32, bfloat16 or float16."
            )
    return state


def read_number(config: Mapping[str, Any], key: str, file: Path, least: float = 0.0) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e30:  # nor NaN
        shown = f"{key[:200]!r} = {str(value)[:80]!r}"
        raise InputError(f"{file} has {shown}; it must be a number of {least:g} or more.")
    return value


def split_state(state: Mapping[str, Tensor], source: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split a state dict into the tensors of adapted matrices by module, and the rest; floats get their widest type.

    Raises:
        InputError: a value is not finite, or a matrix is incomplete or of shapes that do not fit; the message names it.
    """
    types = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(types) > 1:
        widest = reduce(torch.promote_types, types)
        state = {key: value.to(widest) if value.is_floating_point() else value for key, value in state.items()}
    matrices: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{source} holds NaN or infinite values in {key!r}: it comes from a run that diverged.")
        name, _, leaf = key.rpartition(".")
        if is_lora(key):
            matrices.setdefault(name, {})[leaf] = value
        elif leaf != "ranknum" and not leaf.endswith("position_ids"):  # constants of layer and model
            rest[key] = value
    for name, tensors in matrices.items():
        for leaf in ("lora_A", "lora_B"):
            if leaf not in tensors:
                held = f"{name}.{next(iter(tensors))}"
                raise InputError(f"{source} lacks the key {f'{name}.{leaf}'!r}, but holds {held!r}.")
            if tensors[leaf].ndim != 2 or not tensors[leaf].is_floating_point():
                raise InputError(
                    f"{source} has shape {shape_of(tensors[leaf])} for {f'{name}.{leaf}'!r}, not a matrix of numbers."
                )
        a, b = tensors["lora_A"], tensors["lora_B"]
        if a.shape[0] != b.shape[1] or a.shape[0] < 1:
            raise InputError(
                f"{source} has shapes {shape_of(a)} and {shape_of(b)} for lora_A and lora_B of {name!r}: ranks differ."
            )
        for leaf in DIAGONALS:
            if leaf in tensors and tensors[leaf].numel() != a.shape[0]:
                raise InputError(
                    f"{source} has shape {shape_of(tensors[leaf])} for {f'{name}.{leaf}'!r}, its rank is {a.shape[0]}."
                )
    return matrices, rest


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def output_layer(head: Mapping[str, Tensor]) -> list[str] | None:
    """Keys of the weight (outputs, in) and bias (outputs,) of a head's last layer; None if it has no such weight."""
    last = [k for k, t in head.items() if t.ndim == 2 and OUTPUT_LAYER.search(k) and not re.search(r"\.\d+\.", k)]
    if not last:
        return None
    bias = f"{last[-1].removesuffix('weight')}bias"
    return [last[-1], bias] if bias in head else [last[-1]]


def is_language_model(adapter: Adapter) -> bool:
    """Whether an adapter was trained in a decoder with its own output layer, so that it has no head of a task.

    `adapter.json` has the model's class. Older files and those of PEFT do not: there a head decides first, because the
    config.json of a classifier may name the class of its base model, which is a decoder.
    """
    if recorded := adapter.config.get("model_class"):
        return is_decoder(recorded)
    if output_layer(adapter.rest) is not None:
        return False
    return adapter.config.get("task_type") == "CAUSAL_LM" or holds_decoder(adapter.source)


def holds_decoder(folder: Path) -> bool:
    """Whether the config.json of a folder, if there is one, names a decoder with its own output layer."""
    file = folder / "config.json"
    named = read_json(file).get("architectures") if file.is_file() else None
    return isinstance(named, list) and any(map(is_decoder, named))


def is_decoder(model_class: Any) -> bool:
    """Whether this is the name of a class of decoders with their own output layer."""
    return str(model_class).endswith("ForCausalLM")

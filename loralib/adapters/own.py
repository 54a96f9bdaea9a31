"""This project's own format: `adapter.safetensors`, `adapter.json`, and the state of a method's pieces."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from loralib.adapt import adapted_layers, is_lora, ranks
from loralib.adapters.names import unnamed_labels
from loralib.adapters.reading import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Adapter,
    read_number,
    read_state,
    split_state,
)
from loralib.adapters.writing import FORMAT_VERSION, write_json, write_tensors
from loralib.errors import InputError
from loralib.jsonfile import read_json
from loralib.layers import DIAGONALS, START, LoRALinear
from loralib.peft import is_peft

METHOD_STATE = "method_state.safetensors"


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter by the released keys: all factors, `ranknum` and the trained head; no frozen
    backbone."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or is_lora(name)}
    for name, layer in adapted_layers(model):
        state |= {f"{name}.{key}": buffer for key, buffer in layer.named_buffers(recurse=False)}
    return state


def adapter_facts(model: nn.Module) -> dict[str, Any]:
    """The entries of `adapter.json` that are read from the model.

    model_class: name of the class of the model.
    head: names of the trained parameters outside of the adapter.
    ranks, scaling: numbers by matrix.
    low_rank: whether each layer computes weight + scaling B diag A and nothing else.
    shared: further names of factors that several matrices share.
    backbone_sum: see the function.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    shared = {name: first[id(p)] for name, p in every if is_lora(name) and first[id(p)] != name}
    head = [name for name, p in model.named_parameters() if p.requires_grad and not is_lora(name)]
    facts: dict[str, Any] = {
        "model_class": type(model).__name__,
        "backbone_sum": backbone_sum(model, head),
        "low_rank": all(_low_rank(layer) for _, layer in adapted_layers(model)),
        "head": head,
        "ranks": ranks(model),
        "scaling": {name: float(layer.scaling) for name, layer in adapted_layers(model)},
    }
    return facts | ({"shared": shared} if shared else {})


def _low_rank(layer: LoRALinear) -> bool:
    """Whether the update is scaling B diag A, with the diagonal as the file holds it."""
    d, held = layer.diagonal(), [getattr(layer, key) for key in DIAGONALS if hasattr(layer, key)]
    stored = not held if d is None else len(held) == 1 and torch.equal(d, held[0].view(-1))
    start_is_stored = layer.pretrained is None or hasattr(layer, START[0])
    return stored and start_is_stored and type(layer).delta_weight is LoRALinear.delta_weight


def backbone_sum(model: nn.Module, head: Iterable[str]) -> float:
    """A checksum of the pretrained model: the absolute values at the beginning of each frozen parameter, added up.

    Rounding to half precision changes it by a relative 1e-4 at most. A weight that the start of a layer has changed
    counts with its pretrained values.
    """
    trained = set(head)
    changed = {f"{name}.weight": m.pretrained for name, m in adapted_layers(model) if m.pretrained is not None}
    named = (pair for pair in model.named_parameters() if pair[0] not in trained and not is_lora(pair[0]))
    frozen = (changed.get(name, p) for name, p in named)
    sums = [p.detach().reshape(-1)[:64].double().abs().sum() for p in frozen]
    return float(torch.stack(sums).sum()) if sums else 0.0


def other_backbone(config: Mapping[str, Any], head: Iterable[str], model: nn.Module) -> bool:
    known = config.get("backbone_sum")
    return known is not None and not math.isclose(known, backbone_sum(model, head), rel_tol=1e-4)


def save_adapter(model: nn.Module, folder: str | Path, config: Mapping[str, Any] | None = None) -> None:
    """Write `adapter.safetensors` and `adapter.json`.

    Args:
        model: the adapted model.
        folder: the output folder; it is made if it is missing.
        config: facts about the adapter (method, r, alpha, modules, ...). `adapter_facts` are added to them, and
            `base_model`, the name by which the model was loaded, and `label_names`, the labels of its config, unless
            they are among them.

    Raises:
        InputError: the model has no adapted layer of this project.
    """
    if is_peft(model):
        raise InputError("PEFT has adapted the model: save it by its own save_pretrained.")
    if next(adapted_layers(model), None) is None:
        raise InputError(f"{type(model).__name__} has no adapted layer: save it by its own save_pretrained.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = getattr(getattr(model, "config", None), "name_or_path", "") or None
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(labels[i]) for i in sorted(labels)]
    known = {} if not names or unnamed_labels(names) else {"label_names": names}
    facts = {"base_model": base} | known | dict(config or {})
    full = {"format_version": FORMAT_VERSION, **facts, **adapter_facts(model)}
    write_tensors(folder / ADAPTER_FILE, adapter_state(model))
    write_json(folder / ADAPTER_CONFIG, full)


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load a trained adapter and its head into an adapted model. Both must be complete and fit exactly.

    Raises:
        InputError: keys are missing or unknown, shapes differ (the message names file, key and both shapes), or the
            adapter was trained with another scaling (alpha) or on another pretrained model.
    """
    state, file = read_state(path), Path(path).expanduser() / ADAPTER_CONFIG
    config = read_json(file) if file.is_file() else {}
    layers, trained = dict(adapted_layers(model)), config.get("scaling")
    trained = trained if isinstance(trained, dict) else {}
    for name in trained:
        scaling = read_number(trained, name, file)
        if name in layers and not math.isclose(scaling, layers[name].scaling, rel_tol=1e-6):
            raise InputError(
                f"{path} was trained with the scaling {scaling:g} for {name}, this model has {layers[name].scaling:g}: "
                "adapt it with the lora_alpha and lora_r of adapter.json."
            )
    load_trained(model, state, str(path), head_may_differ=False)
    if "backbone_sum" in config:
        read_number(config, "backbone_sum", file)
    if other_backbone(config, state, model):
        raise InputError(f"{path} was trained on another pretrained model: the frozen weights of this one differ.")


def load_trained(model: nn.Module, state: Mapping[str, Tensor], source: str, head_may_differ: bool) -> list[str]:
    """Copy `state` into the model's parameters and buffers.

    Args:
        head_may_differ: if the head is missing or has other shapes, it keeps its fresh values.

    Returns:
        Names of the trainable parameters that kept their values.

    Raises:
        InputError: a key is missing, unknown or of another shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
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
            continue  # it is a constant of the layer
        elif found is None:
            raise InputError(f"{source} lacks the key {name!r}: its modules are not those of this run (--lora_module).")
        else:
            raise InputError(
                f"{source} has shape {tuple(found.shape)} for {name!r}, this run needs {tuple(own[name].shape)}: "
                "set --lora_r and the model as they were."
            )
    for name, layer in adapted_layers(model):
        if hasattr(layer, START[0]):  # its start has changed the frozen weight
            layer.move_start(state[f"{name}.{START[0]}"], state[f"{name}.{START[1]}"])
    with torch.no_grad():
        for name, value in state.items():
            if name not in kept:
                if value.shape != own[name].shape:
                    raise InputError(
                        f"{source} has shape {tuple(value.shape)} for {name!r}, this run {tuple(own[name].shape)}."
                    )
                own[name].copy_(value)
    return kept


def read_own(folder: Path) -> Adapter:
    """Read a folder with `adapter.safetensors` and `adapter.json`.

    Raises:
        InputError: a file is missing, broken or of a later version, or the two do not belong together.
    """
    file, config_file = folder / ADAPTER_FILE, folder / ADAPTER_CONFIG
    for needed in (file, config_file):
        if not needed.is_file():
            raise InputError(f"the adapter folder {folder} lacks {needed.name}: copy the folder as a whole.")
    config, state = read_json(config_file), read_state(file)
    version = read_number(config, "format_version", config_file, 1)
    if "backbone_sum" in config:
        read_number(config, "backbone_sum", config_file)
    if version > FORMAT_VERSION:
        raise InputError(
            f"{config_file} has format_version {version}, this program reads up to {FORMAT_VERSION}: update it."
        )
    for key in ("ranks", "scaling"):
        if not isinstance(config.get(key), dict):
            raise InputError(f"{config_file} has no mapping {key!r} from matrices to numbers.")
        for name in config[key]:
            read_number(config[key], name, config_file)
    shared: Any = config.get("shared") or {}
    head: Any = config.get("head")
    labels: Any = config.get("label_names") or []
    if not isinstance(shared, dict) or not all(isinstance(name, str) for name in shared.values()):
        raise InputError(f"{config_file} has a mapping 'shared' that does not lead from names to names.")
    for key, names in (("head", head), ("label_names", labels)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{config_file} has no list of names under {key!r}.")
    state |= {alias: state[name] for alias, name in shared.items() if name in state}
    matrices, rest = split_state(state, file)
    sizes, scaling = config["ranks"], config["scaling"]
    wrong = [n for n in matrices if n not in sizes or n not in scaling] + [
        n for n in sizes if sizes[n] and n not in matrices
    ]
    wrong += sorted(set(rest) ^ set(head))
    if not wrong and config.get("low_rank") is True:
        wrong = [name for name, tensors in matrices.items() if _rank(tensors) != sizes[name]]
    if wrong:
        raise InputError(f"{file} and {config_file.name} differ in {wrong[0]!r}: they belong to different runs.")
    return Adapter(folder, config, matrices, {name: float(scaling[name]) for name in matrices}, rest)


def _rank(tensors: Mapping[str, Tensor]) -> int:
    d = next((tensors[key] for key in DIAGONALS if key in tensors), None)
    return tensors["lora_A"].shape[0] if d is None else int(d.count_nonzero())


def save_method_state(states: Mapping[str, Mapping[str, Tensor]], folder: str | Path) -> None:
    """Write the state of a method's pieces, `{piece: {key: tensor}}`, into `method_state.safetensors`."""
    flat = {f"{piece}/{key}": t for piece, state in states.items() for key, t in state.items()}
    write_tensors(Path(folder) / METHOD_STATE, flat)


def load_method_state(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read what `save_method_state` wrote.

    Raises:
        InputError: the file is missing or cut off.
    """
    file = Path(folder) / METHOD_STATE
    if not file.is_file():
        raise InputError(f"checkpoint {folder} lacks {METHOD_STATE}: another method wrote it, so it cannot be resumed.")
    try:
        flat = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is cut off or not a safetensors file.") from error
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        piece, _, name = key.partition("/")
        states.setdefault(piece, {})[name] = tensor
    return states

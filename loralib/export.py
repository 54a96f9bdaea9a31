"""Adapters as files: this project's format, Hugging Face PEFT's, merged checkpoints, state dicts of the released code.

A file becomes an `Adapter` (`read_adapter`), and everything is made from that: the exports, and what `--lora_path` puts
into a model. So a layer of one's own is exported without a word of code here: the file knows its scaling.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from loralib.adapt import adapt, adapted_layers, backbone_of, is_head, is_lora, ranks
from loralib.errors import InputError
from loralib.layers import LoRALinear
from loralib.together import work_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"
# Of PEFT's LoRA settings those that compute more than W + scaling B A, and the starts that leave W as it is.
PEFT_MORE = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip
PEFT_STARTS = ("gaussian", "eva", "orthogonal", "mica")
METHOD_STATE = "method_state.safetensors"
FORMAT_VERSION = 1
DIAGONALS = ("lora_E", "lora_gate")  # what may stand between the factors, (r,) as a row or a column


# ---- writing aside ----


def _write(file: Path, data: bytes) -> None:
    """Write aside, then rename: a reader never sees half a file. The mode is the user's usual one."""
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_bytes(data)
    os.replace(aside, file)


def _write_tensors(file: Path, state: Mapping[str, Tensor]) -> None:
    tensors = {name: t.detach().contiguous().cpu() for name, t in state.items()}
    _write(file, save(tensors, metadata={"format": "pt", "version": str(FORMAT_VERSION)}))


def _write_json(file: Path, value: Any) -> None:
    _write(file, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError where torch, safetensors or tokenizers cannot write; each has an exception of its own for that."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(" ".join(str(error).split())[:200]) from error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers' is
            raise
        raise OSError(str(error)[:200]) from error


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder under another name, renamed to `out` when all is written, removed when something fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"the output folder {out} exists and is not empty: name another by --out, or remove it.")
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with disk_errors():
            aside.mkdir(parents=True)
            yield aside
            os.replace(aside, out)
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- a model's adapter, exactly as it is: checkpoints ----


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained (factors and head) and `ranknum`, by the released keys; never the frozen backbone."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, layer in adapted_layers(model):
        state |= {f"{name}.{key}": buffer for key, buffer in layer.named_buffers(recurse=False)}
    return state


def adapter_facts(model: nn.Module) -> dict[str, Any]:
    """What `adapter.json` says of the model itself.

    head: names of trained parameters that are no adapter's; ranks, scaling: by matrix; low_rank: whether
    weight + scaling B diag A is all of each layer; shared: other names of a factor that several matrices share;
    backbone_sum: see there.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    shared = {name: first[id(p)] for name, p in every if is_lora(name) and first[id(p)] != name}
    head = [name for name, p in model.named_parameters() if p.requires_grad and not is_lora(name)]
    facts: dict[str, Any] = {
        "backbone_sum": backbone_sum(model, head),
        "low_rank": all(_low_rank(layer) for _, layer in adapted_layers(model)),
        "head": head,
        "ranks": ranks(model),
        "scaling": {name: float(layer.scaling) for name, layer in adapted_layers(model)},
    }
    return facts | ({"shared": shared} if shared else {})


def _low_rank(layer: LoRALinear) -> bool:
    """Whether the layer's tensors alone give its update: scaling B diag A, with d as it is in the file."""
    d, held = layer.diagonal(), [getattr(layer, key) for key in DIAGONALS if hasattr(layer, key)]
    stored = not held if d is None else len(held) == 1 and torch.equal(d, held[0].view(-1))
    return stored and type(layer).delta_weight is LoRALinear.delta_weight


def backbone_sum(model: nn.Module, head: Iterable[str]) -> float:
    """Sum of the absolute values at the start of each frozen parameter: tells one pretrained model from another.

    Rounding to half precision moves it by less than 1e-4 of itself.
    """
    trained = set(head)
    frozen = (p for name, p in model.named_parameters() if name not in trained and not is_lora(name))
    sums = [p.detach().reshape(-1)[:64].double().abs().sum() for p in frozen]
    return float(torch.stack(sums).sum()) if sums else 0.0


def _other_backbone(config: Mapping[str, Any], head: Iterable[str], model: nn.Module) -> bool:
    known = config.get("backbone_sum")
    return known is not None and not math.isclose(known, backbone_sum(model, head), rel_tol=1e-4)


def save_adapter(model: nn.Module, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write `adapter.safetensors` and `adapter.json`, each of them aside first.

    Args:
        model: the adapted model.
        folder: is made where it is missing.
        config: facts about the adapter (method, r, alpha, modules, base model, ...); `adapter_facts` are added.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    full = {"format_version": FORMAT_VERSION, **config, **adapter_facts(model)}
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    if commit:  # a model of the hub: a branch moves, a commit does not
        full["base_model_revision"] = commit
    _write_tensors(folder / ADAPTER_FILE, adapter_state(model))
    _write_json(folder / ADAPTER_CONFIG, full)


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load a trained adapter and head into an adapted model; everything must be there and fit, values stay as saved.

    Raises:
        InputError: missing or unknown keys, other shapes (the message names file, key and both shapes), or another
            pretrained model.
    """
    state, file = read_state(path), Path(path).expanduser() / ADAPTER_CONFIG
    load_trained(model, state, str(path), head_may_differ=False)
    config = _read_json(file) if file.is_file() else {}
    if "backbone_sum" in config:
        _number(config, "backbone_sum", file)
    if _other_backbone(config, state, model):
        raise InputError(f"{path} was trained on another pretrained model: the frozen weights of this one differ.")


def load_trained(model: nn.Module, state: Mapping[str, Tensor], source: str, head_may_differ: bool) -> list[str]:
    """Copy `state` into the model's parameters and buffers.

    Args:
        head_may_differ: a head that is missing or has other shapes keeps its fresh values.

    Returns:
        Names of trainable parameters that kept their values.
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
                        f"{source} has shape {tuple(value.shape)} for {name!r}, this run {tuple(own[name].shape)}."
                    )
                own[name].copy_(value)
    return kept


# ---- reading: nothing in a file is ever executed ----


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, of a .bin or .pt file (weights_only), or of a folder with one.

    Raises:
        InputError: nothing there, or not readable; the message names the file.
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
    except Exception as error:  # whatever a broken or hostile file makes the reader raise
        raise InputError(
            f"{file} cannot be read as a state dict of tensors ({type(error).__name__}): it is cut off, or another "
            "kind of file; give a .safetensors file, or a .bin file that holds tensors alone."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{file} does not hold a state dict: it must map names to tensors and hold nothing else.")
    return state


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({type(error).__name__}): is it cut off?") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} must hold one JSON object, it holds a {type(value).__name__}.")
    return value


def _number(config: Mapping[str, Any], key: str, file: Path, least: float = 0.0) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e30:  # nor NaN
        shown = f"{key[:200]!r} = {str(value)[:80]!r}"
        raise InputError(f"{file} has {shown}, it must be a number of {least:g} or more.")
    return value


@dataclass(frozen=True)
class Adapter:
    """What a file holds.

    source: file or folder, for messages. config: adapter.json; {} where there is none. matrices: by module name
    lora_A (r, in), lora_B (out, r) and what its layer adds. scaling: by module name; a matrix of the released code,
    whose files do not say it, is missing. rest: the head, and the backbone where a file holds all.
    complete: whether each adapted matrix is in the file, at least in `config["ranks"]` as one of rank 0.
    """

    source: Path
    config: dict[str, Any]
    matrices: dict[str, dict[str, Tensor]]
    scaling: dict[str, float]
    rest: dict[str, Tensor]
    complete: bool = True


def read_adapter(path: str | Path) -> Adapter:
    """Read this project's adapter folder, a PEFT LoRA folder, or a state dict of the released code.

    Raises:
        InputError: not there, cut off, or foreign; the message names file and key.
    """
    path = Path(path).expanduser()
    folder = path.parent if path.is_file() else path
    named = None if path.is_dir() else path.name  # a file beside its config stands for the folder
    if named in (None, ADAPTER_FILE) and ((folder / ADAPTER_CONFIG).is_file() or (path / ADAPTER_FILE).is_file()):
        return _read_own(folder)
    if named in (None, *PEFT_FILES) and (folder / PEFT_CONFIG).is_file():
        return _read_peft(folder)
    matrices, rest = _split(read_state(path), path)
    return Adapter(path, {}, matrices, {}, rest)


def _read_own(folder: Path) -> Adapter:
    file, config_file = folder / ADAPTER_FILE, folder / ADAPTER_CONFIG
    for needed in (file, config_file):
        if not needed.is_file():
            raise InputError(f"the adapter folder {folder} lacks {needed.name}: copy the folder as a whole.")
    config, state = _read_json(config_file), read_state(file)
    version = _number(config, "format_version", config_file, 1)
    if "backbone_sum" in config:
        _number(config, "backbone_sum", config_file)
    if version > FORMAT_VERSION:
        raise InputError(
            f"{config_file} has format_version {version}, this program reads up to {FORMAT_VERSION}: update it."
        )
    for key in ("ranks", "scaling"):
        if not isinstance(config.get(key), dict):
            raise InputError(f"{config_file} has no mapping {key!r} from matrices to numbers.")
        for name in config[key]:
            _number(config[key], name, config_file)
    shared: Any = config.get("shared") or {}
    head: Any = config.get("head")
    labels: Any = config.get("label_names") or []
    if not isinstance(shared, dict) or not all(isinstance(name, str) for name in shared.values()):
        raise InputError(f"{config_file} has a mapping 'shared' that does not lead from names to names.")
    for key, names in (("head", head), ("label_names", labels)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{config_file} has no list of names under {key!r}.")
    state |= {alias: state[name] for alias, name in shared.items() if name in state}
    matrices, rest = _split(state, file)
    sizes, scaling = config["ranks"], config["scaling"]
    wrong = [n for n in matrices if n not in sizes or n not in scaling] + [
        n for n in sizes if sizes[n] and n not in matrices
    ]
    wrong += sorted(set(rest) ^ set(head))
    if not wrong and config.get("low_rank") is True:
        wrong = [name for name, tensors in matrices.items() if _rank(tensors) != sizes[name]]
    if wrong:
        raise InputError(f"{file} and {config_file.name} differ in {wrong[0]!r}: they are not of one run.")
    return Adapter(folder, config, matrices, {name: float(scaling[name]) for name in matrices}, rest)


def _read_peft(folder: Path) -> Adapter:
    file = folder / PEFT_CONFIG
    config = _read_json(file)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file} has peft_type {config.get('peft_type')!r}: only LORA can be read here.")
    for key, wanted in (("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(key, wanted) != wanted:
            raise InputError(f"{file} has {key} = {config[key]!r}: only {wanted!r} can be read here.")
    for key in PEFT_MORE:
        if config.get(key):
            raise InputError(
                f"{file} has {key} = {str(config[key])[:80]}: only plain LoRA, without it, can be read here."
            )
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in PEFT_STARTS):  # the others change the base's weights
        raise InputError(
            f"{file} has init_lora_weights = {str(start)[:80]!r}, which belongs to changed base weights: convert it to "
            "plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    state = {}
    for key, value in read_state(folder).items():
        if ".original_module." not in key:
            name = re.sub(r"\.modules_to_save(\.default)?\.", ".", key.removeprefix("base_model.model."))
            state[re.sub(r"\.(lora_[AB])(\.default)?\.weight$", r".\1", name)] = value
    matrices, rest = _split(state, folder)
    alphas = config.get("alpha_pattern") or {}
    # PEFT takes these keys as regular expressions; one from a file could run for ever, so names alone are read
    if not isinstance(alphas, dict) or not all(re.fullmatch(r"[\w.\\]+", key) for key in alphas):
        raise InputError(f"{file} has an alpha_pattern that is no mapping from module names to numbers.")
    scaling = {}
    for name, tensors in matrices.items():
        found = next((key for key in alphas if f".{name}".endswith("." + key.replace("\\", ""))), None)
        alpha = _number(config, "lora_alpha", file) if found is None else _number(alphas, found, file)
        r = tensors["lora_A"].shape[0]
        scaling[name] = alpha / (math.sqrt(r) if config.get("use_rslora") is True else r)
    return Adapter(folder, {}, matrices, scaling, rest, complete=False)


def _rank(tensors: Mapping[str, Tensor]) -> int:
    d = next((tensors[key] for key in DIAGONALS if key in tensors), None)
    return tensors["lora_A"].shape[0] if d is None else int(d.count_nonzero())


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _split(state: Mapping[str, Tensor], source: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of adapted matrices by module, checked against each other, and the rest."""
    matrices: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{source} holds NaN or infinite values in {key!r}: it is of a run that diverged.")
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
                    f"{source} has shape {_shape(tensors[leaf])} for {f'{name}.{leaf}'!r}, not a matrix of numbers."
                )
        a, b = tensors["lora_A"], tensors["lora_B"]
        if a.shape[0] != b.shape[1] or a.shape[0] < 1:
            raise InputError(
                f"{source} has shapes {_shape(a)} and {_shape(b)} for lora_A and lora_B of {name!r}: ranks differ."
            )
        for leaf in DIAGONALS:
            if leaf in tensors and tensors[leaf].numel() != a.shape[0]:
                raise InputError(
                    f"{source} has shape {_shape(tensors[leaf])} for {f'{name}.{leaf}'!r}, its rank is {a.shape[0]}."
                )
    return matrices, rest


# ---- into a model: --lora_path ----


def load_lora(model: nn.Module, path: str | Path) -> list[str]:
    """Start a freshly adapted model from an adapter: the function that it computes is the file's.

    A matrix of a smaller rank fills the first directions, the others stay fresh and add nothing yet; another scaling is
    folded into the factors; a head that is missing or has other shapes stays fresh.

    Args:
        model: fresh from `adapt`.
        path: what `read_adapter` takes.

    Returns:
        One line for each thing that was not simply copied, to be logged.

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
        raise InputError(f"{source} {held}: set --lora_module and the model as they were.")
    state = _rest_that_fits(model, adapter, source)
    fresh, smaller, scalings = 0, 0, set()
    for name, layer in layers.items():
        own = {key: p.detach() for key, p in layer.named_parameters(recurse=False) if is_lora(key)}
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
        if diagonal is not None:  # a row or a column; ones in a file of plain factors
            values = tensors.get(diagonal, torch.ones(r, dtype=tensors["lora_A"].dtype))
            tensors = tensors | {diagonal: values.reshape((1, r) if own[diagonal].shape[0] == 1 else (r, 1))}
        for key in tensors:
            value = tensors[key] * ratio if ratio != 1.0 and key == (diagonal or "lora_B") else tensors[key]
            state[f"{name}.{key}"] = _padded(value, own[key]) if r < layer.r else value
    kept = load_trained(model, state, source, head_may_differ=True)
    lines = []
    if _other_backbone(adapter.config, adapter.rest, model):
        lines.append("it was trained on another pretrained model: --model_name_or_path has other weights")
    if kept:
        lines.append(f"its head is missing or has other shapes, so these start anew: {', '.join(kept)}")
    if fresh:
        lines.append(f"{fresh} of {len(layers)} matrices have rank 0 there or are missing: they start anew")
    if smaller:
        lines.append(f"{smaller} of {len(layers)} matrices have a lower rank there: further directions start anew")
    for theirs, ours in sorted(scalings)[:1]:
        lines.append(
            f"it was trained with the scaling {theirs:g}, this run has {ours:g}: the ratio went into its values"
        )
    labels, own_labels = adapter.config.get("label_names"), getattr(getattr(model, "config", None), "id2label", None)
    if labels and not kept and own_labels and list(labels) != [own_labels[i] for i in sorted(own_labels)]:
        lines.append(f"its head was trained for the labels {', '.join(map(str, labels))}, which are not this run's")
    return lines


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
            f"{source} has shapes {_shape(a)} and {_shape(b)} for lora_A and lora_B of {name!r}, this run needs "
            f"{_shape(own['lora_A'])} and {_shape(own['lora_B'])}: it was trained on another model."
        )
    if a.shape[0] > layer.r or (exact and a.shape[0] != layer.r):
        raise InputError(
            f"{source} has shape {_shape(a)} for {f'{name}.lora_A'!r}, this run needs {_shape(own['lora_A'])}: "
            f"set --lora_r {a.shape[0]}{'' if exact else ' or more'}."
        )
    extra = sorted(set(tensors) - set(own))
    if extra:
        raise InputError(
            f"{source} holds {f'{name}.{extra[0]}'!r}, which the layer {type(layer).__name__} of this run lacks: "
            "use the entry point and --lora_type that trained it, or fold it: scripts/export_adapter.py --to lora."
        )


def _padded(value: Tensor, fresh: Tensor) -> Tensor:
    """`fresh` with `value` in its first rows and columns; as it is where it has another shape altogether."""
    if value.ndim != fresh.ndim or any(a > b for a, b in zip(value.shape, fresh.shape, strict=True)):
        return value
    full = fresh.clone()
    full[tuple(slice(n) for n in value.shape)] = value
    return full


def _rest_that_fits(model: nn.Module, adapter: Adapter, source: str) -> dict[str, Tensor]:
    """The head of a file. A backbone in it must be the model's own, since an adapter keeps none of it."""
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


# ---- out: folded, PEFT, merged ----


def read_run(folder: str | Path) -> Adapter:
    """The adapter of a run's output folder, of one of its checkpoints, or of an exported folder.

    Raises:
        InputError: not such a folder, or a run that fine-tuned the whole model.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a run's output folder or one of its checkpoints.")
    if (folder / ADAPTER_CONFIG).is_file() or (folder / ADAPTER_FILE).is_file():
        return _read_own(folder)
    if (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds a fully fine-tuned model: from_pretrained loads the folder as it is.")
    raise InputError(f"{folder} holds no {ADAPTER_CONFIG}: give a run's output folder or one of its checkpoints.")


def folded(adapter: Adapter) -> Adapter:
    """The same update with two factors for each matrix and nothing else (layer `frd`).

    Triplets and gates of value 0 are removed, the others go into lora_A; a matrix of rank 0 is left out. scaling stays.

    Raises:
        InputError: the layer is more than weight + scaling B diag A.
    """
    matrices = {}
    for name, tensors in adapter.matrices.items():
        extra = sorted(set(tensors) - {"lora_A", "lora_B", *DIAGONALS})
        if extra or adapter.config.get("low_rank") is not True:
            what = (
                f"holds {f'{name}.{extra[0]}'!r}"
                if extra
                else "was trained with a layer that defines its own delta_weight"
            )
            raise InputError(
                f"{adapter.source} {what}: it is not a product of two factors, so it cannot be written as plain LoRA; "
                "use --to merged --layer FILE.py:CLASS with its layer class."
            )
        a, b = tensors["lora_A"], tensors["lora_B"]
        for leaf in DIAGONALS:
            if leaf in tensors:
                d = tensors[leaf].view(-1)
                left = d.nonzero().view(-1)
                a, b = d[left].unsqueeze(1) * a[left], b[:, left]
        if a.shape[0]:
            matrices[name] = {"lora_A": a, "lora_B": b}
    left_ranks = dict.fromkeys(adapter.config["ranks"], 0) | {n: m["lora_A"].shape[0] for n, m in matrices.items()}
    scaling = {name: adapter.scaling[name] for name in matrices}
    config = adapter.config | {"layer": "frd", "ranks": left_ranks}
    config.pop("shared", None)
    return replace(adapter, config=config, matrices=matrices, scaling=scaling)


def export_lora(run: str | Path, out: str | Path) -> None:
    """Write this project's adapter folder with `folded` factors: rank (in + out) elements a matrix, and the head.

    A layer that cannot be folded is written as it is.
    """
    adapter = read_run(run)
    if adapter.config.get("low_rank") is True:
        adapter = folded(adapter)
    state = {f"{name}.{key}": t for name, tensors in adapter.matrices.items() for key, t in tensors.items()}
    with _new_folder(Path(out)) as folder:
        _write_tensors(folder / ADAPTER_FILE, state | adapter.rest)
        _write_json(folder / ADAPTER_CONFIG, adapter.config)
        if (adapter.source / "config.json").is_file():  # labels and head, which merging needs
            shutil.copyfile(adapter.source / "config.json", folder / "config.json")


def export_peft(run: str | Path, out: str | Path, base: str | None = None) -> None:
    """Write a folder that PEFT loads as plain LoRA: ranks and alphas by matrix, the head in modules_to_save.

    Args:
        base: the base model's name or folder, where it is not the recorded one.
    """
    trained = read_run(run)
    adapter = folded(trained)
    matrices, scaling = dict(adapter.matrices), dict(adapter.scaling)
    if not matrices:  # PEFT refuses an adapter without a matrix: one row of zeros
        if not trained.matrices:
            raise InputError(f"{trained.source} has rank 0 everywhere: export to peft from the run's own folder.")
        name, tensors = next(iter(trained.matrices.items()))
        matrices[name] = {"lora_A": tensors["lora_A"][:1] * 0, "lora_B": tensors["lora_B"][:, :1] * 0}
        scaling[name] = 1.0
    sizes = {name: m["lora_A"].shape[0] for name, m in matrices.items()}
    alphas = {name: scaling[name] * sizes[name] for name in matrices}
    r = max(sizes.values(), key=list(sizes.values()).count)
    alpha = next(alphas[name] for name in sizes if sizes[name] == r)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base or adapter.config.get("base_model"),
        "revision": None if base else adapter.config.get("base_model_revision"),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: size for name, size in sizes.items() if size != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(matrices),
        "modules_to_save": sorted({_head_module(name) for name in adapter.rest}),
        "lora_dropout": adapter.config.get("lora_dropout", 0.0),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    state = {f"{name}.{key}.weight": t for name, tensors in matrices.items() for key, t in tensors.items()}
    state = {f"base_model.model.{name}": t for name, t in (state | adapter.rest).items()}
    with _new_folder(Path(out)) as folder:
        _write_tensors(folder / PEFT_FILES[0], state)
        _write_json(folder / PEFT_CONFIG, config)


def _head_module(parameter: str) -> str:
    """The module to save whole: classifier for classifier.dense.weight, bert.pooler for bert.pooler.dense.weight."""
    parts = parameter.split(".")
    return ".".join(parts[: parts.index("pooler") + 1] if "pooler" in parts else parts[:1])


def export_merged(
    run: str | Path, out: str | Path, base: str | None = None, layer: type[LoRALinear] | None = None
) -> None:
    """Write an ordinary transformers checkpoint with the update in its weights, and its tokenizer.

    Args:
        base: the base model's name or folder, where it is not the recorded one.
        layer: class of the adapted layers, for one whose `delta_weight` is its own.

    Raises:
        InputError: the base model is not to be had, or does not fit.
    """
    from transformers import AutoTokenizer

    adapter = read_run(run)
    model, name, revision = _base_model(adapter, base)
    if _other_backbone(adapter.config, adapter.rest, model):
        raise InputError(
            f"the weights of the base model {name} are not those that {adapter.source} was trained on: give that model "
            "by --base."
        )
    if layer is None:
        adapter = folded(adapter)
        own = dict(model.named_parameters())
        _check_shapes(adapter, own)
        with torch.no_grad():
            for matrix, m in adapter.matrices.items():
                own[f"{matrix}.weight"].add_(m["lora_B"] @ m["lora_A"], alpha=adapter.scaling[matrix])
            for key, value in adapter.rest.items():
                own[key].copy_(value)
    else:
        r, alpha = (_number(adapter.config, key, adapter.source / ADAPTER_CONFIG) for key in ("lora_r", "lora_alpha"))
        adapt(model, layer, list(adapter.config["ranks"]), r=int(r), lora_alpha=alpha)
        load_adapter(model, adapter.source)
        merge(model)
    own_tokenizer = (adapter.source / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            adapter.source if own_tokenizer else name, revision=None if own_tokenizer else revision
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"no tokenizer loads from {adapter.source} or {name} ({type(error).__name__}).") from error
    if tokenizer.pad_token is None:  # of a decoder's base; the run's own tokenizer has it
        tokenizer.pad_token = tokenizer.eos_token
    with _new_folder(Path(out)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # safetensors' own writer keeps them from everybody else
            file.chmod((folder / "config.json").stat().st_mode)


def merge(model: nn.Module) -> None:
    """Replace each adapted layer by a plain linear one with weight + delta_weight, in place.

    Outputs stay the same; afterwards the model is what it was before `adapt`, with other weights.
    """
    plain: dict[int, nn.Linear] = {}
    for _, layer in adapted_layers(model):
        merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged.weight = nn.Parameter((layer.weight + layer.delta_weight()).detach())
        merged.bias = layer.bias
        plain[id(layer)] = merged
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in plain:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, plain[id(module)])
    work_alone(model)


def _base_model(adapter: Adapter, base: str | None) -> tuple["PreTrainedModel", str, str | None]:
    """The pretrained classifier under an adapter, with the head's shape; its name and revision."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    name = base or adapter.config.get("base_model")
    if not isinstance(name, str) or not name:
        raise InputError(f"{adapter.source / ADAPTER_CONFIG} names no base_model: give it by --base.")
    revision = None if base else adapter.config.get("base_model_revision")
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise InputError(f"the base model {name} of {adapter.source} is not there: say where it is by --base.")
    tensors = [*(m["lora_A"] for m in adapter.matrices.values()), *adapter.rest.values()]
    dtype = tensors[0].dtype if tensors else torch.float32  # as trained, whatever the base's file holds
    try:
        config = AutoConfig.from_pretrained(adapter.source if (adapter.source / "config.json").is_file() else name)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            os.path.expanduser(name),
            config=config,
            revision=revision or "main",
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        asked = "" if Path(name).expanduser().is_dir() else " from the hub (or its cache)"
        raise InputError(
            f"the base model {name} cannot be loaded{asked}: {' '.join(str(error).split())[:300]} A copy elsewhere is "
            "named by --base."
        ) from error
    # the head is replaced in any case; of the backbone nothing may be missing
    for lost in sorted([*found["missing_keys"], *found["mismatched_keys"]], key=str):
        key, *shapes = lost if isinstance(lost, tuple | list) else (lost,)
        if key not in adapter.rest and key.startswith(f"{backbone_of(model)[0]}."):
            shown = f" with shapes {' and '.join(str(tuple(s)) for s in shapes)}" if shapes else ""
            raise InputError(
                f"the base model {name} does not fit {adapter.source}: {key!r} is missing or differs{shown}."
            )
    return model.eval(), name, revision


def _check_shapes(adapter: Adapter, own: Mapping[str, Tensor]) -> None:
    needed = {f"{n}.weight": (m["lora_B"].shape[0], m["lora_A"].shape[1]) for n, m in adapter.matrices.items()}
    for key, shape in (needed | {key: tuple(t.shape) for key, t in adapter.rest.items()}).items():
        if key not in own:
            raise InputError(f"{adapter.source} is for a model with {key!r}, which the base model lacks: see --base.")
        if tuple(own[key].shape) != shape:
            raise InputError(
                f"{adapter.source} has shape {shape} for {key!r}, the base model {tuple(own[key].shape)}: see --base."
            )


# ---- state of a method's pieces ----


def save_method_state(states: Mapping[str, Mapping[str, Tensor]], folder: str | Path) -> None:
    """Write the state of a method's pieces, `{piece: {key: tensor}}`, to `method_state.safetensors`."""
    flat = {f"{piece}/{key}": t for piece, state in states.items() for key, t in state.items()}
    _write_tensors(Path(folder) / METHOD_STATE, flat)


def load_method_state(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read what `save_method_state` wrote.

    Raises:
        InputError: the file is missing or cut off.
    """
    file = Path(folder) / METHOD_STATE
    if not file.is_file():
        raise InputError(f"checkpoint {folder} lacks {METHOD_STATE}: it is not of this method and cannot be resumed.")
    try:
        flat = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is cut off or not a safetensors file.") from error
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        piece, _, name = key.partition("/")
        states.setdefault(piece, {})[name] = tensor
    return states

"""Exports adapters: folded into plain factors, or merged into the weights of an ordinary checkpoint."""

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralib.adapt import adapt, adapted_layers, put_layers, replace_modules
from loralib.adapters.own import load_adapter, load_trained, other_backbone, read_own
from loralib.adapters.reading import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Adapter,
    is_decoder,
    is_language_model,
    read_number,
)
from loralib.adapters.writing import new_folder, write_json, write_tensors
from loralib.errors import InputError
from loralib.kernels.prepare import prepare_one_by_one
from loralib.layers import DIAGONALS, KINDS, START, LoRALinear
from loralib.peft import is_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def read_run(folder: str | Path) -> Adapter:
    """The adapter of a run's output folder, of one of its checkpoints, or of an exported folder.

    Raises:
        InputError: the folder is none of these, or of a run that fine-tuned the whole model.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a run's output folder or one of its checkpoints.")
    if (folder / ADAPTER_CONFIG).is_file() or (folder / ADAPTER_FILE).is_file():
        return read_own(folder)
    if (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds a fully fine-tuned model: from_pretrained loads the folder as it is.")
    raise InputError(f"{folder} holds no {ADAPTER_CONFIG}: give a run's output folder or one of its checkpoints.")


def folded(adapter: Adapter) -> Adapter:
    """The same update as two plain factors for each matrix.

    Triplets and gates of value 0 are removed, and the others are multiplied into lora_A. A matrix of rank 0 adds
    nothing and is omitted. The scaling stays. If the start took a product out of the frozen weight (PiSSA), its factors
    are appended with a minus sign, which gives rank 2 r on the base model's own weight.

    Raises:
        InputError: a layer computes more than weight + scaling B diag A.
    """
    matrices = {}
    for name, tensors in adapter.matrices.items():
        extra = sorted(set(tensors) - {"lora_A", "lora_B", *DIAGONALS, *START})
        if extra or adapter.config.get("low_rank") is not True:
            what = (
                f"holds {f'{name}.{extra[0]}'!r}"
                if extra
                else "was trained with a layer that defines its own delta_weight or changes the frozen weight otherwise"
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
        if START[0] in tensors:  # the base's weight still holds what the start took out
            a, b = torch.cat([a, -tensors[START[0]]]), torch.cat([b, tensors[START[1]]], dim=1)
        if a.shape[0]:
            matrices[name] = {"lora_A": a, "lora_B": b}
    left_ranks = dict.fromkeys(adapter.config["ranks"], 0) | {n: m["lora_A"].shape[0] for n, m in matrices.items()}
    scaling = {name: adapter.scaling[name] for name in matrices}
    config = {key: value for key, value in adapter.config.items() if key not in ("shared", "layer")}
    config["ranks"] = left_ranks
    return replace(adapter, config=config, matrices=matrices, scaling=scaling)


def export_lora(run: str | Path, out: str | Path) -> None:
    """Write an adapter folder of this project's format with `folded` factors, rank (in + out) elements for each matrix.

    If the layers cannot be folded, they are written as they are.
    """
    adapter = read_run(run)
    if adapter.config.get("low_rank") is True:
        adapter = folded(adapter)
    state = {f"{name}.{key}": t for name, tensors in adapter.matrices.items() for key, t in tensors.items()}
    with new_folder(Path(out)) as folder:
        write_tensors(folder / ADAPTER_FILE, state | adapter.rest)
        write_json(folder / ADAPTER_CONFIG, adapter.config)
        copy_config(adapter, folder)


def copy_config(adapter: Adapter, folder: Path) -> None:
    """Copy the run's config.json and tokenizer, if there are any.

    The config holds the labels and the head's shape, which merging needs. Without the tokenizer beside it, transformers
    would make an empty one from this config, without a word, and every word of a text would be unknown.
    """
    if (adapter.source / "config.json").is_file():
        shutil.copyfile(adapter.source / "config.json", folder / "config.json")
    if _tokenizer_folder(adapter.source):
        tokenizer_of(adapter.source).save_pretrained(folder)
    else:
        logger.warning("no tokenizer is at %s, so the export has none: use that of the base model", adapter.source)


def _tokenizer_folder(source: Path) -> Path | None:
    places = [source, source.absolute().parent]
    return next((place for place in places if (place / "tokenizer_config.json").is_file()), None)


def tokenizer_of(source: Path, base: str = "", revision: str | None = None) -> Any:
    """The tokenizer in a run's folder (of a checkpoint, in the folder around it), or else that of the base model."""
    from transformers import AutoTokenizer

    place = _tokenizer_folder(source)
    name = str(place or os.path.expanduser(base))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=None if place else revision)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"no tokenizer loads from {name} ({type(error).__name__}).") from error
    if tokenizer.pad_token is None:  # base models of decoders lack it; the run's own tokenizer has it
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def export_merged(
    run: str | Path, out: str | Path, base: str | None = None, layer: type[LoRALinear] | None = None
) -> None:
    """Write an ordinary transformers checkpoint with the update in its weights, and its tokenizer.

    Args:
        base: name or folder of the base model; None: the recorded one.
        layer: class of the adapted layers, needed if it has its own `delta_weight`.

    Raises:
        InputError: the base model cannot be loaded, or does not fit.
    """
    adapter = read_run(run)
    model, name, revision = restored(adapter if layer else folded(adapter), base, layer)
    merge(model)
    if not is_decoder(type(model).__name__):
        _name_outputs(model.config, adapter)
    tokenizer = tokenizer_of(adapter.source, name, revision)
    with new_folder(Path(out)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # safetensors' own writer lets nobody else read them
            file.chmod((folder / "config.json").stat().st_mode)


def _name_outputs(config: Any, adapter: Adapter) -> None:
    """Write into the config what transformers' pipeline reads; older runs did not."""
    names = adapter.config.get("label_names")
    if names and len(names) == config.num_labels:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"


def merge(model: nn.Module) -> None:
    """Replace each adapted layer of a model by a plain linear layer with weight + delta_weight.

    The outputs stay the same. Afterwards the model has the layers that it had before `adapt`, with other
    weights. What `adapt` has frozen stays frozen; the merged weights would train.

    Raises:
        InputError: PEFT has adapted the model.
    """
    if is_peft(model):
        raise InputError("PEFT has adapted the model: merge it by its own merge_and_unload.")
    plain: dict[int, nn.Linear] = {}
    for _, layer in adapted_layers(model):
        merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged.weight = nn.Parameter((layer.weight + layer.delta_weight()).detach())
        merged.bias = layer.bias
        plain[id(layer)] = merged
    replace_modules(model, plain)
    prepare_one_by_one(model)


def restored(
    adapter: Adapter, base: str | None, layer: type[LoRALinear] | None, outputs: int | None = None
) -> tuple["PreTrainedModel", str, str | None]:
    """The model that was trained: the base model (see `base_model`) with the adapter in it.

    Each matrix has its own rank and the trained scaling. `layer` is the class of the adapted layers, needed if it has
    its own `delta_weight`.

    Raises:
        InputError: as `base_model`; or the adapter was trained on another base model, or does not fit.
    """
    model, name, revision = base_model(adapter, base, outputs)
    if other_backbone(adapter.config, adapter.rest, model):
        raise InputError(
            f"the weights of the base model {name} are not those that {adapter.source} was trained on: give that model "
            "by --base (base= in Python)."
        )
    file, config = adapter.source / ADAPTER_CONFIG, {"lora_alpha": 1.0, "lora_dropout": 0.0} | adapter.config
    alpha, dropout = (read_number(config, key, file) for key in ("lora_alpha", "lora_dropout"))
    if layer is not None:
        r, held = read_number(config, "lora_r", file), {m["lora_A"].shape[0] for m in adapter.matrices.values()}
        if r not in held and held:  # refused before a huge rank takes memory
            raise InputError(
                f"{file} has lora_r {r:g}, and its factors have rank {', '.join(map(str, sorted(held)))}: they belong "
                "to different runs."
            )
        adapt(model, layer, list(config["ranks"]), r=int(r), lora_alpha=alpha, lora_dropout=dropout)
        load_adapter(model, adapter.source)
        _let_train(model, adapter.rest)
        return model, name, revision
    if config.get("low_rank") is not True:
        raise InputError(
            f"{adapter.source} was trained with a layer that defines its own delta_weight or changes the frozen "
            "weights: give its class by layer=."
        )
    if any(key in START for tensors in adapter.matrices.values() for key in tensors):
        adapter = folded(adapter)  # this computes the same on the base's own weights
    check_shapes(adapter, dict(model.named_parameters()))
    layers = {}
    for matrix, tensors in adapter.matrices.items():
        kind = next(kind for kind in KINDS if kind.between is None or kind.between in tensors)
        linear, r, scaling = model.get_submodule(matrix), tensors["lora_A"].shape[0], adapter.scaling[matrix]
        assert isinstance(linear, nn.Linear)
        made = kind(linear, r=r, lora_alpha=alpha, lora_dropout=dropout)
        if made.scaling != scaling:  # matrices had different alphas, or the scaling is of another form
            made.lora_alpha *= scaling / made.scaling
        layers[matrix] = made
    put_layers(model, layers)
    state = {f"{matrix}.{key}": t for matrix, tensors in adapter.matrices.items() for key, t in tensors.items()}
    load_trained(model, state | adapter.rest, str(adapter.source), head_may_differ=not adapter.complete)
    _let_train(model, adapter.rest)
    return model, name, revision


def _let_train(model: nn.Module, names: Iterable[str]) -> None:
    """Let the parameters beside the factors train that were trained, so that another `save_adapter` keeps them."""
    own = dict(model.named_parameters())
    for name in names:
        if name in own:
            own[name].requires_grad = True


def base_model(
    adapter: Adapter, base: str | None, outputs: int | None = None
) -> tuple["PreTrainedModel", str, str | None]:
    """Load the pretrained model of an adapter.

    The model is a language model if the adapter was trained in one, otherwise a classifier with a head of the adapter's
    shape.

    Args:
        base: name or folder of the model; None: the recorded one.
        outputs: number of outputs if the adapter has no config.json; None: that of the base model's.

    Returns:
        The model, its name and its revision.

    Raises:
        InputError: the model is not named, cannot be loaded, or does not fit the adapter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers import logging as transformers_logging

    name = base or adapter.config.get("base_model")
    if isinstance(name, str) and (len(name) > 1000 or "\0" in name):
        raise InputError(
            f"{adapter.source / ADAPTER_CONFIG} has a base_model of {len(name)} characters, which names no model "
            f"({name[:40]!r}): give it by --base."
        )
    if not isinstance(name, str) or not name:
        raise InputError(f"{adapter.source / ADAPTER_CONFIG} names no base_model: give it by --base (base= in Python).")
    revision = None if base else adapter.config.get("base_model_revision")
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise InputError(f"the base model {name} of {adapter.source} is not there: say where it is by --base (base=).")
    tensors = [*(m["lora_A"] for m in adapter.matrices.values()), *adapter.rest.values()]
    dtype = tensors[0].dtype if tensors else torch.float32  # that of the training, not of the base's file
    verbosity = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()  # it would warn of an untrained head, which is loaded later
        own = (adapter.source / "config.json").is_file()
        config = AutoConfig.from_pretrained(adapter.source if own else os.path.expanduser(name))
        if outputs is not None and not own and config.num_labels != outputs:
            config.num_labels = outputs
        labels = adapter.config.get("label_names") or ()
        if not own and len(labels) == config.num_labels:
            config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        kind: Any = AutoModelForCausalLM if is_language_model(adapter) else AutoModelForSequenceClassification
        model, found = kind.from_pretrained(
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
            "named by --base (base= in Python)."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # Everything that the adapter does not hold must have come from the base model.
    for lost in sorted([*found["missing_keys"], *found["mismatched_keys"]], key=str):
        key, *shapes = lost if isinstance(lost, tuple | list) else (lost,)
        if key not in adapter.rest:
            shown = f" with shapes {' and '.join(str(tuple(s)) for s in shapes)}" if shapes else ""
            raise InputError(
                f"the base model {name} does not fit {adapter.source}: {key!r} is missing or differs{shown}."
            )
    return model.eval(), name, revision


def check_shapes(adapter: Adapter, own: Mapping[str, Tensor]) -> None:
    """Refuse an adapter whose shapes are not those of the base model's parameters, `own`.

    Raises:
        InputError: names the parameter and both shapes.
    """
    needed = {f"{n}.weight": (m["lora_B"].shape[0], m["lora_A"].shape[1]) for n, m in adapter.matrices.items()}
    for key, shape in (needed | {key: tuple(t.shape) for key, t in adapter.rest.items()}).items():
        if key not in own:
            raise InputError(f"{adapter.source} is for a model with {key!r}, which the base model lacks: see --base.")
        if tuple(own[key].shape) != shape:
            raise InputError(
                f"{adapter.source} has shape {shape} for {key!r}, the base model {tuple(own[key].shape)}: see --base."
            )

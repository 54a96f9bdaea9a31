"""Put adapted layers into a model by module name, choose what trains, count parameters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from loralib.errors import InputError
from loralib.kernels.prepare import prepare_at_once
from loralib.layers import LoRALinear

# What the six names of `lora_module` mean in the families of models: suffixes of module names, as regular expressions.
ROLES: dict[str, tuple[str, ...]] = {
    "query": ("query_proj", "query", "q_lin", "q_proj"),
    "key": ("key_proj", "key", "k_lin", "k_proj"),
    "value": ("value_proj", "value", "v_lin", "v_proj"),
    "attention.output": (r"attention\.output\.dense", r"attention\.out_lin", r"attn\.Wo", r"self_attn\.o_proj"),
    "intermediate": (r"intermediate\.dense", r"ffn\.lin1", r"mlp\.Wi", r"mlp\.gate_proj", r"mlp\.up_proj"),
    "layer.output": (r"\d+\.output\.dense", r"ffn\.lin2", r"mlp\.Wo", r"mlp\.down_proj"),
}
ALL_LINEAR = "all-linear"
FUSED = ("Wqkv", "in_proj", "qkv_proj", "query_key_value", "c_attn")  # query, key and value as one layer


def backbone_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the pretrained body; the whole model, named "", where there is no separate head."""
    prefix = getattr(model, "base_model_prefix", "")
    return (prefix, getattr(model, prefix)) if prefix and hasattr(model, prefix) else ("", model)


def is_head(name: str, prefix: str) -> bool:
    """Whether a parameter or module belongs to the head: it lies outside the backbone, or in its pooler (ledger L1)."""
    return bool(prefix) and (not name.startswith(f"{prefix}.") or f"{name}.".startswith(f"{prefix}.pooler."))


def match_modules(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """Names of the linear layers of the backbone that `modules` means, in `named_modules` order.

    Args:
        model: a transformers model, or any module of linear layers; no part of the latter counts as a head.
        modules: names of `ROLES`, suffixes of real module names (`q_proj`, `attention.self.query`), or `all-linear`;
            one of them may be given as a string.

    Raises:
        InputError: a name matches nothing; the message lists what could match.
    """
    prefix, _ = backbone_of(model)
    linears = [n for n, m in model.named_modules() if _computes(m) and not is_head(n, prefix)]
    if not linears:
        raise InputError(
            f"the backbone of {type(model).__name__} has no linear layer (nn.Linear) to adapt: choose another model."
        )
    chosen: set[str] = set()
    for wanted in [modules] if isinstance(modules, str) else modules:
        if wanted == ALL_LINEAR:
            found = set(linears)
        else:
            patterns = [*ROLES.get(wanted, ()), re.escape(wanted)]
            found = {n for n in linears if any(re.search(rf"(?:^|\.){p}$", n) for p in patterns)}
        if not found:
            suffixes = sorted({re.sub(r"^.*\.\d+\.", "", n) for n in linears})
            roles = [
                role for role, ps in ROLES.items() if any(re.search(rf"(?:^|\.){p}$", n) for p in ps for n in linears)
            ]
            fused = [s for s in suffixes if s.rpartition(".")[2] in FUSED]
            one = fused and wanted in ("query", "key", "value")
            instead = f" (query, key and value are one layer there, {fused[0]})" if one else ""
            raise InputError(
                f"lora_module {wanted!r} matches no linear layer of {type(model).__name__}{instead}: choose from "
                f"{', '.join([*roles, ALL_LINEAR])}, or from its layers {', '.join(suffixes)}."
            )
        chosen |= found
    return [n for n in linears if n in chosen]


def _computes(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is called. `nn.MultiheadAttention` takes the weight of its out_proj and
    never calls it, so an adapter there would do nothing."""
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def adapt(model: nn.Module, layer: type[LoRALinear], modules: Sequence[str], **settings: Any) -> list[str]:
    """Replace linear layers by adapted ones and freeze the rest of the backbone (ledger L1).

    Afterwards only the new factors and the head of a task train (`mark_trainable`). Call this function after
    `from_pretrained` has returned: inside it models have no storage yet, and the factors would lose their values.
    Hooks on the model's children prepare all its layers at once before each forward; loralib/kernels/prepare.py sets
    them and can remove them.

    Args:
        model: a transformers model, or any module of linear layers; no part of the latter counts as a head.
        layer: `LoRALinear` or a subclass of it.
        modules: see `match_modules`.
        settings: arguments of the layer (r, lora_alpha, lora_dropout, init_std).

    Returns:
        The names of the adapted modules.

    Raises:
        InputError: a name matches nothing, a layer is quantised, or the model is adapted already.
    """
    from loralib.peft import is_peft  # imported here because loralib.peft imports Factors

    if is_peft(model):
        raise InputError("PEFT has adapted the model already: leave out the modules to adapt, or give a plain model.")
    if (first := next(adapted_layers(model), None)) is not None:
        raise InputError(f"the model is adapted already ({first[0]}): adapt a freshly loaded one.")
    names = match_modules(model, modules)
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for name, linear in linears.items():
        if not linear.weight.is_floating_point():
            raise InputError(
                f"{name} is quantised ({linear.weight.dtype}): adapt the model with PEFT, and give that to the method."
            )
    put_layers(model, {name: layer(linear, **settings) for name, linear in linears.items()})
    return names


def put_layers(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Put adapted layers into a model and freeze the rest as `adapt` does.

    Args:
        layers: by module name, each made from the linear layer of that name.
    """
    replace_modules(model, {id(model.get_submodule(name)): layer for name, layer in layers.items()})
    held: dict[tuple[str, torch.Size], nn.Parameter] = {}
    for layer in layers.values():
        for key in layer.shared:
            setattr(layer, key, held.setdefault((key, getattr(layer, key).shape), getattr(layer, key)))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, LoRALinear) for m in module.modules()):
            # In evaluation it would take the weights and leave the adapters out. A hook makes it call its layers.
            module.register_forward_hook(_keep)
    mark_trainable(model)
    prepare_at_once(model)


def replace_modules(model: nn.Module, by_id: Mapping[int, nn.Module]) -> None:
    """Replace the modules with these ids. A model may hold one module in several places; each of them is replaced."""
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in by_id:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, by_id[id(module)])


def _keep(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that changes nothing."""


def mark_trainable(model: nn.Module) -> None:
    """Let the parameters of the adapter and the head train, and freeze all others (ledger L1).

    The output layer of a language model is pretrained and no head of a task, so it is frozen too.
    """
    prefix, _ = backbone_of(model)
    language = isinstance(getattr(model, "get_output_embeddings", lambda: None)(), nn.Module)
    layers = [layer for _, layer in adapted_layers(model)]
    own = {id(p) for layer in layers for n, p in layer.adapter_parameters().items() if n not in layer.frozen}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = id(parameter) in own or (is_head(name, prefix) and not language)


def is_lora(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name."""
    return name.rpartition(".")[2].startswith("lora_")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their names, in `named_modules` order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


@dataclass(frozen=True)
class Factors:
    """The low-rank factors that a method works on, from any library. Each list has one entry for each matrix.

    Attributes:
        names: the names of the matrices in logs and records.
        A: first factors, (r, in).
        B: second factors, (out, r).
        between: the r numbers between each pair: AdaLoRA's E (r, 1) or SoRA's gates (1, r). The list is empty for
            plain products.
        penalised: whether the model itself adds an orthogonality penalty to its loss, as with PEFT's AdaLoRA.
    """

    names: list[str]
    A: list[Tensor]
    B: list[Tensor]
    between: list[Tensor] = field(default_factory=list)
    penalised: bool = False

    def ranks(self) -> dict[str, int]:
        """The rank left in each matrix: r, or how many numbers between its factors are not 0.

        Synchronises with the GPU.
        """
        if not self.between:
            return {name: a.shape[0] for name, a in zip(self.names, self.A, strict=True)}
        counts = torch.stack([d.detach().count_nonzero() for d in self.between]).tolist()
        return dict(zip(self.names, counts, strict=True))


def factors(source: nn.Module | Factors) -> Factors:
    """The factors of all adapted layers of a model, in `named_modules` order. `Factors` are returned unchanged.

    Of a model that Hugging Face PEFT has adapted, these are the factors of its active adapter (`loralib.peft`).

    Raises:
        InputError: the model has no adapted layer, or only some of its layers have something between the factors.
    """
    if isinstance(source, Factors):
        return source
    from loralib.peft import is_peft, peft_factors  # imported here because loralib.peft imports Factors

    if is_peft(source):
        return peft_factors(source)
    layers = list(adapted_layers(source))
    if not layers:
        raise InputError(
            f"{type(source).__name__} has no adapted layer: call adapt first, or name the modules to adapt."
        )
    between = [getattr(layer, layer.between) for _, layer in layers if layer.between is not None]
    if len(between) not in (0, len(layers)):
        raise InputError(
            f"{len(between)} of {len(layers)} adapted layers have something between their factors: a method needs "
            "layers of one kind."
        )
    A: list[Tensor] = [layer.lora_A for _, layer in layers]
    B: list[Tensor] = [layer.lora_B for _, layer in layers]
    return Factors([name for name, _ in layers], A, B, between)


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank that each adapted matrix has left: r, or how many numbers between its factors are not 0."""
    return {
        name: layer.r if (d := layer.diagonal()) is None else int(d.count_nonzero())
        for name, layer in adapted_layers(model)
    }


def parameters(model: nn.Module) -> dict[str, Any]:
    """Exact parameter counts (ledger D3).

    Returns:
        A dict of counts of elements; a shared parameter counts once.

        - total, trainable (lora + head), lora, head.
        - frozen: elements of factors that do not train, present if there are any. They are in no other count but total.
        - remaining: kept factor elements, without triplets or gates of value 0: rank (in + out) for each matrix. An
          export holds these, or twice as many after a start such as PiSSA's. For a layer with frozen factors: its
          trainable elements.
        - modules: for each adapted matrix its trainable elements, its rank and its remaining elements. A parameter that
          several matrices share counts for the first of them.
    """
    prefix, _ = backbone_of(model)
    named = list(model.named_parameters())
    lora = sum(p.numel() for n, p in named if is_lora(n) and p.requires_grad)
    frozen = sum(p.numel() for n, p in named if is_lora(n)) - lora
    trainable = sum(p.numel() for _, p in named if p.requires_grad)
    remaining_ranks = ranks(model)
    own: dict[str, int] = {}
    for name, p in named:
        if is_lora(name) and p.requires_grad:
            own[name.rpartition(".")[0]] = own.get(name.rpartition(".")[0], 0) + p.numel()
    modules = {
        name: {
            "trainable": own.get(name, 0),
            "rank": remaining_ranks[name],
            "remaining": own.get(name, 0)
            if layer.frozen
            else remaining_ranks[name] * (layer.in_features + layer.out_features),
        }
        for name, layer in adapted_layers(model)
    }
    return {
        "total": sum(p.numel() for _, p in named),
        "trainable": trainable,
        "lora": lora,
        "head": sum(p.numel() for n, p in named if p.requires_grad and is_head(n, prefix) and not is_lora(n)),
        "remaining": sum(m["remaining"] for m in modules.values()),
        "modules": modules,
    } | ({"frozen": frozen} if frozen else {})

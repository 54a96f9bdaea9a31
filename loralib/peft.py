"""The low-rank factors of a model that Hugging Face PEFT has adapted, so that the methods of this project train it.

The functions of `loralib.methods` take such a model as it is: `rm_lora(get_peft_model(model, config), random_rank=2)`.
PEFT is imported only where the model is one of PEFT's.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapt import Factors
from loralib.errors import InputError

# What PEFT's LoRA may compute beside W + scaling B A: the entry of its config, and its name in a message.
MORE = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "a trained bias of B",
    "use_qalora": "QALoRA's groups",
    "use_bdlora": "block-diagonal factors",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "MonteCLoRA's samples",
    "arrow_config": "Arrow's router",
    "alora_invocation_tokens": "activated LoRA's tokens",
    "target_parameters": "parameters that are not layers",
    "trainable_token_indices": "trained tokens",
}


def is_peft(model: nn.Module) -> bool:
    """Whether the model has layers of PEFT."""
    if sys.modules.get("peft") is None:  # without PEFT imported there can be no such model
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def peft_factors(model: nn.Module) -> Factors:
    """The factors of the active adapter of a model that PEFT has adapted with LoRA or AdaLoRA.

    Other adapters, and what PEFT trains beside the factors (`modules_to_save`, `bias`), are left alone. Each matrix
    keeps its own r (`rank_pattern`) and scaling (`use_rslora`, `alpha_pattern`). This function freezes AdaLoRA's
    `ranknum`: it is a constant, but PEFT makes it trainable when it moves an adapter to another device or dtype.

    Args:
        model: from `get_peft_model` or `PeftModel.from_pretrained(..., is_trainable=True)`, or a transformers model
            after `add_adapter`.

    Returns:
        A (r, in), B (out, r) and for AdaLoRA E (r, 1), in `named_modules` order, with the names of the base model.

    Raises:
        InputError: the adapter is of another kind, computes more than W + scaling B A, adapts a layer that is not
            linear, does not train, is merged, or is not the only active one.
    """
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    active = sorted({adapter for _, layer in layers for adapter in layer.active_adapters})
    if len(active) != 1:
        raise InputError(f"PEFT's adapters {', '.join(active)} are active: set one of them by set_adapter.")
    (adapter,) = active
    configs: Any = model.peft_config
    _refuse_more(adapter, configs[adapter])
    found: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
    for name, layer in layers:
        name = name.removeprefix("base_model.model.")
        if adapter in getattr(layer, "lora_embedding_A", ()):
            raise InputError(f"PEFT's adapter {adapter} adapts the embedding {name}: only linear layers work here.")
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue  # it is a whole module that trains, or a layer of another adapter
        if layer.merged:
            raise InputError(f"PEFT's adapter {adapter} is merged into the weights: call unmerge_adapter first.")
        a: Any = layer.lora_A[adapter]
        b: Any = layer.lora_B[adapter]
        A, B = (a, b) if isinstance(layer, AdaLoraLayer) else (a.weight, b.weight)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise InputError(
                f"PEFT's adapter {adapter} has shapes {tuple(A.shape)} and {tuple(B.shape)} for lora_A and lora_B of "
                f"{name}: only linear layers work here."
            )
        if not (A.requires_grad and B.requires_grad):
            raise InputError(
                f"PEFT's adapter {adapter} does not train: load it with is_trainable=True, or call set_adapter on it."
            )
        E: Any = None
        if isinstance(layer, AdaLoraLayer):
            E = layer.lora_E[adapter]
            layer.ranknum[adapter].requires_grad = False
        found.append((name, A, B, E))
    between = [e for *_, e in found if e is not None]
    return Factors(
        [name for name, *_ in found],
        [a for _, a, _, _ in found],
        [b for _, _, b, _ in found],
        between,
        penalised=bool(between),  # AdaLoraModel.forward adds orth_reg_weight times svd_penalty
    )


def _refuse_more(adapter: str, config: Any) -> None:
    """Refuse adapters that the methods of this project cannot train.

    Raises:
        InputError: names the setting.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in ("LORA", "ADALORA"):
        raise InputError(f"PEFT's adapter {adapter} is of the kind {kind}: only LORA and ADALORA have factors A and B.")
    for switch, what in MORE.items():
        if getattr(config, switch, None):
            raise InputError(
                f"PEFT's adapter {adapter} has {what} ({switch}), which the methods of this project do not know: use "
                "plain LoRA."
            )


class PeftAllocatorState:
    """What PEFT's own AdaLoRA allocator knows and PEFT's checkpoints lack: the importances and the ranks that are kept.

    In `Method.state` it lets a run that `AdaLoraModel.update_and_allocate` prunes resume exactly.

    Args:
        tuner: the `AdaLoraModel`, which is `get_peft_model(model, config).base_model`.
    """

    KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    @property
    def _config(self) -> Any:
        return self.tuner.peft_config[self.tuner.trainable_adapter_name]

    def state_dict(self) -> dict[str, Tensor]:
        allocator = self.tuner.rankallocator
        state = {f"{kind}/{name}": t for kind in self.KINDS for name, t in getattr(allocator, kind).items()}
        kept = self._config.rank_pattern or {}
        return state | {f"kept/{name}": torch.tensor(which, dtype=torch.bool) for name, which in kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        self.restart()
        device, kept = next(self.tuner.parameters()).device, {}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if kind == "kept":
                kept[name] = tensor.tolist()
            else:
                getattr(self.tuner.rankallocator, kind)[name] = tensor.to(device)
        self._config.rank_pattern = kept or None

    def restart(self) -> None:
        """Forget everything, for a run that starts over."""
        self.tuner.rankallocator.reset_ipt()
        self._config.rank_pattern = None

"""LoRA, AdaLoRA, SoRA and RM-LoRA: layers, penalties, rank allocation, gates and masks for current PyTorch.

The names below are imported when they are first used, so `import loralib` itself loads no other library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralib.adapt import Factors
    from loralib.adapters.exports import export_lora, export_merged, merge
    from loralib.adapters.own import load_adapter, save_adapter
    from loralib.adapters.peft import export_peft
    from loralib.errors import InputError
    from loralib.layers import LoRALinear
    from loralib.loading import Prediction, load, predict
    from loralib.methods import Method, adalora, lora, rm_lora, sora
    from loralib.peft import peft_factors
    from loralib.training.method_callback import MethodCallback
    from loralib.training.penalty import WithPenalty

__all__ = [
    "Factors",
    "InputError",
    "LoRALinear",
    "Method",
    "MethodCallback",
    "Prediction",
    "WithPenalty",
    "adalora",
    "export_lora",
    "export_merged",
    "export_peft",
    "load",
    "load_adapter",
    "lora",
    "merge",
    "peft_factors",
    "predict",
    "rm_lora",
    "save_adapter",
    "sora",
]

_MODULES = {
    "adapt": ("Factors",),
    "adapters.exports": ("export_lora", "export_merged", "merge"),
    "adapters.own": ("load_adapter", "save_adapter"),
    "adapters.peft": ("export_peft",),
    "errors": ("InputError",),
    "layers": ("LoRALinear",),
    "loading": ("Prediction", "load", "predict"),
    "methods": ("Method", "adalora", "lora", "rm_lora", "sora"),
    "peft": ("peft_factors",),
    "training.method_callback": ("MethodCallback",),
    "training.penalty": ("WithPenalty",),
}
_PLACES = {name: f"loralib.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = globals()[name] = getattr(import_module(_PLACES[name]), name)
        return value
    raise AttributeError(f"module 'loralib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

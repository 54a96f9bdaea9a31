"""Re-exports names of `loralib.adapters`, for programs written after docs/variant.md."""

from loralib.adapters.exports import export_lora, export_merged, merge
from loralib.adapters.own import load_adapter, save_adapter
from loralib.adapters.peft import export_peft
from loralib.adapters.start import load_lora

__all__ = ["export_lora", "export_merged", "export_peft", "load_adapter", "load_lora", "merge", "save_adapter"]

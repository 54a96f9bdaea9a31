"""Re-exports the steps of an entry point, for user scripts; the imports show where each of them lives.

The names at the end are those that entry points written after earlier versions of docs/variant.md call.
"""

from typing import Any

from loralib.glue.assemble import clear_and_log, effective_batch, make_trainer, trainer_arguments
from loralib.glue.flags import LoRAArguments, ModelArguments
from loralib.glue.folder import RUN_NAMES, clear_output_dir, prepare_output_dir
from loralib.glue.model import adapter_settings, load_lora_path, load_model
from loralib.glue.record import flags_of, write_run
from loralib.glue.run import Run, load_data, start
from loralib.glue.tasks import Task
from loralib.glue.train import train_and_report

__all__ = [
    "RUN_NAMES",
    "Run",
    "adapter_config",
    "adapter_settings",
    "announce",
    "clear_and_log",
    "clear_output_dir",
    "effective_batch",
    "finish",
    "flags_of",
    "load_data",
    "load_lora_path",
    "load_model",
    "make_trainer",
    "prepare_output_dir",
    "start",
    "train_and_report",
    "trainer_arguments",
    "trainer_parts",
    "write_run",
]


def adapter_config(
    method: str, lora: LoRAArguments, model: ModelArguments, task: Task, layer: str | None = None
) -> dict[str, Any]:
    """Call `adapter_settings`. `layer` has no effect: earlier versions wrote it into adapter.json; nothing read it."""
    return adapter_settings(method, lora, model, task)


announce, finish, trainer_parts = clear_and_log, train_and_report, trainer_arguments

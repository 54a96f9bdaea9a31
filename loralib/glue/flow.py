"""The steps of an entry point under one name: where each lives is seen from the imports."""

from loralib.glue.folder import RUN_NAMES, clear_output_dir, prepare_output_dir
from loralib.glue.model import adapter_config, load_lora_path, load_model
from loralib.glue.record import flags_of, write_run
from loralib.glue.run import Run, announce, effective_batch, finish, load_data, start, trainer_parts

__all__ = [
    "RUN_NAMES",
    "Run",
    "adapter_config",
    "announce",
    "clear_output_dir",
    "effective_batch",
    "finish",
    "flags_of",
    "load_data",
    "load_lora_path",
    "load_model",
    "prepare_output_dir",
    "start",
    "trainer_parts",
    "write_run",
]

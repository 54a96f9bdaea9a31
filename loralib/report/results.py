"""Reads a results file, and refuses one whose entries are not of the kinds that this project writes."""

import json
import re
from pathlib import Path
from typing import Any

# A schema by example: a value stands for its kind, None for a number or null. Keys may be missing; "*" is any key.
RESULTS: Any = {
    "status": "",
    "method": "",
    "task": "",
    "seed": 0,
    "arguments": {
        "seed": 0,
        "reg_orth_coef": 0.0,
        "lora_r": None,
        "target_rank": None,
        "target_total_rank": None,
    },
    "effective_batch": 0,
    "steps": 0,
    "parameters": {"trainable": 0, "lora": 0, "remaining": 0, "modules": {"*": {"rank": 0}}},
    "metrics": {"*": 0.0},
    "history": [{"*": 0.0, "epoch": None}],
    "wall_seconds": 0.0,
    "total_seconds": 0.0,
    "peak_memory": {"mb": 0.0},
    "evaluation_rows_per_second": 0.0,
    "lambda": 0.0,
    "remaining": 0,
    "one_class": {"*": 0.0},
    "total_rank": None,
    "target_total_rank": None,
    "earlier_stages": [{"steps": 0, "history": [{"*": 0.0, "epoch": None}]}],
    "stages": [{"lambda": 0.0, "remaining": 0, "steps": 0, "metrics": {"*": 0.0}}],
}


# Flags that change no number of a run. They say where it writes, what it prints and how it is split over devices (the
# effective batch is compared instead), or they are older names of flags that are compared.
WITHOUT_NUMBERS = re.compile(
    r"output_dir|logging_\w+|log_\w+|run_name|overwrite_\w+|resume_\w+|per_device_\w+|gradient_accumulation_steps|"
    r"local_rank|dataloader_(num_workers|pin_memory|prefetch_factor)|save_\w+|report_to|\w*cache\w*|"
    r"hub_\w+|push_to_hub\w*|\w*token|tb_writter_loginterval|disable_tqdm|use_cpu|no_cuda|ddp_\w+|glue_submission|"
    r"do_(train|predict)|max_predict_samples|skip_memory_metrics|torch_empty_cache_steps|project|trackio\w*|"
    r"evaluation_strategy|group_by_length|warmup_ratio|pad_to_max_length|restore_callback_states_from_checkpoint|"
    r"enable_jit_checkpoint|(gradient|activation)_checkpointing\w*|include_\w+|ignore_data_skip|use_fast_tokenizer|"
    r"trust_remote_code|debug"
)


def read_results(path: Path) -> dict[str, Any]:
    """A results file whose entries have the kinds that this project writes.

    Raises:
        FileNotFoundError: there is none.
        OSError, ValueError: it can't be read, with the reason as a clause.
    """
    stage = path.parent.name
    what = f"the results file of its {stage}" if stage.startswith("stage-") else "its results file"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{what} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is cut short or not JSON") from error
    check_results(data, what)
    return data


def check_results(data: Any, what: str) -> None:
    """Raise ValueError if an entry of a results file has another kind than this project writes; it names the first."""
    if not isinstance(data, dict) or data.get("version") != 1:
        raise ValueError(f"{what} is not one of this project's (version 1)")
    wrong = _unlike(data, RESULTS, "")
    if wrong:
        raise ValueError(f"{what} is not one of this project's: {wrong}")


def _unlike(value: Any, example: Any, name: str) -> str | None:
    """The first entry that is not of its example's kind, in words; None where all are."""
    if isinstance(example, dict):
        if not isinstance(value, dict):
            return f"{name} is not a mapping"
        for key in value:
            if key in example or "*" in example:
                below = example.get(key, example.get("*"))
                wrong = _unlike(value[key], below, f"{name}.{key}" if name else str(key))
                if wrong:
                    return wrong
        return None
    if isinstance(example, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        wrong_ones = (_unlike(v, example[0], f"{name}[{i}]") for i, v in enumerate(value))
        return next((wrong for wrong in wrong_ones if wrong), None)
    if isinstance(example, str):
        return None if isinstance(value, str) else f"{name} is not a text"
    if value is None and example is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e25
    return None if number else f"{name} is not a number"

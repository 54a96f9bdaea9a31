"""Which flags decide a run's numbers, and where two runs differ in them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Flags that change no number of a run: where it writes and what it prints, how it is split over devices (the effective
# batch is compared instead), and older names, whose meaning stands in the flag that replaced them.
WITHOUT_NUMBERS = re.compile(
    r"output_dir|logging_\w+|log_\w+|run_name|overwrite_\w+|resume_\w+|per_device_\w+|gradient_accumulation_steps|"
    r"local_rank|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)|save_\w+|report_to|\w*cache\w*|"
    r"hub_\w+|push_to_hub\w*|\w*token|tb_writter_loginterval|disable_tqdm|use_cpu|no_cuda|ddp_\w+|glue_submission|"
    r"do_(train|predict)|max_predict_samples|skip_memory_metrics|torch_empty_cache_steps|project|trackio\w*|"
    r"evaluation_strategy|group_by_length|warmup_ratio|pad_to_max_length|restore_callback_states_from_checkpoint|"
    r"enable_jit_checkpoint|(gradient|activation)_checkpointing\w*|include_\w+|ignore_data_skip|use_fast_tokenizer|trust_remote_code|debug"
)
# Folders and files may move: their last name is what one recognises.
PLACES = (
    "model_name_or_path",
    "config_name",
    "tokenizer_name",
    "lora_path",
    "train_file",
    "validation_file",
    "test_file",
)


@dataclass(frozen=True)
class Asked:
    """What a command asks for, as its entry point parses it.

    Attributes:
        arguments: every flag's value as run.json would hold it; None where the entry point can't be asked.
        given: flags by name as they were typed, for an entry point that can't be asked.
        at_default: flags that have their default.
        data: names that the data folder may have in the record of a run on the same data.
    """

    task: str
    seed: int
    arm: str  # the method's name in this sweep
    method: str | None  # as run.json names it; None for an entry point of the user's
    entry: str  # the last two parts of the entry point's path
    arguments: Mapping[str, Any] | None
    given: Mapping[str, str]
    at_default: frozenset[str]
    effective_batch: int | None
    data: tuple[str, ...] = ()


def differences(record: Mapping[str, Any], asked: Asked) -> list[str]:
    """Where a run's record and a command differ in what decides numbers, in words; empty where they agree.

    Args:
        record: a results file, whole or compact.
    """
    done = record.get("arguments")
    if not isinstance(done, dict):
        return ["arguments that are not recorded"]
    found = [_say("task", record.get("task"), asked.task)] if record.get("task") != asked.task else []
    seed = done.get("seed", record.get("seed"))
    if seed != asked.seed:
        found.append(_say("seed", seed, asked.seed))
    if asked.method is not None and record.get("method") != asked.method:
        found.append(_say("method", record.get("method"), asked.method))
    if asked.method is None and entry_of(record) not in (None, asked.entry):
        found.append(_say("entry point", entry_of(record), asked.entry))
    if asked.arguments is None:
        return found + [_say(k, done[k], v) for k, v in asked.given.items() if k in done and not _same_text(done[k], v)]
    batch = record.get("effective_batch")
    if None not in (batch, asked.effective_batch) and batch != asked.effective_batch:
        found.append(_say("effective batch", batch, asked.effective_batch))
    trains_by_steps = (asked.arguments.get("max_steps") or -1) > 0
    for name, value in asked.arguments.items():
        if WITHOUT_NUMBERS.fullmatch(name) or name in ("seed", "task_name"):
            continue
        if name == "num_train_epochs" and trains_by_steps:
            continue
        if name not in done:
            same = name in asked.at_default
        elif name == "dataset_name":
            same = value == done[name] or (isinstance(done[name], str) and Path(done[name]).name in asked.data)
        elif name in PLACES:
            same = _last(value) == _last(done[name])
        else:
            same = _same(value, done[name])
        if not same:
            found.append(_say(name, done.get(name, "not recorded"), value))
    return found


def entry_of(record: Mapping[str, Any]) -> str | None:
    """The last two parts of the path of the entry point that wrote a record; None where it is not known."""
    command = record.get("command")
    if isinstance(command, list) and command and isinstance(command[0], str):
        return short_path(command[0])
    entry = record.get("entry")
    return entry if isinstance(entry, str) else None


def short_path(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(path).parts[-2:])


def _say(name: str, done: Any, asked: Any) -> str:
    return f"{name} {done} ({asked} is asked for)"


def _last(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) else value


def _same(a: Any, b: Any) -> bool:
    """Equal as values: 1 and 1.0 are, True and 1 are not, nothing and an empty list or mapping are."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(a) == float(b)
    return a == b or (not a and not b and (a, b) != (0, None) and (a, b) != (None, 0))


def _same_text(done: Any, asked: str) -> bool:
    try:
        return float(asked) == float(done)
    except (TypeError, ValueError):
        return asked.lower() == str(done).lower()


def typed_flags(words: Sequence[str]) -> dict[str, str]:
    """Flags by name as they were typed; the last one of a name wins, a bare one is True."""
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, joined, value = word[2:].partition("=")
        after = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else None
        found[name.replace("-", "_")] = value if joined else "True" if after is None else after
    return found

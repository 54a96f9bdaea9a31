"""The flags that decide a run's numbers, and the differences of two runs in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralib.report.results import WITHOUT_NUMBERS

# Folders and files may move, so only the last names of their paths are compared.
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
class RequestedRun:
    """The settings of a command, as its entry point parses them.

    Attributes:
        arguments: the value of every flag as in run.json; None if the entry point's parser cannot be called.
        given: the flags as they were typed, for such an entry point.
        at_default: the flags that have their defaults.
        data: the names that the data folder may have in the record of a run on the same data.
    """

    task: str
    seed: int
    arm: str  # the name of the method in this sweep
    method: str | None  # its name in run.json; None for an entry point of the user
    entry: str  # the last two parts of the entry point's path
    arguments: Mapping[str, Any] | None
    given: Mapping[str, str]
    at_default: frozenset[str]
    effective_batch: int | None
    data: tuple[str, ...] = ()


def differences(record: Mapping[str, Any], asked: RequestedRun) -> list[str]:
    """The differences between a run's record and a command in settings that decide numbers, in words.

    Args:
        record: the record of a run, whole or compact.
    """
    done = record.get("arguments")
    if not isinstance(done, dict):
        return ["its arguments are not recorded"]
    found = [_say("task", record.get("task"), asked.task)] if record.get("task") != asked.task else []
    seed = done.get("seed", record.get("seed"))
    if seed != asked.seed:
        found.append(_say("seed", seed, asked.seed))
    if asked.method is not None and record.get("method") != asked.method:
        found.append(_say("method", record.get("method"), asked.method))
    if asked.method is None and entry_of(record) not in (None, asked.entry):
        found.append(_say("entry point", entry_of(record), asked.entry))
    if asked.arguments is None:
        return found + [
            _say(k, done[k], v) for k, v in asked.given.items() if k in done and not same_as_typed(done[k], v)
        ]
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
            same = same_value(value, done[name])
        if not same:
            found.append(_say(name, done.get(name, "not recorded"), value))
    return found


def entry_of(record: Mapping[str, Any]) -> str | None:
    """The last two parts of the path of the entry point that wrote a record; None if unknown."""
    command = record.get("command")
    if isinstance(command, list) and command and isinstance(command[0], str):
        return short_path(command[0])
    entry = record.get("entry")
    return entry if isinstance(entry, str) else None


def short_path(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(path).parts[-2:])


def _say(name: str, done: Any, asked: Any) -> str:
    return f"{name} is {done}, requested {asked}"


def _last(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) else value


def same_value(a: Any, b: Any) -> bool:
    """Whether two values are equal. 1 equals 1.0; True does not equal 1; None, "", [] and {} equal each other."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(a) == float(b)
    return a == b or (not a and not b and (a, b) != (0, None) and (a, b) != (None, 0))


def same_as_typed(done: Any, asked: str) -> bool:
    """Whether a recorded value is what was typed: as numbers if both are, otherwise as words without case."""
    try:
        return float(asked) == float(done)
    except (TypeError, ValueError):
        return asked.lower() == str(done).lower()


def typed_flags(words: Sequence[str]) -> dict[str, str]:
    """The flags as they were typed, by name. The last one of a name counts, and one without a value is True."""
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, joined, value = word[2:].partition("=")
        after = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else None
        found[name.replace("-", "_")] = value if joined else "True" if after is None else after
    return found

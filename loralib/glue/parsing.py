"""From the command line, or a JSON or YAML file, to dataclasses of flags; and how a program ends."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from loralib.errors import InputError, RunError


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside each flag, the description's lines as they are."""


class _Parser(HfArgumentParser):
    """Raises a sentence where argparse would print all flags."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}; --help lists all flags.")


def make_parser(*classes: Any, description: str = "") -> HfArgumentParser:
    """The parser of an entry point, its flags grouped by dataclass."""
    usage = "%(prog)s FLAGS\n       %(prog)s FILE.json | FILE.yaml"
    return _Parser(list(classes), description=description, usage=usage, formatter_class=_Help)


def parse(classes: Sequence[type], argv: Sequence[str] | None = None, description: str = "") -> tuple[Any, ...]:
    """Flags, or one .json or .yaml file in their place, as instances of `classes`.

    Raises:
        InputError: an unknown flag or a bad value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(*classes, description=description)
    try:
        if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
            aliases = {
                a.lstrip("-"): f.name
                for c in classes
                for f in dataclasses.fields(c)
                for a in f.metadata.get("aliases", ())
            }
            values = {aliases.get(name, name): value for name, value in _read_config(Path(argv[0])).items()}
            known = [f.name for c in classes for f in dataclasses.fields(c) if f.init]
            _refuse_unknown([k for k in values if k not in known], known)
            _check_types(classes, values)
            return _finite(parser.parse_dict(values))
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        known = [option for action in parser._actions for option in action.option_strings]
        _refuse_unknown([u for u in unknown if u.startswith("-")] or unknown, known)
        return _finite(parsed)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # a stock argument class refuses a value
        raise InputError(" ".join(str(error).split())) from error


def _finite(parsed: Sequence[Any]) -> tuple[Any, ...]:
    """`parsed`, refused where a number is NaN or infinite: it would poison a run or pass for a huge value."""
    for part in parsed:
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if isinstance(value, float) and not math.isfinite(value) and f.name != "max_grad_norm":
                raise InputError(f"{f.name} is {value}, it must be a finite number.")
    return tuple(parsed)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise InputError(f"the file {path} does not exist: give a .json or .yaml file, or flags.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold one mapping of flag names to values.")
    return values


def _refuse_unknown(unknown: Sequence[str], known: Sequence[str]) -> None:
    if unknown:
        name = str(unknown[0]).split("=")[0][:80]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else "--help lists all flags."
        raise InputError(f"{name} is not a flag of this program: {hint}")


def _check_types(classes: Sequence[type], values: dict[str, Any]) -> None:
    """A file bypasses argparse: text that means a number (YAML's "1e-3") becomes one, other mismatches are refused."""
    import typing

    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name not in values or values[f.name] is None:
                continue
            kinds = [t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None)]
            value = values[f.name]
            if value is False and str in kinds and bool not in kinds:
                value = values[f.name] = "no"  # what YAML makes of `save_strategy: no`
            try:
                if kinds == [float] and isinstance(value, str | int) and not isinstance(value, bool):
                    values[f.name] = float(value)
                elif kinds == [int] and (isinstance(value, bool) or int(value) != float(value)):
                    raise ValueError
                elif kinds == [int]:
                    values[f.name] = int(value)
                elif kinds == [bool] and not isinstance(value, bool):
                    raise ValueError
                elif kinds == [str] and not isinstance(value, str):
                    raise ValueError
            except (TypeError, ValueError) as error:
                raise InputError(f"{f.name} is {value!r}, it must be of type {kinds[0].__name__}.") from error
            choices = f.metadata.get("choices")
            if choices and values[f.name] not in choices:
                raise InputError(f"{f.name} is {value!r}, it must be one of {', '.join(map(str, choices))}.")


def command(main: Callable[[], Any]) -> NoReturn:
    """Run an entry point's `main`: what ends a run as one sentence has its own exit status (2, 3, 130 or 143)."""
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
        print(
            f"{Path(sys.argv[0]).name}: stopped by Ctrl-C; the same command goes on from the last checkpoint (SIGTERM "
            "would have written one).",
            file=sys.stderr,
        )
    except (InputError, RunError) as error:
        status = error.exit_status
        rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        # Once is enough for what all processes refuse; but a machine may lack a file, and one process find a full disk.
        if rank == 0 or local_rank == 0 or type(error) is RunError:
            process = f"process {rank}: " if rank else ""
            print(f"{Path(sys.argv[0]).name}: {process}error: {error}", file=sys.stderr)
    sys.exit(status)

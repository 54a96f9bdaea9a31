"""Reads flags from the command line and from JSON or YAML files into dataclasses, and gives `main` its exit status."""

import argparse
import difflib
import errno
import json
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from loralib.errors import InputError, RunError, path_of
from loralib.glue.flagfile import SUFFIXES, read_flags
from loralib.glue.gone import GONE
from loralib.glue.training_flags import REFUSED
from loralib.secrets import hide, is_secret, remember

# Older flag -> (current flag, function that converts the value). If both are given, the later one counts.
OLDER: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "evaluation_strategy": ("eval_strategy", lambda value: value),
    "warmup_ratio": ("warmup_steps", lambda value: value),
    "pad_to_max_length": ("padding", lambda value: "fixed" if value else "longest"),
    "no_cuda": ("use_cpu", lambda value: value),
    "group_by_length": ("train_sampling_strategy", lambda value: "group_by_length" if value else "random"),
    "gradient_checkpointing": ("activation_checkpointing", lambda value: value),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs", lambda value: value),
}
LARGEST_FLOAT = 3.4028234663852886e38  # the largest float32, since a run computes in float32
# Ends of the names of flags that hold paths.
PATHS = ("_dir", "_file", "_path", "_name", "glue_submission", "resume_from_checkpoint")
# The longest path that a run appends to a path of its flags.
LONGEST_SUFFIX = "stage-100/checkpoint-1000000/special_tokens_map.json.tmp"


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag, and keeps the lines of the description."""


def _whole(text: str) -> int:
    """A whole number, which may be written as 1e3 or 8.0."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise ValueError from None
        return int(value)


def _boolean(text: str) -> bool:
    return text.lower() == "on" if text.lower() in ("on", "off") else string_to_bool(text)  # YAML has on and off


def _secret(text: str) -> str:
    remember(text)
    return text


class _Parser(HfArgumentParser):
    """Raises one sentence where argparse would print all flags, and lets the later of two names of a flag count."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, _whole)
        self.register("type", string_to_bool, _boolean)
        for action in self._actions:
            if is_secret(action.dest) and action.nargs is None:
                action.type = _secret
        self.own_defaults = {action.dest: action.default for action in self._actions}

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^(ambiguous option: [^=\s]+)=.* could match", r"\1 could match", message, flags=re.S)
        message = re.sub(r"'([^']{80})[^']*'", r"'\1...'", " ".join(message.split()))
        raise InputError(f"{message[:1].upper()}{message[1:]}; --help lists all flags.")

    def destination(self, word: str) -> str | None:
        """The field that a word of the command line sets; None if the word is not a flag, or an ambiguous one."""
        name = word.partition("=")[0]
        options = {option: action.dest for action in self._actions for option in action.option_strings}
        if not name.startswith("--") or name in options:
            return options.get(name)
        found = {dest for option, dest in options.items() if option.startswith(name)}
        return found.pop() if len(found) == 1 else None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does. If a flag is given under both of its names, the later one counts.

        A misspelt flag is reported before a missing one, because it may be the same flag.
        """
        needed = [action for action in self._actions if action.required]
        for action in needed:
            action.required = False
        try:
            found, unknown = super().parse_known_args(args, namespace)
        finally:
            for action in needed:
                action.required = True
        for action in needed:
            if getattr(found, action.dest) is None:
                _refuse_unknown(self, [word for word in unknown if word.startswith("-")] or unknown)
                raise InputError(f"--{action.dest} is missing: {action.help}")
        order = [self.destination(word) for word in args or ()]
        for pair in ((older, today) for older, (today, _) in OLDER.items()):
            if all(name in order for name in pair):
                earlier = min(pair, key=lambda name: max(i for i, dest in enumerate(order) if dest == name))
                setattr(found, earlier, self.own_defaults[earlier])
        for name, value in vars(found).items():
            check_value(name, value)
        return found, unknown


def make_parser(*classes: Any, description: str = "") -> HfArgumentParser:
    """The parser of an entry point. It groups the flags by dataclass."""
    usage = "%(prog)s [FILE.json | FILE.yaml] FLAGS"
    return _Parser(list(classes), description=description, usage=usage, formatter_class=_Help)


def parse(classes: Sequence[type], argv: Sequence[str] | None = None, description: str = "") -> tuple[Any, ...]:
    """Read flags into instances of `classes`. Files of flags (.json, .yaml) may come first; later flags override.

    Raises:
        InputError: a flag is unknown, or its value is bad.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser: Any = make_parser(*classes, description=description)
    files = flag_files(argv)
    words = [word for file in files for word in _file_words(parser, classes, Path(file))]
    argv = argv[len(files) :]
    _refuse_unknown(parser, [word for word in argv[:1] if not word.startswith("-")])
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            [*words, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except RecursionError as error:
        raise InputError("a flag's value is nested too deeply: give a plain list or mapping.") from error
    except (ValueError, TypeError, ImportError, OverflowError) as error:  # a stock argument class refuses a value
        raise InputError(" ".join(str(error).split())) from error
    _refuse_unknown(parser, [u for u in unknown if u.startswith("-")] or unknown)
    return tuple(parsed)


def flag_files(argv: Sequence[str]) -> list[str]:
    """The files of flags at the beginning of a command line."""
    return list(takewhile(lambda word: word.endswith(SUFFIXES) and not word.startswith("-"), argv))


def _file_words(parser: Any, classes: Sequence[type], path: Path) -> list[str]:
    """The flags of a file as words of a command line. Values that no word can express become defaults of the parser."""
    hints = {name: hint for c in classes for name, hint in typing.get_type_hints(c).items()}
    actions = {action.dest: action for action in reversed(parser._actions)}  # so that --x wins over --no_x
    lists: list[str] = []
    words: dict[str, str] = {}
    keys: dict[str, str] = {}
    for key, value in read_flags(path).items():
        option = f"--{key.lstrip('-').replace('-', '_')}"
        name = parser.destination(option)
        if name is None or name not in hints:
            _refuse_unknown(parser, [option])
        if name in keys:
            raise InputError(f"{path} gives {name} twice, as {keys[name]} and as {key}: keep one of the two.")
        keys[name] = key
        kinds = {typing.get_origin(kind) or kind for kind in (typing.get_args(hints[name]) or (hints[name],))}
        kinds |= {typing.get_origin(hints[name])}
        if isinstance(value, list) and any(not isinstance(item, str) for item in value):
            raise InputError(f"{path}: {key} is a list that holds more than words and numbers.")
        if value is None:
            if type(None) not in kinds:
                raise InputError(f"{path}: {key} is null, and this flag needs a value: leave it out, or give one.")
            parser.set_defaults(**{name: None})
        elif isinstance(value, dict):
            if dict not in kinds:
                raise InputError(f"{path}: {key} is a mapping, it must be one value.")
            if str in kinds:
                words[name] = f"{option}={json.dumps(value)}"
            else:
                parser.set_defaults(**{name: value})
        elif isinstance(value, list) and value and actions[name].nargs == "+":
            if any(item.startswith("-") for item in value):
                raise InputError(f"{path}: {key} is a list with a word that begins with a dash.")
            lists += [option, *value]
        elif isinstance(value, list) and list in kinds and len(value) != 1:
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            if str not in kinds:
                raise InputError(f"{path}: {key} is a list, it must be one value.")
            words[name] = f"{option}={','.join(value)}"
        else:
            off = value.lower() in ("false", "off", "no") and "no" in (actions[name].choices or ())
            words[name] = f"{option}={'no' if off else value}"  # YAML reads "save_strategy: no" as false
    for older, (today, value_of) in OLDER.items():
        if older in words and today in words:
            value, current = (_value(actions[name], words[name]) for name in (older, today))
            default = actions[older].default
            if value == default or (not value and not default):  # the file is a dump of all arguments, with defaults
                del words[older]
            elif current == actions[today].default or value_of(value) == current:
                del words[today]
            else:
                raise InputError(f"{path}: {older} and {today} mean the same and differ here: keep {today}.")
    return [*lists, *words.values()]


def _value(action: Any, word: str) -> Any:
    text = word.partition("=")[2]
    try:
        return {int: _whole, string_to_bool: _boolean}.get(action.type, action.type)(text)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        return text  # the parser will refuse this value


def check_value(name: str, value: Any) -> None:
    """Refuse values that can never work: numbers that are not finite or too large, and paths that cannot exist.

    Raises:
        InputError: the message names the flag, the value and what is allowed.
    """
    if isinstance(value, float) and name != "max_grad_norm":
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}, it must be a finite number.")
        if abs(value) > LARGEST_FLOAT:
            raise InputError(f"{name} is {value}, it must be at most {LARGEST_FLOAT:.3g}, the largest of float32.")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{name} is a number of {len(str(abs(value)))} digits, it must be below 2^63.")
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            check_value(name, item)
    elif isinstance(value, str):
        if "\0" in value:
            raise InputError(f"{name} holds a NUL character, which no text or path may hold.")
        if value.startswith("{"):  # the stock class will read it as JSON
            with suppress(json.JSONDecodeError):
                check_value(name, json.loads(value))
        if name.endswith(PATHS):
            try:
                os.lstat(os.path.join(os.path.expanduser(value), LONGEST_SUFFIX))
            except UnicodeEncodeError as error:
                raise InputError(f"{name} is {value!a:.100}, it holds characters that no path may hold.") from error
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise InputError(
                        f"{name} is {value[:40]}... of {len(value):,} letters, which is too long for a path."
                    ) from error


def _refuse_unknown(parser: Any, words: Iterable[str]) -> None:
    for word in words:
        name = hide(word.split("=")[0][:80])
        plain = name.lstrip("-").replace("-", "_")
        known = [
            option
            for action in parser._actions
            for option in action.option_strings
            if action.dest not in REFUSED and option.lstrip("-").count("-") == 0
        ]
        spelt = f"--{plain}"
        close = [option for option in known if len(plain) > 5 and plain in option]
        close = close or difflib.get_close_matches(spelt, known, n=1, cutoff=0.75)
        if plain in GONE:
            raise InputError(f"{name} is not a flag any more: {GONE[plain]}.")
        if name.endswith(SUFFIXES):
            raise InputError(f"{name} must come before the flags; flags after it override it.")
        hint = f"did you mean {close[0]}?" if close else "--help lists all flags."
        raise InputError(f"{name} is not a flag of this program: {hint}")


def command(main: Callable[[], Any]) -> NoReturn:
    """Run an entry point's `main`. An error that ends a run is printed as one sentence and sets the exit status: 2 for
    bad input, 3 for a run that cannot go on, 130 for Ctrl-C, 143 for SIGTERM."""
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
        print(
            f"{Path(sys.argv[0]).name}: stopped by Ctrl-C, which writes no checkpoint (SIGTERM does). The same command "
            "goes on from the last checkpoint, or starts over if there is none. Leave out --overwrite_output_dir.",
            file=sys.stderr,
        )
    except (InputError, RunError, OSError) as raised:
        error = _sentence(raised) if isinstance(raised, OSError) else raised
        status = error.exit_status
        rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        # One process prints what all of them refuse. But a file may be missing on one machine, or one disk be full.
        if rank == 0 or local_rank == 0 or type(error) is RunError or error is not raised:
            process = f"process {rank}: " if rank else ""
            print(f"{Path(sys.argv[0]).name}: {process}error: {hide(str(error))}", file=sys.stderr)
    sys.exit(status)


def _sentence(error: OSError) -> InputError | RunError:
    """The error for what the system refused, with the path that it names. A library's own OSError is raised again."""
    path = path_of(error)
    if path is not None:
        return InputError(f"{path} cannot be used ({error.strerror}): make it usable, or name another path.")
    if error.errno is None:
        raise error
    return RunError(f"the system refused to go on: {error.strerror}.")

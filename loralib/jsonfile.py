"""The one reader of JSON objects from files that may be missing, cut short or foreign. It needs no torch."""

import json
from pathlib import Path
from typing import Any

from loralib.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        InputError: the file is missing, is cut off, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): make it readable.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({type(error).__name__}): is it cut off?") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} must hold one JSON object, it holds a {type(value).__name__}.")
    return value


def find_json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file, or it holds no object."""
    try:
        return read_json(file)
    except InputError:
        return None

"""Access tokens in flags: everything that a program prints or writes shows `...` in their place.

A parser calls `remember` with the value of every secret field. `hide` then finds the value in any text, in whatever way
its flag was spelt. A program that passes flags on without parsing them, such as a sweep, calls `remember_command`,
which recognises a secret flag by its name, also with dashes or abbreviated.
"""

import re
from collections.abc import Iterable
from typing import Any

HIDDEN = "..."
# Names of secret fields, each with the length from which an abbreviation can mean no other flag.
SECRET_FIELDS = {"token": 3, "hub_token": 5, "push_to_hub_token": 12}
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")  # the form of the hub's own tokens
LONG = 8  # a shorter value may be part of other words, so it is hidden only where it stands alone

_values: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether a flag or field carries a secret: `hub_token`, `--hub-token`, and abbreviations such as `--hub_tok`."""
    name = name.lstrip("-").replace("-", "_")
    return name.endswith("token") or any(
        secret.startswith(name) and len(name) >= shortest for secret, shortest in SECRET_FIELDS.items()
    )


def remember(value: object) -> None:
    """Hide this value from now on. None and empty text are not secrets."""
    if isinstance(value, str) and value.strip():
        _values.update((value, value.strip()))


def remember_command(words: Iterable[str]) -> None:
    """Remember the values of the secret flags of a command line."""
    awaited = False  # whether the next word is the value of a secret flag
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            awaited = is_secret(name) and not equals
            if is_secret(name):
                remember(value)
        elif awaited:
            remember(word)
            awaited = False


def hide(value: Any) -> Any:
    """A text with `...` in place of every secret; of a list or dict of JSON values, the same for all texts in it."""
    if isinstance(value, dict):
        return {hide(k): hide(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [hide(v) for v in value]
    if not isinstance(value, str):
        return value
    for secret in sorted(_values, key=len, reverse=True):
        if len(secret) >= LONG:
            value = value.replace(secret, HIDDEN)
        elif value == secret or value.endswith(f"={secret}"):
            value = value.removesuffix(secret) + HIDDEN
    return HUB_TOKEN.sub(HIDDEN, value)

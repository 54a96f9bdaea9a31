"""Names of a head's outputs: which of them are placeholders, and whether two lists name the same classes."""

import re
from collections.abc import Sequence


def plain_label(name: str) -> str:
    """A label's name in one spelling: without case, `_` and `-`, with single spaces."""
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))


def unnamed_labels(names: Sequence[str]) -> bool:
    """Whether these are the placeholders of transformers (LABEL_0, LABEL_1), which give nothing but a number."""
    return bool(names) and all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def placeholders(number: int) -> tuple[str, ...]:
    """The names that transformers gives to outputs without names."""
    return tuple(f"LABEL_{i}" for i in range(number))


def are_indices(names: Sequence[str]) -> bool:
    """Whether the names are the whole numbers 0, 1 and on, in this order."""
    return list(names) == [str(i) for i in range(len(names))]


def places_in(names: Sequence[str], order: Sequence[str]) -> list[int] | None:
    """The place of each of `names` in `order`; None unless both lists name the same classes.

    Case, spaces, `_` and `-` are ignored if the names stay distinct without them. Placeholders stand for the class at
    their own place, and so do the whole numbers 0, 1 and on where the other list has words.
    """
    if len(names) != len(order):
        return None
    by_place = list(range(len(order)))
    if unnamed_labels(names) or unnamed_labels(order):
        return by_place
    for spelled in (str, plain_label):
        ours, theirs = [spelled(name) for name in names], [spelled(name) for name in order]
        if set(ours) == set(theirs) and len(set(ours)) == len(ours):
            return [theirs.index(name) for name in ours]
    return by_place if are_indices(names) else None

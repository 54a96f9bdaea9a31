"""Names of a head's outputs: which of them mean something, and whether two lists of them are for the same classes."""

import re
from collections.abc import Sequence


def plain_label(name: str) -> str:
    """A label's name without what spellings of one name differ in: case, spaces, `_`, `-`."""
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))


def unnamed_labels(names: Sequence[str]) -> bool:
    """Whether these are the placeholders of transformers (LABEL_0, LABEL_1), which say no more than their number."""
    return bool(names) and all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def placeholders(number: int) -> tuple[str, ...]:
    """Names for outputs that have none, as transformers makes them."""
    return tuple(f"LABEL_{i}" for i in range(number))


def places_in(names: Sequence[str], order: Sequence[str]) -> list[int] | None:
    """For each of `names` its place in `order`; None unless both are for the same classes.

    Case, spaces, `_` and `-` make no difference, where names stay distinct without them. Placeholders and the whole
    numbers 0, 1 and on count by their place.
    """
    if len(names) != len(order):
        return None
    by_place = list(range(len(order)))
    if unnamed_labels(names) or unnamed_labels(order) or list(names) == [str(i) for i in by_place]:
        return by_place
    for spelled in (str, plain_label):
        ours, theirs = [spelled(name) for name in names], [spelled(name) for name in order]
        if set(ours) == set(theirs) and len(set(ours)) == len(ours):
            return [theirs.index(name) for name in ours]
    return None

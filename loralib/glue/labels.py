"""Reads a column of labels, words, numbers or nothing, and turns it into class ids or floats."""

import logging
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset

from loralib.adapters.names import plain_label
from loralib.errors import InputError
from loralib.glue.cells import MIXED, is_number, listed, unmixed, utf8_column
from loralib.glue.tasks import GLUE, Task

logger = logging.getLogger(__name__)

_LIST = re.compile(r"\[.*\]", re.DOTALL)  # as pandas writes a column of lists into a csv file
_WHOLE = re.compile(r"([+-]?\d{1,18})(\.0*)?", re.ASCII)
_MISSING = ("nan", "<na>", "nat")  # pandas writes missing values into texts like this
_INFINITE = ("inf", "+inf", "-inf", "infinity", "+infinity", "-infinity")
_MARKS = ("-1", "-1.0", "-")  # data of the hub, and SNLI's own files, mark rows without a label like this


@dataclass(frozen=True)
class TableFlags:
    """The flags about tables of any format: their columns, the kind of labels, and rows without a label."""

    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    label_type: str | None = None  # classes or regression
    unlabelled: str = "refuse"  # or drop


@dataclass
class Labels:
    """A column of labels by its distinct values: row `i` has the label `words[of_row[i]]`.

    Numbers are words too, as they are written. A word has no spaces at its ends. The words of a ClassLabel are its
    names. A missing value is the word "".
    """

    words: list[str]
    of_row: np.ndarray  # (rows,) places in `words`
    names: tuple[str, ...] | None  # the names of a ClassLabel, in its order
    is_float: bool  # stored as floats, and not as digits in a text
    is_text: bool
    spaced: list[str]  # values that had spaces at their ends

    def rows(self, words: Collection[str]) -> np.ndarray:
        """The rows that have one of the words."""
        return np.flatnonzero(np.isin(self.of_row, [i for i, word in enumerate(self.words) if word in words]))

    def describe_rows(self, words: Collection[str]) -> str:
        """Describe the rows that have one of the words: `row 3 (counted from 0) and 7 others have the label '-1'`."""
        rows = self.rows(words)
        others = f" and {len(rows) - 1} other{'s' if len(rows) > 2 else ''} have" if len(rows) > 1 else " has"
        word = self.words[self.of_row[rows[0]]]
        return f"row {rows[0]} (counted from 0){others} " + (f"the label {word[:80]!r}" if word else "no label")


def read_labels(dataset: Dataset, where: str) -> Labels:
    """Read the column `label`.

    Raises:
        InputError: a value (a list, a date, ...) cannot be a label; the message names the first such row.
    """
    feature = dataset.features["label"]
    column = utf8_column(dataset, "label", where)
    kind = column.type
    if kind == MIXED:
        values = unmixed(column)
        _refuse_values(where, values, [isinstance(value, list | dict) for value in values], "a list or an object")
        halves = [isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value) for value in values]
        _refuse_values(where, [ascii(value) for value in values], halves, "a text with half of a character")
        keys = [(type(value), value) for value in values]  # 1 and True are different labels
        place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        distinct, of_row = [value for _, value in place], np.array([place[key] for key in keys], dtype=np.int64)
    else:
        plain = any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean,
                    pa.types.is_string, pa.types.is_large_string, pa.types.is_null))  # fmt: skip
        if not plain:
            _refuse_values(where, column, [value.is_valid for value in column], f"of type {kind}")
            column = pa.chunked_array([pa.nulls(len(column))])
        column = column.cast(pa.float32()) if kind == pa.float16() else column
        encoded = column.combine_chunks()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        encoded = encoded.dictionary_encode(null_encoding="encode")
        distinct, of_row = encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    words = [_word(value, names) for value in distinct]
    places = {word: i for i, word in enumerate(dict.fromkeys(words))}
    of_distinct = np.array([places[word] for word in words], dtype=np.int64)
    return Labels(
        words=list(places),
        of_row=of_distinct[of_row] if len(distinct) else np.zeros(0, np.int64),
        names=names,
        is_float=pa.types.is_floating(kind),
        is_text=pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == MIXED,
        spaced=[v for v, word in zip(distinct, words, strict=True) if isinstance(v, str) and word and v != word],
    )


def _refuse_values(where: str, values: Any, bad: Sequence[bool], kind: str) -> None:
    if any(bad):
        row = list(bad).index(True)
        value = values[row].as_py() if isinstance(values[row], pa.Scalar) else values[row]
        raise InputError(
            f"{where}: row {row} (counted from 0) has the label {str(value)[:80]}, {kind}: a label may be a text, a "
            "whole number, a float, or true or false; several labels per row (multi-label) are not supported."
        )


def _word(value: Any, names: tuple[str, ...] | None) -> str:
    if value is None:
        return ""
    if names is not None and isinstance(value, int):
        return names[value].strip() if 0 <= value < len(names) else "-1" if value == -1 else f"id {value}"
    return str(value).strip()


def _whole(word: str) -> str:
    """As the name of a class, 1.0 and 1. become 1; any other word stays."""
    match = _WHOLE.fullmatch(word)
    return match[1] if match else word


# Which words mean that a row has no label


def _missing(labels: Labels, flags: TableFlags, names: Collection[str]) -> set[str]:
    """The words that mean "no label": the empty one, and nan, <na> and nat in any case.

    Such a word of a text column is a class if --label_type is classes, or if a class has that name.
    """
    are_classes = flags.label_type == "classes" and labels.is_text
    return {w for w in labels.words if not w or (w.casefold() in _MISSING and w not in names and not are_classes)}


def classes_of(labels: Labels, flags: TableFlags, where: str) -> tuple[str, ...] | None:
    """The classes of a generic task, in their order; None for a regression (ledger D1).

    Without `label_type`, labels are a regression if they are floats, or texts of numbers that are not all whole.
    Otherwise they are classes.

    Raises:
        InputError: the labels can be read in two ways, or there are fewer than two classes.
    """
    if labels.names is not None:
        return None if flags.label_type == "regression" else labels.names
    words = [w for w in labels.words if w not in _missing(labels, flags, ())]
    if flags.label_type == "regression":
        return None
    whole = [_WHOLE.fullmatch(w) is not None for w in words]
    if flags.label_type is None:
        if bad := [w for w in words if w.casefold() in _INFINITE]:
            raise InputError(
                f"{where}: {labels.describe_rows(bad)}, which is not a finite number: repair the row, or give "
                "--label_type classes if it is the name of a class."
            )
        digits = labels.is_text and all(map(is_number, words))
        if words and (labels.is_float or (digits and not all(_WHOLE.fullmatch(w) and "." not in w for w in words))):
            if all(whole):
                logger.warning("%s: the labels %s are floats and make a regression; --label_type classes makes them "
                               "classes.", where, listed(words))  # fmt: skip
            return None
        if labels.is_text and words and all(re.fullmatch(r"[+-]?\d+,\d+", w) for w in words):
            raise InputError(f"{where}: {labels.describe_rows(words)}, a number with a comma: write it with a point.")
        broken = [w for w in words if is_number(w) and not _WHOLE.fullmatch(w)]
        if broken and (bad := [w for w in words if not is_number(w)]) and not labels.is_float:
            raise InputError(
                f"{where}: {labels.describe_rows(bad)}, among numbers such as {broken[0]}: repair the row, or give "
                "--label_type classes if all of them are names of classes."
            )
    # "-" is a class beside "+"
    marks = [w for w in words if w in _MARKS[:2] or (w == "-" and "+" not in words)]
    if marks and flags.unlabelled == "drop":
        words = [w for w in words if w not in marks]
        whole = [_WHOLE.fullmatch(w) is not None for w in words]
    elif marks and flags.label_type is None:
        raise InputError(
            f"{where}: {labels.describe_rows(marks)}. It may mean 'no label' or be a class: --unlabelled drop leaves "
            "such rows out, --label_type classes makes it a class, --label_type regression a number."
        )
    if flags.label_type is None and words and all(_LIST.fullmatch(w) for w in words):
        raise InputError(
            f"{where}: {labels.describe_rows(words)}, and all labels look like lists: several labels per row "
            "(multi-label) are not supported; --label_type classes makes each text a class."
        )
    if all(whole):
        words = sorted({_whole(w) for w in words}, key=lambda w: (int(w), w))
    else:
        words = sorted(words)
    if not words:
        raise InputError(f"{where} has no label in any of its {len(labels.of_row)} rows: --label_column names another "
                         "column.")  # fmt: skip
    if len(words) < 2:
        raise InputError(f"{where} has only one label, {', '.join(words)}: a classification needs two or more classes, "
                         "a regression needs floats (or --label_type regression).")  # fmt: skip
    _warn_of_classes(words, len(labels.of_row), where)
    return tuple(words)


def _warn_of_classes(names: Sequence[str], rows: int, where: str) -> None:
    if len(names) > 20 and 2 * len(names) > rows:
        logger.warning("%s: %d classes in %d rows: --label_type regression makes them numbers, --label_column names "
                       "another column.", where, len(names), rows)  # fmt: skip
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(name.casefold(), []).append(name)
    if alike := [", ".join(group) for group in spellings.values() if len(group) > 1]:
        logger.warning("%s: labels that differ only in case are different classes: %s.", where, listed(alike))
    if words := [name for name in names if name.casefold() in ("none", "null", "na", "n/a")]:
        logger.warning("%s: %s is taken for a class, not for a missing label.", where, listed(words))


# From words to ids and floats


def label_ids(task: Task, trained: bool) -> dict[str, int]:
    """The id of the class for which each word stands.

    These words are the names of the classes and, for GLUE's tasks, the ids in GLUE's own order, which may differ from
    that of `task.label_names`. `trained`: the names come from a trained model; then a whole number stands for the class
    with that index.
    """
    names = task.label_names or ()
    ids = {name: i for i, name in enumerate(names)}
    if task.name in GLUE:
        order = {plain_label(name): i for i, name in enumerate(names)}
        numbers = {str(i): order[plain_label(name)] for i, name in enumerate(GLUE[task.name].label_names or ())}
    else:
        numbers = by_index(names) if trained else {}
    return numbers | ids


def by_index(names: Sequence[str]) -> dict[str, int]:
    """The indices 0 to n - 1 as words, for classes whose names are words; {} if a name is a number itself."""
    return {} if any(map(is_number, names)) else {str(i): i for i in range(len(names))}


def label_values(
    labels: Labels, task: Task, flags: TableFlags, where: str, is_test: bool, trained: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Turn labels into ids or floats.

    A test split keeps all of its rows. If its labels are hidden or cannot be used, all of them become -1.

    Returns:
        The values of all rows, and the rows that are kept (None: all).

    Raises:
        InputError: a training or validation row has no proper label; the message names the first one.
    """
    names = task.label_names or ()
    values: dict[str, float]
    if task.label_names is None:
        low, high = task.label_range or (-math.inf, math.inf)
        allowed = f"a finite number from {low} to {high}" if task.label_range else "a finite number"
        values = {w: float(w) for w in labels.words if is_number(w) and low <= float(w) <= high}
    else:
        ids = label_ids(task, trained)
        allowed = listed(list(ids))
        named = trained or task.name in GLUE  # otherwise the classes are spelled as in the file
        spelled = {plain_label(name): i for i, name in enumerate(names)} if named else {}
        values = {}
        for word in labels.words:
            found = next((ids[w] for w in (word, _whole(word)) if w in ids), spelled.get(plain_label(word)))
            if found is not None:
                values[word] = found
    missing = _missing(labels, flags, names)
    if task.label_names is not None or task.label_range is not None:
        missing |= {w for w in _MARKS if w in labels.words}
    missing -= values.keys()
    bad = [w for w in labels.words if w not in values and w not in missing]
    if is_test and (bad or missing):
        if bad or len(labels.rows(missing)) < len(labels.of_row):
            logger.warning("%s: its labels are ignored: %s. Allowed: %s.", where, labels.describe_rows(bad or missing),
                           allowed)  # fmt: skip
        return np.full(len(labels.of_row), -1), None
    if bad:
        raise InputError(f"{where}: {labels.describe_rows(bad)}. Allowed: {allowed}. Repair or remove the row.")
    keep = None
    if missing:
        rows = labels.rows(missing)
        if flags.unlabelled != "drop":
            also = " (-1 or nothing marks hidden labels)" if missing & {"", *_MARKS} else ""
            way = "; --label_type classes makes it a class" if missing - {"", *_MARKS} and labels.is_text else ""
            raise InputError(
                f"{where}: {labels.describe_rows(missing)}{also}. Allowed: {allowed}. Repair the row, or leave such "
                f"rows out with --unlabelled drop{way}."
            )
        logger.warning("%s: %d of %d rows have no label and are left out (--unlabelled drop).", where, len(rows),
                       len(labels.of_row))  # fmt: skip
        keep = np.setdiff1d(np.arange(len(labels.of_row)), rows)
        if not len(keep):
            raise InputError(f"{where} has no row with a label: it needs at least 1.")
    if trained and task.name not in GLUE and {*map(_whole, labels.words)} & by_index(names).keys():
        logger.info("%s: its labels are numbers, which are read as indices into %s.", where, listed(names))
    return np.array([values.get(w, -1) for w in labels.words])[labels.of_row], keep

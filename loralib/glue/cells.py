"""Cells of a table: columns of one type or of several, texts and numbers; and lists of names for messages."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Value

from loralib.errors import InputError

# The type of a column whose values have no common type; it keeps each value as JSON. Such a column is refused only if
# it is used.
MIXED = pa.struct([("any JSON value", pa.string())])
# Python also reads 1_1, nan, inf and the digits of other scripts as numbers; in a label they are words.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def typed(values: list[Any]) -> pa.Array:
    """A column of Python values; its type is MIXED if they have no common type."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return mixed(values)


def mixed(values: Sequence[Any]) -> pa.Array:
    """A column of type MIXED."""
    as_json = [None if value is None else {"any JSON value": json.dumps(value, default=str)} for value in values]
    return pa.array(as_json, MIXED)


def is_mixed(feature: object) -> bool:
    """Whether a feature of `datasets` describes a column of type MIXED."""
    return isinstance(feature, dict) and set(feature) == {MIXED.field(0).name}


def unmixed(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column of type MIXED, as they were in the file."""
    return [None if value is None else json.loads(value["any JSON value"]) for value in column.to_pylist()]


def joined(columns: Sequence[pa.Array | pa.ChunkedArray]) -> pa.ChunkedArray:
    """The pieces of a column as one column of their common type, or of type MIXED if they have none."""
    chunks = [chunk for column in columns for chunk in (column.chunks if hasattr(column, "chunks") else [column])]
    try:
        schemas = [pa.schema([("column", column.type)]) for column in columns]
        target = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        return pa.chunked_array([chunk.cast(target) for chunk in chunks], target)
    except pa.ArrowException:  # there is no common type, or a whole number is too large for a float
        pass
    values = [unmixed(c) if c.type == MIXED else c.to_pylist() for c in chunks]
    return pa.chunked_array([mixed(piece) for piece in values], MIXED)


def column_of(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One column, in the order of the data set's rows."""
    column = dataset.select_columns([name]).with_format("arrow")[:][name]
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def utf8_column(dataset: Dataset, name: str, where: str) -> pa.ChunkedArray:
    """One column. Its texts are checked to be UTF-8, because the reader of parquet files does not check it.

    Raises:
        InputError: a text is not UTF-8; the message names its row.
    """
    column = column_of(dataset, name)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        for row, cell in enumerate(column.cast(pa.large_binary()) if is_text(dataset.features[name]) else ()):
            try:
                (cell.as_py() or b"").decode("utf-8")
            except UnicodeDecodeError:
                raise InputError(
                    f"{where}: row {row} (counted from 0) has {cell.as_py()[:80]!r} in {name}, which is not UTF8: "
                    "write the text in UTF-8."
                ) from error
        raise InputError(
            f"{where} is damaged in its column {name} ({' '.join(str(error).split())[:200]}): write it again."
        ) from error
    return column


def is_text(feature: object) -> bool:
    """Whether a column holds texts."""
    return isinstance(feature, Value) and "string" in feature.dtype


def first_bad_text(column: pa.ChunkedArray) -> tuple[int, object] | None:
    """The first row of a MIXED column without a proper text, and its value; None if all rows have one."""
    for row, value in enumerate(unmixed(column)):
        if not isinstance(value, str):
            return row, value
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return row, value
    return None


def is_number(word: str) -> bool:
    """Whether a cell holds a finite number in the usual notation."""
    return _NUMBER.fullmatch(word) is not None and math.isfinite(float(word))


def listed(names: Sequence[str]) -> str:
    """The first twenty of some names, for a message of one line."""
    shown = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:80]) for name in names[:20])
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")

"""What the cells of a table hold: columns of one type or of several, texts, numbers; and lists of names in messages."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Value

from loralib.errors import InputError

# A column of a JSON file whose values have no common type: each value as JSON. It harms only where it is used.
MIXED = pa.struct([("any JSON value", pa.string())])
# Python reads 1_1, nan, inf and the digits of other scripts as numbers too, which nobody means by such a label.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def typed(values: list[Any]) -> pa.Array:
    """A column of Python's values, of type MIXED where they have no common type."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return mixed(values)


def mixed(values: Sequence[Any]) -> pa.Array:
    """A column of type MIXED."""
    as_json = [None if value is None else {"any JSON value": json.dumps(value, default=str)} for value in values]
    return pa.array(as_json, MIXED)


def is_mixed(feature: object) -> bool:
    """Whether a feature of `datasets` is that of a column of type MIXED."""
    return isinstance(feature, dict) and set(feature) == {MIXED.field(0).name}


def unmixed(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column of type MIXED as they stand in the file."""
    return [None if value is None else json.loads(value["any JSON value"]) for value in column.to_pylist()]


def joined(columns: Sequence[pa.Array | pa.ChunkedArray]) -> pa.ChunkedArray:
    """The pieces of one column, of their common type; of type MIXED where they have none."""
    chunks = [chunk for column in columns for chunk in (column.chunks if hasattr(column, "chunks") else [column])]
    try:
        schemas = [pa.schema([("column", column.type)]) for column in columns]
        target = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        return pa.chunked_array([chunk.cast(target) for chunk in chunks], target)
    except pa.ArrowException:  # no common type, or a whole number that no float holds
        pass
    values = [unmixed(c) if c.type == MIXED else c.to_pylist() for c in chunks]
    return pa.chunked_array([mixed(piece) for piece in values], MIXED)


def column_of(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One column, in the order of the data set's rows."""
    column = dataset.select_columns([name]).with_format("arrow")[:][name]
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def utf8_column(dataset: Dataset, name: str, where: str) -> pa.ChunkedArray:
    """A column whose texts are UTF-8, which reading a parquet file does not look at."""
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
            f"{where} is damaged in its column {name} ({' '.join(str(error).split())[:200]}): write it anew."
        ) from error
    return column


def is_text(feature: object) -> bool:
    """Whether a column holds texts."""
    return isinstance(feature, Value) and "string" in feature.dtype


def first_bad_text(column: pa.ChunkedArray) -> tuple[int, object] | None:
    """The first row of a MIXED column that holds something else than a text, and what it holds."""
    for row, value in enumerate(unmixed(column)):
        if not isinstance(value, str):
            return row, value
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return row, value
    return None


def is_number(word: str) -> bool:
    """Whether a label, or any cell, is a finite number as one writes it."""
    return _NUMBER.fullmatch(word) is not None and math.isfinite(float(word))


def listed(names: Sequence[str]) -> str:
    """Names as a message has them: the first twenty."""
    return ", ".join(name[:80] for name in names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")

"""The rows of a split as a run uses them: checked texts and labels, and no other columns."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value

from loralib.errors import InputError
from loralib.glue.cells import MIXED, column_of, first_bad_text, is_text, utf8_column
from loralib.glue.labels import TableFlags, label_values, read_labels
from loralib.glue.tasks import Task

logger = logging.getLogger(__name__)


def checked_rows(
    table: Dataset, task: Task, where: str, flags: TableFlags, *, is_test: bool, trained: bool, spaced: list[str]
) -> Dataset:
    """The text columns and `label` of one split.

    Args:
        trained: whether the classes come from a trained model.
        spaced: a list to which labels with spaces at their ends are added.

    Raises:
        InputError: a column is missing, or a row has no text or no proper label; the message names the first one.
    """
    needed = [*task.text_columns, *([] if is_test else ["label"])]
    if missing := [name for name in needed if name not in table.column_names]:
        flag = f" (label_column is {flags.label_column!r})" if "label" in missing and flags.label_column else ""
        raise InputError(
            f"{where}: its columns {', '.join(table.column_names)} do not fit {task.name}, which needs "
            f"{', '.join(needed)}: {', '.join(missing)} not found{flag}."
        )
    if len(table) == 0:
        raise InputError(f"{where} has no rows: it needs at least 1.")
    for name in task.text_columns:
        _check_texts(table, name, task, where)
    rows = table.select_columns(list(task.text_columns))
    dtype = "float32" if task.label_names is None else "int64"
    if "label" not in table.column_names:
        return rows.add_column("label", [-1] * len(rows), feature=Value(dtype))
    feature = table.features["label"]
    try:
        labels = read_labels(table, where)
    except InputError as error:
        if not is_test:
            raise
        logger.warning("%s: its labels are ignored (%s).", where, error)
        return rows.add_column("label", [-1] * len(rows), feature=Value(dtype))
    values, keep = label_values(labels, task, flags, where, is_test, trained)
    spaced.extend(labels.spaced)
    if keep is not None:
        table, rows, values = table.select(keep), rows.select(keep), values[keep]
    if (
        isinstance(feature, ClassLabel)
        and keep is None
        and np.array_equal(values, column_of(table, "label").to_numpy())
    ):
        return table.select_columns([*task.text_columns, "label"])  # unchanged, so that the hub's cache is used
    return rows.add_column("label", values, feature=Value(dtype))


def _check_texts(table: Dataset, name: str, task: Task, where: str) -> None:
    column = utf8_column(table, name, where)
    if column.type == MIXED:
        row, value = first_bad_text(column) or (0, None)
        raise InputError(f"{where}: row {row} (counted from 0) has {str(value)[:80]!r} in {name} where a text is "
                         "needed.")  # fmt: skip
    if not is_text(table.features[name]) and column.type != pa.null():
        raise InputError(f"{where}: column {name} holds {table.features[name]} where texts are needed.")
    blank = pc.equal(pc.utf8_trim_whitespace(column.cast(pa.large_string())), "")
    empty = pc.indices_nonzero(pc.fill_null(blank, True))
    if not len(empty):
        return
    # QQP's release has a few questions without words. Everywhere else an empty text is a mistake in the data.
    if not task.drops_cut_rows or column.null_count:
        row = empty[0].as_py()
        others = f", and {len(empty) - 1} others have one too" if len(empty) > 1 else ""
        raise InputError(f"{where}: row {row} (counted from 0) has an empty {name}{others}: fill or remove such rows.")
    logger.warning("%s: %d rows have an empty %s, as released.", where, len(empty), name)

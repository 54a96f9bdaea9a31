"""Recognises the task of a table: one of GLUE's, that of a trained model, or a generic one."""

import logging
from collections.abc import Callable
from dataclasses import replace

from datasets import ClassLabel, Dataset, Value

from loralib.adapters.names import plain_label, unnamed_labels
from loralib.errors import InputError
from loralib.glue.cells import listed
from loralib.glue.columns import find_text_columns, guess_texts
from loralib.glue.labels import TableFlags, classes_of, label_ids, read_labels
from loralib.glue.sources import Source, use_of
from loralib.glue.tasks import GLUE, Task

logger = logging.getLogger(__name__)

_METRICS = {"classification": ("accuracy",), "regression": ("mse", "pearson", "spearmanr")}


def recognise(
    first_split: tuple[str, Dataset],
    read_class_split: Callable[[], tuple[str, Dataset]],
    source: Source,
    task_of_flag: Task | None,
    known: Task | None,
    flags: TableFlags,
) -> Task:
    """The task of the data (ledger D1).

    Args:
        first_split: name and rows of a split that this run reads.
        read_class_split: reads the split that should have all classes.
        source: where the data is.
        task_of_flag: the task of `task_name`.
        known: the task of a trained model.

    Raises:
        InputError: the data contradicts a flag, the task or the trained model, or its columns cannot be told apart.
    """
    split, table = first_split
    where = source.splits[split].where
    glue = task_of_flag
    for task in (source.suggested_task, GLUE.get(known.name) if known is not None else None):
        if glue is None and task is not None and not flags.text_columns and _fits(table, task, where):
            glue = task
            logger.info("Task %s: %s has its name and its columns.", task.name, source.place)
    if known is not None:
        if unnamed_labels(known.label_names or ()):
            known = replace(known, label_names=_names_for(known, glue, read_class_split, source, flags))
        task = _of_known(known, glue, table, where, source, flags)
    elif glue is not None:
        task = glue
    else:
        task = _generic(*read_class_split(), source, flags)
    kind = "regression" if task.label_names is None else "classes"
    if flags.label_type not in (None, kind):
        raise InputError(f"label_type is {flags.label_type} and {task.name} is a task of {kind}: leave the flag out.")
    return task


def _fits(table: Dataset, task: Task, where: str) -> bool:
    """Whether the table has the task's text columns, and no labels whose type belongs to another task.

    Raises:
        InputError: only one of two text columns is there.
    """
    missing = [name for name in task.text_columns if name not in table.column_names]
    if missing and len(missing) < len(task.text_columns):
        raise InputError(
            f"{where} is named like {task.name} and lacks its column {missing[0]} (it has "
            f"{listed(table.column_names)}): add the column; or, for data of another task, rename the folder or name "
            "the columns with --text_column and --text_column_2."
        )
    if missing:
        return False
    feature = table.features.get("label")
    if isinstance(feature, ClassLabel):
        return task.label_names is not None and set(feature.names).issubset(label_ids(task, False))
    floats = isinstance(feature, Value) and feature.dtype.startswith("float")
    return not (floats and task.label_names is not None)


def _of_known(known: Task, glue: Task | None, table: Dataset, where: str, source: Source, flags: TableFlags) -> Task:
    """The task `known` of a trained model, with the text columns of the data."""
    if glue is not None:
        ours, theirs = glue.label_names, known.label_names
        differ = (ours is None) != (theirs is None)
        if differ or {*map(plain_label, ours or ())} != {*map(plain_label, theirs or ())}:
            raise InputError(
                f"{source.place} is {glue.name} with {_labels_in_words(glue)}, and the trained model knows "
                f"{_labels_in_words(known)}: use data of the task that it was trained on."
            )
        return replace(glue, label_names=known.label_names)
    texts = known.text_columns
    if flags.text_columns:
        texts = find_text_columns(table, flags, where)
    elif not texts or not set(texts).issubset(table.column_names):
        texts = guess_texts(table, where)
    if known.text_columns and len(texts) != len(known.text_columns):
        raise InputError(
            f"{where}: the trained model reads {' and '.join(known.text_columns)}, but the texts of this file are "
            f"{' and '.join(texts)}: name as many with --text_column and --text_column_2."
        )
    trained = GLUE[known.name].text_columns if known.name in GLUE else texts
    if len(texts) != len(trained):
        logger.warning("%s: the trained model is for %s, which reads %s, but here is only %s.", where, known.name,
                       " and ".join(trained), " and ".join(texts))  # fmt: skip
    kind = "regression" if known.label_names is None else "classification"
    logger.info("%s: %s of %s, with %s of the trained model.", where, kind, " and ".join(texts),
                _labels_in_words(known))  # fmt: skip
    return Task(kind, texts, known.label_names, known.metrics or _METRICS[kind])


def _names_for(
    known: Task,
    glue: Task | None,
    read_class_split: Callable[[], tuple[str, Dataset]],
    source: Source,
    flags: TableFlags,
) -> tuple[str, ...]:
    """Names for the classes of a head without names: those of the task or of the data, if there are as many.

    Whole numbers stand for the index of a class, even if the data lacks some of them. Without labels the names are
    numbers.
    """
    numbers = tuple(map(str, range(known.num_labels)))
    if glue is not None:
        named = glue
    else:
        split, table = read_class_split()
        if use_of(split) == "test" or "label" not in table.column_names:
            return numbers
        where = source.splits[split].where
        labels = read_labels(table, where)
        if labels.names is None and not labels.is_float and {*labels.words} - {"", "-1"} <= {*numbers}:
            return numbers
        named = Task("data", (), classes_of(labels, flags, where), ())
    if named.label_names is None or named.num_labels != known.num_labels:
        raise InputError(
            f"{source.place} has {_labels_in_words(named)}, and the trained model has {known.num_labels} classes "
            f"without names: give data with all {known.num_labels} of them, or numbers from 0 to "
            f"{known.num_labels - 1}."
        )
    return named.label_names


def _generic(split: str, table: Dataset, source: Source, flags: TableFlags) -> Task:
    where = source.splits[split].where
    if len(table) == 0:
        raise InputError(f"{where} has no rows: it needs at least 1.")
    texts = find_text_columns(table, flags, where) if flags.text_columns else guess_texts(table, where)
    if "label" not in table.column_names:
        name = f"{flags.label_column!r} (label_column)" if flags.label_column else "`label`"
        way = "name the one that holds the labels with --label_column"
        if use_of(split) == "test":
            way = "give train_file, whose labels are the classes, or task_name"
        raise InputError(f"{where} has no column {name} among {listed(table.column_names)}: {way}.")
    names = classes_of(read_labels(table, where), flags, where)
    kind = "regression" if names is None else "classification"
    task = Task(kind, texts, names, _METRICS[kind])
    logger.warning(
        "%s is %s, so this is a generic %s. Texts: %s (--text_column). Labels: column %s (--label_column), which "
        "holds %s (--label_type). For a GLUE task give --task_name.",
        source.place,
        f"named like {source.suggested_task.name} but has other columns or labels"
        if source.suggested_task
        else "not recognised as a GLUE task",
        kind,
        " and ".join(texts),
        flags.label_column or "label",
        "numbers" if names is None else listed(names),
    )
    return task


def _labels_in_words(task: Task) -> str:
    return "float labels" if task.label_names is None else f"the labels {listed(task.label_names)}"

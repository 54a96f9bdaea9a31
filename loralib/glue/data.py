"""Loads the rows of a task from its name, a folder or files. All routes give the same text columns and `label`."""

import logging
from dataclasses import dataclass

from datasets import Dataset

from loralib.errors import InputError
from loralib.glue.cells import listed
from loralib.glue.columns import find_text_columns, rename_label_column, rename_texts
from loralib.glue.labels import TableFlags
from loralib.glue.recognise import recognise
from loralib.glue.rows import checked_rows
from loralib.glue.sources import USES, find, use_of
from loralib.glue.tasks import GLUE, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GlueData:
    """The rows of a run. The keys of `evals` and `tests` are the task's name, and `mnli-mm` for MNLI's mismatched half.

    Each dataset has the task's text columns and `label`: int64 ids in the order of `task.label_names`, or float32. If
    the labels of a test split are hidden, absent or useless, all of them are -1.
    """

    task: Task
    train: Dataset | None
    evals: dict[str, Dataset]
    tests: dict[str, Dataset]


def load(
    *,
    task_name: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    text_column: str | None = None,
    text_column_2: str | None = None,
    label_column: str | None = None,
    label_type: str | None = None,
    unlabelled: str = "refuse",
    do_train: bool = False,
    do_eval: bool = False,
    do_predict: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    known: Task | None = None,
) -> GlueData:
    """Load the splits that a run needs and decide which task they are (ledger D1; docs/data.md has the details).

    `task_name` decides. Without it, the last part of the path `dataset_name` decides, if it is the name of a task and
    the columns fit. Otherwise the data is a generic classification or regression task, and the log says so. The hub is
    never asked for a `dataset_name` that exists as a folder.

    Args:
        known: the task of a trained model (an adapter, a model, a checkpoint). Its `label_names`, None for a
            regression, decide the kind and the order of the classes, so `GlueData.task` may have another order than
            `GLUE[task.name]`; loralib/glue/labels.py says how labels match them. If its `text_columns` are empty, the
            file decides which columns hold the texts; empty `metrics` stand for those of the kind.
        others: the flags of the same names.

    Raises:
        InputError: something cannot be used; the message says what.
    """
    wanted = {"train": do_train, "validation": do_eval, "test": do_predict}
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_predict_samples}
    for use, flag in (("train", "max_train_samples"), ("validation", "max_eval_samples"),
                      ("test", "max_predict_samples")):  # fmt: skip
        limit = limits[use]
        if limit is not None and limit < 1:
            raise InputError(f"{flag} is {limit} but must be at least 1: leave it out to use every row.")
    if task_name is not None and task_name.lower() not in GLUE:
        raise InputError(
            f"task_name {task_name!r} is not a GLUE task: use one of {', '.join(GLUE)}, or leave it out and give "
            "dataset_name, or train_file and validation_file."
        )
    texts = tuple(name for name in (text_column, text_column_2) if name is not None)
    if label_column is not None and label_column in texts:
        raise InputError(f"label_column {label_column!r} is named as a text column too: name another one.")
    flags = TableFlags(texts, label_column, label_type, unlabelled)
    named = GLUE[task_name.lower()] if task_name is not None else None
    source = find(
        named,
        dataset_name,
        dataset_config_name,
        {"train": train_file, "validation": validation_file, "test": test_file},
        {"train": train_split, "validation": validation_split, "test": test_split},
        wanted,
        cache_dir,
        token,
    )

    def read(split: str) -> Dataset:
        table, where = source.splits[split].read(), source.splits[split].where
        texts = find_text_columns(table, flags, where)  # first, because the next line may rename a column to `label`
        table = rename_label_column(table, flags, where)
        return rename_texts(table, texts, named.text_columns if named else texts, where) if texts else table

    # The training split comes first.
    by_use = [split for use in USES for split in source.splits if use_of(split) == use]
    tables = {split: read(split) for split in by_use if wanted[use_of(split)]}
    if not by_use:
        raise InputError(f"{source.place} has no train, validation or test split: name one with --train_split.")

    def with_classes() -> tuple[str, Dataset]:
        """The training split, even if this run does not train; without one, the next split."""
        split = by_use[0]
        return split, tables[split] if split in tables else read(split)

    first = next(iter(tables.items()), None) or with_classes()
    task = recognise(first, with_classes, source, named, known, flags)
    spaced: list[str] = []
    rows = {}
    for split, table in tables.items():
        checked = checked_rows(
            table,
            task,
            source.splits[split].where,
            flags,
            is_test=use_of(split) == "test",
            trained=known is not None,
            spaced=spaced,
        )
        limit = limits[use_of(split)]
        rows[split] = checked.select(range(min(limit, len(checked)))) if limit is not None else checked
    if spaced:
        shown = listed([repr(label) for label in dict.fromkeys(spaced)])
        logger.warning("%s: spaces at the ends of labels do not count: %s.", source.place, shown)
    for use in ("validation", "test"):
        halves = [split for split in rows if use_of(split) == use]
        if task.name == "mnli" and len(halves) == 1:
            logger.warning("%s has only %s of MNLI's two %s splits: that one is used.", source.place,
                           source.splits[halves[0]].name, use)  # fmt: skip

    def keyed(use: str) -> dict[str, Dataset]:
        # Sorting puts matched before mismatched, as in GLUE's reports.
        halves = sorted(split for split in rows if use_of(split) == use)
        return {task.name + ("-mm" if split.endswith("_mismatched") else ""): rows[split] for split in halves}

    return GlueData(task, rows.get("train"), keyed("validation"), keyed("test"))

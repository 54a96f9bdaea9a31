"""Writes predictions: a readable file for each split, and the files that GLUE's server takes."""

import csv
import io
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
from datasets import Dataset

from loralib.adapters.writing import write_file
from loralib.errors import InputError
from loralib.glue.tasks import GLUE, Task, glue_ids

logger = logging.getLogger(__name__)


def write_predictions(
    output_dir: str | os.PathLike[str],
    split_name: str,
    labels: np.ndarray,
    task: Task,
    scores: np.ndarray | None = None,
) -> Path:
    """Write predict_results_<split_name>.txt: the position of each row, its label's name or number, and its scores.

    Columns are separated by tabs. As by the csv module, a cell with a tab, a line end or a quote mark is quoted, and
    its quote marks are doubled. A number is the shortest decimal that restores the float32.

    Args:
        split_name: a key of `GlueData.tests`.
        labels: (rows,) ids or floats, from `metrics.to_labels`.
        scores: (rows, columns), from `metrics.to_scores`: the probability of each class, or the output of a regression.
    """
    words = [_number(x) for x in labels] if task.label_names is None else [task.label_names[i] for i in labels]
    header, table = ["index", "prediction"], [[str(index), word] for index, word in enumerate(words)]
    if scores is not None:
        header += ["score"] if task.label_names is None else [f"probability_{name}" for name in task.label_names]
        table = [[*cells, *map(_number, row)] for cells, row in zip(table, scores, strict=True)]
    text = io.StringIO()
    # Python 3.11 and 3.12 write a lone carriage return without quotes, and readers would end the row there
    returns = any("\r" in cell for row in (header, *table) for cell in row)
    writer = csv.writer(text, "excel-tab", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerows([header, *table])
    return _write(Path(output_dir) / f"predict_results_{split_name}.txt", text.getvalue())


def _number(value: float) -> str:
    return str(np.float32(value))


def has_labels(split: Dataset) -> bool:
    """Whether the labels of a test split can be used. If not, the loader has written -1 into all rows."""
    return any(label != -1 for label in split["label"])


def check_submission(folder: str | os.PathLike[str], task: Task, predicts: bool) -> None:
    """Refuse, before the run trains, a submission that could not be written.

    Args:
        predicts: whether the run predicts.

    Raises:
        InputError: the run does not predict, the server does not take the task, or `folder` is a file.
    """
    if not predicts:
        raise InputError("--glue_submission needs --do_predict: it holds predictions of the test split.")
    if not task.submission:
        raise InputError(f"The server takes no predictions of {task.name!r}: leave out --glue_submission, or give "
                         f"--task_name, one of {', '.join(GLUE)}.")  # fmt: skip
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"glue_submission {folder} is a file: name a folder.")


def write_submission(folder: str | os.PathLike[str], split_name: str, labels: np.ndarray, task: Task) -> Path:
    """Write one file exactly as GLUE's server takes it; once the files of all tasks are there, also submission.zip.

    The index is the position in the test split, counted from 0. It equals the column `index` (QQP: `id`) of GLUE's own
    test files, and `idx` of the hub's test splits.

    Raises:
        InputError: the task is not one of GLUE's.
    """
    if split_name not in task.submission:
        raise InputError(f"The server takes no predictions of {split_name!r}: it takes "
                         f"{', '.join(key for other in GLUE.values() for key in other.submission)}.")  # fmt: skip
    name, rows = task.submission[split_name]
    if len(labels) != rows:
        logger.warning("%s has %d rows and the server takes %d: predict the whole test split to submit it.",
                       name, len(labels), rows)  # fmt: skip
    if task.label_range is not None:
        words = [f"{label:.3f}" for label in np.clip(labels, *task.label_range)]
    else:
        # The server wants GLUE's own names and order; those of the head may differ.
        ids = glue_ids(task)
        names = GLUE[task.name].label_names or ()
        words = [names[ids[label]] if task.submits_names else str(ids[label]) for label in labels]
    lines = ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words))]
    path = _write(Path(folder) / name, "\n".join(lines) + "\n")

    parts = [Path(folder) / name for other in GLUE.values() for name, _ in other.submission.values()]
    if all(part.is_file() for part in parts):
        archive = Path(folder) / "submission.zip"
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
            for part in parts:
                file.write(part, part.name)  # the server expects the files outside of folders
        write_file(archive, content.getvalue())
    return path


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())
    return path

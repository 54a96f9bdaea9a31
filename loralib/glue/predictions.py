"""Predictions on disk: a readable file for each split, and the files that GLUE's server takes."""

import logging
import os
import zipfile
from pathlib import Path

import numpy as np

from loralib.errors import InputError
from loralib.glue.tasks import GLUE, Task

logger = logging.getLogger(__name__)


def write_predictions(output_dir: str | os.PathLike[str], split_name: str, labels: np.ndarray, task: Task) -> Path:
    """Write predict_results_<split_name>.txt: a row's position and its label's name, or its number with 3 decimals.

    split_name is a key of `GlueData.tests`; labels: (rows,) ids or floats, as `metrics.to_labels` gives them.
    """
    if task.label_names is None:
        words = [f"{label:.3f}" for label in labels]
    else:
        words = [task.label_names[label] for label in labels]
    return _write(Path(output_dir) / f"predict_results_{split_name}.txt", words)


def check_submission(folder: str | os.PathLike[str], task: Task, predicts: bool) -> None:
    """Refuse a submission that could not be written, before the run trains for it.

    Args:
        predicts: whether the run predicts at all.
    """
    if not predicts:
        raise InputError("--glue_submission needs --do_predict: it holds predictions of the test split.")
    if not task.submission:
        raise InputError(f"The server takes no predictions of {task.name!r}: leave out --glue_submission, or give "
                         f"--task_name, one of {', '.join(GLUE)}.")  # fmt: skip
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"glue_submission {folder} is a file: name a folder.")


def write_submission(folder: str | os.PathLike[str], split_name: str, labels: np.ndarray, task: Task) -> Path:
    """Write one file exactly as GLUE's server takes it, and submission.zip once the files of all tasks are there.

    The index is the position in the test split counted from 0: that is the `index` (QQP: `id`) column of GLUE's own
    test files in their order, and `idx` of the hub's test splits. Raises InputError for a task that is not GLUE's.
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
        words = [task.label_names[label] if task.label_names and task.submits_names else str(label) for label in labels]
    path = _write(Path(folder) / name, words)

    parts = [Path(folder) / name for other in GLUE.values() for name, _ in other.submission.values()]
    if all(part.is_file() for part in parts):
        archive = Path(folder) / "submission.zip"
        temporary = archive.with_name(f"{archive.name}.{os.getpid()}.tmp")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
            for part in parts:
                file.write(part, part.name)  # flat: the server looks for the files at the top
        temporary.replace(archive)
    return path


def _write(path: Path, words: list[str]) -> Path:
    """A file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    lines = ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words))]
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    temporary.replace(path)
    return path

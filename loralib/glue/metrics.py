"""The official GLUE metrics and keys, offline, as an `evaluate` metric built on scikit-learn and scipy."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    mean_squared_error,
    precision_recall_fscore_support,
)
from transformers import EvalPrediction

from loralib.errors import InputError
from loralib.glue.tasks import GLUE, Task, glue_ids

logger = logging.getLogger(__name__)


def _correlation(function: Callable[..., Any], name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            constant = "predictions" if np.ptp(predictions) == 0 else "labels"
            logger.warning("%s is undefined, all %s are equal: 0 is reported.", name, constant)
            return 0.0
        return float(function(predictions, references))

    return score


def _f1(predictions: np.ndarray, references: np.ndarray) -> float:
    if not np.any(predictions == 1) and not np.any(references == 1):
        logger.warning("f1 is undefined without a positive row or prediction: 0 is reported.")
    # GLUE's F1 is that of class 1. zero_division is for the case of the warning above.
    return float(f1_score(references, predictions, labels=[1], average="micro", zero_division=0.0))


_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, references: float(accuracy_score(references, predictions)),
    "f1": _f1,
    "matthews_correlation": _correlation(matthews_corrcoef, "matthews_correlation"),
    "mse": lambda predictions, references: float(mean_squared_error(references, predictions)),
    "pearson": _correlation(lambda x, y: stats.pearsonr(x, y).statistic, "pearson"),
    "spearmanr": _correlation(lambda x, y: stats.spearmanr(x, y).statistic, "spearmanr"),
}


COMBINED = "combined_score"
MACRO = "f1_macro"


def metric_names(task: Task) -> list[str]:
    """Names of the task's scores.

    GLUE's tasks have their official scores. Other classifications also have the macro-averaged F1, and precision,
    recall and F1 of each class.
    """
    if task.name in GLUE:
        # For a task with two scores GLUE gives their mean.
        return [*task.metrics, COMBINED] if len(task.metrics) > 1 else list(task.metrics)
    if task.label_names is None:
        return list(task.metrics)
    each = [f"{score}_{name}" for name in class_words(task.label_names) for score in ("precision", "recall", "f1")]
    return [*task.metrics, MACRO, *each]


def class_words(label_names: Sequence[str]) -> list[str]:
    """Names of classes as parts of metrics' names: they consist of letters, digits and _, and all differ.

    The number of the class is appended to a name that would be empty or taken, or that would make the metric look like
    a loss or like the macro average.
    """
    words: list[str] = []
    for number, name in enumerate(label_names):
        word = re.sub(r"\W+", "_", name).strip("_")
        if not word or word in [*words, "macro"] or word.endswith("loss"):
            word = f"{word or 'class'}_{number}"
        while word in words:
            word += "_"
        words.append(word)
    return words


def _scores_of_classes(predictions: np.ndarray, references: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """scikit-learn's macro-averaged F1 over the classes that occur, and the scores of each class, 0 if undefined."""
    absent = [name for i, name in enumerate(names) if not np.any(predictions == i) and not np.any(references == i)]
    if absent:
        logger.warning(
            "class %s has neither rows nor predictions: its scores are reported as 0, and f1_macro leaves it out.",
            ", ".join(map(repr, absent)),
        )
    result = {MACRO: float(f1_score(references, predictions, average="macro", zero_division=0.0))}
    each = precision_recall_fscore_support(references, predictions, labels=range(len(names)), zero_division=0.0)
    for word, *values in zip(class_words(names), *each[:3], strict=True):
        result |= {f"{score}_{word}": float(v) for score, v in zip(("precision", "recall", "f1"), values, strict=True)}
    return result


class GlueMetric(evaluate.Metric):
    """`GlueMetric(task).compute(predictions=ids_or_floats, references=...)` returns the task's scores by name.

    A score that is undefined, such as a correlation of constants or F1 without positives, is 0, and the log says so.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        # In memory, because two runs would share a file on disk.
        super().__init__(config_name=task.name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.task.label_names is None else "int64")
        return evaluate.MetricInfo(
            description=f"{', '.join(self.task.metrics)} of {self.task.name}",
            citation="Wang et al., GLUE, arXiv 1804.07461",
            inputs_description="predictions and references: (rows,) class ids, or floats for regression",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if self.task.name in GLUE and self.task.label_names is not None:  # F1 is that of GLUE's class 1
            ids = np.asarray(glue_ids(self.task))
            predictions, references = ids[predictions], ids[references]
        result = {name: _SCORES[name](predictions, references) for name in self.task.metrics}
        if COMBINED in metric_names(self.task):
            result[COMBINED] = float(np.mean(list(result.values())))
        if MACRO in metric_names(self.task):
            result |= _scores_of_classes(predictions, references, self.task.label_names or ())
        return result


def one_class(task: Task, references: Any) -> dict[str, float]:
    """The task's scores of answering the most frequent class of these rows for every row; none for a regression.

    Args:
        references: (rows,) class ids.
    """
    references = np.asarray(references)
    if task.label_names is None or not len(references):
        return {}
    if task.name in GLUE:
        references = np.asarray(glue_ids(task))[references]
    answers = np.full_like(references, np.bincount(references).argmax())
    # a correlation with a constant is 0 here as in every evaluation, but that need not be logged again
    return {m: 0.0 if m == "matthews_correlation" else _SCORES[m](answers, references) for m in task.metrics}


def to_labels(predictions: Any, task: Task) -> np.ndarray:
    """Turn a model's outputs into class ids, or floats for a regression, (rows,).

    Args:
        predictions: the outputs (rows, num_labels), or a tuple that begins with them.

    Raises:
        NaNOutputs: an output is NaN; its argmax would look like a prediction.
    """
    logits = _outputs(predictions)
    return logits.reshape(len(logits)) if task.label_names is None else logits.argmax(axis=-1)


def to_scores(predictions: Any, task: Task) -> np.ndarray:
    """Turn a model's outputs, as for `to_labels`, into probabilities (rows, classes) in float64. The outputs (rows, 1)
    of a regression stay as they are."""
    logits = _outputs(predictions).reshape(-1, task.num_labels)
    return logits if task.label_names is None else softmax(logits.astype(np.float64), axis=-1)


class NaNOutputs(InputError):
    """A model's outputs are NaN in some rows, because the training that made it diverged."""

    def __init__(self, rows: int, total: int) -> None:
        self.seen = f"The model's outputs are NaN in {rows} of {total} rows"
        super().__init__(f"{self.seen} where finite numbers are needed: the training diverged, lower learning_rate.")


def _outputs(predictions: Any) -> np.ndarray:
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if np.isnan(logits).any():
        raise NaNOutputs(int(np.isnan(logits).reshape(len(logits), -1).any(1).sum()), len(logits))
    return logits


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The function with which a Trainer computes the scores of an evaluation."""

    def compute(evaluation: EvalPrediction) -> dict[str, float]:
        predictions = to_labels(evaluation.predictions, task)
        # A fresh metric each time holds no rows of an interrupted evaluation.
        return GlueMetric(task).compute(predictions=predictions, references=evaluation.label_ids)

    return compute

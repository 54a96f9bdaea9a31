"""The official GLUE metrics, offline: an `evaluate` metric over scikit-learn and scipy, with the keys of GLUE's own."""

import logging
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import EvalPrediction

from loralib.errors import InputError
from loralib.glue.tasks import GLUE, Task

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
    # of class 1, as GLUE's; zero_division only covers what the line above says
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


def metric_names(task: Task) -> list[str]:
    """Names of the task's scores."""
    # GLUE's number for a task of two scores; a mean that holds a squared error would say nothing
    return [*task.metrics, COMBINED] if task.name in GLUE and len(task.metrics) > 1 else list(task.metrics)


class GlueMetric(evaluate.Metric):
    """`GlueMetric(task).compute(predictions=ids_or_floats, references=...)` -> the task's scores by name.

    A score without a definition (a correlation of constants, f1 without positives) is 0, and the log says so.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        # in memory: nothing on disk that two runs could share
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
        result = {name: _SCORES[name](predictions, references) for name in self.task.metrics}
        if COMBINED in metric_names(self.task):
            result[COMBINED] = float(np.mean(list(result.values())))
        return result


def to_labels(predictions: Any, task: Task) -> np.ndarray:
    """Model outputs, (rows, num_labels) or a tuple that starts with them, to (rows,) class ids, or floats (regression).

    Raises InputError for NaN: its argmax would look like a prediction.
    """
    logits = _outputs(predictions)
    return logits.reshape(len(logits)) if task.label_names is None else logits.argmax(axis=-1)


def to_scores(predictions: Any, task: Task) -> np.ndarray:
    """Model outputs, as for `to_labels`, to (rows, classes) probabilities in float64, or (rows, 1) raw outputs."""
    logits = _outputs(predictions).reshape(-1, task.num_labels)
    return logits if task.label_names is None else softmax(logits.astype(np.float64), axis=-1)


def _outputs(predictions: Any) -> np.ndarray:
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if np.isnan(logits).any():
        raise InputError(
            f"The model's outputs are NaN in {int(np.isnan(logits).reshape(len(logits), -1).any(1).sum())} of "
            f"{len(logits)} rows where finite numbers are needed: the training diverged, lower learning_rate."
        )
    return logits


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The function of a Trainer that scores a whole evaluation."""

    def compute(evaluation: EvalPrediction) -> dict[str, float]:
        # a fresh metric each time: nothing of an interrupted evaluation stays
        predictions = to_labels(evaluation.predictions, task)
        return GlueMetric(task).compute(predictions=predictions, references=evaluation.label_ids)

    return compute

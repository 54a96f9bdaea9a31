"""`--class_weights`: the weight of each class in the training loss."""

import logging
import math
from collections import Counter
from collections.abc import Sequence

from loralib.errors import InputError
from loralib.glue.data import GlueData

logger = logging.getLogger(__name__)

BALANCED = "balanced"


def class_weights(given: Sequence[object] | str | None, data: GlueData) -> list[float] | None:
    """One weight for each class in the order of `data.task.label_names`; None if there are no weights.

    `balanced` gives rows / (classes x rows of the class) as in scikit-learn, counted in the training rows that the run
    uses. Then the mean weight of a training row is 1.

    Args:
        given: the words of the flag: `balanced`, or numbers, separated by spaces or commas.

    Raises:
        InputError: the task is a regression, there are not as many weights as classes, a weight is not above 0, or
            `balanced` finds no row of a class.
    """
    if given is None:
        return None
    words = " ".join(map(str, [given] if isinstance(given, str) else given)).replace(",", " ").split()
    names = data.task.label_names
    if names is None:
        raise InputError(
            f"--class_weights {' '.join(words)} needs classes, and {data.task.name} is a regression here: leave it out."
        )
    if data.train is None:
        logger.warning("--class_weights has no effect without --do_train: the evaluation loss is not weighted")
        return None
    if words == [BALANCED]:
        rows = Counter(data.train["label"])
        if empty := [name for i, name in enumerate(names) if not rows[i]]:
            raise InputError(
                f"--class_weights balanced needs training rows of every class, and there are none of "
                f"{', '.join(map(repr, empty))}: give one number for each of {', '.join(names)}."
            )
        weights = [len(data.train) / (len(names) * rows[i]) for i in range(len(names))]
    else:
        weights = [_weight(word) for word in words]
        if len(weights) != len(names):
            raise InputError(
                f"--class_weights has {len(weights)} numbers and {data.task.name} has {len(names)} classes: give one "
                f"for each of {', '.join(names)}, in this order, or 'balanced'."
            )
    logger.info("class weights: %s", ", ".join(f"{n} {w:.4g}" for n, w in zip(names, weights, strict=True)))
    return weights


def _weight(word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"class_weights holds {word!r}, it must be 'balanced', or a finite number above 0 per class.")
    return weight

"""Statistics of a comparison, from plain numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EQUAL = 1e-9  # half width of an interval below which all differences are the same number, apart from rounding


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> tuple[int, float, float]:
    """Number of common seeds, mean difference, and half width of its 95 % interval by the t distribution.

    The half width is infinite below 3 pairs.
    """
    from scipy import stats

    differences = _differences(ours, theirs)
    n = len(differences)
    if n < 3:
        return n, float(differences.mean()) if n else float("nan"), float("inf")
    return n, float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))


def p_value(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> float:
    """Two-sided p of the paired t test; NaN below 3 pairs, and where all differences are equal: there is no test."""
    from scipy import stats

    differences = _differences(ours, theirs)
    n, mean, half = paired(ours, theirs)
    if n < 3 or half < EQUAL:
        return float("nan")
    return float(2 * stats.t.sf(abs(mean) / (differences.std(ddof=1) / np.sqrt(n)), n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's method (1979), in the order given; NaN stays and does not count."""
    known = sorted((value, i) for i, value in enumerate(p) if not np.isnan(value))
    corrected = [float("nan")] * len(p)
    highest = 0.0
    for place, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - place)))
        corrected[i] = highest
    return corrected


def verdict(n: int, mean: float, half: float) -> str:
    """A short phrase: higher, lower, no difference seen, or too few pairs."""
    if n < 3:
        return f"too few pairs to tell (n = {n})"
    if abs(mean) <= half:
        return "no difference seen"
    return "higher" if mean > 0 else "lower"


def _differences(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> np.ndarray:
    seeds = sorted(set(ours) & set(theirs), key=str)
    return np.array([ours[seed] - theirs[seed] for seed in seeds], dtype=float)

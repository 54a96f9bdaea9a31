"""What a sweep tuned: its record, which runs are final ones, the values chosen, and the best score to expect."""

from collections.abc import Mapping, Sequence
from math import comb, sqrt
from pathlib import Path
from typing import Any

from loralib.errors import InputError
from loralib.jsonfile import read_json
from loralib.report.runs import SMALLER_IS_BETTER, Run, name_variants
from loralib.report.tables import escape, percent, table
from loralib.sweep.settings import same_as_typed

TUNING_FILE = "tuning.json"


def file_beside(results: Path) -> Path:
    """The record of a tuning beside a compact results file: FILE.tuning.json for FILE.jsonl."""
    return results.with_suffix(f".{TUNING_FILE}")


def read_tuning(root: Path) -> dict[str, Any] | None:
    """The record of the tuning beside the runs; None if nothing was tuned.

    Raises:
        InputError: it is cut short or not one of this project's.
    """
    file = root / TUNING_FILE if root.is_dir() else file_beside(root)
    if not root.is_dir() and not file.exists():
        file = root.parent / TUNING_FILE
    return read_record(file)


def read_record(file: Path) -> dict[str, Any] | None:
    """A record of a tuning; None where there is none.

    Raises:
        InputError: it is cut short or not one of this project's.
    """
    if not file.exists():
        return None
    try:
        found = read_json(file)
        for choice in found["choices"]:
            _ = choice["task"], choice["method"], [dict(score["values"]) for score in choice["scores"]]
            if not choice["scores"] or not isinstance(choice["values"], dict):
                raise ValueError
        lists = {name: list(found[name]) for name in ("tune_seeds", "seeds")}
        return {**found, **lists, "selection": found["selection"]}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error.__cause__, OSError):  # it may be whole
            raise
        raise InputError(
            f"{file} is not a record of a tuning: remove it and run the sweep again, or name another --output."
        ) from error


def final_runs(runs: Sequence[Run], tuning: Mapping[str, Any]) -> list[Run]:
    """The runs that judge the choice: of a tuned task and method, with the chosen values and a seed that tuned nothing.

    Runs of other tasks and methods are kept as they are, except `open_trials`.
    """
    chosen = {(c["task"], c["method"]): c["values"] for c in tuning["choices"]}
    waiting = {id(run) for run in open_trials(runs, tuning)}
    found = []
    for run in runs:
        values = chosen.get((run.task, run.arm))
        if values is None:
            counts = id(run) not in waiting
        else:
            has_values = all(same_as_typed(run.arguments.get(name), value) for name, value in values.items())
            counts = has_values and run.seed not in tuning["tune_seeds"]
        if counts:
            found.append(run)
    name_variants(found)
    return found


def open_trials(runs: Sequence[Run], tuning: Mapping[str, Any]) -> list[Run]:
    """Trials where nothing is chosen yet: of a method that is tuned on another task, with a tuning seed."""
    chosen = {(c["task"], c["method"]) for c in tuning["choices"]}
    tuned = {method for _, method in chosen}
    return [run for run in runs
            if run.arm in tuned and (run.task, run.arm) not in chosen and run.seed in tuning["tune_seeds"]]  # fmt: skip


def tuning_seeds(tuning: Mapping[str, Any]) -> str:
    """The seeds of the trials in words: "seed 1" or "seeds 1, 2"."""
    seeds = tuning["tune_seeds"]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def chosen_table(tuning: Mapping[str, Any]) -> str:
    """Chosen values, number of trials and their score, for each task and method."""
    rows = []
    for choice in tuning["choices"]:
        values = ", ".join(f"{name} {value}" for name, value in choice["values"].items())
        edge = f"at the edge of its grid: {', '.join(choice['edges'])}" if choice["edges"] else "inside its grid"
        diverged = sum(score["score"] is None for score in choice["scores"])
        score = f"{percent(choice['metric'], [choice['mean']])[0]:.2f}"
        rows.append([escape(f"{choice['task']}, {choice['method']}"), escape(values), str(len(choice["scores"])),
                     str(diverged), score, escape(edge)])  # fmt: skip
    header = ["task, method", "chosen", "trials", "without a score", "mean score of the choice", "place"]
    return table(header, rows, words_last=True)


def trials_are_equal(tuning: Mapping[str, Any]) -> bool:
    """Whether every method had the same number of trials on each task."""
    counts: dict[str, set[int]] = {}
    for choice in tuning["choices"]:
        counts.setdefault(choice["task"], set()).add(len(choice["scores"]))
    return all(len(found) == 1 for found in counts.values())


def best_of_trials(scores: Sequence[float], metric: str = "") -> list[tuple[float, float]]:
    """Mean and standard deviation of the best score of k trials, over all subsets of k trials, for k = 1 to n.

    The i-th smallest score is the best of C(i - 1, k - 1) of the C(n, k) subsets (Show Your Work, arXiv 1909.03004,
    without its bias; Tang et al. 2020).
    """
    order = sorted(scores, reverse=metric in SMALLER_IS_BETTER)
    n, found = len(order), []
    for k in range(1, n + 1):
        share = [comb(i - 1, k - 1) / comb(n, k) for i in range(1, n + 1)]
        mean = sum(s * score for s, score in zip(share, order, strict=True))
        square = sum(s * (score - mean) ** 2 for s, score in zip(share, order, strict=True))
        found.append((mean, sqrt(square)))
    return found


def trial_scores(choice: Mapping[str, Any]) -> list[float]:
    """The trials' scores; a trial without a score counts with the worst one that was seen."""
    known = [s["score"] for s in choice["scores"] if s["score"] is not None]
    worst = max(known) if choice["metric"] in SMALLER_IS_BETTER else min(known)
    return [worst if s["score"] is None else s["score"] for s in choice["scores"]]


def scores_by_value(choice: Mapping[str, Any], flag: str) -> dict[str, list[float | None]]:
    """Scores of the trials with each value of a flag, by value, the other tuned flags at the values chosen."""
    others = {name: value for name, value in choice["values"].items() if name != flag}
    found: dict[str, list[float | None]] = {}
    for trial in choice["scores"]:
        if flag in trial["values"] and all(trial["values"].get(name) == value for name, value in others.items()):
            found.setdefault(trial["values"][flag], []).append(trial["score"])
    return found


def expected_table(tuning: Mapping[str, Any]) -> str:
    """Expected best trial score against the number of trials."""
    rows, longest = [], max(len(choice["scores"]) for choice in tuning["choices"])
    for choice in tuning["choices"]:
        means = [mean for mean, _ in best_of_trials(trial_scores(choice), choice["metric"])]
        values = percent(choice["metric"], means)
        cells = [f"{value:.2f}" for value in values] + ["-"] * (longest - len(values))
        rows.append([escape(f"{choice['task']}, {choice['method']}"), *cells])
    return table(["task, method", *(f"{k} trials" if k > 1 else "1 trial" for k in range(1, longest + 1))], rows)

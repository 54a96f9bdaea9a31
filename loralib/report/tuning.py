"""What a sweep tuned: its record, which runs are final ones, the values chosen, and the best score to expect."""

from collections.abc import Mapping, Sequence
from math import comb, sqrt
from pathlib import Path
from typing import Any

from loralib.errors import InputError
from loralib.jsonfile import read_json
from loralib.report.runs import SMALLER_IS_BETTER, Run, brief, name_variants
from loralib.report.tables import escape, percent, table
from loralib.sweep.settings import same_as_typed, same_value

TUNING_FILE = "tuning.json"


def file_beside(results: Path) -> Path:
    """The record of a tuning beside a compact results file: FILE.tuning.json for FILE.jsonl."""
    return results.with_suffix(f".{TUNING_FILE}")


def read_tuning(root: Path, runs: Sequence[Run]) -> dict[str, Any] | None:
    """The record of the tuning to which the runs belong; None if nothing was tuned.

    Args:
        root: a compact results file, or a folder: that of a sweep, a part of it, or one with several sweeps, whose
            records are read as one. Each record is about the runs of its own sweep alone.
        runs: all runs of the file, or below the folder.

    Raises:
        InputError: a record is cut short or not one of this project's, or two have a choice for one task and method.
    """
    if root.is_dir():
        files = sorted({folder / TUNING_FILE for run in runs if (folder := _sweep_of(run)) is not None})
    else:
        files = [file for file in (file_beside(root), root.parent / TUNING_FILE) if file.exists()][:1]
    found = [(file, record) for file in files if (record := read_record(file)) is not None]
    for file, record in found if root.is_dir() else []:
        for entry in (*record["choices"], *record["open"]):
            entry["sweep"] = file.parent
    if not found:
        return None
    of: dict[tuple[str, str], Path] = {}
    for file, record in found:
        for choice in record["choices"]:
            key = choice["task"], choice["method"]
            if key in of:
                raise InputError(
                    f"{of[key]} and {file} both have a choice for {key[0]}, {key[1]}: report their folders one by one."
                )
            of[key] = file
    records = [record for _, record in found]
    return records[0] | {name: [entry for record in records for entry in record[name]] for name in ("choices", "open")}


def _sweep_of(run: Run) -> Path | None:
    """The output folder of the sweep of a run in OUTPUT/TASK/METHOD/seedK."""
    above = run.folder.absolute().parents
    return above[2] if len(above) > 2 else None


def _of_method(run: Run, entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The choices or open tunings of the run's method in its own sweep, on all tasks."""
    return [e for e in entries if e["method"] == run.arm and e.get("sweep") in (None, _sweep_of(run))]


def _seeds(entries: Sequence[Mapping[str, Any]]) -> set[int]:
    return {seed for entry in entries for seed in entry["tune_seeds"]}


def read_record(file: Path) -> dict[str, Any] | None:
    """A record of a tuning; None where there is none.

    Raises:
        InputError: it is cut short or not one of this project's.
    """
    if not file.exists():
        return None
    try:
        found = read_json(file)
        about = {
            "tune_seeds": list(found["tune_seeds"]),
            "seeds": list(found["seeds"]),
            "selection": found["selection"],
        }
        for choice in found["choices"]:
            _ = choice["metric"], choice["mean"] + 0, list(choice["edges"]), [s["score"] for s in choice["scores"]]
            _ = [dict(score["values"]) for score in choice["scores"]]
            if not choice["scores"] or not isinstance(choice["values"], dict):
                raise ValueError
        opened = [{"task": o["task"], "method": o["method"], "points": list(o["points"]), "tune_seeds":
                   list(o["tune_seeds"])} for o in found.get("open", [])]  # fmt: skip
        # Older records have seeds and selection only for all choices together.
        return found | about | {"choices": [about | choice for choice in found["choices"]], "open": opened}
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
    waiting = {id(run) for run in open_trials(runs, tuning)}
    found = []
    for run in runs:
        chosen, begun = (
            [e for e in _of_method(run, tuning[what]) if e["task"] == run.task] for what in ("choices", "open")
        )
        tunes = run.seed in _seeds([*chosen, *begun]) or run.data.get("trial") is True
        if not tunes and _has_chosen(run, chosen[0]) if chosen else id(run) not in waiting:
            found.append(run)
    name_variants(found)
    return found


def _has_chosen(run: Run, choice: Mapping[str, Any]) -> bool:
    """Whether a run has the chosen values."""
    if "arguments" not in choice:  # the parser could not be called, or the record is an older one
        return all(same_as_typed(run.arguments.get(name), value) for name, value in choice["values"].items())
    batch = choice.get("effective_batch")
    both = ((run.arguments.get(name), value) for name, value in choice["arguments"].items())
    same = all(same_value(mine, value) or brief(mine) == brief(value) for mine, value in both)
    return same and batch in (None, run.data.get("effective_batch"))


def open_trials(runs: Sequence[Run], tuning: Mapping[str, Any]) -> list[Run]:
    """Trials where nothing is chosen yet: their record says so, or they have a seed of the tuning that has begun, or,
    without such a tuning, of that of their method on another task."""

    def waits(run: Run) -> bool:
        choices = _of_method(run, tuning["choices"])
        if any(choice["task"] == run.task for choice in choices):
            return False
        begun = [o for o in _of_method(run, tuning["open"]) if o["task"] == run.task]
        return run.seed in _seeds(begun or choices) or run.data.get("trial") is True

    return [run for run in runs if waits(run)]


def tuning_seeds(tuning: Mapping[str, Any]) -> str:
    """The seeds of the trials in words: "seed 1" or "seeds 1, 2"."""
    seeds = sorted(_seeds(tuning["choices"])) or tuning["tune_seeds"]
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

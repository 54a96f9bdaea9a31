"""Which figures a set of runs gives, and the files that they are written to."""

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loralib.report import figures
from loralib.report.runs import SMALLER_IS_BETTER, Run
from loralib.report.spectrum import adapter_spectra, effective_rank
from loralib.report.style import FEWEST_SEEDS, NONZERO
from loralib.report.tables import WORDS, by_method, escape, metrics_of, percent, scores
from loralib.report.tuning import best_of_trials, scores_by_value, trial_scores, tuning_seeds

ROWS = {"heldout": "the half of the validation rows that chooses; the table of scores has the other half"}
MOST_LINES = 12  # of one panel; a task with more of them has one figure per method


class Folder:
    """Writes figures into a folder. A figure that fails is listed as a problem; the others are still drawn."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.made: dict[str, str] = {}  # SVG text by the name of the PNG file
        self.problems: list[str] = []

    def save(self, name: str, draw: Callable[..., Any], *arguments: Any) -> None:
        """Draw one figure and write it as PNG and PDF; its files are called after `name`."""
        png, svg = self.out / file_name(name), io.StringIO()
        try:
            figure = draw(*arguments)
            figure.savefig(png, dpi=130)
            figure.set_layout_engine("none")  # it has done its work
            figure.savefig(png.with_suffix(".pdf"), metadata={"CreationDate": None})
            figure.savefig(svg, format="svg", metadata={"Date": None})
        except Exception as error:  # matplotlib raises many kinds; the tables must not be lost with a figure
            reason = escape(f"{type(error).__name__}: {error}"[:300])
            self.problems.append(f"The figure {escape(name)} could not be drawn: {reason}.")
        else:
            self.made[png.name] = svg.getvalue()


def file_name(name: str) -> str:
    """A portable file name; a hash is appended if characters were replaced."""
    plain = re.sub(r"[^A-Za-z0-9.=-]+", "_", name)
    if len(plain) <= 120 and plain == re.sub(r"[ ,_]+", "_", name):
        return f"{plain}.png"
    return f"{plain[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}.png"


def band(runs: Sequence[Run], key: str, x: str, factor: float) -> figures.Band | None:
    """Mean and deviation over runs of an evaluation's number times `factor`, at the points that all of them have.

    Of fewer than three runs there is no deviation: it is 0.
    """
    series = {i: {e[x]: e[key] for e in run.evaluations if key in e and x in e} for i, run in enumerate(runs)}
    points = factor * pd.DataFrame(series, dtype=float).dropna().sort_index()  # (points, runs)
    if len(points) < 2:
        return None
    deviation = points.std(axis=1, ddof=1) if len(runs) >= FEWEST_SEEDS else 0 * points[0]
    return points.index.tolist(), points.mean(axis=1).tolist(), deviation.tolist()


def draw(
    runs: pd.DataFrame, selection: str, out: Path, tuned: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], list[str]]:
    """All figures as PNG and PDF files; returns their SVG text by the name of the PNG, and a line for each figure or
    adapter that failed.

    Args:
        tuned: the record of a tuning, whose trials get figures, too.
    """
    folder = Folder(out)
    panels: dict[str, Any] = {}
    one_class: dict[str, float] = {}
    for task, part in runs.groupby("task", sort=False):
        metrics = metrics_of(part)
        if not metrics:
            continue
        label = f"{WORDS.get(metrics[0], metrics[0])}{'' if metrics[0] in SMALLER_IS_BETTER else ' (%)'}"
        mine = {name: of for _, name, of in by_method(part)}
        values = {name: list(scores(of, metrics[0]).values()) for name, of in mine.items()}
        if any(values.values()):
            if (baseline := one_class_score(part, metrics[0], selection)) is not None:
                one_class[task] = baseline
            panels[task] = (label, {name: found for name, found in values.items() if found})
        _draw_task(folder, task, mine, metrics[0], label, selection)
    if panels:
        folder.save("comparison", figures.comparison, panels, f"Scores, selection: {selection}", one_class)
    if tuned is not None:
        _draw_tuning(folder, tuned, ROWS.get(selection, "the validation rows"))
    return folder.made, folder.problems


def _draw_tuning(folder: Folder, tuned: Mapping[str, Any], rows: str) -> None:
    for task in dict.fromkeys(choice["task"] for choice in tuned["choices"]):
        choices = {choice["method"]: choice for choice in tuned["choices"] if choice["task"] == task}
        metric = next(iter(choices.values()))["metric"]
        factor = float(percent(metric, [1])[0])
        label = WORDS.get(metric, metric) + ("" if metric in SMALLER_IS_BETTER else " (%)")
        flags: dict[str, dict[str, dict[str, list[float | None]]]] = {}
        for name, choice in choices.items():
            for flag in choice["values"]:
                by_value = scores_by_value(choice, flag)
                percents = {v: [None if s is None else factor * s for s in of] for v, of in by_value.items()}
                flags.setdefault(flag, {})[name] = percents
        chosen = {name: choice["values"] for name, choice in choices.items()}
        best = {
            name: [(factor * mean, factor * deviation) for mean, deviation in best_of_trials(trial_scores(c), metric)]
            for name, c in choices.items()
        }
        title = (
            f"{task}: trials with {tuning_seeds(tuned)}; a dot is a trial, "
            "a line joins their means, a ring marks the chosen value, a cross below is a trial without a score"
            + ("; other tuned flags have their chosen values" if len(flags) > 1 else "")
            + f"; on {rows}"
        )
        folder.save(f"tuning_{task}", figures.tuning, flags, chosen, best, label, title)


def _draw_task(
    folder: Folder, task: str, mine: Mapping[str, pd.DataFrame], metric: str, label: str, selection: str
) -> None:
    """The figures of one task."""
    every = pd.concat(mine.values())
    reported, choosing = (one_class_score(every, metric, which) for which in (selection, "best"))
    rows = ROWS.get(selection, "the validation rows")
    runs = {name: list(of["run"]) for name, of in mine.items()}
    for part, some in _parts(mine).items():
        _draw_lines(folder, f"{task}_{part}" if part else task, f"{task}, {part}" if part else task,
                    {name: runs[name] for name in some}, metric, label, choosing, rows)  # fmt: skip
    points = frontier_points(mine, metric)
    if len({x for values in points.values() for x, _, _ in values}) > 1:
        title = f"{task}: score against the parameters that remain; {_over_seeds(runs, 'bar')}"
        if unknown := [name for name in mine if name not in points and mine[name]["method"].iloc[0] not in points]:
            title += f"; without a known number of them, and so not here: {', '.join(unknown)}"
        folder.save(f"frontier_{task}", figures.frontier, points, label, title, reported)
    for name, of in runs.items():
        stages = {str(run.seed): run.data["stages"] for run in of if run.data.get("stages")}
        if stages and len(stages) == len(of):
            folder.save(f"lambda_{task}_{name}", figures.stages, stages, f"eval_{metric}", label, f"{task}, {name}")
        _draw_ranks(folder, task, name, of, metric, label, rows)


def _parts(mine: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """The names that share the figures with lines: all of them under "", or those of each method if they are many."""
    if len(mine) <= MOST_LINES:
        return {"": list(mine)}
    parts: dict[str, list[str]] = {}
    for name, of in mine.items():
        parts.setdefault(of["method"].iloc[0], []).append(name)
    return parts


def _draw_lines(
    folder: Folder,
    name: str,
    what: str,
    runs: Mapping[str, Sequence[Run]],
    metric: str,
    label: str,
    one_class: float | None,
    rows: str,
) -> None:
    """Learning curves, budgets and spectra.

    Args:
        name: of the files. what: the same for the titles.
        one_class: score of answering one class for every row. rows: the rows of the evaluations, in words.
    """

    def lines(key: str, factor: float, x: str) -> dict[str, figures.Band]:
        found = {name: band(of, key, x, factor) for name, of in runs.items()}
        return {name: line for name, line in found.items() if line is not None}

    learning = {label: lines(f"eval_{metric}", 1 if metric in SMALLER_IS_BETTER else 100, "epoch"),
                "validation loss": lines("eval_loss", 1, "epoch")}  # fmt: skip
    if all(learning.values()):
        title = f"{what}: score and loss; {_over_seeds(runs)}; on {rows}"
        baseline = {} if one_class is None else {label: one_class}
        folder.save(f"curves_{name}", figures.curves, learning, "epoch", title, baseline)
    kept = lines("rank_total", 1, "step")
    nonzero = {f"{of}{NONZERO}": line for of, line in lines("rank_nonzero", 1, "step").items() if line != kept.get(of)}
    budget = {"ranks that are kept, all matrices": kept | nonzero,
              "parameters that are kept (thousands)": lines("remaining", 1e-3, "step"),
              "effective rank, mean over matrices": lines("effective_rank", 1, "step")}  # fmt: skip
    if all(budget.values()):
        title = f"{what}: ranks and parameters that are kept, and effective rank, at each evaluation; "
        title += _over_seeds({of: runs[of] for of in kept})
        title += "; thin dotted lines: singular values other than 0" if nonzero else ""
        folder.save(f"budget_{name}", figures.curves, budget, "optimizer step", title, None, True)
    _draw_spectra(folder, name, what, runs)


def _over_seeds(runs: Mapping[str, Sequence[Run]], shape: str = "band") -> str:
    """What lines and bands are, with the number of seeds."""
    counts = sorted({len(of) for of in runs.values()})
    if counts[-1] == 1:
        return "one seed"
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts[-1] < FEWEST_SEEDS:
        return f"mean of n = {n} seeds"
    few = " where n is 3 or more" if counts[0] < FEWEST_SEEDS else ""
    return f"mean of n = {n} seeds, {shape}: one standard deviation{few}"


def one_class_score(runs: pd.DataFrame, metric: str, selection: str) -> float | None:
    """Score of answering one class for every row, as the figures show scores; None where no run has recorded it."""
    prefix = "heldout_" if selection == "heldout" else "eval_"
    found = (run.data.get("one_class", {}).get(f"{prefix}{metric}") for run in runs["run"])
    known = next((score for score in found if score is not None), None)
    return None if known is None else float(percent(metric, [known])[0])


def frontier_points(
    mine: Mapping[str, pd.DataFrame], metric: str
) -> dict[str, list[tuple[float, float, float | None]]]:
    """(remaining parameters, mean, deviation) of each method's grid points; a method without a grid has one.

    Of fewer than three seeds the deviation is None.
    """
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    variants = pd.Series([of["method"].iloc[0] for of in mine.values()], dtype=object).value_counts()
    for name, of in mine.items():
        found = np.array(list(scores(of, metric).values()))
        left = of["remaining"].dropna()
        if len(found) and len(left):
            deviation = float(found.std(ddof=1)) if len(found) >= FEWEST_SEEDS else None
            method = of["method"].iloc[0]
            key = method if variants[method] > 1 else name
            points.setdefault(key, []).append((float(left.mean()), float(found.mean()), deviation))
    return points


def _draw_ranks(folder: Folder, task: str, name: str, runs: Sequence[Run], metric: str, label: str, rows: str) -> None:
    ranks = pd.DataFrame([run.ranks for run in runs], dtype=float)  # (runs, modules)
    pruned = any(len(set(run.ranks.values())) > 1 for run in runs)
    if ranks.empty or not (runs[0].method in ("adalora", "sora") or pruned):
        return
    mean = ranks.mean().to_dict()
    most = float(runs[0].arguments.get("lora_r") or max(mean.values()))
    factor = 1 if metric in SMALLER_IS_BETTER else 100
    found = {label: band(runs, f"eval_{metric}", "step", factor),
             "ranks kept, all matrices": band(runs, "rank_total", "step", 1)}  # fmt: skip
    lines = {quantity: line for quantity, line in found.items() if line is not None}
    title = f"{task}, {name}: rank left of each matrix, of {most:.0f}"
    title += f", and score and ranks over training; {_over_seeds({name: runs})}; score on {rows}" if lines else ""
    folder.save(f"ranks_{task}_{name}", figures.rank_heatmap, mean, title, most, lines, name)


def _draw_spectra(folder: Folder, file: str, what: str, runs: Mapping[str, Sequence[Run]]) -> None:
    values = {}
    for name, of in runs.items():
        spectra: list[np.ndarray] = []
        for run in of:
            try:
                spectra += adapter_spectra(run.folder).values()
            except (FileNotFoundError, NotADirectoryError):
                continue  # full fine-tuning has no adapter, and neither has a record without its folder
            except (OSError, ValueError) as error:
                folder.problems.append(escape(f"The adapter of {run.folder.name} of {run.task}, {name}, seed "
                                              f"{run.seed} cannot be read: {error}"))  # fmt: skip
        if spectra:
            length = max(map(len, spectra))
            padded = [np.pad(found, (0, length - len(found))) for found in spectra]
            values[name] = (np.mean(padded, axis=0), [effective_rank(found) for found in spectra])
    if values:
        title = (
            f"{what}: singular values of the trained updates (scaling x B x diagonal of AdaLoRA or SoRA x A) of all "
            f"matrices; {_over_seeds(runs).partition(',')[0]}"
        )
        folder.save(f"spectra_{file}", figures.spectra, values, title)

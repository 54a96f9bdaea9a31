"""Each method against LoRA, on the same seeds and the same rows: as a table, and as one sentence per comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from loralib.report.comparison import EQUAL, holm, p_value, paired, verdict
from loralib.report.runs import SMALLER_IS_BETTER, Run, brief
from loralib.report.tables import WORDS, by_method, escape, metrics_of, scores, table

NO_LORA = "no LoRA run has these seeds and this grid point"


@dataclass(frozen=True)
class Comparison:
    """A method against LoRA on one task.

    n: pairs of runs with one seed. mean, half: of their differences, in points of the metric, and the half width of the
    paired 95 % interval. p: of the paired t test, corrected for the number of comparisons; NaN where there is none.
    mismatches: the settings that forbid the comparison, with both values.
    """

    task: str
    name: str
    metric: str
    n: int
    mean: float
    half: float
    p: float
    mismatches: Sequence[str] = ()

    @property
    def comparable(self) -> bool:
        """Whether there is anything to compare."""
        return self.n > 0 and not self.mismatches

    @property
    def alike(self) -> bool:
        """Whether all differences are equal, as between runs that learned nothing: they have no interval."""
        return self.comparable and self.n >= 3 and self.half < EQUAL

    @property
    def interval(self) -> str:
        return f"{self.mean - self.half:+.2f} to {self.mean + self.half:+.2f}"

    @property
    def verdict(self) -> str:
        if self.alike:
            return "nothing can be said: all differences are equal"
        if self.comparable:
            found = verdict(self.n, self.mean, self.half)
            return f"{found}, a hint" if found in ("higher", "lower") and self.p >= 0.05 else found
        return f"not compared: {'; '.join(self.mismatches)}" if self.n else NO_LORA


def comparisons(runs: pd.DataFrame, selection: str) -> list[Comparison]:
    """Every method but LoRA against LoRA; p is corrected for their number (Holm)."""
    found = []
    for task, name, part in by_method(runs):
        metrics = metrics_of(part)
        if part["method"].iloc[0] == "lora" or not metrics:
            continue
        lora = baseline(runs, task, part["variant"].iloc[0])
        ours, theirs = scores(part, metrics[0]), scores(lora, metrics[0])
        one = Comparison(task, name, metrics[0], *paired(ours, theirs), float("nan"),
                         unlike_settings(part, lora, selection))  # fmt: skip
        found.append(replace(one, p=p_value(ours, theirs)) if one.comparable else one)
    corrected = holm([one.p for one in found])
    return [replace(one, p=p) for one, p in zip(found, corrected, strict=True)]


def clear_best(runs: pd.DataFrame, metric: str, selection: str) -> str | None:
    """The method of one task that is better than every other one by the paired 95 % interval; None if there is none.

    There is none either if two methods have fewer than three common seeds, or differ in more than the method.
    """
    parts = {name: part for _, name, part in by_method(runs) if scores(part, metric)}
    sign = -1 if metric in SMALLER_IS_BETTER else 1

    def beats(name: str, other: str) -> bool:
        n, mean, half = paired(scores(parts[name], metric), scores(parts[other], metric))
        unlike = unlike_settings(parts[name], parts[other], selection)
        return n >= 3 and half >= EQUAL and sign * mean > half and not unlike

    clear = [name for name in parts if all(beats(name, other) for other in parts if other != name)]
    return clear[0] if clear and len(parts) > 1 else None


def difference_table(found: Sequence[Comparison]) -> str:
    """Pairs, mean difference, interval, p and a verdict; runs that differ in more than the method are not a pair."""
    rows = []
    for one in found:
        numbers = (
            [f"{one.mean:+.2f}", one.interval if one.n >= 3 and not one.alike else "-"]
            if one.comparable
            else ["-", "-"]
        )
        p = "-" if np.isnan(one.p) else f"{one.p:.3f}"
        rows.append([escape(f"{one.task}, {one.name}"), str(one.n), *numbers, p, escape(one.verdict)])
    header = ["task, method", "pairs", "difference", "95 % interval", "p (Holm)", "against LoRA"]
    return table(header, rows, words_last=True) if rows else ""


def sentences(found: Sequence[Comparison]) -> list[str]:
    """One sentence per comparison, with the numbers that it rests on; it says no more than they carry."""
    tests = sum(not np.isnan(one.p) for one in found)
    return [_sentence(one, tests) for one in found]


def _sentence(one: Comparison, tests: int) -> str:
    unit = "squared error" if one.metric == "mse" else f"points of {WORDS.get(one.metric, one.metric)}"
    seen = f"{one.mean:+.2f} {unit}"
    if not one.comparable:
        why = f"they differ in {'; '.join(one.mismatches)}" if one.n else NO_LORA
        return f"On {one.task}, {one.name} is not compared with LoRA: {why}."
    if one.n < 3:
        pairs = "one pair of runs" if one.n == 1 else f"{one.n} pairs of runs"
        return f"On {one.task}, nothing can be said of {one.name} against LoRA from {pairs} ({seen})."
    if one.alike:
        return (
            f"On {one.task}, nothing can be said of {one.name} against LoRA: the differences of all {one.n} pairs of "
            f"runs are equal ({seen}), and no interval follows from such numbers."
        )
    numbers = f"95 % interval {one.interval}, {one.n} pairs of runs"
    if abs(one.mean) <= one.half:
        return (
            f"On {one.task}, no difference between {one.name} and LoRA was seen ({seen}, {numbers}); any difference "
            "within the interval remains possible."
        )
    direction = "higher" if one.mean > 0 else "lower"
    claim = f"On {one.task}, {one.name} scored {abs(one.mean):.2f} {unit} {direction} than LoRA ({numbers}"
    p = f"p = {one.p:.3f} after correction for {tests} comparison{'s' if tests > 1 else ''}"
    if one.p < 0.05:
        return f"{claim}; {p})."
    return f"{claim}), but {p}: this is a hint, not a finding."


def baseline(runs: pd.DataFrame, task: str, variant: str) -> pd.DataFrame:
    """The LoRA runs to compare with: those of the same grid point, or the only ones; else none."""
    lora = runs[(runs["task"] == task) & (runs["method"] == "lora")]
    return lora if lora["variant"].nunique() <= 1 else lora[lora["variant"] == variant]


# Runs are paired only if these agree; otherwise a difference says nothing about the method.
TO_AGREE = (
    "model_name_or_path",
    "train_file",
    "validation_file",
    "max_train_samples",
    "max_eval_samples",
    "heldout_split",
    "num_train_epochs",
    "max_steps",
)


def unlike_settings(ours: pd.DataFrame, theirs: pd.DataFrame, selection: str) -> list[str]:
    """Settings in which the runs of a pair differ, though a comparison needs them alike; with both values.

    Args:
        selection: if it chooses among the evaluations of a run, their spacing must agree, too.
    """
    first, second = (
        {run.seed: _to_agree(run, selection) for run in runs["run"]}  # of one seed, the last run counts
        for runs in (ours, theirs)
    )
    differ: dict[str, list[tuple[str, str]]] = {}
    for seed in first.keys() & second.keys():
        for name in first[seed]:
            one, other = first[seed][name], second[seed].get(name, first[seed][name])
            if one != other:
                differ.setdefault(name, []).append((one, other))
    sides = {
        name: [", ".join(sorted(set(side))) for side in zip(*values, strict=True)] for name, values in differ.items()
    }
    return [f"{name} {one} against {other}" for name, (one, other) in sorted(sides.items())]


def _to_agree(run: Run, selection: str) -> dict[str, str]:
    """What the other run of a pair must have, too, as far as the record has it."""
    found = {name: brief(run.arguments[name]) for name in TO_AGREE if name in run.arguments}
    counts = run.data.get("metrics", {})
    found |= {f"{k} rows": f"{counts[f'{k}_samples']}" for k in ("train", "eval") if f"{k}_samples" in counts}
    found["trainings in a row"] = str(max(1, len(run.data.get("stages", []))))
    if selection != "last" and run.evaluated_each:
        found["evaluations each"] = run.evaluated_each
    return found

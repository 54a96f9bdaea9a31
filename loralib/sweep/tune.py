"""Tunes within a sweep: every method gets the same number of trials, and the choices are recorded with all scores.

First comes a trial for every task, method, value and tuning seed. Then the value with the best mean over the tuning
seeds is chosen for each task and method. Then come the final runs, with other seeds. Trials are runs like any other:
they are resumed, skipped and kept.
"""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralib.errors import InputError
from loralib.sweep.plan import (
    Arm,
    Job,
    Point,
    check_folders,
    check_tasks,
    flags_by_task_and_arm,
    make_job,
    points_of,
    read_arms,
    read_grid,
)
from loralib.sweep.records import Done

Grid = dict[str, list[str]]


@dataclass
class Tuning:
    """The trials of a sweep, and the settings from which its final runs are made."""

    args: argparse.Namespace
    arms: list[Arm]
    grids: dict[str, Grid]  # by arm
    flags: Mapping[tuple[str, Arm], tuple[str, ...]]
    trials: dict[tuple[str, str, Point, int], Job]  # by task, arm, point and seed

    @property
    def files(self) -> list[Path]:
        """Where the choices are recorded: in the output folder, and beside the compact results file."""
        from loralib.report.tuning import TUNING_FILE, file_beside  # imports large libraries

        beside = [file_beside(self.args.results)] if self.args.results else []
        return [Path(self.args.output).absolute() / TUNING_FILE, *beside]

    def points(self, arm: Arm) -> list[Point]:
        """The points of a method's grid, in the order of the flags."""
        return points_of(self.grids[arm.name])

    def finals(self, choices: Sequence[Mapping[str, Any]]) -> list[Job]:
        """The final runs with the chosen values. Seeds vary last."""
        chosen = {(c["task"], c["method"]): tuple(c["values"].items()) for c in choices}
        jobs = [
            make_job(self.args.output, task, arm, seed, self.flags[task, arm], chosen[task, arm.name])
            for seed, task, arm in itertools.product(self.args.seeds, self.args.tasks, self.arms)
        ]
        check_folders(jobs)
        return jobs


def plan_tuning(args: argparse.Namespace, flags: Sequence[str]) -> Tuning:
    """Plan the trials of a sweep.

    Raises:
        InputError: a grid cannot be read, methods have different numbers of trials, or a seed is both for tuning and
            for final runs.
    """
    check_tasks(args.tasks)
    arms = read_arms(args.methods)
    if args.grid:
        raise InputError("--grid and --tune exclude each other: --grid reports every value, --tune the best one.")
    if not args.tune_seeds:
        raise InputError("--tune needs --tune_seeds: seeds of the trials, none of which is one of --seeds.")
    both = sorted(set(args.seeds) & set(args.tune_seeds))
    if both:
        raise InputError(
            f"seed {both[0]} is in --seeds and in --tune_seeds: a seed that chose a value can't judge it, use others."
        )
    shared = read_grid(args.tune, "--tune")
    grids: dict[str, Grid] = {arm.name: dict(shared) for arm in arms}
    for entry in args.tune_only:
        name, colon, values = entry.rpartition(":")
        if not colon or name not in grids:
            raise InputError(
                f"--tune_only {entry!r} cannot be read: write METHOD:NAME=VALUE,VALUE with a method of this sweep, as "
                "in 'full:learning_rate=2e-5,5e-5'."
            )
        grids[name] |= read_grid([values], "--tune_only")
    counts = {name: len(points_of(grid)) * len(args.tune_seeds) for name, grid in grids.items()}
    if len(set(counts.values())) > 1 and not args.unequal_trials:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(
            f"the methods would get different numbers of trials per task ({told}), and the best of more trials is "
            "better by chance. Give every method the same number, or allow it with --unequal_trials; the report will "
            "mention it."
        )
    own = flags_by_task_and_arm(args, arms, flags)
    trials = {
        (task, arm.name, point, seed): make_job(args.output, task, arm, seed, own[task, arm], point)
        for seed, task, arm in itertools.product(args.tune_seeds, args.tasks, arms)
        for point in points_of(grids[arm.name])
    }
    check_folders(list(trials.values()))
    tuning = Tuning(args, arms, grids, own, trials)
    for file in tuning.files:
        compare_with_earlier(tuning, file)
    return tuning


def kept(tuning: Tuning, earlier: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The earlier choices for tasks and methods that are not part of this call."""
    now = set(itertools.product(tuning.args.tasks, (arm.name for arm in tuning.arms)))
    return [c for c in (earlier or {}).get("choices", []) if (c["task"], c["method"]) not in now]


def compare_with_earlier(tuning: Tuning, file: Path) -> None:
    """Print how a grid extends that of an earlier call.

    Raises:
        InputError: a value or seed was tried earlier and is no longer named, or choices of other tasks or methods
            were made otherwise.
    """
    from loralib.report.tuning import read_record  # imports large libraries

    earlier = read_record(file)
    if earlier is None:
        return
    args = tuning.args
    for flag, before, now in (
        ("--tune_selection", earlier["selection"], args.tune_selection),
        ("--tune_seeds", sorted(earlier["tune_seeds"]), sorted(args.tune_seeds)),
    ):
        if before != now and (others := kept(tuning, earlier)):
            raise InputError(
                f"{file} holds choices of {others[0]['task']}, {others[0]['method']}, made with {flag} {before}, and "
                f"{now} is asked for: name these tasks and methods too, or another --output."
            )
    gone = sorted(set(earlier["tune_seeds"]) - set(args.tune_seeds))
    if gone:
        raise InputError(
            f"{file} holds trials of the tuning seed {gone[0]}, which --tune_seeds does not name any more: name it "
            "too, or another --output."
        )
    for arm in tuning.arms:
        of_arm = [c for c in earlier["choices"] if c["method"] == arm.name and c["task"] in args.tasks]
        tried = [dict(s["values"]) for c in of_arm for s in c["scores"]]
        asked = [dict(point) for point in tuning.points(arm)]
        lost = [values for values in tried if values not in asked]
        if lost:
            raise InputError(
                f"{file} holds trials of {arm.name} with {_words(lost[0])}, which --tune does not name any more: name "
                "it too, which extends the grid, or another --output."
            )
        new = [values for values in asked if values not in tried] if tried else []
        if new:
            print(f"the grid of {arm.name} is extended by {'; '.join(map(_words, new))}: the choice is made again")


def _words(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def choose(tuning: Tuning, done: Done) -> list[dict[str, Any]]:
    """Choose the best value of each task and method, and record the choices with all scores.

    Earlier choices for other tasks and methods stay in the record.

    A diverged trial counts and has the worst score. Of equal means, the first in the order of the grid is chosen.

    Raises:
        InputError: no trial of a method has a score on a task.
    """
    # Imported here because they import large libraries.
    from loralib.adapters.writing import write_json
    from loralib.report.runs import SMALLER_IS_BETTER, Run
    from loralib.report.tuning import read_record

    choices = []
    for task, arm in itertools.product(tuning.args.tasks, tuning.arms):
        scores, means, metric = [], {}, None
        for point in tuning.points(arm):
            of_point: list[float | None] = []
            for seed in tuning.args.tune_seeds:
                record = done.known[tuning.trials[task, arm.name, point, seed]]
                run = Run(Path(), record)
                metric = metric or (run.metrics[0] if run.metrics else None)
                score = run.chosen(tuning.args.tune_selection).get(run.metrics[0]) if run.metrics else None
                if record.get("status") == "diverged" or score is None or not math.isfinite(score):
                    score = None
                over = run.over_budget(tuning.args.tune_selection)
                scores.append({"values": dict(point), "seed": seed, "score": score, "status": record.get("status")}
                              | ({"over_budget": over} if over else {}))  # fmt: skip
                of_point.append(score)
            known = [score for score in of_point if score is not None]
            if len(known) == len(of_point):
                means[point] = sum(known) / len(known)
        if not means:
            raise InputError(
                f"no trial of {arm.name} on {task} has a score (all diverged, or none was evaluated): give --tune "
                "other values."
            )
        sign = -1 if metric in SMALLER_IS_BETTER else 1
        best = max(means, key=lambda point: sign * means[point])
        choices.append({
            "task": task, "method": arm.name, "metric": metric, "values": dict(best), "mean": means[best],
            "trials": len(scores), "edges": edges(tuning.grids[arm.name], best), "grid": tuning.grids[arm.name],
            "scores": scores,
        })  # fmt: skip
    args = tuning.args
    for file in tuning.files:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {
            "version": 1, "selection": args.tune_selection, "tune_seeds": args.tune_seeds, "seeds": args.seeds,
            "choices": [*kept(tuning, read_record(file)), *choices],
        })  # fmt: skip
    return choices


def edges(grid: Grid, best: Point) -> list[str]:
    """The flags whose best value is the smallest or largest of the grid, so that better ones may lie beyond."""
    found = []
    for name, value in best:
        try:
            numbers = sorted({float(v) for v in grid[name]})
        except ValueError:
            continue
        if len(numbers) > 1 and float(value) in (numbers[0], numbers[-1]):
            found.append(name)
    return found


def say(choices: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each choice, and another one if the value is at the edge of its grid."""
    for choice in choices:
        diverged = sum(score["status"] == "diverged" for score in choice["scores"])
        words = f"; {diverged} diverged" if diverged else ""
        print(f"chosen for {choice['task']}, {choice['method']}: {_words(choice['values'])} "
              f"({choice['metric']} {choice['mean']:.4f} of {choice['trials']} trials{words})")  # fmt: skip
        over = sum("over_budget" in score for score in choice["scores"])
        if over:
            print(
                f"  {over} trial(s) were scored above AdaLoRA's target budget, because none of their evaluations was "
                "at it"
            )
        for name in choice["edges"]:
            print(f"  {name} {choice['values'][name]} is at the edge of its grid: widen --tune {name}")

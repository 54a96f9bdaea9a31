"""Tunes within a sweep: every method gets the same number of trials, and the choices are recorded with all scores.

First comes a trial for every task, method, value and tuning seed. Then the value with the best mean over the tuning
seeds is chosen for each task and method. Then come the final runs, with other seeds. Trials are runs like any other:
they are resumed, skipped and kept. The record of a tuning is written before the first trial, with the grids, so that
no report takes a trial for a result.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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
from loralib.sweep.records import DONE, Done, status
from loralib.sweep.settings import WITHOUT_NUMBERS, RequestedRun, same_as_typed

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
    for flag, seeds in (("--seeds", args.seeds), ("--tune_seeds", args.tune_seeds)):
        if not seeds or len(set(seeds)) < len(seeds):
            told = ",".join(map(str, seeds)) or "empty"
            raise InputError(f"{flag} is {told}: name at least one seed, and each seed once (1,2,3 or 1-5).")
    both = sorted(set(args.seeds) & set(args.tune_seeds))
    if both:
        raise InputError(
            f"seed {both[0]} is in --seeds and in --tune_seeds: a seed that chose a value can't judge it, use others."
        )
    shared = read_grid(args.tune, "--tune")
    grids: dict[str, Grid] = {arm.name: dict(shared) for arm in arms}
    own_grids: dict[str, list[str]] = {}
    for entry in args.tune_only:
        name, colon, values = entry.rpartition(":")
        if not colon or name not in grids:
            raise InputError(
                f"--tune_only {entry!r} cannot be read: write METHOD:NAME=VALUE,VALUE with a method of this sweep, as "
                "in 'full:learning_rate=2e-5,5e-5'."
            )
        own_grids.setdefault(name, []).append(values)
    for name, entries in own_grids.items():
        grids[name] |= read_grid(entries, "--tune_only")
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
        (task, arm.name, point, seed): make_job(args.output, task, arm, seed, own[task, arm], point, trial=True)
        for seed, task, arm in itertools.product(args.tune_seeds, args.tasks, arms)
        for point in points_of(grids[arm.name])
    }
    check_folders(list(trials.values()))
    return Tuning(args, arms, grids, own, trials)


def begin(tuning: Tuning) -> None:
    """Record the grids and the seeds of the trials, before the first of them."""
    seeds = {"tune_seeds": tuning.args.tune_seeds, "seeds": tuning.args.seeds}
    opened = [
        {"task": task, "method": arm.name, "points": [dict(point) for point in tuning.points(arm)], **seeds}
        for task, arm in itertools.product(tuning.args.tasks, tuning.arms)
    ]
    _write(tuning, lambda earlier: (earlier.get("choices", []), [*kept(tuning, earlier, "open"), *opened]))


def _write(tuning: Tuning, change: Callable[[Mapping[str, Any]], tuple[list[Any], list[Any]]]) -> None:
    """Write the record of the tuning to all its places.

    Args:
        change: from the record that is there, {} if there is none, to the choices and the open tunings.
    """
    from loralib.adapters.writing import write_json  # imported here because they import large libraries
    from loralib.report.tuning import read_record

    args = tuning.args
    for file in tuning.files:
        file.parent.mkdir(parents=True, exist_ok=True)
        choices, opened = change(read_record(file) or {})
        about = {"version": 1, "selection": args.tune_selection, "tune_seeds": args.tune_seeds, "seeds": args.seeds}
        write_json(file, about | {"open": opened, "choices": choices})


def kept(tuning: Tuning, earlier: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """The earlier entries, of `what` choices or open, for tasks and methods that are not part of this call."""
    now = set(itertools.product(tuning.args.tasks, (arm.name for arm in tuning.arms)))
    return [c for c in earlier.get(what, []) if (c["task"], c["method"]) not in now]


def compare_with_earlier(tuning: Tuning, done: Done) -> None:
    """Print how the grids extend those of earlier calls.

    Raises:
        InputError: a value or seed was tried earlier and is no longer named, or choices of other tasks or methods
            were made otherwise.
    """
    from loralib.report.tuning import read_record  # imports large libraries

    said: set[str] = set()
    for file in tuning.files:
        earlier = read_record(file)
        if earlier is not None:
            said |= _compare(tuning, file, earlier, done)
    print("".join(f"{line}\n" for line in sorted(said)), end="")


def _compare(tuning: Tuning, file: Path, earlier: Mapping[str, Any], done: Done) -> set[str]:
    """As `compare_with_earlier`, with one record; returns what is to be printed."""
    said = set()
    args = tuning.args
    for other in kept(tuning, earlier, "choices"):
        for flag, before, now in (
            ("--tune_selection", other["selection"], args.tune_selection),
            ("--tune_seeds", sorted(other["tune_seeds"]), sorted(args.tune_seeds)),
        ):
            if before != now:
                raise InputError(
                    f"{file} holds choices of {other['task']}, {other['method']}, made with {flag} {before}, and {now} "
                    "is asked for: name these tasks and methods too, or another --output."
                )
    names = {arm.name: arm for arm in tuning.arms}
    choices, begun = (
        [entry for entry in earlier[what] if entry["method"] in names and entry["task"] in args.tasks]
        for what in ("choices", "open")
    )
    ran = [(names[o["method"]], seed, values) for o in begun for values in o["points"] for seed in o["tune_seeds"]
           if _has_run(tuning, o["task"], names[o["method"]], seed, values, done)]  # fmt: skip
    tried_seeds = {seed for c in choices for seed in c["tune_seeds"]} | {seed for _, seed, _ in ran}
    gone = sorted(tried_seeds - set(args.tune_seeds))
    if gone:
        raise InputError(
            f"{file} holds trials of the tuning seed {gone[0]}, which --tune_seeds does not name any more: name it "
            "too, or another --output."
        )
    for arm in tuning.arms:
        of_arm = [c for c in choices if c["method"] == arm.name]
        tried = [dict(s["values"]) for c in of_arm for s in c["scores"]]
        tried += [values for other, _, values in ran if other is arm]
        asked = [dict(point) for point in tuning.points(arm)]
        lost = [values for values in tried if not any(_alike(values, other) for other in asked)]
        if lost:
            raise InputError(
                f"{file} holds trials of {arm.name} with {_words(lost[0])}, which --tune does not name any more: name "
                "it too, which extends the grid, or another --output."
            )
        new = [v for v in asked if not any(_alike(v, other) for other in tried)] if of_arm else []
        if new:
            said.add(f"the grid of {arm.name} is extended by {'; '.join(map(_words, new))}: the choice is made again")
    return said


def _alike(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two points of a grid are the same, however their numbers are spelled."""
    return one.keys() == other.keys() and all(same_as_typed(value, other[name]) for name, value in one.items())


def _has_run(tuning: Tuning, task: str, arm: Arm, seed: int, values: Mapping[str, str], done: Done) -> bool:
    """Whether a trial that an earlier call planned is done, here or in the results file."""
    job = make_job(tuning.args.output, task, arm, seed, (), tuple(values.items()))
    return status(job) in DONE or any(
        (r.get("task"), r.get("arm"), r["arguments"].get("seed")) == (task, arm.name, seed)
        and all(same_as_typed(r["arguments"].get(name), value) for name, value in values.items())
        for r in (done.results.records if done.results else [])
    )


def _words(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _decisive(tuning: Tuning, task: str, arm: Arm, best: Point, asked: Mapping[Job, RequestedRun]) -> dict[str, Any]:
    """The parsed flags by which runs with the chosen values are known: those that differ between the trials, and those
    that were typed. {} if the entry point's parser cannot be called.
    """
    of_point = {point: asked[tuning.trials[task, arm.name, point, tuning.args.tune_seeds[0]]]
                for point in tuning.points(arm)}  # fmt: skip
    arguments = of_point[best].arguments
    if arguments is None:
        return {}
    others = [one.arguments or {} for one in of_point.values()]
    names = {name for name in arguments if any(other.get(name) != arguments[name] for other in others)}
    names |= {name for name, _ in best if name in arguments}
    found: dict[str, Any] = {n: arguments[n] for n in sorted(names) if not WITHOUT_NUMBERS.fullmatch(n)}
    batches = {one.effective_batch for one in of_point.values()}
    return {"arguments": found} | ({"effective_batch": of_point[best].effective_batch} if len(batches) > 1 else {})


def choose(tuning: Tuning, done: Done, asked: Mapping[Job, RequestedRun]) -> list[dict[str, Any]]:
    """Choose the best value of each task and method, and record the choices with all scores.

    Earlier choices for other tasks and methods stay in the record.

    A diverged trial counts and has the worst score. Of equal means, the first in the order of the grid is chosen.

    Raises:
        InputError: no trial of a method has a score on a task.
    """
    from loralib.report.runs import SMALLER_IS_BETTER, Run  # imports large libraries

    args = tuning.args
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
            "scores": scores, "selection": args.tune_selection, "tune_seeds": args.tune_seeds, "seeds": args.seeds,
            **_decisive(tuning, task, arm, best, asked),
        })  # fmt: skip
    _write(tuning, lambda earlier: ([*kept(tuning, earlier, "choices"), *choices], kept(tuning, earlier, "open")))
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

"""Finds finished runs in their own folders, in the folders of other sweeps and in a compact results file.

A results file has one JSON record in each line, which is appended when a run finishes. It is small enough to be
committed to git. With it, a sweep can go on on another machine, and the report can be made without the folders.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralib.errors import InputError
from loralib.jsonfile import find_json
from loralib.sweep.plan import Job
from loralib.sweep.settings import PLACES, WITHOUT_NUMBERS, RequestedRun, differences, entry_of

DONE = ("finished", "diverged")  # a diverged run is done, because with the same flags it would diverge again
KEPT = ("version", "status", "method", "task", "seed", "commit", "versions", "hardware", "world_size",
        "effective_batch", "steps", "metrics", "wall_seconds", "total_seconds", "peak_memory",
        "evaluation_rows_per_second", "heldout", "one_class", "stages", "earlier_stages", "total_rank",
        "target_total_rank")  # fmt: skip
COUNTS = ("trainable", "total", "lora", "head", "remaining")


def result(job: Job) -> dict[str, Any] | None:
    """The run.json of a run; None if there is none, {} if it is cut short or of another kind."""
    return read_result(job.folder / "run.json")


def read_result(file: Path) -> dict[str, Any] | None:
    """The content of a run.json; None if there is none, {} if it is cut short or of another kind."""
    if not os.path.exists(file):
        return None
    run = find_json(file) or {}
    if not isinstance(run.get("arguments"), dict) or not isinstance(run.get("metrics"), dict):
        return {}
    if stages := run.get("stages"):  # a schedule: the evaluations of all its trainings are the run's
        before = [find_json(Path(file).parent / f"stage-{k}" / "run.json") or {} for k in range(len(stages) - 1)]
        run["earlier_stages"] = [{"steps": one.get("steps", 0), "history": _evaluations(one)} for one in before if one]
    return run


def status(job: Job) -> str:
    """The status in the run.json of a run's folder; "" if there is none."""
    return str((result(job) or {}).get("status", ""))


def finished(job: Job) -> bool:
    """Whether the run.json in the run's folder says that the run is finished."""
    return status(job) == "finished"


def check_settings(job: Job, asked: RequestedRun) -> None:
    """Refuse a finished run that has other settings than those asked for.

    Raises:
        InputError: names the settings.
    """
    found = differences(result(job) or {}, asked)
    if found:
        raise InputError(
            f"{job.folder} holds a run that is done with other settings ({'; '.join(found[:4])}): name another "
            "--output, or remove that folder."
        )


# ---- compact records ----


def compact(run: Mapping[str, Any], arm: str | None = None) -> dict[str, Any]:
    """The essentials of a run.json: no paths, no training losses, and of each matrix only its rank."""
    arguments = {
        name: Path(value).name if name in (*PLACES, "dataset_name") and isinstance(value, str) else value
        for name, value in run["arguments"].items()
        if not WITHOUT_NUMBERS.fullmatch(name) or name in ("do_train", "per_device_train_batch_size")
    }
    record = {name: run[name] for name in KEPT if name in run}
    record |= {"arm": arm, "arguments": arguments, "entry": entry_of(run)}
    counts = run.get("parameters")
    if isinstance(counts, dict):
        record["parameters"] = {name: counts[name] for name in COUNTS if name in counts}
        modules = counts.get("modules")
        ranks = (
            {n: m.get("rank") for n, m in modules.items() if isinstance(m, dict)} if isinstance(modules, dict) else {}
        )
        if len(set(ranks.values())) > 1 or 0 in ranks.values():  # pruned; else the rank is lora_r everywhere
            record["parameters"]["modules"] = {name: {"rank": rank} for name, rank in ranks.items()}
    return record | {"history": _evaluations(run)}


def _evaluations(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a run's history that hold an evaluation, without their times."""
    history, watched = run.get("history"), ("eval_", "heldout_", "rank_total")
    return [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second"))}
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, dict) and any(key.startswith(watched) for key in entry)
    ]


class ResultsFile:
    """A compact results file, to which each finished run adds one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.cut = False  # whether the last line was cut off while it was written
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise InputError(
                f"--results {path} cannot be read ({error}): name a results file, or a new one."
            ) from error
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
                    raise ValueError
            except (ValueError, RecursionError) as error:
                if number == len(lines) and not text.endswith("\n"):
                    self.cut = True
                    continue
                raise InputError(
                    f"--results {path}: line {number} is not a record of a run: remove that line, or name another file."
                ) from error
            self.records.append(record)

    def find(self, asked: RequestedRun) -> dict[str, Any] | None:
        """The record of a run with these settings that is done, if possible of the same arm; None if there is none."""
        found = [r for r in self.records if r.get("status") in DONE and is_asked_for(r, asked)]
        return next((r for r in found if r.get("arm") == asked.arm), found[0] if found else None)

    def add(self, run: Mapping[str, Any], arm: str | None = None, trial: bool = False) -> None:
        """Append the record of a run and wait for the disk. A line that was cut off is removed first.

        Args:
            trial: whether it is a trial of a tuning, which no report may take for a result.
        """
        self._append(compact(run, arm) | ({"trial": True} if trial else {}))

    def add_for_arm(self, record: Mapping[str, Any], arm: str, trial: bool = False) -> None:
        """Append a record of this file once more, for another arm with the same settings."""
        own = {name: value for name, value in record.items() if name != "trial"} | {"arm": arm}
        self._append(own | ({"trial": True} if trial else {}))

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            if self.cut:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                self.cut = False
            file.write(json.dumps(record, default=str).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def is_asked_for(record: Mapping[str, Any], asked: RequestedRun) -> bool:
    """Whether a record from elsewhere is that of the requested run.

    If the entry point's parser cannot be called, the record may lack flags. Then the method's name in the sweep has to
    agree too.
    """
    return not differences(record, asked) and (asked.arguments is not None or record.get("arm") == asked.arm)


def runs_below(folder: Path) -> list[dict[str, Any]]:
    """All runs below a folder that are done."""
    found = (read_result(file) for file in sorted(folder.rglob("run.json")))
    return [run for run in found if run and run.get("status") in DONE]


def closest(runs: Iterable[Mapping[str, Any]], asked: RequestedRun) -> list[str]:
    """The differences of the most similar run from the one asked for; [] if none has its task, method and seed."""
    same = [run for run in runs if run.get("task") == asked.task and run["arguments"].get("seed") == asked.seed]
    if asked.method is not None:
        same = [run for run in same if run.get("method") == asked.method]
    return min((differences(run, asked) for run in same), key=len, default=[])


class Done:
    """The records of a sweep's runs that are done, from all places."""

    def __init__(self, results: ResultsFile | None, others: Sequence[dict[str, Any]]) -> None:
        self.results, self.others = results, others
        self.known: dict[Job, dict[str, Any]] = {}

    def find_or_add(self, job: Job, asked: RequestedRun) -> dict[str, Any] | None:
        """The record of a run, or None if it is not done. A record that the results file lacks is added to it.

        Raises:
            InputError: the run's folder holds a run that is done with other settings.
        """
        if job in self.known:
            return self.known[job]
        in_file = self.results.find(asked) if self.results else None
        run = result(job)
        if run and run.get("status") in DONE:
            check_settings(job, asked)
        else:
            run = next((other for other in self.others if is_asked_for(other, asked)), None)
        named = in_file is not None and in_file.get("arm") in (None, asked.arm)
        if run and self.results and not named:
            self.results.add(run, asked.arm, job.trial)
        elif self.results and in_file and not named:
            self.results.add_for_arm(in_file, asked.arm, job.trial)
        found = run or in_file
        if found:
            self.known[job] = found
        return found

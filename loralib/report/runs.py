"""Finished runs from their results files, and the reason why any other folder does not count."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from loralib.logs import last_line
from loralib.report.results import WITHOUT_NUMBERS, check_results, read_results
from loralib.report.style import METHODS

# What a task's table shows; the first is the score that evaluations are chosen by, as in AdaLoRA's Table 1.
METRICS = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy", "accuracy_mm"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("combined_score", "pearson", "spearmanr"),
}
GENERAL = ("accuracy", "f1", "matthews_correlation", "combined_score", "pearson", "mse")
SMALLER_IS_BETTER = ("mse",)
ORDER = ("full", *(name for name in METHODS if name != "full"))

# Beside WITHOUT_NUMBERS, flags that may change numbers and define no method: a sweep runs again where one of them
# differs, but the report pools such runs. Rows that differ are named where two methods are compared (TO_AGREE).
NO_PART_OF_A_METHOD = re.compile(
    r"(data_)?seed|dataloader_\w+|do_\w+|\w+_for_metrics|eval_(on|delay|do|strategy|steps)\w*|max_eval_samples|"
    r"auto_find_batch_size|deepspeed\w*|fsdp\w*|accelerator_config"
)


@dataclass
class Run:
    """One results file, with those of the stages before it (SoRA's schedule).

    The names of its method, from the file to the report:

    - recorded: the method in run.json; LoRA with a penalty is lora-orth.
    - arm: the name of the method in the sweep.
    - method: the name in the report: `label` (the `arm`, set if several arms have the same `recorded`), or `recorded`.
    - variant: the settings in which it differs from other runs of its task and method, such as `lora_r=4`.
    - name: method and variant.
    """

    folder: Path
    data: Mapping[str, Any]
    stages: Sequence[Mapping[str, Any]] = field(default_factory=list)
    variant: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        if not self.stages:  # a compact record holds those of its folder
            self.stages = self.data.get("earlier_stages", [])

    @property
    def task(self) -> str:
        return str(self.data.get("task", "?"))

    @property
    def seed(self) -> Any:
        return self.arguments.get("seed", self.data.get("seed"))  # a stage trains with a seed of its own

    @property
    def arguments(self) -> Mapping[str, Any]:
        return self.data.get("arguments") or {}

    @property
    def arm(self) -> str:
        """The method's name in the sweep that made the run: of its record, else of its folder."""
        named_by_folder = self.folder.parent.name.partition(",")[0] if self.folder.name.startswith("seed") else ""
        return str(self.data.get("arm") or named_by_folder or self.recorded)

    @property
    def method(self) -> str:
        """The name in the report: `recorded`, or `arm` if several arms have the same `recorded`."""
        return self.label or self.recorded

    @property
    def recorded(self) -> str:
        """The method in run.json; LoRA with a penalty is lora-orth."""
        name = str(self.data.get("method", "?"))
        return "lora-orth" if name == "lora" and (self.arguments.get("reg_orth_coef") or 0) > 0 else name

    @property
    def name(self) -> str:
        return f"{self.method} {self.variant}".strip()

    @property
    def settings(self) -> dict[str, Any]:
        """Flags that define the method here, and the effective batch."""
        none = (WITHOUT_NUMBERS, NO_PART_OF_A_METHOD)
        kept = {k: v for k, v in self.arguments.items() if not any(names.fullmatch(k) for names in none)}
        return kept | {"effective_batch": self.data.get("effective_batch")}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's metrics, the one by which evaluations are chosen first; at most two of a generic task."""
        return METRICS.get(self.task) or tuple(m for m in GENERAL if f"eval_{m}" in self.data.get("metrics", {}))[:2]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """One entry per evaluation: step, epoch, eval_*, heldout_*, and what was watched; over all stages.

        The first entry of a step counts: what follows at the end of a run repeats it, or is MNLI's mismatched half.
        An entry with `model_of_step` evaluates the best model again, which --load_best_model_at_end has loaded.
        """
        found: list[dict[str, Any]] = []
        step = epoch = 0.0
        for record in [*self.stages, self.data]:
            by_step: dict[int, dict[str, Any]] = {}
            for entry in record.get("history", []):
                watched = any(k.startswith(("eval_", "heldout_", "rank_total")) for k in entry)
                if watched and "model_of_step" not in entry:
                    known = by_step.setdefault(entry.get("step", 0), {})
                    known |= {k: v for k, v in entry.items() if k not in known}
            for entry in by_step.values():
                shifted = {"step": step + entry.get("step", 0), "epoch": epoch + (entry.get("epoch") or 0)}
                found.append(entry | shifted)
            step += record.get("steps", 0)
            epoch += max((e.get("epoch") or 0 for e in record.get("history", [])), default=0)
        return found

    def evaluation(self, selection: str) -> dict[str, Any] | None:
        """The evaluation that `selection` (best or heldout) chooses; None if the run has none.

        For AdaLoRA, the choice is among evaluations at the target budget, if there are any: before its final phase a
        model has more parameters than the run is to end with.
        """
        if not self.metrics:
            return None
        key, prefix = f"eval_{self.metrics[0]}", "heldout_" if selection == "heldout" else "eval_"
        scored = [
            e for e in self.evaluations if _is_number(e.get(key)) and _is_number(e.get(f"{prefix}{self.metrics[0]}"))
        ]
        scored = [e for e in scored if self._at_target(e)] or scored
        sign = -1 if self.metrics[0] in SMALLER_IS_BETTER else 1
        return max(scored, key=lambda e: sign * e[key], default=None)

    def chosen(self, selection: str) -> dict[str, float]:
        """Metrics by name that `selection` reports; empty where the run does not have them."""
        if selection == "last" or not self.metrics:
            return named(self.data.get("metrics", {}), "eval_")
        return named(self.evaluation(selection) or {}, "heldout_" if selection == "heldout" else "eval_")

    def as_one_class(self, selection: str) -> bool:
        """Whether the score that `selection` reports is exactly that of one answer for every row: the most frequent
        class, or anything where a correlation is 0."""
        if not self.metrics:
            return False
        score, prefix = self.chosen(selection).get(self.metrics[0]), "heldout_" if selection == "heldout" else "eval_"
        constant = (self.data.get("one_class") or {}).get(f"{prefix}{self.metrics[0]}")
        undefined = self.metrics[0] in ("matthews_correlation", "combined_score", "pearson") and score == 0
        return score is not None and (undefined or score == constant)

    def remaining(self, selection: str) -> int | None:
        """Elements of the low-rank factors that are left in the model that `selection` reports; None: not known, or
        full fine-tuning."""
        counts = self.data.get("parameters") or {}
        if not counts.get("lora"):
            return None
        if selection == "last":  # `remaining` is 0 and no rank is recorded if another library made the factors
            return counts.get("remaining") if counts.get("remaining") or self.ranks else None
        evaluation = self.evaluation(selection) or {}
        return evaluation.get("remaining_nonzero", evaluation.get("remaining"))

    def over_budget(self, selection: str) -> tuple[int, int] | None:
        """Singular values of the model that `selection` reports, and the target; None unless the run is over it."""
        target, ranks = self.target, self.data.get("total_rank", sum(self.ranks.values()))
        if selection != "last":
            ranks = _nonzero(self.evaluation(selection) or {})
        return (ranks, target) if target is not None and ranks is not None and ranks > target else None

    @property
    def target(self) -> int | None:
        """Singular values that AdaLoRA is to end with, over all matrices; None for other methods."""
        if "target_total_rank" in self.data or not self.arguments.get("apply_adalora"):
            return self.data.get("target_total_rank")
        total, mean = (self.arguments.get(name) for name in ("target_total_rank", "target_rank"))
        return total or (mean * len(self.ranks) if mean and self.ranks else None)  # a record that lacks it

    def _at_target(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether an evaluation has the ranks that an allocator is to end with; True where the method has none."""
        target, ranks = self.target, _nonzero(evaluation)
        if target is None:
            return True
        begun = evaluation["step"] > 0 and evaluation.get("budget", target) <= target  # all of E is 0 before step 1
        return begun and ranks is not None and ranks <= target

    @property
    def steps(self) -> int:
        """Optimizer steps, of all stages."""
        return sum(record.get("steps") or 0 for record in [*self.stages, self.data])

    @property
    def evaluated_each(self) -> str:
        """How often the run was evaluated; "" if the record does not have it."""
        strategy = self.arguments.get("eval_strategy")
        return f"{self.arguments.get('eval_steps')} steps" if strategy == "steps" else str(strategy or "")

    @property
    def seconds(self) -> float | None:
        """Wall time of all processes of the run; only of the last one if the record lacks the others."""
        return self.data.get("total_seconds", self.data.get("wall_seconds"))

    @property
    def trainable(self) -> int | None:
        return (self.data.get("parameters") or {}).get("trainable")

    @property
    def ranks(self) -> dict[str, float]:
        modules = (self.data.get("parameters") or {}).get("modules") or {}
        return {name: entry["rank"] for name, entry in modules.items() if "rank" in entry}


def named(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers whose names begin with `prefix`, without it; NaN is no number."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix) and _is_number(v)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _nonzero(evaluation: Mapping[str, Any]) -> int | None:
    """Singular values or gates other than 0 at an evaluation; older records have them as rank_total."""
    return evaluation.get("rank_nonzero", evaluation.get("rank_total"))


# ---- reading ----


def read(root: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    """Finished trainings below `root`, and every other run's folder with the reason why it does not count.

    Args:
        root: a folder of runs, or a compact results file (one record per line).
    """
    runs, others = _read_records(root) if root.is_file() else _read_folders(root)
    name_variants(runs)
    return runs, others


def _read_records(file: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    runs, others = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        place = file / f"line {number}"
        try:
            data = json.loads(line)
            check_results(data, "its record")
        except (json.JSONDecodeError, RecursionError):
            others.append((place, "its record is cut short or not JSON"))
            continue
        except ValueError as error:
            others.append((place, str(error)))
            continue
        run = Run(place, data)
        if data.get("status") == "finished":
            runs.append(run)
        else:
            others.append((place, f"{run.method} on {run.task}, seed {run.seed}: {data.get('status')}"))
    return runs, others


def _read_folders(root: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    runs, others = [], []
    folders = {p.parent for name in ("run.json", "run.log") for p in root.rglob(name)}
    folders |= {p.parent for p in root.rglob("checkpoint-*") if p.is_dir()}
    for folder in sorted(folders):
        if re.search(r"/(stage|checkpoint)-\d+(/|$)", f"/{folder.relative_to(root)}"):
            continue
        try:
            data = read_results(folder / "run.json")
            stages = [read_results(folder / name / "run.json") for name in _stage_names(folder)]
        except FileNotFoundError:
            others.append((folder, f"no results file: failed, cut off or still running{_last_words(folder)}"))
            continue
        except (OSError, ValueError) as error:
            others.append((folder, str(error)))
            continue
        run = Run(folder, data, stages)
        if run.arguments.get("do_train") is False:
            others.append((folder, f"{run.method} on {run.task}: evaluation or prediction without training"))
        elif data.get("status") == "finished":
            runs.append(run)
        else:
            others.append((folder, f"{run.method} on {run.task}, seed {run.seed}: {data.get('status')}"))
    return runs, others


def _stage_names(folder: Path) -> list[str]:
    """The stages of a schedule that have a results file, in their order."""
    found = [p.parent.name for p in folder.glob("stage-*/run.json") if re.fullmatch(r"stage-\d{1,6}", p.parent.name)]
    return sorted(found, key=lambda name: int(name[6:]))


def _last_words(folder: Path) -> str:
    said = last_line(folder / "run.log")
    return f"; its log ends with: {said}" if said else ""


def name_variants(runs: Sequence[Run]) -> None:
    """Name runs of one task and method by the settings in which they differ, so a grid needs no declaration.

    Arms of a sweep that train the same method (such as a user's entry point that trains LoRA) are named by the arm.
    """
    arms: dict[str, set[str]] = {}
    for run in runs:
        arms.setdefault(run.recorded, set()).add(run.arm)
    for run in runs:
        run.label = run.arm if len(arms[run.recorded]) > 1 and run.arm != run.recorded else ""
    for task, method in {(run.task, run.method) for run in runs}:
        same = [run for run in runs if (run.task, run.method) == (task, method)]
        keys = sorted({key for run in same for key in run.settings})
        differ = [k for k in keys if len({brief(run.settings.get(k)) for run in same}) > 1]
        for run in same:
            run.variant = ", ".join(f"{k}={brief(run.settings.get(k))}" for k in differ)


def brief(value: Any) -> str:
    """A setting in words; a path is shortened to its last part, since a folder may move."""
    return Path(value).name if isinstance(value, str) and "/" in value else f"{value}"


# ---- as a table ----


def ordered(runs: Iterable[Run]) -> list[Run]:
    """Runs by task, method, variant and seed: known methods first, a grid by its numbers."""

    def place(run: Run) -> tuple[Any, ...]:
        known = ORDER.index(run.method) if run.method in ORDER else len(ORDER)
        numbers = [float(x) for x in re.findall(r"=(\d+(?:\.\d*)?(?:e-?\d+)?)", run.variant)]
        return run.task, known, run.method, numbers, run.variant, str(run.seed).zfill(9)

    return sorted(runs, key=place)


def frame(runs: Iterable[Run], selection: str) -> pd.DataFrame:
    """One row per run, in the order of `ordered`: names, metrics as fractions, cost, and the run itself."""
    rows: list[dict[str, Any]] = []
    for run in ordered(runs):
        about = {"task": run.task, "method": run.method, "variant": run.variant, "name": run.name, "seed": run.seed}
        chosen = run.chosen(selection)
        cost = {"trainable": run.trainable, "head": (run.data.get("parameters") or {}).get("head"),
                "remaining": run.remaining(selection), "steps": run.steps,
                "wall_seconds": run.data.get("wall_seconds"), "seconds": run.seconds,
                "peak_mb": (run.data.get("peak_memory") or {}).get("mb"),
                "rows_per_second": run.data.get("evaluation_rows_per_second"),
                "as_one_class": run.as_one_class(selection)}  # fmt: skip
        rows.append(about | {f"metric {m}": chosen.get(m) for m in run.metrics} | cost | {"run": run})
    columns = ["task", "method", "variant", "name", "seed", "trainable", "head", "remaining", "steps",
               "wall_seconds", "seconds", "peak_mb", "rows_per_second", "as_one_class", "run"]  # fmt: skip
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)

"""Tables and figures from the results files (run.json) below a folder: report.md, report.csv and PNG figures.

    python scripts/report.py output/ [--selection last|best|heldout] [--out DIR]

last: the metrics at the end of the run. best: those of the evaluation with the best score, chosen and reported on the
same rows, so biased upwards. heldout: the evaluation that is best on one half of the validation rows, with its metrics
on the other half (runs with --heldout_split SEED). Needs numpy, scipy, safetensors and matplotlib.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from loralib.errors import InputError  # noqa: E402

try:
    from loralib.glue import figures
except ImportError as error:
    sys.exit(f"report.py: error: {error.name} is missing: pip install -e '{ROOT}'")
from loralib.spectrum import adapter_spectra, effective_rank  # noqa: E402

# What a task's table shows; the first is the score that evaluations are chosen by, as in AdaLoRA's Table 1.
METRICS = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy", "accuracy_mm"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("combined_score", "pearson", "spearmanr"),
}
GENERAL = ("accuracy", "f1", "matthews_correlation", "combined_score", "pearson", "mse")
WORDS = {"matthews_correlation": "Matthews", "accuracy_mm": "mismatched", "combined_score": "mean of the two",
         "spearmanr": "Spearman", "pearson": "Pearson", "f1": "F1"}  # fmt: skip
ORDER = ("full", *(name for name in figures.METHODS if name != "full"))

# Flags that tell runs of one method apart without being settings of it.
NOT_SETTINGS = re.compile(
    r"(data_)?seed|output_dir|logging_.*|run_name|overwrite_.*|resume_.*|per_device_.*|gradient_accumulation_steps|"
    r"local_rank|dataloader_.*|save_.*|report_to|.*cache.*|hub_.*|push_to_hub|tb_writter_loginterval|disable_tqdm|"
    r"do_\w+|.*_for_metrics|eval_(on|delay|do|strategy|steps)\w*|log_.*|use_cpu|no_cuda|ddp_.*|glue_submission|"
    r"max_(eval|predict)_samples|auto_find_batch_size|deepspeed.*|fsdp.*|accelerator_config|project|trackio.*"
)


@dataclass
class Run:
    """One results file, with those of the stages before it (SoRA's schedule)."""

    folder: Path
    data: Mapping[str, Any]
    stages: Sequence[Mapping[str, Any]] = field(default_factory=list)
    variant: str = ""

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
    def method(self) -> str:
        """As the run says, with lora-orth for LoRA with a penalty."""
        name = str(self.data.get("method", "?"))
        return "lora-orth" if name == "lora" and (self.arguments.get("reg_orth_coef") or 0) > 0 else name

    @property
    def name(self) -> str:
        return f"{self.method} {self.variant}".strip()

    @property
    def settings(self) -> dict[str, Any]:
        """Flags that define the method here, and the effective batch."""
        kept = {k: v for k, v in self.arguments.items() if not NOT_SETTINGS.fullmatch(k)}
        return kept | {"effective_batch": self.data.get("effective_batch")}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the task that the run has."""
        return METRICS.get(self.task) or tuple(m for m in GENERAL if f"eval_{m}" in self.data.get("metrics", {}))[:2]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """One entry an evaluation: step, epoch, eval_*, heldout_*, and what was watched; over all stages.

        The first entry of a step counts: what follows at the end of a run repeats it, or is MNLI's mismatched half.
        """
        found: list[dict[str, Any]] = []
        step = epoch = 0.0
        for record in [*self.stages, self.data]:
            by_step: dict[int, dict[str, Any]] = {}
            for entry in record.get("history", []):
                if any(k.startswith(("eval_", "heldout_", "rank_total")) for k in entry):
                    known = by_step.setdefault(entry.get("step", 0), {})
                    known |= {k: v for k, v in entry.items() if k not in known}
            for entry in by_step.values():
                shifted = {"step": step + entry.get("step", 0), "epoch": epoch + (entry.get("epoch") or 0)}
                found.append(entry | shifted)
            step += record.get("steps", 0)
            epoch += max((e.get("epoch") or 0 for e in record.get("history", [])), default=0)
        return found

    def chosen(self, selection: str) -> dict[str, float]:
        """Metrics by name that `selection` reports; empty where the run does not have them."""
        if selection == "last" or not self.metrics:
            return _named(self.data.get("metrics", {}), "eval_")
        key, prefix = f"eval_{self.metrics[0]}", "heldout_" if selection == "heldout" else "eval_"
        scored = [e for e in self.evaluations if key in e and f"{prefix}{self.metrics[0]}" in e]
        if not scored:
            return {}
        sign = -1 if self.metrics[0] == "mse" else 1
        return _named(max(scored, key=lambda e: sign * e[key]), prefix)

    @property
    def steps(self) -> int:
        """Optimizer steps, of all stages."""
        return sum(record.get("steps") or 0 for record in [*self.stages, self.data])

    @property
    def trainable(self) -> int | None:
        return (self.data.get("parameters") or {}).get("trainable")

    @property
    def remaining(self) -> int | None:
        """Elements of the low-rank factors that are left; None for full fine-tuning."""
        counts = self.data.get("parameters") or {}
        return counts.get("remaining") if counts.get("lora") else None

    @property
    def ranks(self) -> dict[str, float]:
        modules = (self.data.get("parameters") or {}).get("modules") or {}
        return {name: entry["rank"] for name, entry in modules.items() if "rank" in entry}


def _named(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix) and isinstance(v, int | float)}


# ---- reading ----


def read(root: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    """Finished trainings below `root`, and every other run's folder with the reason why it does not count."""
    runs, others = [], []
    folders = {p.parent for name in ("run.json", "run.log") for p in root.rglob(name)}
    folders |= {p.parent for p in root.rglob("checkpoint-*") if p.is_dir()}
    for folder in sorted(folders):
        if re.search(r"/(stage|checkpoint)-\d+(/|$)", f"/{folder.relative_to(root)}"):
            continue
        try:
            data = _load(folder / "run.json")
            stages = [_load(p) for p in sorted(folder.glob("stage-*/run.json"), key=lambda p: int(p.parent.name[6:]))]
        except FileNotFoundError:
            log = folder / "run.log"
            lines = re.split(r"[\r\n]+", log.read_text(errors="replace")) if log.exists() else []
            said = [line for line in lines if re.search(r"\berror: |Error: ", line)] or [x for x in lines if x.strip()]
            word = f"; it said last: {said[-1].strip()[-300:]}" if said else ""
            others.append((folder, f"no results file: failed, cut off or still running{word}"))
            continue
        except ValueError:
            others.append((folder, "its results file is cut short or not one of this project's"))
            continue
        run = Run(folder, data, stages)
        if run.arguments.get("do_train") is False:
            others.append((folder, f"{run.method} on {run.task}: evaluation or prediction alone, nothing was trained"))
        elif data.get("status") == "finished":
            runs.append(run)
        else:
            others.append((folder, f"{run.method} on {run.task}, seed {run.seed}: {data.get('status')}"))
    _name_variants(runs)
    return runs, others


def _load(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("version") != 1 or not _like(data, RESULTS):
        raise ValueError(path)
    return data


# What is read of a results file: an example of each kind; None: a number or None. Keys may be missing, "*" is any key.
RESULTS: Any = {
    "status": "",
    "method": "",
    "task": "",
    "seed": 0,
    "arguments": {"seed": 0, "reg_orth_coef": 0.0},
    "effective_batch": 0,
    "steps": 0,
    "parameters": {"trainable": 0, "lora": 0, "remaining": 0, "modules": {"*": {"rank": 0}}},
    "metrics": {"*": 0.0},
    "history": [{"*": 0.0, "epoch": None}],
    "wall_seconds": 0.0,
    "lambda": 0.0,
    "remaining": 0,
    "stages": [{"lambda": 0.0, "remaining": 0, "steps": 0, "metrics": {"*": 0.0}}],
}


def _like(value: Any, example: Any) -> bool:
    """Whether JSON is of the example's kind: a file that something else wrote or broke is not."""
    if isinstance(example, dict):
        if not isinstance(value, dict):
            return False
        known = [key for key in value if key in example or "*" in example]
        return all(_like(value[key], example.get(key, example.get("*"))) for key in known)
    if isinstance(example, list):
        return isinstance(value, list) and all(_like(v, example[0]) for v in value)
    if isinstance(example, str):
        return isinstance(value, str)
    return (
        value is example is None
        or isinstance(value, int | float)
        and not isinstance(value, bool)
        and not abs(value) > 1e25
    )


def _name_variants(runs: Sequence[Run]) -> None:
    """Name runs of one task and method by the settings in which they differ: a grid shows itself."""
    for task, method in {(run.task, run.method) for run in runs}:
        same = [run for run in runs if (run.task, run.method) == (task, method)]
        keys = sorted({key for run in same for key in run.settings})
        differ = [k for k in keys if len({repr(run.settings.get(k)) for run in same}) > 1]
        for run in same:
            run.variant = ", ".join(f"{k}={_brief(run.settings.get(k))}" for k in differ)


def _brief(value: Any) -> str:
    return Path(value).name if isinstance(value, str) and "/" in value else f"{value}"


def groups(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by (task, name), in a fixed order, each by seed."""

    def place(run: Run) -> tuple[Any, ...]:
        known = ORDER.index(run.method) if run.method in ORDER else len(ORDER)
        numbers = [float(x) for x in re.findall(r"=([\d.]+(?:e-?\d+)?)", run.variant)]
        return run.task, known, run.method, numbers, run.variant, str(run.seed).zfill(9)

    found: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=place):
        found.setdefault((run.task, run.name), []).append(run)
    return found


# ---- numbers ----


def percent(metric: str, values: Sequence[float]) -> np.ndarray:
    """Scores in percent; a squared error as it is."""
    return np.asarray(values, dtype=float) * (1 if metric == "mse" else 100)


def spread(values: np.ndarray) -> str:
    """mean +- standard deviation over seeds (n - 1); a single value has none."""
    if not len(values):
        return "-"
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> tuple[int, float, float]:
    """Number of common seeds, mean difference, and half width of its 95 % interval by the t distribution.

    The half width is infinite below 3 pairs.
    """
    from scipy import stats

    seeds = sorted(set(ours) & set(theirs), key=str)
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    n = len(differences)
    if n < 3:
        return n, float(differences.mean()) if n else float("nan"), float("inf")
    return n, float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))


def verdict(n: int, mean: float, half: float) -> str:
    """A plain word."""
    if n < 3:
        return f"too small to tell (n = {n})"
    if abs(mean) <= half:
        return "no difference seen"
    return "higher" if mean > 0 else "lower"


# ---- tables ----

SELECTIONS = {
    "last": "the end of each run (where a run was told to load its best checkpoint, that one), validation split",
    "best": "the evaluation with the best score of each run, chosen and reported on the same validation rows: biased "
    "upwards",
    "heldout": "the evaluation that is best on one half of the validation rows, reported on the other half "
    "(--heldout_split)",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def scores(runs: Sequence[Run], metric: str, selection: str) -> dict[Any, float]:
    """The metric by seed, in percent, of the runs that have it."""
    found = {run.seed: run.chosen(selection).get(metric) for run in runs}
    return {seed: float(percent(metric, [value])[0]) for seed, value in found.items() if value is not None}


def main_table(grouped: Mapping[tuple[str, str], list[Run]], selection: str) -> str:
    """Methods x tasks, every metric of a task, with n."""
    tasks = list(dict.fromkeys(task for task, _ in grouped))
    metrics = {task: next(runs[0].metrics for (t, _), runs in grouped.items() if t == task) for task in tasks}
    header = ["method", *(f"{t}: {' / '.join(WORDS.get(m, m) for m in metrics[t])}" for t in tasks)]
    rows = []
    for name in sorted({n for _, n in grouped}, key=lambda n: [n for _, n in grouped].index(n)):
        cells = []
        for task in tasks:
            found = [scores(grouped.get((task, name), []), m, selection) for m in metrics[task]]
            text = " / ".join(spread(np.array(list(values.values()))) for values in found)
            cells.append(f"{text} (n={len(found[0])})" if found and found[0] else "-")
        rows.append([name, *cells])
    return table(header, rows)


def cost_table(grouped: Mapping[tuple[str, str], list[Run]]) -> str:
    """Parameters and wall time of each task and method."""
    rows = []
    for (task, name), runs in grouped.items():

        def mean(values: Iterable[float | None], form: str) -> str:
            known = [v for v in values if v is not None]
            return format(sum(known) / len(known), form) if known else "-"

        rows.append([f"{task}, {name}", str(len(runs)), mean((r.trainable for r in runs), ",.0f"),
                     mean((r.remaining for r in runs), ",.0f"), mean((r.steps for r in runs), ",.0f"),
                     mean((r.data.get("wall_seconds") for r in runs), ",.0f")])  # fmt: skip
    return table(["task, method", "n", "trainable", "remaining", "steps", "seconds"], rows)


def baseline(grouped: Mapping[tuple[str, str], list[Run]], task: str, runs: Sequence[Run]) -> list[Run]:
    """The LoRA runs to compare with: those of the same grid point, or the only ones; else none."""
    candidates = {name: found for (t, name), found in grouped.items() if t == task and found[0].method == "lora"}
    if len(candidates) <= 1:
        return next(iter(candidates.values()), [])
    return candidates.get(f"lora {runs[0].variant}".strip(), [])


def difference_table(grouped: Mapping[tuple[str, str], list[Run]], selection: str) -> str:
    """Each method against LoRA on the same seeds."""
    rows = []
    for (task, name), runs in grouped.items():
        if runs[0].method == "lora" or not runs[0].metrics:
            continue
        metric = runs[0].metrics[0]
        lora = baseline(grouped, task, runs)
        n, mean, half = paired(scores(runs, metric, selection), scores(lora, metric, selection))
        if not n:
            rows.append([f"{task}, {name}", "0", "-", "-", "no LoRA run with these seeds and this grid point"])
        else:
            interval = f"{mean - half:+.2f} to {mean + half:+.2f}" if n >= 3 else "-"
            rows.append([f"{task}, {name}", str(n), f"{mean:+.2f}", interval, verdict(n, mean, half)])
    return table(["task, method", "pairs", "difference", "95 % interval", "against LoRA"], rows) if rows else ""


def published_tables(tasks: Sequence[str]) -> list[str]:
    """Rows of the papers for the tasks at hand."""
    parts = []
    for name, paper in json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8")).items():
        columns = [i for i, column in enumerate(paper["columns"]) if column.split()[0] in tasks]
        if not columns:
            continue
        header = ["published", "parameters", *(paper["columns"][i] for i in columns), "average of all 8"]
        rows = []
        for row in paper["rows"]:
            values = ("-" if row["values"][i] is None else f"{row['values'][i]:.2f}" for i in columns)
            rows.append([row["method"], row["parameters"], *values, f"{row['average']:.2f}"])
        parts.append(f"**{name}**, {paper['source']}. What differs: {paper['differs']}.\n\n{table(header, rows)}")
    return parts


def stage_table(runs: Sequence[Run]) -> str:
    """SoRA's schedule: threshold, what remains, score."""
    rows = []
    for run in runs:
        for stage in run.data.get("stages", []):
            score = _named(stage.get("metrics", {}), "eval_").get(run.metrics[0]) if run.metrics else None
            cells = [f"{stage.get('lambda', float('nan')):.3g}", f"{stage.get('remaining', 0):,}",
                     "-" if score is None else f"{percent(run.metrics[0], [score])[0]:.2f}"]  # fmt: skip
            rows.append([f"{run.task}, {run.name}, seed {run.seed}", *cells])
    return table(["run", "threshold", "remaining", "score"], rows) if rows else ""


# ---- figures ----


def band(runs: Sequence[Run], key: str, x: str = "epoch") -> figures.Band | None:
    """Mean and deviation over seeds of an evaluation's number, at the points that all runs have."""
    series = [{e[x]: e[key] for e in run.evaluations if key in e and x in e} for run in runs]
    common = sorted(set.intersection(*(set(s) for s in series))) if series else []
    if not common:
        return None
    values = np.array([[s[point] for point in common] for s in series], dtype=float)
    deviation = values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(common))
    return common, values.mean(0).tolist(), deviation.tolist()


def scaled(line: figures.Band | None, factor: float) -> figures.Band | None:
    """A band in other units."""
    return None if line is None else (line[0], [factor * y for y in line[1]], [factor * y for y in line[2]])


def draw(grouped: Mapping[tuple[str, str], list[Run]], selection: str, out: Path) -> tuple[list[str], list[str]]:
    """All figures as PNG files; returns their names, and lines on adapters that could not be read."""
    made: list[str] = []
    problems: list[str] = []

    def save(figure: Any, name: str) -> None:
        file = re.sub(r"[^\w.=-]+", "_", name) + ".png"
        figure.savefig(out / file, dpi=130)
        made.append(file)

    tasks = list(dict.fromkeys(task for task, _ in grouped))
    panels = {}
    for task in tasks:
        mine = {name: runs for (t, name), runs in grouped.items() if t == task}
        metric = next(iter(mine.values()))[0].metrics[0] if next(iter(mine.values()))[0].metrics else None
        if metric is None:
            continue
        label = f"{WORDS.get(metric, metric)}{'' if metric == 'mse' else ' (%)'}"
        values = {name: list(scores(runs, metric, selection).values()) for name, runs in mine.items()}
        if any(values.values()):
            panels[task] = (label, {name: found for name, found in values.items() if found})

        def lines(key: str, factor: float, x: str = "epoch", of: Mapping[str, list[Run]] = mine) -> dict[str, Any]:
            found = {name: scaled(band(runs, key, x), factor) for name, runs in of.items()}
            return {name: line for name, line in found.items() if line is not None and len(line[0]) > 1}

        learning = {
            label: lines(f"eval_{metric}", 1 if metric == "mse" else 100),
            "validation loss": lines("eval_loss", 1),
        }
        if all(learning.values()):
            save(figures.curves(learning, "epoch", f"{task}: mean over seeds, band of one standard deviation"),
                 f"curves_{task}")  # fmt: skip
        budget = {"ranks left, all matrices": lines("rank_total", 1, "step"),
                  "remaining parameters (thousands)": lines("remaining", 1e-3, "step"),
                  "effective rank, mean over matrices": lines("effective_rank", 1, "step")}  # fmt: skip
        if all(budget.values()):
            title = f"{task}: budget, sparsity and effective rank at each evaluation"
            save(figures.curves(budget, "optimizer step", title), f"budget_{task}")

        points: dict[str, list[tuple[float, float, float]]] = {}
        for name, runs in mine.items():
            found = np.array(list(scores(runs, metric, selection).values()))
            left = [run.remaining for run in runs if run.remaining is not None]
            if len(found) and left:
                deviation = float(found.std(ddof=1)) if len(found) > 1 else 0.0
                key = (
                    runs[0].method
                    if any(n != name and r[0].method == runs[0].method for n, r in mine.items())
                    else name
                )
                points.setdefault(key, []).append((float(np.mean(left)), float(found.mean()), deviation))
        if len({x for values in points.values() for x, _, _ in values}) > 1:
            title = f"{task}: metric at the budget that is left, mean ± deviation over seeds"
            save(figures.frontier(points, label, title), f"frontier_{task}")

        staged = {name: runs for name, runs in mine.items() if all(run.data.get("stages") for run in runs)}
        for name, runs in staged.items():
            curve = figures.stages([run.data["stages"] for run in runs], f"eval_{metric}", label, f"{task}, {name}")
            save(curve, f"lambda_{task}_{name}")

        for name, runs in mine.items():
            ranks = [run.ranks for run in runs]
            if runs[0].method in ("adalora", "sora") or any(len(set(r.values())) > 1 for r in ranks):
                mean = {module: float(np.mean([r.get(module, np.nan) for r in ranks])) for module in ranks[0]}
                most = float(runs[0].arguments.get("lora_r") or max(mean.values(), default=1))
                title = f"{task}, {name}: rank left of {most:.0f}\nmean of {len(runs)} seed(s)"
                save(figures.rank_heatmap(mean, title, most), f"ranks_{task}_{name}")

        values_of = {}
        for name, runs in mine.items():
            spectra: list[np.ndarray] = []
            for run in runs:
                try:
                    spectra += adapter_spectra(run.folder).values()
                except FileNotFoundError:
                    continue  # full fine-tuning has no adapter
                except (OSError, ValueError, KeyError) as error:
                    problems.append(f"the adapter of {run.folder} cannot be read: {error}")
            if spectra:
                length = max(map(len, spectra))
                padded = [np.pad(values, (0, length - len(values))) for values in spectra]
                values_of[name] = (np.mean(padded, axis=0), [effective_rank(values) for values in spectra])
        if values_of:
            save(
                figures.spectra(values_of, f"{task}: the trained updates, over all matrices and seeds"),
                f"spectra_{task}",
            )
    if panels:
        title = f"a dot a seed, mean ± standard deviation; selection: {selection}"
        save(figures.comparison(panels, title), "comparison")
    return made, problems


# ---- files ----


def write_csv(runs: Sequence[Run], others: Sequence[tuple[Path, str]], selection: str, root: Path, out: Path) -> None:
    """One line a run, with its metrics as fractions."""
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.metrics))
    header = ["task", "method", "variant", "seed", "status", "selection", *metrics, "trainable", "remaining", "steps",
              "wall_seconds", "folder"]  # fmt: skip
    with open(out / "report.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for run in (run for found in groups(runs).values() for run in found):
            values = run.chosen(selection)
            about = [run.task, run.method, run.variant, run.seed, "finished", selection]
            cost = [run.trainable, run.remaining, run.steps, run.data.get("wall_seconds")]
            writer.writerow([*about, *(values.get(m, "") for m in metrics), *cost, run.folder.relative_to(root)])
        for folder, reason in others:
            writer.writerow(["", "", "", "", reason, *[""] * (len(header) - 6), folder.relative_to(root)])


def report(root: Path, out: Path, selection: str) -> Path:
    """Read everything below `root` and write the report into `out`.

    Raises:
        InputError: nothing to report.
    """
    runs, others = read(root)
    if not runs and not others:
        raise InputError(f"no run.json below {root}: give the folder that holds the runs' output folders.")
    out.mkdir(parents=True, exist_ok=True)
    grouped = groups(runs)
    tasks = list(dict.fromkeys(task for task, _ in grouped))
    models = sorted({_brief(run.arguments.get("model_name_or_path")) for run in runs})
    parts = [
        "# Results",
        f"{len(runs)} finished runs. Model: {', '.join(models) or '-'}. Scores in percent, mean ± standard deviation "
        f"over n seeds. Selection: **{selection}**, {SELECTIONS[selection]}.",
        main_table(grouped, selection),
    ]
    twice = [f"{t}, {name}" for (t, name), found in grouped.items() if len({r.seed for r in found}) < len(found)]
    if twice:
        parts.append(f"Several runs of one seed, of which the last in the order of folders counts: {'; '.join(twice)}.")
    lacking = sum(not run.chosen(selection) for run in runs)
    if lacking:
        way = (
            " (run them with --heldout_split SEED)"
            if selection == "heldout"
            else " (run them with --eval_strategy epoch)"
        )
        parts.append(f"{lacking} runs hold nothing for this selection{way}.")
    differences = difference_table(grouped, selection)
    if differences:
        text = (
            "On the same seeds, in points of the task's first metric; the interval is the paired 95 % interval of the "
            "t distribution, not corrected for the number of comparisons."
        )
        parts += ["## Difference to LoRA", text, differences]
    text = (
        "trainable: low-rank factors and head; remaining: what is left of the factors after pruning, head not counted; "
        "seconds: wall time of the last process of a run."
    )
    parts += ["## Cost", text, cost_table(grouped)]
    schedule = stage_table([run for found in grouped.values() for run in found])
    if schedule:
        parts += ["## Sparsifying schedule", schedule]
    published = published_tables(tasks)
    if published:
        text = (
            f"For comparison, here: {', '.join(models)}, {len({run.seed for run in runs})} seed(s), selection "
            f"{selection}. Numbers are comparable only as far as these agree. STS-B's published number is one "
            "correlation, set beside the mean of Pearson and Spearman. The RM-LoRA paper's GLUE numbers are not known "
            "to this project."
        )
        parts += ["## Published, not from this project", text, *published]
    if others:
        parts += [
            "## Runs that do not count",
            "\n".join(f"- `{f.relative_to(root)}`: {reason}" for f, reason in others),
        ]
    made, problems = draw(grouped, selection, out)
    parts += problems
    if made:
        parts += ["## Figures", "\n\n".join(f"![{name}]({name})" for name in made)]
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_csv(runs, others, selection, root, out)
    return out / "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with runs at any depth")
    parser.add_argument(
        "--selection", choices=list(SELECTIONS), default="last", help="which evaluation of a run counts"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: the folder itself)")
    args = parser.parse_args(argv)
    try:
        path = report(args.folder, args.out or args.folder, args.selection)
    except InputError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: error: the report cannot be written ({error}): name another folder with --out.",
              file=sys.stderr)  # fmt: skip
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

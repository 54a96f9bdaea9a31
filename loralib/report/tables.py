"""Tables of the report as Markdown, each from the table of runs."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loralib.report.runs import Run, brief, named

WORDS = {"matthews_correlation": "Matthews", "accuracy_mm": "mismatched", "combined_score": "mean of the two",
         "spearmanr": "Spearman", "pearson": "Pearson", "f1": "F1"}  # fmt: skip


# ---- text ----


def escape(text: str) -> str:
    """Escape text for a Markdown table cell: no character of it opens a cell, HTML, an image or a formula."""
    one_line = " ".join(str(text).split())
    marked = re.sub(r"([\\`*{}\[\]|$~#])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line)
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """Text as a code span, with a fence longer than any run of backticks in it."""
    one_line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall(r"`+", one_line)), default=0))
    pad = " " if "`" in one_line else ""
    return f"{fence}{pad}{one_line}{pad}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words_last: bool = False) -> str:
    """A Markdown table; all columns but the first are aligned right. Cells are Markdown: `escape` what a user named.

    Args:
        words_last: the last column has words, which are aligned left.
    """
    numbers = len(header) - 1 - words_last
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * numbers + ":---|" * words_last]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# ---- numbers ----


def percent(metric: str, values: Any) -> np.ndarray:
    """Scores in percent; a squared error as it is."""
    return np.asarray(values, dtype=float) * (1 if metric == "mse" else 100)


def in_percent(metrics: Iterable[str]) -> str:
    """The unit of scores, in words: `percent` leaves a squared error as it is."""
    return "in percent, squared errors as they are" if "mse" in metrics else "in percent"


def spread(values: Any) -> str:
    """mean +- standard deviation over seeds (n - 1); a single value has none."""
    known = np.asarray(values, dtype=float)
    if not len(known):
        return "-"
    return f"{known.mean():.2f}" + (f" ± {known.std(ddof=1):.2f}" if len(known) > 1 else "")


def average(values: pd.Series) -> str:
    """Mean of what is known, in whole numbers."""
    known = values.dropna().astype(float)
    return f"{known.mean():,.0f}" if len(known) else "-"


def metrics_of(runs: pd.DataFrame) -> tuple[str, ...]:
    """Metrics of a task, as its first run has them."""
    return next(iter(runs["run"])).metrics if len(runs) else ()


def scores(runs: pd.DataFrame, metric: str) -> dict[Any, float]:
    """The metric by seed, in percent, of the runs that have it; of two runs with one seed the last one's."""
    column = f"metric {metric}"
    if column not in runs:
        return {}
    known = runs.dropna(subset=[column])
    return dict(zip(known["seed"], percent(metric, known[column]).tolist(), strict=True))


def by_method(runs: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(task, name, its runs) in the order of the table."""
    return [(task, name, part) for (task, name), part in runs.groupby(["task", "name"], sort=False)]


# ---- tables ----


def main_table(runs: pd.DataFrame) -> str:
    """Methods x tasks, every metric of a task, with n."""
    tasks = {task: metrics_of(part) for task, part in runs.groupby("task", sort=False)}
    groups = {(task, name): part for task, name, part in by_method(runs)}
    header = ["method", *(f"{escape(t)}: {' / '.join(WORDS.get(m, m) for m in found)}" for t, found in tasks.items())]
    rows = []
    for name in runs["name"].drop_duplicates():
        cells = []
        for task, metrics in tasks.items():
            part = groups.get((task, name))
            found = [] if part is None else [scores(part, metric) for metric in metrics]
            text = " / ".join(spread(list(values.values())) for values in found)
            mark = ", as one class" if part is not None and part["as_one_class"].all() else ""
            cells.append(f"{text} (n={len(found[0])}{mark})" if found and found[0] else "-")
        rows.append([escape(name), *cells])
    return table(header, rows)


# Settings that do nothing while a switch is off.
NEEDS = {
    "apply_lora": ("lora_type", "reg_orth_coef"),
    "apply_adalora": ("target_rank", "target_total_rank", "init_warmup", "final_warmup", "mask_interval", "beta1",
                      "beta2"),
    "train_sparse": ("sparse_lambda", "sparse_lambda_2"),
}  # fmt: skip


def _in_use(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those whose switch is off, and without --apply_lora, which r says."""
    idle = {name for switch, names in NEEDS.items() if settings.get(switch) is False for name in names}
    return {name: value for name, value in settings.items() if name not in idle | {"apply_lora"}}


SHOWN = {"learning_rate": "learning rate", "num_train_epochs": "epochs", "lora_r": "r", "lora_alpha": "alpha"}


def settings_table(runs: pd.DataFrame) -> str:
    """What each method was trained with, so that a reader sees whether a comparison is fair.

    Its other settings: those that the methods of the task do not share, with the value where a run has one.
    """
    rows = []
    for task, part in runs.groupby("task", sort=False):
        settings = {name: _in_use(of["run"].iloc[0].settings) for _, name, of in by_method(part)}
        every = dict.fromkeys(key for found in settings.values() for key in found)
        unlike = [k for k in every if k not in (*SHOWN, "effective_batch", "train_file", "validation_file")
                  and len({brief(found.get(k)) for found in settings.values()}) > 1]  # fmt: skip
        for _, name, of in by_method(part):
            run, mine = of["run"].iloc[0], settings[name]
            counts = [f"{run.data.get('metrics', {}).get(f'{kind}_samples', '-')}" for kind in ("train", "eval")]
            own = ", ".join(f"{k} {brief(mine[k])}" for k in unlike if mine.get(k) not in (None, False, "", 0))
            cells = [brief(mine.get(k)) if mine.get(k) is not None else "-" for k in (*SHOWN, "effective_batch")]
            rows.append([escape(f"{task}, {name}"), *map(escape, cells), *counts, escape(own) or "-"])
    header = ["task, method", *SHOWN.values(), "batch", "training rows", "evaluation rows", "other settings"]
    return table(header, rows, words_last=True)


def cost_table(runs: pd.DataFrame) -> str:
    """Parameters, time and memory of each task and method, means over its runs."""
    columns = ["trained", "remaining", "head", "steps", "seconds", "peak_mb", "rows_per_second"]
    rows = []
    for task, name, part in by_method(runs):
        part = part.drop_duplicates("seed", keep="last")  # as in the table of scores
        known = part.assign(trained=pd.to_numeric(part["trainable"]) - pd.to_numeric(part["head"]).fillna(0))
        hours = pd.to_numeric(part["seconds"]).sum() / 3600
        cells = [average(known[column]) for column in columns]
        rows.append([escape(f"{task}, {name}"), str(len(part)), *cells, f"{hours:.2f}"])
    header = ["task, method", "n", "trained", "remaining", "head", "steps", "seconds", "peak MB", "evaluated rows/s",
              "hours"]  # fmt: skip
    return table(header, rows)


def stage_table(runs: Sequence[Run]) -> str:
    """SoRA's schedule: threshold, what remains, score."""
    rows = []
    for run in runs:
        for stage in run.data.get("stages", []):
            score = named(stage.get("metrics", {}), "eval_").get(run.metrics[0]) if run.metrics else None
            cells = [f"{stage.get('lambda', float('nan')):.3g}", f"{stage.get('remaining', 0):,}",
                     "-" if score is None else f"{percent(run.metrics[0], [score])[0]:.2f}"]  # fmt: skip
            rows.append([escape(f"{run.task}, {run.name}, seed {run.seed}"), *cells])
    return table(["run", "threshold", "remaining", "score"], rows) if rows else ""


def published_tables(file: Path, tasks: Sequence[str]) -> list[str]:
    """Rows of the papers for the tasks at hand."""
    parts = []
    for name, paper in json.loads(file.read_text(encoding="utf-8")).items():
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

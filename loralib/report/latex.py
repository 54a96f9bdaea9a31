"""The table of scores for a paper: booktabs, with a bold number only where the paired intervals say so."""

import numpy as np
import pandas as pd

from loralib.report.differences import clear_best
from loralib.report.tables import WORDS, by_method, metrics_of, scores

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"} | {
    c: rf"\{c}" for c in "{}$&#_%"
}


def latex_text(text: str) -> str:
    """A name as LaTeX prints it."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return "".join(SPECIAL.get(c, c) for c in one_line)


def latex_table(runs: pd.DataFrame, selection: str, models: str) -> str:
    """The table of scores as a `table` environment; it needs the package booktabs.

    Args:
        models: what was fine-tuned, for the caption.
    """
    tasks = {task: metrics for task, part in runs.groupby("task", sort=False) if (metrics := metrics_of(part))}
    groups = {(task, name): part for task, name, part in by_method(runs)}
    counts = {n for part in groups.values() if (n := len(scores(part, (metrics_of(part) or ("",))[0])))}
    best = {
        (task, metric): clear_best(runs[runs["task"] == task], metric)
        for task, metrics in tasks.items()
        for metric in metrics
    }

    def cell(task: str, name: str, metric: str) -> str:
        part = groups.get((task, name))
        found = [] if part is None else list(scores(part, metric).values())
        if not found:
            return "--"
        text = f"{np.mean(found):.2f}"
        text = rf"\textbf{{{text}}}" if best[task, metric] == name else text
        deviation = rf" $\pm$ {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""
        return text + deviation + (f" ({len(found)})" if len(counts) > 1 else "")

    columns = [(task, metric) for task, metrics in tasks.items() for metric in metrics]
    seeds = f"{n} seeds" if len(counts) == 1 and (n := counts.pop()) > 1 else "one seed"
    seeds = "seeds, whose number stands in brackets" if len(counts) > 1 else seeds
    caption = (
        f"{latex_text(models)} on the validation rows: mean and standard deviation over {seeds}, in percent; "
        f"selection: {selection}. Bold: better than every other method of the column by the paired 95\\,\\% interval "
        "of the t distribution, not corrected for the number of comparisons."
    )
    spans = "".join(rf" & \multicolumn{{{len(m)}}}{{c}}{{{latex_text(task)}}}" for task, m in tasks.items())
    names = "".join(f" & {latex_text(WORDS.get(metric, metric))}" for _, metric in columns)
    rows = [
        latex_text(name) + "".join(f" & {cell(task, name, metric)}" for task, metric in columns) + r" \\"
        for name in runs["name"].drop_duplicates()
    ]
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        spans + r" \\",
        "method" + names + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{caption}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"

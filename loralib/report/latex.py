"""The table of scores for a paper: booktabs, with a bold number only where the paired intervals say so."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from loralib.report.differences import clear_best
from loralib.report.tables import WORDS, by_method, in_percent, metrics_of, scores

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"} | {
    c: rf"\{c}" for c in "{}$&#_%"
}

MOST_COLUMNS = 5  # of numbers beside each other


def latex_text(text: str) -> str:
    """A name as LaTeX prints it."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return "".join(SPECIAL.get(c, c) for c in one_line)


def latex_table(runs: pd.DataFrame, selection: str, models: str) -> str:
    """The table of scores as a `table` environment; it needs the package booktabs.

    Tasks stand below each other in blocks of at most MOST_COLUMNS columns, so that nine of them fit on a page.

    Args:
        models: what was fine-tuned, for the caption.
    """
    groups = {(task, name): part for task, name, part in by_method(runs)}
    tasks = {task: [metric for metric in metrics_of(part) if scores(part, metric)]
             for task, part in runs.groupby("task", sort=False)}  # fmt: skip
    tasks = {task: metrics for task, metrics in tasks.items() if metrics}
    if not tasks:
        return "% no finished run with a score\n"
    counts = sorted(
        {n for (task, _), part in groups.items() if task in tasks and (n := len(scores(part, tasks[task][0])))}
    )
    best = {
        (task, metric): clear_best(runs[runs["task"] == task], metric, selection)
        for task, metrics in tasks.items()
        for metric in metrics
    }

    def cell(task: str, name: str, metric: str) -> str:
        part = groups.get((task, name))
        found = [] if part is None else list(scores(part, metric).values())
        if part is None or not found:
            return "--"
        text = f"{np.mean(found):.2f}"
        text = rf"\textbf{{{text}}}" if best[task, metric] == name else text
        deviation = rf"$_{{\pm {np.std(found, ddof=1):.2f}}}$" if len(found) > 1 else ""
        dagger = r"$^\dagger$" if part["as_one_class"].all() else ""
        return text + deviation + dagger + (f" ({len(found)})" if len(counts) > 1 else "")

    if counts[-1:] in ([], [1]):
        what = "one seed"
    else:
        seeds = f"{counts[0]} seeds" if len(counts) == 1 else "seeds, whose number stands in brackets"
        what = f"mean and standard deviation over {seeds}"
    same = any(part["as_one_class"].all() for part in groups.values())
    unit = in_percent(metric for metrics in tasks.values() for metric in metrics)
    caption = (
        f"{latex_text(models)} on the validation rows: {what}, {unit}; selection: {selection}. Bold: better than "
        "every other method of the column by the paired 95\\,\\% interval of the t distribution, not corrected for the "
        "number of comparisons." + (" $\\dagger$: the score of one answer for every row." if same else "")
    )
    lines = ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering"]
    for block in _blocks(tasks):
        columns = [(task, metric) for task in block for metric in tasks[task]]
        spans = "".join(rf" & \multicolumn{{{len(tasks[task])}}}{{c}}{{{latex_text(task)}}}" for task in block)
        ends = np.cumsum([len(tasks[task]) for task in block]) + 1
        rules = "".join(
            rf"\cmidrule(lr){{{end - len(tasks[task]) + 1}-{end}}}" for task, end in zip(block, ends, strict=True)
        )
        names = "".join(f" & {latex_text(WORDS.get(metric, metric))}" for _, metric in columns)
        rows = [
            latex_text(name) + "".join(f" & {cell(task, name, metric)}" for task, metric in columns) + r" \\"
            for name in runs["name"].drop_duplicates()
            if any((task, name) in groups for task in block)
        ]
        lines += [r"\par\medskip" if block[0] != next(iter(tasks)) else "%",
                  rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", spans + r" \\", rules,
                  "method" + names + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]  # fmt: skip
    return "\n".join([*lines, rf"\caption{{{caption}}}", r"\end{table}"]) + "\n"


def _blocks(tasks: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Tasks that stand beside each other."""
    blocks: list[list[str]] = [[]]
    for task, metrics in tasks.items():
        if blocks[-1] and sum(len(tasks[other]) for other in blocks[-1]) + len(metrics) > MOST_COLUMNS:
            blocks.append([])
        blocks[-1].append(task)
    return blocks

"""The report: a page as Markdown and as HTML, a CSV file, a table for LaTeX and figures, from runs below a folder."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from loralib.adapters.writing import write_file
from loralib.errors import InputError
from loralib.report.differences import comparisons, difference_table, sentences
from loralib.report.drawing import draw
from loralib.report.latex import latex_table
from loralib.report.runs import Run, brief, frame, read
from loralib.report.tables import (
    code,
    cost_table,
    escape,
    in_percent,
    main_table,
    published_tables,
    settings_table,
    stage_table,
)
from loralib.report.tuning import (
    chosen_table,
    expected_table,
    file_beside,
    final_runs,
    open_trials,
    read_tuning,
    trials_are_equal,
    tuning_seeds,
)
from loralib.report.webpage import webpage

SELECTIONS = {
    "last": "the end of each run (or its best checkpoint, if the run was told to load that), validation split",
    "best": "the evaluation with the best score of each run, with the parameters that remained then; chosen and "
    "reported on the same validation rows: biased upwards",
    "heldout": "the evaluation that is best on one half of the validation rows, reported on the other half "
    "(--heldout_split), with the parameters that remained then",
}
Others = Sequence[tuple[Path, str]]


def write_csv(runs: pd.DataFrame, others: Others, selection: str, root: Path, out: Path) -> None:
    """One line per run, with its metrics as fractions; text that a spreadsheet would take for a formula stays text."""
    metrics = [column for column in runs.columns if column.startswith("metric ")]
    lines = runs.assign(status="finished", selection=selection, folder=[run.folder for run in runs["run"]])
    left = pd.DataFrame([{"status": reason, "folder": folder} for folder, reason in others])
    lines = pd.concat([lines.drop(columns=["run", "name"]), left])
    lines["folder"] = [str(folder.relative_to(root)) for folder in lines["folder"]]
    columns = ["task", "method", "variant", "seed", "status", "selection", *metrics, "trainable", "remaining", "steps",
               "wall_seconds", "seconds", "peak_mb", "rows_per_second", "folder"]  # fmt: skip
    lines = lines.reindex(columns=columns).astype(object).map(_no_formula)
    lines = lines.rename(columns=lambda name: name.removeprefix("metric "))
    lines.to_csv(out / "report.csv", index=False, encoding="utf-8")


def _no_formula(cell: object) -> object:
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)  # a count, which a column with gaps holds as a float
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def report(root: Path, out: Path, selection: str, published: Path | None = None, pages: Sequence[Path] = ()) -> Path:
    """Read everything below `root` and write the report into `out`.

    Args:
        published: a file with rows of the papers to set beside the results.
        pages: Markdown files, into which sections of the report are put where they ask for them (`fill`).

    Raises:
        InputError: nothing to report, or a page asks for a section that does not exist.
    """
    found, others = read(root)
    if not found and not others:
        raise InputError(f"no run.json below {root}: give the folder that holds the runs' output folders.")
    tuning = read_tuning(root, found)
    if tuning is None and (trials := [run for run in found if run.data.get("trial") is True]):
        raise InputError(
            f"{root} has {len(trials)} trials of a tuning, and the record of that tuning is not there: copy the file "
            f"{file_beside(root).name} from beside the original (its name there begins like that of the original "
            "results file). Files that were put together can only be reported one by one."
        )
    finals = final_runs(found, tuning) if tuning else found
    out.mkdir(parents=True, exist_ok=True)
    runs = frame(finals, selection)
    made, problems = draw(runs, selection, out, tuning)
    parts = ["# Results", *_results(runs, selection), *_tuned(tuning, found, finals, selection)]
    parts += [*_costs(runs), *_origin(found), *_beside(runs, selection, published)]
    if others:
        lines = (f"- {code(str(folder.relative_to(root)))}: {escape(reason)}" for folder, reason in others)
        parts += ["## Runs that do not count", "\n".join(lines)]
    parts += problems
    if made:
        parts += ["## Figures", "\n\n".join(f"![{name}]({name})" for name in made)]
    text = "\n\n".join(parts) + "\n"
    write_file(out / "report.md", text.encode(errors="replace"))
    write_file(out / "report.html", webpage(text, made).encode(errors="replace"))
    write_file(out / "report.tex", latex_table(runs, selection, _models(runs)).encode(errors="replace"))
    write_csv(runs, others, selection, root, out)
    for page in pages:
        fill(page, text)
    return out / "report.md"


def fill(page: Path, text: str) -> None:
    """Put sections of the report into a page, between `<!-- report: SECTION -->` and `<!-- end of report -->`.

    Args:
        page: a Markdown file.
        text: the report as Markdown.

    Raises:
        InputError: the page has no such marks, or names a section that the report lacks.
    """
    sections = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    try:
        before = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--page {page} cannot be read ({error}).") from error

    def section(found: re.Match[str]) -> str:
        if found[1] not in sections:
            raise InputError(
                f"{page} asks for the section {found[1]!r} of the report, which has {', '.join(sections)}."
            )
        return f"<!-- report: {found[1]} -->\n\n{sections[found[1]].strip()}\n\n<!-- end of report -->"

    after, count = re.subn(r"<!-- report: (.*?) -->.*?<!-- end of report -->", section, before, flags=re.DOTALL)
    if not count:
        raise InputError(
            f"{page} has no place for the report: write <!-- report: Scores --> and <!-- end of report --> where its "
            "section Scores shall stand."
        )
    write_file(page, after.encode())


def _models(runs: pd.DataFrame) -> str:
    return ", ".join(sorted({brief(run.arguments.get("model_name_or_path")) for run in runs["run"]}))


def _results(runs: pd.DataFrame, selection: str) -> list[str]:
    """The sections with the scores and the comparisons, as Markdown."""
    unit = in_percent(metric for run in runs["run"] for metric in run.metrics)
    parts = [
        f"{len(runs)} finished runs. Model: {escape(_models(runs)) or '-'}. Scores {unit}, mean ± standard "
        f"deviation over n seeds. Selection: **{selection}**, {SELECTIONS[selection]}.",
        "## Scores",
        main_table(runs),
    ]
    twice = runs[runs.duplicated(["task", "name", "seed"])][["task", "name"]].drop_duplicates()
    if len(twice):
        named = escape("; ".join(f"{row.task}, {row.name}" for row in twice.itertuples(index=False)))
        parts.append(f"Some seeds have several runs; the last one is used, in the order of folders or lines: {named}.")
    lacking = sum(not run.chosen(selection) for run in runs["run"])
    if lacking:
        flag = "--heldout_split SEED" if selection == "heldout" else "--eval_strategy epoch"
        parts.append(f"{lacking} runs have no evaluation for this selection (run them with {flag}).")
    older = sum(len(run.data.get("stages", [])) > 1 and not run.stages for run in runs["run"])
    if older:
        parts.append(f"{older} runs of several trainings have only the evaluations of the last one in their records.")
    parts += _one_class(runs) + _over_budget(runs, selection)
    found = comparisons(runs, selection)
    if found:
        text = (
            "On the same seeds, in points of the task's first metric; the interval is the paired 95 % interval of the "
            "t distribution. p (Holm) is that of the paired t test, corrected for the number of comparisons here."
        )
        limits = (
            "Pairs share the seed. The intervals are about other seeds with the same rows and settings; they say "
            "nothing of other validation rows."
        )
        said = "\n".join(f"- {escape(sentence)}" for sentence in sentences(found))
        parts += ["## Difference to LoRA", text, difference_table(found), said, limits]
    text = "What each method was trained with. The last column has only settings in which methods of a task differ."
    return [*parts, "## Settings", text, settings_table(runs)]


def _one_class(runs: pd.DataFrame) -> list[str]:
    """Name the runs that score what one class for every row scores: such a mean does not measure a method."""
    same = runs[runs["as_one_class"]]
    if not len(same):
        return []
    named = [f"{task}, {name}, seed {', '.join(map(str, part['seed']))}"
             for (task, name), part in same.groupby(["task", "name"], sort=False)]  # fmt: skip
    text = "**No better than a constant answer**: these runs score exactly what one class for every row scores"
    return [f"{text}: {escape('; '.join(named))}."]


def _over_budget(runs: pd.DataFrame, selection: str) -> list[str]:
    """For AdaLoRA: that evaluations at the target budget are chosen from, and the runs that have none."""
    allocated = [run for run in runs["run"] if run.target is not None]
    over = [(run, found) for run in allocated if (found := run.over_budget(selection)) is not None]
    lines = [f"{run.task}, {run.name}, seed {run.seed}: {ranks} singular values, target {target}"
             for run, (ranks, target) in over]  # fmt: skip
    parts = []
    if allocated and selection != "last":
        parts.append("For AdaLoRA, the choice is among evaluations at the target budget, if there are any.")
    if lines:
        why = "" if selection == "last" else ", because none of their evaluations was at the target"
        parts.append(f"**{len(lines)} run(s) are reported over budget**{why}: {escape('; '.join(lines))}.")
    return parts


def _tuned(tuning: Mapping[str, Any] | None, runs: Sequence[Run], finals: Sequence[Run], selection: str) -> list[str]:
    """The sections about a tuning as Markdown; nothing without one."""
    if tuning is None:
        return []
    waiting = Counter(run.task for run in open_trials(runs, tuning))
    told = [f"On {escape(task)} nothing is chosen yet; trials finished so far: {n}." for task, n in waiting.items()]
    if not tuning["choices"]:
        return ["## Chosen values", *(told or ["Nothing is chosen yet."])]
    equal = trials_are_equal(tuning)
    fair = "Each method had the same number of trials." if equal else (
        "**The methods had different numbers of trials**: the best of more trials is better by chance."
    )  # fmt: skip
    words = {"best": "best evaluation", "last": "evaluation at the end"}
    which = " or the ".join(dict.fromkeys(words[choice["selection"]] for choice in tuning["choices"]))
    rows = "on the half of the validation rows that is not reported above"
    if selection != "heldout":
        rows = "**on the rows that are reported above**, so that the scores are biased upwards"
    text = (
        "The results above use the values below and seeds that were not used for tuning. "
        f"{len(runs) - len(finals)} trials and runs with other values are left out. A value was chosen by the mean "
        f"score of its trials with the {tuning_seeds(tuning)}: that of the {which} of each trial, {rows}. {fair}"
    )
    expected = (
        "The mean score of the best of k trials, over all subsets of k trials. A trial without a score counts with the "
        "worst score of the others."
    )
    parts = ["## Chosen values", text, chosen_table(tuning), *told]
    there = {(run.task, run.arm) for run in finals}
    lacking = [f"{c['task']}, {c['method']}" for c in tuning["choices"] if (c["task"], c["method"]) not in there]
    if lacking:
        parts.append(f"No final run with the chosen values is finished yet: {escape('; '.join(lacking))}.")
    over = [f"{c['task']}, {c['method']}" for c in tuning["choices"] if any("over_budget" in s for s in c["scores"])]
    if over:
        parts.append(f"Some trials were scored above AdaLoRA's target budget: {escape('; '.join(over))}.")
    return [*parts, "## Expected best score against the number of trials", expected, expected_table(tuning)]


def _costs(runs: pd.DataFrame) -> list[str]:
    """The sections about parameters, time and memory, and about SoRA's schedule, as Markdown."""
    text = (
        "Means over the runs:\n\n"
        "- trained: parameters that train, without the head.\n"
        "- remaining: what is left of the low-rank factors after pruning, in the model that is reported.\n"
        "- head: the parameters of the head, which train with every method and are in no other column.\n"
        "- seconds: wall time of all processes of a run; an earlier process counts up to the checkpoint that was "
        "resumed.\n"
        f"- peak MB: the most memory in use, {escape(' or '.join(_measured(runs)) or 'not recorded')}.\n"
        "- evaluated rows/s: the speed of the last evaluation.\n"
        "- hours: the sum of the seconds of these n runs, without trials."
    )
    parts = ["## Cost", text, cost_table(runs)]
    schedule = stage_table(list(runs["run"]))
    return [*parts, "## Sparsifying schedule", schedule] if schedule else parts


def _origin(runs: Sequence[Run]) -> list[str]:
    """Where the numbers come from: hours, machines, versions and commits, trials and other left-out runs included."""

    def several(values: Iterable[object]) -> str:
        return escape("; ".join(sorted({str(v) for v in values if v}))) or "not recorded"

    def machine(hardware: Mapping[str, Any]) -> str:
        gpus = hardware.get("gpus") or []
        threads = hardware.get("threads")
        return ", ".join(map(str, gpus)) or f"{hardware.get('cpu', '')}{f' (threads: {threads})' if threads else ''}"

    def short(commit: str) -> str:
        name, plus, changes = commit.partition("+")
        return name[:7] + plus + changes

    versions = [run.data.get("versions") or {} for run in runs]
    hours = sum(run.seconds or 0 for run in runs) / 3600
    lines = [
        f"- {len(runs)} finished runs, trials included, took {hours:.1f} hours in sum.",
        f"- Hardware: {several(machine(run.data.get('hardware') or {}) for run in runs)}.",
        f"- Versions: {several(', '.join(f'{k} {v}' for k, v in found.items()) for found in versions)}.",
        f"- Commits: {several(short(run.data.get('commit') or '') for run in runs)}.",
    ]
    return ["## Where the numbers come from", "\n".join(lines)]


def _measured(runs: pd.DataFrame) -> list[str]:
    """What the peaks of memory count, in the words of the records."""
    return sorted({str(peak.get("of")) for run in runs["run"] if (peak := run.data.get("peak_memory"))})


def _beside(runs: pd.DataFrame, selection: str, published: Path | None) -> list[str]:
    """The section with the papers' numbers, as Markdown; nothing without such numbers."""
    tables = published_tables(published, list(runs["task"].drop_duplicates())) if published else []
    if not tables:
        return []
    text = (
        f"For comparison, here: {escape(_models(runs))}, {runs['seed'].nunique()} seed(s), selection {selection}. "
        "Numbers are comparable only as far as these agree. STS-B's published number is one correlation, set beside "
        "the mean of Pearson and Spearman. The RM-LoRA paper's GLUE numbers are not known to this project."
    )
    return ["## Published, not from this project", text, *tables]


def main(argv: Sequence[str] | None, description: str, published: Path) -> int:
    """Write the report, print its path, and return the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with runs at any depth, or a compact results file")
    parser.add_argument(
        "--selection", choices=list(SELECTIONS), default="last", help="which evaluation of a run counts"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: that folder, or the file's)")
    parser.add_argument("--page", type=Path, action="append", default=[], dest="pages",
                        help="a Markdown file whose marked parts are filled (docs/sweeps.md)")  # fmt: skip
    args = parser.parse_args(argv)
    default = args.folder.parent if args.folder.is_file() else args.folder
    try:
        print(report(args.folder, args.out or default, args.selection, published, args.pages))
    except InputError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: error: the report cannot be written ({error}): name another folder with --out.",
              file=sys.stderr)  # fmt: skip
        return 2
    return 0

"""Prints one table of the runs in the given folders, from each folder's run.json.

python scripts/quickstart_table.py output/quickstart/*
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = ("method", "trainable", "remaining", "rank", "accuracy", "F1", "majority", "seconds")
# The accuracy column shows the first of these scores that a run has; tasks without accuracy have another one.
SCORES = ("accuracy", "matthews_correlation", "pearson", "mse")


def majority(arguments: dict[str, Any]) -> float | None:
    """The share of the most frequent class in the evaluated rows of a run; None for a regression."""
    from loralib.glue.data import load

    names = ("task_name", "dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
    given = {name: arguments.get(name) for name in (*names, "max_eval_samples", "cache_dir")}
    data = load(**given, do_eval=True)
    if data.task.label_names is None:
        return None
    labels = next(iter(data.evals.values()))["label"]
    return Counter(labels).most_common(1)[0][1] / len(labels)


def row(run: dict[str, Any], baseline: float | None) -> tuple[str, ...]:
    """One line of the table. `rank` is the mean of the ranks that the adapted matrices have left."""
    metrics, parameters = run["metrics"], run["parameters"]
    ranks = [module["rank"] for module in parameters["modules"].values()]
    score = next((metrics[f"eval_{name}"] for name in SCORES if f"eval_{name}" in metrics), None)
    f1 = metrics.get("eval_f1")
    return (
        run["method"],
        f"{parameters['trainable']:,}",
        f"{parameters['remaining'] + parameters['head']:,}",
        f"{sum(ranks) / len(ranks):.2f}" if ranks else "-",
        *("-" if value is None else f"{100 * value:.1f}" for value in (score, f1, baseline)),
        f"{run['wall_seconds']:.0f}",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """The table as text: header, rule and rows."""
    from loralib.report.text import aligned

    written = aligned([HEADER, *rows])
    return "\n".join([written[0], "-" * len(written[0]), *written[1:]])


def main(argv: Sequence[str] | None = None) -> str:
    """Print the table and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args(argv).folders
    missing = [str(folder) for folder in folders if not (folder / "run.json").is_file()]
    if missing:
        parser.error(f"no run.json in {', '.join(missing)}: give the output folders of finished runs.")
    runs = [json.loads((folder / "run.json").read_text()) for folder in folders]
    baseline = majority(runs[0]["arguments"])
    text = table([row(run, baseline) for run in runs])
    print(text)
    print("trainable: low-rank factors and head; remaining: what is left of them after pruning; rank: mean a matrix.")
    return text


if __name__ == "__main__":
    main()

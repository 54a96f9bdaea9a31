"""Prints one table of the runs in the given folders, from each folder's run.json.

python scripts/quickstart_table.py output/quickstart/*
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = ("method", "trainable", "remaining", "rank", "accuracy", "F1", "majority", "seconds")
# The accuracy column shows the first of these scores that a run has; tasks without accuracy have another one.
SCORES = ("accuracy", "matthews_correlation", "pearson", "mse")


def row(run: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table. `rank` is the mean of the ranks that the adapted matrices have left."""
    metrics, parameters = run["metrics"], run["parameters"]
    ranks = [module["rank"] for module in parameters["modules"].values()]
    score = next((key for key in map("eval_{}".format, SCORES) if key in metrics), "")
    values = (metrics.get(score), metrics.get("eval_f1"), run.get("one_class", {}).get(score))
    return (
        run["method"],
        f"{parameters['trainable']:,}",
        f"{parameters['remaining'] + parameters['head']:,}",
        f"{sum(ranks) / len(ranks):.2f}" if ranks else "-",
        *("-" if value is None else f"{100 * value:.1f}" for value in values),
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
    text = table([row(run) for run in runs])
    print(text)
    print("trainable: low-rank factors and head; remaining: what is left after pruning; rank: mean over the matrices.")
    return text


if __name__ == "__main__":
    main()

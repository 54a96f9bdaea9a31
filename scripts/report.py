"""Tables and figures from the results files (run.json) below a folder: report.md, .html, .csv, .tex and figures.

    python scripts/report.py output/ [--selection last|best|heldout] [--out DIR] [--page FILE.md]

last: the metrics at the end of the run. best: the metrics of the evaluation with the best score, which is chosen and
reported on the same rows, so the number is biased upwards. heldout: the evaluation that is best on one half of the
validation rows, with its metrics on the other half (for runs with --heldout_split SEED).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    from loralib.report import page
except ImportError as error:
    sys.exit(f"report.py: error: {error.name} is missing: pip install -e '{ROOT}'")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and return the exit status."""
    return page.main(argv, __doc__, ROOT / "scripts" / "published.json")


if __name__ == "__main__":
    sys.exit(main())

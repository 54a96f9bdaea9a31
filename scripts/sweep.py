"""Runs tasks x methods x seeds, and a grid of flags if wanted, on Ray: each run is a task's script in its own process.

    python scripts/sweep.py --tasks mrpc,rte --methods lora,adalora,sora --seeds 1,2,3 [--grid lora_r=4,8] [FLAGS...]

Flags that are not listed here go to every run, those of --only to one method's; MODEL and DATA are read from the
environment, as the scripts do. Every command is parsed before the first run, so a mistyped flag costs seconds. A run is
in OUTPUT/TASK/METHOD[,NAME=VALUE...]/seedK with its output in run.log. The same command again skips finished runs and
goes on with the others from their last checkpoints. Needs Linux, and Ray: pip install -e '.[sweep]'.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loralib.sweep import command  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return command.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Runs all combinations of tasks, methods, seeds and values of flags on Ray; each run is a task's script in a process.

    python scripts/sweep.py --tasks mrpc,rte --methods lora,adalora,sora --seeds 1,2,3 [--grid lora_r=4,8] [FLAGS...]

Flags that --help does not list go to every run; the flags inside --only go to the runs of one method. MODEL and DATA
come from the environment, as by the scripts. Every command is parsed before the first run, so that a mistyped flag
costs seconds. A run is in OUTPUT/TASK/METHOD[,NAME=VALUE...]/seedK, with its output in run.log. The same command, given
again, skips finished runs and goes on with the others from their last checkpoints. It needs Linux, and Ray: pip install
-e '.[sweep]'.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loralib.sweep import command  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep and return the exit status."""
    return command.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())

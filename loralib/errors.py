"""What ends a run with one sentence: a user's mistake, or a run that cannot go on."""

import os


class InputError(ValueError):
    """Bad input from the user: one sentence that says what is wrong, the value, the allowed range and the way out.

    Entry points and scripts print the sentence and exit with status 2; a traceback is for this project's own mistakes.
    """

    exit_status = 2


class RunError(RuntimeError):
    """A run that cannot go on (disk full, say): one sentence that says where, and what is left of it.

    Entry points print the sentence and exit with `exit_status`; `status` is what `run.json` says.
    """

    exit_status = 3
    status = "failed"


class RunDiverged(RunError):
    """A loss or a gradient is not finite any more."""

    status = "diverged"


class RunInterrupted(RunError):
    """SIGTERM came: the step was finished and a checkpoint written. 143 = 128 + 15, as a shell reports SIGTERM."""

    exit_status = 143
    status = "interrupted"


def path_of(error: OSError) -> str | None:
    """The path that the system's error is about; None where it names none, as for a write to an open file."""
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None

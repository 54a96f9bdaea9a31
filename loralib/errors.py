"""The errors that end a run with one sentence: mistakes of a user, and runs that cannot go on."""

import os


class InputError(ValueError):
    """Bad input from the user: one sentence that says what is wrong, the value, the allowed range and the way out.

    Entry points and scripts print the sentence and exit with status 2. Only a mistake of this project prints a
    traceback.
    """

    exit_status = 2


class RunError(RuntimeError):
    """A run that cannot go on, for instance because the disk is full. The sentence says where, and what is left of it.

    Entry points print the sentence and exit with `exit_status`. `status` is the run's status in `run.json`.
    """

    exit_status = 3
    status = "failed"


class RunDiverged(RunError):
    """A loss, a gradient or an output of the model is no longer finite."""

    status = "diverged"
    way_out = "with --overwrite_output_dir and a lower --learning_rate, a warm-up, or bf16 or float32 in place of fp16"


class RunInterrupted(RunError):
    """SIGTERM came; the step was finished and a checkpoint written. A shell reports SIGTERM as 143 = 128 + 15."""

    exit_status = 143
    status = "interrupted"


def check_at_least(least: float, **values: float | None) -> None:
    """Refuse a value below `least`; None is not checked.

    Raises:
        InputError: names the value.
    """
    for name, value in values.items():
        if value is not None and not value >= least:  # NaN, too
            raise InputError(f"{name} is {value}, it must be {least:g} or more.")


def path_of(error: OSError) -> str | None:
    """The path that an error of the system names. None if it names none, as for a write to an open file."""
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None

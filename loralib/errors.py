"""The one exception that stands for a user's mistake."""


class InputError(ValueError):
    """Bad input from the user: one sentence that says what is wrong, the value, the allowed range and the way out.

    Entry points and scripts print the sentence and exit with status 2; a traceback is for this project's own mistakes.
    """


class RunError(RuntimeError):
    """A run that cannot go on (diverged, disk full): one sentence that says where, and what is left of it.

    Entry points print the sentence and exit with status 3.
    """

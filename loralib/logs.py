"""Reads the log of a run, as a sweep keeps it (`run.log`)."""

import re
from pathlib import Path

from loralib.secrets import hide


def last_line(log: Path) -> str:
    """The last error in a log, or its last line if it has no error, without secrets; "" if there is none."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in re.split(r"(?:[\r\n]|\x1b\[A)+", text) if line.strip()]  # \x1b[A: a bar
    errors = [line for line in lines if re.search(r"\berror: |Error: ", line)]
    return hide((errors or lines or [""])[-1])[:300]  # a secret that is cut in two would not be recognised

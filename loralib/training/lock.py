"""One run in an output folder at a time."""

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from loralib.errors import InputError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_held: dict[str, IO[str]] = {}  # one process may run one after the other in one folder


def lock(folder: str | Path) -> None:
    """Reserve an output folder for this process. The kernel lets go when the process ends, however it ends.

    Raises:
        InputError: another process holds it, or the folder cannot be written to.
    """
    folder = Path(folder)
    key = str(folder.resolve())
    if key in _held:
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file: name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - held open while the run lasts
    except OSError as error:
        raise InputError(
            f"output_dir {folder} cannot be written to ({error.strerror or error}): name a folder that can."
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers that outlive a killed run would keep it
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read(200).strip() or "unknown"
        file.close()
        raise InputError(
            f"output_dir {folder} is in use by another run ({owner}): wait for its end or name another folder."
        ) from error
    except OSError as error:  # a file system without locks
        logger.warning("%s takes no lock (%s): see to it that no second run writes there", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    _held[key] = file


def unlock(folder: str | Path) -> None:
    """Let go of a folder that `lock` reserved."""
    file = _held.pop(str(Path(folder).resolve()), None)
    if file is not None:
        file.close()

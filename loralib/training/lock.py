"""Locks an output folder, so that one run at a time writes into it."""

import errno
import fcntl
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from loralib.errors import InputError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_held: dict[str, IO[str]] = {}  # by folder; a process may make several runs in one folder, one after the other


def open_lock(file: Path) -> IO[str]:
    """Open a lock file for reading and for writing at its end; make it if it is missing.

    Raises:
        InputError: it is a link, which could lead to a foreign file, or no plain file.
        OSError: it cannot be opened.
    """
    wrong = f"{file} is a link or no plain file, and a run would write to where it leads: remove it."
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        opened = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InputError(wrong) from error
        raise
    found = os.fstat(opened)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(opened)
        raise InputError(wrong)
    return os.fdopen(opened, "a+", encoding="utf-8", errors="replace")


def lock(folder: str | Path) -> None:
    """Reserve an output folder for this process. The kernel releases it when the process ends in any way.

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
        file = open_lock(folder / LOCK_FILE)
    except OSError as error:
        raise InputError(
            f"output_dir {folder} cannot be written to ({error.strerror or error}): name a folder that can."
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would be kept by workers that outlive a killed run
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read(200).strip() or "unknown"
        file.close()
        raise InputError(
            f"output_dir {folder} is in use by another run ({owner}): wait for its end or name another folder."
        ) from error
    except OSError as error:  # a file system without locks
        logger.warning("%s takes no lock (%s): make sure that no second run writes there", folder, error.strerror)
    with suppress(OSError):  # on a full disk the note is lost, but the lock holds
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
    _held[key] = file


def unlock(folder: str | Path) -> None:
    """Release a folder that `lock` reserved."""
    file = _held.pop(str(Path(folder).resolve()), None)
    if file is not None:
        with suppress(OSError):  # on a full disk the note cannot be written
            file.close()

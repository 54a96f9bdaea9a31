"""Guards a run by two processes between Ray's worker and the script, so that nothing of it outlives the worker."""

import ctypes
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from loralib.errors import InputError
from loralib.training.lock import open_lock

LOCK_FILE = ".sweep.lock"
GRACE = 60.0  # seconds after SIGTERM in which a run may write a checkpoint; then SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def die_with_parent(signum: int) -> None:
    """Ask the kernel for a signal when the parent ends in any way."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum)


def interrupt(signum: int, _: Any) -> NoReturn:
    """Signal handler that ends a program as Ctrl-C does."""
    raise KeyboardInterrupt


def interrupt_on_signals() -> None:
    """Let SIGTERM, and Ctrl-C even where a shell has made this process ignore it, end a program as Ctrl-C does."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, nearest first, without zombies."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(0), [])
        found += below
        left += below
    return found


def guard(parent: int, folder: Path, command: Sequence[str]) -> int:
    """Run `command` so that none of its processes outlives its Ray worker, and return its exit status.

    When Ray ends a worker, it kills the worker's children at once with SIGKILL. So two processes stand between the
    worker and the run. The first one dies with the worker. The second one gets SIGTERM when the first is gone, and then
    ends the run: with SIGTERM, so that it can write a checkpoint, and with SIGKILL after `GRACE` seconds. Both adopt
    the processes below them that lose their parents, so that each can end all of them by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep handles Ctrl-C
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGKILL)
    first = os.getpid()
    if os.getppid() != parent:
        return 1
    second = os.fork()
    if not second:
        return run_below(first, folder, command)
    code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    kill_rest()
    return abs(code)


def run_below(parent: int, folder: Path, command: Sequence[str]) -> int:
    """The second process of `guard`: run `command`. The folder is locked meanwhile, so that a second attempt waits."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    try:
        lock = open_lock(folder / LOCK_FILE)
    except InputError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return error.exit_status
    with lock as file:
        wait_for_lock(file, GRACE + 10, folder)
        file.truncate(0)
        file.write(str(parent))  # the process to end if Ray itself has died
        file.flush()
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: die_with_parent(signal.SIGKILL))
        code = 128 + signal.SIGTERM
        try:
            signal.signal(signal.SIGTERM, interrupt)
            code = child.wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, signal.SIGTERM)
                child.wait(GRACE)
        kill_rest()
        return code


def kill_rest() -> None:
    """Kill all processes that are left below this one."""
    while rest := descendants(os.getpid()):
        for pid in rest:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


# ---- the lock of a run's folder ----


def wait_for_lock(lock: Any, seconds: float, folder: Path) -> None:
    """Take the lock of a run's folder; after `seconds`, end the process with a sentence."""
    for _ in range(math.ceil(seconds / 0.2)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.2)
    sys.exit(f"error: another process trains in {folder}: wait for it, or end it.")


def wait_until_free(folder: Path, end: bool = False) -> None:
    """Wait until the guard of a run has ended it.

    Args:
        end: end the run, as the death of its worker would. This is for a worker that outlives Ray on this machine.
    """
    if not (folder / LOCK_FILE).is_file():
        return
    try:
        lock = open_lock(folder / LOCK_FILE)
    except InputError:
        return  # it is a link, and no guard has made it
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            text = file.read(20)
            if end and text.isdigit() and _is_guard(int(text), folder):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(text), signal.SIGKILL)
        wait_for_lock(file, GRACE + 10, folder)


def _is_guard(pid: int, folder: Path) -> bool:
    """Whether a process of this machine is the guard of the folder; another one may have its number by chance."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"--guard" in words and str(folder).encode() in words

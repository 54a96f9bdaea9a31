"""Checkpoints that are complete or recognised as not: a manifest written last, what may resume from it, and a lock.

A checkpoint folder counts once `checkpoint.json` is in it: the format's version, the step, the settings that decide the
run's numbers, the running sums of the logs, and size and SHA-256 of every other file.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from loralib.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MANIFEST_VERSION = 1
LOCK_FILE = ".lock"


# ---- manifest ----


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Finish a checkpoint: list all its files and write the manifest aside, then rename it into place.

    Args:
        folder: the checkpoint, all other files written.
        content: JSON values to keep beside the list (`step`, `settings`, `progress`).
    """
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    aside = folder / f"{MANIFEST}.tmp"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump({"version": MANIFEST_VERSION, **content, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every file compared with it.

    Raises:
        InputError: the checkpoint is half-written, damaged, or of an unknown version; the message says what is wrong.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["version"], manifest["files"]
        expected = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
        if not (
            isinstance(version, int) and isinstance(manifest["settings"], dict) and isinstance(manifest["step"], int)
        ):
            raise TypeError
        progress = manifest["progress"]
        if not isinstance(progress["losses"], list):
            raise TypeError
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {folder} is half-written: it lacks {MANIFEST}, which is written last.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"checkpoint {folder} is damaged: its {MANIFEST} cannot be read.") from error
    if version > MANIFEST_VERSION:
        raise InputError(
            f"checkpoint {folder} has format {version}, this code reads up to {MANIFEST_VERSION}: update it."
        )
    for name, (size, digest) in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} of {size} bytes"
            raise InputError(f"checkpoint {folder} is damaged: {name} {state}.")
        if _sha256(path) != digest:
            raise InputError(f"checkpoint {folder} is damaged: the content of {name} is not what was written.")
    return manifest


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in `output_dir`; every newer one that is skipped is said, with the reason."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    for _, path in sorted(found, reverse=True):
        try:
            read_manifest(path)
        except InputError as error:
            logger.warning("skipped: %s", error)
            continue
        return path
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- settings ----


def check_settings(folder: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose settings differ: its end would equal neither run's.

    Raises:
        InputError: names each setting that differs, with both values.
    """
    names = ["method"] if saved.get("method") != own.get("method") else sorted({*saved, *own})
    differing = [_difference(n, saved.get(n), own.get(n)) for n in names if saved.get(n) != own.get(n)]
    if not differing:
        return
    why = ""
    if any(saved.get(n) != own.get(n) for n in ("world_size", "n_gpu")):
        why = " (another number of processes would deal other rows and random numbers to each)"
    more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
    raise InputError(
        f"checkpoint {folder} belongs to a run with other settings: {'; '.join(differing[:6])}{more}{why}: go back to "
        "them, name another --output_dir, or start over with --overwrite_output_dir."
    )


def _difference(name: str, saved: Any, own: Any) -> str:
    if isinstance(saved, list) and isinstance(own, list):
        lost, new = [x for x in saved if x not in own], [x for x in own if x not in saved]
        parts = [
            f"{len(saved)} then, {len(own)} now",
            *(f"without {x}" for x in lost[:1]),
            *(f"with {x}" for x in new[:1]),
        ]
        return f"{name}: {', '.join(parts)}"
    return f"{name} was {saved!r}, is {own!r}"


# ---- lock ----

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

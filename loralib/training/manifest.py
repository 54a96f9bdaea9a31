"""Checkpoints that are complete or recognised as not: the list of a checkpoint's files is written last.

A checkpoint folder counts once `checkpoint.json` is in it: the format's version, the step, the settings that decide the
run's numbers, the running sums of the logs, and size and SHA-256 of every other file.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralib.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MANIFEST_VERSION = 1


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


def last_good(output_dir: str | Path) -> str:
    """For a message: which checkpoint a run goes on from."""
    last = last_checkpoint(output_dir)
    return f"the last good checkpoint is {last}" if last else "no checkpoint was written before"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The manifest of a checkpoint, by which an incomplete or damaged one is recognised.

A checkpoint counts only with its `checkpoint.json`, which is written last. This file holds the format's version, the
step, the settings that decide the run's numbers, the running sums of the logs, size and SHA-256 of every other file,
and at its end the SHA-256 of its own content up to there. Version 1 lacks this last entry.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralib.adapters.writing import sync_folder, write_file
from loralib.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MANIFEST_VERSION = 2
REMOVED = ".{}.removed"  # name of a checkpoint while it is deleted
END = b',\n "own_sha256": "%s"\n}\n'  # end of the file; the digest is that of the bytes before it

# By checkpoint, the `_stats` of its files when they were last compared: a run hashes gigabytes only once.
_compared: dict[Path, tuple[Any, ...]] = {}


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Finish a checkpoint: wait until its files are on the disk, and write the list of them.

    Args:
        folder: the checkpoint, with all other files.
        content: JSON values to keep beside the list (`step`, `settings`, `progress`).
    """
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p, sync=True)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    text = json.dumps({"version": MANIFEST_VERSION, **content, "files": files}, indent=1)
    before = text.removesuffix("\n}").encode()
    write_file(folder / MANIFEST, before + END % hashlib.sha256(before).hexdigest().encode())
    sync_folder(folder)
    sync_folder(folder.parent)
    _compared[folder.resolve()] = _stats(folder, files)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and compare every file with it.

    Raises:
        InputError: the checkpoint is half-written, damaged, or of an unknown version; the message says what is wrong.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {folder} is half-written: it lacks {MANIFEST}, which is written last.") from error
    except OSError as error:
        raise InputError(
            f"checkpoint {folder} is damaged: its {MANIFEST} cannot be read ({error.strerror})."
        ) from error
    manifest = parse_manifest(folder, raw)
    files = manifest["files"]
    for name, file in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != file["bytes"]:
            state = "is missing" if found is None else f"has {found} of {file['bytes']} bytes"
            raise InputError(f"checkpoint {folder} is damaged: {name} {state}.")
    stats = _stats(folder, files)
    if _compared.get(folder.resolve()) != stats:
        for name, file in files.items():
            if sha256_of(folder / name) != file["sha256"]:
                raise InputError(f"checkpoint {folder} is damaged: the content of {name} is not what was written.")
        _compared[folder.resolve()] = stats
    return manifest


def parse_manifest(folder: Path, raw: bytes) -> dict[str, Any]:
    """Read the content of `checkpoint.json`, and compare it with its own checksum.

    Args:
        folder: the checkpoint, for messages.
        raw: the bytes of the file.

    Raises:
        InputError: the file is damaged, or of an unknown version.
    """
    damaged = InputError(f"checkpoint {folder} is damaged: its {MANIFEST} is not what was written.")
    end = re.search(re.escape(END).replace(b"%s", b"([0-9a-f]{64})") + rb"\Z", raw)
    if end is not None and hashlib.sha256(raw[: end.start()]).hexdigest().encode() != end[1]:
        raise damaged
    try:
        manifest = json.loads(raw)
        version = manifest["version"]
        if not isinstance(version, int) or isinstance(version, bool):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged from error
    if version > MANIFEST_VERSION and (end is not None or "own_sha256" not in manifest):
        raise InputError(
            f"checkpoint {folder} has format {version}, this code reads up to {MANIFEST_VERSION}: update it."
        )
    if version < 1 or (version > 1 and end is None) or not _well_formed(manifest):
        raise damaged
    return manifest


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether every entry that resuming reads is there and has the right type."""

    def is_a(value: Any, *kinds: type) -> bool:
        return type(value) in kinds

    progress, files = manifest.get("progress"), manifest.get("files")
    return (
        is_a(manifest.get("step"), int)
        and is_a(manifest.get("settings"), dict)
        and isinstance(progress, dict)
        and is_a(progress.get("losses"), list)
        and all(is_a(loss, int, float) for loss in progress["losses"])
        and all(is_a(progress.get(name), int, float) for name in ("total_loss", "seconds"))
        and is_a(progress.get("logged_step"), int)
        and is_a(progress.get("finished"), bool)
        and is_a(progress.get("penalty_sum", 0), int, float)
        and is_a(progress.get("penalty_steps", 0), int)
        and isinstance(files, dict)
        and all(
            isinstance(file, dict) and is_a(file.get("bytes"), int) and is_a(file.get("sha256"), str)
            for file in files.values()
        )
        and all(name and "\0" not in name and ".." not in Path(name).parts for name in files)
    )


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every folder that has a checkpoint's name, lowest step first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def is_written(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; its files are not compared."""
    return (checkpoint / MANIFEST).exists()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in `output_dir`. The log names each later one, and what it lacks."""
    for _, path in reversed(checkpoints(output_dir)):
        try:
            read_manifest(path)
        except InputError as error:
            logger.warning("skipped: %s", error)
            continue
        return path
    return None


def the_same_command(args: Any) -> str:
    """A clause for messages about a run that ended early: what the same command does next.

    Args:
        args: the run's TrainingArguments. If a flag among them would keep the command from going on from the last
            checkpoint, the clause says to leave it out.
    """
    last = last_checkpoint(args.output_dir)
    named = str(getattr(args, "resume_from_checkpoint", None) or "true")
    if last is None and named.lower() == "true":
        return "the same command starts over, since no checkpoint was written before"
    if last is None:
        return f"the same command goes on from {named}"
    flags = ["--overwrite_output_dir"] if getattr(args, "overwrite_output_dir", False) else []
    flags += ["--resume_from_checkpoint"] if named.lower() != "true" else []
    without = f" without {' and '.join(flags)}" if flags else ""
    return f"the same command{without} goes on from the last good checkpoint, {last}"


def remove_checkpoint(folder: Path) -> None:
    """Rename a checkpoint, then delete it: if the process is killed, the rest is not taken for a checkpoint."""
    aside = folder.with_name(REMOVED.format(folder.name))
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(output_dir: str | Path) -> None:
    """Delete the rest of checkpoints whose removal was interrupted."""
    for left in Path(output_dir).glob(REMOVED.format("checkpoint-*")):
        shutil.rmtree(left, ignore_errors=True)


def rotate(written: Path, limit: int | None, best: str | None) -> None:
    """Delete the checkpoints of the lowest steps, so that `limit` remain; with None or 0 all remain.

    Half-written ones, which a killed run has left, do not count. With a limit they are deleted.

    Args:
        written: the checkpoint that was just written; it is kept.
        best: the checkpoint with the best metric; it is kept too.
    """
    remove_leftovers(written.parent)
    kept = {written.name} | ({Path(best).name} if best else set())
    if not limit or limit < 0:
        return
    others = [path for _, path in checkpoints(written.parent) if path.name not in kept]
    half = [path for path in others if not is_written(path)]
    others = [path for path in others if path not in half]
    surplus = len(others) + len(kept) - max(limit, len(kept))
    for path in [*half, *others[:surplus]]:
        try:
            remove_checkpoint(path)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be removed (%s)", path, error.strerror)


def _stats(folder: Path, files: Mapping[str, Any]) -> tuple[Any, ...]:
    """Inode, size and times of the manifest and of each listed file: they change when a file is changed."""
    found = [(folder / name).stat() for name in [MANIFEST, *files]]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


def sha256_of(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync`, once it has reached the disk."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The one writer of files: it writes under another name, and renames the file once it is whole."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from loralib.errors import InputError

if TYPE_CHECKING:  # the report writes files without torch
    from torch import Tensor

FORMAT_VERSION = 1  # of an adapter's files


def write_file(file: Path, data: bytes) -> None:
    """Write to a file beside `file`, wait for the disk, then rename it: a reader never sees half a file, not even after
    a power cut. The file gets the user's usual mode. Two processes may write the same file; the later one wins."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
        sync_folder(file.parent)
    except OSError:
        aside.unlink(missing_ok=True)  # frees the space where the disk is full
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, also those of new and renamed files."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:  # some network file systems cannot do this
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(opened)


def write_tensors(file: Path, state: Mapping[str, "Tensor"]) -> None:
    from safetensors.torch import save

    tensors = {name: t.detach().contiguous().cpu() for name, t in state.items()}
    write_file(file, save(tensors, metadata={"format": "pt", "version": str(FORMAT_VERSION)}))


def write_json(file: Path, value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON value. `default` turns what JSON lacks into something that it has, as in `json.dumps`."""
    write_file(file, (json.dumps(value, indent=2, default=default) + "\n").encode())


class DiskError(OSError):
    """A library could not write a file; the message is that of the library."""


# What torch, safetensors and tokenizers say when they cannot write. torch hides the system's own message.
_CANNOT_WRITE = re.compile(
    r"\(os error \d+\)|inline_container|PytorchStreamWriter|iostream error|^write\(\): fd|"
    r"^Parent directory .* does not exist"
)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError where torch, safetensors or tokenizers cannot write: each of them raises another exception.

    All other errors pass as they are, such as a GPU's that is out of memory, which is a RuntimeError too.
    """
    try:
        yield
    except Exception as error:
        libraries = isinstance(error, SafetensorError | RuntimeError) or type(error) is Exception  # that of tokenizers
        if not libraries or not _CANNOT_WRITE.search(str(error)):
            raise
        raise DiskError(" ".join(str(error).split())[:200]) from error


def way_out(error: OSError) -> str:
    """What to do about a file that cannot be written."""
    no_write = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
    numbers = re.findall(r"\(os error (\d+)\)", str(error)) or [error.errno or 0]
    return "make it writable" if int(numbers[0]) in no_write else "make room"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Make a folder under another name; rename it to `out` when all is written, remove it when something fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"the output folder {out} exists and is not empty: name another by --out, or remove it.")
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with disk_errors():
            aside.mkdir(parents=True)
            yield aside
            os.replace(aside, out)
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)

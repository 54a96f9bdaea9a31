"""Moves the libraries' caches if this user cannot write to them: with `docker -u`, on clusters, in a read-only home."""

import logging
import os
import tempfile
from pathlib import Path

import datasets
import evaluate
from transformers import dynamic_module_utils

from loralib.errors import InputError

logger = logging.getLogger(__name__)

# (module, attribute with the folder, content). The hub's own cache is not in this list: it can be read without writing,
# and where a missing model is downloaded to should be the user's choice.
CACHES = (
    (evaluate.config, "HF_METRICS_CACHE", "metrics"),
    (datasets.config, "HF_DATASETS_CACHE", "data sets"),
    (dynamic_module_utils, "HF_MODULES_CACHE", "code of models"),
)

_own: tempfile.TemporaryDirectory[str] | None = None  # removed when the process ends


def use_writable_caches() -> None:
    """Replace each cache that cannot be written by a temporary folder of this process, and log which one and why.

    The libraries choose their folders when they are imported, so this changes the attributes from which they read them.

    Raises:
        InputError: not even a temporary folder can be made.
    """
    global _own
    for module, attribute, content in CACHES:
        folder = Path(getattr(module, attribute))
        why = _why_not_writable(folder)
        if why is None:
            continue
        if _own is None:
            try:
                _own = tempfile.TemporaryDirectory(prefix="loralib-", ignore_cleanup_errors=True)
            except OSError as error:
                raise InputError(
                    f"the libraries' cache {folder} cannot be written to ({why}), and neither can any folder for "
                    f"temporary files ({error.strerror}): set HF_HOME or TMPDIR to a folder that can be."
                ) from error
        instead = Path(_own.name) / attribute.lower()
        setattr(module, attribute, type(getattr(module, attribute))(instead))
        logger.warning(
            "the cache of %s, %s, cannot be written to (%s): this run keeps it in a temporary folder; set HF_HOME to "
            "your own folder to keep it",
            content,
            folder,
            why,
        )


def _why_not_writable(folder: Path) -> str | None:
    """The reason why `folder` can be neither written to nor made; None if it can."""
    if str(folder).startswith("~"):  # expanduser has found neither HOME nor an entry of the user
        return "this user has no home"
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__

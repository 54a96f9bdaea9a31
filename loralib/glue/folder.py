"""The output folder of a run: what may be in it, what is resumed, what is removed."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralib.errors import InputError
from loralib.glue import card
from loralib.glue.flags import GlueTrainingArguments
from loralib.training.lock import LOCK_FILE, lock
from loralib.training.manifest import last_checkpoint, read_manifest

if TYPE_CHECKING:
    from loralib.glue.run import Run

logger = logging.getLogger(__name__)

RUN_NAMES = re.compile(
    r"checkpoint-\d+|stage-\d+|runs|run\.json|(all|train|eval|predict)\w*_results\w*\.json|predict_results_[\w-]+\.(txt|tsv)|"
    r"trainer_state\.json|training_args\.bin|adapter\.(safetensors|json)|model\.safetensors|config\.json|"
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|spm\.model|sentencepiece\.bpe\.model|"
    r"vocab\.(txt|json)|merges\.txt|glue_submission"
)


def prepare_output_dir(training: GlueTrainingArguments) -> str | None:
    """Decide what happens to an output folder that is not empty.

    Returns:
        The checkpoint to go on from, or None for a fresh start.

    Raises:
        InputError: the folder holds something but no checkpoint, and --overwrite_output_dir is not given.
    """
    folder = Path(training.output_dir)
    if training.process_index == 0:
        lock(folder)
    if training.resume_from_checkpoint:
        if training.resume_from_checkpoint.lower() == "true":
            return _last_checkpoint(folder)
        named = Path(training.resume_from_checkpoint)
        if any(named.glob("checkpoint-*")) or not (named / "trainer_state.json").is_file():
            raise InputError(
                f"resume_from_checkpoint {named} is not a checkpoint: name one folder checkpoint-N, or leave the flag "
                "out to go on from the last one in --output_dir."
            )
        read_manifest(named)
        return training.resume_from_checkpoint
    if not training.do_train:
        return None
    if training.overwrite_output_dir:
        return None
    left = [p.name for p in folder.iterdir() if p.name not in (LOCK_FILE, "runs")] if folder.is_dir() else []
    # A run that was killed before its first checkpoint leaves no more than a half-written one; an interrupted schedule
    # has stages, which know their own checkpoints.
    unfinished = all(re.fullmatch(r"checkpoint-\d+", name) for name in left)
    if (unfinished or any(re.fullmatch(r"stage-\d+", name) for name in left)) and last_checkpoint(folder) is None:
        return None
    return _last_checkpoint(folder)


# Flags that name what a run reads.
INPUTS = ("model_name_or_path", "config_name", "tokenizer_name", "lora_path", "dataset_name", "train_file",
          "validation_file", "test_file")  # fmt: skip


def check_inputs_stay(output_dir: str, arguments: Sequence[Any], files: Sequence[str] = ()) -> None:
    """Refuse to clear an output folder that holds an input of the run, or lies in the folder of one.

    Args:
        arguments: the run's dataclasses of flags.
        files: files of flags.

    Raises:
        InputError: names the input and how the two lie.
    """
    if not os.path.isdir(output_dir):
        return
    given = [(f"--{name}", getattr(part, name, None)) for part in arguments for name in INPUTS]
    for name, value in [*given, *(("the file of flags", file) for file in files)]:
        path = os.path.expanduser(value or "")
        if not os.path.exists(path):  # a name on the hub
            continue
        folder = os.path.isdir(path)
        linked = [entry.path for entry in os.scandir(path) if entry.is_symlink()] if folder else []
        if os.path.samefile(path, output_dir):
            lies = "is"
        elif _within(path, output_dir) or any(_within(link, output_dir) for link in linked):
            lies = "holds"
        elif folder and _within(output_dir, path):
            lies = "lies in"
        else:
            continue
        raise InputError(
            f"output_dir {output_dir} would be cleared of an earlier run, and it {lies} what this run reads, {name} "
            f"{value}: name another --output_dir."
        )


def _within(path: str, folder: str) -> bool:
    """Whether `path` lies below `folder`, by its own name or by where its links lead."""
    ways = {Path(os.path.abspath(path)), Path(os.path.realpath(path))}
    return any(parent.exists() and parent.samefile(folder) for way in ways for parent in (way, *way.parents))


def clear_output_dir(run: Run) -> None:
    """With --overwrite_output_dir: remove what an earlier run left, once nothing can be refused any more."""
    if not run.clear:
        return
    run.clear = False
    with run.training.main_process_first(desc="output folder"):
        if run.training.should_save:
            for item in sorted(Path(run.training.output_dir).iterdir()):
                if RUN_NAMES.fullmatch(item.name) or card.is_card(item):
                    shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
                    logger.info("--overwrite_output_dir: removed %s of an earlier run", item)


def _last_checkpoint(folder: Path) -> str:
    last = last_checkpoint(folder)
    if last is None:
        raise InputError(
            f"output_dir {folder} is not empty and holds no checkpoint to resume from: name another folder, or give "
            "--overwrite_output_dir to remove what an earlier run left there."
        )
    logger.info("going on from %s; --overwrite_output_dir would start anew", last)
    return str(last)

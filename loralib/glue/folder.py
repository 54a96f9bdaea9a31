"""The output folder of a run: which contents are accepted, resumed or removed."""

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
from loralib.glue.record import RUN_FILE, record_of
from loralib.training.lock import lock
from loralib.training.manifest import checkpoints, is_written, last_checkpoint, read_manifest

if TYPE_CHECKING:
    from loralib.glue.run import Run

logger = logging.getLogger(__name__)

RUN_NAMES = re.compile(
    r"checkpoint-\d+|stage-\d+|runs|run\.json|(all|train|eval|predict)\w*_results\w*\.json|predict_results_[\w-]+\.(txt|tsv)|"
    r"trainer_state\.json|training_args\.bin|adapter\.(safetensors|json)|model\.safetensors|config\.json|"
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|spm\.model|sentencepiece\.bpe\.model|"
    r"vocab\.(txt|json)|merges\.txt|glue_submission|"
    r"\.checkpoint-\d+\.removed|\.unfinished|run\.json\.tmp|"
    r"\.(run\.json|adapter\.(safetensors|json)|README\.md|predict_results_[\w-]+\.txt)(\.\d+)?\.tmp"
)
UNFINISHED = ".unfinished"  # a file that exists from the beginning of a training until its record is written
# Files that a run may have before its first whole checkpoint: half a checkpoint, half of one that was being removed,
# and the files of a sweep and of TensorBoard. All files of a run, finished or not, are in RUN_NAMES.
EARLY = re.compile(r"checkpoint-\d+|\.checkpoint-\d+\.removed|runs|run\.log|\.lock|\.sweep\.lock")


def prepare_output_dir(training: GlueTrainingArguments) -> str | None:
    """Lock the output folder, and decide whether the run goes on from a checkpoint in it.

    With --overwrite_output_dir the other files there are not looked at: `clear_output_dir` removes only those of a run.

    Returns:
        The checkpoint to go on from, or None for a fresh start.

    Raises:
        InputError: without --overwrite_output_dir, the folder holds only damaged checkpoints, a finished run without
            checkpoints, or files that are not those of an unfinished run.
    """
    folder = Path(training.output_dir)
    reserve(folder, training)
    if training.resume_from_checkpoint:
        if training.resume_from_checkpoint.lower() == "true":
            last = whole_checkpoint(folder)
            if last is None:
                raise InputError(
                    f"output_dir {folder} holds no checkpoint to resume from: leave --resume_from_checkpoint out to "
                    "start over."
                )
            return str(last)
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
    last = whole_checkpoint(folder)
    if last is not None:
        logger.info("going on from %s; --overwrite_output_dir would start over", last)
        return str(last)
    # A run in stages has its checkpoints in the folders of the stages.
    if not (_early(folder) or _has_stages(folder) or holds_unfinished_run(folder)):
        finished = record_of(folder).get("status") == "finished"
        raise InputError(
            f"output_dir {folder} {'holds a finished run and' if finished else 'is not empty and holds'} no "
            "checkpoint to resume from: name another folder, or give "
            "--overwrite_output_dir to remove what an earlier run left there."
        )
    return None


def reserve(folder: Path, training: GlueTrainingArguments) -> None:
    """Lock a run's folder, from the first process.

    Raises:
        InputError: another run holds it, it cannot be written to, or run.json is a folder.
    """
    if training.process_index == 0:
        lock(folder)
    if (folder / RUN_FILE).is_dir():
        raise InputError(f"{folder / RUN_FILE} is a folder, and a run writes its record there: remove it.")


def whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint from which a run in `folder` goes on; None if no checkpoint was completed.

    Raises:
        InputError: checkpoints were completed, and all of them are damaged.
    """
    last = last_checkpoint(folder)
    for _, path in [] if last else checkpoints(folder):
        if is_written(path):
            try:
                read_manifest(path)
            except InputError as error:
                raise InputError(
                    f"output_dir {folder} holds no whole checkpoint to resume from ({str(error).rstrip('.')}): name "
                    "another folder, or give --overwrite_output_dir to start over there."
                ) from error
    return last


def must_clear(training: GlueTrainingArguments, checkpoint: str | None) -> bool:
    """Whether the files of an earlier run must be removed before this one trains.

    True if --overwrite_output_dir is given, or the earlier run ended before its first checkpoint.
    """
    if not training.do_train or checkpoint is not None:
        return False
    folder = Path(training.output_dir)
    return training.overwrite_output_dir or (holds_unfinished_run(folder) and not _has_stages(folder))


def holds_unfinished_run(folder: Path) -> bool:
    """Whether a training began in the folder, and no record there says that it finished."""
    record = record_of(folder)
    arguments = record.get("arguments")
    trained = arguments.get("do_train") is not False if isinstance(arguments, dict) else True
    if record.get("status") == "finished" and trained:
        return False
    if (folder / UNFINISHED).exists():
        return True
    if (folder / RUN_FILE).is_file() and not record:  # the record was cut short, and nothing else is there
        return all(p.name == RUN_FILE or EARLY.fullmatch(p.name) for p in folder.iterdir())
    return bool(record) and record.get("status") != "finished" and isinstance(arguments, dict) and trained


def _early(folder: Path) -> bool:
    return not folder.is_dir() or all(EARLY.fullmatch(p.name) for p in folder.iterdir())


def _has_stages(folder: Path) -> bool:
    return folder.is_dir() and any(re.fullmatch(r"stage-\d+", p.name) for p in folder.iterdir())


def mark_unfinished(training: GlueTrainingArguments) -> None:
    """Mark the folder of a training that begins; `mark_finished` removes the mark."""
    if training.should_save:
        (Path(training.output_dir) / UNFINISHED).touch()


def mark_finished(training: GlueTrainingArguments) -> None:
    """Remove the mark of `mark_unfinished`, once `run.json` says that the run is finished."""
    (Path(training.output_dir) / UNFINISHED).unlink(missing_ok=True)


# Flags that name files or folders that a run reads.
INPUTS = ("model_name_or_path", "config_name", "tokenizer_name", "lora_path", "dataset_name", "train_file",
          "validation_file", "test_file")  # fmt: skip


def check_inputs_stay(output_dir: str, arguments: Sequence[Any], files: Sequence[str] = ()) -> None:
    """Refuse to clear an output folder that holds an input of the run or lies inside of one.

    Args:
        arguments: the run's dataclasses of flags.
        files: the files of flags.

    Raises:
        InputError: the message names the input, and says which contains which.
    """
    if not os.path.isdir(output_dir):
        return
    given = [(f"--{name}", getattr(part, name, None)) for part in arguments for name in INPUTS]
    for name, value in [*given, *(("the file of flags", file) for file in files)]:
        path = os.path.expanduser(value or "")
        if not os.path.exists(path):  # it is a name on the hub
            continue
        folder = os.path.isdir(path)
        linked = [entry.path for entry in os.scandir(path) if entry.is_symlink()] if folder else []
        if os.path.samefile(path, output_dir):
            lies = "is"
        elif is_within(path, output_dir) or any(is_within(link, output_dir) for link in linked):
            lies = "holds"
        elif folder and is_within(output_dir, path):
            lies = "lies in"
        else:
            continue
        raise InputError(
            f"output_dir {output_dir} would be cleared of an earlier run, and it {lies} what this run reads, {name} "
            f"{value}: name another --output_dir."
        )


def is_within(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies below it, directly or through links."""
    ways = {Path(os.path.abspath(path)), Path(os.path.realpath(path))}
    return any(parent.exists() and parent.samefile(folder) for way in ways for parent in (way, *way.parents))


def clear_output_dir(run: Run) -> None:
    """If `run.clear` is set, remove the files of an earlier run. Call it when nothing can be refused any more."""
    if not run.clear:
        return
    run.clear = False
    with run.training.main_process_first(desc="output folder"):
        if run.training.should_save:
            for item in sorted(Path(run.training.output_dir).iterdir()):
                if RUN_NAMES.fullmatch(item.name) or card.is_card(item):
                    shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
                    logger.info("removed %s of an earlier run", item)

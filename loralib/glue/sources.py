"""Finds the splits of the data in files, in a folder (hub's files, save_to_disk, GLUE's download) or on the hub.

No downloaded code is executed. Local data is held in memory, so that no file appears beside the user's data.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
from datasets import ClassLabel, Dataset

from loralib.errors import InputError
from loralib.glue.cells import joined
from loralib.glue.tables import SUFFIXES, brief, read_file, read_msr_paraphrase, rename_to_hub_columns, stem_and_suffix
from loralib.glue.tasks import GLUE, Task, task_of_folder

logger = logging.getLogger(__name__)

Readers = dict[str, Callable[[], Dataset]]  # by split, a function that reads it: a run reads only what it needs

USES = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}
# Names of splits by their use. Those of MNLI have two halves.
_SPLIT_NAME = re.compile(r"(?:(train)|(validation|valid|val|eval|dev)|(test))((?:_(?:mis)?matched)?)", re.IGNORECASE)
# train, train-00000-of-00001, train-00000-of-00002-0a1b2c
_SHARD = re.compile(r"(.+?)(?:-(\d+)-of-(\d+)(?:-\w+)?)?")


@dataclass(frozen=True)
class Split:
    """A split of the data."""

    name: str  # in its source
    where: str  # file or folder and name of the split, for messages
    read: Callable[[], Dataset]  # reads its rows


@dataclass(frozen=True)
class Source:
    """The place of the data."""

    splits: dict[str, Split]  # by use: train, validation, test, validation_matched, ...
    suggested_task: Task | None  # the task that its name suggests
    place: str  # the files, the folder or the name on the hub, for messages


def use_of(split: str) -> str:
    """The use of a split of a `Source`: train, validation or test."""
    return split.partition("_")[0]


def find(
    task: Task | None,
    dataset_name: str | None,
    config_name: str | None,
    files: Mapping[str, str | None],
    named_splits: Mapping[str, str | None],
    wanted: Mapping[str, bool],
    cache_dir: str | None,
    token: str | bool | None,
) -> Source:
    """Find the data that the flags name.

    Args:
        task: the task of `task_name`.
        files: `train_file`, `validation_file` and `test_file` by use.
        named_splits: `train_split`, `validation_split` and `test_split` by use.
        wanted: whether this run needs the split, by use.

    Raises:
        InputError: the data is not there, or lacks a split that is wanted.
    """
    given = {use: file for use, file in files.items() if file is not None}
    if given and dataset_name is not None:
        raise InputError(
            f"dataset_name {dataset_name!r} and {next(iter(given))}_file {next(iter(given.values()))!r} are both "
            "given: name the data once, as dataset_name or as files."
        )
    if given:
        if named := next((use for use, name in named_splits.items() if name is not None), None):
            raise InputError(
                f"{named}_split {named_splits[named]!r} names a split of dataset_name, and the data comes as files: "
                "leave it out."
            )
        splits = {use: Split(use, file, _reader([_existing(use, file)], task, use)) for use, file in given.items()}
        source = Source(splits, task, ", ".join(given.values()))
    else:
        readers, suggested_task, place = _place(task, dataset_name, config_name, cache_dir, token)
        source = Source(_by_use(readers, named_splits, wanted, place), suggested_task, place)
    for use, flag in USES.items():
        if wanted[use] and not any(use_of(split) == use for split in source.splits):
            names = ", ".join(given or readers)
            way = "add the split" if given else f"name one of them with --{use}_split"
            raise InputError(f"{flag} needs a {use} split and {source.place} has only {names}: {way}, or leave out "
                             f"{flag}.")  # fmt: skip
    return source


def _existing(use: str, file: str) -> Path:
    path = Path(os.path.expanduser(file))  # Path's own expanduser raises for a ~name that does not exist
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.exists(path) else "does not exist"
        what = "is a folder (see dataset_name)" if os.path.isdir(path) else what
        raise InputError(f"{use}_file {file!r} {what}: give a file of {', '.join(SUFFIXES)}.")
    if not stem_and_suffix(path)[1]:
        packed = path.suffix.lower() in (".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".gz")
        way = "unpack it and give" if packed else "give"
        raise InputError(f"{use}_file {file!r} ends in none of the suffixes that are read: {way} a file of "
                         f"{', '.join(SUFFIXES)}, or one of them with .gz.")  # fmt: skip
    return path


def _place(
    task: Task | None,
    dataset_name: str | None,
    config_name: str | None,
    cache_dir: str | None,
    token: str | bool | None,
) -> tuple[Readers, Task | None, str]:
    if dataset_name is not None:
        folder = _folder(dataset_name, config_name, task)
        if folder is not None:
            # The name of the task may be that of a symlink, or of its target.
            names = (Path(os.path.abspath(folder)).name, folder.resolve().name)
            suggested_task = task or task_of_folder(names[0]) or task_of_folder(names[1])
            return _folder_splits(folder, suggested_task), suggested_task, str(folder)
        config_name = config_name or (task.name if task is not None else None)
        return _hub_splits(dataset_name, config_name, cache_dir, token), task_of_folder(config_name or ""), dataset_name
    if task is not None:
        return _hub_splits("nyu-mll/glue", task.name, cache_dir, token), task, f"nyu-mll/glue {task.name}"
    raise InputError(
        f"No data is named: give task_name (one of {', '.join(GLUE)}), or dataset_name (a folder or a data set of the "
        "hub), or train_file and validation_file."
    )


def _by_use(
    readers: Readers, named: Mapping[str, str | None], wanted: Mapping[str, bool], place: str
) -> dict[str, Split]:
    """The splits by use: those that the flags name, otherwise those whose names tell their use."""
    found: dict[str, dict[str, str]] = {use: {} for use in USES}  # use -> {name -> key in `Source.splits`}
    for name in readers:
        if match := _SPLIT_NAME.fullmatch(name):
            use = "train" if match[1] else "validation" if match[2] else "test"
            found[use][name] = use + match[4].lower()
    splits: dict[str, Split] = {}
    for use in USES:
        chosen = named.get(use)
        if chosen is not None:
            if chosen not in readers:
                raise InputError(
                    f"{use}_split {chosen!r} is not a split of {place}: it has {', '.join(readers) or 'none'}."
                )
            match = _SPLIT_NAME.fullmatch(chosen)  # a half of MNLI remains one
            splits[use + (match[4].lower() if match else "")] = Split(
                chosen, f"{place}, split {chosen}", readers[chosen]
            )
            continue
        halves = found[use]
        if len(set(halves.values())) < len(halves) or (len(halves) > 1 and use in halves.values()):
            if wanted[use]:
                raise InputError(f"{place} has {' and '.join(halves)}, which all count as {use}: name one of them with "
                                 f"--{use}_split.")  # fmt: skip
            continue
        splits |= {half: Split(name, f"{place}, split {name}", readers[name]) for name, half in halves.items()}
    return splits


# Folders


def _folder(dataset_name: str, config_name: str | None, task: Task | None) -> Path | None:
    """The local folder that dataset_name means, or its subfolder for the task; None if it is a name on the hub."""
    path = Path(os.path.expanduser(dataset_name))
    if not os.path.isdir(path):
        if os.path.isfile(path):
            raise InputError(f"dataset_name {dataset_name!r} is a file: give its folder, or use train_file, "
                             "validation_file and test_file.")  # fmt: skip
        if dataset_name.startswith((os.sep, ".", "~")) or dataset_name.count(os.sep) > 1:
            raise InputError(f"dataset_name {dataset_name!r} is a folder that does not exist: give one with parquet, "
                             "save_to_disk or tsv files, or a name on the hub.")  # fmt: skip
        return None
    inner = [config_name, *((task.name, task.folder) if task is not None else ())]
    return next((path / name for name in inner if name and os.path.isdir(path / name)), path)


def _folder_splits(folder: Path, task: Task | None) -> Readers:
    """The splits of a save_to_disk folder, of the hub's parquet files (also below `data`) or of GLUE's own download."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            # Otherwise map() would write its cache into the user's folder.
            saved = datasets.load_from_disk(str(folder), keep_in_memory=True)
        except Exception as error:
            if isinstance(error, PermissionError | MemoryError):
                raise InputError(f"{folder} cannot be loaded ({brief(error)}).") from error
            raise InputError(
                f"{folder} is not a complete save_to_disk folder ({brief(error)}): save it again."
            ) from error
        if isinstance(saved, Dataset):
            saved = datasets.DatasetDict({str(saved.split or "train"): saved})
        return _in_memory(saved, task)

    try:
        entries = sorted([*folder.iterdir(), *(folder / "data").glob("*")])
    except OSError as error:
        raise InputError(f"{folder} could not be listed ({brief(error)}): make it readable.") from error
    found: dict[str, dict[str, list[Path]]] = {}  # by split and suffix, the files
    for path in entries:
        stem, suffix = stem_and_suffix(path)
        match = _SHARD.fullmatch(stem)
        if match and suffix and path.is_file():
            found.setdefault(match[1], {}).setdefault(suffix, []).append(path)
    readers: Readers = {name: partial(_read_shards, folder, name, by_suffix, task) for name, by_suffix in found.items()}
    if task is not None and task.name == "ax" and "diagnostic" in readers:
        readers["test"] = readers.pop("diagnostic")
    if task is not None and task.name == "mrpc":
        # The hub's rows come from Microsoft's own files, whose test labels are public; train.tsv is made from them.
        if (folder / "msr_paraphrase_train.txt").is_file() and (folder / "dev_ids.tsv").is_file():
            readers = {
                name: read for name, read in readers.items() if not _SPLIT_NAME.fullmatch(name) or "test" in name
            }
            for split in ("train", "validation"):
                readers[split] = partial(read_msr_paraphrase, folder, task, split)
        if (folder / "msr_paraphrase_test.txt").is_file():
            readers["test"] = partial(read_msr_paraphrase, folder, task, "test")
    if not readers:
        inner = [path.name for path in entries if path.parent == folder and path.is_dir()]
        raise InputError(
            f"{folder} has no train, validation (dev) or test file of {', '.join(SUFFIXES)} and is not a save_to_disk "
            f"folder: name the folder of one task{f', such as {inner[0]!r} in it' if inner else ''}."
        )
    return readers


def _read_shards(folder: Path, split: str, by_suffix: Mapping[str, list[Path]], task: Task | None) -> Dataset:
    paths = by_suffix[min(by_suffix, key=SUFFIXES.index)]
    if len(by_suffix) > 1:
        logger.warning("%s has the split %s as %s: %s is read.", folder, split, ", ".join(by_suffix), paths[0].name)
    shards = {match[3] for path in paths if (match := _SHARD.fullmatch(stem_and_suffix(path)[0]))}
    expected = int(next(iter(shards)) or 1) if len(shards) == 1 else 1
    if len(paths) != expected:
        raise InputError(f"{folder} has {len(paths)} files for the split {split} and their names promise "
                         f"{expected}: {', '.join(path.name for path in paths)}.")  # fmt: skip
    return _reader(paths, task, split)()


def _reader(paths: list[Path], task: Task | None, split: str) -> Callable[[], Dataset]:
    def read() -> Dataset:
        parts = [rename_to_hub_columns(read_file(path, task, split), task) for path in paths]
        if len(parts) == 1:
            return parts[0]
        for path, part in zip(paths, parts, strict=True):
            if part.column_names != parts[0].column_names:
                raise InputError(
                    f"{path} has the columns {', '.join(part.column_names)} and {paths[0].name} has "
                    f"{', '.join(parts[0].column_names)}: the files of a split need the same."
                )
        if all(part.features == parts[0].features for part in parts):
            return datasets.concatenate_datasets(parts)
        if any(isinstance(feature, ClassLabel) for part in parts for feature in part.features.values()):
            raise InputError(f"The files of the split {split}, {paths[0]} and on, have different classes or types of "
                             "columns: write them again with the same.")  # fmt: skip
        # A column may be empty in one file, or hold whole numbers in one file and floats in another.
        columns = {name: joined([part.data.column(name) for part in parts]) for name in parts[0].column_names}
        return Dataset(datasets.table.InMemoryTable(pa.table(columns)))

    return read


# The hub


def _hub_splits(name: str, config: str | None, cache_dir: str | None, token: str | bool | None) -> Readers:
    """All splits of a data set on the hub, or of its copy in the cache if the hub cannot be reached."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        # First a short request: without the hub, load_dataset takes from 20 seconds to minutes to give up.
        huggingface_hub.HfApi(token=token).dataset_info(name, timeout=10)
        reached = True
    except Exception as error:
        # The hub has answered, perhaps with a refusal; or name or token were refused before it was asked.
        own_fault = isinstance(error, (ValueError, huggingface_hub.errors.LocalTokenNotFoundError))
        reached = own_fault or getattr(error, "response", None) is not None
    try:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline or not reached
        loaded = datasets.load_dataset(name, config, cache_dir=cache_dir, token=token)
    except Exception as error:
        if not reached:
            raise InputError(
                f"The hub was not reachable, {name!r}{f' ({config})' if config else ''} is not in the cache, and no "
                f"folder of that name exists here: connect, or give dataset_name as a folder ({brief(error)})."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise InputError(f"The data set {name!r} of the hub could not be kept in the cache ({brief(error)}): make "
                             "room, or name another folder with cache_dir.") from error  # fmt: skip
        raise InputError(f"The data set {name!r}{f' ({config})' if config else ''} of the hub could not be loaded: "
                         f"check its name, dataset_config_name and token ({brief(error)}).") from error  # fmt: skip
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
    return _in_memory(loaded, None)


def _in_memory(loaded: datasets.DatasetDict, task: Task | None) -> Readers:
    return {str(name): partial(rename_to_hub_columns, dataset, task) for name, dataset in loaded.items()}

"""From a task name, a folder or files to rows: the text columns and `label`, the same on every route.

Nothing that was downloaded is ever executed. Local data is held in memory: no file appears beside the user's data.
"""

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
from datasets import ClassLabel, Dataset, Value

from loralib.errors import InputError
from loralib.glue.files import SUFFIXES, brief, hub_columns, read_file, read_msr_paraphrase
from loralib.glue.tasks import GLUE, Task, task_of_folder

logger = logging.getLogger(__name__)

Splits = dict[str, Callable[[], Dataset]]  # hub name of the split -> reads it: only what a run needs is read

# train, dev_matched, validation-00000-of-00001, train-00000-of-00002-0a1b2c
_SPLIT_FILE = re.compile(r"(train|(?:dev|validation|test)(?:_(?:mis)?matched)?)(?:-(\d+)-of-(\d+)(?:-\w+)?)?")
_FLAGS = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}
# Columns that say by their names that they are the texts; elsewhere the first one or two columns of text are taken.
_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"),
          ("sentence",), ("text",))  # fmt: skip
_HIDDEN = ("", "-1", "-1.0")  # how a label that is not given is written


@dataclass(frozen=True)
class GlueData:
    """The rows of a run; `evals` and `tests` are keyed by the task's name, MNLI's mismatched half by `mnli-mm`.

    Each dataset has the task's text columns and `label`: int64 ids in the order of `task.label_names`, or float32;
    all of them -1 in a test split whose labels are hidden or absent, as on the hub.
    """

    task: Task
    train: Dataset | None
    evals: dict[str, Dataset]
    tests: dict[str, Dataset]


def load(
    *,
    task_name: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    do_train: bool = False,
    do_eval: bool = False,
    do_predict: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    known: Task | None = None,
) -> GlueData:
    """Load the splits that a run needs and decide which task they are (ledger D1).

    `task_name` decides; without it the last name of the folder `dataset_name` does, if it is a task's and the columns
    fit; else the data is a generic classification or regression task, which the log says. A `dataset_name` that exists
    as a folder is never sent to the hub. Raises InputError for whatever cannot be used.

    `known` is the task of something that is trained already (an adapter, a model, a checkpoint). Its `label_names`,
    None for a regression, decide the kind and the order of the classes; the file at hand decides neither, and may lack
    classes or have no labels to predict. Names match whatever their case, surrounding spaces, `_`, `-` and inner
    spaces. Whole numbers 0 to n - 1 in a file count by the index of the class, which the log says; those of GLUE's own
    data keep GLUE's order. An empty `text_columns` lets the file decide which columns hold the texts, and empty
    `metrics` stand for those of the kind. `GlueData.task` then has the order of `known.label_names`, which may differ
    from `GLUE[task.name].label_names`.
    """
    wanted = {"train": do_train, "validation": do_eval, "test": do_predict}
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_predict_samples}
    for kind, flag in (("train", "max_train_samples"), ("validation", "max_eval_samples"),
                       ("test", "max_predict_samples")):  # fmt: skip
        limit = limits[kind]
        if limit is not None and limit < 1:
            raise InputError(f"{flag} is {limit} but must be at least 1: leave it out to use every row.")
    if task_name is not None and task_name.lower() not in GLUE:
        raise InputError(
            f"task_name {task_name!r} is not a GLUE task: use one of {', '.join(GLUE)}, or leave it out and give "
            "dataset_name, or train_file and validation_file."
        )
    named = GLUE[task_name.lower()] if task_name is not None else None
    splits, candidate, source = _find(
        named,
        dataset_name,
        dataset_config_name,
        {"train": train_file, "validation": validation_file, "test": test_file},
        cache_dir,
        token,
    )
    for kind, flag in _FLAGS.items():
        if wanted[kind] and not any(_kind(split) == kind for split in splits):
            raise InputError(
                f"{flag} needs a {kind} split and {source} has only {', '.join(splits)}: add the split or leave out "
                f"{flag}."
            )

    raw = {split: read() for split, read in splits.items() if wanted[_kind(split)]}
    for split, dataset in raw.items():
        try:
            dataset.data.validate(full=True)  # also that texts are UTF-8, which reading a file does not look at
        except pyarrow.ArrowInvalid as error:
            raise InputError(
                f"{source}, split {split}, is damaged ({brief(error)}): write it anew, with texts in UTF-8."
            ) from error
    if known is not None:
        task = _known_task(known, named, splits, raw, candidate, source)
    else:
        task = named or _recognise(splits, raw, candidate, source)
    rows = {}
    for split, dataset in raw.items():
        checked = _rows(dataset, task, split, source, known is not None)
        limit = limits[_kind(split)]
        rows[split] = checked.select(range(min(limit, len(checked)))) if limit is not None else checked
    for kind in ("validation", "test"):
        halves = [split for split in rows if _kind(split) == kind]
        if task.name == "mnli" and len(halves) == 1:
            logger.warning("%s has only %s of MNLI's two %s splits: that one is used.", source, halves[0], kind)

    def keyed(kind: str) -> dict[str, Dataset]:
        # sorted: matched before mismatched, as GLUE reports them
        halves = sorted(split for split in rows if _kind(split) == kind)
        return {task.name + ("-mm" if split.endswith("_mismatched") else ""): rows[split] for split in halves}

    return GlueData(task, rows.get("train"), keyed("validation"), keyed("test"))


# Routes: where the splits are


def _kind(split: str) -> str:
    """train, validation or test."""
    return split.partition("_")[0]


def _find(
    task: Task | None,
    dataset_name: str | None,
    config_name: str | None,
    files: dict[str, str | None],
    cache_dir: str | None,
    token: str | bool | None,
) -> tuple[Splits, Task | None, str]:
    """The splits, the task that their place suggests, and the place in words."""
    given = {split: file for split, file in files.items() if file is not None}
    if given and dataset_name is not None:
        raise InputError(
            f"dataset_name {dataset_name!r} and {next(iter(given))}_file {next(iter(given.values()))!r} are both "
            "given: name the data once, as dataset_name or as files."
        )
    if given:
        # os.path: Path's own expanduser fails on the ~name of nobody
        paths = {split: Path(os.path.expanduser(file)) for split, file in given.items()}
        for split, path in paths.items():
            if not os.path.isfile(path) or path.suffix.lower() not in SUFFIXES:
                problem = "ends in none of them" if os.path.isfile(path) else "does not exist"
                raise InputError(f"{split}_file {given[split]!r} {problem}: give a file of {', '.join(SUFFIXES)}.")
        return {s: _reader([path], task, s) for s, path in paths.items()}, task, ", ".join(given.values())
    if dataset_name is not None:
        folder = _folder(dataset_name, config_name, task)
        if folder is not None:
            # a symlink may have a task's name, or its target
            names = (Path(os.path.abspath(folder)).name, folder.resolve().name)
            candidate = task or task_of_folder(names[0]) or task_of_folder(names[1])
            return _folder_splits(folder, candidate), candidate, str(folder)
        config_name = config_name or (task.name if task is not None else None)
        return _hub_splits(dataset_name, config_name, cache_dir, token), task_of_folder(config_name or ""), dataset_name
    if task is not None:
        return _hub_splits("nyu-mll/glue", task.name, cache_dir, token), task, f"nyu-mll/glue {task.name}"
    raise InputError(
        f"No data is named: give task_name (one of {', '.join(GLUE)}), or dataset_name (a folder or a data set of the "
        "hub), or train_file and validation_file."
    )


def _folder(dataset_name: str, config_name: str | None, task: Task | None) -> Path | None:
    """The local folder that dataset_name means, the task's subfolder where it has one; None for a name of the hub."""
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


def _folder_splits(folder: Path, task: Task | None) -> Splits:
    """save_to_disk, the hub's parquet files (in the folder or its `data`), or GLUE's own download."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            # in memory: map() would otherwise write its cache into the user's folder
            saved = datasets.load_from_disk(str(folder), keep_in_memory=True)
        except Exception as error:
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
    found: dict[str, dict[str, list[Path]]] = {}  # split -> suffix -> files
    for path in entries:
        match = _SPLIT_FILE.fullmatch(path.stem)
        if match and path.suffix.lower() in SUFFIXES and path.is_file():
            found.setdefault(_hub_split(match[1]), {}).setdefault(path.suffix.lower(), []).append(path)
    splits: Splits = {}
    for split, by_suffix in found.items():
        paths = by_suffix[min(by_suffix, key=SUFFIXES.index)]
        shards = {match[3] for path in paths if (match := _SPLIT_FILE.fullmatch(path.stem))}
        expected = int(next(iter(shards)) or 1) if len(shards) == 1 else 1
        if len(paths) != expected:
            raise InputError(f"{folder} has {len(paths)} files for the split {split} and their names promise "
                             f"{expected}: {', '.join(path.name for path in paths)}.")  # fmt: skip
        splits[split] = _reader(paths, task, split)

    if task is not None and task.name == "ax" and (folder / "diagnostic.tsv").is_file():
        splits["test"] = _reader([folder / "diagnostic.tsv"], task, "test")
    if task is not None and task.name == "mrpc":
        # The hub's rows come from Microsoft's own files, whose test labels are public; train.tsv is made from them.
        if (folder / "msr_paraphrase_train.txt").is_file() and (folder / "dev_ids.tsv").is_file():
            for split in ("train", "validation"):
                splits[split] = partial(read_msr_paraphrase, folder, task, split)
        if (folder / "msr_paraphrase_test.txt").is_file():
            splits["test"] = partial(read_msr_paraphrase, folder, task, "test")
    if not splits:
        inner = [path.name for path in entries if path.parent == folder and path.is_dir()]
        raise InputError(
            f"{folder} has no train, validation (dev) or test file of {', '.join(SUFFIXES)} and is no save_to_disk "
            f"folder: name the folder of one task{f', such as {inner[0]!r} in it' if inner else ''}."
        )
    return splits


def _hub_splits(name: str, config: str | None, cache_dir: str | None, token: str | bool | None) -> Splits:
    """All splits of a data set of the hub, or of its copy in the cache when the hub cannot be reached."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        # one short request first: load_dataset alone takes from 20 seconds to minutes to give up
        huggingface_hub.HfApi(token=token).dataset_info(name, timeout=10)
        reached = True
    except Exception as error:
        # the hub answered, if only to refuse, or the name or token was so wrong that nobody asked it
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
        raise InputError(f"The data set {name!r}{f' ({config})' if config else ''} of the hub could not be loaded: "
                         f"check its name, dataset_config_name and token ({brief(error)}).") from error  # fmt: skip
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
    return _in_memory(loaded, None)


def _in_memory(loaded: datasets.DatasetDict, task: Task | None) -> Splits:
    return {_hub_split(name): partial(hub_columns, dataset, task) for name, dataset in loaded.items()}


def _hub_split(name: str) -> str:
    return name.replace("dev", "validation", 1) if name.startswith("dev") else name


def _reader(paths: list[Path], task: Task | None, split: str) -> Callable[[], Dataset]:
    def read() -> Dataset:
        parts = [hub_columns(read_file(path, task, split), task) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if part.column_names != parts[0].column_names:
                raise InputError(
                    f"{path} has the columns {', '.join(part.column_names)} and {paths[0].name} has "
                    f"{', '.join(parts[0].column_names)}: the files of a split need the same."
                )
        try:
            return datasets.concatenate_datasets(parts)
        except Exception as error:
            raise InputError(f"The files of the split {split}, {paths[0]} and on, hold different types of columns "
                             f"({brief(error)}).") from error  # fmt: skip

    return read


# Which task it is, and its rows


def _recognise(splits: Splits, raw: dict[str, Dataset], candidate: Task | None, source: str) -> Task:
    """The candidate if the columns fit it, else a generic task with the classes of the training split (ledger D1)."""
    by_use = [split for kind in _FLAGS for split in splits if _kind(split) == kind] or list(splits)
    if candidate is not None:
        dataset = next(iter(raw.values())) if raw else splits[by_use[0]]()
        if _fits(dataset, candidate):
            logger.info("Task %s: %s has its name and its columns.", candidate.name, source)
            return candidate
    split = by_use[0]
    dataset = raw[split] if split in raw else splits[split]()
    task = _generic_task(dataset, split, source)
    logger.warning(
        "%s is %s: generic %s of %s, %s. Give task_name for a GLUE task.",
        source,
        f"named like {candidate.name} but has other columns" if candidate else "not recognised as a GLUE task",
        task.name,
        " and ".join(task.text_columns),
        "float labels" if task.label_names is None else f"labels {', '.join(task.label_names)}",
    )
    return task


def _known_task(
    known: Task, named: Task | None, splits: Splits, raw: dict[str, Dataset], candidate: Task | None, source: str
) -> Task:
    """The task of what is trained already, with the text columns that the data has."""
    split, dataset = next(iter(raw.items())) if raw else next((split, read()) for split, read in splits.items())
    glue = named or next(
        (task for task in (candidate, GLUE.get(known.name)) if task is not None and _fits(dataset, task)), None
    )
    if glue is not None:
        if (glue.label_names is None) != (known.label_names is None) or (
            glue.label_names is not None
            and known.label_names is not None
            and set(map(_plain, glue.label_names)) != set(map(_plain, known.label_names))
        ):
            raise InputError(
                f"{source} is {glue.name} with {_kind_in_words(glue)}, and what is trained knows "
                f"{_kind_in_words(known)}: use data of the task that it was trained on."
            )
        return replace(glue, label_names=known.label_names)
    texts = known.text_columns
    if not texts or not set(texts).issubset(dataset.column_names):
        texts = _guess_texts(dataset, split, source)
    metrics = known.metrics or (("mse", "pearson", "spearmanr") if known.label_names is None else ("accuracy",))
    return replace(known, text_columns=texts, metrics=metrics)


def _kind_in_words(task: Task) -> str:
    return "float labels" if task.label_names is None else f"the labels {', '.join(task.label_names)}"


def _plain(name: str) -> str:
    """A label's name without what spellings of one name differ in: case, spaces, `_`, `-`."""
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))


def _fits(dataset: Dataset, task: Task) -> bool:
    """Whether the columns are the task's: its texts, and labels that are not of another task by their type."""
    if not set(task.text_columns).issubset(dataset.column_names):
        return False
    feature = dataset.features.get("label")
    if isinstance(feature, ClassLabel):
        return task.label_names is not None and set(feature.names).issubset(_label_ids(task))
    return not (_is_float(feature) and task.label_names is not None)


def _guess_texts(dataset: Dataset, split: str, source: str) -> tuple[str, ...]:
    columns = {name: dataset.features[name] for name in dataset.column_names}
    texts = [name for name, feature in columns.items() if _is_text(feature)]
    texts = [name for name in texts if name not in ("label", "idx", "index", "id")]
    known = next((names for names in _TEXTS if set(names).issubset(texts)), None)
    # a csv's numbers are strings too
    names = known or tuple([name for name in texts if not all(map(_is_number, dataset[name]))][:2])
    if not names:
        raise InputError(
            f"{source}, split {split}, has no column of texts among {', '.join(columns) or 'none'}: a GLUE task has "
            f"{'; '.join(' and '.join(known) for known in _TEXTS)}."
        )
    return names


def _generic_task(dataset: Dataset, split: str, source: str) -> Task:
    if len(dataset) == 0:
        raise InputError(f"{source}, split {split} has no rows: it needs at least 1.")
    names = _guess_texts(dataset, split, source)
    columns = {name: dataset.features[name] for name in dataset.column_names}
    if "label" not in columns:
        way = (
            "give train_file, whose labels are the classes, or task_name"
            if _kind(split) == "test"
            else "rename the one that holds the labels"
        )
        raise InputError(f"{source}, split {split}, has no column `label` among {', '.join(columns)}: {way}.")
    feature = columns["label"]
    if isinstance(feature, ClassLabel):
        classes = list(feature.names)
    else:
        classes = sorted({_word(value) for value in dataset["label"]} - set(_HIDDEN))
        if _is_float(feature) or (classes and _is_text(feature) and all(map(_is_number, classes))):
            if _is_float(feature) or not all(re.fullmatch(r"[+-]?\d+", word) for word in classes):
                return Task("regression", names, None, ("mse", "pearson", "spearmanr"))
            classes.sort(key=int)
        elif not _is_text(feature) and feature != Value("bool"):
            classes.sort(key=int)
    if len(classes) < 2:
        raise InputError(f"{source}, split {split}, has the one label {', '.join(classes) or 'hidden'}: a "
                         "classification needs two or more, a regression floats.")  # fmt: skip
    return Task("classification", names, tuple(classes), ("accuracy",))


def _rows(dataset: Dataset, task: Task, split: str, source: str, known: bool) -> Dataset:
    """The text columns and checked labels of one split."""
    where = f"{source}, split {split}"
    needed = [*task.text_columns, *(["label"] if _kind(split) != "test" else [])]
    if missing := [name for name in needed if name not in dataset.column_names]:
        raise InputError(
            f"{where}: its columns {', '.join(dataset.column_names)} do not fit {task.name}, which needs "
            f"{', '.join(needed)}: {', '.join(missing)} not found."
        )
    if len(dataset) == 0:
        raise InputError(f"{where} has no rows: it needs at least 1.")
    for name in task.text_columns:
        if not _is_text(dataset.features[name]):
            raise InputError(f"{where}: column {name} holds {dataset.features[name]} where texts are needed.")
        empty = [row for row, text in enumerate(_column(dataset, name)) if text is None or not text.strip()]
        # QQP's release has a few questions without words; everywhere else an empty text is a mistake in the data
        if empty and not (task.drops_cut_rows and all(dataset[row][name] is not None for row in empty)):
            raise InputError(f"{where}: row {empty[0]} (counted from 0) has an empty {name}, as have {len(empty) - 1} "
                             "others: fill or remove them.")  # fmt: skip
        if empty:
            logger.warning("%s: %d rows have an empty %s, as released.", where, len(empty), name)
    labels = _labels(dataset, task, where, _kind(split) == "test", known)
    if isinstance(dataset.features.get("label"), ClassLabel) and labels == _column(dataset, "label"):
        return dataset.select_columns([*task.text_columns, "label"])  # untouched, so that the hub's cache serves
    rows = dataset.select_columns(list(task.text_columns))
    return rows.add_column("label", labels, feature=Value("float32" if task.label_names is None else "int64"))


def _column(dataset: Dataset, name: str) -> list[Any]:
    return dataset.select_columns([name])[:][name]


def _labels(dataset: Dataset, task: Task, where: str, is_test: bool, known: bool) -> list[int] | list[float]:
    """Ids or floats, all -1 for a test split without them; InputError names the first row without a proper label."""
    if is_test and "label" not in dataset.column_names:
        return [-1] * len(dataset)
    feature = dataset.features["label"]
    words = [_word(value) for value in _column(dataset, "label")]
    # a regression of no known scale may well have -1 among its labels
    hidden = _HIDDEN if task.label_names is not None or task.label_range is not None else ("",)
    if is_test and any(word in hidden for word in words):
        return [-1] * len(dataset)
    if isinstance(feature, ClassLabel):
        names = {str(i): name for i, name in enumerate(feature.names)}
        words = [names.get(word, word) for word in words]
    if task.label_names is None:
        low, high = task.label_range or (-math.inf, math.inf)
        allowed = f"a finite number from {low} to {high}"
        good = [_is_number(word) and math.isfinite(float(word)) and low <= float(word) <= high for word in words]
    else:
        ids = _label_ids(task)
        allowed = ", ".join(ids)
        if known:
            words, by_index = _known_words(words, task)
            if by_index and not is_test:
                logger.info(
                    "%s: its labels are numbers and count by the index of %s.", where, ", ".join(task.label_names)
                )
        good = [word in ids for word in words]
    if not all(good):
        row = good.index(False)
        hint = " (-1 or nothing marks hidden labels)" if words[row] in hidden else ""
        raise InputError(f"{where}: row {row} (counted from 0) has the label {words[row]!r}{hint}, allowed is "
                         f"{allowed}: repair or remove the row.")  # fmt: skip
    return [float(word) for word in words] if task.label_names is None else [ids[word] for word in words]


def _label_ids(task: Task) -> dict[str, int]:
    """Class ids by the words that stand for them: their names and, for GLUE's tasks, the ids themselves."""
    names = task.label_names or ()
    ids = {}
    if task.name in GLUE:  # numbers mean GLUE's order, whatever the order of a model
        order = {_plain(name): i for i, name in enumerate(names)}
        ids = {str(i): order[_plain(name)] for i, name in enumerate(GLUE[task.name].label_names or ())}
    return ids | {name: i for i, name in enumerate(names)}


def _known_words(words: list[str], task: Task) -> tuple[list[str], bool]:
    """Labels in the spelling of the task's names, and whether numbers stand for the index of a name."""
    names = task.label_names or ()
    spelled = {_plain(name): name for name in names}
    words = [spelled.get(_plain(word), word) for word in words]
    by_index = {str(i): name for i, name in enumerate(names)}
    if task.name in GLUE or any(map(_is_number, names)) or not any(word in by_index for word in words):
        return words, False
    return [by_index.get(word, word) for word in words], True


def _word(value: object) -> str:
    """A label as text: 1, 1.0 and `1` are the same class."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def _is_float(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith("float")

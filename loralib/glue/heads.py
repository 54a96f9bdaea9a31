"""The labels of a trained head: finds their names and order, and brings the data into this order.

The order is decided by the first of these that exists: the config.json of the checkpoint that is resumed, adapter.json,
the config.json beside it if adapter.json names no labels, the model's config, the task.
"""

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import PreTrainedConfig

from loralib.adapters.names import are_indices, placeholders, places_in, unnamed_labels
from loralib.adapters.reading import ADAPTER_CONFIG, Adapter, output_layer
from loralib.adapters.start import read_adapter
from loralib.errors import InputError
from loralib.glue.cells import listed
from loralib.glue.data import GlueData
from loralib.glue.flags import ModelArguments
from loralib.glue.tasks import GLUE, Task
from loralib.jsonfile import find_json

logger = logging.getLogger(__name__)

MULTI_LABEL = "multi_label_classification"
TWICE = "two outputs of one name"
CLASSIFIER = "ForSequenceClassification"  # the end of the names of transformers' classifiers


@dataclass(frozen=True)
class TrainedHead:
    """What is known about a head before any data is read.

    source: the file that describes it, for messages.
    label_names: in the order of the outputs, None for a regression; placeholders (LABEL_0) only tell the number.
    task: the name of the task, if it is recorded.
    unsupported: the property of its outputs that is not supported, in words; None if it is supported.
    resumed: whether it comes from the checkpoint from which the run goes on.
    """

    source: str
    label_names: tuple[str, ...] | None
    task: str | None = None
    unsupported: str | None = None
    resumed: bool = False

    def __str__(self) -> str:
        """The kind and the names in words."""
        if self.label_names is None:
            return "a regression"
        if unnamed_labels(self.label_names):
            return f"{len(self.label_names)} classes without names"
        return f"the labels {listed(self.label_names)}"

    def as_task(self) -> Task:
        """The task that the head was trained for. It has no columns, because the data decide them, and it has the name
        of a GLUE task only if it has the labels of that task.

        Raises:
            InputError: the head is `unsupported`.
        """
        if self.unsupported:
            raise InputError(
                f"{self.source} describes a head with {self.unsupported}, which is not supported: here a row has one "
                "label and a label has one name; train a new head by --do_train."
            )
        own = GLUE.get(self.task or "")
        if own is not None and fits(self, own):
            return Task(own.name, (), self.label_names, ())
        return Task("regression" if self.label_names is None else "classification", (), self.label_names, ())


# ---- find the labels ----


def trained_head(model: ModelArguments, lora_path: str | None, checkpoint: str | None) -> TrainedHead | None:
    """The head that a run starts from; None if there is no trained one.

    Raises:
        InputError: the adapter cannot be read, or its files contradict each other.
    """
    if checkpoint is not None:
        file = Path(checkpoint) / "config.json"
        config = find_json(file)
        if config is not None:
            return replace(head_of_config(config, str(file)), resumed=True)
    if lora_path:
        found = head_of_adapter(read_adapter(lora_path))
        if found is not None:
            return found
    return head_of_model(model)


def head_of_adapter(adapter: Adapter) -> TrainedHead | None:
    """The head of an adapter; None if its file has none.

    Raises:
        InputError: adapter.json names more or fewer labels than the head has outputs.
    """
    head, told = output_layer(adapter.rest), adapter.config.get("label_names", ())
    if head is None and not (adapter.config.get("head") and told):
        return None
    number = _outputs(told) if head is None else adapter.rest[head[0]].shape[0]
    task = adapter.config.get("task")
    task = task if isinstance(task, str) else None
    if told or (told is None and number == 1):
        file = str(adapter.source / ADAPTER_CONFIG)
        if _outputs(told) != number:
            raise InputError(
                f"{file} names the labels {', '.join(told or ())} and its head has {number} output(s): they "
                "belong to different runs."
            )
        names = tuple(told) if told else None
        return TrainedHead(file, names, task, TWICE if names is not None and len({*names}) < number else None)
    beside = find_json(adapter.source / "config.json") if adapter.source.is_dir() else None
    if beside is not None:
        found = head_of_config(beside, str(adapter.source / "config.json"))
        if _outputs(found.label_names) == number:
            return replace(found, task=task or found.task)
    return TrainedHead(str(adapter.source), None if number == 1 else placeholders(number), task)


def _outputs(names: Sequence[str] | None) -> int:
    """The number of outputs of a head with these labels: 1 for a regression, which has none."""
    return len(names) if names else 1


def head_of_model(model: ModelArguments) -> TrainedHead | None:
    """The head of a model, by its config; None for a pretrained body without a classifier, or without a config.

    Raises:
        InputError: --config_name asks for several labels per row, or the hub does not answer.
    """
    name = os.path.expanduser(model.model_name_or_path)
    config = _read_config(name, model)
    named = _read_config(model.config_name, model) if model.config_name else config
    if config is None or named is None:
        return None
    if named is not config and named.get("problem_type") == MULTI_LABEL:
        raise InputError(f"config_name {model.config_name} has problem_type {MULTI_LABEL}, which is not supported: a "
                         "row has one label here.")  # fmt: skip
    architectures = config.get("architectures")
    classifies = isinstance(architectures, list) and any(str(a).endswith(CLASSIFIER) for a in architectures)
    head = head_of_config(named, f"the config of {model.config_name or model.model_name_or_path}")
    if not classifies and (head.label_names is None or unnamed_labels(head.label_names)):
        return None  # a config that names labels is taken for that of a classifier, even if it lacks other entries
    record = find_json(Path(name) / "run.json") or {}
    return replace(head, task=head.task or (record["task"] if isinstance(record.get("task"), str) else None))


def _read_config(name: str, model: ModelArguments) -> dict[str, Any] | None:
    """config.json of a folder or of a model on the hub; None without one.

    A folder's broken file counts as none, because load_model reports it. A hub that fails here may answer load_model
    later; the order of the labels would then be lost, so its error is raised.
    """
    try:
        asked: dict[str, Any] = {"cache_dir": model.cache_dir, "revision": model.model_revision, "token": model.token}
        return PreTrainedConfig.get_config_dict(name, **asked)[0]
    except Exception as error:  # each way to read a file has its own exceptions
        if is_folder(name) or isinstance(error.__cause__, RemoteEntryNotFoundError):
            return None
        raise cannot_be_loaded(name, error) from error


def is_folder(name: str) -> bool:
    """Whether a model is given as a folder, existing or not, and not by its name on the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).is_dir()


def cannot_be_loaded(name: str, error: Exception) -> InputError:
    """One sentence for the error that a library raised while it read the model `name`."""
    if Path(name).is_dir():
        where, way = "", " (is every file whole, none half downloaded or a git-lfs pointer?)"
        if any((Path(name) / file).is_file() for file in ("adapter.json", "adapter_config.json")):
            way = " (the folder holds an adapter: give it as --lora_path, and its base model here)"
    else:
        where, way = " (no such folder here, so the hub was asked; it may not have been reachable)", ""
    what = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):  # its message would advise to execute code from the file
        what = "its weights are not a file of tensors"
    if "ignore_mismatched_sizes" in what:
        what = (
            "some layers have sizes that do not match the config and the task's head (listed above): "
            "--ignore_mismatched_sizes replaces them by fresh ones"
        )
        way = ""
    return InputError(f"the model {name} cannot be loaded{where}: {what}{way}")


def head_of_config(config: Mapping[str, Any], source: str) -> TrainedHead:
    """The head that a classifier's config.json describes. transformers leaves out id2label for two unnamed classes.

    Raises:
        InputError: id2label does not name the outputs 0, 1 and on.
    """
    number: Any = config.get("num_labels")
    names = config.get("id2label") or dict(enumerate(placeholders(number if number in range(1, 10**5) else 2)))
    try:
        by_id = {int(i): str(name) for i, name in names.items()}
        ordered = tuple(by_id[i] for i in range(len(by_id)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source} has an id2label that does not map 0, 1 and on, without a gap, to names: repair it."
        ) from error
    kind, task = config.get("problem_type"), config.get("finetuning_task")
    unsupported = None
    if kind == MULTI_LABEL or (kind == "regression" and len(ordered) > 1):
        unsupported = f"problem_type {kind} with {len(ordered)} output(s)"
    elif len(set(ordered)) < len(ordered):
        unsupported = TWICE
    regression = len(ordered) == 1 and unsupported is None
    task = task if isinstance(task, str) else None
    return TrainedHead(source, None if regression else ordered, task, unsupported)


# ---- bring the data into the head's order ----


def in_order_of_head(data: GlueData, head: TrainedHead, trains: bool) -> GlueData:
    """The data with its label ids changed to the order of the head.

    If head and data are for different labels, training starts with a new head and the log says so. An evaluation or a
    resumed run is refused.

    Raises:
        InputError: nothing trains or a checkpoint is resumed, and the head is for other labels.
    """
    if fits(head, data.task):
        return _permuted(data, head)
    names = data.task.label_names
    ours = "a regression" if names is None else f"the labels {listed(names)}"
    what = f"{head.source} describes a head for {head} and the data is for {ours}"
    if head.unsupported:
        what = f"{head.source} describes a head with {head.unsupported}, which is not supported: a row has one label"
    if head.resumed:
        raise InputError(f"{what}: go back to its data, name another --output_dir, or start over with "
                         "--overwrite_output_dir.")  # fmt: skip
    if not trains:
        raise InputError(f"{what}: give data with the labels that were trained, or train a new head by --do_train.")
    logger.warning("%s: training starts with a new, random head", what)
    return data


def fits(head: TrainedHead, task: Task) -> bool:
    """Whether the head is for the classes of the task, in any order; or both are regressions."""
    if head.unsupported:
        return False
    if head.label_names is None or task.label_names is None:
        return head.label_names is None and task.label_names is None
    return places_in(task.label_names, head.label_names) is not None


def _permuted(data: GlueData, head: TrainedHead) -> GlueData:
    names, order = data.task.label_names, head.label_names
    if names is None or order is None or names == order:
        return data
    numbers = are_indices(names)
    if unnamed_labels(order):
        if not numbers:
            level = logging.INFO if data.task.name in GLUE else logging.WARNING  # GLUE's order is the usual one
            said = "%s has no names for its outputs 0 to %d: they count as %s"
            logger.log(level, said, head.source, len(names) - 1, listed(names))
        return data
    places = places_in(names, order)
    assert places is not None
    by_index = numbers and {*names} != {*order}
    said = "the labels are numbers, which are read as indices into" if by_index else "the labels have the order"
    logger.info("%s %s, as in %s", said, listed(order), head.source)

    def moved(rows: Dataset) -> Dataset:
        if places == sorted(places):
            return rows
        labels = [places[i] if i >= 0 else i for i in rows.select_columns(["label"])[:]["label"]]
        return rows.remove_columns("label").add_column("label", labels, feature=Value("int64"))

    return GlueData(
        replace(data.task, label_names=order),
        None if data.train is None else moved(data.train),
        {name: moved(rows) for name, rows in data.evals.items()},
        {name: moved(rows) for name, rows in data.tests.items()},
    )

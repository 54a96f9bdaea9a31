"""Reads one file of rows, whatever its format: parquet, tsv, csv, json, jsonl; InputError names the file and line."""

import csv
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets import Dataset

from loralib.errors import InputError
from loralib.glue.tasks import Task

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".tsv", ".csv", ".jsonl", ".json")


def read_file(path: Path, task: Task | None, split: str) -> Dataset:
    """One file as a dataset; InputError with the file's name, and the line where there is one."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            # ParquetFile: read_table would also look for columns in the names of the folders above
            return Dataset(datasets.table.InMemoryTable(pyarrow.parquet.ParquetFile(path).read()))
        if suffix in (".json", ".jsonl"):
            return Dataset.from_list(list(_json_rows(path)))
        columns = _csv_columns(path) if suffix == ".csv" else _tsv_columns(path, task, split)
        return Dataset.from_dict(columns)
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be read: give one flat object a row.") from error
    except Exception as error:
        raise InputError(f"{path} could not be read as {suffix[1:]} ({brief(error)}): is it complete?") from error


def hub_columns(dataset: Dataset, task: Task | None) -> Dataset:
    """GLUE's own names of a task's columns become the hub's (`#1 String` -> `sentence1`)."""
    names = dataset.column_names
    renamed = {old: new for old, new in (task.tsv_columns if task else {}).items() if old in names and new not in names}
    return dataset.rename_columns(renamed)


def _tsv_columns(path: Path, task: Task | None, split: str) -> dict[str, list[str]]:
    """A tsv file as GLUE writes it: a tab always parts two columns, a quote is a character like any other."""
    with open(path, encoding="utf-8-sig") as lines:  # -sig: msr_paraphrase starts with a byte order mark
        first = lines.readline().rstrip("\n")
        header, line_number = first.split("\t"), 1
        if task is not None and task.tsv_header is not None and task.text_columns[0] not in header:
            header, line_number = list(task.tsv_header), 0
            lines.seek(0)
        if not first or len(set(header)) != len(header):
            raise InputError(f"{path} needs a first line of different column names parted by tabs, not {first[:80]!r}.")
        keep = list(range(len(header)))
        if task is not None and {task.tsv_columns.get(name, name) for name in header}.issuperset(task.text_columns):
            # nine tenths of MNLI's files are parse trees
            needed = {*task.text_columns, *task.tsv_columns, "label"}
            keep = [i for i in keep if header[i] in needed]
        rows: list[list[str]] = []
        cut = 0
        for line in lines:
            line_number += 1
            cells = line.rstrip("\n").split("\t")
            if len(cells) == len(header):
                rows.append([cells[i] for i in keep])
            elif line == "\n":
                continue
            elif task is not None and task.drops_cut_rows and split == "train" and len(cells) < len(header):
                cut += 1
            else:
                raise InputError(f"{path}, line {line_number}: {len(cells)} columns where {len(header)} are expected "
                                 f"({', '.join(header)[:120]}): repair or remove the line.")  # fmt: skip
    if cut:
        logger.warning("%s: %d rows that the release cut in two are left out, as on the hub.", path, cut)
    return {header[i]: [row[k] for row in rows] for k, i in enumerate(keep)}


def _csv_columns(path: Path) -> dict[str, list[str]]:
    """A csv file with a header; cells in double quotes may hold commas and line ends, and no word means `missing`."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if not header or len(set(header)) != len(header):
            raise InputError(f"{path} needs a first line of different column names, not {','.join(header)[:80]!r}.")
        rows = []
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(f"{path}, line {reader.line_num}: {len(row)} columns where {len(header)} are expected "
                                 f"({', '.join(header)[:120]}): repair or remove the line.")  # fmt: skip
            if row:
                rows.append(row)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that holds one list of them, or one object a line."""
    with open(path, encoding="utf-8-sig") as file:
        whole = file.read(1) == "["
        file.seek(0)
        rows = enumerate(json.load(file)) if whole else enumerate((line for line in file if line.strip()), start=1)
        for number, row in rows:
            if not whole:
                try:
                    row = json.loads(row)
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: {brief(error)}: give one JSON object a line, or one "
                                     "list of objects.") from error  # fmt: skip
            if not isinstance(row, dict):
                raise InputError(f"{path}, row {number}: {str(row)[:80]!r} is not an object with named columns.")
            yield row


def read_msr_paraphrase(folder: Path, task: Task, split: str) -> Dataset:
    """MRPC out of Microsoft's files: dev_ids.tsv names the pairs of the training file that are the validation split."""
    path = folder / f"msr_paraphrase_{'test' if split == 'test' else 'train'}.txt"
    try:
        columns = _tsv_columns(path, None, split)
        pairs = list(zip(columns["#1 ID"], columns["#2 ID"], strict=True))
        if split != "test":
            ids = {tuple(line.split("\t")) for line in (folder / "dev_ids.tsv").read_text("utf-8-sig").splitlines()}
            keep = [i for i, pair in enumerate(pairs) if (pair in ids) == (split == "validation")]
            columns = {name: [column[i] for i in keep] for name, column in columns.items()}
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} or dev_ids.tsv could not be read ({brief(error)}): download MRPC again.") from error
    return hub_columns(Dataset.from_dict(columns), task)


def brief(error: BaseException) -> str:
    """The first line of a library's message: the whole of it may fill a screen."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"

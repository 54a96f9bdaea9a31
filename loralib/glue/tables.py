"""Reads a file of rows into a table. The message of a refusal names the file and the line.

The formats are parquet, tsv, csv, json and jsonl, each of them also as `.gz`. docs/data.md describes them for users.
"""

import csv
import gzip
import io
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from loralib.errors import InputError
from loralib.glue.cells import MIXED, joined, mixed, typed
from loralib.glue.tasks import Task

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".tsv", ".csv", ".jsonl", ".json")
_PIECE = 50_000  # rows held as Python objects at a time; these take ten times the memory of a table
_ORIENT = 'with pandas, use df.to_json(path, orient="records", lines=True)'
_STARTS = (
    (b"PK\x03\x04", "is a zip archive or an Excel file", "unpack it, or save it as csv"),
    (b"\xd0\xcf\x11\xe0", "is an Excel file", "save it as csv"),
    (b"\x1f\x8b", "is packed with gzip", "let its name end in .gz"),
    (b"PAR1", "is a parquet file", "let its name end in .parquet"),
    (b"version https://git-lfs", "is the pointer of git-lfs and not the data", "fetch the data with git lfs pull"),
    (b"<!DOCTYPE html", "is a web page", "download the file itself"),
    (b"<html", "is a web page", "download the file itself"),
)


def stem_and_suffix(path: Path) -> tuple[str, str]:
    """Name and suffix of a file: `train.csv.gz` gives train and .csv. An unknown suffix is given as ""."""
    plain = Path(path.name[: -len(".gz")]) if path.name.lower().endswith(".gz") else path
    suffix = plain.suffix.lower()
    return (plain.stem, suffix) if suffix in SUFFIXES else (path.stem, "")


def read_file(path: Path, task: Task | None, split: str) -> Dataset:
    """Read one file as a dataset.

    Raises:
        InputError: the file cannot be read; the message names it and, where there is one, the line.
    """
    suffix = stem_and_suffix(path)[1]
    try:
        if suffix == ".parquet":
            # Not read_table, which would also find columns in the names of the folders above.
            packed = path.name.lower().endswith(".gz")
            table = pyarrow.parquet.ParquetFile(io.BytesIO(_content(path)) if packed else path).read()
        elif suffix in (".json", ".jsonl"):
            table = _table_of_objects(_json_rows(path))
        else:
            content = _text_content(path)
            if suffix == ".csv" or _is_quoted(path, content):
                header, rows = _quoted_rows(path, content, "," if suffix == ".csv" else "\t")
            else:
                header, rows = _literal_rows(path, content, task, split)
            table = _table_of_texts(header, rows)
        return Dataset(datasets.table.InMemoryTable(_supported(path, table)))
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be read: give one flat object per row.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path} could not be unpacked as gzip ({brief(error)}): pack or download it again."
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory: split it, or use a larger machine.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # Arrow's errors about a file's content have no number
            raise InputError(f"{path} cannot be read ({error.strerror}): make it readable.") from error
        raise InputError(f"{path} could not be read as {suffix[1:]} ({brief(error)}): is it complete?") from error


def rename_to_hub_columns(dataset: Dataset, task: Task | None) -> Dataset:
    """Rename a task's columns from GLUE's own names to the hub's: `#1 String` becomes `sentence1`."""
    names = dataset.column_names
    renamed = {old: new for old, new in (task.tsv_columns if task else {}).items() if old in names and new not in names}
    return dataset.rename_columns(renamed)


# Bytes and text


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.name.lower().endswith(".gz") else content


def _text_content(path: Path) -> bytes:
    """The bytes of a text file.

    Raises:
        InputError: its first bytes are those of another kind of file, or of another encoding than UTF-8.
    """
    content = _content(path)
    for start, what, way in _STARTS:
        if content[:200].lstrip()[: len(start)].lower() == start.lower():
            raise InputError(f"{path} {what}: {way}.")
    marks = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
    encoding = next((name for mark, name in marks if content.startswith(mark)), None)
    head = content[:400]
    if encoding is None and len(head) > 3 and (not any(head[1::2]) or not any(head[::2])):
        encoding = "UTF-16"
    if encoding is not None:
        raise InputError(f'{path} is written in {encoding}: write it again in UTF-8, with pandas encoding="utf-8".')
    return content


def _lines(content: bytes, newline: str | None = "") -> io.TextIOWrapper:
    # utf-8-sig, because files of pandas, of Excel and of MRPC may begin with a byte order mark.
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=newline)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> InputError:
    content = _content(path)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as whole:  # `error` counts from the beginning of a piece of the file
        error = whole
    line = content.count(b"\n", 0, error.start) + 1
    cut = content[max(0, error.start - 15) : error.start + 15].decode("cp1252", errors="replace")
    return InputError(
        f"{path}, line {line}: the byte {content[error.start : error.start + 1]!r} is not UTF-8 (in cp1252 it "
        f"would read {' '.join(cut.split())!r}): write the file again in UTF-8."
    )


def _distinct(path: Path, header: Sequence[str], sep: str) -> list[str]:
    if not any(header) or len(set(header)) != len(header):
        raise InputError(f"{path} needs a first line of different column names, not {sep.join(header)[:80]!r}.")
    return list(header)


def _wrong_width(path: Path, line: int, cells: Sequence[str], header: Sequence[str]) -> InputError:
    return InputError(
        f"{path}, line {line}: {len(cells)} columns where {len(header)} are expected ({', '.join(header)[:120]}), "
        f"{' | '.join(cells)[:80]!r}: repair or remove the line."
    )


def _refuse_other_separator(path: Path, header: Sequence[str], others: str) -> None:
    """Refuse a one-column table whose header contains another separator."""
    if len(header) == 1 and (other := next((mark for mark in others if mark in header[0]), None)):
        raise InputError(
            f"{path}, line 1: the only column is {header[0][:80]!r}: its cells seem to be separated by {other!r}; "
            "write them with commas into a .csv file, or with tabs into a .tsv file."
        )


# csv and tsv


def _is_quoted(path: Path, content: bytes) -> bool:
    """Whether the cells of a tsv file are quoted, as csv writers do it. In GLUE's own files a quote is a character.

    In a quoted file every quote mark belongs to a cell that begins and ends with one. This can be true of GLUE's files
    by chance, so a second sign is needed: quoted column names, doubled marks, or lines that fit only if they are read
    as quoted.
    """
    if b'"' not in content:
        return False
    doubled = broken = False
    end = 0
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    for match in re.finditer(rb'"[^"]*+(?:""[^"]*+)*+"', content):
        if content[match.start() - 1 : match.start()] not in (b"\t", b"\n", b"\r") and match.start() > start:
            return False
        if content[match.end() : match.end() + 1] not in (b"\t", b"\n", b"\r", b""):
            return False
        cell = content[match.start() + 1 : match.end() - 1]
        doubled = doubled or b'""' in cell
        broken = broken or b"\t" in cell or b"\n" in cell or b"\r" in cell
        end = match.end()
    if content.find(b'"', end) >= 0:
        return False
    if doubled or content[start : start + 1] == b'"':
        return True
    lines = [line for line in content.splitlines() if line.strip()]
    if not broken or len({line.count(b"\t") for line in lines}) == 1:
        logger.warning("%s has quoted cells; the quote marks are kept as text. To remove them, save it as csv.", path)
        return False
    return True


def _quoted_rows(path: Path, content: bytes, sep: str) -> tuple[list[str], Iterator[Sequence[str]]]:
    """Read rows whose cells may be quoted and then hold separators and line ends. No word means a missing value."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(content), delimiter=sep, strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                at = "" if reader.line_num == line else f" (noticed in line {reader.line_num})"
                raise InputError(
                    f"{path}, line {line}: {error}{at}: a cell in quote marks ends with one, and marks in it are "
                    'doubled, "he said ""no""".'
                ) from error
            if row is None:
                return
            yield line, row

    numbered = records()
    header = _distinct(path, next(numbered, (1, [""]))[1], sep)
    _refuse_other_separator(path, header, ";\t|")

    def rows() -> Iterator[Sequence[str]]:
        for line, row in numbered:
            if len(row) == len(header) and (len(row) > 1 or row[0].strip()):
                yield row
            elif len(row) > 1 or (row and row[0].strip()):
                raise _wrong_width(path, line, row, header)

    return header, rows()


def _literal_rows(
    path: Path, content: bytes, task: Task | None, split: str
) -> tuple[list[str], Iterator[Sequence[str]]]:
    """Read rows of a tsv file as GLUE writes it: a tab always separates two columns, and a quote is a character."""
    lines = _lines(content, newline=None)
    first = lines.readline().rstrip("\n")
    header, line_number = first.split("\t"), 1
    if task is not None and task.tsv_header is not None and task.text_columns[0] not in header:
        header, line_number = list(task.tsv_header), 0
        lines = _lines(content, newline=None)
    _distinct(path, header, "\t")
    _refuse_other_separator(path, header, ",;|")
    keep = list(range(len(header)))
    if task is not None and {task.tsv_columns.get(name, name) for name in header}.issuperset(task.text_columns):
        # Other columns are skipped: nine tenths of MNLI's files are parse trees.
        needed = {*task.text_columns, *task.tsv_columns, "label"}
        keep = [i for i in keep if header[i] in needed]

    def rows(line_number: int) -> Iterator[Sequence[str]]:
        cut = 0
        for line in lines:
            line_number += 1
            cells = line.rstrip("\n").split("\t")
            if len(cells) == len(header) and (len(cells) > 1 or line.strip()):
                yield [cells[i] for i in keep]
            elif not line.strip(" \n"):
                continue
            elif task is not None and task.drops_cut_rows and split == "train" and len(cells) < len(header):
                cut += 1
            else:
                raise _wrong_width(path, line_number, cells, header)
        if cut:
            logger.warning("%s: %d rows that the release cut in two are left out, as on the hub.", path, cut)

    return [header[i] for i in keep], rows(line_number)


def _table_of_texts(header: Sequence[str], rows: Iterator[Sequence[str]]) -> pa.Table:
    schema = pa.schema([(name, pa.string()) for name in header])
    pieces = [schema.empty_table()]
    while piece := list(islice(rows, _PIECE)):
        columns = zip(header, zip(*piece, strict=True), strict=True)
        pieces.append(pa.table({name: pa.array(cells, pa.string()) for name, cells in columns}, schema))
    return pa.concat_tables(pieces)


# JSON


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a file that holds a list of them, also as `{"data": [...]}`, or one object in each line."""
    content = _text_content(path)
    lines = _lines(content, newline=None)
    first = next((line for line in lines if line.strip()), "").strip()
    if first.startswith("["):
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} is not a list of objects in JSON ({brief(error)}): is it whole? ({_ORIENT})"
            ) from error
        yield from _objects(path, rows)
        return
    more = any(line.strip() for line in lines)
    if not more or not _is_json(first):
        try:
            whole = json.loads(content.decode("utf-8-sig"))
        except ValueError:
            whole = None  # the file has an object in each line, and one of them is broken
        if isinstance(whole, dict):
            lists = [value for value in (whole.get("data"), *whole.values()) if _holds_objects(value)]
            if lists and (_holds_objects(whole.get("data")) or len(lists) == 1):
                yield from lists[0]
                return
            if whole and all(isinstance(value, list | dict) for value in whole.values()):
                raise InputError(f"{path} is one object of {', '.join(whole)[:80]} and not rows: {_ORIENT}.")
            yield whole
            return
    for number, line in enumerate(_lines(content, newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: {brief(error)}: give one JSON object per line, or one list of objects; "
                f"{_ORIENT}."
            ) from error
        yield from _objects(path, [row], number)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(row, dict) for row in value)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _objects(path: Path, rows: Sequence[Any], line: int | None = None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            where = f"row {number} (counted from 0)" if line is None else f"line {line}"
            raise InputError(f"{path}, {where}: {str(row)[:80]!r} is not an object with named columns: {_ORIENT}.")
        yield row


def _table_of_objects(rows: Iterator[dict[str, Any]]) -> pa.Table:
    """Make a table with every column that any row has. Rows without a column get a missing value there."""
    pieces: list[tuple[int, dict[str, pa.Array]]] = []
    names: dict[str, None] = {}  # in the order in which they appear
    while piece := list(islice(rows, _PIECE)):
        own = dict.fromkeys(name for row in piece for name in row)
        names |= own
        pieces.append((len(piece), {name: typed([row.get(name) for row in piece]) for name in own}))
    table = {}
    for name in names:
        table[name] = joined([columns.get(name, pa.nulls(count)) for count, columns in pieces])
    return pa.table(table)


# parquet, and MRPC's own files


def _supported(path: Path, table: pa.Table) -> pa.Table:
    """The table in types that `datasets` knows: categories become their values, unknown types become JSON."""
    if len(set(table.column_names)) != len(table.column_names):
        raise InputError(f"{path} needs different column names, not {', '.join(table.column_names)[:80]}.")
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if pa.types.is_dictionary(field.type):
            column = column.cast(field.type.value_type)
        elif field.type == pa.string_view():
            column = column.cast(pa.string())
        try:
            datasets.features.features.generate_from_arrow_type(column.type)
        except Exception:  # the library raises various exceptions for a type that it does not know
            column = pa.chunked_array([mixed(column.to_pylist())], MIXED)
        if column.type != field.type:
            table = table.set_column(place, field.name, column)
    return table


def read_msr_paraphrase(folder: Path, task: Task, split: str) -> Dataset:
    """Read MRPC from Microsoft's files. dev_ids.tsv names the pairs of the training file that are for validation."""
    path = folder / f"msr_paraphrase_{'test' if split == 'test' else 'train'}.txt"
    try:
        table = _table_of_texts(*_literal_rows(path, _text_content(path), None, split))
        if split != "test":
            ids = {tuple(line.split("\t")) for line in (folder / "dev_ids.tsv").read_text("utf-8-sig").splitlines()}
            pairs = zip(table["#1 ID"].to_pylist(), table["#2 ID"].to_pylist(), strict=True)
            table = table.filter(pa.array([(pair in ids) == (split == "validation") for pair in pairs], pa.bool_()))
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise InputError(
                f"{error.filename or path} cannot be read ({error.strerror}): make it readable."
            ) from error
        raise InputError(f"{path} or dev_ids.tsv could not be read ({brief(error)}): download MRPC again.") from error
    return rename_to_hub_columns(Dataset(datasets.table.InMemoryTable(table)), task)


def brief(error: BaseException) -> str:
    """The first line of a library's message; the whole message may fill a screen."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"

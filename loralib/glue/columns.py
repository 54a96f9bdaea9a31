"""Finds the columns of the texts and of the labels: those that flags name, otherwise by their names and contents."""

import logging
import re
from collections.abc import Sequence
from statistics import mean

from datasets import Dataset

from loralib.errors import InputError
from loralib.glue.cells import is_mixed, is_number, is_text, listed, utf8_column
from loralib.glue.labels import TableFlags

logger = logging.getLogger(__name__)

# Usual names of text columns.
TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"),
         ("sentence",), ("text",))  # fmt: skip
# Names of labels, and of indices as pandas writes them. Such a column is not a text unless a flag names it.
_NO_TEXT = re.compile(r"labels?|idx|index|id||unnamed: \d+|__index_level_\d+__", re.IGNORECASE)
# Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
_SAMPLE = 1000  # rows that `guess_texts` reads


def find_column(names: Sequence[str], wanted: str) -> str | None:
    """The column of this name. Otherwise case and spaces at the ends are ignored, and only one column may fit."""
    if wanted in names:
        return wanted
    close = [name for name in names if name.strip().casefold() == wanted.strip().casefold()]
    return close[0] if len(close) == 1 else None


def rename_label_column(dataset: Dataset, flags: TableFlags, where: str) -> Dataset:
    """Give the column of the labels the name `label`. A data set without such a column stays as it is."""
    names = dataset.column_names
    if flags.label_column is not None:
        found = find_column(names, flags.label_column)
        if found is None:
            return dataset.remove_columns("label") if "label" in names else dataset
    elif "label" in names:
        return dataset
    else:
        close = [name for name in names if name.strip().casefold() in ("label", "labels")]
        if len(close) != 1:
            return dataset
        found = close[0]
        logger.info("%s: the labels are in the column %r.", where, found)
    if found == "label":
        return dataset
    if "label" in names:
        dataset = dataset.remove_columns("label")
    return dataset.rename_column(found, "label")


def find_text_columns(dataset: Dataset, flags: TableFlags, where: str) -> tuple[str, ...]:
    """The columns that --text_column and --text_column_2 name.

    Raises:
        InputError: the table has no such column, or it is the column of the labels.
    """
    found = []
    for place, wanted in enumerate(flags.text_columns):
        name = find_column(dataset.column_names, wanted)
        if name is None:
            flag = "text_column" if place == 0 else "text_column_2"
            raise InputError(f"{where} has no column {wanted!r} ({flag}): it has {listed(dataset.column_names)}.")
        if name == "label":
            raise InputError(f"{where}: the text is in a column named 'label', which holds the labels here: rename it.")
        found.append(name)
    return tuple(found)


def guess_texts(dataset: Dataset, where: str) -> tuple[str, ...]:
    """The column or the two columns of texts: those with usual names, otherwise those that hold words and not ids.

    Raises:
        InputError: there is no such column, or there are more than two; the message names the flag that decides.
    """
    names = [name for name in dataset.column_names if is_text(dataset.features[name])]
    # A column of mixed types may have a usual name; then it is taken, and its first row without a text is refused.
    shown = [name for name in dataset.column_names if name in names or is_mixed(dataset.features[name])]
    for usual in TEXTS:
        found = [find_column(shown, name) for name in usual]
        if None not in found:
            return tuple(name for name in found if name is not None)
    sample = dataset.select(range(min(len(dataset), _SAMPLE)))
    kinds: dict[str, list[str]] = {"words": [], "word": []}
    counts: dict[str, float] = {}
    for name in names:
        if not _NO_TEXT.fullmatch(name.strip()):
            cells = [text for text in utf8_column(sample, name, where).to_pylist() if text and text.strip()]
            kind, counts[name] = _kind_of(cells)
            kinds.setdefault(kind, []).append(name)
    longest = max((counts[name] for name in kinds["words"]), default=0.0)
    # Much shorter columns of words beside the text are names, say of people or newspapers.
    texts = [name for name in kinds["words"] if counts[name] >= 4 or 2 * counts[name] > longest] or kinds["word"]
    if not texts:
        usual_names = "; ".join(" and ".join(usual) for usual in TEXTS)
        raise InputError(
            f"{where} has no column of texts among {listed(dataset.column_names) or 'none'}: name it with "
            f"--text_column; names that are known are {usual_names}."
        )
    if len(texts) > 2:
        raise InputError(f"{where} has texts in {listed(texts)}: name one with --text_column, or two with "
                         "--text_column and --text_column_2.")  # fmt: skip
    if others := [name for name in (*kinds["words"], *kinds["word"]) if name not in texts]:
        logger.warning("%s: the text is taken from %s, and not from %s; --text_column and --text_column_2 decide "
                       "otherwise.", where, " and ".join(texts), listed(others))  # fmt: skip
    return tuple(texts)


def _kind_of(cells: Sequence[str]) -> tuple[str, float]:
    """What a column holds (number, words, id, word or nothing), and its mean number of words."""
    if not cells:
        return "nothing", 0
    if all(is_number(cell.strip()) for cell in cells):
        return "number", 0
    counts = [sum(any(map(str.isalpha, word)) for word in cell.split()) for cell in cells]
    counts = [max(count, len(_UNSPACED.findall(cell)) // 2) for count, cell in zip(counts, cells, strict=True)]
    if sum(count > 1 for count in counts) * 2 >= len(cells):
        return "words", mean(counts)
    ids = sum(any(map(str.isdigit, cell)) for cell in cells)
    return ("id" if ids * 2 >= len(cells) else "word"), mean(counts)


def rename_texts(dataset: Dataset, texts: Sequence[str], task_columns: Sequence[str], where: str) -> Dataset:
    """Give the columns that flags name the task's names, and drop all other columns but `label`.

    Raises:
        InputError: the flags name more or fewer columns than the task reads, or one for a text and the labels.
    """
    if len(texts) != len(task_columns):
        raise InputError(f"{where}: the task reads {' and '.join(task_columns)}, and --text_column names "
                         f"{' and '.join(texts)}: name as many columns as it reads.")  # fmt: skip
    if gone := [name for name in texts if name not in dataset.column_names]:
        raise InputError(f"{where}: column {gone[0]!r} is both a text column and the label column: name another one.")
    keep = [*texts, *(["label"] if "label" in dataset.column_names else [])]
    renamed = {old: new for old, new in zip(texts, task_columns, strict=True) if old != new}
    dataset = dataset.select_columns(keep)
    aside = {old: f"{old} (text)" for old in renamed}  # so that two columns can change places
    return dataset.rename_columns(aside).rename_columns({aside[old]: new for old, new in renamed.items()})

"""Whatever pandas writes is read as it was: random tables in every format, with what its options change."""

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loralib.glue.data import load

# No lone carriage return: pandas writes it without quotes into a csv, where it ends the line for every reader.
TEXT = st.text(
    st.sampled_from("ab \"',;\t\n|\\\u00e9\u4f60\u2028\u0085\U0001f600\u00a0#")
    | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=12,
).filter(lambda text: text.strip() and "\r" not in text and not ("\t" in text and "\n" in text))
WORDS = ["NA", "None", "null", "1_1", "two words", "\u00e9", "a,b", 'q"q', "t\tb", "True", "-", "+", "#"]
TABLES = settings(max_examples=25, deadline=None, derandomize=True,
                  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    """One or two texts, labels of different types, columns that nobody asked for, an index."""
    count = draw(st.integers(2, 6))
    column = st.lists(TEXT, min_size=count, max_size=count)
    pair = draw(st.booleans())
    texts = {"sentence1": draw(column), "sentence2": draw(column)} if pair else {"text": draw(column)}
    names = draw(
        st.lists(st.sampled_from(WORDS), min_size=2, max_size=3, unique=True).filter(lambda n: "-" not in n or "+" in n)
    )
    labels = pd.Series((names * count)[:count])
    kind = draw(st.sampled_from(["object", "string", "category", "Int64", "boolean"]))
    if kind == "Int64":
        labels = pd.Series(([3, 1, 20] * count)[:count])
    elif kind == "boolean":
        labels = pd.Series(([True, False] * count)[:count])
    frame = pd.DataFrame(texts | {"label": labels.astype(kind)})
    frame["score"] = pd.Series([None, 2, 3, None, 5, 6][:count], dtype="Int64")
    frame["note"] = pd.Series([None, *draw(column)][:count], dtype="string")
    if draw(st.booleans()):
        frame.index = [f"row {i} of the table" for i in range(count)]
    return frame.sample(frac=1, random_state=draw(st.integers(0, 9)), axis=1)  # the columns in any order


def check(frame: pd.DataFrame, path: Path) -> None:
    loaded = load(train_file=str(path), do_train=True)
    texts = ("sentence1", "sentence2") if "sentence1" in frame else ("text",)
    assert loaded.task.text_columns == texts
    for name in texts:
        assert list(loaded.train[name]) == list(frame[name])
    assert [loaded.task.label_names[label] for label in loaded.train["label"]] == [str(x) for x in frame["label"]]


@pytest.mark.parametrize(("suffix", "sep"), [("csv", ","), ("tsv", "\t")])
@TABLES
@given(
    frame=frames(),
    index=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    end=st.sampled_from(["\n", "\r\n"]),
    packed=st.sampled_from(["", ".gz"]),
)
def test_csv_and_tsv(suffix, sep, frame, index, quoting, encoding, end, packed, tmp_path: Path) -> None:
    path = tmp_path / f"train.{suffix}{packed}"
    frame.to_csv(path, sep=sep, index=index, quoting=quoting, encoding=encoding, lineterminator=end)
    check(frame, path)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@TABLES
@given(frame=frames(), ascii_only=st.booleans(), indent=st.sampled_from([0, 2]), packed=st.sampled_from(["", ".gz"]))
def test_json(suffix, frame, ascii_only, indent, packed, tmp_path: Path) -> None:
    path = tmp_path / f"train.{suffix}{packed}"
    lines = suffix == "jsonl"
    frame.to_json(path, orient="records", lines=lines, force_ascii=ascii_only, indent=None if lines else indent)
    check(frame, path)


@TABLES
@given(frame=frames(), index=st.sampled_from([True, False, None]))
def test_parquet(frame, index, tmp_path: Path) -> None:
    frame.to_parquet(tmp_path / "train.parquet", index=index)
    check(frame, tmp_path / "train.parquet")

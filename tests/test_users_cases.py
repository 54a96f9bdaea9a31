"""Files and flags as users bring them. Each test has one row per kind: the input, the command, and the right value."""

import datetime
import decimal
import gzip
import json
import logging
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loralib.errors import InputError
from loralib.glue import sources
from loralib.glue.data import load
from loralib.glue.tasks import GLUE, Task


def table(folder: Path, name: str, header: str, *rows: str) -> str:
    """A small text file; its path."""
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


# ---- the classes of a trained model ----

KNOWN = Task("classification", (), ("neutral", "Very good", "bad"), ())


@pytest.mark.parametrize(
    ("rows", "ids"),
    [
        (["a,bad", "b,neutral"], [2, 0]),  # a class that the file lacks stays
        (["a,very_good", "b, BAD ", "c,Neutral"], [1, 2, 0]),
        (["a,2", "b,1", "c,0"], [2, 1, 0]),  # by index
    ],
)
def test_known_classes_decide(
    rows: list[str], ids: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = table(tmp_path, "v.csv", "text,label", *rows)
    loaded = load(validation_file=file, do_eval=True, known=KNOWN)
    assert loaded.task.label_names == KNOWN.label_names and loaded.task.text_columns == ("text",)
    assert loaded.task.metrics == ("accuracy",)
    assert list(loaded.evals["classification"]["label"]) == ids
    assert ("indices into" in caplog.text) == rows[0].endswith("2")


def test_known_classes_need_no_labels_and_refuse_others(tmp_path: Path) -> None:
    loaded = load(test_file=table(tmp_path, "t.csv", "text", "a", "b"), do_predict=True, known=KNOWN)
    assert loaded.task.label_names == KNOWN.label_names and list(loaded.tests["classification"]["label"]) == [-1, -1]
    with pytest.raises(InputError, match=r"row 1 .*'awful'.*neutral, Very good, bad"):
        load(validation_file=table(tmp_path, "v.csv", "text,label", "a,bad", "b,awful"), do_eval=True, known=KNOWN)


def test_known_regression_stays_one_on_whole_numbers(tmp_path: Path) -> None:
    known = Task("regression", ("text",), None, ())
    loaded = load(validation_file=table(tmp_path, "v.csv", "text,label", "a,1", "b,2"), do_eval=True, known=known)
    assert loaded.task.label_names is None and list(loaded.evals["regression"]["label"]) == [1.0, 2.0]


def test_a_glue_task_of_pairs_on_one_text_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = table(tmp_path, "t.csv", "text", "a b", "c d")
    load(test_file=file, do_predict=True, known=Task("mrpc", (), GLUE["mrpc"].label_names, ()))
    assert "the trained model is for mrpc, which reads sentence1 and sentence2, but here is only text" in caplog.text


def test_known_order_of_a_glue_task(tmp_path: Path) -> None:
    """Numbers in GLUE's own data keep GLUE's order; the ids that come out have the model's."""
    known = Task("mnli", (), ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), ())
    file = table(tmp_path, "v.csv", "premise,hypothesis,label", "a,b,0", "c,d,contradiction", "e,f,1")
    for arguments in ({}, {"task_name": "mnli"}):
        loaded = load(validation_file=file, do_eval=True, known=known, **arguments)
        assert loaded.task.label_names == known.label_names and loaded.task.name == "mnli"
        assert list(loaded.evals["mnli"]["label"]) == [2, 0, 1]
    with pytest.raises(InputError, match="rte with the labels entailment, not_entailment, and the trained model knows"):
        load(validation_file=file, do_eval=True, known=known, task_name="rte")
    assert GLUE["mnli"].label_names == ("entailment", "neutral", "contradiction")


# ---- tables as people write them ----

CASES = Path(__file__).resolve().parent / "cases"
BAD_GOOD = ("bad", "good")
TRAIN = {"do_train": True}


@pytest.mark.parametrize(
    ("file", "flags", "texts", "names", "first_labels", "count"),
    [
        ("labels_that_python_reads_as_numbers.csv", {}, ("text",), ("1_1", "1_2"), [0, 1], 2),
        ("json_list_after_an_empty_line.json", {}, ("text",), ("0", "1"), [0, 1], 2),
        ("mixed_unused.jsonl", {}, ("text",), BAD_GOOD, [0, 1, 0], 32),
        ("nan_label.csv", {"label_type": "classes"}, ("text",), ("inf", "nan"), [1, 0, 1], 32),
        ("quoted.tsv", {}, ("text",), BAD_GOOD, [0, 1, 0], 32),
        ("blank_ws.tsv", {}, ("text",), BAD_GOOD, [0, 1, 0], 32),
        ("labels_ws.csv", {}, ("text",), BAD_GOOD, [0, 1, 0, 1], 32),
        ("kaggle_ids.csv", {}, ("text_en",), BAD_GOOD, [0, 1, 0], 32),
        ("kaggle_ids.csv", {"text_column": "author"}, ("author",), BAD_GOOD, [0, 1, 0], 32),
        ("kaggle_ids.csv", {"text_column": "text_en", "text_column_2": "author"}, ("text_en", "author"), BAD_GOOD,
         [0, 1, 0], 32),
        ("minus1.csv", {"unlabelled": "drop"}, ("text",), ("0", "1"), [0, 1, 0], 21),
        ("minus1.csv", {"label_type": "classes"}, ("text",), ("-1", "0", "1"), [0, 1, 2], 32),
        ("minus1.csv", {"label_type": "regression"}, ("text",), None, [-1.0, 0.0, 1.0], 32),
        ("float01.csv", {}, ("text",), None, [0.0, 1.0, 0.0], 32),
        ("float01.csv", {"label_type": "classes"}, ("text",), ("0", "1"), [0, 1, 0], 32),
        ("first_lacks_label.jsonl", {"unlabelled": "drop"}, ("text",), BAD_GOOD, [1, 0, 1], 31),
    ],
)  # fmt: skip
def test_the_cases_are_read_as_their_page_says(
    file: str, flags: dict, texts: tuple, names: tuple | None, first_labels: list, count: int, caplog
) -> None:
    caplog.set_level(logging.INFO)
    loaded = load(train_file=str(CASES / file), **TRAIN, **flags)
    assert (loaded.task.text_columns, loaded.task.label_names) == (texts, names)
    assert list(loaded.train["label"])[: len(first_labels)] == first_labels and len(loaded.train) == count
    # the log says what was taken
    assert all(part in caplog.text for part in (*texts, *(names or ("regression",)), "--label_type"))
    if "unlabelled" in flags:
        assert f"{32 - count} of 32 rows" in caplog.text
    if file == "labels_ws.csv":
        assert caplog.text.count("'good '") == 1
    if file == "quoted.tsv":
        assert loaded.train[0]["text"] == 'he said "it is row number 0 is bad",\tand left'


@pytest.mark.parametrize(
    ("file", "flags", "parts"),
    [
        ("json_first_row_lacks_a_column.jsonl", {}, ("row 0", "sentence2")),
        ("first_lacks_label.jsonl", {}, ("row 0", "no label", "--unlabelled drop")),
        ("labels_are_lists.jsonl", {}, ("row 0", "['x']", "a text, a whole number, a float, or true or false")),
        ("columns.json", {}, ('orient="records"',)),
        ("nan_label.csv", {}, ("row 1", "'inf'", "15 others", "--label_type classes")),
        ("quote_unescaped.csv", {}, ("line 2", "doubled")),
        ("ragged.csv", {}, ("line 2", "3 columns where 2", "row number 0 is bad")),
        ("minus1.csv", {}, ("'-1'", "row 0", "10 others", "--unlabelled drop", "--label_type classes")),
        ("utf16.csv", {}, ("UTF-16", "UTF-8")),
        ("kaggle_ids.csv", {"text_column": "text"}, ("'text'", "text_column", "text_en")),
        ("kaggle_ids.csv", {"label_column": "stars"}, ("'stars'", "label_column", "review_id")),
        ("labels_ws.csv", {"label_type": "regression"}, ("row 0", "'bad'", "finite number")),
        ("test_placeholder_labels.csv", {}, ("only one label, ?",)),
        ("labels_as_lists.csv", {}, ("row 0", "\"['bad', 'short']\"", "multi-label", "--label_type classes")),
        ("commas.tsv", {}, ("line 1", "'text,label'", "','", ".csv")),
    ],
)
def test_the_bad_cases_are_refused(file: str, flags: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refusal:
        load(train_file=str(CASES / file), **TRAIN, **flags)
    message = str(refusal.value)
    assert file in message and "\n" not in message and len(message) < 600
    assert all(part in message for part in parts), message


def test_labels_of_a_test_file_that_are_of_no_use_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"train_file": str(CASES / "labels_ws.csv"), "do_train": True, "do_predict": True}
    loaded = load(**arguments, test_file=str(CASES / "test_placeholder_labels.csv"))
    assert set(loaded.tests["classification"]["label"]) == {-1} and len(loaded.tests["classification"]) == 30
    assert "its labels are ignored" in caplog.text and "'?'" in caplog.text
    caplog.clear()
    loaded = load(**arguments, test_file=str(CASES / "labels_ws.csv"))
    assert list(loaded.tests["classification"]["label"])[:3] == [0, 1, 0]
    assert "ignored" not in caplog.text


def test_labels_of_a_test_file_that_cannot_be_labels_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(train_file=str(CASES / "labels_ws.csv"), test_file=str(CASES / "labels_are_lists.jsonl"),
                  do_train=True, do_predict=True)  # fmt: skip
    assert list(loaded.tests["classification"]["label"]) == [-1, -1] and "['x']" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        [["x"], ["y"]],
        [{"a": 1}, {"a": 2}],
        [b"x", b"y"],
        [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)],
        [datetime.datetime(2020, 1, 1), datetime.datetime(2021, 1, 1)],
        [decimal.Decimal("1.5"), decimal.Decimal("2.5")],
    ],
    ids=["list", "struct", "bytes", "date", "time", "decimal"],
)
def test_lists_and_other_values_are_refused_as_labels(values: list, tmp_path: Path) -> None:
    rows = pa.table({"text": ["a b", "c d"], "label": pa.array(values)})
    pq.write_table(rows, tmp_path / "train.parquet")
    datasets.DatasetDict({"train": datasets.Dataset(rows)}).save_to_disk(tmp_path / "saved")
    for place in ({"train_file": str(tmp_path / "train.parquet")}, {"dataset_name": str(tmp_path / "saved")}):
        with pytest.raises(InputError, match=r"row 0 .* a label may be a text, a whole number, a float, or true"):
            load(**place, do_train=True)


def test_types_that_pandas_writes_to_parquet(tmp_path: Path) -> None:
    """Category, nullable and arrow-backed columns, an index of texts, and a column that no other library knows."""
    frame = pd.DataFrame(
        {
            "text": pd.Series(["a b", "c d", "e f"], dtype="string[pyarrow]"),
            "label": pd.Series(["x", "y", "x"], dtype="category"),
            "period": pd.period_range("2020", periods=3, freq="M"),
            "number": pd.Series([1, None, 3], dtype="Int64"),
        }
    )
    frame.index = ["first row", "second row", "third row"]
    frame.to_parquet(tmp_path / "train.parquet")
    loaded = load(train_file=str(tmp_path / "train.parquet"), do_train=True)
    assert loaded.task.text_columns == ("text",) and loaded.task.label_names == ("x", "y")
    assert list(loaded.train["text"]) == ["a b", "c d", "e f"] and list(loaded.train["label"]) == [0, 1, 0]


# ---- folders and splits ----

ROWS = ["fine thing,yes", "poor thing,no", "good thing,yes", "bad thing,no"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "dev", "Dev"])
def test_names_of_the_validation_split(name: str, tmp_path: Path) -> None:
    table(tmp_path, "train.csv", "text,label", *ROWS)
    table(tmp_path, f"{name}.csv", "text,label", *ROWS[:2])
    loaded = load(dataset_name=str(tmp_path), do_train=True, do_eval=True)
    assert list(loaded.evals["classification"]["label"]) == [1, 0]
    saved = datasets.Dataset.from_dict({"text": ["fine thing", "poor thing"], "label": ["yes", "no"]})
    datasets.DatasetDict({"train": saved, name: saved}).save_to_disk(tmp_path / "saved")
    loaded = load(dataset_name=str(tmp_path / "saved"), do_train=True, do_eval=True)
    assert list(loaded.evals["classification"]["label"]) == [1, 0]


def test_named_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In folders, saved data sets and on the hub."""
    splits = {name: datasets.Dataset.from_dict({"text": [f"{name} a", f"{name} b"], "label": ["x", "y"]})
              for name in ("train_r1", "train_r2", "dev_r1")}  # fmt: skip
    for name, rows in splits.items():
        rows.to_csv(tmp_path / f"{name}.csv")
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(sources.huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(splits))
    for place in (str(tmp_path), str(tmp_path / "saved"), "someone/rounds"):
        flags = {"dataset_name": place, "do_train": True, "do_eval": True, "do_predict": True}
        named = {"train_split": "train_r2", "validation_split": "dev_r1", "test_split": "dev_r1"}
        loaded = load(**flags, **named)
        assert list(loaded.train["text"]) == ["train_r2 a", "train_r2 b"]
        assert list(loaded.evals["classification"]["text"]) == list(loaded.tests["classification"]["text"])
        assert loaded.tests["classification"][0] == {"text": "dev_r1 a", "label": 0}
        with pytest.raises(InputError, match="only .*train_r1.*--train_split"):
            load(**flags)
        with pytest.raises(InputError, match="train_split 'train' is not a split of .*train_r1"):
            load(**flags, **named | {"train_split": "train"})
    with pytest.raises(InputError, match="validation_split 'dev' names a split of dataset_name"):
        load(train_file=str(tmp_path / "train_r1.csv"), validation_split="dev", do_train=True)


def test_two_splits_of_one_use_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "dev"):
        table(tmp_path, f"{name}.csv", "text,label", *ROWS)
    assert len(load(dataset_name=str(tmp_path), do_train=True).train) == 4
    with pytest.raises(InputError, match="dev and val, which all count as validation: .*--validation_split"):
        load(dataset_name=str(tmp_path), do_train=True, do_eval=True)
    assert load(dataset_name=str(tmp_path), do_eval=True, validation_split="val").evals


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_folder_that_lacks_a_column_of_its_task_is_refused(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "mrpc"
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"sentence1": ["a b", "c d"], "label": [0, 1]})
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[suffix](folder / f"train.{suffix}")
    with pytest.raises(InputError, match="named like mrpc and lacks its column sentence2"):
        load(dataset_name=str(folder), do_train=True)
    loaded = load(dataset_name=str(folder), do_train=True, text_column="sentence1")
    assert loaded.task.name == "classification" and loaded.task.text_columns == ("sentence1",)


def test_columns_of_a_glue_task_under_other_names(tmp_path: Path) -> None:
    file = table(tmp_path, "train.csv", "label,s2,s1,same", "x,b,a,1", "y,d,c,0")
    columns = {"text_column": "s1", "text_column_2": "s2", "label_column": "same"}
    loaded = load(task_name="mrpc", train_file=file, **TRAIN, **columns)
    assert loaded.task is GLUE["mrpc"]
    assert loaded.train[:] == {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0]}
    with pytest.raises(InputError, match="the task reads sentence1 and sentence2"):
        load(task_name="mrpc", train_file=file, **TRAIN, text_column="s1")


def test_unlabelled_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """SNLI's -1 beside the names of its classes."""
    texts = {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string")}
    names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = datasets.Features({**texts, "label": names})
    rows = {"premise": list("abcd"), "hypothesis": list("efgh"), "label": [0, -1, 2, -1]}
    snli = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})
    monkeypatch.setattr(sources.huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: snli)
    with pytest.raises(InputError, match="row 1 .* and 1 other have the label '-1'.*--unlabelled drop"):
        load(dataset_name="stanfordnlp/snli", do_train=True)
    loaded = load(dataset_name="stanfordnlp/snli", do_train=True, unlabelled="drop")
    assert list(loaded.train["label"]) == [0, 2] and list(loaded.train["premise"]) == ["a", "c"]
    assert "2 of 4 rows" in caplog.text


def test_packed_files(tmp_path: Path) -> None:
    content = ("text,label\n" + "\n".join(ROWS)).encode()
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(content))
    for place in ({"train_file": str(tmp_path / "train.csv.gz")}, {"dataset_name": str(tmp_path)}):
        assert list(load(**place, do_train=True).train["label"]) == [1, 0, 1, 0]
    for name, data, words in (
        ("a.csv.zip", b"PK\x03\x04", "unpack it"),
        ("b.csv", b"PK\x03\x04\x00", "is a zip archive or an Excel file: unpack it"),
        ("c.csv", gzip.compress(content), "is packed with gzip"),
        ("d.csv.gz", gzip.compress(content)[:-9], "could not be unpacked as gzip"),
        ("e.csv.gz", content, "could not be unpacked as gzip"),
        ("f.json", b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs"),
        ("g.csv", b"<!doctype html>\n<html>", "is a web page"),
        ("h.csv", "caf\u00e9,label\n".encode("cp1252"), r"line 1: the byte .*xe9.* is not UTF-8 .*caf\u00e9"),
        ("i.csv", "text,label\n".encode("utf-16-le"), "UTF-16"),
        ("j.csv", b"text;label\nfine;yes\n", "separated by ';'"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=words):
            load(train_file=str(tmp_path / name), do_train=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda frame: frame.to_json(orient="records"),
        lambda frame: frame.to_json(orient="records", lines=True),
        lambda frame: frame.to_json(orient="table"),
        lambda frame: json.dumps({"data": frame.to_dict("records"), "version": 1}, indent=1),
        lambda frame: "\n\n" + "\n\n".join(map(json.dumps, frame.to_dict("records"))),
    ],
    ids=["records", "lines", "table", "data", "blank lines"],
)
def test_json_of_rows_is_read(write, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a b", "c d"], "label": ["x", "y"]})
    (tmp_path / "train.json").write_text(write(frame))
    loaded = load(train_file=str(tmp_path / "train.json"), do_train=True)
    assert loaded.train[:] == {"text": ["a b", "c d"], "label": [0, 1]}


@pytest.mark.parametrize("orient", ["columns", "index", "split", "values", "list"])
def test_json_of_other_orients_is_refused_with_the_words_that_help(orient: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a b", "c d"], "label": ["x", "y"]})
    path = tmp_path / "train.json"
    path.write_text(json.dumps(frame.to_dict("list")) if orient == "list" else frame.to_json(orient=orient))
    with pytest.raises(InputError, match='train.json.*orient="records"'):
        load(train_file=str(path), do_train=True)


def test_words_that_python_reads_as_numbers(tmp_path: Path) -> None:
    for words in (["1_1", "2_2"], ["\uff11", "\uff12"], ["0x1", "0x2"], ["1 2", "3 4"], ["infinite", "nano"]):
        file = table(tmp_path, "t.csv", "text,label", *(f"a b,{word}" for word in words))
        assert load(train_file=file, do_train=True).task.label_names == tuple(words)
    for words in (["0.5", "nan"], ["0.5", "1e999"], ["0.5", "n/a"], ["0,5", "1,5"], ["1", "Infinity"]):
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": "a b", "label": word}) for word in words))
        with pytest.raises(InputError, match="row [01] "):
            load(train_file=str(tmp_path / "t.jsonl"), do_train=True)
    file = table(tmp_path, "t.csv", "text,label", "a b, 1 ", "c d,2", "e f,1.0e1")
    assert list(load(train_file=file, do_train=True).train["label"]) == [1.0, 2.0, 10.0]


# ---- as a user calls it ----


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--train_file", "kaggle_ids.csv", "--text_column", "text_en", "--label_column=label"], 32),
        (["--train_file", "minus1.csv", "--unlabelled", "drop"], 21),
        (["--train_file", "float01.csv", "--label_type", "classes"], 32),
        (["--train_file", "labels_ws.csv", "--test_file", "test_placeholder_labels.csv", "--do_predict"], 32),
        (["--dataset_name", ".", "--train_split", "labels_ws", "--validation_split=quoted", "--do_eval"], 32),
    ],
)
def test_the_cases_train(flags: list[str], steps: int, tiny_model_dir, entry_point, tmp_path, monkeypatch) -> None:
    usual = ["--model_name_or_path", str(tiny_model_dir), "--output_dir", str(tmp_path / "out"), "--do_train",
             "--apply_lora", "--lora_r", "2", "--lora_alpha", "2", "--max_seq_length", "16", "--disable_tqdm", "True",
             "--num_train_epochs", "1", "--per_device_train_batch_size", "1", "--save_strategy", "no"]  # fmt: skip
    monkeypatch.chdir(CASES)
    metrics = entry_point("RM-LoRA").main([*usual, "--random_rank", "1", *flags])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished" and record["task"] == "classification" and record["steps"] == steps
    if "--do_eval" in flags:
        assert metrics["eval_samples"] == 32
    if "--do_predict" in flags:
        lines = (tmp_path / "out" / "predict_results_classification.txt").read_text().splitlines()
        assert len(lines) == 31 and {line.split("\t")[1] for line in lines[1:]} <= set(BAD_GOOD)


def test_flags_that_cannot_work_together(tiny_model_dir, entry_point, tmp_path) -> None:
    usual = ["--model_name_or_path", str(tiny_model_dir), "--output_dir", str(tmp_path / "out"), "--do_train"]
    for flags, words in (
        (["--text_column_2", "b"], "name two columns"),
        (["--text_column", "a", "--text_column_2", "a"], "name two columns"),
        (["--label_column", "a", "--text_column", "a", "--train_file", str(CASES / "pairs.csv")], "text column too"),
        (["--label_type", "numbers"], "classes"),
        (["--unlabelled", "keep"], "drop"),
        (["--task_name", "mrpc", "--label_type", "regression", "--train_file", str(CASES / "pairs.csv")], "label_type"),
    ):
        with pytest.raises(InputError, match=words):
            entry_point("SoRA").main([*usual, *flags])
    assert not (tmp_path / "out" / "run.json").exists()


def test_which_columns_are_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = (
        "Jane Doe,Short title,the body is longer than the title is,a",
        "Al Roe,One title,and it tells more than it does,b",
    )
    file = table(tmp_path, "t.csv", "author,title,body,label", *rows)
    assert load(train_file=file, do_train=True).task.text_columns == ("body",)
    assert "taken from body, and not from author, title; --text_column" in caplog.text
    for header, right in (("q,p,label", ("q", "p")), (" Text ,id,label", (" Text ",)), ("id,URL,label", ())):
        file = table(tmp_path, "t.csv", header, "some words here,x7,a", "other words there,x8,b")
        if right == ("q", "p"):
            file = table(tmp_path, "t.csv", header, "some words here,more words here,a", "and more of them,or less,b")
        if right:
            assert load(train_file=file, do_train=True).task.text_columns == right
        else:
            with pytest.raises(InputError, match="no column of texts among id, URL, label: .*--text_column"):
                load(train_file=file, do_train=True)
    file = table(tmp_path, "t.csv", "a,b,c,label", "one two,one two,one two,x", "one two,one two,one two,y")
    with pytest.raises(InputError, match="has texts in a, b, c: name one with --text_column"):
        load(train_file=file, do_train=True)


def test_a_warning_tells_labels_that_look_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for words, part in (
        (range(30), "30 classes in 30 rows: --label_type regression"),
        (["Good", "good", "bad"], "Good, good"),
        (["a", "b", "None"], "None is taken for a class"),
    ):
        caplog.clear()
        file = table(tmp_path, "t.csv", "text,label", *(f"a b,{word}" for word in words))
        assert len(load(train_file=file, do_train=True).task.label_names) == len(words)
        assert part in caplog.text


def test_a_table_without_any_label(tmp_path: Path) -> None:
    file = table(tmp_path, "t.csv", "text,label", "a b,", "c d,")
    for unlabelled in ("refuse", "drop"):
        with pytest.raises(InputError, match="t.csv has no label in any of its 2 rows"):
            load(train_file=file, do_train=True, unlabelled=unlabelled)


def test_labels_in_messages_stay_on_one_line(tmp_path: Path) -> None:
    rows = [{"text": "a b", "label": "one\nline"}, {"text": "c d", "label": "tab\there"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = table(tmp_path, "v.csv", "text,label", "a b,none of them")
    with pytest.raises(InputError, match=r"Allowed: one\\nline, tab\\there") as refused:
        load(train_file=str(tmp_path / "t.jsonl"), validation_file=other, do_train=True, do_eval=True)
    assert "\n" not in str(refused.value)


def test_a_named_half_of_mnli_keeps_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "mnli"
    folder.mkdir()
    for name in ("train", "test_matched", "test_mismatched"):
        table(folder, f"{name}.csv", "premise,hypothesis,label", f"{name},b,neutral", "c,d,entailment")
    loaded = load(dataset_name=str(folder), test_split="test_mismatched", do_predict=True)
    assert list(loaded.tests) == ["mnli-mm"] and loaded.tests["mnli-mm"][0]["premise"] == "test_mismatched"


def test_a_folder_or_half_a_character_in_place_of_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        load(train_file=str(tmp_path / "t.csv"), do_train=True)
    (tmp_path / "t.jsonl").write_text('{"text": "a b", "label": "x"}\n{"text": "c d", "label": "\\ud83d"}\n')
    with pytest.raises(InputError, match=r"row 1 .* half of a character"):
        load(train_file=str(tmp_path / "t.jsonl"), do_train=True)

"""Bad data is refused in one sentence with the value, the place and what is allowed; generic tasks are guessed."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loralib.errors import InputError
from loralib.glue.data import load
from loralib.glue.tables import read_file
from loralib.glue.tasks import GLUE
from loralib.glue.tokens import row_length, tokenize

GOOD = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2} for i in range(6)]


def folder_of(path, **splits):
    path.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(path / f"{split}-00000-of-00001.parquet")
    return str(path)


def refused(*parts, **arguments):
    """load refuses with one line that holds every part."""
    with pytest.raises(InputError) as refusal:
        load(**{"do_train": True, **arguments})
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 700, message
    for part in parts:
        assert str(part) in message, (part, message)


def changed(row, **values):
    return [{**r, **(values if i == row else {})} for i, r in enumerate(GOOD)]


def test_names_and_flags(tmp_path):
    folder = folder_of(tmp_path / "mrpc", train=GOOD)
    refused("'mrcp'", "cola, mnli, mrpc", task_name="mrcp")
    refused("No data is named")
    for flag in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        refused(flag, "0", "at least 1", dataset_name=folder, **{flag: 0})
    refused("both", dataset_name=folder, train_file="x.csv")
    refused("'nothing.csv'", "does not exist", train_file="nothing.csv")
    (tmp_path / "x.docx").write_text("x")
    refused("x.docx", ".parquet, .tsv", train_file=str(tmp_path / "x.docx"))
    refused("is a file", dataset_name=str(tmp_path / "x.docx"))


def test_missing_folders_and_splits(tmp_path):
    for nowhere in (str(tmp_path / "nowhere"), "~nobody-of-this-name/mrpc"):
        refused(nowhere, "does not exist", dataset_name=nowhere)
    folder = folder_of(tmp_path / "mrpc", validation=GOOD)
    refused("'mrpc'", "no train, validation (dev) or test file", dataset_name=str(tmp_path))
    refused("do_train", "validation", dataset_name=folder)
    refused("do_predict", "validation", dataset_name=folder, do_train=False, do_predict=True)
    folder_of(tmp_path / "only", train=GOOD)
    refused("do_eval", "train", dataset_name=str(tmp_path / "only"), do_eval=True)
    (tmp_path / "none.csv").write_text("sentence,label\n")
    refused("no rows", train_file=str(tmp_path / "none.csv"), task_name="sst2")


def test_columns_that_do_not_fit(tmp_path):
    folder = folder_of(tmp_path / "data", train=[{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    refused("text, label", "sentence1, sentence2, label", dataset_name=folder, task_name="mrpc")
    refused("label", dataset_name=folder_of(tmp_path / "x", train=[{"text": "a", "target": 0}]))
    refused("no column of texts", dataset_name=folder_of(tmp_path / "y", train=[{"number": 1.5, "label": 0}]))
    bad = [{"sentence": 1, "label": 0}, {"sentence": 2, "label": 1}]
    refused("sentence", "int64", dataset_name=folder_of(tmp_path / "cola", train=bad))
    unlike = folder_of(tmp_path / "mrpc", train=GOOD, validation=[{"sentence1": "a", "label": 1}])
    refused("validation", "sentence2 not found", dataset_name=unlike, do_eval=True)


@pytest.mark.parametrize("text", ["", "  \t", None])
def test_empty_texts(tmp_path, text):
    folder = folder_of(tmp_path / "mrpc", train=GOOD, validation=changed(4, sentence2=text))
    refused("validation", "row 4", "sentence2", dataset_name=folder, do_eval=True)


def test_empty_questions_are_kept_only_in_qqp(tmp_path):
    rows = [{"question1": "", "question2": "b", "label": 0}]
    loaded = load(dataset_name=folder_of(tmp_path / "qqp", train=rows), do_train=True)
    assert list(loaded.train["question1"]) == [""]


@pytest.mark.parametrize("label", [2, -1, None])
def test_labels_outside_the_classes(tmp_path, label):
    folder = folder_of(tmp_path / "mrpc", train=changed(3, label=label))
    refused("row 3", "" if label is None else label, "not_equivalent, equivalent", dataset_name=folder)
    # the test split hides its labels
    folder = folder_of(tmp_path / "ok" / "mrpc", test=changed(3, label=label)) if label != 2 else None
    if folder:
        assert set(load(dataset_name=folder, do_predict=True).tests["mrpc"]["label"]) == {-1}


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -1, 5.5])
def test_regression_labels_that_are_no_scores(tmp_path, label):
    rows = [{**row, "label": float(row["label"])} for row in GOOD]
    rows[2]["label"] = float(label)
    refused("row 2", label, "0.0 to 5.0", dataset_name=folder_of(tmp_path / "stsb", train=rows))


def test_a_label_word_of_another_task(tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tcontradiction\n")
    refused("'contradiction'", "entailment, not_entailment", dataset_name=str(tmp_path / "RTE"))


def test_a_validation_label_that_training_never_saw(tmp_path):
    rows = [{"text": f"t{i}", "label": "abc"[i % 3]} for i in range(6)]
    folder = folder_of(tmp_path / "mine", train=rows, validation=rows[:2])
    assert load(dataset_name=folder, do_eval=True).task.label_names == ("a", "b", "c")  # train's
    folder = folder_of(tmp_path / "mine", train=rows, validation=[{"text": "t", "label": "d"}])
    refused("validation", "row 0", "'d'", "a, b, c", dataset_name=folder, do_eval=True)


@pytest.mark.parametrize(
    ("suffix", "content", "parts"),
    [
        ("tsv", "sentence\tlabel\nfine\t0\nno label\n", ("line 3", "1 columns where 2")),
        ("tsv", "", ("first line",)),
        ("tsv", "a\ta\nx\ty\n", ("different column names",)),
        ("tsv", b"sentence\tlabel\n\xff\xfe\t1\n", ("line 2", "'\\xff'", "UTF-8")),
        ("csv", "sentence,label\nfine,0\nx,1,2\n", ("line 3", "3 columns where 2")),
        ("csv", 'sentence,label\n"never closed,0\nx,1\n', ("unexpected end of data",)),
        ("json", '[{"sentence": "x", "label": 1},', ("JSONDecodeError",)),
        ("json", "[" * 100_000, ("nested too deeply",)),
        ("json", "[1, 2]", ("row 0", "not an object")),
        ("jsonl", '{"sentence": "x", "label": 1}\n{"sentence": \n', ("line 2",)),
        ("jsonl", '{"sentence": "x", "label": 1}\n{"sentence": ["y"], "label": 1}\n', ("row 1", "['y']", "sentence")),
        ("jsonl", '{"sentence": "\\ud800", "label": 1}\n', ("row 0", "sentence", "text is needed")),
        ("parquet", b"PAR1 and then nothing of use PAR1", ("could not be read as parquet",)),
        ("parquet", b"", ("could not be read as parquet",)),
    ],
)
def test_broken_files(tmp_path, suffix, content, parts):
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(str(path), *parts, train_file=str(path), task_name="sst2")


def test_a_cut_save_to_disk_folder(tmp_path):
    DatasetDict({"train": Dataset.from_list(GOOD)}).save_to_disk(tmp_path / "mrpc")
    next((tmp_path / "mrpc" / "train").glob("*.arrow")).unlink()
    refused("not a complete save_to_disk folder", dataset_name=str(tmp_path / "mrpc"))


def test_msr_paraphrase_cut_short(tmp_path):
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "dev_ids.tsv").write_text("1\t2\n")
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    (tmp_path / "MRPC" / "msr_paraphrase_train.txt").write_text(f"{header}\r\n1\t1")
    refused("msr_paraphrase_train.txt, line 2", "2 columns where 5", dataset_name=str(tmp_path / "MRPC"))


# Generic tasks


@pytest.mark.parametrize(
    ("rows", "texts", "names", "labels"),
    [
        ([{"text": "a", "label": "neg"}, {"text": "b", "label": "Pos"}], ("text",), ("Pos", "neg"), [1, 0]),
        ([{"id": "x1", "review": "a", "label": 10}, {"id": "x2", "review": "b", "label": 9}], ("review",),
         ("9", "10"), [1, 0]),
        ([{"q": "a", "n": 3, "p": "c", "label": True}, {"q": "b", "n": 4, "p": "d", "label": False}], ("q", "p"),
         ("False", "True"), [1, 0]),
        ([{"premise": "a", "hypothesis": "c", "note": "n", "label": 0.5},
          {"premise": "b", "hypothesis": "d", "note": "n", "label": -1.0}],
         ("premise", "hypothesis"), None, [0.5, -1.0]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tsv", "csv"])
def test_generic_tasks(tmp_path, suffix, rows, texts, names, labels):
    path = tmp_path / f"my rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        sep = {"csv": ",", "tsv": "\t"}[suffix]
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("\n".join(sep.join(map(str, line)) for line in lines) + "\n")
    loaded = load(train_file=str(path), validation_file=str(path), test_file=str(path),
                  do_train=True, do_eval=True, do_predict=True)  # fmt: skip
    assert (loaded.task.text_columns, loaded.task.label_names) == (texts, names)
    for split in (loaded.train, *loaded.evals.values(), *loaded.tests.values()):
        assert list(split["label"]) == labels
    assert loaded.task.num_labels == (1 if names is None else 2)


def test_a_table_with_fewer_than_two_classes_is_refused(tmp_path):
    refused("only one label, same", dataset_name=folder_of(tmp_path / "x", train=[{"text": "a", "label": "same"}]))
    folder = folder_of(tmp_path / "x", train=[{"text": "a", "label": -1}])
    refused("'-1'", "--unlabelled drop", "--label_type classes", dataset_name=folder)
    refused("no label in any of its 1 rows", dataset_name=folder, unlabelled="drop")


def test_an_unlabelled_test_file_without_training_data_is_refused(tmp_path):
    (tmp_path / "test.csv").write_text("sentence\nfine\nnot so\n")
    refused(
        "no column `label`", "give train_file", test_file=str(tmp_path / "test.csv"), do_train=False, do_predict=True
    )


def test_a_folder_named_like_a_task_with_other_columns_is_generic(tmp_path, caplog):
    folder = folder_of(tmp_path / "sst2", train=[{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    assert load(dataset_name=folder, do_train=True).task.name == "classification"
    assert "named like sst2" in caplog.text


# Any bytes: an answer or one sentence, never a hang or another exception


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(alphabet='\t\n\r",ab0{}[]:\x00\ufeff\u2028', max_size=80).map(str.encode)
    ),
    suffix=st.sampled_from(["tsv", "csv", "json", "jsonl", "parquet"]),
    task=st.sampled_from([None, *GLUE.values()]),
)
def test_any_bytes_are_read_or_refused(tmp_path, content, suffix, task):
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(content)
    try:
        read_file(path, task, "train")
    except InputError as error:
        assert re.fullmatch(r".*train\.\w+.*", str(error))


@pytest.mark.parametrize("bad", ["sentence1", "label"])
def test_text_that_is_not_utf8_is_refused(tmp_path, bad):
    rows = [{**row, "label": "yes" if row["label"] else "no"} for row in GOOD]
    folder = folder_of(tmp_path / "pairs", train=[{**row, bad: f"{row[bad]}@@@@"} for row in rows])
    path = tmp_path / "pairs" / "train-00000-of-00001.parquet"
    assert path.read_bytes().count(b"@@@@") > 1
    path.write_bytes(path.read_bytes().replace(b"@@@@", b"@\x80@@"))
    refused("split train", "UTF8", dataset_name=folder)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_parquet_is_read_or_refused(tmp_path, data):
    folder = folder_of(tmp_path / "mrpc", train=GOOD)
    path = tmp_path / "mrpc" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        load(dataset_name=folder, do_train=True)
    except InputError:
        pass


# Tokens


class Words:
    """A tokenizer of whitespace words with BERT's interface as far as `row_length` and `tokenize` use it."""

    def __init__(self, limit=8):
        self.model_max_length = limit

    def num_special_tokens_to_add(self, pair):
        return 3 if pair else 2

    def __call__(self, *texts, padding, max_length, truncation, return_attention_mask):
        ids = [[len(w) for w in " ".join(row).split()][:max_length] for row in zip(*texts, strict=True)]
        pad = max_length if padding == "max_length" else 0
        return {"input_ids": [row + [0] * (pad - len(row)) for row in ids]}


@pytest.mark.parametrize("pad", [True, False])
def test_tokens_are_model_inputs_and_label_only(tmp_path, pad, caplog):
    rows = [{**row, "idx": i} for i, row in enumerate(GOOD)]
    loaded = load(dataset_name=folder_of(tmp_path / "mrpc", train=rows), do_train=True)
    length = row_length(128, loaded.task, Words(), nn.Identity())
    tokens = tokenize(loaded.train, loaded.task, Words(), length, pad)
    assert tokens.column_names == ["label", "input_ids"]
    assert {len(ids) for ids in tokens["input_ids"]} == ({8} if pad else {4})
    assert "128 is above the tokenizer's limit: 8" in caplog.text
    with pytest.raises(InputError, match="max_seq_length is 3 but must be above 3"):
        row_length(3, loaded.task, Words(), nn.Identity())


@pytest.mark.parametrize("limit", [0, -1, None, "512", True, float("nan")])
def test_a_limit_of_the_tokenizer_that_is_not_a_number_of_tokens_is_refused(limit):
    with pytest.raises(InputError, match="model_max_length is .* it must be a number of tokens"):
        row_length(128, GLUE["mrpc"], Words(limit), nn.Identity())


@pytest.mark.parametrize("limit", [10**30, 1e30, float("inf"), 512.0])
def test_very_large_tokenizer_limits_mean_no_limit(limit, caplog):
    assert row_length(128, GLUE["mrpc"], Words(limit), nn.Identity()) == 128
    assert not caplog.text
    with pytest.raises(InputError, match="max_seq_length is 2, reduced from 128, but must be above 3"):
        row_length(128, GLUE["mrpc"], Words(2), nn.Identity())
    if limit > 2**20:
        with pytest.raises(InputError, match="must be at most 1048576"):
            row_length(10**20, GLUE["mrpc"], Words(limit), nn.Identity())

"""The official metrics against their definitions in plain arithmetic; the files for people and for GLUE's server."""

import csv
import math
import re
import warnings
import zipfile

import numpy as np
import pandas
import pytest
from transformers import EvalPrediction

from loralib.errors import InputError
from loralib.glue.metrics import GlueMetric, class_words, compute_metrics, metric_names, one_class, to_labels, to_scores
from loralib.glue.predictions import check_submission, write_predictions, write_submission
from loralib.glue.tasks import GLUE, Task

CLASSES = Task("classification", ("text",), ("a", "b", "c"), ("accuracy",))
FLOATS = Task("regression", ("text",), None, ("mse", "pearson", "spearmanr"))


def one_hot(ids, classes):
    return 3.0 * np.eye(classes)[np.asarray(ids)] - 1.0


def counts(predicted, true):
    pairs = list(zip(predicted, true, strict=True))
    return [sum((p, t) == pair for p, t in pairs) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]


def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return cov / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def ranks(x):
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def expected(task, predicted, true):
    """Each score from its definition."""
    result = {}
    for name in task.metrics:
        if name == "accuracy":
            result[name] = sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)
        elif name == "f1":
            tp, fp, fn, _ = counts(predicted, true)
            result[name] = 2 * tp / (2 * tp + fp + fn)
        elif name == "matthews_correlation":
            tp, fp, fn, tn = counts(predicted, true)
            result[name] = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        elif name == "mse":
            result[name] = sum((p - t) ** 2 for p, t in zip(predicted, true, strict=True)) / len(true)
        elif name == "pearson":
            result[name] = pearson(predicted, true)
        else:
            result[name] = pearson(ranks(predicted), ranks(true))
    if task is CLASSES:
        hits = {c: sum(p == t == c for p, t in zip(predicted, true, strict=True)) for c in range(3)}
        for c, name in enumerate("abc"):
            result[f"precision_{name}"] = hits[c] / predicted.count(c)
            result[f"recall_{name}"] = hits[c] / true.count(c)
            result[f"f1_{name}"] = 2 * hits[c] / (predicted.count(c) + true.count(c))
        result["f1_macro"] = sum(result[f"f1_{name}"] for name in "abc") / 3
    if task.name in ("mrpc", "qqp", "stsb"):
        result["combined_score"] = sum(result.values()) / 2
    return result


@pytest.mark.parametrize("task", [*GLUE.values(), CLASSES, FLOATS], ids=lambda task: task.name)
def test_scores_are_their_definitions(task):
    random = np.random.default_rng(3)
    if task.label_names is None:
        true = random.integers(0, 11, 40) / 2  # with ties
        predicted = np.clip(true + random.normal(size=40), -1, 6)
        outputs = predicted[:, None]
    else:
        true = random.integers(0, task.num_labels, 40)
        predicted = np.where(random.random(40) < 0.6, true, random.integers(0, task.num_labels, 40))
        outputs = one_hot(predicted, task.num_labels)
    wanted = expected(task, predicted.tolist(), true.tolist())
    for form in (outputs, (outputs, np.zeros((40, 2, 2))), outputs.astype(np.float32)):
        got = compute_metrics(task)(EvalPrediction(form, true))
        assert got == pytest.approx(wanted, abs=1e-6 if form is not outputs else 1e-12)
        assert all(type(value) is float for value in got.values())


def test_a_regression_head_of_shape_n_1_or_n():
    for shape in ((2, 1), (2,), (1, 1), (1,)):
        assert to_labels(np.ones(shape), GLUE["stsb"]).shape == shape[:1]


@pytest.mark.parametrize("task", [*GLUE.values(), CLASSES, FLOATS], ids=lambda task: task.name)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("label", [0, 1])
def test_constant_predictions_and_one_class_are_numbers_and_no_warnings(task, rows, label):
    true = np.full(rows, label)
    outputs = one_hot(np.zeros(rows, int), task.num_labels) if task.label_names else np.zeros((rows, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compute_metrics(task)(EvalPrediction(outputs, true))
    right = float(label == 0)
    assert got.pop("accuracy", right) == right
    assert got.pop("mse", float(label)) == float(label)
    if task is CLASSES:
        assert all(got.pop(f"{score}_a") == right for score in ("precision", "recall", "f1"))
        assert got.pop("f1_macro") == right
    if task.metrics == ("accuracy", "f1"):
        assert got.pop("combined_score") == right / 2
    assert all(value == 0.0 for value in got.values())  # correlations, and f1 without a hit


def test_undefined_scores_are_reported(caplog):
    compute_metrics(GLUE["stsb"])(EvalPrediction(np.zeros((3, 1)), np.arange(3.0)))
    compute_metrics(GLUE["mrpc"])(EvalPrediction(one_hot([0, 0], 2), np.zeros(2, int)))
    assert "pearson is undefined" in caplog.text and "f1 is undefined" in caplog.text


def test_a_class_without_rows_and_predictions_is_left_out_of_the_average_and_named(caplog):
    got = compute_metrics(CLASSES)(EvalPrediction(one_hot([0, 2, 2, 0], 3), np.array([0, 2, 0, 0])))
    f1 = {"a": 2 * 2 / (2 + 3), "b": 0.0, "c": 2 * 1 / (2 + 1)}
    assert {k: got[f"f1_{k}"] for k in "abc"} == pytest.approx(f1)
    assert got["f1_macro"] == pytest.approx((f1["a"] + f1["c"]) / 2)
    assert "class 'b' has neither rows nor predictions" in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("good", "bad"), ["good", "bad"]),
        (("0", "1", "-1"), ["0", "1", "1_2"]),
        (("+", "-", "?!"), ["class_0", "class_1", "class_2"]),
        (("a b", "a_b", "a\tb\n"), ["a_b", "a_b_1", "a_b_2"]),
        (("a b", "a_b_1", "a_b"), ["a_b", "a_b_1", "a_b_2"]),
        (("a_1", "a", "a!"), ["a_1", "a", "a_2"]),
        (("b_1", "b!", "b"), ["b_1", "b", "b_2"]),
        (("b_1", "b", "b_2", "b!"), ["b_1", "b", "b_2", "b_3"]),
        (("macro", "loss", "hearing loss"), ["macro_0", "loss_1", "hearing_loss_2"]),
        (("\u043f\u043b\u043e\u0445\u043e", "\u597d"), ["\u043f\u043b\u043e\u0445\u043e", "\u597d"]),
    ],
)
def test_classes_have_different_names_that_tensorboard_takes(names, words):
    assert class_words(names) == words and len({*words}) == len(words)
    task = Task("classification", ("text",), names, ("accuracy",))
    got = compute_metrics(task)(EvalPrediction(one_hot(range(len(names)), len(names)), np.arange(len(names))))
    assert list(got) == metric_names(task) and set(got.values()) == {1.0}
    assert not any(re.search(r"[^-/\w.]", name) or name.endswith("loss") for name in got)


def test_nan_outputs_are_refused():
    outputs = one_hot([0, 1, 1], 2)
    outputs[1, 0] = float("nan")
    with pytest.raises(InputError, match="NaN in 1 of 3 rows"):
        compute_metrics(GLUE["cola"])(EvalPrediction(outputs, np.zeros(3, int)))


def read(path):
    text = path.read_bytes().decode()
    assert text.endswith("\n") and "\r" not in text
    return [line.split("\t") for line in text[:-1].split("\n")]


def test_predictions_have_label_names_and_numbers(tmp_path):
    path = write_predictions(tmp_path / "new", "mnli-mm", np.array([2, 0, 1]), GLUE["mnli"])
    assert path.name == "predict_results_mnli-mm.txt"
    assert read(path) == [["index", "prediction"], ["0", "contradiction"], ["1", "entailment"], ["2", "neutral"]]
    path = write_predictions(tmp_path, "stsb", np.array([5.25, 1.0]), GLUE["stsb"])
    assert read(path)[1:] == [["0", "5.25"], ["1", "1.0"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "predict_results_stsb.txt"]  # no temporary file stays


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e6, 1e30])
def test_numbers_of_any_scale_can_be_told_apart(tmp_path, scale):
    outputs = (np.random.default_rng(0).normal(size=(50, 1)) * scale).astype(np.float32)
    path = write_predictions(tmp_path, "x", to_labels(outputs, FLOATS), FLOATS, to_scores(outputs, FLOATS))
    header, *rows = read(path)
    assert header == ["index", "prediction", "score"]
    for column in (1, 2):
        assert [np.float32(row[column]) for row in rows] == outputs[:, 0].tolist()


@pytest.mark.parametrize(
    "names", [("a", "b", "c"), ("a\tb", 'say "so"', "x\ny"), ("a\rb", "", " c "), ("\t", "\n", "\r")]
)
def test_any_label_word_comes_back_with_its_probability(tmp_path, names):
    task = Task("classification", ("text",), names, ("accuracy",))
    logits = np.array([[9.0, 0, -700], [0, 0, 0], [-1e4, 1e4, 0], [-2.5, 0.25, 3.5]], dtype=np.float32)
    path = write_predictions(tmp_path, "x", to_labels(logits, task), task, to_scores(logits, task))
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, dialect="excel-tab")
    assert header == ["index", "prediction", *(f"probability_{name}" for name in names)]
    assert [row[1] for row in rows] == [names[0], names[0], names[1], names[2]]
    for row, outputs in zip(rows, logits.astype(float), strict=True):
        shifted = [math.exp(x - max(outputs)) for x in outputs]
        assert [float(x) for x in row[2:]] == pytest.approx([x / sum(shifted) for x in shifted], rel=1e-6)
    table = pandas.read_csv(path, sep="\t", keep_default_na=False)
    assert table["prediction"].tolist() == [row[1] for row in rows]


# File, rows and words of GLUE's sample submission.
SERVER = {
    "cola": ("CoLA.tsv", 1063, {"0", "1"}),
    "sst2": ("SST-2.tsv", 1821, {"0", "1"}),
    "mrpc": ("MRPC.tsv", 1725, {"0", "1"}),
    "qqp": ("QQP.tsv", 390965, {"0", "1"}),
    "wnli": ("WNLI.tsv", 146, {"0", "1"}),
    "qnli": ("QNLI.tsv", 5463, {"entailment", "not_entailment"}),
    "rte": ("RTE.tsv", 3000, {"entailment", "not_entailment"}),
    "mnli": ("MNLI-m.tsv", 9796, {"entailment", "neutral", "contradiction"}),
    "mnli-mm": ("MNLI-mm.tsv", 9847, {"entailment", "neutral", "contradiction"}),
    "ax": ("AX.tsv", 1104, {"entailment", "neutral", "contradiction"}),
    "stsb": ("STS-B.tsv", 1379, None),
}


def test_submission_files_and_the_zip_once_all_are_there(tmp_path, caplog):
    for k, (split, (name, rows, words)) in enumerate(SERVER.items()):
        assert not (tmp_path / "submission.zip").exists(), split
        task = GLUE[split.removesuffix("-mm")]
        ids = np.arange(rows) % task.num_labels
        path = write_submission(tmp_path, split, ids if words else np.linspace(-1, 6, rows), task)
        lines = read(path)
        assert path.name == name and lines[0] == ["index", "prediction"] and len(lines) == rows + 1
        assert [index for index, _ in lines[1:]] == [str(i) for i in range(rows)]
        if words:
            assert {word for _, word in lines[1:]} == words
        else:
            assert lines[1][1] == "0.000" and lines[-1][1] == "5.000"
            assert all(len(word) == 5 and 0 <= float(word) <= 5 for _, word in lines[1:])
        assert len(list(tmp_path.iterdir())) == k + 1 + (k + 1 == len(SERVER))
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(name for name, _, _ in SERVER.values())
        assert archive.read("RTE.tsv") == (tmp_path / "RTE.tsv").read_bytes()
    assert "rows and the server takes" not in caplog.text


def test_submission_of_a_part_warns_and_of_another_task_is_refused(tmp_path, caplog):
    write_submission(tmp_path, "rte", np.array([0, 1]), GLUE["rte"])
    assert "RTE.tsv has 2 rows and the server takes 3000" in caplog.text
    with pytest.raises(InputError, match="takes no predictions of 'classification'"):
        write_submission(tmp_path, "classification", np.array([0]), CLASSES)
    with pytest.raises(InputError, match="no predictions of 'classification'.*--task_name"):
        check_submission(tmp_path, CLASSES, predicts=True)  # before the training, not after
    check_submission(tmp_path / "new", GLUE["ax"], predicts=True)


@pytest.mark.parametrize("name", ["cola", "mrpc", "mnli", "stsb"])
def test_scores_of_one_class_are_those_of_a_model_that_answers_it(name, caplog):
    """Against the task's own metric of the best constant answer."""
    labels = {"cola": [1, 1, 0, 1], "mrpc": [0, 0, 1], "mnli": [2, 1, 2, 0], "stsb": [0.5, 3.0]}[name]
    found = one_class(GLUE[name], labels)
    assert not caplog.text
    if name == "stsb":
        assert found == {}
        return
    constant = [GlueMetric(GLUE[name]).compute(predictions=[c] * len(labels), references=labels) for c in set(labels)]
    best = max(constant, key=lambda scores: scores.get("accuracy", 0))
    assert found == {metric: best[metric] for metric in GLUE[name].metrics}

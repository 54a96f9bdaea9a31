"""Files and habits as users bring them: one row a kind, with the input, what is run, and the right value."""

import logging
from pathlib import Path

import pytest

from loralib.errors import InputError
from loralib.glue.data import load
from loralib.glue.tasks import GLUE, Task


def table(folder: Path, name: str, header: str, *rows: str) -> str:
    """A small text file; its path."""
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


# ---- the classes of what is trained already ----

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
    assert ("index" in caplog.text) == rows[0].endswith("2")


def test_known_classes_need_no_labels_and_refuse_others(tmp_path: Path) -> None:
    loaded = load(test_file=table(tmp_path, "t.csv", "text", "a", "b"), do_predict=True, known=KNOWN)
    assert loaded.task.label_names == KNOWN.label_names and list(loaded.tests["classification"]["label"]) == [-1, -1]
    with pytest.raises(InputError, match=r"row 1 .*'awful'.*neutral, Very good, bad"):
        load(validation_file=table(tmp_path, "v.csv", "text,label", "a,bad", "b,awful"), do_eval=True, known=KNOWN)


def test_known_regression_stays_one_on_whole_numbers(tmp_path: Path) -> None:
    known = Task("regression", ("text",), None, ())
    loaded = load(validation_file=table(tmp_path, "v.csv", "text,label", "a,1", "b,2"), do_eval=True, known=known)
    assert loaded.task.label_names is None and list(loaded.evals["regression"]["label"]) == [1.0, 2.0]


def test_known_order_of_a_glue_task(tmp_path: Path) -> None:
    """Numbers in GLUE's own data keep GLUE's order; the ids that come out have the model's."""
    known = Task("mnli", (), ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), ())
    file = table(tmp_path, "v.csv", "premise,hypothesis,label", "a,b,0", "c,d,contradiction", "e,f,1")
    for arguments in ({}, {"task_name": "mnli"}):
        loaded = load(validation_file=file, do_eval=True, known=known, **arguments)
        assert loaded.task.label_names == known.label_names and loaded.task.name == "mnli"
        assert list(loaded.evals["mnli"]["label"]) == [2, 0, 1]
    with pytest.raises(InputError, match="rte with the labels entailment, not_entailment, and what is trained knows"):
        load(validation_file=file, do_eval=True, known=known, task_name="rte")
    assert GLUE["mnli"].label_names == ("entailment", "neutral", "contradiction")

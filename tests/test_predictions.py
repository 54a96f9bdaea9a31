"""--do_predict as a user calls it: which labels of a test file are used, and what the files then hold."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr

from loralib.errors import InputError


def write(path: Path, labels: list[Any]) -> Path:
    words = ["monday", "july", "firm", "road"]
    lines = [{"text": f"the {words[i % 4]} in {words[i // 2 % 4]} {i}", "label": x} for i, x in enumerate(labels)]
    path.write_text("\n".join(json.dumps({k: v for k, v in line.items() if v is not None}) for line in lines))
    return path


def flags(model: Path, train: Path, test: Path, out: Path, *more: str) -> list[str]:
    usual = f"--model_name_or_path {model} --train_file {train} --test_file {test} --output_dir {out} --do_train "
    usual += "--do_predict --apply_lora --lora_r 2 --lora_alpha 4 --max_seq_length 24 --max_steps 12 --use_cpu "
    usual += "--disable_tqdm 1 --report_to none --per_device_train_batch_size 8 --learning_rate 0.02"
    return [*usual.split(), *more]


def results(out: Path, task: str) -> tuple[list[list[str]], dict[str, Any]]:
    with open(out / f"predict_results_{task}.txt", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, dialect="excel-tab"))
    found = json.loads((out / "predict_results.json").read_text())
    assert json.loads((out / "all_results.json").read_text()).items() >= found.items()
    return rows, found


def test_labels_of_a_test_file_give_metrics(
    tmp_path: Path, tiny_model_dir: Path, entry_point: Callable[[str], Any], caplog: Any
) -> None:
    labels = ["bad", "good\tor\nso", "fine", "fine"] * 6
    train, test = write(tmp_path / "train.jsonl", labels), write(tmp_path / "test.jsonl", labels[:13])
    with caplog.at_level(logging.INFO, logger="loralib"):
        metrics = entry_point("AdaLoRA").main(flags(tiny_model_dir, train, test, tmp_path / "out", "--predict_scores"))
    (header, *rows), found = results(tmp_path / "out", "classification")
    names = ["bad", "fine", "good\tor\nso"]
    assert header == ["index", "prediction", *(f"probability_{name}" for name in names)]
    assert [row[1] for row in rows] == [names[int(np.argmax([float(x) for x in row[2:]]))] for row in rows]
    right = sum(row[1] == label for row, label in zip(rows, labels[:13], strict=True))
    assert found["predict_accuracy"] == metrics["predict_accuracy"] == right / 13
    loss = -np.mean([np.log(float(row[2 + names.index(x)])) for row, x in zip(rows, labels[:13], strict=True)])
    assert found["predict_loss"] == pytest.approx(loss, rel=1e-5) and found["predict_samples"] == 13
    assert "all 13 rows have a label, so predict_* metrics are computed" in caplog.text


@pytest.mark.parametrize("column", [[None] * 9, [-1] * 9])
def test_labels_that_cannot_be_used_are_left_out(
    column: list[Any], tmp_path: Path, tiny_model_dir: Path, entry_point: Callable[[str], Any], caplog: Any
) -> None:
    train, test = write(tmp_path / "train.jsonl", [0, 1] * 12), write(tmp_path / "test.jsonl", column)
    with caplog.at_level(logging.INFO, logger="loralib"):
        entry_point("SoRA").main(flags(tiny_model_dir, train, test, tmp_path / "out"))
    (header, *rows), found = results(tmp_path / "out", "classification")
    assert header == ["index", "prediction"] and len(rows) == 9 == found["predict_samples"]
    assert not {"predict_loss", "predict_accuracy"} & found.keys()
    assert "the test split has no usable labels: predictions of 9 rows only, no metrics" in caplog.text


def test_predictions_of_a_regression_on_a_small_scale(
    tmp_path: Path, tiny_model_dir: Path, entry_point: Callable[[str], Any]
) -> None:
    labels = [0.0001 * (i % 9) for i in range(24)]
    train, test = write(tmp_path / "train.jsonl", labels), write(tmp_path / "test.jsonl", labels[:16])
    entry_point("AdaLoRA").main(flags(tiny_model_dir, train, test, tmp_path / "out", "--predict_scores"))
    (header, *rows), found = results(tmp_path / "out", "regression")
    assert header == ["index", "prediction", "score"] and all(row[1] == row[2] for row in rows)
    values = [float(row[1]) for row in rows]
    assert len({*values}) == 16  # every text is another one
    assert found["predict_mse"] == pytest.approx(np.mean((np.array(values) - labels[:16]) ** 2), rel=1e-4)
    assert found["predict_pearson"] == pytest.approx(pearsonr(values, labels[:16]).statistic, abs=1e-4)


def test_scores_need_a_prediction(tmp_path: Path, tiny_model_dir: Path, entry_point: Callable[[str], Any]) -> None:
    train = write(tmp_path / "train.jsonl", [0, 1] * 12)
    argv = flags(tiny_model_dir, train, train, tmp_path / "out", "--do_predict", "False", "--predict_scores")
    with pytest.raises(InputError, match="--predict_scores needs --do_predict"):
        entry_point("AdaLoRA").main(argv)

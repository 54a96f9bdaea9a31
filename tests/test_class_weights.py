"""--class_weights: the loss against its formula, and what a user who gives the flag gets."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loralib.errors import InputError
from loralib.glue.flags import GlueTrainingArguments
from loralib.training.trainer import task_loss

LABELS = ["yes", "no", "no", "maybe", "no", "no"] * 8  # 8, 32 and 8 rows
NAMES = ["maybe", "no", "yes"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_its_formula(smoothing: float) -> None:
    """sum over rows of [(1 - s) w_y (-log p_y) + s / K sum over classes of w_c (-log p_c)], over the number of rows."""
    logits, labels, weights = torch.randn(7, 3), torch.tensor([0, 1, 2, 2, 1, 0, 2]), [0.25, 1.5, 4.0]
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        nll = [math.log(sum(math.exp(x) for x in row)) - x for x in row]
        total += (1 - smoothing) * weights[label] * nll[label]
        total += smoothing / 3 * sum(w * x for w, x in zip(weights, nll, strict=True))
    assert task_loss(logits, labels, smoothing, torch.tensor(weights)).item() == pytest.approx(total / 7, rel=1e-5)
    ones = task_loss(logits, labels, smoothing, torch.ones(3))
    torch.testing.assert_close(ones, task_loss(logits, labels, smoothing))


@pytest.fixture
def flags(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    """Six steps over an uneven data set, without dropout."""
    words = ["monday", "july", "firm", "road"]
    lines = [{"text": f"the {words[i % 4]} in {words[i // 2 % 4]} {i}", "label": x} for i, x in enumerate(LABELS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    usual = f"--model_name_or_path {tiny_model_dir} --config_name {tmp_path / 'config'} "
    usual += f"--train_file {tmp_path / 'rows.jsonl'} "
    usual += f"--validation_file {tmp_path / 'rows.jsonl'} --output_dir {tmp_path / 'out'} --do_train --do_eval "
    usual += "--apply_lora --lora_r 2 --lora_alpha 4 --max_seq_length 24 --max_steps 6 --use_cpu --disable_tqdm 1 "
    usual += "--report_to none --per_device_train_batch_size 8 --learning_rate 0.01 --logging_steps 1 "
    return (usual + "--train_sampling_strategy sequential").split()


def first_loss(out: Path) -> float:
    history = json.loads((out / "run.json").read_text())["history"]
    return next(entry["loss"] for entry in history if "loss" in entry)


def test_balanced_weights_are_counted_recorded_and_used(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any]
) -> None:
    main, out = entry_point("AdaLoRA").main, tmp_path / "out"
    at_rest = ["--learning_rate", "0", "--overwrite_output_dir"]
    plain = main([*flags, *at_rest])["eval_loss"]
    assert "class_weights" not in json.loads((out / "run.json").read_text())
    assert main([*flags, *at_rest, "--class_weights", "balanced"])["eval_loss"] == plain  # never weighted
    run = json.loads((out / "run.json").read_text())
    assert run["class_weights"] == {"maybe": 48 / (3 * 8), "no": 48 / (3 * 32), "yes": 48 / (3 * 8)}
    assert run["arguments"]["class_weights"] == ["balanced"]
    balanced = first_loss(out)
    main([*flags, *at_rest, "--class_weights", "2", "0.5,2"])
    assert first_loss(out) == balanced
    main([*flags, *at_rest, "--class_weights", "4", "1", "4"])
    assert first_loss(out) == pytest.approx(2 * balanced, rel=1e-5)


def test_one_batch_of_8_equals_four_of_2_accumulated(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any]
) -> None:
    main = entry_point("AdaLoRA").main
    main([*flags, "--class_weights", "balanced"])
    split = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    main([*flags, "--class_weights", "balanced", *split, "--output_dir", str(tmp_path / "four")])
    main([*flags, "--output_dir", str(tmp_path / "plain")])
    whole, four, plain = (load_file(tmp_path / n / "adapter.safetensors") for n in ("out", "four", "plain"))
    for key, value in whole.items():
        torch.testing.assert_close(four[key], value, rtol=0, atol=2e-5, msg=key)
    assert max((plain[k] - whole[k]).abs().max() for k in whole) > 1e-3


def test_a_checkpoint_is_resumed_with_the_same_weights_only(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any]
) -> None:
    main = entry_point("AdaLoRA").main
    main([*flags, "--save_steps", "3", "--class_weights", "balanced"])
    (tmp_path / "out" / "run.json").unlink()
    for other in ([], ["--class_weights", "1", "1", "1"]):
        with pytest.raises(InputError, match=r"belongs to a run with other settings: class_weights"):
            main([*flags, "--save_steps", "3", *other])
    main([*flags, "--save_steps", "3", "--class_weights", "2", "0.5", "2"])  # what balanced was


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("1 2", "has 2 numbers and classification has 3 classes: give one for each of maybe, no, yes, in this order"),
        ("1,2,3,4", "has 4 numbers and classification has 3 classes"),
        ("1 -2 3", "class_weights holds '-2', it must be 'balanced', or a finite number above 0"),
        ("1 0 3", "class_weights holds '0'"),
        ("1 nan 3", "class_weights holds 'nan'"),
        ("1 inf 3", "class_weights holds 'inf'"),
        ("balance", "class_weights holds 'balance'"),
        ("balanced 1 2", "class_weights holds 'balanced'"),
    ],
)
def test_bad_class_weights_are_refused(
    weights: str, said: str, flags: list[str], entry_point: Callable[[str], Any]
) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        entry_point("SoRA").main([*flags, "--class_weights", *weights.split()])


def test_a_regression_and_a_class_without_rows_are_refused(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any]
) -> None:
    main = entry_point("AdaLoRA").main
    with pytest.raises(InputError, match="needs training rows of every class, and there are none of 'yes'"):
        few = [x.replace("yes", "no") for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
        (tmp_path / "few.jsonl").write_text("\n".join(few[:47] + [few[47].replace('"no"', '"yes"')]))
        main([*flags, "--train_file", str(tmp_path / "few.jsonl"), "--max_train_samples", "40",
              "--class_weights", "balanced"])  # fmt: skip
    rows = [json.dumps({"text": f"the road {i}", "label": i / 7}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match="--class_weights balanced needs classes, and regression is a regression"):
        main([*flags, "--class_weights", "balanced"])


@pytest.mark.parametrize("name", ["mse", "eval_mse"])
def test_the_best_mean_squared_error_is_the_smallest(name: str, tmp_path: Path) -> None:
    args = GlueTrainingArguments(
        output_dir=str(tmp_path),
        metric_for_best_model=name,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    assert args.greater_is_better is False

"""SoRA's sparsifying schedule (ledger S8): stages, the curve over them, going on after an interruption."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loralib.errors import InputError
from loralib.trainer import LoRATrainer


@pytest.fixture
def flags(tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> list[str]:
    values = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "lora_r": 4,
        "lora_alpha": 8,
        "train_sparse": True,
        "sparse_lambda_2": 0.0,
        "lambda_schedule": "linear",
        "max_lambda": 0.2,
        "lambda_num": 3,
        "lambda_epochs": 1,
        "num_train_epochs": 0.5,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.01,
        "warmup_steps": 1,
        "max_seq_length": 32,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "tensorboard",
        "output_dir": tmp_path / "out",
        "disable_tqdm": True,
    }
    return ["--do_train", "--do_eval", "--apply_lora", *(str(x) for k, v in values.items() for x in (f"--{k}", v))]


def test_stages_rise_and_leave_a_curve(flags, entry_point, tmp_path, caplog) -> None:
    out = tmp_path / "out"
    metrics = entry_point("SoRA").main(flags)
    said = "3 stages: the first trains for 0.5 epochs, each other for 1; 2.5 epochs in all"
    assert said in caplog.messages and "rising at the end" not in caplog.text
    run = json.loads((out / "run.json").read_text())
    assert [point["lambda"] for point in run["stages"]] == pytest.approx([0.0, 0.1, 0.2])
    assert [point["steps"] for point in run["stages"]] == [2, 4, 4]  # 64 rows: 4 steps per epoch
    remaining = [point["remaining"] for point in run["stages"]]
    assert remaining[0] > remaining[1] > remaining[2]
    assert run["stages"][-1]["metrics"]["eval_accuracy"] == metrics["eval_accuracy"]
    final = load_file(out / "adapter.safetensors")
    left = sum(int(v.count_nonzero()) for k, v in final.items() if k.endswith("lora_gate"))
    assert left == sum(run["stages"][-1]["gates"].values())
    for stage in ("stage-0", "stage-1"):
        assert (out / stage / "adapter.safetensors").is_file() and (out / stage / "run.json").is_file()
    # each stage warms up again: the first logged learning rate of a stage is that of its warm-up
    history = [r for r in json.loads((out / "stage-1" / "run.json").read_text())["history"] if "loss" in r]
    assert history[0]["learning_rate"] < history[1]["learning_rate"] == pytest.approx(0.01)
    (events,) = (out / "runs" / "stages").glob("*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    assert [e.value for e in reader.Scalars("Stages/remaining")] == remaining
    assert len(reader.Scalars("Stages/eval_accuracy")) == 3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_interrupted_stage_goes_on_and_ends_the_same(stage: int, flags, entry_point, tmp_path, monkeypatch) -> None:
    main, out = entry_point("SoRA").main, tmp_path / "out"
    main(flags)
    straight = load_file(out / "adapter.safetensors")
    curve = json.loads((out / "run.json").read_text())["stages"]
    shutil.rmtree(out)

    entered = []
    train = LoRATrainer.train

    def breaking(self, *args, **kwargs):
        entered.append(self.args.output_dir)
        if len(entered) == stage + 1:
            save = self._save_checkpoint

            def interrupt(*a, **k):
                save(*a, **k)
                raise KeyboardInterrupt

            self._save_checkpoint = interrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LoRATrainer, "train", breaking)
    with pytest.raises(KeyboardInterrupt):
        main(flags)
    monkeypatch.setattr(LoRATrainer, "train", train)
    main(flags)
    again = load_file(out / "adapter.safetensors")
    assert all(torch.equal(straight[k], again[k]) for k in straight)
    resumed = json.loads((out / "run.json").read_text())["stages"]
    timeless = lambda points: [  # noqa: E731
        {k: v for k, v in (p | p["metrics"]).items() if "second" not in k and k not in ("metrics", "eval_runtime")}
        for p in points
    ]
    assert timeless(resumed) == timeless(curve)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--lambda_schedule", "exp_linear"], "exp_linear cannot start at sparse_lambda_2 = 0"),
        (["--max_lambda", "0"], "max_lambda must be above sparse_lambda_2 = 0.0, .*it is 0.0"),
        (["--lambda_num", "1"], "lambda_num is 1: a schedule needs 2 or more stages"),
        (["--lambda_epochs", "0"], "lambda_epochs is 0.0, it must be above 0"),
        (["--train_sparse", "False"], "--lambda_schedule needs --train_sparse"),
        (["--lambda_schedule", "cubic"], "invalid choice: 'cubic'"),
    ],
)
def test_bad_schedules_are_refused(changes: list[str], said: str, flags, entry_point) -> None:
    with pytest.raises(InputError, match=said):
        entry_point("SoRA").main([*flags, *changes])


def test_schedule_flags_belong_to_a_schedule(flags, entry_point) -> None:
    at = flags.index("--lambda_schedule")
    with pytest.raises(InputError, match="--max_lambda belongs to a schedule"):
        entry_point("SoRA").main(flags[:at] + flags[at + 2 :])


def test_a_warm_up_that_reaches_the_end_is_warned_of(tiny_model_dir, mrpc_dir, entry_point, tmp_path, caplog) -> None:
    flags = (
        f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --do_train --apply_lora --lora_r 2 "
        "--lora_alpha 4 --max_steps 2 --max_seq_length 32 --report_to none --save_strategy no --learning_rate 0.01"
    ).split()
    for warmup, warned in (("1", False), ("0.4", False), ("2", True), ("200", True)):
        caplog.clear()
        entry_point("AdaLoRA").main([*flags, "--warmup_steps", warmup, "--output_dir", str(tmp_path / warmup)])
        words = f"the warm-up of {warmup} steps reaches the 2 steps of the run"
        assert (words in caplog.text) == warned

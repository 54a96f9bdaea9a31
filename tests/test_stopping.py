"""Early stopping as a user calls it, and its counter over a resume, against the stock callback in a straight run."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from loralib.allocator import RankAllocator
from loralib.errors import InputError
from loralib.glue.stopping import EarlyStopping

TRAIN, EVALUATION = runs.rows(22), runs.rows(9)
# best at step 3 and 6; with patience 2 the run stops at step 5, with 3 it goes on and stops at step 9 of 12
SCORES = dict(enumerate([0, 0.5, 0.4, 0.6, 0.5, 0.6, 0.7, 0.6, 0.7, 0.6, 0.9, 0.9, 0.9]))


def train(folder: Path, callback: Any, checkpoint: Path | None = None, **changes: Any) -> Any:
    best = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}
    usual = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "logging_steps": 2}
    trainer = runs.trainer("lora", runs.arguments(folder, **(usual | best | changes)), TRAIN, EVALUATION)
    trainer.compute_metrics = lambda prediction: {"score": SCORES[trainer.state.global_step]}
    trainer.add_callback(callback)
    trainer.train(str(checkpoint) if checkpoint else None)
    return trainer


def always(step: int) -> bool:
    return True


@pytest.mark.parametrize(("patience", "threshold", "stop"), [(2, 0.0, 5), (3, 0.0, 9), (4, 0.15, 5), (2, 0.15, 3)])
def test_it_stops_where_the_stock_callback_does_and_after_a_resume_too(
    patience: int, threshold: float, stop: int, tmp_path: Path
) -> None:
    stock = train(tmp_path / "stock", EarlyStoppingCallback(patience, threshold))
    straight = train(tmp_path / "straight", callback := EarlyStopping(patience, threshold, always))
    assert stock.state.global_step == straight.state.global_step == callback.stopped_at == stop
    expected = runs.result(straight)
    assert runs.differences(runs.result(stock), expected) == []
    for step in range(1, stop + 1):
        again = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "straight", again)
        for later in range(step + 1, stop + 1):
            shutil.rmtree(again / f"checkpoint-{later}")
        resumed = train(again, callback := EarlyStopping(patience, threshold, always), again / f"checkpoint-{step}")
        assert (resumed.state.global_step, callback.stopped_at) == (stop, stop), f"resumed at step {step}"
        assert runs.differences(expected, runs.result(resumed)) == []
        assert callback.state() == straight.callback_handler.callbacks[-1].state()


def test_evaluations_that_do_not_count_set_no_best(tmp_path: Path) -> None:
    """The best value of all is at step 3; from step 7 on 0.7 at step 8 is the best, so that patience 1 ends at 9."""
    straight = train(tmp_path, callback := EarlyStopping(1, 0.0, lambda step: step >= 7))
    assert straight.state.global_step == callback.stopped_at == 9 and callback.best == 0.7


def test_a_score_that_is_not_a_number_is_never_the_best(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(SCORES, 1, float("nan"))
    assert train(tmp_path, EarlyStopping(2, 0.0, always)).state.global_step == 5


def test_the_allocator_knows_when_its_budget_is_the_target() -> None:
    """Against the masks that it makes: after which steps no more singular values are left than the target."""
    trainer = runs.trainer("adalora", runs.arguments("unused", max_steps=40, learning_rate=0.05), runs.rows(80))
    (allocator,) = trainer.method_state.values()
    assert isinstance(allocator, RankAllocator)
    for interval in (1, 3, 7):
        allocator.restart()
        allocator.mask_interval, allocator.total_step, allocator.init_warmup, allocator.final_warmup = (
            interval,
            40,
            5,
            9,
        )
        within = []
        for step in range(40):
            for p in allocator.parameters:
                p.grad = torch.randn_like(p)
                p.data += 0.1 * torch.randn_like(p)
            allocator.step(step)
            if sum(allocator.ranks().values()) <= allocator.target_total and step >= 31:
                within.append(step + 1)
        assert within == [steps for steps in range(41) if allocator.at_target(steps)]
        assert within == list(range(31 + (1 if interval == 1 else 2), 41))  # T - t_f is 31, which 1 divides


def best_of(
    folder: Path, scores: dict[int, float], resume: int | None = None, final_phase: int = 4, **changes: Any
) -> Any:
    """AdaLoRA for 16 steps, the last 4 at the target budget, with the best of the evaluations as its result."""
    best = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}
    usual = {"max_steps": 16, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 2}
    trainer = runs.trainer("adalora", runs.arguments(folder, **(usual | best | changes)), TRAIN, EVALUATION)
    trainer.compute_metrics = lambda prediction: {"score": scores[trainer.state.global_step]}
    trainer.method_state["allocator"].warmups = (4, final_phase)
    trainer.train(str(folder / f"checkpoint-{resume}") if resume else None)
    return trainer


def test_the_best_model_of_adalora_is_one_at_the_target_budget(tmp_path: Path, caplog: Any) -> None:
    """The best score of all is that of step 4, with all ranks; from step 14 on the budget is the target."""
    scores = dict(enumerate([0, 0, 0.5, 0, 0.9, 0, 0.8, 0, 0.7, 0, 0.6, 0, 0.5, 0, 0.2, 0, 0.1]))
    with caplog.at_level(logging.INFO, logger="loralib"):
        straight = best_of(tmp_path / "straight", scores)
    allocator: Any = straight.method_state["allocator"]
    assert (straight.state.best_global_step, straight.state.best_metric) == (14, 0.2)
    assert 0 < sum(allocator.ranks().values()) <= allocator.target_total
    assert "best score at the target budget: 0.2, at step 14" in caplog.text and "over budget" not in caplog.text
    assert sorted(p.name for p in (tmp_path / "straight").glob("checkpoint-*")) == ["checkpoint-14", "checkpoint-16"]
    best_of(tmp_path / "again", scores, save_total_limit=None)
    shutil.rmtree(tmp_path / "again" / "checkpoint-16")
    shutil.rmtree(tmp_path / "again" / "checkpoint-14")
    resumed = best_of(tmp_path / "again", scores, resume=12, save_total_limit=None)
    assert resumed.state.best_global_step == 14
    assert runs.differences(runs.result(straight), runs.result(resumed)) == []


def test_without_an_evaluation_at_the_target_the_best_one_is_over_budget(tmp_path: Path, caplog: Any) -> None:
    """Without a final phase the last mask, here that of step 15, is still above the target."""
    run = best_of(tmp_path, dict.fromkeys(range(17), 0.3) | {4: 0.9}, final_phase=0)
    allocator: Any = run.method_state["allocator"]
    ranks = sum(allocator.ranks().values())
    assert run.state.best_global_step == 4 and ranks > allocator.target_total
    said = f"the model of step 4 has {ranks} singular values, the target is {allocator.target_total}; raise --final_w"
    assert "it is over budget" in caplog.text and said in caplog.text


@pytest.mark.parametrize(("best", "loaded"), [(6, 4), (2, 16)])
def test_a_best_evaluation_without_a_checkpoint_is_reported(
    best: int, loaded: int, tmp_path: Path, caplog: Any
) -> None:
    """Every second evaluation has a checkpoint: the model that is loaded is not that of the best evaluation."""
    scores = dict.fromkeys(range(17), 0.3) | ({4: 0.8} if best == 6 else {}) | {best: 0.9}
    run = best_of(tmp_path, scores, final_phase=0, save_steps=4, save_total_limit=None)
    assert (run.state.best_global_step, run.loaded_step()) == (best, loaded)
    said = f"the best evaluation was that of step {best}, but no checkpoint of that step is here: the result is the mod"
    assert said in caplog.text and f"model of step {loaded}; save as often as you evaluate" in caplog.text
    if loaded == 4:
        assert "the model of step 4 has" in caplog.text


# ---- from a user's seat ----


@pytest.fixture
def flags(tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path) -> list[str]:
    """24 steps with an evaluation at each second one; with only the head it would hardly move."""
    usual = f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --output_dir {tmp_path / 'out'} "
    usual += "--do_train --do_eval --apply_lora --lora_r 4 --lora_alpha 8 --max_seq_length 24 --max_steps 24 --use_cpu "
    usual += "--disable_tqdm 1 --report_to none --per_device_train_batch_size 8 --learning_rate 0 --logging_steps 2 "
    usual += "--eval_strategy steps --eval_steps 2 --save_steps 2 --early_stopping_patience 3 "
    return (usual + "--metric_for_best_model loss").split()


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_a_run_that_does_not_improve_ends_and_says_so(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any], caplog: Any
) -> None:
    """Nothing moves at learning rate 0: the first evaluation is the best, and the third after it ends the run."""
    with caplog.at_level(logging.INFO, logger="loralib"):
        metrics = entry_point("RM-LoRA").main([*flags, "--random_rank", "2"])
    run = record(tmp_path / "out")
    assert run["steps"] == 8 and run["early_stopping"] == {"stopped_at": 8, "best": metrics["eval_loss"]}
    assert "early stopping: after 3 evaluation(s) in a row that do not improve loss" in caplog.text
    assert "early stopping at step 8 of 24" in caplog.text
    assert "the result is the model of the last step, not the best" in caplog.text
    entry_point("RM-LoRA").main([*flags, "--random_rank", "2"])  # a finished run is not trained further
    assert record(tmp_path / "out")["steps"] == 8


def test_an_interrupted_run_stops_where_the_straight_one_does(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any]
) -> None:
    main = entry_point("AdaLoRA").main
    more = ["--learning_rate", "0.01", "--early_stopping_threshold", "0.5"]
    main([*flags, *more])
    whole = record(tmp_path / "out")
    assert whole["early_stopping"]["stopped_at"] == 8
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    for name in ("checkpoint-8", "checkpoint-6"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "run.json").unlink()
    main([*flags, *more, "--output_dir", str(tmp_path / "cut")])
    again = record(tmp_path / "cut")
    assert again["early_stopping"] == whole["early_stopping"] and again["steps"] == 8
    saved = json.loads((tmp_path / "cut" / "checkpoint-4" / "checkpoint.json").read_text())["progress"]["seconds"]
    assert again["total_seconds"] - again["wall_seconds"] == pytest.approx(saved, abs=0.01) and saved > 0
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("out", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    (tmp_path / "cut" / "run.json").unlink()
    with pytest.raises(InputError, match="early_stopping_patience was 3, is 2"):
        main([*flags, *more, "--output_dir", str(tmp_path / "cut"), "--early_stopping_patience", "2"])


def test_adalora_counts_from_the_final_phase_on(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any], caplog: Any
) -> None:
    """T - t_f is 12: the first evaluation at the target is after 12 + 2 steps, and the third after that after 20."""
    adalora = "--lora_type svd --apply_adalora --target_rank 2 --init_warmup 2 --mask_interval 5 --final_warmup".split()
    main = entry_point("AdaLoRA").main
    with caplog.at_level(logging.INFO, logger="loralib"):
        main([*flags, *adalora, "12"])
    assert record(tmp_path / "out")["early_stopping"]["stopped_at"] == 20
    assert "counted from step 14 on, where the budget is the target" in caplog.text
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="none of the 24 steps reaches it: raise --final_warmup"):
        main([*flags, *adalora, "0", "--overwrite_output_dir"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


def test_sora_stops_within_the_last_stage_only(
    flags: list[str], tmp_path: Path, entry_point: Callable[[str], Any]
) -> None:
    schedule = "--train_sparse --sparse_lambda_2 0.001 --lambda_schedule linear --max_lambda 0.002 --lambda_num 2"
    entry_point("SoRA").main([*flags, *schedule.split()])
    assert record(tmp_path / "out" / "stage-0")["steps"] == 24
    assert record(tmp_path / "out")["steps"] == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"early_stopping_patience": "0"}, "early_stopping_patience is 0, it must be 1 or more"),
        ({"early_stopping_threshold": "-0.1"}, "early_stopping_threshold is -0.1, it must be 0 or more"),
        ({"early_stopping_patience": None, "early_stopping_threshold": "1"}, "needs --early_stopping_patience"),
        ({"eval_strategy": "no"}, "needs evaluations: give --eval_strategy epoch or steps"),
        ({"metric_for_best_model": None}, "needs --metric_for_best_model, the name of a score or loss"),
        ({"metric_for_best_model": "f2"}, "metric_for_best_model is 'f2', for mrpc it must be one of loss, accuracy"),
    ],
)
def test_what_cannot_stop_is_refused(
    change: dict[str, str | None], said: str, flags: list[str], entry_point: Callable[[str], Any]
) -> None:
    for name, value in change.items():
        if f"--{name}" in flags:
            at = flags.index(f"--{name}")
            del flags[at : at + 2]
        flags += [f"--{name}", value] if value is not None else []
    with pytest.raises(InputError, match=said):
        entry_point("AdaLoRA").main(flags)

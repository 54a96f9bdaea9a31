"""What each evaluation adds: ranks and spectrum in history and TensorBoard, and the scores of the held-out half."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loralib.adapters.reading import read_state
from loralib.glue.data import GlueData
from loralib.glue.evaluation import HELDOUT, split_heldout
from loralib.glue.tasks import GLUE

ROOT = Path(__file__).resolve().parents[1]


def load(path: str) -> ModuleType:
    """A file as a module."""
    name = "loaded_" + path.replace("/", "_").replace("-", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def halves(rows: int, seed: int) -> dict[str, Dataset]:
    data = GlueData(GLUE["mnli"], None, {k: Dataset.from_dict({"idx": range(rows)}) for k in ("mnli", "mnli-mm")}, {})
    split_heldout(data, seed)
    return data.evals


@pytest.mark.parametrize("rows", [10, 277])
def test_halves_are_disjoint_complete_and_fixed_by_the_seed(rows: int) -> None:
    found = halves(rows, 1)
    choose, report = set(found["mnli"]["idx"]), set(found[HELDOUT]["idx"])
    assert not choose & report and choose | report == set(range(rows)) and abs(len(choose) - len(report)) <= 1
    assert len(found["mnli-mm"]) == rows
    assert list(found["mnli"]["idx"]) == sorted(choose) == list(halves(rows, 1)["mnli"]["idx"])
    assert set(halves(rows, 2)["mnli"]["idx"]) != choose


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, not pre-trained, and 48 rows for it."""
    folder = tmp_path_factory.mktemp("evaluated")
    embedded = load("scripts/embedded.py")
    embedded.build_data(folder / "mrpc", train=48, validation=31, test=2)
    embedded.build_model(folder / "model", steps=0)
    return folder


def train(inputs: Path, out: Path, flags: str) -> Path:
    """An AdaLoRA run from rank 4 to 2 with an evaluation after each epoch of 6 steps."""
    load("AdaLoRA/run_glue.py").main(
        f"--model_name_or_path {inputs / 'model'} --dataset_name {inputs / 'mrpc'} --output_dir {out} "
        "--do_train --do_eval --eval_strategy epoch --per_device_train_batch_size 8 --learning_rate 5e-2 "
        "--max_seq_length 24 --apply_lora --lora_type svd --apply_adalora --lora_r 4 --lora_alpha 8 --target_rank 2 "
        f"--use_cpu --disable_tqdm 1 --report_to tensorboard {flags}".split()
    )
    return out


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """A short run with --heldout_split."""
    flags = "--num_train_epochs 2 --init_warmup 7 --final_warmup 2 --mask_interval 1 --heldout_split 3"
    return train(inputs, inputs / "out", flags)


def test_history_has_the_ranks_and_spectrum_of_each_evaluation(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    watched = [e for e in run["history"] if "effective_rank" in e]
    assert [e["step"] for e in watched] == [6, 12]
    state = {k: v.double() for k, v in read_state(finished).items()}
    names = [k.removesuffix(".lora_A") for k in state if k.endswith("lora_A")]
    assert watched[0]["rank_total"] == 4 * len(names)  # t_i lies behind the first evaluation
    assert watched[1]["rank_total"] == 2 * len(names) == run["target_total_rank"]
    effective, remaining = [], 0
    for name in names:
        A, B, E = (state[f"{name}.lora_{kind}"] for kind in "ABE")
        values = torch.linalg.svdvals(B @ (E * A))[:4]
        share = values[values > 1e-9] / values.sum()
        effective.append(float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0)
        remaining += int(E.count_nonzero()) * (A.shape[1] + B.shape[0])
    assert watched[1]["effective_rank"] == pytest.approx(np.mean(effective), rel=1e-4)
    assert watched[1]["remaining"] == remaining == run["parameters"]["remaining"]


def test_between_two_masks_the_history_has_what_the_last_mask_kept(inputs: Path, tmp_path: Path) -> None:
    """Every value that was zeroed grows again at the next step, so that counting those other than 0 shows no budget."""
    flags = "--num_train_epochs 4 --init_warmup 2 --final_warmup 6 --mask_interval 4 --logging_steps 6"
    out = train(inputs, tmp_path / "out", flags)
    run = json.loads((out / "run.json").read_text())
    matrices = len(run["ranks"])
    watched = [e for e in run["history"] if "rank_total" in e]

    def budget(step: int) -> int:
        """Equation 12 with t_i = 2 and t_f = 6 of T = 24 steps."""
        return int(2 * matrices + 2 * matrices * (1 - (step - 2) / 16) ** 3) if step <= 18 else 2 * matrices

    # the steps before the evaluations are 5, 11, 17 and 23; masks were made at 4, 8, 16 and 23
    assert [(e["step"], e["rank_total"]) for e in watched] == [
        (6, budget(4)), (12, budget(8)), (18, budget(16)), (24, 2 * matrices),
    ]  # fmt: skip
    assert [e["budget"] for e in watched] == [budget(5), budget(11), budget(17), 2 * matrices]
    assert [e["rank_nonzero"] for e in watched] == [4 * matrices] * 3 + [2 * matrices]
    assert watched[3]["remaining"] == watched[3]["remaining_nonzero"] == run["parameters"]["remaining"]
    full = run["parameters"]["lora"] - 4 * matrices  # without the singular values themselves
    assert [e["remaining_nonzero"] for e in watched[:3]] == [full] * 3
    assert full > watched[0]["remaining"] > watched[1]["remaining"] > watched[2]["remaining"] > 0
    events = EventAccumulator(str(next((out / "runs").rglob("events*")).parent)).Reload()
    shown = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert shown["Watch/rank_total"] == [e["rank_total"] for e in watched]
    ranks = [values for tag, values in shown.items() if tag.startswith("Ranknum/")]
    assert np.sum(ranks, axis=0).tolist() == shown["Watch/rank_total"]
    assert shown["Budget/nonzero_rank"] == [e["rank_nonzero"] for e in watched]


def test_a_run_that_goes_on_after_its_last_step_has_the_budget_of_that_step(inputs: Path, tmp_path: Path) -> None:
    flags = "--num_train_epochs 2 --init_warmup 2 --final_warmup 3 --save_strategy epoch --eval_strategy no"
    record = train(inputs, tmp_path / "out", flags) / "run.json"
    straight = json.loads(record.read_text())["history"]
    record.unlink()  # as a kill in the evaluation at the end leaves the folder
    train(inputs, tmp_path / "out", flags)
    again = json.loads(record.read_text())["history"]
    assert straight[-1]["budget"] == straight[-1]["rank_total"] == 2 * 12
    assert again[-1] == straight[-1]


def test_heldout_half_is_evaluated_whenever_the_other_is(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    heldout = [e for e in run["history"] if "heldout_accuracy" in e]
    assert [e["step"] for e in heldout] == [6, 12] and run["metrics"]["eval_samples"] == 16
    assert run["heldout"]["heldout_accuracy"] == heldout[-1]["heldout_accuracy"]
    for half, rows in ((HELDOUT, 15), ("eval", 16)):  # of two classes the larger has at least half of the rows
        share = run["one_class"][f"{half}_accuracy"]
        assert 0.5 <= share < 1 and rows * share == pytest.approx(round(rows * share))
    right = 15 * heldout[-1]["heldout_accuracy"]  # 15 rows, apart from the 16
    assert right == pytest.approx(round(right))


def test_tensorboard_has_each_matrix_and_the_heatmap(finished: Path) -> None:
    events = EventAccumulator(str(next((finished / "runs").rglob("events*")).parent), size_guidance={"images": 0})
    events.Reload()
    assert [e.step for e in events.Images("Watch/ranks")] == [6, 12]
    matrices = [tag for tag in events.Tags()["scalars"] if tag.startswith("EffectiveRank/")]
    assert len(matrices) == 12 and "Watch/rank_total" in events.Tags()["scalars"]


def test_at_the_end_every_number_is_of_the_best_model(inputs: Path, tmp_path: Path) -> None:
    """eval_*, heldout_*, ranks, counts and predictions are those that an evaluation of its checkpoint has."""
    best = "--load_best_model_at_end --metric_for_best_model loss --save_strategy epoch --do_predict --heldout_split 3"
    schedule = "--num_train_epochs 4 --init_warmup 2 --final_warmup 16 --mask_interval 4"
    out = train(inputs, tmp_path / "out", f"{best} {schedule}")
    run = json.loads((out / "run.json").read_text())
    during = {e["step"]: e for e in reversed(run["history"]) if "eval_loss" in e}
    step = min((12, 18, 24), key=lambda step: during[step]["eval_loss"])  # at step 6 the budget is not the target yet
    assert step != 24, "the last model is the best one here, so that this test tells nothing"

    alone = tmp_path / "alone"
    load("AdaLoRA/run_glue.py").main(
        f"--model_name_or_path {inputs / 'model'} --dataset_name {inputs / 'mrpc'} --output_dir {alone} --do_eval "
        f"--do_predict --heldout_split 3 --max_seq_length 24 --lora_path {out / f'checkpoint-{step}'} --apply_lora "
        "--lora_type svd --lora_r 4 --lora_alpha 8 --use_cpu --disable_tqdm 1 --report_to none".split()
    )
    same = json.loads((alone / "run.json").read_text())
    for record in (run["metrics"], run["heldout"]):
        expected = same["metrics"] if record is run["metrics"] else same["heldout"]
        for name in ("eval_loss", "eval_accuracy", "eval_f1", "heldout_loss", "heldout_accuracy", "heldout_f1"):
            if name in record:
                assert record[name] == pytest.approx(expected[name]), name
    assert {"heldout_loss", "heldout_f1"} <= run["heldout"].keys()
    assert run["parameters"]["remaining"] == same["parameters"]["remaining"]
    assert {k: m["rank"] for k, m in run["parameters"]["modules"].items()} == run["ranks"]
    predicted = "predict_results_mrpc.txt"
    assert (out / predicted).read_text() == (alone / predicted).read_text()

    *_, scores, heldout = [e for e in run["history"] if "eval_loss" in e or "heldout_loss" in e]
    assert scores["eval_loss"] == run["metrics"]["eval_loss"]
    assert heldout["heldout_loss"] == run["heldout"]["heldout_loss"]
    assert scores["model_of_step"] == heldout["model_of_step"] == step and scores["step"] == heldout["step"] == 24
    seen = next(e for e in run["history"] if e["step"] == step and "rank_total" in e)
    for name in ("rank_total", "remaining", "effective_rank", "budget", "rank_nonzero", "remaining_nonzero"):
        assert heldout[name] == pytest.approx(seen[name]), name

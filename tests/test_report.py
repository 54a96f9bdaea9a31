"""Reports: numbers against scipy and full matrices; every run counted or listed; figures with nothing cut."""

import csv
import importlib.util
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from safetensors.numpy import save_file
from scipy import stats

from loralib.report import comparison, drawing, figures, page, tuning
from loralib.report.runs import Run
from loralib.report.spectrum import adapter_spectra, effective_rank, singular_values
from loralib.report.style import METHODS as METHODS_WITH_COLOURS
from loralib.sweep.records import compact, read_result

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj",
         "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
METHODS = {"lora": 8, "adalora": 12, "sora": 8, "rm-lora-v1": 4, "rm-lora-v2": 8}


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


report = load("report")


def make_run(
    folder: Path, method: str, task: str = "rte", seed: int = 1, r: int = 8, layers: int = 2, **changes: Any
) -> dict:
    """The results file and adapter of a run of ten evaluations; `accuracies` are those of its evaluations."""
    rng = np.random.default_rng([seed, sum(map(ord, method + task))])
    names = [f"deberta.encoder.layer.{i}.{kind}" for i in range(layers) for kind in KINDS]
    ranks = {n: int(rng.integers(0, r + 1)) if method in ("adalora", "sora") else r for n in names}
    accuracies = changes.pop("accuracies", np.sort(rng.uniform(0.5, 0.9, 10)).tolist())
    history: list[dict[str, Any]] = []
    for i, accuracy in enumerate(accuracies, 1):
        at = {"epoch": float(i), "step": 78 * i}
        history.append({"eval_accuracy": accuracy, "eval_loss": 1 / i, **at})
        left = sum(ranks.values()) if i > 5 else r * len(names)
        watched = {"rank_total": left, "remaining": 64 * left, "effective_rank": r / 2 + i / 10}
        history.append({"heldout_accuracy": 1 - accuracy / 2, **watched, **at})
    metrics = {"eval_accuracy": accuracies[-1], "eval_loss": 0.1}
    history.append(metrics | {"epoch": float(len(accuracies)), "step": 78 * len(accuracies)})
    modules = {n: {"trainable": 64 * r, "rank": k, "remaining": 64 * k} for n, k in ranks.items()}
    run = {
        "version": 1, "status": "finished", "method": method, "task": task, "seed": seed, "effective_batch": 32,
        "arguments": {"lora_r": r, "seed": seed, "model_name_or_path": "here/deberta-v3-base", "reg_orth_coef": 0.0},
        "steps": 78 * len(accuracies), "metrics": metrics, "history": history, "wall_seconds": 100.0 + seed,
        "parameters": {"trainable": 64 * r * len(names) + 1000, "lora": 64 * r * len(names), "head": 1000,
                       "remaining": 64 * sum(ranks.values()), "modules": modules},
    } | changes  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    state = {f"{n}.lora_A": rng.normal(size=(r, 32)).astype("float32") for n in names}
    state |= {f"{n}.lora_B": rng.normal(size=(32, r)).astype("float32") for n in names}
    save_file(state, folder / "adapter.safetensors")
    (folder / "adapter.json").write_text(json.dumps({"scaling": dict.fromkeys(names, 16 / r)}))
    return run


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look only at tables."""
    monkeypatch.setattr(page, "draw", lambda *_: ({}, []))


def text_of(root: Path, *args: str) -> str:
    assert report.main([str(root), *args]) == 0
    return (root / "report.md").read_text()


# ---- numbers ----


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 10**6))
def test_singular_values_are_those_of_the_full_update(r: int, inner: int, outer: int, gated: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lora_A, lora_B = rng.normal(size=(r, inner)), rng.normal(size=(outer, r))
    diagonal = rng.normal(size=r) * (rng.random(r) < 0.7) if gated else None
    full = 1.5 * lora_B @ np.diag(np.ones(r) if diagonal is None else diagonal) @ lora_A
    expected = np.linalg.svd(full, compute_uv=False)[: min(r, inner, outer)]
    found = singular_values(lora_A, lora_B, diagonal, scaling=-1.5)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_effective_rank_between_one_and_the_number_of_directions() -> None:
    assert effective_rank(np.full(7, 0.3)) == pytest.approx(7)
    assert effective_rank(np.array([2.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) == 0
    values = np.array([4.0, 2, 1, 1])
    assert effective_rank(values) == pytest.approx(np.exp(stats.entropy(values))) == effective_rank(10 * values)


def test_adapter_spectra_know_gates_and_scaling(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    A, B, gate = rng.normal(size=(4, 10)), rng.normal(size=(6, 4)), np.array([[1.0, 0, -2, 0]])
    save_file({"x.lora_A": A, "x.lora_B": B, "x.lora_gate": gate}, tmp_path / "adapter.safetensors")
    (tmp_path / "adapter.json").write_text('{"scaling": {"x": 2.0}}')
    expected = np.linalg.svd(2 * B @ np.diag(gate[0]) @ A, compute_uv=False)[:4]
    np.testing.assert_allclose(adapter_spectra(tmp_path)["x"], expected, atol=1e-12)
    (tmp_path / "adapter.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="adapter.safetensors is cut short"):
        adapter_spectra(tmp_path)


def test_paired_interval_is_scipys() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(1, 1, 6), rng.normal(0, 1, 6)
    # seed 9 has no partner and does not count
    n, mean, half = comparison.paired(dict(enumerate(ours)) | {9: 100.0}, dict(enumerate(theirs)))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert n == 6 and (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert comparison.verdict(2, 5.0, float("inf")) == "too few pairs to tell (n = 2)"
    assert [comparison.verdict(5, m, 1.0) for m in (-2, 0.5, 2)] == ["lower", "no difference seen", "higher"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test(p: list[float]) -> None:
    """A hypothesis is rejected when Bonferroni rejects every set of hypotheses that holds it."""
    sets = [s for k in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), k)]
    expected = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(len(p))]
    assert comparison.holm(p) == pytest.approx(expected)
    assert np.isnan(comparison.holm([float("nan"), 0.01])[0]) and comparison.holm([float("nan"), 0.01])[1] == 0.01


def test_p_is_scipys() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    expected = stats.ttest_rel(ours, theirs).pvalue
    assert comparison.p_value(dict(enumerate(ours)), dict(enumerate(theirs))) == pytest.approx(expected)
    assert np.isnan(comparison.p_value({1: 2.0, 2: 3.0}, {1: 1.0, 2: 1.0}))
    same = {seed: 1.0 for seed in range(3)}  # no test, and so none that the others are corrected for
    assert np.isnan(comparison.p_value(same, same)) and np.isnan(comparison.p_value(same, dict.fromkeys(same, 0.1)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.booleans())
def test_the_band_is_the_deviation_over_all_subsets(scores: list[float], error: bool) -> None:
    best = min if error else max
    found = tuning.best_of_trials(scores, "mse" if error else "accuracy")
    for k, (mean, deviation) in enumerate(found, 1):
        bests = [best(subset) for subset in itertools.combinations(scores, k)]
        assert (mean, deviation) == pytest.approx((statistics.fmean(bests), statistics.pstdev(bests)), abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.booleans())
def test_expected_best_is_the_mean_over_all_subsets(scores: list[float], error: bool) -> None:
    best = min if error else max
    expected = [statistics.fmean(best(s) for s in itertools.combinations(scores, k)) for k in range(1, len(scores) + 1)]
    found = [mean for mean, _ in tuning.best_of_trials(scores, "mse" if error else "accuracy")]
    assert found == pytest.approx(expected)


def test_published_rows_average_as_the_papers_say() -> None:
    """GLUE's rule: a task counts once, MNLI and QQP with the mean of their two numbers."""
    for paper in json.loads((ROOT / "scripts" / "published.json").read_text()).values():
        for row in paper["rows"]:
            by_task: dict[str, list[float]] = {}
            for column, value in zip(paper["columns"], row["values"], strict=True):
                by_task.setdefault(column.split()[0], []).append(value)
            if row["values"][0] is not None:
                mean = statistics.mean(statistics.mean(values) for values in by_task.values())
                assert mean == pytest.approx(row["average"], abs=0.01), row  # the papers cut rather than round


# ---- the report ----


def test_table_holds_mean_deviation_and_every_run(tmp_path: Path) -> None:
    last: dict[str, list[float]] = {}
    for method, r in METHODS.items():
        for seed in (1, 2, 3):
            run = make_run(tmp_path / "rte" / method / f"seed{seed}", method, seed=seed, r=r)
            last.setdefault(method, []).append(100 * run["metrics"]["eval_accuracy"])
    make_run(tmp_path / "rte" / "lora-orth" / "seed1", "lora", arguments={"lora_r": 8, "seed": 1, "reg_orth_coef": 0.1})
    make_run(tmp_path / "rte" / "sora" / "seed4", "sora", seed=4, status="diverged")
    cut = tmp_path / "rte" / "sora" / "seed5"
    make_run(cut, "sora", seed=5)
    (cut / "run.json").write_text((cut / "run.json").read_text()[:-40])
    killed = tmp_path / "rte" / "sora" / "seed6"
    (killed / "checkpoint-5").mkdir(parents=True)
    token = "hf_" + 34 * "a"
    (killed / "run.log").write_text(f"training\nrun_glue.py: error: the disk is full, {token}\nlast\n")
    text = text_of(tmp_path)
    for method, values in last.items():
        expected = f"| {method} | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (n=3) |"
        assert expected in text
    difference = np.subtract(last["adalora"], last["lora"])
    assert f"| rte, adalora | 3 | {difference.mean():+.2f} |" in text
    assert "| rte, lora-orth | 1 |" in text and "too few pairs to tell (n = 1)" in text
    listed = text[text.index("## Runs that do not count") :]
    assert "`rte/sora/seed4`: sora on rte, seed 4: diverged" in listed
    assert "`rte/sora/seed5`: its results file is cut short" in listed
    assert "`rte/sora/seed6`: no results file" in listed and "the disk is full" in listed
    assert token not in listed and "last" not in listed.partition("the disk is full")[2].partition("\n")[0]
    assert "seed1" not in listed
    with open(tmp_path / "report.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * len(METHODS) + 1 + 3
    first = next(line for line in lines if line["method"] == "adalora" and line["seed"] == "2")
    assert 100 * float(first["accuracy"]) == pytest.approx(last["adalora"][1])
    published = text[text.index("## Published") :]
    assert "| LoRA r=8 | 1.33M | 85.20 | 88.34 |" in published and "arXiv 2303.10512" in published
    for name in ("curves_rte", "budget_rte", "ranks_rte_adalora", "ranks_rte_sora", "spectra_rte", "comparison"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and f"({name}.png)" in text


@pytest.mark.usefixtures("no_figures")
def test_a_score_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", "lora", accuracies=[0.9, 0.6, 0.8])
    for entry in run["history"][:2]:
        entry |= {k: float("nan") for k in entry if k == "eval_accuracy"}
    (tmp_path / "one" / "run.json").write_text(json.dumps(run))
    for selection, score in (("best", "80.00"), ("heldout", "60.00")):
        assert f"| lora | {score} (n=1) |" in text_of(tmp_path, "--selection", selection)


@pytest.mark.usefixtures("no_figures")
def test_selection_last_best_and_heldout(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "lora", accuracies=[0.5, 0.8, 0.7])
    for selection, expected in (("last", "70.00"), ("best", "80.00"), ("heldout", "60.00")):
        text = text_of(tmp_path, "--selection", selection)
        assert f"| lora | {expected} (n=1) |" in text and f"Selection: **{selection}**" in text
    make_run(tmp_path / "b", "lora", seed=2, history=[])
    assert "1 runs have no evaluation for this selection" in text_of(tmp_path, "--selection", "heldout")


@pytest.mark.usefixtures("no_figures")
def test_each_evaluation_stands_beside_the_parameters_that_remained_then(tmp_path: Path) -> None:
    """SoRA prunes more and more: the best evaluation, the third of four, has not the parameters of the end."""
    run = make_run(tmp_path / "a", "sora", accuracies=[0.5, 0.6, 0.9, 0.7])
    left = [7000, 6000, 5000, 4000]
    for entry in run["history"]:
        if "remaining" in entry:
            entry["remaining"] = left[entry["step"] // 78 - 1]
    run["parameters"]["remaining"] = 4000
    (tmp_path / "a" / "run.json").write_text(json.dumps(run))
    for selection, remaining in (("last", 4000), ("best", 5000), ("heldout", 5000)):
        text = text_of(tmp_path, "--selection", selection)
        assert re.search(rf"\| rte, sora \| 1 \| [\d,]+ \| {remaining:,} \|", text)
        with open(tmp_path / "report.csv") as file:
            assert [line["remaining"] for line in csv.DictReader(file)] == [f"{remaining}"]


def allocated(folder: Path, accuracies: list[float], nonzero: list[int], **changes: Any) -> dict[str, Any]:
    """An AdaLoRA run of target 24 with the singular values other than 0 at each evaluation."""
    run = make_run(folder, "adalora", accuracies=accuracies)
    for entry in run["history"]:
        if "rank_total" in entry:
            ranks = nonzero[entry["step"] // 78 - 1]
            entry |= {"rank_total": min(ranks, 30), "budget": min(ranks, 30), "rank_nonzero": ranks,
                      "remaining": 1, "remaining_nonzero": 64 * ranks}  # fmt: skip
    run |= {"target_total_rank": 24, "total_rank": nonzero[-1]} | changes
    (folder / "run.json").write_text(json.dumps(run))
    return run


@pytest.mark.usefixtures("no_figures")
def test_adalora_is_judged_at_its_target_budget(tmp_path: Path) -> None:
    """The evaluation with the best score of all has 96 ranks; those of the final phase have 24."""
    allocated(tmp_path / "a", [0.9, 0.8, 0.6, 0.5], [96, 96, 24, 24])
    for selection, score in (("best", "60.00"), ("heldout", "70.00")):
        text = text_of(tmp_path, "--selection", selection)
        assert f"| adalora | {score} (n=1) |" in text and "the choice is among evaluations at the target budget" in text
        assert f"| {64 * 24:,} |" in text and "over budget" not in text
    assert "the choice is among evaluations" not in text_of(tmp_path)


@pytest.mark.usefixtures("no_figures")
def test_adalora_without_an_evaluation_at_its_target_is_over_budget(tmp_path: Path) -> None:
    allocated(tmp_path / "a", [0.9, 0.8], [96, 90])
    said = "rte, adalora, seed 1: {} singular values, target 24"
    text = text_of(tmp_path, "--selection", "best")
    assert (
        said.format(96) in text
        and "none of their evaluations was at the target" in text
        and "| adalora | 90.00 (n=1) |" in text
    )
    assert f"| {64 * 96:,} |" in text
    text = text_of(tmp_path)
    assert "1 run(s) are reported over budget**: " + said.format(90) in text


def test_a_record_without_the_target_has_it_from_its_flags(tmp_path: Path) -> None:
    run = allocated(tmp_path / "a", [0.9, 0.6, 0.5], [96, 24, 24])
    matrices = len(run["parameters"]["modules"])
    del run["target_total_rank"], run["total_rank"]
    for flags, best in (({"target_rank": 24 / matrices}, 0.6), ({"target_total_rank": 30}, 0.6), ({}, 0.9)):
        arguments = run["arguments"] | {"apply_adalora": True} | flags
        assert Run(tmp_path, run | {"arguments": arguments}).chosen("best")["accuracy"] == best


@pytest.mark.usefixtures("no_figures")
def test_scores_of_one_answer_for_every_row_are_named(tmp_path: Path) -> None:
    """CoLA's 0.00 ± 0.00 is a model that answers one class; so is an accuracy of exactly the largest class's share."""
    for seed, score in ((1, 0.0), (2, 0.0)):
        metrics = {"eval_matthews_correlation": score, "eval_loss": 0.6}
        make_run(tmp_path / "cola" / f"{seed}", "lora", task="cola", seed=seed, metrics=metrics)
        metrics["eval_matthews_correlation"] += seed - 1
        make_run(tmp_path / "cola" / f"s{seed}", "sora", task="cola", seed=seed, metrics=metrics)
    share = {"one_class": {"eval_accuracy": 0.75, "heldout_accuracy": 0.8}}
    make_run(tmp_path / "rte", "lora", accuracies=[0.4, 0.75], **share)  # the held-out score is 1 - 0.75 / 2
    text = text_of(tmp_path)
    assert "| lora | 0.00 ± 0.00 (n=2, as one class) | 75.00 (n=1, as one class) |" in text
    assert "| sora | 50.00 ± 70.71 (n=2) | - |" in text
    assert "what one class for every row scores: cola, lora, seed 1, 2; cola, sora, seed 1; rte, lora, seed 1." in text
    assert "as one class" not in text_of(tmp_path, "--selection", "heldout")


@pytest.mark.usefixtures("no_figures")
def test_costs_are_means_over_all_processes_and_leave_the_head_out(tmp_path: Path) -> None:
    """One run was resumed (its last process took 101 s); full fine-tuning trains everything but has one head, too."""
    memory = {"peak_memory": {"mb": 1500.0, "of": "tensors on the fullest GPU of the first process"}}
    run = make_run(tmp_path / "1", "lora", total_seconds=299.0, evaluation_rows_per_second=250.0, **memory)
    make_run(tmp_path / "2", "lora", seed=2, **memory)
    make_run(tmp_path / "full", "full", parameters={"trainable": 184_000_000, "lora": 0, "head": 592_130})
    text = text_of(tmp_path)
    factors = f"{run['parameters']['lora']:,}"
    assert f"| rte, lora | 2 | {factors} | {factors} | 1,000 | 780 | 200 | 1,500 | 250 | 0.11 |" in text
    assert "| rte, full | 1 | 183,407,870 | - | 592,130 | 780 | 101 | - | - | 0.03 |" in text
    assert "the most memory in use, tensors on the fullest GPU of the first process." in text
    with open(tmp_path / "report.csv") as file:
        assert [line["seconds"] for line in csv.DictReader(file)] == ["101", "299", "102"]


def test_parameters_that_remain_of_other_libraries_are_not_known(tmp_path: Path) -> None:
    """Unknown ranks (PEFT's layers) are shown as unknown; if all gates are 0, the number is 0."""
    counts = {"trainable": 3000, "lora": 2000, "head": 1000, "remaining": 0, "modules": {}}
    assert Run(tmp_path, {"parameters": counts}).remaining("last") is None
    pruned = counts | {"modules": {"a": {"rank": 0}, "b": {"rank": 0}}}
    assert Run(tmp_path, {"parameters": pruned}).remaining("last") == 0
    record = compact({"arguments": {}, "parameters": pruned})
    assert Run(tmp_path, record).remaining("last") == 0


@pytest.mark.usefixtures("no_figures")
def test_the_mismatched_half_is_never_chosen_as_the_best_evaluation(tmp_path: Path) -> None:
    """The final evaluation of MNLI logs its mismatched half under the matched half's names."""
    run = make_run(tmp_path / "a", "lora", task="mnli", accuracies=[0.5, 0.6])
    run["history"].append({"eval_accuracy": 0.9, "epoch": 2.0, "step": 156})
    run["metrics"] |= {"eval_accuracy_mm": 0.9}
    (tmp_path / "a" / "run.json").write_text(json.dumps(run))
    assert "| lora | 60.00 / 90.00 (n=1) |" in text_of(tmp_path)
    assert "| lora | 60.00 / - (n=1) |" in text_of(tmp_path, "--selection", "best")


def test_grid_is_named_by_what_differs_and_compared_at_equal_budget(tmp_path: Path) -> None:
    for r in (2, 4):
        for method in ("lora", "rm-lora-v2"):
            for seed in (1, 2, 3):
                make_run(tmp_path / f"{method},{r}" / f"{seed}", method, seed=seed, r=r)
    text = text_of(tmp_path)
    assert "| rte, rm-lora-v2 lora_r=4 | 3 |" in text and "no LoRA run" not in text
    assert (tmp_path / "frontier_rte.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_arms_of_one_method_are_told_apart(tmp_path: Path) -> None:
    """A user's entry point that trains LoRA does not count as the LoRA run; it is compared with the LoRA run."""
    for seed in (1, 2, 3):
        for arm, more in (("lora", 0.0), ("my-start", 0.05)):
            make_run(tmp_path / "rte" / arm / f"seed{seed}", "lora", seed=seed, accuracies=[0.7 + seed / 100 + more])
    text = text_of(tmp_path)
    assert "| lora | 72.00 ± 1.00 (n=3) |" in text and "| my-start | 77.00 ± 1.00 (n=3) |" in text
    assert "| rte, my-start | 3 | +5.00 |" in text and "Some seeds have several runs" not in text
    (tmp_path / "alone").mkdir()
    (tmp_path / "rte" / "my-start").rename(tmp_path / "alone" / "any-name")
    text = text_of(tmp_path / "alone")
    assert "| lora | 77.00" in text


def test_stages_are_one_run(tmp_path: Path) -> None:
    stages = [
        {"lambda": i * 1e-4, "remaining": 9000 - 1000 * i, "metrics": {"eval_accuracy": 0.6 + i / 100}, "steps": 780}
        for i in range(3)
    ]
    make_run(tmp_path / "s", "sora", stages=stages)
    for i in range(2):
        make_run(tmp_path / "s" / f"stage-{i}", "sora", seed=1 + i, accuracies=[0.95 - 0.3 * i, 0.5])
    text = text_of(tmp_path, "--selection", "best")
    assert text.startswith("# Results\n\n1 finished runs") and "| sora | 95.00 (n=1) |" in text
    assert "| rte, sora, seed 1 | 0.0002 | 7,000 | 62.00 |" in text
    assert "| rte, sora | 1 | " in text and f" | {780 + 2 * 156:,} | " in text
    assert (tmp_path / "lambda_rte_sora.png").exists()
    tables = text.split("## Figures")[0]
    record = compact(read_result(tmp_path / "s" / "run.json") or {}, "sora")
    (tmp_path / "all.jsonl").write_text(json.dumps(record) + "\n")
    assert report.main([str(tmp_path / "all.jsonl"), "--selection", "best"]) == 0
    assert (tmp_path / "report.md").read_text().split("## Figures")[0] == tables


@pytest.mark.usefixtures("no_figures")
def test_a_schedule_of_trainings_is_not_compared_with_one_training(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        make_run(tmp_path / f"lora{seed}", "lora", seed=seed)
        make_run(tmp_path / f"sora{seed}", "sora", seed=seed, stages=[{"lambda": 0.0}, {"lambda": 1e-4}])
    assert "not compared: trainings in a row 2 against 1 |" in text_of(tmp_path)


def test_nothing_to_report_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "no run.json below" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_an_evaluation_of_a_trained_adapter_is_listed_and_not_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "trained", "lora")
    make_run(tmp_path / "again", "lora", metrics={}, arguments=run["arguments"] | {"do_train": False})
    text = text_of(tmp_path)
    assert "1 finished runs" in text and f"{100 * run['metrics']['eval_accuracy']:.2f} (n=1)" in text
    assert "`again`: lora on rte: evaluation or prediction without training" in text


@pytest.mark.usefixtures("no_figures")
def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "trained", "lora")
    (tmp_path / "file").write_text("")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert "the report cannot be written" in error and "--out" in error and len(error.splitlines()) == 1


@pytest.mark.usefixtures("no_figures")
def test_settings_stand_beside_the_scores(tmp_path: Path) -> None:
    for method, own in (
        ("lora", {}),
        ("adalora", {"target_rank": 4, "beta1": 0.85}),
        ("sora", {"sparse_lambda_2": 0.1}),
    ):
        arguments = {"seed": 1, "learning_rate": 0.001, "num_train_epochs": 3.0, "lora_r": 8, "lora_alpha": 16.0,
                     "weight_decay": 0.1, "padding": "fixed"} | own  # fmt: skip
        metrics = {"eval_accuracy": 0.5, "train_samples": 2490, "eval_samples": 138}
        make_run(tmp_path / method, method, arguments=arguments, metrics=metrics)
    text = text_of(tmp_path)
    assert "| rte, lora | 0.001 | 3.0 | 8 | 16.0 | 32 | 2490 | 138 | - |" in text
    assert "| rte, adalora | 0.001 | 3.0 | 8 | 16.0 | 32 | 2490 | 138 | target_rank 4, beta1 0.85 |" in text
    assert "| rte, sora | 0.001 | 3.0 | 8 | 16.0 | 32 | 2490 | 138 | sparse_lambda_2 0.1 |" in text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("lora", "sora", "selection", "said"),
    [
        ({"eval_samples": [9, 277, 277]}, {"eval_samples": [277, 277, 9]}, "last", "eval rows 277, 9 against 277, 9"),
        (
            {"train_file": ["a.csv"] * 3},
            {"train_file": ["x/a.csv", "a.csv", "b.csv"]},
            "last",
            "train_file b.csv against a.csv",
        ),
        ({"eval_steps": [10] * 3}, {"eval_steps": [78] * 3}, "best", "evaluations each 78 steps against 10 steps"),
        ({"eval_steps": [10] * 3}, {"eval_steps": [78] * 3}, "last", None),
    ],
)
def test_each_pair_must_agree(
    tmp_path: Path, lora: dict[str, list[Any]], sora: dict[str, list[Any]], selection: str, said: str | None
) -> None:
    for method, own in (("lora", lora), ("sora", sora)):
        for seed in range(3):
            values = {name: of[seed] for name, of in own.items()}
            arguments = {"seed": seed, "eval_strategy": "steps"} | {
                k: v for k, v in values.items() if "samples" not in k
            }
            metrics = {"eval_accuracy": 0.5 + seed / 10} | {k: v for k, v in values.items() if "samples" in k}
            make_run(tmp_path / method / f"{seed}", method, seed=seed, arguments=arguments, metrics=metrics)
    text = text_of(tmp_path, "--selection", selection)
    assert ("not compared" in text) == (said is not None) and (said is None or f"not compared: {said} |" in text)


@pytest.mark.usefixtures("no_figures")
def test_runs_on_other_rows_are_not_paired(tmp_path: Path) -> None:
    """An edited copy with fewer rows or epochs is not paired silently: the setting is named."""

    def one(method: str, seed: int, samples: int = 277, limit: int | None = None) -> None:
        arguments = {"seed": seed, "max_eval_samples": limit}
        metrics = {"eval_accuracy": 0.5 + seed / 10, "eval_samples": samples}
        make_run(tmp_path / method / f"{seed}", method, seed=seed, arguments=arguments, metrics=metrics)

    for seed in (1, 2, 3):
        one("lora", seed)
        one("sora", seed)
        one("adalora", seed, limit=64)
        one("rm-lora-v1", seed, samples=9)
    text = text_of(tmp_path)
    assert "| rte, adalora | 3 | - | - | - | not compared: max_eval_samples 64 against None |" in text
    assert "| rte, rm-lora-v1 | 3 | - | - | - | not compared: eval rows 9 against 277 |" in text
    assert re.search(r"\| rte, sora \| 3 \| [+-]\d", text)


@pytest.mark.usefixtures("no_figures")
def test_a_results_file_gives_the_report_of_its_folders(tmp_path: Path) -> None:
    from loralib.sweep.records import ResultsFile

    file = ResultsFile(tmp_path / "committed" / "results.jsonl")
    for method, r in METHODS.items():
        for seed in (1, 2, 3):
            file.add(make_run(tmp_path / "runs" / method / f"seed{seed}", method, seed=seed, r=r), method)
    with open(file.path, "a") as lines:
        lines.write('{"version": 1, "arguments": {}, "steps": "x"}\n')
    for selection in ("last", "best", "heldout"):
        whole = text_of(tmp_path / "runs", "--selection", selection)
        assert report.main([str(file.path), "--selection", selection]) == 0
        small = (file.path.parent / "report.md").read_text()
        listed = (
            "\n\n## Runs that do not count\n\n- `line 16`: its record is not one of this project's: steps is not a "
            "number"
        )
        assert listed in small and small.replace(listed, "") == whole
    assert report.main([str(tmp_path / "runs")]) == 0


@pytest.mark.usefixtures("no_figures")
def test_tuned_sweep_reports_final_runs_and_its_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(method: str, value: float, seed: int, score: float) -> None:
        arguments = {"seed": seed, "learning_rate": value, "model_name_or_path": "m"}
        folder = tmp_path / "rte" / f"{method},learning_rate={value}" / f"seed{seed}"
        make_run(folder, method, seed=seed, arguments=arguments, metrics={"eval_accuracy": score})

    choices = []
    for method, best, scores in (("lora", 0.002, [0.6, 0.7]), ("sora", 0.001, [0.8, None])):
        trials = [{"values": {"learning_rate": f"{v}"}, "seed": 1, "score": s, "status": "finished"}
                  for v, s in zip((0.001, 0.002), scores, strict=True)]  # fmt: skip
        choices.append({"task": "rte", "method": method, "metric": "accuracy", "values": {"learning_rate": f"{best}"},
                        "mean": max(s for s in scores if s), "edges": ["learning_rate"], "scores": trials})  # fmt: skip
        for value in (0.001, 0.002):
            run(method, value, 1, 0.1)
            for seed in (2, 3, 4) if value == best else ():
                run(method, value, seed, 0.9)
    tuned = {"version": 1, "selection": "last", "tune_seeds": [1], "seeds": [2, 3, 4], "choices": choices}
    (tmp_path / "tuning.json").write_text(json.dumps(tuned))
    text = text_of(tmp_path)
    assert "| lora | 90.00 ± 0.00 (n=3) |" in text and "10.00" not in text and "4 trials and runs with other" in text
    assert "| rte, lora | learning_rate 0.002 | 2 | 0 | 70.00 | at the edge of its grid: learning_rate |" in text
    assert "| rte, sora | learning_rate 0.001 | 2 | 1 | 80.00 |" in text and "same number of trials" in text
    assert "| rte, lora | 65.00 | 70.00 |" in text
    waiting = tmp_path / "mrpc" / "lora,learning_rate=0.001" / "seed1"  # a task for which nothing is chosen yet
    make_run(waiting, "lora", task="mrpc", seed=1, arguments={"seed": 1, "learning_rate": 0.001})
    text = text_of(tmp_path)
    assert "mrpc, lora" not in text and "On mrpc nothing is chosen yet; trials finished so far: 1." in text
    shutil.rmtree(waiting)
    assert "**on the rows that are reported above**" in text and "No final run" not in text
    choices.append(
        choices[0] | {"method": "adalora", "scores": [choices[0]["scores"][0] | {"over_budget": [9, 5]}] * 2}
    )
    (tmp_path / "tuning.json").write_text(json.dumps(tuned))
    text = text_of(tmp_path, "--selection", "heldout")
    assert "No final run with the chosen values is finished yet: rte, adalora." in text
    assert "scored above AdaLoRA's target budget: rte, adalora." in text
    assert "on the half of the validation rows that is not reported above" in text
    choices.pop()
    choices[0]["scores"].pop()
    (tmp_path / "tuning.json").write_text(json.dumps(tuned))
    assert "different numbers of trials" in text_of(tmp_path)
    tables = text_of(tmp_path).split("## Cost")[0]
    records = (json.dumps(json.loads(f.read_text())) for f in sorted(tmp_path.rglob("run.json")))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "all.jsonl").write_text("\n".join(records))
    (tmp_path / "alone" / "all.tuning.json").write_text(json.dumps(tuned))
    assert report.main([str(tmp_path / "alone" / "all.jsonl"), "--out", str(tmp_path / "alone")]) == 0
    assert (tmp_path / "alone" / "report.md").read_text().split("## Cost")[0] == tables
    (tmp_path / "alone" / "all.tuning.json").unlink()  # a copy without it
    records = [
        json.loads(line) | {"trial": True} for line in (tmp_path / "alone" / "all.jsonl").read_text().splitlines()
    ]
    (tmp_path / "alone" / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert report.main([str(tmp_path / "alone" / "all.jsonl")]) == 2
    assert "copy the file all.tuning.json from beside the original" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "alone")
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- report: Chosen values -->\nold\n<!-- end of report -->\n\nAfter.\n")
    assert report.main([str(tmp_path), "--page", str(page)]) == 0
    chosen = tables.split("## Chosen values\n\n")[1].split("\n\n## ")[0]
    filled = f"Before.\n\n<!-- report: Chosen values -->\n\n{chosen}\n\n<!-- end of report -->\n\nAfter.\n"
    assert page.read_text() == filled
    page.write_text("<!-- report: Choices -->\nold\n<!-- end of report -->\n")
    assert report.main([str(tmp_path), "--page", str(page)]) == 2 and "old" in page.read_text()
    page.unlink()

    # the folder of a task, and one that holds several sweeps
    scores = tables.split("## Scores")[1].split("\n\n## ")[0]
    assert scores in text_of(tmp_path / "rte")
    base = tmp_path.parent / "several"
    for name in ("first", "second"):
        shutil.copytree(tmp_path, base / name)
    assert report.main([str(base)]) == 2 and "both have a choice for rte, lora" in capsys.readouterr().err
    for file in (base / "second").rglob("run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"task": "qnli"}))
    for choice in choices:
        choice["task"] = "qnli"
    (base / "second" / "tuning.json").write_text(json.dumps(tuned))
    make_run(base / "plain" / "rte" / "full" / "seed1", "full", seed=1, metrics={"eval_accuracy": 0.7})
    assert "70.00 (n=1)" in text_of(base)  # a sweep without tuning has no trials
    make_run(base / "plain" / "rte" / "sora" / "seed1", "sora", seed=1, metrics={"eval_accuracy": 0.7})
    assert "70.00 (n=1)" in text_of(base / "plain")
    shutil.rmtree(base / "plain")
    more = json.loads((base / "first" / "tuning.json").read_text())  # another tuning seed, whose trials have begun
    opened = [
        {"task": "rte", "method": "lora", "points": [{"learning_rate": "0.002"}], "tune_seeds": [1, 4], "seeds": [2]}
    ]
    (base / "first" / "tuning.json").write_text(json.dumps(more | {"open": opened}))
    assert "| lora | 90.00 ± 0.00 (n=2) |" in text_of(base / "first" / "rte")
    (base / "first" / "tuning.json").write_text(json.dumps(more))
    text = text_of(base)
    assert "| lora | 90.00 ± 0.00 (n=3) | 90.00 ± 0.00 (n=3) |" in text and "8 trials and runs with other" in text
    for folder in tmp_path.rglob("seed[234]"):  # before the first final run
        shutil.rmtree(folder)
    assert "No final run with the chosen values is finished yet: rte, lora; rte, sora." in text_of(tmp_path)
    (tmp_path / "tuning.json").write_text("{")
    assert report.main([str(tmp_path)]) == 2


@pytest.mark.usefixtures("no_figures")
def test_settings_that_do_nothing_are_not_shown(tmp_path: Path) -> None:
    """A flag whose switch is off is not shown: full fine-tuning has no lora_type, LoRA no mask_interval."""
    own = {"lora_type": "frd", "reg_orth_coef": 0.0, "mask_interval": 10, "lora_module": "query"}
    make_run(tmp_path / "full", "full", arguments={"apply_lora": False, "apply_adalora": False, **own})
    make_run(tmp_path / "lora", "lora", arguments={"apply_lora": True, "apply_adalora": False, **own})
    make_run(tmp_path / "ada", "adalora", arguments={"apply_lora": True, "apply_adalora": True, **own})
    lines = {line.split("|")[1].split(",")[1].strip(): line for line in text_of(tmp_path).splitlines()
             if line.startswith("| rte,") and line.count("|") == 10}  # fmt: skip
    assert lines["full"].endswith("| - |") and lines["lora"].endswith("| lora_type frd |")
    assert lines["adalora"].endswith("| apply_adalora True, lora_type frd, mask_interval 10 |")


@pytest.mark.usefixtures("no_figures")
def test_the_report_says_where_its_numbers_come_from(tmp_path: Path) -> None:
    """Hours of all runs, machines, versions and commits, with files that were changed."""
    cpu = {"gpus": [], "cpu": "Some CPU", "threads": 2}
    same = {"versions": {"torch": "2.13.0"}, "total_seconds": 5400.0}
    make_run(tmp_path / "a", "lora", seed=1, hardware=cpu, commit="0123456789abcdef", **same)
    make_run(tmp_path / "b", "lora", seed=2, hardware={"gpus": ["H100"]}, commit="fedcba9876543210+changes", **same)
    said = text_of(tmp_path).split("## Where the numbers come from\n\n")[1].split("\n\n")[0].splitlines()
    assert said == [
        "- 2 finished runs, trials included, took 3.0 hours in sum.",
        "- Hardware: H100; Some CPU (threads: 2).",
        "- Versions: torch 2.13.0.",
        "- Commits: 0123456; fedcba9+changes.",
    ]


HOSTILE = r"$\frac{x <b>|`__init__` =cmd"


def test_a_bad_folder_is_listed_and_the_rest_is_reported(tmp_path: Path) -> None:
    """Every folder that is not as this project writes it is listed with its reason; the rest is reported and drawn."""
    good = make_run(tmp_path / "good", "lora")
    deep = "[" * 100_000
    broken = {
        "nested": '{"version": 1, "metrics": ' + deep,
        "mapping": json.dumps(good | {"steps": {"a": 1}}),
        "rank": json.dumps(good | {"arguments": {"lora_r": {}}}),
        "null": json.dumps(good | {"arguments": None}),
        "list": "[]",
        "binary": "\0\0",
    }
    for name, text in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    for name, kind in (("stage-last", "odd"), ("stage-0", "stages")):  # only stage-N is a stage
        make_run(tmp_path / kind, "sora", seed=5)
        make_run(tmp_path / kind / name, "sora", status="finished" if kind == "odd" else 3)
    make_run(tmp_path / "points", "sora", task="sst2", stages=[{}, {"lambda": 1.0}])  # a curve without its numbers
    text = text_of(tmp_path)
    listed = text[text.index("## Runs that do not count") :]
    for name, reason in (
        ("nested", "its results file is cut short or not JSON"),
        ("mapping", "its results file is not one of this project's: steps is not a number"),
        ("rank", "arguments.lora_r is not a number"),
        ("null", "arguments is not a mapping"),
        ("list", "is not one of this project's (version 1)"),
        ("binary", "cut short or not JSON"),
        ("folder", "its results file cannot be read: Is a directory"),
        ("stages", "the results file of its stage-0 is not one of this project's: status is not a text"),
    ):
        (line,) = (line for line in listed.splitlines() if line.startswith(f"- `{name}`: "))
        assert reason in line
    assert "`good`" not in listed and f"{100 * good['metrics']['eval_accuracy']:.2f}" in text
    assert "(curves_rte.png)" in text and "The figure lambda_sst2_sora could not be drawn" in text


def test_names_of_users_are_text_everywhere(tmp_path: Path) -> None:
    """Formulas, HTML, bars and backticks in names and logs; formulas of a spreadsheet; too many modules; bf16."""
    for seed in (1, 2):
        make_run(tmp_path / f"a`b|c{seed}", HOSTILE, task="=2+3", seed=seed)
    modules = {f"model.{i}.part{i % 70}": {"rank": i % 8} for i in range(300)}
    make_run(tmp_path / "many", "adalora", parameters={"trainable": 1, "lora": 1, "remaining": 1, "modules": modules})
    failed = tmp_path / "<img src=x>"
    failed.mkdir()
    (failed / "run.log").write_text("error: <script>alert(1)</script> | $\\alpha$ [a](b)\n")
    text = text_of(tmp_path)
    outside = re.sub(r"`+[^`].*?`+", "", text)  # a code span shows what it holds
    assert "<" not in outside.replace("±", "") and "could not be drawn" not in text
    assert r"\$\\frac\{x &lt;b&gt;\|\`\_\_init\_\_\` =cmd" in text
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \| \$\\alpha\$ \[a\](b)" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| =2")}
    assert widths == {7, 10, 11}  # differences, settings, costs: no row has more bars than its table
    with open(tmp_path / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["task"] for line in lines if line["seed"]] == ["'=2+3", "'=2+3", "rte"]
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert re.fullmatch(r"[\w.=-]+\.png", name) and (tmp_path / name).stat().st_size > 5000


def test_adapters_in_bf16_have_a_spectrum(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_tensors

    A, B = torch.randn(3, 10).bfloat16(), torch.randn(6, 3).bfloat16()
    save_tensors({"x.lora_A": A, "x.lora_B": B}, tmp_path / "adapter.safetensors")
    (tmp_path / "adapter.json").write_text('{"scaling": {"x": 0.5}}')
    expected = torch.linalg.svdvals(0.5 * B.double() @ A.double())[:3].numpy()
    np.testing.assert_allclose(adapter_spectra(tmp_path)["x"], expected, atol=1e-12)
    for text in ("{}", "[" * 100_000, '{"scaling": {}}', '{"scaling": {"x": "a"}}', '{"scaling": 3}'):
        (tmp_path / "adapter.json").write_text(text)
        with pytest.raises(ValueError, match="adapter"):
            adapter_spectra(tmp_path)


def test_report_does_not_wait_for_torch() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "scripts" / "report.py")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


# ---- figures ----


def test_trials_are_drawn_at_their_values_with_the_others_at_theirs() -> None:
    """Two flags: a point of the first flag's panel has the second flag's chosen value."""
    grid = [(lr, r, seed) for lr in ("1e-3", "3e-3", "1e-2") for r in ("4", "8") for seed in (1, 2)]
    score = {(lr, r): 0.5 + 0.1 * i for i, (lr, r) in enumerate(itertools.product(("1e-3", "3e-3", "1e-2"), "48"))}
    trials = [{"values": {"learning_rate": lr, "lora_r": r}, "seed": seed, "status": "finished",
               "score": None if (lr, r, seed) == ("1e-2", "8", 2) else score[lr, r] + seed / 100}
              for lr, r, seed in grid]  # fmt: skip
    choice = {"metric": "accuracy", "values": {"learning_rate": "3e-3", "lora_r": "8"}, "scores": trials}
    by_rate = tuning.scores_by_value(choice, "learning_rate")
    assert by_rate == {"1e-3": pytest.approx([0.61, 0.62]), "3e-3": pytest.approx([0.81, 0.82]), "1e-2": [1.01, None]}
    assert tuning.scores_by_value(choice, "lora_r") == {
        "4": pytest.approx([0.71, 0.72]),
        "8": pytest.approx([0.81, 0.82]),
    }
    assert sorted(tuning.trial_scores(choice))[:2] == pytest.approx([0.51, 0.51])  # the worst stands for the lost one
    figure = figures.tuning(
        {"learning_rate": {"lora": by_rate}}, {"lora": choice["values"]}, {"lora": [(0.7, 0.1), (0.8, 0.0)]}, "m", "t"
    )
    panel, last = figure.axes
    assert panel.get_xscale() == "log" and [t.get_text() for t in panel.get_xticklabels()] == ["1e-3", "3e-3", "1e-2"]
    drawn = {(line.get_marker(), line.get_fillstyle()): line.get_xydata().tolist() for line in panel.lines}
    assert drawn["o", "full"] == [[1e-3, pytest.approx(0.61)], [1e-3, pytest.approx(0.62)], [3e-3, pytest.approx(0.81)],
                                  [3e-3, pytest.approx(0.82)], [1e-2, pytest.approx(1.01)]]  # fmt: skip
    assert drawn["o", "none"] == [[3e-3, pytest.approx(0.815)]]
    assert drawn["x", "full"][0][0] == 1e-2
    assert last.lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.8]]
    words = figures.tuning(
        {"optim": {"lora": {"adamw": [0.5], "sgd": [0.6]}}}, {"lora": {}}, {"lora": [(1, 0)]}, "m", "t"
    )
    assert [t.get_text() for t in words.axes[0].get_xticklabels()] == ["adamw", "sgd"]


@pytest.mark.parametrize(
    ("differences", "comparisons", "said"),
    [
        ([1.0, 2.0, 1.5], 1, "scored 1.50 points of accuracy higher than LoRA (95 % interval +0.26 to +2.74, 3 pairs"),
        ([-1.0, -2.0, -1.5], 1, "scored 1.50 points of accuracy lower than LoRA"),
        ([1.0, 2.0, 1.5], 3, "but p = 0.105 after correction for 3 comparisons: this is a hint, not a finding."),
        ([1.0, -2.0, 1.5], 1, "no difference between sora and LoRA was seen (+0.17 points of accuracy, 95 % interval"),
        ([1.0, 2.0], 1, "nothing can be said of sora against LoRA from 2 pairs of runs (+1.50 points of accuracy)."),
        ([1.0], 1, "from one pair of runs (+1.00 points of accuracy)."),
        ([0.0] * 3, 1, "the differences of all 3 pairs of runs are equal (+0.00 points of accuracy), and no interval"),
        ([1.0] * 3, 1, "the differences of all 3 pairs of runs are equal (+1.00 points of accuracy), and no interval"),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_a_sentence_says_what_the_numbers_carry(
    tmp_path: Path, differences: list[float], comparisons: int, said: str
) -> None:
    for seed, difference in enumerate(differences):
        make_run(tmp_path / "lora" / f"{seed}", "lora", seed=seed, accuracies=[0.5 + seed / 50])
        ours = 0.5 + seed / 50 + difference / 100
        make_run(tmp_path / "sora" / f"{seed}", "sora", seed=seed, accuracies=[ours])
        for other in range(comparisons - 1):
            make_run(
                tmp_path / f"other{other}" / f"{seed}", f"other{other}", seed=seed, accuracies=[0.5 + seed**2 / 99]
            )
    assert said in text_of(tmp_path)


@cache
def all_figures() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = [f"{m}{v}" for m in METHODS for v in ("", " lora_r=16", " learning_rate=0.0005")]
    x = list(range(1, 21))
    bands = {n: (x, 80 + rng.random(20), np.ones(20)) for n in names}
    ranks = {f"deberta.encoder.layer.{i}.{kind}": float(rng.integers(0, 13)) / 2 for i in range(24) for kind in KINDS}
    stages = [{"lambda": i * 1e-4, "remaining": 1_300_000 - i * 100_000, "metrics": {"m": 0.8}} for i in range(7)]
    dots = {n: (80 + rng.random(5)).tolist() for n in names}
    return {
        "heatmap": figures.rank_heatmap(ranks, "mnli, adalora learning_rate=0.0005: rank left\nmean of 5 seed(s)", 12),
        "small heatmap": figures.rank_heatmap(
            {"model.0.dense": 2.0}, "rte, sora: rank left of 8\nmean of 2 seed(s)", 8
        ),
        "heatmap with lines": figures.rank_heatmap(
            {f"model.{i}.{kind}": 2.0 for i in range(2) for kind in KINDS},
            "rte, adalora: a title " * 4,
            8,
            {"accuracy (%)": (x, [80.0] * 20, np.ones(20)), "ranks kept, all matrices": (x, x, np.ones(20))},
            "adalora",
        ),
        "curves": figures.curves({"accuracy (%)": bands, "validation loss": bands}, "epoch", "rte: mean over seeds"),
        "comparison": figures.comparison({t: ("accuracy (%)", dots) for t in ("rte", "mrpc", "mnli", "cola")}, "dots"),
        "one task": figures.comparison({"rte": ("accuracy (%)", {"lora": [80.0]})}, "a title that is " * 9, {"rte": 5}),
        "nine tasks": figures.comparison({f"t{i}": ("m (%)", dots) for i in range(9)}, "dots", {"t0": 79.0}),
        "long names": figures.curves(
            {"m": {f"a-name-of-many-letters-{'longer-' * i} and=settings, of=many": bands["lora"] for i in range(7)}},
            "epoch",
            "title",
        ),
        "frontier": figures.frontier({n: [(1e5, 80, 1), (1e6, 81, 1)] for n in names}, "accuracy (%)", "rte: budget"),
        "stages": figures.stages({"1": stages, "2": stages, "30": stages}, "m", "accuracy (%)", "rte, sora"),
        "spectra": figures.spectra({n: (np.exp(-np.arange(8.0)), rng.random(72) * 8) for n in names}, "rte: updates"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "heatmap",
        "small heatmap",
        "heatmap with lines",
        "curves",
        "comparison",
        "one task",
        "nine tasks",
        "long names",
        "frontier",
        "stages",
        "spectra",
    ],
)
def test_figures_lie_inside_their_page(name: str) -> None:
    figure = all_figures()[name]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = figure.get_tightbbox(canvas.get_renderer())  # of everything with ink, in inches
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.01
    assert np.ptp(figures.as_image(figure)) == 255


def test_heatmap_has_a_cell_for_each_layer_and_kind() -> None:
    ranks = {f"bert.encoder.layer.{i}.{kind}": float(10 * i + k) for i in (0, 3) for k, kind in enumerate(KINDS)}
    kinds, layers, values = figures.rank_grid(ranks)
    assert kinds == ["query_proj", "key_proj", "value_proj", "attention.output", "intermediate", "output"]
    assert layers == [0, 3] and values[:, 1].tolist() == [30, 31, 32, 33, 34, 35]


def texts_of(figure: Any) -> list[str]:
    """All that is written in a figure, as it is drawn."""
    FigureCanvasAgg(figure).draw()
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def test_ticks_that_differ_are_written_differently() -> None:
    """Parameters of the factors between 330,000 and 330,400 are not all 330k."""
    stages = [{"lambda": i * 1e-4, "remaining": 330_000 + 100 * i, "metrics": {"m": 0.5 + i / 50}} for i in range(5)]
    points = {"lora": [(330_000.0, 80.0, 1.0)], "sora": [(330_400.0, 81.0, None)]}
    for figure in (figures.stages({"1": stages}, "m", "m", "t"), figures.frontier(points, "m", "t")):
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                inside = [t.label1.get_text() for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
                assert len(inside) > 1 and len(set(inside)) == len(inside)


def test_seeds_have_a_legend_and_two_of_them_no_bar() -> None:
    stage = [{"lambda": 0.0, "remaining": 5, "metrics": {"m": 0.5}}]
    assert {"seed 3", "seed 40"} <= set(texts_of(figures.stages({"3": stage, "40": stage}, "m", "m", "t")))
    for n, bars in ((2, 0), (3, 1)):
        figure = figures.comparison({"rte": ("m", {"lora": [80.0, 81.0, 83.0][:n]})}, "t")
        assert sum(bool(c.get_segments()) for c in figure.axes[0].findobj(LineCollection)) == bars
        assert any(f"n = {n}" in text for text in texts_of(figure))
    uneven = texts_of(figures.comparison({"rte": ("m", {"lora": [80.0, 81.0], "sora": [80.0]})}, "t"))
    assert "n = 2" in uneven and "n = 1" in uneven
    for deviation, bars in ((None, 0), (1.0, 1)):
        figure = figures.frontier({"lora": [(5.0, 80.0, deviation)]}, "m", "t")
        assert sum(bool(c.get_segments()) for c in figure.axes[0].findobj(LineCollection)) == bars
    series = [Run(Path(), {"history": [{"eval_loss": i + e, "step": e} for e in (1, 2)]}) for i in (0, 3, 6)]
    assert drawing.band(series[:2], "eval_loss", "step", 1.0) == ([1, 2], [2.5, 3.5], [0, 0])
    assert drawing.band(series, "eval_loss", "step", 1.0) == ([1, 2], [4, 5], [3, 3])


def test_the_score_of_one_class_is_drawn_where_it_is_near_and_written_where_it_is_far() -> None:
    for score, lines, said in ((79.0, 1, "dotted: one class for every row, 79.0"), (20.0, 0, "every row: 20.0")):
        figure = figures.comparison({"rte": ("m", {"lora": [80.0, 82.0]})}, "t", {"rte": score})
        assert sum(list(line.get_xdata()) == [score, score] for line in figure.axes[0].lines) == lines
        assert any(said in text for text in texts_of(figure))
        assert figure.axes[0].get_xlim()[0] > 70


def inside(figure: Any) -> None:
    """Every marker of every line lies within its panel."""
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        for line in axes.lines:
            places = line.get_transform().transform(line.get_xydata())
            box = axes.bbox.padded(1)
            assert all(box.contains(*place) for place in places), line.get_label()


def test_methods_of_one_budget_stand_side_by_side_within_the_frontier() -> None:
    """Three grid points at one budget a method: no method pushes another out of the panel, and no line joins them."""
    names = ("lora", "rm-lora-v1", "rm-lora-v2", "lora-orth", "mine", "yours")
    points = {name: [(331_776.0, 20.0 + i + k, None) for i in range(3)] for k, name in enumerate(names)}
    figure = figures.frontier({"sora": [(180_000.0, 25.0, None)], **points}, "m", "t")
    inside(figure)
    drawn = [line for line in figure.axes[0].lines if line.get_marker() not in ("", "None", None)]
    assert {line.get_linestyle() for line in drawn} == {"None"}
    places = {float(line.get_transform().transform(line.get_xydata())[0, 0]) for line in drawn}
    assert len(places) == len(names) + 1
    joined = figures.frontier({"sora": [(1e5, 80.0, None), (2e5, 81.0, None)]}, "m", "t")
    assert "-" in {line.get_linestyle() for line in joined.axes[0].lines}


def test_rows_of_a_comparison_are_one_for_all_tasks() -> None:
    """A method that one task lacks keeps its row there; labels of several lines do not touch the next."""
    long = "my-very-long-variant-name-with-rank-32 lora_alpha=16.0, lora_r=8"
    figure = figures.comparison({"rte": ("m", {"lora": [8.0], long: [7.0]}), "cola": ("m", {"lora": [1.0]})}, "t")
    said = texts_of(figure)
    assert said.count("lora") == 1 and "n = 0" in said
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))


def test_a_trial_without_a_score_is_below_all_dots() -> None:
    flags = {"lr": {name: {"1e-3": [0.8, 0.5], "3e-3": [None]} for name in ("lora", "adalora", "sora")}}
    figure = figures.tuning(
        flags, dict.fromkeys(flags["lr"], {"lr": "1e-3"}), {n: [(1, 0)] for n in flags["lr"]}, "m", "t"
    )
    inside(figure)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    at = [tuple(line.get_transform().transform(line.get_xydata())[0]) for line in crosses]
    assert len(set(at)) == 3 and max(y for _, y in at) < figure.axes[0].transData.transform((1e-3, 0.5))[1] - 5


def test_a_grid_of_many_points_has_a_figure_a_method(tmp_path: Path) -> None:
    """Twenty lines in one panel are unreadable; the points of one method run from dark to light."""
    for method in ("lora", "adalora"):
        for r in range(1, 8):
            arguments = {"lora_r": r, "seed": 1}
            make_run(tmp_path / f"{method}{r}", method, r=r, layers=1, arguments=arguments)
    text = text_of(tmp_path)
    figures_made = set(re.findall(r"!\[.*?\]\((.*?)\.png\)", text))
    assert {"curves_rte_lora", "curves_rte_adalora", "budget_rte_lora", "spectra_rte_adalora"} <= figures_made
    assert "curves_rte" not in figures_made
    names = [f"lora lora_r={r}" for r in range(1, 8)]
    grey = [float(np.dot(figures.style(name, names)["color"][:3], (0.3, 0.59, 0.11))) for name in names]
    assert grey == sorted(grey) and min(np.diff(grey)) > 0.03


def test_counts_begin_at_zero_and_what_is_not_zero_is_drawn_only_where_it_differs(tmp_path: Path) -> None:
    band = ([1, 2], [288.0, 280.0], [0.0, 0.0])
    figure = figures.curves({"ranks": {"adalora": band, "adalora (nonzero)": band}}, "step", "t", None, True)
    low, high = figure.axes[0].get_ylim()
    assert low == 0 and high > 300 and [t.get_text() for t in figure.legends[0].get_texts()] == ["adalora"]
    drawn: dict[str, tuple[Any, ...]] = {}
    folder = drawing.Folder(tmp_path)
    folder.save = lambda name, draw, *arguments: drawn.update({name: arguments})  # type: ignore[method-assign]
    for nonzero, names in (([9, 5], ["adalora"]), ([9, 9], ["adalora", "adalora (nonzero)"])):
        history = [{"rank_total": k, "rank_nonzero": n, "remaining": 1, "effective_rank": 1, "step": k}
                   for k, n in zip((9, 5), nonzero, strict=True)]  # fmt: skip
        runs = {"adalora": [Run(tmp_path / "none", {"history": history})]}
        drawing._draw_lines(folder, "rte", "rte", runs, "accuracy", "accuracy (%)", None, "the validation rows")
        panels, _, title, *_ = drawn["budget_rte"]
        assert list(next(iter(panels.values()))) == names and ("dotted" in title) == (len(names) > 1)


def test_a_method_has_one_colour_and_no_two_share_it() -> None:
    names = [
        "lora",
        "lora lora_r=2",
        "adalora",
        "sora",
        "rm-lora-v1",
        "rm-lora-v2",
        "lora-orth",
        "full",
        "mine",
        "yours",
        "a third",
    ]
    colours = {name: figures.style(name, names)["color"] for name in names}
    assert colours["lora"] == colours["lora lora_r=2"] and len(set(colours.values())) == len(names) - 1
    assert figures.style("lora", names) != figures.style("lora lora_r=2", names)
    known = {figures.style(name, names)["marker"] for name in names if name in METHODS_WITH_COLOURS}
    assert not known & {figures.style(name, names)["marker"] for name in ("mine", "yours", "a third")}

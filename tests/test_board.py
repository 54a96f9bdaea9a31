"""The HPARAMS and CUSTOM SCALARS tabs of a sweep's folder, asked of TensorBoard's own server."""

import json
import logging
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard import program

from loralib.glue.board import RESULTS

COMMON = (
    "--do_train --do_eval --max_steps 6 --per_device_train_batch_size 8 --learning_rate 0.02 --max_seq_length 24 "
    "--eval_strategy steps --eval_steps 3 --save_strategy no --logging_steps 1 --use_cpu --disable_tqdm 1 "
    "--report_to tensorboard"
)
LOW_RANK = "--apply_lora --lora_r 4 --lora_alpha 8 "
RUNS = {
    "full": ("AdaLoRA", "--learning_rate 1e-4"),
    "lora": ("AdaLoRA", LOW_RANK + "--seed 7"),
    "adalora": (
        "AdaLoRA",
        LOW_RANK
        + "--lora_type svd --apply_adalora --target_rank 2 --final_warmup 2 --mask_interval 1 --reg_orth_coef 0.5",
    ),
    "sora": (
        "SoRA",
        LOW_RANK + "--train_sparse --sparse_lambda 0.1 --sparse_lambda_2 0.001 --lambda_schedule linear "
        "--max_lambda 0.01 --lambda_num 2",
    ),
    "rm-lora": ("RM-LoRA", LOW_RANK + "--random_rank 1 --lora_type v2 --reg_orth_coef 0.1"),
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: Any, tiny_model_dir: Path, mrpc_dir: Path, entry_point: Any) -> Path:
    """A run of every method."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, (entry, own) in RUNS.items():
        where = f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --output_dir {folder / name} "
        entry_point(entry).main((where + COMMON + " " + own).split())
    return folder


@pytest.fixture(scope="module")
def url(sweep: Path) -> Iterator[str]:
    """The server on a free port; its reader looks at every file once more at each request."""
    server = program.TensorBoard()
    server.configure(
        argv=["tensorboard", "--logdir", str(sweep), "--port", "0", "--host", "127.0.0.1", "--load_fast", "false"]
    )
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    address = server.launch()
    until = time.time() + 60
    while time.time() < until:  # it reads the files while it answers
        tags = [set(of_run) for of_run in get(address, "plugin/scalars/tags").values()]
        if sum(RESULTS[-1] in names for names in tags) == 6 and any("Stages/remaining" in names for names in tags):
            break
        time.sleep(0.1)
    yield address


def get(address: str, path: str, question: dict[str, Any] | None = None) -> Any:
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(f"{address}data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def table(address: str) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Row -> (hyperparameters, results), as the tab's table, parallel coordinates and scatter ask for them."""
    experiment = get(address, "plugin/hparams/experiment", {"experimentName": ""})
    metrics = [info["name"] for info in experiment["metricInfos"]]
    assert [m["tag"] for m in metrics] == list(RESULTS)
    columns = [{"hparam": info["name"]} for info in experiment["hparamInfos"]] + [{"metric": m} for m in metrics]
    question = {"experimentName": "", "colParams": columns, "startIndex": 0, "sliceSize": 100}
    question["allowedStatuses"] = ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"]
    rows = {}
    for group in get(address, "plugin/hparams/session_groups", question)["sessionGroups"]:
        values = {value["name"]["tag"]: value["value"] for value in group.get("metricValues", [])}
        assert group["name"].startswith(group["hparams"]["method"])
        rows[os.path.basename(group["name"])] = group["hparams"], values
        assert {session["status"] for session in group["sessions"]} == {"STATUS_SUCCESS"}
    return rows


def test_every_run_is_a_row_with_all_columns(sweep: Path, url: str) -> None:
    rows = table(url)
    assert rows.keys() == {*RUNS, "stage-0"}  # a row's name ends with the run's folder
    for name, (parameters, values) in rows.items():
        record = json.loads(((sweep / "sora" if name == "stage-0" else sweep) / name / "run.json").read_text())
        assert set(values) == set(RESULTS), name
        assert values["Final/score"] == pytest.approx(record["metrics"]["eval_combined_score"])
        assert values["Final/loss"] == pytest.approx(record["metrics"]["eval_loss"])
        left = "trainable" if name == "full" else "remaining"
        assert values["Final/remaining_parameters"] == record["parameters"][left]
        assert values["Final/seconds"] == pytest.approx(record["wall_seconds"], abs=2)
        assert parameters["seed"] == record["seed"] and parameters["batch"] == record["effective_batch"] == 8
        assert parameters["method"] == record["method"] and parameters["task"] == "mrpc" and parameters["steps"] == 6
        assert parameters["model"] == "deberta-v3-base"
        assert parameters["learning_rate"] == pytest.approx(record["arguments"]["learning_rate"])
    columns = {name: row[0] for name, row in rows.items()}
    assert {frozenset(c) for c in columns.values()} == {frozenset(columns["lora"])}
    ranks = {name: tuple(c[k] for k in ("r", "alpha", "random_rank", "target_rank")) for name, c in columns.items()}
    assert ranks == {
        "full": (0, 0, 0, 0), "lora": (4, 8, 4, 4), "adalora": (4, 8, 4, 2), "sora": (4, 8, 4, 4),
        "stage-0": (4, 8, 4, 4), "rm-lora": (4, 8, 1, 4),
    }  # fmt: skip
    weights = {n: tuple(c[k] for k in ("threshold", "gate_l1_weight", "penalty_weight")) for n, c in columns.items()}
    assert weights == {
        "full": (0, 0, 0), "lora": (0, 0, 0), "adalora": (0, 0, 0.5), "sora": (0.01, 0.1, 0),
        "stage-0": (0.001, 0.1, 0), "rm-lora": (0, 0, 0.1),
    }  # fmt: skip


def test_the_charts_have_the_curves_that_belong_together(url: str) -> None:
    layout = get(url, "plugin/custom_scalars/layout")
    charts = {
        (c["title"], chart["title"]): chart["multiline"]["tag"] for c in layout["category"] for chart in c["chart"]
    }
    assert len(charts) == sum(len(c["chart"]) for c in layout["category"])  # no chart stands there twice
    wanted = {
        ("loss", "task loss and penalty"): {"train/task_loss", "eval/loss", "train/orth_regu_loss", "train/gate_l1"},
        ("rank", "budget and ranks"): {"Watch/rank_total", "Watch/rank_nonzero", "Budget/total_rank"},
        ("rank", "effective rank"): {"Watch/effective_rank"},
        ("evaluation", "accuracy"): {"eval/accuracy"},
        ("evaluation", "f1"): {"eval/f1"},
        ("gates", "share that is not 0"): {"Gates/nonzero_share"},
        ("gates", "remaining parameters"): {"Gates/remaining_parameters"},
        ("stages of SoRA", "remaining parameters"): {"Stages/remaining"},
        ("stages of SoRA", "evaluation"): {"Stages/eval_accuracy", "Stages/eval_f1"},
    }
    runs = get(url, "runs")
    seen: dict[tuple[str, str], set[str]] = {}
    for key, patterns in charts.items():
        for run in runs:
            for pattern in patterns:
                found = get(url, f"plugin/custom_scalars/scalars?run={run}&tag={pattern.replace('$', '%24')}")
                seen.setdefault(key, set()).update(found.get("tag_to_events") or {})
    assert seen == wanted


def test_one_folder_a_run_and_none_where_one_works(sweep: Path) -> None:
    for name in RUNS:
        assert len([p for p in (sweep / name / "runs").iterdir() if p.name != "stages"]) == 1
    assert (sweep / "sora" / "runs" / "stages").is_dir()


def test_stages_share_no_folder_that_the_user_names(
    tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path, entry_point: Any, monkeypatch: Any
) -> None:
    """Their steps all begin at 0: in one folder they would be a curve that goes back. No file goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    where = f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --output_dir {tmp_path / 'out'} "
    where += f"--logging_dir {tmp_path / 'tb'} "
    entry, own = RUNS["sora"]
    entry_point(entry).main((where + COMMON + " " + own).split())
    assert {p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("events*")} == {
        "tb", "tb/stage-0", "tb/stages",
    }  # fmt: skip
    alone = f"--do_train False --eval_strategy no --output_dir {tmp_path / 'alone'} "
    where = where.replace(f"--logging_dir {tmp_path / 'tb'} ", "")
    entry_point("AdaLoRA").main((where + COMMON + " --apply_lora --lora_r 4 --lora_alpha 8 " + alone).split())
    assert not (tmp_path / "runs").exists() and list((tmp_path / "alone" / "runs").rglob("events*"))


def test_the_record_has_memory_speed_and_the_length_of_rows(sweep: Path) -> None:
    for name in RUNS:
        record = json.loads((sweep / name / "run.json").read_text())
        assert record["sequence_length"] == 24
        assert record["evaluation_rows_per_second"] == record["metrics"]["eval_samples_per_second"] > 0
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        most = int(status["VmHWM"].split()[0]) * 1024 / 1e6  # what the kernel says of this process, which only grows
        assert 0.3 * most < record["peak_memory"]["mb"] <= 1.05 * most
        assert record["peak_memory"]["of"] == "first process, from its start on"

"""The four commands of the paper's release, word for word, as processes of their own.

Only the two absolute folders and the output folder are rewritten. Subprocesses are the point here: what a user types is
what runs. Elsewhere tests call main(argv).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import embedded
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = {
    "lora": """\
export TASK_NAME=mrpc
CUDA_VISIBLE_DEVICES=0,1,2,3 python AdaLoRA/run_glue.py --model_name_or_path /microsoft/deberta-v3-base \
--dataset_name /huggingface/datasets/glue/$TASK_NAME --apply_lora --lora_type frd --lora_r 16 --reg_orth_coef 0 \
--lora_module query,key,value,intermediate,layer.output,attention.output --lora_alpha 32 --do_train --do_eval \
--per_device_train_batch_size 32 --learning_rate 1e-3 --num_train_epochs 5 --max_seq_length 128 \
--report_to tensorboard --evaluation_strategy epoch --logging_step 10 \
--output_dir output/deberta_lora_lr1e03_r16_coef0_alpha32/$TASK_NAME --overwrite_output_dir
""",
    "adalora": """\
export TASK_NAME=mrpc
CUDA_VISIBLE_DEVICES=0,1,2,3 python AdaLoRA/run_glue.py --model_name_or_path /microsoft/deberta-v3-base \
--dataset_name /huggingface/datasets/glue/$TASK_NAME --apply_lora --apply_adalora --lora_type svd --target_rank 8 \
--lora_r 16 --reg_orth_coef 0.1 --init_warmup 50 --final_warmup 50 --mask_interval 10 --beta1 0.85 --beta2 0.85 \
--lora_module query,key,value,intermediate,layer.output,attention.output --lora_alpha 32 --do_train --do_eval \
--per_device_train_batch_size 32 --learning_rate 1e-3 --num_train_epochs 5 --max_seq_length 128 \
--report_to tensorboard --evaluation_strategy epoch --logging_step 10 \
--output_dir output/deberta_adalora_lr1e03_r16_8_coef01_alpha32/$TASK_NAME --overwrite_output_dir
""",
    "sora": """\
export TASK_NAME=mrpc
CUDA_VISIBLE_DEVICES=0,1,2,3 python SoRA/run_glue.py --model_name_or_path /microsoft/deberta-v3-base \
--dataset_name /huggingface/datasets/glue/$TASK_NAME --train_sparse True --sparse_lambda 0.000 --sparse_lambda_2 0.005 \
--apply_lora True --lora_r 16 \
--lora_module query,key,value,intermediate,layer.output,attention.output --lora_alpha 32 --do_train --do_eval \
--per_device_train_batch_size 32 --learning_rate 1e-3 --num_train_epochs 5 --max_seq_length 128 \
--report_to tensorboard --evaluation_strategy epoch --logging_step 10 \
--output_dir output/deberta_sora_lr1e03_r16_lambda_0_lambda2_0005_alpha32/$TASK_NAME --overwrite_output_dir
""",
    "rm-lora-v1": """\
export TASK_NAME=mrpc
CUDA_VISIBLE_DEVICES=0,1,2,3 python RM-LoRA/run_glue.py --model_name_or_path /microsoft/deberta-v3-base \
--dataset_name /huggingface/datasets/glue/$TASK_NAME --apply_lora --lora_r 4 --random_rank 2 --reg_orth_coef 0.1 \
--lora_type v1 \
--lora_module query,key,value,intermediate,layer.output,attention.output --lora_alpha 16 --do_train --do_eval \
--per_device_train_batch_size 32 --learning_rate 1e-3 --num_train_epochs 5 --max_seq_length 128 \
--report_to tensorboard --evaluation_strategy epoch --logging_step 10 \
--output_dir output/deberta_randomlora_lr1e03_r4_2_coef01_svd_alpha16/$TASK_NAME --overwrite_output_dir
""",
}
# Epochs of 21 steps: AdaLoRA's two warm-ups of 50 steps need more than 100 in five epochs. The others make do with 2.
ROWS = {"lora": 64, "adalora": 672, "sora": 64, "rm-lora-v1": 64}


def bash(method: str, model: Path, data: Path, output: Path, drop: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command with its three folders rewritten and `drop` taken out."""
    assert data.name == "mrpc" and model.name == "deberta-v3-base"
    script = COMMANDS[method].replace(drop, "")
    for old, new in (
        ("/microsoft/deberta-v3-base", str(model)),
        ("/huggingface/datasets/glue/", f"{data.parent}/"),
        ("--output_dir output/", f"--output_dir {output}/"),
    ):
        assert script.count(old) == 1
        script = script.replace(old, new)
    # One thread: several would only wait for each other on tensors this small.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def folder_of(method: str, output: Path) -> Path:
    """The output folder that a rewritten command names."""
    name = COMMANDS[method].split("--output_dir output/")[1].split("/")[0]
    return output / name / "mrpc"


@pytest.mark.parametrize("method", COMMANDS)
def test_the_papers_command_runs_word_for_word(method: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    data = embedded.build_data(tmp_path / "mrpc", train=ROWS[method], validation=32, test=4)
    done = bash(method, tiny_model_dir, data, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    folder = folder_of(method, tmp_path)
    results = json.loads((folder / "all_results.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    assert {"eval_accuracy", "eval_f1", "eval_loss", "train_loss"} <= results.keys()
    assert run["metrics"]["eval_accuracy"] == results["eval_accuracy"]
    assert run["method"] == method and run["task"] == "mrpc" and run["status"] == "finished"
    assert run["steps"] == 5 * ROWS[method] // 32 and run["effective_batch"] == 32
    # --evaluation_strategy epoch, --logging_step 10
    assert [e["step"] for e in run["history"] if "eval_loss" in e][:5] == [
        run["steps"] * epoch // 5 for epoch in range(1, 6)
    ]
    assert [e["step"] for e in run["history"] if "learning_rate" in e] == list(range(10, run["steps"] + 1, 10))
    assert list(folder.rglob("events.out.tfevents.*")), "--report_to tensorboard"

    # float32 though the checkpoint is half precision; all that trained and nothing of the backbone
    tensors = load_file(folder / "adapter.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    ours = ("lora", "ranknum", "pooler.", "classifier.")
    assert all(any(part in name for part in ours) for name in tensors), list(tensors)
    trained = sum(t.numel() for n, t in tensors.items() if "ranknum" not in n)
    assert trained == run["parameters"]["trainable"] < run["parameters"]["total"]
    assert not list(folder.rglob("pytorch_model.bin")) and not list(folder.rglob("model.safetensors"))

    if method == "adalora":
        assert run["total_rank"] == 8 * len(run["parameters"]["modules"]) == 48


def test_a_second_run_overwrites_only_when_told_to(tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> None:
    """With the flag the earlier run's files go and others stay; without it the run goes on or is refused."""

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    assert bash("lora", tiny_model_dir, mrpc_dir, tmp_path).returncode == 0
    folder = folder_of("lora", tmp_path)
    first = load_file(folder / "adapter.safetensors")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-7").mkdir()

    done = bash("lora", tiny_model_dir, mrpc_dir, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "removed" in done.stderr and (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "checkpoint-7").exists()
    assert same(load_file(folder / "adapter.safetensors"), first), "the same command gives the same adapter"

    done = bash("lora", tiny_model_dir, mrpc_dir, tmp_path, drop=" --overwrite_output_dir")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-10" in done.stderr and "removed" not in done.stderr
    assert same(load_file(folder / "adapter.safetensors"), first), "a finished run has nothing left to train"

    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)

    def files() -> dict[Path, bytes]:
        return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}

    before = files()
    done = bash("lora", tiny_model_dir, mrpc_dir, tmp_path, drop=" --overwrite_output_dir")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr[-3000:]
    assert "holds a finished run" in last and "--overwrite_output_dir" in last
    assert files() == before

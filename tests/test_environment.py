"""The environment that people have: homes without write access, what `accelerate launch` sets, installed packages."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file

from loralib.errors import InputError
from loralib.glue import caches
from loralib.glue.arguments import GlueTrainingArguments, parse

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--max_steps", "2", "--max_seq_length", "32", "--report_to", "none", "--use_cpu"]
LORA = ["--apply_lora", "--lora_r", "2", "--lora_alpha", "4"]


def flags(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)),
        *("--do_train", *SMALL, *more),
    ]


def as_program(folder: str, argv: list[str], cwd: Path, **env: str | None) -> subprocess.CompletedProcess[str]:
    """An entry point in a process of its own; a variable that is None is not set."""
    full = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    command = [sys.executable, str(ROOT / folder / "run_glue.py"), *argv]
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=300)


# ---- caches ----


SET_ASIDE = {
    "below a file": lambda place: place / "file" / "user",
    "a link to nowhere": lambda place: place / "link",
    "no home": lambda place: Path("~/.cache/huggingface"),
}


@pytest.mark.parametrize("cache", SET_ASIDE)
def test_caches_that_cannot_be_written_to(
    cache: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    mrpc_dir: Path,
    entry_point: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Training, evaluation and prediction end well, the log says what was done, and nothing is written beside them."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "user")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for module, attribute, _ in caches.CACHES:
        monkeypatch.setattr(module, attribute, SET_ASIDE[cache](tmp_path) / attribute)
    with caplog.at_level(logging.WARNING, logger="loralib"):
        metrics = entry_point("AdaLoRA").main(
            flags(tiny_model_dir, mrpc_dir, tmp_path / "out", *LORA, "--do_eval", "--do_predict")
        )
    said = [record.getMessage() for record in caplog.records if "cannot be written to (" in record.getMessage()]
    assert len(said) == 3 and all("set HF_HOME to your own folder to keep it" in line for line in said)
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert list(Path().iterdir()) == [] and not (tmp_path / "nowhere").exists()


def test_no_folder_for_temporary_files_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "file" / "metrics")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    monkeypatch.setattr(caches, "_own", None)
    with pytest.raises(InputError, match="set HF_HOME or TMPDIR to a folder that can be"):
        caches.use_writable_caches()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["AdaLoRA", "SoRA", "RM-LoRA"])
def test_a_home_below_a_file(folder: str, tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path) -> None:
    """The whole program, TensorBoard's figures with matplotlib and the full model included."""
    (tmp_path / "home").write_text("")
    argv = flags(tiny_model_dir, mrpc_dir, tmp_path / "out", "--do_eval", "--report_to", "tensorboard")
    names = ("HF_HOME", "HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    (tmp_path / "cwd").mkdir()
    run = as_program(folder, argv, tmp_path / "cwd", **dict.fromkeys(names), HOME=str(tmp_path / "home" / "user"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr.count("cannot be written to (") == 3
    assert json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]["eval_accuracy"] > 0
    assert list((tmp_path / "cwd").iterdir()) == []


# ---- accelerate launch ----


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """The variables that `accelerate launch` sets, these changed."""
    usual = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "no", "DYNAMO_MODE": "default", "USE_CPU": "False"}
    usual |= {f"DYNAMO_{name}": "False" for name in ("USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")}
    for name, value in (usual | variables).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


def parsed(folder: Path, *more: str) -> GlueTrainingArguments:
    (training,) = parse((GlueTrainingArguments,), ["--output_dir", str(folder), "--report_to", "none", *more])
    return training


def test_bf16_by_the_launcher_is_bf16_by_the_flag(
    tmp_path: Path,
    tiny_model_dir: Path,
    mrpc_dir: Path,
    entry_point: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same numbers, the same record, and a checkpoint that a run in float32 does not go on from."""
    main, argv = entry_point("AdaLoRA").main, flags(tiny_model_dir, mrpc_dir, tmp_path / "flag", *LORA)
    main([*argv, "--bf16"])
    launched(monkeypatch, MIXED_PRECISION="bf16")
    argv = flags(tiny_model_dir, mrpc_dir, tmp_path / "launched", *LORA)
    with caplog.at_level(logging.INFO, logger="loralib"):
        main(argv)
    assert "accelerate launch asks for --mixed_precision bf16: taken as --bf16" in caplog.text
    ours, theirs = (load_file(tmp_path / name / "adapter.safetensors") for name in ("launched", "flag"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert json.loads((tmp_path / "launched" / "run.json").read_text())["arguments"]["bf16"] is True
    launched(monkeypatch)
    checkpoint = str(tmp_path / "launched" / "checkpoint-2")
    with pytest.raises(InputError, match="bf16 was True, is False"):
        main([*flags(tiny_model_dir, mrpc_dir, tmp_path / "again", *LORA), "--resume_from_checkpoint", checkpoint])


@pytest.mark.parametrize("method", ["an adapter", "full fine-tuning"])
def test_a_compiler_by_the_launcher_is_one_by_the_flag(
    method: str, tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path, entry_point: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported has the names of a model that was not compiled, and the record has the backend."""
    launched(monkeypatch, DYNAMO_BACKEND="EAGER")
    more = LORA if method == "an adapter" else []
    entry_point("AdaLoRA").main(flags(tiny_model_dir, mrpc_dir, tmp_path / "compiled", *more))
    launched(monkeypatch)
    entry_point("AdaLoRA").main(flags(tiny_model_dir, mrpc_dir, tmp_path / "plain", *more))
    file = "adapter.safetensors" if more else "model.safetensors"
    compiled, plain = (load_file(tmp_path / name / file) for name in ("compiled", "plain"))
    assert compiled.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-6)
    recorded = json.loads((tmp_path / "compiled" / "run.json").read_text())["arguments"]
    assert (recorded["torch_compile"], recorded["torch_compile_backend"]) == (True, "eager")
    settings = json.loads((tmp_path / "compiled" / "checkpoint-2" / "checkpoint.json").read_text())["settings"]
    assert settings["torch_compile_backend"] == "eager"


def test_flags_that_a_launcher_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, USE_CPU="true", DYNAMO_BACKEND="INDUCTOR", DYNAMO_MODE="max-autotune")
    args = parsed(tmp_path)
    assert (args.use_cpu, args.torch_compile_backend, args.torch_compile_mode) == (True, "inductor", "max-autotune")
    launched(monkeypatch, MIXED_PRECISION="fp16")
    assert parsed(tmp_path, "--use_cpu").fp16
    assert parsed(tmp_path, "--use_cpu", "--fp16").taken_from_launcher == []
    launched(monkeypatch, MIXED_PRECISION="", USE_CPU="", USE_FSDP="", DYNAMO_BACKEND="", DYNAMO_USE_FULLGRAPH="")
    args = parsed(tmp_path, "--use_cpu")
    assert (args.bf16, args.fp16, args.torch_compile, args.taken_from_launcher) == (False, False, False, [])


@pytest.mark.parametrize(
    ("variables", "given", "said"),
    [
        ({"USE_FSDP": "true"}, "", "asks for FSDP .*not supported"),
        ({"USE_DEEPSPEED": "true"}, "", "asks for DeepSpeed .*not supported"),
        ({"USE_MEGATRON_LM": "1"}, "", "asks for Megatron-LM .*not supported"),
        ({"USE_PARALLELISM_CONFIG": "true"}, "", "asks for a parallelism config"),
        ({"MIXED_PRECISION": "fp8"}, "", "--mixed_precision fp8, it must be no, bf16 or fp16"),
        ({"MIXED_PRECISION": "bf16"}, "--fp16", "--mixed_precision bf16 and the program for --fp16: give one"),
        ({"DYNAMO_BACKEND": "EAGER"}, "--torch_compile_backend inductor", "--dynamo_backend eager and the program"),
        ({"MIXED_PRECISION": "float32"}, "", "--mixed_precision float32, it must be no, bf16 or fp16"),
        ({"USE_FSDP": "maybe"}, "", "ACCELERATE_USE_FSDP is 'maybe', it must be true or false"),
        ({"USE_CPU": "maybe"}, "", "ACCELERATE_USE_CPU is 'maybe', it must be true or false"),
        ({"DYNAMO_BACKEND": "BOGUS"}, "", "torch_compile_backend is 'bogus', it must be one of"),
        ({"DYNAMO_BACKEND": "EAGER", "DYNAMO_USE_FULLGRAPH": "True"}, "", "--dynamo_use_fullgraph, which is not"),
        ({"DYNAMO_USE_DYNAMIC": "True"}, "--torch_compile", "--dynamo_use_dynamic, which is not"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps 2", "the Trainer reads only the flag"),
    ],
)
def test_what_a_launcher_may_not_ask_for(
    variables: dict[str, str], given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, **variables)
    with pytest.raises(InputError, match=said) as caught:
        parsed(tmp_path, "--use_cpu", *given.split())
    assert "\n" not in str(caught.value)


CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: bf16
num_machines: 1
num_processes: 1
use_cpu: true
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flags", "a config file", "a config file that asks for FSDP"])
def test_accelerate_launch(way: str, tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path) -> None:
    """The real launcher: bf16 on the CPU is what run.json says, and FSDP is refused in one sentence."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(kind="FSDP" if "FSDP" in way else "'NO'"))
    own = ["--config_file", str(config)]
    if way == "flags":
        own = ["--cpu", "--num_processes", "1", "--mixed_precision", "bf16", "--dynamo_backend", "eager"]
    program = [str(ROOT / "AdaLoRA" / "run_glue.py"), *flags(tiny_model_dir, mrpc_dir, tmp_path / "out", *LORA)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *own, *program]
    # the launcher looks for accelerators itself, and sets FSDP's variables only where it starts several processes
    env = os.environ | ({"ACCELERATE_USE_FSDP": "true"} if "FSDP" in way else {})
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    if "FSDP" in way:
        assert run.returncode != 0 and not (tmp_path / "out" / "run.json").exists()
        assert "error: accelerate launch asks for FSDP" in run.stderr
        return
    assert run.returncode == 0, run.stderr[-3000:]
    arguments = json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]
    assert arguments["bf16"] and arguments["use_cpu"] and arguments["torch_compile"] is (way == "flags")


def test_no_row_is_left_out_of_metrics_and_predictions(
    tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path, entry_point: Any
) -> None:
    """--dataloader_drop_last concerns training: 30 rows in batches of 8 are 30 rows."""
    more = ("--dataloader_drop_last", "True", "--do_eval", "--do_predict", "--max_eval_samples", "30")
    results = []
    for name, given in (("dropping", more), ("whole", more[2:])):
        argv = flags(tiny_model_dir, mrpc_dir, tmp_path / name, *LORA, *given, "--max_predict_samples", "11")
        metrics = entry_point("AdaLoRA").main(argv)
        lines = (tmp_path / name / "predict_results_mrpc.txt").read_text().splitlines()
        results.append((metrics["eval_accuracy"], metrics["eval_loss"], lines))
    assert results[0] == results[1] and len(results[0][2]) == 12  # a line of names, then 11 rows


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_random_states_are_read_on_both_sides_of_numpy_2(core: str, tmp_path: Path) -> None:
    """numpy 2 moved the function that a state is rebuilt with; a checkpoint written before or after is read."""
    run = runs.trainer("lora", runs.arguments(tmp_path, max_steps=2, save_steps=1), runs.rows(8))
    run.train()
    written = zipfile.ZipFile(tmp_path / "checkpoint-1" / "rng_state.pth")
    other = tmp_path / "rng_state.pth"
    with zipfile.ZipFile(other, "w") as file:  # stored, as torch wants it
        for name in written.namelist():
            content = written.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in content or b"cnumpy.core.multiarray\n" in content
                for old in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
                    content = content.replace(old, f"c{core}.multiarray\n".encode())
            file.writestr(name, content)
    run._load_rng_state(str(tmp_path / "checkpoint-1"))
    before = np.random.get_state()
    np.random.seed(0)
    run._load_rng_state(str(tmp_path))
    after = np.random.get_state()
    assert np.array_equal(before[1], after[1]) and before[2:] == after[2:]

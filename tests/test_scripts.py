"""The task scripts: every method's settings parse, fit the task's true number of steps, and are what the papers say."""

import ast
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from loralib.allocator import check_schedule
from loralib.errors import InputError
from loralib.glue.arguments import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, parse
from loralib.glue.tasks import GLUE
from loralib.report.runs import GENERAL
from loralib.report.runs import METRICS as TABLE_METRICS
from loralib.report.style import METHODS as METHODS_WITH_COLOURS
from loralib.sparse import lambda_stages
from loralib.sweep import plan
from loralib.sweep.asking import ask
from loralib.sweep.command import make_parser

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
METHODS = ["lora", "lora-orth", "adalora", "sora", "rm-lora-v1", "rm-lora-v2", "full"]
SECOND = "lora-sora-baseline"  # a second setting of lora, which is not part of `all`

# AdaLoRA, arXiv 2303.10512, Table 8: learning rate, epochs, gamma, t_i, Delta_T, t_f
TABLE_8 = {
    "mnli": (5e-4, 7, 0.1, 8000, 100, 50000),
    "rte": (1.2e-3, 50, 0.3, 600, 1, 1800),
    "qnli": (1.2e-3, 5, 0.1, 2000, 100, 8000),
    "mrpc": (1e-3, 30, 0.1, 600, 1, 1800),
    "qqp": (5e-4, 5, 0.1, 8000, 100, 25000),
    "sst2": (8e-4, 24, 0.1, 6000, 100, 22000),
    "cola": (5e-4, 25, 0.5, 800, 10, 3500),
    "stsb": (2.2e-3, 25, 0.1, 800, 10, 2000),
}


def script(task: str, *args: str, cwd: Path = ROOT, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a task's script, printing its command unless the environment says otherwise."""
    own = ("CUDA_VISIBLE_DEVICES", "NPROC", "NNODES", "MODEL", "DATA", "OUTPUT", "SEED")
    clean = {k: v for k, v in os.environ.items() if k not in own}
    settings = clean | {"DRY_RUN": "1", "PYTHON": sys.executable, "NPROC": "1"} | env
    done = subprocess.run(["bash", str(ROOT / "scripts" / f"{task}.sh"), *args], cwd=cwd, env=settings,
                          capture_output=True, text=True)  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


@cache
def commands(task: str, **env: str) -> dict[str, list[str]]:
    """The command of each method, split into words."""
    lines = script(task, "all", **env).stdout.splitlines()
    return dict(zip(METHODS, map(shlex.split, lines), strict=True))


def test_every_list_of_methods_names_the_same_ones() -> None:
    launch = (ROOT / "scripts" / "launch.sh").read_text()
    (line,) = re.findall(r"^methods=\((.*)\)$", launch, flags=re.M)
    (more,) = re.findall(r'^known=\("\$\{methods\[@\]\}" (.*?)\)', launch, flags=re.M)
    assert line.split() == METHODS and [*METHODS, *more.split()] == [*METHODS, SECOND] == list(plan.METHODS)
    assert set(METHODS_WITH_COLOURS) == {*METHODS, "svd-lora"}  # which has no settings from a paper
    with_layers = {*METHODS} - {"lora-orth", "full"}
    (line,) = re.findall(r"^METHODS = (\(.*\))$", (ROOT / "scripts" / "benchmark.py").read_text(), flags=re.M)
    assert set(ast.literal_eval(line)) == with_layers
    assert set(re.findall(r"^run (\S+) ", (ROOT / "scripts" / "quickstart.sh").read_text(), flags=re.M)) == with_layers


def test_every_list_of_tasks_names_the_same_ones() -> None:
    named = re.compile(rf"{' '.join(TASKS)}|{', '.join([*TASKS, 'ax'])}")
    assert [*TASKS, "ax"] == list(GLUE)  # ax has no training rows, and so no script
    (help_text,) = [f.metadata["help"] for f in fields(DataArguments) if f.name == "task_name"]
    row = (ROOT / "README.md").read_text().partition("`--task_name`")[2].partition("\n")[0]
    sweeps = (ROOT / "docs" / "sweeps.md").read_text().partition("Scripts: ")[2].partition("\n")[0]
    assert all(named.search(text) for text in (help_text, row, sweeps))
    for name in TASKS:  # what a table shows of a task is a metric of it
        shown = {metric.removesuffix("_mm") for metric in TABLE_METRICS.get(name, GENERAL)} - {"combined_score"}
        assert shown & {*GLUE[name].metrics} and (name not in TABLE_METRICS or shown <= {*GLUE[name].metrics})


@cache
def own_arguments(entry: str) -> type:
    """The method's dataclass of flags in an entry point."""
    name = "entry_" + re.sub(r"\W", "_", entry)
    spec = importlib.util.spec_from_file_location(name, entry)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return next(v for v in vars(module).values() if isinstance(v, type) and issubclass(v, LoRAArguments)
                and v is not LoRAArguments)  # fmt: skip


def parsed(words: list[str]) -> tuple:
    """(model, data, method, training) as the entry point itself parses them."""
    at = next(i for i, word in enumerate(words) if word.endswith("run_glue.py"))
    classes = (ModelArguments, DataArguments, own_arguments(words[at]), GlueTrainingArguments)
    return parse(classes, [*words[at + 1 :], "--use_cpu"])


@pytest.mark.parametrize("task", TASKS)
def test_settings_parse_and_fit_the_number_of_steps(task: str) -> None:
    for method, words in commands(task).items():
        _, data, lora, training = parsed(words)
        assert data.task_name == task
        rows = GLUE[task].train_rows
        per_epoch = math.ceil(rows / (training.per_device_train_batch_size * training.gradient_accumulation_steps))
        total = per_epoch * int(training.num_train_epochs)
        assert training.get_warmup_steps(total) < total / 4
        assert lora.apply_lora == (method != "full")
        if method == "adalora":
            check_schedule(lora.init_warmup, lora.final_warmup, total)
            falling = range(lora.init_warmup + 1, total - lora.final_warmup + 1)
            assert sum(step % lora.mask_interval == 0 for step in falling) >= 10, "the budget falls in few jumps"
            assert lora.lora_r == 1.5 * lora.target_rank  # AdaLoRA section 4: initial budget 1.5 x the final one
        if method == "sora":
            assert lora.train_sparse and training.max_grad_norm == 0.1
            if getattr(lora, "lambda_schedule", None):
                stages = lambda_stages(lora.lambda_schedule, lora.sparse_lambda_2, lora.max_lambda, lora.lambda_num)
                assert len(stages) == 7 and stages[0] == 0 and stages[-1] == 7e-4
            else:  # a gate can climb against the threshold in the larger part of the linear schedule
                assert 0 < lora.sparse_lambda_2 < training.learning_rate / 2
        if method.startswith("rm-lora"):
            assert lora.lora_type == method[-2:] and lora.random_rank * 2 == lora.lora_r


def test_commands_are_those_of_version_one() -> None:
    """What `DRY_RUN=1` printed for all 9 x 7 commands when the scripts still stated every value once a method."""
    words = [[w.replace(str(ROOT), "ROOT") for w in commands(t, OUTPUT="/o")[m][1:]] for t in TASKS for m in METHODS]
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    assert digest == "4bb8fafc07039d193cc74f54a84a641c05ee458dc2287c1cef96c1e6ec2be76c"


@pytest.mark.parametrize("task", TABLE_8)
def test_adalora_is_table_8(task: str) -> None:
    _, _, lora, training = parsed(commands(task)["adalora"])
    found = (training.learning_rate, training.num_train_epochs, lora.reg_orth_coef, lora.init_warmup,
             lora.mask_interval, lora.final_warmup)  # fmt: skip
    assert found == TABLE_8[task]
    assert training.per_device_train_batch_size == 32


# SoRA's authors, issue 4 of TsinghuaC3I/SoRA: learning rate and epochs of their LoRA; batch 8
SORA_ISSUE_4 = {"cola": (8e-5, 20), "sst2": (1e-4, 10), "mrpc": (1e-4, 20), "qqp": (3e-4, 10), "stsb": (1e-4, 20),
                "mnli": (3e-4, 10), "qnli": (3e-4, 10), "rte": (1.2e-3, 50)}  # fmt: skip


@pytest.mark.parametrize("task", SORA_ISSUE_4)
def test_lora_as_the_authors_of_sora_trained_it(task: str) -> None:
    words = shlex.split(script(task, SECOND).stdout)
    _, _, lora, training = parsed(words)
    assert (training.learning_rate, training.num_train_epochs) == SORA_ISSUE_4[task]
    assert training.per_device_train_batch_size == 8 and training.max_grad_norm == 0.1
    assert training.get_warmup_steps(1000) == 60 and training.weight_decay == 0.1
    assert lora.apply_lora and (lora.lora_r, lora.lora_alpha, lora.lora_type) == (8, 16, "frd")
    assert words[1] == commands(task)["lora"][1] and f"{task}/{SECOND}/seed42" in words[-1]


def test_no_setting_of_soras_authors_for_wnli() -> None:
    done = script("wnli", SECOND, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "state no settings of LoRA for WNLI: use lora" in done.stderr and len(done.stderr.splitlines()) == 1
    (job,) = plan.plan(make_parser().parse_args(["--tasks", "wnli", "--methods", SECOND, "--seeds", "1"]), [])
    with pytest.raises(InputError, match="wnli, lora-sora-baseline: SoRA's authors state no settings"):
        ask([job])


@pytest.mark.parametrize("task", TASKS)
def test_every_value_names_its_source(task: str) -> None:
    text = (ROOT / "scripts" / f"{task}.sh").read_text()
    values = re.findall(r"^ +(?:--\w+ \S+.*|batch=.*)$", text, re.M)
    assert 35 < len(values) and text.count("\n") < 105
    shared = re.findall(r"^    --\w+ \S+ +#.*$", (ROOT / "scripts" / "launch.sh").read_text(), re.M)
    assert len(shared) == 6  # lora_module, and what lora-sora-baseline has on every task
    for line in [*values, *shared]:
        assert re.search(r"# (not stated: |AdaLoRA(?:'s)? |RM-LoRA's |SoRA's )\w", line), line
    assert not re.search(r"(?<![\w.])/(home|work|tmp|root|data)/", text)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NPROC": "4"}, ["--nproc_per_node", "4", "--standalone"]),
        ({"NPROC": "", "CUDA_VISIBLE_DEVICES": "0,3"}, ["--nproc_per_node", "2", "--standalone"]),
        (
            {"NPROC": "2", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29501"},
            "--nproc_per_node 2 --nnodes 2 --node_rank 1 --master_addr first --master_port 29501".split(),
        ),
    ],
)
def test_processes_keep_the_effective_batch(env: dict[str, str], words: list[str]) -> None:
    command = shlex.split(script("mrpc", "adalora", **env).stdout)
    assert all(word in command for word in ["torch.distributed.run", *words])
    processes = int(env.get("NNODES", 1)) * int(words[words.index("--nproc_per_node") + 1])
    assert parsed(command)[3].per_device_train_batch_size * processes == 32
    accumulated = shlex.split(script("mrpc", "adalora", "--gradient_accumulation_steps=4", **env).stdout)
    assert parsed(accumulated)[3].per_device_train_batch_size * processes * 4 == 32


def test_one_gpu_or_none_is_one_plain_process() -> None:
    two = {"NPROC": "2"}
    assert "--use_cpu" in script("mrpc", "lora", CUDA_VISIBLE_DEVICES="", **two).stdout
    assert "--use_cpu" not in script("mrpc", "lora", CUDA_VISIBLE_DEVICES="0,1", **two).stdout
    for devices in ("0", "GPU-8932f937", ""):
        command = script("mrpc", "lora", NPROC="", CUDA_VISIBLE_DEVICES=devices).stdout
        assert "torch.distributed" not in command


@pytest.mark.parametrize(
    ("args", "env", "sentence"),
    [
        (["lorra"], {}, "'lorra' is not a method of scripts/mrpc.sh"),
        (["lora"], {"NPROC": "3"}, "mrpc's lora needs a batch of 32, which cannot be divided by 3 processes"),
        (["lora"], {"NPROC": "x"}, "NPROC is 'x', it must be a number of processes"),
        (["lora"], {"NPROC": "1", "NNODES": "2"}, "NNODES is 2: set NODE_RANK (0 to 1) and MASTER_ADDR"),
    ],
)
def test_refusals_are_a_sentence(args: list[str], env: dict[str, str], sentence: str) -> None:
    done = script("mrpc", *args, check=False, **env)
    assert done.returncode == 1 and done.stdout == ""
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_environment_and_flags_from_any_folder_with_spaces(tmp_path: Path) -> None:
    """The run itself, by an interpreter that prints what it is given."""
    odd = tmp_path / "a folder, with spaces"
    odd.mkdir()
    fake = odd / "my python"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {"DRY_RUN": "0", "PYTHON": str(fake), "MODEL": str(odd / "model"), "DATA": str(odd / "glue"),
           "OUTPUT": str(odd / "out"), "SEED": "7"}  # fmt: skip
    words = script("rte", "rm-lora-v2", "--learning_rate", "1e-4", cwd=odd, **env).stdout.splitlines()
    model, data, lora, training = parsed(words)
    assert (model.model_name_or_path, data.dataset_name) == (str(odd / "model"), str(odd / "glue"))
    assert training.output_dir == str(odd / "out" / "rte" / "rm-lora-v2" / "seed7") and training.seed == 7
    assert training.learning_rate == 1e-4  # flags win over the script
    own = odd / "mine" / "run_glue.py"
    own.parent.mkdir()
    own.write_text("")
    words = script("rte", "mine/run_glue.py", "--flag", "x y", cwd=odd, **env).stdout.splitlines()
    assert words[0] == str(own) and words[-2:] == ["--flag", "x y"] and "--lora_r" not in words
    assert words[words.index("--output_dir") + 1] == str(odd / "out" / "rte" / "mine" / "seed7")


def test_a_flag_is_itself_however_it_is_spelt(tmp_path: Path) -> None:
    """Dashes, abbreviations and `=`: an unfinished default folder is not cleared for a run that goes elsewhere."""
    unfinished = tmp_path / "mrpc" / "lora" / "seed42" / "runs"
    unfinished.mkdir(parents=True)
    for flags in (["--output_dir", "x"], ["--output-dir", "x"], ["--output-dir=x"], ["--output_d", "x"], ["--ou=x"]):
        printed = script("mrpc", "lora", *flags, cwd=tmp_path, OUTPUT=str(tmp_path)).stdout
        assert "starts over" not in printed and "--overwrite_output_dir" not in printed, flags
        assert "run_glue.py" in printed
    for flags in (["--gradient-accumulation-steps", "4"], ["--gradient_acc=4"], ["--gradient-accumulation-st", "4"]):
        assert "--per_device_train_batch_size 8" in script("mrpc", "lora", *flags).stdout
    for flags in (["--per-device-train-batch-size", "4"], ["--per_device_tr=4"]):
        assert "--per_device_train_batch_size" not in script("mrpc", "lora", *flags).stdout
    for flags in (["--use-cpu"], ["--use_cpu=yes"], ["--use_c", "on"], ["--no-cuda", "1"]):
        printed = script("mrpc", "lora", *flags, NPROC="", CUDA_VISIBLE_DEVICES="0,1").stdout
        assert "torch.distributed" not in printed, flags
    finished = tmp_path / "done"
    finished.mkdir()
    (finished / "run.json").write_text(json.dumps({"version": 1, "status": "finished"}, indent=2) + "\n")
    assert "nothing is done" in script("mrpc", "lora", "--output-dir", str(finished)).stdout
    again = script("mrpc", "lora", "--output-dir", str(finished), "--overwrite-output-dir", "on").stdout
    assert "nothing is done" not in again


def test_an_entry_point_of_a_users_inherits_settings(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text("")
    words = shlex.split(script("rte", str(own), "--like", "lora", "--lora_r", "2").stdout)
    lora = commands("rte")["lora"]
    kept = [word for word in lora[2:] if word not in ("--lora_type", "frd")]
    where = kept.index("--output_dir") + 1
    assert words[1] == str(own) and words[2:] == [*kept[:where], words[where + 2], *kept[where + 1 :], "--lora_r", "2"]
    done = script("rte", str(own), "--like", "lorra", check=False)
    assert done.returncode == 1 and "--like 'lorra' is not a method" in done.stderr


def test_the_same_command_again(tmp_path: Path) -> None:
    """A finished run is left alone; with any other folder the entry point decides: go on, start over or refuse."""
    folder = tmp_path / "mrpc" / "lora" / "seed42"

    def again(*flags: str) -> str:
        return script("mrpc", "lora", *flags, OUTPUT=str(tmp_path)).stdout

    def enters() -> bool:
        said = again()
        return "run_glue.py" in said and "--overwrite_output_dir" not in said

    assert enters()
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("a sweep's first line")
    assert enters()
    (folder / "checkpoint-500").mkdir()  # half-written: no manifest
    assert enters()
    (folder / "notes.txt").write_text("not of a run")
    assert enters()
    whole = json.dumps({"version": 1, "status": "finished", "metrics": {}}, indent=2) + "\n"
    (folder / "run.json").write_text(whole[:30])
    assert "run_glue.py" in again()
    (folder / "run.json").write_text(whole.replace("finished", "diverged"))
    assert "run_glue.py" in again()
    (folder / "run.json").write_text(whole)
    assert "holds a finished run, so nothing is done" in again() and "run_glue.py" not in again()
    assert "run_glue.py" in again("--overwrite_output_dir")

"""Sweeps: what is run and where, what is recognised, and that nothing of a run outlives its worker."""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from loralib.errors import InputError
from loralib.report.runs import read
from loralib.report.tuning import final_runs, open_trials, read_tuning
from loralib.sweep import asking, command, dispatch, guard, plan, records, settings
from loralib.sweep import tune as tune_module
from loralib.sweep.cluster import Cluster, resources
from loralib.sweep.dispatch import Progress
from loralib.sweep.records import Done, ResultsFile
from loralib.sweep.settings import RequestedRun

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "scripts" / "sweep.py"

# Stands for an entry point: writes the results file in no time. Seed 3 never succeeds; seed 2 only after a failure.
ENTRY = """
import json, os, sys
arguments = {a: b for a, b in zip(sys.argv, sys.argv[1:])}
out, seed = arguments["--output_dir"], int(arguments["--seed"])
os.makedirs(out, exist_ok=True)
first = not os.path.exists(os.path.join(out, "tried"))
open(os.path.join(out, "tried"), "w").close()
print("threads", os.environ["OMP_NUM_THREADS"], "gpus", repr(os.environ["CUDA_VISIBLE_DEVICES"]), flush=True)
if seed == 4:
    sys.exit(2)  # bad input
if seed == 3 or seed == 2 and first:
    sys.exit(f"seed {seed} fails")
run = {"version": 1, "status": "finished", "method": "mine", "task": arguments["--task_name"], "seed": seed,
       "arguments": {"lora_r": int(arguments.get("--lora_r", 1))}, "metrics": {"eval_accuracy": 0.5}}
with open(os.path.join(out, "run.json"), "w") as file:
    file.write(json.dumps(run, indent=2) + "\\n")
"""


def jobs(*argv: str) -> list[Any]:
    return plan.plan(*command.make_parser().parse_known_args(list(argv)))


def wait_for(condition: Any, seconds: float) -> Any:
    """The first true value of `condition()`, or the last one."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- planning ----


def test_layout_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run_glue.py").write_text("")
    found = jobs("--tasks", "mrpc,rte", "--methods", "sora,mine/run_glue.py", "--seeds", "1-2,5", "--output", "out",
                 "--grid", "lora_r=4,8", "--only", "sora:--sparse_lr 1e-3", "--max_steps", "9")  # fmt: skip
    assert len(found) == 2 * 2 * 3 * 2 == len({job.folder for job in found})
    first = found[0]
    assert first.folder == tmp_path / "out" / "mrpc" / "sora,lora_r=4" / "seed1"
    words = [str(ROOT / "scripts" / "mrpc.sh"), "sora", "--max_steps", "9", "--sparse_lr", "1e-3", "--lora_r", "4"]
    assert first.command == ["bash", *words, "--seed", "1", "--output_dir", str(first.folder)]
    own = next(job for job in found if job.folder.parent.name == "mine,lora_r=8")
    assert own.command[2] == str(tmp_path / "mine" / "run_glue.py") and "--sparse_lr" not in own.command
    assert [job.seed for job in found[:: len(found) // 3]] == [1, 2, 5]  # each seed's runs before the next seed's


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--tasks": "mrcp"}, "task 'mrcp' has no script: use cola, mnli, mrpc"),
        ({"--tasks": "launch"}, "task 'launch' has no script"),
        ({"--methods": "lorra"}, "method 'lorra' is neither a file nor one of lora"),
        ({"--grid": "lora_r"}, "--grid 'lora_r' cannot be read"),
        ({"--only": "sora:--x 1"}, "--only 'sora:--x 1' cannot be read"),
        ({"--seeds": "3-1"}, "nothing to run: --tasks, --methods and --seeds"),
        ({"--seeds": "1,1"}, "two runs would share"),
        ({"--output_dir": "x"}, "--output_dir is set by the sweep"),
    ],
)
def test_refusals(changes: dict[str, str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"--tasks": "mrpc", "--methods": "lora", "--seeds": "1"} | changes
    assert command.main([word for pair in flags.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_without_ray_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(signal, "signal", lambda *_, name=name: None)
    assert command.main(["--tasks", "mrpc", "--methods", "lora", "--seeds", "1", "--output", str(tmp_path)]) == 2
    assert "Ray, which is not installed: pip install -e" in capsys.readouterr().err


def test_address_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(InputError, match=f"nothing answers at --address {address}"):
            Cluster(address).start()


@pytest.fixture
def parsed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are parsed in this process, which has the libraries already."""
    monkeypatch.setattr(asking, "_parse_all", lambda commands: {
        key: json.loads(json.dumps(asking.parsed(*json.loads(key)), default=str)) for key in map(asking._key, commands)
    })  # fmt: skip


def trained(cell: Any, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of a cell's own command, by the entry point that its script names."""
    from runs import entry_module

    environment = os.environ | {"DRY_RUN": "1", "PYTHON": "python", "CUDA_VISIBLE_DEVICES": "", "NPROC": "1",
                                "MODEL": str(model), "DATA": str(data)}  # fmt: skip
    done = subprocess.run(cell.command, env=environment, capture_output=True, text=True, check=True)
    _, entry, *argv = shlex.split(done.stdout)
    monkeypatch.setattr(sys, "argv", [entry, *argv, "--use_cpu"])
    entry_module(Path(entry).parent.name).main()
    return json.loads((cell.folder / "run.json").read_text())


@pytest.mark.usefixtures("parsed_here")
def test_finished_runs_are_known_by_the_values_of_their_flags(
    tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run's record: flags that change no number may change; the others may not, however they are spelled."""
    monkeypatch.setenv("MODEL", str(tiny_model_dir))
    monkeypatch.setenv("DATA", str(mrpc_dir))
    usual = ["--tasks", "mrpc", "--methods", "lora", "--seeds", "1", "--output", str(tmp_path), "--max_steps", "2",
             "--max_seq_length", "32", "--report_to", "none", "--lora_r", "4"]  # fmt: skip
    (cell,) = jobs(*usual)
    record = trained(cell, tiny_model_dir, mrpc_dir, monkeypatch)
    assert records.finished(cell)

    def found(*flags: str, of: dict[str, Any] = record) -> list[str]:
        (job,) = jobs(*usual, *flags)
        return settings.differences(of, asking.ask([job])[job])

    same = (["--report_to", "all"], ["--learning-rate=1e-3"], ["--learning_r", "0.001"], ["--save_steps", "7"],
            ["--warmup-ratio", "0.10"], ["--num_train_epochs", "9"], ["--gradient_accumulation_steps", "2"],
            ["--lora-r", "4"], ["--eval_strategy", "epoch"], ["--hub_token", "x"], ["--logging-ste=3"])  # fmt: skip
    for flags in same:
        assert found(*flags) == [], flags
    other = {
        "learning_rate is 0.001, requested 0.0005": (
            ["--learning-rate", "5e-4"],
            ["--learning_rate=5e-4"],
            ["--learning_r", "5e-4"],
        ),
        "lora_r is 4, requested 8": (["--lora-r", "8"], ["--lora_r=8"]),
        "max_steps is 2, requested 3": (["--max-steps", "3"], ["--max_st", "3"]),
        "effective batch is 32, requested 64": (
            ["--per_device_train_batch_size", "64"],
            ["--per-device-train-batch-size=64"],
        ),
        "bf16 is False, requested True": (["--bf16"],),
        "heldout_split is None, requested 0": (["--heldout-split", "0"],),
    }
    for words, spellings in other.items():
        for flags in spellings:
            assert [text.startswith(words) for text in found(*flags)] == [True], (flags, found(*flags))
    assert found(of=records.compact(record)) == []  # the compact record is as good
    assert "seed is 1, requested 2" in found("--seeds", "2")[0]
    (wrong,) = jobs(*usual, "--lora_alpha", "5")
    with pytest.raises(InputError, match=r"with other settings \(lora_alpha is 32.0, requested 5.0\)"):
        records.check_settings(wrong, asking.ask([wrong])[wrong])

    # a results file and another sweep's folder are as good as the run's own folder
    file = tmp_path / "results.jsonl"
    elsewhere = [*usual, "--output", str(tmp_path / "new"), "--results", str(file)]
    said = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    assert command.main([*elsewhere, "--adopt", str(tmp_path)]) == 0
    assert "all 1 runs are finished." in said and not (tmp_path / "new").exists()
    (line,) = file.read_text().splitlines()
    kept = json.loads(line)
    assert kept["metrics"] == record["metrics"] and str(tmp_path) not in line and kept["hardware"]
    shutil.rmtree(cell.folder)
    assert command.main(elsewhere) == 0 and file.read_text().splitlines() == [line]
    said.clear()
    assert command.main([*elsewhere, "--learning_rate", "2e-3", "--dry_run"]) == 0
    assert not said[0].startswith("# finished")


@pytest.mark.usefixtures("parsed_here")
def test_mistakes_are_refused_before_anything_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    usual = ["--tasks", "cola,rte", "--methods", "lora,sora", "--seeds", "1", "--output", str(tmp_path / "out")]
    for flags, sentence in (
        (["--lerning_rate", "1"], "cola, lora: --lerning_rate is not a flag of this program: did you mean --learning"),
        (["--only", "sora:--sparse_lr x"], "cola, sora: Argument --sparse_lr/--sparse-lr: invalid float value: 'x'"),
        (["--only", "rte/sora:--lora_r 0"], "rte, sora: lora_r is 0, it must be 1 or more"),
        (["--grid", "lora_r=4,no"], "cola, lora: Argument --lora_r/--lora-r: invalid int value: 'no'"),
        (["--only", "cola/sora:--lambda_num 4"], "cola, sora: "),
        (["--only", "mrpc/sora:--lambda_num 4"], "write METHOD:FLAGS or TASK/METHOD:FLAGS"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0, it must be 1 or more"),
        (
            ["--gradient_accumulation_steps", "5"],
            "cola, lora: cola's lora needs a batch of 32, which cannot be divided by 1 processes x",
        ),
        (["--overwrite_out"], "cola, lora: with --overwrite_output_dir each attempt at a run that was cut off would"),
        (["--output-dir", "x"], "--output_dir is set by the sweep"),
        (["--see", "3"], "--seed is set by the sweep"),
    ):
        assert command.main([*usual, *flags]) == 2, flags
        error = capsys.readouterr().err
        assert sentence in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()
    assert command.main([*usual, "--only", "rte/sora:--lambda_num 4", "--dry_run"]) == 0


def test_commands_are_parsed_in_a_process_of_their_own(tmp_path: Path) -> None:
    """Entry points of a user's with helpers of one name, and one that can't be asked."""
    main = "from loralib.glue import arguments\nfrom helper import Flags\n\n\ndef main(argv=None):\n" \
        "    arguments.parse((Flags, arguments.GlueTrainingArguments), argv)\n    raise SystemExit('trained')\n" \
        "\n\nif __name__ == '__main__':\n    main()\n"  # fmt: skip
    for name, default in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(main)
        (tmp_path / name / "helper.py").write_text(
            "from dataclasses import dataclass\n\n\n@dataclass\nclass Flags:\n"
            f"    own: int = {default}\n    model_name_or_path: str = ''\n    task_name: str = ''\n"
        )
    (tmp_path / "plain.py").write_text(ENTRY)
    arms = f"x={tmp_path}/a/mine.py,y={tmp_path}/b/mine.py:--own 5,z={tmp_path}/b/mine.py,{tmp_path}/plain.py"
    cells = jobs("--tasks", "rte", "--methods", arms, "--seeds", "1", "--output", str(tmp_path))
    asked = asking.ask(cells)
    assert [(asked[c].arguments or {}).get("own") for c in cells] == [1, 5, 2, None]
    assert [c.folder.parent.name for c in cells] == ["x", "y", "z", "plain"]
    assert asked[cells[0]].entry == "a/mine.py" and asked[cells[0]].method is None


def test_a_results_file_survives_a_kill_and_names_a_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    run = {"version": 1, "status": "finished", "method": "lora", "task": "rte", "seed": 1, "metrics": {"a": 1.0},
           "arguments": {"seed": 1, "output_dir": "/home/x", "hub_token": "secret", "dataset_name": "/home/glue"},
           "command": ["/home/AdaLoRA/run_glue.py"], "history": [{"loss": 1}, {"eval_loss": 2, "step": 3}]}  # fmt: skip
    records.ResultsFile(file).add(run)
    whole = file.read_text()
    assert "/home" not in whole and "secret" not in whole and json.loads(whole)["history"] == [run["history"][1]]
    file.write_text(whole + whole[:50])  # a kill while a line was written
    again = records.ResultsFile(file)
    assert len(again.records) == 1
    again.add(run)
    assert file.read_text() == whole * 2
    file.write_text("no\n" + whole)
    with pytest.raises(InputError, match="line 1 is not a record of a run"):
        records.ResultsFile(file)


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A lock that is a link: the run is refused and the link's target stays as it is."""
    target = tmp_path / "precious"
    target.write_text("data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / guard.LOCK_FILE).symlink_to(target)
    own = [sys.executable, str(SWEEP), "--guard", str(os.getpid()), str(tmp_path / "run"), "true"]
    done = subprocess.run(own, capture_output=True, text=True)
    assert done.returncode == 2 and "is a link or no plain file" in done.stderr and "Traceback" not in done.stderr
    guard.wait_until_free(tmp_path / "run")
    assert target.read_text() == "data"


def test_progress_counts_and_estimates() -> None:
    progress = Progress(total=10, skipped=2, slots=2)
    progress.running = 2
    assert progress.line() == "2 of 10 done, 2 running, 0 failed, 6 left"
    progress.done, progress.failed, progress.seconds = 3, 1, [600.0]
    # 4 left and 2 half-way, two at a time, ten minutes each
    assert progress.line() == "3 of 10 done, 2 running, 1 failed, 4 left, about 25 min to go"
    progress.seconds = [7200.0]
    assert progress.line().endswith("about 5 h 0 min to go")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    progress = Progress(total=4, skipped=1, slots=1)
    progress.show()
    progress.say("a run diverged")
    progress.failed = 1
    for _ in range(2):
        progress.show()
    progress.bar.close()
    first, last = "1 of 4 done, 0 running, 0 failed, 3 left", "1 of 4 done, 0 running, 1 failed, 2 left"
    if terminal:
        drawn = re.split(r"[\r\n]+", out.getvalue())
        assert any(re.fullmatch(rf"\|##5 {{7}}\| {first} *", line) for line in drawn)
        assert any(re.fullmatch(rf"\|##### {{5}}\| {last} *", line) for line in drawn)
        assert "a run diverged" in drawn
    else:
        assert out.getvalue().splitlines() == [first, "a run diverged", last] and "\r" not in out.getvalue()


class FakeRay:
    """A cluster of given machines."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": machine} for machine in self.machines]


def test_resources_of_a_run_and_runs_at_a_time() -> None:
    two = FakeRay({"CPU": 16.0, "GPU": 4.0}, {"CPU": 6.0, "GPU": 1.0})
    assert resources(two, None, None) == (1, 4, 5)
    assert resources(two, 0.5, 1) == (0.5, 1, 10)
    assert resources(two, 2, 8) == (2, 8, 2)  # the second machine is too small
    assert resources(FakeRay({"CPU": 2.0}), None, None) == (0, 2, 1)
    for gpus, cpus, sentence in (
        (1, None, "gpus_per_run is 1 and the largest machine has 0 GPUs: give --gpus_per_run 0 to run on CPUs"),
        (1.5, None, "gpus_per_run is 1.5, it must be a whole number, or a share below 1"),
        (0, 3, "cpus_per_run is 3 and the largest machine has 2 CPUs: lower --cpus_per_run"),
        (0, 0, "cpus_per_run is 0, it must be above 0"),
    ):
        with pytest.raises(InputError) as error:
            resources(FakeRay({"CPU": 2.0}), gpus, cpus)
        assert sentence in str(error.value)


# ---- a cluster that vanishes ----


class DyingRay:
    """Ray whose cluster is gone after `lives[i]` results of its i-th start; runs write their results file at once."""

    class exceptions:
        class RayError(Exception):
            pass

        class WorkerCrashedError(RayError):
            pass

        class OutOfMemoryError(RayError):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, lives: list[int], statuses: dict[int, list[int]]) -> None:
        self.lives, self.statuses, self.left, self.started = lives, statuses, 0, []

    def result(self, run: dict[str, Any], folder: Path) -> dict[str, Any]:
        return run

    def start(self) -> Any:
        if not self.lives:
            raise InputError("nothing answers")
        self.left = self.lives.pop(0)
        self.ray = self
        return self

    def alive(self) -> bool:
        return self.left > 0

    def stop(self) -> None:
        self.left = 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, *given: Any, **options: Any) -> Any:
        if options:
            return lambda function: self
        command, folder = given[1], Path(given[3])
        seed = int(command[command.index("--seed") + 1])
        self.started.append(seed)
        return seed, folder

    def options(self, **_: Any) -> Any:
        return self

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return (calls[:1], calls[1:]) if self.left else ([], calls)

    def get(self, call: tuple[int, Path]) -> int:
        self.left -= 1
        seed, folder = call
        if not self.left:
            raise self.exceptions.RayError("the node died")
        code = self.statuses.get(seed, [0]).pop(0) if self.statuses.get(seed) else 0
        if not code:
            folder.mkdir(parents=True, exist_ok=True)
            run = {
                "version": 1,
                "status": "finished",
                "task": folder.parents[1].name,
                "arguments": {"seed": seed},
                "metrics": {},
            }
            run = self.result(run, folder)
            (folder / "run.json").write_text(json.dumps(run))
        return code

    def cancel(self, call: Any, force: bool) -> None:
        pass


@pytest.mark.parametrize(
    ("lives", "statuses", "code", "counts"),
    [
        ([99], {}, 0, [1, 1, 1, 1, 1]),
        ([99], {2: [1], 3: [1, 1], 4: [2]}, 1, [1, 2, 2, 1, 1]),  # one retry, none after bad input
        ([2, 3, 99], {2: [1]}, 0, None),  # lost twice: no retry is used up by it
        ([2], {}, 3, None),  # it never comes back
        ([1, 1, 1, 1, 1], {}, 3, None),  # it is lost again and again
    ],
)
def test_a_cluster_that_vanishes_costs_no_run_its_retry(
    lives: list[int],
    statuses: dict[int, list[int]],
    code: int,
    counts: list[int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entry = tmp_path / "mine.py"
    entry.write_text("")
    ray = DyingRay(list(lives), {seed: list(found) for seed, found in statuses.items()})
    monkeypatch.setattr(dispatch, "Cluster", lambda address: ray)
    monkeypatch.setattr(dispatch, "PAUSE", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    argv = ["--tasks", "rte", "--methods", str(entry), "--seeds", "1-5", "--output", str(tmp_path / "out"),
            "--wait_for_cluster", "0"]  # fmt: skip
    assert command.main(argv) == code
    if counts:
        assert [ray.started.count(seed) for seed in range(1, 6)] == counts
    said = capsys.readouterr()
    if code == 3:
        assert "the same command goes on with the rest" in said.err and len(said.err.splitlines()) == 1
        ray.lives = [99]
        assert command.main(argv) == 0  # as the sentence says
    if code != 1:
        assert len(list(tmp_path.rglob("run.json"))) == 5 and "given up" not in said.out


# ---- tuning ----

# Accuracy by method and value; a run's seed adds a thousandth. None: it diverges.
SCORES = {
    "a": {"1e-3": 0.6, "2e-3": 0.8, "4e-3": None},
    "b": {"1e-3": 0.7, "2e-3": 0.7, "4e-3": 0.6, "8e-3": 0.9},
}


class ScoringRay(DyingRay):
    """Runs whose score depends on the method and value in their folder's name."""

    def result(self, run: dict[str, Any], folder: Path) -> dict[str, Any]:
        method, _, value = folder.parent.name.partition(",learning_rate=")
        score = {float(known): score for known, score in SCORES[method].items()}[float(value)]
        seed = run["arguments"]["seed"]
        run["arguments"]["learning_rate"] = float(value)
        if score is None:
            return run | {"status": "diverged"}
        return run | {"metrics": {"eval_accuracy": score + seed / 1000}}


def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, values: str = "1e-3,2e-3,4e-3") -> Any:
    tmp_path.mkdir(exist_ok=True)
    entry = tmp_path / "mine.py"
    entry.write_text("")
    ray = ScoringRay([99, 99], {})
    monkeypatch.setattr(dispatch, "Cluster", lambda address: ray)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    argv = ["--tasks", "rte", "--methods", f"a={entry},b={entry}", "--tune", f"learning_rate={values}",
            "--tune_seeds", "1,2", "--seeds", "5-6", "--output", str(tmp_path / "out"), *flags]  # fmt: skip
    return command.main(argv), ray


def test_tuning_chooses_by_the_mean_and_runs_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "r.jsonl"
    code, ray = tune(tmp_path, monkeypatch, "--results", str(results))
    said = capsys.readouterr().out
    assert code == 0 and len(ray.started) == 2 * 3 * 2 + 2 * 2
    finals = sorted(str(p.parent.relative_to(tmp_path / "out" / "rte")) for p in tmp_path.rglob("seed[56]/run.json"))
    assert finals == [f"{m},learning_rate={v}/seed{s}" for m, v in (("a", "2e-3"), ("b", "1e-3")) for s in (5, 6)]
    assert "chosen for rte, a: learning_rate 2e-3 (accuracy 0.8015 of 6 trials; 2 diverged)" in said
    assert "learning_rate 1e-3 is at the edge of its grid: widen" in said and said.count("at the edge") == 1
    choice = json.loads((tmp_path / "out" / "tuning.json").read_text())
    a, b = choice["choices"]
    assert a["values"] == {"learning_rate": "2e-3"} and b["edges"] == ["learning_rate"] and a["edges"] == []
    assert [s["score"] for s in a["scores"]] == [0.601, 0.602, 0.801, 0.802, None, None]
    assert len(results.read_text().splitlines()) == 16
    assert json.loads((tmp_path / "r.tuning.json").read_text()) == choice  # which goes where the results go

    # again, and on another machine: nothing is run, diverged trials included
    for again in (tmp_path / "out", tmp_path / "elsewhere"):
        code, ray = tune(tmp_path, monkeypatch, "--results", str(results), "--output", str(again))
        assert code == 0 and not ray.started
    capsys.readouterr()

    # a wider grid keeps the trials; one that lacks a value is refused
    SCORES["a"]["8e-3"] = 0.5
    code, ray = tune(tmp_path, monkeypatch, "--results", str(results), values="1e-3,2e-3,4e-3,8e-3")
    said = capsys.readouterr().out
    assert "is not taken" not in said  # the other values' trials are no near misses
    assert code == 0 and len(ray.started) == 4 + 2  # the new value's trials, and b's final runs
    assert "the grid of b is extended by learning_rate 8e-3: the choice is made again" in said
    assert "chosen for rte, b: learning_rate 8e-3" in said


def test_a_tuning_of_another_task_keeps_earlier_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks or methods that a later call does not name stay in the record, unless it chooses by other rules."""
    results = ["--results", str(tmp_path / "r.jsonl")]
    tune(tmp_path, monkeypatch, *results)
    first = json.loads((tmp_path / "r.tuning.json").read_text())["choices"]
    code, _ = tune(tmp_path, monkeypatch, *results, "--tasks", "mrpc")
    for file in (tmp_path / "r.tuning.json", tmp_path / "out" / "tuning.json"):
        now = json.loads(file.read_text())["choices"]
        assert code == 0 and now[:2] == first and [c["task"] for c in now] == ["rte", "rte", "mrpc", "mrpc"]
    for flags in (["--tune_selection", "best"], ["--tune_seeds", "1"]):
        code, _ = tune(tmp_path, monkeypatch, *results, "--tasks", "mrpc", *flags)
        assert code == 2 and f"holds choices of rte, a, made with {flags[0]} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tune_seeds", "4-5"], "seed 5 is in --seeds and in --tune_seeds"),
        (["--tune_only", "a:learning_rate=1e-3"], "different numbers of trials per task (a 2, b 6)"),
        (["--tune_only", "a:lora_r=2,4"], "different numbers of trials per task (a 12, b 6)"),
        (["--tune_only", "c:lora_r=2,4"], "--tune_only 'c:lora_r=2,4' cannot be read"),
        (["--grid", "lora_r=2,4"], "--grid and --tune exclude each other"),
        (["--seeds", "5,5"], "--seeds is 5,5: name at least one seed, and each seed once"),
        (["--seeds", "6-5"], "--seeds is empty"),
        (["--tune", "learning_rate=.001"], "--tune learning_rate has one value twice, as 1e-3 and as .001"),
        (["--tune", "seed=3,4"], "--seed is set by the sweep"),
        (["--only", "a:--lora_r 4 --output_dir x"], "--output_dir is set by the sweep"),
    ],
)
def test_tuning_that_is_not_fair_is_refused(
    flags: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, ray = tune(tmp_path, monkeypatch, *flags)
    assert code == 2 and sentence in capsys.readouterr().err and not ray.started


def test_grids_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--tune_only replaces a method's grid; different numbers of trials are allowed by name."""
    code, ray = tune(tmp_path, monkeypatch, "--tune_only", "b:learning_rate=1e-3,4e-3,8e-3")
    assert code == 0 and json.loads((tmp_path / "out" / "tuning.json").read_text())["choices"][1]["values"] == {
        "learning_rate": "8e-3"
    }
    refused, _ = tune(tmp_path, monkeypatch)  # 8e-3 was tried and is not named any more
    assert refused == 2
    code, ray = tune(tmp_path / "other", monkeypatch, "--tune_only", "b:learning_rate=2e-3", "--unequal_trials")
    assert code == 0 and len(ray.started) == 6 + 2 + 4


def test_values_of_one_flag_may_stand_in_several_entries() -> None:
    assert plan.read_grid(["learning_rate=1e-3", "lora_r=2", "learning-rate=3e-3"], "--tune") == {
        "learning_rate": ["1e-3", "3e-3"], "lora_r": ["2"],
    }  # fmt: skip


def test_a_tuning_is_on_record_before_its_first_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No report takes a trial for a result, and no value that was tried can be left out."""
    results, out = tmp_path / "r.jsonl", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(command, "choose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # Ctrl-C before it
        assert tune(tmp_path, patch, "--results", str(results))[0] == 130
    for root in (out, out / "rte", results):
        found, _ = read(root)
        record = read_tuning(root, found)
        assert record and len(found) == 10 and not final_runs(found, record) and len(open_trials(found, record)) == 10
    capsys.readouterr()
    for where in (["--output", str(out)], ["--output", str(tmp_path / "new"), "--results", str(results)]):
        assert tune(tmp_path, monkeypatch, *where, values="1e-3,2e-3")[0] == 2
        assert "holds trials of a with learning_rate 4e-3, which --tune does not name" in capsys.readouterr().err
    record = json.loads((out / "tuning.json").read_text())  # a seed that was mistyped and stopped at once has no trial
    for opened in record["open"]:
        opened["tune_seeds"] = [1, 2, 11]
    for file in (out / "tuning.json", tmp_path / "r.tuning.json"):
        file.write_text(json.dumps(record))
    code, _ = tune(tmp_path, monkeypatch, "--results", str(results), values="0.001,2e-3,4e-3")  # a spelling
    assert code == 0
    record = json.loads((out / "tuning.json").read_text())
    assert record["open"] == [] and len(record["choices"]) == 2


def test_a_choice_is_known_by_parsed_flags(parsed_here: None, tmp_path: Path) -> None:
    """An abbreviation, and a flag that is recorded under another name."""
    for typed, values, arguments in (
        ("learning_ra", ("1e-3", "3e-3"), {"learning_rate": 3e-3}),
        ("warmup_ratio", ("0.1", "0.06"), {"warmup_steps": 0.06}),
        ("lora_r", ("4",), {"lora_r": 4}),
    ):
        argv = ["--tasks", "rte", "--methods", "lora", "--tune", f"{typed}={','.join(values)}", "--tune_seeds", "1",
                "--seeds", "2", "--output", str(tmp_path)]  # fmt: skip
        planned = tune_module.plan_tuning(*command.make_parser().parse_known_args(argv))
        asked = asking.ask(list(planned.trials.values()))
        found = tune_module._decisive(planned, "rte", planned.arms[0], ((typed, values[-1]),), asked)
        assert found == {"arguments": arguments}


def test_another_name_for_the_same_settings_has_its_own_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "r.jsonl"
    tune(tmp_path, monkeypatch, "--results", str(results))
    records = list(map(json.loads, results.read_text().splitlines()))
    assert [r["arm"] for r in records].count("a") == 8 and sum(r.get("trial", False) for r in records) == 12
    asked = RequestedRun("rte", 5, "c", None, "x/mine.py", {}, {}, frozenset(), None)
    file, job = ResultsFile(results), jobs("--tasks", "rte", "--methods", "lora", "--seeds", "5")[0]
    for record in file.records:
        record.pop("entry")
    assert Done(file, []).find_or_add(job, asked)
    last = json.loads(results.read_text().splitlines()[-1])
    assert last["arm"] == "c" and last["arguments"]["seed"] == 5


def test_two_arms_with_the_same_settings_keep_their_own_runs(tmp_path: Path) -> None:
    """As in a comparison of a method with itself; a trial's mark is not copied to a run that is none."""
    results = ResultsFile(tmp_path / "r.jsonl")
    done = Done(results, [])
    for arm, score, trial in (("a", 0.1, True), ("b", 0.2, False)):
        asked = RequestedRun("rte", 5, arm, None, "x/mine.py", {}, {}, frozenset(), None)
        folder = tmp_path / "out" / "rte" / arm / "seed5"
        folder.mkdir(parents=True)
        run = {
            "version": 1,
            "status": "finished",
            "task": "rte",
            "arguments": {"seed": 5},
            "metrics": {"eval_accuracy": score},
        }
        (folder / "run.json").write_text(json.dumps(run))
        job = plan.Job("rte", plan.Arm(arm, "mine.py"), 5, (), folder, trial)
        assert (done.find_or_add(job, asked) or {})["metrics"] == run["metrics"]
    found = list(map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines()))
    assert [(r["arm"], r["metrics"]["eval_accuracy"], r.get("trial")) for r in found] == [
        ("a", 0.1, True),
        ("b", 0.2, None),
    ]
    done.known.clear()
    asked = RequestedRun("rte", 5, "c", None, "x/mine.py", {}, {}, frozenset(), None)
    done.find_or_add(plan.Job("rte", plan.Arm("c", "mine.py"), 5, (), tmp_path / "none"), asked)
    assert "trial" not in json.loads((tmp_path / "r.jsonl").read_text().splitlines()[-1])


def test_like_stands_before_the_shared_flags() -> None:
    entry = str(ROOT / "tests" / "variants" / "rslora.py")
    for flags in ("--lora_alpha 11 --like lora", "--like=lora --lora_alpha 11", "--like lora --lora_alpha 11"):
        (job,) = jobs("--tasks", "mrpc", "--methods", f"x={entry}:{flags}", "--seeds", "1", "--max_steps", "5")
        assert job.flags == ("--like", "lora", "--max_steps", "5", "--lora_alpha", "11")


# ---- the comparison ----

FAILS_AT_COLA = """#!/usr/bin/env bash
echo "$@" >> "$RECORD"
[[ "$*" != *"--tasks cola"* ]]
"""


def test_the_comparison_goes_on_after_a_task_with_failed_runs(tmp_path: Path) -> None:
    """A relative MODEL and DATA are those of the folder where it is started."""
    (tmp_path / "model").mkdir()
    (tmp_path / "python").write_text(FAILS_AT_COLA)
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PYTHON": str(tmp_path / "python"), "RECORD": str(tmp_path / "record"), "MODEL": "model"}

    def compare(**more: str) -> subprocess.CompletedProcess[str]:
        script = ["bash", str(ROOT / "scripts" / "comparison.sh")]
        return subprocess.run(script, cwd=tmp_path, env=env | {"DATA": "."} | more, capture_output=True, text=True)

    assert compare(TASKS="cola,rte").returncode == 1
    assert re.findall(r"--tasks (\w+)", (tmp_path / "record").read_text()) == ["cola", "rte"]
    for wrong, said in (({"TASKS": "cola,qnli"}, "TASKS has qnli"), ({"DATA": "none"}, "there is no folder none")):
        done = compare(**wrong)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "record").read_text().count("--tasks") == 2


# ---- nothing outlives its worker ----


def start_family(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A worker, and the processes below it: two of the guard, then a run with children, one in a session of its own."""
    code = (
        "import os, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:3], str(os.getpid()), *sys.argv[3:]])"
    )
    command = [str(SWEEP), "--guard", str(folder), "bash", "-c", "setsid sleep 100 & sleep 100 & wait"]
    worker = subprocess.Popen([sys.executable, "-c", code, *command], start_new_session=True)
    assert wait_for(lambda: len(guard.descendants(worker.pid)) >= 5, 20)
    time.sleep(0.3)  # children of the run have become what they are
    return worker, guard.descendants(worker.pid)


@pytest.mark.parametrize("victims", ["worker", "first", "worker and first", "second"])
def test_killing_a_process_above_ends_all_of_the_run(victims: str, tmp_path: Path) -> None:
    """`worker and first` is what Ray does to a worker that it ends."""
    worker, family = start_family(tmp_path)
    assert len(family) == 5 and all(map(alive, family))
    for name, pid in (("first", family[0]), ("second", family[1]), ("worker", worker.pid)):
        if name in victims:
            os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(alive, family)), 20), [pid for pid in family if alive(pid)]
    worker.wait()


def test_second_attempt_waits_for_the_first(tmp_path: Path) -> None:
    worker, family = start_family(tmp_path)
    try:
        with open(tmp_path / guard.LOCK_FILE) as lock, pytest.raises(SystemExit, match="another process trains in"):
            guard.wait_for_lock(lock, 0.3, tmp_path)
    finally:
        worker.kill()
        worker.wait()
    with open(tmp_path / guard.LOCK_FILE) as lock:
        guard.wait_for_lock(lock, 20, tmp_path)
    # The system frees the lock of a process a moment before it has ended.
    assert wait_for(lambda: not any(map(alive, family)), 10)


def run_sweep(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("OUTPUT", "SEED", "NPROC", "CUDA_VISIBLE_DEVICES")}
    return subprocess.run([sys.executable, str(SWEEP), *argv], env=clean | env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_sweep_and_ends_its_runs(tmp_path: Path, signum: int) -> None:
    """Ray has handlers of its own for SIGTERM. The run gets SIGTERM, too, in which it may write a checkpoint."""
    pytest.importorskip("ray")
    entry = tmp_path / "mine.py"
    entry.write_text("""
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit((out / "stopped").write_text("") or 143))
(out / "started").write_text("")
time.sleep(300)
""")
    argv = ["--tasks", "rte", "--methods", str(entry), "--seeds", "1", "--output", str(tmp_path / "out")]
    argv += ["--gpus_per_run", "0", "--cpus_per_run", "1"]
    sweep = subprocess.Popen([sys.executable, str(SWEEP), *argv], stdout=subprocess.PIPE, text=True)
    out = tmp_path / "out" / "rte" / "mine" / "seed1"
    assert wait_for((out / "started").exists, 120)
    sweep.send_signal(signum)
    said, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 130 and "stopping: runs that are under way" in said, said
    assert wait_for((out / "stopped").exists, 60)


def test_sweep_on_ray(tmp_path: Path) -> None:
    """With Ray: failures are retried once, logged, and stop nothing. Without: the sentence that says what to do."""
    entry = tmp_path / "mine.py"
    entry.write_text(ENTRY)
    out = tmp_path / "out"
    argv = ["--tasks", "rte", "--methods", str(entry), "--seeds", "1-4", "--output", str(out), "--lora_r", "4",
            "--gpus_per_run", "0", "--cpus_per_run", "1", "--hub_tok", "Secret-of-the-hub"]  # fmt: skip
    if importlib.util.find_spec("ray") is None:
        done = run_sweep(*argv)
        assert done.returncode == 2 and "Ray, which is not installed" in done.stderr
        return
    half = out / "rte" / "mine" / "seed1"
    half.mkdir(parents=True)
    (half / "run.json").write_text('{\n  "status": "fini')
    done = run_sweep(*argv)
    assert done.returncode == 1, done.stderr
    assert f"{half / 'run.json'} is cut short or not a results file: that run is done again." in done.stdout
    assert "2 of 4 done, 0 running, 2 failed, 0 left" in done.stdout
    assert "failed: rte/mine/seed3: seed 3 fails" in done.stdout
    attempts = [(out / "rte" / "mine" / f"seed{s}" / "run.log").read_text().count("== bash") for s in (1, 2, 3, 4)]
    assert attempts == [1, 2, 2, 1]  # what was refused once is refused again
    logged = (half / "run.log").read_text()
    assert "--hub_tok ..." in logged and "Secret-of-the-hub" not in logged + done.stdout + done.stderr
    assert "threads 1 gpus ''" in (half / "run.log").read_text()
    entry.write_text(ENTRY.replace("seed == 3 or", "").replace("seed == 4", "False"))
    before = (half / "run.json").stat().st_mtime_ns
    done = run_sweep(*argv)
    assert done.returncode == 0 and "4 of 4 done" in done.stdout, done.stderr
    assert (half / "run.json").stat().st_mtime_ns == before  # finished runs are left alone
    assert "all 4 runs are finished" in run_sweep(*argv).stdout
    wrong = run_sweep(*argv, "--lora_r", "5")
    assert wrong.returncode == 2 and "with other settings (lora_r is 4, requested 5)" in wrong.stderr


@pytest.mark.slow
def test_killed_worker_loses_nothing(tmp_path: Path) -> None:
    """SIGKILL of Ray's worker in the middle of a run: the run goes on from its checkpoint to the same adapter."""
    pytest.importorskip("ray")
    embedded = tmp_path / "embedded"
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "embedded.py"), "--out", str(embedded)], check=True,
                          capture_output=True, text=True)  # fmt: skip
    base = Path(done.stdout.split()[-1])
    env = {"MODEL": str(base / "deberta-v3-tiny"), "DATA": str(base / "mrpc"), "HF_HUB_OFFLINE": "1"}
    argv = ["--tasks", "mrpc", "--methods", "rm-lora-v1", "--seeds", "1", "--cpus_per_run", "1",
            "--max_seq_length", "40", "--max_train_samples", "256", "--num_train_epochs", "10",
            "--save_steps", "5"]  # fmt: skip
    assert run_sweep(*argv, "--output", str(tmp_path / "straight"), **env).returncode == 0
    killed = tmp_path / "killed"
    folder = killed / "mrpc" / "rm-lora-v1" / "seed1"
    process = subprocess.Popen([sys.executable, str(SWEEP), *argv, "--output", str(killed)], env=os.environ | env,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert wait_for(lambda: (folder / "checkpoint-10" / "checkpoint.json").exists(), 120)
    guards = {int(p.parent.name) for p in Path("/proc").glob("*/cmdline") if _is_guard(p, folder)}
    (worker,) = {parent(pid) for pid in guards} - guards
    family = guard.descendants(worker)
    os.kill(worker, signal.SIGKILL)
    assert wait_for(lambda: not any(map(alive, family)), guard.GRACE + 10)
    assert "lost its worker" in process.communicate(timeout=300)[0] and process.returncode == 0
    assert "going on from" in (folder / "run.log").read_text()
    found = load_file(folder / "adapter.safetensors")
    expected = load_file(tmp_path / "straight" / "mrpc" / "rm-lora-v1" / "seed1" / "adapter.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)


def parent(pid: int) -> int:
    """Its parent process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _is_guard(cmdline: Path, folder: Path) -> bool:
    try:
        words = cmdline.read_bytes().split(b"\0")
    except OSError:
        return False
    return b"--guard" in words and str(folder).encode() in words

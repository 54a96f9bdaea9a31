"""docs/clusters.md and the Dockerfile: every snippet is parsed, and the recipe for torchrun is run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import yaml
from safetensors.torch import load_file
from test_docs import flags_of_the_entry_points

from loralib.sweep.command import make_parser

PAGE = (runs.ROOT / "docs" / "clusters.md").read_text()
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
SHELL = [text for kind, text in SNIPPETS if kind in ("bash", "sh")]
MANIFESTS = [yaml.safe_load(text) for kind, text in SNIPPETS if kind == "yaml"]
JOBS = [text for text in SHELL if text.startswith("#!/bin/bash\n#SBATCH")]


def name_of_job(text: str) -> str:
    (name,) = re.findall(r"--job-name=(\S+)", text)
    return str(name)


def manifest(kind: str) -> Any:
    (found,) = [found for found in MANIFESTS if found["kind"] == kind]
    return found


def test_every_snippet_of_shell_parses() -> None:
    assert len(SHELL) >= 8 and {kind for kind, _ in SNIPPETS} == {"bash", "sh", "yaml"}
    for text in SHELL:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_programs_and_scripts_of_the_page_exist() -> None:
    named = set(re.findall(r"(?:bash|python) ([\w/-]+\.(?:sh|py))|\b([A-Z][\w-]+/run_glue\.py)", PAGE))
    files = {name.removeprefix("/opt/rm-lora-glue/") for pair in named for name in pair if name}
    assert {"scripts/sweep.py", "scripts/rte.sh", "AdaLoRA/run_glue.py"} <= files
    assert all((runs.ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("text", JOBS, ids=name_of_job)
def test_jobs_of_slurm_are_requeued_only_after_sigterm(text: str) -> None:
    words = shlex.split(" ".join(re.findall(r"^#SBATCH (.*)$", text, re.M)))
    known = "job-name array nodes gpus gpus-per-node ntasks-per-node cpus-per-task mem time signal requeue open-mode "
    known += "output exclusive"
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    assert options.keys() <= set(known.split()) and re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    if "requeue" in options:  # what the script makes of the signal is tried below
        assert options["signal"] in ("TERM@120", "B:USR1@120") and options["open-mode"] == "append"
        assert text.count('scontrol requeue "$SLURM_JOB_ID"') == 1
    assert "overwrite_output_dir" not in text


# A program that ends with $STATUS, or on SIGTERM, after some time, writes `checkpoint` and ends with $STOPPED.
STANDIN = """#!/bin/bash
echo $$ > run.pid
trap 'sleep 0.4; touch checkpoint; exit "$STOPPED"' TERM
[[ -z "$STATUS" ]] || exit "$STATUS"
touch begun
while :; do sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
if [[ "$1" == show ]]; then echo first; else echo "$@" >> requeued; fi
"""
SCANCEL = """#!/bin/bash
[[ "$*" == "--signal=TERM 77" ]] && kill -TERM "$(cat run.pid)"
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of stand-ins for the programs of SLURM and for torchrun."""
    folder = tmp_path / "tools"
    folder.mkdir()
    texts = {"srun": STANDIN, "torchrun": STANDIN, "scontrol": SCONTROL, "scancel": SCANCEL}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def begin_job(text: str, tools: Path, **variables: str) -> subprocess.Popen[bytes]:
    """The batch script in the folder of its tools."""
    there = text.replace('cd "$HOME/rm-lora-glue" && source .venv/bin/activate', ":")
    assert there != text
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_ARRAY_TASK_ID": "3"}
    environment = os.environ | slurm | variables | {"PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", "-c", there], env=environment, cwd=tools.parent)


SIGNALLED = [text for text in JOBS if "--signal=B:USR1" in text]


@pytest.mark.parametrize("text", SIGNALLED, ids=name_of_job)
@pytest.mark.parametrize(
    ("number", "stopped", "requeued"),
    [
        (signal.SIGUSR1, 1, True),  # the time is nearly over; torchrun has a status of its own
        (signal.SIGUSR1, 0, False),  # the run was at its end
        (signal.SIGTERM, 1, False),  # scancel
    ],
)
def test_a_signal_to_the_batch_script(text: str, number: int, stopped: int, requeued: bool, tools: Path) -> None:
    """The script waits for the checkpoint, and the job goes back into the queue where its time was over."""
    job = begin_job(text, tools, STATUS="", STOPPED=str(stopped))
    deadline = time.time() + 30
    while not (tools.parent / "begun").exists():
        assert job.poll() is None and time.time() < deadline
        time.sleep(0.02)
    job.send_signal(number)
    if number == signal.SIGTERM and "srun" in text:  # SLURM sends it to all processes
        os.kill(int((tools.parent / "run.pid").read_text()), signal.SIGTERM)
    assert job.wait(30) == stopped and (tools.parent / "checkpoint").exists()
    assert (tools.parent / "requeued").exists() == requeued
    assert not requeued or (tools.parent / "requeued").read_text() == "requeue 77\n"


@pytest.mark.parametrize("text", [text for text in JOBS if "scontrol requeue" in text], ids=name_of_job)
def test_a_job_that_ends_by_itself(text: str, tools: Path) -> None:
    """It is requeued only at status 143, and where torchrun hides the status, never without the signal."""
    for status in (0, 1, 2, 3, 130, 143):
        (tools.parent / "requeued").unlink(missing_ok=True)
        assert begin_job(text, tools, STATUS=str(status), STOPPED="0").wait(30) == status
        assert (tools.parent / "requeued").exists() == (status == 143 and text not in SIGNALLED)


def test_the_sweep_on_slurm_meets_its_own_ray(tools: Path) -> None:
    (text,) = [text for text in JOBS if "symmetric-run" in text]
    (tools / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" "$@" > called\n')
    assert begin_job(text, tools, SLURM_CPUS_PER_TASK="32").wait(30) == 0
    mode, token, *words = (tools.parent / "called").read_text().splitlines()
    assert mode == "token" and re.fullmatch(r"[0-9a-f]{64}", token)
    own, sweep = words[: words.index("--")], words[words.index("--") + 1 :]
    assert own[:2] == ["ray", "symmetric-run"] and own[4:] == ["--min-nodes", "2", "--num-cpus", "32"]
    assert sweep[:2] == ["python", "scripts/sweep.py"]
    parsed, rest = make_parser("").parse_known_args(sweep[2:])
    assert not rest and ["--address", parsed.address] == own[2:4]
    host, port = parsed.address.split(":")
    assert port == "6379" and host and not host.startswith("127.")


def test_the_job_of_kubernetes_ends_at_status_2_and_goes_on_at_143() -> None:
    spec = manifest("Job")["spec"]
    pod = spec["template"]["spec"]
    rules = {status: rule["action"] for rule in spec["podFailurePolicy"]["rules"]
             for status in rule.get("onExitCodes", {}).get("values", [])}  # fmt: skip
    assert rules == {2: "FailJob", 3: "FailJob", 143: "Ignore"} and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert all(rule["onExitCodes"]["containerName"] == container["name"]
               for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule)  # fmt: skip
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    script, *flags = container["args"]
    assert (runs.ROOT / script).is_file()
    assert {flag.partition("=")[0] for flag in flags} <= flags_of_the_entry_points()


def test_the_cluster_of_kuberay_shares_image_token_and_volumes() -> None:
    job = manifest("RayJob")["spec"]
    cluster = job["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [pod["template"]["spec"]["containers"][0] for pod in pods]
    assert len({c["image"] for c in containers}) == 1
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}\n" in (runs.ROOT / "constraints.txt").read_text()
    assert all("/output" in {m["mountPath"] for m in c["volumeMounts"]} for c in containers)
    words = shlex.split(job["entrypoint"])
    (clone,) = re.findall(r"^WORKDIR (\S+)$", (runs.ROOT / "Dockerfile").read_text(), re.M)
    assert words[:2] == ["python", f"{clone}/scripts/sweep.py"] and job["shutdownAfterJobFinishes"] is True
    parsed, rest = make_parser("").parse_known_args(words[2:])
    assert not rest and parsed.output == "/output" and parsed.address == "auto" and parsed.seeds == [1, 2, 3, 4, 5]


def test_the_dockerfile_has_what_it_copies_and_installs_as_the_pages_say() -> None:
    text = re.sub(r"\\\n\s*", "", (runs.ROOT / "Dockerfile").read_text())
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in lines} == {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT"}
    assert lines[0][0] == "FROM" and lines[-1] == ["ENTRYPOINT", '["python"]']
    for word, rest in lines:
        if word == "RUN":
            subprocess.run(["bash", "-n"], input=rest, text=True, check=True)
        if word == "COPY":
            assert all((runs.ROOT / source).exists() for source in rest.split()[:-1])
    (at,) = [i for i, (_, rest) in enumerate(lines) if rest.startswith("pip install")]
    assert lines[at][1] == "pip install --no-cache-dir -c constraints.txt -e '.[sweep]' 'ray[default]'"
    before = [rest.split()[:-1] for word, rest in lines[:at] if word == "COPY"]
    assert "." not in sum(before, []) and lines[at + 1] == ["COPY", ". ."]  # other changes leave that layer alone
    assert {"setup.py", "pyproject.toml", "constraints.txt", "loralib/__init__.py"} == set(sum(before, []))
    assert "pip install -c constraints.txt -e '.[sweep]'" in (runs.ROOT / "docs" / "sweeps.md").read_text()
    ignored = (runs.ROOT / ".dockerignore").read_text().split()
    assert {"output", ".venv*"} <= set(ignored) and ".git" not in ignored


@pytest.mark.slow
def test_the_recipe_for_torchrun_goes_on_after_sigterm_and_ends_as_undisturbed(
    tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path, tools: Path
) -> None:
    """The page's own script with two processes on the CPU; scontrol is a stand-in that writes down the job's number."""
    (job,) = [text for text in JOBS if "torchrun --standalone" in text]
    flags = runs.LONG_RUN | {"model_name_or_path": str(tiny_model_dir), "dataset_name": str(mrpc_dir)}
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
    (tools / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    changed = job.replace('cd "$HOME/rm-lora-glue" && source .venv/bin/activate', f"cd {runs.ROOT}")
    changed = changed.replace("--nproc_per_node 4", "--nproc_per_node 2")
    assert changed.count(str(runs.ROOT)) == 1 and "--nproc_per_node 2" in changed
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "77", "PATH": f"{tools}:{os.environ['PATH']}"}

    def begin(name: str) -> subprocess.Popen[bytes]:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(flags | {"output_dir": str(tmp_path / name)}))
        script = tmp_path / f"{name}.sh"
        script.write_text(changed.replace("run.yaml", str(tmp_path / f"{name}.yaml")))
        log = open(tmp_path / f"{name}.log", "ab")  # noqa: SIM115 - the process keeps it
        return subprocess.Popen(["bash", str(script)], env=environment, stdout=log, stderr=log)

    def record(name: str) -> dict[str, Any]:
        return json.loads((tmp_path / name / "run.json").read_text())

    def stop(number: int) -> int:
        """Begin or go on, and signal only the batch script, as B: says, after the next log. Return the last step."""
        said = (tmp_path / "stopped.log").read_text().count("'loss'") if (tmp_path / "stopped.log").exists() else 0
        job = begin("stopped")
        while (tmp_path / "stopped.log").read_text().count("'loss'") == said:
            assert job.poll() is None, (tmp_path / "stopped.log").read_text()[-3000:]
            time.sleep(0.05)
        job.send_signal(number)
        assert job.wait(120) != 0 and record("stopped")["status"] == "interrupted"
        assert (tmp_path / "stopped" / f"checkpoint-{record('stopped')['steps']}").is_dir()
        return int(record("stopped")["steps"])

    cancelled = stop(signal.SIGTERM)
    assert 0 < cancelled and not (tmp_path / "requeued").exists()  # as by scancel
    assert cancelled < stop(signal.SIGUSR1) < 150
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert begin("stopped").wait(300) == 0 and begin("straight").wait(300) == 0
    assert record("stopped")["status"] == "finished" and record("stopped")["world_size"] == 2
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"  # a run that ends well stays out of the queue
    flags["lora_r"] = 0
    assert begin("refused").wait(120) != 0
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"  # and so does bad input
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("straight", "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

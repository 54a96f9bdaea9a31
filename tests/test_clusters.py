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

from loralib.sweep.command import make_parser

PAGE = (runs.ROOT / "docs" / "clusters.md").read_text()
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
SHELL = [text for kind, text in SNIPPETS if kind in ("bash", "sh")]
MANIFESTS = [yaml.safe_load(text) for kind, text in SNIPPETS if kind == "yaml"]
JOBS = [text for text in SHELL if text.startswith("#!/bin/bash\n#SBATCH")]


def manifest(kind: str) -> Any:
    (found,) = [found for found in MANIFESTS if found["kind"] == kind]
    return found


def test_every_snippet_of_shell_parses() -> None:
    assert len(SHELL) >= 8 and {kind for kind, _ in SNIPPETS} == {"bash", "sh", "yaml"}
    for text in SHELL:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_programs_and_scripts_of_the_page_exist() -> None:
    named = set(re.findall(r"(?:bash|python) ([\w/-]+\.(?:sh|py))|\b([A-Z][\w-]+/run_glue\.py)", PAGE))
    files = {name for pair in named for name in pair if name}
    assert {"scripts/sweep.py", "scripts/rte.sh", "AdaLoRA/run_glue.py"} <= files
    assert all((runs.ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("text", JOBS, ids=lambda text: re.search(r"job-name=(\S+)", text)[1])  # type: ignore[index]
def test_jobs_of_slurm_are_requeued_after_sigterm_alone(text: str) -> None:
    words = shlex.split(" ".join(re.findall(r"^#SBATCH (.*)$", text, re.M)))
    known = (
        "job-name array nodes gpus gpus-per-node ntasks-per-node cpus-per-task mem time signal requeue open-mode output"
    )
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    assert options.keys() <= set(known.split()) and re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    if "requeue" in options:
        assert options["signal"].endswith("TERM@120") and options["open-mode"] == "append"
        assert re.search(r"if \[\[ (\$status -eq 143|-n \$\{stopped:-\}) \]\]|if grep -q .*interrupted", text)
        assert text.count("scontrol requeue") == 1
    assert "overwrite_output_dir" not in text


def test_the_job_of_kubernetes_ends_at_status_2_and_goes_on_at_143() -> None:
    spec = manifest("Job")["spec"]
    pod = spec["template"]["spec"]
    rules = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in spec["podFailurePolicy"]["rules"]
             if "onExitCodes" in rule}  # fmt: skip
    assert rules == {2: "FailJob", 143: "Ignore"} and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert all(rule["onExitCodes"]["containerName"] == container["name"]
               for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule)  # fmt: skip
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    script, *flags = container["args"]
    help_text = subprocess.run(
        [sys.executable, str(runs.ROOT / script), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(re.search(rf"{flag.partition('=')[0]}\b", help_text) for flag in flags)


def test_the_cluster_of_kuberay_shares_image_token_and_volumes() -> None:
    job = manifest("RayJob")["spec"]
    cluster = job["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [pod["template"]["spec"]["containers"][0] for pod in pods]
    assert len({c["image"] for c in containers}) == 1
    assert all({e["name"] for e in c["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} for c in containers)
    assert all("/output" in {m["mountPath"] for m in c["volumeMounts"]} for c in containers)
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["python", "scripts/sweep.py"] and job["shutdownAfterJobFinishes"] is True
    parsed, rest = make_parser("").parse_known_args(words[2:])
    assert not rest and parsed.output == "/output" and parsed.seeds == [1, 2, 3, 4, 5]


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
    assert "pip install --no-cache-dir -c constraints.txt -e '.[sweep]'" in text
    assert "pip install -c constraints.txt -e '.[sweep]'" in (runs.ROOT / "docs" / "sweeps.md").read_text()
    ignored = (runs.ROOT / ".dockerignore").read_text().split()
    assert {"output", ".venv*"} <= set(ignored) and ".git" not in ignored


@pytest.mark.slow
def test_the_recipe_for_torchrun_goes_on_after_sigterm_and_ends_as_undisturbed(
    tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    """The page's own script with two processes on the CPU; scontrol is a stand-in that writes down the job's number."""
    (job,) = [text for text in JOBS if "torchrun --standalone" in text]
    flags = {
        "model_name_or_path": str(tiny_model_dir), "dataset_name": str(mrpc_dir), "do_train": True, "do_eval": True,
        "apply_lora": True, "apply_adalora": True, "lora_type": "svd", "lora_r": 4, "lora_alpha": 8, "target_rank": 2,
        "init_warmup": 5, "final_warmup": 10, "mask_interval": 2, "max_steps": 150, "learning_rate": 0.01,
        "max_seq_length": 32, "logging_steps": 10, "save_steps": 1000, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "ddp_backend": "gloo", "per_device_train_batch_size": 4,
    }  # fmt: skip
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
    (tools / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
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

    stopped = begin("stopped")
    while "'loss'" not in (tmp_path / "stopped.log").read_text():
        assert stopped.poll() is None, (tmp_path / "stopped.log").read_text()[-3000:]
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)  # to the batch script alone, as B: says
    assert stopped.wait(120) != 0
    assert record("stopped")["status"] == "interrupted" and 0 < record("stopped")["steps"] < 150
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert begin("stopped").wait(300) == 0 and begin("straight").wait(300) == 0
    assert record("stopped")["status"] == "finished" and record("stopped")["world_size"] == 2
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"  # a run that ends well stays out of the queue
    flags["lora_r"] = 0
    assert begin("refused").wait(120) != 0
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"  # and so does bad input
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("straight", "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

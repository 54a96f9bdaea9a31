"""What a result depends on beside its flags: versions, devices, commit."""

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "datasets", "evaluate", "accelerate", "scipy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The devices that a process sees: names of the GPUs and of the CPU, and the number of threads."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cpu": cpu_name(), "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """The model of the CPU where the system tells it, otherwise its architecture."""
    names: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def forget_peak_memory() -> None:
    """Let `peak_memory` count from here on. This works for GPUs; on a CPU the peak is that of the whole process."""
    for i in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(i)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory that was in use, in MB of 10^6 bytes, and what was measured.

    With GPUs this counts the tensors of this process on its fullest GPU, on a CPU everything that the process has held.
    """
    if device.type == "cuda":
        used = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        return {"mb": round(used / 1e6, 1), "of": "tensors on the fullest GPU of the first process"}
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"mb": round(used / 1e6, 1), "of": "first process, from its start on"}


def git_commit() -> str | None:
    """Commit of the checkout that holds this file, "+changes" where files differ from it; None outside of git.

    Results files in scripts/results do not count: a sweep appends to one while it runs.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)scripts/results")
        return (git("rev-parse", "HEAD") + ("+changes" if changes else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None

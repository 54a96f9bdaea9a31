"""What a result depends on beside its flags: versions, devices, commit."""

import platform
import resource
import subprocess
import sys
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
    """The devices that a process sees, CPU and threads."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


def forget_peak_memory() -> None:
    """Let `peak_memory` count from here on, on the GPUs; a process's own peak is that of its whole life."""
    for i in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(i)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory that was in use, in MB of 10^6 bytes, and what was measured.

    On GPUs the tensors of this process, on its fullest GPU; on a CPU all that the process has held so far.
    """
    if device.type == "cuda":
        used = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        return {"mb": round(used / 1e6, 1), "of": "tensors on the fullest GPU of the first process"}
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"mb": round(used / 1e6, 1), "of": "first process, from its start on"}


def git_commit() -> str | None:
    """Commit of the checkout that holds this file, "+changes" where files differ from it; None outside of git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        return (git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None

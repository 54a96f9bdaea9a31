"""Folders that the code of commit 409de3b wrote, each of a run that SIGTERM stopped at step 5 of 12, are gone on from.

tests/fixtures/409de3b holds the pretrained model, the data, the flags (runs.json) and the interrupted folders. The end
is held against a straight run of today's code on the same machine. Both must be bitwise the same where today's straight
run passes step 5 with the very tensors of the fixture; on a processor whose kernels round otherwise it does not, and
then both must agree within 1e-4.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures" / "409de3b"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a run or checkpoint: an adapter, or with full fine-tuning the model."""
    adapter = folder / "adapter.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def numbers(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All logs, and the curve over stages, without what depends on the clock."""
    logs = record["history"] + [stage["metrics"] | {"steps": stage["steps"]} for stage in record.get("stages", [])]
    return [{k: v for k, v in log.items() if not k.endswith(("_runtime", "_per_second"))} for log in logs]


@pytest.mark.parametrize("name", ["adalora", "sora", "rm-lora", "full"])
def test_a_run_of_409de3b_goes_on(name: str, entry_point: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURES, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    told = json.loads(Path("runs.json").read_text())[name]
    stage = "stage-1" if name == "sora" else "."
    before = json.loads(Path(name, stage, "run.json").read_text())
    assert (before["status"], before["steps"]) == ("interrupted", 5)
    early = tensors(Path(name, stage, "checkpoint-5"))
    entry_point(told["entry"]).main([*told["flags"], "--output_dir", name])
    # the later --save_total_limit wins
    entry_point(told["entry"]).main([*told["flags"], "--output_dir", "straight", "--save_total_limit", "9"])
    here = tensors(Path("straight", stage, "checkpoint-5"))
    same_kernels = all(torch.equal(early[key], here[key]) for key in here)
    resumed, straight = (json.loads(Path(folder, "run.json").read_text()) for folder in (name, "straight"))
    assert resumed["status"] == straight["status"] == "finished"
    ends = tensors(Path(name)), tensors(Path("straight"))
    assert ends[0].keys() == ends[1].keys()
    for key in ends[0]:
        assert (ends[0][key] - ends[1][key]).abs().max() <= (0 if same_kernels else 1e-4), key
    if same_kernels:
        assert numbers(resumed) == numbers(straight)

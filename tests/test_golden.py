"""The recorded trajectories of the released code hold (every ledger row marked G)."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import replay_golden  # noqa: E402

CASES = sorted((HERE / "golden").glob("*.json"))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_recorded_trajectory(case: Path, tmp_path: Path) -> None:
    result = replay_golden.replay(case, str(tmp_path))
    assert replay_golden.within_tolerance(result), result
    assert result["max_logit_diff"] < 1e-5


def test_a_changed_record_fails(tmp_path: Path) -> None:
    """The replay notices: another penalty weight, and a rank that differs at one step."""
    import json
    import shutil

    for source in (HERE / "golden").glob("adalora.*"):
        shutil.copy(source, tmp_path)
    path = tmp_path / "adalora.json"
    case = json.loads(path.read_text())
    case["hparams"]["reg_orth_coef"] *= 1.01
    path.write_text(json.dumps(case))
    assert not replay_golden.within_tolerance(replay_golden.replay(path, str(tmp_path / "a")))
    case["hparams"]["reg_orth_coef"] /= 1.01
    counts = case["expected"]["allocations"][10]["nonzero"]
    counts[next(iter(counts))] += 1
    path.write_text(json.dumps(case))
    assert not replay_golden.within_tolerance(replay_golden.replay(path, str(tmp_path / "b")))

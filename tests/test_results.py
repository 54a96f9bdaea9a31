"""docs/results.md and the README's table hold what the committed results files say."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from runs import ROOT

from loralib.report import page

PAGES = ["docs/results.md", "README.md"]


@pytest.fixture
def command() -> list[str]:
    """The page's own command."""
    (line,) = re.findall(r"^python scripts/report\.py (.*)$", (ROOT / "docs" / "results.md").read_text(), re.M)
    return shlex.split(line)


def test_the_pages_hold_what_the_results_files_say(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the page, run on a copy, changes neither page."""
    for name in (*PAGES, "scripts/results/comparison.jsonl", "scripts/results/comparison.tuning.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "draw", lambda *_: ({}, []))
    assert page.main(command, None, ROOT / "scripts" / "published.json") == 0
    assert [word for flag, word in zip(command, command[1:], strict=False) if flag == "--page"] == PAGES
    for name in PAGES:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name


def test_the_figures_of_the_pages_are_in_the_repository() -> None:
    named = {(ROOT / name).parent / file
             for name in PAGES for file in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / name).read_text())}  # fmt: skip
    assert len(named) >= 4 and all(file.is_file() for file in named)


def test_the_prose_names_no_number_of_a_score() -> None:
    """Scores stand in the tables alone, which the test above holds to the files."""
    text = re.sub(r"<!-- report: .*?<!-- end of report -->", "", (ROOT / "docs" / "results.md").read_text(), flags=re.S)
    assert not re.search(r"\d+\.\d\d", text)

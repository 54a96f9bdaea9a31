"""The set-up files agree with each other, and the scripts refuse what they must."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import quickstart_table
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): pin for name, pin in found.items()}


def declared() -> dict[str, list[Requirement]]:
    """Requirements by extra ("" for none), as setup.py states them."""
    code = "import json, runpy, setuptools as s; s.setup = lambda **k: print(json.dumps(k)); runpy.run_path('setup.py')"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stated = json.loads(out)
    folders = {f.parent.relative_to(ROOT) for f in (ROOT / "loralib").rglob("*.py")}
    assert stated["name"] != "loralib" and sorted(stated["packages"]) == sorted(".".join(f.parts) for f in folders)
    groups = {"": stated["install_requires"], **stated["extras_require"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


def test_every_direct_dependency_is_pinned_inside_its_range() -> None:
    pinned = pins()
    for extra in ("", "test", "peft"):
        for requirement in declared()[extra]:
            pin = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), (requirement, pin)
    assert pinned["torch"] == "2.13.0"


def test_every_range_begins_where_the_oldest_set_is() -> None:
    """So each lower end is a version that `test.sh --oldest` runs with."""
    oldest = pins("constraints-oldest.txt")
    for extra in ("", "test", "peft"):
        for requirement in declared()[extra]:
            (start,) = (s.version for s in requirement.specifier if s.operator == ">=")
            pin = oldest[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin) and f"{pin}.".startswith(f"{start}."), (requirement, pin)


def test_ranges_end_below_the_next_major_version() -> None:
    """A minor version that nobody has tried yet can be installed: what it may not drop is a test of its own."""
    for name, allowed, not_allowed in (("torch", "2.99", "3.0"), ("transformers", "5.99", "6.0")):
        (requirement,) = (r for r in declared()[""] if r.name == name)
        assert requirement.specifier.contains(allowed) and not requirement.specifier.contains(not_allowed)


def test_pins_fit_each_other() -> None:
    """What an installed pinned package asks for is pinned too, in the range that it asks for."""
    pinned = pins()
    for name, pin in pinned.items():
        try:
            if version(name).split("+")[0] != pin:
                continue
        except ModuleNotFoundError:
            continue
        for line in requires(name) or []:
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(wanted.name)
            if other in pinned:
                assert wanted.specifier.contains(pinned[other], prereleases=True), (name, line, pinned[other])


def test_conda_file_keeps_its_name_and_a_python_that_setup_allows() -> None:
    text = (ROOT / "env.yml").read_text()
    assert re.search(r"^name: py39$", text, re.M)
    assert re.search(r"^  - python=3\.11$", text, re.M)
    assert "-c constraints.txt" in text


def fake_clone(folder: Path) -> Path:
    """Only the set-up scripts, in a folder with a space in its name."""
    clone = folder / "a clone"
    (clone / "scripts").mkdir(parents=True)
    for name in ("scripts/setup_env.sh", "scripts/quickstart.sh", "scripts/test.sh", "setup.py", "constraints.txt"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    return clone


def on_path(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose PATH begins with these shell scripts."""
    folder.mkdir()
    for name, body in programs.items():
        program = folder / name.replace("_", ".")
        program.write_text("#!/bin/sh\n" + textwrap.dedent(body))
        program.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    return clean | {"PATH": f"{folder}:/usr/bin:/bin"}


OLD = """
case "$*" in
    *--version*) echo Python 3.9.18 ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path, script: str) -> None:
    clone = fake_clone(tmp_path)
    names = {name: OLD for name in ("python", "python3", "python3_11", "python3_12", "python3_13")}
    run = subprocess.run(
        ["bash", str(clone / "scripts" / script)],
        env=on_path(tmp_path / "bin", **names),
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and run.stdout == ""
    assert re.fullmatch(r"error: Python 3\.11 or later is needed .*Python 3\.9\.18.*env\.yml.*\n", run.stderr), (
        run.stderr
    )
    assert not (clone / ".venv").exists()


# A Python whose venv makes another such Python, and whose pip writes down how it was called.
RECORDER = """
case "$*" in
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    *"-m pip"*) echo "$*" >> "$RECORD"; exit "${PIP_EXIT:-0}" ;;
    *find_spec*) exit 1 ;;
    *embedded.py*) echo /embedded ;;
    *run_glue.py*) echo "$*" >> "$RECORD"; case "$*" in *SoRA/*) exit "${SORA_EXIT:-0}" ;; esac ;;
    *quickstart_table.py* | *"-m pytest"*) echo "$*" >> "$RECORD" ;;
esac
"""


def recorded(script: str, tmp_path: Path, *flags: str, again: bool = False, **env: str) -> tuple[int, str, list[str]]:
    """(exit status, stderr, calls of pip, entry points, table and pytest) of a script whose Python only records."""
    clone = tmp_path / "a clone" if again else fake_clone(tmp_path)
    record = tmp_path / "record"
    record.write_text("")
    bin_ = tmp_path / ("bin2" if again else "bin")
    environment = on_path(bin_, python3_11=RECORDER, python=RECORDER) | {"RECORD": str(record)} | env
    command = ["bash", str(clone / "scripts" / script), *flags]
    run = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    return run.returncode, run.stderr, record.read_text().splitlines()


def quickstart(tmp_path: Path, *flags: str, again: bool = False, **env: str) -> tuple[int, str, list[str]]:
    return recorded("quickstart.sh", tmp_path, *flags, again=again, **env)


@pytest.mark.parametrize(
    ("flags", "called"),
    [
        ((), "-m pytest -n logical --maxprocesses 4 --dist loadfile"),
        (("-n", "0", "--pdb"), "-m pytest -n logical --maxprocesses 4 --dist loadfile -n 0 --pdb"),
        (("-m", "slow"), "-m pytest -m slow"),
    ],
)
def test_only_the_default_tier_runs_in_several_processes(tmp_path: Path, flags: tuple[str, ...], called: str) -> None:
    code, said, calls = recorded("test.sh", tmp_path, *flags)
    assert code == 0, said
    assert calls[-1].endswith(called)


def test_quickstart_installs_once_then_runs_five_methods_and_the_table(tmp_path: Path) -> None:
    code, _, calls = quickstart(tmp_path)
    assert code == 0
    assert calls[0].endswith("install -qq --disable-pip-version-check -c constraints.txt -e .")
    assert [call.split("/run_glue.py")[0].rsplit("/", 1)[1] for call in calls[1:6]] == [
        "AdaLoRA",
        "AdaLoRA",
        "SoRA",
        "RM-LoRA",
        "RM-LoRA",
    ]
    for call in calls[1:6]:
        assert "--model_name_or_path /embedded/deberta-v3-tiny --dataset_name /embedded/mrpc" in call
    assert "quickstart_table.py" in calls[6] and len(calls) == 7
    code, _, calls = quickstart(tmp_path, again=True)
    assert code == 0 and len(calls) == 6 and not any("-m pip" in call for call in calls)


def test_quickstart_with_own_model_and_task_is_the_paper_run(tmp_path: Path) -> None:
    flags = ("--model_name_or_path", "microsoft/deberta-v3-base", "--task_name=mrpc", "--seed", "7")
    code, _, calls = quickstart(tmp_path, *flags)
    assert code == 0
    for call in calls[1:6]:
        assert "embedded" not in call and "--overwrite_output_dir" not in call
        assert "--learning_rate 1e-3 --num_train_epochs 5 --max_seq_length 128" in call
        assert call.endswith("--model_name_or_path microsoft/deberta-v3-base --task_name=mrpc --seed 7")
        assert "/output/deberta-v3-base-mrpc/" in call


def test_quickstart_keeps_one_folder_a_method_under_the_users_output_dir(tmp_path: Path) -> None:
    code, _, calls = quickstart(tmp_path, "--output_dir", "/some where", "--num_train_epochs", "1")
    assert code == 0
    folders = [re.search(r"--output_dir (.*?) --num", call) for call in calls[1:6]]
    assert [f and f[1] for f in folders] == [
        f"/some where/{m}" for m in ("lora", "adalora", "sora", "rm-lora-v1", "rm-lora-v2")
    ]


def test_a_failing_step_stops_the_quickstart_with_a_sentence(tmp_path: Path) -> None:
    code, stderr, calls = quickstart(tmp_path, SORA_EXIT="2")
    assert code == 1 and stderr.endswith("error: sora failed, see the message above; nothing after it was run.\n")
    assert len(calls) == 4
    code, stderr, calls = quickstart(tmp_path, again=True)
    assert code == 0


def test_a_failed_installation_is_reported_and_tried_again(tmp_path: Path) -> None:
    code, stderr, calls = quickstart(tmp_path, PIP_EXIT="1")
    assert code == 1 and stderr.startswith("error: the installation failed") and len(calls) == 1
    code, _, calls = quickstart(tmp_path, again=True)
    assert code == 0 and "-m pip" in calls[0]


def test_table_reads_the_runs_and_names_missing_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {
        "method": "sora",
        "metrics": {"eval_accuracy": 0.9375, "eval_f1": 0.95},
        "parameters": {
            "trainable": 12345,
            "head": 100,
            "remaining": 200,
            "modules": {"a": {"rank": 1}, "b": {"rank": 2}},
        },
        "wall_seconds": 12.3,
        "one_class": {"eval_accuracy": 0.65625, "eval_f1": 0.7},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    lines = quickstart_table.main([str(tmp_path)]).splitlines()
    assert lines[0].split() == list(quickstart_table.HEADER)
    assert lines[2].split() == ["sora", "12,345", "300", "1.50", "93.8", "95.0", "65.6", "12"]
    with pytest.raises(SystemExit):
        quickstart_table.main([str(tmp_path), str(tmp_path / "none")])
    assert f"no run.json in {tmp_path / 'none'}" in capsys.readouterr().err


# ---- the wheel ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution as `pip wheel` builds it, from a copy of the clone: nothing is built in the clone itself."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "loralib", folder / "loralib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; print('\\n' + build_meta.build_wheel('.'))"
    run = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / run.stdout.splitlines()[-1]


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "loralib").rglob("*.py")}
    assert wanted | {"loralib/py.typed"} <= held
    others = {name for name in held if not name.startswith("loralib/") and ".dist-info/" not in name}
    assert not others, "a wheel that brings other top-level names would hide a user's own"


@pytest.mark.slow
def test_the_wheel_trains_outside_of_the_clone(
    wheel: Path, tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path
) -> None:
    """In an environment of its own, where nothing but the wheel and the libraries can be imported."""
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)  # what installing a wheel of Python files does
    libraries = [p for p in sys.path if p.endswith("site-packages") and not Path(p, "loralib").exists()]
    (site / "libraries.pth").write_text("\n".join(libraries))
    shutil.copy(ROOT / "AdaLoRA" / "run_glue.py", tmp_path / "train.py")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    python = str(tmp_path / "env" / "bin" / "python")
    every = (
        "import loralib, pkgutil, importlib; print(loralib.__file__); [importlib.import_module(m.name) for m in "
        "pkgutil.walk_packages(loralib.__path__, 'loralib.')]"
    )
    run = subprocess.run([python, "-c", every], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith(str(site)), run.stderr
    flags = f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --output_dir out --do_train --do_eval "
    flags += "--apply_lora --lora_r 2 --lora_alpha 4 --max_steps 2 --max_seq_length 32 --use_cpu"
    run = subprocess.run([python, "train.py", *flags.split()], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished" and record["commit"] is None
    assert (tmp_path / "out" / "adapter.safetensors").exists()

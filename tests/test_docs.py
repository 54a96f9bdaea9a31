"""The documentation is true: commands parse, flags and tests exist, ledger rows and code agree, links resolve."""

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import Trainer, TrainingArguments

from loralib.glue import flow
from loralib.glue.arguments import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, make_parser
from loralib.training.trainer import LoRATrainer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md")]
PAGES = sorted(page for page in PAGES if not page.parent.name.startswith("."))
METHODS = {"AdaLoRA": "AdaLoRAArguments", "SoRA": "SoRAArguments", "RM-LoRA": "RMLoRAArguments"}
OTHER_PROGRAMS = set("cd conda docker export git kill nvidia-smi pip pre-commit ray source tensorboard".split())
# Flags of TensorBoard and Slurm, and the abbreviation that the paper's commands use.
OTHER_FLAGS = {"--logdir", "--requeue", "--signal", "--exclusive", "--logging_step"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks whose info string is `kind` or begins with it."""
    fenced = re.findall(rf"^```{kind}\b[^\n]*\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    return [str(text) for text in fenced]


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a bash block as words, variables put in; without assignments and comments."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\[(--[^\]|]*)(\|[^\]]*)?\]", r"\1", line)  # [--optional this|that]: with the first choice
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                yield from [words] if words and words[0] not in ("do", "done", "for", "export") else []
                words = []
                continue
            word = re.sub(r"\$\{?(\w+)\}?", lambda m: variables.get(m[1], m[1]), word)
            assigned = re.fullmatch(r"(\w+)=(.*)", word)
            if assigned and (not words or words == ["export"]):
                variables[assigned[1]] = assigned[2]
            else:
                words.append(word)


def load(path: Path) -> ModuleType:
    """The module of a file, imported as `python FILE` finds it (its own folder first)."""
    name = f"docs_{path.parent.name}_{path.stem}".replace("-", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[name]


class Parsed(Exception):
    """Raised where a program has its arguments and would begin to work."""


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path, list[str]], None]:
    """parses(file, argv): the program of `file` takes these arguments; it stops before it does anything."""
    known_args, args = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args
    inside: list[bool] = []

    def parse_args(self: argparse.ArgumentParser, *a: Any, **k: Any) -> Any:
        inside.append(True)
        try:
            args(self, *a, **k)
        finally:
            inside.pop()
        raise Parsed

    def parse_known_args(self: argparse.ArgumentParser, *a: Any, **k: Any) -> Any:
        found = known_args(self, *a, **k)
        if inside or isinstance(self, type(make_parser(LoRAArguments))):
            return found
        unknown = [word for word in found[1] if word.startswith("--")]
        assert set(unknown) <= flags_of_the_entry_points(), unknown
        raise Parsed

    def start(*a: Any, **k: Any) -> Any:
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(flow, "start", start)

    def check(path: Path, argv: list[str]) -> None:
        assert path.is_file(), f"{path} does not exist"
        if path.name == "replay_golden.py":  # its arguments are files
            assert all(list(ROOT.glob(word)) for word in argv)
            return
        main = load(path).main
        if hasattr(load(path), "start"):  # an entry point
            monkeypatch.setattr(load(path), "start", start)
        if not inspect.signature(main).parameters:
            assert not argv, f"{path.name} takes no arguments"
            return
        with pytest.raises((Parsed, SystemExit)) as stopped:
            main(argv)
        assert stopped.type is Parsed or stopped.value.code == 0, capsys.readouterr().err

    return check


def check_command(words: list[str], parses: Callable[[Path, list[str]], None]) -> None:
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        with pytest.raises(Parsed):
            torchrun_parser().parse_args(words[1 : at + 1])
        words = ["python", *words[at:]]
    if words[-1] == "...":  # flags that the page has elsewhere
        assert (ROOT / words[1]).is_file() and {w for w in words if w.startswith("--")} <= known_flags()
    elif words[0] == "python" and words[1] != "-m":
        parses(ROOT / words[1], words[2:])
    elif words[0] == "bash":
        script, own = ROOT / words[1], words[2:]
        assert script.is_file(), f"{words[1]} does not exist"
        if "launch.sh" in script.read_text():  # a task's script tells what it would run
            place = {"DRY_RUN": "1", "NPROC": "1", "PYTHON": sys.executable}
            done = subprocess.run(words, cwd=ROOT, env=os.environ | place, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout, done.stderr
            for line in done.stdout.strip().splitlines():
                _, file, *argv = shlex.split(line)
                parses(Path(file), argv)
        elif own and script.name != "test.sh":  # the quickstart hands its flags to the entry points
            needed = "--apply_lora --lora_r 8 --lora_alpha 8 --output_dir o --model_name_or_path m"
            parses(ROOT / "AdaLoRA" / "run_glue.py", [*needed.split(), *own])
    else:
        assert words[0] in OTHER_PROGRAMS or words[:2] == ["python", "-m"], f"{words[0]} is not a known program"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path, parses: Callable[[Path, list[str]], None]) -> None:
    for block in blocks(page, "bash"):
        for words in commands(block):
            try:
                check_command(words, parses)
            except Exception as error:
                raise AssertionError(f"{shlex.join(words)}: {error}") from error


def test_a_wrong_command_is_noticed(parses: Callable[[Path, list[str]], None]) -> None:
    from loralib.errors import InputError

    usual = "--model_name_or_path m --output_dir o".split()
    (words,) = commands("A=x CUDA_VISIBLE_DEVICES=0 python AdaLoRA/run_glue.py \\\n  --task_name $A  # comment\n")
    assert words == ["python", "AdaLoRA/run_glue.py", "--task_name", "x"]
    parses(ROOT / "AdaLoRA" / "run_glue.py", [*usual, "--do_train"])
    with pytest.raises(InputError, match="--no_such_flag"):
        parses(ROOT / "AdaLoRA" / "run_glue.py", [*usual, "--no_such_flag", "1"])
    with pytest.raises(InputError, match="lora_type"):
        parses(ROOT / "RM-LoRA" / "run_glue.py", [*usual, "--lora_type", "svd"])
    with pytest.raises(AssertionError):
        parses(ROOT / "scripts" / "export_adapter.py", ["run", "--to", "nowhere"])


def test_commands_marked_quick_run() -> None:
    quick = {block for page in PAGES for block in blocks(page, "bash quick")}
    assert quick
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    for block in quick:
        done = subprocess.run(
            ["bash", "-euc", python + block], cwd=ROOT, env=one_thread, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ---- flags ----


@cache
def flags_of_the_entry_points() -> set[str]:
    options: set[str] = set()
    own = [getattr(load(ROOT / folder / "run_glue.py"), name) for folder, name in METHODS.items()]
    own.append(load(ROOT / "tests" / "variants" / "dora_glue.py").DoRAArguments)
    own.append(load(ROOT / "tests" / "variants" / "loraplus_glue.py").LoRAPlusArguments)
    own.append(load(ROOT / "tests" / "variants" / "peft_glue.py").PeftArguments)
    for cls in own:
        parser = make_parser(ModelArguments, DataArguments, cls, GlueTrainingArguments)
        options |= {option for action in parser._actions for option in action.option_strings}
    return options


@cache
def known_flags() -> set[str]:
    """Flags of the entry points, and those that the scripts' sources name."""
    files = [*(ROOT / "scripts").glob("*.*"), ROOT / "loralib" / "sweep" / "command.py"]
    sources = "".join(path.read_text() for path in files if path.suffix in (".py", ".sh"))
    torchrun = {option for action in torchrun_parser()._actions for option in action.option_strings}
    return flags_of_the_entry_points() | set(re.findall(r"--[A-Za-z][\w-]*", sources)) | torchrun | OTHER_FLAGS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_the_text_exist(page: Path) -> None:
    others = r"^(#SBATCH|srun|docker|.*ray start|.*pip) .*$|`srun .*?`"  # programs with flags of their own
    text = re.sub(others, "", re.sub(r"\\\n", " ", page.read_text()), flags=re.M)
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text))
    assert named <= known_flags(), named - known_flags()


@pytest.mark.parametrize("folder", METHODS)
def test_every_flag_of_a_method_is_on_its_page(folder: str) -> None:
    cls = getattr(load(ROOT / folder / "run_glue.py"), METHODS[folder])
    own = {field.name for field in dataclasses.fields(cls)} - {
        field.name for field in dataclasses.fields(LoRAArguments)
    }
    rows = [line for line in (ROOT / folder / "README.md").read_text().splitlines() if line.startswith("| `--")]
    documented = set(re.findall(r"`--(\w+)`", "\n".join(rows)))
    assert own <= documented, own - documented


def test_every_shared_flag_is_in_the_table() -> None:
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    shared = {
        f.name
        for c in (ModelArguments, DataArguments, LoRAArguments, GlueTrainingArguments)
        for f in dataclasses.fields(c)
        if f.init
    }
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    documented = set(re.findall(r"`--(\w+)`", "\n".join(rows)))
    assert shared - stock <= documented, shared - stock - documented


# ---- ledger ----


def ledger_rows() -> dict[str, str]:
    """The details of each row by its id."""
    parts = re.split(r"^#### ([A-Z]\d+) .*$", (ROOT / "docs" / "ledger.md").read_text(), flags=re.M)[1:]
    rows = {
        row_id: re.split(r"^## ", text, flags=re.M)[0] for row_id, text in zip(parts[::2], parts[1::2], strict=True)
    }
    assert len(rows) == len(parts) // 2, "an id stands twice"
    return rows


LEDGER = ledger_rows()


@pytest.mark.parametrize("row", LEDGER)
def test_ledger_row_names_tests_that_exist(row: str) -> None:
    (line,) = re.findall(r"^- Test: (.*)$", LEDGER[row], flags=re.M)
    assert re.search(r"^- Here: ", LEDGER[row], flags=re.M)
    named = re.findall(r"`(\w+\.py)::(\w+)`", line)
    assert named, line
    for file, test in named:
        source = ROOT / "tests" / file
        assert source.is_file() and re.search(rf"^def {test}\(", source.read_text(), flags=re.M), f"{file}::{test}"


def test_each_ledger_row_is_in_a_table_and_each_difference_on_its_method_s_page() -> None:
    text = (ROOT / "docs" / "ledger.md").read_text()
    listed = dict(re.findall(r"^\| \[([A-Z]\d+)\]\(#[^)]*\).*\| ([^|]*) \|$", text, flags=re.M))
    assert {*listed, "O1"} == set(LEDGER)
    for folder, letter in {"AdaLoRA": "A", "SoRA": "S", "RM-LoRA": "R"}.items():
        page = (ROOT / folder / "README.md").read_text()
        differing = [row for row, here in listed.items() if row[0] == letter and not here.startswith("as released")]
        assert re.findall(r"^- \[([A-Z]\d+)\]", page, flags=re.M) == differing


def test_ledger_ids_in_the_code_exist() -> None:
    files = [path for folder in ("loralib", *METHODS) for path in (ROOT / folder).rglob("*.py")]
    named: set[str] = set()
    for path in files:
        for phrase in re.findall(r"[Ll]edger((?:,? (?:and |to )?[A-Z]\d+)+)", path.read_text()):
            named |= set(re.findall(r"[A-Z]\d+", phrase))
    assert named and named <= set(LEDGER), named - set(LEDGER)


# ---- the map of the code ----


def names_in(file: Path) -> set[str]:
    """Functions, classes and methods of a module; a method as CLASS.METHOD."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_ways_through_the_files_lead_through_functions_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## Four ways through the files")[1].split("\n## ")[0]
    ways = re.split(r"^(?=[A-Z].*:\n\n1\. )", section, flags=re.M)[1:]
    assert len(ways) == 4
    for way in ways:
        assert re.findall(r"^(\d)\. ", way, flags=re.M) == list("12345"), way
        steps = re.findall(r"`([\w/-]+\.py): ([\w.]+)`", way)
        files = list(dict.fromkeys(file for file, _ in steps))
        assert len(files) >= 3 and all(name in names_in(ROOT / file) for file, name in steps), steps


def test_what_not_to_touch_names_code_and_tests_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    entries = re.split(r"^- ", text.split("## What not to touch lightly")[1].split("\n## ")[0], flags=re.M)[1:]
    assert len(entries) == 10
    for entry in entries:
        tests = re.findall(r"`(tests/[\w.]+/?)`", entry)
        assert tests and all((ROOT / test).exists() for test in tests), entry
        for file, name in re.findall(r"`([\w/-]+\.py): ([\w.]+)`", entry):
            assert name in names_in(ROOT / file), (file, name)
    bases = " ".join(entries[6].split()).split("The order is ")[1].split(", and")[0].split(", ")
    assert bases == [kind.__name__ for kind in LoRATrainer.__mro__ if issubclass(kind, Trainer)]


def test_the_map_of_the_tests_names_each_file_once() -> None:
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ")]
    header = next(i for i, line in enumerate(rows) if "tests/test_NAME.py" in line)
    named = [name for row in rows[header + 1 :] for name in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert sorted(named) == sorted(file.stem.removeprefix("test_") for file in (ROOT / "tests").glob("test_*.py"))


# ---- measured numbers ----


def results(name: str) -> Any:
    return json.loads((ROOT / "scripts" / "results" / name).read_text())


def test_the_numbers_of_speed_are_those_of_their_files() -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    record = results("cpu-base-8x128.json")
    for name, r in record["records"][0]["results"].items():
        numbers = [f"{r[key]:.2f}" for key in ("step_s", "ratio_to_peft", "ratio_to_frozen")]
        numbers += [f"{r['operations']:,}", f"{r['peak_memory_bytes'] / 1e6:,.0f}"]
        assert f"| {' | '.join([name, *numbers])} |" in text
        assert f"| {' | '.join([name, *numbers[:2], *numbers[3:]])} |" in (ROOT / "README.md").read_text()
    assert all(record["machine"][key] in text for key in ("date", "cpu", "torch", "transformers", "peft"))
    assert record["machine"]["command"].replace("'", '"') in text
    words = " ".join(text.split())
    four, half = (
        results(f"cpu-base-{name}.json")["records"][0]["results"] for name in ("4-layers-8x128", "8x128-bf16")
    )
    ratios = [f"{r[name]['ratio_to_peft']:.2f}" for r in (four, half) for name in ("lora", "adalora")]
    assert f"LoRA takes {ratios[0]} of PEFT's LoRA and AdaLoRA {ratios[1]} of PEFT's AdaLoRA" in words
    assert f"`--dtype bf16` {ratios[2]} and {ratios[3]}" in words
    for name in ("lora", "adalora"):
        ours, theirs = half[name]["operations"], half[f"peft {name}"]["operations"]
        assert f"{ours:,} operations, PEFT's {theirs:,}" in words or f"{ours:,}, PEFT's {theirs:,}" in words
    epoch = results("cpu-xsmall-mrpc-epoch.json")["runs"]
    for way in ("unpadded", "longest"):
        share = f"{epoch[way]['train_runtime_s'] / epoch['fixed']['train_runtime_s']:.2f}"
        assert share in words and share in (ROOT / "README.md").read_text()

    def spread(runs: list[dict[str, float]]) -> str:
        accuracies = [100 * run["eval_accuracy"] for run in runs]
        return f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}"

    padding = results("padding-five-seeds.json")
    for task, ways in padding["tasks"].items():
        assert all(len(ways[way]["runs"]) == 5 for way in ways)
        cells = [spread(ways[way]["runs"]) for way in ("fixed", "longest", "grouped")]
        assert f"| {task.upper()} | {' | '.join(cells)} |" in text
    assert f"other dropout gave {spread(padding['again']['runs'])}" in words


# ---- links and shown code ----


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)}, anchor


def test_variant_page_shows_the_tested_files() -> None:
    shown = [block.strip() for block in blocks(ROOT / "docs" / "variant.md", "python")]
    files = [path.read_text().strip() for path in (ROOT / "tests" / "variants").glob("*.py")]
    assert sorted(shown) == sorted(files)


def test_the_main_page_shows_the_four_commands_that_are_run_word_for_word() -> None:
    from test_four_commands import COMMANDS

    shown = [words for block in blocks(ROOT / "README.md", "bash") for words in commands(block)]
    for text in COMMANDS.values():
        (words,) = commands(text)
        assert words in shown

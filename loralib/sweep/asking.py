"""Computes each run's flags: runs its script with DRY_RUN=1, then the entry point's parser, without data or model.

python -m loralib.sweep.asking < questions.json     (runs in a process of its own, because the sweep imports no torch)
"""

import ast
import importlib.util
import inspect
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from loralib.errors import InputError
from loralib.sweep.plan import METHODS, ROOT, Job
from loralib.sweep.settings import RequestedRun, short_path, typed_flags


def ask(jobs: Sequence[Job], processes: int = 1) -> dict[Job, RequestedRun]:
    """Parse the flags of each run. Equal commands are parsed once.

    Args:
        processes: number of processes of one run; they share its batch.

    Raises:
        InputError: a script or an entry point refuses a flag or value; the message names the run.
    """
    kinds = {(job.task, job.arm, job.flags): job for job in jobs}
    with ThreadPoolExecutor(max_workers=4) as pool:
        printed = dict(zip(kinds, pool.map(lambda job: _dry_run(job, processes), kinds.values()), strict=True))
    parsed = _parse_all([command for command in printed.values() if _can_be_asked(command[0])])
    for kind, answer in ((kind, parsed.get(_key(command))) for kind, command in printed.items()):
        if answer is not None and "error" in answer:
            raise InputError(f"{kind[0]}, {kind[1].name}: {answer['error']}")
        if answer is not None and answer["arguments"].get("overwrite_output_dir"):
            raise InputError(
                f"{kind[0]}, {kind[1].name}: with --overwrite_output_dir each attempt at a run that was cut off would "
                "start over; remove the folders that are to be run again, or name another --output."
            )
    return {job: _asked(job, printed[kind], parsed.get(_key(printed[kind]))) for job, kind in _kinds_of(jobs)}


def _kinds_of(jobs: Sequence[Job]) -> Iterator[tuple[Job, Any]]:
    return ((job, (job.task, job.arm, job.flags)) for job in jobs)


def _key(command: tuple[str, list[str], int]) -> str:
    return json.dumps(command[:2])


def _dry_run(job: Job, processes: int) -> tuple[str, list[str], int]:
    """(entry point, its flags, number of processes) of a run, as the task's script prints them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OUTPUT", "SEED")}
    environment |= {"DRY_RUN": "1", "PYTHON": "python", "CUDA_VISIBLE_DEVICES": ""}
    environment.setdefault("NPROC", str(processes))
    with tempfile.TemporaryDirectory() as nowhere:  # the content of the run's own folder must not matter here
        command = replace(job, folder=Path(nowhere) / "run").command
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"its script ended with status {done.returncode}"]
        raise InputError(f"{job.task}, {job.arm.name}: {last[0].removeprefix('error: ')}")
    words = shlex.split(done.stdout.strip().splitlines()[-1])  # its last four are --seed S --output_dir D (plan.Job)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    count = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words[:at] else 1
    argv = words[at + 1 :]
    return words[at], [*argv[:-4], "--seed", "0", "--output_dir", "run"], count


def _can_be_asked(entry: str) -> bool:
    """Whether a file looks like an entry point of docs/variant.md, which runs nothing when it is imported.

    It has a function `main` and uses the names `parse` and `__name__`.
    """
    try:
        tree = ast.parse(Path(entry).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return False
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    return has_main and {"parse", "__name__"} <= names


def _asked(job: Job, command: tuple[str, list[str], int], answer: Mapping[str, Any] | None) -> RequestedRun:
    entry, argv, processes = command
    method = None if job.arm.own else METHODS[job.arm.method]
    arguments = None if answer is None else answer["arguments"]
    batch = None
    data: tuple[str, ...] = ()
    if arguments is not None:
        batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * processes
        name = arguments.get("dataset_name")
        if name is not None:  # the folder of the task, or one with a folder for each task
            data = (Path(name).name, *([job.task] if (Path(name) / job.task).is_dir() else []))
    at_default = frozenset(() if answer is None else answer["at_default"])
    given = typed_flags(job.flags)
    return RequestedRun(
        job.task, job.seed, job.arm.name, method, short_path(entry), arguments, given, at_default, batch, data
    )


# ---- in the process that parses ----


def _parse_all(commands: Sequence[tuple[str, list[str], int]]) -> dict[str, dict[str, Any]]:
    questions = sorted({_key(command) for command in commands})
    if not questions:
        return {}
    here = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "loralib.sweep.asking"], input="\n".join(questions), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": here, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise InputError(f"the flags of the runs could not be parsed: {last[0]}")
    return dict(zip(questions, map(json.loads, done.stdout.splitlines()), strict=True))


class _Parsed(BaseException):
    """Carries the parsed flags out of an entry point's main, before that does anything else."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts


@contextmanager
def _parse_alone() -> Iterator[None]:
    """Within this context, `parse` ends the main that calls it."""
    from loralib.glue import arguments, parsing

    parse = parsing.parse
    places: tuple[Any, ...] = (parsing, arguments)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Parsed(parse(*args, **kwargs))

    for module in places:
        module.parse = stop
    try:
        yield
    finally:
        for module in places:
            module.parse = parse


def parsed(entry: str, argv: Sequence[str]) -> dict[str, Any]:
    """The flags of an entry point as run.json would record them, or {"error": message} if it refuses them."""
    from loralib.glue.record import flags_of

    known, path, words = set(sys.modules), list(sys.path), sys.argv
    sys.path.insert(0, str(Path(entry).parent))
    sys.argv = [entry, *argv, "--use_cpu"]  # a machine that only plans needs no GPU
    try:
        with _parse_alone():
            spec = importlib.util.spec_from_file_location("entry_point", entry)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["entry_point"] = module
            spec.loader.exec_module(module)
            module.main(*([sys.argv[1:]] if inspect.signature(module.main).parameters else []))
    except _Parsed as found:
        values = {k: v for part in found.parts for k, v in flags_of(part).items()}
        at_default = [f.name for part in found.parts for f in fields(part) if getattr(part, f.name) == f.default]
        return {"arguments": values, "at_default": at_default}
    except InputError as error:
        return {"error": str(error)}
    except (Exception, SystemExit) as error:
        return {"error": f"{Path(entry).name} could not be asked for its flags ({type(error).__name__}: {error})."}
    finally:
        sys.path[:], sys.argv = path, words
        for name in set(sys.modules) - known:  # modules beside the next entry point may have the same names
            file = getattr(sys.modules[name], "__file__", None)
            if name == "entry_point" or (file and Path(file).parent == Path(entry).parent):
                del sys.modules[name]
    return {"error": f"main of {entry} parsed nothing: see docs/variant.md."}


def main() -> None:
    """Answer the questions on standard input, one in each line, in the same order."""
    answers, sys.stdout = sys.stdout, sys.stderr  # other programs' prints must not mix with the answers
    for line in sys.stdin:
        print(json.dumps(parsed(*json.loads(line)), default=str), file=answers)


if __name__ == "__main__":
    main()

"""Plans a sweep: one run for each task, method, seed and grid point, each with its command and its folder."""

import argparse
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loralib.errors import InputError
from loralib.secrets import is_secret
from loralib.sweep.settings import same_as_typed

ROOT = Path(__file__).resolve().parents[2]
# The methods of the task scripts, each with its name in run.json. scripts/launch.sh has the same list.
METHODS = {"lora": "lora", "lora-orth": "lora", "adalora": "adalora", "sora": "sora", "rm-lora-v1": "rm-lora-v1",
           "rm-lora-v2": "rm-lora-v2", "full": "full", "lora-sora-baseline": "lora"}  # fmt: skip
Point = tuple[tuple[str, str], ...]  # values of a grid: (flag, value) pairs


@dataclass(frozen=True)
class Arm:
    """A method of the comparison, with its own flags."""

    name: str  # in folders and tables
    method: str  # one of METHODS, or the absolute path of an entry point
    flags: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether it is an entry point of the user."""
        return self.method not in METHODS


@dataclass(frozen=True)
class Job:
    """One run: the flags of its script, and its output folder."""

    task: str
    arm: Arm
    seed: int
    flags: tuple[str, ...]
    folder: Path
    trial: bool = False  # of a tuning

    @property
    def name(self) -> str:
        """The path of its folder below that of the sweep."""
        return str(Path(*self.folder.parts[-3:]))

    @property
    def command(self) -> list[str]:
        """The task's script with all flags."""
        own = ["--seed", str(self.seed), "--output_dir", str(self.folder)]
        return ["bash", str(ROOT / "scripts" / f"{self.task}.sh"), self.arm.method, *self.flags, *own]


def plan(args: argparse.Namespace, flags: Sequence[str]) -> list[Job]:
    """All runs of a sweep without tuning. Seeds vary last, so that every method has a first result early.

    Raises:
        InputError: a task or method is unknown, a grid cannot be read, or a flag is given that the sweep sets itself.
    """
    check_tasks(args.tasks)
    arms = read_arms(args.methods)
    grid = read_grid(args.grid, "--grid")
    own = flags_by_task_and_arm(args, arms, flags)
    jobs = [
        make_job(args.output, task, arm, seed, own[task, arm], point)
        for seed, task, arm, point in itertools.product(args.seeds, args.tasks, arms, points_of(grid))
    ]
    if not jobs:
        raise InputError("nothing to run: --tasks, --methods and --seeds (1,2,3 or 1-5) each need one entry or more.")
    check_folders(jobs)
    return jobs


def make_job(
    output: str, task: str, arm: Arm, seed: int, flags: Sequence[str], point: Point, trial: bool = False
) -> Job:
    """The run of a grid point. Its folder is OUTPUT/TASK/METHOD[,NAME=VALUE...]/seedK."""
    label = ",".join([arm.name, *(f"{name}={value}".replace("/", "_") for name, value in point)])
    values = [word for name, value in point for word in (f"--{name}", value)]
    return Job(task, arm, seed, (*flags, *values), Path(output).absolute() / task / label / f"seed{seed}", trial)


def check_folders(jobs: Sequence[Job]) -> None:
    """Refuse a plan in which two runs share a folder."""
    seen: set[Path] = set()
    for job in jobs:
        if job.folder in seen:
            raise InputError(
                f"two runs would share the folder {job.folder}: name each task, method, seed and value once."
            )
        seen.add(job.folder)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse a task without a script."""
    scripts = (ROOT / "scripts").glob("*.sh")
    known = sorted(p.stem for p in scripts if p.stem != "launch" and "/launch.sh" in p.read_text(encoding="utf-8"))
    for task in tasks:
        if task not in known:
            raise InputError(f"task {task!r} has no script: use {', '.join(known)}.")


def split_arms(text: str) -> list[str]:
    """Split --methods into its entries. A comma inside the flags of an entry does not end the entry."""
    found: list[str] = []
    for part in text.split(","):
        starts = part.strip() in METHODS or re.match(r"\s*[\w.+-]+=", part) or Path(part.partition(":")[0]).is_file()
        if found and ":--" in found[-1] and not starts:
            found[-1] += f",{part}"
        elif part.strip():
            found.append(part.strip())
    return found


def read_arms(entries: Sequence[str]) -> list[Arm]:
    """Read the entries METHOD, PATH, NAME=METHOD[:FLAGS] and NAME=PATH[:FLAGS]."""
    arms = []
    for entry in entries:
        named = re.match(r"([\w.+-]+)=(.+)$", entry)
        text = named[2] if named else entry
        method, colon, words = text.partition(":--")
        flags = tuple(shlex.split(f"--{words}")) if colon else ()
        refuse_what_the_sweep_sets(flags)
        if method not in METHODS and not Path(method).is_file():
            raise InputError(
                f"method {method!r} is neither a file nor one of {', '.join(METHODS)}: name one of them, or the "
                "path of your entry point."
            )
        where = method if method in METHODS else str(Path(method).absolute())
        if flags and not named:
            raise InputError(f"--methods {entry!r}: give it a name, as in NAME={entry}.")
        arms.append(Arm(named[1] if named else method_label(method), where, flags))
    return arms


def method_label(method: str) -> str:
    """The folder name of a method; for an entry point it is the name of the file, or of the folder of run_glue.py."""
    if method in METHODS:
        return method
    path = Path(method).absolute()
    return path.parent.name if path.stem == "run_glue" else path.stem


def read_grid(entries: Sequence[str], flag: str) -> dict[str, list[str]]:
    """Read the entries NAME=VALUE,VALUE of a grid into values by flag. Several entries of one flag are one list.

    Raises:
        InputError: an entry cannot be read, a value is named twice, or the sweep sets the flag itself.
    """
    grid: dict[str, list[str]] = {}
    for entry in entries:
        name, _, values = entry.partition("=")
        if is_secret(name):
            raise InputError(f"{flag} {name}: an access token is not a setting to compare; give it to all runs.")
        name = name.lstrip("-").replace("-", "_")
        refuse_what_the_sweep_sets([f"--{name}"])
        if not name or not all(values.split(",")):
            raise InputError(
                f"{flag} {entry!r} cannot be read: write {flag} NAME=VALUE,VALUE, as in {flag} lora_r=4,8."
            )
        for value in values.split(","):
            known = next((v for v in grid.get(name, []) if same_as_typed(v, value)), None)
            if known is not None:
                raise InputError(f"{flag} {name} has one value twice, as {known} and as {value}: name each value once.")
            grid.setdefault(name, []).append(value)
    return grid


def refuse_what_the_sweep_sets(flags: Sequence[str]) -> None:
    """Refuse the flags that differ from run to run: the seed and the output folder."""
    for flag in flags:
        name = flag.split("=")[0].lstrip("-").replace("-", "_")
        for set_here in ("seed", "output_dir"):
            if flag.startswith("--") and len(name) >= 2 and set_here.startswith(name):  # also abbreviated
                raise InputError(f"--{set_here} is set by the sweep for each run: use --seeds and --output.")


def points_of(grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """All combinations of a grid's values."""
    return list(itertools.product(*([(name, value) for value in values] for name, values in grid.items())))


def flags_by_task_and_arm(
    args: argparse.Namespace, arms: Sequence[Arm], flags: Sequence[str]
) -> Mapping[tuple[str, Arm], tuple[str, ...]]:
    """The flags of each task and arm: those of all runs, then the arm's, then those of --only. Later ones win."""
    refuse_what_the_sweep_sets(flags)
    if args.like is not None and args.like not in METHODS:
        raise InputError(f"--like {args.like}: it must be one of {', '.join(METHODS)}.")
    wide: dict[str, list[str]] = {}
    narrow: dict[tuple[str, str], list[str]] = {}
    names = {name: arm.name for entry, arm in zip(args.methods, arms, strict=True) for name in (entry, arm.name)}
    for entry in args.only:
        what, colon, words = entry.partition(":--")
        task, _, method = what.partition("/")
        more = shlex.split(f"--{words}") if colon else []
        refuse_what_the_sweep_sets(more)
        if more and what in names:
            wide.setdefault(names[what], []).extend(more)
        elif more and task in args.tasks and method in names:
            narrow.setdefault((task, names[method]), []).extend(more)
        else:
            raise InputError(
                f"--only {entry!r} cannot be read: write METHOD:FLAGS or TASK/METHOD:FLAGS, as in "
                "'sora:--sparse_lr 1e-3' or 'rte/sora:--lambda_num 4', with a task and a method of this sweep."
            )
    found = {}
    for task, arm in itertools.product(args.tasks, arms):
        like, of_arm = _split_like(arm.flags)
        if args.like and arm.own and not like:
            like = ("--like", args.like)
        own = (*wide.get(arm.name, ()), *narrow.get((task, arm.name), ()))
        found[task, arm] = (*like, *flags, *of_arm, *own)
    return found


def _split_like(flags: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """--like METHOD and the other flags of an entry point; the task's script wants --like as its first flag."""
    for i, flag in enumerate(flags):
        if flag == "--like":
            return flags[i : i + 2], flags[:i] + flags[i + 2 :]
        if flag.startswith("--like="):
            return ("--like", flag.partition("=")[2]), flags[:i] + flags[i + 1 :]
    return (), flags

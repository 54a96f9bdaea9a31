"""Runs tasks x methods x seeds, and a grid of flags if wanted, on Ray: each run is a task's script in its own process.

    python scripts/sweep.py --tasks mrpc,rte --methods lora,adalora,sora --seeds 1,2,3 [--grid lora_r=4,8] [FLAGS...]

Flags that are not listed here go to every run, those of --only to one method's; MODEL and DATA are read from the
environment, as the scripts do. A run is in OUTPUT/TASK/METHOD[,NAME=VALUE...]/seedK with its output in run.log. The
same command again skips finished runs and goes on with the others from their last checkpoints. Needs Linux, and Ray:
pip install -e '.[sweep]'.
"""

import argparse
import ctypes
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from loralib.errors import InputError  # noqa: E402
from loralib.secrets import hide, is_secret, remember_command  # noqa: E402
from loralib.training.lock import open_lock  # noqa: E402

METHODS = ("lora", "lora-orth", "adalora", "sora", "rm-lora-v1", "rm-lora-v2", "full")
LOCK_FILE = ".sweep.lock"
GRACE = 60.0  # seconds that a run has to write a checkpoint after SIGTERM, before SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


@dataclass(frozen=True)
class Job:
    """One run: what its script is called with, and where it goes."""

    task: str
    method: str
    seed: int
    flags: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """Its folder below the sweep's."""
        return str(Path(*self.folder.parts[-3:]))

    @property
    def command(self) -> list[str]:
        """The task's script with all flags."""
        own = ["--seed", str(self.seed), "--output_dir", str(self.folder)]
        return ["bash", str(ROOT / "scripts" / f"{self.task}.sh"), self.method, *self.flags, *own]


# ---- what to run ----


def plan(args: argparse.Namespace, flags: Sequence[str]) -> list[Job]:
    """All runs, seeds outermost so that every method has a first result early.

    Raises:
        InputError: an unknown task or method, a grid that can't be read, a flag that is the sweep's to set.
    """
    known = sorted(p.stem for p in (ROOT / "scripts").glob("*.sh") if "launch.sh" in p.read_text())
    known = [name for name in known if name not in ("launch", "sweep")]
    for task in args.tasks:
        if task not in known:
            raise InputError(f"task {task!r} has no script: use {', '.join(known)}.")
    for method in args.methods:
        if method not in METHODS and not Path(method).is_file():
            raise InputError(
                f"method {method!r} is neither a file nor one of {', '.join(METHODS)}: name one of them, or the "
                "path of an entry point of yours."
            )
    for flag in flags:
        if flag.split("=")[0] in ("--seed", "--output_dir"):
            raise InputError(f"{flag.split('=')[0]} is set by the sweep for each run: use --seeds and --output.")
    grid = []
    for entry in args.grid:
        name, _, values = entry.partition("=")
        if is_secret(name):
            raise InputError(f"--grid {name}: an access token is no setting to compare; give it to all runs.")
        if not name.lstrip("-") or not all(values.split(",")):
            raise InputError(
                f"--grid {entry!r} cannot be read: write --grid NAME=VALUE,VALUE, as in --grid lora_r=4,8."
            )
        grid.append([(name.lstrip("-"), value) for value in values.split(",")])
    only: dict[str, list[str]] = {}
    for entry in args.only:
        method, _, words = entry.partition(":")
        if method not in args.methods or not words.startswith("--"):
            raise InputError(f"--only {entry!r} cannot be read: write METHOD:FLAGS, as in 'sora:--sparse_lr 1e-3'.")
        only.setdefault(method, []).extend(shlex.split(words))
    base = Path(args.output).absolute()
    jobs = []
    for seed, task, method, point in itertools.product(args.seeds, args.tasks, args.methods, itertools.product(*grid)):
        label = ",".join([method_label(method), *(f"{n}={v}".replace("/", "_") for n, v in point)])
        own = tuple(word for name, value in point for word in (f"--{name}", value))
        where = str(Path(method).absolute()) if method not in METHODS else method
        jobs.append(Job(task, where, seed, (*flags, *only.get(method, ()), *own), base / task / label / f"seed{seed}"))
    if not jobs:
        raise InputError("nothing to run: --tasks, --methods and --seeds (1,2,3 or 1-5) each need one entry or more.")
    twice = [job for i, job in enumerate(jobs) if job.folder in {other.folder for other in jobs[:i]}]
    if twice:
        raise InputError(
            f"two runs would share the folder {twice[0].folder}: name each task, method, seed and value once."
        )
    return jobs


def method_label(method: str) -> str:
    """Folder name of a method: the name itself; for an entry point its file's name, or its folder's if run_glue.py."""
    if method in METHODS:
        return method
    path = Path(method).absolute()
    return path.parent.name if path.stem == "run_glue" else path.stem


def result(job: Job) -> dict[str, Any] | None:
    """The results file of a run; None where there is none, {} where it is cut short."""
    try:
        run = json.loads((job.folder / "run.json").read_text(encoding="utf-8"))
        return run if isinstance(run, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def finished(job: Job) -> bool:
    """Whether the results file says so."""
    return (result(job) or {}).get("status") == "finished"


def check_settings(job: Job) -> None:
    """Refuse to take a finished run for one that other flags were given for."""
    done = (result(job) or {}).get("arguments", {})
    for i, flag in enumerate(job.flags):
        name, joined, value = flag.lstrip("-").partition("=")
        if not flag.startswith("--") or name not in done:
            continue
        if not joined:
            value = job.flags[i + 1] if i + 1 < len(job.flags) and not job.flags[i + 1].startswith("--") else "True"
        try:
            same = float(value) == float(done[name])
        except (TypeError, ValueError):
            same = value.lower() == str(done[name]).lower()
        if not same:
            raise InputError(
                f"{job.folder} holds a finished run with {name} {done[name]}, and {value} is asked for now: name "
                "another --output, or remove that folder."
            )


# ---- one run: a guard between Ray's worker and the script ----


def die_with_parent(signum: int) -> None:
    """Ask the kernel for a signal when the parent goes, by whatever death."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum)


def interrupt(signum: int, _: Any) -> NoReturn:
    """Handler that makes SIGTERM, and Ctrl-C wherever it was ignored, end things as Ctrl-C does."""
    raise KeyboardInterrupt


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, nearest first; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(0), [])
        found += below
        left += below
    return found


def guard(parent: int, folder: Path, command: Sequence[str]) -> int:
    """Run `command` so that nothing of it outlives its Ray worker; returns its exit status.

    Two processes stand between the worker and the run, since Ray kills the children of a worker that it ends, at once
    and with SIGKILL. The first dies with the worker, the second gets SIGTERM when the first is gone, and ends the run:
    SIGTERM, so that a checkpoint can be written, SIGKILL after `GRACE` seconds. Both adopt what loses its parent below
    them, so that either can clear up alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to handle
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGKILL)
    first = os.getpid()
    if os.getppid() != parent:
        return 1
    second = os.fork()
    if not second:
        return watch(first, folder, command)
    code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    kill_rest()
    return abs(code)


def watch(parent: int, folder: Path, command: Sequence[str]) -> int:
    """The second process of `guard`. The folder is locked while it runs: a second attempt waits."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    with open_lock(folder / LOCK_FILE) as lock:
        wait_for_lock(lock, GRACE + 10, folder)
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: die_with_parent(signal.SIGKILL))
        code = 128 + signal.SIGTERM
        try:
            signal.signal(signal.SIGTERM, interrupt)
            code = child.wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, signal.SIGTERM)
                child.wait(GRACE)
        kill_rest()
        return code


def kill_rest() -> None:
    """Kill whatever is left below this process."""
    while rest := descendants(os.getpid()):
        for pid in rest:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def wait_for_lock(lock: Any, seconds: float, folder: Path) -> None:
    """Hold the lock of a run's folder, or end with a sentence after `seconds`."""
    for _ in range(math.ceil(seconds / 0.2)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.2)
    sys.exit(f"error: another process trains in {folder}: wait for it, or end it.")


# ---- the sweep ----


class Progress:
    """One line that is rewritten on a terminal, and a new line at each change elsewhere."""

    def __init__(self, total: int, skipped: int, slots: int) -> None:
        self.total, self.done, self.failed, self.running, self.slots = total, skipped, 0, 0, slots
        self.seconds: list[float] = []
        self.last = ""

    def line(self) -> str:
        """done / running / failed / left, and the time that remains at the mean of the runs so far."""
        left = self.total - self.done - self.failed - self.running
        text = f"{self.done} of {self.total} done, {self.running} running, {self.failed} failed, {left} left"
        if self.seconds and left + self.running:
            rest = sum(self.seconds) / len(self.seconds) * (left + self.running / 2) / self.slots
            hours, minutes = divmod(math.ceil(rest / 60), 60)
            text += f", about {f'{hours} h ' if hours else ''}{minutes} min to go"
        return text

    def show(self) -> None:
        """Print the line if it says something new."""
        line = self.line()
        if line != self.last:
            print(
                f"\r\033[K{line}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True
            )
        self.last = line

    def say(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)
        self.last = ""


def start_ray(address: str | None) -> Any:
    """Ray, started inside this process or connected to `address`; no telemetry, no dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"sweeps run on Ray, which is not installed: pip install -e '{ROOT}[sweep]' (a single run needs no Ray: "
            "bash scripts/mrpc.sh lora)."
        ) from error
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():  # Ray itself takes minutes to give up
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise InputError(
                f"nothing answers at --address {address} ({error}): start Ray there, or leave it out."
            ) from error
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Ray could not start, or not reach {address or 'itself'}: {' '.join(str(error).split())[:300]}"
        ) from error
    return ray


def resources(ray: Any, gpus: float | None, cpus: float | None) -> tuple[float, float, int]:
    """(GPUs a run, CPUs a run, runs at a time).

    Raises:
        InputError: no machine of the cluster has what a run asks for.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {kind: max(node.get(kind, 0) for node in nodes) for kind in ("GPU", "CPU")}
    gpus = (1 if most["GPU"] else 0) if gpus is None else gpus
    cpus = min(4, most["CPU"]) if cpus is None else cpus
    for flag, value, kind in (("gpus_per_run", gpus, "GPU"), ("cpus_per_run", cpus, "CPU")):
        if value < 0 or (value > 1 and value != int(value)):
            raise InputError(f"{flag} is {value}, it must be a whole number, or a share below 1 of one {kind}.")
        if value > most[kind]:
            way = "give --gpus_per_run 0 to run on CPUs" if kind == "GPU" and not most[kind] else f"lower --{flag}"
            raise InputError(f"{flag} is {value:g} and the largest machine has {most[kind]:g} {kind}s: {way}.")
    if not cpus:
        raise InputError("cpus_per_run is 0, it must be above 0: every run needs a core or a share of one.")
    per_node = [min(int(n.get(k, 0) / v + 1e-9) for k, v in (("GPU", gpus), ("CPU", cpus)) if v) for n in nodes]
    return gpus, cpus, max(1, sum(per_node))


def sweep(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    """Run all jobs that are not finished; 0 when all are in the end, 1 when some failed, 130 after Ctrl-C."""
    todo = deque(job for job in jobs if not finished(job))
    for job in jobs:
        if result(job) == {}:
            print(f"{job.folder / 'run.json'} is cut short: that run is done again.")
        if finished(job):
            check_settings(job)
    if not todo:
        print(f"all {len(jobs)} runs are finished.")
        return 0
    ray = start_ray(args.address)
    running: dict[Any, tuple[Job, float]] = {}
    try:
        gpus, cpus, slots = resources(ray, args.gpus_per_run, args.cpus_per_run)
        place, base = os.getcwd(), dict(os.environ)

        @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
        def work(name: str, command: list[str], shown: str, folder: str) -> int:
            # Pickled by value: no name of this module stands in it.
            import os
            import subprocess
            import sys

            env = base | {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES",) if k in os.environ}
            env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "") if gpus else ""
            env["PYTHON"] = sys.executable
            env.setdefault("OMP_NUM_THREADS", str(max(1, int(cpus))))
            env.setdefault("TQDM_MININTERVAL", "60")  # the log is a file
            os.makedirs(folder, exist_ok=True)
            own = [sys.executable, name, "--guard", str(os.getpid()), folder, *command]
            with open(os.path.join(folder, "run.log"), "ab") as log:
                log.write(f"== {shown}\n".encode())
                log.flush()
                # a session of its own: Ray may end the process group of a worker that died
                null, out = subprocess.DEVNULL, subprocess.STDOUT
                return subprocess.run(
                    own, cwd=place, env=env, stdin=null, stdout=log, stderr=out, start_new_session=True
                ).returncode

        progress = Progress(len(jobs), len(jobs) - len(todo), slots)
        failures: dict[Job, int] = {}
        while todo or running:
            while todo and len(running) < slots:
                job = todo.popleft()
                shown = shlex.join(hide(job.command))
                start = work.options(name=job.name).remote
                call = start(str(Path(__file__).resolve()), job.command, shown, str(job.folder))
                running[call] = (job, time.monotonic())
            progress.running = len(running)
            progress.show()
            for call in ray.wait(list(running), timeout=1.0)[0]:
                job, began = running.pop(call)
                try:
                    why = f"ended with status {ray.get(call)}"
                except ray.exceptions.RayError as error:
                    why = f"lost its worker ({type(error).__name__})"
                if finished(job):
                    progress.done += 1
                    progress.seconds.append(time.monotonic() - began)
                    continue
                failures[job] = failures.get(job, 0) + 1
                if failures[job] == 1:
                    todo.append(job)
                    progress.say(f"{job.name} {why}: tried once more, later")
                else:
                    progress.failed += 1
                    progress.say(f"{job.name} {why}: given up, see {job.folder / 'run.log'}")
        progress.running = 0
        progress.show()
        failed = [job for job in jobs if not finished(job)]
        print()
        for job in failed:
            print(f"failed: {job.name}: {last_line(job.folder / 'run.log')}")
        return 1 if failed else 0
    except KeyboardInterrupt:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        print("\nstopping: runs that are under way get a minute to write a checkpoint ...", flush=True)
        return 130
    finally:
        for call in running:
            ray.cancel(call, force=True)
        ray.shutdown()
        for job, _ in running.values():
            wait_until_free(job.folder)


def wait_until_free(folder: Path) -> None:
    """Until the guard of a cancelled run has ended it."""
    if (folder / LOCK_FILE).exists():
        with open_lock(folder / LOCK_FILE) as lock:
            wait_for_lock(lock, GRACE + 10, folder)


def last_line(log: Path) -> str:
    """What a run said last: its last error, else its last line."""
    lines = (
        [line.strip()[:300] for line in re.split(r"[\r\n]+", log.read_text(errors="replace"))] if log.exists() else []
    )
    errors = [line for line in lines if re.search(r"\berror: |Error: ", line)]
    return hide(next((line for line in [*errors[-1:], *reversed(lines)] if line), "no output"))


def numbers(text: str) -> list[int]:
    """Seeds: 1,2,5 or 1-5."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        return [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no seeds: write 1,2,3 or 1-5") from error


def names(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def make_parser() -> argparse.ArgumentParser:
    """The sweep's own flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tasks", type=names, required=True, help="tasks, separated by commas")
    parser.add_argument("--methods", type=names, required=True, help=f"{', '.join(METHODS)}, or paths of entry points")
    parser.add_argument("--seeds", type=numbers, required=True, help="1,2,3 or 1-5")
    parser.add_argument("--grid", action="append", default=[], help="NAME=VALUE,VALUE; may be given several times")
    parser.add_argument("--only", action="append", default=[], help="METHOD:FLAGS for one method; also several times")
    parser.add_argument("--output", default=os.environ.get("OUTPUT", str(ROOT / "output")), help="base folder")
    parser.add_argument("--address", help="a running Ray cluster, which must see the same clone and output folder")
    parser.add_argument("--gpus_per_run", type=float, help="GPUs of a run, shares allowed (default 1 if there are any)")
    parser.add_argument("--cpus_per_run", type=float, help="CPU cores of a run (default up to 4)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    return parser


def listed(jobs: Sequence[Job]) -> Iterator[str]:
    """The commands, with a word on runs that would be skipped."""
    for job in jobs:
        yield f"{'# finished: ' if finished(job) else ''}{shlex.join(hide(job.command))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--guard"]:
        try:
            return guard(int(argv[1]), Path(argv[2]), argv[3:])
        except InputError as error:
            print(f"sweep.py: error: {error}", file=sys.stderr)
            return 2
    args, flags = make_parser().parse_known_args(argv)
    remember_command(word for text in (*flags, *args.only, *args.grid) for word in [text, *re.split(r"[\s:,]+", text)])
    try:
        jobs = plan(args, flags)
        if args.dry_run:
            print("\n".join(listed(jobs)))
            return 0
        for signum in (signal.SIGINT, signal.SIGTERM):  # also where a shell has started this with Ctrl-C ignored
            signal.signal(signum, interrupt)
        code = sweep(jobs, args)
    except InputError as error:
        print(f"sweep.py: error: {hide(str(error))}", file=sys.stderr)
        return 2
    if code != 130:
        print(f"tables and figures: python scripts/report.py {shlex.quote(args.output)}")
    return code


if __name__ == "__main__":
    sys.exit(main())

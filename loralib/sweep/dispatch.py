"""Runs a sweep on Ray: shows the progress, tries a failed run once more; a lost cluster counts as no run's failure."""

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from shutil import get_terminal_size
from typing import Any

from tqdm import tqdm

from loralib.errors import InputError
from loralib.logs import last_line
from loralib.secrets import hide
from loralib.sweep.cluster import Cluster, ClusterLost, resources
from loralib.sweep.guard import wait_until_free
from loralib.sweep.plan import ROOT, Job
from loralib.sweep.records import Done, result, status
from loralib.sweep.settings import RequestedRun

PAUSE = 10.0  # seconds between two attempts to find a cluster again
LOSSES = 3  # give up if a cluster is lost more often than this without the end of a run in between
BAD_INPUT = 2  # exit status of a run whose flags or files are refused


class Progress:
    """The progress of a sweep: a bar on a terminal, elsewhere a new line for each change."""

    def __init__(self, total: int, skipped: int, slots: int) -> None:
        self.total, self.done, self.failed, self.running, self.slots = total, skipped, 0, 0, slots
        self.seconds: list[float] = []
        self.last = ""
        shape = {"bar_format": "|{bar:10}| {desc}", "ncols": get_terminal_size().columns, "nrows": 9}
        self.bar = tqdm(total=total, initial=skipped, file=sys.stdout, disable=not sys.stdout.isatty(), **shape)

    def line(self) -> str:
        """How many runs are done, running, failed and left, and the remaining time by the mean of the runs so far."""
        left = self.total - self.done - self.failed - self.running
        text = f"{self.done} of {self.total} done, {self.running} running, {self.failed} failed, {left} left"
        if self.seconds and left + self.running:
            rest = sum(self.seconds) / len(self.seconds) * (left + self.running / 2) / self.slots
            hours, minutes = divmod(math.ceil(rest / 60), 60)
            text += f", about {f'{hours} h ' if hours else ''}{minutes} min to go"
        return text

    def show(self) -> None:
        """Show the line if it has changed."""
        line = self.line()
        if line != self.last and self.bar.disable:
            print(line, flush=True)
        elif line != self.last:
            self.bar.n = self.done + self.failed
            self.bar.set_description_str(line)
        self.last = line

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self.bar.external_write_mode(sys.stdout):
            print(text, flush=True)
        self.last = ""


def sweep(jobs: Sequence[Job], asked: Mapping[Job, RequestedRun], done: Done, args: argparse.Namespace) -> int:
    """Run all jobs that are not done.

    Returns:
        0 if all are finished at the end, 1 if some failed, 130 after Ctrl-C.

    Raises:
        ClusterLost: the cluster is gone and did not come back.
    """
    todo = deque(job for job in jobs if done.find_or_add(job, asked[job]) is None)
    for job in todo:
        if result(job) == {}:
            print(f"{job.folder / 'run.json'} is cut short or not a results file: that run is done again.")
    if not todo:
        print(f"all {len(jobs)} runs are finished." if not _failed(jobs, done) else f"all {len(jobs)} runs are done.")
        return _list_failed(jobs, done)
    cluster = Cluster(args.address)
    cluster.start()
    loop = _Loop(jobs, asked, done, args, cluster, todo)
    try:
        loop.run()
        loop.progress.bar.close()
        print()
        return _list_failed(jobs, done)
    except KeyboardInterrupt:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        loop.progress.bar.close()
        print("\nstopping: runs that are under way get a minute to write a checkpoint ...", flush=True)
        return 130
    finally:
        loop.end()


def _failed(jobs: Sequence[Job], done: Done) -> list[Job]:
    return [job for job in jobs if (done.known.get(job) or {}).get("status") != "finished"]


def _list_failed(jobs: Sequence[Job], done: Done) -> int:
    failed = _failed(jobs, done)
    for job in failed:
        diverged = (done.known.get(job) or {}).get("status") == "diverged"
        said = last_line(job.folder / "run.log") or "no output"
        word = "its loss, gradients or outputs are no longer finite" if diverged else said
        print(f"{'diverged' if diverged else 'failed'}: {job.name}: {word}")
    return 1 if failed else 0


class _Loop:
    """The loop of a sweep, with the runs that wait, those under way and those that have ended."""

    def __init__(
        self,
        jobs: Sequence[Job],
        asked: Mapping[Job, RequestedRun],
        done: Done,
        args: argparse.Namespace,
        cluster: Cluster,
        todo: deque[Job],
    ) -> None:
        self.asked, self.done, self.args, self.cluster, self.todo = asked, done, args, cluster, todo
        self.running: dict[Any, tuple[Job, float]] = {}
        self.failures: dict[Job, int] = {}
        self.lost: dict[Job, int] = {}
        self.losses = 0  # how often the cluster was lost since a run ended
        self.progress = Progress(len(jobs), len(jobs) - len(todo), 1)
        self.work = self._prepare()

    def _prepare(self) -> Any:
        gpus, cpus, self.progress.slots = resources(self.cluster.ray, self.args.gpus_per_run, self.args.cpus_per_run)
        return worker(self.cluster.ray, gpus, cpus)

    def run(self) -> None:
        """Run until no job is left."""
        while self.todo or self.running:
            if not self.cluster.alive():
                self._find_again()
                continue
            while self.todo and len(self.running) < self.progress.slots:
                job = self.todo.popleft()
                script = str(ROOT / "scripts" / "sweep.py")
                shown = shlex.join(hide(job.command))
                call = self.work.options(name=job.name).remote(script, job.command, shown, str(job.folder))
                self.running[call] = (job, time.monotonic())
            self.progress.running = len(self.running)
            self.progress.show()
            for call in self.cluster.ray.wait(list(self.running), timeout=1.0)[0]:
                job, began = self.running.pop(call)
                self._ended(call, job, began)
        self.progress.running = 0
        self.progress.show()

    def _ended(self, call: Any, job: Job, began: float) -> None:
        errors = self.cluster.ray.exceptions
        code = None
        try:
            code = self.cluster.ray.get(call)
            why = f"ended with status {code}"
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.RayTaskError) as error:
            why = f"lost its worker ({type(error).__name__})"
        except errors.RayError as error:  # the fault is that of its machine or of Ray, not of the run
            wait_until_free(job.folder, end=True)
            self.lost[job] = self.lost.get(job, 0) + self.cluster.alive()
            if self.lost[job] <= LOSSES:
                self.todo.appendleft(job)
                self.progress.say(
                    f"{job.name} lost its machine ({type(error).__name__}): it goes on when a machine is free"
                )
                return
            why = f"lost its machine {self.lost[job]} times"
            self.failures[job] = 1
        self.losses = 0
        if status(job) in ("finished", "diverged") and self.done.find_or_add(job, self.asked[job]) is not None:
            if status(job) == "finished":
                self.progress.done += 1
            else:
                self.progress.failed += 1
                self.progress.say(f"{job.name} diverged")
            self.progress.seconds.append(time.monotonic() - began)
            return
        self.failures[job] = self.failures.get(job, 0) + 1
        if self.failures[job] == 1 and code != BAD_INPUT:
            self.todo.append(job)
            self.progress.say(f"{job.name} {why}: will be tried once more at the end")
        else:
            self.progress.failed += 1
            self.progress.say(f"{job.name} {why}: given up, see {job.folder / 'run.log'}")

    def _find_again(self) -> None:
        """Start or join the cluster again. Runs that were under way return to the queue, and none counts as failed.

        Raises:
            ClusterLost: the cluster did not come back in time, or was lost again and again.
        """
        self.losses += 1
        left = [job for job, _ in self.running.values()]
        self.progress.say(f"the Ray cluster is gone, with {len(left)} runs under way: looking for it again ...")
        self.running.clear()
        self.cluster.stop()
        for job in left:
            wait_until_free(job.folder, end=True)
        for job in reversed(left):
            if self.done.find_or_add(job, self.asked[job]) is None:
                self.todo.appendleft(job)
            else:
                self.progress.done += 1
        until = time.monotonic() + 60 * self.args.wait_for_cluster
        counts = (
            f"{self.progress.done} of {self.progress.total} runs are done, and the same command goes on with the rest"
        )
        while self.losses <= LOSSES:
            try:
                self.cluster.start()
                self.work = self._prepare()
                return
            except InputError as error:
                self.cluster.stop()
                if time.monotonic() > until:
                    raise ClusterLost(
                        f"the Ray cluster is gone and did not come back within {self.args.wait_for_cluster:g} minutes "
                        f"({error}); {counts}."
                    ) from error
                time.sleep(PAUSE)
        raise ClusterLost(f"the Ray cluster was lost {self.losses} times, and no run ended in between; {counts}.")

    def end(self) -> None:
        """Cancel the runs that are under way, and wait for their guards."""
        alive = self.cluster.ray is not None and (not self.running or self.cluster.alive())
        for call in self.running if alive else ():
            self.cluster.ray.cancel(call, force=True)
        self.cluster.stop()
        for job, _ in self.running.values():
            wait_until_free(job.folder, end=not alive)


def worker(ray: Any, gpus: float, cpus: float) -> Any:
    """The function that Ray calls for a run: it starts the guard, writes run.log and returns the exit status."""
    place = os.getcwd()
    base = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}  # a run must not get the cluster's token

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    def work(script: str, command: list[str], shown: str, folder: str) -> int:
        # Ray pickles this function by value, so it must not use names of this module.
        import os
        import subprocess
        import sys

        env = base | {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES",) if k in os.environ}
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "") if gpus else ""
        env["PYTHON"] = sys.executable
        env.setdefault("OMP_NUM_THREADS", str(max(1, int(cpus))))
        env.setdefault("TQDM_MININTERVAL", "60")  # the log is a file
        os.makedirs(folder, exist_ok=True)
        own = [sys.executable, script, "--guard", str(os.getpid()), folder, *command]
        # A link is not followed, because it may lead to a foreign file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(os.path.join(folder, "run.log"), flags, 0o644), "ab") as log:
            log.write(f"== {shown}\n".encode())
            log.flush()
            # The guard has a session of its own, because Ray may end the process group of a worker that died.
            null, out = subprocess.DEVNULL, subprocess.STDOUT
            return subprocess.run(
                own, cwd=place, env=env, stdin=null, stdout=log, stderr=out, start_new_session=True
            ).returncode

    return work

"""The command of a sweep: it reads the flags, plans the runs and runs them."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralib.errors import InputError, RunError
from loralib.secrets import hide, remember_command
from loralib.sweep.asking import ask
from loralib.sweep.dispatch import sweep
from loralib.sweep.guard import guard, interrupt_on_signals
from loralib.sweep.plan import METHODS, ROOT, Job, plan, split_arms
from loralib.sweep.records import Done, ResultsFile, closest, is_asked_for, runs_below
from loralib.sweep.settings import RequestedRun
from loralib.sweep.tune import begin, choose, compare_with_earlier, plan_tuning, say


def numbers(text: str) -> list[int]:
    """Read seeds, written as 1,2,5 or 1-5."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        return [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds: write 1,2,3 or 1-5") from error


def names(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of the sweep's own flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tasks", type=names, required=True, help="tasks, separated by commas")
    parser.add_argument("--methods", type=split_arms, required=True,
                        help=f"{', '.join(METHODS)}, paths of entry points, or NAME=METHOD:FLAGS")  # fmt: skip
    parser.add_argument("--seeds", type=numbers, required=True, help="1,2,3 or 1-5")
    parser.add_argument("--grid", action="append", default=[], help="NAME=VALUE,VALUE; may be given several times")
    parser.add_argument("--tune", action="append", default=[],
                        help="NAME=VALUE,VALUE: the best is chosen for each task and method")  # fmt: skip
    parser.add_argument("--tune_only", action="append", default=[],
                        help="METHOD:NAME=VALUE,VALUE: another grid for one method, or a flag of its own")  # fmt: skip
    parser.add_argument("--tune_seeds", type=numbers, default=[], help="seeds of the trials, other ones than --seeds")
    parser.add_argument("--tune_selection", choices=["last", "best"], default="last",
                        help="a trial's score: at its end, or of its best evaluation (default last)")  # fmt: skip
    parser.add_argument("--unequal_trials", action="store_true", help="allow different numbers of trials")
    parser.add_argument("--only", action="append", default=[],
                        help="METHOD:FLAGS or TASK/METHOD:FLAGS; may be given several times")  # fmt: skip
    parser.add_argument("--like", help="your entry points get the task's settings of this method")
    parser.add_argument("--output", default=os.environ.get("OUTPUT", str(ROOT / "output")), help="base folder")
    parser.add_argument("--results", type=Path, help="compact results file: runs in it are done, new ones are added")
    parser.add_argument("--adopt", type=Path, action="append", default=[],
                        help="folder of earlier runs; those with the requested settings are not repeated")  # fmt: skip
    parser.add_argument("--address", help="a running Ray cluster, which must see the same clone and output folder")
    parser.add_argument("--wait_for_cluster", type=float, default=10.0, metavar="MINUTES",
                        help="minutes to wait for a lost cluster (default 10)")  # fmt: skip
    parser.add_argument("--gpus_per_run", type=float, help="GPUs of a run, shares allowed (default 1 if there are any)")
    parser.add_argument("--cpus_per_run", type=float, help="CPU cores of a run (default up to 4)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    return parser


def listed(jobs: Sequence[Job], asked: Mapping[Job, RequestedRun], done: Done) -> Iterator[str]:
    """The commands of all runs; those of finished runs begin with `# finished: `."""
    for job in jobs:
        yield f"{'# finished: ' if done.find_or_add(job, asked[job]) else ''}{shlex.join(hide(job.command))}"


def say_near_misses(jobs: Sequence[Job], asked: Mapping[Job, RequestedRun], done: Done) -> None:
    """Print why runs of other folders or of the results file, although similar, do not count for this sweep."""
    missing = [job for job in jobs if done.find_or_add(job, asked[job]) is None]

    def counts(run: Mapping[str, Any]) -> bool:  # a grid's other runs are not near misses
        of_task = (
            one for one in asked.values() if (one.task, one.seed) == (run.get("task"), run["arguments"].get("seed"))
        )
        return any(is_asked_for(run, one) for one in of_task)

    others = [*done.others, *(done.results.records if done.results else [])] if missing else []
    others = [run for run in others if not counts(run)]
    found = [(job, closest(others, asked[job])) for job in missing]
    near = [(job, words) for job, words in found if words]
    for job, words in near[:10]:
        print(f"{job.name}: a finished run is not reused: {'; '.join(words[:4])}")
    if len(near) > 10:
        print(f"... and {len(near) - 10} more runs like these")


def open_records(args: argparse.Namespace) -> Done:
    """Read the results file and the runs below the folders of --adopt."""
    for folder in args.adopt:
        if not folder.is_dir():
            raise InputError(f"--adopt {folder} is not a folder: name the base folder of earlier runs.")
    adopted = [run for folder in args.adopt for run in runs_below(folder)]
    return Done(ResultsFile(args.results) if args.results else None, adopted)


def main(argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run a sweep.

    Returns:
        The exit status: 0 if all runs are finished, 1 if some failed, 2 for bad input, 3 if the cluster is gone, 130
        after Ctrl-C or SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--guard"]:
        return guard(int(argv[1]), Path(argv[2]), argv[3:])
    args, flags = make_parser(description).parse_known_args(argv)
    typed = (*flags, *args.methods, *args.only, *args.grid)
    remember_command(word for text in typed for word in [text, *re.split(r"[\s:,]+", text)])
    try:
        tuning = plan_tuning(args, flags) if args.tune or args.tune_only else None
        if args.tune_seeds and not tuning:
            raise InputError("--tune_seeds needs --tune: name the flag and the values to try.")
        jobs = list(tuning.trials.values()) if tuning else plan(args, flags)
        asked = ask(jobs, max(1, int(args.gpus_per_run or 1)))
        done = open_records(args)
        if tuning:
            compare_with_earlier(tuning, done)
        if args.dry_run:
            print("\n".join(listed(jobs, asked, done)))
            if tuning:
                print(f"# then the best value of each method on each task, with the seeds {args.seeds}")
            return 0
        if tuning:
            begin(tuning)
        interrupt_on_signals()
        say_near_misses(jobs, asked, done)
        code = sweep(jobs, asked, done, args)
        if tuning and code != 130:
            open_trials = sum(job not in done.known for job in jobs)
            if open_trials:
                raise RunError(
                    f"{open_trials} trials failed, so no value is chosen. Run the same command again to retry them."
                )
            choices = choose(tuning, done, asked)
            say(choices)
            jobs = tuning.finals(choices)
            asked = ask(jobs, max(1, int(args.gpus_per_run or 1)))
            code = sweep(jobs, asked, done, args)
    except (InputError, RunError) as error:
        print(f"sweep.py: error: {hide(str(error))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    if code != 130:
        print(f"tables and figures: python scripts/report.py {shlex.quote(str(args.results or args.output))}")
    return code

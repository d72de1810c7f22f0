"""One run from any learning rate, against tuned schedules: the benchmark that the default brain is judged by.

    python benchmarks/zero_shot.py --data-dir DIR [--members] [--part NAME ...] [--workers 2] [--brain DIR ...]
                                   [--out DIR]
    python benchmarks/zero_shot.py --table [--out DIR]      the tables, from what is kept
    python benchmarks/zero_shot.py --plan                   runs and hours of each part, without running

A part is a task with an optimizer. On each, cosine is tuned (16 rates, 8 seeds to choose by validation loss, 8 others
to report the test loss), and so are WSD, plateau, Schedule-Free and a constant rate; the brains, the rule `uwhg` and
whatever else claims to need no tuning get one run for each report seed, from rates drawn log-uniformly from 1e-5..1e-1.
What is counted, and how, stands under the tables. --members lets the networks that the default brain is the mean of
play by themselves as well, each an arm `brain:member-N`: one network is what one seed of its recipe learned.

Every run's numbers are kept in OUT/PART.json, so a part that was interrupted goes on where it was, and an arm that is
not what it was (another default brain) is run anew, alone. Without --part, all parts that are not complete are run.
Needs the extra: pip install "trimtab[baselines]".

Budget, as measured: 4,992 runs and 3.15 CPU hours, 1.6 hours with two workers on two free cores, of three that were
granted. Each --brain adds 104 runs and 4 CPU minutes, --members five times that; another default brain is 416 runs and
16 CPU minutes. --plan says it for each part, by a machine that was busy (3.6 CPU hours).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from zero_shot_suite.arms import DRAWN, TUNED, identity
from zero_shot_suite.parts import PARTS, Options, Part, find_part
from zero_shot_suite.plan import count_jobs, next_jobs, partner
from zero_shot_suite.store import Kept, load_all, open_part
from zero_shot_suite.summary import summarize
from zero_shot_suite.table import render

from trimtab import registry
from trimtab.agents.policy import PolicyAgent
from trimtab.brain import Brain
from trimtab.errors import InputError, RunFailedError, TrimtabError
from trimtab.executors import Event, Executor, make_executor
from trimtab.storage import atomic_write
from trimtab.training.own_optimizers import import_extra

_SAVE_EVERY_S = 30.0  # losing more than this to a kill would be noticed


class _Progress:
    """One line on the screen: where we are, and how long it will take."""

    def __init__(self, parts: Sequence[Part], options: Options, n_brains: int, workers: int) -> None:
        self._total = {part.name: count_jobs(part, options, n_brains) for part in parts}
        self._cost = {part.name: part.cost_s for part in parts}
        self._names = [part.name for part in parts]
        self._workers = max(1, workers)
        self._spent = (0, 0.0)  # runs and seconds of the part under way
        self._shown = -math.inf

    def begin(self, kept: Kept) -> None:
        """A part begins."""
        self._spent = (0, 0.0)
        self._shown = -math.inf
        self.show(kept)

    def add(self, kept: Kept, seconds: float) -> None:
        """A run is over."""
        runs, spent = self._spent
        self._spent = (runs + 1, spent + seconds)
        self._cost[kept.part.name] = self._spent[1] / self._spent[0]
        self.show(kept)

    def show(self, kept: Kept) -> None:
        """Write the line, on a screen over the one before; into a file only now and then."""
        is_screen = sys.stderr.isatty()
        if time.monotonic() - self._shown < (0.2 if is_screen else 60.0):
            return
        self._shown = time.monotonic()
        name = kept.part.name
        place = self._names.index(name)
        left = max(0, self._total[name] - len(kept.runs)) * self._cost[name]
        later = sum(self._total[other] * self._cost[other] for other in self._names[place + 1 :])
        line = (
            f"part {place + 1} of {len(self._names)}, {name}: {len(kept.runs)} of about {self._total[name]} runs, "
            f"{_minutes(left / self._workers)} left, of all {_minutes((left + later) / self._workers)}"
        )
        print(f"\r{line:110s}" if is_screen else line, end="" if is_screen else "\n", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def run_part(
    kept: Kept, executor: Executor, data_dir: Path | None, brains: dict[str, str], progress: _Progress
) -> None:
    """Run what a part lacks, and keep it.

    Args:
        kept: What there is; its runs are added to.
        executor: Does the runs.
        data_dir: Folder with the data sets.
        brains: NAME -> folder.
        progress: Told of each run.

    Raises:
        RunFailedError: A run failed; what was done before is kept.
    """
    last_save = time.monotonic()

    def on_event(event: Event) -> None:
        nonlocal last_save
        if event.kind == "failed":
            raise RunFailedError(f"{kept.part.name}: {event.key}: {event.data['error']}")
        if event.kind != "done":
            return
        kept.runs[event.key] = event.data
        progress.add(kept, event.data["seconds"])
        if time.monotonic() - last_save > _SAVE_EVERY_S:
            kept.save()
            last_save = time.monotonic()

    progress.begin(kept)
    try:
        # A brain that is kept and was not named now cannot be run; whatever else is missing is.
        while jobs := next_jobs(kept.part, kept.options, brains, kept.runs):
            for job in jobs:
                replayed = partner(job, kept.options)
                executor.submit(
                    job.key,
                    {
                        **vars(job),
                        "part": kept.part.name,
                        "brain": brains.get(job.arm.partition(":")[2]),
                        "replay": None if replayed is None else kept.runs[replayed.key]["replay"],
                    },
                    None if data_dir is None else str(data_dir),
                )
            executor.drain(on_event)
        kept.is_complete = True
    finally:
        if kept.runs:
            kept.save()


def _brains(folders: Sequence[Path]) -> dict[str, str]:
    brains: dict[str, str] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in brains:
            raise InputError(f"two brains are called {name!r} ({brains[name]} and {folder}); rename a folder")
        brains[name] = str(folder.resolve())
    return brains


def default_members() -> list[Brain]:
    """The networks that the default brain is the mean of, each as a brain of its own.

    Raises:
        InputError: It is no mean of several.
    """
    brain = Brain.load("default")
    agent = brain.agent
    if not isinstance(agent, PolicyAgent) or agent.members == 1:
        raise InputError("the default brain is no mean of several networks; leave --members out")
    found = []
    for index in range(agent.members):
        alone = type(agent)(**{**agent.options, "members": 1}, n_knobs=agent.n_knobs)
        own = {key: value[index : index + 1] for key, value in agent.state_dict().items() if key != "rng"}
        alone.load_state_dict({**alone.state_dict(), **own})
        found.append(replace(brain, agent=alone))
    return found


def run(arguments: argparse.Namespace, members_in: Path) -> None:
    """Run the parts that were asked for, or all that are missing.

    Args:
        arguments: Of the command.
        members_in: An empty folder for the networks of the default brain: workers load what they run from a folder.
    """
    options = Options(arguments.rates, arguments.seeds, min(arguments.other_seeds, arguments.seeds))
    for package in ("schedulefree", "prodigyopt"):
        import_extra(package)
    members = default_members() if arguments.members else []
    folders = [member.save(members_in / f"member-{index}") for index, member in enumerate(members)]
    brains = _brains([*arguments.brain, *folders])
    arms = {arm: identity(arm, brains) for arm in (*TUNED, *DRAWN, *(f"brain:{name}" for name in brains))}
    asked = [find_part(name) for name in arguments.part or PARTS]
    all_kept = [open_part(part, arguments.out, options, arms) for part in asked]
    missing = [kept for kept in all_kept if next_jobs(kept.part, options, brains, kept.runs)]
    if not missing:
        print("nothing is missing; --table makes the tables")
    for task_name in dict.fromkeys(kept.part.task_name for kept in missing):
        registry.load("task", task_name)("small").load(arguments.data_dir)  # better missed now than after an hour
    progress = _Progress([kept.part for kept in missing], options, len(brains), arguments.workers)
    with make_executor("local", "zero_shot_suite.single:run_job", workers=arguments.workers, threads=1) as executor:
        for kept in missing:
            run_part(kept, executor, arguments.data_dir, brains, progress)
            line = f"{kept.part.name}: {len(kept.runs)} runs, {kept.seconds:.0f} CPU s, in {kept.path}"
            print(f"\r{line:110s}" if sys.stderr.isatty() else line, flush=True)


def table(folder: Path) -> None:
    """Write the tables from what is kept, and show them."""
    with Console(stderr=True).status("reading") as status:
        summary = summarize(load_all(folder), status.update)
    text = render(summary)
    atomic_write(folder / "table.json", json.dumps(summary, indent=1) + "\n")
    atomic_write(folder / "table.md", text)
    print(text)
    print(f"written to {folder / 'table.md'} and table.json")


def plan(arguments: argparse.Namespace) -> None:
    """Show the budget."""
    options = Options(arguments.rates, arguments.seeds, min(arguments.other_seeds, arguments.seeds))
    total = 0.0
    n_brains = len(arguments.brain) + (len(default_members()) if arguments.members else 0)
    for part in map(find_part, arguments.part or PARTS):
        runs = count_jobs(part, options, n_brains)
        total += runs * part.cost_s
        print(f"{part.name:20s} {runs:5d} runs of {part.cost_s:5.2f} CPU s: {runs * part.cost_s / 60:6.1f} CPU minutes")
    hours = total / 3600 / max(1, arguments.workers)
    print(f"{total / 3600:.2f} CPU hours in all: {hours:.2f} h with {arguments.workers} workers on as many free cores")


def main(given: Sequence[str] | None = None) -> int:
    """Run, plan or tabulate; the exit code is 0, 1 if a run failed, 2 on bad input, or 130 if it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", metavar="NAME", help=f"one of {', '.join(PARTS)}; default: all")
    parser.add_argument("--table", action="store_true", help="make the tables from what is kept, and run nothing")
    parser.add_argument("--plan", action="store_true", help="show runs and hours, and run nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes at once, one thread each")
    parser.add_argument("--rates", type=int, default=16, help="of the grid, over four decades; a multiple of 4")
    parser.add_argument("--seeds", type=int, default=8, help="to choose by, and as many others to report")
    parser.add_argument("--other-seeds", type=int, default=4, help="to choose by, of the tuned arms beside cosine")
    parser.add_argument("--brain", type=Path, action="append", default=[], metavar="DIR", help="a further arm")
    parser.add_argument("--members", action="store_true", help="the networks of the default brain as further arms")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "zero_shot")
    arguments = parser.parse_args(given)
    try:
        if arguments.table:
            others = [name for name in vars(arguments) if name not in ("table", "out")]
            given = [name.replace("_", "-") for name in others if getattr(arguments, name) != parser.get_default(name)]
            if given:
                raise InputError(
                    f"--table tells of all that --out holds and runs nothing; leave out --{', --'.join(given)}"
                )
            table(arguments.out)
        elif arguments.plan:
            plan(arguments)
        else:
            with tempfile.TemporaryDirectory() as folder:
                run(arguments, Path(folder))
    except TrimtabError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("\nstopped; what was run is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

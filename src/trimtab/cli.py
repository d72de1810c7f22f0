"""The command line: `trimtab run | prune | report | learn | list | show`.

Nothing here imports torch, NumPy or matplotlib before a command needs them, so that help and lists are quick.
This is the one place that reads an environment variable (TRIMTAB_DATA) and that turns errors into exit codes:
0 all done, 1 something that was asked for failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import trimtab
from trimtab import registry
from trimtab.errors import InputError, TrimtabError, unknown_name

__all__ = ["app", "main"]

DATA_VARIABLE = "TRIMTAB_DATA"
_KINDS = ("tasks", "agents", "knobs", "signals", "rewards")
_PRUNING = "pruning"  # what `trimtab learn` makes that is no controller's brain
_LISTS = (*_KINDS, "arms", "studies", "recipes", "brains", "experience")
# What typer raises on a wrong command line; older typers have it from click, newer ones bring their own.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="trimtab",
    help="Controllers of hyperparameters while a model trains, and experiments that say whether they help.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the command `trimtab`.

    Args:
        args: Words of the command line; those of this process where it is None.

    Raises:
        SystemExit: Always, with the exit code.
    """
    try:
        code = app(args=args, prog_name="trimtab", standalone_mode=False)
    except _UsageError as error:
        Console(stderr=True, highlight=False).print(
            f"trimtab: {error.format_message()} (trimtab --help says what is known)",
            markup=False,
            soft_wrap=True,
        )
        code = _BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _guarded(action: Callable[[], int], how_to_resume: str = "") -> None:
    """Run a command's work and end with its exit code; an error of ours is one message, not a traceback."""
    screen = Console(stderr=True, highlight=False)
    try:
        code = action()
    except TrimtabError as error:
        screen.print(f"trimtab: {error}", markup=False, soft_wrap=True)
        code = _BAD_INPUT if isinstance(error, InputError) else _FAILED
        if code == _FAILED and how_to_resume:
            screen.print(f"what is done is kept; go on with: {how_to_resume}", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        then = f"; what is done is kept, go on with: {how_to_resume}" if how_to_resume else ""
        screen.print(f"trimtab: interrupted{then}", markup=False, soft_wrap=True)
        code = _INTERRUPTED
    raise typer.Exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        Console().print(f"trimtab {trimtab.__version__}", highlight=False)
        raise typer.Exit(0)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    del version  # done by its callback
    if context.invoked_subcommand is None:
        Console().print(context.get_help(), markup=False, highlight=False)
        raise typer.Exit(_BAD_INPUT)


@app.command("run")
def run_command(  # noqa: PLR0913 (one argument for each option of the command)
    study: Annotated[str, typer.Argument(metavar="STUDY|FILE.yaml", help="A study of ours, or a file.")],
    scale: Annotated[str, typer.Option(help="smoke, small or full.")] = "small",
    tasks: Annotated[
        str | None, typer.Option(help="Only these tasks, with commas; FILE.py:NAME for one of your own.")
    ] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms, with commas between them.")] = None,
    n_seeds: Annotated[int | None, typer.Option(help="Seeds, instead of the study's number.")] = None,
    seed: Annotated[int | None, typer.Option(help="Root seed, instead of the study's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; runs/STUDY if not given.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help=f"Folder with data sets; ${DATA_VARIABLE} if not given.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local, or ray (not available yet).")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes at once; one for each core if not given, 0: in this one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what is in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Not available yet.")] = False,
) -> None:
    """Run a study: arms x tasks x seeds, and its report."""
    given: dict[str, Any] = {
        "scale": None if scale == "small" else scale,
        "tasks": tasks,
        "arms": arms,
        "n-seeds": n_seeds,
        "seed": seed,
        "out": out,
        "data-dir": data_dir,
        "workers": workers,
    }

    def action() -> int:
        from trimtab.experiments.run import run
        from trimtab.progress import make_display

        if tensorboard:
            raise InputError("--tensorboard is not available in this version; leave it out")
        outcome = run(
            study,
            scale=scale,
            tasks=None if tasks is None else tasks.split(","),
            arms=None if arms is None else arms.split(","),
            n_seeds=n_seeds,
            seed=seed,
            out=out,
            data_dir=_data_folder(data_dir),
            executor=executor,
            workers=workers,
            resume=resume,
            display=make_display(Console(stderr=True)),
        )
        screen = Console(stderr=True, highlight=False)
        _print_summary(outcome.out)
        if outcome.left_out:
            names = ", ".join(outcome.left_out)
            screen.print(f"left out, since their data was not found: {names}", markup=False, soft_wrap=True)
        for directory, why in outcome.failed.items():
            screen.print(f"failed: {directory}: {why}", markup=False, soft_wrap=True)
        if outcome.failed:
            again = _command_line("run", study, given)
            screen.print(
                f"{len(outcome.failed)} of {outcome.n_runs} runs failed; try them again with: {again}",
                markup=False,
                soft_wrap=True,
            )
        Console().print(f"report: {outcome.report}", markup=False, highlight=False, soft_wrap=True)
        return outcome.exit_code

    _guarded(action, _command_line("run", study, given))


@app.command("prune")
def prune_command(  # noqa: PLR0913 (one argument for each option of the command)
    task: Annotated[str, typer.Argument(metavar="TASK", help="A task of `trimtab list tasks`.")],
    target: Annotated[str, typer.Option(help="What may be left: flops=0.5, params=0.5, latency=0.5,batch_size=64.")],
    agent: Annotated[str, typer.Option(help="What chooses the widths.")] = "ppo",
    baselines: Annotated[str | None, typer.Option(help="Other methods to compare with, with commas.")] = None,
    max_evaluations: Annotated[int, typer.Option(help="Configurations that a search scores.")] = 100,
    fine_tune_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of a fine-tuning; one pass over the data if not given.")
    ] = None,
    score_steps: Annotated[
        int, typer.Option(help="Optimizer steps before each score of a search, where cut networks only guess.")
    ] = 0,
    stages: Annotated[int, typer.Option(help="Stages of pruning and fine-tuning.")] = 1,
    multiple: Annotated[int, typer.Option(help="Widths are multiples of it.")] = 8,
    brain: Annotated[
        str, typer.Option(help="What ppo starts from: the brain we ship, or the folder of another.")
    ] = "pruning",
    model: Annotated[
        Path | None, typer.Option(help="Folder of a saved network of the task, instead of training one.")
    ] = None,
    scale: Annotated[str, typer.Option(help="smoke, small or full.")] = "small",
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write; runs/prune-TASK if not given.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help=f"Folder with data sets; ${DATA_VARIABLE} if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what is in --out.")] = False,
) -> None:
    """Train a task's network, prune it to a target, fine-tune it, and report."""
    options: dict[str, Any] = {
        "max_evaluations": max_evaluations, "stages": stages, "multiple": multiple, "brain": brain, "seed": seed,
        "fine_tune_steps": fine_tune_steps, "score_steps": score_steps, "model": model, "scale": scale, "out": out,
    }  # fmt: skip
    words = {"target": target, "agent": agent, "baselines": baselines, **options, "data-dir": data_dir}
    usual = {
        "agent": "ppo",
        "max_evaluations": 100,
        "stages": 1,
        "score_steps": 0,
        "multiple": 8,
        "brain": "pruning",
        "seed": 0,
        "scale": "small",
    }
    given = {name: None if value == usual.get(name) else value for name, value in words.items()}

    def action() -> int:
        from trimtab.experiments.pruning.command import SAVED, prune_task
        from trimtab.progress import make_display

        outcome = prune_task(
            task,
            target=target,
            agent=agent,
            baselines=[name.strip() for name in baselines.split(",")] if baselines else [],
            data_dir=_data_folder(data_dir),
            resume=resume,
            display=make_display(Console(stderr=True)),
            **options,
        )
        _print_summary(outcome.out)
        for why in outcome.failed.values():
            Console(stderr=True, highlight=False).print(f"failed: {why}", markup=False, soft_wrap=True)
        screen = Console(highlight=False)
        if (outcome.out / SAVED).is_dir():
            screen.print(f"network: {outcome.out / SAVED}", markup=False, soft_wrap=True)
        screen.print(f"report: {outcome.report}", markup=False, soft_wrap=True)
        return outcome.exit_code

    _guarded(action, _command_line("prune", task, given))


@app.command("report")
def report_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study.")],
    compare: Annotated[list[Path] | None, typer.Option(help="Not available yet.")] = None,
) -> None:
    """(Re)write the report of a study from its run directories alone."""

    def action() -> int:
        if compare:
            raise InputError("--compare is not available in this version; report each folder by itself")
        _check_study(directory)
        from trimtab.experiments import report

        path = report.write(directory)
        _print_summary(directory)
        Console().print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
        return 0

    _guarded(action)


@app.command("learn")
def learn_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE.yaml", help="A recipe of ours, or a file.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; runs/learn-RECIPE if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what is in --out.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes at once; one for each core if not given, 0: in this one.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Learners, instead of the recipe's number.")] = None,
    num_envs: Annotated[int | None, typer.Option(help="Runs in an iteration, instead of the recipe's.")] = None,
) -> None:
    """Learn a brain by a recipe; its folder holds the brain and where it comes from."""
    changes = {"iterations": iterations, "seeds": seeds, "num_envs": num_envs}
    given = {"seed": seed or None, "out": out, "workers": workers, **changes}

    def action() -> int:
        if recipe == _PRUNING:
            return _learn_pruning(out, seed, {"resume": resume or None, "workers": workers, **changes})
        from trimtab.learning.learn import learn
        from trimtab.learning.recipe import recipe_names
        from trimtab.progress import make_display

        known = [*recipe_names(), _PRUNING]
        if recipe not in known and not recipe.endswith((".yaml", ".yml")) and not Path(recipe).exists():
            raise unknown_name("recipe", recipe, known)
        display = make_display(Console(stderr=True))
        learned = learn(recipe, out, seed=seed, workers=workers, resume=resume, display=display, **changes)
        screen = Console(highlight=False)
        screen.print(f"chosen: {learned.why}", markup=False, soft_wrap=True)
        screen.print(f"report: {learned.report}", markup=False, soft_wrap=True)
        screen.print(f"brain: {learned.brain}", markup=False, soft_wrap=True)
        return 0

    _guarded(action, "" if recipe == _PRUNING else _command_line("learn", recipe, given))


def _learn_pruning(out: Path | None, seed: int, others: dict[str, Any]) -> int:
    """Learn the policy of `trimtab.prune`, which is made in another way than the brains of recipes."""
    for name, value in others.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is not for `trimtab learn {_PRUNING}`: it is made in one piece; leave it out")
    from trimtab.progress import make_display
    from trimtab.pruner.learn import learn_policy

    brain = learn_policy(out, seed=seed, display=make_display(Console(stderr=True)))
    Console(highlight=False).print(f"brain: {brain}", markup=False, soft_wrap=True)
    return 0


@app.command("list")
def list_command(
    what: Annotated[str, typer.Argument(metavar="|".join(_LISTS), help="What to list.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Folder of the experience; those of runs/* if not given.")
    ] = None,
) -> None:
    """List what has a name."""

    def action() -> int:
        if what not in _LISTS:
            raise unknown_name("list", what, _LISTS)
        if what == "experience":
            _print_experiences(directory)
            return 0
        if directory is not None:
            raise InputError(f"--dir is for `trimtab list experience`; leave it out to list {what}")
        rows = _rows(what)
        console = Console(highlight=False)
        width = max(len(name) for name in rows)
        for name, description in rows.items():
            console.print(f"{name:<{width}}  {description}", markup=False, soft_wrap=True)
        return 0

    _guarded(action)


@app.command("show")
def show_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR|BRAIN", help="Folder of a study, or of a brain.")],
) -> None:
    """Show what a folder holds: a study's plan and state, or where a brain comes from."""

    def action() -> int:
        from trimtab.experiments.show import show

        show(directory, Console(highlight=False))
        return 0

    _guarded(action)


def _data_folder(given: Path | None) -> Path | None:
    """The folder of data sets that was given, or that the environment names."""
    if given is None and os.environ.get(DATA_VARIABLE):
        return Path(os.environ[DATA_VARIABLE])
    return given


def _rows(what: str) -> dict[str, str]:
    """Name -> description of one list."""
    if what == "brains":
        from trimtab import brains

        return brains.descriptions()
    if what == "studies":
        from trimtab.experiments.design import study_names
        from trimtab.yaml_files import read_yaml

        return {name: str(read_yaml(path).get("idea")) for name, path in study_names().items()}
    if what == "recipes":
        from trimtab.learning.recipe import recipe_names
        from trimtab.yaml_files import read_yaml

        recipes = {name: str(read_yaml(path, "recipe").get("idea")) for name, path in recipe_names().items()}
        return {**recipes, _PRUNING: "a policy of widths for trimtab.prune, taught on many small networks"}
    if what == "arms":
        rows = {name: entry.description for name, entry in registry.entries("agent").items() if name != "replay"}
        rows["placebo:ARM"] = "ARM decides, and only its base schedule is written"
        rows["yoked:ARM"] = "replays, without looking, the decisions ARM took under another seed"
        rows["tuned-ARM"] = "a baseline at the rate that a study's `tuning` chose on other seeds"
        return rows
    kind = what.removesuffix("s")
    return {name: entry.description for name, entry in sorted(registry.entries(kind).items())}


def _check_study(directory: Path) -> None:
    if not (directory / "study.json").is_file():
        raise InputError(f"there is no study in {directory}: expected study.json in it, as `trimtab run` writes it")


def _command_line(command: str, name: str, given: dict[str, Any]) -> str:
    """The command that goes on with a study or a recipe, with the options that it was begun with."""
    words = ["trimtab", command, name]
    for option, value in given.items():
        words += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--resume"])


def _print_experiences(directory: Path | None) -> None:
    """A table for each folder of experience: the one given, or runs/experience and those of the studies in runs."""
    from trimtab.experience import DEFAULT_FOLDER

    runs = DEFAULT_FOLDER.parent
    found = [DEFAULT_FOLDER, *sorted(runs.glob(f"*/{DEFAULT_FOLDER.name}"))]
    roots = [root for root in found if root.exists()] if directory is None else [directory]
    if sum([_print_experience(root) for root in roots]) == 0:
        where = f"{DEFAULT_FOLDER} and {runs}/*/{DEFAULT_FOLDER.name}" if directory is None else str(directory)
        text = (
            f"no experience in {where}: runs of learned arms leave their transitions in OUT/{DEFAULT_FOLDER.name} of a "
            "study, and trimtab.experience.ExperienceStore appends others; name another folder with --dir"
        )
        Console(highlight=False).print(text, markup=False, soft_wrap=True)


def _print_experience(root: Path) -> bool:
    """A table of what is stored, one row a spec, if anything is; what cannot be read is named on the error output."""
    from trimtab.experience import ExperienceStore

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = ExperienceStore(root).summary()
    for warning in caught:
        Console(stderr=True, highlight=False).print(f"trimtab: {warning.message}", markup=False, soft_wrap=True)
    if not rows:
        return False
    n_runs, n_transitions = sum(row.runs for row in rows), sum(row.transitions for row in rows)
    title = Text(f"{root}: {_count(n_runs, 'run')}, {_count(n_transitions, 'transition')}")
    table = Table(title=title, title_justify="left")
    table.add_column("fingerprint", no_wrap=True)
    for name in ("runs", "transitions"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("knobs")
    table.add_column("signals", justify="right", no_wrap=True)
    table.add_column("tasks")
    table.add_column("mean reward sum of a run", justify="right")
    for row in rows:
        cells = (
            row.fingerprint,
            str(row.runs),
            str(row.transitions),
            ", ".join(row.knobs),
            str(len(row.signals)),
            ", ".join(row.tasks) or "-",
            f"{row.mean_reward_sum:.4g}",
        )
        table.add_row(*map(Text, cells))  # names are a file's: no markup in them
    _print_table(table)
    return True


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _print_summary(out: Path) -> None:
    """A short table: what each arm reached, and what its interval says."""
    from trimtab.experiments.show import summary_table

    table = summary_table(out)
    if table is not None:
        _print_table(table)


def _print_table(table: Table) -> None:
    """In the width of the terminal, or of 120 where there is none."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)

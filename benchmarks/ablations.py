"""What the parts of a recipe are worth: each left out or exchanged, learned anew, and compared with the whole.

    python benchmarks/ablations.py [--recipe NAME|FILE] [--iterations N] [--seeds N] [--num-envs N] [--hold-out FAMILY]
                                   [--only VARIANT ...] [--seed ROOT] [--workers N] [--out DIR]
    python benchmarks/ablations.py --quick     everything at its smallest, under two minutes on one core
    python benchmarks/ablations.py --list      the variants of the recipe, without learning

The variants: `full`; two other rewards; each family of features left out; no base schedule; the residual on `uwhg`; no
early decisions. Each is learned as by `trimtab learn`, in OUT/VARIANT; then the agents of all play the same episodes,
on which none was watched or chosen. OUT/table.md and OUT/table.json hold the final losses relative to `uwhg`'s and,
paired by learner and task, to those of `full`; OUT/curves.png how they came about, and OUT/full/plots/curves.png the
return of `full` against what was trained, with the interval over its learners and held-out families beside.

The same command goes on where it was stopped: variants that are complete are not learned again, and the table is
written anew after each. --hold-out takes families from training and the choice, of every variant.

Budget, extrapolated from the five learners of `default` (50 iterations each, 1.4 CPU hours in all): as much a variant,
and 19 CPU hours for all 14, half as many with two workers on two free cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ablation_suite.figures import LEAST_SEEDS
from ablation_suite.picture import draw
from ablation_suite.playing import PLAYED, RULE, asked, kept_play, make_episodes
from ablation_suite.summary import summarize
from ablation_suite.table import render
from ablation_suite.variants import Variant, make_full, make_variants, variant_names
from rich.console import Console

from trimtab import machine
from trimtab.brain import Brain
from trimtab.errors import InputError, RunFailedError, TrimtabError, unknown_name
from trimtab.executors import Event, Executor, make_executor
from trimtab.learning.learn import learn
from trimtab.learning.recipe import Recipe, load_recipe
from trimtab.learning.teach import read_plan
from trimtab.progress import make_display
from trimtab.storage import atomic_write, read_lines, write_json

QUICK = {"iterations": 2, "seeds": 2, "num_envs": 8}


@dataclass(frozen=True)
class Plan:
    """What was asked for.

    Attributes:
        full: The recipe of `full`.
        variants: All variants that it has, by name.
        impossible: Those that it has not, and why.
        out: Folder of the ablations.
        root_seed: Root seed, the same for all variants.
    """

    full: Recipe
    variants: Mapping[str, Variant]
    impossible: Mapping[str, str]
    out: Path
    root_seed: int

    def kept(self, name: str) -> dict[str, Any] | None:
        """What was played for a variant, or the rule; None where it was not, or not as it would be played now."""
        return kept_play(self.out, name, self.asked(name))

    def asked(self, name: str) -> dict[str, Any]:
        """What a play depends on."""
        recipe = self.full if name == RULE else self.variants[name].recipe
        return asked(make_episodes(self.full, self.root_seed), recipe)

    def is_learned(self, name: str) -> bool:
        """Whether a variant was learned to the end, by its recipe and seed."""
        folder = self.out / name
        is_there = (folder / "brain" / "brain.json").is_file()
        return is_there and read_plan(folder) == (self.variants[name].recipe, self.root_seed)


def learn_variant(plan: Plan, variant: Variant, workers: int | None) -> None:
    """Learn a variant from where it is to the end.

    Raises:
        OutputError: Its folder holds another recipe.
        RunFailedError: A learner did not come to its end; what is done is kept.
    """
    folder = plan.out / variant.name
    path = plan.out / "recipes" / f"{variant.name}.yaml"
    is_begun = (folder / "learn.json").is_file()
    if not is_begun:
        atomic_write(path, yaml.safe_dump(variant.recipe.to_json(), sort_keys=False, allow_unicode=True))
    display = make_display(Console(stderr=True))
    learn(path, folder, seed=plan.root_seed, workers=workers, resume=is_begun, display=display)


def play_missing(plan: Plan, executor: Executor) -> None:
    """Let the rule and the agents of learned variants play, where they did not before.

    Raises:
        RunFailedError: An agent could not play.
    """
    job = {"full": plan.full.to_json(), "seed": plan.root_seed}
    results: dict[str, dict[str, Any]] = {}

    def on_event(event: Event) -> None:
        if event.kind == "failed":
            raise RunFailedError(f"{event.key} could not play: {event.data['error']}")
        if event.kind == "done":
            results[event.key] = event.data

    for name in (RULE, *(name for name in plan.variants if plan.is_learned(name))):
        if plan.kept(name) is not None:
            continue
        keys = [f"{name} {index}" for index in range(1 if name == RULE else plan.full.seeds)]
        for index, key in enumerate(keys):
            executor.submit(key, {**job, "variant": name, "index": index}, str(plan.out))
        executor.drain(on_event)
        learners = [results[key] for key in keys]
        write_json(plan.out / PLAYED / f"{name}.json", {"asked": plan.asked(name), "learners": learners})


def write_page(plan: Plan, failed: Mapping[str, str]) -> str:
    """Write table.md, table.json and curves.png from what is there.

    Args:
        plan: What was asked for.
        failed: Variant -> why it failed.

    Returns:
        The table.
    """
    full, out = plan.full, plan.out
    kept = {name: plan.kept(name) for name in (RULE, *plan.variants)}
    plays = {name: [row["played"] for row in one["learners"]] for name, one in kept.items() if one is not None}
    rule = plays.pop(RULE)[0]
    rows: dict[str, dict[str, Any]] = {}
    curves = {}
    for name, figures in summarize(plays, rule, full.choosing_families, full.validate_on.held_out).items():
        cpu_s = Brain.load(out / name / "brain").provenance["cost"]["cpu_s"]
        rows[name] = {"what": plan.variants[name].what, "cpu_s": cpu_s, **figures}
        learners = [read_lines(out / name / f"seed-{index}" / "curve.jsonl") for index in range(full.seeds)]
        curves[name] = (plan.variants[name], learners)
    if curves:
        draw(curves, out / "curves.png")
    page = {
        "recipe": full.to_json(),
        "root_seed": plan.root_seed,
        "families": list(full.choosing_families),
        "held_out": list(full.validate_on.held_out),
        "rows": rows,
        "unfinished": [name for name in plan.variants if name not in rows and name not in failed],
        "failed": dict(failed),
        "impossible": dict(plan.impossible),
    }
    text = render(page)
    write_json(out / "table.json", page)
    atomic_write(out / "table.md", text)
    return text


def choose(only: Sequence[str], variants: Mapping[str, Variant], impossible: Mapping[str, str]) -> list[Variant]:
    """The variants that were asked for, in their order; all where none is named.

    Raises:
        UnknownNameError: There is no such variant.
        InputError: This recipe has no such variant.
    """
    for name in only:
        if name not in variant_names():
            raise unknown_name("variant", name, variant_names())
        if name in impossible:
            raise InputError(f"--only {name}: this recipe has no such variant: {impossible[name]}")
    return [variant for name, variant in variants.items() if not only or name in only]


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of `full`.

    Raises:
        InputError: It, or a change of it, is wrong.
    """
    changes = {name: getattr(arguments, name) for name in QUICK}
    if arguments.quick and arguments.recipe is not None:
        raise InputError(
            f"--quick is the recipe 'smoke' at its smallest; leave out --recipe {arguments.recipe}, or --quick"
        )
    if arguments.quick:
        changes = {name: QUICK[name] if given is None else given for name, given in changes.items()}
    recipe = load_recipe("smoke" if arguments.quick else arguments.recipe or "default", **changes)
    return make_full(recipe, arguments.hold_out)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """What the arguments ask for.

    Raises:
        InputError: Something that was given is wrong.
    """
    full = read_recipe(arguments)
    variants, impossible = make_variants(full)
    out = arguments.out or Path("runs") / f"ablations-{'quick' if arguments.quick else full.recipe}"
    return Plan(full, variants, impossible, out.absolute(), arguments.seed)


def run(arguments: argparse.Namespace) -> None:
    """Learn the variants that were asked for and are not there, and write the table after each.

    Raises:
        InputError: Something that was given is wrong.
        RunFailedError: A variant failed; the others were gone on with.
    """
    plan, workers = make_plan(arguments), arguments.workers
    wanted = choose(arguments.only, plan.variants, plan.impossible)
    n_workers = machine.default_workers("cpu", 1) if workers is None else workers
    missing = [variant.name for variant in wanted if not plan.is_learned(variant.name)]
    failed: dict[str, str] = {}
    begun_s, n_begun, text = time.monotonic(), 0, ""
    with make_executor("local", "ablation_suite.playing:work", workers=n_workers, threads=1) as executor:
        for place, variant in enumerate(wanted):
            where = f"variant {place + 1} of {len(wanted)}, {variant.name}"
            if variant.name in missing:
                left_s = (time.monotonic() - begun_s) / max(1, n_begun) * (len(missing) - n_begun)
                _say(f"{where}: {variant.what}" + (f"; of all about {_minutes(left_s)} left" if n_begun else ""))
                n_begun += 1
                try:
                    learn_variant(plan, variant, workers)
                except RunFailedError as error:
                    failed[variant.name] = str(error)
                    _say(f"{variant.name} failed: {error}")
            else:
                _say(f"{where}: complete before, and kept")
            play_missing(plan, executor)
            text = write_page(plan, failed)
    print(text)
    print(f"written to {plan.out / 'table.md'}, table.json and curves.png")
    if failed:
        raise RunFailedError("; ".join(f"{name}: {why}" for name, why in failed.items()))


def show(arguments: argparse.Namespace) -> None:
    """List the variants of the recipe."""
    plan = make_plan(arguments)
    full = plan.full
    for variant in choose(arguments.only, plan.variants, plan.impossible):
        print(f"{variant.name:20s} {variant.what}")
    for name, why in plan.impossible.items():
        print(f"{name:20s} not of this recipe: {why}")
    print(f"each: {full.seeds} learners, {full.iterations} iterations of {full.num_envs} runs")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def main(given: Sequence[str] | None = None) -> int:
    """Run or list; the exit code is 0, 1 if a variant failed, 2 on bad input, or 130 if it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", metavar="NAME|FILE", help="what is taken apart; default: default")
    parser.add_argument("--iterations", type=int, metavar="N", help="instead of the recipe's")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"learners; below {LEAST_SEEDS} there are no intervals")
    parser.add_argument("--num-envs", type=int, metavar="N", help="runs in each iteration, instead of the recipe's")
    parser.add_argument(
        "--hold-out", action="append", default=[], metavar="FAMILY", help="not trained on nor chosen by"
    )
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT", help=", ".join(variant_names()))
    parser.add_argument("--quick", action="store_true", help="the recipe smoke, two learners of two iterations")
    parser.add_argument("--list", action="store_true", help="show the variants, and learn nothing")
    parser.add_argument("--seed", type=int, default=0, metavar="ROOT", help="root seed of all variants")
    parser.add_argument("--workers", type=int, metavar="N", help="processes at once; default: one for each core")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ablations-RECIPE")
    arguments = parser.parse_args(given)
    try:
        show(arguments) if arguments.list else run(arguments)
    except TrimtabError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("\nstopped; what was learned is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

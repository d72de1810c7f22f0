"""prune: a trained network made smaller, to a budget, by a learned agent.

Called by users, by `trimtab prune` and by the study of pruning. Search, then a short fine-tuning of the few best, then
the best of those: all on validation. A test set is the caller's, and is read once, afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.cost import count_by_module, size_of
from trimtab.errors import InputError, unknown_name
from trimtab.progress import News
from trimtab.pruner.choice import FineTune
from trimtab.pruner.methods import METHODS
from trimtab.pruner.policies import SHIPPED, TaughtPolicy
from trimtab.pruner.result import Costs, PruneReport, PruneResult
from trimtab.pruner.stage import BLIND, Given, Outcome, run_method
from trimtab.pruning.budget import Budget, Prunable, Target
from trimtab.pruning.fingerprint import fingerprint
from trimtab.pruning.latency import measure
from trimtab.pruning.latency_table import LatencyTable
from trimtab.pruning.network import PrunableNetwork, units_of
from trimtab.pruning.scorer import check_one
from trimtab.storage import read_json, write_json

__all__ = ["prune"]

BACKENDS = ("surgery", "torch-pruning")
MIN_EVALUATIONS = 8  # of a stage
N_BEST = 5  # candidates that are fine-tuned
_FEW = 2  # units, of which a reader is warned


def prune(  # noqa: PLR0913 (each by name, and most of them left as they are)
    model: nn.Module,
    example_inputs: object,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    validation: object = None,
    fine_tune: FineTune | None = None,
    score_after: FineTune | None = None,
    target: Mapping[str, Any] | None = None,
    agent: str = "ppo",
    max_evaluations: int = 100,
    seed: int = 0,
    brain: str | Path = SHIPPED,
    multiple: int = 8,
    importance: str = "l2",
    ignore: Collection[str] = (),
    stages: int = 1,
    n_best: int = N_BEST,
    baselines: Collection[str] = (),
    backend: str = "surgery",
    checkpoint: str | Path | None = None,
    on_news: Callable[[News], None] | None = None,
) -> PruneResult:
    """Prune a trained network to a budget.

    Args:
        model: Trained. It is copied and never touched.
        example_inputs: A tensor, or a tuple of the forward's positional arguments. FLOPs are those of this batch.
        evaluate: Score of a network in evaluation, higher is better: a black box, called at most `max_evaluations`
            times in a search. Give this or `validation`.
        validation: (inputs, targets), samples along the first axis: accuracy for whole-number targets, minus the mean
            squared error for floats. Activations are kept between evaluations, which makes them tens of times cheaper;
            not of networks with batch norm, whose statistics are taken anew of the inputs after every cut.
        fine_tune: Trains a network in place, for a short while; called with copies, in training, with torch's random
            generators lent. None: nothing is fine-tuned.
        score_after: Trains a cut network in place, for a moment, before each of its scores in a search: for networks
            that only guess when they are cut, between which a search cannot choose. None: scored as they are cut, and
            by "paper" after `fine_tune`.
        target: What may be left: {"flops": share}, {"params": share} or {"latency": share, "batch_size": n}; None
            halves the FLOPs.
        agent: "ppo", which was taught on many small networks before; "ppo-untaught", which was not; "paper", PPO with
            the write-up's settings, which retrains after each action and needs `fine_tune`; or a method without
            learning: "random-search" (widths at random that use the budget up), "uniform" (the same share everywhere),
            "global" and "lamp" (one threshold for all parts), "greedy", "random-units", or "exhaustive" (all
            configurations within the budget are scored, where they are not too many).
        max_evaluations: Configurations that are scored in the search, the dense one not counted; 8 or more. "greedy"
            and "exhaustive" are no search: they score what they need.
        seed: Of everything that is drawn.
        brain: What "ppo" starts from: "pruning", which we ship, or a folder that `trimtab learn pruning` made.
        multiple: Widths are multiples of it, since odd ones are slower than wider ones that are; narrow parts, of
            fewer than four times as many units, go in quarters.
        importance: Which units go first: "l2", "product", "incoming", "outgoing" or "random". Heads and the
            feed-forward units of torch's transformer layers go by "l2" with each of them but "random".
        ignore: Names of layers whose units stay.
        stages: Prune and fine-tune in so many stages, each to the same share of the one before; more than 1 needs
            `fine_tune`.
        n_best: Configurations of the search that are fine-tuned and compared again.
        baselines: Other agents to compare with, by name, in one stage, each with evaluations of its own and the same
            fine-tuning.
        backend: What finds the parts and cuts them: "surgery", ours, or "torch-pruning", for networks that torch.fx
            cannot trace; it has FLOPs and parameters as targets, and needs `pip install "trimtab[prune]"`.
        checkpoint: Folder in which the search is kept, so that the same call goes on where it was ended.
        on_news: Told how far it is.

    Returns:
        The pruned network and a report.

    Raises:
        BrainError: `brain` cannot be loaded.
        InputError: An argument is wrong, the target is out of reach, nothing can be pruned, the network cannot be
            traced, or `evaluate` fails on the dense network; before any training.
        RunFailedError: Fine-tuning failed for every candidate.
    """
    parsed = Target.parse({"flops": 0.5} if target is None else target)
    check_one(evaluate, validation)
    ignored = _names("ignore", ignore)
    methods = _methods(agent, baselines)
    _check_counts(max_evaluations=max_evaluations, seed=seed, stages=stages, n_best=n_best)
    _check_functions(fine_tune, score_after, on_news, needs="paper" in methods, stages=stages)
    if checkpoint is not None and not isinstance(checkpoint, (str, Path)):
        raise InputError(f"checkpoint is {checkpoint!r}; expected a folder's path, or None")
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    policy = TaughtPolicy.for_methods(methods, brain)
    taught = {} if policy is None else policy.weights
    options: dict[str, Any] = {
        "multiple": multiple, "importance": importance, "ignore": sorted(ignored), "seed": seed,
    }  # fmt: skip
    describe = partial(_network_of(backend), example_inputs=example_inputs, **options)
    dense = describe(model)
    folder = None if checkpoint is None else Path(checkpoint)
    if parsed.kind != "latency":
        Budget(dense, parsed)  # out of reach is said before anything is written
    if folder is not None:
        options |= {"agent": agent, "max_evaluations": max_evaluations, "n_best": n_best, "stages": stages,
                    "backend": backend, "parts": {part.name: list(part.widths) for part in dense.parts}}  # fmt: skip
        given_by_user = {
            "brain": taught if agent == "ppo" else None,
            "score_after": None if score_after is None else True,  # what it does cannot be compared
            "model": dense.model.state_dict(),
            "example_inputs": dense.inputs,
            "validation": validation,
        }
        _claim(folder, {"target": parsed.to_dict(), **options, **{k: fingerprint(v) for k, v in given_by_user.items()}})
    whole = _budget(dense, parsed, folder, 1, on_news)
    given = Given(
        evaluate, validation, fine_tune, max_evaluations // stages, n_best, seed, taught, score_after, on_news
    )
    network, outcomes = dense, list[Outcome]()
    for number in range(1, stages + 1):
        target_now = replace(parsed, share=parsed.share ** (number / stages))
        if outcomes and outcomes[-1].candidates[0].share <= target_now.share:
            continue  # the stage before went further than it had to
        if outcomes:
            network = describe(outcomes[-1].model)
        budget = whole if stages == 1 else _budget(network, target_now, folder, number, on_news, whole.dense)
        log = None if folder is None else folder / f"evaluations-{number}.jsonl"
        outcomes.append(run_method(agent, given, network, budget, log=log))
    others = []
    for name in methods[1:]:
        log = None if folder is None else folder / f"evaluations-{name}.jsonl"
        others.append(run_method(name, replace(given, max_evaluations=max_evaluations), dense, whole, log=log))
    return _result(dense, whole, outcomes, others, max_evaluations, seed)


def _network_of(backend: str) -> Callable[..., Prunable]:
    if backend == "surgery":
        return PrunableNetwork
    from trimtab.pruning.torch_pruning import TorchPruningNetwork  # an extra

    return TorchPruningNetwork


def _budget(
    network: Prunable,
    target: Target,
    folder: Path | None,
    number: int,
    on_news: Callable[[News], None] | None,
    dense: float | None = None,
) -> Budget:
    """The budget; of a target of latency with a table that is measured, or was before."""
    if target.kind != "latency" or target.batch_size is None:
        return Budget(network, target, dense=dense)
    if not isinstance(network, PrunableNetwork):
        raise InputError("target latency is measured layer by layer, which needs backend='surgery'; or take flops")
    path = None if folder is None else folder / f"latencies-{number}.json"
    if path is not None and path.exists():
        table = LatencyTable.load(network, target.batch_size, read_json(path))
    else:

        def tell(done: int, total: int) -> None:
            if on_news is not None:
                on_news(News("measurement", done, total, "latencies of layers"))

        table = LatencyTable(network, target.batch_size, progress=tell)
        if path is not None:
            write_json(path, table.to_dict())
    return Budget(network, target, table.seconds, dense=dense)


def _methods(agent: object, baselines: object) -> tuple[str, ...]:
    """The agent, and the baselines, each once.

    Raises:
        InputError: One of them is no method.
    """
    others = _names("baselines", baselines)
    for name in others:
        if name not in METHODS:
            raise unknown_name("baseline", name, METHODS)
    if agent not in METHODS:
        raise unknown_name("agent", agent, METHODS)
    return (str(agent), *dict.fromkeys(others))


def _check_functions(fine_tune: object, score_after: object, on_news: object, *, needs: bool, stages: int) -> None:
    """Refuse what is no function, and none where one is needed.

    Raises:
        InputError: Naming the argument.
    """
    for name, given in (("fine_tune", fine_tune), ("score_after", score_after)):
        if given is not None and not callable(given):
            raise InputError(f"{name} is {type(given).__name__}; expected a function that trains a network in place")
    if on_news is not None and not callable(on_news):
        raise InputError(f"on_news is {type(on_news).__name__}; expected a function of the news, or None")
    if fine_tune is None and (needs or stages != 1):
        what = "agent 'paper' retrains after each action" if needs else "stages are fine-tuned in between"
        raise InputError(f"{what}: give fine_tune=, a function that trains a network in place")


def _check_counts(*, seed: int, **counts: int) -> None:
    """Refuse numbers that are none.

    Raises:
        InputError: Naming the argument.
    """
    for name, least, value in [
        ("seed", 0, seed),
        ("max_evaluations", MIN_EVALUATIONS * counts["stages"], counts["max_evaluations"]),
        ("stages", 1, counts["stages"]),
        ("n_best", 1, counts["n_best"]),
    ]:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; expected a whole number of {least} or more")


def _names(argument: str, given: object) -> list[str]:
    """The names that an argument has.

    Raises:
        InputError: It is one name, or something else than names.
    """
    is_several = isinstance(given, Collection) and not isinstance(given, (str, bytes, Mapping))
    names: list[Any] = list(given) if is_several else []  # type: ignore[call-overload]
    if not is_several or not all(isinstance(name, str) for name in names):
        raise InputError(f"{argument} is {given!r}; expected a list of names, such as ['conv1']; [] for none")
    return names


def _claim(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write down what the folder is for, or compare.

    Raises:
        InputError: It holds another search.
        OutputError: It cannot be written.
    """
    path = folder / "search.json"
    if not path.exists():
        write_json(path, asked)
        return
    there = read_json(path)
    differ = [key for key in asked if not isinstance(there, dict) or there.get(key) != asked[key]]
    if differ:
        raise InputError(
            f"checkpoint {folder} holds another search: {', '.join(differ)} differ; give the arguments of then, or "
            "another folder"
        )


def _result(
    dense: Prunable,
    budget: Budget,
    stages: Sequence[Outcome],
    others: Sequence[Outcome],
    max_evaluations: int,
    seed: int,
) -> PruneResult:
    """The last network, and what all stages have to say."""
    last = stages[-1]
    chosen = last.candidates[0]
    sizes = {part.name: (part.size, units_of(last.model, part)) for part in dense.parts}
    notes = [
        f"{name} has {new} of {old} units left: fine-tuning may not bring back what it did"
        for name, (old, new) in sizes.items()
        if 0 < new <= _FEW < old
    ]
    failed = sum(stage.proposal.failed for stage in stages)
    if failed:
        failure = next(stage.proposal.failure for stage in stages if stage.proposal.failure)
        notes.append(f"{failed} configurations had no score; the first: {failure}")
    if any(stage.is_blind for stage in stages):
        notes.append(BLIND.format(how="give score_after=, a function that trains a cut network for a moment"))
    latency: dict[str, Any] = {}
    if budget.target.batch_size is not None:
        models = {"dense": dense.model, "pruned": last.model}
        latency = measure(models, dense.inputs, batch_sizes=(budget.target.batch_size,)).to_dict()
    report = PruneReport(
        target=budget.target.to_dict(), agent=last.method, seed=seed,
        dense=_costs(dense.model, dense, stages[0].dense),
        pruned=_costs(last.model, dense, chosen.before if chosen.after is None else chosen.after),
        score_before=chosen.before, widths=sizes, refused=dense.refused,
        evaluations=sum(stage.proposal.evaluations for stage in stages), max_evaluations=max_evaluations,
        failed=failed, candidates=last.candidates, baselines=tuple(other.candidates[0] for other in others),
        notes=tuple(notes), latency=latency,
    )  # fmt: skip
    return PruneResult(last.model, report)


def _costs(model: nn.Module, network: Prunable, score: float) -> Costs:
    return Costs(score, count_by_module(model, network.inputs)[""], *size_of(model))

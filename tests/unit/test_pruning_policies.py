"""The taught policy: its file, how a search starts from it, and that the one we ship is worth it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab import brains
from trimtab.agents.widths import PRESETS, WidthOptions, WidthPolicy, shapes_of
from trimtab.brain import Brain
from trimtab.cli import main
from trimtab.envs.pruning import FEATURES, N_LEVELS, Problem, PruningEnv
from trimtab.errors import BrainError
from trimtab.pruner.learn import learn_policy
from trimtab.pruner.lessons import FAMILIES, draw_lesson
from trimtab.pruner.policies import TaughtPolicy
from trimtab.pruner.search import Search, relative, seeds_of
from trimtab.pruner.teach import Classroom, teach
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration
from trimtab.pruning.scorer import Scorer
from trimtab.pruning.validation import Validation
from trimtab.tasks.families import SOURCES, is_held_out


def small() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), torch.zeros(
            1, 8
        )


def worth(network: PrunableNetwork, configuration: Configuration) -> float:
    """A score between 0 and 1 that wants the second part wide."""
    first, second = (width / part.size for width, part in zip(configuration, network.parts, strict=True))
    return 0.2 * first + 0.7 * second


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of three networks and 128 steps."""
    return learn_policy(tmp_path_factory.mktemp("learned") / "out", seed=3, n_lessons=3, n_steps=128)


def test_a_policy_comes_back_the_same_and_says_where_it_is_from(learned: Path, tmp_path: Path) -> None:
    policy = TaughtPolicy.load(learned)
    again = TaughtPolicy.load(policy.save(tmp_path / "again"))
    assert set(again.weights) == set(policy.weights)
    assert all(torch.equal(again.weights[name], policy.weights[name]) for name in policy.weights)
    assert again.provenance == policy.provenance
    found = policy.provenance
    assert (found["command"], found["n_lessons"], found["n_steps"]) == ("trimtab learn pruning --seed 3", 3, 128)
    assert sum(found["lessons_drawn_from"].values()) == 3
    assert found["curve"][-1][0] == found["cost"]["episodes"]
    assert not any(is_held_out(source) for source in found["sources"])


def test_the_same_numbers_make_the_same_policy(learned: Path, tmp_path: Path) -> None:
    again = learn_policy(tmp_path / "again", seed=3, n_lessons=3, n_steps=128)
    assert (again / "weights.safetensors").read_bytes() == (learned / "weights.safetensors").read_bytes()


def test_what_learning_refuses(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(trimtab.errors.InputError, match="n_lessons is 0; expected a whole number of 1 or more"):
        learn_policy(tmp_path / "out", n_lessons=0)
    with pytest.raises(trimtab.errors.InputError, match="n_steps is 1; expected a whole number of 64 or more"):
        learn_policy(tmp_path / "out", n_steps=1)
    with pytest.raises(trimtab.errors.OutputError, match="is not empty; give another --out"):
        learn_policy(learned.parent, n_lessons=1)
    assert not (tmp_path / "out").exists()
    for words, text in [
        (["--resume"], "--resume is not for `trimtab learn pruning`"),
        (["--workers", "2"], "--workers is not for `trimtab learn pruning`"),
        (["--num-envs", "2"], "--num-envs is not for `trimtab learn pruning`"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["learn", "pruning", "--out", str(tmp_path / "out"), *words])
        assert ended.value.code == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("what", ["flipped", "torn", "gone", "features", "other"])
def test_a_broken_file_is_one_error_before_anything_is_done(learned: Path, tmp_path: Path, what: str) -> None:
    folder = TaughtPolicy.load(learned).save(tmp_path / "policy")
    weights = folder / "weights.safetensors"
    raw = weights.read_bytes()
    source: str | Path = folder
    if what == "flipped":
        weights.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
        text = "is not what was saved"
    elif what == "torn":
        weights.write_bytes(raw[:-5])
        text = "is not what was saved"
    elif what == "gone":
        source, text = tmp_path / "nowhere", "expected a folder that trimtab wrote, or 'pruning'"
    elif what == "features":
        from trimtab import brain_files

        description = {"features": list(FEATURES[1:]), "n_actions": 17, "provenance": {}}
        brain_files.write(
            folder, description, TaughtPolicy.load(learned).weights, kind="trimtab-pruning-policy", version=1
        )
        text = "was taught for other features or actions"
    else:
        source, text = "default", "expected the format 'trimtab-pruning-policy', got 'trimtab-brain'"
    model, inputs = small()
    with pytest.raises(BrainError, match=text):
        trimtab.prune(model, inputs, evaluate=lambda _: pytest.fail("evaluated"), brain=source)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda weights: {**weights, "action_net.bias": torch.zeros(16)},
            r"action_net.bias is \(16,\), expected \(17,\)",
        ),
        (lambda weights: {n: w for n, w in weights.items() if n != "action_net.bias"}, "action_net.bias is missing"),
        (lambda weights: {**weights, "more": torch.zeros(1)}, r"more is \(1,\), expected no such tensor"),
        (
            lambda weights: {**weights, "value_net.bias": torch.tensor([math.nan])},
            "value_net.bias has numbers that are",
        ),
    ],
)
def test_weights_of_another_network_are_refused_at_once(
    learned: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], text: str
) -> None:
    weights = dict(TaughtPolicy.load(learned).weights)
    folder = TaughtPolicy(change(weights)).save(tmp_path / "policy")
    with pytest.raises(BrainError, match=text):
        TaughtPolicy.load(folder)
    model, inputs = small()
    for source in (None, 3):
        with pytest.raises(trimtab.errors.InputError, match=f"brain is {source}; expected 'pruning', or a folder"):
            trimtab.prune(model, inputs, evaluate=lambda _: 0.0, brain=source)
    with pytest.raises(trimtab.errors.InputError, match="brain 'b' is what 'ppo' starts from, and uniform is not"):
        trimtab.prune(model, inputs, evaluate=lambda _: 0.0, agent="uniform", brain="b")


def test_the_shapes_of_a_policy_are_known_without_making_one() -> None:
    env = PruningEnv(*small(), validation=(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)), target={"flops": 0.5})
    found = {name: tuple(tensor.shape) for name, tensor in WidthPolicy(env, PRESETS["ppo"], seed=0).weights().items()}
    assert shapes_of(len(FEATURES), N_LEVELS) == found


def test_a_folder_is_a_policy_that_the_search_starts_from(learned: Path) -> None:
    model, inputs = small()
    asked: list[tuple[int, ...]] = []

    def evaluate(network: nn.Module) -> float:
        widths = tuple(layer.out_features for layer in network if isinstance(layer, nn.Linear))[:2]
        asked.append(widths)
        return (0.2 * widths[0] + 0.7 * widths[1]) / 64

    result = trimtab.prune(model, inputs, evaluate=evaluate, target={"params": 0.4}, max_evaluations=8, brain=learned)
    assert result.report.evaluations <= 8
    assert TaughtPolicy.load(learned.parent).digest == TaughtPolicy.load(learned).digest  # OUT, and OUT/brain
    network = PrunableNetwork(model, inputs)
    budget = Budget(network, Target.parse({"params": 0.4}))
    rules = seeds_of(budget)
    dense = worth(network, network.dense)
    score = relative(lambda widths: worth(network, widths), rules, dense)
    env = PruningEnv(problem=Problem(network, budget, score, dense))
    policy = WidthPolicy(env, PRESETS["ppo"], seed=0)
    policy.load_weights(TaughtPolicy.load(learned).weights)
    observation, _ = env.reset()
    is_over, infos = False, {}
    while not is_over:
        observation, _, is_over, _, infos = env.step(policy.act(observation))
    assert (
        infos["widths"] in asked[: 2 + len(rules)]
    )  # the dense network, the rules, then what the policy holds for best


def test_rewards_are_relative_to_the_better_rule() -> None:
    scores = {(1,): 0.5, (2,): 0.7, (3,): 0.9, (4,): -math.inf}
    compared = relative(scores.__getitem__, [(1,), (2,)], 0.8)
    assert [compared((n,)) for n in (1, 2, 3)] == pytest.approx([-0.25, 0.0, 0.25])
    assert compared((4,)) == pytest.approx(-0.875)  # as if it scored 0
    losses = relative({(1,): -2.0, (2,): -3.0, (3,): -math.inf}.__getitem__, [(1,)], -1.0)  # a size, whatever its sign
    assert [losses((n,)) for n in (1, 2)] == [0.0, -1.0]
    assert losses((3,)) == 0.0
    alone = relative({(1,): -math.inf, (2,): 0.5}.__getitem__, [(1,)], 0.0)
    assert alone((2,)) == 0.5


def test_a_lesson_depends_on_its_numbers_alone() -> None:
    first = draw_lesson(0, 5)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        again, other = draw_lesson(0, 5), draw_lesson(0, 6)
    weights, same = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert torch.equal(first.inputs, again.inputs)
    with torch.no_grad():
        right = (first.model(first.inputs).argmax(1) == first.targets).double().mean()
    assert first.accuracy == pytest.approx(float(right))
    assert (first.family in FAMILIES, first.accuracy != other.accuracy) == (True, True)
    assert not any(is_held_out(source) for family in FAMILIES for source in SOURCES[family])


def test_teaching_writes_down_what_it_was_paid() -> None:
    lessons = [draw_lesson(0, 5)]
    options = WidthOptions(n_steps=32, batch_size=32)
    policy, rewards = teach(lessons, n_steps=64, seed=1, options=options)
    n_parts = len(PrunableNetwork(lessons[0].model, lessons[0].inputs[:1]).parts)
    assert len(rewards) == 64 // n_parts
    twin, paid = teach(lessons, n_steps=64, seed=1, options=options)
    assert paid == rewards
    assert all(torch.equal(value, twin.weights()[name]) for name, value in policy.weights().items())
    dense = Classroom(lessons).problem(0, 8, 0.5).score(PrunableNetwork(lessons[0].model, lessons[0].inputs[:1]).dense)
    assert dense >= 0  # the rules are no better than the network that was not cut


def test_what_we_ship_has_seen_nothing_that_it_is_judged_on(capsys: pytest.CaptureFixture[str]) -> None:
    policy = TaughtPolicy.load()
    assert policy.provenance["command"] == "trimtab learn pruning"
    assert not any(is_held_out(source) for source in policy.provenance["sources"])
    folder = brains.folder_of("pruning")
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000
    assert json.loads((folder / "brain.json").read_text())["format"] == "trimtab-pruning-policy"
    with pytest.raises(BrainError, match="expected the format 'trimtab-brain', got 'trimtab-pruning-policy'"):
        Brain.load("pruning")
    for words, text in [
        (["list", "brains"], "learned, for trimtab.prune: trimtab learn pruning"),
        (["show", "pruning"], "ppo of trimtab.prune"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.slow
def test_with_eight_evaluations_what_we_ship_finds_more_than_what_was_not_taught() -> None:
    """On networks that it was not taught on; paired, and by more than two standard errors of the difference."""
    found: dict[str, list[float]] = {"ppo": [], "ppo-untaught": []}
    weights = TaughtPolicy.load().weights
    for number in range(24):
        lesson = draw_lesson(11, number)
        network = PrunableNetwork(lesson.model, lesson.inputs[:1])
        evaluator = CachedEvaluator(network, Validation((lesson.inputs, lesson.targets), network.model, 1))
        for agent, scores in found.items():
            best = []
            for share in (0.5, 0.25):
                scorer = Scorer(network, score_of=evaluator.score, seed=0)
                search = Search(Budget(network, Target("flops", share)), scorer, agent, 8, 0, weights)
                best.append(scorer.scores[search.run()[0]])
            scores.append(float(np.mean(best)))
    difference = np.array(found["ppo"]) - np.array(found["ppo-untaught"])
    assert difference.mean() > 2 * difference.std(ddof=1) / math.sqrt(len(difference))

"""Learners: what they teach, that it is what the exported agent does, and that a saved one goes on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_envs import FakeTraining, off_by
from trimtab.agents.base import Actions, Timing
from trimtab.agents.policy import PPOAgent
from trimtab.agents.sb3 import PPOOptions, PPOTrainer
from trimtab.errors import InputError, UnknownNameError
from trimtab.learning.learners import Learner, make_learner
from trimtab.spec import ControlSpec, make_agent
from trimtab.storage import load_state, save_state
from trimtab.testing.contract import is_plain, same

NAMES = ("ppo", "dqn", "evolution")
SIGNALS = ["progress", "lr_log_ratio_start", "update_to_weight", "grad_update_cosine"]
QUICK: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 64, "hidden": [8, 8]},
    "dqn": {"batch_size": 32, "gradient_steps": 3, "buffer_size": 400, "hidden": [8, 8]},
    "evolution": {},
}


def spec_of(name: str, **options: Any) -> ControlSpec:
    return ControlSpec.for_agent(
        make_agent(name, {"signals": SIGNALS, "n_decisions": 4, "early_decisions": 1, **options})
    )


def make(name: str, seed: int = 3, **options: Any) -> tuple[Learner, FakeTraining]:
    spec = spec_of(name)
    return make_learner(name, spec, seed=seed, options={**QUICK[name], **options}), FakeTraining(spec, 32)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    whole, envs = make(name)
    numbers = [whole.iterate(envs) for _ in range(5)]
    first, envs = make(name)
    assert [first.iterate(envs) for _ in range(3)] == numbers[:3]
    assert is_plain(first.state_dict())
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second, envs = make(name)
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert second.iteration == 3
    assert [second.iterate(envs) for _ in range(2)] == numbers[3:]
    assert same(second.state_dict(), whole.state_dict())
    assert same(second.agent().state_dict(), whole.agent().state_dict())
    other, envs = make(name, seed=4)
    assert other.iterate(envs) != numbers[0]


@pytest.mark.parametrize("name", NAMES)
def test_nobody_elses_generators_are_moved_and_agents_handed_out_stay(name: str) -> None:
    torch_before = torch.get_rng_state()
    learner, envs = make(name)
    assert np.array_equal(torch.get_rng_state(), torch_before)
    before = learner.agent()
    kept = before.state_dict()
    learner.iterate(envs)
    assert np.array_equal(torch.get_rng_state(), torch_before)  # NumPy's and Python's: conftest.leaves_no_trace
    assert same(before.state_dict(), kept)
    assert not same(learner.agent().state_dict(), kept)


def test_the_exported_ppo_has_the_models_probabilities() -> None:
    learner, envs = make("ppo", learning_rate=0.03)
    for _ in range(4):
        learner.iterate(envs)
    agent, policy = learner.agent(), learner._trainer.model.policy
    seen = learner.spec.observation_space.low + np.random.default_rng(0).random((500, 4)) * (
        learner.spec.observation_space.high - learner.spec.observation_space.low
    )
    with torch.no_grad():
        chances = policy.get_distribution(torch.as_tensor(agent.features(seen), dtype=torch.float32)).distribution.probs
    mine = agent.probabilities(seen)[:, 0]
    assert abs(mine - chances.numpy()).max() < 1e-6
    assert mine.std(axis=0).max() > 0.01  # and they are not the same for all
    expected = chances.numpy() @ np.array(agent.moves)
    np.testing.assert_allclose(agent.predict(seen, deterministic=True)[0][:, 0], expected, atol=4e-6)


def test_the_exported_ppo_of_two_knobs() -> None:
    agent = PPOAgent(signals=SIGNALS, hidden=[8], n_knobs=2)
    trainer = PPOTrainer(agent, 0, {})
    exported = trainer.export()
    seen = np.random.default_rng(0).normal(size=(5, 4))
    with torch.no_grad():
        parts = trainer.model.policy.get_distribution(
            torch.as_tensor(agent.features(seen), dtype=torch.float32)
        ).distribution
    for knob, part in enumerate(parts):
        np.testing.assert_allclose(exported.probabilities(seen)[:, knob], part.probs.numpy(), atol=1e-6)
        assert part.probs.argmax(dim=1).tolist() == [agent.keep] * 5  # it begins by changing nothing


def test_the_exported_dqn_has_the_models_values() -> None:
    learner, envs = make("dqn")
    for _ in range(3):
        learner.iterate(envs)
    agent = learner.agent()
    seen = np.random.default_rng(0).normal(size=(50, 4))
    with torch.no_grad():
        values = learner._trainer.model.q_net(torch.as_tensor(agent.features(seen), dtype=torch.float32))
    np.testing.assert_allclose(agent.outputs(seen)[:, 0, 0], values.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "iterations", "bound"),
    [
        ("ppo", {"iterations": 40}, 40, 0.4),
        ("dqn", {"iterations": 20}, 20, 0.5),
        ("evolution", {}, 40, 0.3),
    ],
)
def test_they_learn_to_bring_the_rate_to_its_place(
    name: str, options: dict[str, Any], iterations: int, bound: float
) -> None:
    spec = spec_of(name)
    envs = FakeTraining(spec, 64)
    learner = make_learner(name, spec, seed=1, options=options)
    assert off_by(learner.agent(), envs) > 1.3  # what doing nothing gives is 1.5
    for _ in range(iterations):
        learner.iterate(envs)
    assert off_by(learner.agent(), envs) < bound


def test_in_the_cooldown_the_rate_falls_and_exploration_stays() -> None:
    learner, envs = make("ppo", iterations=5, cooldown=0.4, learning_rate=0.01, entropy=0.3, entropy_end=0.1)
    rates, bonuses = [], []
    for _ in range(6):
        learner.iterate(envs)
        model = learner._trainer.model
        rates.append(model.policy.optimizer.param_groups[0]["lr"])
        bonuses.append(model.ent_coef)
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.01, 0.02 / 3, 0.01 / 3, 0.01 / 3], rtol=1e-12)
    np.testing.assert_allclose(bonuses, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1], rtol=1e-12)


def test_the_residual_is_taught_as_it_acts() -> None:
    spec = spec_of("ppo", residual="uwhg")
    learner = make_learner("ppo", spec, seed=1, options={"residual": "uwhg", **QUICK["ppo"]})
    envs = FakeTraining(spec, 32)
    learner.iterate(envs)
    agent, twin = learner.agent(), FakeTraining(spec, 32)
    seen, _ = twin.reset(seed=envs.seeds[0])
    state, starts = None, np.ones(32, np.bool_)
    for actions in envs.actions:  # each action is half of one of the moves, added to the rule's
        zero, _ = agent.to_actions(np.zeros((32, 1)), seen, state, starts)
        halves = {
            run: [agent.to_actions(np.full((32, 1), move), seen, state, starts)[0][run, 0] for move in agent.moves]
            for run in range(32)
        }
        assert all(actions[run, 0] in halves[run] for run in range(32))
        assert (actions != zero).any()
        state = agent.to_actions(np.zeros((32, 1)), seen, state, starts)[1]
        starts = np.zeros(32, np.bool_)
        seen = twin.step(actions)[0]


def test_only_what_was_cut_is_bootstrapped() -> None:
    for ends, is_bootstrapped in (("terminated", False), ("truncated", True)):
        spec = spec_of("ppo")
        learner = make_learner("ppo", spec, options=QUICK["ppo"])
        model = learner._trainer.model
        with torch.no_grad():
            model.policy.value_net.bias.fill_(10.0)
        learner.iterate(FakeTraining(spec, 32, ends=ends))
        last = model.rollout_buffer.rewards[-1]
        assert model.rollout_buffer.rewards[:-1].any() == np.False_
        assert (last > 5).all() == is_bootstrapped
        assert (abs(last) <= 0.5).all() != is_bootstrapped


def test_two_knobs_are_moved_at_once() -> None:
    agent = make_agent("ppo", {"signals": SIGNALS, "n_decisions": 4, "early_decisions": 1}, n_knobs=2)
    spec = ControlSpec.for_agent(agent, knobs=("lr", "weight_decay"))
    learner, envs = make_learner("ppo", spec, options=QUICK["ppo"]), FakeTraining(spec, 32)
    assert learner.iterate(envs)["entropy"] == pytest.approx(2 * 2.1, abs=0.2)
    assert {actions.shape for actions in envs.actions} == {(32, 2)}
    assert set(np.unique(envs.actions)) == set(agent.moves)
    assert learner.agent().predict(np.zeros((3, 4)), deterministic=True)[0].shape == (3, 2)


def test_exploration_falls_in_a_line() -> None:
    options = PPOOptions(iterations=11)
    weights = [options.between(options.entropy, options.entropy_end, i) for i in (0, 5, 10, 99)]
    assert weights == pytest.approx([0.02, 0.011, 0.002, 0.002])
    learner, envs = make("ppo", iterations=3)
    seen = []
    for _ in range(4):
        learner.iterate(envs)
        seen.append(learner._trainer.model.ent_coef)
    assert seen == pytest.approx([0.02, 0.011, 0.002, 0.002])
    learner, envs = make("dqn", iterations=3)
    assert [learner.iterate(envs)["epsilon"] for _ in range(3)] == pytest.approx([1.0, 0.525, 0.05])


def test_an_iteration_is_one_whole_episode_of_every_run() -> None:
    learner, envs = make("ppo")
    numbers = learner.iterate(envs)
    assert numbers["n_decisions"] == 5 * 32 == learner._trainer.model.num_timesteps
    assert {"mean_return", "entropy", "kl", "loss"} <= set(numbers)
    assert numbers["entropy"] == pytest.approx(2.1, abs=0.1)  # of nine moves, one more likely
    assert learner._trainer.model.batch_size == 80  # two equal ones, about the 64 asked for
    longer = FakeTraining(learner.spec, 32, n_decisions=8)
    longer.n_decisions = 8
    assert learner.iterate(longer)["n_decisions"] == 8 * 32
    for length, text in ((4, "32 of 32 runs have ended after 4 decisions"), (6, "0 of 32 runs have ended after 5")):
        before = learner.agent().state_dict()
        with pytest.raises(InputError, match=f"{text}.*; expected all of them after 5"):
            learner.iterate(FakeTraining(learner.spec, 32, n_decisions=length))
        assert same(learner.agent().state_dict(), before)
        assert learner.iteration == 2


def test_wrong_environments() -> None:
    learner, _ = make("ppo")
    with pytest.raises(InputError, match="the environment's observation space of one run is"):
        learner.iterate(FakeTraining(spec_of("ppo", signals=["progress", "update_to_weight"]), 16))
    factors = ControlSpec(signals=tuple(SIGNALS), actions=Actions("multiply", (0.1, 1.0, 10.0)))
    with pytest.raises(InputError, match=r"the environment's action space of one run is Discrete\(3\)"):
        learner.iterate(FakeTraining(factors, 16))
    learner, envs = make("dqn")
    learner.iterate(envs)
    with pytest.raises(InputError, match="an environment of 16 runs, but what is remembered came from 32"):
        learner.iterate(FakeTraining(learner.spec, 16))
    learner, envs = make("dqn", buffer_size=100)
    with pytest.raises(InputError, match="buffer_size is 100; expected room for one iteration, 32 runs of 5 decisions"):
        learner.iterate(envs)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("ppo", {"gama": 1.0}, "unknown option of learner 'ppo' 'gama'; did you mean 'gamma'"),
        ("ppo", {"signals": []}, "option 'signals' of learner 'ppo' is set by the spec or the call"),
        ("ppo", {"epochs": 0}, "option epochs is 0; expected a whole number of 1 or more"),
        ("ppo", {"gae_lambda": 1.5}, r"gae_lambda is 1.5; expected a number in \[0, 1\]"),
        ("dqn", {"epsilon": -1}, "epsilon is -1; expected a number of 0 or more"),
        ("evolution", {"epochs": 3}, "unknown option of learner 'evolution' 'epochs'"),
        ("ppo", {"moves": [-1.0, 0.0, 1.0]}, "agent 'ppo' needs actions .*; make the spec by ControlSpec.for_agent"),
        ("pppo", {}, "unknown learner 'pppo'; did you mean 'ppo'"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_learner(name, spec_of(name if name in NAMES else "ppo"), options=options)


def test_specs_of_another_kind() -> None:
    factors = ControlSpec(signals=tuple(SIGNALS), actions=Actions("multiply", (0.1, 1.0, 10.0)))
    with pytest.raises(InputError, match="agent 'ppo' needs actions Actions"):
        make_learner("ppo", factors)
    agent = make_agent("ppo", {"signals": SIGNALS})
    with pytest.raises(InputError, match=r"needs timing .*, the spec has Timing"):
        make_learner("ppo", ControlSpec.for_agent(agent, timing=Timing(every=10)))
    with pytest.raises(InputError, match="dqn moves one knob, the spec has 2; take 'ppo'"):
        make_learner("dqn", ControlSpec.for_agent(agent, knobs=("lr", "weight_decay")))
    with pytest.raises(InputError, match="moves the first knob, which is 'weight_decay', not 'lr'"):
        make_learner("ppo", ControlSpec.for_agent(agent, knobs=("weight_decay", "lr")), options={"residual": "uwhg"})
    with pytest.raises(UnknownNameError, match="unknown learner"):
        make_learner("sac", factors)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_states_are_refused_and_change_nothing(name: str) -> None:
    learner, envs = make(name)
    learner.iterate(envs)
    state = learner.state_dict()
    learned = state["learned"]
    key = "policy" if "policy" in learned else "weights"
    torn = {**learned, key: torch.zeros(2) if key == "weights" else dict(list(learned["policy"].items())[1:])}
    for change, text in (
        ({"seed": 8}, "was saved by a learner with seed 8; this one has 3"),
        ({"spec": "0" * 16}, "was saved by a learner with spec '0000"),
        ({"options": {}, "learner": "sac"}, "with learner 'sac'; this one has"),
        ({"iteration": -1}, "iteration is -1; expected a whole number"),
        ({"more": 1}, "state has the keys"),
        ({"learned": {}}, "the state has the keys"),
        ({"learned": torn}, "does not fit this learner|expected a tensor of shape"),
    ):
        with pytest.raises(InputError, match=text):
            learner.load_state_dict({**state, **change})
        assert same(learner.state_dict(), state)
    if name != "evolution":
        larger, _ = make(name)
        moments = {
            **learned["optimizer"],
            "state": {0: {**learned["optimizer"]["state"][0], "exp_avg": torch.zeros(1)}},
        }
        with pytest.raises(InputError, match="does not fit this learner"):
            larger.load_state_dict({**state, "learned": {**learned, "optimizer": moments}})
        assert larger.iteration == 0

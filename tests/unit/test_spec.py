"""ControlSpec: spaces, JSON, fingerprint, what is refused; actions and timing as numbers; agents made by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import gymnasium
import numpy as np
import pytest

from trimtab import registry
from trimtab.agents.base import Actions, Base, Needs, Timing
from trimtab.agents.q_learning import QLearning
from trimtab.agents.scripted import SCHEDULES, make_schedule
from trimtab.errors import InputError, UnknownNameError
from trimtab.spec import ControlSpec, make_agent
from trimtab.testing.contract import make_state

SPEC = ControlSpec(
    knobs=("lr", "weight_decay"),
    knob_options={"lr": {"high": 10.0}},
    signals=("progress", "lr_unit"),
    reward="negative_loss",
    penalty=-7.0,
    actions=Actions("multiply", (0.5, 1.0, 2.0)),
    timing=Timing(every="epoch"),
    base=Base("cosine", {"min_factor": 0.1}),
)

CHANGES: list[dict[str, Any]] = [
    {"knobs": ("lr",)},
    {"knobs": ("weight_decay", "lr")},
    {"knob_options": {"lr": {"high": 9.0}}},
    {"signals": ("lr_unit", "progress")},
    {"reward": "improvement"},
    {"penalty": -7.5},
    {"actions": Actions("multiply", (0.5, 1.0, 2.5))},
    {"actions": Actions("decades")},
    {"timing": Timing(every=3)},
    {"base": Base("cosine", {"min_factor": 0.2})},
    {"turns": True, "signals": ("progress", "lr_unit", "turn")},
    {"masks": True},
]


def test_a_spec_comes_back_from_json() -> None:
    data = json.loads(json.dumps(SPEC.to_json()))
    again = ControlSpec.from_json(data)
    assert again == SPEC
    assert again.fingerprint == SPEC.fingerprint
    assert len(SPEC.fingerprint) == 16


def test_the_fingerprint_is_fixed_and_speaks_of_every_field() -> None:
    """It ties brains and experience to specs: it may not change from version to version for the same spec."""
    prints = [SPEC.fingerprint, *(dataclasses.replace(SPEC, **change).fingerprint for change in CHANGES)]
    assert len(set(prints)) == len(prints)
    assert {field for change in CHANGES for field in change} == {
        field.name for field in dataclasses.fields(ControlSpec)
    }
    assert SPEC.fingerprint == "aa562af63656c5e3"  # as it was before there were turns and masks
    assert SPEC.fingerprint == dataclasses.replace(SPEC, knobs=["lr", "weight_decay"]).fingerprint  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"knobs": ()}, "expected a sequence of one or more different names"),
        ({"knobs": "lr"}, "expected a sequence of one or more different names"),
        ({"knobs": ("lr", "lr")}, "expected a sequence of one or more different names"),
        ({"knobs": ("momenta",)}, "unknown knob 'momenta'; did you mean 'momentum'"),
        ({"turns": 1}, "turns is 1; expected True or False"),
        ({"masks": "yes"}, "masks is 'yes'; expected True or False"),
        ({"turns": True}, "turns=True, but the signal 'turn' is not observed"),
        ({"signals": ("turn",)}, "the signal 'turn' says which knob's turn it is; give turns=True"),
        (
            {"knobs": ("lr", "optimizer"), "knob_options": {"lr": {"hold_decay": True}}},
            "hold_decay=True and the knob 'optimizer' would both write the decay",
        ),
        ({"signals": ("val_loss",)}, "unknown signal 'val_loss'; did you mean"),
        ({"reward": "improvment"}, "unknown reward 'improvment'; did you mean 'improvement'"),
        ({"knob_options": {"wd": {}}}, "unknown knob with options 'wd'; did you mean 'weight_decay'"),
        ({"knobs": ("weight_decay",), "knob_options": {}, "signals": ()}, "'cosine' acts on 'lr', which is not among"),
        (
            {"knobs": ("weight_decay",), "knob_options": {}, "base": Base()},
            r"signals \['lr_unit'\] speak of the knob 'lr', which is not among",
        ),
        ({"knob_options": {"lr": {"hold_decay": True}}}, "would both write the decay; choose one"),
        ({"base": Base("cosin")}, "unknown base schedule 'cosin'; did you mean 'cosine'"),
        (
            {"base": Base("cosine", {"warmup": 3})},
            "option of the schedule 'cosine' 'warmup'; did you mean 'warmup_steps'",
        ),
        ({"base": Base("cosine", {"min_factor": 2.0})}, r"min_factor is 2.0; expected a number in \[0, 1\]"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ({"knob": ["lr"]}, "unknown key of a spec 'knob'; did you mean 'knobs'"),
        ({"timing": {"evry": 3}}, "a spec could not be read: TypeError"),
        ({"timing": None}, "a spec could not be read"),
        ({"actions": {"kind": "multiply"}}, "a spec could not be read: KeyError: 'factors'"),
        ({"penalty": "much"}, "a spec could not be read: ValueError"),
        ({"knobs": 5}, "a spec could not be read: TypeError"),
        ({"actions": {"kind": "jump", "factors": []}}, "unknown kind of action 'jump'"),
    ],
)
def test_broken_json(broken: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ControlSpec.from_json({**SPEC.to_json(), **broken})


@pytest.mark.parametrize(
    "key", [field.name for field in dataclasses.fields(ControlSpec) if field.name not in ("turns", "masks")]
)
def test_a_missing_key_is_named(key: str) -> None:
    data = SPEC.to_json()
    del data[key]
    with pytest.raises(InputError, match=f"a spec could not be read: KeyError: '{key}'"):
        ControlSpec.from_json(data)


def test_for_agent_takes_its_needs_and_changes_by_name() -> None:
    agent = QLearning(every=7, base="wsd")
    spec = ControlSpec.for_agent(agent, reward="improvement")
    assert (spec.signals, spec.actions, spec.timing, spec.base) == (
        agent.needs.signals,
        agent.needs.actions,
        Timing(every=7),
        Base("wsd"),
    )
    assert spec.reward == "improvement"
    with pytest.raises(UnknownNameError, match="unknown field of a ControlSpec 'rewards'; did you mean 'reward'"):
        ControlSpec.for_agent(agent, rewards="improvement")


# ---- spaces and functions -------------------------------------------------------------------------------------------


def test_spaces() -> None:
    assert SPEC.observation_space == gymnasium.spaces.Box(np.zeros(2), np.ones(2), dtype=np.float64)
    assert SPEC.action_space == gymnasium.spaces.MultiDiscrete([3, 3])
    one = dataclasses.replace(SPEC, knobs=("lr",), knob_options={})
    assert one.action_space == gymnasium.spaces.Discrete(3)
    moves = dataclasses.replace(SPEC, actions=Actions("decades", low=-1.0, high=2.0))
    assert moves.action_space == gymnasium.spaces.Box(-1.0, 2.0, (2,), np.float64)
    assert dataclasses.replace(SPEC, actions=Actions("set")).action_space.contains(np.array([0.1, 1e9]))


def test_observe_stacks_the_signals_in_order() -> None:
    for n_runs in (None, 3):
        state = make_state(3, n_runs=n_runs)
        seen = SPEC.observe(state)
        assert seen.shape == (n_runs or 1, 2)
        assert seen[0].tolist() == pytest.approx([0.3, math.log(0.02 / 1e-7) / math.log(31.6 / 1e-7)])
        np.testing.assert_array_equal(seen, SPEC.make_observer()(state))
    assert ControlSpec().observe(make_state(1)).shape == (1, 0)


def test_the_reward_is_the_one_that_is_named() -> None:
    assert SPEC.make_reward()(make_state(3)).tolist() == [-1.95]


def test_a_spec_with_turns_and_masks_comes_back_from_json() -> None:
    spec = dataclasses.replace(SPEC, turns=True, masks=True, signals=("turn",))
    assert ControlSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.n_moved == 1
    assert spec.action_space == gymnasium.spaces.Discrete(3)
    assert not {"turns", "masks"} & set(SPEC.to_json())


MANY = ControlSpec(
    knobs=("lr", "momentum", "dropout", "batch_size", "optimizer"), actions=Actions("multiply", (0.5, 1.0, 2.0))
)


def test_the_joint_space_of_many_knobs_is_factored() -> None:
    assert MANY.action_space == gymnasium.spaces.MultiDiscrete([3] * 5)
    moves = dataclasses.replace(MANY, actions=Actions("decades", low=-1.0, high=1.0))
    assert moves.action_space == gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float64)


def test_each_knob_moves_on_its_own_scale() -> None:
    before = [0.1, 0.9, 0.2, 33.0, 1.0]
    up = MANY.decode_one(np.full((1, 5), 2), before)
    # 1 - momentum is halved; dropout moves by log10(2) of its range of 0.6; the batch is doubled; the next optimizer.
    assert up == pytest.approx([0.2, 0.95, 0.2 + 0.6 * math.log10(2), 66.0, 2.0])
    down = MANY.decode_one(np.zeros((1, 5), dtype=int), before)
    assert down == pytest.approx([0.05, 0.8, 0.2 - 0.6 * math.log10(2), 16.0, 0.0])
    assert MANY.decode_one(np.ones((1, 5), dtype=int), before) == before
    both = np.array([[2] * 5, [0] * 5])
    np.testing.assert_array_equal(MANY.decode(both, np.array([before, before])), [up, down])


def test_in_turn_one_number_moves_one_knob() -> None:
    spec = dataclasses.replace(MANY, turns=True)
    before = [0.1, 0.9, 0.2, 33.0, 1.0]
    assert spec.decode_one(np.array([[2]]), before, 3) == [0.1, 0.9, 0.2, 66.0, 1.0]
    moved = spec.decode(np.array([[2], [1]]), np.array([before, before]), 0)
    np.testing.assert_array_equal(moved, [[0.2, *before[1:]], before])
    with pytest.raises(InputError, match=r"expected finite numbers of shape \(1, 1\)"):
        spec.decode_one(np.full((1, 5), 2), before, 3)


def test_decode() -> None:
    settings = np.array([[0.1, 1.0], [0.2, 2.0]])
    np.testing.assert_allclose(SPEC.decode(np.array([[0, 1], [2, 2]]), settings), [[0.05, 1.0], [0.4, 4.0]])
    moves = dataclasses.replace(SPEC, actions=Actions("decades"))
    np.testing.assert_allclose(moves.decode(np.array([[1.0, -1.0], [0.0, 9.0]]), settings), [[1.0, 0.1], [0.2, 200.0]])
    direct = dataclasses.replace(SPEC, actions=Actions("set"))
    np.testing.assert_allclose(direct.decode(np.array([[3.0, 4.0], [5.0, 6.0]]), settings), [[3.0, 4.0], [5.0, 6.0]])


@pytest.mark.parametrize(
    "action", [[[0]], [[0, 1, 2]], [0, 1], [[0, 9]], [[0, -1]], [[0.5, 0]], [[math.nan, 0]], [[math.inf, 0]], 3]
)
def test_an_action_that_cannot_be_decoded(action: Any) -> None:
    with pytest.raises(InputError, match=r"action .*; expected"):
        SPEC.decode(np.asarray(action), np.array([[0.1, 0.1]]))


def test_make_knobs_with_options() -> None:
    knobs = SPEC.make_knobs()
    assert [knob.name for knob in knobs] == ["lr", "weight_decay"]
    assert knobs[0].high == 10.0
    with pytest.raises(UnknownNameError, match=r"option of the knob .lr. .max.; .*known: high, hold_decay, low"):
        dataclasses.replace(SPEC, knob_options={"lr": {"max": 1.0}}).make_knobs()
    with pytest.raises(InputError, match=r"lr: bounds \[2\.0, 1\.0\]; expected 0 < low < high"):
        dataclasses.replace(SPEC, knob_options={"lr": {"low": 2.0, "high": 1.0}}).make_knobs()


# ---- actions, timing, schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kind": "add"}, "unknown kind of action 'add'"),
        ({"kind": "multiply"}, r"action factors \[\]; expected positive numbers, one of them 1"),
        ({"kind": "multiply", "factors": (0.5, 2.0)}, "one of them 1"),
        ({"kind": "multiply", "factors": (1.0, -2.0)}, "expected positive numbers"),
        ({"kind": "multiply", "factors": (1.0, math.inf)}, "expected positive numbers"),
        ({"kind": "multiply", "factors": (1.0, math.nan)}, "expected positive numbers"),
        ({"kind": "decades", "low": 0.0}, "expected low < 0 < high"),
        ({"kind": "decades", "high": math.nan}, "expected low < 0 < high"),
    ],
)
def test_actions_that_make_no_sense(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Actions(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"every": every} for every in (0, -1, 2.5, True, "batch")),
        *(
            {"n_decisions": 0},
            {"early_decisions": -1},
            {"early_share": 0.0},
            {"early_share": 1.0},
            {"unknown_every": 0},
        ),
    ],
)
def test_timings_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        Timing(**arguments)


def decisions(timing: Timing, total_steps: int | None, epoch_steps: int | None = None, until: int = 10**9) -> list[int]:
    steps, step = [], 0
    while step < (total_steps or until):
        step = timing.next_decision(len(steps), step, total_steps, epoch_steps)
        steps.append(step)
    return steps


def test_timing() -> None:
    assert decisions(Timing(every=10), 35) == [10, 20, 30, 35]
    assert decisions(Timing(every="epoch"), 20, 8) == [8, 16, 20]
    assert decisions(Timing(every=None, n_decisions=4), 40) == [10, 20, 30, 40]
    uwhg = make_agent("uwhg").needs.timing
    steps = decisions(uwhg, 1000)
    assert steps[:8] == [10, 20, 30, 40, 50, 60, 70, 116]  # 7 of 1 %, then 20 parts of the rest
    assert steps[-1] == 1000
    assert decisions(uwhg, 100)[:8] == [2, 4, 6, 8, 10, 12, 14, 18]  # 1 % would be one step: at least two
    assert decisions(uwhg, 3) == [2, 3]
    assert decisions(uwhg, 1) == [1]
    assert decisions(uwhg, None, until=200) == [2, 4, 6, 8, 10, 12, 14, 64, 114, 164, 214]


@pytest.mark.parametrize("total_steps", [1, 2, 7, 13, 100, 661, 2000])
def test_the_last_decision_falls_on_the_budgets_end(total_steps: int) -> None:
    for timing in (Timing(every=10), Timing(every=None), make_agent("uwhg").needs.timing):
        steps = decisions(timing, total_steps)
        assert steps[-1] == total_steps
        assert all(before < after for before, after in itertools.pairwise(steps))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_are_positive_and_never_above_one(name: str) -> None:
    schedule = make_schedule(Base(name))
    for total in (1, 2, 3, 50, 333):
        factors = [schedule(step, total) for step in range(total + 3)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert max(factors) == 1.0 or total < 30


@pytest.mark.parametrize("name", ["cosine", "wsd", "step", "exponential"])
def test_schedules_that_need_an_end_say_so(name: str) -> None:
    with pytest.raises(
        InputError, match=f"the schedule '{name}' needs the number of optimizer steps; give total_steps"
    ):
        make_schedule(Base(name))(0, None)
    assert make_schedule(Base("constant"))(0, None) == 1.0


# ---- agents by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("q-learning", {}, "unknown agent 'q-learning'; did you mean 'q_learning'"),
        ("q_learning", {"epsilom": 0.1}, "unknown option of agent 'q_learning' 'epsilom'; did you mean 'epsilon'"),
        ("q_learning", {"seed": 3}, "option 'seed' of agent 'q_learning' is set by the run, leave it out"),
        ("q_learning", {"n_knobs": 2}, "option 'n_knobs' of agent 'q_learning' is set by the run"),
        ("q_learning", {"gamma": 1.5}, r"q_learning: gamma is 1.5; expected a number in \[0, 1\]"),
        ("q_learning", {"gamma": True}, r"q_learning: gamma is True; expected"),
        ("q_learning", {"actions": "huge"}, "unknown set of actions 'huge'"),
        ("q_learning", {"actions": [0.5, 2.0]}, "one of them 1"),
        ("q_learning", {"actions": 3}, "expected a name .* or factors"),
        ("q_learning", {"bins": {}}, "q_learning: bins are {}; expected signals"),
        ("q_learning", {"bins": {"progress": []}}, "bins of 'progress' are .*; expected ascending finite edges"),
        ("q_learning", {"bins": {"progress": [0.5, 0.5]}}, "expected ascending finite edges"),
        ("q_learning", {"bins": {"progress": ["a"]}}, "expected ascending finite edges"),
        ("q_learning", {"bins": {"progress": 3}}, "expected ascending finite edges"),
        (
            "q_learning",
            {"bins": {str(n): list(range(99)) for n in range(9)}},
            "a table of .* entries; at most 10000000",
        ),
        ("q_learning", {"epsilon_schedule": "cosine"}, "unknown epsilon schedule 'cosine'"),
        ("q_learning", {"epsilon_decisions": 0}, "epsilon_decisions is 0; expected a whole number of 1 or more"),
        ("q_learning", {"epsilon_decisions": "many"}, "epsilon_decisions is 'many'; expected a whole number"),
        ("constant", {"scale": 2}, "unknown option of agent 'constant' 'scale'"),
        ("uwhg", {"target": 9}, "uwhg: target 9"),
        ("uwhg", {"gain": "a"}, "agent 'uwhg'"),
        ("cosine", {"warmup": 3}, "unknown option of agent 'cosine' 'warmup'; did you mean 'warmup_steps'"),
        ("cosine", {"warmup_steps": -3}, r"warmup_steps is -3; expected a number in \[0, inf\]"),
        ("default-cosine", {"min_factr": 0.1}, "unknown option of agent 'default-cosine' 'min_factr'"),
        ("constant", {"lr": 0.1}, "unknown option of agent 'constant' 'lr'"),
        ("plateau", {"factor": 1.0}, "factor is 1.0; expected a number between 0 and 1"),
        ("plateau", {"patience": -1}, "patience is -1"),
        ("replay", {}, "agent 'replay': .*settings"),
        ("replay", {"settings": []}, "replay: settings"),
        ("replay", {"settings": [[0.1], [0.1, 0.2]]}, "replay: settings"),
        ("replay", {"settings": [[-0.1]]}, "replay: settings"),
        ("replay", {"settings": [["a"]]}, "replay: settings"),
        ("replay", {"settings": [[0.1]], "timing": {"evry": 3}}, "agent 'replay': .*evry"),
        ("random", {"factors": [2.0]}, "one of them 1"),
        ("wsd", {"warmup_share": 0.6, "decay_share": 0.6}, r"decay_share is 0.6; expected a number in \[0, 0.4\]"),
    ],
)
def test_a_wrong_option_is_one_input_error(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_agent(name, options)


def test_third_party_agents_may_take_any_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._TABLES, "agent", dict(registry._TABLES["agent"]))
    registry.add("agent", "theirs", f"{__name__}:their_agent")
    made = make_agent("theirs", {"anything": 3}, seed=5)
    assert made.options == {"anything": 3}  # type: ignore[attr-defined]


def their_agent(**options: Any) -> Any:
    class Theirs:
        name = "theirs"
        needs = Needs()

        def __init__(self) -> None:
            self.options = options

    return Theirs()

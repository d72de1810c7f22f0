"""Controller: what is decided reaches the weights, a placebo writes nothing, a second writer is named."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from recorder import Recorder, controlled
from toy import OPTIMIZERS, Toy
from trimtab.agents.policy import PPOAgent
from trimtab.agents.q_learning import QLearning
from trimtab.agents.scripted import Replay
from trimtab.controller import Controller
from trimtab.errors import ConflictError, InputError
from trimtab.safety import Gate, Safety
from trimtab.spec import ControlSpec

# ---- a decision reaches the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_one_changed_action_changes_the_weights_from_the_next_step_on(optimizer: str) -> None:
    """If a decision did not reach the optimizer, the two runs would end equal: the bug of FINDINGS section 1."""
    paths = []
    for changed in (0.1, 0.05):
        toy = Toy(optimizer, 0.1)
        settings = [[0.1], [changed], [0.1], [0.1]]
        controller = Controller(Replay(settings), optimizer=toy.optimizer, total_steps=40)
        path = []
        for _ in range(40):
            controller.step(toy.step())
            path.append(toy.weights())
        paths.append(path)
    acts_from = 20  # decision 1 is taken after 20 steps; the step numbered 20 is the first it acts on
    for t in range(40):
        assert torch.equal(paths[0][t], paths[1][t]) == (t < acts_from), t


def test_a_decision_is_recorded_as_asked_written_and_read_back() -> None:
    _, controller = controlled(Recorder(0.5, every=10), 40, safety=Safety(gate=Gate(max_factor=1.25)))
    rows = controller.decisions
    assert [row.optimizer_step for row in rows] == [10, 20, 30]  # none at the end: it could act on nothing
    assert [row.index for row in rows] == [0, 1, 2]
    first = rows[0]
    assert (first.knob, first.source, first.before) == ("lr", "agent", 0.1)
    assert first.asked == pytest.approx(0.05, rel=1e-15)
    assert first.setting == first.written == first.read_back == pytest.approx(0.08, rel=1e-15)
    assert first.note == "gate: change too large"
    assert rows[-1].read_back == pytest.approx(0.1 / 1.25**3, rel=1e-14)


def test_read_back_is_what_the_tensor_holds() -> None:
    toy = Toy("adam", torch.tensor(0.1, dtype=torch.float32))
    held = toy.optimizer.param_groups[0]["lr"]
    _, controller = controlled(Recorder(0.3, every=10), 20, toy=toy)
    row = controller.decisions[0]
    assert toy.optimizer.param_groups[0]["lr"] is held
    assert row.read_back == float(held) != row.written  # float32 keeps 24 bits of it
    assert row.read_back == pytest.approx(0.03, rel=1e-7)


def test_the_settings_level_is_multiplied_by_the_base_schedule() -> None:
    agent = QLearning(every=10, base="cosine", epsilon=0.0)
    toy = Toy()
    controller = Controller(agent, optimizer=toy.optimizer, total_steps=40)
    for t in range(40):
        assert toy.rates[0] == pytest.approx(0.1 * (1 + math.cos(math.pi * t / 40)) / 2, rel=1e-14)
        controller.step(toy.step())
    assert toy.rates[0] == 0.0


# ---- placebo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("two_groups", [False, True])
def test_a_placebo_equals_its_base_schedule_to_the_bit(base: str, optimizer: str, two_groups: bool) -> None:
    plain = Toy(optimizer, 0.05, two_groups=two_groups)
    schedule = Controller(base, optimizer=plain.optimizer, total_steps=60) if base != "constant" else None
    placebo = Toy(optimizer, 0.05, two_groups=two_groups)
    agent = QLearning(actions="coarse", epsilon=1.0, base=base, every=5, seed=3)
    controller = Controller(agent, optimizer=placebo.optimizer, total_steps=60, mode="placebo")
    for _ in range(60):
        loss = plain.step()
        if schedule is not None:
            schedule.step(loss)
        controller.step(placebo.step())
        assert torch.equal(plain.weights(), placebo.weights())
        assert plain.rates == placebo.rates
    asked = [row.asked for row in controller.decisions]
    assert len({round(value, 12) for value in asked}) > 1, "it decided nothing that could have been written"
    assert all(row.note == "placebo: decided, not written" for row in controller.decisions)
    assert agent.n_updates == 11  # it learns as its arm does
    assert controller.snapshot_bytes == 0


def test_a_placebo_goes_through_a_diverging_run_as_its_base_does() -> None:
    plain, placebo = Toy(poison={13}), Toy(poison={13})
    controller = Controller(QLearning(every=5), optimizer=placebo.optimizer, total_steps=30, mode="placebo")
    for _ in range(30):
        plain.step()
        controller.step(placebo.step())
    assert torch.isnan(placebo.weights()).all() == torch.isnan(plain.weights()).all()
    assert controller.n_rollbacks == 0


# ---- a second writer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("CosineAnnealingLR", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10)),
        ("ReduceLROnPlateau", lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer)),
        ("Controller", lambda optimizer: Controller("constant", optimizer=optimizer)),
    ],
)
def test_a_second_writer_is_named_at_construction(name: str, make: Any) -> None:
    toy = Toy()
    other = make(toy.optimizer)
    with pytest.raises(ConflictError, match=rf"{name}.*would overwrite the rate.*on_conflict='warn'"):
        Controller("uwhg", optimizer=toy.optimizer, total_steps=10)
    del other
    Controller("uwhg", optimizer=toy.optimizer, total_steps=10)


def test_a_scheduler_of_another_optimizer_is_no_conflict() -> None:
    other, toy = Toy(), Toy()
    scheduler = lr_scheduler.StepLR(other.optimizer, 3)
    assert Controller("constant", optimizer=toy.optimizer).status == "running"
    assert scheduler.last_epoch == 0


def test_a_scheduler_that_only_waits_for_the_collector_is_no_conflict() -> None:
    toy = Toy()
    scheduler = lr_scheduler.StepLR(toy.optimizer, 3)
    scheduler.myself = scheduler  # a cycle: reference counting alone does not free it
    gc.disable()
    try:
        del scheduler
        assert Controller("constant", optimizer=toy.optimizer).status == "running"
    finally:
        gc.enable()


def test_a_controller_of_another_knob_is_no_conflict() -> None:
    toy = Toy("adamw", weight_decay=0.1)
    scheduler = lr_scheduler.StepLR(toy.optimizer, 3)
    controller = Controller(Recorder(), optimizer=toy.optimizer, knobs=("weight_decay",))
    for _ in range(12):
        controller.step(toy.step())
        scheduler.step()
    assert [row.knob for row in controller.decisions] == ["weight_decay"] * 2
    assert controller.status == "running"


def test_a_rate_that_somebody_else_wrote_is_found_at_the_next_step() -> None:
    toy = Toy()
    controller = Controller("uwhg", optimizer=toy.optimizer, total_steps=100)
    controller.step(toy.step())
    toy.optimizer.param_groups[0]["lr"] = 0.123
    loss = toy.step()
    with pytest.raises(ConflictError, match=r"param group 0 has lr=0\.123 where 0\.\d+ was written: somebody else"):
        controller.step(loss)


@pytest.mark.parametrize("base", ["constant", "cosine"])
def test_a_tensor_rate_that_somebody_else_wrote_is_found_at_the_next_step(base: str) -> None:
    toy = Toy(lr=torch.tensor(0.1))
    agent = QLearning(every=5, base=base, epsilon=0.0)
    controller = Controller(agent, optimizer=toy.optimizer, total_steps=20)
    toy.optimizer.param_groups[0]["lr"].fill_(0.2)
    loss = toy.step()
    with pytest.raises(ConflictError, match=r"has lr=0.2 where 0.1 was written"):
        controller.step(loss)


def test_a_scheduler_attached_later_is_named() -> None:
    toy = Toy()
    controller = Controller("constant", optimizer=toy.optimizer, total_steps=100)
    scheduler = lr_scheduler.ExponentialLR(toy.optimizer, 0.5)
    controller.step(toy.step())
    scheduler.step()
    loss = toy.step()
    with pytest.raises(ConflictError, match="somebody else writes it, probably by ExponentialLR"):
        controller.step(loss)


def test_on_conflict_warn_hands_the_rate_back_and_records_it() -> None:
    toy = Toy()
    controller = Controller("uwhg", optimizer=toy.optimizer, total_steps=100, safety=Safety(on_conflict="warn"))
    controller.step(toy.step())
    toy.optimizer.param_groups[0]["lr"] = 0.123
    loss = toy.step()
    with pytest.warns(RuntimeWarning, match=r"lr=0\.123.*control of 'lr' has ended"):
        rows = controller.step(loss)
    assert [(row.source, row.read_back, row.action) for row in rows] == [("conflict", 0.123, None)]
    assert controller.status == "conflict"
    for _ in range(30):
        assert controller.step(toy.step()) == []
    assert toy.rates == [0.123]


def test_on_conflict_warn_at_construction_leaves_the_rate_alone() -> None:
    toy = Toy()
    scheduler = lr_scheduler.ExponentialLR(toy.optimizer, 0.5)
    with pytest.warns(RuntimeWarning, match="ExponentialLR is attached"):
        controller = Controller("cosine", optimizer=toy.optimizer, total_steps=9, safety=Safety(on_conflict="warn"))
    for _ in range(3):
        controller.step(toy.step())
        scheduler.step()
    assert toy.rates == [0.1 / 8]
    assert [row.source for row in controller.decisions] == ["conflict"]


# ---- what the agent is told -----------------------------------------------------------------------------------------


def test_the_agent_is_told_of_each_decision_what_followed_it() -> None:
    agent = Recorder(0.9, ("progress", "lr_log_ratio_start"), every=5)
    _, controller = controlled(agent, 20)
    assert len(agent.transitions) == 3
    for index, (before, action, reward, after, terminated) in enumerate(agent.transitions):
        assert before.shape == after.shape == (1, 2)
        assert before[0, 0] == pytest.approx(0.25 * (index + 1))
        assert after[0, 0] == pytest.approx(0.25 * (index + 2))
        assert before[0, 1] == pytest.approx(index * math.log10(0.9))
        assert after[0, 1] == pytest.approx((index + 1) * math.log10(0.9))
        assert action.shape == (1, 1)
        assert reward.shape == (1,)
        assert terminated.tolist() == [index == 2]  # the budget is observed, so its end terminates
    assert controller.last_reward == agent.transitions[-1][2][0]


def test_the_reward_belongs_to_the_decision_before_it() -> None:
    agent = Recorder(every=2)
    toy = Toy()
    controller = Controller(
        agent, optimizer=toy.optimizer, total_steps=8, spec=ControlSpec.for_agent(agent, reward="improvement")
    )
    for loss in (8.0, 8.0, 4.0, 4.0, 3.0, 1.0, 2.5, 2.5):
        toy.step()
        controller.step(loss)
    assert [transition[2][0] for transition in agent.transitions] == [4.0, 2.0, -0.5]


def test_a_roll_back_is_penalised_and_not_an_end() -> None:
    agent = Recorder(every=5)
    toy = Toy(poison={7})
    controller = Controller(
        agent, optimizer=toy.optimizer, total_steps=20, spec=ControlSpec.for_agent(agent, penalty=-3.0)
    )
    for _ in range(20):
        controller.step(toy.step())
    rewards = [transition[2][0] for transition in agent.transitions]
    assert rewards[0] == -3.0
    assert [bool(transition[4][0]) for transition in agent.transitions] == [False, True]
    assert [row.source for row in controller.decisions] == ["agent", "guard", "agent"]


def test_a_diverged_interval_is_penalised_without_a_guard_too() -> None:
    """Minus an infinite loss must not come out as 0, the best there is."""
    agent = Recorder(every=5)
    toy = Toy()
    spec = ControlSpec.for_agent(agent, reward="negative_loss", penalty=-50.0)
    controller = Controller(agent, optimizer=toy.optimizer, total_steps=15, spec=spec, safety=Safety(rollback=False))
    for t in range(15):
        toy.step()
        controller.step(math.inf if t >= 5 else 2.0)
    # The first interval was rewarded with -2: the others lie 50 below it.
    assert [transition[2][0] for transition in agent.transitions] == [-52.0, -52.0]


def test_use_mode_learns_nothing_and_takes_the_best_known_action() -> None:
    agent = QLearning(every=2, epsilon=1.0)
    toy = Toy()
    Controller(agent, optimizer=toy.optimizer, total_steps=40, mode="use")
    before = agent.state_dict()
    controlled(agent, 40, mode="use")
    after = agent.state_dict()
    assert torch.equal(before["table"], after["table"])
    assert before["rng"] == after["rng"]


def test_a_taught_agent_takes_its_best_action_in_every_mode_and_needs_a_brain() -> None:
    runs = {}
    for mode in ("learn", "use"):
        _, controller = controlled(PPOAgent(seed=1), 200, mode=mode)
        runs[mode] = [decision.asked for decision in controller.decisions]
    assert runs["learn"] == runs["use"]
    assert len(set(runs["use"])) > 20  # means of moves, not nine moves
    with pytest.raises(InputError, match="agent 'ppo' knows nothing by itself; give a brain that holds one"):
        controlled("ppo")

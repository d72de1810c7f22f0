"""What is learned is what is run: the vector environment shows and does what a Controller shows and does."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from puppets import Joint, Puppet, in_double
from trimtab.controller import Controller
from trimtab.envs import batched
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import draw_episode
from trimtab.envs.specs import default_spec
from trimtab.seeding import derive_seed
from trimtab.tasks.families import SEQUENCE_FAMILIES
from trimtab.training.batched import BatchedTraining


@pytest.mark.parametrize(
    ("family", "reports"),
    [*itertools.product(["mlp", "quadratic", "cnn"], [True, False]), ("recurrent", True), ("attention", False)],
)
def test_observations_and_rates_are_those_of_a_controller(
    family: str, reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In double precision: in single, small differences grow over hundreds of steps.
    monkeypatch.setattr(batched, "BatchedTraining", functools.partial(BatchedTraining, dtype=torch.float64))
    spec = default_spec()
    options: dict[str, Any] = {
        "horizon": (60, 90),
        "max_cnn_horizon": 90,
        "runs_per_task": 2,
        "no_validation": 0.0 if reports else 1.0,
        "some_validation": 0.0,
    }
    is_sequence = family in SEQUENCE_FAMILIES
    if is_sequence:
        options["initial_lr"] = (1e-5, 1e-2)
    env = TrainingVectorEnv(6, (family,), **options)
    observation, infos = env.reset(seed=7)
    rng = np.random.default_rng(0)
    # Up from wherever it starts, so that some runs go wrong and are rolled back.
    moves = rng.choice([-0.5, 0.0, 0.2, 0.5, 1.0], (env.n_decisions, 6))
    if (
        is_sequence
    ):  # only at the end: at high rates their paths are chaotic, and rounding grows a thousandfold in ten steps
        moves[:-7] -= moves[:-7].mean(0)
        moves[-7:] = 1.0
    seen, rates, back = [observation], [infos["lr"]], [infos["rolled_back"]]
    for row in moves:
        observation, _, _, _, infos = env.step(row[:, None])
        seen.append(observation)
        rates.append(infos["lr"])
        back.append(infos["rolled_back"])
    n_compared = n_rollbacks = 0
    batches = draw_episode(env.options, 6, spec.timing, derive_seed(7, "episode", 0, "of runs"))
    for batch in batches:
        for task, group, seed, lr in zip(batch.tasks, batch.groups, batch.seeds, batch.lr, strict=True):
            if task.network.dropout:
                continue  # drawn in another way here and there
            place = 2 * group + [r for r, g in zip(batch.lr, batch.groups, strict=True) if g == group].index(lr)
            loop = in_double(task, seed, lr, batch.total_steps)
            puppet = Puppet(moves[:, place].tolist())
            controller = Controller(
                puppet,
                optimizer=loop.optimizer,
                model=loop.model,
                total_steps=batch.total_steps,
                spec=spec,
                mode="use",
            )
            settings = []
            while not loop.is_over():
                loss = loop.step()
                due = controller.is_due
                val_loss = loop.evaluate("val")["loss"] if due and reports else None
                controller.step(loss, val_loss)
                if due:
                    settings.append(controller.state.settings["lr"])
            mine = np.array([*puppet.seen[1:], controller.last_observation])
            theirs = np.stack([row[place] for row in seen])
            calm = slice(-7 if is_sequence else None)  # see above; what then follows is compared less finely
            np.testing.assert_allclose(mine[calm], theirs[calm], atol=1e-7, rtol=1e-7)
            np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)
            # The environment's rates are those an interval was trained at, the controller's those after a decision.
            after = np.array([row[place] for row in rates])
            is_cut = np.array([row[place] for row in back])
            np.testing.assert_allclose(np.array(settings)[:-1][~is_cut[1:]], after[1:][~is_cut[1:]], rtol=1e-9)
            n_rollbacks += controller.n_rollbacks
            assert controller.n_rollbacks == is_cut.sum()
            n_compared += 1
    assert n_compared >= 2
    # Sequences are of the running Python's own text: in 3.11's some runs are rolled back, in 3.10's none.
    assert n_rollbacks >= (0 if is_sequence else 1)


# Of the second, batches are small enough that no run sleeps through a decision: turns are those of the environment.
@pytest.mark.parametrize(("turns", "high"), [(False, 50), (True, 16)])
def test_several_knobs_act_here_as_under_a_controller(turns: bool, high: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "BatchedTraining", functools.partial(BatchedTraining, dtype=torch.float64))
    plain = default_spec()
    own = ("momentum_unit", "batch_size_unit", *(["turn"] if turns else []))
    spec = dataclasses.replace(
        plain,
        knobs=("lr", "momentum", "batch_size"),
        knob_options={"batch_size": {"low": 4, "high": high}},
        signals=(*plain.signals, *own),
        turns=turns,
    )
    options: dict[str, Any] = {"horizon": (60, 90), "runs_per_task": 2, "no_validation": 0.0, "some_validation": 0.0}
    env = TrainingVectorEnv(6, ("mlp",), spec, initial_lr=(1e-4, 1e-2), **options)
    observation, infos = env.reset(seed=8)
    moves = np.random.default_rng(0).choice([-0.3, 0.0, 0.3], (env.n_decisions, 6, 1 if turns else 3))
    seen, is_cut, awake = [observation], np.zeros(6, dtype=bool), [~infos["asleep"]]
    for row in moves:
        observation, *_, infos = env.step(row)
        seen.append(observation)
        awake.append(~infos["asleep"])
        is_cut |= infos["rolled_back"]
    n_compared, sizes, slept = 0, [], 0
    for batch in draw_episode(env.options, 6, spec.timing, derive_seed(8, "episode", 0, "of runs")):
        for task, group, seed, lr in zip(batch.tasks, batch.groups, batch.seeds, batch.lr, strict=True):
            place = 2 * group + [r for r, g in zip(batch.lr, batch.groups, strict=True) if g == group].index(lr)
            if task.network.dropout or is_cut[place]:
                continue
            loop = in_double(task, seed, lr, batch.total_steps)
            asked = np.array([row[place] for row in awake])  # the decisions that the run on its own takes
            puppet = Joint(moves[asked[:-1], place])
            controller = Controller(
                puppet, optimizer=loop.optimizer, model=loop.model, loader=loop, total_steps=batch.total_steps,
                spec=spec, mode="use",
            )  # fmt: skip
            rows = []
            while not loop.is_over():
                loss, is_due = loop.step(), controller.is_due
                controller.step(loss, loop.evaluate("val")["loss"] if is_due else None)
                rows += [controller.last_observation] if is_due else []
            mine = np.array(rows)
            theirs = np.stack([row[place] for row, is_asked in zip(seen, asked, strict=True) if is_asked])
            np.testing.assert_allclose(mine, theirs, atol=1e-7, rtol=1e-7)
            assert infos["spent"][place] == pytest.approx(loop.spent, abs=1e-9)
            assert 0 <= batch.total_steps - loop.spent < loop.step_cost
            slept += int((~asked).sum())
            sizes.append(len({round(x, 9) for x in mine[:, len(plain.signals) + 1]}))
            n_compared += 1
    assert n_compared >= 2
    assert min(sizes) >= 2  # the batch size did change, in every run
    assert max(sizes) >= 3
    assert (slept > 0) != turns

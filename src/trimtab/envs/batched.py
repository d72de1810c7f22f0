"""TrainingVectorEnv: R small networks in training, as one Gymnasium vector environment.

Made by `gymnasium.make_vec("trimtab/Training-v0", num_envs=R, families=(...))`. One environment step is one decision
of every run and the interval after it. All runs of an episode have equally many decisions and end together, so an
agent may compare them. What the agent sees and does goes through the same `ControlSpec` as in use, and the guard is
the one of use: an interval that goes wrong is rolled back, the rate divided, and the steps are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from trimtab.agents.base import Timing
from trimtab.agents.scripted import Schedule
from trimtab.clock import ROUNDING, affordable_steps, steps_until
from trimtab.envs.episodes import Batch, EpisodeOptions, draw_episode
from trimtab.envs.measuring import summarize
from trimtab.envs.specs import default_spec
from trimtab.errors import InputError
from trimtab.knobs.base import CategoricalKnob, Knob
from trimtab.run_state import Array, Interval, RunState, Summary, Value
from trimtab.safety import Guard, Safety
from trimtab.seeding import derive_seed, numpy_generator
from trimtab.spec import ControlSpec
from trimtab.training.batched import BatchedTraining, IntervalStats
from trimtab.training.batched_optimizer import ALGORITHMS

__all__ = ["TrainingVectorEnv"]


class TrainingVectorEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Learning rates of R runs, each decided on at the same decisions.

    Observation (R, S) and action are those of the spec. The reward is the spec's; an episode ends when the budgets
    are used up, which is `terminated`, since the progress is observed; nothing is ever truncated. The step after it
    draws the next episode (Gymnasium's `AutoresetMode.NEXT_STEP`): its action counts for nothing, its reward is 0.

    A run's budget is one of training FLOPs: those of "total_steps" at the batch size that it began with. With batches
    twice as large it takes half as many steps between two decisions, and sees the base schedule and the decisions at
    the same shares of its budget. Where a step costs more than an interval it takes none in the intervals that the step
    pays for, and its actions after those count for nothing, as the run on its own would not be asked there.

    Knobs are "lr" (always), "weight_decay", "momentum", "optimizer", "dropout" and "batch_size"; others are refused by
    name. Many networks that are drawn have no dropout, and an optimizer may not be among the knob's choices: with
    `masks` in the spec the knob is left out there, without it the run is refused.

    `infos` has, per run: every knob as read back from where it acts (NaN where it is masked; of "optimizer" the place
    among its choices), "total_steps",
    "group" (the number of its task), "rolled_back", "spent" (of "total_steps"), "asleep" (no step was taken in the last
    interval), and at the end of an episode "score_loss", the final loss on the split that is never observed.

    Args:
        num_envs: R.
        families: Families of tasks, taken in turn.
        spec: What is observed and how actions act; None: that of the learned controllers.
        device: Where the networks are trained.
        also_fit: Timings of other agents, whose environments are to draw the very same episodes from a seed; see
            `draw_episode`.
        **options: Of `EpisodeOptions`.

    Attributes:
        control_spec: The spec in use (`spec` is Gymnasium's own).

    Raises:
        InputError: An argument is wrong; the message names it.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium declares it so)
        "autoreset_mode": AutoresetMode.NEXT_STEP
    }

    def __init__(
        self,
        num_envs: int = 1,
        families: Sequence[str] = ("mlp", "quadratic"),
        spec: ControlSpec | None = None,
        device: str = "cpu",
        also_fit: Sequence[Timing] = (),
        **options: Any,
    ) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
            raise InputError(f"num_envs is {num_envs!r}; expected a number of runs of 1 or more")
        known = EpisodeOptions.__dataclass_fields__
        for key in options:
            if key not in known:
                raise InputError(f"unknown option {key!r} of the environment; known: {', '.join(known)}")
        self.num_envs = num_envs
        self.control_spec = spec or default_spec()
        _check_spec(self.control_spec)
        self.options = EpisodeOptions(families=_names(families), **options)
        self.device = device
        self._also_fit = tuple(also_fit)
        self.single_observation_space = self.control_spec.observation_space
        self.single_action_space = self.control_spec.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._observe = self.control_spec.make_observer()
        self._reward = self.control_spec.make_reward()
        self._schedule = self.control_spec.make_schedule()
        self._knobs = self.control_spec.make_knobs()
        self._safety = Safety()
        self._root: int | None = None
        self._n_episodes = 0
        self._runs: _Runs | None = None

    @property
    def n_decisions(self) -> int:
        """Environment steps in an episode: the first interval is `reset`'s, with nothing decided yet."""
        timing = self.control_spec.timing
        return timing.early_decisions + timing.n_decisions - 1

    @property
    def total_steps(self) -> npt.NDArray[np.int64]:
        """Budgets of the runs that the last `reset` drew, in optimizer steps; (R,).

        Raises:
            InputError: `reset` was not called.
        """
        if self._runs is None:
            raise InputError("total_steps before reset(); call reset(seed=...) first")
        return self._runs.state.budgets.astype(np.int64)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Draw new runs and take their first interval, at the rates they start with.

        Args:
            seed: All that is drawn from now on depends on it alone; None goes on drawing.
            options: There are none.

        Returns:
            The first observation (R, S), and infos.

        Raises:
            InputError: The seed is not one whole number, or there are options.
        """
        if options:
            raise InputError(f"reset(options={options}); this environment has none, give them when it is made")
        if seed is not None:
            if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
                raise InputError(f"seed is {seed!r}; expected one whole number of 0 or more for all runs")
            self._root, self._n_episodes = int(seed), 0
        elif self._root is None:
            self._root = int(np.random.SeedSequence().generate_state(1)[0])
        episode = derive_seed(self._root, "episode", self._n_episodes, "of runs")
        self._n_episodes += 1
        timing = self.control_spec.timing
        return self.begin(draw_episode(self.options, self.num_envs, timing, episode, self._also_fit))

    def begin(self, batches: list[Batch]) -> tuple[Array, dict[str, Any]]:
        """Begin an episode of given runs instead of drawn ones, as `reset` does: for benchmarks and for tests.

        Args:
            batches: R runs in all, with equally many decisions.

        Returns:
            The first observation (R, S), and infos.

        Raises:
            InputError: They are not R runs.
        """
        count = sum(len(batch.tasks) for batch in batches)
        if count != self.num_envs:
            raise InputError(f"begin() was given {count} runs; expected num_envs={self.num_envs}")
        self._runs = _Runs(batches, self)
        self._runs.advance()
        return self._runs.observation, self._runs.infos()

    def step(
        self, actions: npt.NDArray[Any]
    ) -> tuple[Array, Array, npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """One decision of every run, and the interval after it.

        Args:
            actions: As the action space has them: (R,) factors' numbers, or (R, K).

        Raises:
            InputError: `reset` was not called, or the actions do not fit.
        """
        runs, nothing = self._runs, np.zeros(self.num_envs, dtype=np.bool_)
        if runs is None:
            raise InputError("step() before reset(); call reset(seed=...) first")
        if runs.is_over:
            observation, infos = self.reset()
            return observation, np.zeros(self.num_envs), nothing, nothing, infos
        runs.act(np.asarray(actions).reshape(self.num_envs, -1))
        runs.advance()
        return runs.observation, runs.reward, nothing | runs.is_over, nothing, runs.infos()


class _State(RunState):
    """RunState of runs with budgets of their own."""

    def __init__(self, total_steps: npt.NDArray[np.int64]) -> None:
        super().__init__(cast(Any, None))  # there is no torch optimizer: rates are written to the batches
        self.budgets = total_steps.astype(np.float64)
        self.taken = np.zeros(len(total_steps))
        nothing = np.full(len(total_steps), np.nan)
        self.initial_loss = nothing
        empty = Interval(*[nothing] * len(Interval._fields))
        self.summary = Summary(empty, empty, *[nothing] * (len(Summary._fields) - 2))
        self.rollback_memory = np.zeros(len(total_steps))
        self.lowest_bad_rate = nothing

    @property
    def progress(self) -> Value:
        return np.minimum(1.0, self.taken / self.budgets)

    @property
    def budget(self) -> Value:
        return self.budgets


class _Runs:
    """The runs of one episode."""

    def __init__(self, batches: list[Batch], env: TrainingVectorEnv) -> None:
        spec = env.control_spec
        self._spec, self._timing = spec, spec.timing
        self._schedule: Schedule = env._schedule
        self._knobs, self._rate = env._knobs, spec.knobs.index("lr")
        self._cut = env._safety.cut
        self._turns = spec.turns
        # As in `trimtab.hand`: what moves the rate comes first, and the agent's own move of it starts from there.
        self._order = sorted(range(len(self._knobs)), key=lambda column: not self._knobs[column].moves_rate)
        self._batches = batches
        self._trainings = [BatchedTraining(b.tasks, b.seeds, b.lr, device=env.device) for b in batches]
        # Runs of a task stand side by side in the order of the tasks, whatever batch they are in.
        order = np.argsort(np.concatenate([np.array(b.groups) for b in batches]), kind="stable")
        places = np.argsort(order)
        ends = np.cumsum([len(b.tasks) for b in batches])
        self._places = [places[end - len(b.tasks) : end] for b, end in zip(batches, ends, strict=True)]
        # Batch and column of each run.
        self._homes = {int(run): (b, i) for b, places in enumerate(self._places) for i, run in enumerate(places)}
        n_runs = len(order)
        self.state = state = _State(self._spread([np.full(len(b.tasks), b.total_steps) for b in batches]))
        state.groups = self._spread([np.array(b.groups) for b in batches])
        self._chances = self._spread([np.array(b.val_chance) for b in batches])
        self._rng = numpy_generator(batches[0].seeds[0], "validation")
        main = [np.full(len(b.tasks), float(self._timing.main_interval(b.total_steps))) for b in batches]
        state.main_interval = self._spread(main)
        self._guards = [Guard(env._safety.cut, env._safety.max_rollbacks) for _ in range(n_runs)]
        self._suspects = set(range(n_runs))  # runs without a good interval yet, or asked about at the last decision
        self._is_lost = np.zeros(n_runs, dtype=np.bool_)  # given up: the rate is 0 from then on
        self._is_fresh = np.ones(n_runs, dtype=np.bool_)  # the coming interval begins on good weights
        self._is_cut = np.zeros(n_runs, dtype=np.bool_)
        self._observe, self._reward = env._observe, env._reward
        self.observation = self.reward = np.empty(0)
        self._lowest_reward = np.zeros(n_runs)
        self._index = 0
        self.is_over = False
        self._spent = [np.zeros(len(b.tasks)) for b in batches]  # of the budget, in steps of the cost at the start
        self._targets = [0] * len(batches)  # of the last decision, in the same unit
        self._is_asleep = np.zeros(n_runs, dtype=np.bool_)  # no step was taken in the last interval
        if "optimizer" in spec.knobs:
            for training in self._trainings:
                training.watch_squares()
        self._settings = np.stack([self._read(knob) for knob in self._knobs], axis=1)
        self._is_masked = np.isnan(self._settings)
        self._check_masks()
        self._n_samples = self._spread([training.n_samples for training in self._trainings])
        for column, knob in enumerate(self._knobs):
            state.settings[knob.name] = state.initial_settings[knob.name] = self._settings[:, column].copy()
            state.to_unit[knob.name] = knob.to_unit

    def _spread(self, parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """From the batches' order to that of the environment."""
        out = np.empty(sum(map(len, parts)), dtype=parts[0].dtype)
        for places, part in zip(self._places, parts, strict=True):
            out[places] = part
        return out

    def _check_masks(self) -> None:
        """Refuse runs that a knob cannot act on, where the spec does not mask it."""
        if self._is_masked.any() and not self._spec.masks:
            run, column = np.argwhere(self._is_masked)[0].tolist()
            knob = self._knobs[column]
            number, place = self._homes[run]
            why = "its network has no dropout"
            if isinstance(knob, CategoricalKnob):
                name = self._trainings[number].optimizer.names[place]
                why = f"its optimizer is {name!r}, which is not among the choices {list(knob.choices)}"
            raise InputError(
                f"the knob {knob.name!r} cannot act on a run of the family {self._batches[number].family!r}: {why}; "
                "leave the knob out, or give masks=True"
            )

    def _read(self, knob: Knob) -> Array:
        """A knob's values as they stand where they act; NaN where it has none; (R,)."""
        values = self._spread([_READ[knob.name](training) for training in self._trainings])
        if isinstance(knob, CategoricalKnob):
            place_of = [knob.choices.index(name) if name in knob.choices else np.nan for name in ALGORITHMS]
            return np.array(place_of)[values.astype(np.int64)]
        return values

    def _write(self) -> None:
        """Make the settings act; the rates of lost runs are 0."""
        for column in self._order:
            knob, values = self._knobs[column], self._settings[:, column]
            if isinstance(knob, CategoricalKnob):
                self._switch(self._names(knob, values))
                continue
            if column == self._rate:
                values = np.where(self._is_lost, 0.0, values)
            for places, training in zip(self._places, self._trainings, strict=True):
                _WRITE[knob.name](training, values[places])

    def _names(self, knob: CategoricalKnob, values: Array) -> list[list[str]]:
        """Of each batch the algorithms that settings (R,) of the knob stand for; masked runs keep theirs."""
        return [
            [
                old if np.isnan(value) else knob.choices[int(value)]
                for old, value in zip(names, values[places], strict=True)
            ]
            for places, names in zip(self._places, [t.optimizer.names for t in self._trainings], strict=True)
        ]

    def _switch(self, names: list[list[str]]) -> None:
        for own, training in zip(names, self._trainings, strict=True):
            training.optimizer.switch(own)

    def act(self, actions: npt.NDArray[Any]) -> None:
        """Move the settings; of a run that was just rolled back the guard has moved the rate, and nothing else does."""
        # The decision that is answered was counted when its interval ended.
        turn = (self._index - 1) % len(self._knobs) if self._turns else None
        asked = self._spec.decode(actions, self._settings, turn)
        # A budget that pays for no further step ends a run on its own, which would not be asked here.
        costs = self._spread(
            [t.batch_sizes / b.tasks[0].batch_size for t, b in zip(self._trainings, self._batches, strict=True)]
        )
        is_used_up = (self.state.budgets - self.state.taken + ROUNDING) / costs < 1
        for column in self._order if turn is None else [turn]:
            knob, before = self._knobs[column], self._settings[:, column]
            moved = np.where(asked[:, column] == before, before, knob.clip(asked[:, column]))
            if knob.name == "batch_size":
                moved = np.minimum(moved, self._n_samples)
            moved = np.where(self._is_masked[:, column], before, moved)
            is_held = self._is_cut | self._is_asleep | is_used_up
            moved = np.where(is_held | self._is_lost, before, moved)
            self._set(column, moved, ~is_held)
            if isinstance(knob, CategoricalKnob):
                self._follow(self._names(knob, moved))
                asked = self._spec.decode(actions, self._settings, turn)
        self._write()

    def _follow(self, names: list[list[str]]) -> None:
        """Convert rates and decays of the runs that are about to switch, and record it, as `trimtab.hand` does."""
        pairs = [t.optimizer.conversion(own) for own, t in zip(names, self._trainings, strict=True)]
        for name, parts in zip(("lr", "weight_decay"), zip(*pairs, strict=True), strict=True):
            if name in self._spec.knobs:
                column, factors = self._spec.knobs.index(name), self._spread(list(parts))
                self._set(column, self._settings[:, column] * factors, factors != 1)
                continue
            for factors, training in zip(parts, self._trainings, strict=True):
                decay = training.optimizer.weight_decay
                decay.mul_(torch.from_numpy(factors).to(decay).unsqueeze(1))

    def _set(self, column: int, values: Array, where: npt.NDArray[np.bool_]) -> None:
        name, state, before = self._knobs[column].name, self.state, self._settings[:, column]
        known = np.asarray(state.last_moves.get(name, np.zeros(len(before))))
        state.note_move(name, before, values)
        state.last_moves[name] = np.where(where, state.last_moves[name], known)
        self._settings[:, column] = values
        state.settings[name] = values.copy()

    def advance(self) -> None:
        """Train to the next decision, look, and roll back what went wrong."""
        state = self.state
        before = state.summary
        snapshots, intervals, finite, firsts, late = [], [], [], [], []
        for number, training in enumerate(self._trainings):
            snapshots.append(training.snapshot())
            stats = self._train(number)
            val_loss = training.evaluate("val").double().cpu().numpy()
            intervals.append(summarize(stats, np.where(np.isnan(val_loss), np.inf, val_loss)))
            finite.append(training.are_finite().cpu().numpy())
            losses = stats.losses.double().cpu().numpy()
            own = [losses[len(losses) - count :, run] for run, count in enumerate(stats.counts)]
            firsts.append(np.array([steps[0] if len(steps) else np.nan for steps in own]))
            late.append([steps[max(1, len(steps) // 2) :] for steps in own])
        columns = [self._spread(list(parts)) for parts in zip(*intervals, strict=True)]
        interval = Interval(*columns)
        is_told = self._rng.random(len(self._chances)) < self._chances
        interval = interval._replace(val_loss=np.where(is_told, interval.val_loss, np.nan))
        state.taken = self._spread(self._spent)
        self._is_asleep = asleep = np.asarray(interval.n_steps) == 0
        state.record(interval)
        if asleep.any():  # nothing was measured, nothing has changed
            still = before._replace(previous=before.current, previous_smoothed_loss=before.smoothed_loss)
            state.summary = _either(asleep, still, state.summary)
        self._note_first_losses(self._spread(firsts))
        self._is_cut = bad = self._judge(self._spread(finite), late)
        memory = np.asarray(state.rollback_memory)
        state.note_rollback(bad, self._settings[:, self._rate].copy())
        state.rollback_memory = np.where(asleep, memory, state.rollback_memory)
        if self.is_over:
            score = self._spread([t.evaluate("score").double().cpu().numpy() for t in self._trainings])
            state.score_loss = np.where(np.isnan(score), np.inf, score)
        if self._turns:
            state.turn = np.full(len(bad), self._index % len(self._knobs) / max(1, len(self._knobs) - 1))
        # What agents see, and learn by, is the interval as it was; only then it is undone.
        self.observation = self._observe(state)
        reward = self._reward(state)
        is_bad = bad | ~np.isfinite(np.asarray(state.watched_loss()))
        # A bad interval never pays; at the end its rank may already say worse.
        self.reward = np.where(is_bad, np.minimum(reward, self._lowest_reward + self._spec.penalty), reward)
        self._lowest_reward = np.minimum(self._lowest_reward, np.where(is_bad, 0.0, reward))
        if bad.any():
            self._undo(bad, before, snapshots)
        self._index += 1

    def _train(self, number: int) -> IntervalStats:
        """Train a batch up to the next decision: each run by as many steps as that share of its budget pays for.

        The steps of a run are those that `trimtab.clock.Clock` would count for it on its own.
        """
        batch, training, spent = self._batches[number], self._trainings[number], self._spent[number]
        start, total = self._targets[number], batch.total_steps
        end = self._targets[number] = int(self._timing.next_decision(self._index, start, total, None))
        self.is_over = end >= total
        costs = training.batch_sizes / batch.tasks[0].batch_size
        pairs = list(zip(spent.tolist(), costs.tolist(), strict=True))
        counts = [
            max(0, min(steps_until(end, used, cost), affordable_steps(total - used, cost))) for used, cost in pairs
        ]
        longest = max(counts)
        known: dict[tuple[float, float], list[float]] = {}
        for (used, cost), count in zip(pairs, counts, strict=True):
            if (used, cost) not in known:
                own = [self._schedule(used + step * cost, total) for step in range(count)]
                known[used, cost] = [0.0] * (longest - count) + own
        self._spent[number] = spent + np.array(counts) * costs
        return training.run(np.array(counts), np.array([known[pair] for pair in pairs]).T)

    def _note_first_losses(self, losses: Array) -> None:
        """The highest loss at which an interval on good weights began: as `Controller._measure` has it."""
        known = np.asarray(self.state.initial_loss)
        take = self._is_fresh & np.isfinite(losses)
        self.state.initial_loss = np.where(take, np.fmax(known, losses), known)
        self._is_fresh &= ~take

    def _judge(self, finite: npt.NDArray[np.bool_], late: list[list[Array]]) -> npt.NDArray[np.bool_]:
        """Which runs are to be rolled back, by the guard of use; it is asked only where it might say so.

        Args:
            finite: Whether all weights of a run are; (R,).
            late: Of each batch and run the train losses of the interval's second half.
        """
        bad = np.zeros(len(finite), dtype=np.bool_)
        asleep = set(np.flatnonzero(self._is_asleep).tolist())
        suspects = set(np.flatnonzero(_might_be_bad(self.state, finite) & ~self._is_lost).tolist()) - asleep
        for run in self._suspects - suspects - asleep:
            self._guards[run].count_good()
        self._suspects = suspects | (self._suspects & asleep)
        for run in sorted(suspects):
            batch, column = self._homes[run]
            verdict = self._guards[run].judge(
                _single(self.state, run), weights_are_finite=bool(finite[run]), losses=late[batch][column].tolist()
            )
            bad[run] = verdict.kind != "ok"
            self._is_lost[run] = verdict.kind == "give_up"
        return bad

    def _undo(self, bad: npt.NDArray[np.bool_], before: Summary, snapshots: list[dict[str, torch.Tensor]]) -> None:
        """Put weights, optimizer state and what is known of the run back to the interval's start; divide the rate."""
        for places, training, snapshot in zip(self._places, self._trainings, snapshots, strict=True):
            training.restore(snapshot, torch.from_numpy(bad[places]).to(training.parameters.device))
        now = self.state.summary
        # Under a controller the best validation loss counts when it is reported, before its interval is judged.
        best = np.where(np.isfinite(now.best_val_loss), now.best_val_loss, before.best_val_loss)
        kept = before._replace(best_val_loss=best)
        self.state.summary = _either(bad, kept, now)
        self._is_fresh |= bad
        rate = self._settings[:, self._rate]
        self._set(self._rate, np.where(bad, rate / self._cut, rate), bad)
        self._write()

    def infos(self) -> dict[str, Any]:
        """See `TrainingVectorEnv`."""
        infos = {
            **{knob.name: self._read(knob) for knob in self._knobs},
            "total_steps": self.state.budgets.astype(np.int64),
            "group": self.state.groups,
            "rolled_back": self._is_cut.copy(),
            "spent": np.asarray(self.state.taken).copy(),
            "asleep": self._is_asleep.copy(),
        }
        if self.is_over:
            infos["score_loss"] = np.asarray(self.state.score_loss)
        return infos


def _either(where: npt.NDArray[np.bool_], one: Summary, other: Summary) -> Summary:
    """Of some runs the one, of the rest the other."""
    return Summary(
        Interval(*[np.where(where, a, b) for a, b in zip(one.current, other.current, strict=True)]),
        Interval(*[np.where(where, a, b) for a, b in zip(one.previous, other.previous, strict=True)]),
        *[np.where(where, a, b) for a, b in zip(one[2:], other[2:], strict=True)],
    )


def _might_be_bad(state: RunState, finite: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Every run that a guard could find fault with, and some more.

    It needs a loss 1.5 times the first, or none, or a train loss three times the best and half of the first.
    """
    now, first = state.current, state.summary
    late = np.where(np.isnan(now.second_half_loss), now.train_loss, now.second_half_loss)
    with np.errstate(all="ignore"):
        good = finite & np.isfinite(now.train_loss) & ~(late > 1.5 * np.asarray(state.initial_loss))
        lost = (late > 0.5 * np.asarray(state.initial_loss)) & (late > 3.0 * np.asarray(first.best_train_loss))
        return ~(good & ~lost & ~(np.asarray(now.val_loss) > 1.5 * np.asarray(first.initial_val_loss)))


def _single(state: RunState, run: int) -> RunState:
    """What the guard of one run reads of it."""
    one = RunState(cast(Any, None))

    def number(value: Value) -> float:
        return float(np.asarray(value)[run])

    summary = state.summary
    current, previous = (Interval(*map(number, part)) for part in (summary.current, summary.previous))
    one.summary = Summary(current, previous, *map(number, summary[2:]))
    one.initial_loss = number(state.initial_loss)
    return one


def _names(families: Sequence[str]) -> tuple[str, ...]:
    if isinstance(families, str) or not all(isinstance(name, str) for name in families):
        raise InputError(f"families {families!r}; expected a sequence of names, such as ('mlp',)")
    return tuple(families)


def _check_spec(spec: ControlSpec) -> None:
    """Refuse what batches of runs cannot honour."""
    for name in spec.knobs:
        if name not in _READ:
            raise InputError(
                f"the knob {name!r} is not known to batches of runs, which have {', '.join(_READ)}; leave it out"
            )
    if "lr" not in spec.knobs:
        raise InputError(f"knobs {spec.knobs}; batches of runs need 'lr' among them")
    if spec.knob_options.get("batch_size", {}).get("rate_scaling", "none") != "none":
        raise InputError("rate_scaling of the knob 'batch_size' is not known to batches of runs; leave it out")
    if spec.turns and spec.masks:
        raise InputError(
            "turns and masks together are not known to batches of runs, whose turns are the same; choose one"
        )
    if spec.knob_options.get("lr", {}).get("hold_decay"):
        raise InputError("hold_decay=True of the knob 'lr' is not known to batches of runs; leave it out")
    if spec.reward == "accuracy_improvement":
        raise InputError("reward 'accuracy_improvement': batches of runs report no accuracy; take another reward")


def _write_column(name: str) -> Callable[[BatchedTraining, Array], None]:
    def write(training: BatchedTraining, values: Array) -> None:
        target: torch.Tensor = getattr(training.optimizer, name)
        target[:, 0] = torch.from_numpy(values).to(target)
        if name == "weight_decay":
            training.optimizer.look_at_decay()

    return write


def _column(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor[:, 0].double().cpu().numpy())


# Where each knob acts in a batch of runs, in the order of its runs; "optimizer" is written by name.
_READ: dict[str, Callable[[BatchedTraining], Array]] = {
    "lr": lambda training: _column(training.optimizer.lr),
    "weight_decay": lambda training: _column(training.optimizer.weight_decay),
    "momentum": lambda training: _column(training.optimizer.momentum),
    "optimizer": lambda training: np.array([float(ALGORITHMS.index(name)) for name in training.optimizer.names]),
    "dropout": lambda training: training.dropout,
    "batch_size": lambda training: training.batch_sizes.astype(np.float64),
}
_WRITE: dict[str, Callable[[BatchedTraining, Array], None]] = {
    "lr": _write_column("lr"),
    "weight_decay": _write_column("weight_decay"),
    "momentum": lambda training, values: training.optimizer.set_momentum(
        torch.from_numpy(values).unsqueeze(1).to(training.parameters.device)
    ),
    "dropout": lambda training, values: training.set_dropout(values),
    "batch_size": lambda training, values: training.resize(values.astype(np.int64)),
}

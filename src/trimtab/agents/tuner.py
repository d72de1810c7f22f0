"""Tuner: learns when to intervene in a training run, and what to change then.

`InterventionLearner` works on any spaces and is called by `adapters.ask_tell`; `TunerAgent` is the same as a registered
agent ("tuner"), for controllers and studies. Whether to act is `agents.intervention`'s, what to change is
`agents.proposals`'. Both learn from what was recorded, in this run and before; no environment is stepped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from typing_extensions import override

from trimtab.agents.base import Actions, Agent, Array, Base, Needs, State, Timing
from trimtab.agents.epsilon_greedy import FACTORS
from trimtab.agents.intervention import Batch, InterventionGate
from trimtab.agents.proposals import KINDS, ActionCode
from trimtab.errors import InputError, unknown_name
from trimtab.seeding import derive_seed, numpy_generator

__all__ = ["InterventionLearner", "TunerAgent", "TunerOptions"]

SIGNALS = (
    "progress",
    "train_loss_log_ratio",
    "val_loss_log_ratio",
    "val_loss_log_ratio_best",
    "loss_slope",
    "generalization_gap",
    "grad_update_cosine",
    "update_to_weight",
)


@dataclass(frozen=True)
class TunerOptions:
    """The tuner's settings; keys of the configuration of `trimtab.HyperParameterOptimizer`, and options of "tuner".

    Attributes:
        agent: What proposes: "ppo" or "dqn".
        learning_rate: Adam's, of the proposals.
        n_steps: Interventions in a rollout (PPO): the newest there are, from earlier runs too. As long as there are
            fewer, updates learn from those; below `batch_size` there is none.
        batch_size: Of a minibatch.
        gamma: Discount per decision.
        train_frequency_min: Decisions between two trainings where rewards are worse than they used to be.
        train_frequency_max: And where they are better.
        training_timesteps_min: Transitions that a training draws where rewards are better than they used to be.
        training_timesteps_max: And where they are worse.
        intervention_threshold: What the probability that acting beats no change must lie above, at first; see
            `InterventionGate`. 0 always acts and 1 never.
        burn_in: Decisions at the start of a run in which nothing is changed.
        min_distance: Decisions from one intervention to the next, at least; 1 allows every one.
        stagnation: Decisions without a better running mean of the reward after which the threshold falls.
        min_gain: See `InterventionGate`.
        exploration: See `InterventionGate`.
        max_transitions: Transitions remembered; the oldest go first.

    Raises:
        InputError: A value is out of range; the message names it.
    """

    agent: str = "ppo"
    learning_rate: float = 3e-4
    n_steps: int = 1024
    batch_size: int = 64
    gamma: float = 0.99
    train_frequency_min: int = 5
    train_frequency_max: int = 25
    training_timesteps_min: int = 5000
    training_timesteps_max: int = 10000
    intervention_threshold: float = 0.4
    burn_in: int = 0
    min_distance: int = 1
    stagnation: int = 20
    min_gain: float = 0.25
    exploration: float = 0.02
    max_transitions: int = 20_000

    def __post_init__(self) -> None:
        if not isinstance(self.agent, str) or self.agent not in KINDS:
            raise unknown_name("agent of the tuner", self.agent, KINDS)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "agent":
                continue
            is_whole = isinstance(item.default, int)
            low = 0 if item.name in _FROM_ZERO else 1
            high = 1.0 if item.name in (*_SHARES, "learning_rate") else math.inf
            kinds = int if is_whole else (int, float)
            fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            if (
                not fits
                or not (low if is_whole else 0) <= value <= high
                or (item.name == "learning_rate" and not value)
            ):
                expected = (
                    f"a whole number of {low} or more"
                    if is_whole
                    else "a number in [0, 1]"
                    if item.name in _SHARES
                    else "a number above 0 and up to 1"
                    if item.name == "learning_rate"
                    else "a number of 0 or more"
                )
                raise InputError(f"{item.name} is {value!r}; expected {expected}")
        for low_name, high_name in _PAIRS:
            low_value, high_value = getattr(self, low_name), getattr(self, high_name)
            if low_value > high_value:
                raise InputError(f"{low_name} is {low_value}, above {high_name}, {high_value}; exchange them")
        for name in ("n_steps", "max_transitions"):
            if getattr(self, name) < self.batch_size:
                raise InputError(
                    f"{name} is {getattr(self, name)}, below batch_size, {self.batch_size}: nothing would ever be "
                    "learned; give a smaller batch_size"
                )
        if self.batch_size < 2:
            raise InputError("batch_size is 1; expected 2 or more, since advantages are compared within a minibatch")


_FROM_ZERO = ("burn_in",)
_SHARES = ("gamma", "intervention_threshold", "exploration")
_PAIRS = (
    ("train_frequency_min", "train_frequency_max"),
    ("training_timesteps_min", "training_timesteps_max"),
)


class InterventionLearner:
    """Decides when to intervene and what to change, and learns both from what followed.

    Args:
        n_signals: S.
        action_space: What an intervention can change.
        options: See `TunerOptions`.
        no_change: The action that changes nothing, which is never proposed; None where there is none.
        seed: Of all that is drawn.

    Attributes:
        code: How actions are written as columns.
        gate: Whether to act.
        proposals: What to change.
        n_trainings: Trainings so far.

    Raises:
        InputError: The action space is of a kind that cannot be learned.
    """

    def __init__(
        self,
        n_signals: int,
        action_space: gymnasium.Space[Any],
        options: TunerOptions,
        *,
        no_change: Any = None,
        seed: int = 0,
    ) -> None:
        self.options = options
        self.code = ActionCode(action_space, no_change)
        self.gate = InterventionGate(
            n_signals,
            threshold=float(options.intervention_threshold),
            gamma=float(options.gamma),
            min_gain=float(options.min_gain),
            exploration=float(options.exploration),
            stagnation=options.stagnation,
            seed=derive_seed(seed, "gate"),
        )
        self.proposals = KINDS[options.agent](
            n_signals,
            self.code,
            learning_rate=float(options.learning_rate),
            n_steps=options.n_steps,
            batch_size=options.batch_size,
            gamma=float(options.gamma),
            seed=derive_seed(seed, "proposals"),
        )
        self._rng = numpy_generator(seed, "tuner")
        self._n_signals = n_signals
        self._n_seen = self._since = self.n_trainings = 0
        self._lowest: float | None = None  # reward that was finite
        self._kept, self._new = self._empty(), list[Batch]()

    def reseed(self, seed: int) -> None:
        """Begin exploration anew from a seed."""
        self._rng = numpy_generator(seed, "tuner")
        self.gate.reseed(derive_seed(seed, "gate"))

    @property
    def batch(self) -> Batch:
        """All transitions that are remembered, the oldest first."""
        if self._new:
            newest = slice(-self.options.max_transitions, None)
            columns = zip(self._kept, *self._new, strict=True)
            self._kept, self._new = Batch(*(np.concatenate(column)[newest] for column in columns)), []
        return self._kept

    def draw_seed(self) -> int:
        """A seed for an environment."""
        return int(self._rng.integers(2**31))

    @property
    def n_seen(self) -> int:
        """Transitions taken in so far; the number of the next one."""
        return self._n_seen

    @property
    def train_frequency(self) -> int:
        """Decisions between two trainings, as the newest rewards stand to all."""
        low, high = self.options.train_frequency_min, self.options.train_frequency_max
        return low + round((high - low) * self.gate.performance)

    @property
    def training_timesteps(self) -> int:
        """Transitions that the next training draws."""
        low, high = self.options.training_timesteps_min, self.options.training_timesteps_max
        return high - round((high - low) * self.gate.performance)

    def decide(self, observation: Array, *, deterministic: bool = False) -> tuple[npt.NDArray[np.bool_], Array, Array]:
        """Whether to intervene, the probability that it pays, and what to change; (R, S) -> (R,), (R,), (R, K).

        Args:
            observation: See above.
            deterministic: Neither explore when nor what.
        """
        observation = self.gate.fill(observation)
        acts, probability = self.gate.decide(observation, deterministic=deterministic)
        x = self.gate.normalize(observation)
        return acts, probability, self.proposals.propose(x, None if deterministic else self._rng)

    def record(
        self,
        observations: Array,
        actions: Array,
        rewards: Array,
        next_observations: Array,
        terminated: npt.NDArray[np.bool_],
        intervened: npt.NDArray[np.bool_],
    ) -> None:
        """Take in what followed decisions, (N, ...), and train where it is time to.

        A reward that is not finite counts as one standard deviation below the lowest that is remembered, a signal that
        is not as the mean of what was seen.
        """
        if not self._n_seen:
            self.gate.begin(np.asarray(observations, dtype=np.float64))
        observations, next_observations = self.gate.fill(observations), self.gate.fill(next_observations)
        x = self.gate.normalize(observations)
        finite = rewards[np.isfinite(rewards)]
        if len(finite):
            lowest = float(finite.min())
            self._lowest = lowest if self._lowest is None else min(self._lowest, lowest)
        floor = (self._lowest or 0.0) - self.gate.reward_std
        new = Batch(
            np.asarray(observations, dtype=np.float64),
            np.asarray(actions, dtype=np.float64),
            np.where(np.isfinite(rewards), rewards, floor),
            np.asarray(next_observations, dtype=np.float64),
            np.asarray(terminated, dtype=np.bool_),
            np.asarray(intervened, dtype=np.bool_),
            self.proposals.log_prob(x, actions),
            np.arange(self._n_seen, self._n_seen + len(observations)),
        )
        self.gate.take_in(new)
        self._remember(new)
        self._since += len(new.rewards)
        if self._since >= self.train_frequency and not self.gate.is_closed:
            self.train(self.training_timesteps)

    def learn_from_earlier(self, batch: Batch) -> None:
        """Remember transitions of earlier runs, and learn from them."""
        if len(batch.rewards):
            self.gate.take_in_earlier(batch)
            self._remember(batch)
            self.train(self.options.training_timesteps_max)

    def _remember(self, batch: Batch) -> None:
        count = len(batch.rewards)
        batch = batch._replace(numbers=np.arange(self._n_seen, self._n_seen + count))
        self._n_seen += count
        self._new.append(batch)

    def train(self, timesteps: int) -> None:
        """Learn from what is remembered: when to act, then what to change."""
        self._since = 0
        if len(self.batch.rewards) < 2:
            return
        self.n_trainings += 1
        gate, batch = self.gate, self.batch
        gate.learn(batch, timesteps, self.options.batch_size)
        x, next_x = gate.normalize(batch.observations), gate.normalize(batch.next_observations)
        self.proposals.learn(batch, x, next_x, gate.scaled(batch.rewards), gate.advantages(batch), timesteps)

    def _empty(self) -> Batch:
        signals, columns = (0, self._n_signals), (0, self.code.n_columns)
        none, no = np.zeros(0), np.zeros(0, dtype=np.bool_)
        return Batch(
            np.zeros(signals), np.zeros(columns), none, np.zeros(signals), no, no, none, np.zeros(0, dtype=np.int64)
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that experience changed, as one level of tensors and JSON scalars."""
        return {
            **{f"gate.{key}": value for key, value in self.gate.state_dict().items()},
            **{f"proposals.{key}": value for key, value in self.proposals.state_dict().items()},
            **{f"batch.{key}": _tensor(column) for key, column in self.batch._asdict().items()},
            "rng": self._rng.bit_generator.state,
            "counts": [self._n_seen, self._since, self.n_trainings],
            "lowest": self._lowest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: It does not fit; nothing is changed.
        """
        mine = self.state_dict()
        if set(state) != set(mine):
            wrong = sorted(set(state) ^ set(mine))
            raise InputError(f"tuner: the state lacks or has beyond what is expected: {', '.join(wrong)}")
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                raise InputError(f"tuner: {key} holds numbers that are not finite")
        try:
            self._load(state)
        except Exception as error:
            self._load(mine)
            if isinstance(error, InputError):
                raise
            raise InputError(f"tuner: the state does not fit: {type(error).__name__}: {error}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        parts: dict[str, dict[str, Any]] = {"gate": {}, "proposals": {}, "batch": {}}
        for key, value in state.items():
            owner, _, name = key.partition(".")
            if name:
                parts[owner][name] = value
        batch = self._batch_of(parts["batch"])
        rng = np.random.default_rng(0)
        rng.bit_generator.state = state["rng"]
        n_seen, since, n_trainings = (int(count) for count in state["counts"])
        lowest = None if state["lowest"] is None else float(state["lowest"])
        self.gate.load_state_dict(parts["gate"])
        self.proposals.load_state_dict(parts["proposals"])
        self._kept, self._new, self._rng, self._lowest = batch, [], rng, lowest
        self._n_seen, self._since, self.n_trainings = n_seen, since, n_trainings

    def _batch_of(self, columns: Mapping[str, torch.Tensor]) -> Batch:
        made = {}
        n = len(columns["rewards"])
        for name, empty in self._empty()._asdict().items():
            column = columns[name].numpy().astype(empty.dtype)
            if column.shape != (n, *empty.shape[1:]):
                raise InputError(f"tuner: batch.{name} has the shape {column.shape}; expected {(n, *empty.shape[1:])}")
            made[name] = column
        sizes = np.array(self.code.sizes)
        if len(sizes) and not ((made["actions"] >= 0) & (made["actions"] < sizes)).all():
            raise InputError(f"tuner: batch.actions lie outside of the choices, {sizes.tolist()}")
        return Batch(**made)


def _tensor(column: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(column.astype(np.int64) if column.dtype == np.bool_ else column.copy())


class TunerAgent(Agent):
    """The tuner as an agent of controllers and studies: every knob is multiplied by a factor, or nothing is changed.

    Args:
        actions: A name in `trimtab.agents.q_learning.FACTORS`, or the factors themselves, one of them 1.
        signals: Names of the signals that it observes; None for `SIGNALS`.
        every: Steps between decisions, or "epoch"; None shares the budget among `n_decisions`.
        n_decisions: For `every=None`.
        base: Name of the schedule under it.
        n_knobs: Knobs it moves together.
        seed: Of all that is drawn.
        **options: Those of `TunerOptions`; `agent` there says what proposes.

    Raises:
        UnknownNameError: An unknown option, set of factors, or kind of proposals.
        InputError: An option is out of range.
    """

    name = "tuner"
    is_learned = True

    def __init__(
        self,
        *,
        actions: str | Sequence[float] = "coarse",
        signals: Sequence[str] | None = None,
        every: int | str | None = None,
        n_decisions: int = 32,
        base: str = "constant",
        n_knobs: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._factors = _factors(actions)
        self._signals = SIGNALS if signals is None else tuple(signals)
        if not self._signals:
            raise InputError("tuner: signals are empty; it needs something to look at")
        self._every, self._n_decisions, self._base = every, n_decisions, base
        self.tuner_options = make_options(options)
        self._n_knobs = n_knobs
        keep = self._factors.index(1.0)
        self.learner = InterventionLearner(
            len(self._signals),
            spaces.MultiDiscrete([len(self._factors)] * n_knobs),
            self.tuner_options,
            no_change=np.full(n_knobs, keep),
            seed=seed,
        )
        self._keep = keep

    @property
    @override
    def needs(self) -> Needs:
        timing = Timing(every=self._every, n_decisions=self._n_decisions)
        return Needs(self._signals, Actions("multiply", self._factors), timing, Base(self._base))

    @property
    @override
    def options(self) -> dict[str, Any]:
        return {
            "actions": list(self._factors),
            "signals": list(self._signals),
            "every": self._every,
            "n_decisions": self._n_decisions,
            "base": self._base,
            **asdict(self.tuner_options),
        }

    @override
    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        """See `Agent.predict`; the state holds the decisions of each run so far and since its last intervention."""
        runs = len(observation)
        if state is None:
            state = (np.zeros(runs, dtype=np.int64), np.full(runs, self.tuner_options.min_distance))
        begun = np.zeros(runs, np.bool_) if episode_start is None else episode_start
        count = np.where(begun, 0, state[0])
        since = np.where(begun, self.tuner_options.min_distance, state[1])
        acts, probability, proposed = self.learner.decide(observation, deterministic=deterministic)
        acts = acts & (count >= self.tuner_options.burn_in) & (since >= self.tuner_options.min_distance)
        self.note = f"p(acting pays) {probability[0]:.2f}, threshold {self.learner.gate.threshold:.2f}"
        action = np.where(acts[:, None], proposed, self._keep).astype(np.int64)
        return action, (count + 1, np.where(acts, 1, since + 1))

    @override
    def update(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        intervened = (action != self._keep).any(1)
        self.learner.record(observation, action, reward, next_observation, terminated, intervened)

    @override
    def learn_from_earlier(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        """See `Agent.learn_from_earlier`. Of what another policy proposed, PPO learns as if this one had."""
        x = self.learner.gate.normalize(observation)
        self.learner.learn_from_earlier(
            Batch(
                observation,
                np.asarray(action, dtype=np.float64),
                reward,
                next_observation,
                terminated,
                (action != self._keep).any(1),
                self.learner.proposals.log_prob(x, np.asarray(action, dtype=np.float64)),
                np.zeros(len(reward), dtype=np.int64),
            )
        )

    @override
    def reseed(self, seed: int) -> None:
        self.learner.reseed(seed)

    @override
    def learn(self, env: Any, total_timesteps: int) -> TunerAgent:
        """Learn by acting in a single Gymnasium environment with this agent's signals and factors."""
        seen, _ = env.reset(seed=self.learner.draw_seed())
        state: State | None = None
        for _ in range(total_timesteps):
            now = np.asarray(seen, dtype=np.float64).reshape(1, -1)
            action, state = self.predict(now, state)
            given = action[0] if self._n_knobs > 1 else int(action[0, 0])
            seen, reward, terminated, truncated, _ = env.step(given)
            then = np.asarray(seen, dtype=np.float64).reshape(1, -1)
            self.update(now, action, np.array([float(reward)]), then, np.array([bool(terminated)]))
            if terminated or truncated:
                seen, _ = env.reset()
                state = None
        return self

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state)


def make_options(given: Mapping[str, Any]) -> TunerOptions:
    """Options by name.

    Raises:
        UnknownNameError: One is unknown.
        InputError: One is out of range.
    """
    known = [item.name for item in fields(TunerOptions)]
    for key in given:
        if key not in known:
            raise unknown_name("option of the tuner", key, known)
    return TunerOptions(
        **{key: value.item() if isinstance(value, np.generic) else value for key, value in given.items()}
    )


def _factors(given: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(given, str):
        if given not in FACTORS:
            raise unknown_name("set of actions", given, FACTORS)
        return FACTORS[given]
    factors = tuple(float(factor) for factor in given)
    if len(factors) < 2 or 1.0 not in factors:
        raise InputError(
            f"tuner: actions {given!r}; expected a name ({', '.join(FACTORS)}), or factors with 1 among them"
        )
    return factors

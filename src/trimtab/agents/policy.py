"""Policies that were learned before: small networks that choose among moves of log10 of the rate, in NumPy.

Called through the registry (`ppo`, `dqn`), by brains, and by the learners, which put what Stable-Baselines3 trained
into them. At decision time there is no torch: three products of small matrices. Source: FINDINGS section 5; acting
with the mean of the distribution over moves (1.133) beat its likeliest move (1.149) and sampling (1.176).
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Self, override

from trimtab.agents.base import Actions, Agent, Array, Base, Needs, State, Timing, load_generator
from trimtab.agents.features import Features
from trimtab.agents.fine_tune import advantages_of, improve
from trimtab.agents.uwhg import N_FIRST, UWHG
from trimtab.errors import InputError, unknown_name

__all__ = ["MOVES", "DQNAgent", "PPOAgent", "PolicyAgent"]

Indices = npt.NDArray[np.int64]

MOVES = (-2.0, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 2.0)
EARLY_DECISIONS = 6  # each 1 % of the budget: from 1e-5 the rate has to rise four decades before training can begin
RESIDUAL_SHARE = 0.5  # of a move that is added to a rule's: the rule leads, the policy corrects
MAX_WEIGHTS = 10_000_000  # 80 MB; the usual policy has two thousand


class PolicyAgent(Agent):
    """A multilayer perceptron (tanh) from features to one number for each move.

    x = clip(scale * observation),  h = tanh(x W0 + b0), ...,  z = h W + b,  one z for each knob and move

    With several members, each has its own weights and the mean of their moves is taken.

    Args:
        signals: Names of the signals it observes; None for `features.SIGNALS`.
        scales: Signal -> what it is multiplied by, where it is to be another than in `features.SCALES`.
        hidden: Widths of the hidden layers.
        moves: Moves of log10 of the setting to choose among, ascending, one of them 0 ("no change").
        n_decisions: Decisions after the early ones, in equal parts of the budget.
        early_decisions: Decisions of 1 % of the budget at the start; None for 6, or 7 with the residual, whose rule
            spends the first on measuring.
        base: Name of the schedule under it; "cosine" needs a known budget, "constant" does not.
        base_options: Its options.
        residual: None, or "uwhg": half the move is added to what that rule proposes for the first knob.
        members: Networks whose moves are averaged.
        ranges: Signal -> (lowest, highest) it was learned on. Where one lies outside, the rule `uwhg` decides alone,
            and `note` says so; None trusts the policy everywhere.
        n_knobs: Knobs it moves together.
        seed: Seed of the first weights and of its exploration.

    Attributes:
        features: From signals to what the network sees.
        moves: See above.
        move_table: The same as an array, to be indexed by choices.
        hidden: See above.
        members: See above.
        n_knobs: See above.

    Raises:
        InputError: An option is out of range, or the residual's rule needs a signal that is not observed.
    """

    is_taught = True

    def __init__(  # noqa: PLR0913 (options of a study file, flat because people write them by hand)
        self,
        *,
        signals: Sequence[str] | None = None,
        scales: Mapping[str, float] | None = None,
        hidden: Sequence[int] = (32, 32),
        moves: Sequence[float] = MOVES,
        n_decisions: int = 20,
        early_decisions: int | None = None,
        base: str = "cosine",
        base_options: Mapping[str, Any] | None = None,
        residual: str | None = None,
        members: int = 1,
        ranges: Mapping[str, Sequence[float]] | None = None,
        n_knobs: int = 1,
        seed: int = 0,
    ) -> None:
        self.features = Features(self.name, signals, scales)
        self.moves = _ascending_moves(self.name, moves)
        self.hidden = tuple(_whole(self.name, "hidden", width) for width in hidden)
        self.members = _whole(self.name, "members", members)
        self.n_knobs = _whole(self.name, "n_knobs", n_knobs)
        self._share_of_rule = _share_of_rule(self.name, residual)
        self._ranges = _checked_ranges(self.name, ranges, self.features.signals)
        low, high = zip(*[self._ranges.get(name, (-np.inf, np.inf)) for name in self.features.signals], strict=True)
        self._low, self._high = np.array(low), np.array(high)
        seen = self.features.signals
        self._ratio_column = seen.index("update_to_weight") if "update_to_weight" in seen else None
        self._rule: UWHG | None = None
        self._rule_columns: list[int] = []
        if residual or self._ranges:
            self._rule, self._rule_columns = self._make_rule()
        if early_decisions is None:
            early_decisions = N_FIRST + 1 if self._rule else EARLY_DECISIONS
        self._needs = Needs(
            signals=self.features.signals,
            actions=Actions("decades", low=self.moves[0], high=self.moves[-1]),
            timing=Timing(every=None, n_decisions=n_decisions, early_decisions=early_decisions),
            base=Base(base, dict(base_options or {})),
        )
        self._rng = np.random.default_rng(seed)
        # One column for the sum of weighted moves and one for the sum of weights: their quotient is the mean move.
        self._moves_and_ones = np.array([self.moves, [1.0] * len(self.moves)]).T.copy()
        self.move_table: Array = np.array(self.moves)
        self._share = np.full((1, self.members), 1.0 / self.members)
        self._weights, self._biases = self._initial(np.random.default_rng([seed, 1]))

    def _make_rule(self) -> tuple[UWHG, list[int]]:
        rule = UWHG()
        missing = [name for name in rule.needs.signals if name not in self.features.signals]
        if missing:
            raise InputError(
                f"{self.name}: the rule 'uwhg' needs the signals {', '.join(missing)}, which are not among "
                f"{', '.join(self.features.signals)}; add them to `signals`"
            )
        return rule, [self.features.signals.index(name) for name in rule.needs.signals]

    def _initial(self, rng: np.random.Generator) -> tuple[list[Array], list[Array]]:
        """Small random weights, and a bias that makes "no change" the likeliest move."""
        widths = [len(self.features.signals), *self.hidden, self.n_knobs * len(self.moves)]
        if self.members * sum(a * b for a, b in itertools.pairwise(widths)) > MAX_WEIGHTS:
            raise InputError(f"{self.name}: more than {MAX_WEIGHTS} weights; take fewer or narrower layers")
        weights, biases = [], []
        for fan_in, fan_out in itertools.pairwise(widths):
            weights.append(rng.standard_normal((self.members, fan_in, fan_out)) / np.sqrt(fan_in))
            biases.append(np.zeros((self.members, 1, fan_out)))
        weights[-1] *= 0.01
        biases[-1].reshape(self.members, self.n_knobs, -1)[..., self.keep] = 1.0
        return weights, biases

    @property
    def keep(self) -> int:
        """Index of the move "no change"."""
        return self.moves.index(0.0)

    @property
    @override
    def needs(self) -> Needs:
        return self._needs

    @property
    @override
    def options(self) -> dict[str, Any]:
        timing, base = self._needs.timing, self._needs.base
        return {
            "signals": list(self.features.signals),
            "scales": dict(self.features.scales),
            "hidden": list(self.hidden),
            "moves": list(self.moves),
            "n_decisions": timing.n_decisions,
            "early_decisions": timing.early_decisions,
            "base": base.name,
            "base_options": dict(base.options),
            "residual": "uwhg" if self._share_of_rule else None,
            "members": self.members,
            "ranges": {name: list(pair) for name, pair in self._ranges.items()} or None,
        }

    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        """See `Agent.predict`; the state is that of the residual's rule, None without one."""
        outputs = self.outputs(observation)
        moves = self._act(outputs) if deterministic else self._explore(outputs)
        return self.to_actions(moves, observation, state, episode_start)

    def to_actions(
        self,
        moves: Array,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[Array, State | None]:
        """What is asked of the knobs when these moves are chosen: the moves, or half of them added to the rule's.

        Args:
            moves: (R, K).
            observation: Signals, not features; (R, S).
            state: What this method (or `predict`) returned before.
            episode_start: True where a run has just begun; (R,).

        Returns:
            The actions (R, K), within the actions' bounds, and the state to hand in next time.
        """
        self.note = ""
        if self._rule is None:
            return self._hold_where_blind(moves, observation), state
        proposed, state = self._rule.predict(observation[:, self._rule_columns], state, episode_start)
        actions = moves
        if self._share_of_rule:
            actions = RESIDUAL_SHARE * moves
            actions[:, :1] += proposed  # the first knob is the rate, of which alone the rule speaks
        if self._ranges:
            actions = self._trust(actions, proposed, observation)
        actions = self._hold_where_blind(actions, observation)
        return np.minimum(np.maximum(actions, self.moves[0]), self.moves[-1]), state

    def _hold_where_blind(self, actions: Array, observation: Array) -> Array:
        """The actions, and 0 where a gradient scaler skipped every step, or gradients are sparse: nothing is known."""
        if self._ratio_column is None:
            return actions
        is_blind = observation[:, self._ratio_column] == 0.0  # exactly 0 only where it was not measured
        if not is_blind.any():
            return actions
        self.note = "no update was measured: nothing moves"
        return np.where(is_blind[:, None], 0.0, actions)

    def _trust(self, actions: Array, proposed: Array, observation: Array) -> Array:
        """The actions, and the rule's where a signal lies outside what the policy was learned on."""
        outside = np.logical_or(observation < self._low, observation > self._high)
        if not outside.any():
            return actions
        names = [name for name, column in zip(self.features.signals, outside.T, strict=True) if column.any()]
        self.note = f"outside what was learned on ({', '.join(names)}): the rule uwhg decides"
        rule = np.zeros_like(actions)
        rule[:, :1] = proposed
        return np.where(np.any(outside, axis=1, keepdims=True), rule, actions)

    def outputs(self, observation: Array) -> Array:
        """Each member's number for each knob and move: logits, or values; (R, S) -> (R, members, K, moves).

        Every run is multiplied by itself, so that its numbers do not depend, to the last bit, on its neighbours.
        """
        hidden = self.features(observation)[:, None, None, :]
        last = len(self._weights) - 1
        for index, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            hidden = hidden @ weight
            hidden += bias
            if index < last:
                np.tanh(hidden, out=hidden)
        return hidden.reshape(len(observation), self.members, self.n_knobs, len(self.moves))

    @abstractmethod
    def _act(self, outputs: Array) -> Array:
        """The moves of deterministic use; (R, members, K, moves) -> (R, K)."""

    @abstractmethod
    def _explore(self, outputs: Array) -> Array:
        """Moves drawn at random; (R, members, K, moves) -> (R, K)."""

    def _mean_of_members(self, moves: Array) -> Array:
        """(R, members, K) -> (R, K)."""
        return moves[:, 0] if self.members == 1 else (self._share @ moves)[:, 0]

    @classmethod
    def join(cls, agents: Sequence[Self]) -> Self:
        """One agent that acts with the mean of several, which differ in nothing but their weights.

        Raises:
            InputError: No agent, or their options differ.
        """
        if not agents:
            raise InputError("no agents to join; expected one or more")
        first = agents[0]
        rest = [{**agent.options, "members": 1, "n_knobs": agent.n_knobs} for agent in agents]
        for other, options in zip(agents, rest, strict=True):
            if type(other) is not type(first) or options != rest[0]:
                keys = [key for key in rest[0] if options[key] != rest[0][key]]
                raise InputError(
                    f"{other.name!r} cannot be joined with {first.name!r}: they differ in {keys or 'their kind'}"
                )
        joined = type(first)(**{**rest[0], "members": sum(agent.members for agent in agents)})
        joined._weights = [np.concatenate(layers) for layers in zip(*(a._weights for a in agents), strict=True)]
        joined._biases = [np.concatenate(layers) for layers in zip(*(a._biases for a in agents), strict=True)]
        return joined

    @override
    def reseed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def learn(self, env: Any, total_timesteps: int) -> Agent:
        """Not here: Stable-Baselines3 is not imported where a policy is used.

        Raises:
            InputError: Always; it names `make_learner`.
        """
        del env, total_timesteps
        raise InputError(f"agent {self.name!r} is taught by a learner: make_learner({self.name!r}, spec).iterate(envs)")

    def _tensors(self) -> dict[str, Array]:
        pairs = zip(self._weights, self._biases, strict=True)
        return {
            f"{kind}{index}": array
            for index, pair in enumerate(pairs)
            for kind, array in zip(("w", "b"), pair, strict=True)
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        tensors = {key: torch.from_numpy(array.copy()) for key, array in self._tensors().items()}
        return {**tensors, "rng": self._rng.bit_generator.state}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        mine = self._tensors()
        if set(state) != {*mine, "rng"}:
            raise InputError(f"{self.name}: the state has the keys {sorted(state)}; expected {sorted([*mine, 'rng'])}")
        for key, array in mine.items():
            value = state[key]
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != array.shape:
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(f"{self.name}: {key} is {shape}; expected a tensor of shape {array.shape}")
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"{self.name}: {key} holds numbers that are not finite; learn it anew")
        load_generator(self._rng, state["rng"], self.name)
        arrays = {key: state[key].detach().to("cpu", torch.float64).numpy().copy() for key in mine}
        self._weights = [arrays[f"w{index}"] for index in range(len(self._weights))]
        self._biases = [arrays[f"b{index}"] for index in range(len(self._biases))]


class PPOAgent(PolicyAgent):
    """A policy as PPO learns it: the outputs are logits of the moves.

    Deterministic use takes the mean of the distribution, sum_a softmax(z)_a move_a; otherwise a move is drawn.
    """

    name = "ppo"

    @override
    def learn_from_earlier(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        """See `Agent.learn_from_earlier`, and `agents.fine_tune` for how.

        What was not this policy's own choice (the rule's, where a signal lay outside of what it was learned on; none,
        where no update was measured; the guard's, where the action is NaN) counts among the rewards, and is not learned
        from.

        Raises:
            InputError: It corrects a rule, or moves several knobs.
        """
        del next_observation
        if self._share_of_rule or self.n_knobs != 1:
            raise InputError(
                f"{self.name}: what it chose cannot be told from its actions (residual {self.options['residual']}, "
                f"{self.n_knobs} knobs); only a policy of one knob without a residual is taught on from earlier runs"
            )
        away = np.abs(action[:, :1] - self.move_table)
        own = (away.min(axis=1) < 1e-9) & np.all((observation >= self._low) & (observation <= self._high), axis=1)
        if self._ratio_column is not None:
            own &= observation[:, self._ratio_column] != 0.0  # see `_hold_where_blind`
        gains = advantages_of(reward, terminated)
        if not own.any() or not np.any(gains[own]):
            return
        choices = away.argmin(axis=1)[own]
        features = self.features(observation[own])
        self._weights, self._biases = improve(self._weights, self._biases, features, choices, gains[own])

    def probabilities(self, observation: Array) -> Array:
        """Probability of each move, the mean over members; (R, S) -> (R, K, moves)."""
        return self._mean_probabilities(self.outputs(observation))

    @override
    def _act(self, outputs: Array) -> Array:
        sums = _exponentials(outputs) @ self._moves_and_ones
        return self._mean_of_members(sums[..., 0] / sums[..., 1])

    @override
    def _explore(self, outputs: Array) -> Array:
        below = np.cumsum(self._mean_probabilities(outputs), axis=-1)[..., :-1]
        drawn = self._rng.random(below.shape[:-1])
        return np.asarray(self.move_table[(drawn[..., None] >= below).sum(axis=-1)])

    def _mean_probabilities(self, outputs: Array) -> Array:
        weights = _exponentials(outputs)
        return np.asarray((weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1))


class DQNAgent(PolicyAgent):
    """A policy as DQN learns it: the outputs are values of the moves.

    Deterministic use takes the best move; otherwise one in twenty moves is drawn at random.
    """

    name = "dqn"
    epsilon = 0.05

    @override
    def _act(self, outputs: Array) -> Array:
        return self._mean_of_members(self.move_table[outputs.argmax(axis=-1)])

    @override
    def _explore(self, outputs: Array) -> Array:
        best = self._act(outputs)
        explores = self._rng.random(best.shape) < self.epsilon
        return np.where(explores, self.move_table[self._rng.integers(0, len(self.moves), best.shape)], best)


def _exponentials(outputs: Array) -> Array:
    """exp(z - max z): the softmax but for its denominator, without overflow."""
    return np.asarray(np.exp(outputs - outputs.max(axis=-1, keepdims=True)))


def _share_of_rule(who: str, residual: str | None) -> float:
    if residual not in (None, "uwhg"):
        raise unknown_name(f"residual of agent {who!r}", residual, ["uwhg"])
    return RESIDUAL_SHARE if residual else 0.0


def _checked_ranges(
    who: str, given: Mapping[str, Sequence[float]] | None, signals: Sequence[str]
) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for name, pair in (given or {}).items():
        if name not in signals:
            raise unknown_name(f"signal with a range, of agent {who!r}", name, signals)
        try:
            low, high = map(float, pair)
        except (TypeError, ValueError):
            low = high = np.nan
        if not low <= high:
            raise InputError(f"{who}: range of {name!r} is {pair!r}; expected two numbers, the lower one first")
        ranges[name] = (low, high)
    return ranges


def _whole(who: str, key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{who}: {key} is {value!r}; expected a whole number of 1 or more")
    return value


def _ascending_moves(who: str, given: Sequence[float]) -> tuple[float, ...]:
    try:
        moves = tuple(float(move) for move in given)
    except (TypeError, ValueError):
        moves = ()
    good = 0.0 in moves and len(set(moves)) == len(moves) and list(moves) == sorted(moves)
    if not good or not -10 <= moves[0] < 0 < moves[-1] <= 10:
        raise InputError(
            f"{who}: moves {given!r}; expected ascending numbers of decades within 10, below 0, 0 and above 0"
        )
    return moves

"""Deep Q-learning within a run, over factors of the rate or over a continuous move of it.

Called through the registry. Sources: Mnih et al. 2015, "Human-level control through deep reinforcement learning",
Nature 518:529-533 (replay, target network, epsilon-greedy); for the continuous form Gu et al. 2016, "Continuous Deep
Q-Learning with Model-based Acceleration", arXiv:1603.00748, section 4 (a quadratic advantage, whose maximum is known).
Deviations: a run has tens of decisions, so that every minibatch is drawn from a memory of all of them, and every
decision is followed by several updates; the output layer begins at 0, so that an untaught network moves nothing.

Stable-Baselines3's DQN steps an environment of its own and has no continuous form; here a training run is the
environment, and is stepped by whoever trains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from trimtab.agents.base import Actions, Array, Base, State, load_generator
from trimtab.agents.epsilon_greedy import EpsilonGreedy, best_or_keep, check_shares, check_transitions
from trimtab.agents.features import Features
from trimtab.errors import InputError

__all__ = ["CONTINUOUS", "DeepQ"]

CONTINUOUS = "continuous"
# The write-ups' x0.9 and x1.1 as the ends of the continuous form, symmetric in decades.
DECADES = math.log10(1.1)
MAX_WIDTH = 2048  # two layers of it are 34 MB, and as much for each of target and Adam's two moments
# Scale-free, and known from the first decision on.
SIGNALS = (
    "progress",
    "val_loss_log_ratio",
    "val_loss_log_ratio_best",
    "train_loss_log_ratio",
    "loss_slope",
    "generalization_gap",
    "grad_update_cosine",
    "update_to_weight",
    "lr_log_ratio_start",
)
_N_HEADS = 3  # of the continuous form: value, where the best move lies, log of the curvature over that of rewards
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_COLUMNS = ("observation", "action", "reward", "next_observation", "terminated")


class DeepQ(EpsilonGreedy):
    """A small network (ReLU) of the values of moves, learned from a memory of transitions.

        discrete    target = r + gamma max_a Q'(s', a)
        continuous  Q(s, a) = V(s) - u exp(c(s)) ((a - m(s)) / span)^2 / 2,  so that max_a Q = V, at the best move m(s)

    Q' is the network of up to `target_every` decisions ago; the loss is Huber's; u is the standard deviation of the
    remembered rewards. Where those are hundredths, an untaught network without it holds every move but the best for so
    bad that each that is tried, whatever it gave, draws the best towards it.

    Args:
        actions: A name in `epsilon_greedy.FACTORS`, the factors themselves, or "continuous".
        span: Of the continuous form alone: the largest move, in decades, up and down; None for `DECADES`.
        signals: Names of the signals it observes; None for `SIGNALS`.
        hidden: Widths of the hidden layers, each up to `MAX_WIDTH`.
        learning_rate: Adam's.
        gamma: Discount per decision, in [0, 1].
        epsilon: Probability of a move drawn evenly, at the start.
        epsilon_end: The same in the end.
        epsilon_schedule: "constant", "linear" or "exponential", as of `q_learning`.
        epsilon_decisions: See there.
        batch_size: Transitions in a minibatch; fewer where there are no more.
        updates: Minibatches after each decision.
        target_every: Decisions between two copies into the target network.
        memory: Transitions that are remembered; the oldest go first.
        every: Steps between decisions, or "epoch".
        base: Name of the schedule under it.
        base_options: Its options.
        seed: Of the first weights, exploration and minibatches.

    Raises:
        InputError: A number is out of range, or `span` is given beside factors.
    """

    name = "deep_q"
    n_updates = 0  # transitions learned from, over all runs

    def __init__(  # noqa: PLR0913 (options of a study file, flat because people write them by hand)
        self,
        *,
        actions: str | Sequence[float] = "standard",
        span: float | None = None,
        signals: Sequence[str] | None = None,
        hidden: Sequence[int] = (32, 32),
        learning_rate: float = 1e-3,
        gamma: float = 0.99,
        epsilon: float = 0.1,
        epsilon_end: float = 0.01,
        epsilon_schedule: str = "constant",
        epsilon_decisions: int = 100,
        batch_size: int = 32,
        updates: int = 8,
        target_every: int = 10,
        memory: int = 10_000,
        every: int | str = 10,
        base: str = "constant",
        base_options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.features = Features(self.name, signals if signals is not None else SIGNALS, None)
        counts = {"batch_size": batch_size, "updates": updates, "target_every": target_every, "memory": memory}
        counts |= {f"hidden[{place}]": width for place, width in enumerate(hidden)}
        for key, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise InputError(f"deep_q: {key} is {count!r}; expected a whole number of 1 or more")
            if "[" in key and count > MAX_WIDTH:
                raise InputError(f"deep_q: {key} is {count}; expected at most {MAX_WIDTH}")
        self._is_continuous = isinstance(actions, str) and actions == CONTINUOUS
        if span is not None and not self._is_continuous:
            raise InputError(f"deep_q: span is {span!r}, but the actions are factors; leave it out")
        check_shares(self.name, {"gamma": gamma})
        self._given_span, self._span = span, DECADES if span is None else span
        for key, value, most in (("learning_rate", learning_rate, 1.0), ("span", self._span, 2.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                raise InputError(f"deep_q: {key} is {value!r}; expected a number above 0 and up to {most:g}")
        self._hidden = tuple(hidden)
        self._rate, self._gamma, self._counts = float(learning_rate), float(gamma), counts
        moves = Actions("decades", low=-self._span, high=self._span) if self._is_continuous else None
        course = (epsilon, epsilon_end, epsilon_schedule, epsilon_decisions)
        base_schedule = Base(base, dict(base_options or {}))
        super().__init__(actions, self.features.signals, course, every, base_schedule, seed, moves)
        self._network = self._first_weights(np.random.default_rng([seed, 1]))
        self._target = [weight.detach().clone() for weight in self._network]
        self._adam = self._make_adam()
        self._kept = self._empty()

    def _first_weights(self, rng: np.random.Generator) -> list[Tensor]:
        """Weights and biases in turn; the last layer is 0."""
        n_out = _N_HEADS if self._is_continuous else len(self._actions.factors)
        widths = [len(self.features.signals), *self._hidden, n_out]
        tensors: list[Tensor] = []
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            scale = math.sqrt(2 / fan_in) if layer < len(self._hidden) else 0.0
            weight = torch.from_numpy(scale * rng.standard_normal((fan_in, fan_out)))
            tensors += [weight.requires_grad_(), torch.zeros(fan_out, dtype=torch.float64, requires_grad=True)]
        return tensors

    def _make_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._network, lr=self._rate)

    def _empty(self) -> dict[str, Array]:
        width = len(self.features.signals)
        shapes = {"observation": (0, width), "next_observation": (0, width)}
        return {name: np.zeros(shapes.get(name, (0,))) for name in _COLUMNS}

    @property
    @override
    def options(self) -> dict[str, Any]:
        return {
            **super().options,
            "span": self._given_span,
            "signals": list(self.features.signals),
            "hidden": list(self._hidden),
            "learning_rate": self._rate,
            "gamma": self._gamma,
            **{key: count for key, count in self._counts.items() if "[" not in key},
        }

    def outputs(self, observation: Array) -> Array:
        """Values of the moves, or value, place and curvature; (R, S) -> (R, outputs).

        Every run is multiplied by itself, so that its numbers do not depend, to the last bit, on its neighbours.
        """
        hidden = self.features(observation)[:, None, :]
        layers = [tensor.detach().numpy() for tensor in self._network]
        for place in range(0, len(layers), 2):
            hidden = hidden @ layers[place] + layers[place + 1]
            if place + 2 < len(layers):
                hidden = np.maximum(hidden, 0.0)
        return np.asarray(hidden[:, 0, :])

    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        """See `Agent.predict`; of equal values "keep" is taken, then the first."""
        del episode_start
        found = self.outputs(observation)
        if self._is_continuous:
            chosen = self._span * np.tanh(found[:, 1])
        else:
            chosen = best_or_keep(found, self._actions.factors.index(1.0))
        if not deterministic and self._is_continuous:
            chosen = self._explore(chosen, lambda n: self._rng.uniform(-self._span, self._span, n))
        elif not deterministic:
            chosen = self._explore(chosen, lambda n: self._rng.integers(0, found.shape[1], n))
        return chosen[:, None], state

    @override
    def update(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        check_transitions(self.name, observation, action, reward, next_observation)
        new = (self.features(observation), action[:, 0], reward, self.features(next_observation), terminated)
        for name, column in zip(_COLUMNS, new, strict=True):
            joined = np.concatenate([self._kept[name], np.asarray(column, dtype=np.float64)])
            self._kept[name] = joined[-self._counts["memory"] :]
        before = self.n_updates
        self.n_updates += len(reward)
        for _ in range(self._counts["updates"]):
            self._learn()
        if before // self._counts["target_every"] != self.n_updates // self._counts["target_every"]:
            self._target = [weight.detach().clone() for weight in self._network]

    @override
    def learn_from_earlier(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        """See `Agent.learn_from_earlier`; one at a time, as they came: the target does not depend on who acted."""
        for row in range(len(reward)):
            one = slice(row, row + 1)
            self.update(observation[one], action[one], reward[one], next_observation[one], terminated[one])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _learn(self) -> None:
        """One minibatch; gradients are on, also where whoever trains has turned them off."""
        n = len(self._kept["reward"])
        rows = self._rng.integers(0, n, min(n, self._counts["batch_size"]))
        seen, action, reward, then, ended = (torch.from_numpy(self._kept[name][rows]) for name in _COLUMNS)
        with torch.no_grad():
            following = _forward(self._target, then)
            best = following[:, 0] if self._is_continuous else following.max(dim=1).values
            target = reward + self._gamma * (1.0 - ended) * best
        found = _forward(self._network, seen)
        if self._is_continuous:
            away = action / self._span - torch.tanh(found[:, 1])
            unit = float(self._kept["reward"].std())
            value = found[:, 0] - unit * torch.exp(found[:, 2].clamp(max=10.0)) * away**2 / 2
        else:
            value = found.gather(1, action.long()[:, None])[:, 0]
        self._adam.zero_grad()
        torch.nn.functional.smooth_l1_loss(value, target).backward()  # type: ignore[no-untyped-call]
        self._adam.step()

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"rng": self._rng.bit_generator.state, "n_updates": self.n_updates}
        for place, (weight, old) in enumerate(zip(self._network, self._target, strict=True)):
            moments = self._adam.state.get(weight) or {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
            state |= {f"network{place}": weight.detach().clone(), f"target{place}": old.clone()}
            state |= {f"adam{place}.{key}": moments[key].detach().clone() for key in _MOMENTS}
        return {**state, **{f"memory.{name}": torch.from_numpy(kept.copy()) for name, kept in self._kept.items()}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        mine = self.state_dict()
        if set(state) != set(mine):
            raise InputError(
                f"deep_q: the state lacks or has beyond what is expected: {sorted(set(state) ^ set(mine))}"
            )
        n_kept = len(state["memory.reward"]) if isinstance(state["memory.reward"], Tensor) else -1
        for key, value in mine.items():
            if not isinstance(value, Tensor):
                continue
            shape = (n_kept, *value.shape[1:]) if key.startswith("memory.") else tuple(value.shape)
            if not isinstance(state[key], Tensor) or tuple(state[key].shape) != shape:
                raise InputError(f"deep_q: {key} does not have the shape {shape}; it is of other options")
            if not bool(torch.isfinite(state[key]).all()):
                raise InputError(f"deep_q: {key} holds numbers that are not finite; learn it anew")
        self._check_numbers(state)
        load_generator(self._rng, state["rng"], self.name)
        self.n_updates = state["n_updates"]
        n_tensors = len(self._network)
        self._network = [state[f"network{k}"].to(torch.float64).clone().requires_grad_() for k in range(n_tensors)]
        self._target = [state[f"target{k}"].to(torch.float64).clone() for k in range(n_tensors)]
        self._adam = self._make_adam()
        for place, weight in enumerate(self._network):
            if float(state[f"adam{place}.step"]):
                self._adam.state[weight] = {key: state[f"adam{place}.{key}"].clone() for key in _MOMENTS}
        self._kept = {name: state[f"memory.{name}"].to(torch.float64).numpy().copy() for name in _COLUMNS}

    def _check_numbers(self, state: Mapping[str, Any]) -> None:
        """Refuse what has the right shape and would fail, or teach nonsense, at the next minibatch."""
        count, action = state["n_updates"], state["memory.action"]
        known = torch.arange(len(self._actions.factors)).to(action.dtype)
        good = {
            "n_updates": isinstance(count, int) and not isinstance(count, bool) and count >= 0,
            "memory.action": self._is_continuous or bool(torch.isin(action, known).all()),
            "memory.terminated": bool(torch.isin(state["memory.terminated"], torch.tensor([0.0, 1.0])).all()),
            **{key: bool((value >= 0).all()) for key, value in state.items() if key.endswith(("exp_avg_sq", ".step"))},
        }
        for key in good:
            if not good[key]:
                raise InputError(f"deep_q: {key} holds what this agent never writes there; learn it anew")


def _forward(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """The network on features; (B, S) -> (B, outputs)."""
    for place in range(0, len(layers), 2):
        x = x @ layers[place] + layers[place + 1]
        if place + 2 < len(layers):
            x = torch.relu(x)
    return x

"""Proposals: what an intervention changes, learned by PPO or DQN of Stable-Baselines3 from recorded transitions.

Called by `agents.tuner`. No environment is stepped: a rollout, or a replay buffer, is filled from what was recorded.
Sources: Schulman et al. 2017, arXiv:1707.06347; Mnih et al. 2015, Nature 518:529-533. PPO is meant for fresh rollouts;
from older ones it learns with each transition weighted by how much likelier its policy has made the action since then
(importance sampling). Where that is more than a factor of 2 the transition is left out; and an update ends early where
the policy moves further than `TARGET_KL` from where the update began.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution, MultiCategoricalDistribution
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn
from typing_extensions import override

from trimtab.agents.base import Array
from trimtab.agents.intervention import BOUND, Batch
from trimtab.errors import InputError
from trimtab.seeding import derive_seed, scoped_global_rng, scoped_numpy_rng, torch_generator

__all__ = ["KINDS", "ActionCode", "Proposals"]

HIDDEN = (32, 32)
TARGET_KL = 0.03
MAX_RATIO = 2.0  # of the policy's probability now to that when it proposed
LOG_STD = (
    -1.5
)  # at first, of a Gaussian over bounds of -1..1: nearly half a decade where moves are 2 decades either way
MAX_JOINT = 1000  # joint actions that DQN has a value for
_CPU = torch.device("cpu")


class ActionCode:
    """How the actions of a space are written as K columns.

    Choices (Discrete, MultiDiscrete with one axis, MultiBinary) are indices from 0. A Box with finite bounds is
    stretched to -1..1, since a policy begins with a standard deviation of 1; one without is taken as it is.

    Args:
        space: The action space.
        no_change: The action that changes nothing, or None where there is none.

    Attributes:
        sizes: Choices in each column; empty for a Box.
        n_columns: K.
        no_change: The same in columns, (K,), or None.

    Raises:
        InputError: A space of another kind, or an action that it does not contain.
    """

    def __init__(self, space: gymnasium.Space[Any], no_change: Any = None) -> None:
        self.space = space
        if isinstance(space, spaces.Discrete):
            sizes, start = [int(space.n)], np.array([int(space.start)])
        elif isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
            sizes, start = [int(n) for n in space.nvec], np.asarray(space.start, dtype=np.int64)
        elif isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
            sizes, start = [2] * space.shape[0], np.zeros(space.shape[0], dtype=np.int64)
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            sizes, start = [], np.zeros(0, dtype=np.int64)
            low, high = (np.ravel(bound).astype(np.float64) for bound in (space.low, space.high))
            is_finite = np.isfinite(low) & np.isfinite(high) & (high > low)
            self._bounds = np.where(is_finite, low, -1.0), np.where(is_finite, high, 1.0)
            self._limits = space.low, space.high
        else:
            raise InputError(
                f"action space {space}; expected Discrete, MultiDiscrete or MultiBinary with one axis, or a Box of "
                "floats"
            )
        self.sizes, self._start = tuple(sizes), start
        self.n_columns = len(self.sizes) or math.prod(space.shape or ())
        if not self.n_columns:
            raise InputError(f"action space {space} has nothing to choose")
        self.no_change = None if no_change is None else self.encode(no_change)
        if self.no_change is not None and self.sizes and max(self.sizes) == 1:
            raise InputError(f"action space {space} has nothing to choose but no change")

    def encode(self, action: Any) -> Array:
        """(K,) of an action of the space.

        Raises:
            InputError: The space does not contain it.
        """
        try:
            given = np.asarray(action, dtype=self.space.dtype)
        except (TypeError, ValueError) as error:
            raise InputError(f"action {action!r} is not in the action space {self.space}: {error}") from error
        value: Any = int(given) if isinstance(self.space, spaces.Discrete) and given.shape == () else given
        if not self.space.contains(value):
            raise InputError(f"action {action!r} is not in the action space {self.space}")
        if self.sizes:
            return np.asarray(np.ravel(value) - self._start, dtype=np.float64)
        low, high = self._bounds
        return np.asarray(2 * (np.ravel(given) - low) / (high - low) - 1, dtype=np.float64)

    def decode(self, columns: Array) -> Any:
        """The action that (K,) stands for, inside of the space."""
        if isinstance(self.space, spaces.Discrete):
            return int(columns[0]) + int(self._start[0])
        if self.sizes:
            return (columns.astype(np.int64) + self._start).astype(self.space.dtype)
        low, high = self._bounds
        values = (low + (columns + 1) / 2 * (high - low)).reshape(self.space.shape or ())
        return np.clip(values, *self._limits).astype(self.space.dtype)


class Proposals(ABC):
    """What is proposed, given that something is changed.

    Args:
        n_signals: S.
        code: How actions are written as columns.
        learning_rate: Adam's.
        n_steps: Transitions of a rollout (PPO): the newest interventions there are; fewer do until there are as many.
        batch_size: Of a minibatch.
        gamma: Discount per decision.
        seed: Of the first weights, and of what Stable-Baselines3 draws.

    Raises:
        InputError: The space does not suit the algorithm.
    """

    model: BaseAlgorithm

    def __init__(
        self,
        n_signals: int,
        code: ActionCode,
        *,
        learning_rate: float,
        n_steps: int,
        batch_size: int,
        gamma: float,
        seed: int,
    ) -> None:
        self._code, self._seed = code, seed
        self._rate, self._n_steps, self._batch_size, self._gamma = learning_rate, n_steps, batch_size, gamma
        self._n_updates = 0
        self._box = spaces.Box(-BOUND, BOUND, (n_signals,), np.float32)
        with self._lend("first weights"):
            self.model = self._make_model()
            self.model.observation_space, self.model.action_space = self._box, self._own_space()
            self.model.n_envs = 1
            self.model._setup_model()
        self.model.set_logger(Logger(None, []))

    @contextmanager
    def _lend(self, *path: str | int) -> Iterator[None]:
        """Lend the global generators, from which Stable-Baselines3 draws, set by the purpose."""
        state = torch_generator(self._seed, "proposals torch", *path).get_state()
        with scoped_numpy_rng(derive_seed(self._seed, "proposals numpy", *path)), scoped_global_rng([state], _CPU):
            yield

    @abstractmethod
    def _make_model(self) -> BaseAlgorithm:
        """The model, without an environment."""

    @abstractmethod
    def _own_space(self) -> gymnasium.Space[Any]:
        """The model's own action space."""

    @abstractmethod
    def propose(self, x: Tensor, rng: np.random.Generator | None) -> Array:
        """An action for each run, never "no change"; normalised signals (R, S) -> (R, K).

        Args:
            x: See above.
            rng: Where to draw from; None takes the best known.
        """

    @abstractmethod
    def log_prob(self, x: Tensor, actions: Array) -> Array:
        """Log probability (or density) of actions; (R, S), (R, K) -> (R,); 0 where there is none."""

    @abstractmethod
    def _learn(
        self, batch: Batch, x: Tensor, next_x: Tensor, rewards: Array, advantages: Array, timesteps: int
    ) -> None:
        """See `learn`."""

    def learn(self, batch: Batch, x: Tensor, next_x: Tensor, rewards: Array, advantages: Array, timesteps: int) -> None:
        """Learn from transitions.

        Args:
            batch: All that are remembered, the newest last.
            x: Their signals, normalised; (N, S).
            next_x: And those after them; (N, S).
            rewards: In standard deviations around their mean; (N,).
            advantages: Of acting, in the same unit; (N,).
            timesteps: Transitions to draw, in minibatches.
        """
        with self._lend("update", self._n_updates):
            self._learn(batch, x, next_x, rewards, advantages, timesteps)
        self._n_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments and the number of updates; tensors and JSON scalars."""
        policy = self.model.policy
        state: dict[str, Any] = {f"policy.{key}": value.clone() for key, value in policy.state_dict().items()}
        for n, parameter in enumerate(self._learned()):
            kept = policy.optimizer.state.get(parameter) or {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            state |= {f"adam{n}.{key}": value.detach().clone() for key, value in kept.items()}
        return {**state, "n_updates": self._n_updates, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: It does not fit; nothing is changed.
        """
        mine = self.state_dict()
        if set(state) != set(mine):
            raise InputError(f"proposals: the state has the keys {sorted(state)}; expected {sorted(mine)}")
        for key, value in mine.items():
            if isinstance(value, Tensor) and getattr(state[key], "shape", None) != value.shape:
                raise InputError(f"proposals: {key} does not have the shape {tuple(value.shape)}")
        n_updates, seed = int(state["n_updates"]), int(state["seed"])
        policy = self.model.policy
        policy.load_state_dict({k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")})
        for n, parameter in enumerate(self._learned()):
            kept = {key: state[f"adam{n}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            policy.optimizer.state[parameter] = kept
        self._n_updates, self._seed = n_updates, seed

    def _learned(self) -> list[nn.Parameter]:
        return [p for group in self.model.policy.optimizer.param_groups for p in group["params"]]


class PPOProposals(Proposals):
    """PPO's policy; one choice for each column, or a Gaussian."""

    model: PPO

    @override
    def _make_model(self) -> PPO:
        return PPO(
            "MlpPolicy",
            None,  # type: ignore[arg-type]  # as its own `load` does
            learning_rate=self._rate,
            gamma=self._gamma,
            ent_coef=0.01,
            target_kl=TARGET_KL,
            batch_size=self._batch_size,
            policy_kwargs={"net_arch": list(HIDDEN), "activation_fn": nn.Tanh, "log_std_init": LOG_STD},
            device="cpu",
            _init_setup_model=False,
        )

    @override
    def _own_space(self) -> gymnasium.Space[Any]:
        if self._code.sizes:
            return spaces.MultiDiscrete(list(self._code.sizes))
        return spaces.Box(-1.0, 1.0, (self._code.n_columns,), np.float32)

    def _distribution(self, x: Tensor) -> tuple[list[Array], Array]:
        """Probabilities of each column's choices, [(R, n)]; or mean and standard deviation, each (R, K)."""
        with torch.no_grad():
            found = self.model.policy.get_distribution(x)
        if isinstance(found, MultiCategoricalDistribution):
            return [part.probs.double().numpy() for part in found.distribution], np.zeros(0)
        if not isinstance(found, DiagGaussianDistribution):
            raise InputError(f"a policy with a {type(found).__name__}; expected choices or a Gaussian")
        return [found.distribution.mean.double().numpy()], found.distribution.stddev.double().numpy()

    @override
    def propose(self, x: Tensor, rng: np.random.Generator | None) -> Array:
        parts, std = self._distribution(x)
        if not self._code.sizes:
            return parts[0] if rng is None else parts[0] + std * rng.normal(size=parts[0].shape)
        return np.stack([self._choose([part[run] for part in parts], rng) for run in range(len(x))])

    def _choose(self, parts: list[Array], rng: np.random.Generator | None) -> Array:
        """One choice a column; where all of them would change nothing, the likeliest one that does."""
        if rng is None:
            chosen = np.array([int(p.argmax()) for p in parts], dtype=np.float64)
        else:
            chosen = np.array([int(rng.choice(len(p), p=p / p.sum())) for p in parts], dtype=np.float64)
        nothing = self._code.no_change
        if nothing is None or not np.array_equal(chosen, nothing):
            return chosen
        odds = []  # of the best other choice in each column, to what it has now
        for p, keep in zip(parts, nothing.astype(int), strict=True):
            others = np.delete(p, keep)
            odds.append(others.max() / max(p[keep], 1e-12) if len(others) else -1.0)
        column = int(np.argmax(odds)) if rng is None else int(rng.choice(len(odds), p=_shares(odds)))
        others = parts[column].copy()
        others[int(nothing[column])] = -1.0
        chosen[column] = int(others.argmax())
        return chosen

    @override
    def log_prob(self, x: Tensor, actions: Array) -> Array:
        with torch.no_grad():
            given = torch.from_numpy(actions).float()
            _, log_prob, _ = self.model.policy.evaluate_actions(x, given)
        return np.asarray(log_prob.double().numpy())

    @override
    def _learn(
        self, batch: Batch, x: Tensor, next_x: Tensor, rewards: Array, advantages: Array, timesteps: int
    ) -> None:
        del next_x, rewards
        model = self.model
        rows = np.flatnonzero(batch.intervened)
        if len(rows) < self._batch_size:
            return
        log_probs = self.log_prob(x[rows], batch.actions[rows])
        moved = log_probs - batch.log_probs[rows]
        newest = np.flatnonzero(np.abs(moved) <= math.log(MAX_RATIO))[-self._n_steps :]
        if len(newest) < self._batch_size:
            return
        rows, log_probs = rows[newest], log_probs[newest]
        weighted = np.exp(moved[newest]) * advantages[rows]
        with torch.no_grad():
            values = model.policy.predict_values(x[rows]).flatten().numpy()
        n = len(rows)
        buffer = RolloutBuffer(n, self._box, model.action_space, device="cpu", gamma=self._gamma)
        for name, column in {
            "observations": x[rows].numpy(),
            "actions": batch.actions[rows],
            "log_probs": log_probs,
            "values": values,
            "advantages": weighted,
            "returns": values + weighted,
        }.items():
            place = getattr(buffer, name)
            place[:] = np.asarray(column, dtype=place.dtype).reshape(place.shape)
        buffer.pos, buffer.full = n, True
        model.rollout_buffer = buffer
        model.n_epochs = max(1, timesteps // n)
        model.train()


class DQNProposals(Proposals):
    """DQN over all joint choices and one more, which leaves things alone and is never proposed."""

    model: DQN

    @override
    def _make_model(self) -> DQN:
        n_joint = math.prod(self._code.sizes) if self._code.sizes else 0
        if not 0 < n_joint <= MAX_JOINT:
            raise InputError(
                f"dqn has a value for each joint action, and {self._code.space} has "
                f"{n_joint or 'a continuum'}; expected at most {MAX_JOINT}: take agent 'ppo'"
            )
        return DQN(
            "MlpPolicy",
            None,  # type: ignore[arg-type]  # as its own `load` does
            learning_rate=self._rate,
            buffer_size=1,  # the real one is filled at each update
            batch_size=self._batch_size,
            gamma=self._gamma,
            policy_kwargs={"net_arch": list(HIDDEN), "activation_fn": nn.Tanh},
            device="cpu",
            _init_setup_model=False,
        )

    @override
    def _own_space(self) -> spaces.Discrete[np.int64]:
        return spaces.Discrete(math.prod(self._code.sizes) + 1)

    def _joint(self, actions: Array) -> npt.NDArray[np.int64]:
        columns = tuple(actions.astype(np.int64).T)
        return np.asarray(np.ravel_multi_index(columns, self._code.sizes), dtype=np.int64)

    @override
    def propose(self, x: Tensor, rng: np.random.Generator | None) -> Array:
        with torch.no_grad():
            values = self.model.q_net(x).double().numpy()[:, :-1]
        if self._code.no_change is not None and values.shape[1] > 1:
            values[:, self._joint(self._code.no_change[None])[0]] = -np.inf
        chosen = values.argmax(1)
        if rng is not None:
            rate = max(0.05, 1 / (1 + self._n_updates / 4))
            allowed = np.flatnonzero(np.isfinite(values[0]))
            drawn = rng.choice(allowed, len(chosen))
            chosen = np.where(rng.random(len(chosen)) < rate, drawn, chosen)
        return np.stack(np.unravel_index(chosen, self._code.sizes), 1).astype(np.float64)

    @override
    def log_prob(self, x: Tensor, actions: Array) -> Array:
        del x
        return np.zeros(len(actions))

    @override
    def _learn(
        self, batch: Batch, x: Tensor, next_x: Tensor, rewards: Array, advantages: Array, timesteps: int
    ) -> None:
        del advantages
        model, n = self.model, len(rewards)
        if n < self._batch_size:
            return
        nothing = math.prod(self._code.sizes)
        buffer = ReplayBuffer(n, self._box, model.action_space, device="cpu", handle_timeout_termination=False)
        for name, column in {
            "observations": x.numpy(),
            "next_observations": next_x.numpy(),
            "actions": np.where(batch.intervened, self._joint(batch.actions), nothing),
            "rewards": rewards,
            "dones": batch.terminated,
        }.items():
            place = getattr(buffer, name)
            place[:] = np.asarray(column, dtype=place.dtype).reshape(place.shape)
        buffer.pos, buffer.full = 0, True
        model.replay_buffer = buffer
        model.q_net_target.load_state_dict(model.q_net.state_dict())
        model.train(max(1, timesteps // self._batch_size), self._batch_size)


def _shares(odds: list[float]) -> Array:
    positive = np.maximum(np.array(odds), 0.0)
    return positive / positive.sum() if positive.sum() > 0 else np.full(len(odds), 1 / len(odds))


KINDS: dict[str, type[Proposals]] = {"ppo": PPOProposals, "dqn": DQNProposals}

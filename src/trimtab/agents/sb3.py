"""PPO and DQN of Stable-Baselines3, taught a whole episode of all runs at a time.

Called by the learners; beside envs/sb3.py the only file that imports stable_baselines3. Sources: Schulman et al. 2017,
arXiv:1707.06347; Mnih et al. 2015, Nature 518:529-533; settings: FINDINGS section 5 and its record, section 3.

Stable-Baselines3 draws from the global generators of torch and NumPy and saves with cloudpickle. Here the generators
are lent to it for one iteration, set from (seed, number of the iteration), and what has to be kept is taken out as
tensors: so iteration i is the same whether or not the learner was saved before it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from typing_extensions import override

from trimtab.agents.policy import PolicyAgent
from trimtab.errors import InputError
from trimtab.seeding import derive_seed, scoped_global_rng, scoped_numpy_rng, torch_generator

__all__ = ["DQNOptions", "DQNTrainer", "PPOOptions", "PPOTrainer", "Trainer"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Options:
    """What both have.

    Attributes:
        iterations: Iterations over which exploration falls from its first to its last value; it stays there.
        learning_rate: Adam's.
        batch_size: Transitions in a minibatch; PPO's are made equal and so may be a little larger or smaller.
        gamma: Discount per decision; 1, because the reward comes at the end.
    """

    iterations: int = 300
    learning_rate: float = 1e-3
    batch_size: int = 2048
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value, kind = getattr(self, item.name), type(item.default)
            fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
            low = 1 if kind is int else 0
            if not fits or not low <= value < math.inf:
                expected = "a whole number of 1 or more" if kind is int else "a number of 0 or more"
                raise InputError(f"learner's option {item.name} is {value!r}; expected {expected}")
            if value > 1 and item.name in ("gamma", "gae_lambda", "epsilon", "epsilon_end", "cooldown"):
                raise InputError(f"learner's option {item.name} is {value!r}; expected a number in [0, 1]")

    def between(self, first: float, last: float, iteration: int) -> float:
        """A number that goes in a straight line from `first` to `last`."""
        return first + (last - first) * min(1.0, iteration / max(1, self.iterations - 1))


@dataclass(frozen=True)
class PPOOptions(_Options):
    """PPO's settings.

    Attributes:
        epochs: Passes over the rollout.
        clip: Range of the probability ratio, 1 - clip to 1 + clip.
        gae_lambda: 0 is one-step TD, 1 is Monte Carlo.
        entropy: Weight of the entropy bonus in the first iteration.
        entropy_end: And in the last.
        value_weight: Weight of the value loss.
        max_grad_norm: Gradients are shortened to this norm.
        cooldown: Share of the iterations, the last ones, in which exploration stays at its last value and Adam's rate
            falls in a straight line towards 0.
    """

    # An episode costs a hundred times what an update does: as many updates as the clip allows.
    batch_size: int = 256
    epochs: int = 8
    clip: float = 0.2
    gae_lambda: float = 0.97
    entropy: float = 0.02
    entropy_end: float = 0.002
    value_weight: float = 0.5
    max_grad_norm: float = 0.5
    cooldown: float = 0.0

    @property
    def n_warm(self) -> int:
        """Iterations before the cooldown."""
        return self.iterations - round(self.cooldown * self.iterations)

    @override
    def between(self, first: float, last: float, iteration: int) -> float:
        return first + (last - first) * min(1.0, iteration / max(1, self.n_warm - 1))

    def learning_rate_at(self, iteration: int) -> float:
        """Adam's rate in an iteration, counted from 0; after the last it is that of the last."""
        n_left = self.iterations - min(iteration, self.iterations - 1)
        return self.learning_rate * min(1.0, n_left / (self.iterations - self.n_warm + 1))


@dataclass(frozen=True)
class DQNOptions(_Options):
    """DQN's settings.

    Attributes:
        gradient_steps: Minibatches after each iteration's episodes; then the target network is set to the other.
        n_step: Rewards added up before a value is bootstrapped: the reward comes tens of decisions late.
        buffer_size: Transitions kept; the oldest go first.
        epsilon: Share of random moves in the first iteration.
        epsilon_end: And in the last.
        max_grad_norm: Gradients are shortened to this norm.
    """

    batch_size: int = 512
    gradient_steps: int = 64
    n_step: int = 10
    buffer_size: int = 100_000
    epsilon: float = 1.0
    epsilon_end: float = 0.05
    max_grad_norm: float = 10.0


class Trainer(ABC):
    """A model of Stable-Baselines3 that learns the weights of a policy agent.

    Args:
        agent: What is learned for: its features, widths, moves and knobs hold, its weights are not used.
        seed: Root of all that is drawn.
        options: The learner's options by name.

    Attributes:
        action_space: What one run chooses: the index of a move, one for each knob.
        model: The model of Stable-Baselines3.

    Raises:
        InputError: An option is unknown or out of range.
    """

    options_class: ClassVar[type[_Options]]
    model: BaseAlgorithm

    def __init__(self, agent: PolicyAgent, seed: int, options: Mapping[str, Any]) -> None:
        self._agent = agent
        self._seed = seed
        n_moves = len(agent.moves)
        self.action_space: gymnasium.Space[Any] = (
            gymnasium.spaces.Discrete(n_moves)
            if agent.n_knobs == 1
            else gymnasium.spaces.MultiDiscrete([n_moves] * agent.n_knobs)
        )
        self._configure(options)
        with self._lend("first weights"):
            self.model = self._make_model()
        self.model.set_logger(Logger(None, []))

    @contextmanager
    def _lend(self, *path: str | int) -> Iterator[None]:
        """Lend the global generators for one purpose, set by it; what was drawn elsewhere is not moved."""
        state = torch_generator(self._seed, "sb3 torch", *path).get_state()
        with scoped_numpy_rng(derive_seed(self._seed, "sb3 numpy", *path)), scoped_global_rng([state], _CPU):
            yield

    @abstractmethod
    def _configure(self, options: Mapping[str, Any]) -> None:
        """Read and keep the options."""

    @abstractmethod
    def _make_model(self) -> BaseAlgorithm:
        """The model, without an environment."""

    @abstractmethod
    def _prepare(self, n_runs: int, n_decisions: int, iteration: int) -> None:
        """Set the model up for an iteration of so many runs and decisions."""

    @abstractmethod
    def _layers(self) -> list[nn.Linear]:
        """The linear layers of what decides, in order."""

    @abstractmethod
    def _numbers(self) -> dict[str, float]:
        """What the model has logged of the iteration."""

    def _set_up(self, model: BaseAlgorithm) -> None:
        """As `load` of Stable-Baselines3 does it: spaces first, then the networks; no environment is needed."""
        shape = (len(self._agent.features.signals),)
        model.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        model.action_space = self.action_space
        model.n_envs = 1
        model._setup_model()

    def iterate(self, view: VecEnv, n_decisions: int, iteration: int) -> dict[str, float]:
        """Let every run of the view play one whole episode, then learn from it.

        Args:
            view: The environment; its `reset` begins the episodes.
            n_decisions: Decisions of an episode.
            iteration: Number of the iteration, from 0; it sets what is drawn and how much is explored.

        Returns:
            What was logged: loss, and what each algorithm has beside it.

        Raises:
            InputError: A run does not end exactly with decision `n_decisions`.
        """
        model = self.model
        self._prepare(view.num_envs, n_decisions, iteration)
        with self._lend("iteration", iteration):
            model.n_envs = view.num_envs
            model.set_env(view)
            model.learn(
                n_decisions * view.num_envs,
                callback=_WholeEpisodes(n_decisions),
                log_interval=None,  # type: ignore[arg-type]  # None is what turns its printing off
                reset_num_timesteps=False,
            )
        return self._numbers()

    def _logged(self, key: str) -> float:
        return float(self.model.logger.name_to_value[key])

    def export(self) -> PolicyAgent:
        """The agent that acts as the model would, without torch."""
        agent = type(self._agent)(**self._agent.options, n_knobs=self._agent.n_knobs, seed=self._seed)
        state = agent.state_dict()
        for index, layer in enumerate(self._layers()):
            state[f"w{index}"] = layer.weight.detach().T[None].to(torch.float64)
            state[f"b{index}"] = layer.bias.detach()[None, None].to(torch.float64)
        agent.load_state_dict(state)
        return agent

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned, as tensors and JSON scalars; generators need none, see the head of the file."""
        policy = self.model.policy
        return {
            "policy": {key: value.clone() for key, value in policy.state_dict().items()},
            "optimizer": _copy(policy.optimizer.state_dict()),
            "n_decisions": self.model.num_timesteps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: The state does not fit; nothing is changed.
        """
        mine = self.state_dict()
        if set(state) != set(mine):
            raise InputError(f"{self._agent.name}: the state has the keys {sorted(state)}; expected {sorted(mine)}")
        try:
            self._load(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self._load(mine)
            raise InputError(f"the state does not fit this learner of {self._agent.name!r}: {error}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        policy = self.model.policy
        policy.load_state_dict(state["policy"])
        policy.optimizer.load_state_dict(_copy(state["optimizer"]))
        for parameter, moments in policy.optimizer.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if moments[key].shape != parameter.shape:
                    raise InputError(f"{key} has the shape {tuple(moments[key].shape)}, not {tuple(parameter.shape)}")
        self.model.num_timesteps = int(state["n_decisions"])


class PPOTrainer(Trainer):
    """PPO with separate networks for policy and value, of the agent's widths."""

    options_class = PPOOptions
    model: PPO

    @override
    def _configure(self, options: Mapping[str, Any]) -> None:
        self.options = PPOOptions(**options)

    @override
    def _make_model(self) -> PPO:
        options, hidden = self.options, list(self._agent.hidden)
        model = PPO(
            "MlpPolicy",
            None,  # type: ignore[arg-type]  # as its own `load` does
            learning_rate=options.learning_rate,
            n_epochs=options.epochs,
            gamma=options.gamma,
            gae_lambda=options.gae_lambda,
            clip_range=options.clip,
            vf_coef=options.value_weight,
            max_grad_norm=options.max_grad_norm,
            policy_kwargs={"net_arch": {"pi": hidden, "vf": hidden}, "activation_fn": nn.Tanh},
            device="cpu",
            _init_setup_model=False,
        )
        self._set_up(model)
        # Its last layer starts a hundredth as large as the others already; "no change" is made the likeliest move.
        with torch.no_grad():
            bias: torch.Tensor = model.policy.action_net.bias  # type: ignore[assignment]
            bias.view(self._agent.n_knobs, -1)[:, self._agent.keep] = 1.0
        return model

    @override
    def _prepare(self, n_runs: int, n_decisions: int, iteration: int) -> None:
        model, total = self.model, n_runs * n_decisions
        rate = self.options.learning_rate_at(iteration)
        model.lr_schedule = lambda _: rate
        model.ent_coef = self.options.between(self.options.entropy, self.options.entropy_end, iteration)
        # Equal minibatches: its own division would leave a small one at the end, as heavy as the others.
        model.batch_size = math.ceil(total / max(1, round(total / self.options.batch_size)))
        model.n_steps = n_decisions
        model.rollout_buffer = RolloutBuffer(
            n_decisions,
            model.observation_space,
            model.action_space,
            device="cpu",
            gamma=self.options.gamma,
            gae_lambda=self.options.gae_lambda,
            n_envs=n_runs,
        )

    @override
    def _layers(self) -> list[nn.Linear]:
        policy = self.model.policy
        return [
            layer for layer in [*policy.mlp_extractor.policy_net, policy.action_net] if isinstance(layer, nn.Linear)
        ]

    @override
    def _numbers(self) -> dict[str, float]:
        return {
            "loss": self._logged("train/loss"),
            "value_loss": self._logged("train/value_loss"),
            "entropy": -self._logged("train/entropy_loss"),
            "kl": self._logged("train/approx_kl"),
            "clip_share": self._logged("train/clip_fraction"),
        }


class DQNTrainer(Trainer):
    """DQN with n-step returns; one knob, since it has one value for each move.

    Raises:
        InputError: The agent moves several knobs.
    """

    options_class = DQNOptions
    model: DQN

    @override
    def _configure(self, options: Mapping[str, Any]) -> None:
        self.options = DQNOptions(**options)
        if self._agent.n_knobs > 1:
            raise InputError(
                f"dqn moves one knob, the spec has {self._agent.n_knobs}; take 'ppo', which chooses for each"
            )

    @override
    def _make_model(self) -> DQN:
        options = self.options
        model = _ExploringDQN(
            "MlpPolicy",
            None,  # type: ignore[arg-type]  # as its own `load` does
            learning_rate=options.learning_rate,
            buffer_size=1,  # the real one is made when the number of runs is known
            learning_starts=0,
            batch_size=options.batch_size,
            gamma=options.gamma,
            gradient_steps=options.gradient_steps,
            replay_buffer_class=NStepReplayBuffer,
            replay_buffer_kwargs={"n_steps": options.n_step, "gamma": options.gamma},
            target_update_interval=2**62,  # it is set once an iteration, in `_prepare`
            max_grad_norm=options.max_grad_norm,
            policy_kwargs={"net_arch": list(self._agent.hidden), "activation_fn": nn.Tanh},
            device="cpu",
            _init_setup_model=False,
        )
        self._set_up(model)
        model.replay_buffer = None
        return model

    def _make_buffer(self, n_runs: int) -> NStepReplayBuffer:
        model = self.model
        return NStepReplayBuffer(
            self.options.buffer_size,
            model.observation_space,
            model.action_space,
            device="cpu",
            n_envs=n_runs,
            n_steps=self.options.n_step,
            gamma=self.options.gamma,
        )

    @override
    def _prepare(self, n_runs: int, n_decisions: int, iteration: int) -> None:
        model, buffer = self.model, self.model.replay_buffer
        if self.options.buffer_size < n_runs * n_decisions:
            raise InputError(
                f"dqn: buffer_size is {self.options.buffer_size}; expected room for one iteration, "
                f"{n_runs} runs of {n_decisions} decisions"
            )
        if buffer is None:
            model.replay_buffer = self._make_buffer(n_runs)
        elif buffer.n_envs != n_runs:
            raise InputError(
                f"dqn: an environment of {n_runs} runs, but what is remembered came from {buffer.n_envs}; "
                "keep to one size"
            )
        model.train_freq = TrainFreq(n_decisions, TrainFrequencyUnit.STEP)  # type: ignore[assignment]
        rate = self.options.between(self.options.epsilon, self.options.epsilon_end, iteration)
        model.exploration_rate = rate
        model.exploration_schedule = lambda _: rate
        model.q_net_target.load_state_dict(model.q_net.state_dict())

    @override
    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.model.q_net.q_net if isinstance(layer, nn.Linear)]

    @override
    def _numbers(self) -> dict[str, float]:
        return {"loss": self._logged("train/loss"), "epsilon": float(self.model.exploration_rate)}

    @override
    def state_dict(self) -> dict[str, Any]:
        buffer = self.model.replay_buffer
        kept: dict[str, Any] | None = None
        if buffer is not None:
            kept = {key: torch.from_numpy(getattr(buffer, key)[: _filled(buffer)].copy()) for key in _REMEMBERED}
            kept |= {"position": buffer.pos, "is_full": buffer.full}
        return {**super().state_dict(), "remembered": kept}

    @override
    def _load(self, state: Mapping[str, Any]) -> None:
        kept, buffer = state["remembered"], None
        if kept is not None:
            buffer = self._make_buffer(kept["rewards"].shape[1])
            buffer.pos, buffer.full = int(kept["position"]), bool(kept["is_full"])
            for key in _REMEMBERED:
                getattr(buffer, key)[: _filled(buffer)] = kept[key].numpy()
        super()._load(state)
        self.model.replay_buffer = buffer


_REMEMBERED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def _filled(buffer: ReplayBuffer) -> int:
    return int(buffer.buffer_size if buffer.full else buffer.pos)


class _ExploringDQN(DQN):
    """DQN in which each run explores by itself; the original's draw is one for all runs of a step."""

    @override
    def predict(  # type: ignore[override]
        self,
        observation: npt.NDArray[Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], Any]:
        chosen, state = self.policy.predict(observation, state, episode_start, deterministic=True)
        if deterministic:
            return chosen, state
        explores = np.random.random(len(chosen)) < self.exploration_rate  # noqa: NPY002 (lent by Trainer)
        drawn = np.random.randint(0, self.action_space.n, len(chosen))  # type: ignore[attr-defined]  # noqa: NPY002
        return np.where(explores, drawn, chosen), state


class _WholeEpisodes(BaseCallback):
    """Stop with an error, before anything is learned, where a rollout is not one whole episode of every run."""

    def __init__(self, n_decisions: int) -> None:
        super().__init__()
        self._n_decisions = n_decisions

    def _on_step(self) -> bool:
        is_over, count = self.locals["dones"], self.n_calls
        if is_over.any() if count < self._n_decisions else not is_over.all():
            raise InputError(
                f"{int(is_over.sum())} of {len(is_over)} runs have ended after {count} decisions; expected all of them "
                f"after {self._n_decisions}, as the spec's timing or the environment's `n_decisions` says"
            )
        return True


def _copy(value: Any) -> Any:
    """A nest with its tensors copied: optimizers write into theirs."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value

"""WidthPolicy: PPO of Stable-Baselines3 on short episodes in which one number is chosen at a time.

Called by `trimtab.pruner`, which gives it the environment. Source: Schulman et al. 2017, arXiv:1707.06347. With the
write-up's rate of 3e-4 the policy needs thousands of episodes; with 3e-3 it converges in three hundred (FINDINGS
section 4). An episode has one reward at its end, so values are not bootstrapped (gae_lambda 1) and not discounted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor

from trimtab.errors import InputError
from trimtab.seeding import derive_seed, scoped_global_rng, scoped_numpy_rng, torch_generator

__all__ = ["PRESETS", "WidthOptions", "WidthPolicy", "shapes_of"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class WidthOptions:
    """Settings of PPO, by the names of Stable-Baselines3.

    Attributes:
        learning_rate: Adam's.
        n_steps: Environment steps between two updates.
        batch_size: Of a minibatch.
        n_epochs: Passes over what was gathered.
        gamma: Discount per step.
        gae_lambda: 1 is Monte Carlo.
        clip_range: Of the probability ratio.
        ent_coef: Weight of the entropy bonus.
        hidden: Units of each of the two hidden layers.
    """

    learning_rate: float = 3e-3
    n_steps: int = 64
    batch_size: int = 64
    n_epochs: int = 10
    gamma: float = 1.0
    gae_lambda: float = 1.0
    clip_range: float = 0.2
    ent_coef: float = 0.01
    hidden: int = 64

    def __post_init__(self) -> None:
        for item in fields(self):
            value, kind = getattr(self, item.name), type(item.default)
            is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < (1 if kind is int else 0):
                expected = "a whole number of 1 or more" if kind is int else "a number of 0 or more"
                raise InputError(f"agent's option {item.name} is {value!r}; expected {expected}")


PRESETS = {
    "ppo": WidthOptions(learning_rate=1e-3),  # from what it was taught before; faster, it forgets that
    "ppo-untaught": WidthOptions(),
    "paper": WidthOptions(
        learning_rate=3e-4, gamma=0.99, gae_lambda=0.95, ent_coef=0.0
    ),  # clip, epochs, batch as above
}


def shapes_of(n_features: int, n_actions: int, hidden: int = WidthOptions.hidden) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a policy."""
    layers = {"action_net": (n_actions, hidden), "value_net": (1, hidden)}
    for net in ("policy_net", "value_net"):
        layers |= {f"mlp_extractor.{net}.0": (hidden, n_features), f"mlp_extractor.{net}.2": (hidden, hidden)}
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in layers.items()}
    return found | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


class WidthPolicy:
    """A policy and a value, learned by acting.

    Args:
        env: Its spaces are taken: a Box of one axis and a Discrete.
        options: PPO's.
        seed: Of everything that is drawn.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], options: WidthOptions, *, seed: int) -> None:
        self._seed, self._n_learned = seed, 0
        settings: dict[str, Any] = asdict(options)
        hidden = settings.pop("hidden")
        with self._lend("first weights"):
            self.model = PPO(
                "MlpPolicy", env, device="cpu", verbose=0, policy_kwargs={"net_arch": [hidden, hidden]}, **settings
            )
        self.model.policy.float()  # as the observations are, whatever torch's default type is
        self.model.set_logger(Logger(None, []))

    @contextmanager
    def _lend(self, *path: str | int) -> Iterator[None]:
        """Lend the global generators, from which Stable-Baselines3 draws, set by the purpose."""
        state = torch_generator(self._seed, "widths torch", *path).get_state()
        with scoped_numpy_rng(derive_seed(self._seed, "widths numpy", *path)), scoped_global_rng([state], _CPU):
            yield

    def learn(self, n_steps: int, is_enough: Callable[[], bool]) -> None:
        """Act in the environment and learn from it.

        Args:
            n_steps: Environment steps at most.
            is_enough: Asked after every step; True ends it at once.
        """
        self._n_learned += 1
        with self._lend("learning", self._n_learned), torch.enable_grad():
            self.model.learn(n_steps, callback=_Until(is_enough), log_interval=None)  # type: ignore[arg-type]

    def act(self, observation: Any, *, deterministic: bool = True) -> int:
        """An action for one observation."""
        action, _ = self.model.predict(observation, deterministic=deterministic)
        return int(np.asarray(action))

    def weights(self) -> dict[str, Tensor]:
        """Weights of policy and value."""
        return {name: tensor.detach().clone() for name, tensor in self.model.policy.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Inverse of `weights`.

        Raises:
            InputError: They are those of another network; nothing is changed.
        """
        own = self.model.policy.state_dict()
        given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if given != expected:
            raise InputError(f"the policy's weights are {given}; expected {expected}: it was made for other features")
        self.model.policy.load_state_dict(dict(weights))


class _Until(BaseCallback):
    """Ends learning when somebody says so."""

    def __init__(self, is_enough: Callable[[], bool]) -> None:
        super().__init__()
        self._is_enough = is_enough

    def _on_step(self) -> bool:
        return not self._is_enough()

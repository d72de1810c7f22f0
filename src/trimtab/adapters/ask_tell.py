"""HyperParameterOptimizer: ask and tell, for whoever steps the training run: the tuner that learns when to intervene.

Called by users. The environment is asked for its spaces, and for `hyperparameters`, `decode` and `no_change_action`
where it has them; it is never reset or stepped, so that what is learned here does not disturb the run under way.
docs/tuner.md says what is learned, from what, and how many decisions that takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from trimtab.agents.base import Array
from trimtab.agents.intervention import Batch
from trimtab.agents.tuner import InterventionLearner, TunerOptions, make_options
from trimtab.errors import BrainError, InputError, unknown_name, warn
from trimtab.experience import ExperienceStore, Transitions
from trimtab.storage import load_state, save_state
from trimtab.version import __version__

__all__ = ["HyperParameterOptimizer"]

FORMAT, VERSION = "trimtab-tuner", 1
_LEAST = 10  # decisions, before which a mean reward says too little to be the best
LATEST, BEST = "latest.safetensors", "best.safetensors"
_OWN = ("brain_save_dir", "experience_dir", "seed")
_COLUMNS = ("intervened", "log_prob")  # of a transition, beside what every experience has


class HyperParameterOptimizer:
    """Decide at each question whether to intervene in a training run, and with which hyperparameters.

        tuner = trimtab.HyperParameterOptimizer(env, config)
        hyperparams = tuner.optimize_hyperparameters(observation)        # dict, or None: leave everything as it is
        ...                                                              # apply them, train on, measure
        tuner.learn_from_intervention(new_observation, reward, intervened=hyperparams is not None)

    Args:
        env: A Gymnasium environment, or anything with `observation_space` and `action_space`. Observations are
            flattened. Actions: Discrete, MultiDiscrete or MultiBinary with one axis, or a Box of floats.
        config: Settings by name: those of `TunerOptions`, "brain_save_dir" (folder of `save_brain`; default
            "models/rl_brains"), "seed" (default 0) and "experience_dir" (folder of transitions of earlier runs, which
            are learned from at once, and to which `save_brain`, `close` and the end of a run add those of this one;
            default None: neither).

    Attributes:
        options: The settings in use.
        learner: What learns.
        last_action: The action behind the last answer, as the environment's `step` takes it: the environment's
            `no_change_action` where the answer was None, and None where it has none.
        probability: That acting beats no change, as it was judged at the last question; NaN before.

    Raises:
        InputError: A setting is unknown or out of range, or a space cannot be learned on; the message names it.
    """

    def __init__(self, env: Any, config: Mapping[str, Any] | None = None) -> None:
        if config is not None and not isinstance(config, Mapping):
            raise InputError(f"config is a {type(config).__name__}; expected a dict of settings, or None")
        given = dict(config or {})
        known = [*(item.name for item in fields(TunerOptions)), *_OWN]
        for key in given:
            if key not in known:
                raise unknown_name("key of the configuration", key, known)
        folder, seed = given.pop("brain_save_dir", "models/rl_brains"), given.pop("seed", 0)
        experience = given.pop("experience_dir", None)
        for key, value in (("brain_save_dir", folder), ("experience_dir", experience)):
            if not (isinstance(value, Path) or (isinstance(value, str) and value)) and not (
                value is None and key == "experience_dir"
            ):
                raise InputError(f"{key} is {value!r}; expected a folder")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed is {seed!r}; expected a whole number of 0 or more")
        self.options = make_options(given)
        self._folder = Path(folder)
        inner = getattr(env, "unwrapped", env)
        self._space = _space_of(env, "observation_space")
        self._inner = inner
        self._names = _names_of(inner)
        self._no_change = getattr(inner, "no_change_action", None)
        try:
            flat: gymnasium.Space[Any] = spaces.flatten_space(self._space)
        except NotImplementedError:
            flat = self._space
        if not isinstance(flat, spaces.Box) or not flat.shape[0]:
            raise InputError(f"observation space {self._space}; expected one that flattens to a Box of numbers")
        self.learner = InterventionLearner(
            flat.shape[0], _space_of(env, "action_space"), self.options, no_change=self._no_change, seed=seed
        )
        n_columns = self.learner.code.n_columns
        if self._names is not None and not hasattr(inner, "decode") and len(self._names) != n_columns:
            raise _names_differ(self._names, n_columns)
        self.last_action: Any = self._no_change
        self.probability = float("nan")
        self._asked: tuple[Array, Array, bool] | None = None
        self._count, self._since = 0, self.options.min_distance
        self._best: float | None = None
        self._has_warned = False
        self._store = None if experience is None else ExperienceStore(experience)
        if self._store is not None:
            earlier = self._store.read(self.fingerprint, newest=self.options.max_transitions, columns=_COLUMNS)
            self.learner.learn_from_earlier(_batch_of(earlier))
        self._n_stored = self.learner.n_seen

    @property
    def threshold(self) -> float:
        """What `probability` has to lie above now."""
        return self.learner.gate.threshold

    def optimize_hyperparameters(self, observation: Any, *, deterministic: bool = False) -> dict[str, Any] | None:
        """Ask whether to intervene, and how.

        Args:
            observation: What the observation space describes. Numbers that are not finite count as average ones.
            deterministic: Do not explore: neither by a coin that decides in place of the threshold now and then, nor
                by drawing what to change.

        Returns:
            None: leave everything as it is. Else a dict. Keys: the environment's `hyperparameters` where it has them,
            else "action_0", "action_1", ...; values: what its `decode(action)` gives, else the action's numbers.

        Raises:
            InputError: The observation does not fit the space, or `decode` gave another number of values than there
                are names.
        """
        seen = self._flatten(observation)
        intervenes, proposed = self._decide(seen, deterministic=deterministic)
        action = self.learner.code.decode(proposed[0]) if intervenes else self._no_change
        answer = self._by_name(action) if intervenes else None
        self._asked, self.last_action = (seen, proposed, intervenes), action
        return answer

    def _decide(self, seen: Array, *, deterministic: bool = False) -> tuple[bool, Array]:
        """Whether to intervene, and what with, (1, K)."""
        acts, probability, proposed = self.learner.decide(seen, deterministic=deterministic)
        self.probability = float(probability[0])
        may_act = self._count >= self.options.burn_in and self._since >= self.options.min_distance
        # A Gaussian that is cut at its bounds may come to lie on the action that changes nothing.
        code = self.learner.code
        is_nothing = code.no_change is not None and np.array_equal(
            np.asarray(code.decode(proposed[0])), np.asarray(code.decode(code.no_change))
        )
        return bool(acts[0]) and may_act and not is_nothing, proposed

    def learn_from_intervention(
        self, new_observation: Any, reward: float, intervened: bool, *, terminated: bool = False
    ) -> None:
        """Tell what followed the last answer; now and then this trains, which takes a few tenths of a second.

        Args:
            new_observation: After the interval that followed.
            reward: Of that interval, higher is better; not finite counts as worse than all before.
            intervened: Whether hyperparameters were applied. False for an answer that was not followed.
            terminated: Whether the run has ended and nothing follows; the next question begins a new one.

        Raises:
            InputError: Nothing was asked before, or `intervened` is True where the answer was None.
        """
        if self._asked is None:
            raise InputError("learn_from_intervention() before optimize_hyperparameters(); ask first")
        for key, value in (("intervened", intervened), ("terminated", terminated)):
            if not isinstance(value, (bool, np.bool_)):
                raise InputError(f"{key} is {value!r}; expected True or False")
        seen, proposed, was_told = self._asked
        if intervened and not was_told:
            raise InputError("intervened is True, but the answer was None: nothing was there to be applied")
        try:
            if isinstance(reward, (str, bool)):
                raise TypeError("no number")
            number = float(reward)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"reward is {reward!r}; expected one number") from None
        then = self._flatten(new_observation)
        self._asked = None
        self._take_in(seen, proposed, number, then, did=bool(intervened), ends=bool(terminated))
        is_full = self.learner.n_seen - self._n_stored >= self.options.max_transitions
        if terminated or (is_full and self._store is not None):
            try:
                self.close()
            except InputError as error:  # a full disk must not end the training that is being watched
                warn(f"this run's transitions were not stored: {error}")

    def _take_in(self, seen: Array, proposed: Array, reward: float, then: Array, *, did: bool, ends: bool) -> None:
        """Record one decision, and count it."""
        self.learner.record(seen, proposed, np.array([reward]), then, np.array([ends]), np.array([did]))
        self._count += 1
        self._since = 1 if did else self._since + 1
        if ends:
            self._begin_run()

    def _begin_run(self) -> None:
        self._count, self._since = 0, self.options.min_distance

    @property
    def fingerprint(self) -> str:
        """What experience of this tuner is filed under: the same spaces and hyperparameters, the same digits."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()[:16]

    def close(self) -> None:
        """Add this run's transitions to "experience_dir", as a file of their own; without one there is nothing to do.

        Raises:
            InputError: They cannot be stored (OutputError: the folder cannot be written).
        """
        self._close(type(self._inner).__name__)

    def _close(self, task: str) -> None:
        batch, first = self.learner.batch, self._n_stored
        new = batch.numbers >= first
        if self._store is None or not new.any():
            return
        names = self._names or [f"action_{n}" for n in range(batch.actions.shape[1])]
        signals = [f"observation_{n}" for n in range(batch.observations.shape[1])]
        transitions = Transitions(
            batch.observations[new],
            batch.actions[new],
            batch.rewards[new],
            batch.next_observations[new],
            batch.terminated[new],
            {"intervened": batch.intervened[new], "log_prob": batch.log_probs[new]},
        )
        spec = {"knobs": list(names), "signals": signals, **self._identity()}
        run = {"task": task, "agent": f"tuner, {self.options.agent}"}
        self._store.append(transitions, spec=spec, fingerprint=self.fingerprint, run=run)
        self._n_stored = self.learner.n_seen

    def learn(self, env: Any, total_timesteps: int) -> HyperParameterOptimizer:
        """Gain experience in a cheap environment with the same spaces, by asking and telling; then go on elsewhere.

        Args:
            env: Has `no_change_action`; it is reset and stepped.
            total_timesteps: Decisions to take.

        Raises:
            InputError: Its spaces are others, it has no `no_change_action`, or the number is not positive.
        """
        inner = getattr(env, "unwrapped", env)
        for key, mine in (("observation_space", self._space), ("action_space", self.learner.code.space)):
            if _space_of(env, key) != mine:
                raise InputError(f"learn: the {key} is {_space_of(env, key)}; expected that of the tuner, {mine}")
        nothing = getattr(inner, "no_change_action", None)
        if nothing is None:
            raise InputError("learn: the environment has no `no_change_action`, so that it cannot be left alone")
        if isinstance(total_timesteps, bool) or not isinstance(total_timesteps, int) or total_timesteps < 1:
            raise InputError(f"total_timesteps is {total_timesteps!r}; expected a whole number of 1 or more")
        self._asked = None
        self._begin_run()
        observation, infos = env.reset(seed=self.learner.draw_seed())
        for _ in range(total_timesteps):
            seen = self._flatten(observation)
            acts, proposed = self._decide(seen)
            # After a roll-back ours does what the guard says, and the action counts for nothing.
            acts = acts and not infos.get("rolled_back", False)
            action = self.learner.code.decode(proposed[0]) if acts else nothing
            observation, reward, terminated, truncated, infos = env.step(action)
            then = self._flatten(observation)
            self._take_in(seen, proposed, float(reward), then, did=acts, ends=bool(terminated))
            if terminated or truncated:
                self._close(type(inner).__name__)
                observation, infos = env.reset()
                self._begin_run()
        self._close(type(inner).__name__)
        self._begin_run()
        return self

    # ---- keeping ------------------------------------------------------------------------------------------------

    def save_brain(self, path: str | Path | None = None) -> Path:
        """Save everything that was learned and remembered; numbers and names, nothing that can run.

        Args:
            path: File; None writes "latest.safetensors" in `brain_save_dir` and, where the running mean of the reward
                is the best of all that were saved so, after ten decisions or more, "best.safetensors" beside it.

        Transitions since the last time go to "experience_dir" afterwards, where there is one.

        Returns:
            The file.

        Raises:
            OutputError: It cannot be written.
        """
        mean = self.learner.gate.recent_reward
        if path is None and self._best is None:
            self._best = _best_of(self._folder / BEST)
        is_best = path is None and self.learner.gate.n_decisions >= _LEAST and (self._best is None or mean > self._best)
        if is_best:
            self._best = mean
        state = {
            "format": FORMAT,
            "version": VERSION,
            "trimtab": __version__,
            "spaces": self._identity(),
            "config": asdict(self.options),
            "counts": [self._count, self._since],
            "asked": None if self._asked is None else [_tensor(part) for part in self._asked],
            "best": self._best,
            "learner": self.learner.state_dict(),
        }
        place = self._folder / LATEST if path is None else Path(path)
        save_state(place, state)
        if is_best:
            save_state(self._folder / BEST, state)
        self.close()
        return place

    def load_brain(self, path: str | Path | None = None) -> None:
        """Go on from what `save_brain` wrote.

        Args:
            path: A file, or a folder with "latest.safetensors"; None: `brain_save_dir`.

        Raises:
            BrainError: It is missing, torn, foreign or of a future version, or was learned on other spaces or with
                another agent; nothing is changed.
        """
        place = self._folder if path is None else Path(path)
        place = place / LATEST if place.is_dir() or path is None else place
        try:
            state = load_state(place)
        except InputError as error:
            raise BrainError(str(error)) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise BrainError(f"{place} is no tuner; expected a file that HyperParameterOptimizer.save_brain wrote")
        if state.get("version") != VERSION:
            raise BrainError(
                f"{place} has version {state.get('version')!r}, this trimtab reads version {VERSION}; upgrade trimtab"
            )
        mine = {**self._identity(), "agent": self.options.agent}
        theirs = {**dict(state.get("spaces") or {}), "agent": dict(state.get("config") or {}).get("agent")}
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise BrainError(f"{place} was learned with {key} {theirs.get(key)}, this tuner has {value}")
        try:
            count, since = (int(number) for number in state["counts"])
            best = None if state["best"] is None else float(state["best"])
            asked = None if state["asked"] is None else [part.numpy() for part in state["asked"]]
            self.learner.load_state_dict(state["learner"])
            self._n_stored = self.learner.n_seen
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BrainError(f"{place}: {error}; it is torn or foreign, save it anew") from error
        self._count, self._since, self._best = count, since, best
        self._asked = None if asked is None else (asked[0], asked[1], bool(asked[2]))

    def _identity(self) -> dict[str, Any]:
        names = None if self._names is None else list(self._names)
        code = self.learner.code
        control = getattr(self._inner, "control_spec", None)
        return {
            "observations": _describe(self._space),
            "actions": _describe(code.space),
            "no_change": None if code.no_change is None else code.no_change.tolist(),
            "hyperparameters": names,
            "spec": getattr(control, "fingerprint", None),
        }

    # ---- small things -------------------------------------------------------------------------------------------

    def _flatten(self, observation: Any) -> Array:
        """(1, S) of an observation.

        Raises:
            InputError: It does not fit the space.
        """
        if callable(getattr(observation, "detach", None)):
            observation = observation.detach().cpu().numpy()
        try:
            if isinstance(self._space, spaces.Box):  # as numbers: a small whole type has neither -1 nor NaN
                flat = np.asarray(observation, dtype=np.float64).ravel()
            else:
                whole = isinstance(self._space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
                if whole and not self._space.contains(np.asarray(observation, dtype=self._space.dtype)):
                    raise ValueError("it is not in the space")
                flat = np.asarray(spaces.flatten(self._space, observation), dtype=np.float64).ravel()
            expected = spaces.flatdim(self._space)
            if len(flat) != expected:
                raise ValueError(f"{len(flat)} numbers where the space has {expected}")
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise InputError(f"observation {observation!r} does not fit {self._space}: {error}") from error
        is_finite = np.isfinite(flat)
        if not is_finite.all() and not self._has_warned:
            self._has_warned = True
            warn("an observation has numbers that are not finite; they count as average ones")
        return flat[None]

    def _by_name(self, action: Any) -> dict[str, Any]:
        decode = getattr(self._inner, "decode", None)
        values: Any = action if decode is None else decode(action)
        if isinstance(values, Mapping):
            return dict(values)
        numbers = _plain(values)
        names = [f"action_{n}" for n in range(len(numbers))] if self._names is None else self._names
        if len(names) != len(numbers):
            raise _names_differ(names, len(numbers))
        return dict(zip(names, numbers, strict=True))


def _batch_of(transitions: Transitions) -> Batch:
    """Transitions as the learner has them; it gives them numbers of its own."""
    return Batch(
        transitions.observations.astype(np.float64),
        transitions.actions.astype(np.float64),
        transitions.rewards.astype(np.float64),
        transitions.next_observations.astype(np.float64),
        transitions.terminated,
        transitions.extra["intervened"].astype(np.bool_),
        # 0 where there were no probabilities (DQN): so far off that PPO leaves it out, while the gate learns from it.
        np.where(transitions.extra["log_prob"] == 0, 1e9, transitions.extra["log_prob"]).astype(np.float64),
        np.zeros(len(transitions), dtype=np.int64),
    )


def _names_differ(names: Sequence[str], count: int) -> InputError:
    return InputError(
        f"the environment names {len(names)} hyperparameters ({', '.join(names)}), and its action has {count} values; "
        "make `hyperparameters` and `decode` agree"
    )


def _describe(space: gymnasium.Space[Any]) -> str:
    """A space with all that makes two of them different; `str` rounds bounds, as NumPy prints at the time."""
    if isinstance(space, spaces.Box):
        bounds = hashlib.sha256(space.low.tobytes() + space.high.tobytes()).hexdigest()[:12]
        return f"Box({space.dtype}, {space.shape}, bounds {bounds})"
    if isinstance(space, spaces.MultiDiscrete):
        return f"MultiDiscrete({space.nvec.tolist()}, start {np.asarray(space.start).tolist()})"
    if isinstance(space, spaces.Dict):
        return f"Dict({', '.join(f'{key}: {_describe(part)}' for key, part in space.spaces.items())})"
    if isinstance(space, spaces.Tuple):
        return f"Tuple({', '.join(map(_describe, space.spaces))})"
    return str(space)


def _tensor(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float64))


def _best_of(path: Path) -> float | None:
    """Mean reward of the best brain that was saved before; None where there is none that can be read."""
    if not path.exists():
        return None
    try:
        best = load_state(path)["best"]
        return None if best is None else float(best)
    except (InputError, KeyError, TypeError, ValueError):
        return None


def _plain(values: Any) -> list[Any]:
    """An action, or what a `decode` gave, as a list of Python's own values."""
    if callable(getattr(values, "detach", None)):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        values = values.ravel().tolist()
    elif isinstance(values, str) or not isinstance(values, Iterable):
        values = [values]
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _space_of(env: Any, key: str) -> gymnasium.Space[Any]:
    space = getattr(env, key, None)
    if not isinstance(space, gymnasium.Space):
        raise InputError(f"env is a {type(env).__name__} whose {key} is {space!r}; expected a Gymnasium environment")
    return space


def _names_of(inner: Any) -> Sequence[str] | None:
    names = getattr(inner, "hyperparameters", None)
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"the environment's `hyperparameters` are {names!r}; expected a sequence of names")
    if len(set(names)) != len(names):
        raise InputError(f"the environment's `hyperparameters` are {list(names)}; expected different names")
    return tuple(names)

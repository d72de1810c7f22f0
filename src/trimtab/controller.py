"""Controller: an agent, a spec and safety on one training run.

Called by the adapters, the experiments and users with a loop of their own. `step` is called once after each
optimizer step; between decisions it stores the loss on its device and writes the base schedule; at a decision it
brings everything over in one transfer, judges the interval, teaches the agent, asks it, writes, and reads back.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.agents.base import Agent, Array, Timing
from trimtab.brain import Brain
from trimtab.errors import ConflictError, InputError, unknown_name
from trimtab.gradients import GradientProbe
from trimtab.records import Decision
from trimtab.run_state import Interval, RunState
from trimtab.safety import Guard, Safety, Snapshot, Verdict
from trimtab.spec import ControlSpec, make_agent
from trimtab.writers import find_writers

__all__ = ["Controller"]

_log = logging.getLogger("trimtab")
_NEVER = 1 << 62


class Controller:
    """Let an agent move the knobs of a training run.

    Args:
        agent_or_brain: An agent, a brain, or the name of a registered agent.
        optimizer: The optimizer whose settings are moved; its steps are watched through a hook.
        model: Takes part in roll-back with its buffers, and makes `best_state` possible.
        loader: The data loader; needed for `every="epoch"`.
        knobs: Names of the knobs to move; None: the brain's own, or ("lr",).
        total_steps: Budget in optimizer steps; needed by schedules that end.
        every: Optimizer steps between decisions, or "epoch"; None: the agent's own timing.
        spec: A whole ControlSpec instead of the agent's own wishes; excludes `knobs` and `every`.
        safety: Gate, guard, and what to do about a second writer.
        mode: "learn": act, explore and learn. "use": act by the best known action, learn nothing. "placebo":
            decide and learn, but write nothing but the base schedule (the guard is off, so that the run equals
            the base schedule's to the bit).

    Attributes:
        spec: The spec in use.
        agent: The agent in use.
        state: The RunState that signals and rewards read.
        decisions: Every decision so far.
        last_reward: Reward of the last interval; None before the first decision.
        last_interval: What was measured in the last interval, whatever became of it; None before the first.
        last_observation: The signals at the last decision, in the spec's order; zeros before the first.
        status: "running", "over" (budget used), "gave_up" (the guard's last word) or "conflict".

    Raises:
        InputError: An argument is wrong; the message names it.
        ConflictError: Another scheduler is attached to the optimizer.
    """

    def __init__(
        self,
        agent_or_brain: Agent | Brain | str,
        *,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        loader: Iterable[Any] | None = None,
        knobs: Sequence[str] | None = None,
        total_steps: int | None = None,
        every: int | str | None = None,
        spec: ControlSpec | None = None,
        safety: Safety | None = None,
        mode: Literal["learn", "use", "placebo"] = "learn",
    ) -> None:
        _check(optimizer, model, total_steps, mode)
        self.agent, self.spec = _resolve(agent_or_brain, knobs, every, spec)
        self.safety = safety or Safety()
        self.mode = mode
        self.state = RunState(optimizer, model, loader, total_steps)
        self.decisions: list[Decision] = []
        self.last_reward: float | None = None
        self.last_interval: Interval | None = None
        self.last_observation: list[float] = [0.0] * len(self.spec.signals)
        self.status = "running"
        self._epoch_steps = _epoch_steps(self.spec.timing, loader)
        self._schedule = self.spec.make_schedule()
        self._varies = self.spec.base.name != "constant"
        self._factor_at(0)
        if "lr" in self.spec.knobs and (writers := find_writers(optimizer, but=self)):
            self._meet_conflict(f"{' and '.join(writers)} is attached to the optimizer and would overwrite the rate",
                                at_start=True)
        self._knobs = self.spec.make_knobs()
        found = [knob.bind(self.state) for knob in self._knobs]
        self._rate = next((knob for knob in self._knobs if knob.name == "lr"), None)
        self._levels: Array = np.stack(found, axis=1)
        if self._rate is not None:
            start = self.agent.initial_setting(type(optimizer).__name__)
            if start is not None:
                self._levels[:, self._knobs.index(self._rate)] = start
        for column, knob in enumerate(self._knobs):
            self.state.initial_settings[knob.name] = self._levels[:, column].copy()
        self._note_settings()
        self._observe = self.spec.make_observer()
        self._guard = Guard(self.safety.cut, self.safety.max_rollbacks) if self._has_guard() else None
        self._snapshot = Snapshot(optimizer, model, on_cpu=self.safety.snapshot_on_cpu)
        self._probe = GradientProbe(optimizer)
        self._best: dict[str, Tensor] | None = None
        self._losses: list[Tensor | float] = []
        self._val_loss = self._accuracy = math.nan
        self._t = 0
        self._n_skipped = 0
        self._index = 0
        self._last_change: int | None = None
        self._agent_state: Any = None
        self._pending: tuple[Array, Any] | None = None
        self._has_warned = False
        self._next = 0
        if self.status == "running":
            self._set_next()
            self._write_base()
            if self._guard is not None:
                self._snapshot.take()

    # ---- what the loop calls ------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether the coming call of `step` takes a decision: the time to measure a validation loss."""
        return self.status == "running" and self._t + 1 >= self._next

    @property
    def n_skipped_steps(self) -> int:
        """Calls of `step` before which the optimizer took no step (a gradient scaler skipped it)."""
        return self._n_skipped

    @property
    def n_rollbacks(self) -> int:
        """Roll-backs so far."""
        return sum(decision.source == "guard" for decision in self.decisions)

    @property
    def snapshot_bytes(self) -> int:
        """Memory that a snapshot takes now; 0 where there is none."""
        return self._snapshot.size_bytes if self._guard is not None else 0

    def step(
        self,
        loss: Tensor | float,
        val_loss: float | Tensor | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> list[Decision]:
        """Take in one optimizer step. Call it once after each `optimizer.step()`.

        Args:
            loss: The train loss of that step, one number; a tensor stays on its device until a decision.
            val_loss: A validation loss measured after that step.
            metrics: More of what was measured; "accuracy" in [0, 1] is used.

        Returns:
            The decisions taken in this call; mostly none.

        Raises:
            InputError: The loss is not one number.
            ConflictError: Somebody else wrote a knob's value.
        """
        if val_loss is not None or metrics:
            self.report(val_loss, metrics)
        if self.status != "running":
            self._beyond()
            return []
        try:
            self._losses.append(loss.detach().clone() if isinstance(loss, Tensor) else float(loss))
        except (TypeError, ValueError):
            raise InputError(f"step() needs the loss of the step just taken, one number; got {loss!r}") from None
        probe = self._probe
        self._t += 1
        probe.step = self._t
        self._n_skipped = self._t - probe.n_steps
        if self._t >= self._next:
            return self._decide()
        if self._varies:
            self._write_base()
        else:
            self._check_owner(may_sync=False)
        return []

    def report(self, val_loss: float | Tensor | None = None, metrics: Mapping[str, float] | None = None) -> None:
        """Take in what was measured on validation data, at any time; the newest before a decision counts.

        Args:
            val_loss: Lower is better. NaN counts as infinite.
            metrics: "accuracy" in [0, 1] is used, other names are refused.

        Raises:
            InputError: Nothing was given, or an unknown metric.
        """
        for name, value in (metrics or {}).items():
            if name != "accuracy":
                raise unknown_name("metric", name, ("accuracy",))
            self._accuracy = float(value)
        if val_loss is None:
            return
        value = float(val_loss)
        value = math.inf if math.isnan(value) else value
        self._val_loss = value
        state = self.state
        if self._t == 0:
            state.initial_val_loss = np.array([value])
        if not value >= float(state.best_val_loss[0]):
            if math.isfinite(value):
                state.best_val_loss = np.array([value])
            self._keep_best()

    def read_knobs(self) -> dict[str, float]:
        """Present value of each knob, read from where it acts; may wait for a device."""
        return {knob.name: float(knob.read(self.state)[0]) for knob in self._knobs}

    def best_state(self) -> dict[str, Tensor]:
        """Weights and buffers of the model at its best reported validation loss, as a `state_dict`; copies.

        Raises:
            InputError: No model was given, or no validation loss was ever reported.
        """
        if self.state.model is None:
            raise InputError("best_state() needs the model: give it as model=... when the controller is made")
        if self._best is None:
            raise InputError("best_state() needs a validation loss: call report(val_loss=...) while training")
        return {key: value.clone() for key, value in self._best.items()}

    # ---- one decision -------------------------------------------------------------------------------------------

    def _decide(self) -> list[Decision]:
        state = self.state
        if not self._check_owner(may_sync=True):
            return self.decisions[-1:]
        state.optimizer_steps = self._t
        before = state.measurements()
        interval, weights_are_finite = self._measure()
        state.record(interval)
        verdict = Verdict("ok")
        if self._guard is not None:
            verdict = self._guard.judge(state, weights_are_finite=weights_are_finite)
        is_over = state.total_steps is not None and self._t >= state.total_steps
        reward = np.array([self.spec.penalty]) if verdict.kind != "ok" else self.spec.compute_reward(state)
        self.last_reward = float(reward[0])
        observation = self._observe(state)
        self.last_interval, self.last_observation = interval, observation[0].tolist()
        if self._pending is not None and self.mode != "use":
            ended = np.array([is_over or verdict.kind == "give_up"])
            self.agent.update(*self._pending, reward, observation, ended)
            self._pending = None
        first = len(self.decisions)
        if verdict.kind == "give_up":
            self._give_up(verdict.reason)
        else:
            if verdict.kind == "roll_back":
                self._snapshot.restore()
                self._probe.forget()
                state.rewind(before)
            if not is_over or verdict.kind == "roll_back":
                self._act(observation, verdict, is_over=is_over)
            if is_over:
                self.status = "over"
                self._write_base()
            elif self._guard is not None:
                self._snapshot.take()
        self._index += 1
        self._set_next()
        return self.decisions[first:]

    def _measure(self) -> tuple[Interval, bool]:
        """Bring losses, gradient statistics and a check of the weights over in one transfer."""
        pending = self._probe.pending()
        on_device = [loss.reshape(()) for loss in self._losses if isinstance(loss, Tensor)]
        parts = [torch.stack(on_device).double()] if on_device else []
        device = parts[0].device if parts else torch.device("cpu")
        parts += [row.to(device, torch.float64) for row in pending]
        if self._guard is not None:
            parts.append(_weight_norm(self.state.optimizer).to(device, torch.float64).reshape(1))
        values = torch.cat(parts).tolist() if parts else []
        n_tensors = len(on_device)
        brought = iter(values[:n_tensors])
        losses = [next(brought) if isinstance(loss, Tensor) else loss for loss in self._losses]
        rows = [values[n_tensors + 4 * i : n_tensors + 4 * i + 4] for i in range(len(pending))]
        grad_norm, cosine, ratio = self._probe.collect(rows)
        if math.isnan(float(self.state.initial_loss[0])) and losses:
            self.state.initial_loss = np.array([losses[0]])
        half = max(1, len(losses) // 2)
        interval = Interval(
            train_loss=_mean(losses),
            first_half_loss=_mean(losses[:half]),
            second_half_loss=_mean(losses[half:]),
            val_loss=np.array([self._val_loss]),
            accuracy=np.array([self._accuracy]),
            grad_norm=np.array([grad_norm]),
            grad_update_cosine=np.array([cosine]),
            update_ratio=np.array([ratio]),
        )
        self._losses = []
        self._val_loss = self._accuracy = math.nan
        return interval, self._guard is None or math.isfinite(values[-1])

    def _act(self, observation: Array, verdict: Verdict, *, is_over: bool) -> None:
        """Ask the agent, or after a roll-back cut the rate; write, and read back."""
        action = None
        if self.agent.decides and not is_over:
            starts = np.array([self._index == 0])
            action, self._agent_state = self.agent.predict(
                observation, self._agent_state, starts, deterministic=self.mode == "use"
            )
        if verdict.kind == "roll_back":
            self._cut_rate(verdict.reason)
        elif action is not None:
            self._pending = (observation, action)
            asked = self.spec.decode(action, self._levels)
            is_changed = False
            for column in range(len(self._knobs)):
                is_changed |= self._move(column, float(action[0, column]), asked[:, column])
            if is_changed:
                self._last_change = self._index
        elif not is_over:
            self._write_base()

    def _move(self, column: int, action: float, asked: Array) -> bool:
        """Write what may be written of one knob's asked setting, and record it; whether the setting changed."""
        knob, present = self._knobs[column], self._levels[:, column].copy()
        setting, note = self.safety.gate.limit(asked, present, self._index, self._last_change)
        if not np.array_equal(setting, present):
            inside = knob.clip(setting)
            if not np.array_equal(inside, setting):
                setting, note = inside, f"bounds [{knob.low:g}, {knob.high:g}]"
        if self.mode == "placebo":
            setting, note = present, "placebo: decided, not written"
        self._set(column, setting, "agent", action, float(asked[0]), note)
        return not np.array_equal(setting, present)

    def _cut_rate(self, reason: str) -> None:
        column = 0 if self._rate is None else self._knobs.index(self._rate)
        if self._rate is None:
            setting, done = self._levels[:, column], "there is no rate to cut among the knobs"
        else:
            level, factor = float(self._levels[0, column]), self._factor_at(self._t - 1)
            standing = float(self._rate.read(self.state)[0]) / factor if factor > 0 else 0.0
            if standing > level * 1.001:  # somebody wrote a higher rate through the knob itself: that is what failed
                level = standing
            setting, done = np.array([level / self.safety.cut]), f"rate / {self.safety.cut:g}"
        note = f"{reason}: rolled back to the start of the interval, {done}"
        if self.state.model is None:
            note += "; buffers were not rolled back, give model=... for that"
        _log.warning("step %d: %s", self._t, note)
        self._set(column, setting, "guard", None, float(setting[0]), note)

    def _give_up(self, reason: str) -> None:
        """Put the best weights back, and keep them: a rate of 0 moves nothing whatever the loop goes on doing."""
        model = self.state.model
        if model is not None and self._best is not None:
            model.load_state_dict(self._best)
            kept = "the weights of the best validation loss"
        else:
            self._snapshot.restore()
            kept = "the weights of the last good interval"
        note = f"{reason}: gave up, kept {kept}, control ended"
        _log.warning("step %d: %s", self._t, note)
        self.status = "gave_up"
        if self._rate is not None:
            self._set(self._knobs.index(self._rate), np.zeros(1), "gave_up", None, 0.0, note)
        else:
            self._set(0, self._levels[:, 0], "gave_up", None, float(self._levels[0, 0]), note)

    def _set(self, column: int, setting: Array, source: str, action: float | None, asked: float, note: str) -> None:
        """Make a setting act, read it back from there, and record all of it."""
        knob = self._knobs[column]
        before = float(knob.read(self.state)[0])
        self._levels[:, column] = setting
        self._note_settings()
        factor = self._factor_at(self._t) if knob is self._rate else 1.0
        written = float(setting[0]) * factor
        knob.put(self.state, written)
        read_back = float(knob.read(self.state)[0])
        self.decisions.append(
            Decision(
                index=self._index,
                optimizer_step=self._t,
                knob=knob.name,
                source=source,
                action=action,
                before=before,
                asked=asked,
                setting=float(setting[0]),
                written=written,
                read_back=read_back,
                note=note,
            )
        )

    # ---- the rate between decisions, and who owns it --------------------------------------------------------------

    def _factor_at(self, step: int) -> float:
        return self._schedule(step, self.state.total_steps)

    def _write_base(self) -> None:
        rate = self._rate
        if rate is None:
            self._check_owner(may_sync=False)
        elif self._t == 0 or self._check_owner(may_sync=False):
            level = float(self._levels[0, self._knobs.index(rate)])
            rate.put(self.state, level * self._schedule(self._t, self.state.total_steps))

    def _check_owner(self, *, may_sync: bool) -> bool:
        """Whether every knob still holds what was written; else an error, or the end of control."""
        for knob in self._knobs:
            found = knob.find_conflict(self.state, may_sync=may_sync)
            if found is not None:
                writers = find_writers(self.state.optimizer, but=self) if knob.name == "lr" else []
                by = f", probably by {' and '.join(writers)}" if writers else ""
                self._meet_conflict(f"{found}: somebody else writes it{by}", knob=knob.name)
                return False
        return True

    def _meet_conflict(self, found: str, *, knob: str = "lr", at_start: bool = False) -> None:
        message = (f"{found}; a decision counts only if nobody overwrites it. Remove the other writer, or give "
                   "on_conflict='warn' to hand the value back and end control")
        if self.safety.on_conflict == "error":
            raise ConflictError(message)
        warnings.warn(f"{found}; control of {knob!r} has ended", RuntimeWarning, stacklevel=4)
        self.status = "conflict"
        present = float(self.state.optimizer.param_groups[0][knob])
        index = 0 if at_start else self._index
        t = 0 if at_start else self._t
        self.decisions.append(
            Decision(index, t, knob, "conflict", None, present, present, present, present, present, found)
        )

    def _beyond(self) -> None:
        if self.status == "over" and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"step() was called more often than total_steps={self.state.total_steps}; the last rate is held",
                          RuntimeWarning, stacklevel=3)

    # ---- small things -------------------------------------------------------------------------------------------

    def _has_guard(self) -> bool:
        return self.safety.rollback and self.mode != "placebo"

    def _set_next(self) -> None:
        if self.status == "running":
            timing: Timing = self.spec.timing
            self._next = timing.next_decision(self._index, self._t, self.state.total_steps, self._epoch_steps)
        else:
            self._next = _NEVER
        self._probe.next_decision = self._next

    def _note_settings(self) -> None:
        for column, knob in enumerate(self._knobs):
            setting = self._levels[:, column].copy()
            self.state.settings[knob.name] = setting
            self.state.unit_settings[knob.name] = knob.to_unit(setting)

    @torch.no_grad()
    def _keep_best(self) -> None:
        model = self.state.model
        if model is None:
            return
        now = model.state_dict()
        if self._best is None:
            self._best = {key: value.detach().clone() for key, value in now.items()}
        else:
            for key, value in now.items():
                self._best[key].copy_(value)

    # ---- saving and going on ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped: tensors, lists and plain numbers, no code."""
        losses = self._losses
        return {
            "spec": self.spec.fingerprint,
            "agent": self.agent.name,
            "status": self.status,
            "t": self._t,
            "n_skipped": self._n_skipped,
            "index": self._index,
            "next": self._next,
            "last_change": self._last_change,
            "last_reward": self.last_reward,
            "last_interval": None if self.last_interval is None else self.last_interval.to_json(),
            "last_observation": list(self.last_observation),
            "has_warned": self._has_warned,
            "levels": self._levels.tolist(),
            "losses": [loss.clone() if isinstance(loss, Tensor) else loss for loss in losses],
            "val_loss": self._val_loss,
            "accuracy": self._accuracy,
            "run": self.state.state_dict(),
            "knobs": {knob.name: knob.state_dict() for knob in self._knobs},
            "guard": None if self._guard is None else self._guard.state_dict(),
            "snapshot": self._snapshot.state_dict(),
            "probe": self._probe.state_dict(),
            "best": None if self._best is None else {key: value.clone() for key, value in self._best.items()},
            "agent_state": None if self._agent_state is None else [_to_list(x) for x in self._agent_state],
            "pending": None if self._pending is None else [_to_list(x) for x in self._pending],
            "learned": self.agent.state_dict(),
            "decisions": [decision.to_json() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, for a controller made with the same arguments; the rates are written anew.

        Raises:
            InputError: The state is of another agent or spec, or lacks something; nothing is changed then.
        """
        for key, mine in (("agent", self.agent.name), ("spec", self.spec.fingerprint)):
            if state.get(key) != mine:
                raise InputError(f"this state is of the {key} {state.get(key)!r}, the controller has {mine!r}; make it with "
                                 "the same arguments as the one that was saved")
        self.status = state["status"]
        self._t, self._n_skipped = state["t"], state["n_skipped"]
        self._index, self._next = state["index"], state["next"]
        self._last_change, self.last_reward = state["last_change"], state["last_reward"]
        self._has_warned = state["has_warned"]
        seen = state["last_interval"]
        self.last_interval = None if seen is None else Interval.from_json(seen)
        self.last_observation = list(state["last_observation"])
        self._levels = np.asarray(state["levels"], dtype=np.float64)
        device = next(p.device for group in self.state.optimizer.param_groups for p in group["params"])
        self._losses = [loss.to(device, copy=True) if isinstance(loss, Tensor) else loss for loss in state["losses"]]
        self._val_loss, self._accuracy = state["val_loss"], state["accuracy"]
        self.state.load_state_dict(state["run"])
        for knob in self._knobs:
            knob.load_state_dict(state["knobs"][knob.name])
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])
        self._snapshot.load_state_dict(state["snapshot"])
        self._probe.load_state_dict(state["probe"])
        best = state["best"]
        self._best = None if best is None else {key: value.to(device, copy=True) for key, value in best.items()}
        kept = state["agent_state"]
        self._agent_state = None if kept is None else tuple(np.asarray(x) for x in kept)
        pending = state["pending"]
        self._pending = None if pending is None else (np.asarray(pending[0], dtype=np.float64), np.asarray(pending[1]))
        self.agent.load_state_dict(state["learned"])
        self.decisions = [Decision.from_json(row) for row in state["decisions"]]
        for column, knob in enumerate(self._knobs):
            if self.status in ("running", "over", "gave_up"):
                factor = self._factor_at(self._t) if knob is self._rate else 1.0
                knob.put(self.state, float(self._levels[0, column]) * factor)


def _check(optimizer: object, model: object, total_steps: object, mode: str) -> None:
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    if model is not None and not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module or None")
    whole = isinstance(total_steps, int) and not isinstance(total_steps, bool) and total_steps >= 1
    if total_steps is not None and not whole:
        raise InputError(f"total_steps is {total_steps!r}; expected a number of optimizer steps of 1 or more, or None")
    if mode not in ("learn", "use", "placebo"):
        raise unknown_name("mode", mode, ("learn", "use", "placebo"))


def _resolve(
    given: Agent | Brain | str, knobs: Sequence[str] | None, every: int | str | None, spec: ControlSpec | None
) -> tuple[Agent, ControlSpec]:
    """The agent, and the spec it is used with."""
    if spec is not None and (knobs is not None or every is not None):
        raise InputError("give either spec, or knobs and every, not both")
    if isinstance(given, Brain):
        changes: dict[str, Any] = {} if knobs is None else {"knobs": tuple(knobs)}
        if every is not None:
            changes["timing"] = Timing(every=every)
        wanted = spec or ControlSpec(**{**_fields(given.spec), **changes})
        given.check_spec(wanted)
        return given.agent, wanted
    names = ("lr",) if knobs is None else tuple(knobs)
    agent = make_agent(given, n_knobs=len(names)) if isinstance(given, str) else given
    if not callable(getattr(agent, "predict", None)):
        raise InputError(f"agent_or_brain is a {type(given).__name__}; expected an Agent, a Brain or an agent's name")
    if spec is not None:
        return agent, spec
    changes = {"knobs": names}
    if every is not None:
        changes["timing"] = Timing(every=every)
    return agent, ControlSpec.for_agent(agent, **changes)


def _fields(spec: ControlSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def _epoch_steps(timing: Timing, loader: Iterable[Any] | None) -> int | None:
    if timing.every != "epoch":
        return None
    if not isinstance(loader, Sized) or len(loader) < 1:
        raise InputError("every='epoch' needs the data loader with a known length: give loader=...")
    return len(loader)


def _weight_norm(optimizer: Optimizer) -> Tensor:
    """Sum of the parameters' norms: finite if and only if every weight is (norms of finite float32 do not overflow here
    unless the weights are far beyond use)."""
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    norms = torch._foreach_norm(parameters)
    device = norms[0].device
    return torch.stack([norm.to(device, torch.float64) for norm in norms]).sum()


def _mean(values: list[float]) -> Array:
    """Mean as (1,); NaN of none. A plain sum: an infinite loss must come out infinite or NaN, not as an error."""
    return np.array([sum(values) / len(values) if values else math.nan])


def _to_list(value: Any) -> Any:
    return np.asarray(value).tolist()

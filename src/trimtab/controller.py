"""Controller: an agent, a spec and safety on one training run.

Called by the adapters, the experiments and users with a loop of their own. `step` is called once after each
optimizer step; between decisions it stores the loss on its device and writes the base schedule; at a decision it
brings everything over in one transfer, judges the interval, teaches the agent, asks it, writes, and reads back.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.agents.base import Agent, Array
from trimtab.averaging import WeightAverage
from trimtab.best_weights import BestWeights
from trimtab.brain import Brain
from trimtab.clock import Clock
from trimtab.errors import InputError, unknown_name, warn
from trimtab.given import check_run, epoch_steps_of, resolve
from trimtab.hand import Hand
from trimtab.meter import Meter, to_number
from trimtab.records import Decision
from trimtab.run_state import BatchingLoop, Interval, RunState
from trimtab.safety import GOOD, Guard, Safety, Snapshot, Verdict
from trimtab.spec import ControlSpec
from trimtab.writers import find_writers

__all__ = ["Controller"]

_log = logging.getLogger("trimtab")


class Controller:
    """Let an agent move the knobs of a training run.

    Args:
        agent_or_brain: An agent, a brain, or the name of a registered agent.
        optimizer: The optimizer whose settings are moved; its steps are watched through a hook.
        model: Takes part in roll-back with its buffers, and makes `best_state` possible.
        loader: The data loader, or a TrainingLoop; needed for `every="epoch"`, and by the knobs of the data.
        knobs: Names of the knobs to move; None: the brain's own, or ("lr",).
        total_steps: Budget in optimizer steps; needed by schedules that end. Under a TrainingLoop, given as the
            loader, those of the task's own cost: its training FLOPs are the budget (docs/knobs.md).
        every: Optimizer steps between decisions, or "epoch"; None: the agent's own timing.
        spec: A whole ControlSpec instead of the agent's own wishes; excludes `knobs` and `every`.
        safety: Gate, guard, and what to do about a second writer.
        mode: "learn": act, explore and learn. "use": act by the best known action, learn nothing. "placebo":
            decide and learn, but write nothing but the base schedule (the guard is off, so that the run equals
            the base schedule's to the bit).
        average: Keep a running average of the weights beside them; needs the model. See `averaged`.
        example_inputs: For the knobs `units` and `layers`: a batch of what the model's forward takes, a tensor or a
            tuple of positional arguments. None takes the first samples of `loader`.

    Attributes:
        spec: The spec in use.
        agent: The agent in use.
        state: The RunState that signals and rewards read.
        last_interval: What was measured in the last interval, whatever became of it; None before the first.
        status: "running", "over" (budget used), "gave_up" (the guard's last word) or "conflict".

    Raises:
        InputError: An argument is wrong; the message names it.
        ConflictError: Another scheduler is attached to the optimizer.
    """

    def __init__(  # noqa: PLR0913 (each by name but the first, and most of them left as they are)
        self,
        agent_or_brain: Agent | Brain | str,
        *,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        loader: Iterable[Any] | BatchingLoop | None = None,
        knobs: Sequence[str] | None = None,
        total_steps: int | None = None,
        every: int | str | None = None,
        spec: ControlSpec | None = None,
        safety: Safety | None = None,
        mode: Literal["learn", "use", "placebo"] = "learn",
        average: bool = False,
        example_inputs: object = None,
    ) -> None:
        if not isinstance(average, bool):
            raise InputError(f"average is {average!r}; expected True or False")
        if average and model is None:
            raise InputError("average=True needs the model: give it as model=...")
        check_run(optimizer, model, total_steps, mode)
        for key, value, kind in (("spec", spec, ControlSpec), ("safety", safety, Safety)):
            if value is not None and not isinstance(value, kind):
                raise InputError(f"{key} is a {type(value).__name__}; expected a trimtab.{kind.__name__} or None")
        self.agent, self.spec = resolve(agent_or_brain, knobs, every, spec)
        self.safety = safety or Safety()
        self.mode = mode
        self.state = RunState(optimizer, model, loader, total_steps)
        self.state.example_inputs = example_inputs
        self._last_reward: float | None = None
        self._lowest_reward = 0.0
        self._is_first = True
        self.last_interval: Interval | None = None
        self._last_observation: Array | None = None
        self.status = "running"
        self._epoch_steps = epoch_steps_of(self.spec.timing, loader)
        self.state.main_interval = float(self.spec.timing.main_interval(total_steps, self._epoch_steps))
        if "lr" in self.spec.knobs and (writers := find_writers(optimizer, but=self)):
            found = f"{' and '.join(writers)} is attached to the optimizer and would overwrite the rate"
        else:
            found = ""
        start = self.agent.initial_setting(type(optimizer).__name__)
        self._clock = Clock(loader, total_steps)
        self._hand = Hand(self.spec, self.state, self._clock, self.safety.gate, start)
        if found:
            self._hand.yield_to("lr", found, 0, 0, self.safety.on_conflict)
            self.status = "conflict"
        self._check_actions()
        self._observe = self.spec.make_observer()
        self._reward = self.spec.make_reward()
        self._guard = Guard(self.safety.cut, self.safety.max_rollbacks) if self._has_guard() else None
        self._snapshot = Snapshot(optimizer, model, on_cpu=self.safety.snapshot_on_cpu)
        self._meter = Meter(optimizer)
        self._meter.needs_spread = "loss_noise" in self.spec.signals
        self._probe = self._meter.probe
        self._probe.needs_layers = any(name.startswith("update_to_weight_") for name in self.spec.signals)
        self._best = BestWeights(model)
        self._average = WeightAverage(optimizer, model, total_steps) if average and model is not None else None
        self._is_averaged = False
        self._t = 0
        self._index = 0
        self._agent_state: Any = None
        self._pending: tuple[Array, Any] | None = None
        self._has_warned = False
        self._next = 0
        if self.status == "running":
            self._set_next()
            self._hand.write_all(0)
            if self._guard is not None:
                self._keep_snapshot(is_stale=True)

    # ---- what the loop calls ------------------------------------------------------------------------------------

    @property
    def decisions(self) -> list[Decision]:
        """Every decision so far: the agent's, the guard's, and the end of control where there was one."""
        return self._hand.decisions

    @property
    def is_due(self) -> bool:
        """Whether the coming call of `step` takes a decision: the time to measure a validation loss."""
        return self.status == "running" and self._t + 1 >= self._next

    @property
    def n_steps(self) -> int:
        """Calls of `step` so far; those beyond the budget are not counted."""
        return self._t

    @property
    def n_skipped_steps(self) -> int:
        """Calls of `step` before which the optimizer took no step (a gradient scaler skipped it)."""
        return self._t - self._probe.n_steps + self._probe.count_found_inf()

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
        t = self._t + 1
        if t >= self._next and self.status != "running":
            self._beyond()
            return []
        self._meter.add(loss)
        self._t = t
        if self._average is not None and (spent := self._clock.at(t)) >= self._average.next_look:
            self._average.look(spent)
        if t >= self._next:
            return self._decide()
        if not self._hand.follow_base(t):
            self._is_owner()  # it is not: says by whom, and ends control
            return self.decisions[-1:]
        return []

    def report(self, val_loss: float | Tensor | None = None, metrics: Mapping[str, float] | None = None) -> None:
        """Take in what was measured on validation data, at any time; the newest before a decision counts.

        Args:
            val_loss: Lower is better. NaN counts as infinite.
            metrics: "accuracy" in [0, 1] is used, other names are refused.

        Raises:
            InputError: Nothing was given, an unknown metric, or no number.
        """
        if val_loss is None and not metrics:
            raise InputError("report() was given nothing; expected val_loss=... or an accuracy")
        value = math.nan if val_loss is None else to_number(val_loss, f"val_loss is {val_loss!r}; expected one number")
        for name, given in (metrics or {}).items():
            if name != "accuracy":
                raise unknown_name("metric", name, ("accuracy",))
            wrong = f"accuracy is {given!r}; expected a number in [0, 1]"
            accuracy = to_number(given, wrong)
            if not 0 <= accuracy <= 1:
                raise InputError(wrong)
            if not self._is_averaged:
                self._meter.accuracy = accuracy
        if val_loss is None:
            return
        value = math.inf if math.isnan(value) else value
        if not self._is_averaged:  # what is measured of other weights says nothing of how the run goes
            self._note_val_loss(value)
        self._best.offer(value, is_averaged=self._is_averaged, plan=self._hand.plan)

    def _note_val_loss(self, value: float) -> None:
        self._meter.val_loss = value
        state = self.state
        if self._t == 0:
            state.note_val_loss(value)
        elif math.isfinite(value) and not value >= state.summary.best_val_loss:
            state.summary = state.summary._replace(best_val_loss=value)

    def read_knobs(self) -> dict[str, float]:
        """Present value of each knob, read from where it acts; may wait for a device."""
        return self._hand.read()

    @property
    def masked(self) -> dict[str, str]:
        """Knobs that cannot act on this run and were left out (`ControlSpec.masks`), and why."""
        return dict(self._hand.masked)

    def best_state(self) -> dict[str, Tensor]:
        """Weights and buffers of the model at its best reported validation loss, as a `state_dict`; copies.

        Raises:
            InputError: No model was given, or no validation loss was ever reported.
        """
        return self._best.copy()

    @property
    def plan(self) -> list[dict[str, Any]]:
        """Changes of the model's shape so far, JSON: `trimtab.surgery.replay` makes them to a fresh model."""
        return self._hand.plan

    @property
    def best_plan(self) -> list[dict[str, Any]]:
        """The same up to the shape that `best_state` fits."""
        return list(self._best.plan)

    @property
    def best_is_averaged(self) -> bool:
        """Whether what `best_state` returns is the average of the weights."""
        return self._best.is_averaged

    @contextmanager
    def averaged(self, batches: Iterable[Any] | None = None) -> Iterator[None]:
        """The model with a running average of its weights, to be evaluated, and reported where it is the better one.

        A `report` inside counts for `best_state` alone: what is observed of the run stays that of its own weights.

        Args:
            batches: Train inputs, or tuples that begin with them, to measure the statistics of batch norm with;
                needed if the model has any.

        Raises:
            InputError: There is no average, or not yet; batches are missing; `step` was called inside.
        """
        if self._average is None:
            raise InputError("averaged() needs the model and average=True when the controller is made")
        if self._is_averaged:
            raise InputError("averaged() was entered twice; leave the first one before")
        with self._average.applied(batches):
            # A coming `step` finds that it is due in another status than "running": no check in those that are fine.
            kept = self.status, self._next
            self.status, self._next, self._is_averaged = "averaged", 0, True
            try:
                yield
            finally:
                (self.status, self._next), self._is_averaged = kept, False

    # ---- one decision -------------------------------------------------------------------------------------------

    def _decide(self) -> list[Decision]:
        state = self.state
        if not self._is_owner():
            return self.decisions[-1:]
        first = len(self.decisions)
        self._hand.take_in_forced(self._index, self._t)
        self._clock.read(self._t)
        state.optimizer_steps, state.spent = self._t, self._clock.spent
        before = state.summary
        is_over = self._clock.is_used_up
        interval, weights_are_finite = self._measure()
        state.record(interval)
        verdict = GOOD
        if self._guard is not None:
            verdict = self._guard.judge(state, weights_are_finite=weights_are_finite, losses=self._meter.last_losses)
        state.note_rollback(verdict is not GOOD, state.settings.get("lr", math.nan))
        observation = self._observe(state)
        self.last_interval, self._last_observation = interval, observation
        is_bad = verdict is not GOOD or not math.isfinite(state.watched_loss())
        # Below anything this run has been rewarded with, in the reward's own unit: a bad interval must never pay.
        self._last_reward = self._lowest_reward + self.spec.penalty if is_bad else None
        if self.mode != "use" and self.agent.is_learned:
            reward = np.array([self.last_reward])  # of the first interval too: a penalty lies below it
            if self._pending is not None:
                ended = np.array([is_over or verdict.kind == "give_up"])
                self.agent.update(*self._pending, reward, observation, ended)
        self._pending = None
        if verdict.kind == "give_up":
            self._give_up(verdict.reason)
        else:
            if verdict.kind == "roll_back":
                self._restore()
                self._probe.forget()
                # A first validation loss goes, too: later ones are not to be compared with that of ruined weights.
                state.summary = before
                self._is_first = True
            elif self._guard is not None and self._hand.can_reshape:
                self._keep_snapshot()  # now: from a network that turns out badly the way leads back to this one
            self._act(observation, verdict, is_over=is_over)
            is_stale = self._take_in_changes()
            self._clock.read(self._t)  # a knob may have changed what a step costs
            if self._clock.is_used_up:
                self.status = "over"
            elif self._guard is not None and (verdict is not GOOD or is_stale or not self._hand.can_reshape):
                self._keep_snapshot(is_stale=is_stale or verdict is not GOOD)
        self._index += 1
        self._set_next()
        return self.decisions[first:]

    @property
    def last_reward(self) -> float | None:
        """Reward of the last interval, worked out when it is first asked for; None before the first decision."""
        if self._last_reward is None and self.last_interval is not None:
            self._last_reward = float(self._reward(self.state)[0])
            self._lowest_reward = min(self._lowest_reward, self._last_reward)
        return self._last_reward

    @property
    def last_observation(self) -> list[float]:
        """The signals at the last decision, in the spec's order; zeros before the first."""
        observation = self._last_observation
        return [0.0] * len(self.spec.signals) if observation is None else [float(value) for value in observation[0]]

    def _measure(self) -> tuple[Interval, bool]:
        """Sum up the interval; and whether every weight is finite."""
        interval, health = self._meter.measure(0.0 if self._guard is None else self._snapshot.sum_of_weights())
        first = self._meter.first_loss
        if self._is_first and math.isfinite(first):
            # After a roll-back too, where the first loss is again one of good weights: batches of few rows differ
            # so much that the very first loss may lie far below all others.
            known = float(self.state.initial_loss)
            self.state.initial_loss = first if math.isnan(known) else max(known, first)
            self._is_first = False
        return interval, math.isfinite(health)

    def _act(self, observation: Array, verdict: Verdict, *, is_over: bool) -> None:
        """Ask the agent, or after a roll-back cut the rate; write, and read back."""
        action = None
        if self.agent.decides and not is_over:
            is_best = self.mode == "use" or self.agent.is_taught
            action, self._agent_state = self.agent.predict(observation, self._agent_state, deterministic=is_best)
        if verdict.kind == "roll_back":
            note = self._hand.cut_rate(self.safety.cut, verdict.reason, self._index, self._t)
            _log.warning("step %d: %s", self._t, note)
        elif action is None:
            self._hand.follow_base(self._t)
        else:
            self._pending = (observation, action)
            remark = self.agent.note
            self._hand.act(action, self._index, self._t, is_placebo=self.mode == "placebo", remark=remark)

    def _give_up(self, reason: str) -> None:
        """Put the best weights back, and keep them: a rate of 0 moves nothing whatever the loop goes on doing."""
        best = functools.partial(self._hand.reshape, index=self._index, step=self._t, why="gave up: the best network")
        if self._best.put_back(best):
            kept = "the weights of the best validation loss"
            self._restart_average()
        else:
            self._restore()
            kept = "the weights of the last good interval"
        note = f"{reason}: gave up, kept {kept}, control ended"
        _log.warning("step %d: %s", self._t, note)
        self.status = "gave_up"
        self._probe.freeze()
        self._hand.give_up(note, self._index, self._t)

    def _restore(self) -> None:
        """Go back to the snapshot: the network's shape, then weights and the optimizer's state."""
        self._hand.reshape(self._snapshot.plan, self._index, self._t, "rolled back to the network of before")
        self._snapshot.restore()
        self._restart_average()

    def _keep_snapshot(self, *, is_stale: bool = False) -> None:
        self._snapshot.keep(is_stale=is_stale)
        self._snapshot.plan = self._hand.plan

    def _take_in_changes(self) -> bool:
        """Let go of what a knob's move has made useless; whether the snapshot is.

        One of before a change of the shape is not: it has the weights that were good.
        """
        has_touched, has_reshaped = self._hand.take_touched()
        if has_reshaped:
            self._probe.forget()
            self._restart_average()
        return has_touched

    def _restart_average(self) -> None:
        if self._average is not None:
            self._average.restart()

    def _is_owner(self) -> bool:
        """Whether every knob still holds what was written; else an error, or the end of control."""
        conflict = self._hand.find_conflict(self)
        if conflict is not None:
            self._hand.yield_to(*conflict, self._index, self._t, self.safety.on_conflict)
            self.status = "conflict"
            self._set_next()
        return conflict is None

    def _beyond(self) -> None:
        if self._is_averaged:
            raise InputError("step() was called inside averaged(): the weights are the average's; train outside of it")
        if self.status == "over" and not self._has_warned:
            self._has_warned = True
            warn(f"step() was called more often than total_steps={self.state.total_steps}; the last rate is held")

    # ---- small things -------------------------------------------------------------------------------------------

    def _check_actions(self) -> None:
        """Refuse, before the first step, an agent that moves another number of knobs than there are."""
        if not self.agent.decides:
            return
        nothing, starts = np.zeros((1, len(self.spec.signals))), np.array([True])
        action, _ = self.agent.predict(nothing, None, starts, deterministic=True)
        if np.shape(action) != (1, self.spec.n_moved):
            raise InputError(
                f"agent {self.agent.name!r} gives actions of shape {np.shape(action)}; expected "
                f"(1, {self.spec.n_moved}), one column a knob of {', '.join(self.spec.knobs)}"
            )

    def _has_guard(self) -> bool:
        return self.safety.rollback and self.mode != "placebo"

    def _set_next(self) -> None:
        self._hand.note_turn(self._index)
        self._next = 0  # no decision will come, and `step` looks why
        if self.status == "running":
            self._clock.aim(self.spec.timing, self._epoch_steps)
            self._aim()
        else:
            self._probe.rest()

    def _aim(self) -> None:
        count = self._clock.steps_left
        self._next = self._t + count
        self._probe.aim(count)

    # ---- saving and going on ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped: tensors, lists and plain numbers, no code."""
        return {
            "spec": self.spec.fingerprint,
            "agent": self.agent.name,
            "status": self.status,
            "t": self._t,
            "index": self._index,
            "next": self._next,
            "last_reward": self.last_reward,
            "lowest_reward": self._lowest_reward,
            "is_first": self._is_first,
            "last_interval": None if self.last_interval is None else [*self.last_interval],
            "last_observation": self.last_observation,
            "has_warned": self._has_warned,
            "hand": self._hand.state_dict(),
            "run": self.state.state_dict(),
            "clock": self._clock.state_dict(),
            "guard": None if self._guard is None else self._guard.state_dict(),
            "snapshot": self._snapshot.state_dict(),
            "meter": self._meter.state_dict(),
            "best": self._best.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "agent_state": None if self._agent_state is None else [_to_list(x) for x in self._agent_state],
            "pending": None if self._pending is None else [_to_list(x) for x in self._pending],
            "learned": self.agent.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, for a controller made with the same arguments; the rates are written anew.

        Raises:
            InputError: The state is of another agent or spec, or lacks something; nothing is changed then.
        """
        for key, mine in (("agent", self.agent.name), ("spec", self.spec.fingerprint)):
            if state.get(key) != mine:
                raise InputError(
                    f"this state is of the {key} {state.get(key)!r}, the controller has {mine!r}; make it with "
                    "the same arguments as the one that was saved"
                )
        if missing := sorted(_STATE_KEYS - set(state)):
            raise InputError(f"this state lacks {', '.join(missing)}; it is torn, or of another version")
        guards = ["no roll-back" if guard is None else "roll-back" for guard in (state["guard"], self._guard)]
        totals = [state["run"]["total_steps"], self.state.total_steps]
        averages = [state["average"] is not None, self._average is not None]
        for key, (theirs, ours) in (("rollback", guards), ("total_steps", totals), ("average", averages)):
            if theirs != ours:
                raise InputError(
                    f"this state was saved with {key}: {theirs}, the controller has {ours}; make it with the same "
                    f"{key} as the one that was saved"
                )
        shape = self._hand.plan
        self._hand.load_shape(state["hand"], None if state["guard"] is None else state["snapshot"].get("plan"))
        try:
            self._snapshot.check(state["snapshot"], self._hand.plan)
        except InputError:
            self._hand.reshape(shape)
            raise
        self.status = state["status"]
        self._t = state["t"]
        self._index, self._next = state["index"], state["next"]
        self._last_reward, self._lowest_reward = state["last_reward"], state["lowest_reward"]
        self._is_first = state["is_first"]
        self._has_warned = state["has_warned"]
        seen = state["last_interval"]
        self.last_interval = None if seen is None else Interval(*seen)
        self._last_observation = None if seen is None else np.array([state["last_observation"]])
        self._hand.load_state_dict(state["hand"])
        device = next(p.device for group in self.state.optimizer.param_groups for p in group["params"])
        self.state.load_state_dict(state["run"])
        self._clock.load_state_dict(state["clock"])
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])
        self._snapshot.load_state_dict(state["snapshot"])
        self._meter.load_state_dict(state["meter"])
        self._best.load_state_dict(state["best"], device)
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        kept = state["agent_state"]
        self._agent_state = None if kept is None else tuple(np.asarray(x) for x in kept)
        pending = state["pending"]
        self._pending = None if pending is None else (np.asarray(pending[0], dtype=np.float64), np.asarray(pending[1]))
        self.agent.load_state_dict(state["learned"])
        if self.status != "conflict":
            self._hand.write_all(self._t)
            self._hand.note_turn(self._index)


_STATE_KEYS = {
    *("spec", "agent", "status", "t", "index", "next", "last_reward", "lowest_reward", "is_first"),
    *("last_interval", "last_observation", "has_warned", "hand", "run", "clock", "guard", "snapshot"),
    *("meter", "best", "average", "agent_state", "pending", "learned"),
}


def _to_list(value: Any) -> Any:
    return np.asarray(value).tolist()

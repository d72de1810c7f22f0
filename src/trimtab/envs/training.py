"""TrainingEnv: one training run of a task as a Gymnasium environment.

Made by `gymnasium.make("trimtab/Training-v0", task="digits-mlp")`. It is a `Controller` on a `TrainingLoop`, as in use,
whose agent stands outside: what is observed, what an action does, and when the guard steps in, is the controller's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from trimtab import registry
from trimtab.agents.base import keep_actions
from trimtab.controller import Controller
from trimtab.envs.specs import default_spec
from trimtab.errors import InputError
from trimtab.knobs.base import CategoricalKnob
from trimtab.run_state import Array
from trimtab.safety import GOOD, Safety, Verdict
from trimtab.seeding import numpy_generator
from trimtab.spec import ControlSpec
from trimtab.tasks.base import Data, Task
from trimtab.training.loop import TrainingLoop

__all__ = ["TrainingEnv"]

INITIAL_RATES = (1e-5, 1e-1)  # what a user may have written: the range of `EpisodeOptions.initial_lr`


class TrainingEnv(gymnasium.Env[Any, Any]):
    """One run; an environment step is one decision and the interval after it.

    With the knob "weight_decay", a task without any begins at the knob's lower bound, since 0 cannot be multiplied.

    Observation (S,) and action are those of the spec. `reset` takes the first interval, at the rate the run starts
    with. The validation loss is measured at every decision. The episode is `terminated` at the end of the budget, since
    the progress is observed, and when the guard gives up; it is never truncated. After a roll-back the guard has moved
    the rate, and the action that follows counts for nothing, as in use.

    `infos` has "optimizer_steps", "val_loss", "rolled_back", each knob's value as read back from the optimizer (the
    base schedule included), "masked" (knobs that cannot act on the run, where the spec masks them), and at the end
    "final_val_loss", measured on the weights that are kept, and "best_val_loss". The test split is not read.

    Args:
        task: A task, or the name of one in the registry.
        knobs: Names of the knobs; None: those of the spec, or ("lr",).
        data_dir: Folder with the data sets; None where the task's data are bundled.
        scale: "smoke", "small" or "full" of a task given by its name.
        spec: What is observed, how actions act, what is rewarded. None: that of the learned controllers, but rewarded
            by "log_improvement" with a penalty of -1, because theirs is a rank among several runs.
        lr: Initial rate; None draws one in each episode, log-uniform in 1e-5..1e-1.
        safety: Gate and guard; None: those of `Safety()`.
        device: Where the network is trained.

    Attributes:
        control_spec: The spec in use (`spec` is Gymnasium's own).
        controller: That of the episode under way, for reading; None before the first.

    Raises:
        InputError: An argument is wrong; the message names it.
        MissingDataError: The data are not where they were looked for.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        task: str | Task = "digits-mlp",
        knobs: Sequence[str] | None = None,
        data_dir: str | Path | None = None,
        *,
        scale: str = "small",
        spec: ControlSpec | None = None,
        lr: float | None = None,
        safety: Safety | None = None,
        device: str = "cpu",
    ) -> None:
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf):
            raise InputError(f"lr is {lr!r}; expected a positive number, or None to draw one in each episode")
        self.control_spec = _make_spec(spec, knobs)
        self.task: Task = task if isinstance(task, Task) else registry.load("task", task)(scale)
        self.observation_space = self.control_spec.observation_space
        self.action_space = self.control_spec.action_space
        self.controller: _Held | None = None
        self._lr = lr
        self._safety = safety or Safety()
        self._device = device
        self._data: Data = self.task.load(None if data_dir is None else Path(data_dir))
        self._loop: TrainingLoop | None = None
        self._val_loss = math.nan

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of the knobs, in the order of the values of `decode`."""
        return self.control_spec.knobs

    @property
    def no_change_action(self) -> Any:
        """The action that leaves every knob where it is; None where actions are settings, of which none does."""
        actions, count = self.control_spec.actions, self.control_spec.n_moved
        if actions.kind == "set":
            return None
        kept = keep_actions(actions, np.zeros((1, 0)), count)[0]
        return int(kept[0]) if self.action_space.shape == () else kept

    def decode(self, action: Any) -> list[Any]:
        """Values that an action asks for now, one a knob, within its bounds: whole numbers, and names of choices.

        Those of the rate are without the base schedule, and the gate may leave less; the records say what was written.

        Raises:
            InputError: There is no run under way, or the action does not fit.
        """
        if self.controller is None:
            raise InputError("decode() before reset(): values depend on those of a run; call reset(seed=...) first")
        asked = self.controller.decode(np.asarray(action).reshape(1, -1))
        values: list[Any] = []
        for knob, number in zip(self.control_spec.make_knobs(), asked, strict=True):
            value = min(max(number, knob.low), knob.high)
            whole = round(value) if knob.is_whole else value
            values.append(knob.choices[int(whole)] if isinstance(knob, CategoricalKnob) else whole)
        return values

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin a run and take its first interval.

        Args:
            seed: Initial weights, data order and initial rate of this run and of those after it depend on it alone;
                None goes on drawing.
            options: There are none.

        Returns:
            The first observation (S,), and infos.

        Raises:
            InputError: There are options, a knob cannot act on the task, or the budget ends before an action could act.
        """
        if options:
            raise InputError(f"reset(options={options}); this environment has none, give them when it is made")
        super().reset(seed=seed)
        run = int(self.np_random.integers(1 << 62))
        low, high = np.log(INITIAL_RATES)
        drawn = float(np.exp(numpy_generator(run, "initial rate").uniform(low, high)))
        task = self.task.replace(lr=drawn if self._lr is None else self._lr)
        if task.weight_decay == 0 and "weight_decay" in self.control_spec.knobs:
            # Nothing can be multiplied with 0: the least that the knob can write, which changes next to nothing.
            knobs = dict(zip(self.control_spec.knobs, self.control_spec.make_knobs(), strict=True))
            task = task.replace(weight_decay=knobs["weight_decay"].low)
        self._loop = loop = TrainingLoop(task, self._data, seed=run, device=self._device)
        timing, epoch_steps = self.control_spec.timing, loop.steps_per_epoch
        if timing.next_decision(0, 0, loop.total_steps, epoch_steps) >= loop.total_steps:
            raise InputError(
                f"the first decision would fall on the end of the budget of {loop.total_steps} optimizer steps; decide "
                "more often, or take a larger scale"
            )
        if timing.every == "epoch":  # the loop has no loader that the controller could ask
            timing = dataclasses.replace(timing, every=epoch_steps)
        self.controller = _Held(
            "constant",  # which is never asked: the actions come by `answer`
            optimizer=loop.optimizer,
            model=loop.model,
            loader=loop,
            total_steps=loop.total_steps,
            spec=dataclasses.replace(self.control_spec, timing=timing),
            safety=self._safety,
            mode="use",
        )
        self._advance(loop, self.controller)
        return np.array(self.controller.last_observation), self._infos(loop, self.controller)

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One decision, and the interval after it.

        Args:
            action: As the action space has it: one factor's number, or (K,).

        Returns:
            Observation (S,), reward of the interval, terminated, truncated (never), infos.

        Raises:
            InputError: `reset` was not called since the start or since the end of an episode, or the action does not
                fit.
        """
        loop, controller = self._loop, self.controller
        if loop is None or controller is None:
            raise InputError("step() before reset(); call reset(seed=...) first")
        if controller.status != "running":
            raise InputError("step() after the end of the episode; call reset() first")
        controller.answer(np.asarray(action).reshape(1, -1))
        # An action may leave nothing: what is left of the budget does not pay for a step with so many samples.
        reward = self._advance(loop, controller) if controller.status == "running" else None
        is_over = controller.status != "running"
        return (
            np.array(controller.last_observation),
            0.0 if reward is None else reward,
            is_over,
            False,
            self._infos(loop, controller),
        )

    def _advance(self, loop: TrainingLoop, controller: _Held) -> float | None:
        """Train up to the next decision, validate, and let the controller look; the reward of the interval."""
        is_due = False
        while not is_due:
            is_due = controller.is_due
            loss = loop.step()
            if is_due:
                measured = loop.evaluate("val")
                self._val_loss = measured["loss"]
                metrics = {"accuracy": measured["accuracy"]} if "accuracy" in measured else None
                controller.report(self._val_loss, metrics)
            controller.step(loss)
        return controller.last_reward

    def _infos(self, loop: TrainingLoop, controller: _Held) -> dict[str, Any]:
        infos: dict[str, Any] = {
            "optimizer_steps": loop.steps_done,
            "val_loss": self._val_loss,
            "rolled_back": controller.was_rolled_back or controller.status == "gave_up",
            "masked": sorted(controller.masked),
            **controller.read_knobs(),
        }
        if controller.status != "running":
            # Whoever gave up, or rolled the last interval back, has put other weights in place.
            infos["final_val_loss"] = loop.evaluate("val")["loss"]
            infos["best_val_loss"] = float(controller.state.summary.best_val_loss)
        return infos


class _Held(Controller):
    """A controller that waits at each decision for an answer from outside.

    Attributes:
        was_rolled_back: Whether the last interval was, and control went on.
    """

    was_rolled_back = False
    _is_waiting = False

    def _act(self, observation: Array, verdict: Verdict, *, is_over: bool) -> None:
        self.was_rolled_back = verdict is not GOOD
        self._is_waiting = verdict is GOOD and not is_over
        if not self._is_waiting:  # the guard cuts the rate, or the run is over: nobody's action counts
            super()._act(observation, verdict, is_over=is_over)

    def decode(self, action: npt.NDArray[Any]) -> list[float]:
        """The settings that an action asks for, before gate and bounds; (1, K).

        Raises:
            InputError: The action does not fit.
        """
        return self._hand.check(action, max(0, self._index - 1))

    def answer(self, action: npt.NDArray[Any]) -> None:
        """Do now what `_act` would have done with an agent's action; (1, K).

        Raises:
            InputError: The action does not fit; the question stands.
        """
        decided = self._index - 1  # the decision is counted when it is asked
        if self._is_waiting:
            self._hand.act(action, decided, self._t, is_placebo=False)
            self._is_waiting = False
            if self._take_in_changes() and self._guard is not None:
                self._keep_snapshot(is_stale=True)
            self._clock.read(self._t)  # a knob may have changed what a step costs
            if self._clock.is_used_up:
                self.status = "over"
            else:
                self._aim()
        else:
            self._hand.check(action, decided)  # a wrong action is refused even where it cannot count


def _make_spec(spec: ControlSpec | None, knobs: Sequence[str] | None) -> ControlSpec:
    if spec is None:
        if isinstance(knobs, str):
            raise InputError(f"knobs {knobs!r}; expected a sequence of names, such as ('lr',)")
        names = ("lr",) if knobs is None else tuple(knobs)
        return dataclasses.replace(default_spec(), knobs=names, reward="log_improvement", penalty=-1.0)
    if not isinstance(spec, ControlSpec):
        raise InputError(f"spec is a {type(spec).__name__}; expected a ControlSpec or None")
    if knobs is not None and tuple(knobs) != spec.knobs:
        raise InputError(f"knobs {knobs!r} beside a spec with the knobs {spec.knobs}; give either spec or knobs")
    if spec.reward == "score_rank":
        raise InputError(
            "reward 'score_rank' ranks the runs of one task, and here one run is alone: it would be 0 throughout; "
            "take 'log_improvement', or gymnasium.make_vec for several runs"
        )
    return spec

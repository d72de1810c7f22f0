"""RLScheduler: a controller of the learning rate where a torch scheduler stood.

Called by users. It is a `torch.optim.lr_scheduler.LRScheduler`, so that what checks for one accepts it; what it
writes is decided by a brain, not by a formula of the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trimtab.brain import Brain
from trimtab.controller import Controller
from trimtab.errors import InputError
from trimtab.records import Decision
from trimtab.run_state import BatchingLoop
from trimtab.safety import Safety

__all__ = ["RLScheduler"]


class RLScheduler(LRScheduler):
    """A learning-rate scheduler that looks at the run.

    Put it where the torch scheduler was, and give `step` the loss::

        scheduler = trimtab.RLScheduler(optimizer, total_steps=1000)
        for inputs, targets in loader:
            loss = loss_function(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            optimizer.zero_grad()

    Gradients are looked at in the optimizer's own step, so it does not matter when `zero_grad` is called. The loss
    stays on its device; only a decision (a few dozen in a run) waits for it.

    Args:
        optimizer: Its param groups' rates are moved together, their ratios kept. A tensor rate is filled in place.
        total_steps: Calls of `step` that are planned; beyond them the last rate is held, with one warning. None:
            the horizon is unknown, and nothing decays towards an end.
        brain: "default" (learned; without `total_steps` the rule `uwhg`, which needs no end), a folder that
            `Brain.save` wrote, or a Brain. One that learns (a Q-table) goes on learning here; it is `scheduler.brain`.
        model: Lets buffers (batch norm) take part in roll-backs, and makes `best_state` possible.
        seed: Seed of the brain's exploration, for brains that explore; the default one draws nothing.
        rollback: Watch for divergence and roll back to the start of the interval; "cpu" keeps the snapshot, whose
            size `repr` shows, in host memory; False keeps none and never rolls back.
        on_conflict: What to do when something else writes the rate: "error", or "warn": hand the rate back and
            end control.
        loader: Where a brain moves the batch size: the loop (`TrainingLoop`), or the DataLoader whose `batch_sampler`
            is a `trimtab.knobs.data.ResizableBatchSampler`. Knobs that have nothing to act on here (that, without a
            loader; dropout, without a `model` that has it) are left out where the brain was taught to do without them,
            and else refused.
        average: With a `model`, keep a running average of the weights beside them, one more copy; see `averaged`.

    Raises:
        InputError: An argument is wrong, such as a rate of 0 or NaN; the message names it.
        BrainError: The brain cannot be loaded.
        ConflictError: Another scheduler is attached to the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        *,
        brain: str | Path | Brain = "default",
        model: nn.Module | None = None,
        seed: int = 0,
        rollback: bool | Literal["cpu"] = True,
        on_conflict: str = "error",
        loader: Iterable[Any] | BatchingLoop | None = None,
        average: bool = True,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed is {seed!r}; expected a whole number of 0 or more")
        if not isinstance(average, bool):
            raise InputError(f"average is {average!r}; expected True or False")
        if not isinstance(rollback, bool) and rollback != "cpu":
            raise InputError(f"rollback is {rollback!r}; expected True, False or 'cpu'")
        if not isinstance(brain, (str, Path, Brain)):
            raise InputError(f"brain is a {type(brain).__name__}; expected 'default', a folder, or a trimtab.Brain")
        self._source = brain if isinstance(brain, str) else repr(brain)
        if brain == "default" and total_steps is None:
            brain = "default-open"  # no end is known, so nothing may decay towards one
        self.brain = brain if isinstance(brain, Brain) else Brain.load(brain)
        self.brain.agent.reseed(seed)
        self._controller = Controller(
            self.brain,
            optimizer=optimizer,
            model=model,
            loader=loader,
            total_steps=total_steps,
            safety=Safety(rollback=bool(rollback), snapshot_on_cpu=rollback == "cpu", on_conflict=on_conflict),
            mode="learn" if self.brain.agent.is_learned else "use",
            average=average if model is not None else False,
        )
        has_own_step = "step" in vars(optimizer)
        super().__init__(optimizer)
        if not has_own_step:
            # Torch wraps `optimizer.step`, for a warning of its own schedulers' `step`. That one is overridden here,
            # and the wrapper costs 2.5 us a step.
            vars(optimizer).pop("step", None)
        # A scheduler that was here before leaves its own initial_lr behind: what counts is the rate found.
        self.base_lrs = [_copy(group["lr"]) for group in optimizer.param_groups]

    def _initial_step(self) -> None:
        """The controller has written the first rate already."""
        self._step_count = 1

    @property
    def last_epoch(self) -> int:
        """Calls of `step` so far, under torch's name for them."""
        return self._controller.n_steps

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        """Torch's constructor sets it; the controller counts."""

    def __repr__(self) -> str:
        controller = self._controller
        size = controller.snapshot_bytes
        kept = f"snapshots of {size / 1e6:.1f} MB" if size else "no snapshots"
        rates = [float(rate) for rate in self.get_last_lr()]
        return (
            f"RLScheduler(brain={self._source!r} ({self.brain.agent.name}), "
            f"total_steps={controller.state.total_steps}, "
            f"step={self.last_epoch}, lr={rates}, {controller.status}, {kept})"
        )

    @property
    def decisions(self) -> list[Decision]:
        """Every decision so far: asked, written, read back."""
        return list(self._controller.decisions)

    @property
    def status(self) -> str:
        """One of "running", "over", "gave_up" and "conflict"; see `Controller.status`."""
        return self._controller.status

    @property
    def masked(self) -> dict[str, str]:
        """Knobs of the brain that have nothing to act on here and were left out, and why."""
        return self._controller.masked

    @property
    def skipped_steps(self) -> int:
        """Calls of `step` before which the optimizer took no step, because a gradient scaler skipped it."""
        return self._controller.n_skipped_steps

    def step(self, loss: Tensor | float | None = None) -> None:
        """Take in one optimizer step; call it once after each `optimizer.step()`.

        Args:
            loss: The train loss of that step, one number. A tensor is kept where it is.

        Raises:
            InputError: There is no loss, or it is not one number.
            ConflictError: Something else wrote the rate since the last call.
        """
        if loss is None:
            raise InputError("RLScheduler.step() needs the loss of the step just taken: call scheduler.step(loss)")
        self._controller.step(loss)

    def report(self, val_loss: float | Tensor | None = None, accuracy: float | None = None) -> None:
        """Tell it what was measured on validation data, at any time.

        Args:
            val_loss: Lower is better; the weights of the best one are what `best_state` returns.
            accuracy: In [0, 1].
        """
        self._controller.report(val_loss, None if accuracy is None else {"accuracy": accuracy})

    def averaged(self, batches: Iterable[Any] | None = None) -> AbstractContextManager[None]:
        """The model with a running average of its weights over the last part of the run.

        It is there to be evaluated, and is the model's own state again afterwards::

            with scheduler.averaged():
                scheduler.report(val_loss=evaluate(model))

        What is reported inside counts for `best_state` alone, which so returns the average where it is better.

        Args:
            batches: Train inputs, or tuples that begin with them, to measure the statistics of batch norm with;
                needed if the model has any.

        Raises:
            InputError: No `model` was given, `average` is False, nothing is averaged before half of `total_steps`,
                or batches are missing.
        """
        return self._controller.averaged(batches)

    @property
    def best_is_averaged(self) -> bool:
        """Whether what `best_state` returns is the average."""
        return self._controller.best_is_averaged

    def best_state(self) -> dict[str, Tensor]:
        """The model's `state_dict` at its best reported validation loss, the average's included.

        Raises:
            InputError: No `model` was given, or nothing was reported.
        """
        return self._controller.best_state()

    def get_last_lr(self) -> list[float | Tensor]:
        """Present rate of each param group, read from where it acts; tensors are copies."""
        return [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """The same as `get_last_lr`: there is no formula that would know the next rate."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped; loads with `torch.load(..., weights_only=True)`.

        It holds the snapshot of the interval's start and the best weights, so it is as large as those.
        """
        return {
            "brain": f"{self._source} ({self.brain.agent.name})",
            "last_epoch": self.last_epoch,
            "base_lrs": [_copy(rate) for rate in self.base_lrs],
            "controller": self._controller.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, before or after the optimizer's own is loaded.

        Raises:
            InputError: The state is not of a scheduler made with the same arguments.
        """
        if "controller" not in state_dict:
            raise InputError(f"this is no state of an RLScheduler: it has the keys {sorted(state_dict)}")
        self._controller.load_state_dict(state_dict["controller"])
        self.base_lrs = [_copy(rate) for rate in state_dict["base_lrs"]]


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate

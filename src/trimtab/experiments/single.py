"""One job of a study: one training run from its start, or from its checkpoint, to its result.

Called by the executors in a worker process. What is written where: `trimtab.storage.RunDirectory`. A run that is
killed and resumed writes the same files as one that was not, but for times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.agents.base import Agent, Base, Timing
from trimtab.agents.scripted import Replay
from trimtab.brain import Brain
from trimtab.controller import Controller
from trimtab.errors import InputError
from trimtab.experiments.earlier_brains import check_brain, sources_of, what_it_took
from trimtab.experiments.experience import check_experience, read_experience, store_run
from trimtab.experiments.fine_tuning import REWARD, Explorer, check_fine_tuning
from trimtab.experiments.jobs import (
    Job,
    Progress,
    begin_with,
    cosine_of,
    find_device,
    inference_speed,
    load_data,
    make_task,
)
from trimtab.safety import Safety
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec, make_agent
from trimtab.storage import RunDirectory, append_lines, load_state, read_lines, save_state
from trimtab.tasks.base import Data, Task
from trimtab.training.loop import TrainingLoop
from trimtab.training.own_optimizers import check_own_optimizer, put_in

__all__ = ["check_job", "check_own_optimizers", "run_one"]

# Losing more than this to a kill would be noticed; a checkpoint of the small GPT takes about 50 ms.
CHECKPOINT_EVERY_S = 15.0
LEARNED = "learned"  # folder, below the study's, of what arms learned before their runs
# Rules about who gets the guard: a placebo must equal its base to the bit, and a baseline is what everybody uses.
_GUARDED = ("learned", "rule", "yoked")


@dataclass
class _Times:
    """Wall time spent, in seconds, over all the parts of a run that was resumed."""

    training: float = 0.0
    controller: float = 0.0
    evaluation: float = 0.0


def check_job(job: Job) -> None:
    """Check, without data or training, that a job's task, agent, options, knobs and reward exist and fit together.

    Raises:
        InputError: Something does not; the message names the arm.
    """
    try:
        task = make_task(job)
        if job.get("own_optimizer") is not None:
            check_own_optimizer(job["own_optimizer"])
        if job["kind"] == "yoked":
            return  # it replays what its partner, checked as an arm of its own, will have decided
        if job.get("search") is not None:
            return  # trimtab.experiments.searches.check_search looks at it, with the data
        agent = _make_agent(job, task)
        spec = _make_spec(job, task, agent)
        spec.make_knobs()
        if job["brain"] is not None:
            check_brain(job["brain"], task)
        if job["learn_runs"]:
            check_fine_tuning(agent)
        if job.get("experience") is not None:
            check_experience(job, spec, agent)
    except InputError as error:
        raise type(error)(f"arm {job['arm']!r} on {job['task']!r}: {error}") from error


def check_own_optimizers(jobs: Iterable[Job], data_dir: str | None) -> None:
    """Check, without training, that jobs with an optimizer of their own can have it on their task's network.

    Raises:
        InputError: One cannot; the message names the arm.
    """
    for job in sorted(jobs, key=lambda job: str(job["task"])):
        try:
            data = load_data(job["task"], job["scale"], data_dir)
            put_in(TrainingLoop(make_task(job), data, seed=0), job["own_optimizer"])
        except InputError as error:
            raise type(error)(f"arm {job['arm']!r} on {job['task']!r}: {error}") from error
    load_data.cache_clear()  # it is the workers that need it


def run_one(job: Job, out: str, data_dir: str | None, progress: Progress) -> dict[str, Any]:
    """Run or resume one job; a finished one is only read.

    Args:
        job: `trimtab.experiments.plan.Job` as JSON.
        out: The study's folder.
        data_dir: Folder with the data sets, or None.
        progress: Called at every interval with step, total_steps, what of them is spent, and the losses.

    Returns:
        What result.json holds.
    """
    folder = RunDirectory(Path(out) / job["directory"])
    if folder.is_done():
        result: dict[str, Any] = _read_result(folder)
        return result
    if job.get("search") is not None:
        from trimtab.experiments.searches import run_search

        return run_search(job, folder, data_dir, progress)
    logging.getLogger("trimtab").setLevel(logging.ERROR)  # roll-backs are in the records; here they only tear the bar
    run = _Run(job, Path(out), data_dir, folder)
    while not run.is_over:
        run.interval()
        progress(run.news())
    result = run.result()
    if job["kind"] == "learned":
        store_run(job, folder, Path(out))
    folder.finish(result)
    return result


def _read_result(folder: RunDirectory) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(folder.result.read_text(encoding="utf-8"))
    return data


def _make_agent(job: Job, task: Task) -> Agent:
    options = dict(job["options"])
    if job["agent"] in ("cosine", "default-cosine"):
        options = cosine_of(task, options)
    seed = _exploration_seed(job)
    if _is_shared(job):  # what it learns must not depend on the task that it is used on
        seed = derive_seed(job["root_seed"], "learning", job["seed"])
    if job["brain"] is not None:
        agent = Brain.load(job["brain"]).agent
        if agent.name != job["agent"]:
            raise InputError(f"the brain in {job['brain']} is of the agent {agent.name!r}; say agent: {agent.name}")
        agent.reseed(seed)
        return agent
    return make_agent(job["agent"], options, seed=seed, n_knobs=len(job["knobs"]))


def _exploration_seed(job: Job) -> int:
    return derive_seed(job["root_seed"], "exploration", job["task"], job["seed"])


def _is_shared(job: Job) -> bool:
    """Whether an arm learns before its run what does not depend on that run's task."""
    has_own = bool(job.get("learn_tasks")) and job["learn_runs"] > 0
    return has_own and job.get("experience") is None and not job["placebo"]


def _learned_file(job: Job, out: Path) -> Path | None:
    """Where what such an arm learned is kept, for its runs on other tasks; None where it depends on the task."""
    if not _is_shared(job):
        return None
    same = {key: value for key, value in job.items() if key not in ("task", "role", "directory")}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]
    return out / LEARNED / f"{job['arm']}-seed-{job['seed']}-{digest}.safetensors"


def _read_learned(kept: Path) -> dict[str, Any] | None:
    """What was kept; None where nothing was, or what is there is torn and is learned anew."""
    try:
        saved: dict[str, Any] = load_state(kept)
    except InputError:
        return None
    return saved


def _make_spec(job: Job, task: Task, agent: Agent) -> ControlSpec:
    changes: dict[str, Any] = {"knobs": tuple(job["knobs"])}
    brain = None if job["brain"] is None else Brain.load(job["brain"])
    if brain is not None:  # what an arm cannot say is the brain's
        changes |= {key: getattr(brain.spec, key) for key in ("reward", "penalty", "turns", "masks")}
        if brain.spec.knobs == changes["knobs"]:
            changes["knob_options"] = brain.spec.knob_options
    if job["knob_options"]:
        changes["knob_options"] = job["knob_options"]
    if job["reward"] is not None:
        changes["reward"] = job["reward"]
    if brain is not None and brain.spec.base.name == job["base"]:
        changes["base"] = brain.spec.base
    elif job["base"] is not None:
        own = agent.needs.base
        options = dict(own.options) if own.name == job["base"] else {}
        changes["base"] = Base(job["base"], cosine_of(task, options) if job["base"] == "cosine" else options)
    if agent.needs.timing.every is not None:  # others, the rule and most brains, bring their own times
        if job["every"] is not None:
            changes["timing"] = Timing(every=job["every"])
        elif "every" not in job["options"]:
            changes["timing"] = Timing(every=task.eval_every)
    spec = ControlSpec.for_agent(agent, **changes)
    if brain is not None:
        brain.check_spec(spec)
    return spec


def _replay(job: Job, out: Path) -> tuple[Agent, ControlSpec, float]:
    """A twin of a finished run: the settings that it was granted, decision by decision, and its starting rate."""
    partner = RunDirectory(out / job["replay_from"])
    if not partner.is_done():
        raise InputError(f"{job['arm']} replays {job['replay_from']}, which did not come to its end")
    header = partner.header()
    spec = ControlSpec.from_json(header["spec"])
    start = header["start"]
    settings = [[start[knob] for knob in spec.knobs]]
    for row in read_lines(partner.decisions):
        while len(settings) <= row["index"] + 1:
            settings.append(list(settings[-1]))
        settings[row["index"] + 1][spec.knobs.index(row["knob"])] = row["setting"]
    agent = Replay(settings[1:] or settings, spec.timing, spec.base)
    same = {key: getattr(spec, key) for key in ("reward", "knobs", "knob_options", "masks")}
    return agent, ControlSpec.for_agent(agent, **same), float(start["lr"])


class _Run:
    """One run under way."""

    def __init__(self, job: Job, out: Path, data_dir: str | None, folder: RunDirectory) -> None:
        self.job = job
        self.task = make_task(job)
        data = load_data(job["task"], job["scale"], data_dir)
        self.folder = folder
        if job["kind"] == "yoked":
            agent, spec, start = _replay(job, out)
            self.task = self.task.replace(lr=start)
        else:
            agent = _make_agent(job, self.task)
            spec = _make_spec(job, self.task, agent)
        saved = folder.resume()
        self.learning = {"transitions": 0, "runs": 0, "optimizer_steps": 0, "flops": 0}
        if saved is None and not job["placebo"]:
            self._learn_from_earlier(agent, spec, out)
            self._learn_before(agent, data_dir, out)
        self.loop, self.controller = self._make(self.task, agent, spec, data, job["seed"])
        self.times = _Times()
        self.validation: dict[str, float] = {}
        if saved is None:
            self._begin(spec)
        else:
            self.loop.load_state_dict(saved["loop"])
            self.controller.load_state_dict(saved["controller"])
            self.times = _Times(**saved["times"])
            self.learning = saved["learning"]
        self._last_checkpoint = time.monotonic()

    def _make(
        self, task: Task, agent: Agent, spec: ControlSpec, data: Data, seed: int
    ) -> tuple[TrainingLoop, Controller]:
        job = self.job
        loop = TrainingLoop(
            task,
            data,
            seed=derive_seed(job["root_seed"], "run", task.name, seed),
            device=find_device(job["device"]),
            precision=job["precision"],
        )
        begin_with(loop, job["start"], job["arm"])
        if job.get("own_optimizer") is not None:
            put_in(loop, job["own_optimizer"])
        controller = Controller(
            agent,
            optimizer=loop.optimizer,
            model=loop.model,
            loader=loop,
            total_steps=loop.total_steps,
            spec=replace(spec, timing=_in_steps(spec.timing, loop)),
            safety=Safety(rollback=job["kind"] in _GUARDED),
            mode="placebo" if job["placebo"] else "learn",
        )
        return loop, controller

    def _learn_from_earlier(self, agent: Agent, spec: ControlSpec, out: Path) -> None:
        """What the agent learns from first: transitions of earlier runs with its spec, of another study."""
        if self.job.get("experience") is None:
            return
        transitions = read_experience(self.job, spec, out)
        self.learning["transitions"] = len(transitions)
        agent.learn_from_earlier(
            transitions.observations,
            transitions.actions,
            transitions.rewards,
            transitions.next_observations,
            transitions.terminated,
        )

    def _learn_before(self, agent: Agent, data_dir: str | None, out: Path) -> None:
        """What the agent learns from before the run that counts: whole runs under seeds that nothing reports.

        On tasks of its own (`learn_tasks`) it learns the same whatever task it is used on afterwards, and so once for
        all of them: the first run keeps what it learned. Two that begin at once learn the same, and write the same.
        """
        names = self.job.get("learn_tasks") or [self.job["task"]]
        kept = _learned_file(self.job, out)
        saved = None if kept is None else _read_learned(kept)
        if saved is not None:
            agent.load_state_dict(saved["agent"])
            self.learning = saved["learning"]
        else:
            self._learn_on(names, agent, data_dir)
            if kept is not None:
                save_state(kept, {"agent": agent.state_dict(), "learning": self.learning})
        if kept is not None:
            agent.reseed(_exploration_seed(self.job))

    def _learn_on(self, names: list[str], agent: Agent, data_dir: str | None) -> None:
        explorer = Explorer(agent) if agent.is_taught else None
        for number in range(self.job["learn_runs"]):
            job = {**self.job, "task": names[number % len(names)]}
            task = make_task(job)
            data = load_data(job["task"], job["scale"], data_dir)
            seed = derive_seed(self.job["root_seed"], "learning", self.job["seed"], number)
            spec = _make_spec(job, task, agent)
            if explorer is not None:
                explorer.begin_run()
                spec = replace(spec, reward=REWARD)
            loop, controller = self._make(task, explorer or agent, spec, data, seed)
            self._validate(loop, controller)
            while not loop.is_over() and controller.status == "running":
                loss = loop.step()
                if controller.is_due:
                    self._validate(loop, controller)
                controller.step(loss)
            self.learning["runs"] += 1
            self.learning["optimizer_steps"] += loop.steps_done
            self.learning["flops"] += loop.flops_used
        if explorer is not None:
            self.learning["transitions"] += explorer.teach()

    def _begin(self, spec: ControlSpec) -> None:
        job = self.job
        self.folder.start({
            "schema": 1,
            **{key: job[key] for key in ("study", "arm", "task", "role", "seed", "agent", "kind", "of", "options")},
            "dataset": self.task.dataset,
            **({} if job["brain"] is None or job["kind"] != "learned" else {"taught": what_it_took(job["brain"])}),
            "initial_lr": self.task.lr if job["initial_lr"] is None else job["initial_lr"],
            "start": {name: float(value) for name, value in self.controller.state.initial_settings.items()},
            "total_steps": self.loop.total_steps,
            "flops_budget": self.loop.flops_budget,
            "job": dict(job),
            "spec": self.controller.spec.to_json(),
            "fingerprint": spec.fingerprint,
            "device": str(self.loop.device),
            "precision": self.loop.precision,
        })  # fmt: skip
        self._validate(self.loop, self.controller)
        append_lines(self.folder.series, [self._row()])

    def _validate(self, loop: TrainingLoop, controller: Controller) -> dict[str, float]:
        measured = loop.evaluate("val")
        metrics = {"accuracy": measured["accuracy"]} if "accuracy" in measured else None
        controller.report(measured["loss"], metrics)
        self.validation = measured
        return measured

    @property
    def is_over(self) -> bool:
        return self.loop.is_over() or self.controller.status == "gave_up"

    def interval(self) -> None:
        """Train up to the next decision, and write down what happened."""
        loop, controller, times = self.loop, self.controller, self.times
        started = time.perf_counter()
        while not self.is_over:
            is_due = controller.is_due
            loss = loop.step()
            if is_due:
                before = time.perf_counter()
                self._validate(loop, controller)
                times.evaluation += time.perf_counter() - before
            before = time.perf_counter()
            decisions = controller.step(loss)
            times.controller += time.perf_counter() - before
            if is_due:
                append_lines(self.folder.decisions, [decision.to_json() for decision in decisions])
                append_lines(self.folder.series, [self._row()])
                break
        times.training += time.perf_counter() - started
        if time.monotonic() - self._last_checkpoint > CHECKPOINT_EVERY_S and not self.is_over:
            self.folder.checkpoint({
                "loop": loop.state_dict(),
                "controller": controller.state_dict(),
                "times": vars(times),
                "learning": self.learning,
            })  # fmt: skip
            self._last_checkpoint = time.monotonic()

    def _row(self) -> dict[str, Any]:
        """One line of series.jsonl; what a roll-back took out of the state is still what was measured here."""
        controller, state = self.controller, self.controller.state
        seen = controller.last_interval
        return {
            "optimizer_step": self.loop.steps_done,
            "epoch": self.loop.epoch,
            "spent": self.loop.spent,
            "samples": self.loop.samples_seen,
            "progress": self.loop.spent / self.loop.total_steps,
            "train_loss": None if seen is None else float(seen.train_loss),
            "val_loss": self.validation["loss"],
            "accuracy": self.validation.get("accuracy"),
            "reward": controller.last_reward,
            "signals": dict(zip(controller.spec.signals, controller.last_observation, strict=True)),
            "knobs": controller.read_knobs(),
            "best_val_loss": float(state.summary.best_val_loss),
        }

    def news(self) -> dict[str, Any]:
        """What the progress bar shows."""
        row = self._row()
        return {
            "total_steps": self.loop.total_steps,
            **{k: row[k] for k in ("optimizer_step", "spent", "train_loss", "val_loss")},
        }

    def result(self) -> dict[str, Any]:
        """Measure the end: validation again (timed), and test, for the only time."""
        loop, controller = self.loop, self.controller
        started = time.perf_counter()
        val = loop.evaluate("val")
        eval_runtime = time.perf_counter() - started
        test = loop.evaluate("test")
        rows = read_lines(self.folder.series)
        known = [row["val_loss"] for row in rows if row["val_loss"] is not None]
        last_train = next((row["train_loss"] for row in reversed(rows) if row["train_loss"] is not None), None)
        metrics = {
            "final_train_loss": last_train,
            "final_val_loss": val["loss"],
            "best_val_loss": min([*known, val["loss"]]) if math.isfinite(val["loss"]) else min(known, default=None),
            "test_loss": test["loss"],
            "test_accuracy": test.get("accuracy"),
            "test_f1": test.get("f1"),
            "test_mse": test.get("mse"),
            "eval_loss": val["loss"],
            "eval_accuracy": val.get("accuracy"),
            "epoch": loop.epoch,
            "optimizer_steps": loop.steps_done,
            "samples": loop.samples_seen,
            "flops": loop.flops_used,
            "budget_used": loop.spent / loop.total_steps,
        }
        if (controller.agent.is_learned or self.learning["runs"]) and not self.job["placebo"]:
            self._save_brain()
        notes = [decision.note for decision in controller.decisions if decision.source in ("guard", "gave_up")]
        if not math.isfinite(test["loss"]):
            notes.append("diverged: the test loss is not finite")
        return {
            "status": "gave_up" if controller.status == "gave_up" else "done",
            "error": None,
            "metrics": metrics,
            "times": {
                "total_train_time": self.times.training,
                "controller_time": self.times.controller,
                "validation_time": self.times.evaluation,
                "eval_runtime": eval_runtime,
                "eval_samples_per_second": val["n_samples"] / eval_runtime,
                "eval_steps_per_second": val["n_batches"] / eval_runtime,
                "avg_inference_tokens_per_second": inference_speed(loop),
            },
            "n_decisions": len(controller.decisions),
            "n_interventions": sum(decision.setting != before for decision, before in _with_settings(controller)),
            "n_rollbacks": controller.n_rollbacks,
            "test_reads": loop.test_reads,
            "learning": self.learning,
            "notes": notes,
            "brain": controller.spec.fingerprint,
        }

    def _save_brain(self) -> None:
        """Keep what was learned, so that later runs, here or behind RLScheduler, can go on from it."""
        job, learning = self.job, self.learning
        provenance = {
            "study": job["study"],
            "arm": job["arm"],
            "task": job["task"],
            "root_seed": job["root_seed"],
            "seed": job["seed"],
            "from": job["brain"],
            **({} if job["brain"] is None else sources_of(job["brain"])),
            "runs": learning["runs"] + 1,
            "optimizer_steps": learning["optimizer_steps"] + self.loop.steps_done,
            "trimtab": trimtab.__version__,
            "torch": torch.__version__,
        }
        Brain(self.controller.agent, self.controller.spec, provenance).save(self.folder.path / "brain")


def _with_settings(controller: Controller) -> list[tuple[Any, float]]:
    """Each decision beside the setting before it."""
    settings = {name: float(value) for name, value in controller.state.initial_settings.items()}
    pairs = []
    for decision in controller.decisions:
        pairs.append((decision, settings[decision.knob]))
        settings[decision.knob] = decision.setting
    return pairs


def _in_steps(timing: Timing, loop: TrainingLoop) -> Timing:
    """Epochs as optimizer steps: the loop has no loader that could be asked."""
    return timing if timing.every != "epoch" else replace(timing, every=loop.steps_per_epoch)

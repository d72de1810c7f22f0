"""What Stable-Baselines3 costs beside a batched environment, and what one decision of a learned policy costs.

    python benchmarks/sb3_rollout.py [--rounds 20] [--out FILE.json]

One iteration is a whole episode of 256 runs (27 decisions, 18 signals), then PPO's update (4 epochs, 3 minibatches).
The same is done by a bare loop: the policy in NumPy, everything kept in arrays, the update in a few lines of torch. The
environment costs nothing but random numbers, and what it costs is counted apart and taken off. The two are run in turn,
in an order that changes from round to round. CPU seconds of the process on one thread; medians with quartiles.

A decision is timed warm, in a tight loop, and after other work has gone through 8 MB of memory, which is nearer to
where it stands in a training run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import gymnasium
import numpy as np
import stable_baselines3
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from trimtab import registry
from trimtab.agents.features import SIGNALS
from trimtab.agents.policy import DQNAgent, PPOAgent
from trimtab.agents.sb3 import PPOTrainer
from trimtab.envs.sb3 import SB3View

N_RUNS, N_DECISIONS, N_SIGNALS, GROUP = 256, 27, 18, 16
ENV_DECISIONS_A_SECOND = 6000  # the goal for small MLPs, ten optimizer steps each; for the share of an iteration


class RandomTraining(gymnasium.vector.VectorEnv):
    """Random observations, and ranks at the end; it counts the CPU seconds that it takes itself."""

    def __init__(self) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = N_RUNS
        self.single_observation_space = gymnasium.spaces.Box(-3.0, 3.0, (N_SIGNALS,), np.float64)
        self.single_action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float64)
        self.seconds = 0.0

    def reset(self, *, seed=None, options=None):
        """First observations."""
        started = time.process_time()
        self._rng, self._taken = np.random.default_rng(seed), 0
        seen = self._rng.normal(size=(N_RUNS, N_SIGNALS))
        self.seconds += time.process_time() - started
        return seen, {}

    def step(self, actions):
        """One decision of all runs."""
        started = time.process_time()
        seen, reward, infos = self._rng.normal(size=(N_RUNS, N_SIGNALS)), np.zeros(N_RUNS), {}
        self._taken += 1
        done = np.full(N_RUNS, self._taken == N_DECISIONS)
        if done[0]:
            ranks = actions.reshape(-1, GROUP).argsort(axis=1).argsort(axis=1)
            reward = (ranks / (GROUP - 1) - 0.5).reshape(-1)
            infos, self._taken = {"final_obs": seen, "_final_obs": done}, 0
        self.seconds += time.process_time() - started
        return seen, reward, done, np.zeros(N_RUNS, np.bool_), infos


class Stopwatch:
    """Wraps a method and adds up the CPU seconds spent in it."""

    def __init__(self, method):
        self.method, self.seconds = method, 0.0

    def __call__(self, *args, **kwargs):
        """Call what is wrapped."""
        started = time.process_time()
        try:
            return self.method(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - started


class Bare:
    """PPO without a framework: what would have to be written instead."""

    def __init__(self, agent: PPOAgent) -> None:
        self.agent = agent
        self.policy, self.value = self._network(len(agent.moves)), self._network(1)
        self.parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, 1e-3)
        self.rng = np.random.default_rng(0)

    def _network(self, n_out: int) -> nn.Sequential:
        layers = [nn.Linear(N_SIGNALS, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, n_out)]
        return nn.Sequential(*layers)

    @staticmethod
    def _forward(layers, x):
        for index, (weight, bias) in enumerate(layers):
            x = x @ weight + bias
            x = np.tanh(x) if index < 2 else x
        return x

    def collect(self, envs: RandomTraining, seed: int):
        """One episode of every run: features, choices, log probabilities, advantages, returns; (T R, ...)."""
        nets = [
            [
                (layer.weight.detach().numpy().T, layer.bias.detach().numpy())
                for layer in net
                if isinstance(layer, nn.Linear)
            ]
            for net in (self.policy, self.value)
        ]
        seen, _ = envs.reset(seed=seed)
        shape = (N_DECISIONS, N_RUNS)
        features = np.zeros((*shape, N_SIGNALS), np.float32)
        chosen, chances = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        values, rewards = np.zeros((N_DECISIONS + 1, N_RUNS), np.float32), np.zeros(shape, np.float32)
        for step in range(N_DECISIONS):
            x = features[step] = self.agent.features(seen)
            logits = self._forward(nets[0], features[step])
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            below = np.cumsum(np.exp(logits), axis=1)[:, :-1]
            chosen[step] = (self.rng.random((N_RUNS, 1)) >= below).sum(axis=1)
            chances[step] = logits[np.arange(N_RUNS), chosen[step]]
            values[step] = self._forward(nets[1], x.astype(np.float32))[:, 0]
            seen, rewards[step], _, _, _ = envs.step(self.agent.move_table[chosen[step]][:, None])
        advantages, last = np.zeros(shape, np.float32), np.zeros(N_RUNS, np.float32)
        for step in reversed(range(N_DECISIONS)):  # no value follows the last decision: values[N_DECISIONS] is 0
            last = rewards[step] + values[step + 1] - values[step] + 0.97 * last
            advantages[step] = last
        returns = advantages + values[:-1]
        flat = [torch.from_numpy(array.reshape(-1)) for array in (chosen, chances, advantages, returns)]
        return [torch.from_numpy(features.reshape(-1, N_SIGNALS)), *flat]

    def train(self, rollout) -> None:
        """4 epochs of 3 minibatches."""
        total = N_DECISIONS * N_RUNS
        for _ in range(4):
            order = torch.from_numpy(self.rng.permutation(total))
            for part in order.chunk(3):
                features, chosen, before, advantages, returns = (tensor[part] for tensor in rollout)
                logs = torch.log_softmax(self.policy(features), dim=1)
                ratio = torch.exp(logs.gather(1, chosen[:, None])[:, 0] - before)
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                gain = torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)).mean()
                entropy = -(logs.exp() * logs).sum(dim=1).mean()
                error = nn.functional.mse_loss(self.value(features)[:, 0], returns)
                loss = -gain - 0.02 * entropy + 0.5 * error
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, 0.5)
                self.optimizer.step()


def middle(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high, "min": min(values)}


def measure_rollouts(rounds: int) -> dict:
    """CPU milliseconds of an iteration's parts, Stable-Baselines3 and bare in turn."""
    names = [*SIGNALS, *(f"more{index}" for index in range(N_SIGNALS - len(SIGNALS)))]
    for name in names[len(SIGNALS) :]:
        registry.add("signal", name, "trimtab.signals:progress")
    agent = PPOAgent(signals=names)
    trainer, bare, envs = PPOTrainer(agent, 0, {}), Bare(agent), RandomTraining()
    train = trainer.model.train = Stopwatch(trainer.model.train)
    kept: dict[str, list[float]] = {}

    def note(key: str, seconds: float) -> None:
        kept.setdefault(key, []).append(1000 * seconds)

    def with_sb3(turn: int) -> None:
        envs.seconds = train.seconds = 0.0
        view = SB3View(
            envs,
            observe=agent.features,
            act=lambda chosen, *rest: agent.to_actions(agent.move_table[chosen], *rest),
            action_space=trainer.action_space,
        )
        started = time.process_time()
        trainer.iterate(view, N_DECISIONS, turn)
        whole = time.process_time() - started - envs.seconds
        note("sb3 collect", whole - train.seconds)  # with what stands around it: the reset, the buffer, the generators
        note("sb3 train", train.seconds)
        note("sb3", whole)

    def with_bare(turn: int) -> None:
        envs.seconds = 0.0
        started = time.process_time()
        rollout = bare.collect(envs, turn)
        between = time.process_time()
        bare.train(rollout)
        ended = time.process_time()
        note("bare collect", between - started - envs.seconds)
        note("bare train", ended - between)
        note("bare", ended - started - envs.seconds)
        note("environment", envs.seconds)

    for turn in range(rounds + 2):
        for play in (with_sb3, with_bare) if turn % 2 else (with_bare, with_sb3):
            play(turn)
        if turn == 1:
            kept.clear()  # two rounds to warm up
    result = {key: middle(values) for key, values in kept.items()}
    extra = [a - b for a, b in zip(kept["sb3"], kept["bare"], strict=True)]
    environment = 1000 * N_RUNS * N_DECISIONS / ENV_DECISIONS_A_SECOND
    return {
        "runs": N_RUNS,
        "decisions": N_DECISIONS,
        "signals": N_SIGNALS,
        "rounds": rounds,
        "ms_an_iteration": result,
        "sb3_minus_bare_ms": middle(extra),
        "batched_environment_ms": environment,
        "sb3_minus_bare_share_of_environment": middle(extra)["median"] / environment,
        "raw_ms": kept,
    }


def measure_decisions(rounds: int) -> dict:
    """CPU microseconds of one deterministic decision of one run."""
    rng = np.random.default_rng(0)
    elsewhere = np.zeros(1 << 20)
    found = {}
    agents = {
        "ppo": PPOAgent(),
        "dqn": DQNAgent(),
        "ppo, residual": PPOAgent(residual="uwhg"),
        "ppo, five members": PPOAgent(members=5),
    }
    starts = np.zeros(1, np.bool_)
    for name, agent in agents.items():
        seen = rng.normal(size=(1, len(agent.features.signals)))
        _, state = agent.predict(seen, None, np.ones(1, np.bool_), deterministic=True)
        warm, cold = [], []
        for _ in range(rounds):
            started = time.process_time()
            for _ in range(500):
                agent.predict(seen, state, starts, deterministic=True)
            warm.append((time.process_time() - started) / 500 * 1e6)
            single = []
            for _ in range(20):
                elsewhere += 1.0
                started = time.perf_counter()  # one call is shorter than the process clock can tell
                agent.predict(seen, state, starts, deterministic=True)
                single.append((time.perf_counter() - started) * 1e6)
            cold.append(statistics.median(single))
        found[name] = {"warm_us": middle(warm), "after_8_MB_us": middle(cold)}
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sb3_rollout.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    rollouts, decisions = measure_rollouts(arguments.rounds), measure_decisions(arguments.rounds)
    for key, value in rollouts["ms_an_iteration"].items():
        print(f"{key:14s} {value['median']:8.2f} ms an iteration ({value['low']:.2f} to {value['high']:.2f})")
    extra, share = rollouts["sb3_minus_bare_ms"], rollouts["sb3_minus_bare_share_of_environment"]
    print(f"Stable-Baselines3 costs {extra['median']:.1f} ms more ({extra['low']:.1f} to {extra['high']:.1f}):")
    print(f"{share:.1%} of an environment that takes {ENV_DECISIONS_A_SECOND} decisions a second")
    for name, row in decisions.items():
        print(
            f"{name:18s} {row['warm_us']['median']:6.1f} us warm, {row['after_8_MB_us']['median']:6.1f} us after 8 MB"
        )
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "load_before_and_after": [load[0], os.getloadavg()[0]],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({"machine": machine, "rollout": rollouts, "decision": decisions}, indent=1) + "\n"
    )
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

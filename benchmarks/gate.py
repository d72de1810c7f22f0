"""Does the gate learn to act where it helps, and nowhere else? On toys whose right decisions are known.

    python benchmarks/gate.py [--seeds 5] [--agent ppo] [--out FILE.json]

Four states come at random, seen with a little noise; in one of them intervening helps. Toys:

    costly    intervening gives +1 there and costs 0.5 elsewhere
    neutral   it gives +1 there and nothing elsewhere: a tie is no reason to intervene
    noisy     as costly, under noise with a standard deviation of 1 (else 0.1)
    later     it costs 0.1 everywhere, and there leads to a state that gives +1 at the next decision

Through `trimtab.HyperParameterOptimizer` with the write-up's configuration. After 150, 300 and 600 decisions: the share
of right ones without exploration, on 100 fresh observations; and, over the last 100 decisions, with it. Seeds begin at
70; the gate's constants were set on seeds 0 to 3.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from gymnasium import spaces

from trimtab import HyperParameterOptimizer
from trimtab.storage import write_json

TOYS = ("costly", "neutral", "noisy", "later")
LOOKS = (150, 300, 600)
FIRST_SEED, GOOD = 70, 2
ENV = SimpleNamespace(
    observation_space=spaces.Box(-np.inf, np.inf, (4,)),
    action_space=spaces.MultiDiscrete([3, 3]),
)


def reward_of(toy: str, state: int, acts: bool, is_bonus: bool, rng: np.random.Generator) -> float:
    """Of one decision."""
    if toy == "later":
        gain = float(is_bonus) - 0.1 * acts
    else:
        gain = (1.0 if state == GOOD else 0.0 if toy == "neutral" else -0.5) * acts
    return float(gain + (1.0 if toy == "noisy" else 0.1) * rng.normal())


def play(toy: str, agent: str, seed: int) -> dict[int, tuple[float, float]]:
    """Decisions -> (share of right ones without exploration, and with it)."""
    tuner = HyperParameterOptimizer(ENV, {"seed": seed, "agent": agent})
    rng = np.random.default_rng(seed)
    fresh = np.random.default_rng(seed + 1000)

    def observe(state: int, source: np.random.Generator) -> np.ndarray:
        return np.eye(4)[state] + 0.05 * source.normal(size=4)

    state, is_bonus, right, looks = 0, False, [], {}
    seen = observe(state, rng)
    for number in range(1, max(LOOKS) + 1):
        acts = tuner.optimize_hyperparameters(seen) is not None
        reward = reward_of(toy, state, acts, is_bonus, rng)
        right.append(acts == (state == GOOD))
        is_bonus = toy == "later" and acts and state == GOOD
        # In the toy of later effects the fourth state comes after a good act alone, so that it can be seen coming.
        state = 3 if is_bonus else int(rng.integers(3 if toy == "later" else 4))
        seen = observe(state, rng)
        tuner.learn_from_intervention(seen, reward, acts)
        if number in LOOKS:
            judged = [
                (tuner.learner.decide(observe(s, fresh)[None], deterministic=True)[0][0]) == (s == GOOD)
                for s in range(4)
                for _ in range(25)
            ]
            looks[number] = (float(np.mean(judged)), float(np.mean(right[-100:])))
    return looks


def main() -> int:
    """Play all toys, print, and write where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--agent", choices=("ppo", "dqn"), default="ppo")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for toy in TOYS:
        played = []
        for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
            print(f"\r{toy}: seed {seed}   ", end="", file=sys.stderr, flush=True)
            played.append(play(toy, arguments.agent, seed))
        for number in LOOKS:
            alone = [one[number][0] for one in played]
            exploring = [one[number][1] for one in played]
            rows.append({"toy": toy, "decisions": number, "right": alone, "right_exploring": exploring})
            print(
                f"\r{toy:8s} after {number:4d}: right {statistics.mean(alone):.3f} (lowest {min(alone):.2f}), "
                f"exploring {statistics.mean(exploring):.3f}"
            )
    if arguments.out:
        write_json(arguments.out, {"agent": arguments.agent, "first_seed": FIRST_SEED, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

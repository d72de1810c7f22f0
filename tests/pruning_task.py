"""A task of pruning that takes a fraction of a second, and the study that prunes it."""

from trimtab.tasks.base import Task
from trimtab.tasks.pruning import digits_pruning

NAME = "tiny-pruning"
STUDY = """
study: tiny
kind: pruning
idea: a test
tasks: [tiny-pruning]
targets: [{flops: 0.5}]
methods: [ppo, uniform, scratch]
max_evaluations: 8
n_best: 2
fine_tune_steps: 3
multiple: 4
latency_repeats: 2
latency_batch_sizes: [1, 64]
n_seeds: 1
"""


def tiny(scale: str = "small") -> Task:
    """digits-pruning for 30 optimizer steps."""
    return digits_pruning(scale).replace(name=NAME, total_steps=30, warmup_steps=0)

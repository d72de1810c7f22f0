"""A recipe so small that a whole brain is made in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "recipe": "tiny",
    "idea": "a test",
    "learner": "ppo",
    "options": {"hidden": [4]},
    "spec": {"n_decisions": 2, "early_decisions": 1},
    "tasks": {"families": ["quadratic"], "runs_per_task": 2, "horizon": [50, 52]},
    "num_envs": 4,
    "iterations": 3,
    "seeds": 2,
    "validate": {"every": 2, "num_envs": 2, "episodes": 1, "runs_per_task": 2},
    "choose": "best-or-ensemble",
}


def write(folder: Path, name: str = "tiny.yaml", **changes: Any) -> Path:
    """The tiny recipe as a file; a mapping is merged into what is there, None takes a key away."""
    data = dict(TINY)
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / name
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path

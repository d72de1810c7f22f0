"""The brains we ship: a folder each, with the command that made it in its provenance.

Called by `Brain.load`, `trimtab.pruner.policies` and the command line; nothing here imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["RULES", "descriptions", "folder_of"]

# Names that a rule without learning stands behind, as long as no brain of this name is shipped: the rule's options.
RULES: dict[str, dict[str, str]] = {"default": {}, "default-open": {"base": "constant"}}
_HERE = Path(__file__).parent


def folder_of(name: str) -> Path | None:
    """Folder of the shipped brain of this name; None where there is none."""
    return next((path.parent for path in _HERE.glob("*/brain.json") if path.parent.name == name), None)


def descriptions() -> dict[str, str]:
    """Name -> what it is, of everything that `Brain.load` knows by name, and of what `trimtab.prune` starts from."""
    rules = {
        "default": "the rule uwhg over a cosine, no learning; for runs with a known number of steps",
        "default-open": "the rule uwhg over a constant base, no learning; for runs whose end is not known",
    }
    learned = {}
    for path in sorted(_HERE.glob("*/brain.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        what = "learned" if data["format"] == "trimtab-brain" else "learned, for trimtab.prune"
        learned[path.parent.name] = f"{what}: {data['provenance'].get('command', 'provenance in brain.json')}"
    return {**rules, **learned}

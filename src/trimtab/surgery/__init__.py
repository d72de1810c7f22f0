"""surgery: add and remove units and layers of a live network, with its optimizer's state carried along.

Knows no reinforcement learning and no knobs. `layout` names the units on an axis, `trace` gets the forward as a graph,
`couplings` finds with `module_rules` and `operation_rules` what changes together, `units` cuts and copies tensors,
`layers` puts layers in and takes them out, `optimizer_state` follows, `surgeon` is what users call, `plans` repeats
what one did.
"""

from trimtab.surgery.couplings import Group
from trimtab.surgery.layers import Deepened, Head
from trimtab.surgery.plans import replay
from trimtab.surgery.surgeon import Change, Surgeon

__all__ = ["Change", "Deepened", "Group", "Head", "Surgeon", "replay"]

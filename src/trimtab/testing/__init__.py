"""Contract batteries for third parties: what an agent, knob, signal, reward or adapter owes, as functions to call.

Called from tests, ours and those of packages that register things of their own; nothing of trimtab needs it. Each
function raises `ContractError`, an AssertionError, whose text names what was broken, or returns None.
"""

from trimtab.testing.adapters import check_adapter
from trimtab.testing.agents import check_agent
from trimtab.testing.contract import ContractError
from trimtab.testing.knobs import check_knob
from trimtab.testing.rewards import check_reward
from trimtab.testing.signals import check_signal

__all__ = ["ContractError", "check_adapter", "check_agent", "check_knob", "check_reward", "check_signal"]

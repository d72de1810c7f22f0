"""The spec that controllers of the rate are trained on, where nothing else is asked for.

Called by the environments.
"""

from __future__ import annotations

from trimtab.spec import ControlSpec, make_agent

__all__ = ["default_spec"]


def default_spec(agent: str = "ppo", **options: object) -> ControlSpec:
    """What a learned policy asks for, judged by its rank at the end of the run.

    The penalty is 0: a run that was rolled back has lost the interval, and its rank says so.

    Args:
        agent: Name of a registered agent.
        **options: Its options.
    """
    return ControlSpec.for_agent(make_agent(agent, options), reward="score_rank", penalty=0.0)

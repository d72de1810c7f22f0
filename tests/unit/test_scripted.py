"""Scripts that remember within a run begin anew where a run begins, each run for itself."""

from __future__ import annotations

import numpy as np

from trimtab.agents.scripted import Plateau, Replay


def test_a_replay_starts_again_with_the_run_that_starts():
    agent, observation = Replay([[0.1], [0.2], [0.3]]), np.zeros((2, 0))
    _, state = agent.predict(observation)
    action, state = agent.predict(observation, state, np.array([False, True]))
    assert action.tolist() == [[0.2], [0.1]]
    assert agent.predict(observation, state)[0].tolist() == [[0.3], [0.2]]


def test_a_plateau_forgets_with_the_run_that_starts():
    agent = Plateau(patience=0)
    _, state = agent.predict(np.array([[1.0], [1.0]]))
    # Worse than before is a plateau of the run that goes on, and the first loss of the one that starts.
    action, _ = agent.predict(np.array([[2.0], [2.0]]), state, np.array([False, True]))
    assert action.tolist() == [[0], [1]]

"""Learning: what turns episodes of an environment into an agent."""

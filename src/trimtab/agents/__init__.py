"""Agents: from an observation to an action. They see arrays only, never a run, an optimizer or a record."""

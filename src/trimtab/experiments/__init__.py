"""Experiments: studies of arms x tasks x seeds, their runs, statistics, plots and report."""

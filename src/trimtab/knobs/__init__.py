"""Knobs: hyperparameters that can be changed while a model trains, one concept a file."""

"""Carrying out a run configuration: the run directory, training, evaluation, export."""

"""Averages of models: what is averaged, what it is worth, and what it is used for."""

"""Exact resume: what every stateful part saves, and saves that cannot be half done."""

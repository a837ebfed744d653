"""Verifiers that hang on one rank."""

import os
import time


def hangs_on_rank_1(completions):
    """Run in a process of the verifier pool, which knows the rank from its environment."""
    if os.environ.get("RANK") == "1":
        time.sleep(1000)
    return [float(len(completion) % 2) for completion in completions]

"""Verifiable rewards: small verifiers, each run in processes that can be killed at a deadline.

``build_rewards`` turns the ``rewards`` section of a configuration into callables for the trainer and the
evaluation. A verifier is a pure function ``(completion, row, **params) -> Verdict`` in a file of its own
(``reasoning_gym``, ``math``, ``expression``, ``format``, ``function``);
:mod:`~posttrain.rewards.pool` runs it. Nothing here imports torch.
"""

from posttrain.rewards.pool import VerifierPool, VerifierStartError
from posttrain.rewards.registry import VERIFIERS, VerifierSpec
from posttrain.rewards.reward import Reward, VerifierFailure, build_rewards
from posttrain.rewards.verdict import STATUSES, Status, Verdict

__all__ = [
    "STATUSES",
    "VERIFIERS",
    "Reward",
    "Status",
    "Verdict",
    "VerifierFailure",
    "VerifierPool",
    "VerifierSpec",
    "VerifierStartError",
    "build_rewards",
]

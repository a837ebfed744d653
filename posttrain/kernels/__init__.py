"""Statistics of next-token distributions, tile by tile: the only place that touches vocabulary-sized tensors.

:mod:`~posttrain.kernels.statistics`, :mod:`~posttrain.kernels.divergence`, :mod:`~posttrain.kernels.entropy`
and :mod:`~posttrain.kernels.kept` have the mathematics on plain tensors, :mod:`~posttrain.kernels.head` the
LM head of a model and the watching of a forward, :mod:`~posttrain.kernels.reference` a policy beside its
reference.
"""

from posttrain.kernels.divergence import filtered_forward_kl
from posttrain.kernels.entropy import entropies_with_gradient
from posttrain.kernels.head import LMHead, Scored, logit_scale_of, watch_head
from posttrain.kernels.kept import Truncation, log_kept
from posttrain.kernels.reference import ReferenceScores, score_against_reference
from posttrain.kernels.statistics import TILE, TokenStatistics, token_statistics

__all__ = [
    "TILE",
    "LMHead",
    "ReferenceScores",
    "Scored",
    "TokenStatistics",
    "Truncation",
    "entropies_with_gradient",
    "filtered_forward_kl",
    "log_kept",
    "logit_scale_of",
    "score_against_reference",
    "token_statistics",
    "watch_head",
]

"""``posttrain.SFTTrainer``: TRL's trainer with exact resume and a stop at the first non-finite number."""

from __future__ import annotations

from trl import SFTTrainer as TRLSFTTrainer

from posttrain.checkpointing.resume import ExactResume
from posttrain.guards import FiniteGuard


class SFTTrainer(ExactResume, FiniteGuard, TRLSFTTrainer):
    """Supervised fine-tuning; same arguments and same numbers as ``trl.SFTTrainer``."""

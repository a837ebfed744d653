"""``DPOTrainer`` and ``RewardTrainer``: TRL's, with selection, exact resume and a stop at bad numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl import DPOTrainer as TRLDPOTrainer
from trl import RewardTrainer as TRLRewardTrainer

from posttrain.guards import FiniteGuard
from posttrain.selection.trainer import SelectionMixin

if TYPE_CHECKING:
    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.selector import Selector
    from posttrain.selection.settings import Select


class _Selecting(SelectionMixin, FiniteGuard):
    """Takes ``selection=`` beside what the trainer beneath takes."""

    def __init__(
        self, *args: Any, selection: SelectionPlan | Selector | Select | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.start_selection(selection)


class DPOTrainer(_Selecting, TRLDPOTrainer):
    """Direct preference optimisation; same arguments and same numbers as ``trl.DPOTrainer``.

    Args:
        *args: As ``trl.DPOTrainer``.
        selection: Which weights train: a plan, a selector, either with settings, or None for what TRL trains.
        **kwargs: As ``trl.DPOTrainer``.

    Raises:
        posttrain.selection.plan.PlanError: The selection does not fit, or cannot be enforced here.
        FloatingPointError: During training, when a loss or gradient is not finite.
    """


class RewardTrainer(_Selecting, TRLRewardTrainer):
    """Training of reward models on preferences; arguments and numbers as ``trl.RewardTrainer``.

    ``selection`` and what is raised are as with :class:`DPOTrainer`.
    """

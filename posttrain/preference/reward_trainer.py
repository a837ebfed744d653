"""``posttrain.RewardTrainer``: TRL's, with selection, exact resume and a stop at bad numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl import RewardTrainer as TRLRewardTrainer

from posttrain.guards import FiniteGuard
from posttrain.selection.trainer import SelectionMixin

if TYPE_CHECKING:
    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.selector import Selector
    from posttrain.selection.settings import Select


class RewardTrainer(SelectionMixin, FiniteGuard, TRLRewardTrainer):
    """Training of reward models on preferences; same arguments and same numbers as ``trl.RewardTrainer``.

    Args:
        *args: As ``trl.RewardTrainer``.
        selection: Which weights train: a plan, a selector, either with settings, or None for what TRL trains.
        **kwargs: As ``trl.RewardTrainer``.

    Raises:
        posttrain.selection.plan.PlanError: The selection does not fit, or cannot be enforced here.
        FloatingPointError: During training, when a loss or gradient is not finite.
    """

    def __init__(
        self, *args: Any, selection: SelectionPlan | Selector | Select | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.start_selection(selection)

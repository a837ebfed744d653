"""How a selection is put into force: what :class:`Select` says beside the selector or plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.selector import Selector

Backend = Literal["auto", "freeze", "packed", "composed", "masked"]
Decay = Literal["off", "selected", "to_base"]
ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Names of the optimiser that ours can stand for."""
SWALLOWED_BELOW = 1e-4
"""Learning rate from which bf16 shows steps: half of its last place is about 6e-5 at 0.02, a usual weight."""


@dataclass(frozen=True)
class Select:
    """A selection with settings: ``SFTTrainer(..., selection=Select(HFT(), round=1))``.

    Attributes:
        what: A plan, or a selector that makes one.
        backend: See :mod:`posttrain.selection.apply`.
        weight_decay: Whether decoupled decay acts on single selected scalars: ``off``, ``selected`` (towards
            0) or ``to_base`` (towards the weights before training). Unselected scalars never decay; tensors
            that train whole decay as without a selection.
        age_correction: Bias correction by the number of steps a scalar has trained, see
            :mod:`posttrain.selection.adamw`.
        master_weights: Whether weights in half precision that train whole keep a copy in fp32, on which AdamW
            acts: 12 bytes of state per scalar in place of 4. Without it steps below half of their last place
            are lost. Packed values are in fp32 in any case; DeepSpeed and FSDP keep their own copies.
        round: Round of a sequence of trainings, for selectors that draw anew in each.
        examples: Rows of the training data that a selector may score weights on.
        batches: Those examples, where the trainer is not to take them from its own data.
    """

    what: SelectionPlan | Selector
    backend: Backend = "auto"
    weight_decay: Decay = "off"
    age_correction: bool = True
    master_weights: bool = True
    round: int = 0
    examples: int = 1024
    batches: Any = None

r"""WAGLE, weight attribution for unlearning: train what forgets and leaves the rest able (arXiv 2410.17509).

Idea
    An unlearning run (see ``posttrain methods unlearn``) is restricted to the weights that influence what is
    to be forgotten and whose change the retained ability tolerates. A bi-level argument gives a score in
    closed form from the gradients on both sets.

Formula
    At the start, in eval mode, G_f and G_r are sums over batches of the gradient of the mean token NLL on the
    forget and the retain set, signed::

        S_i = | (theta_i - G_r,i / mu) G_f,i |

    The ``budget`` best scalars over all tensors may move, the others do not. mu stands for the diagonal of
    the Hessian; ``mu: null`` is mu = inf, the score |theta G_f| (SNIP) that needs no retain set. A weight
    that a loss does not reach has the gradient 0 and with G_f = 0 the score 0: such weights come last.

Scale
    S depends on how many batches are summed: sums over n retain batches with mu rank as means with mu / n.
    ``normalise`` takes means, so that mu does not depend on the number of examples. With mu = 1e-6 the second
    term usually dominates.

Defaults and where they come from
    mu 1e-6 with sums: every published configuration. budget 0.95: the published one for GradDiff and NPO on
    TOFU (0.8 for PO there; 0.4 and 0.6 for GradDiff and NPO on WMDP).

Needs
    Examples in two sets: ``batches={"forget": [...], "retain": [...]}``. A supervised run whose rows carry a
    ``forget`` column gives its own. Two sums of 4 bytes per candidate, and one dense gradient, once.

Composes with
    Every unlearning loss, and plain SFT. With a budget this high dense gradients are cheaper than packed
    values; the backend is chosen accordingly. Unselected weights do not move at all here; the official code
    decays them.

When not to use it
    Without retain data that resembles what has to stay: G_r is all it knows of that.

What to watch
    The loss on the retain set: a mask cannot make up for an unlearning loss that runs away.

Official code
    OPTML-Group/WAGLE. It sorts all scores at once (over 100 GB at 7B); here a histogram finds the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.gradient_sums import gradient_sums
from posttrain.selection.plan import SelectionPlan
from posttrain.selection.selector import Budget, ElementSelector
from posttrain.selection.top_b import top_b

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from posttrain.selection.selector import Batch, Batches, Need


def attribution(
    theta: torch.Tensor, forget: torch.Tensor, retain: torch.Tensor | None = None, mu: float | None = None
) -> torch.Tensor:
    """Return (theta - G_r / mu) G_f, signed (arXiv 2410.17509); the score is its absolute value.

    Args:
        theta: Weights, any shape.
        forget: G_f of the same shape.
        retain: G_r; None as 0.
        mu: > 0; None as infinity.

    Returns:
        In fp32 at least.
    """
    theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
    if retain is not None and mu is not None:
        theta = theta - retain / mu
    return theta * forget


def two_sets(name: str, batches: Batches | None) -> tuple[Iterable[Batch], Iterable[Batch]]:
    """Return the batches to forget and those to retain.

    Raises:
        ValueError: They were not given as these two sets.
    """
    if not isinstance(batches, Mapping) or set(batches) != {"forget", "retain"}:
        found = sorted(batches) if isinstance(batches, Mapping) else type(batches).__name__
        raise ValueError(
            f"{name} compares two sets of examples and needs batches={{'forget': ..., 'retain': ...}}, found "
            f"{found}. In a supervised run mark the rows to forget with a column 'forget' (true or false)"
        )
    return batches["forget"], batches["retain"]


class WAGLE(ElementSelector):
    """Select what influences forgetting and tolerates change. See the module page."""

    name = "wagle"
    title = "WAGLE: weight attribution for unlearning"
    paper = "2410.17509"
    needs: ClassVar[Need] = "examples"
    groups: ClassVar[tuple[str, ...]] = ("forget", "retain")

    budget: Budget | None = Field(
        0.95, description="Scalars that may move: a number, or a fraction of the candidates; null for all."
    )
    mu: float | None = Field(1e-6, gt=0, description="Diagonal of the Hessian; null for infinity (SNIP).")
    normalise: bool = Field(False, description="Means over batches in place of sums.")

    def select(self, model: nn.Module, *, round: int = 0, batches: Batches | None = None) -> SelectionPlan:
        """Return the best scalars; see :meth:`~posttrain.selection.selector.Selector.select`."""
        forget, retain = two_sets(self.name, batches)
        ranked, whole, budget = self.split(model)
        if budget is None:
            return self.elements(model, {}, [*ranked, *whole], round=round)
        in_forget, forgets = gradient_sums(model, ranked, forget)
        if not forgets:
            raise ValueError(
                "the forget set has no batch with a label: WAGLE scores weights on what to forget"
            )
        in_retain, retains = ({}, 0) if self.mu is None else gradient_sums(model, ranked, retain)
        if self.normalise:
            in_forget = {name: value / forgets for name, value in in_forget.items()}
            in_retain = {name: value / max(retains, 1) for name, value in in_retain.items()}

        def scorer(name: str) -> Callable[[], torch.Tensor]:
            return lambda: attribution(
                ranked[name].detach(), in_forget[name], in_retain.get(name), self.mu
            ).abs()

        picked = top_b({name: scorer(name) for name in ranked}, budget)
        return self.elements(
            model, picked, whole, round=round, forget_batches=forgets, retain_batches=retains
        )

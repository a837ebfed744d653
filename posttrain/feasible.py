"""Feasible learning (arXiv 2501.14912): one multiplier per training row, for any trainer.

The pure functions, the table of multipliers, and what the methods of preference optimisation and of
supervised fine-tuning have in common. Their pages are :mod:`posttrain.preference.feasible` and
:mod:`posttrain.sft.feasible`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from posttrain._lazy import torch
from posttrain.rl.method import Conflict

if TYPE_CHECKING:
    from posttrain.rl.gauges import Gauges

REPORTED_ROWS = 100_000
"""Most rows that the report lists, the hardest first."""


def dual_step(
    multipliers: torch.Tensor,
    losses: torch.Tensor,
    *,
    tolerance: float,
    dual_lr: float,
    alpha: float | None,
    cap: float | None = None,
) -> torch.Tensor:
    """Return max(0, lambda + eta (g - eps - lambda / alpha)), without gradient.

    Args:
        multipliers: (n,) lambda.
        losses: (n,) g in nats; where it is not finite, lambda stays as it is.
        tolerance: eps.
        dual_lr: eta.
        alpha: Price of slack; None is infinity, without slack.
        cap: Largest multiplier, None for no limit.
    """
    lam, g = multipliers.detach(), losses.detach().to(multipliers.dtype)
    slack = 0.0 if alpha is None else lam / alpha
    moved = (lam + dual_lr * (g - tolerance - slack)).clamp(min=0.0, max=cap)
    return torch.where(torch.isfinite(g), moved, lam)


def clamped_losses(losses: torch.Tensor, *, tolerance: float, alpha: float) -> torch.Tensor:
    """Return (alpha / 2) max(0, g - eps)^2 per row: the resilient problem with the multipliers solved for."""
    return alpha / 2 * (losses - tolerance).clamp(min=0.0).square()


def cvar(losses: torch.Tensor, level: float = 0.8) -> torch.Tensor:
    """Return the mean of the worst ceil((1 - level) n) of n losses, 0-dim."""
    worst = math.ceil(round((1 - level) * losses.numel(), 6))
    return losses.topk(max(worst, 1)).values.mean()


def mean_per_row(ids: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each id once, ascending, and the mean of its finite losses; ids without one are left out."""
    finite = torch.isfinite(losses)
    unique, place = torch.unique(ids[finite], return_inverse=True)
    kept = losses[finite]
    sums = torch.zeros(len(unique), dtype=kept.dtype).index_add_(0, place, kept)
    counts = torch.zeros_like(sums).index_add_(0, place, torch.ones_like(kept))
    return unique, sums / counts


class Multipliers:
    """One number per training row, the same on every rank.

    Attributes:
        values: (n,) lambda, fp32, on the CPU.
        losses: (n,) loss at the latest visit, NaN before the first.
        visits: (n,) how often a row was visited.
        fingerprint: Of the rows.
    """

    def __init__(self, count: int, fingerprint: str, init: float) -> None:
        self.values = torch.full((count,), init, dtype=torch.float32)
        self.losses = torch.full((count,), torch.nan, dtype=torch.float32)
        self.visits = torch.zeros(count, dtype=torch.int32)
        self.fingerprint = fingerprint
        self._waiting: list[tuple[int, float]] = []
        self._summary: dict[str, float] = {}

    def record(self, ids: torch.Tensor, losses: torch.Tensor, where: torch.Tensor) -> None:
        """Remember the losses of a micro-batch until :meth:`update`; all (B,)."""
        ids, losses = ids.cpu()[where.cpu()], losses.detach().float().cpu()[where.cpu()]
        self._waiting += zip(ids.tolist(), losses.tolist(), strict=True)

    def update(self, **settings: Any) -> None:
        """Move the multipliers of the rows that all ranks have recorded; collective.

        Args:
            **settings: Of :func:`dual_step`; without any the multipliers stay.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        found: Sequence[tuple[int, float]] = self._waiting
        if PartialState().num_processes > 1:
            found = gather_object(found)
        self._waiting = []
        ids, losses = mean_per_row(
            torch.tensor([row for row, _ in found], dtype=torch.int64),
            torch.tensor([loss for _, loss in found], dtype=torch.float64),
        )
        if settings:
            self.values[ids] = dual_step(self.values[ids], losses, **settings)
        self.losses[ids] = losses.float()
        self.visits[ids] += 1
        self._summary = {}

    def summary(self) -> dict[str, float]:
        """Return numbers over all rows: of the multipliers, and of the latest losses of rows visited."""
        if not self._summary:
            seen = self.losses[self.visits > 0].double()
            self._summary = {
                "multiplier_mean": self.values.double().mean().item(),
                "multiplier_max": self.values.max().item(),
                "multiplier_zero": (self.values == 0).double().mean().item(),
            }
            if seen.numel():
                self._summary["cvar_0.8"] = cvar(seen).item()
        return self._summary

    def hardest(self) -> torch.Tensor:
        """Return the ids of the rows visited, largest multiplier first, ties by the latest loss."""
        ids = self.visits.nonzero().flatten()
        ids = ids[torch.argsort(self.losses[ids], descending=True, stable=True)]
        return ids[torch.argsort(self.values[ids], descending=True, stable=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the table."""
        return {
            "values": self.values,
            "losses": self.losses,
            "visits": self.visits,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the table.

        Raises:
            ValueError: It is of other rows.
        """
        if len(state["values"]) != len(self.values) or state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint keeps multipliers of {len(state['values'])} training rows with fingerprint "
                f"{state['fingerprint'][:12]}, this run has {len(self.values)} with {self.fingerprint[:12]}: "
                "resume with the same rows in the same order, or start a new run"
            )
        self.values, self.losses, self.visits = (
            state[name].cpu().clone() for name in ("values", "losses", "visits")
        )
        self._waiting, self._summary = [], {}


class FeasibleRows(BaseModel):
    """Fields and table of the methods; put it before their ``Method``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tolerance: float = Field(
        0.3, ge=0, description="eps: the loss that every row should stay below, in nats."
    )
    dual_lr: float = Field(1.0, ge=0, description="eta: how fast a multiplier follows the excess loss.")
    alpha: float | None = Field(
        1.0, gt=0, description="Price of slack; null is infinity (no slack), which needs `max`."
    )
    init: float = Field(1.0, ge=0, description="Multiplier of a row that was not visited yet.")
    order: Literal["primal_first", "dual_first"] = Field(
        "primal_first", description="Whether a step uses the multiplier from before or after its own update."
    )
    mode: Literal["feasible", "clamped", "erm"] = Field(
        "feasible",
        description="feasible: multipliers; clamped: the squared excess, no multipliers; erm: the plain "
        "mean, with the same numbers logged.",
    )
    max: float | None = Field(None, gt=0, description="Largest multiplier; null for no limit.")

    _table: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _bounded(self) -> FeasibleRows:
        if self.alpha is None and self.mode == "clamped":
            raise ValueError("mode: clamped squares the excess loss at a price: give alpha a number")
        if self.alpha is None and self.max is None and self.mode == "feasible":
            raise ValueError(
                "alpha: null lets the multiplier of a row that cannot be learned (a wrong label) grow "
                "without end: give alpha a number, or set max"
            )
        if self.max is not None and self.init > self.max:
            raise ValueError(f"init ({self.init}) is above max ({self.max})")
        return self

    @property
    def wants_ids(self) -> bool:
        """Rows are told apart."""
        return True

    @property
    def table(self) -> Multipliers:
        """The multipliers, once a trainer was built.

        Raises:
            RuntimeError: None was.
        """
        if self._table is None:
            raise RuntimeError("there is no table of multipliers before a trainer was built with the method")
        found: Multipliers = self._table
        return found

    def doubts(self) -> Iterator[Conflict]:
        """Yield what is allowed and rarely wanted."""
        if self.mode == "feasible" and self.alpha is not None and self.dual_lr > self.alpha:
            yield Conflict(
                f"dual_lr ({self.dual_lr}) is above alpha ({self.alpha}): multipliers overshoot their fixed "
                "point and swing",
                field="dual_lr",
                fatal=False,
            )

    def number_rows(self, count: int, fingerprint: str) -> None:
        """Begin the table anew.

        Args:
            count: One more than the largest id.
            fingerprint: Of the rows.
        """
        self._table = Multipliers(count, fingerprint, self.init)

    def settings(self) -> dict[str, Any]:
        """Return the settings of :func:`dual_step`."""
        return {
            "tolerance": self.tolerance,
            "dual_lr": self.dual_lr,
            "alpha": self.alpha,
            "cap": self.max,
        }

    def row_objective(
        self, losses: torch.Tensor, ids: torch.Tensor | None, where: torch.Tensor, gauges: Gauges
    ) -> torch.Tensor:
        """Return what the primal step averages, (B,), and record the losses.

        Args:
            losses: (B,) g with gradient, nats.
            ids: (B,) rows of the table; None in an evaluation, which has g itself and records nothing.
            where: (B,) bool, rows that have tokens.
            gauges: Where numbers are logged.
        """
        gauges.mean("loss", losses, where=where)
        gauges.mean("feasible", (losses.detach() <= self.tolerance).float(), where=where)
        if ids is None:
            return losses
        table = self.table
        objective = losses
        if self.mode == "clamped":
            assert self.alpha is not None  # validated
            objective = clamped_losses(losses, tolerance=self.tolerance, alpha=self.alpha)
        elif self.mode == "feasible":
            weights = table.values[ids.cpu()].to(losses.device)
            if self.order == "dual_first":
                weights = dual_step(weights, losses, **self.settings())
            gauges.mean("weight", weights, where=where)
            objective = weights.to(losses.dtype) * losses
        for name, value in table.summary().items():
            if self.mode == "feasible" or name == "cvar_0.8":
                gauges.mean(name, losses.new_tensor([value]))
        table.record(ids, losses, where)
        return objective

    def optimizer_step(self) -> None:
        """Move the multipliers of the rows of this step."""
        self.table.update(**(self.settings() if self.mode == "feasible" else {}))

    def report(self) -> dict[str, Any]:
        """Return the rows visited, hardest first: mislabelled ones should be near the top."""
        table = self.table
        ids = table.hardest()
        listed = ids[:REPORTED_ROWS]
        return {
            "rows": len(table.values),
            "visited": len(ids),
            **table.summary(),
            "id": listed.tolist(),
            "multiplier": table.values[listed].tolist(),
            "loss": table.losses[listed].tolist(),
            "visits": table.visits[listed].tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the table."""
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the table; refuse one of other rows."""
        self.table.load_state_dict(state)

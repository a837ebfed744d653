r"""GARDO, part 1: the KL penalty only where the reward looks untrustworthy (arXiv 2512.24138).

Idea
    A KL penalty on every sample stops reward hacking and learning alike. Here it acts only on the samples
    that the optimised (proxy) reward likes much more than other rewards do, which are measured and never
    optimised. The parts ``gardo_reference`` and ``gardo_diversity`` are separate methods.

Formula
    Proxy: the weighted sum of the rewards with a weight other than 0. Auxiliaries: K rewards with weight 0.
    Per generation batch, over the B rows of all ranks that have the reward in question::

        win(y)_i = (1/B) sum_{j != i} 1[ y_i > y_j ]          a tie counts 0 (strict) or 0.5 (half)
        U_i      = win(proxy)_i - mean over the auxiliaries of row i of win(auxiliary)_i      in (-1, 1)
        gate_i   = 1[ U_i > (1 - k)-quantile of U ]           linear interpolation; all rows when k >= 1
        loss     = policy term + Agg( beta * gate_i * KL_it )

    KL and ``beta`` are TRL's own, Agg has the divisor of the base ``loss_type``. With ``normalize="gated"``
    the KL term is moreover multiplied by (rows / gated rows) of the generation batch, the mean over gated
    rows. A row without proxy or without any auxiliary has no U: it is not gated and not in the quantile.
    When all U are equal nothing is gated for k < 1.

    The share k follows the trend of u = mean of U over the rows with U >= 0 (0 when there is none). Once the
    last ``window`` values are there: k <- k (1 + step), at most 1, when u exceeds all of them, k (1 - step)
    when it is below all of them; then k is cut to ``bounds`` and u joins the window. The new k acts from the
    next generation batch on.

Defaults and where they come from
    fraction 0.1, step 0.1, window 20: paper. bounds 0.02 to 0.2: official code, not in the paper. ``ties``
    strict and ``scope`` batch: paper (its listing takes the quantile per prompt). The paper trains image
    models and has **no language-model result**; what a good auxiliary is for text is open (a second
    verifier, a reward model, a judge that is blind to length). Verifiable rewards are full of ties: with
    strict wins all correct answers share the share of wrong ones, ``half`` keeps U steady when everything is
    right, and ``scope="group"`` removes the difficulty of the prompt. ``beta`` in the paper: 0.04, higher
    than ungated.

Needs
    ``beta`` above 0 and at least one reward with weight 0. No extra forward.

Composes with
    Every ``loss_type``, ACE, ``gardo_reference``, ``gardo_diversity``, SPINE (both masks act on the KL term).
    Refused: no auxiliary, an auxiliary with a weight, ``beta`` 0.

When not to use it
    With one exact verifier: nothing can be hacked that a second opinion would see.

Official code
    Four differences; the paper is followed. (1) **Its sign is the opposite**: it ranks in descending order,
    so that as released it gates what the proxy likes less than the auxiliaries do. (2) It takes the quantile
    among U >= 0 only, gating about half as many. (3) It averages the KL over gated samples
    (``normalize="gated"``). (4) It compares the trend from the first value on. The plain mean of U over the
    batch, which the paper's text names for the trend, is 0 by construction; the mean over U >= 0 is the
    code's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from posttrain._lazy import torch
from posttrain.rl.method import AllRows, Conflict, Method, Need, Rollout, Setup, Tokens
from posttrain.rl.quantiles import row_quantile


def win_rates(
    values: torch.Tensor, *, ties: Literal["strict", "half"] = "strict", group_size: int | None = None
) -> torch.Tensor:
    """Return for each row the share of rows it beats (arXiv 2512.24138).

    Args:
        values: (B,) a reward, NaN where it does not apply.
        ties: What an equal row counts: nothing, or 0.5.
        group_size: Compare inside consecutive groups of this many rows; all rows when None.

    Returns:
        (B,) float64 in [0, 1), divided by the number of rows with a value; NaN where ``values`` is.
    """
    grouped = values.contiguous().view(-1, group_size or len(values))
    known = ~grouped.isnan()
    ranked = grouped.masked_fill(~known, torch.inf).sort(dim=1).values
    beaten = torch.searchsorted(ranked, grouped).double()
    if ties == "half":
        not_above = torch.searchsorted(ranked, grouped, right=True)
        beaten = beaten + 0.5 * (not_above - beaten - 1)  # a row equals itself
    rates = beaten / known.sum(dim=1, keepdim=True).clamp(min=1)
    return rates.masked_fill(~known, torch.nan).flatten()


def uncertainty(
    proxy: torch.Tensor,
    auxiliaries: torch.Tensor,
    *,
    ties: Literal["strict", "half"] = "strict",
    group_size: int | None = None,
) -> torch.Tensor:
    """Return U, how much more the proxy likes a row than the auxiliaries do (arXiv 2512.24138).

    Args:
        proxy: (B,) the optimised reward.
        auxiliaries: (B, K) rewards that are not optimised; NaN where one does not apply.
        ties: See :func:`win_rates`.
        group_size: See :func:`win_rates`.

    Returns:
        (B,) float64 in (-1, 1); NaN for a row without proxy or without any auxiliary.
    """
    others = [win_rates(column, ties=ties, group_size=group_size) for column in auxiliaries.unbind(dim=1)]
    own = win_rates(proxy, ties=ties, group_size=group_size)
    # equal differences of equal rates must stay equal: the gate compares strictly
    return (own - torch.stack(others, dim=1).nanmean(dim=1)).round(decimals=12)


def uncertainty_gate(uncertain: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return which rows get the KL penalty, (B,) bool (arXiv 2512.24138).

    Args:
        uncertain: (B,) U; NaN for a row that has none, which is gated at ``fraction`` 1 only.
        fraction: k, the share of rows to gate; at 1 or more all rows are (TRL's own KL), at 0 none.
    """
    if fraction >= 1:
        return torch.ones_like(uncertain, dtype=torch.bool)
    known = ~uncertain.isnan()
    threshold = row_quantile(uncertain.unsqueeze(0), known.unsqueeze(0), 1 - fraction)
    return known & (uncertain > threshold)


def gate_trend(uncertain: torch.Tensor) -> float:
    """Return the mean of U over the rows with U >= 0; 0 when there is none."""
    chosen = uncertain[uncertain >= 0]
    return chosen.mean().item() if chosen.numel() else 0.0


def next_fraction(
    fraction: float,
    history: Sequence[float],
    trend: float,
    *,
    window: int = 20,
    step: float = 0.1,
    bounds: tuple[float, float] = (0.02, 0.2),
) -> float:
    """Return the share k for the next batch (arXiv 2512.24138).

    Args:
        fraction: The share so far.
        history: Earlier values of :func:`gate_trend`; nothing happens before there are ``window`` of them.
        trend: The new value.
        window: How many of the last values count.
        step: Relative change.
        bounds: Smallest and largest share.
    """
    last = history[-window:]
    if len(last) == window:
        if trend > max(last):
            fraction = min(fraction * (1 + step), 1.0)
        elif trend < min(last):
            fraction = fraction * (1 - step)
    return min(max(fraction, bounds[0]), bounds[1])


class GardoKL(Method):
    """Restrict TRL's KL term to rows with an uncertain reward. See the module page."""

    name = "gardo_kl"
    title = "GARDO: KL penalty gated by reward uncertainty"
    paper = "2512.24138"

    fraction: float = Field(0.1, ge=0, le=1, description="Share k of rows with a KL penalty at the start.")
    bounds: tuple[float, float] = Field((0.02, 0.2), description="Smallest and largest share; official code.")
    step: float = Field(0.1, ge=0, lt=1, description="Relative change of the share; 0 keeps it fixed.")
    window: int = Field(20, ge=1, description="Generation batches a trend is compared with.")
    auxiliaries: list[str] | None = Field(
        None, min_length=1, description="Rewards with weight 0 to compare with; all of them when unset."
    )
    ties: Literal["strict", "half"] = Field(
        "strict", description="What a tie counts in a win rate: 0 or 0.5."
    )
    scope: Literal["batch", "group"] = Field("batch", description="Rows that a row is compared with.")
    normalize: Literal["all", "gated"] = Field(
        "all", description="Mean of the KL over all rows (paper) or over the gated ones (official code)."
    )

    _share: float | None = PrivateAttr(default=None)
    _trends: list[float] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _fraction_is_inside(self) -> GardoKL:
        low, high = self.bounds
        if not 0 <= low <= self.fraction <= high <= 1:
            raise ValueError(
                f"needed 0 <= bounds[0] <= fraction <= bounds[1] <= 1, found fraction={self.fraction} and "
                f"bounds={list(self.bounds)}"
            )
        return self

    @property
    def neutral(self) -> bool:
        """A share of 1 that cannot fall gates every row: TRL's own KL."""
        return self.fraction == 1 and (self.step == 0 or self.bounds[0] == 1)

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing: with ``beta`` above 0 TRL computes the reference."""
        return frozenset()

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse a run without KL term or without a reward to compare with."""
        if not setup.trainer.get("beta"):
            yield Conflict(
                "GARDO's gate acts on TRL's KL term, but beta is 0: set beta above 0 (0.04 in the paper)",
                field="beta",
            )
        if setup.reward_names is None or setup.reward_weights is None:
            return
        try:
            _auxiliary_columns(self.auxiliaries, setup.reward_names, list(setup.reward_weights))
        except ValueError as error:
            yield Conflict(str(error), field="auxiliaries")

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """Decide which rows are gated and move the share (in training only); advantages stay."""
        everyone = rollout.everyone
        assert everyone is not None
        uncertain = self._uncertainty(everyone)
        share = self.fraction if self._share is None else self._share
        gate = uncertainty_gate(uncertain, share)
        factor = gate.float()
        if self.normalize == "gated":
            factor = factor * (len(gate) / gate.sum().clamp(min=1))
        rollout.carry["gardo_gate"] = rollout.local(factor).to(rollout.mask.device)
        trend = gate_trend(uncertain)
        rollout.gauges.mean("gated_rows", gate.float())
        rollout.gauges.mean("uncertainty", uncertain, uncertain >= 0)
        rollout.gauges.mean("share", uncertain.new_tensor(share))
        if rollout.training:
            self._share = next_fraction(
                share, self._trends, trend, window=self.window, step=self.step, bounds=self.bounds
            )
            self._trends = [*self._trends, trend][-self.window :]
        return rollout.advantages

    def _uncertainty(self, everyone: AllRows) -> torch.Tensor:
        # on the CPU, where float64 always exists; a few thousand numbers
        rewards, weights = everyone.rewards.cpu().double(), everyone.weights.cpu().double()
        columns = _auxiliary_columns(self.auxiliaries, everyone.names, weights.tolist())
        optimised = rewards[:, weights != 0]
        proxy = (optimised * weights[weights != 0]).nansum(dim=1)
        proxy = proxy.masked_fill(optimised.isnan().all(dim=1), torch.nan)
        group_size = everyone.group_size if self.scope == "group" else None
        return uncertainty(proxy, rewards[:, columns], ties=self.ties, group_size=group_size)

    def kl_weights(self, tokens: Tokens) -> torch.Tensor | None:
        """Return the gate, (B, 1)."""
        return tokens.carry["gardo_gate"].unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        """The share and the trend window."""
        return {"share": self._share, "trends": list(self._trends)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._share, self._trends = state["share"], list(state["trends"])


def _auxiliary_columns(
    wanted: list[str] | None, names: tuple[str, ...], weights: Sequence[float]
) -> list[int]:
    """Return the columns of the auxiliary rewards.

    Raises:
        ValueError: None is there, or a wanted one is unknown or optimised.
    """
    free = [column for column, weight in enumerate(weights) if weight == 0]
    if all(weight == 0 for weight in weights):
        raise ValueError("every reward has weight 0, so there is no proxy to distrust: give one a weight")
    for name in wanted or ():
        if name not in names:
            raise ValueError(f"there is no reward {name!r}; the rewards are {', '.join(names)}")
        if names.index(name) not in free:
            raise ValueError(
                f"the auxiliary reward {name!r} is optimised (weight {weights[names.index(name)]}), so it "
                "cannot be a second opinion: give it weight 0"
            )
    if not free:
        raise ValueError(
            "GARDO compares the optimised reward with rewards that are not optimised, and all of "
            f"{', '.join(names)} have a weight: add a reward with weight 0"
        )
    return free if wanted is None else [names.index(name) for name in wanted]

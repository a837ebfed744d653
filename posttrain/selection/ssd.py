r"""SSD, selective synaptic dampening: unlearning in one edit, without training (arXiv 2308.07707).

Idea
    Weights that matter much more for the data to be forgotten than for the data as a whole are scaled down,
    once. No ascent, no fine-tuning on what is to be kept.

Formula
    With F the mean over sequences of the squared gradient of the loss (Fisher's diagonal), F_f on the forget
    set and F_D on all data, the forget set included, per scalar::

        selected   F_f > alpha F_D                       strict, a product: alpha = inf selects nothing
        theta <-   theta * min((lambda F_D / F_f)^k, 1)  where selected

    F_D = 0 < F_f erases the scalar. For alpha < F_f / F_D < lambda the factor is 1: selected and unchanged.
    No scalar grows or changes its sign. With the label-free variant (LFSSD) the loss is the squared norm of
    the logits, and F sums |g| in place of g^2.

Statistics
    One sequence per backward pass, whatever the size of the batches that are given: squaring the gradient of
    a batch is another statistic, which depends on its size. The loss is the mean token NLL (nats) over the
    labels of the sequence; rows without a label are left out. Sums are fp32 (squares of bf16 gradients
    underflow in half precision), the model is in eval mode. F_D is made of both sets: in the proportion in
    which rows are given, or with ``forget_share``, the forget set's share of all training data, where only
    a sample of the rest is looked at. With a share s nothing passes alpha >= 1/s, for F_D >= s F_f: where the
    sets are of one size alpha has to be below 2, or ``forget_share`` set. Several processes give each its own
    rows; sums of squares are added up over ranks, never gradients.

Defaults and where they come from
    alpha 10 and lambda 1 are the official code's (alpha 5 for ViT class forgetting), k = 1. Block matrices
    only: embeddings, head and norms are left alone (ours). No results of the authors on language models are
    known; there choose alpha by the share it selects (``fraction``), or let :func:`search` raise that share
    until the retained ability suffers. Some hundreds of forget rows and thousands of others will do.

Use
    ``report = ssd(model, forget, retain, SSD(alpha=10))`` edits the model in place. As a selector (``ssd``,
    with ``batches={"forget": ..., "retain": ...}``) it plans the selected scalars for gradient-based
    unlearning instead, and changes nothing.

Once only
    Applied twice, the same statistics dampen twice. A dampened model says so in its config
    (``posttrain_ssd``, saved as part of ``config.json``), and a second edit is refused unless ``again=True``.

Needs
    Two statistics of 4 bytes per candidate weight (``device="cpu"`` off-loads them) and one dense gradient.

When not to use it
    On quantised weights, or with an adapter that is not merged yet: merge it first. Not when you need a
    guarantee: dampening lowers what the data left in these weights; measure how fast it can be relearned.

What to watch
    The report's share per tensor, and what the retained ability loses; ``search`` does both at once.

Official code
    if-loops/selective-synaptic-dampening: F there is of squared *batch* gradients. What it calls a lower
    bound is the upper bound of 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain._lazy import torch
from posttrain.selection.gradient_sums import (
    gradient_sums,
    mean_squared_logits,
    mean_token_nll,
    single_rows,
)
from posttrain.selection.plan import PlanError, SelectionPlan
from posttrain.selection.selector import ElementSelector
from posttrain.selection.wagle import two_sets

if TYPE_CHECKING:
    from torch import nn

    from posttrain.selection.selector import Batch, Batches, Need

logger = logging.getLogger(__name__)

MARKER = "posttrain_ssd"
"""The entry of a model's config that says it was dampened."""


def chosen(forget: torch.Tensor, full: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return where F_f > alpha F_D, bool; nowhere for alpha = inf."""
    if math.isinf(alpha):
        return torch.zeros_like(forget, dtype=torch.bool)
    return forget > alpha * full


def factors(
    forget: torch.Tensor, full: torch.Tensor, *, alpha: float = 10.0, lam: float = 1.0, exponent: float = 1.0
) -> torch.Tensor:
    """Return what each scalar is multiplied by, in [0, 1]: 1 where it is not selected.

    Args:
        forget: F_f, >= 0, any shape.
        full: F_D of the same shape.
        alpha: Selection threshold on F_f / F_D, > 0, may be infinite.
        lam: lambda, >= 0.
        exponent: k, > 0.
    """
    where = chosen(forget, full, alpha)
    ratio = lam * full / torch.where(where, forget, torch.ones_like(forget))  # no 0/0 where nothing is chosen
    return torch.where(where, ratio.pow(exponent).clamp(max=1.0), torch.ones_like(ratio))


def dampen(
    theta: torch.Tensor,
    forget: torch.Tensor,
    full: torch.Tensor,
    alpha: float = 10.0,
    lam: float = 1.0,
    exponent: float = 1.0,
) -> torch.Tensor:
    """Return the dampened weights in their own type (arXiv 2308.07707); see :func:`factors`."""
    factor = factors(forget, full, alpha=alpha, lam=lam, exponent=exponent).to(theta.device)
    return (theta.to(factor.dtype) * factor).to(theta.dtype)


@dataclass(frozen=True)
class Importances:
    """F_f and F_D per candidate weight, means over sequences.

    Attributes:
        forget: By name, fp32 at least.
        full: By name.
        rows: Sequences that counted, (forget, retain), over all ranks.
    """

    forget: dict[str, torch.Tensor]
    full: dict[str, torch.Tensor]
    rows: tuple[int, int]

    @property
    def numel(self) -> int:
        """Candidate scalars."""
        return sum(values.numel() for values in self.forget.values())

    def selected(self, alpha: float) -> int:
        """Return how many scalars ``alpha`` selects."""
        return sum(int(chosen(self.forget[name], self.full[name], alpha).sum()) for name in self.forget)

    def alpha_for(self, fraction: float) -> float:
        """Return the smallest alpha >= 0 that selects at most this fraction of the candidates.

        Raises:
            ValueError: More than that matter for the forget set alone (F_D = 0), or the fraction is not in
                (0, 1).
        """
        if not 0 < fraction < 1:
            raise ValueError(f"the fraction of scalars to select must be in (0, 1), found {fraction}")
        limit = math.floor(fraction * self.numel)
        low, high = 0.0, 1.0
        while self.selected(high) > limit:
            low, high = high, high * 4
            if math.isinf(high) or high > 1e37:
                raise ValueError(
                    f"{self.selected(1e37):,} scalars matter for the forget set alone, above {limit:,} "
                    f"({fraction:.2%}): look at more data, or raise the fraction"
                )
        for _ in range(60):
            middle = (low * high) ** 0.5 if low > 0 else high / 16
            if not low < middle < high or (low > 0 and high / low < 1 + 1e-7):
                break
            if self.selected(middle) > limit:
                low = middle
            else:
                high = middle
        return high


@dataclass(frozen=True)
class Report:
    """What an edit did.

    Attributes:
        alpha: Threshold that was used.
        rows: Sequences that counted, (forget, retain).
        tensors: Per candidate tensor (scalars, selected, changed); selected ones whose factor is 1 stay.
    """

    alpha: float
    rows: tuple[int, int]
    tensors: Mapping[str, tuple[int, int, int]]

    @property
    def fraction(self) -> float:
        """Selected part of all candidate scalars."""
        return sum(t[1] for t in self.tensors.values()) / sum(t[0] for t in self.tensors.values())

    def summary(self) -> str:
        """Return a table for people: the selected and changed part of each tensor."""
        width = max(len(name) for name in self.tensors)
        lines = [f"SSD alpha {self.alpha:g}: {self.fraction:.3%} of the candidates selected"]
        lines += [
            f"{name.ljust(width)}  {selected / numel:9.3%} selected  {changed / numel:9.3%} changed"
            for name, (numel, selected, changed) in self.tensors.items()
        ]
        return "\n".join(lines)


class SSD(ElementSelector):
    """Select, and dampen, what matters for the forget set far more than for all data. See the module page."""

    name = "ssd"
    title = "SSD: selective synaptic dampening"
    paper = "2308.07707"
    needs: ClassVar[Need] = "examples"
    groups: ClassVar[tuple[str, ...]] = ("forget", "retain")

    budget: None = Field(None, description="Unused: the threshold, or the fraction, decides.")
    alpha: float | None = Field(
        None, gt=0, description="Select where F_f > alpha F_D; 10 if neither this nor fraction is set."
    )
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Choose alpha so that at most this part of the candidates is selected."
    )
    lam: float = Field(1.0, ge=0, description="lambda, strength of the dampening: smaller is stronger.")
    exponent: float = Field(1.0, gt=0, description="k.")
    loss: Literal["nll", "logits"] = Field(
        "nll", description="nll: squared gradients of the token NLL. logits: the label-free LFSSD."
    )
    forget_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the forget set in all training data; as rows are given if unset.",
    )
    embeddings: bool = Field(False, description="Token embeddings and the output head are candidates.")
    norms: bool = Field(False, description="Weights and biases of norms are candidates.")

    @model_validator(mode="after")
    def _one_threshold(self) -> SSD:
        if self.fraction is not None and self.alpha is not None:
            raise ValueError(f"alpha ({self.alpha:g}) and fraction ({self.fraction:g}) exclude each other")
        if self.always_train:
            raise ValueError("always_train has no meaning for SSD: it selects by a threshold")
        return self

    def select(self, model: nn.Module, *, round: int = 0, batches: Batches | None = None) -> SelectionPlan:
        """Return the scalars that :func:`ssd` would dampen, as a plan."""
        forget, retain = two_sets(self.name, batches)
        found = importances(model, forget, retain, self)
        alpha = self.threshold(found)
        if problem := _hopeless(alpha, _share(found.rows, self)):
            raise PlanError(problem)
        where = {
            name: chosen(found.forget[name], found.full[name], alpha).flatten().nonzero().flatten()
            for name in found.forget
        }
        return self.elements(model, where, round=round, alpha_used=alpha, rows=list(found.rows))

    def threshold(self, found: Importances) -> float:
        """Return alpha, from the fraction where that is set."""
        if self.fraction is not None:
            return found.alpha_for(self.fraction)
        return 10.0 if self.alpha is None else self.alpha


def importances(
    model: nn.Module,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    settings: SSD | None = None,
    *,
    device: torch.device | str | None = None,
) -> Importances:
    """Return F_f and F_D of every candidate weight.

    Args:
        model: Unwrapped, on its device.
        forget: Batches of what is to be forgotten, this rank's.
        retain: Batches of the other training data, this rank's.
        settings: Scope, loss and proportion.
        device: Where the statistics live, see :func:`~posttrain.selection.gradient_sums.gradient_sums`.

    Raises:
        PlanError: There is nothing to select from.
        ValueError: One of the sets has no row that counts.
        FloatingPointError: A gradient is not finite.
    """
    settings = SSD() if settings is None else settings
    parameters = settings.candidates(model)
    loss, statistic = (
        (mean_token_nll, "square") if settings.loss == "nll" else (mean_squared_logits, "absolute")
    )
    sums, rows = [], []
    for batches in (forget, retain):
        total, count = gradient_sums(
            model,
            parameters,
            _rows(batches, labelled=settings.loss == "nll"),
            loss=loss,
            statistic=statistic,  # type: ignore[arg-type]
            device=device,
        )
        sums.append(total)
        rows.append(_over_ranks(total, parameters, count))
    _refuse_empty(rows, settings)
    in_forget, in_retain = rows
    mean_forget = {name: value / in_forget for name, value in sums[0].items()}
    share = _share(rows, settings)
    full = {
        name: share * value + (1 - share) * sums[1][name] / max(in_retain, 1)
        for name, value in mean_forget.items()
    }
    return Importances(mean_forget, full, (in_forget, in_retain))


def _share(rows: Sequence[int], settings: SSD) -> float:
    """Return the weight of the forget set in F_D."""
    return rows[0] / sum(rows) if settings.forget_share is None else settings.forget_share


def _hopeless(alpha: float, share: float) -> str | None:
    """Say why no scalar can pass a threshold, if so: F_D >= share F_f, so F_f <= F_D / share."""
    if alpha * share < 1:
        return None
    return (
        f"alpha {alpha:g} selects nothing: the forget set is {share:.2%} of the data that SSD looked at, so "
        f"F_f is at most {1 / share:.3g} F_D. If it is less of all training data say so with forget_share "
        "(0.01 for 1 %), else take a smaller alpha, or a fraction"
    )


def _rows(batches: Iterable[Batch], *, labelled: bool) -> Iterator[Batch]:
    for batch in batches:
        yield from single_rows(batch, labelled=labelled)


def _refuse_empty(rows: list[int], settings: SSD) -> None:
    for count, what in zip(rows, ("forget", "retain"), strict=True):
        if count == 0 and not (what == "retain" and settings.forget_share == 1):
            raise ValueError(
                f"the {what} set has no row with a label: SSD compares the forget set with all data"
            )


def _over_ranks(totals: dict[str, torch.Tensor], parameters: Mapping[str, nn.Parameter], count: int) -> int:
    """Add the sums of all ranks up in place; return the count of all ranks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return count
    for name, total in totals.items():
        there = total.to(parameters[name].device)
        distributed.all_reduce(there)
        total.copy_(there)
    device = next(iter(parameters.values())).device
    counts = torch.tensor([count], dtype=torch.int64, device=device)
    distributed.all_reduce(counts)
    return int(counts)


def ssd(
    model: nn.Module,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    settings: SSD | None = None,
    *,
    again: bool = False,
    device: torch.device | str | None = None,
) -> Report:
    """Dampen the model in place, once.

    Args:
        model: Unwrapped, with whole weights and no adapter.
        forget: Batches of (B, T) ``input_ids``, ``labels`` and optionally ``attention_mask``.
        retain: The same of the other training data.
        settings: Defaults: ``SSD()``.
        again: Allow it on a model that was dampened before, for another forget set.
        device: Where the statistics live.

    Returns:
        How much of each tensor was selected and changed.

    Raises:
        PlanError: The model was dampened already, has an adapter, or nothing can be selected.
        ValueError: A set is empty, or the fraction cannot be reached.
        FloatingPointError: A gradient is not finite.
    """
    settings = SSD() if settings is None else settings
    _refuse_model(model, again=again)
    found = importances(model, forget, retain, settings, device=device)
    if problem := _hopeless(settings.threshold(found), _share(found.rows, settings)):
        logger.warning(problem)
    return apply(model, found, settings, again=again)


def apply(
    model: nn.Module, found: Importances, settings: SSD | None = None, *, again: bool = False
) -> Report:
    """Dampen the model in place by statistics that were taken before; see :func:`ssd`."""
    settings = SSD() if settings is None else settings
    _refuse_model(model, again=again)
    alpha = settings.threshold(found)
    parameters = dict(model.named_parameters())
    tensors: dict[str, tuple[int, int, int]] = {}
    with torch.no_grad():
        for name, in_forget in found.forget.items():
            parameter = parameters[name]
            factor = factors(
                in_forget, found.full[name], alpha=alpha, lam=settings.lam, exponent=settings.exponent
            )
            parameter.copy_(
                dampen(parameter, in_forget, found.full[name], alpha, settings.lam, settings.exponent)
            )
            tensors[name] = (
                factor.numel(),
                int(chosen(in_forget, found.full[name], alpha).sum()),
                int((factor < 1).sum()),
            )
    report = Report(alpha, found.rows, tensors)
    _mark(
        model, settings.model_dump(mode="json") | {"alpha_used": alpha, "fraction_selected": report.fraction}
    )
    logger.info("SSD: alpha %g selected %.3f %% of the candidates", alpha, 100 * report.fraction)
    return report


def search(
    model: nn.Module,
    found: Importances,
    fractions: Iterable[float],
    accept: Callable[[nn.Module], bool],
    settings: SSD | None = None,
    *,
    again: bool = False,
) -> Report | None:
    """Dampen ever larger fractions, always from the original weights, until ``accept`` says no.

    Args:
        model: As in :func:`ssd`.
        found: Statistics of the original weights.
        fractions: Parts of the candidates to select, each in (0, 1); tried in ascending order.
        accept: Whether the model is still good enough, for example its perplexity on retained data.
        settings: All but ``alpha`` and ``fraction``.
        again: As in :func:`ssd`.

    Returns:
        The report of the largest accepted fraction, which the model then has; None, with the original
        weights, when not even the first was accepted.
    """
    settings = SSD() if settings is None else settings
    _refuse_model(model, again=again)
    before = _marker(model)
    parameters = dict(model.named_parameters())
    originals = {name: parameters[name].detach().to("cpu", copy=True) for name in found.forget}

    def dampened(fraction: float | None) -> Report | None:
        with torch.no_grad():
            for name, original in originals.items():
                parameters[name].copy_(original)
        _set_marker(model, before)
        if fraction is None:
            return None
        values = settings.model_dump() | {"fraction": fraction, "alpha": None}
        return apply(model, found, SSD(**values), again=again)

    best: float | None = None
    for fraction in sorted(fractions):
        dampened(fraction)
        if not accept(model):
            break
        best = fraction
    return dampened(best)


# ---- the marker ------------------------------------------------------------------------------------------


def _refuse_model(model: nn.Module, *, again: bool) -> None:
    if hasattr(model, "peft_config"):
        raise PlanError("SSD edits whole weights, found a model with an adapter: merge it first")
    if _marker(model) and not again:
        raise PlanError(
            f"this model was dampened before ({_marker(model)[-1]}), and the same edit twice would "
            "dampen twice: start from the original weights, or say again=True for another forget set"
        )


def _marker(model: nn.Module) -> list[Any]:
    return list(getattr(getattr(model, "config", model), MARKER, None) or [])


def _set_marker(model: nn.Module, edits: list[Any]) -> None:
    setattr(getattr(model, "config", model), MARKER, edits or None)


def _mark(model: nn.Module, edit: dict[str, Any]) -> None:
    _set_marker(model, [*_marker(model), edit])

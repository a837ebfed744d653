r"""LiPO: preference optimisation on ranked lists of responses (arXiv 2402.01878).

Idea
    A ranking of K responses says more than one pair out of it. With DPO's implicit rewards as scores,
    alignment is learning to rank, and any ranking loss will do. LiPO-lambda is the pairwise logistic loss
    with LambdaRank's weights: a pair counts the more, the further apart its labels are and the nearer the
    top the model ranks it at present.

Formula
    Responses y_1..y_K of one prompt with labels psi_i in [0, 1], scores s_i = beta S(y_i) (the sequence
    log-ratio to the reference, see :mod:`posttrain.preference.method`), P = {(i, j): psi_i > psi_j}::

        lambda         sum_P Delta_ij softplus(s_j - s_i),  detached
                       Delta_ij = |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)|,  G = 2^psi - 1,  D(r) = log2(1 + r),
                       tau_i the rank of i by the scores, largest first
        pair_logistic  sum_P softplus(s_j - s_i)                     (K = 2: DPO)
        pair_hinge     sum_P max(0, 1 - s_i + s_j)
        list_mle       sum_k [log sum_(j >= k) exp s_(j) - s_(k)]    ((k) the k-th best by label)
        softmax        -sum_i psi_i / (sum_j psi_j) log softmax(s)_i (uniform if all psi are 0)
        point_mse      sum_i (psi_i - s_i)^2
        point_sigmoid  -sum_i [psi_i log sigma(s_i) + (1 - psi_i) log sigma(-s_i)]

    ``reduction="pairs_mean"``: the sum over all pairs of the optimiser step, over ranks and accumulated
    micro-batches, divided by their number; in ``lambda`` each Delta is first multiplied by the K of its own
    list. ``"list_sum"``: the sums above, mean over prompts; losses without pairs have no other.

Data
    Columns ``prompt``, ``completions`` (K strings or K lists of messages; K may differ) and one of
    ``scores`` (larger is better), ``ranks`` (1 is best, equal ranks allowed) and ``preferences`` (K x K,
    entry (k, i) the probability that k beats i; its rows' means are the labels, as in the paper). Or plain
    ``chosen`` and ``rejected``: lists of two with labels 1 and 0. Scores have to lie in [0, 1]
    (``labels="given"``) or are brought there list by list (``"min_max"``; equal scores become 0.5).
    Runs of ``posttrain train`` leave out lists whose responses are all labelled alike, and say how many;
    they refuse single responses. Trainers take both.

Defaults and where they come from
    lambda, exp2 gains, base-2 discounts, the mean over pairs and the factor K: the ranking library RAX as
    the paper's listing calls it; that the experiments kept its reduction is unconfirmed, the text has sums
    and a logarithm of unnamed base (``discount="log"``, natural, 1/ln 2 times as large). Learning rates do
    not carry over between reductions. The paper's beta is 0.05 (TRL's default 0.1), K = 8, Adafactor at
    2e-5, 32 prompts a batch, samples of the SFT model at temperature 0.7, top-k 40. Scores are not divided
    by the length; ``length_normalized`` is ours.

Needs
    The trainer's own path for lists: no ``loss_type`` beside the default. Two scores of a list that are equal
    (all are at the first step) and equal labels in ``list_mle`` are ordered by a hash of tokens, seed and
    epoch, so the order in the data carries no information, and neither do micro-batches or ranks.
    ``forward_rows`` bounds memory for large K: so many responses go through the model at a time and their
    activations are computed again in the backward, at the price of one more forward.

Composes with
    LoRA, precomputed references (a sum for every response), RPO (its term on the best response of each list:
    highest label, the first on ties), selection of weights. Refused: methods that act on pairs, other
    loss types, f-divergences, ``ld_alpha``, WPO weights.

When not to use it
    - Labels of one reward model that is not trusted beyond the order: ``pair_logistic`` ignores gaps.
    - With pairs only: lambda, pair_logistic, list_mle and softmax are DPO there, up to a factor.

Does it do what it claims?
    On scores yes. ``configs/evidence/lipo.yaml`` (its first lines are the commands): 384 lists of eight
    continuations of story openings, sampled from the model of 260,000 weights that is trained and ordered by
    a known word score; DPO on the best and the worst of each list, ``pair_logistic`` (DPO's loss on all its
    pairs), and ``lambda``; beta 0.1, five seeds, 95 % t intervals, 125 held-out pairs::

        arm            score                 win rate              accuracy              KL
        best-worst     0.776 [0.759, 0.794]  0.972 [0.964, 0.980]  0.781 [0.735, 0.826]  14.0 [12.9, 15.2]
        pair_logistic  0.791 [0.779, 0.803]  0.976 [0.967, 0.985]  0.811 [0.795, 0.828]  12.3 [12.0, 12.7]
        lambda         0.816 [0.795, 0.837]  0.986 [0.975, 0.998]  0.786 [0.725, 0.846]  15.6 [14.8, 16.3]

    Over best-worst, paired by seed, the score of lambda is +0.040 [0.020, 0.059] and its win rate +0.014
    [0.004, 0.024], for 1.6 [0.0, 3.1] nats more KL; that of all pairs +0.015 [-0.001, 0.031] for 1.7 [0.6,
    2.8] nats less. Accuracy does not differ; lambda's samples are more alike (self-BLEU 0.169 [0.165, 0.173]
    where the other two have 0.142). Lists of other lengths were not compared.

What to watch
    ``rewards/accuracies`` (all pairs that labels order), ``lipo/ndcg`` (of the ranking by scores, gain and
    discount as set), ``lipo/lists_without_pairs`` (part of lists that teach nothing), ``rewards/chosen`` and
    ``rewards/rejected`` (best and worst response of each list), ``rewards/margins``.

Official code
    None was found; values were checked by hand and against the formulas of the paper and of RAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.preference.method import Batch, ListSettings, Method, as_list
from posttrain.rl.method import Conflict, Setup, not_sharded

Objective = Literal[
    "lambda", "pair_logistic", "pair_hinge", "list_mle", "softmax", "point_mse", "point_sigmoid"
]
Gain = Literal["exp2", "linear"]
Discount = Literal["log2", "log", "none"]

PAIR_LOSSES = frozenset({"lambda", "pair_logistic", "pair_hinge"})
"""Losses that are sums over pairs."""


def labels_from_preferences(preferences: Sequence[Sequence[float]]) -> list[float]:
    """Return psi_k, the mean of row k of a matrix of win probabilities (arXiv 2402.01878).

    Args:
        preferences: K x K, entry (k, i) the probability that response k beats response i.

    Raises:
        ValueError: It is not square, or an entry lies outside [0, 1] or is missing.
    """
    size = len(preferences)
    if any(len(row) != size for row in preferences):
        raise ValueError(f"preferences has to be {size} x {size}, found rows of {[*map(len, preferences)]}")
    return [sum(row) / size for row in map(unit_labels, preferences)]


def labels_from_ranks(ranks: Sequence[float]) -> list[float]:
    """Return psi_k, the part of the list that k beats, itself and equal ranks counting half; 1 is best.

    Raises:
        ValueError: A rank is missing or no number.
    """
    _finite(ranks, "ranks")
    return [sum(0.5 * ((r < other) + (r <= other)) for other in ranks) / len(ranks) for r in ranks]


def unit_labels(scores: Sequence[float], mode: Literal["given", "min_max"] = "given") -> list[float]:
    """Return labels in [0, 1]: the scores as they are, or scaled so that the list spans [0, 1].

    Equal scores become 0.5 under ``min_max``.

    Raises:
        ValueError: A score is missing or no number, or lies outside [0, 1] with ``given``.
    """
    _finite(scores, "scores")
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    if mode == "min_max":
        return [0.5 if high == low else (score - low) / (high - low) for score in scores]
    if low < 0 or high > 1:
        raise ValueError(
            f"scores have to lie in [0, 1], found {low} to {high}: gains 2^psi would explode. Scale them, or "
            "set labels to min_max"
        )
    return [float(score) for score in scores]


def _finite(values: Sequence[float], name: str) -> None:
    for place, value in enumerate(values):
        if value is None or not abs(value) < float("inf"):  # NaN compares false
            raise ValueError(f"{name} has {value} at response {place}: every response needs a number")


def pair_mask(labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return (B, K, K) bool: psi_i > psi_j, both there."""
    both = valid.unsqueeze(2) & valid.unsqueeze(1)
    return (labels.unsqueeze(2) > labels.unsqueeze(1)) & both


def ranks_of(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return (B, K) 1-based ranks, largest first, ties by place; absent places come last."""
    order = values.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) + 1


def gains_of(labels: torch.Tensor, gain: Gain) -> torch.Tensor:
    """Return G: 2^psi - 1, or psi."""
    return labels.exp2() - 1 if gain == "exp2" else labels


def discounts_of(ranks: torch.Tensor, discount: Discount, like: torch.Tensor) -> torch.Tensor:
    """Return 1 / D(rank) in the dtype of ``like``; with ``none`` it is 1."""
    if discount == "none":
        return torch.ones_like(like)
    ranks = ranks.to(like.dtype)
    return 1 / ((1 + ranks).log2() if discount == "log2" else ranks.log1p())


def lambda_weights(
    scores: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    *,
    gain: Gain = "exp2",
    discount: Discount = "log2",
) -> torch.Tensor:
    """Return Delta, (B, K, K), symmetric, without gradient (arXiv 2402.01878).

    Args:
        scores: (B, K) s, whose ranking sets the discounts.
        labels: (B, K) psi.
        valid: (B, K) bool.
        gain: G.
        discount: D; with ``none`` the factor is left out.
    """
    gains = gains_of(labels, gain)
    weights = (gains.unsqueeze(2) - gains.unsqueeze(1)).abs()
    if discount != "none":
        factor = discounts_of(ranks_of(scores.detach(), valid), discount, labels)
        weights = weights * (factor.unsqueeze(2) - factor.unsqueeze(1)).abs()
    return weights.detach()


def list_losses(
    objective: Objective,
    scores: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    *,
    gain: Gain = "exp2",
    discount: Discount = "log2",
) -> torch.Tensor:
    """Return the loss of each list as a sum, (B,); see the formulas of this module.

    Args:
        objective: Which loss.
        scores: (B, K) s with gradient.
        labels: (B, K) psi in [0, 1].
        valid: (B, K) bool; absent places may hold any finite number.
        gain: Of ``lambda``.
        discount: Of ``lambda``.
    """
    functional = torch.nn.functional
    if objective in PAIR_LOSSES:
        gaps = scores.unsqueeze(2) - scores.unsqueeze(1)
        terms = (1 - gaps).relu() if objective == "pair_hinge" else -functional.logsigmoid(gaps)
        if objective == "lambda":
            terms = terms * lambda_weights(scores, labels, valid, gain=gain, discount=discount)
        return torch.where(pair_mask(labels, valid), terms, 0.0).sum(dim=(1, 2))
    if objective == "list_mle":
        place = ranks_of(labels, valid)
        after = (place.unsqueeze(1) >= place.unsqueeze(2)) & valid.unsqueeze(1)
        after = after | torch.eye(scores.size(1), dtype=torch.bool, device=scores.device)
        tails = scores.unsqueeze(1).masked_fill(~after, -torch.inf).logsumexp(dim=2)
        terms = tails - scores
    elif objective == "softmax":
        present = labels.masked_fill(~valid, 0.0)
        total = present.sum(dim=1, keepdim=True)
        target = torch.where(
            total > 0, present / total.clamp_min(1e-30), 1 / valid.sum(dim=1, keepdim=True).to(labels.dtype)
        )
        logs = scores.masked_fill(~valid, -torch.inf).log_softmax(dim=1).masked_fill(~valid, 0.0)
        terms = -target * logs
    elif objective == "point_mse":
        terms = (labels - scores).square()
    else:
        terms = functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return torch.where(valid, terms, 0.0).sum(dim=1)


def ndcg(
    scores: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    *,
    gain: Gain = "exp2",
    discount: Discount = "log2",
) -> torch.Tensor:
    """Return (B,) discounted gain of the ranking by scores over that of the best ranking; 1 without gains."""
    gains = gains_of(labels, gain).masked_fill(~valid, 0.0)
    reached, best = (
        (gains * discounts_of(ranks_of(key, valid), discount, labels)).sum(dim=1) for key in (scores, labels)
    )
    return torch.where(best > 0, reached / best.clamp_min(1e-30), 1.0)


class LiPO(Method):
    """LiPO: one ranking loss over the scores of all responses to a prompt."""

    name = "lipo"
    title = "LiPO: one ranking loss over all answers to a prompt"
    paper = "2402.01878"
    replaces_loss = True

    objective: Objective = Field(default="lambda", description="The ranking loss.")
    gain: Gain = Field(default="exp2", description="G of lambda: 2^psi - 1, or psi.")
    discount: Discount = Field(
        default="log2", description="D of lambda: log2(1 + rank), ln(1 + rank), or leave the factor out."
    )
    reduction: Literal["pairs_mean", "list_sum"] = Field(
        default="pairs_mean", description="Mean over pairs, or sum in a list and mean over prompts."
    )
    labels: Literal["given", "min_max"] = Field(
        default="given", description="Scores as they are, in [0, 1], or scaled list by list."
    )
    length_normalized: bool = Field(
        default=False, description="Divide each sequence log-ratio by the length of its response."
    )
    list_size: int | None = Field(
        default=None, ge=2, description="Use the first so many responses of a list; None for all."
    )
    forward_rows: int | None = Field(
        default=None, ge=1, description="Responses that go through the model at a time; None for all."
    )

    @property
    def lists(self) -> ListSettings:
        """How the data are to be read."""
        return ListSettings(
            labels=self.labels,
            size=self.list_size,
            forward_rows=self.forward_rows,
            counts_pairs=self._pairs_mean,
        )

    @property
    def _pairs_mean(self) -> bool:
        return self.reduction == "pairs_mean" and self.objective in PAIR_LOSSES

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """See :meth:`posttrain.preference.method.Method.conflicts`."""
        from posttrain.preference.registry import available

        yield from super().conflicts(setup)
        trainer = setup.trainer
        if self.forward_rows is not None:
            yield from not_sharded(setup, "lipo.forward_rows runs the model again in the backward")
        losses = as_list(trainer.get("loss_type") or ["sigmoid"])
        if losses != ["sigmoid"] or trainer.get("loss_weights"):
            yield Conflict(
                f"lipo replaces the loss, found loss_type={losses}, loss_weights="
                f"{trainer.get('loss_weights')}: drop them, and choose lipo's objective",
                "loss_type",
            )
        for name, neutral in (
            ("f_divergence_type", "reverse_kl"),
            ("ld_alpha", None),
            ("use_weighting", False),
            ("label_smoothing", 0.0),
        ):
            if trainer.get(name, neutral) not in (neutral, None):
                yield Conflict(f"lipo does not define {name} for lists, found {trainer[name]}: drop it", name)
        for name in setup.methods:
            method = available().get(name)
            if method is not None and method is not LiPO and not method.for_lists:
                yield Conflict(
                    f"{name} acts on pairs of a chosen and a rejected response, which lists do not have: "
                    "drop it, or train on pairs without lipo"
                )

    def loss(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        """See :meth:`posttrain.preference.method.Method.loss`."""
        lists = batch.lists
        assert lists is not None
        values = batch.beta * scores
        if self.length_normalized:
            values = values / batch.mask.sum(dim=1).clamp_min(1)
        spread = lists.spread(values)
        labels, valid = lists.labels.to(values.dtype), lists.valid
        sums = list_losses(self.objective, spread, labels, valid, gain=self.gain, discount=self.discount)
        self._log(batch, spread.detach(), labels, valid)
        if not self._pairs_mean:
            return sums.mean()
        if self.objective == "lambda":
            sums = sums * valid.sum(dim=1)
        # without a single pair in the whole step the sums are 0, and so is the loss
        return sums.sum() / torch.where(lists.pairs > 0, lists.pairs, 1.0)

    def _log(self, batch: Batch, scores: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> None:
        gauges = batch.gauges
        gauges.mean("ndcg", ndcg(scores, labels, valid, gain=self.gain, discount=self.discount))
        gauges.mean("lists_without_pairs", (~pair_mask(labels, valid).flatten(1).any(dim=1)).float())
        gauges.mean("list_size", valid.sum(dim=1).float())

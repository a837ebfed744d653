"""Policy against reference at every token: log-probabilities and the exact KL, in one pass of tiles."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.kernels.head import LMHead
from posttrain.kernels.statistics import project, temper

#: Logits held at a time by each of the two models: on a CPU what fits its cache, on a GPU what keeps it busy.
CPU_TILE, TILE = 2**18, 2**24
ROWS = 1024
_LOWEST = -1e30  # stands for a logit of -inf, so that 0 * logit is 0
_IMPOSSIBLE = 1e12  # nats; no KL of finite logits comes near


@dataclass(frozen=True)
class ReferenceScores:
    """What :func:`score_against_reference` returns; every tensor is (N,), in fp32 at least, nats.

    Attributes:
        logps: log pi(id), with gradient.
        ref_logps: log ref(id), constant.
        kl: KL(ref || pi) over the whole vocabulary, >= 0, with gradient; exactly 0 where both are equal bit
            for bit, inf where pi excludes a token that ref does not.
        entropies: Entropy of pi, constant.
        mean_logits: Mean logit of pi over the vocabulary, constant.
        is_top1: bool, whether id is the first most likely token of pi.
        log_sum_sq_probs: log sum_v pi(v)^2, constant, or None when not asked for.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    kl: torch.Tensor
    entropies: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    log_sum_sq_probs: torch.Tensor | None = None


def score_against_reference(
    hidden: torch.Tensor,
    head: LMHead,
    ref_hidden: torch.Tensor,
    ref_head: LMHead,
    ids: torch.Tensor,
    *,
    log_sum_sq_probs: bool = False,
    tile: int | None = None,
) -> ReferenceScores:
    """Return what a policy and a reference say about N tokens, with gradient to the policy.

    With p and q the next-token distributions of policy and reference and y the token, the derivative of
    ``g log p_y + g' KL(q || p)`` with respect to the policy's logits is g (1[y] - p) + g' (p - q). Both
    models go through their heads together, a tile of (tokens x part of the vocabulary) at a time; the
    backward computes the tiles again, so a (tokens x vocabulary) tensor never exists. A token with q = 0 adds
    nothing to the KL, whatever its logits.

    Args:
        hidden: (N, H) hidden states of the policy.
        head: Its LM head. Gradient goes to weight and bias if they require it. Every rank has to call this
            (and the backward) equally often: a sharded head is gathered inside.
        ref_hidden: (N, H') of the reference; constant.
        ref_head: Its LM head, maybe the same; constant.
        ids: (N,) the tokens.
        log_sum_sq_probs: Also compute that.
        tile: Logits held at a time by each model.

    Raises:
        ValueError: Shapes do not fit; the vocabularies differ; or the head of the policy trains and is
            sharded by FSDP, so that its gradient would be lost.
    """
    weight, bias = head.module.weight, getattr(head.module, "bias", None)
    assert isinstance(weight, torch.Tensor)
    trains = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bool(bias.requires_grad))
    )
    partitioned = hasattr(weight, "ds_status")
    if trains and not partitioned and (hasattr(weight, "full_tensor") or weight.dim() != 2):
        raise ValueError(
            "the exact KL needs the gradient of the LM head, which is sharded here (FSDP): train with LoRA, "
            "which leaves the head frozen, or use DeepSpeed or plain data parallelism"
        )
    if ids.shape != hidden.shape[:1] or ids.shape != ref_hidden.shape[:1]:
        raise ValueError(
            f"one row per token is needed: found {tuple(ids.shape)} ids, hidden states of "
            f"{tuple(hidden.shape)} and {tuple(ref_hidden.shape)}"
        )
    device = weight.device  # with the model split over devices, the head may be on another one
    settings = (head, ref_head, log_sum_sq_probs, tile or (CPU_TILE if device.type == "cpu" else TILE))
    ref_hidden, ids = ref_hidden.detach().to(device), ids.to(device)

    def apply(states: torch.Tensor) -> tuple[Any, ...]:
        trained = (head.module.weight, bias) if trains else (None, None)
        columns: tuple[Any, ...] = _Score.apply(states, *trained, ref_hidden, ids, settings)
        return columns

    if not (trains and partitioned):
        return ReferenceScores(*apply(hidden.to(device)))
    constant: dict[int, Any] = {}

    def differentiable(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = apply(states)
        constant.update({i: column for i, column in enumerate(columns) if i not in (0, 2)})
        return columns[0], columns[2]

    logps, kl = head.call(differentiable, hidden.to(device))
    return ReferenceScores(logps, constant[1], kl, *(constant[i] for i in range(3, 7)))


@contextlib.contextmanager
def _both(
    head: LMHead, ref_head: LMHead
) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]]:
    """Yield (weight, bias) of both heads in full, without gradient; a shared head is gathered once."""
    with head.gathered() as (weight, bias):
        policy = (weight.detach(), None if bias is None else bias.detach())
        if ref_head.module is head.module:
            yield policy, policy
            return
        with ref_head.gathered() as (weight, bias):
            yield policy, (weight.detach(), None if bias is None else bias.detach())


def _spans(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _tiles(hidden: torch.Tensor, weight: torch.Tensor, tile: int) -> tuple[list[slice], list[slice]]:
    """Return spans of rows and of the vocabulary."""
    rows = min(max(hidden.size(0), 1), ROWS, max(tile, 1))
    return _spans(hidden.size(0), rows), _spans(weight.size(0), max(1, tile // rows))


def _half(hidden: torch.Tensor) -> torch.dtype | None:
    """Return the type in which a GPU multiplies under autocast; a CPU gains nothing from it."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if device != "cpu" and torch.is_autocast_enabled(device) else None


def _exact(hidden: torch.Tensor) -> torch.autocast:
    """Return a context without autocast, which would take sums of products in half precision."""
    return torch.autocast(hidden.device.type, enabled=False)


def _logits(
    hidden: torch.Tensor,
    head: LMHead,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    part: slice,
    half: torch.dtype | None,
) -> torch.Tensor:
    """Return (rows, part) tempered logits in fp32 at least, without -inf."""
    rows = weight[part]
    z = project(hidden, rows) if half is None else project(hidden.to(half), rows.to(half))
    # only a bias brings logits of -inf
    finite = None if bias is None else bias[part].to(z.dtype).clamp(min=_LOWEST)
    temper(z, finite, head.temperature, head.logit_scale, head.softcap)
    return z


class _Total:
    """log-sum-exp of rows that come in parts, and sums weighted by the exponentials."""

    def __init__(self, like: torch.Tensor, sums: int) -> None:
        self.top = torch.full_like(like, -math.inf)
        self.sums = [torch.zeros_like(like) for _ in range(sums + 1)]

    def raise_top(self, z: torch.Tensor) -> torch.Tensor:
        """Take the maxima of the part into account, and return exp(z - top)."""
        top = torch.maximum(self.top, z.amax(dim=-1))
        self.scale = (self.top - top).exp()
        self.top = top
        return (z - top.unsqueeze(1)).exp_()

    def add(self, place: int, value: torch.Tensor, power: int = 1) -> None:
        self.sums[place].mul_(self.scale**power).add_(value)

    @property
    def log(self) -> torch.Tensor:
        return self.top + self.sums[0].log()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the sums of products of rows, without a tensor of products."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        ref_hidden: torch.Tensor,
        ids: torch.Tensor,
        settings: tuple[LMHead, LMHead, bool, int],
    ) -> tuple[torch.Tensor | None, ...]:
        del weight, bias  # only for autograd: the heads know them, and gather them
        head, ref_head, squares, tile = settings
        ctx.set_materialize_grads(False)
        half = _half(hidden)
        with _both(head, ref_head) as (policy, reference), _exact(hidden):
            columns, log_totals = _forward(
                hidden, (head, *policy), ref_hidden, (ref_head, *reference), ids, squares, tile, half
            )
        ctx.save_for_backward(hidden, ref_hidden, ids, *log_totals)
        ctx.settings, ctx.half = settings, half
        ctx.mark_non_differentiable(*(column for column in (columns[1], *columns[3:]) if column is not None))
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, ref_hidden, ids, log_total, ref_log_total = ctx.saved_tensors
        head, ref_head, _, tile = ctx.settings
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        summed = log_total.dtype
        zero = torch.zeros_like(log_total)
        grad, grad_kl = (zero if g is None else g.to(summed) for g in (grads[0], grads[2]))
        with _both(head, ref_head) as ((weight, bias), (ref_weight, ref_bias)), _exact(hidden):
            # summed over tiles, so not in half precision
            grad_hidden = torch.zeros_like(hidden, dtype=summed)
            grad_weight = torch.zeros_like(weight, dtype=summed) if needs_weight else None
            grad_bias = torch.zeros_like(weight[:, 0], dtype=summed) if needs_bias else None
            row_spans, parts = _tiles(hidden, weight, tile)
            for rows in row_spans:
                h, r, kl = hidden[rows], ref_hidden[rows], _nonzero_span(grad_kl[rows])
                factor, target = (grad_kl - grad)[rows].unsqueeze(1), ids[rows]
                for part in parts:
                    z = _logits(h, head, weight, bias, part, ctx.half)
                    bend = None if head.softcap is None else _bend(z, head)
                    slope = z.sub_(log_total[rows].unsqueeze(1)).exp_().mul_(factor)
                    if kl.stop > kl.start:
                        q = _logits(r[kl], ref_head, ref_weight, ref_bias, part, ctx.half)
                        q.sub_(ref_log_total[rows][kl].unsqueeze(1)).exp_()
                        slope[kl].addcmul_(q, grad_kl[rows][kl].unsqueeze(1), value=-1)
                    local = target - part.start
                    inside = (local >= 0) & (local < slope.size(1))
                    slope.scatter_add_(
                        1,
                        local.clamp(0, slope.size(1) - 1).unsqueeze(1),
                        torch.where(inside, grad[rows], 0.0).unsqueeze(1),
                    )
                    if bend is not None:
                        slope.mul_(bend)
                    if head.logit_scale != 1.0 or head.temperature != 1.0:
                        slope.mul_(head.logit_scale / head.temperature)
                    _add_product(grad_hidden[rows], slope, weight[part], ctx.half)
                    if grad_weight is not None:
                        _add_product(grad_weight[part], slope.t(), h, ctx.half)
                    if grad_bias is not None:
                        grad_bias[part] += slope.sum(dim=0)
        return (
            grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _forward(
    hidden: torch.Tensor,
    policy: tuple[LMHead, torch.Tensor, torch.Tensor | None],
    ref_hidden: torch.Tensor,
    reference: tuple[LMHead, torch.Tensor, torch.Tensor | None],
    ids: torch.Tensor,
    squares: bool,
    tile: int,
    half: torch.dtype | None,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    """Return the columns of :class:`ReferenceScores` and the log totals of both."""
    weight, ref_weight = policy[1], reference[1]
    for states, matrix in ((hidden, weight), (ref_hidden, ref_weight)):
        if states.dim() != 2 or matrix.dim() != 2 or states.size(1) != matrix.size(1):
            raise ValueError(
                f"hidden states are (N, H) and the LM head is (V, H): found {tuple(states.shape)} and "
                f"{tuple(matrix.shape)}"
            )
    if weight.size(0) != ref_weight.size(0):
        raise ValueError(
            f"policy and reference need one vocabulary: found {weight.size(0)} and {ref_weight.size(0)} "
            "tokens"
        )
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    row_spans, parts = _tiles(hidden, weight, tile)
    found: list[list[torch.Tensor]] = []
    for rows in row_spans:
        target = ids[rows]
        like = hidden.new_zeros(target.size(0), dtype=dtype)
        mine, theirs = _Total(like, 2), _Total(like, 1)
        chosen, ref_chosen, total = like.clone(), like.clone(), like.clone()
        earlier = torch.full_like(like, -math.inf)  # largest logit before the target
        for part in parts:
            z = _logits(hidden[rows], *policy, part, half)
            y = _logits(ref_hidden[rows], *reference, part, half)
            local = target - part.start
            inside = (local >= 0) & (local < z.size(1))
            column = local.clamp(0, z.size(1) - 1).unsqueeze(1)
            chosen = torch.where(inside, z.gather(1, column).squeeze(1), chosen)
            ref_chosen = torch.where(inside, y.gather(1, column).squeeze(1), ref_chosen)
            total += z.sum(dim=-1)

            before = mine.top
            e = mine.raise_top(z)
            mine.add(0, e.sum(dim=-1))
            mine.add(1, _dot(e, z))
            if squares:
                mine.add(2, _dot(e, e), power=2)
            # of a part that ends before the target all maxima count, of its own part those on the left
            earlier = torch.where(local >= z.size(1), mine.top, torch.where(inside, before, earlier))
            here = inside.nonzero().squeeze(1)
            places = torch.arange(z.size(1), device=z.device)
            left = z[here].masked_fill(places >= local[here].unsqueeze(1), -math.inf).amax(dim=-1)
            earlier[here] = torch.maximum(earlier[here], left)

            e = theirs.raise_top(y)
            theirs.add(0, e.sum(dim=-1))
            theirs.add(1, _dot(e, y.sub_(z)))
        log_total, ref_log_total = mine.log, theirs.log
        kl = theirs.sums[1] / theirs.sums[0] - (ref_log_total - log_total)
        kl = kl.clamp_(min=0).masked_fill_(kl > _IMPOSSIBLE, math.inf)
        found.append(
            [
                chosen - log_total,
                ref_chosen - ref_log_total,
                kl,
                log_total - mine.sums[1] / mine.sums[0],
                total / weight.size(0),
                (chosen >= mine.top) & (chosen > earlier),
                mine.sums[2].log() - 2 * mine.sums[0].log(),
                log_total,
                ref_log_total,
            ]
        )
    empty = hidden.new_zeros(0, dtype=dtype)
    if not found:
        found.append([empty] * 5 + [empty.bool()] + [empty] * 3)
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return [*joined[:6], joined[6] if squares else None], joined[7:]


def _bend(z: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Return the derivative of the soft-capping at tempered logits."""
    assert head.softcap is not None
    return (z * (head.temperature / head.softcap)).square_().neg_().add_(1)


def _nonzero_span(values: torch.Tensor) -> slice:
    """Return the shortest slice with all values that are not 0; a method may stop the gradient of a side."""
    places = values.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1) if places.numel() else slice(0, 0)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, half: torch.dtype | None) -> None:
    """Add a @ b to ``total``, which is fp32 at least, without rounding the product to half precision."""
    half = b.dtype if half is None else half
    if total.is_cuda and half in (torch.float16, torch.bfloat16):
        torch.addmm(total, a.to(half), b.to(half), out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b.to(total.dtype))

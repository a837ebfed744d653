"""The forward of a policy and its reference that also gives the exact KL between them, token by token.

TRL's fused head returns log-probabilities and neither hidden states nor logits. Here both models are called
for one logit, which goes unused, the hidden states are seen on their way, and both heads are read together in
:mod:`posttrain.kernels.reference`. What comes out has the fields of TRL's head, and its loss goes on as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from posttrain.kernels import Scored, score_against_reference, watch_head


@dataclass
class OutputWithKL(FusedCausalLMOutput):
    """TRL's output with what the reference says; all (R, T), 0 where nothing counts.

    Attributes:
        ref_logps: log ref(y_t | s_t), nats.
        kl: KL(ref || pi) of the next token, nats, with gradient to the policy.
    """

    ref_logps: torch.Tensor | None = None
    kl: torch.Tensor | None = None


def one_logit(policy: torch.nn.Module) -> dict[str, int]:
    """Return what to call a causal language model with if its logits are not needed."""
    known = inspect.signature(type(policy).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def forward_with_kl(
    model: Callable[..., Any],
    policy: torch.nn.Module,
    run_reference: Callable[[dict[str, Any], Callable[[Any], AbstractContextManager[Any]]], Any],
    kwargs: Mapping[str, Any],
    mask: torch.Tensor,
    autocast: AbstractContextManager[Any],
    *,
    log_sum_sq_probs: bool = False,
) -> OutputWithKL:
    """Run both models and score the completions.

    Args:
        model: The policy as it is called, with its wrappers.
        policy: The causal language model inside.
        run_reference: Calls the reference with the given arguments, in a context made from the causal
        language
            model inside it.
        kwargs: What TRL calls the policy with.
        mask: (R, S) bool, completion tokens.
        autocast: The trainer's mixed precision.
        log_sum_sq_probs: Also give that field.

    Raises:
        ValueError: The head trains and is sharded, see :mod:`posttrain.kernels.reference`.
    """
    arguments = {name: value for name, value in kwargs.items() if name not in ("labels", "fused_lm_head")}
    arguments |= one_logit(policy)
    seen: list[Scored] = []

    def watch(inside: Any) -> AbstractContextManager[None]:
        return watch_head(inside, kwargs["input_ids"], mask, mask.size(1) - 1, seen.append)

    with watch(policy):
        outputs = model(**arguments)
    run_reference(arguments, watch)
    mine, theirs = seen
    where = mine.mask
    with autocast:
        scores = score_against_reference(
            mine.hidden[where],
            mine.head,
            theirs.hidden[where],
            theirs.head,
            mine.ids[where],
            log_sum_sq_probs=log_sum_sq_probs,
        )

    def placed(values: torch.Tensor) -> torch.Tensor:
        target = where.to(values.device)
        return values.new_zeros(target.shape).masked_scatter(target, values)

    return OutputWithKL(
        log_probs=placed(scores.logps),
        entropy=placed(scores.entropies),
        log_sum_sq_probs=None if scores.log_sum_sq_probs is None else placed(scores.log_sum_sq_probs),
        mean_logits=placed(scores.mean_logits),
        is_top1=placed(scores.is_top1),
        label_mask=where,
        aux_loss=getattr(outputs, "aux_loss", None),
        ref_logps=placed(scores.ref_logps),
        kl=placed(scores.kl),
    )

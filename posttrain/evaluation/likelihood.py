"""Log-probabilities of given texts under a model, token by token, without a (tokens x vocabulary) tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from posttrain.evaluation.generate import generation_mode
from posttrain.kernels.head import LMHead
from posttrain.kernels.statistics import token_statistics


@torch.no_grad()
def sequence_logps(
    model: Any, sequences: Sequence[tuple[Sequence[int], int]], *, pad: int, batch_size: int = 32
) -> list[torch.Tensor]:
    """Return log p(token | what comes before) in nats for the tail of each sequence.

    Args:
        model: A causal language model; PEFT and DDP wrappers are fine. Its state is the same afterwards.
        sequences: Token ids, and the place at which the tail begins, at least 1.
        pad: Id put on masked places.
        batch_size: Sequences that go forward together. Under sharding every rank needs as many sequences.

    Returns:
        One float32 tensor on the CPU for each, (tokens of the tail,).
    """
    if hasattr(model, "module") and not hasattr(model, "get_input_embeddings"):
        model = model.module  # DDP
    core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # the head of an adapter, or a copy that is trained beside it, is more than its weight
    plain = type(core.get_output_embeddings()) is torch.nn.Linear
    device = core.get_input_embeddings().weight.device
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index][0]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    with generation_mode(model):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = [sequences[index] for index in places]
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row, _ in rows], device=device)
            column = torch.arange(width, device=device)
            ends = torch.tensor([len(row) for row, _ in rows], device=device).unsqueeze(1)
            begins = torch.tensor([begin for _, begin in rows], device=device).unsqueeze(1)
            inputs = {"input_ids": ids, "attention_mask": (column < ends).long(), "use_cache": False}
            where = ((column >= begins) & (column < ends))[:, 1:]
            if plain:
                head = LMHead.of(core)
                hidden = core.base_model(**inputs).last_hidden_state[:, :-1]
                with head.gathered() as (weight, bias):
                    logps = token_statistics(
                        hidden[where].to(weight.device),
                        weight,
                        ids[:, 1:][where].to(weight.device),
                        bias=bias,
                        logit_scale=head.logit_scale,
                        softcap=head.softcap,
                    ).logps
            else:
                logits = model(**inputs).logits[:, :-1][where].float()
                logps = torch.log_softmax(logits, -1).gather(1, ids[:, 1:][where].unsqueeze(1)).squeeze(1)
            counts = where.sum(dim=1).tolist()
            for index, part in zip(places, logps.float().cpu().split(counts), strict=True):
                found[index] = part
    return found

"""Generation batches as rows: taking some, joining two, gathering them over ranks.

A batch is the dict that TRL's ``_generate_and_score_completions`` returns. Every tensor in it with as many
entries as the batch has rows goes with its row; everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain._lazy import torch

Batch = dict[str, Any]

CARRY = "posttrain/"
"""Prefix of the keys that are ours."""

# what stands where a row has no token; 0 for every other key
_FILL = {"tool_mask": 1, "importance_sampling_ratio": 1}


def row_keys(batch: Batch) -> list[str]:
    """Return the keys of the row-shaped tensors, sorted, so that all ranks go through them alike."""
    rows = len(batch["prompt_ids"])
    return sorted(
        key
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows
    )


def refuse_images(batch: Batch) -> None:
    """Raise when a batch holds images, whose tensors are not row-shaped.

    Raises:
        ValueError: It does.
    """
    if "num_images" in batch or "pixel_values" in batch:
        raise ValueError("rows of a generation batch with images cannot be moved: train text only")


def take_rows(batch: Batch, rows: torch.Tensor) -> Batch:
    """Return the batch with rows ``rows``, (n,) indices, in that order.

    Raises:
        ValueError: The batch holds images.
    """
    refuse_images(batch)
    taken = {key: batch[key][rows.to(batch[key].device)] for key in row_keys(batch)}
    return {**batch, **taken}


def join_rows(first: Batch, second: Batch, pad_token: int) -> Batch:
    """Return the rows of ``first`` and then those of ``second``, padded to common widths.

    The keys are those of ``first``; what ``second`` lacks is zero. Advantages of one number per row become
    one per token where those of ``first`` are.

    Raises:
        ValueError: A batch holds images.
    """
    refuse_images(first)
    refuse_images(second)
    joined = dict(first)
    rows = len(second["prompt_ids"])
    for key in row_keys(first):
        a = first[key]
        b = second[key] if key in second else a.new_zeros(rows, *a.shape[1:])
        if b.dim() == 1 and a.dim() == 2:
            b = b.unsqueeze(1).expand(-1, second["completion_ids"].size(1))
        if a.dim() > 1:
            width = max(a.size(1), b.size(1))
            a, b = (_widen(part, key, width, pad_token) for part in (a, b))
        joined[key] = torch.cat([a, b.to(a)])
    return joined


def _fill(key: str, pad_token: int) -> int:
    return pad_token if key in ("prompt_ids", "completion_ids") else _FILL.get(key, 0)


def _widen(values: torch.Tensor, key: str, width: int, pad_token: int) -> torch.Tensor:
    missing = width - values.size(1)
    sides = (missing, 0) if key.startswith("prompt_") else (0, missing)  # prompts are padded on the left
    return torch.nn.functional.pad(values, sides, value=_fill(key, pad_token)) if missing else values


def gather_batch(batch: Batch, pad_token: int, widest: Callable[[int], int], gather: Any) -> Batch:
    """Return the row-shaped tensors of all ranks, in rank order, the same on every rank. Collective.

    Args:
        batch: This rank's, with the same number of rows and the same keys as on the others.
        pad_token: Id of the padding token.
        widest: Collective: the largest of a number over all ranks.
        gather: Collective: the concatenation of equally shaped tensors over all ranks.
    """
    refuse_images(batch)
    gathered = {}
    for key in row_keys(batch):
        value = batch[key]
        if value.dim() > 1:
            value = _widen(value, key, widest(value.size(1)), pad_token)
        gathered[key] = gather(value.contiguous())
    return gathered


def kept_share(loss_type: str, rows: int, of_rows: int, tokens: torch.Tensor, of_tokens: torch.Tensor) -> Any:
    """Return the factor that gives a loss over some rows of a micro-batch the divisor of all of them.

    Args:
        loss_type: Any of TRL's.
        rows: Rows that the loss saw.
        of_rows: Rows of the micro-batch.
        tokens: 0-dim, active tokens that the loss saw.
        of_tokens: 0-dim, active tokens of the micro-batch.

    Raises:
        ValueError: Unknown ``loss_type``.
    """
    if loss_type in ("grpo", "sapo", "dr_grpo", "luspo"):
        return rows / of_rows
    if loss_type == "bnpo":
        return tokens.clamp(min=1.0) / of_tokens.clamp(min=1.0)
    if loss_type in ("dapo", "cispo", "vespo"):
        return 1.0  # these divide by the active tokens of the whole generation batch
    raise ValueError(f"no divisor is known for loss_type={loss_type!r}")

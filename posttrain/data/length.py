"""Prompts that are too long: counted first, then refused or left out aloud, never cut."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from posttrain.data.contracts import is_conversational
from posttrain.data.errors import DataError

logger = logging.getLogger(__name__)

BATCH = 256
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class LengthReport:
    """Lengths of the prompts of a data set, in tokens.

    Attributes:
        column: What was measured: ``prompt``, or ``messages`` or ``text`` where there is no prompt.
        rows: Rows measured.
        mean: Mean length.
        percentiles: Length by percentile (50, 90, 99): so many percent of the rows are not longer.
        longest: The largest length.
        longest_kept: The largest length of the rows that are left.
        limit: Longest length allowed, or None.
        over: Rows over the limit.
        kept: Rows that are left.
    """

    column: str
    rows: int
    mean: float
    percentiles: dict[int, int]
    longest: int
    longest_kept: int
    limit: int | None
    over: int
    kept: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return dataclasses.asdict(self)


def count_tokens(dataset: Dataset, tokenizer: Any, column: str = "prompt") -> list[int]:
    """Return the length of each prompt in tokens, as TRL tokenizes it.

    Text goes through the tokenizer with its special tokens; messages through its chat template, with the
    opening of the assistant's turn when they are a prompt.
    """
    opening = {"add_generation_prompt": column == "prompt", "tokenize": True, "return_dict": True}
    spoken = is_conversational(dataset, column)
    lengths: list[int] = []
    for start in range(0, len(dataset), BATCH):
        values = list(dataset[start : start + BATCH][column])
        encoded = tokenizer.apply_chat_template(values, **opening) if spoken else tokenizer(values)
        lengths += [len(ids) for ids in encoded["input_ids"]]
    return lengths


def apply_length_policy(
    dataset: Dataset,
    tokenizer: Any,
    max_prompt_tokens: int | None,
    policy: Literal["refuse", "filter"] = "refuse",
) -> tuple[Dataset, LengthReport]:
    """Measure all prompts and apply the policy to those over the limit.

    Args:
        dataset: Rendered rows, see :func:`posttrain.data.prompts.render`.
        tokenizer: A transformers tokenizer.
        max_prompt_tokens: Longest prompt allowed in tokens, or None: only measure.
        policy: ``refuse`` raises, ``filter`` leaves the rows out and warns with the numbers.

    Returns:
        The rows within the limit, unchanged and in order, and the report.

    Raises:
        DataError: Prompts over the limit under ``refuse``, or none left under ``filter``.
    """
    names = dataset.column_names
    column = next(name for name in ("prompt", "messages", "text") if name in names)
    lengths = np.asarray(count_tokens(dataset, tokenizer, column))
    if not len(lengths):
        raise DataError("the data set has no rows to measure")
    fits = np.ones(len(lengths), bool) if max_prompt_tokens is None else lengths <= max_prompt_tokens
    over = int((~fits).sum())
    report = LengthReport(
        column=column,
        rows=len(lengths),
        mean=float(lengths.mean()),
        # "higher" gives the length of a row that exists
        percentiles={p: int(np.percentile(lengths, p, method="higher")) for p in PERCENTILES},
        longest=int(lengths.max()),
        longest_kept=int(lengths[fits].max(initial=0)),
        limit=max_prompt_tokens,
        over=over,
        kept=len(lengths) - over,
    )
    if not over:
        return dataset, report
    worst = np.argsort(-lengths, kind="stable")[:3]
    examples = "; ".join(
        f"row {index + 1}: {lengths[index]} tokens, {_start(dataset[int(index)][column])}" for index in worst
    )
    finding = (
        f"{over} of {len(lengths)} rows ({over / len(lengths):.1%}) have a {column} over "
        f"{max_prompt_tokens} tokens; "
        f"the longest has {report.longest}, 99 % have at most {report.percentiles[99]}. Longest: {examples}"
    )
    if policy == "refuse":
        raise DataError(
            f"{finding}. Raise data.max_prompt_tokens to {report.longest}, or leave these rows out with "
            "data.over_length: filter. Prompts are never cut"
        )
    if over == len(lengths):
        raise DataError(f"{finding}. Nothing would be left: raise data.max_prompt_tokens")
    logger.warning("%s. They are left out; %d rows remain", finding, report.kept)
    return dataset.select(np.flatnonzero(fits)), report


def _start(value: Any) -> str:
    text = repr(value[-1].get("content") if isinstance(value, list) else value)
    return text if len(text) <= 50 else f"{text[:47]}..."

"""Letting numbers of the data set through to the micro-step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class WithColumns:
    """A collator that adds columns, as (B,) tensors, to what another one makes of the rest.

    Whole numbers stay such (int64), anything else is fp32; a missing value is -1.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], columns: Sequence[str]
    ) -> None:
        self.collator, self.columns = collator, columns

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows."""
        batch = self.collator([{k: v for k, v in row.items() if k not in self.columns} for row in rows])
        for name in self.columns:
            if all(name in row for row in rows):
                values = [-1 if row[name] is None else row[name] for row in rows]
                whole = all(type(value) is int for value in values)
                batch[name] = torch.tensor(values if whole else [float(value) for value in values])
        return batch

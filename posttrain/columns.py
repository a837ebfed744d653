"""Letting numbers of the data set through to the micro-step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from posttrain._lazy import torch

if TYPE_CHECKING:
    from datasets import Dataset

#: Column of the training data with the place of a row before anything was left out; yours is kept.
ID = "posttrain_id"


def number_rows(rows: Any, names: str) -> tuple[Dataset, int, str]:
    """Give every row its place as an id, unless there are ids.

    Args:
        rows: As the trainer was given them.
        names: Of the methods that want ids, for the message.

    Returns:
        The rows with ids, one more than the largest id, and the fingerprint of the rows.

    Raises:
        ValueError: The rows are a stream, or an id is no whole number from 0.
    """
    from datasets import Dataset

    from posttrain.data.load import row_fingerprint

    if not isinstance(rows, Dataset):
        raise ValueError(
            f"{names} keeps a number for every training row, which a stream does not have: load the data set "
            "in full"
        )
    if ID not in rows.column_names:
        return rows.add_column(ID, list(range(len(rows)))), len(rows), row_fingerprint(rows)
    ids = rows[ID][:]
    if any(type(value) is not int or value < 0 for value in ids):
        raise ValueError(f"{names}: the column {ID!r} holds whole numbers from 0, one for each row")
    return rows, max(ids, default=-1) + 1, row_fingerprint(rows)


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

"""Answers in no pair, to see where a preference run moves probability (:mod:`posttrain.preference.probe`)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

from posttrain.config.schema import DataConfig
from posttrain.data.contracts import check
from posttrain.data.errors import DataError
from posttrain.data.files import read_file

DEFAULT_SIZE = 64


def load_probe(config: DataConfig, train: Dataset) -> Dataset | None:
    """Return the rows of ``data.probe`` with ``prompt`` and ``completion``, or None without that section.

    Args:
        config: The ``data`` section. With ``probe.file`` its rows, else prompts of the training pairs, each
            with the chosen or rejected answer of another prompt, in turns.
        train: Training pairs, before any rendering.

    Raises:
        DataError: The file cannot be used, there are fewer rows than asked for, or all prompts are the same.
    """
    if config.probe is None:
        return None
    probe, rng = config.probe, random.Random(config.probe.seed)
    if probe.file is not None:
        table = read_file(Path(probe.file).expanduser())
        found = check(table, "sft")
        if set(found) != {"prompt", "completion"}:
            raise DataError(
                f"{table.place}: a probe needs the columns prompt and completion, found "
                f"{', '.join(table.dataset.column_names)}"
            )
        rows = table.dataset.select_columns(["prompt", "completion"])
        return rows.select(sorted(rng.sample(range(len(rows)), _size(probe.size, len(rows), len(rows)))))
    places = rng.sample(range(len(train)), _size(probe.size, DEFAULT_SIZE, len(train)))
    prompts = train["prompt"][:]
    keys = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
    if len(set(keys)) == 1:
        raise DataError(
            "data.probe takes answers of other prompts, and every training row has the same: give probe.file"
        )
    completions: list[Any] = []
    for number, place in enumerate(places):
        other = place
        while keys[other] == keys[place]:
            other = rng.randrange(len(train))
        completions.append(train[other][("chosen", "rejected")[number % 2]])
    return Dataset.from_dict({"prompt": [prompts[place] for place in places], "completion": completions})


def _size(wanted: int | None, default: int, rows: int) -> int:
    if wanted is not None and wanted > rows:
        raise DataError(f"data.probe.size asks for {wanted} rows, there are {rows}: lower it")
    return wanted or min(default, rows)

"""What a deep check looks at: rows, tokenizer, shapes; loaded as the run would load them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from posttrain.config.launch import LAUNCHED
from posttrain.config.schema import RunConfig
from posttrain.config.tasks import TASKS, TaskSpec
from posttrain.config.trainer_check import check_trainer
from posttrain.data.errors import DataError
from posttrain.data.files import PLACE
from posttrain.data.load import LoadedData, load_data
from posttrain.data.prompts import render
from posttrain.deep.findings import Finding
from posttrain.models.load import ModelLoadError
from posttrain.models.skeleton import load_skeleton

LOOKED_AT = 2000
"""Rows that are tokenized at most, evenly spread over the data."""

_LAUNCHED = (*LAUNCHED, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass
class Subject:
    """One run, not started.

    Attributes:
        config: The checked configuration.
        spec: Its task.
        trainer: Every field of TRL's configuration class, as written or by default.
        processes: Training processes of the launch that is meant.
        data: All rows, as they are before the tokenizer is known; None when they cannot be loaded.
        model: Shapes; None when there is none.
        tokenizer: As the run has it; None when there is none.
        rows: Training rows in the form of the tokenizer, at most :data:`LOOKED_AT`.
        held_out: The same of the held-out rows.
        trouble: What went wrong on the way, by section.
    """

    config: RunConfig
    spec: TaskSpec
    trainer: dict[str, Any]
    processes: int
    data: LoadedData | None
    model: Any
    tokenizer: Any
    rows: Dataset | None
    held_out: Dataset | None
    trouble: dict[str, list[Finding]]


def load_subject(config: RunConfig, ranks: int = 1) -> Subject:
    """Load data, tokenizer and shapes of a checked configuration; what fails becomes a finding.

    Args:
        config: The run.
        ranks: Training processes of the launch that is meant.
    """
    spec = TASKS[config.task]
    adapter = config.model.adapter is not None
    trouble: dict[str, list[Finding]] = {"tokens": [], "data": []}
    model, tokenizer = _model(config, spec, trouble["tokens"])
    data = _data(config, trouble["data"])
    rows = held_out = None
    if data is not None and tokenizer is not None:
        try:
            rows = render(spread(data.train), tokenizer, config.data)
            if data.eval is not None:
                held_out = render(spread(data.eval), tokenizer, config.data)
        except DataError as error:
            trouble["tokens"].append(_told(error))
    return Subject(
        config=config,
        spec=spec,
        trainer=check_trainer(config.trainer, spec, ("trainer",), adapter=adapter)[1],
        processes=ranks,
        data=data,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        held_out=held_out,
        trouble=trouble,
    )


def spread(dataset: Dataset, most: int = LOOKED_AT) -> Dataset:
    """Return at most so many rows, evenly spread, in order."""
    if len(dataset) <= most:
        return dataset
    return dataset.select([index * len(dataset) // most for index in range(most)])


@contextmanager
def alone() -> Iterator[None]:
    """Hide the variables of a launcher: what is built here has no other processes to meet."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _model(config: RunConfig, spec: TaskSpec, trouble: list[Finding]) -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model, tokenizer = load_skeleton(config.model, scores=spec.scores)
    except ModelLoadError as error:
        trouble.append(_told(error))
        return None, None
    for text in dict.fromkeys(str(item.message) for item in heard):
        # ours are about tokens; those of libraries about their own affairs
        if "tokenizer" in text and ("embedding rows" in text or "no pad token" in text):
            trouble.append(Finding("warning", text))
    return model, tokenizer


def _data(config: RunConfig, trouble: list[Finding]) -> LoadedData | None:
    wanted = config.evaluate is not None or config.trainer.get("eval_strategy", "no") != "no"
    try:
        return load_data(config.data, config.task, hold_out=wanted, places=True)
    except DataError as error:
        trouble.append(_told(error))
        return None


def _told(error: Exception) -> Finding:
    """Return an error of ours as a finding; below its first line are the places."""
    head, *rest = str(error).replace(f", {PLACE}", "").splitlines()
    return Finding("error", head, examples=tuple(line.strip() for line in rest))

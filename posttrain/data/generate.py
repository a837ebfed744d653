"""The process that generates reasoning-gym problems: ``python -m posttrain.data.generate``.

It has a process of its own because five tasks draw from Python sets: only with a fixed hash seed, which an
interpreter gets at its start, do they give the same problems to every process. The request comes as JSON on
standard input; rows go out as JSON lines, or one line ``{"error": ...}``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Row = dict[str, Any]
MAX_ROUNDS = 50
LEAST_ROUND = 1000
"""Problems of which not one is new before a task counts as exhausted."""


def generate(request: dict[str, Any]) -> tuple[list[Row], list[Row], int]:
    """Generate a training split and, when asked for, held-out problems.

    Args:
        request: ``task``, ``params``, ``train`` and ``eval`` (or None); the last two have ``seed``
            and ``size``.

    Returns:
        Training rows, held-out rows, and how many generated held-out problems were not used because their
        question is in the training split or came before. Others were generated in their place, with the
        seeds that follow; there are fewer rows than asked for only when the task has no more questions.

    Raises:
        ValueError: No such task, or parameters it refuses.
    """
    make = _maker(request["task"], request["params"])
    train = list(make(request["train"]["seed"], request["train"]["size"]))
    if request["eval"] is None:
        return train, [], 0
    seed, size = request["eval"]["seed"], request["eval"]["size"]
    held_out, repeated = distinct_problems(make, seed, size, {row["question"] for row in train})
    return train, held_out, repeated


def distinct_problems(
    make: Callable[[int, int], Iterable[Row]], seed: int, size: int, known: set[str]
) -> tuple[list[Row], int]:
    """Return ``size`` rows with questions that are new and differ, and how many rows were not used.

    Args:
        make: (seed, size) to rows.
        seed: First seed; each further round takes the seeds that follow.
        size: Rows wanted.
        known: Questions that may not occur.
    """
    known = set(known)
    rows: list[Row] = []
    repeated = drawn = 0
    for round_number in range(MAX_ROUNDS):
        before = len(rows)
        # a few problems that are all known say nothing of the task
        count = size if round_number == 0 else max(size, LEAST_ROUND)
        for row in make(seed + drawn, count):
            if row["question"] in known:
                repeated += 1
                continue
            known.add(row["question"])
            rows.append(row)
            if len(rows) == size:
                return rows, repeated
        drawn += count
        if len(rows) == before and count >= LEAST_ROUND:
            break  # a whole round without anything new: the task is exhausted
    return rows, repeated


def _maker(task: str, params: dict[str, Any]) -> Callable[[int, int], Iterator[Row]]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f". Known: {', '.join(sorted(DATASETS))}"
        raise ValueError(f"reasoning-gym has no task {task!r}{hint}")
    known = [
        field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("seed", "size")
    ]
    for name in params:
        if name in ("seed", "size"):
            raise ValueError(f"data.params.{name}: set data.train.{name} and data.eval.{name} instead")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"task {task!r} has no parameter {name!r}{hint}; it has: {', '.join(known)}")

    def make(seed: int, size: int) -> Iterator[Row]:
        try:
            source = reasoning_gym.create_dataset(task, seed=seed, size=size, **params)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"task {task!r} refuses the parameters {params}: {error or type(error).__name__}"
            ) from error
        for index in range(size):
            entry = source[index]
            yield {
                "question": entry["question"],
                "answer": entry["answer"],
                "rg_index": index,
                "rg_seed": seed,
                "rg_size": size,
            }

    return make


def main() -> None:
    """Answer one request."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some tasks print
    sys.stdout = sys.stderr
    try:
        train, held_out, repeated = generate(json.load(sys.stdin))
    except ValueError as error:
        out.write(json.dumps({"error": str(error)}) + "\n")
    else:
        out.write(json.dumps({"repeated": repeated, "train": len(train)}) + "\n")
        for row in (*train, *held_out):
            out.write(json.dumps(row) + "\n")
    out.close()


if __name__ == "__main__":
    main()

"""What columns each kind of training needs, and what to say when they are not there."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from posttrain.data.errors import DataError, listed
from posttrain.data.files import Table

Kind = Literal[
    "text", "prompt", "messages", "completion", "answer", "reply", "replies", "numbers", "number", "square"
]
"""``text``: text that is not empty. ``prompt``, ``completion``: text or messages. ``messages``: a list of
messages with an answer of the assistant. ``answer``: text or a number. ``reply``: as ``completion``, but text
may be empty; ``replies``: a list of them. ``number`` and ``numbers``: finite. ``square``: as many lists as
each of them has numbers, in [0, 1]."""


@dataclass(frozen=True)
class Contract:
    """Columns of one kind of training.

    Attributes:
        alternatives: Sets of columns; the first set that the data has is used.
        optional: Columns that are checked when they are there.
        reserved: Columns that may not be there, because TRL gives the name another meaning.
    """

    alternatives: tuple[Mapping[str, Kind], ...]
    optional: Mapping[str, Kind]
    reserved: tuple[str, ...] = ()


CONTRACTS: dict[str, Contract] = {
    "rlvr": Contract(
        alternatives=({"prompt": "prompt"},),
        optional={"answer": "answer"},
        reserved=(
            *("prompts", "completion", "completions", "completion_ids", "trainer_state"),
            *("log_metric", "log_extra", "environments"),
        ),
    ),
    "sft": Contract(
        alternatives=(
            {"messages": "messages"},
            {"prompt": "prompt", "completion": "completion"},
            {"prompt": "prompt", "answer": "text"},
            {"text": "text"},
        ),
        optional={},
    ),
}

CONTRACTS["ttrl"] = CONTRACTS["rlvr"]  # answers, where there are any, only serve the metrics
CONTRACTS["preference"] = Contract(
    alternatives=(
        {"prompt": "prompt", "chosen": "reply", "rejected": "reply"},
        {"prompt": "prompt", "completions": "replies", "scores": "numbers"},
        {"prompt": "prompt", "completions": "replies", "ranks": "numbers"},
        {"prompt": "prompt", "completions": "replies", "preferences": "square"},
        {"chosen": "reply", "rejected": "reply"},
    ),
    optional={"margin": "number"},
    reserved=(
        *("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"),
        *("chosen_input_ids", "rejected_input_ids", "image", "images"),
    ),
)
CONTRACTS["reward"] = CONTRACTS["preference"]

SYNONYMS: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "problem", "query", "input", "prompts", "user", "text", "context"),
    "answer": (
        "final",
        "solution",
        "final_answer",
        "gold",
        "target",
        "label",
        "correct",
        "output",
        "response",
    ),
    "completion": (
        "response",
        "output",
        "answer",
        "solution",
        "chosen",
        "assistant",
        "target",
        "completions",
    ),
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog"),
    "text": ("content", "document", "story", "texts"),
    "chosen": ("preferred", "better", "winner", "accepted", "good", "response_chosen", "y_w", "positive"),
    "rejected": ("dispreferred", "worse", "loser", "refused", "bad", "response_rejected", "y_l", "negative"),
    "completions": ("responses", "answers", "outputs", "candidates", "replies"),
    "scores": ("rewards", "ratings", "labels", "reward", "score"),
    "ranks": ("rank", "ranking"),
}


def rename(table: Table, columns: Mapping[str, str]) -> Table:
    """Apply ``columns`` (new name to old name); a column that has a new name already is replaced.

    Raises:
        DataError: An old name does not exist, or is wanted twice.
    """
    if not columns:
        return table
    dataset = table.dataset
    found = dataset.column_names
    for new, old in columns.items():
        if old not in found:
            raise DataError(
                f"{table.place}: data.columns wants {new!r} from column {old!r}, which does not exist. "
                f"Found: {', '.join(found)}{_nearest(old, found)}"
            )
    if len(set(columns.values())) != len(columns):
        raise DataError(
            f"data.columns takes one column for two names: {dict(columns)}. Name each column once"
        )
    replaced = [new for new in columns if new in found and new not in columns.values()]
    if replaced:
        notes = (*table.notes, f"columns replaced by renaming: {', '.join(replaced)}")
        table = Table(dataset.remove_columns(replaced), table.place, table.lines, notes)
        dataset = table.dataset
    renamed = dataset.rename_columns({old: new for new, old in columns.items()})
    return Table(renamed, table.place, table.lines, table.notes)


def check(table: Table, task: str) -> Mapping[str, Kind]:
    """Check columns and every row against the contract of a task.

    Args:
        table: The data, after renaming.
        task: A key of :data:`CONTRACTS`.

    Returns:
        The alternative that the data fulfils.

    Raises:
        DataError: Columns are missing (with the renaming that would likely fix it) or reserved, or rows are
            bad: all are counted, the first are named. Nothing is ever dropped.
    """
    contract = CONTRACTS[task]
    found = table.dataset.column_names
    chosen = next((columns for columns in contract.alternatives if set(columns) <= set(found)), None)
    if chosen is None:
        raise DataError(_missing(table, task, contract))
    reserved = [name for name in contract.reserved if name in found]
    if reserved:
        raise DataError(
            f"{table.place}: column {reserved[0]!r} cannot be passed on, because TRL uses the name "
            f"itself. Rename it, for example data.columns: {{my_{reserved[0]}: {reserved[0]}}}"
        )
    checked = dict(chosen) | {name: kind for name, kind in contract.optional.items() if name in found}
    bad: dict[int, str] = {}
    for name, kind in checked.items():
        values = table.dataset[name][:]
        if name in contract.optional and all(value is None for value in values):
            continue
        for index, value in enumerate(values):
            problem = next(_problems(value, kind), None)
            if problem:
                bad.setdefault(index, f"{table.where(index)}: column {name!r} {problem}")
    if bad:
        raise DataError(
            f"{table.place}: {len(bad)} of {len(table.dataset)} rows cannot be used for task {task!r}; "
            f"none was dropped. Correct or remove them:\n{listed([bad[index] for index in sorted(bad)])}"
        )
    return chosen


def is_conversational(dataset: Dataset, column: str) -> bool:
    """Whether a column holds lists of messages."""
    return len(dataset) > 0 and isinstance(dataset[0][column], list)


def _problems(value: Any, kind: Kind) -> Iterator[str]:
    if kind in ("prompt", "completion", "messages") and isinstance(value, list):
        yield from _message_problems(value, needs_assistant=kind == "messages")
    elif kind == "reply":
        if isinstance(value, list):
            yield from _message_problems(value, needs_assistant=False)
        elif not isinstance(value, str):
            yield f"holds {_described(value)} where text or a list of messages is needed"
    elif kind == "replies":
        if not isinstance(value, list) or not value:
            yield f"holds {_described(value)} where a list of answers is needed"
        for item in value if isinstance(value, list) else ():
            yield from _problems(item, "reply")
    elif kind in ("number", "numbers"):
        items = value if kind == "numbers" and isinstance(value, list) else [value]
        if (kind == "numbers") != isinstance(value, list) or not all(map(_is_number, items)):
            wanted = "a list of finite numbers" if kind == "numbers" else "a finite number"
            yield f"holds {_described(value)} where {wanted} is needed"
    elif kind == "square":
        rows = value if isinstance(value, list) else [value]
        if not rows or any(not isinstance(row, list) or len(row) != len(rows) for row in rows):
            yield f"holds {_described(value)} where a square table, list by list, is needed"
        elif not all(_is_number(item) and 0 <= item <= 1 for row in rows for item in row):
            yield f"holds {_described(value)} where numbers in [0, 1] are needed"
    elif kind == "messages":
        yield f"holds {_described(value)} where a list of messages is needed"
    elif kind == "answer":
        if value is None or isinstance(value, (list, dict)) or (isinstance(value, str) and not value.strip()):
            yield f"holds {_described(value)} where text or a number is needed"
    elif not isinstance(value, str):
        wanted = "text" if kind == "text" else "text or a list of messages"
        yield f"holds {_described(value)} where {wanted} is needed"
    elif not value.strip():
        yield "is empty"


def _message_problems(messages: list[Any], needs_assistant: bool) -> Iterator[str]:
    if not messages:
        yield "is an empty list of messages"
    for number, message in enumerate(messages, start=1):
        keys = (
            [key for key, value in message.items() if value is not None] if isinstance(message, dict) else []
        )
        if not isinstance(message, dict):
            yield f"message {number} is {_described(message)}, an object with role and content is needed"
        elif not isinstance(message.get("role"), str) or not message["role"]:
            yield (
                f"message {number} has no role (found: {', '.join(keys) or 'nothing'}); role "
                f"and content are needed"
            )
        elif not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            yield f"message {number} has no content (found: {', '.join(keys)}); role and content are needed"
    if needs_assistant and not any(isinstance(m, dict) and m.get("role") == "assistant" for m in messages):
        yield "has no message of the assistant, so there is nothing to learn"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _described(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _missing(table: Table, task: str, contract: Contract) -> str:
    found = table.dataset.column_names
    wanted = " or ".join(" + ".join(map(repr, columns)) for columns in contract.alternatives)
    fixes = []
    for columns in contract.alternatives:
        absent = [name for name in columns if name not in found]
        taken = set(columns) & set(found)
        renaming = {}
        for name in absent:
            source = _likely(name, [column for column in found if column not in taken])
            if source is not None:
                renaming[name] = source
                taken.add(source)
        if len(renaming) == len(absent):
            fixes.append(
                "data.columns: {" + ", ".join(f"{new}: {old}" for new, old in renaming.items()) + "}"
            )
    fix = (
        f". Likely fix: {fixes[0]}" if fixes else ". Rename with data.columns: {new name: column of the file}"
    )
    return f"{table.place}: task {task!r} needs column {wanted}. Found: {', '.join(found)}{fix}"


def _likely(name: str, found: list[str]) -> str | None:
    lowered = {column.lower(): column for column in reversed(found)}
    for synonym in (name, *SYNONYMS.get(name, ())):
        if synonym in lowered:
            return lowered[synonym]
    near = difflib.get_close_matches(name, lowered, n=1)
    return lowered[near[0]] if near else None


def _nearest(name: str, found: list[str]) -> str:
    near = difflib.get_close_matches(name, found, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

"""From columns to prompts: the template of the configuration, and the chat template of the tokenizer."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from posttrain.config.schema import DataConfig
from posttrain.data.contracts import is_conversational
from posttrain.data.errors import DataError
from posttrain.data.files import Table
from posttrain.patterns import UNREADABLE, SlowPatternError, limited

Message = dict[str, Any]


def template_fields(template: str) -> list[tuple[str, str | None]]:
    """Split a prompt template into (text before, column) pairs; the column is None at the end.

    Only ``{column}`` is allowed, and ``{{`` for a brace: no attributes, indices, conversions or formats, so
    that nothing in the data can be read as an instruction.

    Raises:
        DataError: Anything else, or no column at all.
    """
    pieces: list[tuple[str, str | None]] = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"data.prompt_template: {error}; write {{{{ and }}}} for braces that are text"
        ) from None
    for text, name, specification, conversion in parsed:
        if name is not None and (not name.isidentifier() or specification or conversion):
            raise DataError(
                f"data.prompt_template: field {{{name}}} is not a plain column name; only "
                f"{{column}} is allowed, "
                "and {{ and }} for braces that are text"
            )
        pieces.append((text, name))
    if not any(name for _, name in pieces):
        raise DataError("data.prompt_template has no {column}: every prompt would be the same")
    return pieces


def apply_pattern(table: Table, pattern: str) -> Table:
    """Keep of every text prompt what the one group of ``pattern`` matches.

    Args:
        table: The data, after renaming.
        pattern: A regular expression, searched anywhere in the prompt; a dot matches line ends too.

    Raises:
        DataError: Not a regular expression with one group, no text prompts, or a row that does not match
            or on which the search has no end.
    """
    try:
        expression = re.compile(pattern, re.DOTALL)
    except UNREADABLE as error:
        raise DataError(f"data.prompt_pattern is not a regular expression: {error}") from None
    if expression.groups != 1:
        raise DataError(
            f"data.prompt_pattern needs one group (...), found {expression.groups} in {pattern!r}"
        )
    if "prompt" not in table.dataset.column_names:
        raise DataError(f"{table.place}: data.prompt_pattern needs a prompt column")
    prompts = []
    for index, prompt in enumerate(table.dataset["prompt"]):
        if not isinstance(prompt, str):
            raise DataError(f"{table.place}: data.prompt_pattern is for text prompts, found messages")
        try:
            match = limited(expression, "search", prompt)
        except SlowPatternError as error:
            raise DataError(f"{table.place}, {table.where(index)}: data.prompt_pattern: {error}") from None
        if match is None or match.group(1) is None:
            raise DataError(
                f"{table.place}, {table.where(index)}: data.prompt_pattern {pattern!r} does not "
                f"match {prompt[:80]!r}"
            )
        prompts.append(match.group(1))
    rest = table.dataset.remove_columns("prompt")
    dataset = rest.add_column("prompt", prompts).select_columns(table.dataset.column_names)
    return Table(dataset, table.place, table.lines, table.notes)


def apply_template(table: Table, template: str, aliases: Mapping[str, str]) -> Table:
    """Build the ``prompt`` column from a template.

    Args:
        table: The data, after renaming.
        template: See :func:`template_fields`. Numbers are written as Python writes them, lists as JSON.
        aliases: Names a column had before renaming; a template may use either.

    Raises:
        DataError: A column that does not exist, or a row that has nothing in it.
    """
    pieces = template_fields(template)
    found = table.dataset.column_names
    columns = {}
    for name in dict.fromkeys(name for _, name in pieces if name is not None):
        column = name if name in found else aliases.get(name, name)
        if column not in found:
            known = ", ".join([*found, *aliases])
            raise DataError(f"{table.place}: data.prompt_template needs column {name!r}. Found: {known}")
        columns[name] = table.dataset[column][:]
        for index, value in enumerate(columns[name]):
            if value is None:
                raise DataError(
                    f"{table.place}, {table.where(index)}: column {column!r} of the template holds nothing"
                )
    prompts = [
        "".join(text + (_written(columns[name][index]) if name else "") for text, name in pieces)
        for index in range(len(table.dataset))
    ]
    return Table(put_column(table.dataset, "prompt", prompts), table.place, table.lines, table.notes)


def render(dataset: Dataset, tokenizer: Any, config: DataConfig) -> Dataset:
    """Put prompts into the form the tokenizer is made for.

    With a chat template (and ``chat_template`` other than ``never``) text becomes messages: the prompt a user
    message after the system prompt, a completion an assistant message. Without one text stays as it is.
    Rows that hold messages already stay as they are, apart from the system prompt. A ``text`` column is
    never touched.

    Args:
        dataset: What :func:`posttrain.data.load.load_data` returned (the prompt template is applied there).
        tokenizer: Only its ``chat_template`` attribute is looked at.
        config: The ``data`` section.

    Raises:
        DataError: Messages without a chat template, ``always`` without one, or a system prompt that cannot be
            placed.
    """
    available = bool(getattr(tokenizer, "chat_template", None))
    if config.chat_template == "always" and not available:
        raise DataError(
            "data.chat_template is 'always', but the tokenizer has no chat template: set 'auto' or 'never'"
        )
    chat = available and config.chat_template != "never"
    answers = ("completion", "chosen", "rejected")
    columns = [name for name in ("prompt", *answers) if name in dataset.column_names]
    columns = columns if "prompt" in columns else ["messages"] if "messages" in dataset.column_names else []
    spoken = [name for name in columns if is_conversational(dataset, name)]
    if spoken and not chat:
        reason = "data.chat_template is 'never'" if available else "the tokenizer has no chat template"
        raise DataError(
            f"column {spoken[0]!r} holds messages, but {reason}. Use an instruction-tuned "
            "checkpoint, name one with "
            "model.tokenizer, or give the data as text"
        )
    if not chat or not columns:
        if config.system_prompt is not None:
            reason = "the rows are plain text" if not columns else "no chat template is used"
            raise DataError(
                f"data.system_prompt needs a chat template, but {reason}: put it in data.prompt_template"
            )
        return dataset
    for name in columns:
        opening = config.system_prompt if name in ("prompt", "messages") else None
        role = "assistant" if name in answers else "user"
        converted = [_messages(value, role, opening, index) for index, value in enumerate(dataset[name][:])]
        dataset = put_column(dataset, name, converted)
    if "completions" in dataset.column_names and "prompt" in columns:
        lists = [
            [_messages(reply, "assistant", None, index) for reply in replies]
            for index, replies in enumerate(dataset["completions"][:])
        ]
        dataset = put_column(dataset, "completions", lists)
    return dataset


def put_column(dataset: Dataset, name: str, values: list[Any]) -> Dataset:
    """Replace a column where it stands, or put a new one first."""
    order = dataset.column_names if name in dataset.column_names else [name, *dataset.column_names]
    # the old column goes last: a table that loses its only column forgets how many rows it has
    dataset = dataset.add_column("_new", values)
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    return dataset.rename_column("_new", name).select_columns(order)


def _messages(value: str | list[Message], role: str, system: str | None, index: int) -> list[Message]:
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(
            f"row {index + 1} has a system message of its own, and data.system_prompt is set: "
            "remove one of the two"
        )
    return [{"role": "system", "content": system}, *messages]


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)

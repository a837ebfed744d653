"""Fields of pydantic models in plain words: for error messages and for the table of ``posttrain methods``."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from posttrain.config.problems import show

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def field_needed(info: FieldInfo) -> str:
    """Return what a field takes: ``a number above 0 and at most 1, or null``, ``one of old, live``."""
    words = _words(info.annotation)
    null = "null" in words
    text = ", or ".join(word for word in words if word != "null")
    bounds = field_range(info)
    text = f"{text} {bounds}" if bounds else text
    return f"{text}, or null" if null else text


def field_type(info: FieldInfo) -> str:
    """Return the type of a field, short: ``number | null``, ``old | live``."""
    parts = []
    for word in _words(info.annotation):
        parts.append(
            word.removeprefix("one of ")
            .replace(", ", " | ")
            .removeprefix("a ")
            .replace("whole number", "integer")
        )
    return " | ".join(parts)


def field_range(info: FieldInfo) -> str:
    """Return the limits of a field in words, empty when it has none."""
    bounds: list[str] = []
    for item in info.metadata:
        if isinstance(item, annotated_types.Interval):
            bounds += _bounds(item.gt, item.ge, item.lt, item.le)
        elif isinstance(
            item, (annotated_types.Gt, annotated_types.Ge, annotated_types.Lt, annotated_types.Le)
        ):
            name = type(item).__name__.lower()
            value = getattr(item, name)
            bounds += _bounds(**{n: value if n == name else None for n in ("gt", "ge", "lt", "le")})
        elif isinstance(item, annotated_types.MinLen) and item.min_length:
            bounds.append(
                "that is not empty" if item.min_length == 1 else f"of length {item.min_length} or more"
            )
    return " and ".join(bounds)


def _bounds(gt: Any, ge: Any, lt: Any, le: Any) -> list[str]:
    limits = (("above", gt), ("at least", ge), ("below", lt), ("at most", le))
    return [f"{word} {show(limit)}" for word, limit in limits if limit is not None]


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation (``AdapterConfig | None``, ``list[RewardConfig]``), or None."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    for part in typing.get_args(annotation):
        found = section_class(part)
        if found is not None:
            return found
    return None


def _words(annotation: Any) -> list[str]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _words(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return list(dict.fromkeys(word for part in typing.get_args(annotation) for word in _words(part)))
    if origin is Literal:
        return [
            "one of " + ", ".join(v if isinstance(v, str) else show(v) for v in typing.get_args(annotation))
        ]
    if origin in (list, tuple):
        (item, *_) = typing.get_args(annotation) or (Any,)
        inner = (
            "mappings"
            if section_class(item)
            else {"a whole number": "whole numbers", "a number": "numbers"}.get(
                _words(item)[0], "text" if item is str else "values"
            )
        )
        return [f"a list of {inner}"]
    if origin is dict or annotation is dict or section_class(annotation):
        return ["a mapping"]
    return [_WORDS.get(annotation, "a value")]

"""pydantic's errors as sentences that say what was found, what is needed and the nearest valid name."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from posttrain.config.describe import field_needed, section_class
from posttrain.config.problems import KeyPath, Problem, nearest, show

RULE = "posttrain_rule"
"""Type of the errors that validators of the schema raise; ``ctx["field"]`` names the field to change."""

_WRONG_TYPE = ("_type", "_parsing", "_from_float", "int_parsing_size", "is_instance_of")


def problems_of(error: ValidationError, model: type[BaseModel], data: Any, at: KeyPath = ()) -> list[Problem]:
    """Translate the errors of one validation.

    Args:
        error: What pydantic raised.
        model: The class that was validated.
        data: The value that was validated.
        at: Where it sits in the configuration.

    Returns:
        One problem per place; several branches of a union count as one.
    """
    problems: dict[tuple[KeyPath, str], Problem] = {}
    for item in error.errors(include_url=False):
        loc = tuple(item["loc"])
        problem = _problem(dict(item), _written(loc, data, item["type"]), model, data)
        key = (problem.path, problem.message)
        if key not in problems:
            problems[key] = Problem(
                problem.message,
                (*at, *problem.path),
                found=problem.found,
                needed=problem.needed,
                suggestion=problem.suggestion,
            )
    return list(problems.values())


def _problem(item: dict[str, Any], path: KeyPath, model: type[BaseModel], data: Any) -> Problem:
    kind, context = item["type"], item.get("ctx", {})
    owner, info = _field(path, model)
    name = path[-1] if path else "the configuration"
    found = _value(path, data)
    if kind == "missing":
        return Problem(f"{name!r} is missing", path, needed=_with_help(info))
    if kind == "extra_forbidden":
        near = nearest(name, owner.model_fields)
        return Problem(
            f"unknown key {name!r}",
            path,
            found=found,
            needed=None
            if near
            else f"one of {', '.join(owner.model_fields)}"
            if owner.model_fields
            else "no keys",
            suggestion=f"did you mean {near!r}?" if near else None,
        )
    if kind == RULE:
        field = context["field"]
        return Problem(item["msg"], (*path, *field.split(".")) if field else path)
    if kind in {"value_error", "assertion_error"}:
        return Problem(item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "), path)
    needed = field_needed(info) if info is not None and not isinstance(name, int) else None
    if needed is not None and needed.startswith("a number") and _not_finite(found):
        numbers = needed.replace("a number", "a finite number", 1)
        return Problem(f"{name} has a value that is not finite", path, found=found, needed=numbers)
    if kind == "literal_error":
        expected = needed or f"one of {context['expected']}"
        near = (
            nearest(found, expected.removeprefix("one of ").split(", ")) if isinstance(found, str) else None
        )
        return Problem(
            f"{name} has a value that is not allowed",
            path,
            found=found,
            needed=expected,
            suggestion=f"did you mean {near!r}?" if near else None,
        )
    if any(kind.endswith(ending) for ending in _WRONG_TYPE):
        needed = needed or (
            "a mapping"
            if kind in {"model_type", "dict_type"}
            else item["msg"].removeprefix("Input should be ")
        )
        return Problem(
            f"{name} has a value of the wrong type",
            path,
            found=found,
            needed=needed,
            suggestion=_written_as(found, kind),
        )
    return Problem(
        f"{name} has a value that is not allowed",
        path,
        found=found,
        needed=needed or item["msg"].removeprefix("Input should be "),
    )


def _written(loc: KeyPath, data: Any, kind: str) -> KeyPath:
    """Cut off what pydantic adds to a place: the branch of a union, ``[key]`` of a mapping."""
    path: list[str | int] = []
    for step in loc:
        inside = isinstance(data, dict) and step in data
        inside = inside or (isinstance(data, list) and isinstance(step, int) and step < len(data))
        if not inside:
            return (*path, step) if kind == "missing" else tuple(path)
        path.append(step)
        data = data[step]
    return tuple(path)


def _field(path: KeyPath, model: type[BaseModel]) -> tuple[type[BaseModel], FieldInfo | None]:
    """Return the innermost model on the way to ``path``, and the field there."""
    owner, info = model, None
    for depth, step in enumerate(path):
        if isinstance(step, int):
            continue
        if info is not None:
            below = section_class(info.annotation)
            if below is None:
                return owner, info
            owner = below
        info = owner.model_fields.get(step)
        if info is None:
            return owner, None if depth == len(path) - 1 else info
    return owner, info


def _value(path: KeyPath, data: Any) -> Any:
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):  # the place does not exist: nothing was found there
            return None
    return data


def _with_help(info: FieldInfo | None) -> str | None:
    if info is None:
        return None
    return field_needed(info) + (f": {info.description}" if info.description else "")


def _not_finite(found: Any) -> bool:
    """Whether a number, or a text that is meant as one, is nan or infinite."""
    if isinstance(found, str):
        return found.lower().lstrip("+-.") in {"nan", "inf", "infinity"}
    return isinstance(found, float) and not math.isfinite(found)


def _written_as(found: Any, kind: str) -> str | None:
    """Return the fix for a value that only has the wrong type."""
    if kind.startswith("bool") and isinstance(found, str) and found.lower() in {"yes", "no", "on", "off"}:
        return f"write {'true' if found.lower() in {'yes', 'on'} else 'false'}"
    if kind.startswith("string") and isinstance(found, (bool, int, float)):
        return f"put it in quotes: '{show(found)}'"
    if kind.startswith(("list", "tuple")) and isinstance(found, (str, int, float)):
        return f"write a list: [{found}]"
    if kind.startswith(("int", "float")) and isinstance(found, (str, float)):
        try:
            number = float(found)
        except ValueError:
            return None
        if kind.startswith("int"):
            return f"write {int(number)}" if math.isfinite(number) and number.is_integer() else None
        return f"write {found} without quotes" if math.isfinite(number) else None
    return None

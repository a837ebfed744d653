"""The verifiers by name. Importing this module, or a verifier, loads no heavy library."""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from posttrain.rewards.verdict import Verdict

VERIFIERS = {
    "reasoning_gym": "posttrain.rewards.reasoning_gym",
    "math": "posttrain.rewards.math",
    "expression": "posttrain.rewards.expression",
    "format": "posttrain.rewards.format",
    "soft_overlong": "posttrain.rewards.soft_overlong",
    "word_list": "posttrain.rewards.word_list",
}
"""Name to module. A module has ``verify(completion, row, **params)``, ``columns(**params)`` and perhaps
``prepare(**params)`` (imports and checks, once per process) and ``optional_columns(**params)``."""

FUNCTION_PREFIX = "python:"


@dataclass(frozen=True)
class VerifierSpec:
    """A verifier and its parameters; all of it can be written as JSON.

    Attributes:
        name: A key of :data:`VERIFIERS`, or ``python:package.module.function``.
        params: Keyword arguments of its ``verify`` (or of the user function).
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        """Whether this is a function of the user."""
        return self.name.startswith(FUNCTION_PREFIX)

    def columns(self) -> tuple[str, ...] | None:
        """Return the data columns it cannot do without, or None for a user function: unknown."""
        return None if self.is_function else _module(self.name).columns(**self.params)

    def sent_columns(self) -> tuple[str, ...] | None:
        """Return the data columns it reads when they exist, or None for all of them."""
        if self.is_function:
            return None
        optional = getattr(_module(self.name), "optional_columns", None)
        return (*_module(self.name).columns(**self.params), *(optional(**self.params) if optional else ()))


def check(spec: VerifierSpec) -> None:
    """Check name and parameters without starting anything.

    Raises:
        ValueError: Unknown name or parameter, or a value of the wrong type; with the nearest valid one.
    """
    if spec.is_function:
        if "." not in spec.name.removeprefix(FUNCTION_PREFIX):
            raise ValueError(f"{spec.name!r} must name a function as python:package.module.function")
        return
    if spec.name not in VERIFIERS:
        known = ", ".join(VERIFIERS)
        raise ValueError(
            f"unknown verifier {spec.name!r}{_nearest(spec.name, VERIFIERS)}; known are {known} and "
            "python:package.module.function"
        )
    problems = _parameter_problems(spec)
    if problems:
        raise ParameterError(spec.name, problems)


class ParameterError(ValueError):
    """Parameters that a verifier does not take, all of them.

    Attributes:
        problems: (parameter, message) pairs.
    """

    def __init__(self, verifier: str, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__(f"verifier {verifier!r}: " + "; ".join(message for _, message in problems))


def _parameter_problems(spec: VerifierSpec) -> list[tuple[str, str]]:
    fields = _fields(_module(spec.name).verify)
    known = ", ".join(fields) or "none"
    problems = [
        (name, f"there is no parameter {name!r}{_nearest(name, fields)}; there are: {known}")
        for name in spec.params
        if name not in fields
    ]
    model: Any = create_model(
        "Params", __config__=ConfigDict(strict=True), **typing.cast(dict[str, Any], fields)
    )
    try:
        model(**{name: value for name, value in spec.params.items() if name in fields})
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0])
            if item["type"] == "missing":
                problems.append((name, f"parameter {name!r} is needed"))
            else:
                problems.append((name, f"{name}: {item['msg']}, found {item['input']!r}"))
    return problems


def resolve(spec: VerifierSpec) -> Callable[[Any, dict[str, Any]], Verdict]:
    """Load a verifier in this process: import what it needs and bind its parameters.

    Raises:
        ValueError: Wrong name or parameters, or a user function that cannot be loaded.
    """
    check(spec)
    if spec.is_function:
        from posttrain.rewards.function import load

        return load(spec.name.removeprefix(FUNCTION_PREFIX), spec.params)
    module = _module(spec.name)
    if hasattr(module, "prepare"):
        module.prepare(**spec.params)
    return partial(module.verify, **spec.params)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _module(name: str) -> Any:
    return importlib.import_module(VERIFIERS[name])


def _fields(verify: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(verify)
    return {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in inspect.signature(verify).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }

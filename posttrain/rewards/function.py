"""A reward function of the user, named by its dotted path, with TRL's signature."""

from __future__ import annotations

import difflib
import importlib
import inspect
import numbers
from collections.abc import Callable
from typing import Any

from posttrain.rewards.verdict import Verdict, graded

TRAINER_ARGUMENTS = ("completion_ids", "trainer_state", "log_metric", "log_extra", "environments")
"""What TRL also passes, and what does not exist in a verifier process."""


def load(path: str, params: dict[str, Any]) -> Callable[[Any, dict[str, Any]], Verdict]:
    """Import ``package.module.function`` and return it as a verifier of one row.

    The function is called as ``function(prompts=[...], completions=[...], **columns, **params)`` with lists
    of length one, so that the deadline holds per row; without ``**kwargs`` it gets the columns it names. It
    returns a list with one finite number, or None where it does not apply (``skipped``). A number of 1 or
    more counts as ``correct``, anything less as ``wrong``; the number itself is the reward.

    Raises:
        ValueError: No such module or function, or one that cannot be called this way.
    """
    function = _import(path)
    accepted, everything = _accepted(function, path)

    def verify(completion: Any, row: dict[str, Any]) -> Verdict:
        arguments = {name: [value] for name, value in row.items() if name != "prompt"}
        arguments |= {"prompts": [row.get("prompt")], "completions": [completion]} | params
        if not everything:
            arguments = {name: value for name, value in arguments.items() if name in accepted}
        return _verdict(function(**arguments), path)

    return verify


def _import(path: str) -> Callable[..., Any]:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"'python:{path}' must name a function as python:package.module.function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r} of 'python:{path}': {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"module {module_name!r} has no function {name!r}{hint}")
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ValueError(f"'python:{path}' must be a plain function, found {type(function).__name__}")
    result: Callable[..., Any] = function
    return result


def _accepted(function: Callable[..., Any], path: str) -> tuple[set[str], bool]:
    parameters = inspect.signature(function).parameters.values()
    impossible = [p.name for p in parameters if p.name in TRAINER_ARGUMENTS and p.default is p.empty]
    if impossible:
        raise ValueError(
            f"'python:{path}' asks for {impossible}, which a verifier process does not have: "
            "give them a default"
        )
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _verdict(result: Any, path: str) -> Verdict:
    if not isinstance(result, (list, tuple)) or len(result) != 1:
        size = (
            f"{type(result).__name__} of {len(result)}"
            if hasattr(result, "__len__")
            else type(result).__name__
        )
        raise TypeError(f"{path} must return a list with one number per completion (here 1), found {size}")
    (score,) = result
    if score is None:
        return Verdict("skipped", None, None, "the function returned None")
    if hasattr(score, "item"):
        score = score.item()
    if not isinstance(score, numbers.Real):
        raise TypeError(f"{path} must return numbers or None, found {type(score).__name__}")
    return graded(float(score), None)

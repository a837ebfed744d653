"""Finding methods by name: every module of this package that defines a :class:`Method` is one.

Methods outside the package are named ``package.module:ClassName``. Importing torch is left to the methods
that need it at import time (ours do not).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

import posttrain.rl
from posttrain.rl.method import Method

# Modules of the package that hold the machinery; importing the first three pulls in torch and TRL.
_MACHINERY = frozenset({"trainer", "seams", "formulas", "rollouts", "rows", "gauges", "method", "registry"})


@functools.cache
def available() -> dict[str, type[Method]]:
    """Return every built-in method, by name."""
    found: dict[str, type[Method]] = {}
    for module_info in pkgutil.iter_modules(posttrain.rl.__path__):
        if module_info.name in _MACHINERY:
            continue
        module = importlib.import_module(f"posttrain.rl.{module_info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Method) and cls is not Method and cls.__module__ == module.__name__:
                if not hasattr(cls, "name"):
                    raise TypeError(f"{cls.__module__}.{cls.__name__} has no name: set name, title and paper")
                if cls.name in found:
                    raise ValueError(f"two methods are called {cls.name!r}: {found[cls.name]} and {cls}")
                found[cls.name] = cls
    return dict(sorted(found.items()))


def resolve(name: str) -> type[Method]:
    """Return the class of a method by its name or by ``package.module:ClassName``.

    Raises:
        KeyError: No such method; the message names the nearest ones.
        TypeError: The named object is not a :class:`Method`.
    """
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise KeyError(f"cannot load method {name!r}: {error}") from error
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise TypeError(f"{name!r} is not a subclass of posttrain.rl.method.Method")
        return cls
    methods = available()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"unknown method {name!r}{hint} Known methods: {', '.join(methods)}")
    return methods[name]


def build(methods: Mapping[str, Mapping[str, Any]]) -> list[Method]:
    """Build the methods of a configuration, in the order they are written."""
    return [resolve(name)(**params) for name, params in methods.items()]

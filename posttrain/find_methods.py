"""Finding methods by name: every module of a package that defines a subclass of its ``Method`` is one.

Methods outside the package are named ``package.module:ClassName``. Importing torch is left to the methods
that need it at import time (ours do not).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

M = TypeVar("M")


def find(package: ModuleType, base: type[M], machinery: frozenset[str]) -> dict[str, type[M]]:
    """Return the methods of a package, by name.

    Args:
        package: Where to look.
        base: Its ``Method``.
        machinery: Modules of the package that hold no methods, and may pull in torch and TRL.
    """
    found: dict[str, type[M]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        if module_info.name in machinery:
            continue
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, base) and cls is not base and cls.__module__ == module.__name__:
                name: Any = getattr(cls, "name", None)
                if name is None:
                    raise TypeError(f"{cls.__module__}.{cls.__name__} has no name: set name, title and paper")
                if name in found:
                    raise ValueError(f"two methods are called {name!r}: {found[name]} and {cls}")
                found[name] = cls
    return dict(sorted(found.items()))


def resolve(
    name: str,
    methods: Mapping[str, type[M]],
    base: type[M] | tuple[type[M], ...],
    noun: str = "method",
) -> type[M]:
    """Return the class of a method by its name or by ``package.module:ClassName``.

    Raises:
        KeyError: No such method; the message names the nearest ones.
        TypeError: The named object is not a subclass of ``base``.
    """
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise KeyError(f"cannot load {noun} {name!r}: {error}") from error
        if not (inspect.isclass(cls) and issubclass(cls, base)):
            needed = " or ".join(
                f"{b.__module__}.{b.__name__}" for b in (base if isinstance(base, tuple) else (base,))
            )
            raise TypeError(f"{name!r} is not a subclass of {needed}")
        return cls
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"unknown {noun} {name!r}{hint} Known {noun}s: {', '.join(methods)}")
    return methods[name]

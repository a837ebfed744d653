"""The methods of preference optimisation, by name; see :mod:`posttrain.find_methods`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import posttrain.preference
from posttrain import find_methods
from posttrain.preference.method import Method

_MACHINERY = frozenset(
    {
        "cofs",
        "diagnostics",
        "kl",
        "lists",
        "passes",
        "probe",
        "trainer",
        "trainers",
        "reward_trainer",
        "method",
        "registry",
        "seams",
        "token_masks",
    }
)


@functools.cache
def available() -> dict[str, type[Method]]:
    """Return every built-in method, by name."""
    return find_methods.find(posttrain.preference, Method, _MACHINERY)


def resolve(name: str) -> type[Method]:
    """Return a method's class, see :func:`posttrain.find_methods.resolve`."""
    return find_methods.resolve(name, available(), Method)


def build(methods: Mapping[str, Mapping[str, Any]]) -> list[Method]:
    """Build the methods of a configuration, in the order they are written."""
    return [resolve(name)(**params) for name, params in methods.items()]

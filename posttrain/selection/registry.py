"""Finding selectors by name: every module of this package that defines a :class:`Selector` is one.

Selectors outside the package are named ``package.module:ClassName``. No module that is looked at imports
torch.
"""

from __future__ import annotations

import functools

import posttrain.selection
from posttrain import find_methods
from posttrain.selection.selector import Selector

# Modules of the package that hold the machinery; some of them import torch.
_MACHINERY = frozenset(
    {
        "adamw",
        "apply",
        "delta",
        "delta_apply",
        "delta_base",
        "delta_file",
        "grow",
        "packed",
        "plan",
        "registry",
        "selector",
        "settings",
        "strict",
        "top_b",
        "trainer",
    }
)


@functools.cache
def available() -> dict[str, type[Selector]]:
    """Return every built-in selector, by name."""
    return find_methods.find(posttrain.selection, Selector, _MACHINERY)


def resolve(name: str) -> type[Selector]:
    """Return the class of a selector by its name or by ``package.module:ClassName``.

    Raises:
        KeyError: No such selector; the message names the nearest ones.
        TypeError: The named object is not a :class:`Selector`.
    """
    return find_methods.resolve(name, available(), Selector, noun="selector")

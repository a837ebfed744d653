"""Putting one configuration on top of another: mappings merge, but one selector takes another's place."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.config.plain_yaml import Node, merge

_SOURCES = ("method", "params", "plan")


def put_on_top(below: Node, above: Node) -> Node:
    """Put the mapping ``above`` on top of the mapping ``below``; neither is changed.

    Mappings are merged key by key, everything else is replaced. A selection has one selector, so that one of
    ``above`` takes the place of one of another name, parameters included; ``round``, ``backend`` and the
    other settings stay.
    """
    if isinstance(below.value, dict) and isinstance(above.value, dict):
        old, new = below.value.get("selection"), above.value.get("selection")
        if old is not None and new is not None:
            below = Node({**below.value, "selection": _without_other_selector(old, new)}, below.where)
    return merge(below, above)


def make_room(root: Node, steps: list[str], value: Node) -> None:
    """Take the selector out of the document, in place, if an override names another one.

    Args:
        root: The document.
        steps: Keys of the override.
        value: Its value.
    """
    if steps[0] != "selection" or "selection" not in root.value:
        return
    for step in reversed(steps[1:]):
        value = Node({step: value}, value.where)
    root.value["selection"] = _without_other_selector(root.value["selection"], value)


def _without_other_selector(below: Node, above: Node) -> Node:
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return below
    old, new = _source(below.value), _source(above.value)
    if old is None or new is None or old == new:
        return below
    kept = {key: node for key, node in below.value.items() if key not in _SOURCES and not _is_selector(key)}
    return Node(kept, below.where)


def _source(selection: Mapping[str, Node]) -> str | None:
    """Return the selector, ``plan`` for a plan file, None where the mapping has settings only."""
    if "method" in selection:
        return str(selection["method"].value)
    if "plan" in selection and selection["plan"].value is not None:
        return "plan"
    return next((key for key in selection if _is_selector(key)), None)


def _is_selector(key: object) -> bool:
    from posttrain.selection.registry import available

    # a misspelt key is none: it is reported as it is written
    return isinstance(key, str) and (":" in key or key in available())

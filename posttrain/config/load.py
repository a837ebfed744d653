"""Reading a configuration: the file, what it extends, and overrides on top.

``extends: base.yaml`` (a path relative to the file that says it, or a list of paths) puts the file on top
of others. ``key.sub=value`` overrides are put on top of all. Putting on top means: mappings are merged
key by key; everything else, lists and ``null`` included, replaces what was there. So ``evaluate: null``
drops that section, ``methods: []`` drops all methods, and ``methods: {ace: null}`` is ACE with its defaults.
A selection has one selector: another one takes its place (:mod:`posttrain.config.layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from posttrain.config.layers import put_on_top
from posttrain.config.overrides import apply_override
from posttrain.config.plain_yaml import Node, dump_yaml, read_yaml
from posttrain.config.problems import KeyPath, Problem, near_file


@dataclass
class Document:
    """A configuration after ``extends`` and overrides.

    Attributes:
        source: The file as it was named.
        root: Its mapping; empty when the file could not be read.
        problems: What was wrong with the text itself.
    """

    source: str
    root: Node
    problems: list[Problem] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        """The plain mapping."""
        plain: dict[str, Any] = self.root.plain()
        return plain

    def find(self, path: KeyPath) -> tuple[Node, int]:
        """Return the deepest node on the way to ``path``, and how many steps of the path it covers.

        The shorthands of the schema are understood: ``rewards: [{math: {weight: 2}}]`` for a named reward,
        ``methods: [ace]`` for methods without parameters.
        """
        node = self.root
        for depth, step in enumerate(path):
            value = node.value
            if isinstance(value, dict) and len(value) == 1 and depth and isinstance(path[depth - 1], int):
                (only,) = value.values()
                value = only.value if isinstance(only.value, dict) and step not in value else value
            if holds(value, step):
                node = value[step]
            elif isinstance(value, list) and any(item.value == step for item in value):
                node = next(item for item in value if item.value == step)
            elif isinstance(value, list) and any(_names(item) == step for item in value):
                node = next(item for item in value if _names(item) == step).value[step]
            else:
                return node, depth
        return node, len(path)


def holds(value: Any, step: str | int) -> bool:
    """Return whether ``value[step]`` exists."""
    inside_list = isinstance(value, list) and isinstance(step, int) and step < len(value)
    return inside_list or (isinstance(value, dict) and step in value)


def _names(item: Node) -> str | None:
    """Return the key of a mapping with one key, the long form of a list entry."""
    return next(iter(item.value)) if isinstance(item.value, dict) and len(item.value) == 1 else None


def resolved_yaml(config: BaseModel) -> str:
    """Return a checked configuration as YAML, every field written out.

    Loading the text gives a configuration equal to ``config``.
    """
    return dump_yaml(config.model_dump(mode="json"))


def load_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a configuration file, what it extends, and put the overrides on top.

    Args:
        path: The YAML file.
        overrides: ``key.sub=value`` texts, applied in order; the value is YAML.

    Returns:
        The document. Nothing is raised for bad input: see :attr:`Document.problems`.
    """
    problems: list[Problem] = []
    root = _read_file(Path(path), problems, ())
    root = root if root is not None else Node({}, str(path))
    for override in overrides:
        apply_override(override, root, problems)
    return Document(str(path), root, problems)


def _read_file(
    path: Path, problems: list[Problem], parents: tuple[Path, ...], said: str | None = None
) -> Node | None:
    """Return the merged mapping of a file, or None; ``said`` is where ``extends`` named it."""
    key: KeyPath = ("extends",) if said else ()
    where = said or str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(
            Problem(
                f"{path} is not UTF-8 text: byte {error.start} cannot be read",
                key,
                needed="a YAML file in UTF-8",
                where=where,
            )
        )
        return None
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        near = near_file(path)
        fix = f"did you mean {near}?" if near else None
        problems.append(Problem(f"cannot read {path}: {reason}", key, suggestion=fix, where=where))
        return None
    node = read_yaml(text, str(path), problems)
    if node is None:
        return None
    if node.value is None:
        problems.append(Problem(f"{path} is empty", needed="at least 'task:' and 'data:'", where=node.where))
        return None
    if not isinstance(node.value, dict):
        kind = "a list" if isinstance(node.value, list) else "a single value"
        problems.append(
            Problem(
                f"{path} holds {kind}", needed="a mapping of sections, such as 'task: rlvr'", where=node.where
            )
        )
        return None
    bases = node.value.pop("extends", None)
    return node if bases is None else _extend(node, bases, path, problems, parents)


def _extend(node: Node, bases: Node, path: Path, problems: list[Problem], parents: tuple[Path, ...]) -> Node:
    named = bases.value if isinstance(bases.value, list) else [bases]
    merged: Node | None = None
    chain = (*parents, path.resolve())
    for base in named:
        if not isinstance(base.value, str) or not base.value:
            problems.append(
                Problem(
                    "'extends' takes a path or a list of paths",
                    ("extends",),
                    found=base.plain(),
                    where=base.where,
                )
            )
            continue
        target = path.parent / base.value
        if target.resolve() in chain:
            loop = " -> ".join(file.name for file in (*chain, target))
            problems.append(
                Problem(f"files extend each other in a circle: {loop}", ("extends",), where=base.where)
            )
            continue
        below = _read_file(target, problems, chain, base.where)
        if below is not None:
            merged = below if merged is None else put_on_top(merged, below)
    return node if merged is None else put_on_top(merged, node)

"""Reading a configuration: YAML, ``extends`` and overrides, with the origin of every value.

The YAML read here is plain: text, numbers, ``true``/``false``, ``null``, lists and mappings. It differs
from PyYAML's defaults where those surprise: ``1e-6`` is a number, ``no``, ``off`` and ``2024-01-01`` are
text, a key given twice is a mistake, and a tag such as ``!!python/object`` is refused.

``extends: base.yaml`` (a path relative to the file that says it, or a list of paths) puts the file on top
of others. ``key.sub=value`` overrides are put on top of all. Putting on top means: mappings are merged
key by key; everything else, lists and ``null`` included, replaces what was there. So ``evaluate: null``
drops that section, ``methods: []`` drops all methods, and ``methods: {ace: null}`` is ACE with its defaults.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from posttrain.config.problems import KeyPath, Problem, dotted, near_file

_MOST_NODES = 100_000  # anchors can make a short file unfold without end
_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


@dataclass
class Node:
    """A value and where it was written.

    Attributes:
        value: A plain value, a dict of nodes or a list of nodes.
        where: ``file.yaml:12`` or ``override 'x=y'``.
    """

    value: Any
    where: str

    def plain(self) -> Any:
        """Return the value without its origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


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


class _Resolver(yaml.resolver.BaseResolver):
    """Which unquoted text is a number, a truth value or null (YAML 1.2, plus 1_000)."""


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Resolver.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), list(_first))


class _Loader(
    yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer, _Resolver
):
    def __init__(self, stream: str) -> None:
        yaml.reader.Reader.__init__(self, stream)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        _Resolver.__init__(self)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either this module or plain YAML 1.1 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


for _first, _rules in _Resolver.yaml_implicit_resolvers.items():
    for _tag, _regexp in _rules:
        _Dumper.add_implicit_resolver(_tag, _regexp, [_first])


def dump_yaml(data: Any) -> str:
    """Return ``data`` as YAML that :func:`load_document` reads back to an equal value."""
    text: str = yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=110)
    return text


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
        _apply(override, root, problems)
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
            merged = below if merged is None else _merge(merged, below)
    return node if merged is None else _merge(merged, node)


def _merge(below: Node, above: Node) -> Node:
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return Node(merged, above.where)


def read_yaml(text: str, name: str, problems: list[Problem], where: str | None = None) -> Node | None:
    """Read one YAML document, adding what is wrong with it to ``problems``.

    Args:
        text: The YAML text.
        name: The file, for ``name:line`` origins.
        problems: Mistakes are appended here.
        where: One origin for everything instead, for an override.

    Returns:
        The node, its value None when the text is empty; None when it is not YAML.
    """
    try:
        root = _Loader(text).get_single_node()
        return (
            Node(None, where or f"{name}:1")
            if root is None
            else _Builder(name, problems, where).build(root, (), ())
        )
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"the character {chr(error.character)!r} is not allowed in YAML"
        problems.append(Problem(message, where=where or f"{name}:{line}"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = error.problem or error.context or "it cannot be parsed"
        if error.context and error.context_mark and error.context_mark.line + 1 != line:
            reason += f" ({error.context} that starts at line {error.context_mark.line + 1})"
        problems.append(
            Problem(
                f"this is not valid YAML: {reason}",
                suggestion=_syntax_fix(reason),
                where=where or f"{name}:{line}",
            )
        )
    except (RecursionError, _TooLargeError):
        problems.append(
            Problem(
                f"the YAML is nested too deeply or unfolds to more than {_MOST_NODES} values",
                where=where or name,
            )
        )
    return None


def _syntax_fix(reason: str) -> str | None:
    if "\\t" in reason:
        return "indent with spaces, not with tabs"
    if "mapping values are not allowed" in reason:
        return "check the indentation, and put text that holds ': ' in quotes"
    return None


class _TooLargeError(Exception):
    pass


class _Builder:
    """Turns the nodes of PyYAML into plain values with origins."""

    def __init__(self, name: str, problems: list[Problem], where: str | None) -> None:
        self.name, self.problems, self.where = name, problems, where
        self.count = 0

    def origin(self, node: yaml.Node) -> str:
        return self.where or f"{self.name}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: KeyPath, parents: tuple[int, ...]) -> Node:
        self.count += 1
        if self.count > _MOST_NODES:
            raise _TooLargeError
        where = self.origin(node)
        if id(node) in parents:
            self.problems.append(
                Problem("an alias (*name) stands inside the value it names", path, where=where)
            )
            return Node(None, where)
        parents = (*parents, id(node))
        if node.tag not in _PLAIN_TAGS and node.tag != _TAG + "merge":
            tag = node.tag.replace(_TAG, "!!")
            self.problems.append(
                Problem(
                    f"the tag {tag} is not allowed",
                    path,
                    needed="plain text, numbers, lists and mappings",
                    where=where,
                )
            )
            return Node(None, where)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.build(item, (*path, i), parents) for i, item in enumerate(node.value)], where)
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, path, parents), where)
        assert isinstance(node, yaml.ScalarNode)
        return Node(self.scalar(node, path), where)

    def mapping(self, node: yaml.MappingNode, path: KeyPath, parents: tuple[int, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                self.inherit(value_node, inherited, path, parents)
                continue
            if key_node.tag != _TAG + "str":
                found = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.problems.append(
                    Problem(
                        "a key must be text; put it in quotes", path, found=found, where=self.origin(key_node)
                    )
                )
                continue
            key = self.scalar(key_node, path)
            value = self.build(value_node, (*path, key), parents)
            value.where = self.origin(key_node)
            if key in entries:
                self.problems.append(
                    Problem(
                        f"the key {key!r} is given twice",
                        (*path, key),
                        suggestion=f"keep one; the other is at {entries[key].where}",
                        where=value.where,
                    )
                )
                continue
            entries[key] = value
        return inherited | entries

    def inherit(
        self, node: yaml.Node, into: dict[str, Node], path: KeyPath, parents: tuple[int, ...]
    ) -> None:
        """Add the entries of ``<<: *name`` or ``<<: [*a, *b]``; the first that names a key wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            built = self.build(source, path, parents)
            if isinstance(built.value, dict):
                for key, value in built.value.items():
                    into.setdefault(key, value)
            else:
                self.problems.append(
                    Problem("'<<' takes a mapping or a list of mappings", path, where=built.where)
                )

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        digits = text.replace("_", "").lower()
        try:
            if kind == "int":
                return int(digits)
            if kind == "float":
                return float(digits.replace(".", "", 1) if digits.endswith(("inf", "nan")) else digits)
            if kind == "bool":
                return {"true": True, "false": False}[digits]
        except (ValueError, KeyError):
            self.problems.append(
                Problem(f"this cannot be read as {kind}", path, found=text, where=self.origin(node))
            )
            return None
        if kind == "null":
            return None
        if _SURROGATE.search(text):
            self.problems.append(
                Problem(
                    "the text holds half of a character (a lone surrogate)",
                    path,
                    found=ascii(text),
                    where=self.origin(node),
                )
            )
            return ""
        return text


def _apply(override: str, root: Node, problems: list[Problem]) -> None:
    """Put one ``key.sub=value`` on top of the document, in place."""
    where = f"override {override!r}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        problems.append(
            Problem(
                "this is not an override",
                needed="key.sub=value, for example trainer.learning_rate=1e-5",
                where=where,
            )
        )
        return
    if key.split(".")[0] == "extends":
        problems.append(Problem("'extends' works in a file, not as an override", ("extends",), where=where))
        return
    before = len(problems)
    value = read_yaml(text, "", problems, where)
    if value is None:
        for index in range(before, len(problems)):
            fix = f"put the value in quotes: {key}='\"...\"'"
            problems[index] = Problem(
                problems[index].message, (key,), found=text, suggestion=fix, where=where
            )
        return
    steps = key.split(".")
    node = root
    done: list[str] = []
    while True:
        step, rest = _next_step(node, steps)
        if (
            isinstance(node.value, list)
            and done == ["methods"]
            and all(isinstance(n.value, str) for n in node.value)
        ):
            node.value = {item.value: Node({}, item.where) for item in node.value}
        if isinstance(node.value, list):
            if not step.isdecimal() or int(step) >= len(node.value):
                needed = (
                    f"a position from 0 to {len(node.value) - 1}"
                    if node.value
                    else "an empty list cannot be indexed"
                )
                problems.append(
                    Problem(
                        f"{dotted(tuple(done))} is a list without an entry {step!r}",
                        (*done, step),
                        needed=needed,
                        suggestion=f"or replace the list: {'.'.join(done)}='[...]'",
                        where=where,
                    )
                )
                return
            if not rest:
                node.value[int(step)] = value
                return
            child = node.value[int(step)]
        else:
            if node.value is None:
                node.value = {}
            if not isinstance(node.value, dict):
                problems.append(
                    Problem(
                        f"{dotted(tuple(done))} is a single value, so it has no {step!r}",
                        (*done, step),
                        found=node.value,
                        where=where,
                    )
                )
                return
            if not rest:
                node.value[step] = _merge(node.value[step], value) if step in node.value else value
                return
            child = node.value.setdefault(step, Node({}, where))
        node, steps, done = child, rest, [*done, step]


def _next_step(node: Node, steps: list[str]) -> tuple[str, list[str]]:
    """Split the next key off; a written key that holds dots (``pkg.module:Class``) is taken whole."""
    if isinstance(node.value, dict):
        for count in range(len(steps), 1, -1):
            joined = ".".join(steps[:count])
            if joined in node.value:
                return joined, steps[count:]
    return steps[0], steps[1:]

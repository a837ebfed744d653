"""YAML without surprises, and with the origin of every value.

The YAML read here is plain: text, numbers, ``true``/``false``, ``null``, lists and mappings. It differs
from PyYAML's defaults where those surprise: ``1e-6`` is a number, ``no``, ``off`` and ``2024-01-01`` are
text, a key given twice is a mistake, and a tag such as ``!!python/object`` is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from posttrain.config.problems import KeyPath, Problem

_MOST_NODES = 100_000  # anchors can make a short file unfold without end
DEEPEST = 100  # what a configuration needs is below 10; code that walks it may recurse
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")
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


def merge(below: Node, above: Node) -> Node:
    """Put ``above`` on top: mappings are merged key by key, everything else is replaced."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, above.where)


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

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds these line breaks away unless they are escaped
        style = '"' if _LINE_BREAKS.search(data) else None
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _first, _rules in _Resolver.yaml_implicit_resolvers.items():
    for _tag, _regexp in _rules:
        _Dumper.add_implicit_resolver(_tag, _regexp, [_first])


def dump_yaml(data: Any) -> str:
    """Return ``data`` as YAML that :func:`load_document` reads back to an equal value."""
    text: str = yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=110)
    return text


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
        if error.context_mark and "<stream end>" in (error.problem or ""):
            mark = error.context_mark  # what was never closed, not the end of the file
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
                f"the YAML is nested more than {DEEPEST} deep or unfolds to more than {_MOST_NODES} values",
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
        if self.count > _MOST_NODES or len(parents) > DEEPEST:
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

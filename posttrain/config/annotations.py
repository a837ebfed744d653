"""Type annotations as text: whether a YAML value fits one, and what one means in plain words."""

from __future__ import annotations

import ast
import functools
import math


def accepts(annotation: str, value: object) -> bool:
    """Return whether a YAML value fits a type annotation, as text.

    Enumerations and other classes take text. A whole number fits ``float``; ``true`` fits no number.
    """
    return _fits(_parse(annotation), value)


@functools.cache
def _parse(annotation: str) -> ast.expr:
    return ast.parse(annotation, mode="eval").body


def _fits(node: ast.expr, value: object) -> bool:
    if isinstance(node, ast.BinOp):
        return _fits(node.left, value) or _fits(node.right, value)
    if isinstance(node, ast.Constant):
        return value is None if node.value is None else isinstance(value, str)
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).rsplit(".", 1)[-1]
        parts = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Optional":
            return value is None or _fits(parts[0], value)
        if name == "Union":
            return any(_fits(part, value) for part in parts)
        if name == "Literal":
            return any(
                isinstance(p, ast.Constant) and type(p.value) is type(value) and p.value == value
                for p in parts
            )
        if name == "Sequence" and isinstance(value, str):
            return True
        if name in {"list", "List", "Sequence"}:
            return isinstance(value, list) and all(_fits(parts[0], item) for item in value)
        if name in {"dict", "Dict", "Mapping"}:
            return isinstance(value, dict) and all(_fits(parts[-1], item) for item in value.values())
        if name in {"tuple", "Tuple"}:
            return isinstance(value, list)
    name = ast.unparse(node).rsplit(".", 1)[-1]
    if name in {"Any", "object"}:
        return True
    if name in {"int", "float"}:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (name == "float" and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, {"bool": bool, "dict": dict, "list": list, "tuple": list}.get(name, str))


def describe_type(annotation: str) -> str:
    """Return a type annotation in plain words: ``float | None`` is 'a number, or null'."""
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
        "list": "a list",
        "tuple": "a list",
        "dict": "a mapping",
        "list[str]": "a list of text",
        "list[int]": "a list of whole numbers",
        "list[float]": "a list of numbers",
        "tuple[str, ...]": "a list of text",
    }
    parts: list[str] = []
    text = annotation.replace("typing.", "")
    if text.startswith("Optional[") and text.endswith("]"):
        text = text.removeprefix("Optional[")[:-1] + " | None"
    for name in text.split(" | "):
        word = words.get(name) or ("a mapping" if name.startswith("dict[") else None)
        word = word or (
            "false"
            if name == "Literal[False]"
            else "a list"
            if name.startswith(("list[", "tuple["))
            else "text"
        )
        if word not in parts:
            parts.append(word)
    if "null" in parts:
        parts.remove("null")
        parts.append("null")
    return ", or ".join(parts)

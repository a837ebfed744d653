"""Reading installed packages without importing them.

TRL and transformers take seconds to import; a configuration check has a fraction of one. What it needs
to know of them (field names, types, defaults, enumerations) stands in their source as plain literals.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NOT_LITERAL = object()


@functools.cache
def package_folder(package: str) -> Path | None:
    """Return the folder of an installed top-level package, or None; nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def installed(package: str) -> bool:
    """Return whether a top-level package or module can be imported; nothing is imported."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def source_tree(package: str, module: str) -> ast.Module:
    """Parse ``module`` (``trainer.grpo_config``) of an installed package.

    Raises:
        ModuleNotFoundError: The package is not installed, or holds no such file.
    """
    folder = package_folder(package)
    if folder is None:
        raise ModuleNotFoundError(
            f"{package} is not installed in this environment: install posttrain with its dependencies"
        )
    file = folder.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ModuleNotFoundError(
            f"{package} has no module {module}: its version is outside the range posttrain supports"
        )
    return ast.parse(file.read_text(encoding="utf-8"))


def class_body(package: str, module: str, name: str) -> list[ast.stmt]:
    """Return the statements of a top-level class.

    Raises:
        ModuleNotFoundError: As :func:`source_tree`.
        LookupError: The module defines no such class.
    """
    for statement in source_tree(package, module).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement.body
    raise LookupError(
        f"{package}.{module} defines no {name}: its version is outside the range posttrain supports"
    )


@functools.cache
def enum_values(package: str, module: str, name: str) -> tuple[str, ...]:
    """Return the values of an enumeration of strings, in order. Raises as :func:`class_body`."""
    return tuple(
        statement.value.value
        for statement in class_body(package, module, name)
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@functools.cache
def dict_keys(package: str, module: str, name: str) -> tuple[str, ...]:
    """Return the literal keys of a module-level dict.

    Raises:
        ModuleNotFoundError: As :func:`source_tree`.
        LookupError: The module assigns no such dict.
    """
    for statement in source_tree(package, module).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if name in names:
                return tuple(str(key.value) for key in statement.value.keys if isinstance(key, ast.Constant))
    raise LookupError(
        f"{package}.{module} assigns no dict {name}: its version is outside the range posttrain supports"
    )


@dataclass(frozen=True)
class SourceField:
    """A field of a dataclass, as it stands in its source.

    Attributes:
        name: Its name.
        annotation: Its type as written in the source, ``"float | None"``.
        choices: Allowed values where the source lists them.
    """

    name: str
    annotation: str
    choices: tuple[Any, ...] | None
    _default: Any

    @property
    def literal(self) -> bool:
        """Whether the default stands in the source as a literal."""
        return self._default is not _NOT_LITERAL

    @property
    def default(self) -> Any:
        """The default; None when it is computed (then :attr:`literal` is False)."""
        return self._default if self.literal else None


def dataclass_fields(body: Iterable[ast.stmt]) -> dict[str, SourceField]:
    """Return the fields that the body of a dataclass declares, by name, in order."""
    found = (_field(statement) for statement in body)
    return {field.name: field for field in found if field is not None}


def _field(statement: ast.stmt) -> SourceField | None:
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return None
    annotation = ast.unparse(statement.annotation)
    if annotation.startswith(("ClassVar", "typing.ClassVar")):
        return None
    default: ast.expr | None = statement.value
    choices = None
    if isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "field":
        options = {keyword.arg: keyword.value for keyword in default.keywords}
        init = options.get("init")
        if isinstance(init, ast.Constant) and init.value is False:
            return None
        factory = options.get("default_factory")
        empty = {"list": "[]", "dict": "{}"}.get(ast.unparse(factory)) if factory else None
        default = ast.parse(empty, mode="eval").body if empty else options.get("default")
        if isinstance(factory, ast.Lambda):
            default = factory.body
        choices = _choices(options.get("metadata"))
    return SourceField(statement.target.id, annotation, choices, _literal(default))


def _choices(metadata: ast.expr | None) -> tuple[Any, ...] | None:
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices":
                listed = _literal(value)
                return tuple(listed) if isinstance(listed, list) else None
    return None


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return _NOT_LITERAL
    try:
        return ast.literal_eval(node)
    except ValueError:  # a computed default, such as the optimiser that fits the installed torch
        return _NOT_LITERAL

"""The tasks of reasoning-gym and their parameters, read from the installed source.

Importing reasoning-gym takes most of a second; a check only needs names, types and the conditions that the
tasks' own ``validate`` methods assert.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from posttrain.config.annotations import accepts, describe_type
from posttrain.config.problems import KeyPath, Problem, nearest
from posttrain.config.upstream import SourceField, dataclass_fields, package_folder

_REGISTRATION = re.compile(r"^register_dataset\(\s*([^,\s]+),\s*\w+,\s*(\w+)", re.MULTILINE)
_PLAIN = {"int", "float", "bool", "str", "list", "tuple", "dict", "None", "Optional", "Sequence", "Literal"}
_FROM_SPLIT = {"seed": "data.train.seed and data.eval.seed", "size": "data.train.size and data.eval.size"}
_BUILTINS = {
    f.__name__: f for f in (all, any, abs, bool, float, int, isinstance, len, list, max, min, set, str, sum)
}


@dataclass(frozen=True)
class _Source:
    file: Path
    config_class: str


@functools.cache
def task_sources() -> dict[str, _Source]:
    """Return the file and configuration class of every task, by task name.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    folder = package_folder("reasoning_gym")
    if folder is None:
        raise ModuleNotFoundError("reasoning-gym is not installed: install posttrain with its dependencies")
    sources = {}
    for file in sorted(folder.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for name, config_class in _REGISTRATION.findall(text):
            literal = name if name[0] in "\"'" else _constant(text, name)
            if literal:
                sources[literal.strip("\"'")] = _Source(file, config_class)
    return sources


def _constant(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*=\s*([\"'][\w-]+[\"'])", text, re.MULTILINE)
    return found.group(1) if found else None


def task_fields(task: str) -> dict[str, SourceField]:
    """Return the parameters of a task by name. ``task`` must be one of :func:`task_sources`."""
    return dataclass_fields(_config_body(task))


@functools.cache
def _config_body(task: str) -> tuple[ast.stmt, ...]:
    source = task_sources()[task]
    tree = ast.parse(source.file.read_text(encoding="utf-8"))
    bodies = [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == source.config_class]
    if not bodies:
        raise LookupError(f"reasoning-gym defines no {source.config_class} in {source.file.name}")
    return tuple(bodies[0])


def check_task(task: str, params: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with ``data.source: reasoning_gym:TASK`` and ``data.params``."""
    if task not in task_sources():
        near = nearest(task, task_sources())
        yield Problem(
            f"reasoning-gym has no task {task!r}",
            ("data", "source"),
            found=f"reasoning_gym:{task}",
            needed=None if near else f"one of {', '.join(sorted(task_sources()))}",
            suggestion=f"did you mean 'reasoning_gym:{near}'?" if near else None,
        )
        return
    fields = task_fields(task)
    own = [name for name in fields if name not in _FROM_SPLIT]
    wrong = False
    for name, value in params.items():
        path: KeyPath = ("data", "params", name)
        problem = None
        if name in _FROM_SPLIT:
            problem = Problem(
                f"{name} of a generated task is set per split",
                path,
                found=value,
                suggestion=f"set {_FROM_SPLIT[name]}",
            )
        elif name not in fields:
            near = nearest(name, own)
            problem = Problem(
                f"the task {task} has no parameter {name!r}",
                path,
                found=value,
                needed=f"one of {', '.join(own)}" if own else "no parameters",
                suggestion=f"did you mean {near!r}?" if near else None,
            )
        elif not _fits(fields[name], value):
            problem = Problem(
                f"{name} has a value of the wrong type",
                path,
                found=value,
                needed=describe_type(fields[name].annotation),
            )
        if problem is not None:
            wrong = True
            yield problem
    if not wrong:
        yield from _broken_conditions(task, fields, params)


def _fits(field: SourceField, value: Any) -> bool:
    """Return whether a value has the type of a parameter, or its default; annotations can be wrong."""
    names = {node.id for node in ast.walk(ast.parse(field.annotation)) if isinstance(node, ast.Name)}
    same = field.literal and type(value) is type(field.default) and value is not None
    return same or not names <= _PLAIN or accepts(field.annotation, value)


def _broken_conditions(
    task: str, fields: Mapping[str, SourceField], params: Mapping[str, Any]
) -> Iterator[Problem]:
    """Evaluate the assertions of the task's own ``validate``.

    Those that need more than its parameters, such as a constant of the module, wait for the run.
    """
    values = {name: field.default for name, field in fields.items() if field.literal} | dict(params)
    values |= {"size": 1, "seed": 0}
    scope = {"__builtins__": _BUILTINS, "self": SimpleNamespace(**values)}
    validate = next(
        (n for n in _config_body(task) if isinstance(n, ast.FunctionDef) and n.name == "validate"), None
    )
    for statement in validate.body if validate else ():
        if not isinstance(statement, ast.Assert):
            continue
        try:
            # the installed package's own condition, on plain values: no text of the user is evaluated
            holds = eval(compile(ast.Expression(statement.test), f"<{task}.validate>", "eval"), scope)
        except (NameError, AttributeError, TypeError):  # needs a constant of its module or a computed default
            continue
        names = [
            n.attr for n in ast.walk(statement.test) if isinstance(n, ast.Attribute) and n.attr in fields
        ]
        names = list(dict.fromkeys(names))
        blamed = next((name for name in names if name in params), None)
        if not holds and blamed is not None:
            yield Problem(
                f"the task {task} refuses " + ", ".join(f"{name}={values[name]!r}" for name in names),
                ("data", "params", blamed),
                found=params[blamed],
                needed=ast.unparse(statement.test).replace("self.", ""),
            )

"""What ``posttrain methods`` shows: the list, and the page of one method with its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from pydantic.fields import FieldInfo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain import find_methods
from posttrain.config import launch_matrix
from posttrain.config.describe import field_range, field_type
from posttrain.config.launch import TITLES
from posttrain.config.problems import show
from posttrain.preference import method as preference
from posttrain.preference import registry as preference_registry
from posttrain.rl import method as rl
from posttrain.rl import registry as rl_registry
from posttrain.selection import registry as selectors
from posttrain.selection.selector import Selector
from posttrain.sft import method as sft
from posttrain.sft import registry as sft_registry

Method = rl.Method | preference.Method | sft.Method | Selector

_COFS = "cofs is a function, no method: posttrain.preference.cofs; see 'posttrain methods ofs_dpo'"
ELSEWHERE = {
    "warm": "warm is a verb, no method: 'posttrain warm --help'; its page is that of posttrain.run.warm",
    "s3ft": "s3ft is a verb and a section of the configuration, no method: 'posttrain s3ft --help'; its page "
    "is that of posttrain.sft.s3ft",
    "cofs": _COFS,
    "cofs_dpo": _COFS,
}
"""Papers that are here, but not as a method: where they are."""


def available() -> dict[str, type[Method]]:
    """Return the built-in methods of all tasks and the selectors, by name.

    A name that several tasks know is that of the first; the others' are ``TASK/NAME``.
    """
    found: dict[str, type[Method]] = {}
    for methods in (rl_registry, preference_registry, sft_registry, selectors):
        for name, cls in methods.available().items():
            found[f"{task_of(cls)}/{name}" if name in found else name] = cls
    return found


def resolve(name: str) -> type[Method]:
    """Return a method's class by ``NAME`` or ``TASK/NAME``, in any case.

    Raises:
        KeyError: No such method; the message says where it lives, or names the nearest one.
        TypeError: See :func:`posttrain.find_methods.resolve`.
    """
    if ":" not in name:
        name = name.lower().replace("-", "_")
    if name in ELSEWHERE:
        raise KeyError(ELSEWHERE[name])
    task, _, alone = name.rpartition("/")
    cls = available().get(alone)
    if cls is not None and task == task_of(cls):
        return cls
    return find_methods.resolve(name, available(), (rl.Method, preference.Method, sft.Method, Selector))


def task_of(cls: type[Method]) -> str:
    """Return the first task the method is for; ``selection`` is for all of them."""
    if issubclass(cls, Selector):
        return "selection"
    if issubclass(cls, preference.Method):
        return "preference"
    return "sft" if issubclass(cls, sft.Method) else "rlvr"


def use(cls: type[Method]) -> str:
    """Return how a configuration names it."""
    section = "selection" if issubclass(cls, Selector) else "methods"
    return f"{section}: {{{cls.name}: {{...}}}}"


def page(cls: type[Method]) -> str:
    """Return the documentation page of a method: the docstring of its module."""
    module = inspect.getmodule(cls)
    return inspect.cleandoc((module.__doc__ if module else None) or cls.__doc__ or "")


def parameters(cls: type[Method]) -> list[dict[str, Any]]:
    """Return name, type, default, range and description of every parameter; ``required`` has no default."""
    return [
        {
            "name": name,
            "type": field_type(info),
            "default": None if info.is_required() else info.get_default(call_default_factory=True),
            "required": info.is_required(),
            "range": field_range(info),
            "description": info.description or "",
        }
        for name, info in cls.model_fields.items()
    ]


def as_json(cls: type[Method]) -> dict[str, Any]:
    """Return a method for machines, with the JSON schema of its parameters."""
    return {
        "name": cls.name,
        "task": task_of(cls),
        "title": cls.title,
        "paper": cls.paper,
        "class": f"{cls.__module__}:{cls.__name__}",
        "page": page(cls),
        "parameters": parameters(cls),
        "schema": cls.model_json_schema(),
        "launches": launch_matrix.cells_of(task_of(cls), cls.name),
    }


def print_list(classes: Iterable[type[Method]], console: Console) -> None:
    """Print one row per method."""
    table = _table("name", "task", "title", "paper", "parameters")
    for cls in classes:
        shown = [_with_default(name, info) for name, info in cls.model_fields.items()]
        table.add_row(
            Text(cls.name),
            Text(task_of(cls)),
            Text(cls.title),
            Text(f"arXiv {cls.paper}" if cls.paper else ""),
            Text(", ".join(shown)),
        )
    console.print(table)
    console.print(
        "'posttrain methods NAME' explains one; 'methods: {NAME: {parameter: value}}' in a config uses it, "
        "'selection: {NAME: {parameter: value}}' where the task is selection. A name of two tasks: "
        "'posttrain methods TASK/NAME'."
    )


def print_page(cls: type[Method], console: Console) -> None:
    """Print the page of a method and the table of its parameters."""
    console.print(Text(page(cls)), soft_wrap=True)
    console.print()
    console.print(Text(f"Parameters ({use(cls)})"))
    table = _table("name", "type", "default", "range", "description")
    for row in parameters(cls):
        default = "required" if row["required"] else show(row["default"]).strip("\"'")
        table.add_row(
            *(
                Text(str(text))
                for text in (row["name"], row["type"], default, row["range"], row["description"])
            )
        )
    console.print(table)
    print_launches(cls, console)


def print_launches(cls: type[Method], console: Console) -> None:
    """Print under which launches the method was measured to train as on one process, and what is refused."""
    uses = launch_matrix.cells_of(task_of(cls), cls.name)
    if not uses:
        return
    console.print(Text("Launches (two processes against one: largest difference of losses, of weights)"))
    table = _table("", *(TITLES[mode] for mode in launch_matrix.MODES))
    reasons: dict[str, None] = {}
    for use, cells in uses.items():
        row = [cells[mode] for mode in launch_matrix.MODES]
        reasons |= dict.fromkeys(cell["reason"] for cell in row if cell["verdict"] == "refused")
        told = (f"{c['losses']:g}, {c['weights']:g}" if c["verdict"] == "works" else "refused" for c in row)
        table.add_row(Text(use), *map(Text, told))
    console.print(table)
    for reason in reasons:
        console.print(Text(f"Refused: {reason}"), soft_wrap=True)


def _with_default(name: str, info: FieldInfo) -> str:
    if info.is_required():
        return name
    return f"{name}={show(info.get_default(call_default_factory=True))}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    return table

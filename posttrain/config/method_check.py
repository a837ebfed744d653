"""The ``methods:`` section: names, parameters, and what does not go with the rest of the run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from posttrain.config.launch import launch_mode, processes
from posttrain.config.problems import KeyPath, Problem, nearest
from posttrain.config.schema import RewardConfig
from posttrain.config.sentences import problems_of
from posttrain.config.tasks import TASKS, Task, TaskSpec
from posttrain.selection import registry as selectors

FSDP2 = "set fsdp_version: 2 in the launcher's fsdp_config"


def check_methods(
    methods: Mapping[str, Mapping[str, Any]],
    task: Task,
    spec: TaskSpec,
    trainer: Mapping[str, Any],
    written: Mapping[str, Any],
    *,
    adapter: bool,
    rewards: Sequence[RewardConfig],
) -> tuple[list[Problem], dict[str, dict[str, Any]]]:
    """Check every method with its parameters, then each against the whole setup.

    Args:
        methods: Parameters by method name, as written.
        task: The task of the run.
        spec: Its row in the task table.
        trainer: Every field of the TRL configuration with its value.
        written: The ``trainer:`` section as written, to point at the right line.
        adapter: Whether a PEFT adapter is trained.
        rewards: The entries under ``rewards:``.

    Returns:
        The problems, and the parameters of the valid methods with defaults filled in.
    """
    problems = [
        Problem(
            f"task {task!r} needs the method {name!r}", ("methods",), suggestion=f"add methods: {{{name}: }}"
        )
        for name in spec.requires
        if name not in methods
    ]
    if not methods:
        return problems, {}
    if spec.methods is None:
        names = ", ".join(methods)
        known = [
            other
            for other, row in TASKS.items()
            if row.methods and methods.keys() <= importlib.import_module(row.methods).available().keys()
        ]
        fix = f"drop the section, or set task: {known[0]}" if known else "drop the section"
        return [Problem(f"task {task!r} has no methods, found {names}", ("methods",), suggestion=fix)], {}
    registry = importlib.import_module(spec.methods)
    built: dict[str, Any] = {}
    for name, params in methods.items():
        path: KeyPath = ("methods", name)
        try:
            cls = registry.resolve(name)
        except Exception as error:  # the module of a user's own method may raise anything
            problems.append(_unknown(name, path, error, registry))
            continue
        try:
            # dumped and read as JSON by the strict rules: "0.5" is no number, a list may fill a tuple
            built[name] = cls.model_validate_json(json_text(params), strict=True)
        except ValidationError as error:
            problems += problems_of(error, cls, params, path)
    problems += _conflicts(built, task, trainer, written, adapter, rewards)
    return problems, {name: method.model_dump(mode="json") for name, method in built.items()}


def json_text(value: Any) -> str:
    """Return plain data as JSON for pydantic's strict reader, ``.nan`` and ``.inf`` included."""
    import json

    return json.dumps(value)


def _unknown(name: str, path: KeyPath, error: Exception, registry: Any) -> Problem:
    if ":" in name:
        reason = str(error.args[0]) if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        return Problem(
            f"the method {name!r} cannot be loaded: {reason}", path, needed="package.module:ClassName"
        )
    known = registry.available()
    if name in selectors.available():
        return Problem(
            f"{name!r} selects weights, it is no method of a loss",
            path,
            suggestion=f"write selection: {{{name}: {{...}}}}",
        )
    near = nearest(name, known)
    return Problem(
        f"unknown method {name!r}",
        path,
        needed=f"one of {', '.join(known)}, or package.module:ClassName",
        suggestion=f"did you mean {near!r}?" if near else "see 'posttrain methods'",
    )


def _conflicts(
    built: Mapping[str, BaseModel],
    task: Task,
    trainer: Mapping[str, Any],
    written: Mapping[str, Any],
    adapter: bool,
    rewards: Sequence[RewardConfig],
) -> Iterator[Problem]:
    from posttrain.preference import method as preference
    from posttrain.rewards.reward import reward_names
    from posttrain.rl import method as rl
    from posttrain.rl.method import Setup
    from posttrain.sft import method as sft

    setup = Setup(
        trainer=trainer,
        methods=tuple(built),
        adapter=adapter,
        task=task,
        rewards=len(rewards),
        reward_names=tuple(reward_names(rewards)) if rewards else None,
        reward_weights=tuple(reward.weight for reward in rewards) if rewards else None,
        ranks=processes(),
        launch=launch_mode(trainer),
        needs_all_rows=tuple(
            name
            for name, m in built.items()
            if isinstance(m, rl.Method) and m.needs_all_rows and not m.neutral
        ),
    )
    if setup.launch == "fsdp1" and built:
        names = ", ".join(built)
        yield Problem(f"{names} cannot go with FSDP1, which flattens weights", ("methods",), suggestion=FSDP2)
    for name, method in built.items():
        if not isinstance(method, (rl.Method, preference.Method, sft.Method)):
            continue
        found = list(method.conflicts(setup))
        whole = isinstance(method, sft.Method) and not method.any_launch and not method.neutral
        if whole and not any(conflict.fatal for conflict in found):
            # one of the user's own: the trainer refuses it too, once the model is there
            found += rl.not_sharded(setup, f"{name} needs whole weights (any_launch is not set)")
        for conflict in found:
            path: KeyPath = ("methods", name)
            if conflict.field is not None and conflict.field in written:
                path = ("trainer", conflict.field)
            elif conflict.field is not None and conflict.field in type(method).model_fields:
                path = ("methods", name, conflict.field)
            yield Problem(conflict.message, path, "error" if conflict.fatal else "warning")

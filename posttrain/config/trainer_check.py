"""The ``trainer:`` section against the TRL configuration class it is passed to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.config.annotations import accepts
from posttrain.config.problems import KeyPath, Problem, nearest
from posttrain.config.tasks import TaskSpec
from posttrain.config.trainer_fields import GONE, OWNED, RENAMED, trainer_fields
from posttrain.config.trainer_ranges import Choices, needed, rule_for
from posttrain.config.trainer_rules import rule_problems
from posttrain.config.upstream import SourceField

DEPRECATED = {
    "use_transformers_paged": "use_transformers_continuous_batching",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "pad_token": "the pad token of the tokenizer",
}
"""Fields that TRL drops in its next major version, with what replaces them."""


def check_trainer(
    values: Mapping[str, Any], spec: TaskSpec, at: KeyPath, *, adapter: bool = False
) -> tuple[list[Problem], dict[str, Any]]:
    """Check the fields of a TRL configuration: names, types, ranges and how they go together.

    Args:
        values: The section as written.
        spec: The task whose configuration class it is for.
        at: Where the section sits, ``("trainer",)``.
        adapter: Whether a PEFT adapter is trained.

    Returns:
        The problems, and every field of the class with its value: as written where that is valid, the
        default elsewhere (None where TRL computes it).

    Raises:
        ModuleNotFoundError, LookupError: TRL or transformers is missing or of a version we do not know.
    """
    fields = trainer_fields(spec)
    problems: list[Problem] = []
    merged = {name: field.default for name, field in fields.items()}
    valid: set[str] = set()
    for name, value in values.items():
        problem = _field_problem(name, value, fields, spec.config_class, (*at, name))
        if problem is not None:
            problems.append(problem)
        if problem is None or problem.severity == "warning":
            merged[name] = value
            valid.add(name)
    broken = values.keys() - valid
    problems += rule_problems(merged, valid, broken, spec, at, adapter=adapter)
    return problems, merged


def _field_problem(
    name: str, value: Any, fields: Mapping[str, SourceField], class_name: str, path: KeyPath
) -> Problem | None:
    """Return what is wrong with one field on its own, or None."""
    if name in OWNED and name in fields:
        return Problem(f"posttrain sets {name} itself", path, found=value, suggestion=OWNED[name])
    if name not in fields:
        return _unknown(name, value, fields, class_name, path)
    field = fields[name]
    rule = rule_for(field, class_name)
    # listed choices say more than the annotation: scale_rewards is a str that also takes true
    if not isinstance(rule, Choices) and not accepts(field.annotation, value):
        return Problem(
            f"{name} has a value of the wrong type",
            path,
            found=value,
            needed=needed(field, class_name),
            suggestion=_conversion(field.annotation, value) or _near_choice(field, class_name, value),
        )
    if rule is not None and not rule.allows(value):
        return Problem(
            f"{name} has a value that is not allowed",
            path,
            found=value,
            needed=needed(field, class_name),
            suggestion=_near_choice(field, class_name, value),
        )
    if name in DEPRECATED and value is not None:
        return Problem(
            f"{name} is deprecated in TRL", path, severity="warning", suggestion=f"use {DEPRECATED[name]}"
        )
    return None


def _unknown(
    name: str, value: Any, fields: Mapping[str, SourceField], class_name: str, path: KeyPath
) -> Problem:
    gone = GONE.get(class_name, {}).get(name)
    if gone is not None:
        return Problem(f"{class_name} has no field {name!r} any more", path, found=value, suggestion=gone)
    renamed = RENAMED.get(name, "")
    target = re.match(r"[\w.]*", renamed)
    word = target.group() if target else ""
    if word in fields or "." in word or word == "run_dir":
        return Problem(f"{class_name} has no field {name!r}", path, found=value, suggestion=f"use {renamed}")
    near = nearest(name, fields)
    return Problem(
        f"{class_name} has no field {name!r}",
        path,
        found=value,
        needed=None if near else f"a field of TRL's {class_name}",
        suggestion=f"did you mean {near!r}?" if near else None,
    )


def _near_choice(field: SourceField, class_name: str, value: Any) -> str | None:
    rule = rule_for(field, class_name)
    values = [choice for choice in getattr(rule, "values", ()) if isinstance(choice, str)]
    near = nearest(value, values) if isinstance(value, str) else None
    return f"did you mean {near!r}?" if near else None


def _conversion(annotation: str, value: object) -> str | None:
    """Return the value to write when the found one only has the wrong type."""
    if isinstance(value, float) and value.is_integer() and accepts(annotation, int(value)):
        return f"write {int(value)}"
    if not isinstance(value, str):
        return None
    word = value.strip().lower()
    if word in {"yes", "no", "on", "off", "true", "false"} and accepts(annotation, True):
        return f"write {'true' if word in {'yes', 'on', 'true'} else 'false'}"
    if word in {"none", "null"} and accepts(annotation, None):
        return "write null"
    try:
        number = float(word)
    except ValueError:
        return None
    if accepts(annotation, number) or (number.is_integer() and accepts(annotation, int(number))):
        return f"write {word} without quotes"
    return None

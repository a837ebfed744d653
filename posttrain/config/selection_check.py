"""The ``selection:`` section: the selector, its parameters, and what does not go with the rest of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.config.launch import DEEPSPEED, SHARDED, SPLIT, TITLES, launch_mode, processes
from posttrain.config.method_check import FSDP2, json_text
from posttrain.config.problems import KeyPath, Problem, near_file, nearest
from posttrain.config.schema import SelectionConfig
from posttrain.config.sentences import problems_of
from posttrain.config.tasks import Task
from posttrain.selection import registry
from posttrain.selection.explicit import Explicit
from posttrain.selection.selector import Selector
from posttrain.selection.settings import ADAMW

_PARAMS: KeyPath = ("selection", "params")


def check_selection(
    selection: SelectionConfig, task: Task, trainer: Mapping[str, Any], *, adapter: bool
) -> tuple[list[Problem], SelectionConfig]:
    """Check a selection with its parameters.

    Args:
        selection: The section.
        task: The task of the run.
        trainer: Every field of the TRL configuration with its value.
        adapter: Whether a PEFT adapter is trained.

    Returns:
        The problems, and the section with the parameters of the selector filled in.
    """
    problems = list(_trainer_rules(selection, trainer))
    if selection.plan is not None:
        path = Path(selection.plan).expanduser()
        if not path.is_file():
            near = near_file(path)
            problems.append(
                Problem(
                    f"no plan file at {selection.plan}",
                    ("selection", "plan"),
                    needed="a file of 'posttrain plan make'",
                    suggestion=f"did you mean {near}?" if near else None,
                )
            )
        return problems, selection
    assert selection.method is not None
    try:
        cls = registry.resolve(selection.method)
    except Exception as error:  # the module of a user's own selector may raise anything
        problems.append(_unknown(selection.method, error))
        return problems, selection
    try:
        selector = cls.model_validate_json(json_text(selection.params), strict=True)
    except ValidationError as error:
        return problems + problems_of(error, cls, selection.params, _PARAMS), selection
    problems += _selector_rules(selector, selection, task, trainer, adapter)
    return problems, selection.model_copy(update={"params": selector.model_dump(mode="json")})


def _unknown(name: str, error: Exception) -> Problem:
    path: KeyPath = ("selection", "method")
    if ":" in name:
        reason = str(error.args[0]) if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        return Problem(
            f"the selector {name!r} cannot be loaded: {reason}", path, needed="package.module:ClassName"
        )
    known = registry.available()
    # a method may be known by the name in its title: PaFi is 'magnitude'
    titled = (key for key, cls in known.items() if name.lower() == cls.title.lower().partition(":")[0])
    near = nearest(name, known) or next(titled, None)
    return Problem(
        f"unknown selector {name!r}",
        path,
        needed=f"one of {', '.join(known)}, or package.module:ClassName",
        suggestion=f"did you mean {near!r}?" if near else "see 'posttrain methods'",
    )


def _trainer_rules(selection: SelectionConfig, trainer: Mapping[str, Any]) -> Iterator[Problem]:
    decay = trainer.get("weight_decay") or 0.0
    if selection.weight_decay != "off" and decay == 0:
        yield Problem(
            f"selection.weight_decay {selection.weight_decay!r} does nothing while trainer.weight_decay is 0",
            ("selection", "weight_decay"),
            "warning",
            suggestion="set trainer.weight_decay, or drop it",
        )
    mode = launch_mode(trainer)
    if mode in DEEPSPEED and selection.weight_decay == "to_base":
        yield Problem(
            "weight_decay to_base acts before the optimiser's step, which DeepSpeed hides",
            ("selection", "weight_decay"),
            needed="off or selected",
        )
    if mode in DEEPSPEED and selection.backend == "masked":
        yield Problem(
            "backend 'masked' is an optimiser of its own, and DeepSpeed brings its own",
            ("selection", "backend"),
            needed="auto or composed" if mode == "zero3" else "auto, packed or composed",
        )
    elif mode in SPLIT and selection.backend in ("masked", "packed"):
        yield Problem(
            f"backend {selection.backend!r} needs whole weights, and {TITLES[mode]} shards them",
            ("selection", "backend"),
            needed="auto or composed",
        )


def _selector_rules(
    selector: Selector,
    selection: SelectionConfig,
    task: Task,
    trainer: Mapping[str, Any],
    adapter: bool,
) -> Iterator[Problem]:
    changing = selector.schedule in ("grow", "shrink")
    optim = trainer.get("optim") or ADAMW[0]
    optim = str(getattr(optim, "value", optim))
    if (changing or selection.backend == "masked") and optim not in ADAMW:
        yield Problem(
            f"{selector.name} moves single scalars of dense tensors with an AdamW of its own",
            ("trainer", "optim") if "optim" in trainer else ("selection",),
            found=optim,
            needed="adamw_torch",
        )
    if selector.schedule == "grow" and selection.weight_decay != "off":
        yield Problem(
            f"{selector.name} is defined without weight decay",
            ("selection", "weight_decay"),
            found=selection.weight_decay,
            needed="off",
        )
    elif selection.weight_decay == "to_base" and selection.backend in ("freeze", "masked"):
        yield Problem(
            "weight_decay to_base needs packed values, which remember where they began",
            ("selection", "backend"),
            found=selection.backend,
            needed="auto, packed or composed",
        )
    can = ("auto", "masked", *(["packed"] if selector.schedule == "shrink" and processes() == 1 else []))
    if changing and selection.backend not in can:
        yield Problem(
            f"{selector.name} changes the selection while it trains, which {selection.backend!r} cannot",
            ("selection", "backend"),
            needed=" or ".join(can),
        )
    elif selection.backend == "freeze" and _in_part(selector):
        yield Problem(
            f"{selector.name} trains parts of tensors, and 'freeze' takes whole ones",
            ("selection", "backend"),
            needed="auto, packed, composed or masked",
        )
    mode = launch_mode(trainer)
    if changing and mode in SHARDED:
        why = (
            "needs the gradient between backward and step, and DeepSpeed has no such place"
            if mode in DEEPSPEED
            else "changes the selection while it trains, which shards of weights cannot follow"
        )
        yield Problem(
            f"{selector.name} {why}",
            ("selection", "method"),
            suggestion="use DDP, or a selector whose selection stays",
        )
    elif mode == "fsdp1" and _in_part(selector):
        yield Problem(
            f"{selector.name} trains single scalars, and FSDP1 flattens tensors together",
            ("selection", "method"),
            suggestion=f"{FSDP2}, or select whole tensors (hft)",
        )
    if selector.needs == "examples" and task != "sft":
        yield Problem(
            f"{selector.name} scores weights on examples with labels, and task {task!r} has none",
            ("selection", "method"),
            suggestion="make the plan with an sft configuration (posttrain plan make), and name its file "
            "here: selection: {plan: FILE}",
        )
    if selector.name == "hft" and adapter:
        yield Problem(
            "hft with an adapter freezes half of the adapter's matrices; the base is frozen anyway",
            ("selection", "method"),
            "warning",
            suggestion="drop model.adapter for half fine-tuning; to halve a LoRA, hft: {categories: "
            "[attention, feed_forward], always_train: []}",
        )
    if selection.round and selector.schedule != "round":
        yield Problem(
            f"{selector.name} selects the same in every round",
            ("selection", "round"),
            "warning",
            found=selection.round,
        )


def _in_part(selector: Selector) -> bool:
    """Whether some scalars of a tensor move and others do not, as far as the parameters tell."""
    if isinstance(selector, Explicit):
        return bool(selector.rows or selector.columns)
    return selector.granularity == "element" and getattr(selector, "level", "element") == "element"

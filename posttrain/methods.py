"""What every trainer asks of the methods it is given."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.launch import launch_mode
from posttrain.rl.method import Conflict, Setup

logger = logging.getLogger(__name__)


def setup_of(methods: Sequence[Any], config: Any, config_class: Any, *, adapter: bool, **more: Any) -> Setup:
    """Return what methods may look at when a trainer is built.

    Args:
        methods: What the trainer was given.
        config: Its configuration, or None for the defaults of ``config_class``.
        config_class: TRL's.
        adapter: Whether a PEFT adapter is trained.
        **more: Further fields of :class:`~posttrain.rl.method.Setup`.
    """
    fields = {name: entry.default for name, entry in config_class.__dataclass_fields__.items()}
    trainer = fields if config is None else vars(config)
    return Setup(
        trainer=trainer,
        launch=launch_mode(trainer),
        methods=tuple(getattr(method, "name", "") for method in methods),
        adapter=adapter,
        ranks=1 if config is None else config.world_size,
        **more,
    )


def vet(methods: Sequence[Any], base: type, setup: Setup, *, example: str) -> list[Conflict]:
    """Refuse methods that cannot work together or in this setup; warn about doubtful ones.

    Args:
        methods: What the trainer was given.
        base: Its ``Method``.
        setup: What they may look at.
        example: How one is written, for the message.

    Returns:
        The warnings.

    Raises:
        ValueError: Two methods of one name, two that replace the loss, or a setup that one refuses.
        TypeError: An entry is not a ``base``.
    """
    for method in methods:
        if not isinstance(method, base):
            raise TypeError(f"methods takes instances such as {example}, found {method!r}")
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"each method may be given once, found {', '.join(twice)} more than once")
    replacing = [m.name for m in methods if getattr(m, "replaces_loss", False) and not m.neutral]
    if len(replacing) > 1:
        raise ValueError(f"one method may replace the loss, found {', '.join(replacing)}")
    conflicts = [conflict for method in methods for conflict in method.conflicts(setup)]
    fatal = [conflict.message for conflict in conflicts if conflict.fatal]
    if fatal:
        raise ValueError("; ".join(fatal))
    for conflict in conflicts:
        logger.warning(conflict.message)
    return conflicts


def write_reports(methods: Sequence[Any], folder: str | None) -> None:
    """Write what each method reports at the end of training to ``FOLDER/NAME.json``."""
    for method in methods:
        report = method.report()
        if report is not None:
            path = Path(folder or ".") / f"{method.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report), encoding="utf-8")

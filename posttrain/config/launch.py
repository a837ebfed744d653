"""How a run is launched, as far as one can tell before anything is loaded: who holds which weights.

The launcher says so in the environment of every process (``accelerate launch`` sets
``ACCELERATE_USE_DEEPSPEED``, ``ACCELERATE_USE_FSDP`` and what belongs to them), the configuration in
``trainer.deepspeed`` and ``trainer.fsdp``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

Mode = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]

TITLES: dict[Mode, str] = {
    "single": "one process",
    "ddp": "DDP",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
}
DEEPSPEED: frozenset[Mode] = frozenset({"zero1", "zero2", "zero3"})
SHARDED: frozenset[Mode] = DEEPSPEED | {"fsdp1", "fsdp2"}
SPLIT: frozenset[Mode] = SHARDED - {"zero1", "zero2"}
"""Where weights are in pieces, and not only gradients or what belongs to the optimiser."""

LAUNCHED = (
    "WORLD_SIZE",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_USE_FSDP",
    "FSDP_VERSION",
)
"""What a launcher puts into the environment of its processes, as far as it is read here."""


def processes() -> int:
    """Return the number of training processes of this launch: ``WORLD_SIZE``, or 1."""
    text = os.environ.get("WORLD_SIZE", "1")
    return max(int(text), 1) if text.isdecimal() else 1


def launch_mode(trainer: Mapping[str, Any]) -> Mode:
    """Return how this process was launched. DeepSpeed without stages counts as ZeRO-1: it has the optimiser.

    Args:
        trainer: Fields of the TRL configuration; ``deepspeed``, ``fsdp`` and ``fsdp_config`` are looked at.
    """
    settings = trainer.get("deepspeed")
    if settings or _is_true("ACCELERATE_USE_DEEPSPEED"):
        return _stage(settings)
    if trainer.get("fsdp") or _is_true("ACCELERATE_USE_FSDP"):
        options = _read(trainer.get("fsdp_config"))
        version = options.get("fsdp_version", options.get("version"))
        if version is None:
            version = 2 if trainer.get("fsdp") else os.environ.get("FSDP_VERSION", "1")
        return "fsdp1" if str(version) == "1" else "fsdp2"
    return "ddp" if processes() > 1 else "single"


def _stage(settings: Any) -> Mode:
    options = _read(settings or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    stage = (options.get("zero_optimization") or {}).get("stage", 0)
    if not options:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    stages: dict[str, Mode] = {"2": "zero2", "3": "zero3"}
    return stages.get(str(stage), "zero1")


def _read(value: Any) -> dict[str, Any]:
    """Return settings given as a mapping, as JSON or as the name of a JSON file; empty if they are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text("utf-8"))
        except (OSError, ValueError):
            return {}  # said elsewhere
    return value if isinstance(value, dict) else {}


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def environment(path: Path) -> dict[str, str]:
    """Return what ``accelerate launch --config_file PATH`` tells its processes, as far as it is read here.

    Raises:
        ValueError: There is no such file, or it is no configuration of accelerate.
    """
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as an accelerate configuration: {error}") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"{path} is no accelerate configuration: it has no distributed_type")
    found = {"WORLD_SIZE": str(settings.get("num_processes") or 1)}
    kind = str(settings["distributed_type"]).upper()
    if kind == "DEEPSPEED":
        options = settings.get("deepspeed_config") or {}
        found["ACCELERATE_USE_DEEPSPEED"] = "true"
        if options.get("deepspeed_config_file"):
            found["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(options["deepspeed_config_file"])
        else:
            found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(options.get("zero_stage", 2))
    elif kind == "FSDP":
        options = settings.get("fsdp_config") or {}
        found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(options.get("fsdp_version", 1))}
    return found


@contextmanager
def as_launched(path: Path | None) -> Iterator[None]:
    """Answer inside as if this process had been launched with an accelerate configuration, if there is one.

    Raises:
        ValueError: See :func:`environment`.
    """
    if path is None:
        yield
        return
    there = environment(path)
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    os.environ.update(there)
    try:
        yield
    finally:
        for name in LAUNCHED:
            os.environ.pop(name, None)
        os.environ.update(before)

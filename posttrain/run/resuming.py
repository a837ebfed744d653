"""What may differ between a run and its continuation: how it goes on, not what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from posttrain.config.schema import RunConfig
from posttrain.run.directory import RunDirectory, RunError

# A failing verifier is repaired by these, and then the run goes on.
_REWARD_MAY_CHANGE = ("deadline", "workers", "max_failures")
_MODEL_MAY_CHANGE = ("attn_implementation", "trust_remote_code")


def check_continuation(run: RunDirectory, config: RunConfig, fingerprint: str) -> list[str]:
    """Compare a configuration and its data with those the run was started with.

    Args:
        run: The run to be resumed.
        config: The configuration it is to be resumed with.
        fingerprint: Of the rows loaded now.

    Returns:
        The changes that are allowed (``trainer``, ``evaluate``, ``export`` and the like), one text each.

    Raises:
        RunError: Task, model, data, rewards or methods are others, or the rows have changed: that would be
            another run.
    """
    # through JSON, as the file was: tuples become lists
    now = json.loads(json.dumps(config.model_dump(mode="json")))
    try:
        then = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        refused = _changes(_identity(then, run), _identity(now, run))
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
        AttributeError,
        KeyError,
        TypeError,
    ) as error:
        raise RunError(
            f"{run.config} is damaged, so it cannot be told whether the run is the same ({error}). Restore "
            "it, or start a new run with run_dir=..."
        ) from error
    if refused:
        raise RunError(
            f"--resume goes on with the run in {run.root}, and this is another one: {'; '.join(refused)}. "
            "Put the old values back, or start a new run with run_dir=..."
        )
    known = _known_fingerprint(run)
    if known is not None and known != fingerprint:
        raise RunError(
            f"--resume goes on with the run in {run.root}, but the rows of {config.data.source} have changed "
            "since it was started. Put the old data back, or start a new run with run_dir=..."
        )
    return _changes(then | {"run_dir": None}, now | {"run_dir": None})


def _identity(config: dict[str, Any], run: RunDirectory) -> dict[str, Any]:
    """Return the parts of a plain configuration that say which run it is."""
    model = {key: value for key, value in config["model"].items() if key not in _MODEL_MAY_CHANGE}
    rewards = [
        {key: value for key, value in reward.items() if key not in _REWARD_MAY_CHANGE}
        | {"params": {key: value for key, value in reward["params"].items() if key != "memory_gib"}}
        for reward in config["rewards"]
    ]
    parts = {"task": config["task"], "model": model, "data": config["data"], "rewards": rewards}
    parts["methods"] = config["methods"]
    parts["selection"] = config.get("selection")  # a run of an earlier version had none
    rewriting = config.get("s3ft")
    parts["s3ft"] = rewriting and {key: value for key, value in rewriting.items() if key != "batch_size"}
    if run.warm_start.model.exists():
        parts["warm_start"] = config["warm_start"]
    return parts


def _changes(then: Any, now: Any, path: str = "") -> list[str]:
    """Name the smallest parts that differ, by their dotted paths."""
    if then == now:
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        keys: Sequence[Any] = list(dict.fromkeys([*then, *now]))
        pairs = [(then.get(key), now.get(key)) for key in keys]
    elif (
        isinstance(then, list)
        and isinstance(now, list)
        and len(then) == len(now)
        and isinstance(now[0], dict)
    ):
        keys, pairs = range(len(now)), list(zip(then, now, strict=True))
    else:
        return [f"{path} was {_shown(then)}, now {_shown(now)}"]
    return [
        change
        for key, (old, new) in zip(keys, pairs, strict=True)
        for change in _changes(old, new, f"{path}.{key}" if path else str(key))
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known_fingerprint(run: RunDirectory) -> str | None:
    try:
        manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
        fingerprint = manifest["data"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # killed before it was written, or edited: the rows cannot be compared
    return str(fingerprint)

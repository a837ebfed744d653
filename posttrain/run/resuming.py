"""What may differ between a run and its continuation: how it goes on, not what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.checkpointing.whole import damage, refusal
from posttrain.config.schema import RunConfig
from posttrain.evaluation.results import Evaluation
from posttrain.run.directory import RunDirectory, RunError
from posttrain.stored import StoredFileError, stored_json

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


def check_files(run: RunDirectory) -> None:
    """Look at the files that a resume reads and goes on with: none is taken for missing because of damage.

    Raises:
        RunError: One is damaged; the message names it and says how to go on.
    """
    for path, consequence in (
        (run.manifest, "the rows are then not compared with those at its start"),
        (run.evaluation, "the resume then evaluates again"),
    ):
        if not path.exists():
            continue
        try:
            content = stored_json(path)
            if path == run.manifest:
                known = [content["time"], content["command"], *content.get("resumed", [])]
                whole = isinstance(content["data"]["fingerprint"], str) and len(known) >= 2
            else:
                parts = [content[when] for when in ("before", "after") if content.get(when) is not None]
                whole = all(Evaluation.from_dict(part) for part in parts) and isinstance(
                    content.get("steps", {}), dict
                )
        except (StoredFileError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            whole = False
        if not whole:
            raise RunError(f"{path} is damaged. Restore it from a copy, or move it away: {consequence}")
    for path in (run.metrics, run.completions, run.alarms):
        if path.is_dir():
            raise RunError(f"{path} is a folder, and the run writes a file of that name: move it away")
    for stage in (run,) if run.warm_start.model.exists() else (run, run.warm_start):
        newest = newest_checkpoint(stage.checkpoints)
        if newest is not None and (found := damage(newest)):
            raise RunError(refusal(newest, found))


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

"""A run that takes seconds, in this process or in one of its own, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.cli import app

STEPS = 7
TINY: dict[str, Any] = {
    "task": "rlvr",
    "threads": 1,
    "data": {
        "source": "reasoning_gym:chain_sum",
        "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "prompt_pattern": ": (.*)",
        "train": {"size": 40, "seed": 0},
        "eval": {"size": 6, "seed": 1_000_003},
    },
    "warm_start": {
        "size": 300,
        "trainer": {
            "max_steps": 12,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "gradient_checkpointing": False,
            "logging_steps": 2,
            "save_steps": 4,
        },
    },
    "rewards": ["verifier"],
    "methods": {"ace": {"alpha": 1.0}},
    "trainer": {
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "steps_per_generation": 2,
        "max_completion_length": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 3,
        "save_total_limit": 2,
    },
    "evaluate": {"k": [1, 2], "samples": 2, "resamples": 100},
    "export": {},
}
LORA = {"model": {"adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"}}}
# Wall time differs between two runs of the same job; everything else must not.
TIMES = {"seconds", "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with nested ``changes`` on top; None drops a section."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = copy.deepcopy(value)
    return result


def write_config(folder: Path, run_dir: Path | str, *changes: dict[str, Any]) -> Path:
    config = {**TINY, "run_dir": str(run_dir)}
    for change in changes:
        config = merged(config, change)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def posttrain(*arguments: Any, code: int = 0) -> Any:
    """Run a verb in this process; stdout and stderr are kept apart."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def start(*arguments: Any, log: Path | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a verb in a process of its own."""
    output: Any = subprocess.PIPE if log is None else log.open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain", *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE if log is None else subprocess.DEVNULL,
        stderr=output,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})},
        **options,
    )


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Every line must be strict JSON."""
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().split("\n") if line]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def outcome(run: Path) -> dict[str, Any]:
    """Everything two runs of the same job must have in common, bit for bit."""
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    evaluation = json.loads((run / "evaluation.json").read_text())
    for part in ("before", "after"):
        for key in ("seconds", "tokens_per_second"):
            evaluation[part].pop(key)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return {
        "last checkpoint": checkpoint.name,
        "weights": {
            str(path.relative_to(run)): load_file(path)
            for folder in ("export", "warm_start/model", f"checkpoints/{checkpoint.name}")
            for path in sorted((run / folder).rglob("*.safetensors"))
        },
        "optimizer": optimizer["state"],
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "metrics": timeless(json_lines(run / "metrics.jsonl")),
        "warm start metrics": timeless(json_lines(run / "warm_start" / "metrics.jsonl")),
        "completions": json_lines(run / "completions.jsonl"),
        "evaluation": evaluation,
    }


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Compare nested containers with tensors; the message names the first place that differs."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), (where, left.keys() ^ right.keys())
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), (where, len(left), len(right))
        for index, (first, second) in enumerate(zip(left, right, strict=True)):
            assert_same(first, second, f"{where}/{index}")
    else:
        assert left == right, (where, left, right)

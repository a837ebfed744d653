"""``posttrain eval`` and ``posttrain export``: what is done with a model after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState

from posttrain.checkpointing.resume import newest_checkpoint
from posttrain.config.schema import EvaluateConfig, ExportConfig, RunConfig
from posttrain.data.length import apply_length_policy
from posttrain.data.load import load_data
from posttrain.data.prompts import render
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.results import Evaluation
from posttrain.export.card import card_of
from posttrain.export.export import export_model
from posttrain.export.push import push
from posttrain.models.load import load_for_evaluation
from posttrain.rewards.reward import build_rewards
from posttrain.run.directory import RunDirectory, RunError, write_json

EXPORT_FORMATS: tuple[str, ...] = get_args(ExportConfig.model_fields["format"].annotation)


def run_of(path: str | Path) -> RunDirectory | None:
    """Return the run directory that ``path`` is or lies in, or None."""
    start = Path(path)
    if not start.exists():
        return None
    for folder in [start, *start.resolve().parents][:4]:
        run = RunDirectory(folder)
        if run.config.exists() and run.manifest.exists():
            return run
    return None


def model_of(path: str | Path) -> str:
    """Return the model folder to load for ``path``: a run stands for its newest checkpoint.

    Raises:
        RunError: A run directory without a checkpoint.
    """
    run = RunDirectory(Path(path))
    if not run.config.exists():
        return str(path)
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise RunError(f"{path} holds no checkpoint yet; train first, or name a model folder")
    return str(checkpoint)


def config_of(path: str | Path) -> Path:
    """Return the configuration of the run that ``path`` belongs to.

    Raises:
        RunError: ``path`` does not lie in a run directory.
    """
    run = run_of(path)
    if run is None:
        raise RunError(f"{path} does not lie in a run directory: say what to evaluate on with --config CONFIG.yaml")
    return run.config


def evaluate_path(path: str, config: RunConfig, *, out: Path | None = None) -> Evaluation:
    """Evaluate a checkpoint, an adapter, a run or a Hub model on the held-out rows of ``config``.

    Args:
        path: What to evaluate.
        config: Gives data, rewards (the first decides what is correct) and the ``evaluate`` section.
        out: Where to write the evaluation with all samples, as JSON.

    Raises:
        RunError: The configuration has no rewards to judge with, or no held-out rows.
    """
    if not config.rewards:
        raise RunError("an evaluation needs a verifier: add rewards, for example rewards=[verifier]")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = config.evaluate or EvaluateConfig()
    data = load_data(config.data, config.task)
    assert data.eval is not None
    model, tokenizer = load_for_evaluation(model_of(path), config.model.dtype)
    rows = render(data.eval, tokenizer, config.data)
    rows, _ = apply_length_policy(rows, tokenizer, config.data.max_prompt_tokens, config.data.over_length)
    rewards = build_rewards(config.rewards[:1], data)
    try:
        result = evaluate(
            model.to(PartialState(cpu=not torch.accelerator.is_available()).device),
            tokenizer,
            rows,
            rewards[0].verify,
            settings,
            max_new_tokens=settings.max_new_tokens or config.trainer.get("max_completion_length", 512),
        )
    finally:
        for reward in rewards:
            reward.close()
    if out is not None:
        write_json(out, result.to_dict())
    return result


def export_path(
    source: Path, *, to: Path | None, format: str, push_to: str | None, private: bool
) -> dict[str, Any]:
    """Export the model of a run or of one of its checkpoints, verified, and upload it if asked.

    Returns:
        ``folder``, ``format``, ``max_difference`` of the reloaded logits, and ``pushed`` (address or None).

    Raises:
        RunError: ``source`` is not a run, and no target folder was given.
    """
    run = run_of(source)
    if run is None and to is None:
        raise RunError(f"{source} does not lie in a run directory: name a target folder with --to")
    model, tokenizer = load_for_evaluation(model_of(source))
    target = to or run.export  # type: ignore[union-attr]
    card = card_of(run) if run is not None else None
    result = export_model(model, tokenizer, target, format=format, card=card)  # type: ignore[arg-type]
    pushed = push(target, push_to, private=private) if push_to else None
    return {
        "folder": result.folder,
        "format": result.format,
        "max_difference": result.comparison.max_difference,
        "pushed": pushed,
    }

"""``posttrain eval`` and ``posttrain export``: what is done with a model after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState

from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.config.paths import usable_path
from posttrain.config.schema import ExportConfig, RunConfig
from posttrain.config.tasks import TASKS
from posttrain.data.length import apply_length_policy
from posttrain.data.load import load_data
from posttrain.data.prompts import render
from posttrain.evaluation.results import Evaluation
from posttrain.export.push import preflight, push
from posttrain.models.load import load_for_evaluation
from posttrain.models.scoring import load_scorer
from posttrain.rewards.pool import VerifierStartError
from posttrain.rewards.reward import build_rewards
from posttrain.run.directory import RunDirectory, RunError, write_json
from posttrain.run.evaluating import (
    can_evaluate,
    check_context,
    evaluate_model,
    fitting_pairs,
    reference_of,
)
from posttrain.run.publish import publish, ready
from posttrain.stored import stored_config, stored_json

EXPORT_FORMATS: tuple[str, ...] = get_args(ExportConfig.model_fields["format"].annotation)


def run_of(path: str | Path) -> RunDirectory | None:
    """Return the run directory that ``path`` is or lies in, or None."""
    start = _expanded(path)
    if not start.exists():
        return None
    for folder in [start, *start.resolve().parents][:4]:
        run = RunDirectory(folder)
        if run.config.is_file() and run.manifest.is_file():
            return run
    return None


def _expanded(path: str | Path) -> Path:
    """Return a path of the command line with ``~`` replaced.

    Raises:
        RunError: The system refuses to look at it.
    """
    try:
        usable_path(str(path))
        return Path(path).expanduser()
    except ValueError as error:
        raise RunError(str(error)) from None


def model_of(path: str | Path) -> str:
    """Return the model folder to load for ``path``: a run stands for the model it trained.

    That is the one a method left when training was over, else the newest checkpoint, the best one when the
    run was to keep that (``trainer.load_best_model_at_end``), or its export when no checkpoints were written,
    or only shards of some.

    Raises:
        RunError: A run directory without any of them.
    """
    run = RunDirectory(_expanded(path))
    if not run.config.is_file():
        return str(run.root) if str(path).startswith("~") else str(path)
    if run.finished_model.is_dir():
        return str(run.finished_model)
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None and run.export.is_dir():
        return str(run.export)
    if checkpoint is None:
        raise RunError(f"{path} holds no checkpoint and no export yet; train first, or name a model folder")
    config = stored_config(run.config)
    if config["trainer"].get("load_best_model_at_end"):
        best = stored_json(checkpoint / "trainer_state.json").get("best_model_checkpoint")
        if best:
            checkpoint = run.checkpoints / Path(str(best)).name
    if not any(path.suffix == ".safetensors" for path in checkpoint.iterdir()):
        if run.export.is_dir():
            return str(run.export)
        if (checkpoint / "zero_to_fp32.py").is_file():
            raise RunError(
                f"{checkpoint} holds shards of ZeRO-3, no model: resume the run to its end, which exports "
                f"it, or put them together with python {checkpoint}/zero_to_fp32.py {checkpoint} FOLDER "
                "--safe_serialization; with zero3_save_16bit_model: true checkpoints hold the model"
            )
        raise RunError(
            f"{checkpoint} holds shards of FSDP, no model: resume the run to its end, which exports it, or "
            "put them together with accelerate merge-weights; with fsdp_state_dict_type: FULL_STATE_DICT "
            "checkpoints hold the model"
        )
    return str(checkpoint)


def base_of(folder: str) -> Path | None:
    """Return the base of an adapter that was trained on the warm start of its run, wherever that lies now."""
    run = run_of(folder)
    if run is None or not Path(folder).resolve().is_relative_to(run.checkpoints.resolve()):
        return None
    return run.warm_start.model if run.warm_start.model.is_dir() else None


def config_of(path: str | Path) -> Path:
    """Return the configuration of the run that ``path`` belongs to.

    Raises:
        RunError: ``path`` does not lie in a run directory.
    """
    run = run_of(path)
    if run is None:
        raise RunError(
            f"{path} does not lie in a run directory: say what to evaluate on with --config CONFIG.yaml"
        )
    return run.config


def evaluate_path(path: str, config: RunConfig, *, out: Path | None = None) -> Evaluation:
    """Evaluate a checkpoint, an adapter, a run or a Hub model on the held-out rows of ``config``.

    Args:
        path: What to evaluate.
        config: Gives data, rewards (the first decides what is correct) and the ``evaluate`` section.
        out: Where to write the evaluation with all samples, as JSON.

    Raises:
        RunError: The configuration has no rewards to judge with, or they do not fit the data.
    """
    if not can_evaluate(config):
        raise RunError("an evaluation needs a verifier: add rewards, for example rewards=[verifier]")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    state = PartialState(cpu=not torch.accelerator.is_available())
    data = load_data(config.data, config.task)
    assert data.eval is not None
    folder = model_of(path)
    load = load_scorer if TASKS[config.task].scores else load_for_evaluation
    model, tokenizer = load(
        folder, config.model.dtype, base=base_of(folder), trust_remote_code=config.model.trust_remote_code
    )
    rows = render(data.eval, tokenizer, config.data)
    limits = (config.data.max_prompt_tokens, config.data.over_length)
    rows, lengths = apply_length_policy(rows, tokenizer, *limits)
    longest = lengths.longest_kept
    if TASKS[config.task].pairs:
        rows, _, longest = fitting_pairs(config, rows, model, tokenizer)
    check_context(config, model, longest)
    try:
        rewards = build_rewards(config.rewards[:1], data)
    except (ValueError, VerifierStartError) as error:
        raise RunError(str(error)) from error
    try:
        judge = next(iter(rewards), None)
        result = evaluate_model(
            config, model, tokenizer, rows, judge, reference=reference_of(config, tokenizer=tokenizer)
        )
    finally:
        for reward in rewards:
            reward.close()
    if out is not None and state.is_main_process:
        write_json(out.expanduser(), result.to_dict())
    return result


def export_path(
    source: str | Path,
    *,
    to: Path | None,
    format: str,
    push_to: str | None,
    private: bool,
    base: str | None = None,
) -> dict[str, Any]:
    """Export the model of a run or of one of its checkpoints, verified, and upload it if asked.

    Args:
        source: Run directory or model folder.
        to: Target folder. When None: ``RUN/export``, or ``RUN/export-FORMAT`` for a format that was named, so
            that a merged model does not replace the adapter.
        format: One of :data:`EXPORT_FORMATS`.
        push_to: Hub repository, or None. An export that lies in ``source`` is uploaded as it is.
        private: Whether a repository that is created is private.
        base: Base of a delta, ``model.path`` of the run when None; or the address of an adapter's base.

    Returns:
        See :func:`posttrain.run.publish.publish`; and ``pushed``: the address on the Hub, or None.

    Raises:
        RunError: ``source`` is not a run, and no target folder was given.
        posttrain.export.push.PushRefusedError: The push cannot work; nothing was exported.
        posttrain.export.push.PushError: It did not; the export is complete, the message says how to go on.
    """
    if push_to is not None:
        preflight(push_to, private=private)
        if to is None and base is None and (done := ready(str(source), format)) is not None:
            return {**done, "pushed": push(done["folder"], push_to, private=private)}
    run = run_of(source)
    if run is None and to is None:
        raise RunError(f"{source} does not lie in a run directory: name a target folder with --to")
    folder = model_of(source)
    remote, dtype = False, "auto"
    if run is not None:
        config = stored_config(run.config)
        remote, dtype = bool(config["model"].get("trust_remote_code")), config["model"]["dtype"]
    load: Any = load_for_evaluation
    if run is not None and config["task"] in TASKS and TASKS[config["task"]].scores:
        load = load_scorer
    model, tokenizer = load(
        folder,
        dtype,
        base=base_of(folder),
        trust_remote_code=remote,
    )
    if to is None:
        assert run is not None
        to = run.export if format == "auto" else run.root / f"export-{format}"
    done = publish(
        model,
        tokenizer,
        to.expanduser(),
        run=run,
        format=format,  # type: ignore[arg-type]
        pushing=push_to is not None,
        base=base,
    )
    pushed = push(done["folder"], push_to, private=private) if push_to is not None else None
    return {**done, "pushed": pushed}

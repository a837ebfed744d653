"""The batch arithmetic of a run, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from posttrain.deep.findings import Finding, Section
from posttrain.deep.subject import Subject


def look_at_batches(subject: Subject, tokens_per_row: float | None = None) -> Section:
    """Return what one optimiser step, one epoch and the whole run take.

    Args:
        subject: With data.
        tokens_per_row: Mean tokens that one row brings into a forward (both answers of a pair); None when
            unknown. For reinforcement learning the prompt only.
    """
    assert subject.data is not None
    if subject.spec.generates:
        facts = _generating(subject, len(subject.data.train), tokens_per_row)
    else:
        facts = _plain(subject, len(subject.data.train), tokens_per_row)
    return Section("batch", "Batch arithmetic", tuple(_findings(subject, facts)), facts)


def _generating(subject: Subject, rows: int, prompt_tokens: float | None) -> dict[str, Any]:
    """GRPO: a generation batch holds whole groups, and is used num_iterations times."""
    values, ranks = subject.trainer, subject.processes
    per_device, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    group, reuse = values["num_generations"], values["num_iterations"]
    size = values["generation_batch_size"]
    steps_per_generation = values["steps_per_generation"]
    if size is None:
        size = per_device * ranks * (steps_per_generation or accumulation)
    micro = size // (per_device * ranks)
    completions = per_device * accumulation * ranks
    prompts = size // group
    # micro-batches of all generation batches of an epoch, each used num_iterations times
    micro_of_epoch = rows // max(prompts, 1) * micro * reuse
    per_epoch = max(math.ceil(micro_of_epoch / accumulation), 1) if micro_of_epoch else 0
    steps = _steps(values, per_epoch)
    limit = values["max_completion_length"]
    generations = math.ceil(steps * accumulation / (micro * reuse)) if micro else 0
    facts: dict[str, Any] = {
        "processes": ranks,
        "completions_per_step": completions,
        "prompts_per_generation": prompts,
        "completions_per_generation": size,
        "group": group,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "generations": generations,
        "completions": generations * size,
        "completion_tokens_at_most": generations * size * limit,
        "prompt_tokens": None if prompt_tokens is None else round(generations * size * prompt_tokens),
    }
    on = f" on each of {ranks} processes" if ranks > 1 else ""
    facts["words"] = [
        f"One generation: {prompts} prompt{'s' if prompts != 1 else ''} x {group} completions = {size} "
        f"completions, for {micro} forward-backward passes of {per_device} rows{on}"
        + (f", used {reuse} times" if reuse > 1 else ""),
        f"One optimiser step: {completions} completions of {completions / group:g} prompts "
        f"({per_device} rows x {accumulation} accumulated x {ranks} process{'es' if ranks > 1 else ''})",
        f"One epoch: {rows} prompts = {per_epoch} optimiser steps",
        f"The run: {steps} optimiser steps, {generations} generations, {generations * size:,} "
        "completions of at most "
        f"{limit} tokens: at most {generations * size * limit:,} sampled tokens",
    ]
    return facts


def _plain(subject: Subject, rows: int, tokens_per_row: float | None) -> dict[str, Any]:
    values, ranks = subject.trainer, subject.processes
    per_device, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    batches = math.ceil(rows / (per_device * ranks))
    if values["dataloader_drop_last"]:
        batches = rows // (per_device * ranks)
    per_epoch = max(math.ceil(batches / accumulation), 1) if batches else 0
    steps = _steps(values, per_epoch)
    per_step = per_device * accumulation * ranks
    what = "pairs" if subject.spec.pairs else "rows"
    tokens = None if tokens_per_row is None else round(tokens_per_row * per_step)
    facts: dict[str, Any] = {
        "processes": ranks,
        "rows_per_step": per_step,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "rows": steps * per_step,
        "tokens_per_step": tokens,
        "tokens": None if tokens_per_row is None else round(tokens_per_row * steps * per_step),
        "epochs": round(steps / per_epoch, 3) if per_epoch else None,
        "packing": bool(values.get("packing")),
    }
    facts["words"] = [
        f"One optimiser step: {per_step} {what} ({per_device} x {accumulation} accumulated x {ranks} "
        f"process{'es' if ranks > 1 else ''})" + ("" if tokens is None else f", about {tokens:,} tokens"),
        f"One epoch: {rows} {what} = {per_epoch} optimiser steps",
        f"The run: {steps} optimiser steps = {facts['epochs']:g} epochs"
        + ("" if facts["tokens"] is None else f", about {facts['tokens']:,} tokens")
        if facts["epochs"] is not None
        else "The run: no whole batch",
    ]
    if facts["packing"]:
        facts["words"].append(
            f"packing puts several rows into each of {values['max_length']} tokens: fewer steps than "
            "counted here"
        )
    return facts


def _steps(values: dict[str, Any], per_epoch: int) -> int:
    most = values["max_steps"]
    return int(most) if most > 0 else math.ceil(values["num_train_epochs"] * per_epoch)


def _findings(subject: Subject, facts: dict[str, Any]) -> Iterable[Finding]:
    if facts["steps_per_epoch"] == 0:
        yield Finding(
            "error",
            "the data do not fill one batch, so nothing would be trained",
            cure="lower per_device_train_batch_size or gradient_accumulation_steps, or give more rows",
        )
    values, steps = subject.trainer, facts["steps"]
    warmup = values["warmup_steps"] or 0
    if warmup >= 1 and steps and warmup >= steps:
        yield Finding(
            "warning",
            f"warmup_steps={warmup:g} reaches past the {steps} steps of the run: learning_rate is "
            "never reached",
            cure="lower warmup_steps; a value below 1 is a share of all steps",
        )
    if 0 < steps < 10:
        yield Finding(
            "warning",
            f"the whole run has {steps} optimiser steps",
            cure="lower gradient_accumulation_steps or the batch, or set max_steps, if this is more "
            "than a trial",
        )
    if subject.spec.generates and steps:
        epochs = (
            facts["completions"] / facts["group"] / max(len(subject.data.train), 1) if subject.data else 0
        )
        if epochs > 20:
            yield Finding(
                "note",
                f"every prompt is met about {epochs:.0f} times",
                cure="more prompts (data.train.size) are cheap where they are generated",
            )

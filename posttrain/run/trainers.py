"""From a run configuration to a TRL configuration and a posttrain trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, SFTConfig

from posttrain.config.schema import RunConfig
from posttrain.rl import registry
from posttrain.rl.trainer import GRPOTrainer
from posttrain.run.callbacks import ConsoleProgress, RunRecorder
from posttrain.run.directory import RunDirectory
from posttrain.sft.trainer import SFTTrainer


def trl_config(cls: type, fields: Mapping[str, Any], run: RunDirectory, **ours: Any) -> Any:
    """Build a TRL configuration with defaults that work on the machine at hand.

    Fields the user wrote win. Without an accelerator ``use_cpu`` is set (TRL raises otherwise) and mixed
    precision is off (TRL turns bfloat16 on, which a CPU emulates).
    """
    values: dict[str, Any] = {"output_dir": str(run.checkpoints), "report_to": "none", **ours}
    if not torch.accelerator.is_available():
        values["use_cpu"] = True
        if not fields.get("fp16"):
            values["bf16"] = False
    values |= fields
    return cls(**values)


def sft_trainer(
    run: RunDirectory,
    fields: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    train: Dataset,
    *,
    peft_config: Any = None,
    title: str = "sft",
) -> SFTTrainer:
    """Build the supervised trainer of a run or of its warm start."""
    recorder = RunRecorder(run)
    trainer = SFTTrainer(
        model=model,
        args=trl_config(SFTConfig, fields, run),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[recorder],
    )
    return _watched(trainer, title)


def grpo_trainer(
    config: RunConfig,
    run: RunDirectory,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    rewards: Sequence[Any],
    *,
    peft_config: Any = None,
) -> GRPOTrainer:
    """Build the reinforcement-learning trainer of a run."""
    recorder = RunRecorder(run)
    trainer = GRPOTrainer(
        model=model,
        args=trl_config(
            GRPOConfig, config.trainer, run, reward_weights=[reward.weight for reward in rewards]
        ),
        reward_funcs=list(rewards),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[recorder],
        methods=registry.build(config.methods),
    )
    recorder.trainer = trainer
    return _watched(trainer, "rlvr")


def _watched(trainer: Any, title: str) -> Any:
    """Replace transformers' bar and its printed dictionaries by one readable line."""
    if not trainer.args.disable_tqdm:
        callback: type[TrainerCallback]
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(ConsoleProgress(title))
    return trainer

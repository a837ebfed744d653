"""From a run configuration to a TRL configuration and a posttrain trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from posttrain.config.schema import RunConfig, SelectionConfig
from posttrain.preference import registry as preference_registry
from posttrain.preference.reward_trainer import RewardTrainer
from posttrain.preference.trainer import DPOTrainer
from posttrain.rl import registry
from posttrain.rl.trainer import GRPOTrainer
from posttrain.rl.ttrl import unlabelled
from posttrain.run.alarms import Alarms
from posttrain.run.callbacks import FiniteWeights, RunRecorder
from posttrain.run.directory import RunDirectory, RunError
from posttrain.run.progress import ConsoleProgress
from posttrain.selection import registry as selectors
from posttrain.selection.plan import SelectionPlan
from posttrain.selection.selector import Selector
from posttrain.selection.settings import Select
from posttrain.sft import registry as sft_registry
from posttrain.sft.trainer import SFTTrainer


def trl_config(cls: type, fields: Mapping[str, Any], run: RunDirectory, **ours: Any) -> Any:
    """Build a TRL configuration with defaults that work on the machine at hand.

    Fields the user wrote win. Without an accelerator ``use_cpu`` is set (TRL raises otherwise) and mixed
    precision is off (TRL turns bfloat16 on, which a CPU emulates).

    Raises:
        RunError: TRL refuses the fields.
    """
    values: dict[str, Any] = {"output_dir": str(run.checkpoints), "report_to": "none", **ours}
    if not torch.accelerator.is_available():
        values["use_cpu"] = True
        if not fields.get("fp16"):
            values["bf16"] = False
    values |= fields
    if values["report_to"] not in ("none", [], None):  # else trackers file every run under the same name
        values = {"run_name": _tracked_name(run), "project": "posttrain", **values}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise RunError(f"{cls.__name__} refuses the fields under 'trainer': {error}") from error


def _tracked_name(run: RunDirectory) -> str:
    """Return the folder of a run as it is seen from here; arms of a comparison end in the same word."""
    root, here = run.root.resolve(), Path.cwd()
    return root.relative_to(here).as_posix() if root.is_relative_to(here) else "/".join(root.parts[-3:])


def sft_trainer(
    run: RunDirectory,
    args: SFTConfig,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    *,
    held_out: Dataset | None = None,
    peft_config: Any = None,
    watchers: Sequence[TrainerCallback] = (),
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    selection: Select | None = None,
    title: str = "sft",
) -> SFTTrainer:
    """Build the supervised trainer of a run or its warm start; ``watchers`` come before what reads logs.

    Raises:
        RunError: No row has a token to learn.
    """
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[*watchers, RunRecorder(run), FiniteWeights()],
        methods=sft_registry.build(methods or {}),
        selection=selection,
    )
    prepared: Any = trainer.train_dataset
    # TRL leaves out rows cut before their answer and stops in a sampler of none; packed ones it keeps
    if "labels" in prepared.column_names and not any(
        label != -100 for labels in prepared["labels"] for label in labels
    ):
        raise RunError(
            f"{title}: none of {len(train)} rows has a token to learn, because trainer.max_length = "
            f"{args.max_length} cuts them before the answer, or answers are empty. Raise it, or set it to "
            "null; posttrain check --deep shows how long the rows are"
        )
    return _watched(trainer, run, title)


def grpo_trainer(
    config: RunConfig,
    run: RunDirectory,
    args: GRPOConfig,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    rewards: Sequence[Any],
    *,
    held_out: Dataset | None = None,
    peft_config: Any = None,
    watchers: Sequence[TrainerCallback] = (),
    selection: Select | None = None,
) -> GRPOTrainer:
    """Build the reinforcement-learning trainer of a run; ``watchers`` come before what reads logs."""
    recorder = RunRecorder(run)
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=list(rewards) or [unlabelled],
        train_dataset=train,
        eval_dataset=held_out if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[*watchers, recorder, FiniteWeights()],
        methods=registry.build(config.methods),
        selection=selection,
        rollout=config.rollout,
    )
    recorder.trainer = trainer
    return _watched(trainer, run, config.task)


def pair_trainer(
    config: RunConfig,
    run: RunDirectory,
    args: DPOConfig | RewardConfig,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    *,
    held_out: Dataset | None = None,
    peft_config: Any = None,
    watchers: Sequence[TrainerCallback] = (),
    selection: Select | None = None,
    probe: Dataset | None = None,
) -> DPOTrainer | RewardTrainer:
    """Build the trainer of a run on pairs; ``watchers`` come before what reads logs."""
    options: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": train,
        "eval_dataset": held_out if args.eval_strategy != "no" else None,
        "processing_class": tokenizer,
        "peft_config": peft_config,
        "callbacks": [*watchers, RunRecorder(run), FiniteWeights()],
        "selection": selection,
    }
    trainer: DPOTrainer | RewardTrainer
    if isinstance(args, RewardConfig):
        trainer = RewardTrainer(**options)
    else:
        whole = peft_config is None and not isinstance(model, PeftModel)
        if whole and not args.precompute_ref_log_probs:
            # TRL would read it from the model's address again, which an embedded model does not have
            options["ref_model"] = copy.deepcopy(model)
        trainer = DPOTrainer(
            **options, methods=preference_registry.build(config.methods), probe_dataset=probe
        )
    return _watched(trainer, run, config.task)


def build_selection(section: SelectionConfig | None) -> Select | None:
    """Return what a configuration selects, for ``selection=`` of a trainer.

    Raises:
        posttrain.selection.plan.PlanError: The plan file is damaged.
    """
    if section is None:
        return None
    what: SelectionPlan | Selector
    if section.plan is not None:
        what = SelectionPlan.load(Path(section.plan).expanduser())
    else:
        assert section.method is not None
        what = selectors.resolve(section.method)(**section.params)
    return Select(
        what,
        backend=section.backend,
        weight_decay=section.weight_decay,
        age_correction=section.age_correction,
        master_weights=section.master_weights,
        round=section.round,
        examples=section.examples,
    )


def run_training(trainer: Any, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one; the terminal is given back also when that fails."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ConsoleProgress):
                callback.stop()


def _watched(trainer: Any, run: RunDirectory, title: str) -> Any:
    """Replace transformers' bar and the dictionaries it prints by our own display, and set the alarms.

    Trackers (``report_to``) come last, so that they see what the callbacks before them add to a log.
    """
    trainer.add_callback(Alarms(run.alarms))
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    for tracker in [row for row in trainer.callback_handler.callbacks if isinstance(row, kinds)]:
        trainer.remove_callback(tracker)
        trainer.add_callback(tracker)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ConsoleProgress(title))
    return trainer

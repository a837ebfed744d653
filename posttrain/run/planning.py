"""The plan of a configuration, made without training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import SFTConfig

from posttrain.config.schema import RunConfig
from posttrain.data.length import apply_length_policy
from posttrain.data.load import load_data
from posttrain.data.prompts import render
from posttrain.models.adapter import build_peft_config
from posttrain.run.directory import RunDirectory, RunError
from posttrain.run.starting import start_model
from posttrain.run.trainers import build_selection, sft_trainer, trl_config
from posttrain.selection.plan import SelectionPlan


def make_plan(config: RunConfig) -> SelectionPlan:
    """Return what the ``selection`` section selects in the model the run would start from.

    Raises:
        RunError: There is no such section, its selector chooses while it trains, or it finds nothing.
    """
    select = build_selection(config.selection)
    if select is None:
        raise RunError("the configuration has no 'selection' section: add one, such as selection: hft")
    if isinstance(select.what, SelectionPlan):
        raise RunError(f"the selection is a plan file already: {config.selection.plan}")  # type: ignore[union-attr]
    if select.what.schedule == "grow":
        raise RunError(f"{select.what.name} chooses while it trains, so there is no plan to make before")
    seed = int(config.trainer.get("seed", 42))
    set_seed(seed)
    model, tokenizer = start_model(config, seed)
    try:
        batches = None
        if select.what.needs == "examples":
            trainer = _trainer(config, model, tokenizer)
            model = trainer.accelerator.unwrap_model(trainer.model)
            batches = trainer.selection_examples(select.examples, select.what.groups)
        elif config.model.adapter is not None:
            from peft import get_peft_model

            model = get_peft_model(model, build_peft_config(config.model.adapter, model))
        return select.what.select(model, round=select.round, batches=batches)
    except (ValueError, FloatingPointError) as error:
        raise RunError(f"selection: {error}") from error


def _trainer(config: RunConfig, model: Any, tokenizer: Any) -> Any:
    """Return the trainer whose examples the run would have; it writes nothing."""
    rows = render(load_data(config.data, config.task, hold_out=False).train, tokenizer, config.data)
    rows, _ = apply_length_policy(rows, tokenizer, config.data.max_prompt_tokens, config.data.over_length)
    peft = None if config.model.adapter is None else build_peft_config(config.model.adapter, model)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        args = trl_config(SFTConfig, config.trainer, run)
        return sft_trainer(run, args, model, tokenizer, rows, peft_config=peft, title="plan")

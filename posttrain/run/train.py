"""``posttrain train``: warm start, evaluation, training, evaluation, export, report.

Every step that is finished leaves a file in the run directory, and a resumed run goes on behind the last
of them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from posttrain.checkpointing.resume import newest_checkpoint
from posttrain.config.load import resolved_yaml
from posttrain.config.schema import RunConfig
from posttrain.data.length import apply_length_policy
from posttrain.data.load import LoadedData, load_data, load_warm_start
from posttrain.data.prompts import render
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.results import Evaluation, compare
from posttrain.export.card import card_of
from posttrain.export.export import export_model
from posttrain.export.push import push
from posttrain.models.adapter import build_peft_config
from posttrain.models.load import is_untrained, load_model
from posttrain.report import write_report
from posttrain.rewards.reward import Reward, build_rewards
from posttrain.run.directory import RunDirectory, write_json
from posttrain.run.manifest import build_manifest
from posttrain.run.trainers import grpo_trainer, sft_trainer

logger = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run left behind.

    Attributes:
        run_dir: The run directory.
        steps: Optimiser steps done.
        evaluation: Content of evaluation.json, or None without an ``evaluate`` section.
        export: Folder of the export, or None without an ``export`` section.
        report: The HTML report.
        pushed: Address on the Hub, or None.
    """

    run_dir: str
    steps: int
    report: str
    evaluation: dict[str, Any] | None = None
    export: str | None = None
    pushed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON, with the metrics of the evaluations but not their samples."""
        summary = {name: _summary(part) for name, part in (self.evaluation or {}).items() if part}
        return {**asdict(self), "evaluation": summary or None}

    def text(self) -> str:
        """Return the result for people."""
        lines = [f"run      {self.run_dir} ({self.steps} steps)"]
        difference = (self.evaluation or {}).get("difference")
        for name in ("before", "after"):
            metrics = ((self.evaluation or {}).get(name) or {}).get("metrics", {})
            shown = [f"{key} {_interval(value)}" for key, value in metrics.items() if key.startswith("pass@")]
            if shown:
                lines.append(f"{name:<8} {'  '.join(shown)}")
        if difference:
            shown = [
                f"{key} {_interval(value, signed=True)}"
                for key, value in difference["metrics"].items()
                if key.startswith("pass@")
            ]
            lines.append(f"change   {'  '.join(shown)}")
        lines += [f"export   {self.export}"] if self.export else []
        lines += [f"pushed   {self.pushed}"] if self.pushed else []
        return "\n".join([*lines, f"report   {self.report}"])


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False, command: str | None = None) -> RunResult:
    """Carry out a run.

    Args:
        config: The checked configuration.
        resume: Go on from the newest checkpoint in ``config.run_dir``.
        overwrite: Replace a run that is already there (it is kept as ``RUN.old``).
        command: What to write into the manifest as the command to repeat.

    Returns:
        Where everything is.

    Raises:
        posttrain.run.directory.RunError: The run directory does not fit the request.
    """
    return _Run(config, resume=resume, command=command, overwrite=overwrite).carry_out()


class _Run:
    """The steps of one run, in order, with what they share."""

    def __init__(self, config: RunConfig, *, resume: bool, overwrite: bool, command: str | None) -> None:
        self.config = config
        self.resume = resume
        self.command = command
        self.run = RunDirectory(Path(config.run_dir))
        self.console = Console(stderr=True)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        self.seed = int(config.trainer.get("seed", 42))
        if self.state.is_main_process:
            self.run.begin(resume=resume, overwrite=overwrite)
        self.state.wait_for_everyone()

    def carry_out(self) -> RunResult:
        config = self.config
        set_seed(self.seed)
        data = load_data(config.data, config.task, hold_out=config.evaluate is not None)
        model, self.tokenizer = load_model(config.model, seed=self.seed)
        train_rows = self._prepare("training", data.train)
        eval_rows = None if data.eval is None else self._prepare("held-out", data.eval)
        rewards = build_rewards(config.rewards, data)
        try:
            self._describe(data)
            model = self._warm_started(model, data)
            before = self._evaluated("before", model, eval_rows, rewards)
            trainer = self._trainer(model, train_rows, rewards)
            checkpoint = newest_checkpoint(self.run.checkpoints) if self.resume else None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trained = trainer.accelerator.unwrap_model(trainer.model)
            after = self._evaluated("after", trained, eval_rows, rewards)
        finally:
            for reward in rewards:
                reward.close()
        evaluation = self._compared(before, after)
        exported, pushed = self._exported(trained, train_rows)
        report = self.run.root / "report.html"
        if self.state.is_main_process:
            write_report(self.run.root, report)
        self.state.wait_for_everyone()
        return RunResult(
            run_dir=str(self.run.root),
            steps=trainer.state.global_step,
            report=str(report),
            evaluation=evaluation,
            export=exported,
            pushed=pushed,
        )

    # ---- steps ------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            self.console.print(text, highlight=False)

    def _prepare(self, name: str, rows: Dataset) -> Dataset:
        """Turn rows into prompts for this tokenizer and apply the length policy."""
        config = self.config.data
        rows = render(rows, self.tokenizer, config)
        rows, lengths = apply_length_policy(rows, self.tokenizer, config.max_prompt_tokens, config.over_length)
        self._say(
            f"{name}: {lengths.kept} rows, {lengths.column} length median {lengths.percentiles[50]}, "
            f"longest {lengths.longest} tokens" + (f", {lengths.over} over the limit left out" if lengths.over else "")
        )
        return rows

    def _describe(self, data: LoadedData) -> None:
        """Write down what is about to run."""
        if not self.state.is_main_process:
            return
        text = resolved_yaml(self.config)
        if self.resume and self.run.config.read_text() != text:
            self._say("note: the configuration differs from the one this run was started with")
        self.run.config.write_text(text)
        seeds = {"run": self.seed, "train": self.config.data.train.seed, "eval": self.config.data.eval.seed}
        manifest = build_manifest(
            self.config.model_dump(mode="json"), data=data.describe, seeds=seeds, command=self.command
        )
        if self.resume and self.run.manifest.exists():
            earlier = json.loads(self.run.manifest.read_text())
            manifest["resumed"] = [*earlier.get("resumed", []), manifest["time"]]
            manifest["time"] = earlier["time"]
        write_json(self.run.manifest, manifest)

    def _warm_started(self, model: Any, data: LoadedData) -> Any:
        """Supervised fine-tuning on the source's own answers, where the configuration asks for it."""
        warm, config = self.config.warm_start, self.config
        if warm is None:
            return model
        if warm.when == "untrained" and not is_untrained(config.model):
            self._say(f"no warm start: {config.model.path} is trained already (warm_start.when=always forces one)")
            return model
        run = self.run.warm_start
        if not run.model.exists():
            rows = self._prepare("warm start", load_warm_start(data, warm.size))
            fields = {"seed": self.seed, **warm.trainer}
            trainer = sft_trainer(run, fields, model, self.tokenizer, rows, title="warm start")
            checkpoint = newest_checkpoint(run.checkpoints) if self.resume else None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            partial = run.model.with_name("model.partial")
            trainer.save_model(str(partial))
            if self.state.is_main_process:
                self.tokenizer.save_pretrained(partial)
                os.replace(partial, run.model)
            self.state.wait_for_everyone()
        # read back: the policy then has an address, which adapters, references and cards refer to
        model, _ = load_model(config.model.model_copy(update={"path": str(run.model), "tokenizer": None}))
        return model

    def _trainer(self, model: Any, rows: Dataset, rewards: Sequence[Reward]) -> Any:
        config = self.config
        peft_config = build_peft_config(config.model.adapter, model) if config.model.adapter else None
        if config.task == "rlvr":
            return grpo_trainer(config, self.run, model, self.tokenizer, rows, rewards, peft_config=peft_config)
        return sft_trainer(self.run, config.trainer, model, self.tokenizer, rows, peft_config=peft_config)

    def _evaluated(
        self, when: str, model: Any, rows: Dataset | None, rewards: Sequence[Reward]
    ) -> Evaluation | None:
        """Evaluate on the held-out rows; the first reward decides what is correct."""
        settings = self.config.evaluate
        if settings is None or rows is None or not rewards or (when == "before" and not settings.before):
            return None
        done = self._read_evaluation().get(when) if self.resume else None
        if done:
            return Evaluation.from_dict(done)
        self._say(f"evaluating {when} training: {len(rows)} problems x {settings.samples} samples")
        limit = settings.max_new_tokens or self.config.trainer.get("max_completion_length", 512)
        device = self.state.device
        result = evaluate(
            model.to(device), self.tokenizer, rows, rewards[0].verify, settings, max_new_tokens=limit
        )
        if self.state.is_main_process:
            write_json(self.run.evaluation, {**self._read_evaluation(), when: result.to_dict()})
        self.state.wait_for_everyone()
        return result

    def _read_evaluation(self) -> dict[str, Any]:
        return json.loads(self.run.evaluation.read_text()) if self.run.evaluation.exists() else {}

    def _compared(self, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any] | None:
        if after is None:
            return None
        content: dict[str, Any] = {"before": before.to_dict() if before else None, "after": after.to_dict()}
        content["difference"] = compare(before, after).to_dict() if before else None
        if self.state.is_main_process:
            write_json(self.run.evaluation, content)
        return content

    def _exported(self, model: Any, rows: Dataset) -> tuple[str | None, str | None]:
        settings = self.config.export
        if settings is None:
            return None, None
        folder = Path(settings.dir) if settings.dir else self.run.export
        pushed = None
        if self.state.is_main_process:
            result = export_model(
                model,
                self.tokenizer,
                folder,
                format=settings.format,
                card=card_of(self.run),
                probe_texts=probe_texts(rows, self.tokenizer),
            )
            self._say(
                f"exported ({result.format}) to {folder}; reloaded logits differ by at most "
                f"{result.comparison.max_difference:.2g}"
            )
            if settings.push:
                pushed = push(folder, settings.push, private=settings.private)
                self._say(f"pushed to {pushed}")
        self.state.wait_for_everyone()
        return str(folder), pushed


def probe_texts(rows: Dataset, tokenizer: Any, count: int = 4) -> list[str]:
    """Return a few training texts, rendered, for the comparison of an export with the trained model."""
    column = next(name for name in ("prompt", "messages", "text") if name in rows.column_names)
    values = rows[:count][column]
    if isinstance(values[0], str):
        return values
    return [tokenizer.apply_chat_template(value, tokenize=False) for value in values]


def _interval(estimate: dict[str, Any], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def _summary(part: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without its per-problem records."""
    return {key: value for key, value in part.items() if key != "problems"}

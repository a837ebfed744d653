"""``posttrain train``: warm start, evaluation, training, evaluation, export, report.

Every step that is finished leaves a file in the run directory, and a resumed run goes on behind the last
of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.config.load import resolved_yaml
from posttrain.config.schema import RunConfig, WatchdogConfig
from posttrain.config.tasks import TASKS
from posttrain.data.length import apply_length_policy
from posttrain.data.load import LoadedData, load_data, load_warm_start
from posttrain.data.probe import load_probe
from posttrain.data.prompts import render
from posttrain.deep.tokens import token_text
from posttrain.evaluation.results import Evaluation, compare
from posttrain.export.push import preflight, push
from posttrain.models.adapter import build_peft_config
from posttrain.models.load import is_untrained, load_model
from posttrain.partitioned import whole_models
from posttrain.preference.lists import ListError
from posttrain.report import write_report
from posttrain.rewards.pool import VerifierStartError
from posttrain.rewards.reward import Reward, build_rewards
from posttrain.rollout.updates import RolloutError
from posttrain.run.directory import RunDirectory, RunError, write_json, write_text
from posttrain.run.evaluating import (
    can_evaluate,
    check_context,
    evaluate_model,
    evaluation_settings,
    fitting_pairs,
    reference_of,
)
from posttrain.run.held_out import HeldOutEvaluation
from posttrain.run.manifest import build_manifest
from posttrain.run.publish import publish
from posttrain.run.ranks import Ranks
from posttrain.run.result import RunResult
from posttrain.run.resuming import check_continuation, check_files
from posttrain.run.rewriting import Rewriting
from posttrain.run.starting import slow_here, start_model
from posttrain.run.status import record_end, write_status
from posttrain.run.trainers import (
    build_selection,
    grpo_trainer,
    pair_trainer,
    run_training,
    sft_trainer,
    trl_config,
)
from posttrain.selection.plan import PlanError
from posttrain.sft.s3ft import check_columns
from posttrain.sharding import RAM_EFFICIENT
from posttrain.watchdog import Limits, watching
from posttrain.watchdog.phases import LIMITS, chapter


def train(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, command: str | None = None
) -> RunResult:
    """Carry out a run.

    Args:
        config: The checked configuration.
        resume: Go on from the newest checkpoint in ``config.run_dir``.
        overwrite: Replace a run that is already there (it is kept as ``RUN.old``).
        command: What to write into the manifest as the command to repeat.

    Returns:
        Where everything is; the same on every rank.

    Raises:
        posttrain.run.directory.RunError: The run directory or a value in the configuration does not fit the
            request. So do ``DataError`` and ``ModelLoadError``; any other error is a run that failed.
    """
    run = RunDirectory(Path(config.run_dir).expanduser())
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = Ranks()
    hold_again: list[Callable[[], None]] = []
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            run.begin(resume=resume, overwrite=overwrite)
            hold_again.append(stack.enter_context(run.held()))

        def replace() -> None:
            if run.move_aside():
                hold_again[0]()

        ranks.on_main(begin)
        ranks.require_shared(run.root.absolute())
        clear = replace if overwrite else None
        job = _Run(config, run, ranks, resume=resume, command=command, clear=clear)
        try:
            with watching(
                run.watchdog,
                _limits(config),
                rank=ranks.state.process_index,
                world=ranks.state.num_processes,
                checkpoints=run.checkpoints,
                go_on="go on with --resume",
            ):
                result = job.carry_out()
        except BaseException as error:
            if job.described:  # a request that was refused leaves the folder as it was
                record_end(run, error, rank=ranks.state.process_index)
            raise
        if ranks.state.is_main_process:
            write_status(run, "finished")
        return result


def _limits(config: RunConfig) -> Limits | None:
    section = config.watchdog or WatchdogConfig()
    if not section.enabled:
        return None
    return Limits(section.silence, section.collective, {name: getattr(section, name) for name in LIMITS})


class _Run:
    """The steps of one run, in order, with what they share."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        ranks: Ranks,
        *,
        resume: bool,
        command: str | None,
        clear: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.run, self.ranks = config, run, ranks
        self.resume, self.command, self.clear = resume, command, clear
        self.say, self.on_main = ranks.say, ranks.on_main
        self.seed = int(config.trainer.get("seed", 42))
        self.described = False

    def carry_out(self) -> RunResult:
        config = self.config
        chapter("loading")
        set_seed(self.seed)
        if (
            RAM_EFFICIENT in os.environ
        ):  # a run evaluates and plans before it shards: every rank needs weights
            os.environ[RAM_EFFICIENT] = "false"
        rewards: Sequence[Reward] = ()
        try:
            # what can be refused is refused before anything is written or computed
            self.on_main(self._check_files)
            self.on_main(self._check_push)
            if (warning := slow_here(config)) is not None:  # before a large model is downloaded
                self.say(warning)
            data = load_data(config.data, config.task, hold_out=self._wants_held_out_rows())
            if TASKS[config.task].pairs:
                for note in data.describe["notes"]:
                    self.say(f"data: {note}")
            rewards = self._rewards(data)
            self.args, self.warm_args = self._arguments(rewards), self._warm_start_arguments()
            with whole_models():
                model, self.tokenizer = start_model(config, self.seed)
            self._peft_config(model)
            train_rows, _ = self._prepare("training", data.train, model)
            held_out, longest = (None, 0)
            if data.eval is not None:
                held_out, longest = self._prepare("held-out", data.eval, model)
            probe = load_probe(config.data, data.train)
            self.probe = None if probe is None else render(probe, self.tokenizer, config.data)
            if config.evaluate is not None and can_evaluate(config):
                check_context(config, model, longest)
            if config.s3ft is not None:
                check_columns(train_rows.column_names)
            self.on_main(lambda: self._describe(data))
            self.described = True
            model = self._warm_started(model, data)
            if config.s3ft is not None:
                chapter("generation")
                job = Rewriting(config.s3ft, model, self.tokenizer, rewards[0], self.run.s3ft, self.ranks)
                with whole_models():
                    train_rows = job.carry_out(train_rows)
            with whole_models():
                before = self._evaluated("before", 0, model, held_out, rewards)
            chapter("loading")
            trainer = self._trainer(model, train_rows, held_out, rewards, before)
            self._train(trainer)
            self.on_main(lambda: self._keep_methods(trainer))
            steps = trainer.state.global_step
            if trainer.selection is not None:
                last = trainer.selection.plan
                self.on_main(lambda: last.save(self.run.selection))
            if TASKS[self.config.task].generates:
                trainer.end_rollouts()
            trained = trainer.plain_model()
            after = self._evaluated("after", steps, trained, held_out, rewards, start=before)
        finally:
            for reward in rewards:
                reward.close()
        chapter("export")
        evaluation = self.on_main(lambda: self._compared(before, after, steps))
        exported = self.on_main(lambda: self._exported(trained, train_rows))
        self.on_main(lambda: write_report(self.run.root, self.run.report))
        pushed = self.on_main(lambda: self._pushed(exported))  # last: all else is done, whatever comes of it
        return RunResult(
            run_dir=str(self.run.root),
            steps=steps,
            report=str(self.run.report),
            evaluation=evaluation,
            export=exported.get("folder"),
            pushed=pushed,
        )

    # ---- before anything is written ---------------------------------------------------------------------

    def _check_files(self) -> None:
        if self.resume:
            check_files(self.run)

    def _check_push(self) -> None:
        settings = self.config.export
        if settings is not None and settings.push is not None:
            preflight(settings.push, private=settings.private)

    def _wants_held_out_rows(self) -> bool:
        return self.config.evaluate is not None or self.config.trainer.get("eval_strategy", "no") != "no"

    def _rewards(self, data: LoadedData) -> Sequence[Reward]:
        try:
            return build_rewards(self.config.rewards, data)
        except (ValueError, VerifierStartError) as error:
            raise RunError(str(error)) from error

    def _arguments(self, rewards: Sequence[Reward]) -> Any:
        if TASKS[self.config.task].generates:
            # a vote takes the place of all rewards: the weight of the one behind the metrics is not its own
            weights = None if self.config.task == "ttrl" else [reward.weight for reward in rewards]
            return trl_config(GRPOConfig, self.config.trainer, self.run, reward_weights=weights)
        kinds: dict[str, type] = {"preference": DPOConfig, "reward": RewardConfig}
        return trl_config(kinds.get(self.config.task, SFTConfig), self.config.trainer, self.run)

    def _warm_start_arguments(self) -> Any:
        """Return the arguments of the warm start, or None when there is none."""
        warm, model = self.config.warm_start, self.config.model
        if warm is None:
            return None
        if warm.when == "untrained" and not is_untrained(model):
            self.say(f"no warm start: {model.path} is trained already (warm_start.when=always forces one)")
            return None
        return trl_config(SFTConfig, {"seed": self.seed, **warm.trainer}, self.run.warm_start)

    def _peft_config(self, model: Any) -> Any:
        if self.config.model.adapter is None:
            return None
        try:
            return build_peft_config(self.config.model.adapter, model)
        except ValueError as error:
            raise RunError(f"model.{error}") from error

    def _prepare(self, name: str, rows: Dataset, model: Any) -> tuple[Dataset, int]:
        """Turn rows into prompts for this tokenizer and apply the length policy; also return the longest."""
        config = self.config.data
        rows = render(rows, self.tokenizer, config)
        rows, lengths = apply_length_policy(
            rows, self.tokenizer, config.max_prompt_tokens, config.over_length
        )
        left_out = f", {lengths.over} over the limit left out" if lengths.over else ""
        self.say(
            f"{name}: {lengths.kept} rows, {lengths.column} length median {lengths.percentiles[50]}, "
            f"longest {lengths.longest} tokens{left_out}"
        )
        if TASKS[self.config.task].pairs:
            rows, counts, longest = fitting_pairs(self.config, rows, model, self.tokenizer)
            self.say(f"{name}: {counts}")
            return rows, longest
        return rows, lengths.longest_kept if lengths.column == "prompt" else 0

    def _describe(self, data: LoadedData) -> None:
        """Write down what is about to run."""
        config = self.config
        seeds = {"run": self.seed, "train": config.data.train.seed, "eval": config.data.eval.seed}
        manifest = build_manifest(
            config.model_dump(mode="json"), data=data.describe, seeds=seeds, command=self.command
        )
        if self.resume:
            for change in check_continuation(self.run, config, data.fingerprint):
                self.say(f"note: {change}")
            if self.run.manifest.exists():
                earlier = json.loads(self.run.manifest.read_text(encoding="utf-8"))
                again = {"time": manifest["time"], "command": manifest["command"]}
                manifest |= {key: earlier[key] for key in ("time", "command")}
                manifest["resumed"] = [*earlier.get("resumed", []), again]
        if self.clear is not None:
            self.clear()
        write_text(self.run.config, resolved_yaml(config))
        write_json(self.run.manifest, manifest)
        write_status(self.run, "running")

    # ---- steps ------------------------------------------------------------------------------------------

    def _warm_started(self, model: Any, data: LoadedData) -> Any:
        """Supervised fine-tuning on the source's own answers, where the configuration asks for it."""
        warm, config, run = self.config.warm_start, self.config, self.run.warm_start
        if warm is None or self.warm_args is None:
            return model
        if not run.model.exists():
            rows, _ = self._prepare("warm start", load_warm_start(data, warm.size), model)
            trainer = sft_trainer(run, self.warm_args, model, self.tokenizer, rows, title="warm start")
            run_training(trainer, newest_checkpoint(run.checkpoints) if self.resume else None)
            self._keep_model(trainer, run.model)
        # read back: the policy then has an address, which adapters, references and cards refer to
        path = str(run.model.resolve())
        settings = config.model.model_copy(update={"path": path, "tokenizer": None, "revision": None})
        with whole_models():
            return load_model(settings)[0]

    def _keep_methods(self, trainer: Any) -> None:
        """Write down what methods trained beside the model, and what they show of a few responses."""
        if self.config.task != "preference":
            return
        trainer.save_modules(self.run.modules)
        pictures = [
            {
                "method": method.name,
                "title": picture.title,
                "step": trainer.state.global_step,
                "tokens": [token_text(self.tokenizer, token) for token in picture.ids],
                "values": picture.values,
            }
            for method in trainer.methods
            for picture in method.pictures()
        ]
        if pictures:
            write_json(self.run.pictures, {"pictures": pictures})

    def _keep_model(self, trainer: Any, to: Path) -> None:
        partial = to.with_name(f"{to.name}.partial")
        trainer.save_model(str(partial))

        def keep() -> None:
            self.tokenizer.save_pretrained(partial)
            partial.replace(to)

        self.on_main(keep)

    def _trainer(
        self,
        model: Any,
        rows: Dataset,
        held_out: Dataset | None,
        rewards: Sequence[Reward],
        start: Evaluation | None,
    ) -> Any:
        options = {
            "held_out": held_out,
            "peft_config": self._peft_config(model),
            "watchers": self._watchers(held_out, rewards, start),
        }
        try:
            options["selection"] = build_selection(self.config.selection)
            if TASKS[self.config.task].generates:
                trainer: Any = grpo_trainer(
                    self.config, self.run, self.args, model, self.tokenizer, rows, rewards, **options
                )
            elif TASKS[self.config.task].pairs:
                trainer = pair_trainer(
                    self.config,
                    self.run,
                    self.args,
                    model,
                    self.tokenizer,
                    rows,
                    probe=self.probe,
                    **options,
                )
            else:
                trainer = sft_trainer(
                    self.run, self.args, model, self.tokenizer, rows, methods=self.config.methods, **options
                )
        except PlanError as error:
            raise RunError(f"selection: {error}") from error
        except ListError as error:
            raise RunError(f"data: {error}") from error
        except RolloutError as error:
            raise RunError(f"trainer.use_vllm: {error}") from error
        self._keep_plan(trainer)
        return trainer

    def _keep_plan(self, trainer: Any) -> None:
        selection = trainer.selection
        if selection is None:
            return
        plan = selection.plan
        end = trainer.selected_in_the_end
        count = plan.count if end is None else end
        self.say(
            f"selection {plan.method}: {count:,} of {plan.numel:,} weights train "
            f"({count / plan.numel:.2%}){'' if end is None else ' in the end'}, backend {selection.backend}"
        )
        self.on_main(lambda: plan.save(self.run.selection))

    def _watchers(
        self, rows: Dataset | None, rewards: Sequence[Reward], start: Evaluation | None
    ) -> list[TrainerCallback]:
        """Return what evaluates on the held-out rows during training, if the configuration asks for it."""
        settings = self.config.evaluate
        if settings is None or settings.every is None or rows is None or not can_evaluate(self.config):
            return []
        judge = next(iter(rewards), None)

        def measure(model: Any) -> Evaluation:
            reference = reference_of(self.config, model)
            return evaluate_model(
                self.config,
                model,
                self.tokenizer,
                rows,
                judge,
                reference=reference,
                start=start,
                progress=False,
            )

        return [HeldOutEvaluation(settings.every, measure)]

    def _train(self, trainer: Any) -> None:
        checkpoint = newest_checkpoint(self.run.checkpoints) if self.resume else None
        if checkpoint is not None:
            self.say(f"going on from {checkpoint.name}")
        elif self.resume:
            self.say("no checkpoint was written yet: training starts at step 0")
        self.on_main(lambda: shutil.rmtree(self.run.finished_model, ignore_errors=True))
        run_training(trainer, checkpoint)
        if getattr(trainer, "finished", False):
            self._keep_model(trainer, self.run.finished_model)

    def _evaluated(
        self,
        when: str,
        steps: int,
        model: Any,
        rows: Dataset | None,
        rewards: Sequence[Reward],
        *,
        start: Evaluation | None = None,
    ) -> Evaluation | None:
        """Evaluate on the held-out rows; the first reward decides what is correct."""
        settings = self.config.evaluate
        if settings is None or rows is None or not can_evaluate(self.config):
            return None
        if when == "before" and not settings.before:
            return None
        done = self._stored(when, steps)
        if done is not None:
            return done
        what = f"{len(rows)} {'pairs' if TASKS[self.config.task].pairs else 'problems'}"
        what += "" if TASKS[self.config.task].scores else f" x {settings.samples} samples"
        self.say(f"evaluating {when} training: {what}")
        chapter("evaluation")
        result = evaluate_model(
            self.config,
            model,
            self.tokenizer,
            rows,
            next(iter(rewards), None),
            reference=None if when == "before" else reference_of(self.config, model),
            start=start,
        )

        def store() -> None:
            stored = self._read_evaluation()
            stored |= {when: result.to_dict(), "steps": {**stored.get("steps", {}), when: steps}}
            write_json(self.run.evaluation, stored)

        self.on_main(store)
        return result

    def _stored(self, when: str, steps: int) -> Evaluation | None:
        """Return an evaluation made before the run was stopped, if it is of this model and these settings."""
        if not self.resume:
            return None
        stored = self._read_evaluation()
        part = stored.get(when)
        if part is None or stored.get("steps", {}).get(when) != steps:
            return None
        # as JSON has them
        wanted = json.loads(json.dumps(evaluation_settings(self.config)))
        return Evaluation.from_dict(part) if part["settings"] == wanted else None

    def _read_evaluation(self) -> dict[str, Any]:
        if not self.run.evaluation.exists():
            return {}
        content: dict[str, Any] = json.loads(self.run.evaluation.read_text(encoding="utf-8"))
        return content

    def _compared(
        self, before: Evaluation | None, after: Evaluation | None, steps: int
    ) -> dict[str, Any] | None:
        if after is None:
            return None
        content = {
            "before": before.to_dict() if before else None,
            "after": after.to_dict(),
            "difference": compare(before, after).to_dict() if before else None,
            "steps": {"before": 0, "after": steps},
        }
        write_json(self.run.evaluation, content)
        return content

    def _exported(self, model: Any, rows: Dataset) -> dict[str, Any]:
        settings = self.config.export
        if settings is None:
            return {}
        done = publish(
            model,
            self.tokenizer,
            Path(settings.dir).expanduser() if settings.dir else self.run.export,
            run=self.run,
            format=settings.format,
            pushing=settings.push is not None,
            probe_texts=probe_texts(rows, self.tokenizer),
        )
        self.say(
            f"exported ({done['format']}) to {done['folder']}; reloaded logits differ by at most "
            f"{done['max_difference']:.2g}"
        )
        return done

    def _pushed(self, exported: dict[str, Any]) -> str | None:
        settings = self.config.export
        if settings is None or settings.push is None:
            return None
        address = push(exported["folder"], settings.push, private=settings.private)
        self.say(f"pushed to {address}")
        return address


def probe_texts(rows: Dataset, tokenizer: Any, count: int = 4) -> list[str]:
    """Return a few training texts, rendered, for the comparison of an export with the trained model."""
    column = next(name for name in ("prompt", "messages", "text") if name in rows.column_names)
    values = rows[:count][column]
    if isinstance(values[0], str):
        return list(values)
    return [tokenizer.apply_chat_template(value, tokenize=False) for value in values]

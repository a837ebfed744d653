"""How trainer fields go together: batch arithmetic, pairs that exclude or need each other.

Each rule looks at the merged fields (as written, defaults elsewhere) and yields problems. A rule fires only
when at least one of the fields it is about was written, so that defaults are never blamed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from posttrain.config.launch import processes
from posttrain.config.problems import KeyPath, Problem
from posttrain.config.tasks import TaskSpec
from posttrain.config.upstream import installed
from posttrain.config.vllm_rules import vllm_problems

# modules a tracker can be had from, any of which will do
_TRACKERS = {
    name: (name,)
    for name in (
        "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "trackio",
        "wandb",
    )
} | {"tensorboard": ("tensorboard", "tensorboardX")}  # fmt: skip
DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses of the difference of two rewards, for which divergences other than the reverse KL are defined."""

_MIN_LR_SCHEDULES = {"cosine_with_min_lr", "cosine_warmup_with_min_lr"}


def rule_problems(
    fields: Mapping[str, Any],
    written: AbstractSet[str],
    broken: AbstractSet[str],
    spec: TaskSpec,
    at: KeyPath,
    *,
    adapter: bool,
) -> Iterator[Problem]:
    """Yield what does not go together.

    Args:
        fields: Every field of the class with its value.
        written: The fields that the configuration gives, with a valid value.
        broken: The fields that the configuration gives with an invalid value; a default stands in for them,
            and no rule that looked at one is told.
        spec: The task.
        at: Where the section sits.
        adapter: Whether a PEFT adapter is trained.
    """
    rules = _Rules(fields, written, at)
    found = [*rules.common()]
    if spec.generates:
        found += [*rules.batch(), *rules.objective(adapter), *rules.generation(), *vllm_problems(rules)]
    elif spec.pairs:
        found += [] if spec.scores else rules.preference(adapter)
    else:
        found += rules.supervised()
    for problem in found:
        # the message of a rule names every field it looked at
        if not broken & set(re.findall(r"\w+", problem.message)):
            yield problem


class _Rules:
    def __init__(self, fields: Mapping[str, Any], written: AbstractSet[str], at: KeyPath) -> None:
        self.fields, self.written, self.at = fields, written, at

    def __getitem__(self, name: str) -> Any:
        return self.fields.get(name)

    def problem(
        self, name: str, message: str, fix: str | None = None, *, warn: bool = False, **more: Any
    ) -> Problem:
        """Return a problem that points at the first written field among ``name`` and ``more['fields']``."""
        names = (name, *more.pop("fields", ()))
        name = next((n for n in names if n in self.written), name)
        return Problem(message, (*self.at, name), "warning" if warn else "error", suggestion=fix, **more)

    def common(self) -> Iterator[Problem]:
        if self["fp16"] and self["bf16"]:
            yield self.problem("fp16", "fp16 and bf16 are both true", "keep one of them")
        if self["fp16_full_eval"] and self["bf16_full_eval"]:
            yield self.problem(
                "fp16_full_eval", "fp16_full_eval and bf16_full_eval are both true", "keep one of them"
            )
        yield from self.schedule()
        workers = self["dataloader_num_workers"]
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if self[name] and workers == 0:
                yield self.problem(
                    name,
                    f"{name} needs dataloader_num_workers above 0, found 0",
                    "set dataloader_num_workers",
                )
        alike = self["eval_strategy"] == self["save_strategy"]
        if self["load_best_model_at_end"] and self["save_strategy"] != "best" and not alike:
            yield self.problem(
                "load_best_model_at_end",
                "load_best_model_at_end needs save_strategy and eval_strategy to be equal, found "
                f"{self['save_strategy']!r} and {self['eval_strategy']!r}",
                f"set eval_strategy: {self['save_strategy']}",
            )
        trackers = [self["report_to"]] if isinstance(self["report_to"], str) else self["report_to"] or []
        for tracker in trackers:
            packages = _TRACKERS.get(tracker, ())
            if packages and not any(installed(package) for package in packages):
                yield self.problem(
                    "report_to",
                    f"report_to: {tracker} needs the package {packages[0]}, which is not installed",
                    f"pip install {packages[0]}, or report_to: none",
                )
        for switch, package, how in (
            ("deepspeed", "deepspeed", "pip install 'posttrain[deepspeed]'"),
            ("use_liger_kernel", "liger_kernel", "pip install liger-kernel"),
        ):
            if self[switch] and not installed(package):
                yield self.problem(
                    switch, f"{switch} needs the package {package}, which is not installed", how
                )
        for name in ("deepspeed", "fsdp_config", "accelerator_config"):
            value = self[name]
            if isinstance(value, str) and not value.startswith("{") and not Path(value).is_file():
                yield self.problem(name, f"{name} names a JSON file that does not exist", found=value)

    def schedule(self) -> Iterator[Problem]:
        kind = self["lr_scheduler_type"]
        options = self["lr_scheduler_kwargs"] if isinstance(self["lr_scheduler_kwargs"], dict) else {}
        if kind in _MIN_LR_SCHEDULES and ("min_lr" in options) == ("min_lr_rate" in options):
            yield self.problem(
                "lr_scheduler_type",
                f"{kind} needs exactly one of min_lr and min_lr_rate in lr_scheduler_kwargs",
                "lr_scheduler_kwargs: {min_lr_rate: 0.1}",
            )
        if kind == "warmup_stable_decay" and "num_decay_steps" not in options:
            yield self.problem(
                "lr_scheduler_type",
                f"{kind} needs num_decay_steps in lr_scheduler_kwargs",
                "lr_scheduler_kwargs: {num_decay_steps: 100}",
            )
        if kind in {"reduce_lr_on_plateau", "greedy"} and self["eval_strategy"] == "no":
            yield self.problem(
                "lr_scheduler_type",
                f"{kind} follows the evaluation loss, but eval_strategy is 'no'",
                "set eval_strategy: steps",
            )
        warmup, total = self["warmup_steps"], self["max_steps"]
        if total > 0 and warmup >= total:
            yield self.problem(
                "warmup_steps",
                f"warmup_steps={warmup:g} reaches past max_steps={total}: learning_rate is never reached",
                "lower warmup_steps; a value below 1 is a share of all steps",
                warn=True,
                fields=("max_steps",),
            )

    def batch(self) -> Iterator[Problem]:
        """The generation batch has to hold whole groups."""
        per_device, ranks = self["per_device_train_batch_size"], processes()
        size, steps, group = (
            self["generation_batch_size"],
            self["steps_per_generation"],
            self["num_generations"],
        )
        if size is not None and steps is not None:
            yield self.problem(
                "generation_batch_size",
                f"generation_batch_size={size} and steps_per_generation={steps} say the same thing twice",
                "keep one of them",
            )
            return
        step = per_device * ranks
        on = f" * {ranks} processes" if ranks > 1 else ""
        if size is not None:
            if size % step:
                yield self.problem(
                    "generation_batch_size",
                    f"generation_batch_size={size} is not a multiple of the batch of one step: "
                    f"per_device_train_batch_size={per_device}{on} = {step}",
                    f"set generation_batch_size: {_near_multiple(size, step)}",
                )
            if size % group:
                yield self.problem(
                    "generation_batch_size",
                    f"generation_batch_size={size} does not hold whole groups of num_generations={group}",
                    f"set generation_batch_size: {_near_multiple(size, group)}",
                )
        else:
            source = "steps_per_generation" if steps is not None else "gradient_accumulation_steps"
            steps = steps if steps is not None else self["gradient_accumulation_steps"]
            total = step * steps
            if total % group:
                yield self.problem(
                    "num_generations",
                    "the generation batch does not hold whole groups: "
                    f"per_device_train_batch_size={per_device} * {source}={steps}{on} = {total}, "
                    f"not a multiple of num_generations={group}",
                    _batch_fix(step, steps, group, source),
                    fields=("per_device_train_batch_size", source),
                )
        if self["auto_find_batch_size"]:
            yield self.problem(
                "auto_find_batch_size",
                "auto_find_batch_size would break groups apart",
                "leave it out and lower per_device_train_batch_size",
            )
        if self["eval_strategy"] != "no":
            per_eval, wanted = self["per_device_eval_batch_size"], self["num_generations_eval"] or group
            if per_eval * ranks % wanted:
                name = "num_generations_eval" if self["num_generations_eval"] else "num_generations"
                yield self.problem(
                    "per_device_eval_batch_size",
                    "the evaluation batch does not hold whole groups: "
                    f"per_device_eval_batch_size={per_eval}{on} is not a multiple of {name}={wanted}",
                    f"set per_device_eval_batch_size: {_near_multiple(per_eval, wanted)}",
                    fields=("eval_strategy",),
                )

    def objective(self, adapter: bool) -> Iterator[Problem]:
        loss, level = self["loss_type"], self["importance_sampling_level"]
        low, high = self["entropy_coef_min"], self["entropy_coef_max"]
        if low > high:
            yield self.problem(
                "entropy_coef_min",
                f"entropy_coef_min={low:g} is above entropy_coef_max={high:g}",
                "swap them, or raise entropy_coef_max",
                needed=f"at most entropy_coef_max={high:g}",
                fields=("entropy_coef_max",),
            )
        if self["sync_ref_model"] and self["beta"] == 0:
            yield self.problem(
                "sync_ref_model",
                "sync_ref_model=true with beta=0 has no reference model to move",
                "set beta above 0, or sync_ref_model: false",
                fields=("beta",),
            )
        if self["sync_ref_model"] and adapter:
            yield self.problem(
                "sync_ref_model",
                "sync_ref_model=true does not go with model.adapter: the reference is the bare base model",
                "set sync_ref_model: false, or train all weights",
            )
        delta, epsilon = self["delta"], self["epsilon"]
        if delta is not None and delta <= 1 + epsilon:
            yield self.problem(
                "delta",
                f"delta={delta:g} caps the ratio below the clip range 1 + epsilon = {1 + epsilon:g}",
                f"set delta above {1 + epsilon:g}",
                warn=True,
            )
        if loss == "luspo" and level != "sequence":
            yield self.problem(
                "loss_type",
                f"luspo is defined on sequences, found importance_sampling_level={level!r}",
                "set importance_sampling_level: sequence",
                warn=True,
            )
        if loss == "vespo" and level != "token":
            yield self.problem(
                "importance_sampling_level",
                "vespo builds its own sequence weights from tokens",
                "set importance_sampling_level: token",
                warn=True,
            )
        if level == "sequence" and loss in {"bnpo", "dr_grpo", "dapo", "cispo"}:
            yield self.problem(
                "importance_sampling_level",
                f"{loss} sums over tokens, so long completions weigh more than in GSPO",
                "set loss_type: grpo for GSPO",
                warn=True,
            )

    def generation(self) -> Iterator[Problem]:
        if self["log_completions_hub_repo"] is not None and not self["log_completions"]:
            yield self.problem(
                "log_completions_hub_repo",
                "log_completions_hub_repo needs log_completions",
                "set log_completions: true",
            )
        low, high = self["vllm_importance_sampling_clip_min"], self["vllm_importance_sampling_clip_max"]
        mode = self["vllm_importance_sampling_mode"]
        if low is not None and high is not None and low >= high:
            yield self.problem(
                "vllm_importance_sampling_clip_min",
                f"vllm_importance_sampling_clip_min={low:g} is not below "
                f"vllm_importance_sampling_clip_max={high:g}",
                fields=("vllm_importance_sampling_clip_max",),
            )
        if not self["vllm_importance_sampling_correction"]:
            return
        if mode.endswith("_truncate") and low is None and high is None:
            yield self.problem(
                "vllm_importance_sampling_mode",
                f"{mode} needs a bound",
                "set vllm_importance_sampling_clip_max",
                fields=("vllm_importance_sampling_clip_max",),
            )
        if self["loss_type"] == "vespo" and self["use_vllm"] and not mode.startswith("token_"):
            yield self.problem(
                "vllm_importance_sampling_mode",
                "vespo with vLLM corrects per token",
                found=mode,
                needed="one of token_truncate, token_mask",
                fields=("loss_type",),
            )

    def preference(self, adapter: bool) -> Iterator[Problem]:
        """TRL's own conditions, most of which it only states when the model is loaded."""
        losses = self["loss_type"] if isinstance(self["loss_type"], list) else [self["loss_type"]]
        if not losses:
            yield self.problem("loss_type", "loss_type is an empty list", "leave it out for sigmoid")
        twice = [name for name in dict.fromkeys(losses) if losses.count(name) > 1]
        if twice:
            yield self.problem("loss_type", f"loss_type has {twice[0]} twice", "add up its loss_weights")
        weights = self["loss_weights"]
        if weights is not None and len(weights) != len(losses):
            yield self.problem(
                "loss_weights",
                f"loss_weights has {len(weights)} numbers for {len(losses)} of loss_type "
                f"({', '.join(losses)})",
                f"give {len(losses)}",
                fields=("loss_type",),
            )
        smoothing, divergence = self["label_smoothing"], self["f_divergence_type"]
        if "exo_pair" in losses and smoothing == 0:
            yield self.problem(
                "label_smoothing",
                "loss_type exo_pair needs label_smoothing above 0, found 0",
                "set label_smoothing: 0.001, the value of its paper",
                fields=("loss_type",),
            )
        if "robust" in losses and smoothing >= 0.5:
            yield self.problem(
                "label_smoothing",
                f"loss_type robust takes label_smoothing for the share of wrong labels, found {smoothing:g}",
                "set it below 0.5, for example 0.1",
                needed="at least 0 and below 0.5",
            )
        if smoothing and not {"exo_pair", "robust", "aot", "aot_unpaired"} & set(losses):
            yield self.problem(
                "label_smoothing",
                f"label_smoothing does nothing with loss_type {', '.join(losses)}",
                "set loss_type: robust, or drop it",
                warn=True,
            )
        wrong = [name for name in losses if name not in DIVERGENCE_LOSSES]
        if divergence != "reverse_kl" and wrong:
            yield self.problem(
                "f_divergence_type",
                f"f_divergence_type {divergence} is not defined for loss_type {', '.join(wrong)}",
                f"use f_divergence_type: reverse_kl, or one of {', '.join(DIVERGENCE_LOSSES)}",
                fields=("loss_type",),
            )
        for name, needs, on in (
            (
                "f_alpha_divergence_coef",
                "f_divergence_type: alpha_divergence",
                divergence == "alpha_divergence",
            ),
            ("discopop_tau", "loss_type: discopop", "discopop" in losses),
            ("ref_model_mixup_alpha", "sync_ref_model: true", self["sync_ref_model"]),
            ("ref_model_sync_steps", "sync_ref_model: true", self["sync_ref_model"]),
            ("precompute_ref_batch_size", "precompute_ref_log_probs: true", self["precompute_ref_log_probs"]),
        ):
            if name in self.written and not on:
                yield self.problem(
                    name, f"{name} does nothing without {needs}", f"set {needs}, or drop it", warn=True
                )
        if self["use_weighting"] and {"aot", "aot_unpaired"} & set(losses):
            yield self.problem(
                "use_weighting",
                "use_weighting weighs pairs, and loss_type aot sorts them apart",
                "set use_weighting: false, or another loss_type",
                fields=("loss_type",),
            )
        if self["sync_ref_model"] and self["precompute_ref_log_probs"]:
            yield self.problem(
                "precompute_ref_log_probs",
                "precompute_ref_log_probs keeps the numbers of one reference, and sync_ref_model moves it",
                "set one of them to false",
                fields=("sync_ref_model",),
            )
        if self["sync_ref_model"] and adapter:
            yield self.problem(
                "sync_ref_model",
                "sync_ref_model=true does not go with model.adapter: the reference is the bare base model",
                "set sync_ref_model: false, or train all weights",
            )
        if self["padding_free"]:
            yield self.problem(
                "padding_free",
                "padding_free is switched off in this version of TRL's DPOTrainer: batches are padded",
                "set padding_free: false",
                warn=True,
            )

    def supervised(self) -> Iterator[Problem]:
        if self["padding_free"] and not self["packing"] and self["max_length"] is not None:
            yield self.problem(
                "padding_free",
                "padding_free without packing does not enforce max_length",
                "set packing: true, or max_length: null",
            )
        if self["packing"] and self["max_length"] is None:
            yield self.problem(
                "packing",
                "packing fills blocks of max_length tokens, but max_length is null",
                "set max_length",
                fields=("max_length",),
            )


def _near_multiple(number: int, unit: int) -> int:
    return max((number + unit // 2) // unit, 1) * unit


def _batch_fix(step: int, steps: int, group: int, source: str) -> str:
    """Name the nearest group size, and the next number of steps, that make groups whole."""
    total = step * steps
    near = (size for gap in range(1, 1000) for size in (group + gap, group - gap) if 2 <= size <= total)
    size = next((size for size in near if total % size == 0), None)
    options = [] if size is None else [f"num_generations: {size}"]
    unit = group // math.gcd(step, group)
    options.append(f"{source}: {-(-steps // unit) * unit}")
    return "set " + ", or ".join(options)

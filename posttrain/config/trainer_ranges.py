"""Which values each trainer field may have.

TRL and transformers check few of them, and many only after the model is loaded and a batch generated, or
never. Rules go by field name and hold for every task; :func:`rule_for` adds the choices that differ by
task. What TRL's own source lists (``choices`` in its metadata, enumerations) is read from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from posttrain.config.annotations import describe_type
from posttrain.config.problems import show
from posttrain.config.upstream import SourceField, dict_keys, enum_values


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; ``also`` lists values allowed outside of it."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    also: tuple[Any, ...] = ()
    nullable: bool = True
    note: str = ""

    def allows(self, value: Any) -> bool:
        """Return whether a value of the right type is in the range."""
        if value in self.also and not isinstance(value, bool):
            return True
        if value is None:
            return self.nullable
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True  # text where the type allows it, such as pad_to_multiple_of: auto
        if self.low is not None and (value <= self.low if self.open_low else value < self.low):
            return False
        return self.high is None or not (value >= self.high if self.open_high else value > self.high)

    def describe(self) -> str:
        """Return the range in words."""
        bounds = []
        if self.low is not None:
            bounds.append(f"{'above' if self.open_low else 'at least'} {show(self.low)}")
        if self.high is not None:
            bounds.append(f"{'below' if self.open_high else 'at most'} {show(self.high)}")
        text = " and ".join(bounds)
        if self.also:
            text += ", or " + ", ".join(show(value) for value in self.also)
        return text + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Every:
    """A step interval: a whole number of steps, or a share of all steps below 1."""

    zero: bool = False
    nullable: bool = True

    def allows(self, value: Any) -> bool:
        """Return whether a value of the right type is an interval."""
        if value is None:
            return self.nullable
        if value == 0:
            return self.zero
        return 0 < value < 1 or (value >= 1 and math.isfinite(value) and value == int(value))

    def describe(self) -> str:
        """Return the rule in words."""
        return f"{'0, ' if self.zero else ''}a whole number of steps, or a share of all steps between 0 and 1"


@dataclass(frozen=True)
class Choices:
    """One of a list of values."""

    values: tuple[Any, ...]
    many: bool = False

    def allows(self, value: Any) -> bool:
        """Return whether a value is listed; each entry of it when a list may be given."""
        if self.many and isinstance(value, list):
            return all(self.allows(item) for item in value)
        return any(type(value) is type(choice) and value == choice for choice in self.values)

    def describe(self) -> str:
        """Return the values, comma-separated."""
        listed = ", ".join(
            choice if isinstance(choice, str) and choice else show(choice) for choice in self.values
        )
        return f"one of {listed}" + (", or a list of them" if self.many else "")


Rule = Range | Every | Choices

_COUNT = Range(low=1)
_COUNT_NEEDED = Range(low=1, nullable=False)
_ZERO_UP = Range(low=0)
_ABOVE_ZERO = Range(low=0, open_low=True)
_SHARE = Range(low=0, high=1)
_PORT = Range(low=1, high=65535)

GRPO_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
DPO_LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical")

_RULES: dict[str, Rule] = {
    # length of training and optimiser
    "num_train_epochs": _ABOVE_ZERO,
    "max_steps": Range(low=1, also=(-1,), note="-1: as many as num_train_epochs asks for"),
    "learning_rate": Range(low=0, high=10, open_low=True),
    "weight_decay": _ZERO_UP,
    "adam_beta1": Range(low=0, high=1, open_high=True),
    "adam_beta2": Range(low=0, high=1, open_high=True),
    "adam_epsilon": _ABOVE_ZERO,
    "max_grad_norm": Range(low=0, note="0 switches clipping off"),
    "label_smoothing_factor": Range(low=0, high=1, open_high=True),
    "neftune_noise_alpha": _ABOVE_ZERO,
    "router_aux_loss_coef": _ZERO_UP,
    "warmup_steps": Every(zero=True, nullable=False),
    # batches
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "dataloader_num_workers": _ZERO_UP,
    "dataloader_prefetch_factor": _COUNT,
    "dataset_num_proc": _COUNT,
    "pad_to_multiple_of": Range(low=1, also=("auto",)),
    "max_length": _COUNT,
    # logging, saving, evaluation
    "logging_steps": Every(),
    "save_steps": Every(),
    "eval_steps": Every(),
    "eval_delay": _ZERO_UP,
    "save_total_limit": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "num_completions_to_print": _COUNT,
    "log_level": Choices((*LOG_LEVELS, "passive")),
    "log_level_replica": Choices((*LOG_LEVELS, "passive")),
    "include_num_input_tokens_seen": Choices((True, False, "all", "non_padding", "no")),
    # seeds: numpy takes 32 bits
    "seed": Range(low=0, high=2**32 - 1),
    "data_seed": Range(low=0, high=2**32 - 1),
    # distributed
    "ddp_timeout": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    # generation
    "num_generations": Range(low=2, nullable=False, note="a group of one has no advantage"),
    "num_generations_eval": _COUNT,
    "max_completion_length": _COUNT_NEEDED,
    "generation_batch_size": _COUNT,
    "steps_per_generation": _COUNT,
    "num_iterations": _COUNT,
    "temperature": _ABOVE_ZERO,
    "top_p": Range(low=0, high=1, open_low=True),
    "top_k": Range(low=0, note="0 switches it off"),
    "min_p": _SHARE,
    "repetition_penalty": _ABOVE_ZERO,
    "max_tool_calling_iterations": _COUNT,
    # the objective
    "beta": _ZERO_UP,
    "epsilon": _ABOVE_ZERO,
    "epsilon_high": _ABOVE_ZERO,
    "delta": _ABOVE_ZERO,
    "sapo_temperature_neg": _ABOVE_ZERO,
    "sapo_temperature_pos": _ABOVE_ZERO,
    "vespo_k_pos": _ZERO_UP,
    "vespo_k_neg": _ZERO_UP,
    "vespo_lambda_pos": _ZERO_UP,
    "vespo_lambda_neg": _ZERO_UP,
    "top_entropy_quantile": _SHARE,
    "entropy_coef_min": _ZERO_UP,
    "entropy_coef_max": _ZERO_UP,
    "entropy_coef_delta": _ABOVE_ZERO,
    "entropy_target": _ZERO_UP,
    "off_policy_mask_threshold": _ZERO_UP,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _COUNT,
    "precompute_ref_batch_size": _COUNT,
    "ld_alpha": _SHARE,
    "label_smoothing": Range(low=0, high=1, open_high=True),
    "discopop_tau": _ABOVE_ZERO,
    "f_alpha_divergence_coef": _ABOVE_ZERO,
    "f_divergence_type": Choices(F_DIVERGENCES),
    "center_rewards_coefficient": _ZERO_UP,
    "importance_sampling_level": Choices(("token", "sequence")),
    "multi_objective_aggregation": Choices(("sum_then_normalize", "normalize_then_sum")),
    "scale_rewards": Choices(("group", "batch", "none", True, False)),
    # vLLM
    "vllm_mode": Choices(("server", "colocate")),
    "vllm_model_impl": Choices(("vllm", "transformers")),
    "vllm_importance_sampling_mode": Choices(IMPORTANCE_SAMPLING_MODES),
    "vllm_importance_sampling_clip_max": _ABOVE_ZERO,
    "vllm_importance_sampling_clip_min": _ZERO_UP,
    "vllm_gpu_memory_utilization": Range(low=0, high=1, open_low=True),
    "vllm_tensor_parallel_size": _COUNT,
    "vllm_max_model_length": _COUNT,
    "vllm_server_port": _PORT,
    "vllm_group_port": _PORT,
    "vllm_server_timeout": _ABOVE_ZERO,
}

# Enumerations that transformers only looks at when the configuration object is built.
_ENUMS = {
    "lr_scheduler_type": ("trainer_utils", "SchedulerType"),
    "optim": ("training_args", "OptimizerNames"),
    "logging_strategy": ("trainer_utils", "IntervalStrategy"),
    "eval_strategy": ("trainer_utils", "IntervalStrategy"),
    "save_strategy": ("trainer_utils", "SaveStrategy"),
    "hub_strategy": ("trainer_utils", "HubStrategy"),
}


def rule_for(field: SourceField, class_name: str) -> Rule | None:
    """Return the rule of a field, or None when every value of its type will do."""
    if field.name == "loss_type" and class_name == "GRPOConfig":
        return Choices(GRPO_LOSS_TYPES)
    if class_name == "DPOConfig" and field.name == "loss_type":
        return Choices(DPO_LOSS_TYPES, many=True)
    if class_name == "DPOConfig" and field.name == "beta":
        return Range(low=0, open_low=True, note="at 0 nothing is learned")
    if field.name in _RULES:
        return _RULES[field.name]
    if field.name in _ENUMS:
        return Choices(enum_values("transformers", *_ENUMS[field.name]))
    if field.name == "report_to":
        known = dict_keys("transformers", "integrations.integration_utils", "INTEGRATION_TO_CALLBACK")
        return Choices(("none", "all", *known), many=True)
    if field.name == "debug":
        return Choices(("", *enum_values("transformers", "debug_utils", "DebugOption")), many=True)
    if field.choices:
        optional = (None,) if "None" in field.annotation else ()
        return Choices((*field.choices, *optional))
    return None


def needed(field: SourceField, class_name: str) -> str:
    """Return in words what a field takes: its choices, or its type and range."""
    rule = rule_for(field, class_name)
    if isinstance(rule, Choices):
        return rule.describe()
    if rule is None:
        return describe_type(field.annotation)
    text = rule.describe()
    if isinstance(rule, Range):
        text = f"{'a number' if 'float' in field.annotation else 'a whole number'} {text}"
    return f"{text}, or null" if rule.nullable and "None" in field.annotation else text

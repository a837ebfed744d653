"""Small trainings, one for every method, selector and backend, that are the same on one process and on two.

A case takes three optimiser steps of two micro-steps, with the method at a setting in which it acts. A method
or selector that is registered and has no settings here fails in test_matrix.py.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / name) for name in (".", "launch", "preference", "rl", "fsdp")
)

import launch_runs
import pairs
import support
import test_preference_lists
import test_rl_table
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig

from posttrain import GRPOTrainer, RewardTrainer, Select, SFTTrainer
from posttrain.partitioned import whole_models
from posttrain.preference import registry as preference_registry
from posttrain.rl import registry as rl_registry
from posttrain.selection import registry as selectors
from posttrain.selection.settings import Backend
from posttrain.sft import registry as sft_registry

STEPS = 3

#: Settings in which methods act; those of the GRPO family are in their table.
PREFERENCE: dict[str, dict[str, Any]] = {
    "feasible": {"tolerance": 0.3, "dual_lr": 0.5, "alpha": 2.0},
    "flex_dpo": {"beta_rejected": 0.05},
    "lipo": {},
    "ofs_dpo": {"alpha": 0.3, "interval": 2, "slow_lr_ratio": 4.0},
    "rpo": {"eta": 0.05},
    "sparse_po": {"mask_init": "ones", "mask_l1_reward": 0.01},
    "tdpo": {"alpha": 0.5},
}
SFT: dict[str, dict[str, Any]] = {
    "feasible": {"alpha": 2.0, "dual_lr": 0.5},
    "lfu": {"alpha": 0.5, "ascent_batch": "same"},
    "sgtm": {"mlp_units": 4, "kv_groups": 1, "retain_mask_prob": 0.5, "examples": 8},
    "unlearn": {},
}
SELECTORS: dict[str, dict[str, Any]] = {
    "bitfit": {"mode": "norm"},
    "explicit": {"parameters": ("norm",), "rows": {"q_proj": (0, 5)}},
    "fish": {"budget": 0.05},
    "hft": {"seed": 3},
    "id3": {"budget": 0.05},
    "magnitude": {"budget": 0.05},
    "random": {"budget": 0.05, "seed": 1},
    "rl_subnetwork": {"before": "{models}/start", "after": "{models}/later"},
    "sara": {"budget": 0.05},
    "ssd": {"fraction": 0.05},
    "wagle": {"budget": 0.05},
}
#: LoRA alpha and learning rate where a method divides by a spread, which has to be large against rounding.
SPREAD: dict[str, tuple[int, float]] = {"constrained": (1024, 1e-2), "gardo_diversity": (256, 1e-3)}
#: Methods that train adapters by definition.
ADAPTERS_ONLY = {"preference/ofs_dpo"}
#: Methods that give TRL's numbers by definition.
EXACT = {"rlvr/skip_zero_advantage"}


@dataclass(frozen=True)
class Case:
    """One small training.

    Attributes:
        build: Makes the trainer from a folder, the number of processes and the methods.
        methods: What builds its methods, of which every training needs its own.
        parts: Names of what the case is about: task, and method or selector and backend.
    """

    build: Callable[[Path, int, Sequence[Any]], Any]
    methods: Callable[[], list[Any]] = list
    parts: dict[str, Any] = field(default_factory=dict)


def settings(ranks: int) -> dict[str, Any]:
    # epsilon: Adam makes whole steps of gradients that are nothing but rounding
    return launch_runs.settings(ranks) | {"max_steps": STEPS, "save_strategy": "no", "adam_epsilon": 1e-6}


def same_micro_batches(ranks: int) -> dict[str, Any]:
    """The micro-batches of two ranks on one, for what a method does in each of them."""
    return {
        "per_device_train_batch_size": launch_runs.ROWS // 2,
        "gradient_accumulation_steps": 4 // ranks,
    }


def written(prompt: str, number: int, temperature: float, step: int) -> list[int]:
    """The ``number``-th completion of a prompt: two to eight letters of twelve."""
    digest = hashlib.sha256(f"{prompt}/{number}/{temperature:g}/{step}".encode()).digest()
    return [3 + byte % 12 for byte in digest[: 2 + digest[-1] % 7]]


class FixedRollouts(GRPOTrainer):
    """Writes what :func:`written` says, whatever the ranks."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        prompts = self._tokenizer.batch_decode(prompt_ids)
        first = self.accelerator.process_index * len(prompts)
        at, step = self.generation_config.temperature, self.state.global_step
        return [written(p, (first + i) % self.num_generations, at, step) for i, p in enumerate(prompts)], None


class Generated(FixedRollouts):
    """Writes what the model would write first, greedily, and goes on as :class:`FixedRollouts`."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        self.generation_config.do_sample = False
        made, *_ = GRPOTrainer._generate_single_turn(self, prompt_ids, *args, **kwargs)
        fixed, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return [[*first[:3], *rest] for first, rest in zip(made, fixed, strict=True)], None


def start(folder: Path) -> Any:
    """Load the model that :func:`prepare` has written."""
    return AutoModelForCausalLM.from_pretrained(models(folder) / "start", dtype=torch.float32)


def models(folder: Path) -> Path:
    return folder.parent / "models"


def prepare(folder: Path) -> None:
    """Write the models that cases under ``folder`` read."""
    model = support.model()
    for name in ("start", "later"):
        model.save_pretrained(folder / "models" / name)
        support.tokenizer().save_pretrained(folder / "models" / name)
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.view(-1)[index :: 20 + index] += 0.01


def adapter(lora: bool, alpha: int = 32) -> Any:
    # not as PEFT begins, where policy and reference are one and divergences are 0
    return support.lora(init_lora_weights=False, lora_alpha=alpha) if lora else None


def rl(
    folder: Path,
    ranks: int,
    methods: Sequence[Any],
    *,
    lora: bool,
    row: Any = None,
    spread: tuple[int, float] | None = None,
) -> Any:
    """GRPO; the case without methods really generates."""
    more = {} if row is None else row.trainer
    alpha = 32
    if spread is not None:
        alpha, more = spread[0], more | {"learning_rate": spread[1]}
    args = support.grpo_config(folder, **(settings(ranks) | {"num_generations": 4} | more))
    return (Generated if row is None else FixedRollouts)(
        model=start(folder),
        args=args,
        reward_funcs=support.letter_reward if row is None else list(row.rewards),
        train_dataset=support.prompts(48),
        processing_class=support.tokenizer(),
        peft_config=adapter(lora, alpha),
        methods=methods,
    )


def preference(folder: Path, ranks: int, methods: Sequence[Any], *, lora: bool, lists: bool = False) -> Any:
    """DPO on pairs, or on lists."""
    return pairs.trainer(
        folder,
        methods=methods,
        data=test_preference_lists.rows(16) if lists and methods else pairs.rows(16),
        reference=None if lora else support.model(seed=1),
        peft_config=adapter(lora),
        train_sampling_strategy="sequential",
        beta=0.5,
        **settings(ranks),
    )


def sft(
    folder: Path, ranks: int, methods: Sequence[Any], *, lora: bool = False, selection: Any = None
) -> Any:
    """SFT on answers of which some are to be forgotten."""
    rows = support.answers(32)
    split = same_micro_batches(ranks) if any(method.name == "lfu" for method in methods) else {}
    return SFTTrainer(
        args=support.sft_config(folder, train_sampling_strategy="sequential", **(settings(ranks) | split)),
        model=support.model(),
        train_dataset=rows.add_column("forget", [i % 3 == 0 for i in range(len(rows))]),
        processing_class=support.tokenizer(),
        peft_config=adapter(lora),
        methods=methods,
        selection=selection,
    )


def reward(folder: Path, ranks: int, methods: Sequence[Any], *, lora: bool) -> Any:
    """A reward model on pairs."""
    assert not methods
    config = LlamaConfig(**(support.model().config.to_dict() | {"num_labels": 1}))
    with whole_models():  # arguments that are still alive would let ZeRO-3 partition it
        model = LlamaForSequenceClassification(config)
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = RewardConfig(
        output_dir=str(folder), train_sampling_strategy="sequential", **(common | settings(ranks))
    )
    return RewardTrainer(
        model=model,
        args=args,
        train_dataset=pairs.rows(16),
        processing_class=support.tokenizer(),
        peft_config=support.lora(task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False)
        if lora
        else None,
    )


def selected(
    folder: Path, ranks: int, methods: Sequence[Any], *, name: str, backend: Backend, parameters: Any
) -> Any:
    """SFT of what a selector selects."""
    filled = {
        key: value.format(models=models(folder)) if isinstance(value, str) else value
        for key, value in parameters.items()
    }
    chosen = Select(selectors.resolve(name)(**filled), backend=backend, examples=8)
    return sft(folder, ranks, methods, selection=chosen)


def _cases() -> dict[str, Case]:
    families: dict[str, tuple[Any, Any, dict[str, dict[str, Any]]]] = {
        "rlvr": (rl, rl_registry, {name: row.active for name, row in test_rl_table.ROWS.items()}),
        "preference": (preference, preference_registry, PREFERENCE),
        "sft": (sft, sft_registry, SFT),
        "reward": (reward, None, {}),
    }
    found: dict[str, Case] = {}
    for task, (build, registry, table) in families.items():
        for lora in (False, True):
            tail = "+lora" if lora else ""
            found[task + tail] = Case(_with(build, lora=lora), parts={"task": task, "lora": lora})
            for name, parameters in table.items():
                if f"{task}/{name}" in ADAPTERS_ONLY and not lora:
                    continue
                more: dict[str, Any] = {"row": test_rl_table.ROWS[name]} if task == "rlvr" else {}
                if name in SPREAD:
                    more["spread"] = SPREAD[name]
                if name == "lipo":
                    more["lists"] = True
                found[f"{task}/{name}{tail}"] = Case(
                    _with(build, lora=lora, **more),
                    _methods(registry, name, parameters),
                    {"task": task, "method": name, "parameters": parameters, "lora": lora},
                )
    for name, parameters in SELECTORS.items():
        for backend in get_args(Backend):
            if backend != "auto":
                found[f"selection/{name}:{backend}"] = Case(
                    _with(selected, name=name, backend=backend, parameters=parameters),
                    parts={"selector": name, "parameters": parameters, "backend": backend},
                )
    return found


def _with(build: Any, **options: Any) -> Callable[[Path, int, Sequence[Any]], Any]:
    return lambda folder, ranks, methods: build(folder, ranks, methods, **options)


def _methods(registry: Any, name: str, parameters: dict[str, Any]) -> Callable[[], list[Any]]:
    return lambda: [registry.resolve(name)(**parameters)]


CASES = _cases()

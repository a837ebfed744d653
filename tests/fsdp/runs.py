"""Runs of toy size that give the same numbers on one process and on two ranks.

Each takes a folder and a number of ranks, and returns a trainer.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "preference"))

import pairs
import support
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig

from posttrain import GRPOTrainer, RewardTrainer, Select, SFTTrainer
from posttrain.preference import TDPO
from posttrain.preference.sparse_po import SparsePO
from posttrain.rl import LpReg
from posttrain.rl.gardo_reference import GardoReference
from posttrain.selection.random_mask import RandomMask

CHECKPOINTS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on prompt, place in the group and step, not on ranks or weights."""
    made = []
    for i, prompt in enumerate(prompts):
        key = f"{prompt}/{i % trainer.num_generations}/{trainer.state.global_step}"
        digest = hashlib.sha256(key.encode()).digest()
        made.append([3 + byte % 40 for byte in digest[: 2 + digest[-1] % 7]])
    tokenizer = support.tokenizer()
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": made,
        "logprobs": None,
    }


def sft(folder: Path, ranks: int, *, model: Any = None, selection: Any = None, **settings: Any) -> Any:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4 // ranks, "max_grad_norm": 0.3}
    return SFTTrainer(
        model=support.model(tied=True) if model is None else model,
        args=support.sft_config(folder, **(defaults | settings)),
        train_dataset=support.answers(24),
        processing_class=support.tokenizer(),
        selection=selection,
    )


def dpo(folder: Path, ranks: int, methods: Any, **options: Any) -> Any:
    return pairs.trainer(
        folder,
        methods=methods,
        data=pairs.rows(24),
        **({"per_device_train_batch_size": 4 // ranks} | options),
    )


def grpo(folder: Path, ranks: int, methods: Any, **settings: Any) -> Any:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 16 // ranks, "beta": 0.04}
    return GRPOTrainer(
        model=stored(folder),
        args=support.grpo_config(folder, **(defaults | settings)),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout_func=rollout,
        methods=methods,
    )


def reward(folder: Path, ranks: int) -> Any:
    args = RewardConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4 // ranks,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        max_steps=4,
    )
    torch.manual_seed(0)  # of the head
    model = AutoModelForSequenceClassification.from_pretrained(folder.parent / "wide", num_labels=1)
    return RewardTrainer(
        model=model, args=args, train_dataset=pairs.rows(24), processing_class=support.tokenizer()
    )


def stored(folder: Path) -> Any:
    """Load the model that :func:`prepare` has put beside the folder of a run; weights that are far from 0."""
    return AutoModelForCausalLM.from_pretrained(folder.parent / "wide", dtype=torch.float32)


def prepare(folder: Path) -> None:
    """Write the models that runs under ``folder`` read."""
    model = support.model(initializer_range=0.3)
    model.save_pretrained(folder / "wide")
    support.tokenizer().save_pretrained(folder / "wide")


def packed(**settings: Any) -> Select:
    return Select(RandomMask(budget=0.1), **settings)


def adapted(folder: Path, ranks: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    return dpo(
        folder,
        ranks,
        [TDPO(alpha=0.5)],
        peft_config=support.lora(init_lora_weights="pissa"),
        gradient_checkpointing=True,
        **settings,
    )


def loaded(folder: Path, ranks: int) -> Any:
    model = stored(folder)  # by the first rank only, if the launcher says so
    return dpo(folder, ranks, [TDPO(alpha=0.5)], model=model, reference=stored(folder))


RUNS: dict[str, Callable[[Path, int], Any]] = {
    "packed": lambda folder, ranks: sft(folder, ranks, selection=packed(weight_decay="to_base")),
    "kl": lambda folder, ranks: grpo(
        folder,
        ranks,
        [LpReg(rho=0.9, kappa=0.01, scope="generation_batch", kl="forward"), GardoReference(max_kl=1e-9)],
        epsilon=1.0,
        epsilon_high=9.0,
    ),
    "adapter": adapted,
    "loaded": loaded,
    "reward": reward,
}

#: Runs that are stopped after 3 of 6 steps and gone on with, with the kind of their checkpoints.
RESUMED: dict[str, tuple[Callable[[Path, int], Any], str]] = {
    "packed": (
        lambda folder, ranks: sft(folder, ranks, selection=packed(), **CHECKPOINTS),
        "SHARDED_STATE_DICT",
    ),
    "full": (
        lambda folder, ranks: sft(folder, ranks, selection=packed(), **CHECKPOINTS),
        "FULL_STATE_DICT",
    ),
    "moving": (
        lambda folder, ranks: grpo(
            folder, ranks, [GardoReference(max_kl=1e-9)], num_iterations=2, **CHECKPOINTS
        ),
        "SHARDED_STATE_DICT",
    ),
    "masks": (
        lambda folder, ranks: dpo(
            folder,
            ranks,
            [SparsePO(mask_init="ones")],
            sync_ref_model=True,
            ref_model_sync_steps=2,
            **CHECKPOINTS,
        ),
        "SHARDED_STATE_DICT",
    ),
    "adapter": (lambda folder, ranks: adapted(folder, ranks, **CHECKPOINTS), "SHARDED_STATE_DICT"),
}

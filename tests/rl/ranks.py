"""Run by test_rl_invariance.py under one or several processes: rollouts depend on prompts alone."""

import hashlib
import json
import sys
from pathlib import Path

import support
import torch

from posttrain import GRPOTrainer
from posttrain.rl import ACE


def rollout(prompts, trainer):
    """The j-th completion of a prompt is a fixed pseudo-random string of 2 to 8 characters."""
    tokenizer = support.tokenizer()
    completion_ids = []
    for i, prompt in enumerate(prompts):
        digest = hashlib.sha256(
            f"{prompt}/{i % trainer.num_generations}/{trainer.state.global_step}".encode()
        ).digest()
        completion_ids.append([3 + byte % 40 for byte in digest[: 2 + digest[-1] % 7]])
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completion_ids,
        "logprobs": None,
    }


def main(out: str, per_device: int, accumulation: int, loss_type: str) -> None:
    torch.set_num_threads(1)
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(
            Path(out).parent / "checkpoints",
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            loss_type=loss_type,
            max_steps=5,
        ),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout_func=rollout,
        methods=[ACE()],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        keys = (
            "loss",
            "grad_norm",
            "ace/shift_mean",
            "ace/shift_max",
            "ace/amplified_rows",
            "ace/weight_mean",
        )
        weights = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
        Path(out).write_text(json.dumps({"logs": support.logged(trainer, *keys), "weights": weights}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    support.leave()

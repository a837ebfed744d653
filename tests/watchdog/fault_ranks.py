"""Run by test_watchdog_runs.py under torchrun: a script whose reward function goes wrong on rank 1."""

import re
import sys
import time

import support
import torch

from posttrain import GRPOTrainer
from posttrain.watchdog import Limits


def reward(completions, trainer_state, **_):
    if torch.distributed.get_rank() == 1 and trainer_state.global_step == 3:
        if sys.argv[2] == "sleeps":
            time.sleep(1000)
        elif sys.argv[2] == "never-yields":
            re.match(r"(a+)+$", "a" * 60 + "b")  # keeps the interpreter from all other threads
        raise ValueError("no reward for this one")
    return support.letter_reward(completions)


def main(folder: str, mode: str) -> None:
    torch.set_num_threads(1)
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(
            folder, max_steps=6, per_device_train_batch_size=4, save_steps=2, save_strategy="steps"
        ),
        reward_funcs=reward,
        train_dataset=support.prompts(12),
        processing_class=support.tokenizer(),
    )
    if mode == "never-yields":
        trainer.watchdog = Limits(silence=5)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

"""Run by test_rl_shaping_ranks.py under one or several processes: constrained rewards and GARDO together."""

import json
import sys
from pathlib import Path

import ranks
import support
import torch

from posttrain import GRPOTrainer
from posttrain.rl import Constrained, GardoDiversity, GardoKL, GardoReference


def length_reward(completions, **kwargs):
    return [float(len(text)) if text else None for text in completions]


def vowel_reward(completions, **kwargs):
    return [float(sum(text.count(letter) for letter in "aiou")) for text in completions]


def main(out: str, per_device: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    methods = [
        Constrained(equal={"letter_reward": 0.1}, at_most={"length_reward": 4.0}, init=0.3),
        GardoKL(fraction=0.3, bounds=(0.1, 0.5), window=1, normalize="gated"),
        GardoReference(max_kl=None, max_steps=3),
        GardoDiversity(),
    ]
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(
            Path(out).parent / "checkpoints",
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            reward_weights=[1.0, 1.0, 0.0],
            beta=0.1,
            learning_rate=5e-3,
            max_steps=6,
        ),
        reward_funcs=[support.letter_reward, length_reward, vowel_reward],
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora(),
        rollout_func=ranks.rollout,
        methods=methods,
    )
    trainer.train()
    states = [method.state_dict() for method in methods]
    Path(f"{out}.{trainer.accelerator.process_index}").write_text(json.dumps(states))
    if trainer.accelerator.is_main_process:
        keys = (
            "loss",
            "grad_norm",
            "constrained/value/length_reward",
            "constrained/weight/letter_reward",
            "gardo_kl/gated_rows",
            "gardo_kl/uncertainty",
            "gardo_reference/kl",
            "gardo_diversity/distance",
            "gardo_diversity/factor",
        )
        weights = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
        Path(out).write_text(json.dumps({"logs": support.logged(trainer, *keys), "weights": weights}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    support.leave()

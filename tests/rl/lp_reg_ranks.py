"""Run by test_rl_lp_reg_invariance.py under one or several processes."""

import json
import sys
from pathlib import Path

import support
import torch
from ranks import rollout

from posttrain import GRPOTrainer
from posttrain.rl import LpReg


def main(out: str, per_device: int, accumulation: int, iterations: int) -> None:
    torch.set_num_threads(1)
    model = support.model(initializer_range=0.3)  # peaked distributions: the filter drops something
    trainer = GRPOTrainer(
        model=model,
        args=support.grpo_config(
            Path(out).parent / "checkpoints",
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            num_iterations=iterations,
            epsilon=1.0,
            epsilon_high=9.0,
            max_steps=4,
        ),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout_func=rollout,
        methods=[LpReg(rho=0.9, kappa=0.01, scope="generation_batch")],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        keys = ("loss", "grad_norm", "lp_reg/gated_share", "lp_reg/log_ratio_mean")
        weights = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
        Path(out).write_text(json.dumps({"logs": support.logged(trainer, *keys), "weights": weights}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    support.leave()

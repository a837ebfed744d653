"""Run by test_rl_ttrl_trainer.py under one or several processes: votes among rollouts that prompts decide."""

import json
import sys
from pathlib import Path

import support
import torch

from posttrain import GRPOTrainer
from posttrain.rl import TTRL


def rollout(prompts, trainer):
    """Digits or "no idea", by prompt and place in the group; the majority differs from prompt to prompt."""
    tokenizer = support.tokenizer()
    rank, group = trainer.accelerator.process_index, trainer.num_generations
    completion_ids = []
    for i, prompt in enumerate(prompts):
        number = int("".join(filter(str.isdigit, prompt)))
        place = (rank * len(prompts) + i) % group
        digit = (number + (place * place * 7 + number * place) % 3 * (place % 2)) % 10
        text = f"{'so ' * (place % 3)}{digit}" if (number + place) % 5 else "no idea"
        completion_ids.append([*tokenizer(text)["input_ids"], 1])
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completion_ids,
        "logprobs": None,
    }


def build(folder, methods, reward, **settings):
    options = {
        "max_steps": 4,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "max_completion_length": 12,
    }
    return GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(folder, **(options | settings)),
        reward_funcs=reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout_func=rollout,
        methods=methods,
    )


def verifier(completions, **kwargs):
    return [float("7" in text or "8" in text) for text in completions]


def main(out: str, per_device: int, accumulation: int, n_samples: int) -> None:
    torch.set_num_threads(1)
    method = TTRL(n_votes=8, n_samples=n_samples, extract="last_number", equivalence="math")
    settings = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    trainer = build(Path(out).parent / "checkpoints", [method], verifier, **settings)
    trainer.train()
    if trainer.accelerator.is_main_process:
        names = ("majority_ratio", "vote_entropy", "label_accuracy", "reward_accuracy", "kept_pseudo_reward")
        keys = ("loss", "grad_norm", "reward", *(f"ttrl/{name}" for name in names))
        weights = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
        Path(out).write_text(json.dumps({"logs": support.logged(trainer, *keys), "weights": weights}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    support.leave()

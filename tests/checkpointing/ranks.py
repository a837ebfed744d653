"""Run by test_checkpointing_ranks.py under torchrun: train, stop, go on, and write down what came out."""

import json
import sys
from pathlib import Path

import support
import torch
from transformers import TrainerCallback

from posttrain import GRPOTrainer, SFTTrainer
from posttrain.rl import ACE


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def grpo(folder, stop):
    # 24 rows on two ranks are 6 groups a generation of 3 steps, so 6 prompts make an epoch of 3 steps
    return GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(
            folder, max_steps=14, per_device_train_batch_size=4, steps_per_generation=3, logging_steps=2
        ),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(12),
        processing_class=support.tokenizer(),
        callbacks=[StopAt(stop)],
        methods=[ACE()],
    )


def sft(folder, stop):
    return SFTTrainer(
        model=support.model(),
        args=support.sft_config(folder, max_steps=14, per_device_train_batch_size=2),
        train_dataset=support.answers(24),
        processing_class=support.tokenizer(),
        callbacks=[StopAt(stop)],
    )


def main(kind: str, folder: str, stop: int, resume: bool) -> None:
    torch.set_num_threads(1)
    trainer = {"grpo": grpo, "sft": sft}[kind](folder, stop)
    trainer.train(resume_from_checkpoint=resume or None)
    if trainer.accelerator.is_main_process:
        keys = ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch")
        weights = {name: tensor.flatten().tolist() for name, tensor in trainer.model.state_dict().items()}
        out = {"logs": support.logged(trainer, *keys), "weights": weights}
        Path(folder, "result.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume")
    support.leave()

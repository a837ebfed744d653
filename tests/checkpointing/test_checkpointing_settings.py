"""Resume is exact in settings where it is easy to get wrong, and honest where it cannot be."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import support
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer, SFTTrainer
from posttrain.checkpointing.resume import CheckpointError
from posttrain.rl import ACE


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def grpo(folder, *, stop=0, cls=GRPOTrainer, **settings):
    """A trainer; upper-case settings are arguments of the trainer, made anew."""
    different = {key.lower(): settings.pop(key)() for key in list(settings) if key.isupper()}
    if cls is GRPOTrainer:
        different.setdefault("methods", [ACE()])
    return cls(
        **{
            "model": support.model(),
            "args": support.grpo_config(folder, **({"max_steps": 10, "weight_decay": 0.1} | settings)),
            "reward_funcs": support.letter_reward,
            "train_dataset": support.prompts(12),
            "processing_class": support.tokenizer(),
            "callbacks": [StopAt(stop)],
        }
        | different
    )


def sft(folder, *, stop=0, **settings):
    different = {key.lower(): settings.pop(key)() for key in list(settings) if key.isupper()}
    return SFTTrainer(
        **{
            "model": support.model(),
            "args": support.sft_config(folder, **({"logging_steps": 3} | settings)),
            "train_dataset": support.answers(),
            "processing_class": support.tokenizer(),
            "callbacks": [StopAt(stop)],
        }
        | different
    )


def exact(make, folder, k, **settings):
    whole = make(folder / "whole", **settings)
    whole.train()
    first = make(folder / "cut", stop=k, **settings)
    first.train()
    assert first.state.global_step == k
    second = make(folder / "cut", **settings)
    second.train(resume_from_checkpoint=True)
    support.assert_same(support.weights(second.model), support.weights(whole.model))
    keys = ("loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "epoch", "ace/shift_max")
    assert support.logged(second, *keys) == support.logged(whole, *keys)
    assert support.logged(whole, *keys)
    return whole, second


def trained_adapter():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return get_peft_model(support.model(), support.lora(lora_dropout=0.1, init_lora_weights=False))


def evaluated():
    return {"a": support.prompts(4)}


# (settings, k); an epoch of 12 prompts has 6 steps
GRPO = {
    "end-of-epoch": ({}, 6),
    "stream": ({"TRAIN_DATASET": lambda: support.prompts(12).to_iterable_dataset()}, 8),
    "remainder": (
        {"gradient_accumulation_steps": 5, "steps_per_generation": 2, "per_device_train_batch_size": 4}
        | {"max_steps": -1, "num_train_epochs": 2},
        3,
    ),
    "evaluation": (
        {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "logging_steps": 3}
        | {"EVAL_DATASET": evaluated, "steps_per_generation": 4},
        5,
    ),
    "adaptive-entropy": ({"use_adaptive_entropy": True, "steps_per_generation": 2}, 3),
    "workers": ({"dataloader_num_workers": 1}, 3),
    "bfloat16": ({"MODEL": lambda: support.model(dtype=torch.bfloat16)}, 3),
    "trained-adapter": ({"MODEL": trained_adapter, "steps_per_generation": 2}, 3),
    "pissa": ({"PEFT_CONFIG": lambda: support.lora(init_lora_weights="pissa")}, 3),
    "saved-modules": ({"PEFT_CONFIG": lambda: support.lora(modules_to_save=["lm_head"])}, 3),
}


@pytest.mark.parametrize("name", GRPO)
def test_reinforcement_learning_resumes_bit_exact(name, tmp_path):
    settings, k = GRPO[name]
    exact(grpo, tmp_path, k, **settings)


# an epoch of 24 rows has 6 steps
SFT = {
    "plain": ({}, 4),
    "next-epoch": ({}, 8),
    "stream": ({"TRAIN_DATASET": lambda: support.answers().to_iterable_dataset()}, 8),
    "grouped": ({"train_sampling_strategy": "group_by_length"}, 8),
    "packing": ({"packing": True, "per_device_train_batch_size": 1}, 4),
    "completions": ({"completion_only_loss": True, "gradient_accumulation_steps": 2}, 4),
    "noise": ({"neftune_noise_alpha": 5.0}, 4),
    "lora": ({"PEFT_CONFIG": lambda: support.lora(lora_dropout=0.1), "gradient_checkpointing": True}, 4),
}


@pytest.mark.parametrize("name", SFT)
def test_supervised_training_resumes_bit_exact(name, tmp_path):
    settings, k = SFT[name]
    exact(sft, tmp_path, k, **settings)


def test_more_steps_on_resume(tmp_path):
    whole = grpo(tmp_path / "whole", max_steps=6, lr_scheduler_type="constant")
    whole.train()
    shorter = grpo(
        tmp_path / "cut", max_steps=4, lr_scheduler_type="constant", save_strategy="steps", save_steps=4
    )
    shorter.train()
    longer = grpo(tmp_path / "cut", max_steps=6, lr_scheduler_type="constant")
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6
    support.assert_same(support.weights(longer.model), support.weights(whole.model))


def test_another_layout_on_a_boundary_generates_at_once(tmp_path):
    grpo(tmp_path, stop=4, steps_per_generation=4).train()
    other = grpo(tmp_path, max_steps=9, steps_per_generation=3)
    generated = []
    inner = other._generate_and_score_completions
    other._generate_and_score_completions = lambda rows: generated.append(other._step) or inner(rows)
    other.train(resume_from_checkpoint=True)
    # the buffer of the old layout would have lasted until micro-step 6
    assert generated == [4, 6]


def test_checkpoints_of_plain_trl_resume_on_a_boundary(tmp_path, caplog):
    grpo(tmp_path / "cut", stop=4, cls=TRLGRPOTrainer, steps_per_generation=2).train()
    whole = grpo(tmp_path / "whole", METHODS=list, steps_per_generation=2)
    whole.train()
    resumed = grpo(tmp_path / "cut", METHODS=list, steps_per_generation=2)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "exact only on a generation boundary" in caplog.text
    support.assert_same(support.weights(resumed.model), support.weights(whole.model))


def test_state_of_another_format_is_refused(tmp_path):
    grpo(tmp_path, stop=2).train()
    path = tmp_path / "checkpoint-2" / "posttrain_state_0.pt"
    torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)
    with pytest.raises(CheckpointError, match="has format 99"):
        grpo(tmp_path).train(resume_from_checkpoint=True)


def test_a_disk_that_fills_up_inside_torch(tmp_path, monkeypatch):
    """torch reports a failed write as a RuntimeError of its zip writer."""
    trainer = grpo(tmp_path, save_strategy="steps", save_steps=2)
    real_save = torch.save

    def full_disk(payload, path, *args, **kwargs):
        if trainer.state.global_step == 4 and "optimizer" in str(path):
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128064 vs 127952")
        return real_save(payload, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"unexpected pos.*checkpoint-2\. Free disk space"):
        trainer.train()
    assert not (tmp_path / "_saving").exists()  # half a checkpoint would keep the disk full


def test_other_errors_in_a_save_are_not_called_a_full_disk(tmp_path, monkeypatch):
    trainer = grpo(tmp_path, save_strategy="steps", save_steps=2)

    def lost(*args, **kwargs):
        raise RuntimeError("NCCL communicator was aborted")

    monkeypatch.setattr(trainer, "_save_rng_state", lost)
    with pytest.raises(RuntimeError, match="NCCL") as caught:
        trainer.train()
    assert not isinstance(caught.value, CheckpointError)


def test_uploads_wait_for_the_complete_checkpoint(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append(
            (Path(folder).name, (Path(folder) / "posttrain_state_0.pt").exists(), self.args.push_to_hub)
        )

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    trainer = grpo(tmp_path, max_steps=4, push_to_hub=True, save_strategy="steps", save_steps=2)
    trainer.train()
    assert pushed == [("checkpoint-2", True, True), ("checkpoint-4", True, True)]
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.push_to_hub


def test_extra_columns_keep_their_type(tmp_path):
    def reward(completions, log_extra, **kwargs):
        log_extra("length", [np.float64(len(text)) for text in completions])
        log_extra("long", [np.bool_(len(text) > 3) for text in completions])
        return support.letter_reward(completions)

    settings = {"steps_per_generation": 4, "logging_steps": 2, "log_completions": True}
    settings |= {"num_completions_to_print": 0, "REWARD_FUNCS": lambda: reward}
    grpo(tmp_path, stop=3, **settings).train()
    grpo(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=True)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00004.parquet")
    assert table["length"].tolist() == [float(len(text)) for text in table["completion"]]
    assert table["long"].dtype == bool

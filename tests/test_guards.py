"""A run stops at the first number that is not finite, and says which rows caused it."""

import json

import pytest
import support
import torch

from posttrain import GRPOTrainer, SFTTrainer


def build(tmp_path, reward=support.letter_reward, **settings):
    return GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, **settings),
        reward_funcs=reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
    )


def test_nonfinite_loss_stops_and_writes_the_rows(tmp_path):
    trainer = build(tmp_path)
    inner = trainer._calculate_rewards

    def poisoned(*args):
        if trainer.state.global_step == 2:
            with torch.no_grad():
                trainer.model.lm_head.weight[5] = float("nan")
        return inner(*args)

    trainer._calculate_rewards = poisoned
    with pytest.raises(FloatingPointError, match="the loss is nan after 2 optimiser steps"):
        trainer.train()
    written = json.loads((tmp_path / "nonfinite.json").read_text())
    assert written["step"] == 2
    assert len(written["rows"]["completion_ids_text"]) == 8


def test_infinite_reward_names_row_and_function(tmp_path):
    def broken_score(completions, **kwargs):
        return [float("inf") if i == 3 else 0.0 for i in range(len(completions))]

    with pytest.raises(FloatingPointError, match="row 3: broken_score = inf"):
        build(tmp_path, broken_score).train()


def test_nonfinite_gradient_stops_before_the_step(tmp_path):
    trainer = build(tmp_path)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = support.weights(trainer.model)
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        trainer.train()
    support.assert_same(support.weights(trainer.model), before)


def test_failed_verifier_rows_do_not_move_the_policy(tmp_path):
    """A row whose verifier failed is left out of its group, also when another reward did score it."""

    class Verifier:
        __name__ = "verifier"
        failed: list[bool]

        def __call__(self, completions, **kwargs):
            self.failed = [i == 1 for i in range(len(completions))]
            return [None if flag else float(i % 4 == 0) for i, flag in enumerate(self.failed)]

    trainer = build(tmp_path, [Verifier(), support.letter_reward])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": f"say {i // 4}?"} for i in range(8)])
    assert batch["advantages"][1] == 0
    assert (batch["advantages"][[0, 2, 3]] != 0).all()
    assert batch["advantages"][[0, 2, 3]].sum().item() == pytest.approx(0, abs=1e-5)


def test_only_token_ids_are_decoded(tmp_path):
    """Packed batches also hold position_ids, which mean nothing as text."""
    trainer = SFTTrainer(
        model=support.model(),
        args=support.sft_config(tmp_path, packing=True, per_device_train_batch_size=1),
        train_dataset=support.answers(),
        processing_class=support.tokenizer(),
    )
    with torch.no_grad():
        trainer.model.lm_head.weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan after 0 optimiser steps"):
        trainer.train()
    rows = json.loads((tmp_path / "nonfinite.json").read_text())["rows"]
    assert "position_ids" in rows
    assert [key for key in rows if key.endswith("_text")] == ["input_ids_text"]
    assert "<eos>" in rows["input_ids_text"][0]

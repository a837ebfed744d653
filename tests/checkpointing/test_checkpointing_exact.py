"""N steps in one go equal k steps, a stop and a resume, bit for bit, wherever k falls."""

import pytest
import support
import torch
from pydantic import PrivateAttr
from transformers import TrainerCallback

from posttrain import GRPOTrainer
from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.checkpointing.resume import CheckpointError
from posttrain.rl import ACE
from posttrain.rl.method import Method

STEPS = 10
KEYS = ("loss", "grad_norm", "learning_rate", "reward", "entropy", "num_tokens", "ace/shift_max", "epoch")


class Counting(Method):
    """Keeps state: scales the policy term by a factor that shrinks at every optimiser step."""

    name = "counting"
    title = "a method with state"
    _seen: int = PrivateAttr(0)

    def token_weights(self, tokens):
        return torch.full((tokens.mask.size(0), 1), 0.9**self._seen)

    def optimizer_step(self):
        self._seen += 1

    def state_dict(self):
        return {"seen": self._seen}

    def load_state_dict(self, state):
        self._seen = state["seen"]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def build(folder, *, adapter=False, methods=(), stop=None, **settings):
    return GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(folder, **({"max_steps": STEPS, "weight_decay": 0.1} | settings)),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(12),
        eval_dataset=support.prompts(4),
        processing_class=support.tokenizer(),
        peft_config=support.lora(lora_dropout=0.1) if adapter else None,
        methods=methods,
        callbacks=[StopAt(stop)] if stop else None,
    )


def outcome(trainer):
    state = trainer.optimizer.state_dict()["state"]
    optimizer = {f"{i}/{name}": value for i, entry in state.items() for name, value in entry.items()}
    return support.weights(trainer.model), optimizer, support.logged(trainer, *KEYS)


def same(left, right):
    support.assert_same(left[0], right[0])
    support.assert_same(left[1], right[1])
    assert left[2] == right[2]
    assert left[2]


SCHEDULES = {
    "every-step": {},
    "buffered": {"steps_per_generation": 4},
    "iterations": {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 4},
}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("k", [3, 4, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resume_is_bit_exact(schedule, k, adapter, tmp_path):
    settings = SCHEDULES[schedule]
    whole = build(tmp_path / "whole", adapter=adapter, methods=[ACE(), Counting()], **settings)
    whole.train()
    first = build(tmp_path / "cut", adapter=adapter, methods=[ACE(), Counting()], stop=k, **settings)
    first.train()
    assert first.state.global_step == k
    second = build(tmp_path / "cut", adapter=adapter, methods=[ACE(), Counting()], **settings)
    second.train(resume_from_checkpoint=True)
    same(outcome(second), outcome(whole))


def test_resumed_epochs_see_the_rows_of_an_uninterrupted_run(tmp_path):
    seen = {}

    def noting(name):
        def reward(prompts, completions, **kwargs):
            seen.setdefault(name, []).append(tuple(prompts))
            return support.letter_reward(completions)

        return reward

    for name, stop, resume in [("whole", None, False), ("cut", 8, False), ("cut", None, True)]:
        trainer = build(tmp_path / name, stop=stop, max_steps=15)
        trainer.reward_funcs = [noting(name)]
        trainer.train(resume_from_checkpoint=resume or None)
    assert seen["cut"] == seen["whole"]
    assert len(set(seen["whole"])) > 6  # 12 prompts at 2 a step: epochs of 6 steps with different orders


def test_resuming_a_finished_run_takes_no_further_step(tmp_path):
    settings = {"max_steps": 3, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
    first = build(tmp_path, **settings)
    first.train()
    again = build(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    support.assert_same(support.weights(again.model), support.weights(first.model))


def test_changed_methods_are_refused(tmp_path):
    build(tmp_path, methods=[ACE()], stop=2).train()
    with pytest.raises(ValueError, match=r"was written with methods \['ace'\], this run has \[\]"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_buffered_rollouts_refuse_another_batch_layout(tmp_path):
    build(tmp_path, stop=3, steps_per_generation=4).train()
    other = build(tmp_path, steps_per_generation=2)
    with pytest.raises(CheckpointError, match="steps_per_generation: 4 then, 2 now"):
        other.train(resume_from_checkpoint=True)


def test_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = build(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    real_save = torch.save

    def full_disk(payload, path, *args, **kwargs):
        if trainer.state.global_step == 4 and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        return real_save(payload, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left.*the last good one is checkpoint-2"):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path / "whole")
    whole.train()
    support.assert_same(support.weights(resumed.model), support.weights(whole.model))


def test_rotation_keeps_newest_and_best(tmp_path):
    trainer = build(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(names) <= 2
    assert {"checkpoint-10", best.rpartition("/")[2]} == names
    assert not (tmp_path / "_saving").exists()


def test_newest_checkpoint_ignores_other_folders(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "_saving/checkpoint-12"):
        (tmp_path / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert newest_checkpoint(tmp_path / "nowhere") is None

"""With no methods, or neutral ones, the trainer is TRL bit for bit: losses, gradient norms, weights."""

import pytest
import support
import torch
from datasets import Dataset
from trl import GRPOTrainer as TRLGRPOTrainer
from trl import SFTTrainer as TRLSFTTrainer

from posttrain import GRPOTrainer, SFTTrainer
from posttrain.rl import ACE

LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"]


def run(cls, tmp_path, *, adapter, steps=20, **settings):
    kwargs = {key: settings.pop(key) for key in ("methods",) if key in settings}
    trainer = cls(
        model=support.model(),
        args=support.grpo_config(tmp_path, max_steps=steps, **settings),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora() if adapter else None,
        **kwargs,
    )
    trainer.train()
    return trainer


def same_run(left, right):
    keys = ("loss", "grad_norm", "reward", "entropy", "completions/mean_length")
    assert support.logged(left, *keys) == support.logged(right, *keys)
    assert len(support.logged(left, *keys)) == left.state.global_step
    support.assert_same(support.weights(left.model), support.weights(right.model))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_methods_and_neutral_methods_are_trl(loss_type, adapter, tmp_path):
    upstream = run(TRLGRPOTrainer, tmp_path / "trl", adapter=adapter, loss_type=loss_type)
    for name, methods in {"none": [], "neutral": [ACE(alpha=0)]}.items():
        ours = run(GRPOTrainer, tmp_path / name, adapter=adapter, loss_type=loss_type, methods=methods)
        same_run(ours, upstream)


def conversation():
    tokenizer = support.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": f"say {i}?"}]} for i in range(4)]
    return {"processing_class": tokenizer, "train_dataset": Dataset.from_list(rows)}


def some_rewards(completions, **kwargs):
    """None where it does not apply, as a list of texts or of messages."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    scores = support.letter_reward(texts)
    return [None if i % 3 == 0 else score for i, score in enumerate(scores)]


async def awaited_reward(completions, **kwargs):
    return some_rewards(completions)


# Settings of the trainer, then what is built differently (arguments of the trainer, "weights" of the model).
OTHERS = {
    "beta": ({"beta": 0.1, "loss_type": "dapo"}, {"path": True}),
    "beta-lora": ({"beta": 0.1}, {"peft_config": support.lora}),
    "iterations": (
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {},
    ),
    "off-policy": (
        {"steps_per_generation": 4, "per_device_train_batch_size": 4, "entropy_coef": 0.01},
        {},
    ),
    "remainder": (
        {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "per_device_train_batch_size": 4},
        {},
    ),
    "sequence": (
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "scale_rewards": "batch"},
        {},
    ),
    "entropy-mask": ({"top_entropy_quantile": 0.5, "mask_truncated_completions": True}, {}),
    "two-sided": (
        {"delta": 2.0, "off_policy_mask_threshold": 0.01, "steps_per_generation": 2, "scale_rewards": "none"},
        {},
    ),
    "adaptive-entropy": ({"use_adaptive_entropy": True, "entropy_target": 3.7}, {}),
    "two-rewards": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"reward_funcs": lambda: [support.letter_reward, some_rewards]},
    ),
    "sapo": ({"loss_type": "sapo"}, {}),
    "vespo": ({"loss_type": "vespo", "steps_per_generation": 2}, {}),
    "luspo": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "checkpointing-lora": (
        {"gradient_checkpointing": True},
        {"peft_config": lambda: support.lora(lora_dropout=0.1)},
    ),
    "bfloat16": ({}, {"dtype": torch.bfloat16}),
    "bfloat16-head": ({"cast_lm_head_to_fp32": True}, {"dtype": torch.bfloat16}),
    "autocast": ({"bf16": True}, {}),
    "tied": ({}, {"tied": True}),
    "evaluation": (
        {
            "eval_strategy": "steps",
            "eval_steps": 3,
            "num_generations_eval": 2,
            "per_device_eval_batch_size": 4,
        },
        {"eval_dataset": lambda: {"a": support.prompts(4), "b": support.prompts(2)}},
    ),
    "async-reward": ({}, {"reward_funcs": lambda: awaited_reward}),
    "stream": ({}, {"train_dataset": lambda: support.prompts(4).to_iterable_dataset()}),
    "conversation": ({}, {"conversation": True, "reward_funcs": lambda: some_rewards}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_trl_too(name, tmp_path):
    settings, different = OTHERS[name]
    results = []
    for cls, folder in [(TRLGRPOTrainer, "trl"), (GRPOTrainer, "ours")]:
        built = dict(different)
        model = support.model(tied=built.pop("tied", False), dtype=built.pop("dtype", torch.float32))
        if built.pop("path", False):
            model.save_pretrained(tmp_path / "base")
            model = str(tmp_path / "base")
        talks = conversation() if built.pop("conversation", False) else {}
        trainer = cls(
            **{
                "model": model,
                "args": support.grpo_config(tmp_path / folder, max_steps=8, **settings),
                "reward_funcs": support.letter_reward,
                "train_dataset": support.prompts(
                    4
                ),  # several epochs: the sampler's order must follow as well
                "processing_class": support.tokenizer(),
            }
            | talks
            | {key: make() for key, make in built.items()}
        )
        trainer.train()
        results.append(trainer)
    same_run(*results)
    evaluated = [support.logged(trainer, "eval_a_loss", "eval_reward") for trainer in results]
    assert evaluated[0] == evaluated[1]
    assert bool(evaluated[0]) == (name == "evaluation")


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"completion_only_loss": True}], ids=str)
def test_supervised_is_trl(settings, tmp_path):
    results = []
    for cls, folder in [(TRLSFTTrainer, "trl"), (SFTTrainer, "ours")]:
        trainer = cls(
            model=support.model(),
            args=support.sft_config(tmp_path / folder, max_steps=20, **settings),
            train_dataset=support.answers(),
            processing_class=support.tokenizer(),
        )
        trainer.train()
        results.append(trainer)
    keys = ("loss", "grad_norm", "entropy", "num_tokens", "mean_token_accuracy")
    assert support.logged(results[0], *keys) == support.logged(results[1], *keys)
    assert len(support.logged(results[0], *keys)) == 20
    support.assert_same(*(support.weights(trainer.model) for trainer in results))


def test_methods_leave_the_random_stream_alone(tmp_path):
    """Two arms of a comparison start with the same rollouts."""
    from peft import get_peft_model

    def trained_adapter():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return get_peft_model(support.model(), support.lora(init_lora_weights=False))

    for make in (support.model, trained_adapter):
        first = []
        for methods in ([], [ACE()]):
            trainer = GRPOTrainer(
                model=make(),
                args=support.grpo_config(tmp_path, max_steps=1),
                reward_funcs=support.letter_reward,
                train_dataset=support.prompts(),
                processing_class=support.tokenizer(),
                methods=methods,
            )
            trainer.train()
            first.append([row["completion"] for row in trainer.last_completions()])
        assert first[0] == first[1]

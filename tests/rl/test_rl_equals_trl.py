"""With no methods, or neutral ones, the trainer is TRL bit for bit: losses, gradient norms, weights."""

import pytest
import support
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
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


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "loss_type": "dapo"},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"steps_per_generation": 4, "per_device_train_batch_size": 4, "entropy_coef": 0.01},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "scale_rewards": "batch"},
        {"top_entropy_quantile": 0.5, "mask_truncated_completions": True},
    ],
    ids=["beta", "iterations", "off-policy", "sequence", "entropy-mask"],
)
def test_other_settings_are_trl_too(settings, tmp_path):
    if settings.get("beta"):
        support.model().save_pretrained(tmp_path / "base")
    results = []
    for cls, name in [(TRLGRPOTrainer, "trl"), (GRPOTrainer, "ours")]:
        trainer = cls(
            model=str(tmp_path / "base") if settings.get("beta") else support.model(),
            args=support.grpo_config(tmp_path / name, max_steps=8, **settings),
            reward_funcs=support.letter_reward,
            train_dataset=support.prompts(4),  # several epochs: the sampler's order must follow as well
            processing_class=support.tokenizer(),
        )
        trainer.train()
        results.append(trainer)
    same_run(*results)

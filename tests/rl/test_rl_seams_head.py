"""Contract of the seams around the LM head: what TRL's forward feeds to it is what methods get to see."""

import pytest
import support
import torch

from posttrain.rl.seams import GRPOSeams


def build(folder, *, adapter=False, **settings):
    trainer = GRPOSeams(
        model=support.model(),
        args=support.grpo_config(folder, **settings),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora(init_lora_weights=False) if adapter else None,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    trainer.hooked = True
    return trainer


def rows(n=8):
    return [{"prompt": f"say {i // 4}?"} for i in range(n)]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_live_head_gives_the_log_probs_of_the_loss(adapter, checkpointing, tmp_path):
    trainer = build(tmp_path, adapter=adapter, gradient_checkpointing=checkpointing, temperature=0.7)
    trainer.wants_head = True
    seen = []

    def on_tokens(batch, logps, entropies):
        mask = batch["completion_mask"].bool()
        found = trainer.live_head.statistics(mask, entropy=True)
        assert torch.equal(trainer.live_head.ids, batch["completion_ids"])
        assert torch.allclose(found.logps, logps.detach()[mask], atol=2e-6)
        assert torch.allclose(found.entropies, entropies.detach()[mask], atol=2e-6)
        seen.append(trainer.live_head.hidden.requires_grad)
        return batch["advantages"]

    trainer.on_tokens = on_tokens
    batch = trainer._generate_and_score_completions(rows())
    assert trainer.live_head is None  # scoring and generation are not watched
    trainer.compute_loss(trainer.model, batch).backward()
    assert seen == [True]
    assert trainer.live_head is None
    policy = trainer.model.get_base_model() if adapter else trainer.model
    assert not policy.base_model._forward_hooks


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_first_scoring_pass_off_policy_is_the_policy_that_generated(adapter, tmp_path, monkeypatch):
    """Not the reference, which with an adapter is the same model with another one."""
    support.model(seed=9).save_pretrained(tmp_path / "base")
    monkeypatch.setattr("trl.trainer.grpo_trainer.get_config_model_id", lambda config: str(tmp_path / "base"))
    trainer = build(
        tmp_path,
        adapter=adapter,
        beta=0.1,
        steps_per_generation=2,
        per_device_train_batch_size=4,
        temperature=0.7,
    )
    trainer.wants_old_head = trainer.wants_reference = True
    if adapter:  # as it began it is the reference
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.data.mul_(2)
    parts = []

    def on_old_head(scored):
        parts.append(len(scored.ids))
        logps = torch.zeros(scored.ids.shape)
        logps[scored.mask] = scored.statistics(scored.mask).logps
        assert not scored.hidden.requires_grad
        return {"again": logps}

    trainer.on_old_head = on_old_head
    batch = trainer._generate_and_score_completions(rows())
    mask = batch["completion_mask"].bool()
    assert parts == [4, 4]  # TRL scores in micro-batches: hidden states of the whole batch are never held
    assert torch.allclose(batch["again"][mask], batch["old_per_token_logps"][mask], atol=2e-6)
    assert (batch["again"] - batch["ref_per_token_logps"])[mask].abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"gradient_accumulation_steps": 2, "num_iterations": 2},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2},
        {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
    ],
    ids=str,
)
def test_off_policy_is_when_trl_keeps_old_log_probs(settings, tmp_path):
    trainer = build(tmp_path, per_device_train_batch_size=4, **settings)
    batch = trainer._generate_and_score_completions(rows(4 * trainer.args.steps_per_generation))
    assert trainer.off_policy == ("old_per_token_logps" in batch)


def test_on_policy_old_log_probs_stay_out_of_the_loss(tmp_path):
    trainer = build(tmp_path)
    trainer.wants_old_logps = trainer.wants_old_head = True
    live = []
    trainer.on_tokens = lambda batch, logps, entropies: live.append(logps.detach()) or batch["advantages"]
    trainer.on_old_head = lambda scored: pytest.fail("on-policy the live head is used")
    batch = trainer._generate_and_score_completions(rows())
    assert "old_per_token_logps" not in batch
    trainer.compute_loss(trainer.model, batch)
    mask = batch["completion_mask"].bool()
    assert torch.allclose(batch["posttrain/old_logps"][mask], live[0][mask], atol=1e-6)

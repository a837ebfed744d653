"""The tail of the gap between sampler and trainer, from the log-probabilities that the sampler gives."""

import math

import pytest
import support

from posttrain import GRPOTrainer
from posttrain.rl import ACE


def rollout(prompts, trainer):
    tokenizer = support.tokenizer()
    ids = [[5 + (3 * i + t) % 20 for t in range(1 + i % 4)] for i in range(len(prompts))]
    # one token in three is where a uniform policy would have it, the others are far off
    logps = [[-math.log(len(tokenizer)) - (1.0 if t % 3 else 0.0) for t in range(len(row))] for row in ids]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": logps,
    }


@pytest.mark.parametrize("methods", [[], [ACE()]], ids=["no methods", "ace"])
def test_shares_of_tokens_that_are_off(tmp_path, methods):
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, num_iterations=2, max_steps=2, logging_steps=1),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout_func=rollout,
        methods=methods,
    )
    seen = {}
    inner = trainer.on_sampled
    trainer.on_sampled = lambda batch: (seen.setdefault("batch", dict(batch)), inner(batch))[1]
    trainer.train()
    batch = seen["batch"]
    gap = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
    gap = gap[batch["completion_mask"].bool()]
    found = support.logged(trainer, "rollout_gap/over_10_percent", "rollout_gap/over_50_percent")[0]
    shares = [(gap > math.log(limit)).double().mean().item() for limit in (1.1, 1.5)]
    assert found == pytest.approx(shares)
    assert 0 < found[1] < found[0] < 1


def test_nothing_without_a_sampler_that_tells(tmp_path):
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, num_iterations=2, max_steps=2, logging_steps=1),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        methods=[],
    )
    trainer.train()
    assert not [key for row in trainer.state.log_history for key in row if key.startswith("rollout_gap")]

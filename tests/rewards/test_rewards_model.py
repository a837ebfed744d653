"""A trained reward model as a reward: its numbers, what it refuses, and a run that uses one."""

import math

import pytest
import support
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from posttrain.config.schema import DataConfig, ModelConfig, RewardConfig
from posttrain.data.pairs import encode_scored
from posttrain.models.load import ModelLoadError
from posttrain.models.scoring import load_reward_model
from posttrain.rewards import build_rewards
from posttrain.rewards.model import ModelReward
from posttrain.rewards.registry import ParameterError

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '?' }}{% endfor %}"


def scorer(**overrides):
    torch.manual_seed(0)
    config = support.model(**overrides).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def by_hand(model, tokenizer, prompt, completion):
    """One sequence at a time, without padding."""
    ids = torch.tensor([encode_scored(tokenizer, prompt, completion)])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, -1]
    return (model.score.weight @ hidden).item()


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_scores_are_those_of_the_last_token_in_any_batch(chat):
    model, tokenizer = scorer(), support.tokenizer()
    prompts, completions = ["a b", "see", "x"], ["c", " the long one", "y z"]
    if chat:
        tokenizer.chat_template = CHAT
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [
            completions[0],
            *([{"role": "assistant", "content": text}] for text in completions[1:]),
        ]
    expected = [by_hand(model, tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
    for size in (1, 2, 3):
        reward = ModelReward(model, tokenizer, batch_size=size)
        assert reward(prompts=prompts, completions=completions) == pytest.approx(expected, abs=1e-6)
    assert [v.status for v in reward.verdicts] == ["wrong"] * 3
    # between two scores: at one of them, rounding would decide
    threshold = sum(sorted(expected)[:2]) / 2
    judged = ModelReward(model, tokenizer, threshold=threshold)
    verdicts = judged.verify(completions, [{"prompt": prompt} for prompt in prompts])
    assert [v.status == "correct" for v in verdicts] == [score > threshold for score in expected]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_scored_is_an_error_not_a_number():
    model, tokenizer = scorer(), support.tokenizer()
    reward = ModelReward(model, tokenizer, max_length=6, config=RewardConfig(name="model:x", max_failures=1))
    values = reward(prompts=["abc", "abc"], completions=["d", "defg"])
    assert values[0] is not None
    assert values[1] is None
    assert reward.failed == [False, True]
    assert "longer than the 6 tokens" in reward.verdicts[1].message
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    assert reward(prompts=["abc"], completions=["d"]) == [None]


def test_from_a_configuration(tmp_path):
    model, tokenizer = scorer(), support.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    entries = [RewardConfig(name=f"model:{tmp_path}", weight=2.0, params={"batch_size": 4})] * 2
    first, second = build_rewards(entries, DataConfig(source="x.jsonl"))
    assert (first.__name__, second.__name__, first.weight) == ("model", "model_2", 2.0)
    assert first(prompts=["a"], completions=["b"]) == pytest.approx(
        [by_hand(model, tokenizer, "a", "b")], abs=1e-6
    )
    first.close()
    with pytest.raises(ParameterError, match="there is no parameter 'batch'"):
        ModelReward(model, tokenizer, batch=3)


def test_a_causal_model_is_no_reward_model(tmp_path):
    support.model().save_pretrained(tmp_path)
    support.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no trained head .* Train one with task: reward"):
        ModelReward(tmp_path)
    with pytest.raises(ValueError, match="is not trained"):
        ModelReward("embedded:char-llama")


def test_an_adapter_without_a_head_is_no_reward_model(tmp_path):
    """A head would be drawn for it, and give numbers that mean nothing."""
    support.model().save_pretrained(tmp_path / "base")
    support.tokenizer().save_pretrained(tmp_path / "base")
    for name, settings in (("causal", {}), ("untyped", {"task_type": None})):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        get_peft_model(base, support.lora(**settings)).save_pretrained(tmp_path / name)
    with pytest.raises(ModelLoadError, match="adapter of task type CAUSAL_LM: train one with task: reward"):
        ModelReward(tmp_path / "causal", base=str(tmp_path / "base"))
    with pytest.raises(ModelLoadError, match="has no trained head"):
        ModelReward(tmp_path / "untyped", base=str(tmp_path / "base"))
    with pytest.raises(ModelLoadError, match="merge it into its base"):
        load_reward_model(ModelConfig(path=str(tmp_path / "causal")))

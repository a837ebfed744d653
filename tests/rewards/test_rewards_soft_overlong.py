"""DAPO's soft overlong punishment against the values of its definition and TRL's own function."""

import pytest
from trl.rewards import get_soft_overlong_punishment

from posttrain.config.check import check_config
from posttrain.config.schema import DataConfig, RewardConfig
from posttrain.rewards import VerifierStartError, build_rewards
from posttrain.rewards.soft_overlong import penalty, verify

DATA = DataConfig(source="rows.jsonl")


def test_values_of_the_definition():
    assert [penalty(tokens, 100, 20) for tokens in (0, 80, 81, 90, 100, 101, 500)] == [
        0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0
    ]  # fmt: skip
    assert [penalty(tokens, 100, 0) for tokens in (100, 101)] == [0.0, -1.0]


@pytest.mark.parametrize(("limit", "cache"), [(100, 20), (64, 64), (7, 3)])
def test_the_same_as_trl(limit, cache):
    theirs = get_soft_overlong_punishment(limit, cache)
    lengths = range(0, limit + 5)
    assert theirs([[1] * length for length in lengths]) == [
        penalty(length, limit, cache) for length in lengths
    ]


def test_through_the_reward_with_token_ids():
    config = RewardConfig(name="soft_overlong", params={"limit": 10, "cache": 4})
    (reward,) = build_rewards([config], DATA)
    try:
        ids = [[1] * 3, [1] * 8, [1] * 10]
        assert reward(prompts=["a"] * 3, completions=["x"] * 3, completion_ids=ids) == [0.0, -0.5, -1.0]
        assert [verdict.status for verdict in reward.verdicts] == ["correct", "wrong", "wrong"]
    finally:
        reward.close()


def test_without_token_counts_it_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="name another reward first"):
        verify("x", {}, limit=10, cache=4)


def test_lengths_out_of_range_are_refused():
    with pytest.raises(VerifierStartError, match="cache between 0 and limit"):
        build_rewards([RewardConfig(name="soft_overlong", params={"limit": 4, "cache": 5})], DATA)


def test_it_cannot_judge_an_evaluation(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "task: rlvr\ndata: {source: 'reasoning_gym:chain_sum'}\n"
        "rewards: [{soft_overlong: {params: {limit: 8, cache: 4}}}, verifier]\nevaluate: {}\n"
    )
    (problem,) = [p for p in check_config(path).problems if p.severity == "error"]
    assert "list it after the reward that judges" in problem.message

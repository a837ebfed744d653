"""The callables that TRL and the evaluation get: values, counts, logs, refusals."""

from __future__ import annotations

import sys

import pytest
from datasets import Dataset

from posttrain.config.schema import DataConfig, RewardConfig
from posttrain.data.load import LoadedData
from posttrain.rewards import VerifierFailure, build_rewards
from posttrain.rewards.reward import completion_text

FILE = DataConfig(source="rows.jsonl")


@pytest.fixture(scope="module", autouse=True)
def user_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_code")
    (folder / "scores_for_tests.py").write_text(
        "import time\n"
        "def score(prompts, completions, value, scale=1.0, **columns):\n"
        "    assert len(prompts) == len(completions) == len(value) == 1\n"
        "    if value[0] == 'raise': raise RuntimeError('broken ' + prompts[0])\n"
        "    if value[0] == 'hang': time.sleep(60)\n"
        "    if value[0] == 'none': return [None]\n"
        "    return [scale * value[0]]\n"
        "def talk(prompts, completions, trainer_state=None):\n"
        "    return [float(completions[0][-1]['role'] == 'assistant' and prompts[0][0]['content'] == 'hi')]\n"
    )
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def make(data=FILE, **config):
    (reward,) = build_rewards([RewardConfig(**config)], data)
    return reward


def test_five_outcomes_stay_apart():
    reward = make(name="math", unparseable=-0.5, weight=2.0, max_failures=1.0)
    metrics, extra = {}, {}
    values = reward(
        prompts=["p"] * 5,
        completions=["\\boxed{4}", "\\boxed{5}", "dunno", "\\boxed{4}", "\\boxed{4}"],
        completion_ids=[[1]] * 5,
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
        trainer_state=object(),
        answer=["4", "4", "4", "4", None],
        unused=list(range(5)),
    )
    reward.close()
    assert values == [1.0, 0.0, -0.5, 1.0, None]
    assert [v.status for v in reward.verdicts] == ["correct", "wrong", "unparseable", "correct", "error"]
    assert reward.failed == [False, False, False, False, True]
    assert metrics == {
        "verifier/math/correct": 0.4,
        "verifier/math/wrong": 0.2,
        "verifier/math/unparseable": 0.2,
        "verifier/math/error": 0.2,
        "verifier/math/timeout": 0.0,
    }
    assert extra == {"math_status": ["correct", "wrong", "unparseable", "correct", "error"]}
    assert (reward.__name__, reward.weight) == ("math", 2.0)


def test_unparseable_null_leaves_the_row_out_but_is_no_failure():
    reward = make(name="math", unparseable=None)
    assert reward(prompts=["p"], completions=["dunno"], answer=["4"]) == [None]
    assert reward.failed == [False]
    reward.close()


def test_a_user_function_gets_columns_and_params_and_its_numbers_are_the_rewards():
    reward = make(name="python:scores_for_tests.score", params={"scale": 3.0}, deadline=0.5, max_failures=1.0)
    metrics = {}
    values = reward(
        prompts=["p0", "p1", "p2", "p3", "p4"],
        completions=["a"] * 5,
        value=[1, -0.25, "none", "raise", "hang"],
        log_metric=metrics.__setitem__,
    )
    reward.close()
    assert values == [3.0, -0.75, None, None, None]
    assert [v.status for v in reward.verdicts] == ["correct", "wrong", "skipped", "error", "timeout"]
    assert reward.failed == [False, False, False, True, True]
    assert reward.verdicts[3].message == "RuntimeError: broken p3"
    shares = {"correct": 0.2, "wrong": 0.2, "unparseable": 0.0, "error": 0.2, "timeout": 0.2, "skipped": 0.2}
    assert metrics == {f"verifier/score/{status}": share for status, share in shares.items()}


def test_too_many_failures_stop_the_run_and_name_the_rows():
    reward = make(name="python:scores_for_tests.score", deadline=0.5, max_failures=0.4)
    prompts = [f"p{i}" for i in range(5)]
    assert reward(prompts=prompts, completions=["a"] * 5, value=[1, 1, 1, "raise", "raise"]).count(None) == 2
    with pytest.raises(VerifierFailure) as caught:
        reward(prompts=prompts, completions=["a"] * 5, value=[1, "raise", "hang", 1, "raise"])
    reward.close()
    message = str(caught.value)
    assert "3 of 5 completions ended in error (2) or timeout (1); at most 40%" in message
    assert message.index("row 2") < message.index("row 1")  # the slowest comes first
    assert "RuntimeError: broken p1" in message
    assert reward.failed == [False, True, True, False, True]


def test_conversational_completions():
    messages = [{"role": "assistant", "content": "\\boxed{4}"}]
    reward = make(name="math")
    assert reward(prompts=[[{"role": "user", "content": "2+2"}]], completions=[messages], answer=["4"]) == [
        1.0
    ]
    reward.close()
    reward = make(name="python:scores_for_tests.talk")
    assert reward(prompts=[[{"role": "user", "content": "hi"}]], completions=[messages], other=[1]) == [1.0]
    reward.close()


def test_completion_text():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]) == "a"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""
    assert completion_text([]) == ""
    with pytest.raises(TypeError, match="found int"):
        completion_text(3)


def test_names_are_unique():
    configs = [RewardConfig(name=name) for name in ("format", "format", "python:scores_for_tests.score")]
    rewards = build_rewards(configs, FILE)
    assert [reward.__name__ for reward in rewards] == ["format", "format_2", "score"]
    for reward in rewards:
        reward.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "verifier"}, "Choose one of expression, format, math, word_list or python:"),
        ({"name": "format", "params": {"memory_gib": 0}}, "memory_gib must be"),
        ({"name": "forrmat"}, "did you mean 'format'"),
        ({"name": "math", "params": {"gold": 1}}, "gold: Input should be a valid string"),
    ],
)
def test_what_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_verifier_takes_no_task_of_its_own():
    data = DataConfig(source="reasoning_gym:gcd")
    with pytest.raises(ValueError, match=r"'task' comes from data\.source"):
        make(data, name="verifier", params={"task": "lcm"})


def test_missing_columns_are_found_before_training():
    train = Dataset.from_dict({"prompt": ["p"], "final": ["1"]})
    data = LoadedData(FILE, "rlvr", train, None, "", {})
    with pytest.raises(
        ValueError, match=r"'math' reads column 'answer'.*found: prompt, final.*answer: final"
    ):
        make(data, name="math")
    make(data, name="math", params={"gold": "final"}).close()

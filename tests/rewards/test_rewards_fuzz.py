"""Whatever a model writes, every verifier gives a verdict in time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.registry import VerifierSpec

ROW = {
    "answer": "18",
    "nums": [1, 2, 3],
    "target": 7,
    "rg_index": 0,
    "rg_seed": 3,
    "rg_size": 1,
}
NO_ANSWER = {name: value for name, value in ROW.items() if name != "answer"}
SPECS = {
    "math": (VerifierSpec("math"), ROW),
    "math_text": (VerifierSpec("math", {"extract": "text"}), ROW),
    "expression": (VerifierSpec("expression"), ROW),
    "format": (VerifierSpec("format"), ROW),
    "pattern": (VerifierSpec("format", {"pattern": r"(\w+\s?)+\."}), ROW),
    "chain_sum": (VerifierSpec("reasoning_gym", {"task": "chain_sum"}), NO_ANSWER),
    "countdown": (VerifierSpec("reasoning_gym", {"task": "countdown"}), NO_ANSWER),
    "n_queens": (VerifierSpec("reasoning_gym", {"task": "n_queens"}), NO_ANSWER),
    "simple_integration": (VerifierSpec("reasoning_gym", {"task": "simple_integration"}), NO_ANSWER),
}

fragments = st.sampled_from(
    [
        *("\\boxed{", "}", "\\frac", "{1}", "$", "<answer>", "</answer>", "<think>", "</think>", "9**9", "^"),
        *(
            "(",
            ")",
            "+",
            "/",
            "=",
            " ",
            "18",
            "x",
            "\\{",
            "%",
            "\0",
            "\ud800",
            "\n",
            "sqrt(",
            "E",
            "1e9",
            "-",
            ".",
        ),
    ]
)
texts = st.one_of(st.text(max_size=80), st.lists(fragments, max_size=25).map("".join))


@pytest.fixture(scope="module")
def pools():
    made = {name: VerifierPool(spec, deadline=1.0, memory_gib=2.0) for name, (spec, _) in SPECS.items()}
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(texts, min_size=1, max_size=12))
def test_every_text_gets_a_verdict(pools, name, batch):
    verdicts = pools[name].verify(batch, [SPECS[name][1]] * len(batch))
    assert len(verdicts) == len(batch)
    for verdict in verdicts:
        assert verdict.status in ("correct", "wrong", "unparseable", "error", "timeout")
        assert (verdict.score is None) == verdict.failed
        assert verdict.status == "correct" or verdict.score is None or verdict.score < 1.0
        assert verdict.status == "correct" or verdict.status == "wrong" or verdict.message


@pytest.mark.parametrize("name", ["expression", "format", "chain_sum"])
def test_these_never_blame_the_verifier(pools, name):
    hostile = [
        "9**9**9**9",
        "(" * 10_000,
        "<answer>" * 10_000,
        "\ud800\0",
        "\\boxed{" * 10_000,
        "-" * 100_000,
    ]
    verdicts = pools[name].verify(hostile, [SPECS[name][1]] * len(hostile))
    assert {v.status for v in verdicts} <= {"wrong", "unparseable"}

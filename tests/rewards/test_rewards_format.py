from __future__ import annotations

import pytest

from posttrain.rewards import format as form
from posttrain.rewards.extract import canonical, extract_answer

GOOD = "<think>because</think>\n<answer> 42 </answer>"


def test_the_default_form():
    verdict = form.verify(GOOD, {})
    assert (verdict.status, verdict.score, verdict.answer) == ("correct", 1.0, "42")
    assert form.verify(f"\n {GOOD} \n", {}).status == "correct"
    assert form.verify("<think></think><answer>1</answer>", {}).status == "correct"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "<think> occurs 0 times"),
        ("<answer>42</answer>", "<think> occurs 0 times"),
        (GOOD + "<answer>43</answer>", "<answer> occurs 2 times"),
        ("<answer>42</answer><think>because</think>", "order"),
        ("<think>a<answer>42</think></answer>", "order"),
        ("<think>a</think> so <answer>42</answer>", "order"),
        ("hm <think>a</think><answer>42</answer>", "order"),
        ("<think>a</think><answer>42</answer> done", "order"),
        ("</think>a<think><answer>42</answer>", "order"),
        ("<think>a</think></answer>42<answer>", "order"),
        ("<think>a</think><answer> \n</answer>", "empty"),
        ("<think>a</think><answer>42", "</answer> occurs 0 times"),
    ],
)
def test_broken_forms_say_why(text, message):
    verdict = form.verify(text, {})
    assert (verdict.status, verdict.score) == ("wrong", 0.0)
    assert message in verdict.message


def test_a_pattern_matches_everything_unless_told_to_search():
    pattern = r"A: (?P<answer>\d+)"
    assert form.verify("A: 7", {}, pattern=pattern).answer == "7"
    assert form.verify("well, A: 7", {}, pattern=pattern).status == "wrong"
    assert form.verify("well, A: 7.", {}, pattern=pattern, match="search").answer == "7"
    assert form.verify("a\nb", {}, pattern="a.b").status == "correct"  # DOTALL


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        (" a \n", "text", "a"),
        (" \n", "text", None),
        ("<answer>1</answer><answer> 2 </answer>", "answer_tag", "2"),
        ("<answer>1</answer> <answer>2", "answer_tag", "1"),
        ("</answer><answer>", "answer_tag", None),
        ("<answer></answer>", "answer_tag", None),
        (r"\boxed{\frac{1}{2}} text", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{\{1,2\}}", "boxed", r"\{1,2\}"),
        (r"\boxed{\boxed{3}}", "boxed", "3"),
        (r"\boxed{1", "boxed", None),
        (r"\boxed{1\}", "boxed", None),
        ("a 1,000.5, b", "last_number", "1,000.5"),
        ("3-5", "last_number", "5"),
        ("x = -5.", "last_number", "-5"),
        ("7/8", "last_number", "7/8"),
        ("model gpt4", "last_number", None),
        ("٣", "last_number", None),
    ],
)
def test_extraction(text, how, answer):
    assert extract_answer(text, how) == answer


def test_canonical_spellings():
    assert canonical("+1,000.00") == canonical(" 1000 ") == "1000"
    assert canonical("-0.0") == canonical("0") == "0"
    assert canonical("007") == "7"
    assert canonical("1.50") == "1.5"
    assert canonical("100") == "100"
    assert canonical("1,00") == "1,00"
    assert canonical("a \n b") == "a b"
    long = "1" * 5000
    assert len(canonical(long)) < 400
    assert canonical(long) != canonical(long + "1")

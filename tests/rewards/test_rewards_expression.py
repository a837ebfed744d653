"""Countdown expressions: exact values, the multiset of integers, and a parser that nothing gets past."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rewards.expression import ExpressionError, evaluate, parse, verify

ROW = {"nums": [3, 3, 8, 8], "target": 24}
COUNTDOWN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "countdown"


def check(text, nums=(1, 2, 3), target=7, **params):
    return verify(text, {"nums": list(nums), "target": target}, **params)


@pytest.mark.parametrize(
    ("text", "nums", "target"),
    [
        ("8/(3-8/3)", (3, 3, 8, 8), 24),  # not exact in floating point
        (" ( 1 + 2*3 ) \n", (1, 2, 3), 7),
        ("1+2*3 = 7", (1, 2, 3), 7),
        ("1+2×3", (3, 2, 1), 7),
        ("6÷2−1", (6, 2, 1), 2),
        ("-1+2*3", (1, 2, 3), 5),
        ("2-(-3)*1", (1, 2, 3), 5),
        ("10-4-3", (10, 4, 3), 3),  # minus and division group to the left
        ("24/4/3", (24, 4, 3), 2),
        ("1/3+2", (1, 2, 3), "7/3"),
        ("((((((1))))))+2*3", (1, 2, 3), 7),
    ],
)
def test_right_answers(text, nums, target):
    verdict = check(text, nums, target)
    assert (verdict.status, verdict.score) == ("correct", 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1+2+3", "equals 6, the target is 7"),
        ("7", "uses the integers [7], the problem gives [1, 2, 3]"),
        ("1+2*3+0", "uses the integers [0, 1, 2, 3]"),
        ("1+3*2*1", "uses the integers [1, 1, 2, 3]"),
        ("12+3", "uses the integers [3, 12]"),
        ("1/(2-2)", "uses the integers"),
        ("1+2*3=8", "claims to equal 8"),
    ],
)
def test_wrong_answers_say_why(text, message):
    verdict = check(text)
    assert (verdict.status, verdict.score) == ("wrong", 0.0)
    assert message in verdict.message


def test_division_by_zero_is_wrong():
    verdict = check("3/(1-1)", (1, 1, 3), 3)
    assert (verdict.status, verdict.message) == ("wrong", "divides by zero")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "the answer",
        "1+2*3 is it",
        "1+",
        "(1+2*3",
        "1+2*3)",
        "1 2 3",
        "1**2",
        "1//2",
        "2^3",
        "1.0+2*3",
        "0x1+2*3",
        "1e1",
        "1_0",
        "١+٢*٣",  # digits, but not ASCII
        "１+2*3",
        "abs(1)",
        "__import__('os').system('true')",
        "[1][0]+2*3",
        "1 if 1 else 2",
        "1,2,3",
        "()",
        "1+2*3 = 7 = 7",
        "7 = 1+2*3",
        "9" * 19,
        "9" * 5000,
        "9**9**9**9",
        "(" * 5000 + "1" + ")" * 5000,
        "(" * 200 + "1" + ")" * 200,
        "-" * 200 + "1",
        "1" + "+1" * 2000,
        "\x00",
        "\ud800",
    ],
)
def test_everything_else_is_unparseable(text):
    verdict = check(text)
    assert (verdict.status, verdict.score, verdict.answer) == ("unparseable", 0.0, None)


def test_extraction_and_column_names():
    row = {"n": [1, 2, 3], "goal": 7}
    names = {"nums": "n", "target": "goal"}
    assert verify("so <answer>1+2*3</answer>", row, extract="answer_tag", **names).status == "correct"
    assert verify("so \\boxed{1+2*3}.", row, extract="boxed", **names).status == "correct"
    assert verify("so 1+2*3", row, extract="boxed", **names).status == "unparseable"
    assert check("1+2*3=7", equation=False).status == "unparseable"


def test_equal_trees_have_one_spelling():
    assert check("( 1+2 * 3)").answer == check("1+(2*3)").answer == "(1+(2*3))"
    assert check("(1+2)*3").answer != check("1+2*3").answer


@pytest.mark.parametrize(
    "row", [{}, {"nums": [], "target": 1}, {"nums": ["1"], "target": 1}, {"nums": [True], "target": 1}]
)
def test_a_row_without_a_problem_is_an_error_not_a_wrong_answer(row):
    with pytest.raises(ValueError, match="must hold a list of integers"):
        verify("1", row)


@pytest.mark.parametrize("target", [None, "many", "1/0"])
def test_a_row_without_a_target_is_an_error(target):
    with pytest.raises(ValueError, match="must hold a number"):
        verify("1", {"nums": [1], "target": target})


trees = st.recursive(
    st.integers(0, 50).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=12,
)


@given(trees)
def test_values_agree_with_python_on_expressions_we_wrote(text):
    # eval is safe here: the text comes from the strategy above, not from a model
    tree, integers = parse(text)
    wrapped = "".join(
        f"Fraction({t})" if t.isdigit() else t for t in text.replace("(", "( ").replace(")", " )").split()
    )
    try:
        expected = eval(wrapped, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(tree)
        return
    assert evaluate(tree) == expected
    assert integers == [int(t) for t in text.replace("(", " ").replace(")", " ").split() if t.isdigit()]


@given(st.text(alphabet="0123456789+-*/() =.x", max_size=60))
def test_arbitrary_text_gives_a_verdict(text):
    assert verify(text, ROW).status in ("correct", "wrong", "unparseable")


def test_the_error_says_where():
    with pytest.raises(ExpressionError, match="'x' at character 4"):
        parse("1 + x")


def test_all_shared_countdown_solutions_are_correct():
    if not (COUNTDOWN / "test.jsonl").is_file():
        pytest.skip("shared/data/countdown is not beside the repository")
    rows = [json.loads(line) for line in (COUNTDOWN / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    assert {verify(row["solution"], row).status for row in rows} == {"correct"}
    assert {verify(row["solution"], row | {"target": row["target"] + 1}).status for row in rows} == {"wrong"}

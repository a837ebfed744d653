"""Mathematical answers: right ones in many spellings, wrong ones, and what cannot be read."""

from __future__ import annotations

import pytest

from posttrain.rewards import math as math_answer


@pytest.fixture(scope="module", autouse=True)
def _prepared():
    math_answer.prepare()


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("18", "The answer is 18."),
        ("18", "so we get \\boxed{18}"),
        (18, "\\boxed{18.0}"),
        ("1,000", "1000"),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}"),
        ("\\frac{1}{2}", "\\boxed{0.5}"),
        ("1/2", "$\\dfrac{2}{4}$"),
        ("50\\%", "\\boxed{50\\%}"),
        ("50\\%", "\\boxed{0.5}"),
        ("18", "\\boxed{\\boxed{18}}"),
        ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}"),
        ("\\{1,2,3\\}", "\\boxed{\\{3,1,2\\}}"),
        ("(1,2)", "\\boxed{(1,2)}"),
        ("[1,2)", "\\boxed{[1,2)}"),
        ("x^2+2x+1", "$(x+1)^2$"),
        ("3", "hence $x=3$"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}"),
        ("\\text{east}", "\\boxed{\\text{east}}"),
        ("work $= \\boxed{7}$", "7"),
        ("2^{10}", "1024"),
    ],
)
def test_right(gold, completion):
    verdict = math_answer.verify(completion, {"answer": gold})
    assert (verdict.status, verdict.score) == ("correct", 1.0)


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("18", "The answer is 19."),
        ("18", "first 18, but then \\boxed{81}"),
        ("18", "\\boxed{-18}"),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}"),
        ("\\frac{1}{2}", "\\boxed{2}"),
        ("50\\%", "\\boxed{5\\%}"),
        ("\\{1,2,3\\}", "\\boxed{\\{1,2\\}}"),
        ("(1,2)", "\\boxed{(2,1)}"),
        ("[1,2)", "\\boxed{[1,2]}"),
        ("x^2+2x+1", "$(x-1)^2$"),
        ("7", "\\boxed{\\frac{1}{0}}"),
        ("\\text{east}", "\\boxed{\\text{west}}"),
    ],
)
def test_wrong(gold, completion):
    verdict = math_answer.verify(completion, {"answer": gold})
    assert (verdict.status, verdict.score) == ("wrong", 0.0)
    assert verdict.message.startswith("read as ")


@pytest.mark.parametrize("completion", ["", "I do not know", "\\boxed{", "\\boxed{}", "\0"])
def test_unparseable(completion):
    verdict = math_answer.verify(completion, {"answer": "18"})
    assert (verdict.status, verdict.score, verdict.answer) == ("unparseable", 0.0, None)


def test_strict_extraction():
    row = {"answer": "18"}
    assert math_answer.verify("it is 18", row, extract="boxed").status == "unparseable"
    assert math_answer.verify("19 <answer>18</answer> 20", row, extract="answer_tag").status == "correct"
    assert math_answer.verify("\\frac{36}{2}", row, extract="text").status == "correct"
    assert math_answer.verify("18 of 20", row, extract="last_number").status == "wrong"


def test_correct_answers_share_one_spelling_and_wrong_ones_differ():
    row = {"final": "1/2"}
    spelled = [
        math_answer.verify(text, row, gold="final").answer for text in ("$0.5$", "$\\frac12$", "$50\\%$")
    ]
    assert len(set(spelled)) == 1
    others = {math_answer.verify(text, row, gold="final").answer for text in ("3", "4", "\\boxed{3}")}
    assert others == {"3", "4"}


@pytest.mark.parametrize("gold", [None, "", " ", [], True])
def test_a_missing_gold_answer_is_an_error_not_a_wrong_answer(gold):
    with pytest.raises(ValueError, match="column 'answer' must hold the right answer"):
        math_answer.verify("1", {"answer": gold})


def test_model_text_is_not_run():
    for text in ("__import__('os').abort()", "\\boxed{__import__('os').abort()}", "$exit()$"):
        assert math_answer.verify(text, {"answer": "18"}).status in ("wrong", "unparseable")

"""The bounded word-list score."""

import pytest

from posttrain.rewards.registry import VerifierSpec, check, resolve
from posttrain.rewards.word_list import verify

LISTS = {"positive": ["happy", "fun"], "negative": ["sad"]}


@pytest.mark.parametrize(
    ("text", "score", "status"),
    [
        ("", 0.5, "wrong"),
        ("Happy, HAPPY day", 5 / 6, "wrong"),
        ("fun fun fun fun fun", 1.0, "correct"),
        ("sad sad", 1 / 6, "wrong"),
        ("sad sad sad sad sad", 0.0, "wrong"),
        ("happy but sad", 0.5, "wrong"),
        ("unhappy funny", 0.5, "wrong"),
    ],
)
def test_score(text, score, status):
    verdict = verify(text, {}, **LISTS)
    assert verdict.score == pytest.approx(score)
    assert verdict.status == status


def test_distinct_counts_a_word_once():
    assert verify("fun fun fun happy", {}, distinct=True, **LISTS).score == pytest.approx(5 / 6)


def test_bound_must_be_positive():
    with pytest.raises(ValueError, match="bound must be positive, found 0"):
        resolve(VerifierSpec("word_list", {**LISTS, "bound": 0.0}))


def test_lists_are_needed():
    with pytest.raises(ValueError, match="negative"):
        check(VerifierSpec("word_list", {"positive": ["a"]}))

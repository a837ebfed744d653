"""pass@k, maj@k, diversity and the bootstrap against hand-computed values and brute force."""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.evaluation.estimators import (
    EXACT_UP_TO,
    Estimate,
    bootstrap,
    distinct_answers,
    distinct_n,
    maj_at_k,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 2, 2, 5 / 6),  # of the 6 pairs only one has no correct sample
        (5, 1, 2, 2 / 5),
        (16, 0, 4, 0.0),
        (16, 16, 4, 1.0),
        (16, 13, 4, 1.0),  # only three wrong ones: any four hold a correct one
        (10, 3, 1, 0.3),
        (3, 1, 3, 1.0),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-13)


@pytest.mark.parametrize(("n", "c", "k"), [(100_000, 1, 7), (100_000, 3, 50_000), (99_999, 40_000, 2)])
def test_pass_at_k_is_stable_for_many_samples(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [(4, 2, 5, "k=5 needs at least 5 samples, found 4"), (4, 2, 0, "at least 1"), (4, 5, 2, "correct=5")],
)
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def maj_by_enumeration(answers: list, correct: list[bool], k: int) -> float:
    """Every order of drawing k of n; a tie goes to the answer drawn first."""
    right: dict = {}
    for answer, is_right in zip(answers, correct, strict=True):
        right.setdefault(answer, is_right)
    wins = total = 0
    for order in permutations(range(len(answers)), k):
        votes: Counter = Counter(answers[i] for i in order if answers[i] is not None)
        total += 1
        if votes:
            best = max(votes.values())
            wins += right[next(answer for answer in votes if votes[answer] == best)]
    return wins / total


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["7", "7", "9"], {"7"}, 3, 1.0),
        (["7", "7", "9"], {"7"}, 1, 2 / 3),
        (["7", "9"], {"7"}, 2, 0.5),  # a tie: whichever is drawn first
        (["9", "9", "7"], {"7"}, 3, 0.0),
        ([None, None, "7"], {"7"}, 3, 1.0),  # no answer never wins a vote
        ([None, "7"], {"7"}, 1, 0.5),
        ([None, None], set(), 2, 0.0),
        (["7", "7.0", "9", "9"], {"7", "7.0"}, 4, 0.0),  # right answers written apart do not add up
    ],
)
def test_maj_at_k_by_hand(answers: list, right: set, k: int, expected: float) -> None:
    assert maj_at_k(answers, [answer in right for answer in answers], k) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=7),
    st.sets(st.sampled_from(["a", "b", "c", "d"])),
    st.data(),
)
def test_maj_at_k_is_the_share_of_draws_it_wins(answers: list, right: set, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    correct = [answer in right for answer in answers]
    assert maj_at_k(answers, correct, k) == pytest.approx(maj_by_enumeration(answers, correct, k), abs=1e-12)


@given(st.permutations(["a", "a", "b", "b", "c", None, "d", "d"]), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_maj_at_k_ignores_the_order_of_samples(answers: list, k: int) -> None:
    reference = maj_at_k(sorted(answers, key=str), [a == "a" for a in sorted(answers, key=str)], k)
    assert maj_at_k(answers, [answer == "a" for answer in answers], k) == pytest.approx(reference, rel=1e-12)


def test_maj_at_k_stays_exact_at_the_largest_exact_size() -> None:
    answers = ["a"] * 600 + ["b"] * 400
    assert len(answers) == EXACT_UP_TO
    # two answers and an odd k: a wins exactly when it has more than half of the draws (hypergeometric)
    for k in (3, 501):
        wins = sum(math.comb(600, j) * math.comb(400, k - j) for j in range(k // 2 + 1, k + 1))
        expected = float(Fraction(wins, math.comb(1000, k)))
        assert maj_at_k(answers, [a == "a" for a in answers], k) == pytest.approx(expected, rel=1e-9)


def test_maj_at_k_by_random_draws_beyond() -> None:
    answers = ["a"] * 900 + ["b"] * 600
    correct = [answer == "a" for answer in answers]
    wins = sum(math.comb(900, j) * math.comb(600, 3 - j) for j in (2, 3))
    expected = float(Fraction(wins, math.comb(1500, 3)))
    found = maj_at_k(answers, correct, 3)
    assert found == pytest.approx(expected, abs=4 * 0.5 / 64)  # four standard errors of 4096 draws
    assert found == maj_at_k(answers, correct, 3)
    assert found != maj_at_k(answers, correct, 3, seed=1)


def test_maj_at_k_refuses_mismatched_lengths() -> None:
    with pytest.raises(ValueError, match="2 answers and 1 verdicts"):
        maj_at_k(["a", "b"], [True], 1)


def test_diversity_by_hand() -> None:
    assert distinct_answers(["1", "1", None, "2"]) == 2
    corpus = [[1, 2, 1, 2], [1, 2]]
    assert distinct_n(corpus, 1) == 2 / 6
    assert distinct_n(corpus, 2) == 2 / 4  # 12, 21, 12 and 12; none across the boundary
    assert distinct_n(corpus, 3) == 2 / 2
    assert distinct_n(corpus, 5) is None
    with pytest.raises(ValueError, match="n >= 1"):
        distinct_n(corpus, 0)


def test_bootstrap_matches_the_binomial_interval() -> None:
    values = np.array([1.0] * 300 + [0.0] * 100)
    estimate = bootstrap(values, confidence=0.95, resamples=4000, seed=3)
    assert estimate.value == 0.75
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert estimate.low == pytest.approx(0.75 - half, abs=0.005)
    assert estimate.high == pytest.approx(0.75 + half, abs=0.005)
    narrower = bootstrap(values, confidence=0.8, resamples=4000, seed=3)
    assert estimate.low < narrower.low < 0.75 < narrower.high < estimate.high


def test_bootstrap_is_seeded_and_leaves_global_state_alone() -> None:
    values = np.random.default_rng(0).random(50)
    np.random.seed(7)
    state = np.random.get_state()[1].copy()
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert (np.random.get_state()[1] == state).all()


def test_bootstrap_counts_what_it_leaves_out() -> None:
    nan = float("nan")
    assert bootstrap([nan, nan]) == Estimate(None, None, None, 0, 2)
    assert bootstrap([0.25, nan]) == Estimate(0.25, None, None, 1, 1)
    estimate = bootstrap([0.0, 1.0, nan])
    assert (estimate.value, estimate.problems, estimate.left_out) == (0.5, 2, 1)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        bootstrap([[0.0, 1.0]])


def test_paired_difference_has_the_sign_of_after_minus_before_and_uses_the_pairs() -> None:
    difficulty = np.random.default_rng(0).random(200)
    before, after = difficulty, np.clip(difficulty + 0.05, 0, 1)
    estimate = paired_difference(before, after)
    assert estimate.value == pytest.approx((after - before).mean())
    assert estimate.excludes_zero
    assert estimate.low > 0.04
    # unpaired, the spread of difficulty (sd 0.29) would give about +-0.057
    assert estimate.high - estimate.low < 0.01
    worse = paired_difference(after, before)
    assert worse.value == pytest.approx(-estimate.value)
    assert worse.excludes_zero
    assert not paired_difference([0, 1, 0, 1], [1, 0, 0, 1]).excludes_zero


def test_paired_difference_drops_a_problem_that_is_missing_on_either_side() -> None:
    nan = float("nan")
    estimate = paired_difference([0.0, nan, 0.5, 1.0], [1.0, 1.0, nan, 1.0])
    assert (estimate.value, estimate.problems, estimate.left_out) == (0.5, 2, 2)
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([0.0], [0.0, 1.0])

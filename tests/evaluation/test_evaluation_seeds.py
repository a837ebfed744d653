"""Intervals over seeds against tables of Student's t and hand-computed examples."""

import math
import random

import pytest

from posttrain.evaluation.seeds import over_seeds, paired_over_seeds, t_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "table"),
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.975, 4, 2.7764), (0.975, 7, 2.3646),
        (0.975, 9, 2.2622), (0.975, 29, 2.0452), (0.95, 5, 2.0150), (0.995, 10, 3.1693), (0.975, 10_000,
        1.9602),
    ],
)  # fmt: skip
def test_quantiles_of_the_published_table(probability, freedom, table):
    assert t_quantile(probability, freedom) == pytest.approx(table, abs=5e-5)


def test_the_median_is_zero():
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 3), (1.0, 3), (0.975, 0)])
def test_quantile_refuses_what_it_cannot_give(probability, freedom):
    with pytest.raises(ValueError, match="t_quantile needs"):
        t_quantile(probability, freedom)


def test_mean_and_interval_of_five_seeds():
    estimate = over_seeds([0.1, 0.2, 0.3, 0.4, 0.5])
    half = 2.776445 * math.sqrt(0.025) / math.sqrt(5)
    assert estimate.value == pytest.approx(0.3)
    assert estimate.low == pytest.approx(0.3 - half, abs=1e-6)
    assert estimate.high == pytest.approx(0.3 + half, abs=1e-6)
    assert (estimate.seeds, estimate.left_out) == (5, 0)
    assert estimate.excludes_zero
    assert over_seeds([0.1, 0.2, 0.3, 0.4, 0.5], confidence=0.9).high == pytest.approx(
        0.3 + 2.131847 * math.sqrt(0.005), abs=1e-6
    )


def test_missing_seeds_are_counted():
    estimate = over_seeds([1.0, None, float("nan"), 3.0])
    assert (estimate.value, estimate.seeds, estimate.left_out) == (2.0, 2, 2)
    one = over_seeds([1.0, None])
    assert (one.value, one.low, one.high, one.seeds) == (1.0, None, None, 1)
    assert not one.excludes_zero
    none = over_seeds([None, None])
    assert (none.value, none.low, none.seeds, none.left_out) == (None, None, 0, 2)


def test_difference_is_second_minus_first_over_pairs():
    estimate = paired_over_seeds([1.0, 2.0, None, 4.0], [1.5, 2.7, 9.0, None])
    assert estimate.value == pytest.approx(0.6)
    assert (estimate.seeds, estimate.left_out) == (2, 2)
    assert estimate.high == pytest.approx(0.6 + 12.7062 * 0.1, abs=1e-4)


def test_pairing_removes_what_seeds_share():
    first = [0.0, 10.0, 20.0, 30.0]
    estimate = paired_over_seeds(
        first, [value + 1 + shift for value, shift in zip(first, (-0.1, 0.1) * 2, strict=True)]
    )
    half = 3.182446 * math.sqrt(0.04 / 3) / 2
    assert estimate.value == pytest.approx(1.0)
    assert estimate.low == pytest.approx(1.0 - half, abs=1e-6)
    assert estimate.excludes_zero


def test_seeds_that_agree_exactly_prove_nothing():
    estimate = paired_over_seeds([0.0, 10.0], [1.0, 11.0])
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
    assert not estimate.excludes_zero


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_excluded_on_either_side_only(sign):
    assert over_seeds([sign * value for value in (1.0, 1.1, 0.9)]).excludes_zero
    assert not over_seeds([sign * value for value in (1.0, -0.5, 0.9)]).excludes_zero


def test_a_difference_needs_the_same_seeds():
    with pytest.raises(ValueError, match="same seeds on both sides, found 1 and 2"):
        paired_over_seeds([1.0], [1.0, 2.0])


def test_intervals_cover_the_mean_as_often_as_they_say():
    generator = random.Random(0)
    hits = 0
    for _ in range(2000):
        estimate = over_seeds([generator.gauss(1.0, 2.0) for _ in range(5)])
        hits += estimate.low <= 1.0 <= estimate.high
    assert 0.935 <= hits / 2000 <= 0.965

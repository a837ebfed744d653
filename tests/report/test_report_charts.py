"""The drawings: positions, gaps, bands, smoothing, words."""

import math
import re

import pytest

from posttrain.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    line_chart,
    moving_average,
    number,
    ticks,
)

NAN = math.nan


def paths(svg: str, kind: str = "line") -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<path class="{kind}[^"]*" d="M([^"]*?)Z?"', svg)
    return [[tuple(map(float, point.split(","))) for point in path.split("L")] for path in found]


def test_points_are_where_their_values_say() -> None:
    svg = line_chart("t", [Line("a", [0, 5, 10], [0.0, 1.0, 0.25])], y_range=(0.0, 1.0))
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    middle = (LEFT + right) / 2
    quarter = bottom - 0.25 * (bottom - TOP)
    assert paths(svg) == [[(LEFT, bottom), (middle, TOP), (right, pytest.approx(quarter, abs=0.06))]]


def test_powers_of_two_are_evenly_spaced_and_labelled() -> None:
    svg = line_chart("t", [Line("a", [1, 4, 16], [0.1, 0.2, 0.3])], log2_x=True, smooth=False)
    (line,) = paths(svg)
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.11)
    assert re.findall(r'text-anchor="middle">([^<]*)<', svg) == ["1", "4", "16", "step"]


def test_a_value_that_is_no_number_breaks_the_line() -> None:
    svg = line_chart("t", [Line("a", [1, 2, 3, 4, 5], [1.0, 2.0, NAN, 4.0, 5.0])])
    assert [len(path) for path in paths(svg)] == [2, 2]
    assert "nan" not in svg.lower()


def test_a_band_runs_along_the_upper_edge_and_back_along_the_lower() -> None:
    line = Line("a", [1, 2, 3], [0.5, 0.6, 0.7], low=[0.4, None, 0.6], high=[0.6, None, 0.8])
    svg = line_chart("t", [line], smooth=False, y_range=(0.0, 1.0))
    (band,) = paths(svg, "band")
    heights = [(HEIGHT - BOTTOM - y) / (HEIGHT - BOTTOM - TOP) for _, y in band]
    assert heights == pytest.approx([0.6, 0.8, 0.6, 0.4], abs=1e-3)
    assert "a, 1: 0.5 [0.4, 0.6]" in svg
    assert "a, 2: 0.6<" in svg


def test_long_series_are_smoothed_and_very_long_ones_thinned() -> None:
    values = [float(i % 2) for i in range(100)]
    raw, thick = paths(line_chart("t", [Line("a", range(100), values)], y_range=(0.0, 1.0)))
    assert len(raw) == len(thick) == 100
    assert {y for _, y in raw} == {float(TOP), float(HEIGHT - BOTTOM)}
    # the mean of nine alternating values is 4/9 or 5/9
    middle = [(HEIGHT - BOTTOM - y) / (HEIGHT - BOTTOM - TOP) for _, y in thick[10:90]]
    assert min(middle) == pytest.approx(4 / 9, abs=1e-3)
    assert max(middle) == pytest.approx(5 / 9, abs=1e-3)
    many = Line("a", range(10_000), [float(i) for i in range(10_000)])
    thinned = paths(line_chart("t", [many]))[0]
    assert 0.9 * MAX_POINTS < len(thinned) <= MAX_POINTS


def test_moving_average_by_hand() -> None:
    assert moving_average([1, 2, 6, NAN, 4], 3) == [1.5, 3.0, 4.0, 5.0, 4.0]
    assert math.isnan(moving_average([1, NAN, NAN, NAN, 1], 3)[2])


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 1e-9], [1e300, 2e300]])
def test_flat_single_and_extreme_series_can_be_drawn(values: list[float]) -> None:
    svg = line_chart("t", [Line("a", list(range(len(values))), values)])
    assert paths(svg)
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.52, 0.78) == pytest.approx([0.55, 0.6, 0.65, 0.7, 0.75])
    assert ticks(1, 120) == pytest.approx([20, 40, 60, 80, 100, 120])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (0, "0"), (-2.5, "−2.5"), (12345.6, "12,346"), (2e-6, "2e−6"), (1.5e9, "1.5e9"),
     (NAN, "–"), (None, "–"), (1.0, "1")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_description_says_what_the_line_does_and_is_escaped() -> None:
    svg = line_chart("Reward", [Line('"run" <1>', [1, 2, 9], [0.5, 0.2, 0.75])])
    assert 'aria-label="Reward. &#34;run&#34; &lt;1&gt;: from 0.5 at step 1 to 0.75 at step 9; ' in svg
    assert "lowest 0.2, highest 0.75." in svg
    assert "<1>" not in svg

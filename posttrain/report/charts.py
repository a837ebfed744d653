"""Small line charts as inline SVG.

Drawn by hand instead of by a plotting library: colours and type come from the page's style sheet (so light,
dark and print are right), each chart is a few kilobytes, and every one carries a sentence that says what it
shows to those who do not see it. All text passes through ``escape``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 28
MAX_POINTS = 300
SMOOTH_FROM = 24
HOVER_UP_TO = 60

Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One series.

    Attributes:
        label: Name in the legend and in the description.
        x: Positions, ascending.
        y: Values; NaN breaks the line.
        style: Which of the style sheet's series colours, from 0.
        low: Lower end of a band, or None.
        high: Upper end of a band, or None.
        dashed: Draw a dashed line with hollow points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False


def series(index: int) -> str:
    """Return the style sheet's classes of the run at ``index``: six colours, then the same ones dotted."""
    return f"s{index % 6}" + (" again" if index // 6 % 2 else "")


def number(value: float | None) -> str:
    """Return a short decimal: three significant digits, no needless zeros."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1e6 or magnitude < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    text = f"{value:,.0f}" if magnitude >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers within [low, high]."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) < count + 1.5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str = "step", smooth: bool = True, log2_x: bool = False,
    y_range: tuple[float, float] | None = None,
    height: int = HEIGHT,
) -> Markup:  # fmt: skip
    """Return an SVG with all lines in one frame.

    Args:
        title: What is shown; begins the description.
        lines: At least one, each with at least one finite value.
        x_label: Name of the horizontal axis.
        smooth: Draw long series thin, with a thick moving average on top.
        log2_x: Space the horizontal axis by powers of two and label each position.
        y_range: Fixed vertical range; from the data when unset.
        height: Height in the units in which the width is 360.
    """
    lines = [_thinned(line) for line in lines]
    xs = [math.log2(x) if log2_x else x for line in lines for x in line.x]
    ys = [y for line in lines for band in (line.y, line.low or (), line.high or ()) for y in band]
    x_low, x_high = _padded(min(xs), max(xs), 0.0 if max(xs) > min(xs) else 1.0)
    finite = [y for y in ys if y is not None and not math.isnan(y)]
    y_low, y_high = y_range or _padded(min(finite), max(finite), 0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = ((math.log2(x) if log2_x else x) - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    parts = [_axes(lines, place, (x_low, x_high), (y_low, y_high), x_label, log2_x, height)]
    for line in lines:
        parts.append(_line(line, place, smooth))
    description = f"{title}. " + " ".join(describe(line, x_label) for line in lines)
    head = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description)}" '
        'preserveAspectRatio="xMidYMid meet">'
    )
    return Markup(head + "".join(parts) + "</svg>")


def describe(line: Line, x_label: str) -> str:
    """Return the sentence a screen reader gets for a line."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y)]
    (first, start), (last, end) = points[0], points[-1]
    values = [y for _, y in points]
    if len(points) == 1:
        return f"{line.label}: {number(start)} at {x_label} {number(first)}."
    return (
        f"{line.label}: from {number(start)} at {x_label} {number(first)} to {number(end)} at {x_label} "
        f"{number(last)}; lowest {number(min(values))}, highest {number(max(values))}."
    )


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Return the centred mean over ``window`` values, fewer at the ends; NaN are skipped over."""
    half = window // 2
    means = []
    for place in range(len(values)):
        near = [v for v in values[max(0, place - half) : place + half + 1] if not math.isnan(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def window_for(count: int) -> int:
    """Return the width of the moving average for a series of ``count`` logs."""
    return max(5, count // 12) | 1


def _thinned(line: Line) -> Line:
    """Replace a very long series by the means of equal stretches."""
    if len(line.x) <= MAX_POINTS:
        return line
    size = math.ceil(len(line.x) / MAX_POINTS)
    x, y = [], []
    for start in range(0, len(line.x), size):
        known = [v for v in line.y[start : start + size] if not math.isnan(v)]
        stretch = line.x[start : start + size]
        x.append(sum(stretch) / len(stretch))
        y.append(sum(known) / len(known) if known else math.nan)
    return Line(line.label, x, y, line.style, dashed=line.dashed)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def _axes(
    lines: Sequence[Line],
    place: Place,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    log2_x: bool,
    height: int,
) -> str:
    parts = []
    x_low, x_high = x_range
    for y in ticks(*y_range):
        _, top = place(1, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(_text("tick", LEFT - 6, top + 3.5, "end", number(y)))
    positions = sorted({x for line in lines for x in line.x}) if log2_x else ticks(x_low, x_high)
    if not log2_x and all(x == int(x) for line in lines for x in line.x):
        positions = [x for x in positions if x == int(x)]
    for x in positions:
        left, _ = place(x, y_range[0])
        parts.append(_text("tick", left, height - BOTTOM + 14, "middle", number(x)))
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, height - 1, "middle", x_label))
    return "".join(parts)


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(line: Line, place: Place, smooth: bool) -> str:
    style = series(line.style) + (" dashed" if line.dashed else "")
    parts = []
    if line.low is not None and line.high is not None:
        edges = [
            (x, low, high)
            for x, low, high in zip(line.x, line.low, line.high, strict=True)
            if low is not None and high is not None
        ]
        around = [place(x, high) for x, _, high in edges] + [place(x, low) for x, low, _ in reversed(edges)]
        if edges:
            parts.append(f'<path class="band {style}" d="{_path(around)}Z"/>')
    smoothed = smooth and len(line.x) >= SMOOTH_FROM
    thin = " raw" if smoothed else ""
    for stretch in _stretches(line.x, line.y):
        parts.append(f'<path class="line {style}{thin}" d="{_path([place(*p) for p in stretch])}"/>')
    if smoothed:
        means = moving_average(line.y, window_for(len(line.y)))
        for stretch in _stretches(line.x, means):
            parts.append(f'<path class="line {style}" d="{_path([place(*p) for p in stretch])}"/>')
    dots = not smoothed and len(line.x) <= 16
    for index, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if math.isnan(y) or len(line.x) > HOVER_UP_TO:
            continue
        left, top = place(x, y)
        interval = ""
        if line.low is not None and line.high is not None and line.low[index] is not None:
            interval = f" [{number(line.low[index])}, {number(line.high[index])}]"
        hint = escape(f"{line.label}, {number(x)}: {number(y)}{interval}")
        visible = f'<circle class="dot {style}" cx="{left:.1f}" cy="{top:.1f}" r="2.6"/>' if dots else ""
        parts.append(
            f'<g>{visible}<circle class="hit" cx="{left:.1f}" cy="{top:.1f}" r="6"/><title>{hint}</title></g>'
        )
    return "".join(parts)


def _stretches(x: Sequence[float], y: Sequence[float]) -> list[list[tuple[float, float]]]:
    """Return the runs of consecutive finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in zip(x, y, strict=True):
        if math.isnan(point[1]):
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _path(points: Sequence[tuple[float, float]]) -> str:
    # a single point is drawn as a dot by its round line caps
    points = list(points) * 2 if len(points) == 1 else points
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)

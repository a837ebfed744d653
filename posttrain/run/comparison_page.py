"""The page of a comparison: table, pass@k, curves with bands over seeds, and every run with how it ended."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

import jinja2
from markupsafe import Markup

import posttrain.report
from posttrain.report.charts import Line, line_chart
from posttrain.report.curves import CLOCKS, MAIN
from posttrain.report.evaluation import fixed, signed
from posttrain.report.page import clean, duration
from posttrain.run.comparison import END_SHARE, LEVEL, Comparison
from posttrain.run.directory import write_text

_HIDDEN = CLOCKS | {"num_tokens", "step_time"}


def write_page(comparison: Comparison, command: str, out: Path) -> None:
    """Write the page, self-contained and without scripts, whole or not at all.

    Args:
        comparison: What to show.
        command: The command that repeats it.
        out: The HTML file.
    """
    shared = Path(posttrain.report.__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, shared]), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(fixed=fixed, signed=signed, text=clean, duration=duration)
    keys = logged(comparison)
    page = environment.get_template("comparison.html.j2").render(
        css=Markup((shared / "style.css").read_text(encoding="utf-8")),
        it=comparison,
        arms=comparison.plan.arms,
        level=f"{LEVEL:.0%}",
        end_share=f"{END_SHARE:.0%}",
        at_k=[chart for kind in ("pass", "maj") if (chart := at_k(comparison, kind)) is not None],
        main=[(MAIN[key], chart_over_seeds(comparison, key, MAIN[key])) for key in MAIN if key in keys],
        more=[(key, chart_over_seeds(comparison, key, key)) for key in keys if key not in MAIN],
        command=command,
    )
    write_text(out, page)


def logged(comparison: Comparison) -> list[str]:
    """Return the names of numbers that some run logged as a finite number, in order of appearance."""
    names = dict.fromkeys(name for run in comparison.runs.values() for name in run.names())
    return [name for name in names if name not in _HIDDEN]


def band(points: list[dict[float, float]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return positions, means, lowest and highest values over seeds.

    Args:
        points: One mapping from position to value per seed; a position may be missing in some.
    """
    positions = sorted({x for seed in points for x in seed})
    at = [[seed[x] for seed in points if x in seed] for x in positions]
    return (
        positions,
        [fmean(values) for values in at],
        [min(values) for values in at],
        [max(values) for values in at],
    )


def chart_over_seeds(comparison: Comparison, key: str, title: str) -> Markup:
    """Return the curves of a logged number: mean over seeds per arm, with the band from lowest to highest."""
    lines = []
    for style, arm in enumerate(comparison.arm_names):
        points = []
        for (name, _), run in comparison.runs.items():
            if name == arm:
                pairs = zip(*run.series(key), strict=True)
                points.append({step: value for step, value in pairs if not math.isnan(value)})
        if any(points):
            x, y, low, high = band(points)
            lines.append(Line(arm, x, y, style=style, low=low, high=high))
    return line_chart(title, lines)


def at_k(comparison: Comparison, kind: str) -> tuple[str, Markup] | None:
    """Return held-out pass@k or maj@k after training, with the band over seeds; None without any."""
    lines = []
    for style, arm in enumerate(comparison.arm_names):
        points = []
        for (name, _), values in comparison.values.items():
            if name == arm:
                heads = ((key.removeprefix(f"after/{kind}@"), value) for key, value in values.items())
                points.append({float(k): value for k, value in heads if k.isdecimal()})
        if any(points):
            x, y, low, high = band(points)
            lines.append(Line(arm, x, y, style=style, low=low, high=high))
    if not lines:
        return None
    title = f"Held-out {kind}@k after training"
    chart = line_chart(title, lines, x_label="k", log2_x=True, smooth=False, y_range=(0.0, 1.0), height=236)
    return title, chart

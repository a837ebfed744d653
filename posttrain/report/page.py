"""One self-contained HTML page from one or several run directories.

The page asks nothing of any network: styles and drawings are inline, there is no script, and a content
security policy tells the browser to refuse both, whatever a model may have written into a completion.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from posttrain.report import curves, evaluation, several
from posttrain.report.charts import number, series
from posttrain.report.findings import findings
from posttrain.report.load import Run, as_dict, read_run
from posttrain.run.directory import write_text

if TYPE_CHECKING:
    from posttrain.doctor.finding import Finding

_HERE = Path(__file__).parent
# control characters are not allowed in HTML: show their pictures (U+2400 and following) instead
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def write_report(run_dirs: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several with their curves overlaid.

    Args:
        run_dirs: One run directory or several. Missing or damaged files inside are named on the page.
        out: File to write; ``report.html`` in the run directory, or beside the first one of several.

    Returns:
        The file written. It appears whole or not at all.

    Raises:
        FileNotFoundError: A directory does not exist.
        ValueError: A directory holds no run, or none was given.
    """
    paths = [Path(run_dirs)] if isinstance(run_dirs, str | os.PathLike) else [Path(path) for path in run_dirs]
    if not paths:
        raise ValueError("a report needs at least one run directory, found none")
    runs = [read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]
    if out is None:
        out = paths[0] / "report.html" if len(paths) == 1 else paths[0].resolve().parent / "report.html"
    page = render(runs)
    write_text(out, page)
    return out


def render(runs: Sequence[Run]) -> str:
    """Return the page of the given runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        number=number,
        series=series,
        fixed=evaluation.fixed,
        signed=evaluation.signed,
        interval=evaluation.interval,
        text=clean,
        plain=plain,
        size=size,
    )
    views = [(run, evaluation.build(run)) for run in runs]
    return environment.get_template("template.html.j2").render(
        css=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        runs=runs,
        views=views,
        findings=[(run, _shown(findings(run), alone=len(runs) == 1)) for run in runs],
        notes=[(run, run.notes + curves.missing(run)) for run in runs],
        groups=curves.build(runs),
        overlay=evaluation.overlay(runs) if len(runs) > 1 else [],
        results=several.results(views) if len(runs) > 1 else None,
        differing=several.differences(runs) if len(runs) > 1 else [],
        warm_starts=[(run, curves.build([run.warm_start])) for run in runs if run.warm_start],
        pictures=[(run, token_rows(run)) for run in runs],
        cards=curves.cards,
        expects_samples=any(run.config.get("task") not in ("sft", "preference", "reward") for run in runs),
        samples=[(run, samples(run.completions)) for run in runs],
        facts=facts,
        command=command,
    )


def _shown(found: Sequence[Finding], *, alone: bool) -> list[Finding]:
    """Return what is shown: beside other runs no notes, which would crowd out the comparison."""
    return [finding for finding in found if alone or finding.severity != "note"]


def token_rows(run: Run) -> list[dict[str, Any]]:
    """Return the rows of coloured tokens: each token with its share of the largest value, and its value."""
    peaks: dict[tuple[str, str], float] = {}
    for picture in run.pictures:
        for name, values in picture["values"].items():
            key = (str(picture.get("method")), name)
            peaks[key] = max([peaks.get(key, 0.0), *values])
    return [
        {
            "method": picture.get("method"),
            "title": picture.get("title"),
            "name": name,
            "tokens": [
                (token, min(max(value / peak, 0.0), 1.0) if peak else 0.0, value)
                for token, value in zip(picture["tokens"], values, strict=True)
            ],
        }
        for picture in run.pictures
        for name, values in picture["values"].items()
        for peak in [peaks[str(picture.get("method")), name]]
    ]


def samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return completions grouped by step and prompt, in their order: ``step``, ``prompt`` and ``answers``."""
    groups: list[dict[str, Any]] = []
    for row in rows:
        step, prompt = row.get("step"), row.get("prompt")
        if not groups or (groups[-1]["step"], groups[-1]["prompt"]) != (step, prompt):
            groups.append({"step": step, "prompt": prompt, "answers": []})
        groups[-1]["answers"].append(row)
    return groups


def facts(run: Run) -> list[tuple[str, str]]:
    """Return what the run is, in a few (name, value) pairs, as far as known."""
    config = run.config
    model, data = as_dict(config.get("model")), as_dict(config.get("data"))
    selection = as_dict(config.get("selection"))
    found = [
        ("task", config.get("task")),
        ("model", model.get("path")),
        ("adapter", as_dict(model.get("adapter")).get("type")),
        ("data", data.get("source")),
        ("methods", ", ".join(curves.method_names(run))),
        ("selection", selection.get("method") or selection.get("plan")),
        ("steps", number(run.metrics[-1][0]) if run.metrics else None),
        ("training", duration(run.summary.get("train_runtime"))),
    ]
    return [(name, str(value)) for name, value in found if value]


def command(run: Run) -> str:
    """Return the command that repeats the run, or nothing when the manifest does not say."""
    value = run.manifest.get("command")
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value or "")


def duration(seconds: float | None) -> str | None:
    """Return ``72 s``, ``4 min 10 s`` or ``3 h 05 min``."""
    if seconds is None:
        return None
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int) -> str:
    """Return a file size for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def clean(value: Any) -> str:
    """Return a prompt, completion or answer as text: messages with their roles, controls made visible."""
    if value is None:
        return "–"
    if isinstance(value, list) and all(isinstance(item, dict) and "content" in item for item in value):
        value = "\n".join(f"{item.get('role', '?')}: {item['content']}" for item in value)
    return (value if isinstance(value, str) else plain(value)).translate(_CONTROLS)


def plain(value: Any) -> str:
    """Return any value on one line."""
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest path endings that tell all runs apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"the same run directory was given twice: {', '.join(map(str, paths))}")

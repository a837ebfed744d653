"""A deep check on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.deep.findings import DeepReport, Finding

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "dim"}
HEAD, TAIL, AROUND = 8, 8, 4
"""Tokens of a long row that are shown: at its start, at its end, and around each change of the mask."""


def print_deep(report: DeepReport, console: Console) -> None:
    """Print every section: its table or sentences, then what was found."""
    for section in report.sections:
        console.print()
        console.print(Text(section.title, style="bold"), soft_wrap=True)
        show = _FACTS.get(section.name)
        if show is not None and section.facts:
            show(section.facts, console)
        for finding in section.findings:
            _print_finding(finding, console)
        if not section.findings:
            console.print(Text("  nothing to report", style="green"))
    errors, warnings = len(report.of("error")), len(report.of("warning"))
    console.print()
    plural = "s" if warnings != 1 else ""
    text = f"deep check: {'ok' if report.ok else 'not ready'} ({errors} error{'s' if errors != 1 else ''}, "
    console.print(Text(f"{text}{warnings} warning{plural})", style="green" if report.ok else "red"))


def _print_finding(finding: Finding, console: Console) -> None:
    line = Text("  ")
    line.append(f"{finding.level}: ", style=_STYLES[finding.level])
    line.append(finding.message, style="dim" if finding.level == "note" else "")
    console.print(line, soft_wrap=True)
    for label, text in finding.details():
        console.print(Text.assemble((f"    {label}", "cyan"), f": {text}"), soft_wrap=True)


def _tokens(facts: dict[str, Any], console: Console) -> None:
    for row in facts["table"]:
        tokens = row["tokens"]
        trained = sum(token["trained"] for token in tokens)
        title = (
            f"{row['place']}{' ' + row['part'] if row['part'] else ''}: {len(tokens)} tokens, {trained} train"
        )
        title += f", {row['cut']} cut off" if row["cut"] else ""
        console.print(Text(f"  {title}"), soft_wrap=True)
        table = Table(show_edge=False, pad_edge=False)
        for name, justify in (("#", "right"), ("id", "right"), ("token", "left"), ("role", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column("trains")
        earlier = -1
        for place in _shown([token["trained"] for token in tokens]):
            if place != earlier + 1:
                table.add_row("", "", Text(f"... {place - earlier - 1} more", style="dim"), "", "")
            earlier = place
            token = tokens[place]
            style = "green" if token["trained"] else "dim"
            table.add_row(
                str(place),
                str(token["id"]),
                Text(repr(token["text"]), style=f"bold {style}" if token["special"] else style),
                Text(token["role"], style=style),
                Text("yes" if token["trained"] else "-", style=style),
            )
        console.print(table)


def _shown(trained: list[bool]) -> list[int]:
    """Return the places to show: both ends, and where the mask changes."""
    last = len(trained)
    changes = [place for place in range(1, last) if trained[place] != trained[place - 1]]
    wanted = {*range(HEAD), *range(last - TAIL, last)}
    for change in changes[:6]:
        wanted |= set(range(change - AROUND, change + AROUND))
    return sorted(place for place in wanted if 0 <= place < last)


def _rows(facts: dict[str, Any], console: Console) -> None:
    lines = [f"{facts['train_rows']:,} training rows"]
    if facts["held_out_rows"] is not None:
        lines.append(f"{facts['held_out_rows']:,} held out")
    if facts.get("looked_at", facts["train_rows"]) < facts["train_rows"]:
        lines.append(f"lengths from {facts['looked_at']:,} of them")
    console.print(Text(f"  {', '.join(lines)}; columns {', '.join(facts['columns'])}"), soft_wrap=True)
    for name, title in (
        ("prompt_tokens", "prompt"),
        ("gold_tokens", "gold answer"),
        ("tokens", "whole sequence"),
    ):
        found = facts.get(name)
        if not found or "longest" not in found:  # no sequence is left: a finding says why
            continue
        parts = found.get("percentiles", {p: found.get(f"p{p}") for p in (50, 90, 99)})
        title = found.get("column", title)
        text = f"  tokens of a {title}: " + ", ".join(
            f"{p} % have at most {value}" for p, value in parts.items()
        )
        console.print(Text(f"{text}, the longest {found['longest']}"), soft_wrap=True)


def _words(facts: dict[str, Any], console: Console) -> None:
    for line in facts["words"]:
        console.print(Text(f"  {line}"), soft_wrap=True)


def _pay(facts: dict[str, Any], console: Console) -> None:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(f"mean pay on {facts['rows']} rows")
    names = list(next(iter(facts["pay"].values()), {}))
    for name in names:
        weight = facts["weights"].get(name, 1)
        table.add_column(name if weight == 1 else f"{name} (x {weight:g})", justify="right")
    for kind, pay in facts["pay"].items():
        cells = ("-" if pay[name] is None else f"{pay[name]:.3g}" for name in names)
        table.add_row(Text(kind), *cells)
    console.print(table)


def _memory(facts: dict[str, Any], console: Console) -> None:
    console.print(
        Text(
            f"  {facts['rows']} sequences of up to {facts['tokens']} tokens in a pass on {facts['device']}; "
            f"{facts['trainable']:,} weights train"
        ),
        soft_wrap=True,
    )
    ways = facts["sharded"] or {"bytes": facts["terms"]}
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("GiB of each process" if facts["sharded"] else "at the peak")
    for way in ways:
        table.add_column(way if facts["sharded"] else "GiB", justify="right")
    terms = dict.fromkeys(name for way in ways.values() for name, size in way.items() if size)
    for name in terms:
        table.add_row(name, *(_gib(way.get(name, 0)) for way in ways.values()))
    table.add_row("total", *(_gib(sum(way.values())) for way in ways.values()), style="bold")
    console.print(table)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f}" if size < 2**30 else f"{size / 2**30:.2f}"


_FACTS: dict[str, Callable[[dict[str, Any], Console], None]] = {
    "tokens": _tokens,
    "data": _rows,
    "rewards": _pay,
    "batch": _words,
    "memory": _memory,
}

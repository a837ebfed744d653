"""Sampled completions in the terminal: the newest, those of a step, those of a running run as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posttrain.report.load import as_dict, as_number
from posttrain.run.directory import RunDirectory, RunError, json_object, last_json_lines, read_json_object
from posttrain.terminal import visible

SHOWN = 8
LENGTH = 1200
"""Characters of a text that are shown; longer ones lose their middle."""

_SEARCHED = 5000
_INDENT = 10
_STYLES = {
    "correct": "green",
    "wrong": "red",
    "unparseable": "yellow",
    "error": "magenta",
    "timeout": "magenta",
    "skipped": "dim",
}


def newest(run: RunDirectory, *, count: int = SHOWN, status: str | None = None) -> list[dict[str, Any]]:
    """Return the completions of the newest log, or the newest with a certain status; oldest first.

    Args:
        run: Where to look.
        count: How many at most.
        status: Of the first reward, such as ``wrong``; None for all.
    """
    rows = last_json_lines(run.completions, count if status is None else _SEARCHED)
    if status is not None:
        return [row for row in rows if row.get("status") == status][-count:]
    return [row for row in rows if row.get("step") == rows[-1].get("step")]


def at_step(
    run: RunDirectory, step: int, *, count: int = SHOWN, status: str | None = None
) -> list[dict[str, Any]]:
    """Return completions of the log nearest to ``step``."""
    found: list[dict[str, Any]] = []
    nearest: float | None = None
    if not run.completions.exists():
        return []
    with run.completions.open("rb") as file:
        for line in file:
            row = json_object(line)
            at = None if row is None else as_number(row.get("step"))
            if row is None or at is None or (status is not None and row.get("status") != status):
                continue
            if nearest is None or abs(at - step) < abs(nearest - step):
                nearest, found = at, []
            if at == nearest and len(found) < count:
                found.append(row)
    return found


def held_out(run: RunDirectory, *, count: int = SHOWN, status: str | None = None) -> list[dict[str, Any]]:
    """Return samples of the last held-out evaluation, one per problem, in the form of completions."""
    stored = read_json_object(run.evaluation)
    part = as_dict(stored.get("after")) or as_dict(stored.get("before"))
    problems = part.get("problems")
    rows = []
    for problem in problems if isinstance(problems, list) else ():
        samples = as_dict(problem).get("samples")
        for sample in samples if isinstance(samples, list) else ():
            found = as_dict(sample)
            if status is None or found.get("status") == status:
                rows.append(
                    {
                        "prompt": as_dict(problem).get("prompt"),
                        "completion": found.get("text"),
                        "status": found.get("status"),
                        "rewards": {"score": found.get("score")},
                    }
                )
                break
        if len(rows) == count:
            break
    return rows


def follow(
    run: RunDirectory,
    running: Callable[[], bool],
    *,
    status: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """Return the completions that are written from this call on, as they come, until the run has ended.

    Args:
        run: Where to look; the file need not exist yet.
        running: Whether more may come.
        status: Only those with this status.
        wait: Called between two looks, with seconds.
    """
    return _following(run, running, status, wait, _end(run.completions))


def _following(
    run: RunDirectory,
    running: Callable[[], bool],
    status: str | None,
    wait: Callable[[float], None],
    begin: tuple[int, int],
) -> Iterator[dict[str, Any]]:
    place, identity = begin
    seen = max((as_number(row.get("step")) or 0 for row in last_json_lines(run.completions, 1)), default=0)
    known = -1
    while True:
        more = running()  # asked before the look, so that the last lines are not missed
        size, which = _end(run.completions)
        if which != identity or size < place:
            # written anew by a resumed run, whose first steps are those that were shown
            place, identity, known = 0, which, seen
        if size > place:
            with run.completions.open("rb") as file:
                file.seek(place)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    place += len(line)
                    row = json_object(line)
                    step = None if row is None else as_number(row.get("step"))
                    if row is None or step is None or step <= known:
                        continue
                    seen = max(seen, step)
                    if status is None or row.get("status") == status:
                        yield row
        if not more:
            return
        wait(1.0)


def _end(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_ino


def print_samples(rows: Iterable[Mapping[str, Any]], console: Console, *, full: bool = False) -> None:
    """Print completions as blocks: a line with step, status and rewards, the prompt, the completion."""
    for row in rows:
        status = visible(str(row.get("status", "")))
        style = _STYLES.get(status, "cyan")
        head = Text()
        if row.get("step") is not None:
            head.append(visible(f"step {row['step']}  "), "bold")
        if status:
            head.append(f"{status}  ", f"bold {style}")
        rewards = as_dict(row.get("rewards"))
        head.append(
            "  ".join(f"{visible(str(name))} {_figure(value)}" for name, value in rewards.items()), style
        )
        if as_number(row.get("advantage")) is not None:
            head.append(f"  advantage {row['advantage']:+.3g}", "dim")
        console.print(head, soft_wrap=True)
        for label, value, colour in (
            ("prompt", row.get("prompt"), "dim"),
            ("answer", row.get("completion"), style),
        ):
            lines = (_readable(value, full) or "(empty)").split("\n")
            # a pipe gets the lines as they are, a terminal long ones wrapped beneath their beginning
            width = max(20, console.width - _INDENT) if console.is_terminal else None
            name = label
            for line in lines:
                text = Text(line, colour)
                for part in [text] if width is None else text.wrap(console, width, tab_size=4) or [text]:
                    console.print(Text.assemble((f"  {name:<7} ", "dim"), part), soft_wrap=True)
                    name = ""
        console.print()


def _figure(value: Any) -> str:
    return "-" if as_number(value) is None else f"{value:.4g}"


def _readable(value: Any, full: bool) -> str:
    """Return a text or conversation without what a terminal would obey; a long one loses its middle."""
    if isinstance(value, list):
        turns = (as_dict(turn) for turn in value)
        value = "\n".join(f"[{turn.get('role', '?')}] {turn.get('content', '')}" for turn in turns)
    text = visible(str(value if value is not None else ""))
    if full or len(text) <= LENGTH:
        return text
    left_out = len(text) - LENGTH
    return (
        f"{text[: LENGTH // 2]} [... {left_out:,} characters, --full shows them ...] {text[-LENGTH // 2 :]}"
    )


def require_run(folder: Path) -> RunDirectory:
    """Return the run in ``folder``.

    Raises:
        RunError: It is none.
    """
    run = RunDirectory(folder.expanduser())
    if not any(path.is_file() for path in (run.config, run.manifest, run.metrics, run.completions)):
        raise RunError(f"{folder} is no run directory: it holds no config.yaml and no completions.jsonl")
    return run

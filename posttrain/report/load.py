"""Reading a run directory as it is: finished, killed half-way, or incomplete.

Nothing here fails because a file is missing or damaged. What could not be read becomes a note, and the page
shows the notes. Layout of a run: :mod:`posttrain.run.directory`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.run.directory import json_object

FILES = ("config.yaml", "manifest.json", "metrics.jsonl", "completions.jsonl", "evaluation.json")
SHOWN_STEPS = 6
SHOWN_PER_STEP = 3
_STEP = re.compile(rb'\{"step": (\d{1,15}), .*\}\n\Z', re.DOTALL)  # as our own lines begin and end


@dataclass
class Run:
    """What was found in one run directory.

    Attributes:
        path: The directory.
        label: Name in legends; unique on a page.
        config: Resolved configuration, or {}.
        config_text: The file as written, or "".
        manifest: Whatever the manifest holds, or {}.
        metrics: (step, values) of each log, in file order; values are finite numbers, NaN for the others.
        not_finite: Name to the steps at which it was no finite number.
        summary: Numbers logged once, at the end of training.
        completions: Sampled completions at a few steps spread over the run.
        pictures: Numbers over the tokens of a few responses: method, title, step, tokens and values by name.
        evaluation: ``before``, ``after``, ``difference`` as far as they exist.
        export: (relative path, bytes) of every exported file.
        warm_start: The supervised stage, or None.
        notes: What is missing, damaged or left out, one sentence each.
    """

    path: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    not_finite: dict[str, list[float]] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    completions: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    export: list[tuple[str, int]] = field(default_factory=list)
    warm_start: Run | None = None
    notes: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """Return the names of all logged numbers, in order of first appearance."""
        return list(dict.fromkeys(key for _, values in self.metrics for key in values))

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return steps and values of one logged number."""
        points = [(step, values[key]) for step, values in self.metrics if key in values]
        return [step for step, _ in points], [value for _, value in points]


def read_run(path: Path, label: str) -> Run:
    """Read one run directory.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: It holds none of the files of a run.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no run directory at {path}")
    if not any((path / name).exists() for name in FILES):
        raise ValueError(f"{path} is not a run directory: it holds none of {', '.join(FILES)}")
    run = Run(path, label)
    run.config_text = _read_text(run, "config.yaml")
    try:
        config = yaml.safe_load(run.config_text)
    except (yaml.YAMLError, ValueError, RecursionError):
        run.notes.append("config.yaml is not valid YAML; it is shown as it is.")
        config = None
    run.config = as_dict(config)
    run.manifest = _read_json(run, "manifest.json")
    read_metrics(run)
    run.evaluation = read_evaluation(run)
    run.completions = _read_completions(run)
    run.notes = [note for note in run.notes if not _as_it_should_be(run, note)]
    if (path / "mask_examples.json").exists():
        run.pictures = _pictures(run)
    if (path / "warm_start").is_dir():
        run.warm_start = Run(path / "warm_start", label)
        read_metrics(run.warm_start)
        run.notes += [f"warm start: {note}" for note in run.warm_start.notes]
    export = path / "export"
    if export.is_dir():
        files = sorted(file for file in export.rglob("*") if file.is_file())
        run.export = [(file.relative_to(export).as_posix(), file.stat().st_size) for file in files]
    return run


def _as_it_should_be(run: Run, note: str) -> bool:
    """Whether what a note misses is what the configuration did not ask for."""
    task = run.config.get("task")
    if note == "evaluation.json is missing.":
        return run.config.get("evaluate", "not said") is None
    return note == "completions.jsonl is missing." and task in ("sft", "preference", "reward")


def as_dict(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a mapping, else an empty one; files may hold anything."""
    return value if isinstance(value, dict) else {}


def _read_text(run: Run, name: str) -> str:
    try:
        return (run.path / name).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.notes.append(_unreadable(name, error))
        return ""


def _unreadable(name: str, error: OSError) -> str:
    """Return the note for a file that is not there, or is there and cannot be read."""
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing."
    return f"{name} cannot be read ({error.strerror}); it is left out."


def _read_json(run: Run, name: str) -> dict[str, Any]:
    text = _read_text(run, name)
    if not text:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.notes.append(f"{name} is not valid JSON ({error}); it is left out.")
        return {}
    if not isinstance(data, dict):
        run.notes.append(f"{name} holds a {type(data).__name__} instead of an object; it is left out.")
        return {}
    return data


def _pictures(run: Run) -> list[dict[str, Any]]:
    """Return the good pictures; damaged ones are counted in a note."""
    data = _read_json(run, "mask_examples.json").get("pictures")
    pictures = data if isinstance(data, list) else []
    good = [picture for picture in pictures if _is_picture(picture)]
    if len(good) < len(pictures) or data is not pictures:
        run.notes.append(f"mask_examples.json: {len(pictures) - len(good)} of {len(pictures)} are damaged.")
    return good


def _is_picture(picture: Any) -> bool:
    tokens, values = as_dict(picture).get("tokens"), as_dict(as_dict(picture).get("values"))
    return (
        isinstance(tokens, list)
        and all(isinstance(token, str) for token in tokens)
        and all(
            isinstance(row, list)
            and len(row) == len(tokens)
            and all(as_number(value) is not None for value in row)
            for row in values.values()
        )
    )


def read_evaluation(run: Run) -> dict[str, Any]:
    """Return the parts of evaluation.json that are objects."""
    data = _read_json(run, "evaluation.json")
    return {name: part for name, part in data.items() if isinstance(part, dict)}


def read_metrics(run: Run) -> None:
    """Read the logs of a run into it."""
    broken: Counter[str] = Counter()
    for _, row in _json_lines(run, "metrics.jsonl"):
        step = as_number(row.pop("step", None))
        if step is None:
            broken["no step"] += 1
            continue
        numbers = {}
        for key, value in row.items():
            if _is_number(value) or value is None:
                number = as_number(value)
                numbers[key] = math.nan if number is None else float(number)
        if "train_runtime" in row:
            run.summary = {key: value for key, value in numbers.items() if not math.isnan(value)}
        else:
            run.metrics.append((float(step), numbers))
    if broken["no step"]:
        run.notes.append(f"metrics.jsonl: {broken['no step']} lines have no step and are left out.")
    # a log that never was a number anywhere (all null) has nothing to show
    known = {key for _, values in run.metrics for key, value in values.items() if not math.isnan(value)}
    for step, values in run.metrics:
        for key, value in values.items():
            if math.isnan(value):
                run.not_finite.setdefault(key, []).append(step)
    for key, steps in run.not_finite.items():
        total = sum(key in values for _, values in run.metrics)
        run.notes.append(f"metrics.jsonl: {key} is not a finite number in {len(steps)} of {total} logs.")
    run.metrics = [(step, {k: v for k, v in values.items() if k in known}) for step, values in run.metrics]


def _read_completions(run: Run) -> list[dict[str, Any]]:
    """Return a few completions from a few steps: first, last, and evenly between."""
    places: dict[float, list[int]] = {}
    for offset, row in _json_lines(run, "completions.jsonl"):
        step = as_number(row.get("step"))
        if step is not None:
            places.setdefault(step, []).append(offset)
    steps = sorted(places)
    last = len(steps) - 1
    picked = {steps[round(i * last / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)} if steps else set()
    rows = []
    if picked:
        with (run.path / "completions.jsonl").open("rb") as file:
            for step in sorted(picked):
                for offset in places[step][:SHOWN_PER_STEP]:
                    file.seek(offset)
                    kept = json_object(file.readline())
                    if kept is not None:
                        rows.append(kept)
    return rows


def _json_lines(run: Run, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (byte offset, object) of every good line; damaged ones are counted in a note.

    Completions are cut down to their step here, so that a large file does not fill the memory.
    """
    path = run.path / name
    rows: list[tuple[int, dict[str, Any]]] = []
    damaged: list[int] = []
    offset = number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = _row(line, steps_only=name == "completions.jsonl")
                if row is not None:
                    rows.append((offset, row))
                elif line.strip():
                    damaged.append(number)
                offset += len(line)
    except OSError as error:
        run.notes.append(_unreadable(name, error))
        return []
    if damaged and damaged[-1] == number:
        run.notes.append(f"{name}: the last line is incomplete (stopped while writing); it is left out.")
        damaged.pop()
    if damaged:
        run.notes.append(f"{name}: {len(damaged)} damaged lines are left out (first: line {damaged[0]}).")
    if not rows:
        run.notes.append(f"{name} holds no complete line.")
    return rows


def _row(line: bytes, *, steps_only: bool) -> dict[str, Any] | None:
    """Return the object of a line, or None; of a completion only its step, without parsing the text."""
    if steps_only and (match := _STEP.match(line)):
        return {"step": int(match[1])}
    row = json_object(line)
    return {"step": row.get("step")} if row is not None and steps_only else row


def as_number(value: Any) -> Any:
    """Return ``value`` if it is a finite number, else None."""
    try:
        return value if _is_number(value) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

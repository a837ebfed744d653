"""``posttrain compare``: arms x seeds of one configuration, paired by seed.

::

    OUT/comparison.json          the design, the result of every run, means and differences with intervals
    OUT/report.html              the same as a page, with curves
    OUT/ARM/seed-S/              a normal run directory
    OUT/ARM/seed-S.yaml          its configuration: posttrain train OUT/ARM/seed-S.yaml repeats it
    OUT/ARM/seed-S.log           what it printed
    OUT/ARM/seed-S.json          how it ended

Each run is a process of its own. What is finished is not run again, what was interrupted is resumed, what
failed is tried again; so the same command goes on with a comparison, and a larger ``--seeds`` or one more
``--arm`` extends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.check import check_and_load
from posttrain.config.load import resolved_yaml
from posttrain.run.arms import Plan, PlannedRun
from posttrain.run.comparison import Comparison, Outcome, compare_runs
from posttrain.run.comparison_page import write_page
from posttrain.run.directory import RunDirectory, RunError, write_json, write_text
from posttrain.run.manifest import build_manifest
from posttrain.stored import stored_json

Say = Callable[[str], None]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 60.0
_SHOWN_LINES = 3
_SHOWN_CHARACTERS = 400


def compare(plan: Plan, *, jobs: int = 1, say: Say = logger.info) -> Comparison:
    """Carry out what is missing of a comparison, and report all of it.

    Args:
        plan: The runs; see :func:`posttrain.run.arms.plan`.
        jobs: Runs at a time, each on one device: with several GPUs they take turns, without one they share
            the cores.
        say: Called with one line per run that starts or ends.

    Returns:
        The result; runs that failed are in it. ``comparison.json`` and ``report.html`` are written.

    Raises:
        RunError: The folder is in use, holds something else, or holds runs of another configuration.
    """
    for name, what in plan.switched_on.items():
        say(f"arm {name}: {what}")
    _refuse_foreign(plan.out)
    plan.out.mkdir(parents=True, exist_ok=True)
    with _held(plan.out):
        _refuse_changed(plan.runs)
        design = {
            "arms": {arm.name: list(arm.overrides) for arm in plan.arms},
            "seeds": plan.seeds,
            "base_seed": plan.base_seed,
        }
        manifest = build_manifest({}, seeds={"base": plan.base_seed})
        del manifest["config"], manifest["data"]
        write_json(plan.out / "comparison.json", {**design, "manifest": manifest})
        outcomes = _carry_out(plan.runs, jobs, say)
        result = compare_runs(plan, outcomes)
        write_page(result, manifest["command"], plan.out / "report.html")
        write_json(plan.out / "comparison.json", {**result.to_dict(), "manifest": manifest})
    return result


def _refuse_foreign(out: Path) -> None:
    try:
        used = out.exists() and any(out.iterdir())
    except OSError as error:
        raise RunError(f"--out {out} cannot be used ({error.strerror}): choose another folder") from error
    if used and not (out / "comparison.json").is_file():
        raise RunError(
            f"{out} holds files but no comparison, so nothing is written there: choose another --out"
        )


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(RunDirectory(out).held())
        except RunError:
            raise RunError(
                f"another comparison is running in {out}: wait for it, end it, or choose another --out"
            ) from None
        yield


def _refuse_changed(runs: Sequence[PlannedRun]) -> None:
    """Refuse to mix runs of two designs in one comparison."""
    for run in runs:
        if not run.run.root.exists():
            continue
        file = run.beside("yaml")
        report, before = check_and_load(file)
        if before == run.config:
            continue
        if before is None:
            raise RunError(f"the configuration of an earlier run is damaged or outdated:\n{report.text()}")
        then, now = before.model_dump(mode="json"), run.config.model_dump(mode="json")
        changed = ", ".join(key for key in now if then.get(key) != now[key])
        raise RunError(
            f"{run.run.root} was run with another configuration (it differs in: {changed}; compare "
            f"{file}). Choose another --out, another name for the arm, or move {run.run.root} away"
        )


@dataclass
class _Process:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    started: float


def _carry_out(runs: Sequence[PlannedRun], jobs: int, say: Say) -> list[Outcome]:
    """Run what is not finished, ``jobs`` at a time; return one outcome per run, in order."""
    ended: dict[int, Outcome] = {}
    waiting = []
    for index, run in enumerate(runs):
        done = _stored(run)
        if done is not None:
            ended[index] = done
            say(f"{run.name}: finished before")
        else:
            waiting.append(index)
    places: dict[int, tuple[int, _Process]] = {}  # by slot, which decides the device
    with _terminated_gently(places):
        while waiting or places:
            for slot, (index, process) in list(places.items()):
                if process.process.poll() is not None:
                    del places[slot]
                    ended[index] = _end(process)
                    say(f"[{len(ended)}/{len(runs)}] {ended[index].text()}")
            for slot in range(jobs):
                busy = {runs[index].run.root for index, _ in places.values()}
                ready = None if slot in places else _next(runs, waiting, busy)
                if ready is None:
                    continue
                waiting.remove(ready)
                run = runs[ready]
                leader = run.warm_start_of
                if leader is not None and not leader.run.warm_start.model.exists():
                    ended[ready] = Outcome(
                        run, "failed", 0.0, f"the warm start of {leader.name} does not exist"
                    )
                    say(f"[{len(ended)}/{len(runs)}] {ended[ready].text()}")
                    continue
                resumed = run.run.config.is_file()
                say(f"{run.name}: {'resumed' if resumed else 'started'}, see {run.beside('log')}")
                places[slot] = (ready, _start(run, slot, jobs, resume=resumed))
            time.sleep(_POLL_SECONDS)
    return [ended[index] for index in range(len(runs))]


def _next(runs: Sequence[PlannedRun], waiting: Sequence[int], busy: set[Path]) -> int | None:
    """Return the first run that need not wait for a warm start that is being made."""
    unborn = busy | {runs[index].run.root for index in waiting}
    for index in waiting:
        leader = runs[index].warm_start_of
        if leader is None or leader.run.warm_start.model.exists() or leader.run.root not in unborn:
            return index
    return None


def _start(run: PlannedRun, slot: int, jobs: int, *, resume: bool) -> _Process:
    file = run.beside("yaml")
    write_text(file, resolved_yaml(run.config))
    run.beside("json").unlink(missing_ok=True)
    with run.beside("log").open("ab") as log:
        process = subprocess.Popen(
            [*command(file), *(["--resume"] if resume else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_share_of_machine(slot, jobs)},
            start_new_session=True,  # ctrl-c reaches this process only, which then ends its runs one by one
        )
    return _Process(run, process, time.monotonic())


def command(file: Path) -> list[str]:
    """Return the command that carries out one run."""
    return [sys.executable, "-m", "posttrain", "train", str(file)]


def _share_of_machine(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment that keeps runs at the same time out of each other's way."""
    if jobs == 1:
        return {}
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(index) for index in range(count)]
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    if count == 0 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    return {}


def _end(ended: _Process) -> Outcome:
    code = ended.process.returncode
    seconds = round(time.monotonic() - ended.started, 3)
    error = "" if code == 0 else f"exit code {code}: {_last_words(ended.run.beside('log'))}"
    outcome = Outcome(ended.run, "failed" if code else "finished", seconds, error)
    write_json(ended.run.beside("json"), {"status": outcome.status, "seconds": seconds, "error": error})
    return outcome


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line and not line.startswith("(POSTTRAIN_DEBUG")]
    # the verb's own message begins so, and is the last thing it prints
    start = max((i for i, line in enumerate(said) if line.startswith(("failed:", "error:"))), default=None)
    words = " ".join(said[start:] if start is not None else said[-_SHOWN_LINES:]) or "nothing was printed"
    return words if len(words) <= _SHOWN_CHARACTERS else f"{words[:_SHOWN_CHARACTERS]} ..."


def _stored(run: PlannedRun) -> Outcome | None:
    """Return the outcome of a run that finished earlier."""
    file = run.beside("json")
    if not file.is_file() or not run.run.config.is_file():
        return None
    stored: dict[str, Any] = stored_json(file)
    if stored["status"] != "finished":
        return None
    return Outcome(run, "finished", stored["seconds"])


@contextlib.contextmanager
def _terminated_gently(places: dict[int, tuple[int, _Process]]) -> Iterator[None]:
    """End the runs when this process is asked to end; they can be resumed then."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        running = [process for _, process in places.values() if process.process.poll() is None]
        for process in running:
            process.process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.process.kill()
                process.process.wait()

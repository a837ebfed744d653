"""What went wrong in a run: how it ended, what its numbers say, what its weights hold.

Nothing here needs the run to be finished or its files to be whole.
"""

from __future__ import annotations

import itertools
import shutil
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from posttrain.checkpointing.folders import checkpoint_folders
from posttrain.config.tasks import TASKS
from posttrain.doctor import history
from posttrain.doctor.combinations import DISK_FULL
from posttrain.doctor.failures import Known, explain
from posttrain.doctor.finding import Finding
from posttrain.report.load import Run, as_dict, as_number, read_evaluation, read_metrics
from posttrain.run.directory import RunDirectory, RunError, held, last_json_lines, read_json_object
from posttrain.run.status import read_status

State = Literal["running", "finished", "stopped", "failed", "killed", "unknown"]
SILENT_FACTOR, SILENT_SECONDS = 20.0, 600.0
"""A running run that has not logged for this many times its usual interval, and this long, hangs."""

_LAST_COMPLETIONS = 200


@dataclass(frozen=True)
class RunState:
    """How a run is going or how it ended.

    Attributes:
        state: ``running``, ``finished``, ``stopped`` (Ctrl-C, SIGTERM), ``failed`` (an error), ``killed`` (it
            ended without writing why) or ``unknown`` (a run of another version, or damaged files).
        steps: Optimiser steps that were logged.
        of: Steps it was to take, or None.
        checkpoint: Step of the newest checkpoint, or None.
        task: Of the run, or "".
        started: UTC, ISO 8601, or "".
        ended: The same.
        errors: What ended it, of all ranks since its last start.
    """

    state: State
    steps: int = 0
    of: int | None = None
    checkpoint: int | None = None
    task: str = ""
    started: str = ""
    ended: str = ""
    errors: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the state for JSON."""
        return asdict(self) | {"errors": list(self.errors)}

    def text(self) -> str:
        """Return one line for people."""
        done = f"step {self.steps}" + ("" if self.of is None else f" of {self.of}")
        kept = "no checkpoint" if self.checkpoint is None else f"newest checkpoint {self.checkpoint}"
        when = f", {self.started} to {self.ended}" if self.started and self.ended else ""
        return f"{self.task or 'run'}: {self.state}, {done}, {kept}{when}"


@dataclass
class Patient:
    """A run as the doctor has read it."""

    run: RunDirectory
    state: RunState
    logs: Run
    warm_start: Run | None
    config: dict[str, Any]


def examine(folder: Path) -> tuple[RunState, list[Finding]]:
    """Return the state of a run and what is wrong with it.

    Raises:
        RunError: ``folder`` is not a run directory; the message names runs below it, if there are any.
    """
    patient = read(folder)
    return patient.state, [finding for check in CHECKS for finding in check(patient)]


def read(folder: Path) -> Patient:
    """Read a run directory as it is.

    Raises:
        RunError: It is none.
    """
    run = RunDirectory(folder.expanduser())
    if not any(path.is_file() for path in (run.config, run.manifest, run.metrics, run.status)):
        raise RunError(_not_a_run(folder))
    logs = Run(run.root, run.root.name)
    read_metrics(logs)
    logs.evaluation = read_evaluation(logs)
    warm = None
    if run.warm_start.root.is_dir():
        warm = Run(run.warm_start.root, "warm start")
        read_metrics(warm)
    config = _config(run)
    return Patient(run, state_of(run, logs, config), logs, warm, config)


def _not_a_run(folder: Path) -> str:
    if not folder.expanduser().exists():
        return f"there is no folder {folder}"
    below = sorted(path.parent for path in folder.expanduser().glob("*/config.yaml"))
    below += sorted(path.parent for path in folder.expanduser().glob("*/*/config.yaml"))
    if below:
        return f"{folder} is no run directory, but holds {len(below)}: name one, for example {below[0]}"
    files = "config.yaml, manifest.json, metrics.jsonl, status.json"
    return f"{folder} is no run directory: it holds none of {files}"


def _config(run: RunDirectory) -> dict[str, Any]:
    try:
        return as_dict(yaml.safe_load(run.config.read_text(encoding="utf-8", errors="replace")))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


def state_of(run: RunDirectory, logs: Run, config: dict[str, Any]) -> RunState:
    """Put together what status.json says and whether a process holds the folder."""
    status = read_status(run)
    written, started = status.get("state"), str(status.get("started", ""))
    rows = last_json_lines(run.failures, 64)
    errors = tuple(row for row in rows if str(row.get("time", "")) >= started)
    errors = errors or tuple(_stopped_by_watchdog(run, started))
    here = status.get("host") in (None, socket.gethostname())
    state: State = "unknown"
    if held(run):
        state = "running"
    elif written in ("finished", "stopped", "failed"):
        state = written
    elif errors:
        state = "failed"  # of another rank; the first was ended from outside
    elif written == "running":
        state = "killed" if here else "unknown"
    elif run.report.is_file() and logs.summary:
        state = "finished"  # by a version that wrote no status
    checkpoints = checkpoint_folders(run.checkpoints)
    steps = int(logs.metrics[-1][0]) if logs.metrics else 0
    newest = next(reversed(checkpoints.values()), None)
    stored = read_json_object(newest / "trainer_state.json").get("max_steps") if newest else None
    wanted = as_number(stored) or as_number(as_dict(config.get("trainer")).get("max_steps")) or 0
    of = int(wanted) if wanted > 0 else None
    return RunState(
        state,
        max(steps, max(checkpoints, default=0)),
        of,
        max(checkpoints, default=None),
        str(config.get("task", "")),
        started,
        str(status.get("ended", "")),
        errors,
    )


def _stopped_by_watchdog(run: RunDirectory, started: str) -> Iterator[dict[str, Any]]:
    """Yield what the watchdog wrote before it ended processes that could not raise any more."""
    for path in sorted(run.watchdog.glob("stopped_rank*.json")):
        row = read_json_object(path)
        when = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        if when >= started and row.get("message") and row.get("kind") != "interrupted":
            yield {"time": when, "rank": row.get("by"), "type": "RankFailure", "error": row["message"]}


# ---- checks -----------------------------------------------------------------------------------------------


def ending(patient: Patient) -> Iterator[Finding]:
    """How the run ended, when it did not finish."""
    state = patient.state
    left = (
        f"--resume goes on from checkpoint {state.checkpoint}"
        if state.checkpoint is not None
        else "no checkpoint was written: --resume starts anew (trainer.save_steps writes them)"
    )
    if state.state == "failed":
        if not state.errors:
            yield Finding(
                "run_failed",
                "error",
                f"the run failed after step {state.steps}; failures.jsonl does not say why",
                "a full disk, or the file was deleted",
                f"start it again with POSTTRAIN_DEBUG=1; {left}",
            )
            return
        error = _origin(state.errors)
        text = str(error.get("error", ""))
        known = explain(f"{error.get('type', '')}: {text}")
        others = len({str(row.get("rank")) for row in state.errors}) - 1
        where = f" (rank {error.get('rank')}, and {others} more after it)" if others > 0 else ""
        cause = "see the trace in failures.jsonl" if known is None else known.cause
        advice = left if known is None else f"{known.advice}. {left[0].upper()}{left[1:]}"
        name = "run_failed" if known is None else known.name
        yield Finding(name, "error", f"{text}{where}", cause, advice, state.steps)
    elif state.state == "killed":
        yield Finding(
            "run_killed",
            "error",
            f"the run was ended after step {state.steps} without a word: no process holds its folder",
            "SIGKILL: the system was out of memory (dmesg | grep -i 'killed process'), a scheduler's time "
            "was up, or "
            "the machine went down",
            f"{left[0].upper()}{left[1:]}; against memory: smaller batches, fewer verifier workers",
            state.steps,
        )
    elif state.state == "stopped":
        yield Finding(
            "run_stopped",
            "note",
            f"the run was stopped after step {state.steps}",
            "Ctrl-C or SIGTERM",
            left,
            state.steps,
        )
    elif state.state == "unknown":
        yield Finding(
            "run_unfinished",
            "warning",
            f"the run is not finished (step {state.steps}), and nothing says how it ended",
            "it was written by an earlier version or runs on another machine, or files are missing",
            left,
            state.steps,
        )


def _origin(errors: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return the error that took the others down: the first that is not about another rank."""
    own = (row for row in errors if row.get("type") not in ("RankFailure", "DistBackendError"))
    found = list(own)
    broken = [row for row in found if (explain(str(row.get("error"))) or _NONE).name != "collective_timeout"]
    return (broken or found or list(errors))[0]


_NONE = Known("", "", "", "")


def silence(patient: Patient) -> Iterator[Finding]:
    """A running run that says nothing any more."""
    if patient.state.state != "running":
        return
    stages = [
        path
        for path in (patient.run.metrics, patient.run.warm_start.metrics, patient.run.manifest)
        if path.exists()
    ]
    if not stages:
        return
    quiet = time.time() - max(path.stat().st_mtime for path in stages)
    seconds = [row["seconds"] for _, row in patient.logs.metrics if "seconds" in row]
    gaps = [after - before for before, after in itertools.pairwise(seconds) if after > before]
    usual = statistics.median(gaps) if gaps else SILENT_SECONDS / SILENT_FACTOR
    stacks = patient.run.watchdog if any(patient.run.watchdog.glob("*.txt")) else None
    if quiet > max(SILENT_SECONDS, SILENT_FACTOR * usual):
        yield Finding(
            "silent",
            "warning",
            f"the run has not logged for {quiet / 60:.0f} min; {usual:.3g} s between two logs were usual",
            "a rank that waits for another, a verifier without a deadline, a download, or a long evaluation",
            (f"stacks are in {stacks}; " if stacks else "")
            + "py-spy dump --pid PID of each process shows where it stands; end it, and --resume goes on",
            patient.state.steps,
        )


def no_logs(patient: Patient) -> Iterator[Finding]:
    """A run that ended before its first step was logged."""
    if patient.logs.metrics or patient.state.state == "running":
        return
    if patient.state.state == "finished":
        advice = "more data or trainer.max_steps; trainer.logging_steps below the steps of the run"
    else:
        advice = "the error above came before; trainer.logging_steps: 1 shows the first steps"
    yield Finding("no_logs", "warning", "no step was logged", "the run ended before its first log", advice)


def numbers(patient: Patient) -> Iterator[Finding]:
    """What the logs say, of the warm start too."""
    task = TASKS.get(str(patient.config.get("task")))  # type: ignore[call-overload]
    settings = as_dict(patient.config.get("trainer"))
    adapter = as_dict(patient.config.get("model")).get("adapter") is not None
    generates = task.generates if task else bool(patient.logs.series("reward")[0])
    logs = history.Logs(_finite_rows(patient.logs), patient.logs.not_finite, settings, adapter, generates)
    yield from history.course(logs)
    if patient.warm_start is not None:
        warm = as_dict(as_dict(patient.config.get("warm_start")).get("trainer"))
        early = history.Logs(_finite_rows(patient.warm_start), patient.warm_start.not_finite, warm)
        for finding in history.course(early):
            text = f"warm start: {finding.found}"
            yield Finding(finding.name, finding.severity, text, finding.cause, finding.advice, finding.step)


def _finite_rows(run: Run) -> list[tuple[float, dict[str, float]]]:
    return [(step, {k: v for k, v in row.items() if as_number(v) is not None}) for step, row in run.metrics]


def nonfinite_rows(patient: Patient) -> Iterator[Finding]:
    """Rows that were written down because their loss was not finite."""
    for path in sorted(patient.run.checkpoints.glob("nonfinite*.json")):
        yield Finding(
            "nonfinite_rows",
            "warning",
            f"{path} holds the rows of a loss that was not finite",
            "over-long or empty rows, a reward that is not finite, or weights that had blown up before",
            "read the entries *_text there; if the rows are ordinary, lower the learning rate",
        )


def evaluation(patient: Patient) -> Iterator[Finding]:
    """A held-out score that fell from before to after."""
    difference = as_dict(as_dict(patient.logs.evaluation.get("difference")).get("metrics"))
    for name in ("pass@1", "accuracy", "win_rate"):
        estimate = as_dict(difference.get(name))
        value, low, high = (as_number(estimate.get(key)) for key in ("value", "low", "high"))
        if value is None:
            continue
        rewards = patient.logs.series("reward")[1]
        part = max(1, len(rewards) // 5)
        rose = len(rewards) >= 5 and statistics.fmean(rewards[-part:]) > statistics.fmean(rewards[:part])
        if high is not None and high < 0:
            yield Finding(
                "held_out_fell",
                "error",
                f"held-out {name} changed by {value:+.3f} [{low:+.3f}, {high:+.3f}]"
                + (" while the training reward rose" if rose else ""),
                "the reward is exploited or the prompts are learned by heart"
                if rose
                else "training did harm",
                "compare completions of early and late steps (posttrain samples --step); lower the learning "
                "rate; "
                "evaluate.every shows when it turned" + ("; check what the reward accepts" if rose else ""),
                patient.state.steps,
            )
        elif low is not None and high is not None and low <= 0 <= high:
            yield Finding(
                "no_measurable_change",
                "note",
                f"held-out {name} changed by {value:+.3f} [{low:+.3f}, {high:+.3f}], which may be nothing",
                "too few steps, a small learning rate, or too few held-out rows to see it",
                "train longer or raise the learning rate; more rows in data.eval and evaluate.samples "
                "narrow the "
                "interval",
            )
        return


def rewarded_emptiness(patient: Patient) -> Iterator[Finding]:
    """Empty completions with a reward."""
    rows = [row for row in last_json_lines(patient.run.completions, _LAST_COMPLETIONS) if "completion" in row]
    empty = [row for row in rows if not _text(row["completion"]).strip()]
    paid = [
        row for row in empty if any((as_number(v) or 0) > 0 for v in as_dict(row.get("rewards")).values())
    ]
    if paid:
        yield Finding(
            "empty_rewarded",
            "error",
            f"{len(paid)} of the latest {len(rows)} completions are empty and have a reward above 0",
            "the reward function takes an empty answer for a good one",
            "mend it: an answer that is empty, or repeats the prompt, has to score 0",
        )
    elif len(empty) > 0.5 * len(rows):
        yield Finding(
            "empty_completions",
            "warning",
            f"{len(empty)} of the latest {len(rows)} completions are empty",
            "the model ends at once: the prompt ends with an end-of-text token, or the template lacks the "
            "start of the "
            "answer",
            "look at the prompt as the model sees it; data.prompt_template",
        )


def _text(completion: Any) -> str:
    if isinstance(completion, list):
        return " ".join(str(as_dict(turn).get("content") or "") for turn in completion)
    return str(completion)


def damaged_files(patient: Patient) -> Iterator[Finding]:
    """Checkpoints and exports that do not open."""
    from posttrain.doctor.weights import damaged

    checkpoints = list(checkpoint_folders(patient.run.checkpoints).values())
    for folder in [*checkpoints, patient.run.finished_model, patient.run.export]:
        bad = damaged(folder) if folder.is_dir() else []
        if not bad:
            continue
        kept = folder in checkpoints
        yield Finding(
            "damaged_checkpoint" if kept else "damaged_export",
            "error",
            f"{folder}: {'; '.join(bad[:3])}{f'; and {len(bad) - 3} more' if len(bad) > 3 else ''}",
            "a copy that did not end, a full disk, or a disk error; a run itself renames only whole "
            "checkpoints",
            "delete that folder: --resume takes the one before"
            if kept
            else "posttrain export RUN writes it anew",
        )
    newest = checkpoints[-1] if checkpoints else None
    if newest and patient.state.state != "finished" and not any(newest.glob("posttrain_state_*.pt")):
        yield Finding(
            "inexact_resume",
            "note",
            f"{newest} holds no state of methods and rollouts",
            "trainer.save_only_model, or it was written by TRL alone",
            "a resume begins there with a new optimiser or new rollouts; drop save_only_model to resume "
            "exactly",
        )
    if patient.state.state in ("failed", "killed") and (patient.run.checkpoints / "_saving").is_dir():
        yield Finding(
            "unfinished_checkpoint",
            "note",
            f"{patient.run.checkpoints / '_saving'} is a checkpoint that was being written",
            "the run ended at that moment",
            "nothing: it is never resumed from, and the next checkpoint replaces it",
        )


def trained_weights(patient: Patient) -> Iterator[Finding]:
    """Weights that are not finite, or are those the run began with."""
    from posttrain.doctor.weights import adapter_movement, not_finite

    folder = _latest(patient)
    if folder is None:
        return
    bad = not_finite(folder)
    if bad is not None:
        yield Finding(
            "weights_not_finite",
            "error",
            f"{bad[1]} values of {bad[0]} in {folder} are not finite",
            "the optimiser's last step overflowed",
            "use an earlier checkpoint; lower the learning rate, or train in bfloat16 or float32",
        )
        return
    still = False
    for movement in adapter_movement(folder):
        if movement.still == movement.modules:
            still = True
            yield Finding(
                "adapter_never_moved",
                "error",
                f"all {movement.modules} B matrices of {movement.file} are zero: the adapter changes nothing",
                "no gradient reached it: gradient checkpointing without inputs that require gradients, a "
                "learning "
                "rate of 0, groups with equal rewards throughout, or an adapter that was added after the "
                "optimiser",
                "see grad_norm in metrics.jsonl; gradient_checkpointing_kwargs: {use_reentrant: false}; "
                "raise "
                "trainer.learning_rate",
            )
        elif movement.still:
            yield Finding(
                "adapter_partly_still",
                "warning",
                f"{movement.still} of {movement.modules} B matrices of {movement.file} are zero, such as "
                f"{movement.example}",
                "these modules take no part in the answer (experts that were never chosen, a second tower), "
                "or their "
                "gradient is cut off",
                "leave them out of model.adapter.target_modules",
            )
    if not still:
        yield from _unmoved(patient, folder)


def _latest(patient: Patient) -> Path | None:
    """Return the folder with the weights the run has come to."""
    run = patient.run
    newest = next(reversed(checkpoint_folders(run.checkpoints).values()), None)
    places = [run.finished_model, newest, run.export]
    return next((path for path in places if path is not None and path.is_dir()), None)


def _unmoved(patient: Patient, folder: Path) -> Iterator[Finding]:
    """Compare the latest weights with what they began from: base, warm start or first checkpoint."""
    from posttrain.doctor.weights import same_weights

    model = as_dict(patient.config.get("model"))
    base = Path(str(model.get("path", ""))).expanduser()
    first = next(iter(checkpoint_folders(patient.run.checkpoints).values()), None)
    starts = [patient.run.warm_start.model, base, *([first] if first not in (None, folder) else [])]
    for start in starts:
        if start is None or not start.is_dir() or same_weights(start, folder) is not True:
            continue
        low = str(model.get("dtype", "")) in ("bfloat16", "float16")
        yield Finding(
            "weights_never_moved",
            "error",
            f"the weights in {folder} are those of {start}, bit for bit",
            "updates smaller than the spacing of 16-bit numbers are rounded away, or there was no gradient"
            if low
            else "no gradient, or a learning rate of 0",
            "model.dtype: float32 (with trainer.bf16: true for speed), a higher learning rate, or an adapter"
            if low
            else "see grad_norm and learning_rate in metrics.jsonl",
        )
        return


def room(patient: Patient) -> Iterator[Finding]:
    """Space for the next checkpoint."""
    try:
        free = shutil.disk_usage(patient.run.root).free / 2**30
    except OSError:
        return
    newest = next(reversed(checkpoint_folders(patient.run.checkpoints).values()), None)
    files = newest.rglob("*") if newest else ()
    needed = sum(path.stat().st_size for path in files if path.is_file()) / 2**30
    unfinished = patient.state.state != "finished"
    if free < DISK_FULL or (unfinished and free < 1.1 * needed):
        yield Finding(
            "disk_full",
            "error" if unfinished else "warning",
            f"{free:.2f} GiB are free where the run lies; a checkpoint takes {needed:.2f} GiB",
            "checkpoints of this and other runs",
            "delete what is no longer needed, or lower trainer.save_total_limit",
        )


def other_versions(patient: Patient) -> Iterator[Finding]:
    """Packages that have changed since the run was started."""
    from posttrain.doctor.packages import installed

    manifest = read_json_object(patient.run.manifest)
    then = as_dict(manifest.get("versions"))
    changed = {
        name: (old, installed(name))
        for name, old in then.items()
        if name in ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "deepspeed")
        and installed(name) not in (None, old)
    }
    if changed:
        told = ", ".join(f"{name} {old} then, {now} now" for name, (old, now) in changed.items())
        yield Finding(
            "other_versions",
            "note",
            told,
            "the environment was changed since, or the run comes from another machine",
            "resume with the versions it was started with, where numbers have to repeat",
        )
    gpus = as_dict(manifest.get("hardware")).get("gpus")
    if gpus and as_dict(patient.config.get("trainer")).get("use_cpu"):
        yield Finding(
            "cpu_on_gpu_machine",
            "warning",
            f"trainer.use_cpu is set, and the machine had {len(gpus)} GPUs",
            "a configuration that was tried out on a laptop",
            "drop trainer.use_cpu",
        )


CHECKS = (
    ending,
    silence,
    no_logs,
    numbers,
    nonfinite_rows,
    evaluation,
    rewarded_emptiness,
    damaged_files,
    trained_weights,
    room,
    other_versions,
)

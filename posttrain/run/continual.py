"""``posttrain continual``: several trainings in a row, and what each leaves of the ones before.

::

    OUT/continual.json           the design, every number, means and paired differences with intervals
    OUT/base/seed-S/             the run all arms of a seed begin from, where one is asked for
    OUT/ARM/seed-S/round-R/      a normal run directory per round; its model is where the next begins
    OUT/ARM/seed-S/round-R/tasks.json   how well that model does every task

With A[r][t] the accuracy on task t after round r, task r being the one learned in it::

    new          A[last][last]
    learned      mean of A[t][t]
    kept         mean of A[last][t] over all tasks but the last
    forgetting   mean of max over t <= r of A[r][t], minus A[last][t], over all tasks but the last
    transfer     mean of A[last][t] - A[t][t], over all tasks but the last (negative: forgotten)

The base counts as the first round, and is the same for all arms. The general loss is the mean negative
log-likelihood per answer token on the held-out rows of the first round, after the last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from trl import SFTConfig

from posttrain.config.check import check_and_load
from posttrain.config.schema import ExportConfig, RunConfig
from posttrain.data.load import load_data
from posttrain.data.prompts import render
from posttrain.evaluation.seeds import SeedEstimate, over_seeds, paired_over_seeds
from posttrain.models.load import load_for_evaluation
from posttrain.run.arms import Arm
from posttrain.run.directory import RunDirectory, RunError, write_json
from posttrain.run.once import train_once
from posttrain.run.trainers import sft_trainer, trl_config
from posttrain.run.verbs import evaluate_path
from posttrain.selection import registry as selectors
from posttrain.stored import stored_json

METRICS = ("new", "learned", "kept", "forgetting", "transfer", "general_loss")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Rounds:
    """Rounds x arms x seeds.

    Attributes:
        rounds: Configurations in their order, one list per arm.
        arms: The first is the one the others are compared with.
        base: The run all begin from, None when rounds[0] names a model.
        seeds: Seed s adds s to ``trainer.seed``.
        out: Folder.
    """

    rounds: dict[str, list[RunConfig]]
    arms: tuple[Arm, ...]
    base: RunConfig | None
    seeds: int
    out: Path


def plan_sequence(
    rounds: Sequence[Path],
    arms: Sequence[Arm],
    *,
    base: Path | None,
    seeds: int,
    out: Path,
    overrides: Sequence[str] = (),
) -> Rounds:
    """Check every round of every arm; nothing is written.

    Raises:
        RunError: Fewer than two tasks, names that occur twice, or a configuration that is wrong or has
            nothing to judge with.
    """
    if len(rounds) + (base is not None) < 2:
        raise RunError("forgetting takes two tasks: name two configurations, or one and --base")
    names = [arm.name.lower() for arm in arms]
    if not arms or len(set(names)) < len(names) or "base" in names:
        raise RunError(f"each arm needs a name of its own, not 'base'; found {', '.join(names) or 'no arm'}")
    if seeds < 1:
        raise RunError(f"--seeds is at least 1, found {seeds}")
    problems: list[str] = []

    def load(path: Path, changes: Sequence[str], what: str) -> RunConfig | None:
        report, config = check_and_load(path, changes)
        if config is None:
            problems.append(f"{what}:\n{report.text()}")
        elif config.evaluate is None or not config.rewards:
            problems.append(
                f"{what}: {path} needs 'rewards' and 'evaluate', which say how well a task is done"
            )
        return config

    of_base = None if base is None else load(base, overrides, "base")
    loaded = {
        arm.name: [load(path, [*overrides, *arm.overrides], f"arm {arm.name!r}") for path in rounds]
        for arm in arms
    }
    if problems:
        raise RunError("\n".join(problems))
    kept = {name: [config for config in configs if config is not None] for name, configs in loaded.items()}
    return Rounds(kept, tuple(arms), of_base, seeds, out)


def continual(sequence: Rounds, *, say: Say) -> dict[str, Any]:
    """Carry out what is missing, and return all of it; a sequence that was stopped goes on.

    Returns:
        ``arms``, ``seeds``, ``tasks``, ``accuracy`` (per arm and seed, A as a list over rounds, the base
        first where there is one), ``values``, ``means`` and ``differences`` (arm minus first arm).
    """
    out = sequence.out
    if out.exists() and any(out.iterdir()) and not (out / "continual.json").is_file():
        raise RunError(
            f"{out} holds files but no sequence, so nothing is written there: choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    design = {
        "arms": {arm.name: list(arm.overrides) for arm in sequence.arms},
        "seeds": sequence.seeds,
        "tasks": _tasks(sequence),
    }
    _refuse_other(out / "continual.json", design)
    write_json(out / "continual.json", design)
    values: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in sequence.arms}
    accuracy: dict[str, list[list[list[float]]]] = {arm.name: [] for arm in sequence.arms}
    for seed in range(sequence.seeds):
        start = _base(sequence, seed, say)
        for arm in sequence.arms:
            table, losses = _rounds(sequence, arm, seed, start, say)
            accuracy[arm.name].append(table)
            values[arm.name].append(summarise(table) | {"general_loss": losses[-1]})
    first = sequence.arms[0].name
    result: dict[str, Any] = design | {"accuracy": accuracy, "values": values, "means": {}, "differences": {}}
    for metric in METRICS:
        columns = {name: [row.get(metric) for row in rows] for name, rows in values.items()}
        result["means"][metric] = {name: over_seeds(column).to_dict() for name, column in columns.items()}
        result["differences"][metric] = {
            name: paired_over_seeds(columns[first], column).to_dict()
            for name, column in columns.items()
            if name != first
        }
    write_json(out / "continual.json", result)
    return result


def summarise(table: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the numbers of one sequence.

    Args:
        table: A[r][t]; task t is learned in round r = t, the base (if any) being the first of both.

    Returns:
        ``new``, ``learned``, ``kept``, ``forgetting``, ``transfer``; see the module page.
    """
    last = len(table) - 1
    earlier = range(last)
    return {
        "new": table[last][last],
        "learned": fmean(table[t][t] for t in range(last + 1)),
        "kept": fmean(table[last][t] for t in earlier),
        "forgetting": fmean(max(table[r][t] for r in range(t, last + 1)) - table[last][t] for t in earlier),
        "transfer": fmean(table[last][t] - table[t][t] for t in earlier),
    }


def print_sequence(result: dict[str, Any], console: Console) -> None:
    """Print one row per number and one column per arm."""
    arms = list(result["arms"])
    columns = [*arms, *(f"{name} - {arms[0]}" for name in arms[1:])]
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for metric in METRICS:
        cells = [_cell(result["means"][metric][name]) for name in arms]
        cells += [_cell(result["differences"][metric][name], signed=True) for name in arms[1:]]
        table.add_row(metric.replace("_", " "), *cells)
    console.print(f"{' -> '.join(result['tasks'])}; mean over {result['seeds']} seeds [95 % t interval]")
    console.print(table)


def _cell(estimate: dict[str, Any], *, signed: bool = False) -> str:
    if estimate["value"] is None:
        return "-"
    sign = "+" if signed else ""
    if estimate["low"] is None:
        return f"{estimate['value']:{sign}.3f}"
    star = ""
    if signed and SeedEstimate(**estimate).excludes_zero:
        star = " *"
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]{star}"


# ---- runs --------------------------------------------------------------------------------------------------


def _tasks(sequence: Rounds) -> list[str]:
    first = next(iter(sequence.rounds.values()))
    configs = [*([sequence.base] if sequence.base else []), *first]
    return [Path(config.run_dir).name for config in configs]


def _refuse_other(path: Path, design: dict[str, Any]) -> None:
    if not path.is_file():
        return
    then = stored_json(path)
    if then["tasks"] != design["tasks"]:
        raise RunError(
            f"{path.parent} holds a sequence with other tasks ({then['tasks']}, now {design['tasks']}): "
            "choose another --out"
        )
    for name, overrides in design["arms"].items():
        if name in then["arms"] and then["arms"][name] != overrides:
            raise RunError(
                f"{path.parent} holds an arm {name!r} with other settings ({then['arms'][name]}): give the "
                "arm another name, or choose another --out"
            )


def _base(sequence: Rounds, seed: int, say: Say) -> Path | None:
    """Train what all arms of a seed begin from; return its model."""
    if sequence.base is None:
        return None
    run = RunDirectory(sequence.out / "base" / f"seed-{seed}")
    return train_once(_local(sequence.base, run, seed), f"base, seed {seed}", say)


def _rounds(
    sequence: Rounds, arm: Arm, seed: int, start: Path | None, say: Say
) -> tuple[list[list[float]], list[float]]:
    """Train the rounds of an arm; return accuracy by round and task, and the general loss by round."""
    configs = sequence.rounds[arm.name]
    judged = [*([sequence.base] if sequence.base else []), *configs]
    table, losses = [], []
    if start is not None:
        done = _judge(start, judged, sequence.out / "base" / f"seed-{seed}" / "tasks.json", say)
        table.append(done["accuracy"])
        losses.append(done["general_loss"])
    model = start
    for number, config in enumerate(configs):
        run = RunDirectory(sequence.out / arm.name / f"seed-{seed}" / f"round-{number}")
        local = _local(config, run, seed, model=model, round=number)
        model = train_once(local, f"{arm.name}, seed {seed}, round {number}", say)
        done = _judge(model, judged, run.root / "tasks.json", say)
        table.append(done["accuracy"])
        losses.append(done["general_loss"])
    return table, losses


def _local(
    config: RunConfig, run: RunDirectory, seed: int, *, model: Path | None = None, round: int = 0
) -> RunConfig:
    """Return the configuration of a round: its seed, folder, start, draw, and a whole model at the end."""
    changes: dict[str, Any] = {
        "run_dir": str(run.root),
        "trainer": {**config.trainer, "seed": int(config.trainer.get("seed", 42)) + seed},
        "export": ExportConfig(format="merged" if config.model.adapter is not None else "full"),
        "evaluate": None if config.evaluate is None else config.evaluate.model_copy(update={"before": False}),
    }
    if model is not None:
        path = {"path": str(model.resolve()), "tokenizer": None, "revision": None}
        changes["model"] = config.model.model_copy(update=path)
        changes["warm_start"] = None
    selection = config.selection
    if selection is not None and selection.method is not None:
        params = dict(selection.params)
        if "seed" in params:
            params["seed"] = int(params["seed"]) + seed
        update: dict[str, Any] = {"params": params}
        if selectors.resolve(selection.method).schedule == "round":
            update["round"] = round
        changes["selection"] = selection.model_copy(update=update)
    return config.model_copy(update=changes)


def _judge(model: Path, configs: Sequence[RunConfig], path: Path, say: Say) -> dict[str, Any]:
    """Return how well a model does every task, and the general loss; kept in a file."""
    if path.is_file():
        stored: dict[str, Any] = stored_json(path)
        if len(stored["accuracy"]) == len(configs):
            return stored
    say(f"judging {model.parent} on {len(configs)} tasks")
    found = {
        "accuracy": [_accuracy(model, config) for config in configs],
        "general_loss": general_loss(model, configs[0]),
    }
    write_json(path, found)
    return found


def _accuracy(model: Path, config: RunConfig) -> float:
    metrics = evaluate_path(str(model), config).to_dict()["metrics"]
    return float(metrics["pass@1"]["value"])


def general_loss(folder: Path, config: RunConfig) -> float:
    """Return the mean negative log-likelihood per answer token, in nats, on the held-out rows."""
    data = load_data(config.data, "sft")
    assert data.eval is not None
    model, tokenizer = load_for_evaluation(str(folder), config.model.dtype)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rows = render(data.eval, tokenizer, config.data)
    with tempfile.TemporaryDirectory() as name:
        run = RunDirectory(Path(name))
        settings = {"eval_strategy": "steps", "disable_tqdm": True, "max_steps": 1, "eval_steps": 1}
        args = trl_config(SFTConfig, settings, run)
        trainer = sft_trainer(run, args, model, tokenizer, rows, held_out=rows, title="general loss")
        return float(trainer.evaluate()["eval_loss"])

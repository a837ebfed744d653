r"""``posttrain warm``: reward models trained apart, their weights averaged (WARM, arXiv 2401.12187).

::

    OUT/warm.json            the design, every number, what was averaged and what was left out
    OUT/probe-K/             head on frozen features, one per start; where the members of that start begin
    OUT/member-I/            a normal run of task reward
    OUT/member-I/scores.json rewards of its held-out pairs
    OUT/model/               the average: a normal reward model

1. *Linear probing.* The head is trained alone on the frozen features and is the same for all members that
   begin at one checkpoint. Heads drawn apart would leave nothing to average.
2. *Members.* M runs on the same pairs, each with a seed (order of the data; dropout, where
   ``trainer.disable_dropout`` is false) and learning rate of its own, and whatever else is varied; members
   may begin at several checkpoints of one supervised run (the paper's Baklava).
3. *Checks*, on held-out pairs. Members that are no better than chance are left out. The others are sorted by
   accuracy; one that is not linearly connected with the best, Acc of some interpolation of the two more than
   the tolerance below the line between their accuracies, is left out with a warning. With one member left,
   that is the result.
4. *Average*, weights equal, last checkpoints; compared with every member, the best one, and the ensemble of
   the same members' rewards, which costs M forward passes where the average costs one.

Why it helps against wrong labels (toy of the paper): what one run learns with probability p has weight p in a
mean of predictions, and p^2 in a mean of the weights of two layers, so what only some runs picked up fades.
Where the configuration has label noise, the share of wrong training labels that is reproduced is reported.

Does it do what it claims?
    Of the two claims one shows. ``configs/evidence/warm.yaml`` (its first lines are the command): a fifth of
    the labels exchanged, four members from one head, five repetitions, 95 % t intervals, 125 clean held-out
    pairs. Wrong labels reproduced: 0.205 [0.166, 0.245] by the average, where a single model reproduces 0.307
    [0.277, 0.336] (difference -0.101 [-0.139, -0.064]) and the ensemble of the averaged members 0.254 [0.220,
    0.289] (-0.049 [-0.087, -0.011]). Held-out accuracy: average 0.858 [0.841, 0.874], a single model 0.842
    [0.822, 0.861] (+0.016 [-0.001, 0.033]: not clear), the ensemble 0.902 [0.865, 0.940], the best member,
    chosen on the pairs that judge it, 0.888 [0.850, 0.926]. One to three of the four members were averaged:
    at a learning rate of 2e-3 this small model leaves the basin, and the check of connectivity leaves the
    others out. So the average forgets wrong labels here, and does not replace the ensemble.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from posttrain.config.check import check_and_load
from posttrain.config.schema import EvaluateConfig, ExportConfig, RunConfig
from posttrain.config.source_check import check_model
from posttrain.config.tasks import TASKS
from posttrain.data.load import load_data
from posttrain.data.pairs import encode_scored
from posttrain.data.prompts import render
from posttrain.evaluation.scoring import text_scores
from posttrain.evaluation.seeds import over_seeds, paired_over_seeds
from posttrain.merging.average import MergeError, average
from posttrain.merging.formulas import connectivity_gap, pair_accuracy
from posttrain.models.scoring import HEADS, load_scorer
from posttrain.run.directory import RunError, write_json
from posttrain.run.evaluating import fitting_pairs
from posttrain.run.once import train_once
from posttrain.run.ranks import Ranks
from posttrain.stored import stored_json

LEARNING_RATES = (1.0, 0.4)
"""Factors of the members' learning rates in turn, where none are given: the paper's 1e-4 and 4e-5."""

RESULTS = ("member", "best", "ensemble", "warm")
"""Mean over members, best member on the held-out pairs, mean of rewards, and mean of weights."""

_TITLES = {
    "member": "mean member",
    "best": "best member (on these pairs)",
    "ensemble": "mean of rewards",
    "warm": "mean of weights",
}
_HEAD = rf"(^|\.)({'|'.join(HEADS)})\."
_NOISY = 500  # wrong labels that are looked at

Say = Callable[[str], None]
Pairs = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Warm:
    """What is to be averaged.

    Attributes:
        config: The run of one member.
        probe: The run of the probing stage.
        members: Their number M.
        vary: Values per key of the configuration, in turn over members.
        starts: Checkpoints in turn over members; the configuration's own when empty.
        seeds: How often all of it is done; repetition s adds 1000 s to all seeds but those of the data.
        shares: Interpolations that are looked at, lambda in (0, 1).
        tolerance: How far accuracy may fall below the line.
        floor: Accuracy that a member has to exceed.
        out: Folder.
    """

    config: RunConfig
    probe: RunConfig
    members: int
    vary: dict[str, tuple[Any, ...]]
    starts: tuple[str, ...]
    seeds: int
    shares: tuple[float, ...]
    tolerance: float
    floor: float
    out: Path


def plan_warm(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    members: int = 4,
    vary: Sequence[str] = (),
    starts: Sequence[str] = (),
    probe: Sequence[str] = (),
    seeds: int = 1,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    tolerance: float = 0.02,
    floor: float = 0.5,
    out: Path | None = None,
) -> Warm:
    """Check everything; nothing is written.

    Args:
        path: Configuration of ``task: reward``.
        overrides: Changes for all members, KEY=VALUE.
        members: M.
        vary: KEY=V1,V2,... each; member i takes the i-th value, in turn.
        starts: Folders of checkpoints, in turn.
        probe: Changes for the probing stage, KEY=VALUE.
        seeds, shares, tolerance, floor, out: See :class:`Warm`; ``RUN_DIR-warm`` when ``out`` is None.

    Raises:
        RunError: Something of it does not go together; all configurations are checked.
    """
    if members < 1 or seeds < 1:
        raise RunError(f"--members and --seeds are at least 1, found {members} and {seeds}")
    if any(not 0 < share < 1 for share in shares):
        raise RunError(f"interpolations lie between 0 and 1, found {list(shares)}")
    values = dict(_varied(text) for text in vary)
    probing = [f"selection={{explicit: {{parameters: ['{_HEAD}']}}}}", "model.adapter=null", *probe]
    problems = []

    def load(changes: Sequence[str], what: str) -> RunConfig | None:
        report, config = check_and_load(path, [*overrides, *changes])
        if config is None:
            problems.append(f"{what}:\n{report.text()}")
        return config

    config, first = load([], "members"), load(probing, "probing")
    for index in range(max((len(choices) for choices in values.values()), default=0)):
        load(
            [_override(key, choices[index % len(choices)]) for key, choices in values.items()],
            f"member {index}",
        )
    if config is not None:
        models = [config.model.model_copy(update={"path": start, "tokenizer": None}) for start in starts]
        problems += [f"--start: {found.message}" for model in models for found in check_model(model)]
    if problems or config is None or first is None:
        raise RunError("\n".join(problems))
    if not TASKS[config.task].scores:
        raise RunError(f"{path} has task {config.task!r}; reward models come from task: reward")
    if config.selection is not None and len(starts) > 1:
        raise RunError(
            "members that begin at several checkpoints do not have one plan of weights: drop selection"
        )
    out = out or Path(f"{config.run_dir.rstrip('/')}-warm")
    return Warm(
        config,
        first,
        members,
        values,
        tuple(starts),
        seeds,
        tuple(shares),
        tolerance,
        floor,
        out.expanduser(),
    )


def warm(plan: Warm, *, say: Say) -> dict[str, Any]:
    """Carry out what is missing, and return all of it; a job that was stopped goes on.

    Returns:
        ``runs`` (all numbers, per seed), ``accuracy`` (per result in :data:`RESULTS`, a list over seeds),
        ``accuracy_means``, ``accuracy_differences`` (``warm`` minus each of the others), and ``noise`` with
        the same for reproduced wrong labels, where there are any.
    """
    ranks = Ranks()
    ranks.on_main(lambda: _begin(plan))
    runs = [_once(plan, seed, ranks, say) for seed in range(plan.seeds)]
    result: dict[str, Any] = {"design": _design(plan), "runs": runs}
    for what in ("accuracy", "noise"):
        columns = {name: [run[what].get(name) for run in runs] for name in RESULTS if runs[0][what]}
        result[what] = columns
        result[f"{what}_means"] = {name: over_seeds(values).to_dict() for name, values in columns.items()}
        result[f"{what}_differences"] = {
            name: paired_over_seeds(values, columns["warm"]).to_dict()
            for name, values in columns.items()
            if name != "warm"
        }
    ranks.on_main(lambda: write_json(plan.out / "warm.json", result))
    return result


def print_warm(result: dict[str, Any], console: Console) -> None:
    """Print the members and the comparison."""
    run = result["runs"][0]
    table = Table(box=None, pad_edge=False)
    for column in ("member", "accuracy", "mean reward", "sd", "interpolation", ""):
        table.add_column(column, justify="left" if column in ("member", "") else "right")
    for member in run["members"]:
        gap = member.get("gap")
        table.add_row(
            f"{member['name']} {' '.join(f'{k}={v}' for k, v in member['settings'].items())}",
            f"{member['accuracy']:.3f}",
            f"{member['mean']:.3f}",
            f"{member['sd']:.3f}",
            "-" if gap is None else f"{-gap:+.3f}",
            member["left_out"] or "",
        )
    console.print(table)
    seeds = len(result["runs"])
    spread = f"mean over {seeds} seeds [95 % t interval]" if seeds > 1 else "one seed"
    for what, title in (("accuracy", "held-out accuracy"), ("noise", "wrong training labels reproduced")):
        if not result[what]:
            continue
        console.print(f"{title}, {spread}; the average minus each")
        table = Table(box=None, pad_edge=False, show_header=False)
        for name in RESULTS:
            difference = result[f"{what}_differences"].get(name)
            table.add_row(
                _TITLES[name],
                _cell(result[f"{what}_means"][name]),
                "" if difference is None else _cell(difference, signed=True),
            )
        console.print(table)
    console.print(f"average: {', '.join(each['model'] for each in result['runs'])}")


def _cell(estimate: dict[str, Any], *, signed: bool = False) -> str:
    value, sign = estimate["value"], "+" if signed else ""
    if value is None:
        return "-"
    if estimate["low"] is None:
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


# ---- the request ------------------------------------------------------------------------------------------


def _varied(text: str) -> tuple[str, tuple[Any, ...]]:
    key, found, values = text.partition("=")
    choices = tuple(yaml.safe_load(value) for value in values.split(",") if value.strip())
    if not found or not choices:
        raise RunError(
            f"--vary is KEY=VALUE,VALUE,..., such as trainer.learning_rate=1e-4,4e-5; found {text!r}"
        )
    return key.strip(), choices


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _design(plan: Warm) -> dict[str, Any]:
    return {
        "config": json.loads(plan.config.model_dump_json()),
        "probe": json.loads(plan.probe.model_dump_json()),
        "vary": {key: list(values) for key, values in plan.vary.items()},
        "starts": list(plan.starts),
        "members": plan.members,
        "seeds": plan.seeds,
        "shares": list(plan.shares),
        "tolerance": plan.tolerance,
        "floor": plan.floor,
    }


def _begin(plan: Warm) -> None:
    out, record = plan.out, plan.out / "warm.json"
    if out.exists() and any(out.iterdir()) and not record.is_file():
        raise RunError(
            f"{out} holds files but no warm.json, so nothing is written there: choose another --out"
        )
    if not record.is_file():
        write_json(record, {"design": _design(plan)})


# ---- one repetition ---------------------------------------------------------------------------------------


def _once(plan: Warm, seed: int, ranks: Ranks, say: Say) -> dict[str, Any]:
    out = plan.out if plan.seeds == 1 else plan.out / f"seed-{seed}"
    name = "" if plan.seeds == 1 else f"seed {seed}, "
    starts = plan.starts or ("",)
    used = starts[: plan.members]
    probes = [
        train_once(_probe_run(plan, start, seed, out / f"probe-{index}"), f"{name}probe {index}", say)
        for index, start in enumerate(used)
    ]
    members = []
    for index in range(plan.members):
        config, settings = _member(plan, index, seed, probes[index % len(probes)], out / f"member-{index}")
        export = train_once(config, f"{name}member {index}", say)
        if len(used) > 1:
            settings["start"] = starts[index % len(starts)]
        members.append({"name": f"member-{index}", "settings": settings, "folder": str(export)})
    return ranks.on_main(lambda: _averaged(plan, members, out, say))


def _probe_run(plan: Warm, start: str, seed: int, folder: Path) -> RunConfig:
    config = _local(plan.probe, folder, "full")
    own = {"seed": int(config.trainer.get("seed", 42)) + 1000 * seed}
    config = config.model_copy(update={"trainer": {**config.trainer, **own}})
    if start:
        config = config.model_copy(update={"model": _at(config, start)})
    return config


def _member(plan: Warm, index: int, seed: int, probe: Path, folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run of a member, and what it has of its own."""
    config = plan.config
    own = int(config.trainer.get("seed", 42)) + 1000 * seed + index
    content = config.model_dump(mode="json")
    settings: dict[str, Any] = {key: values[index % len(values)] for key, values in plan.vary.items()}
    rate = config.trainer.get("learning_rate")
    if "trainer.learning_rate" not in settings and rate is not None:
        settings["trainer.learning_rate"] = float(rate) * LEARNING_RATES[index % len(LEARNING_RATES)]
    settings.setdefault("trainer.seed", own)
    for key, value in settings.items():
        part = content
        *steps, last = key.split(".")
        for step in steps:
            if part.get(step) is None:  # a section that the configuration does not have
                part[step] = {}
            part = part[step]
        part[last] = value
    config = RunConfig.model_validate(content)
    merged = config.model.adapter is not None and len(plan.starts) > 1  # members do not have one base then
    kind = "merged" if merged else ("adapter" if config.model.adapter is not None else "full")
    config = _local(config, folder, kind)
    return config.model_copy(update={"model": _at(config, str(probe))}), settings


def _at(config: RunConfig, path: str) -> Any:
    folder = Path(path).expanduser()
    address = str(folder.resolve()) if folder.is_dir() else path
    return config.model.model_copy(update={"path": address, "tokenizer": None, "revision": None})


def _local(config: RunConfig, folder: Path, kind: Any) -> RunConfig:
    changes = {
        "run_dir": str(folder),
        "export": ExportConfig(format=kind),
        # keeps the held-out pairs out of the training rows
        "evaluate": (config.evaluate or EvaluateConfig(k=[1])).model_copy(update={"before": False}),
    }
    return config.model_copy(update=changes)


# ---- what comes out ---------------------------------------------------------------------------------------


def _averaged(plan: Warm, members: list[dict[str, Any]], out: Path, say: Say) -> dict[str, Any]:
    judge = _Judge(plan.config, members[0]["folder"])
    for member in members:
        judge.look_at(member)
        low = member["accuracy"] <= plan.floor
        member["left_out"] = f"accuracy {member['accuracy']:.3f} is not above {plan.floor}" if low else None
    ranking = sorted(members, key=lambda member: -member["accuracy"])
    kept = [member for member in ranking if member["left_out"] is None]
    if not kept:
        raise RunError(
            f"no member tells chosen from rejected better than {plan.floor}: the best has "
            f"{ranking[0]['accuracy']:.3f} on {judge.count} held-out pairs. Train longer or on other data"
        )
    trial = out / ".trial"
    for member in kept[1:]:
        member["path"] = {}
        for share in plan.shares:
            found = judge.score(_mean([kept[0], member], trial, (1 - share, share)))
            accuracy = pair_accuracy(*found)
            gap = connectivity_gap(accuracy, kept[0]["accuracy"], member["accuracy"], share)
            member["path"][str(share)] = accuracy
            member["gap"] = max(gap, member.get("gap", -math.inf))
        if member.get("gap", 0.0) > plan.tolerance:
            member["left_out"] = f"not connected with {kept[0]['name']}: {member['gap']:.3f} below the line"
    for member in members:
        if member["left_out"]:
            say(f"{out}: {member['name']} is left out of the average ({member['left_out']})")
    used = [member for member in kept if member["left_out"] is None]
    if len(used) == 1 and plan.members > 1:
        say(f"{out}: nothing is left to average with; the result is {used[0]['name']} by itself")
    target = out / "model"
    shutil.rmtree(target, ignore_errors=True)
    scores = judge.score(_mean(used, target, None))
    ensemble = _ensemble([member["scores"] for member in used])
    scale = [member["sd"] for member in used]
    if max(scale) > 3 * max(min(scale), 1e-12):
        say(
            f"{out}: rewards of the members spread differently (sd {min(scale):.3g} to {max(scale):.3g}): "
            "the widest dominates the average"
        )
    curve = {}
    for count in range(1, len(used) + 1):
        found = scores if count == len(used) else judge.score(_mean(used[:count], trial, None))
        curve[str(count)] = pair_accuracy(*found)
    shutil.rmtree(trial, ignore_errors=True)
    run: dict[str, Any] = {
        "pairs": judge.count,
        "model": str(target),
        "averaged": [member["name"] for member in used],
        "accuracy": {
            "member": fmean(member["accuracy"] for member in members),
            "best": ranking[0]["accuracy"],
            "ensemble": pair_accuracy(*ensemble),
            "warm": pair_accuracy(*scores),
        },
        "accuracy_by_members": curve,
        "noise": judge.wrong_labels(members, used, ranking[0], str(target)),
        "members": [{k: v for k, v in member.items() if k != "scores"} for member in members],
    }
    write_json(out / "scores.json", {"warm": scores, **{m["name"]: m["scores"] for m in members}})
    return run


def _mean(members: Sequence[dict[str, Any]], target: Path, weights: Sequence[float] | None) -> str:
    shutil.rmtree(target, ignore_errors=True)
    try:
        average([member["folder"] for member in members], target, weights=weights)
    except MergeError as error:
        raise RunError(f"the members cannot be averaged: {error}") from error
    return str(target)


def _ensemble(scores: Sequence[Pairs]) -> Pairs:
    """Return the mean reward of every answer over models."""
    chosen, rejected = (
        [fmean(values) for values in zip(*side, strict=True)] for side in zip(*scores, strict=True)
    )
    return chosen, rejected


class _Judge:
    """Held-out pairs, and training pairs with wrong labels, scored by reward models."""

    def __init__(self, config: RunConfig, folder: str) -> None:
        self.config = config
        data = load_data(config.data, config.task)
        assert data.eval is not None
        model, tokenizer = load_scorer(folder, config.model.dtype)
        self.pairs = self._fit(data.eval, model, tokenizer)
        self.count = len(self.pairs)
        self.noisy = self._wrong(data.train, model, tokenizer)
        self.fingerprint = data.fingerprint

    def _fit(self, rows: Dataset, model: Any, tokenizer: Any) -> Dataset:
        return fitting_pairs(self.config, render(rows, tokenizer, self.config.data), model, tokenizer)[0]

    def _wrong(self, rows: Dataset, model: Any, tokenizer: Any) -> Dataset | None:
        """Return training pairs whose labels were exchanged, as they are trained on."""
        if self.config.data.label_noise is None:
            return None
        clean = load_data(self.config.data.model_copy(update={"label_noise": None}), self.config.task).train
        right = clean["chosen"][:]
        wrong = [index for index, text in enumerate(rows["chosen"][:]) if text != right[index]][:_NOISY]
        return self._fit(rows.select(wrong), model, tokenizer)

    def look_at(self, member: dict[str, Any]) -> None:
        """Add scores and their summary to a member; scores that are known are read."""
        path = Path(member["folder"]).parent / "scores.json"
        known = stored_json(path) if path.is_file() else {}
        if known.get("fingerprint") != self.fingerprint:
            found = self.score(member["folder"])
            known = {"fingerprint": self.fingerprint, "chosen": found[0], "rejected": found[1]}
            write_json(path, known)
        member["scores"] = (known["chosen"], known["rejected"])
        values = known["chosen"] + known["rejected"]
        member |= {"accuracy": pair_accuracy(*member["scores"]), "mean": fmean(values), "sd": pstdev(values)}

    def score(self, folder: str, pairs: Dataset | None = None) -> Pairs:
        """Return the rewards of chosen and rejected answers, of the held-out pairs when None are given."""
        rows = self.pairs if pairs is None else pairs
        model, tokenizer = load_scorer(folder, self.config.model.dtype)
        model = model.to(Ranks().state.device)
        texts = [
            encode_scored(tokenizer, row["prompt"], row[side])
            for side in ("chosen", "rejected")
            for row in rows
        ]
        settings = self.config.evaluate or EvaluateConfig(k=[1])
        found = text_scores(model, texts, pad=tokenizer.pad_token_id, batch_size=settings.batch_size)
        return found[: len(rows)], found[len(rows) :]

    def wrong_labels(
        self,
        members: Sequence[dict[str, Any]],
        used: Sequence[dict[str, Any]],
        best: dict[str, Any],
        model: str,
    ) -> dict[str, float]:
        """Return the share of wrong training labels that each result reproduces."""
        if self.noisy is None or len(self.noisy) == 0:
            return {}
        scores = {member["name"]: self.score(member["folder"], self.noisy) for member in members}
        ensemble = _ensemble([scores[member["name"]] for member in used])
        return {
            "member": fmean(pair_accuracy(*found) for found in scores.values()),
            "best": pair_accuracy(*scores[best["name"]]),
            "ensemble": pair_accuracy(*ensemble),
            "warm": pair_accuracy(*self.score(model, self.noisy)),
        }

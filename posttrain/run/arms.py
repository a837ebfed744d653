"""The arms of a comparison, and the runs they stand for.

An arm is a name and changes on top of a configuration. Each arm is run with the same seeds: seed s sets
``trainer.seed`` to the configuration's own seed plus s. The seeds of the data stay, so that all runs train on
the same rows and are judged on the same problems.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.config.check import check_and_load
from posttrain.config.schema import RunConfig
from posttrain.config.source_check import EMBEDDED_MODELS
from posttrain.run.directory import RunDirectory, RunError

Share = Literal["once", "per-seed", "no"]
SHARES: tuple[str, ...] = get_args(Share)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CLOSES = {"]": "[", "}": "{", ")": "("}
# What must not differ: results on other problems, or from other samples, cannot be set against each other.
_SAME = ("evaluate", "data.source", "data.params", "data.eval")
# What makes one arm dearer than another.
_BUDGET = (
    "model.path", "data.train", "trainer.max_steps", "trainer.num_train_epochs",
    "trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps",
    "trainer.generation_batch_size", "trainer.steps_per_generation", "trainer.num_generations",
    "trainer.num_iterations", "trainer.max_completion_length",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: Its name, also that of its folder.
        overrides: ``key=value`` changes on top of the configuration.
    """

    name: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        arm: Name of the arm.
        seed: s, from 0; ``trainer.seed`` is the base seed plus s.
        config: The configuration, its run_dir included.
        warm_start_of: The run whose warm start this one begins from, None when it makes its own or has none.
    """

    arm: str
    seed: int
    config: RunConfig
    warm_start_of: PlannedRun | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def run(self) -> RunDirectory:
        """Its run directory, OUT/ARM/seed-S."""
        return RunDirectory(Path(self.config.run_dir))

    def beside(self, ending: str) -> Path:
        """Return the file of that ending beside the run directory: its .yaml, .log or .json."""
        return self.run.root.with_name(f"{self.run.root.name}.{ending}")


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison, in the order in which they start.

    Attributes:
        arms: In the order of the command line; the first is the one the others are compared with.
        seeds: Number of seeds.
        base_seed: ``trainer.seed`` of seed 0.
        out: Folder of the comparison.
        runs: Seed by seed, arms in turn.
        notes: What a reader should know about the design.
    """

    arms: tuple[Arm, ...]
    seeds: int
    base_seed: int
    out: Path
    runs: tuple[PlannedRun, ...]
    notes: tuple[str, ...]

    @property
    def switched_on(self) -> dict[str, str]:
        """Methods and selection of each arm as all merging left them: an override may add to a mapping."""
        first = {run.arm: run.config for run in reversed(self.runs)}
        return {arm.name: _switched_on(first[arm.name]) for arm in self.arms}


def parse_arm(text: str) -> Arm:
    """Read ``NAME:key=value,key=value``; a comma inside brackets or quotes belongs to the value.

    Raises:
        RunError: The name cannot be a folder's, or an override sets what the comparison sets itself.
    """
    name, _, rest = text.partition(":")
    if not _NAME.fullmatch(name):
        raise RunError(
            f"--arm {text!r} needs the form NAME:key=value,key=value; the name consists of letters, "
            f"digits and ._- and begins with a letter or digit (NAME alone is the configuration as it is)"
        )
    overrides = tuple(split_overrides(rest))
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in ("run_dir", "trainer.seed"):
            fix = "give --out DIR" if key == "run_dir" else "put it on the command line, for all arms"
            raise RunError(f"arm {name!r} sets {key}, which the comparison sets for each run: {fix}")
    return Arm(name, overrides)


def split_overrides(text: str) -> list[str]:
    """Split at commas that stand outside brackets and quotes; empty pieces are dropped."""
    pieces, opened, quote = [""], [], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            opened.append(character)
        elif opened and _CLOSES.get(character) == opened[-1]:
            opened.pop()
        elif character == "," and not opened:
            pieces.append("")
            continue
        pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]


def plan(
    config: str | Path,
    arms: Sequence[Arm],
    *,
    seeds: int,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    share: Share = "once",
) -> Plan:
    """Check every arm and lay out the runs; nothing is written.

    Args:
        config: The YAML file all arms start from.
        arms: At least one; the first is the one the others are compared with.
        seeds: Seeds per arm, at least 1.
        out: Folder of the comparison; RUN_DIR-compare when None.
        overrides: Changes for all arms.
        share: ``once``: all runs begin from one warm start, made in the first run; ``per-seed``: the arms of
            a seed begin from one, made in the first arm's run; ``no``: each run makes its own. Without effect
            when the arms have none, or do not agree on it.

    Raises:
        RunError: Names occur twice, a configuration is wrong (all problems of all arms are listed), or the
            arms cannot be compared.
    """
    names = [arm.name.lower() for arm in arms]
    if not arms or len(set(names)) < len(names):
        raise RunError(
            f"each arm needs a name of its own, found {', '.join(names) or 'no arm'}: --arm NAME:key=value"
        )
    if seeds < 1:
        raise RunError(f"--seeds is at least 1, found {seeds}")
    configs = _load(config, overrides, arms)
    _refuse_incomparable(arms, configs)
    base_seed = int(configs[0].trainer.get("seed", 42))
    out = out or Path(f"{configs[0].run_dir.rstrip('/')}-compare")
    shared = share != "no" and _one_warm_start(configs)
    runs: list[PlannedRun] = []
    for seed in range(seeds):
        for arm, of_arm in zip(arms, configs, strict=True):
            leader = None
            if shared:
                leader = next((run for run in runs if share == "once" or run.seed == seed), None)
            local = _local(of_arm, out / arm.name / f"seed-{seed}", base_seed + seed)
            runs.append(
                PlannedRun(arm.name, seed, local if leader is None else _begin_from(local, leader), leader)
            )
    notes = _notes(arms, configs)
    if shared and share == "once" and seeds > 1:
        notes.append(
            "All runs begin from one warm start (that of the first run): the intervals are over "
            "reinforcement learning from it, and do not contain how warm starts vary. --share-warm-start "
            "per-seed includes that."
        )
    return Plan(tuple(arms), seeds, base_seed, out, tuple(runs), tuple(notes))


def _switched_on(config: RunConfig) -> str:
    chosen = config.selection
    selection = "none" if chosen is None else chosen.method or f"plan {chosen.plan}"
    return f"methods {', '.join(config.methods) or 'none'}; selection {selection}"


def _load(config: str | Path, overrides: Sequence[str], arms: Sequence[Arm]) -> list[RunConfig]:
    loaded, problems = [], []
    for arm in arms:
        report, of_arm = check_and_load(config, [*overrides, *arm.overrides])
        if of_arm is None:
            problems.append(f"arm {arm.name!r}:\n{report.text()}")
        else:
            loaded.append(of_arm)
    if problems:
        raise RunError("\n".join(problems))
    return loaded


def _local(config: RunConfig, folder: Path, seed: int) -> RunConfig:
    """Return the configuration of one run: its seed, its folder, and nothing that leaves the folder."""
    export = config.export.model_copy(update={"dir": None, "push": None}) if config.export else None
    trainer = {**config.trainer, "seed": seed}
    return config.model_copy(update={"run_dir": str(folder), "trainer": trainer, "export": export})


def _begin_from(config: RunConfig, leader: PlannedRun) -> RunConfig:
    path = str(leader.run.warm_start.model.resolve())
    model = config.model.model_copy(update={"path": path, "tokenizer": None, "revision": None})
    return config.model_copy(update={"model": model, "warm_start": None})


def _one_warm_start(configs: Sequence[RunConfig]) -> bool:
    """Whether all arms make the same warm start; the adapter comes after it."""
    first = configs[0]
    if first.warm_start is None or not (
        first.warm_start.when == "always" or first.model.path in EMBEDDED_MODELS
    ):
        return False
    keys = [
        (c.task, c.model.model_copy(update={"adapter": None}), c.data, c.warm_start, c.threads)
        for c in configs
    ]
    return all(key == keys[0] for key in keys)


def _refuse_incomparable(arms: Sequence[Arm], configs: Sequence[RunConfig]) -> None:
    for arm, config in zip(arms[1:], configs[1:], strict=True):
        for key in (*_SAME, "trainer.seed"):
            one, two = _value(configs[0], key), _value(config, key)
            if one != two:
                raise RunError(
                    f"arms {arms[0].name!r} and {arm.name!r} differ in {key} ({one} and {two}): their "
                    f"results could not be compared. Change it for all arms, as KEY=VALUE outside --arm"
                )


def _notes(arms: Sequence[Arm], configs: Sequence[RunConfig]) -> list[str]:
    notes = []
    for key in _BUDGET:
        values = [_value(config, key) for config in configs]
        if any(value != values[0] for value in values):
            shown = ", ".join(
                f"{_shown(value)} in {arm.name}" for arm, value in zip(arms, values, strict=True)
            )
            notes.append(f"The arms do not have the same budget: {key} is {shown}.")
    judges = [config.rewards[:1] and config.rewards[0].model_dump(exclude={"weight"}) for config in configs]
    if configs[0].evaluate is not None and any(judge != judges[0] for judge in judges):
        notes.append("The arms are judged by different rewards: the first reward decides what is correct.")
    if any(config.export is not None and config.export.push for config in configs):
        notes.append("The runs of a comparison are not uploaded: export.push is left out.")
    return notes


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)

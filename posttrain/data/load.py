"""The ``data`` section of a configuration turned into training and held-out rows."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from posttrain.config.schema import DataConfig, SplitConfig
from posttrain.config.tasks import TASKS
from posttrain.data import sources
from posttrain.data.contracts import CONTRACTS, check, rename
from posttrain.data.errors import DataError
from posttrain.data.files import Table, with_places
from posttrain.data.pairs import flip, to_pairs
from posttrain.data.prompts import apply_pattern, apply_template

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 500


@dataclass(frozen=True)
class LoadedData:
    """Checked rows of a run.

    Attributes:
        config: The ``data`` section they come from.
        task: The kind of training whose contract they fulfil.
        train: Training rows.
        eval: Held-out rows, or None when none were asked for.
        fingerprint: SHA-256 (hex) over all rows in order; equal in every process and on every machine.
        describe: Source, sizes, columns and notes, for the manifest and the model card.
    """

    config: DataConfig
    task: str
    train: Dataset
    eval: Dataset | None
    fingerprint: str
    describe: dict[str, Any]


def load_data(config: DataConfig, task: str, *, hold_out: bool = True, places: bool = False) -> LoadedData:
    """Load, rename, template, check and split the data of a run.

    Args:
        config: The ``data`` section.
        task: A key of :data:`posttrain.data.contracts.CONTRACTS`. For ``sft`` a prompt with an answer gets
            the answer as its completion; for ``preference`` and ``reward`` see :mod:`posttrain.data.pairs`.
        hold_out: Whether held-out rows are wanted. They come from ``eval.file`` or ``eval.split`` when
            given, from the Hub's ``test`` split when it has one, and are taken out of the training rows
            otherwise: ``eval.size`` rows, by default a tenth and at most 500. Generated tasks generate
            problems whose questions are not in the training rows.
        places: Whether rows say where they come from, in the column :data:`posttrain.data.files.PLACE`
            (which counts in the fingerprint).

    Returns:
        The rows. Held-out prompts never occur in the training rows, except when both were given as files or
        splits that overlap: that is counted and warned about.

    Raises:
        DataError: Anything that is wrong with the data; nothing is repaired or dropped in silence.
    """
    if task not in CONTRACTS:
        raise ValueError(f"unknown task {task!r}; one of {', '.join(CONTRACTS)} is needed")
    if sources.is_generated(config):
        raw, raw_eval = sources.generate(config, config.train, config.eval if hold_out else None)
    elif sources.is_file(config):
        raw, raw_eval = sources.read(config, config.train), None
        if hold_out and config.eval.file:
            raw_eval = sources.read(config, config.eval)
    else:
        raw, raw_eval = _from_hub(config, hold_out)
    if places:
        raw, raw_eval = with_places(raw), None if raw_eval is None else with_places(raw_eval)
    notes = [*raw.notes, *(raw_eval.notes if raw_eval else ())]
    train = _prepare(raw, config, task, notes)
    held_out = None if raw_eval is None else _prepare(raw_eval, config, task, notes, "held-out: ")
    if not sources.is_generated(config):
        if held_out is not None:
            held_out = _sample(held_out, config.eval, "eval")
        elif hold_out:
            train, held_out = _split(train, config.eval, notes)
        train = _sample(train, config.train, "train")
        _warn_overlap(train, held_out, notes)
    noise: dict[str, Any] = {}
    if config.label_noise is not None:
        train, noise["label_noise"] = flip(train, config.label_noise, notes)
    for note in notes:
        logger.info("%s: %s", config.source, note)
    fingerprint = row_fingerprint(train, held_out)
    describe = {
        "source": config.source,
        "params": config.params,
        "task": task,
        "train_rows": len(train),
        "eval_rows": None if held_out is None else len(held_out),
        "columns": train.column_names,
        "train_seed": config.train.seed,
        "eval_seed": config.eval.seed,
        "fingerprint": fingerprint,
        "notes": notes,
        **noise,
    }
    return LoadedData(config, task, train, held_out, fingerprint, describe)


def load_warm_start(data: LoadedData, size: int) -> Dataset:
    """Return rows for supervised fine-tuning on the source's own answers, none of them held out.

    Args:
        data: The data of the run.
        size: Rows at most. A generated task generates that many with ``train.seed + 1`` and leaves out those
            whose prompt is held out; other sources use their training rows, sampled with that seed.

    Raises:
        DataError: The source has no answers to learn.
    """
    config = data.config
    seed = config.train.seed + 1
    if sources.is_generated(config):
        raw, _ = sources.generate(config, SplitConfig(size=size, seed=seed), None)
        rows = _prepare(raw, config, "sft", [])
        held_out = set(_keys(data.eval)) if data.eval is not None else set()
        keep = [index for index, key in enumerate(_keys(rows)) if key not in held_out]
        logger.info(
            "warm start: %d of %d generated rows left out, because they are held out",
            len(rows) - len(keep),
            len(rows),
        )
        if not keep:
            raise DataError(
                f"{config.source}: every generated row is held out, nothing is left for the warm start"
            )
        return rows.select(keep)
    rows = _finish(Table(data.train, f"{config.source} (training rows)"), "sft", [])
    return _sample(rows, SplitConfig(size=min(size, len(rows)), seed=seed), "train")


def row_fingerprint(*datasets: Dataset | None) -> str:
    """Return the SHA-256 (hex) of all rows, each as JSON with sorted keys, with the number of "
    "rows of each set."""
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(b"none\n" if dataset is None else b"%d\n" % len(dataset))
        for row in dataset.to_list() if dataset is not None else ():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _from_hub(config: DataConfig, hold_out: bool) -> tuple[Table, Table | None]:
    splits = sources.fetch(config)
    train = sources.hub_split(splits, config.train.split or "train", config.source)
    name = config.eval.split or ("test" if "test" in splits and config.train.split != "test" else None)
    return train, sources.hub_split(splits, name, config.source) if hold_out and name else None


def _prepare(table: Table, config: DataConfig, task: str, notes: list[str], place: str = "") -> Dataset:
    renamed = rename(table, config.columns)
    if config.prompt_pattern is not None:
        renamed = apply_pattern(renamed, config.prompt_pattern)
    if config.prompt_template is not None:
        aliases = {old: new for new, old in config.columns.items()}
        if sources.is_generated(config):
            aliases.setdefault("question", "prompt")
        renamed = apply_template(renamed, config.prompt_template, aliases)
    found: list[str] = []
    finished = _finish(renamed, task, found)
    notes += [f"{place}{note}" for note in found]
    return finished


def _finish(table: Table, task: str, notes: list[str]) -> Dataset:
    chosen = check(table, task)
    dataset = table.dataset
    if TASKS[task].pairs:  # type: ignore[index]
        return to_pairs(table, notes)
    if task != "sft":
        return dataset
    if "answer" in chosen:
        dataset = dataset.add_column("completion", dataset["answer"][:])
    # TRL's trainer looks at column names to tell what kind of rows it has: leave it no choice
    others = {name for columns in CONTRACTS["sft"].alternatives for name in columns} - {
        *chosen,
        "completion",
        "answer",
    }
    return dataset.remove_columns([name for name in dataset.column_names if name in others])


def _sample(dataset: Dataset, split: SplitConfig, name: str) -> Dataset:
    if split.size is None:
        return dataset
    if split.size > len(dataset):
        raise DataError(
            f"data.{name}.size asks for {split.size} rows, there are {len(dataset)}: lower it, "
            "or leave it out for all"
        )
    return dataset.select(sorted(random.Random(split.seed).sample(range(len(dataset)), split.size)))


def _split(dataset: Dataset, split: SplitConfig, notes: list[str]) -> tuple[Dataset, Dataset]:
    """Take held-out rows out of a data set; rows with the same prompt stay together."""
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(_keys(dataset)):
        groups.setdefault(key, []).append(index)
    wanted = split.size or max(1, min(HELD_OUT_MOST, round(HELD_OUT_SHARE * len(dataset))))
    order = list(groups)
    random.Random(split.seed).shuffle(order)
    chosen: list[int] = []
    for key in order:
        if len(chosen) + len(groups[key]) <= wanted:
            chosen += groups[key]
    if len(chosen) == len(dataset) or not chosen:
        raise DataError(
            f"{wanted} held-out rows cannot be taken from {len(dataset)} rows with {len(groups)} "
            "different prompts: "
            "set data.eval.size lower, or give data.eval.file"
        )
    if len(chosen) < wanted and split.size is not None:
        raise DataError(
            f"data.eval.size asks for {wanted} held-out rows; only {len(chosen)} can be taken: lower it"
        )
    notes.append(
        f"{len(chosen)} rows were taken out of the training data and held out (seed {split.seed}); "
        "no prompt is on both sides"
    )
    held_out = set(chosen)
    rest = [index for index in range(len(dataset)) if index not in held_out]
    return dataset.select(rest), dataset.select(sorted(chosen))


def _warn_overlap(train: Dataset, held_out: Dataset | None, notes: list[str]) -> None:
    if held_out is None:
        return
    known = set(_keys(train))
    shared = sum(key in known for key in _keys(held_out))
    if shared:
        note = f"{shared} of {len(held_out)} held-out rows have a prompt that is also in the training rows"
        logger.warning("%s: what is measured on them is memory", note)
        notes.append(note)


def _keys(dataset: Dataset) -> list[str]:
    column = next(name for name in ("prompt", "messages", "text") if name in dataset.column_names)
    return [json.dumps(value, sort_keys=True) for value in dataset[column][:]]

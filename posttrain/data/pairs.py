"""Rows that say which of two answers is better: brought to one form, counted, and mislabelled on request.

Every form ends as the columns ``prompt``, ``chosen`` and ``rejected``, all text or all messages:

* prompt, chosen, rejected;
* chosen and rejected that both begin with the prompt (the part they share);
* prompt, completions and scores (higher is better), ranks (1 is best) or preferences (K x K chances that the
  one of the row beats that of the column): the best and the worst of the list are the pair, and the list
  stays beside it for methods that use all of it.

Nothing is dropped in silence: each thing that is left out or kept with a doubt is counted in a note.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets

from posttrain.config.schema import LabelNoiseConfig
from posttrain.data.errors import DataError, listed
from posttrain.data.files import Table, read_file

Message = dict[str, Any]
Reply = str | list[Message]

FORMS = ("messages", "text", "completion", "label")
"""Columns that TRL would take for another kind of data."""


LABELS = ("scores", "ranks", "preferences")
"""Columns that say how good the answers of a list are; the first that is there counts."""


def to_pairs(table: Table, notes: list[str]) -> Dataset:
    """Return checked rows in the form of :mod:`posttrain.data.pairs`.

    Args:
        table: Rows that fulfil the contract of a task on pairs.
        notes: Gets what was left out or is doubtful, with counts.

    Raises:
        DataError: A list has scores of another length or fewer than two answers, two answers do not begin
            alike where there is no prompt, or no pair is left.
    """
    dataset = table.dataset
    names = dataset.column_names
    dataset = dataset.remove_columns([name for name in FORMS if name in names])
    if "chosen" not in names:
        dataset = _from_lists(table, dataset, notes)
    columns = {
        name: dataset[name][:] for name in ("prompt", "chosen", "rejected") if name in dataset.column_names
    }
    if "prompt" in columns:
        columns = _one_form(columns)
    different = [
        index
        for index, (a, b) in enumerate(zip(columns["chosen"], columns["rejected"], strict=True))
        if a != b
    ]
    alike = len(dataset) - len(different)
    if alike:
        if not different:
            raise DataError(
                f"{table.place}: all {alike} pairs have a chosen answer equal to the rejected one"
            )
        notes.append(f"{alike} of {len(dataset)} pairs were left out: chosen and rejected are the same text")
        dataset = dataset.select(different)
        columns = {name: [values[index] for index in different] for name, values in columns.items()}
    if "prompt" not in columns:
        columns = _split_off_prompts(columns, table)
        notes.append("the prompt of each pair is what its two answers begin with in common")
    empty = sum(
        not _text(a).strip() or not _text(b).strip()
        for a, b in zip(columns["chosen"], columns["rejected"], strict=True)
    )
    if empty:
        notes.append(f"{empty} of {len(dataset)} pairs have an empty answer; they are kept")
    rest = [name for name in dataset.column_names if name not in columns]
    pairs = Dataset.from_dict(columns)
    return concatenate_datasets([pairs, dataset.select_columns(rest)], axis=1) if rest else pairs


def flip(dataset: Dataset, noise: LabelNoiseConfig, notes: list[str]) -> tuple[Dataset, dict[str, Any]]:
    """Exchange chosen and rejected in some rows; scores and margins of the pair stay where they are.

    In a list the best and the worst answer exchange their labels.

    Args:
        dataset: Training rows with ``chosen`` and ``rejected``.
        noise: Which rows: a share of them, or those whose ``column`` holds a value of a file.
        notes: Gets how many it were.

    Returns:
        The rows, and what to write into the manifest.

    Raises:
        DataError: The file or a column does not exist, or no row is meant.
    """
    rows = len(dataset)
    about: dict[str, Any] = {"rows": rows}
    if noise.file is None:
        assert noise.share is not None
        count = round(noise.share * rows)
        chosen = set(random.Random(noise.seed).sample(range(rows), count))
        about |= {"share": noise.share, "seed": noise.seed}
        origin = f"drawn with seed {noise.seed}"
    else:
        assert noise.column is not None
        wanted = _values(noise.file, noise.column)
        if noise.column not in dataset.column_names:
            raise DataError(
                f"data.label_noise.column: the data has no column {noise.column!r}. Found: "
                f"{', '.join(dataset.column_names)}"
            )
        values = dataset[noise.column][:]
        chosen = {index for index, value in enumerate(values) if value in wanted}
        missed = len(wanted) - len({values[index] for index in chosen})
        origin = f"those that {noise.file} names by {noise.column!r}"
        origin += f"; {missed} of its {len(wanted)} values are not in the training rows" if missed else ""
        about |= {"file": noise.file, "column": noise.column, "values": len(wanted)}
    about["flipped"] = len(chosen)
    if not chosen:
        raise DataError(
            f"data.label_noise means none of the {rows} training rows ({origin}): drop the section"
        )
    notes.append(
        f"label noise: chosen and rejected are exchanged in {len(chosen)} of {rows} training rows "
        f"({origin}); held-out rows are as they were"
    )
    better, worse = dataset["chosen"][:], dataset["rejected"][:]
    for index in chosen:
        better[index], worse[index] = worse[index], better[index]
    order = dataset.column_names
    new = {"chosen": better, "rejected": worse}
    for label in LABELS if "completions" in order else ():
        if label in order:
            new[label] = dataset[label][:]
            for index in chosen:
                new[label][index] = _exchanged(label, new[label][index])
    dataset = dataset.remove_columns(list(new))
    for name, column in new.items():
        dataset = dataset.add_column(name, column)
    return dataset.select_columns(order), about


def _merits(label: str, values: Sequence[Any]) -> list[float]:
    """Return one number per answer of a list, higher is better."""
    if label == "preferences":
        return [sum(row) / len(row) for row in values]
    return [-float(value) if label == "ranks" else float(value) for value in values]


def _exchanged(label: str, values: Sequence[Any]) -> list[Any]:
    """Return the labels of a list with those of the best and the worst answer exchanged."""
    merits, places = _merits(label, values), list(range(len(values)))
    best, last = merits.index(max(merits)), merits.index(min(merits))
    places[best], places[last] = last, best
    if label == "preferences":
        return [[values[row][column] for column in places] for row in places]
    return [values[place] for place in places]


def _values(file: str, column: str) -> set[Any]:
    table = read_file(Path(file).expanduser())
    if column not in table.dataset.column_names:
        raise DataError(
            f"data.label_noise.file {file}: no column {column!r}. "
            f"Found: {', '.join(table.dataset.column_names)}"
        )
    return set(table.dataset[column][:])


def encode_pair(
    tokenizer: Any, row: dict[str, Any], max_length: int | None
) -> tuple[list[int], list[int], int]:
    """Return the token ids of prompt with chosen, of prompt with rejected, and where both answers begin.

    They are those that TRL's ``DPOTrainer`` trains on: text ends with the end token, messages go through the
    chat template, and an answer begins where prompt and whole part ways.

    Args:
        tokenizer: A transformers tokenizer.
        row: ``prompt``, ``chosen`` and ``rejected``.
        max_length: Longest sequence; the end is cut off.
    """
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(prompt, str):
        start = tokenizer(prompt)["input_ids"]
        better, worse = (
            tokenizer(prompt + _ended(reply, tokenizer))["input_ids"] for reply in (chosen, rejected)
        )
    else:
        start = _templated(tokenizer, prompt, add_generation_prompt=True)
        better, worse = (_templated(tokenizer, prompt + reply) for reply in (chosen, rejected))
    begin = min(_shared(start, better), _shared(start, worse))
    return better[:max_length], worse[:max_length], begin


def encode_scored(tokenizer: Any, prompt: Reply, reply: Reply) -> list[int]:
    """Return the token ids of a prompt with an answer as TRL's ``RewardTrainer`` scores them."""
    if isinstance(prompt, str) and isinstance(reply, str):
        return list(tokenizer(prompt + _ended(reply, tokenizer))["input_ids"])
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return _templated(tokenizer, start + (_said(reply) if isinstance(reply, str) else list(reply)))


def apply_pair_lengths(
    dataset: Dataset,
    tokenizer: Any,
    max_length: int | None,
    policy: Literal["refuse", "filter"],
    *,
    whole: bool,
    context: int | None = None,
) -> tuple[Dataset, str, int]:
    """Count the tokens of all pairs and apply the policy to those that cannot be trained on.

    Args:
        dataset: Rendered rows.
        tokenizer: A transformers tokenizer.
        max_length: ``trainer.max_length``; None for no limit.
        policy: ``refuse`` raises, ``filter`` leaves the pairs out.
        whole: Whether both sequences have to fit whole, as for a reward model. Otherwise the end of an answer
            may be cut off, which is counted, but not all of it.
        context: Longest sequence of the model.

    Returns:
        The pairs that can be trained on, a sentence with the counts, and the tokens of their longest prompt.

    Raises:
        DataError: Pairs that do not fit under ``refuse``, none left, or sequences longer than the context.
    """
    encoded = [encode_pair(tokenizer, row, None) for row in dataset]
    longest = np.asarray([max(len(a), len(b)) for a, b, _ in encoded])
    begins = np.asarray([begin for _, _, begin in encoded])
    limit = np.inf if max_length is None else max_length
    unfit = longest > limit if whole else begins >= limit
    over = int(unfit.sum())
    if over:
        what = "are longer than" if whole else "have a prompt that leaves no room for an answer within"
        finding = f"{over} of {len(encoded)} pairs {what} trainer.max_length={max_length} tokens"
        if policy == "refuse":
            needed = int(longest.max()) if whole else int(begins.max()) + 1
            raise DataError(
                f"{finding}. Raise trainer.max_length to {needed}, or leave these pairs out with "
                "data.over_length: filter"
            )
        if over == len(encoded):
            raise DataError(f"{finding}. Nothing would be left: raise trainer.max_length")
    kept = longest[~unfit]
    cut = 0 if max_length is None else int((kept > max_length).sum())
    used = int(min(kept.max(), max_length or kept.max()))
    if context is not None and used > context:
        raise DataError(
            f"the longest pair has {used} tokens, more than the context of the model: set "
            f"trainer.max_length: {context}"
        )
    text = f"{len(kept)} pairs, length median {int(np.median(kept))}, longest {int(kept.max())} tokens"
    text += f", {cut} with an answer cut at {max_length}" if cut else ""
    text += f", {over} left out because they do not fit {max_length}" if over else ""
    return (dataset.select(np.flatnonzero(~unfit)) if over else dataset), text, int(begins[~unfit].max())


def _ended(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token
    return text if text.endswith(end) else text + end


def _templated(tokenizer: Any, messages: Sequence[Message], **options: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """Return how many items two sequences begin with in common."""
    for index, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return index
    return min(len(one), len(two))


def _text(reply: Any) -> str:
    return (
        reply if isinstance(reply, str) else "".join(str(message.get("content") or "") for message in reply)
    )


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _one_form(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Make prompt and answers all text or all messages.

    Sets are published with the question as text and both conversations whole: the question is then their
    first message, and the prompt what they share.
    """
    spoken = {name: isinstance(values[0], list) for name, values in columns.items()}
    if all(spoken.values()) or not any(spoken.values()):
        return columns
    prompts = columns["prompt"]
    if not spoken["prompt"]:
        whole = all(
            isinstance(reply, list) and len(reply) > 1 and any(m.get("content") == prompt for m in reply)
            for name in ("chosen", "rejected")
            for prompt, reply in zip(prompts, columns[name], strict=True)
        )
        if whole:
            return {name: columns[name] for name in ("chosen", "rejected")}
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return {"prompt": prompts} | {
        name: columns[name] if spoken[name] else [_said(text) for text in columns[name]]
        for name in ("chosen", "rejected")
    }


def _split_off_prompts(columns: dict[str, list[Any]], table: Table) -> dict[str, list[Any]]:
    from trl import extract_prompt

    rows = [
        extract_prompt({"chosen": chosen, "rejected": rejected})
        for chosen, rejected in zip(columns["chosen"], columns["rejected"], strict=True)
    ]
    bare = [index for index, row in enumerate(rows) if not row["prompt"]]
    if bare:
        raise DataError(
            f"{table.place}: there is no column 'prompt', and in {len(bare)} of {len(rows)} rows chosen and "
            f"rejected do not begin alike (first: {table.where(bare[0])}). Name the prompt's column with "
            "data.columns: {prompt: YOUR_COLUMN}"
        )
    return {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}


def _from_lists(table: Table, dataset: Dataset, notes: list[str]) -> Dataset:
    """Add the best and the worst answer of each list as chosen and rejected."""
    name = next(label for label in LABELS if label in dataset.column_names)
    problems, kept, tied = [], [], 0
    better, worse = [], []
    for index, (replies, values) in enumerate(zip(dataset["completions"][:], dataset[name][:], strict=True)):
        if len(replies) != len(values) or len(replies) < 2:
            problems.append(f"{table.where(index)}: {len(replies)} completions and {len(values)} {name}")
            continue
        merits = _merits(name, values)
        if max(merits) == min(merits):
            tied += 1
            continue
        kept.append(index)
        better.append(replies[merits.index(max(merits))])
        worse.append(replies[merits.index(min(merits))])
    if problems:
        raise DataError(
            f"{table.place}: {len(problems)} lists cannot be used; each needs two completions at least and "
            f"as many {name}:\n{listed(problems)}"
        )
    if not kept:
        raise DataError(f"{table.place}: in all {tied} lists every answer has the same of {name}")
    if tied:
        notes.append(f"{tied} of {len(dataset)} lists were left out: all their {name} are equal")
        dataset = dataset.select(kept)
    notes.append(f"chosen and rejected are the best and the worst of each list, by {name}")
    return dataset.add_column("chosen", better).add_column("rejected", worse)

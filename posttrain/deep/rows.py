"""The data: what is too long, empty, twice there, on both sides, or contradicts itself."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from posttrain.data.errors import DataError
from posttrain.data.files import PLACE
from posttrain.data.length import PERCENTILES, apply_length_policy
from posttrain.data.pairs import apply_pair_lengths
from posttrain.data.sources import is_generated
from posttrain.deep.findings import Finding, Section, first, share, short
from posttrain.deep.stand_in import Encoded, Encoding
from posttrain.deep.subject import Subject

CUT_SHARE = 0.05
"""More answers than this cut off is no accident of a few long rows."""

LENGTH_BIAS = 0.7
"""Share of pairs with the longer answer preferred from which length alone explains the preference."""


def look_at_rows(subject: Subject, encoding: Encoding | None) -> Section:
    """Return counts and findings about the rows of a run.

    Args:
        subject: With data, and rows and tokenizer where those could be loaded.
        encoding: The rows as tokens, for supervised runs and those on pairs.
    """
    data = subject.data
    assert data is not None
    findings = [Finding("note", note) for note in data.describe["notes"]]
    facts: dict[str, Any] = {
        "train_rows": len(data.train),
        "held_out_rows": None if data.eval is None else len(data.eval),
        "columns": [name for name in data.train.column_names if name != PLACE],
    }
    findings += _same_rows(data.train, generated=is_generated(data.config))
    findings += _overlap(data.train, data.eval)
    findings += _pairs(data.train) if subject.spec.pairs else _contradictions(data.train)
    findings += _empty(data.train)
    if subject.rows is not None:
        facts["looked_at"] = len(subject.rows)
        more, facts["prompt_tokens"] = _prompts(subject)
        findings += more
        findings += _room(subject, facts["prompt_tokens"])
        if encoding is not None and not subject.spec.generates:
            findings += _cut(subject, encoding)
            facts["tokens"] = _lengths([sequence.length for sequence in encoding.sequences])
            facts["trained_tokens"] = sum(sum(sequence.trained) for sequence in encoding.sequences)
        if subject.spec.generates:
            findings += _answers(subject, facts)
    return Section("data", "Data", tuple(findings), facts)


def key(value: Any) -> str:
    """Return a value as text that is equal for what a person would call the same: case and spaces aside."""
    if isinstance(value, list):
        text = json.dumps([m.get("content") if isinstance(m, dict) else m for m in value], default=str)
    else:
        text = str(value)
    return " ".join(text.lower().split())


# ---- rows among each other ---------------------------------------------------------------------------------


def _columns(rows: Dataset) -> list[str]:
    known = ("prompt", "completion", "messages", "text", "chosen", "rejected", "answer")
    return [name for name in known if name in rows.column_names]


def _same_rows(rows: Dataset, *, generated: bool) -> Iterable[Finding]:
    columns = _columns(rows)
    seen: dict[str, int] = {}
    twice: list[str] = []
    for index, values in enumerate(zip(*(rows[name][:] for name in columns), strict=True)):
        name = json.dumps(values, sort_keys=True, default=str)
        if name in seen:
            twice.append(f"{_place(rows, index)} repeats {_place(rows, seen[name])}")
        else:
            seen[name] = index
    if twice:
        yield Finding(
            "note" if generated else "warning",
            f"{share(len(twice), len(rows))} rows repeat an earlier one word for word",
            "the task has few different problems"
            if generated
            else "files were joined, or the source has them twice",
            "make the task larger with data.params"
            if generated
            else "remove them; each epoch weighs them that many times",
            first(twice),
        )


def _overlap(rows: Dataset, held_out: Dataset | None) -> Iterable[Finding]:
    if held_out is None:
        return
    column = _columns(rows)[0]
    exact = {json.dumps(value, sort_keys=True) for value in rows[column][:]}
    near = {key(value) for value in rows[column][:]}
    same, alike = [], []
    for index, value in enumerate(held_out[column][:]):
        if json.dumps(value, sort_keys=True) in exact:
            same.append(f"{_place(held_out, index)}: {short(value)}")
        elif key(value) in near:
            alike.append(f"{_place(held_out, index)}: {short(value)}")
    for found, how in (
        (same, "are also in the training rows"),
        (alike, "differ from one only in case or spaces"),
    ):
        if found:
            yield Finding(
                "warning",
                f"{share(len(found), len(held_out))} held-out prompts {how}",
                "train and test were not split by prompt",
                "take them out of the training rows; what is measured on them is memory",
                first(found),
            )


def _contradictions(rows: Dataset) -> Iterable[Finding]:
    """Rows with one prompt and different answers: label noise where there is one right answer."""
    answer = next((name for name in ("answer",) if name in rows.column_names), None)
    if answer is None or "prompt" not in rows.column_names:
        return
    answers: dict[str, dict[str, int]] = defaultdict(dict)
    for index, (prompt, value) in enumerate(zip(rows["prompt"][:], rows[answer][:], strict=True)):
        answers[key(prompt)].setdefault(key(value), index)
    clashing = [found for found in answers.values() if len(found) > 1]
    if clashing:
        told = [
            " and ".join(
                f"{_place(rows, index)}: {short(text, 30)}" for text, index in list(found.items())[:2]
            )
            for found in clashing
        ]
        yield Finding(
            "warning",
            f"{len(clashing)} prompts come with different gold answers",
            "wrong labels, or questions that are cut short",
            "correct or remove them: a verifier can only reward one",
            first(told),
        )


def _pairs(rows: Dataset) -> Iterable[Finding]:
    better, worse = rows["chosen"][:], rows["rejected"][:]
    prompts = rows["prompt"][:] if "prompt" in rows.column_names else [""] * len(rows)
    alike = [index for index, (a, b) in enumerate(zip(better, worse, strict=True)) if key(a) == key(b)]
    if alike:
        yield Finding(
            "warning",
            f"{share(len(alike), len(rows))} pairs have answers that differ only in case or spaces",
            cure="remove them: what they teach is not a preference",
            examples=first([f"{_place(rows, index)}: {short(better[index])}" for index in alike]),
        )
    verdicts: dict[tuple[str, str, str], int] = {}
    against: list[str] = []
    for index, (prompt, a, b) in enumerate(zip(prompts, better, worse, strict=True)):
        keys = key(prompt), key(a), key(b)
        other = verdicts.get((keys[0], keys[2], keys[1]))
        if other is not None and keys[1] != keys[2]:
            against.append(f"{_place(rows, index)} and {_place(rows, other)}: {short(a)}")
        verdicts.setdefault(keys, index)
    if against:
        yield Finding(
            "warning",
            f"{len(against)} pairs say the opposite of another: label noise",
            "annotators disagreed, or chosen and rejected are exchanged in part of the data",
            "keep the majority, or set trainer.loss_type: robust with label_smoothing at the share "
            "of wrong labels",
            first(against),
        )
    sizes = [(len(key(a)), len(key(b))) for a, b in zip(better, worse, strict=True)]
    longer = sum(a > b for a, b in sizes) / max(sum(a != b for a, b in sizes), 1)
    if len(rows) >= 50 and max(longer, 1 - longer) > LENGTH_BIAS:
        yield Finding(
            "note",
            f"the {'longer' if longer > 0.5 else 'shorter'} answer is chosen in "
            f"{max(longer, 1 - longer):.0%} of the "
            "pairs: length alone explains most preferences",
            cure="watch completion lengths in the evaluation; loss_type: sigmoid_norm takes length out",
        )


def _empty(rows: Dataset) -> Iterable[Finding]:
    for name in ("chosen", "rejected", "completion", "messages"):
        if name not in rows.column_names:
            continue
        empty = [index for index, value in enumerate(rows[name][:]) if not _said(name, value)]
        if empty:
            yield Finding(
                "warning",
                f"{share(len(empty), len(rows))} rows have an empty "
                f"{'answer' if name == 'messages' else name}",
                cure="remove them, unless the model is to learn to say nothing",
                examples=first(
                    [f"{_place(rows, index)}: {short(rows[index].get('prompt', ''))}" for index in empty]
                ),
            )


def _said(name: str, value: Any) -> bool:
    """Whether the answer in a cell holds anything."""
    if isinstance(value, list):
        spoken = [m for m in value if name != "messages" or m.get("role") == "assistant"]
        return any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in spoken)
    return bool(str(value or "").strip())


# ---- lengths -----------------------------------------------------------------------------------------------


def _prompts(subject: Subject) -> tuple[list[Finding], dict[str, Any]]:
    """Apply the length policy of the run, and tell what it would say."""
    config = subject.config.data
    findings: list[Finding] = []
    assert subject.rows is not None
    _, report = apply_length_policy(subject.rows, subject.tokenizer, None)
    for name, rows in (("training", subject.rows), ("held-out", subject.held_out)):
        if rows is None:
            continue
        try:
            _, measured = apply_length_policy(
                rows, subject.tokenizer, config.max_prompt_tokens, config.over_length
            )
        except DataError as error:
            findings.append(Finding("error", f"{name}: {error}"))
            continue
        if measured.over:
            findings.append(
                Finding(
                    "warning",
                    f"{share(measured.over, measured.rows)} {name} rows have more than "
                    f"{measured.limit} tokens of "
                    f"{measured.column} and are left out",
                    cure=f"raise data.max_prompt_tokens (the longest has {measured.longest}), if they "
                    "are wanted",
                )
            )
        report = measured if name == "training" else report
    return findings, dataclasses.asdict(report)


def _room(subject: Subject, prompts: dict[str, Any]) -> Iterable[Finding]:
    """Do prompt and completion together fit what the model knows?"""
    if not subject.spec.generates or prompts["column"] != "prompt":
        return
    context = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    limit = int(subject.trainer["max_completion_length"] or 0)
    longest = int(prompts["longest_kept"])
    if context is not None and longest + limit > context:
        yield Finding(
            "error",
            f"the longest prompt has {longest} tokens, and {limit} more of completion exceed the "
            f"context of {context}",
            cure=f"set trainer.max_completion_length to at most {max(context - longest, 0)}, or leave "
            "out long "
            "prompts with data.max_prompt_tokens and data.over_length: filter",
        )


def _cut(subject: Subject, encoding: Encoding) -> Iterable[Finding]:
    rows = subject.rows
    assert rows is not None
    cut = [sequence for sequence in encoding.sequences if sequence.cut]
    total = len(encoding.sequences)
    limit = subject.trainer["max_length"]
    if cut:
        lost = sum(sequence.cut for sequence in cut)
        yield Finding(
            "error" if len(cut) > total / 2 else "warning",
            f"{share(len(cut), total)} sequences are cut at trainer.max_length={limit}, by {lost} "
            "tokens in all: "
            "they end without the end token, so stopping is not learned from them",
            "TRL's default is 1024" if "max_length" not in subject.config.trainer else "",
            f"set trainer.max_length: {max(sequence.length for sequence in cut)}, or take long rows "
            "out of the data",
            _named(rows, cut),
        )
    if not encoding.left_out:
        return
    if subject.spec.pairs and subject.config.data.over_length == "refuse":
        try:
            apply_pair_lengths(rows, subject.tokenizer, limit, "refuse", whole=subject.spec.scores)
        except DataError as error:
            yield Finding("error", str(error))
            return
    how = "left out (data.over_length: filter)" if subject.spec.pairs else "dropped by TRL without a word"
    yield Finding(
        "warning" if len(encoding.left_out) < len(rows) else "error",
        f"{share(len(encoding.left_out), len(rows))} rows are {how}: within trainer.max_length={limit} "
        "nothing of them would train",
        "an answer is longer than that" if subject.spec.scores else "the prompt alone fills the length",
        "raise trainer.max_length, or set data.max_prompt_tokens",
        first([f"{_place(rows, index)}: {short(rows[index].get('prompt'))}" for index in encoding.left_out]),
    )


def _answers(subject: Subject, facts: dict[str, Any]) -> Iterable[Finding]:
    """Could the gold answers be written within the limit of a completion?"""
    rows = subject.rows
    assert rows is not None
    limit = int(subject.trainer["max_completion_length"])
    if "max_completion_length" not in subject.config.trainer:
        yield Finding(
            "note",
            f"trainer.max_completion_length is TRL's default of {limit} tokens; a completion that is cut off "
            "cannot end with an answer",
            cure="set it to what the task needs: sample a few answers first (posttrain eval) and "
            "look at their lengths",
        )
    if "answer" not in rows.column_names:
        return
    answers = [str(value) for value in rows["answer"][:] if value is not None]
    if not answers:
        return
    lengths = [len(ids) for ids in subject.tokenizer(answers, add_special_tokens=False)["input_ids"]]
    facts["gold_tokens"] = _lengths(lengths)
    over = sum(length + 1 > limit for length in lengths)
    if over:
        yield Finding(
            "error" if over > CUT_SHARE * len(lengths) else "warning",
            f"{share(over, len(lengths))} gold answers do not fit "
            f"trainer.max_completion_length={limit} with their "
            f"end token; the longest has {max(lengths)} tokens",
            "the limit is below the answers themselves, without any reasoning before them",
            f"set trainer.max_completion_length above {max(lengths) + 1}",
        )


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    if not lengths:
        return {"sequences": 0}
    return {
        "sequences": len(lengths),
        "mean": float(np.mean(lengths)),
        **{f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in PERCENTILES},
        "longest": int(max(lengths)),
    }


def _named(rows: Dataset, sequences: Sequence[Encoded]) -> tuple[str, ...]:
    worst = sorted(sequences, key=lambda sequence: -sequence.length)[:3]
    return tuple(f"{_place(rows, s.row)}{f' ({s.part})' if s.part else ''}: {s.length} tokens" for s in worst)


def _place(rows: Dataset, index: int) -> str:
    return str(rows[index][PLACE]) if PLACE in rows.column_names else f"row {index + 1}"

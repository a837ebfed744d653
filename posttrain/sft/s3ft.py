r"""S3FT, selective self-to-supervised fine-tuning: own answers where they are right (arXiv 2502.08130).

Idea
    Gold answers pull a model to a foreign style, and general ability is lost. Where the model's own answer is
    right already, train on that; where it is not, on its rephrasing of the gold answer, if that is right; on
    the gold answer only where both fail. All of it happens once, before training.

Formula
    With the start model M, rows (x, y) and a judge J in {0, 1}::

        z = M(x)                  if J(x, y, M(x)) = 1
            M(rephrase(x, y))     else, if J(x, y, M(rephrase(x, y))) = 1
            y                     else
        then SFT from M on (x, z)

    J is the first reward of the run: a score of at least ``threshold``. An answer that is empty, was cut at
    ``max_new_tokens`` or matches ``leak_pattern`` is not right, whatever the judge would say, and is not
    shown to it. An answer that the judge fails on (error, timeout, no score) is not right either.

In a configuration
    ``s3ft: {}`` in a run of ``task: sft`` with ``rewards``: the rows are rewritten before the first step.
    ``posttrain s3ft CONFIG --to rows.jsonl`` writes them without training. Rows are prompt and completion
    (or answer), text or messages, or ``messages`` that end with the assistant; of those the last turn is
    rewritten.

    Each row is kept with ``source`` (model, paraphrase, gold) and ``judge_score`` (null for gold). Rows are
    never lost: what cannot be answered (longer than the context, a tool call, several turns) stays gold and
    is counted.

Defaults and where they come from
    One own answer and one rephrasing per row (paper, Mistral-7B-Instruct-v0.2). Greedy decoding, the words of
    the rephrasing prompt, and the choice among several right answers by mean log-probability are ours: the
    paper shows its prompts in figures per task and does not say how it decodes. Judges of the paper: the
    final number (GSM8K), the tests (MBPP), a language model (NQ).

Details
    - Only what the stored text becomes is trained on: TRL tokenises it with the template of the generation
      and adds the end token. ``retokenised_differently`` counts kept answers for which that gives other
      tokens than were generated.
    - The samples of a row depend on the seed, its prompt and how many equal prompts came before, not on the
      batch or the number of processes (up to the rounding of batched matrix products).
    - After every batch the finished rows are written down; a stopped job goes on with the others. Rows whose
      judge failed are tried again then. The weights are told apart by a sample of each tensor.

Needs
    Generation of one to two answers per row, and as many judgements.

Composes with
    LoRA (the adapter's base is M), every SFT method and selection. Refused: rows of plain text, rows with
    tools.

When not to use it
    - When the answer is right for wrong reasons and the judge only reads the number.
    - For the task alone: its gain is retention. A small replication (Qwen2.5-1.5B-Instruct) saw less
      accuracy on the task than plain SFT, and less loss elsewhere.
    - Base models cannot follow the rephrasing prompt: ``paraphrase: false``, or few-shot words in
      ``paraphrase_template``.

What to watch
    The shares of the sources (GSM8K in the paper: 49.5 % own, 42.1 % rephrased, 8.4 % gold), and
    ``judge_failed``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal, get_args

from posttrain.config.schema import S3FTConfig
from posttrain.data.errors import DataError
from posttrain.patterns import SlowPatternError, limited
from posttrain.rewards.verdict import Verdict

Source = Literal["model", "paraphrase", "gold"]
Stage = Literal["model", "paraphrase"]
Outcome = Literal[
    "correct",
    "wrong",
    "unparseable",
    "error",
    "timeout",
    "skipped",
    "empty",
    "cut",
    "leaked",
    "too_long",
    "no_answer",
]
SOURCES: tuple[Source, ...] = get_args(Source)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FAILED: tuple[Outcome, ...] = ("error", "timeout")
"""Outcomes that are the judge's fault."""

Message = Mapping[str, Any]
_REACH = 1e-9  # a score may miss the threshold by rounding


@dataclass(frozen=True)
class Candidate:
    """An answer of the model.

    Attributes:
        text: As it would be trained on.
        tokens: Its length in tokens, end token included.
        finished: Whether it has its end token.
        same_tokens: Whether its text becomes the tokens that were generated.
        place: What the generator needs to find it again, such as the ids; not looked at here.
    """

    text: str
    tokens: int
    finished: bool
    same_tokens: bool = True
    place: Any = None


@dataclass(frozen=True)
class Target:
    """What a row trains on.

    Attributes:
        source: Where it comes from.
        text: The answer; None for gold, which stays as it is.
        score: The judge's; None for gold.
        tokens: Length of the answer; None for gold.
        same_tokens: See :class:`Candidate`; True for gold.
        outcomes: What became of each candidate that was looked at, by stage.
    """

    source: Source
    text: str | None
    score: float | None
    tokens: int | None
    same_tokens: bool
    outcomes: dict[str, list[str]]

    @property
    def judge_failed(self) -> bool:
        """Whether the row stayed gold although a candidate was never judged."""
        tried = [outcome for stage in self.outcomes.values() for outcome in stage]
        return self.source == "gold" and any(outcome in FAILED for outcome in tried)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


Generate = Callable[[Stage, list[int]], Sequence[Sequence[Candidate] | Outcome]]
"""Answers of a stage for some rows, or why there are none: ``too_long``, or a gold that is ``no_answer``."""
Judge = Callable[[list[int], list[str]], Sequence[Verdict]]
"""One verdict per (row, text)."""
Rank = Callable[[int, Sequence[Candidate]], Sequence[float]]
"""Mean log-probability of each candidate of a row."""


def targets(
    rows: Sequence[int], generate: Generate, judge: Judge, rank: Rank, settings: S3FTConfig
) -> list[Target]:
    """Choose own answer, rephrasing or gold for each row (arXiv 2502.08130, section 3).

    Args:
        rows: Numbers of the rows, whatever the three functions understand by them.
        generate: Makes the answers of a stage.
        judge: Judges them.
        rank: Asked where several different own answers are right and ``select`` is ``logprob``.
        settings: The ``s3ft`` section.

    Returns:
        One target per row, in order.
    """
    chosen: dict[int, tuple[Stage, Candidate, float]] = {}
    outcomes: dict[int, dict[str, list[str]]] = {row: {} for row in rows}
    stages: tuple[Stage, ...] = ("model", "paraphrase") if settings.paraphrase else ("model",)
    for stage in stages:
        open_rows = [row for row in rows if row not in chosen]
        if not open_rows:
            break
        groups = generate(stage, open_rows)
        judged = _judged(open_rows, groups, judge, settings, leaks=stage == "paraphrase")
        for row, group, verdicts in zip(open_rows, groups, judged, strict=True):
            outcomes[row][stage] = [outcome for outcome, _ in verdicts]
            right = [
                (candidate, score)
                for candidate, (outcome, score) in zip(_some(group), verdicts, strict=False)
                if outcome == "correct"
            ]
            if right:
                candidate, score = _best(row, right, rank, settings.select)
                chosen[row] = stage, candidate, score
    found = []
    for row in rows:
        if row in chosen:
            stage, best, score = chosen[row]
            found.append(Target(stage, best.text, score, best.tokens, best.same_tokens, outcomes[row]))
        else:
            found.append(Target("gold", None, None, None, True, outcomes[row]))
    return found


def _judged(
    rows: Sequence[int],
    groups: Sequence[Sequence[Candidate] | Outcome],
    judge: Judge,
    settings: S3FTConfig,
    *,
    leaks: bool,
) -> list[list[tuple[Outcome, float]]]:
    """Return outcome and score of every candidate; what cannot be right is not shown to the judge."""
    leak = re.compile(settings.leak_pattern) if leaks and settings.leak_pattern else None
    results: list[list[tuple[Outcome, float]]] = []
    asked: list[tuple[int, int]] = []
    for group in groups:
        results.append([(group, math.nan)] if isinstance(group, str) else [])
        for number, candidate in enumerate(_some(group)):
            outcome: Outcome = "skipped"
            if not candidate.text.strip():
                outcome = "empty"
            elif not candidate.finished:
                outcome = "cut"
            elif leak is not None and _leaks(leak, candidate.text):
                outcome = "leaked"
            else:
                asked.append((len(results) - 1, number))
            results[-1].append((outcome, math.nan))
    if asked:
        texts = [_some(groups[place])[number].text for place, number in asked]
        verdicts = judge([rows[place] for place, _ in asked], texts)
        for (place, number), verdict in zip(asked, verdicts, strict=True):
            results[place][number] = judge_outcome(verdict, settings.threshold)
    return results


def _leaks(leak: re.Pattern[str], text: str) -> bool:
    try:
        return limited(leak, "search", text) is not None
    except SlowPatternError as error:
        raise DataError(f"s3ft.leak_pattern: {error}") from None


def _some(group: Sequence[Candidate] | Outcome) -> Sequence[Candidate]:
    return () if isinstance(group, str) else group


def judge_outcome(verdict: Verdict, threshold: float) -> tuple[Outcome, float]:
    """Return what a verdict means: ``correct`` from the threshold on; without a number, not correct.

    Args:
        verdict: Of the first reward.
        threshold: Lowest score that is right.

    Returns:
        The outcome, and the score or NaN.
    """
    score = math.nan if verdict.score is None else float(verdict.score)
    if verdict.status not in ("correct", "wrong"):
        return verdict.status, score
    if not math.isfinite(score):
        return "error", math.nan
    return ("correct" if score >= threshold - _REACH else "wrong"), score


def _best(
    row: int, right: Sequence[tuple[Candidate, float]], rank: Rank, select: str
) -> tuple[Candidate, float]:
    """Choose among right answers; the first of equals."""
    first: dict[str, tuple[Candidate, float]] = {}
    for candidate, score in right:
        first.setdefault(candidate.text, (candidate, score))
    different = list(first.values())
    if len(different) == 1:
        return different[0]
    if select == "shortest":
        return min(different, key=lambda pair: pair[0].tokens)
    values = rank(row, [candidate for candidate, _ in different])
    return different[max(range(len(different)), key=lambda index: values[index])]


def statistics(found: Sequence[Target]) -> dict[str, Any]:
    """Return counts and shares: per source, per stage and outcome; mean tokens of kept answers."""
    total = len(found)
    sources = Counter(target.source for target in found)
    kept = [target for target in found if target.source != "gold"]
    stages: dict[str, dict[str, int]] = {}
    for stage in get_args(Stage):
        counts = Counter(outcome for target in found for outcome in target.outcomes.get(stage, ()))
        if counts:
            stages[stage] = {outcome: counts[outcome] for outcome in OUTCOMES if counts[outcome]}
    return {
        "rows": total,
        "sources": {source: sources[source] for source in SOURCES},
        "shares": {source: sources[source] / total if total else 0.0 for source in SOURCES},
        "outcomes": stages,
        "judge_failed": sum(target.judge_failed for target in found),
        "retokenised_differently": sum(not target.same_tokens for target in kept),
        "mean_tokens": fmean(target.tokens or 0 for target in kept) if kept else None,
    }


# ---- rows ------------------------------------------------------------------------------------------------


def check_columns(columns: Sequence[str]) -> None:
    """Refuse rows that have no answer to replace, or that a generation would see differently.

    Raises:
        DataError: Such columns.
    """
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        raise DataError(
            "s3ft needs a prompt and its answer (prompt + completion, prompt + answer, or messages); found "
            f"{', '.join(columns)}"
        )
    for name in ("tools", "chat_template_kwargs"):
        if name in columns:
            raise DataError(
                f"s3ft generates without the column {name!r}, which training would put into the prompt: "
                "remove it, or train without s3ft"
            )
    taken = [name for name in ("source", "judge_score") if name in columns]
    if taken:
        raise DataError(
            f"s3ft writes a column {taken[0]!r}, and the rows have one: rename it with data.columns"
        )


def prompt_and_gold(row: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return the prompt of a row and the text of its gold answer; None where that is not one plain answer.

    Args:
        row: Rendered: ``prompt`` and ``completion``, or ``messages``.
    """
    if "messages" in row:
        prompt, answer = list(row["messages"][:-1]), list(row["messages"][-1:])
        return prompt, _only_answer(answer) if prompt else None
    completion = row["completion"]
    return row["prompt"], completion if isinstance(completion, str) else _only_answer(completion)


def _only_answer(messages: Sequence[Message]) -> str | None:
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        return None
    content = messages[0].get("content")
    extra = [key for key, value in messages[0].items() if value and key not in ("role", "content")]
    return content if isinstance(content, str) and not extra else None


def put_answer(row: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Return the row with its target, ``source`` and ``judge_score``; a gold row is as it was."""
    new = dict(row)
    if target.text is not None:
        if "messages" in row:
            new["messages"] = [*row["messages"][:-1], {**row["messages"][-1], "content": target.text}]
        elif isinstance(row["completion"], str):
            new["completion"] = target.text
        else:
            new["completion"] = [{**row["completion"][0], "content": target.text}]
    return new | {"source": target.source, "judge_score": target.score}


def rephrase(prompt: str | Sequence[Message], gold: str, template: str) -> str | list[dict[str, Any]]:
    """Return the prompt that asks to rephrase the gold answer.

    Args:
        prompt: Text, or messages: then the last message of the user becomes the template.
        gold: The gold answer.
        template: With the fields {prompt} and {gold}.

    Raises:
        DataError: The messages hold no text of the user.
    """
    if isinstance(prompt, str):
        return _filled(template, prompt, gold)
    for place in range(len(prompt) - 1, -1, -1):
        content = prompt[place].get("content")
        if prompt[place].get("role") == "user" and isinstance(content, str):
            asked = {**prompt[place], "content": _filled(template, content, gold)}
            return [*map(dict, prompt[:place]), asked, *map(dict, prompt[place + 1 :])]
    raise DataError(
        "s3ft cannot ask for a rephrasing where a prompt has no text of the user: set s3ft.paraphrase: false"
    )


def _filled(template: str, prompt: str, gold: str) -> str:
    # one pass: braces inside the prompt or the answer are text
    values = {"{prompt}": prompt, "{gold}": gold, "{{": "{", "}}": "}"}
    return re.sub(r"\{\{|\}\}|\{prompt\}|\{gold\}", lambda match: values[match.group()], template)

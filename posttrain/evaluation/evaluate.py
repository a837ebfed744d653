"""Held-out evaluation: sample, verify, summarise; on one process or many, with the same result.

Under ``torch.distributed`` the problems are dealt out to the ranks and the records gathered again. Every
rank makes the same number of ``generate`` calls (sharded models wait for each other in them), and a rank
that fails makes all ranks fail instead of leaving them waiting.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from posttrain.config.schema import EvaluateConfig
from posttrain.evaluation.estimators import distinct_n
from posttrain.evaluation.generate import Completion, encode_prompt, occurrences, prompt_digest, sample
from posttrain.evaluation.results import UNJUDGED, Evaluation, Problem, Sample, summarise
from posttrain.rewards.verdict import STATUSES, Verdict

if TYPE_CHECKING:
    from datasets import Dataset


class Verify(Protocol):
    """Judges completions; ``rows[i]`` is the data row that ``completions[i]`` answers."""

    def __call__(self, completions: list[str], rows: list[dict[str, Any]]) -> Sequence[Verdict]:
        """Return one verdict per completion, in order."""


def evaluate(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    verify: Verify,
    config: EvaluateConfig,
    *,
    max_new_tokens: int,
    progress: bool = True,
) -> Evaluation:
    """Sample ``config.samples`` completions of every problem, verify them and summarise.

    A sample whose verifier ended in an error or a timeout, or did not apply (skipped), is counted as such
    and is neither right nor wrong: it does not enter n. A problem left with fewer than k valid samples
    is left out of pass@k and maj@k, and counted in ``left_out``.

    Args:
        model: A causal language model, wrapped or not; its state is the same afterwards.
        tokenizer: Its tokenizer.
        dataset: Rows with a ``prompt`` (text or messages) and whatever the verifier needs; an ``answer``
            column is kept in the records.
        verify: Judges a list of completions against their rows.
        config: The ``evaluate`` section; its ``max_new_tokens`` wins over the argument.
        max_new_tokens: Longest completion when the section names none.
        progress: Show bars on stderr (rank 0, and only on a terminal).

    Returns:
        The same :class:`Evaluation` on every rank.

    Raises:
        ValueError: The data set is empty or has no ``prompt``, a prompt does not fit, or the verifier
            returns the wrong number of verdicts or an unknown status.
        RuntimeError: Another rank failed; the message has its error.
    """
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"evaluation needs a column 'prompt', found {sorted(dataset.column_names)}: rename one with "
            "data.columns: {prompt: YOUR_COLUMN}"
        )
    if len(dataset) == 0:
        raise ValueError("evaluation needs at least one problem, found an empty data set")
    limit = config.max_new_tokens or max_new_tokens
    settings = config.model_dump(exclude={"before", "every"}) | {"max_new_tokens": limit}
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]
    rank, world = rank_and_world()
    started = time.perf_counter()
    failure: Exception | None = None
    share: list[tuple[Problem, list[Completion]]] = []
    try:
        share = evaluate_share(
            model, tokenizer, rows, verify, config, limit, rank, world, progress and rank == 0
        )
    except Exception as error:  # reported to all ranks below, then raised
        if world == 1:
            raise
        failure = error
    seconds = time.perf_counter() - started
    if world > 1:
        share, seconds = gather(share, seconds, failure, rank, world)
    share.sort(key=lambda item: item[0].index)
    completions = [completion.token_ids for _, group in share for completion in group]
    once = (group[:1] if config.temperature == 0 else group for _, group in share)
    return summarise(
        [problem for problem, _ in share],
        distinct={f"distinct-{n}": distinct_n(completions, n) for n in (1, 2, 3, 4)},
        settings=settings,
        seconds=seconds,
        tokens=sum(len(completion.token_ids) for group in once for completion in group),
    )


def evaluate_share(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    verify: Verify,
    config: EvaluateConfig,
    max_new_tokens: int,
    rank: int,
    world: int,
    progress: bool,
) -> list[tuple[Problem, list[Completion]]]:
    """Evaluate this rank's problems: every world-th row."""
    streams = occurrences([prompt_digest(encode_prompt(tokenizer, row["prompt"])) for row in rows])
    mine = list(range(rank, len(rows), world))
    # same number of generate calls on all ranks: repeat a problem, and drop its samples again
    padded = mine + [0] * (math.ceil(len(rows) / world) - len(mine))
    with _progress(progress) as bars:
        task = bars.add_task("sampling", total=len(padded) * config.samples)
        groups = sample(
            model,
            tokenizer,
            [rows[index]["prompt"] for index in padded],
            n=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=max_new_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
            streams=[streams[index] for index in padded],
            progress=lambda done: bars.advance(task, done),
        )[: len(mine)]
        pairs = [(index, item) for index, group in zip(mine, groups, strict=True) for item in group]
        task = bars.add_task("verifying", total=len(pairs))
        judged: dict[int, list[Sample]] = {index: [] for index in mine}
        for start in range(0, len(pairs), config.batch_size):
            batch = pairs[start : start + config.batch_size]
            verdicts = verify([item.text for _, item in batch], [rows[index] for index, _ in batch])
            if len(verdicts) != len(batch):
                raise ValueError(
                    f"the verifier returned {len(verdicts)} verdicts for {len(batch)} completions"
                )
            for (index, item), verdict in zip(batch, verdicts, strict=True):
                judged[index].append(_judged(item, verdict))
            bars.advance(task, len(batch))
    problems = [
        Problem(index, rows[index]["prompt"], _plain(rows[index].get("answer")), judged[index])
        for index in mine
    ]
    return list(zip(problems, groups, strict=True))


def _judged(completion: Completion, verdict: Verdict) -> Sample:
    status: str = verdict.status
    score = verdict.score
    if status not in STATUSES:
        raise ValueError(f"the verifier returned status {status!r}; known are {', '.join(STATUSES)}")
    if score is not None and not math.isfinite(score):
        # a NaN would poison the mean and is not JSON: the verifier failed, so it is counted as failed
        status, score = "error", None
    return Sample(
        text=completion.text,
        status=status,
        score=None if score is None else float(score),
        answer=verdict.answer,
        length=len(completion.token_ids),
        finished=completion.finished,
        message=verdict.message if status in UNJUDGED else None,
    )


def _plain(value: Any) -> Any:
    """Return ``value`` if it survives JSON, else its text."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)


def rank_and_world() -> tuple[int, int]:
    """Return rank and number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(
    share: list[tuple[Problem, list[Completion]]],
    seconds: float,
    failure: Exception | None,
    rank: int,
    world: int,
) -> tuple[list[tuple[Problem, list[Completion]]], float]:
    """Collect all shares on all ranks; raise everywhere when one rank failed."""
    payloads: list[Any] = [None] * world
    dist.all_gather_object(payloads, (share, seconds, None if failure is None else repr(failure)))
    if failure is not None:
        raise failure
    failed = {other: message for other, (_, _, message) in enumerate(payloads) if message is not None}
    if failed:
        raise RuntimeError(f"rank {rank} stops the evaluation because other ranks failed: {failed}")
    return [item for part, _, _ in payloads for item in part], max(time for _, time, _ in payloads)


@contextmanager
def _progress(wanted: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), disable=not (wanted and sys.stderr.isatty())
    ) as bars:
        yield bars

r"""TTRL: reinforcement learning without labels, by majority vote (arXiv 2504.16084).

Idea
    On a question without a known answer, sample many answers, take the most frequent one as the label, reward
    agreement with it, and run ordinary GRPO. More samples vote than train.

Formula
    For each prompt, with y_1..y_N the samples in order and N = n_votes = ``num_generations``::

        a_j   = answer read from y_j in a canonical spelling, or empty
        label = most frequent a_j;  ties: the one that occurs first
        R_j   = 1 if a_j equals the label, else 0
        train on j = 1..M, M = n_samples; A_j is normalised over these M rows

    The vote counts spellings; the reward asks a grader. Equal values in different spellings therefore split
    the vote but are rewarded alike. R replaces what the reward functions say, in training. There may be one
    reward function: its scores only serve the metrics, and a run without any is ``task: ttrl`` with no
    ``rewards``. TRL's logged ``reward`` and ``rewards/NAME`` are then those of the vote over all N rows.

    ``extract`` says where the answer stands. ``math``, in this order: "final answer is $...$. I hope", the
    last ``\boxed{}``, what follows "he answer is", "final answer is" or the Chinese phrase, the last number;
    then without LaTeX spacing, dollar signs, units and degree signs. ``choice``: the last standalone letter A
    to D. Others: :data:`posttrain.rewards.extract.Extract`. ``equivalence="math"`` grades with math-verify in
    a process that is killed at the ``deadline``; an answer it fails on is left out of its group, not counted
    as wrong; a label it cannot read is compared by spelling, as ``"exact"`` always does.

Defaults and where they come from
    64 votes, 32 samples, first of ties: official script. Its other settings: 8 prompts per rollout, one
    prompt per update, temperature 1, learning rate 5e-7 with 3 % warm-up and cosine, KL 1e-3, clip 0.2,
    responses of 3072 tokens, 80 epochs on AIME and 30 on AMC (MATH-500 unconfirmed). Ours: an empty answer
    neither votes nor is rewarded (``drop_empty``; officially it can win and is then rewarded, here it never
    is), ``min_majority``, ``tie="skip"``, and ``exclude_truncated``: with ``mask_truncated_completions`` a
    truncated row does not vote (its last number is no answer), but still gets its 0 or 1.

Needs
    ``num_generations`` equal to n_votes. Groups may be spread over ranks. With fewer samples than votes each
    rank must hold whole groups and each micro-step a whole number of rows that stay:
    ``per_device_train_batch_size`` * n_samples / n_votes; the loss sees that many rows per micro-step.

Metrics
    ``ttrl/majority_ratio`` (rows with the winning answer / N), ``vote_entropy`` (nats over the votes),
    ``distinct_answers``, ``empty_answers``, ``excluded_rows``, ``labelled_groups``, ``grader_failures``,
    ``pseudo_reward``, and ``kept_...`` for the rows that train. Where the reward function knows the answer:
    ``label_accuracy`` (groups whose label it accepts, in any row that gave it), ``verifier_reward``, and
    ``reward_accuracy`` (rows that it and the vote judge alike).

Composes with
    Every advantage and token method; SPINE is made for it. ACE then also amplifies right answers that were
    outvoted, and AEPO's tempered samples, which are judged by the vote of the main group of their prompt,
    inherit its errors (warnings). Refused: more than one reward function.

Evidence at laptop size
    On the page of ``spine``, beside SPINE's (``configs/evidence/spine.yaml``): no gain over the start.

When not to use it
    When labels or a verifier exist, or when the majority is mostly wrong: a rising ``pseudo_reward`` is no
    progress, it only says that the samples agree more. Label a few problems and watch ``label_accuracy``.

Official code
    PRIME-RL/TTRL (verl). Differences: ours above; its grader is a string match, then sympy on tuples, with a
    strict match for integers and unreduced fractions; ours is math-verify. Its label accuracy reads the
    answer out of the extracted answer again. Its reward stands at the last row's final position for every
    row, which only GRPO forgives.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from posttrain._lazy import torch
from posttrain.rewards.extract import canonical, extract_answer
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.registry import VerifierSpec
from posttrain.rewards.reward import completion_text
from posttrain.rewards.verdict import TOP_SCORE
from posttrain.rl.method import Conflict, Method, Samples, Setup

Reading = Literal["math", "choice", "text", "answer_tag", "boxed", "last_number"]

_PHRASES = ("he answer is", "final answer is", "答案是")
_OPENING, _CLOSING = "final answer is $", "$. I hope"
_CHOICE = re.compile(r"(?<![A-Za-z])[A-D](?![A-Za-z])")
# spacing, delimiters, percent and degree signs; \left and \right only as whole commands
_LATEX = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[!,;: $%()\[\]]|\^\\circ|\^\{\\circ\}|[$%\s]")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|mbox|mathrm)\{([^{}]*)\}")
_NAMED = re.compile(r"[A-Za-z]=(?!=)")


def read_answer(completion: str, how: Reading = "math") -> str | None:
    """Return the answer of a completion in its canonical spelling, or None when there is none.

    Args:
        completion: What the model wrote.
        how: Where the answer stands, see the module page.
    """
    if how == "choice":
        letters = _CHOICE.findall(completion)
        return letters[-1] if letters else None
    if how != "math":
        found = extract_answer(completion, how)
        return canonical(found) if found is not None else None
    found = _quoted(completion)
    if found is None:
        found = extract_answer(completion, "boxed")
    if found is None:
        found = _announced(completion)
    if found is None:
        found = extract_answer(completion, "last_number")
    return _plain_math(found) if found is not None else None


def _quoted(text: str) -> str | None:
    start = text.find(_OPENING)
    if start < 0:
        return None
    start += len(_OPENING)
    end = text.find(_CLOSING, start)
    return text[start:end].strip() or None if end >= 0 else None


def _announced(text: str) -> str | None:
    for phrase in _PHRASES:
        position = text.rfind(phrase)
        if position >= 0:
            return text[position + len(phrase) :].strip().lstrip(":").strip() or None
    return None


def _plain_math(answer: str) -> str | None:
    answer = answer.strip().rstrip("./").strip()
    # a unit goes, an answer in words stays
    worded = _TEXT.sub("", answer)
    answer = worded if worded.strip() else _TEXT.sub(r"\1", answer)
    answer = _FRACTION.sub(r"\\frac", _LATEX.sub("", answer)).rstrip("./")
    answer = _NAMED.sub("", answer, count=1) if _NAMED.match(answer) else answer
    return canonical(answer) or None


@dataclass(frozen=True)
class Vote:
    """The outcome of one group's vote.

    Attributes:
        label: The winning answer, None when there is none.
        ratio: Rows with the most frequent answer / all rows, whether it became the label or not.
        entropy: Of the votes, nats; 0 without votes.
        distinct: Number of different answers among the votes.
    """

    label: str | None
    ratio: float
    entropy: float
    distinct: int


def majority_vote(
    answers: Sequence[str | None],
    *,
    silent: Sequence[bool] | None = None,
    drop_empty: bool = True,
    tie: Literal["first", "skip"] = "first",
    min_majority: float = 0.0,
) -> Vote:
    """Return the most frequent answer of a group (arXiv 2504.16084).

    Args:
        answers: Canonical answers in generation order, None or "" for empty.
        silent: Rows that do not vote; nobody by default.
        drop_empty: Empty answers do not vote. Otherwise they do, and a group in which they win has no label.
        tie: ``first``: the tied answer that occurs first. ``skip``: no label.
        min_majority: No label when :attr:`Vote.ratio` is strictly below it.

    Returns:
        The vote; the label is never empty.
    """
    said = [answer or "" for answer in answers]
    heard = [a for a, quiet in zip(said, silent or [False] * len(said), strict=True) if not quiet]
    counts = Counter(answer for answer in heard if answer or not drop_empty)  # keeps the order of occurrence
    if not counts:
        return Vote(None, 0.0, 0.0, 0)
    total = counts.total()
    winner, most = max(counts.items(), key=lambda item: item[1])  # the first of equals
    tied = sum(count == most for count in counts.values()) > 1
    ratio = most / len(answers)
    refused = ratio < min_majority or (tied and tie == "skip")
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    return Vote(None if refused else winner or None, ratio, entropy, len(counts))


def pseudo_rewards(
    answers: Sequence[str | None], label: str | None, equal: Mapping[str, bool | None] | None = None
) -> list[float]:
    """Return 1 for answers that agree with the label and 0 for others; all 0 without a label.

    Args:
        answers: Canonical answers of a group.
        label: What the vote decided.
        equal: What the grader says about other spellings: the same, another answer, or None: it failed, which
            gives NaN (the row is left out). Spellings that are not in it are other answers.
    """
    graded: dict[str, bool | None] = {**(equal or {}), **({label: True} if label else {})}
    values = {True: 1.0, False: 0.0, None: math.nan}
    return [values[graded.get(answer, False)] if label and answer else 0.0 for answer in answers]


def unlabelled(completions: Sequence[Any], **_: Any) -> list[float]:
    """Stand in for the reward function that TRL asks for, where nothing can be verified: 0 for every row."""
    return [0.0] * len(completions)


class TTRL(Method):
    """Reward agreement with the majority of a group. See the module page."""

    name = "ttrl"
    title = "TTRL: majority vote in place of labels"
    paper = "2504.16084"

    n_votes: int = Field(64, ge=2, description="Samples per prompt that vote; equals num_generations.")
    n_samples: int = Field(32, ge=2, description="Samples per prompt that train, the first of them.")
    extract: Reading = Field("math", description="Where the answer stands in a completion.")
    equivalence: Literal["math", "exact"] = Field(
        "math", description="How other spellings are compared with the label."
    )
    drop_empty: bool = Field(
        True, description="Empty answers do not vote (ours). If they vote and win, the group has no label."
    )
    tie: Literal["first", "skip"] = Field("first", description="First of tied answers, or no label (ours).")
    min_majority: float = Field(
        0.0, ge=0, le=1, description="No label when the winner has a smaller share of all rows (ours)."
    )
    exclude_truncated: bool | None = Field(
        None, description="Truncated rows do not vote (ours); unset: as mask_truncated_completions says."
    )
    deadline: float = Field(10.0, gt=0, le=3600, description="Seconds one comparison may take.")
    workers: int = Field(1, ge=1, le=64, description="Grader processes per rank.")

    _pool: VerifierPool | None = PrivateAttr(default=None)
    _labels: dict[str, str | None] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _samples_are_votes(self) -> TTRL:
        if self.n_samples > self.n_votes:
            raise ValueError(
                f"n_samples={self.n_samples} rows cannot train when only n_votes={self.n_votes} are sampled"
            )
        return self

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse group and batch sizes that do not fit, and rewards that would be lost."""
        trainer = setup.trainer
        if trainer.get("num_generations", self.n_votes) != self.n_votes:
            yield Conflict(
                f"TTRL votes among n_votes={self.n_votes} samples per prompt, found num_generations="
                f"{trainer['num_generations']}: make them equal",
                field="num_generations",
            )
        elif self.n_samples < self.n_votes:
            yield from self._batch_conflicts(setup)
        if setup.rewards is not None and setup.rewards > 1:
            yield Conflict(
                f"TTRL's vote is the only reward, found {setup.rewards} reward functions: keep one (for the "
                "metrics) or none"
            )
        if setup.rewards == 0 and trainer.get("eval_strategy", "no") != "no":
            yield Conflict(
                "an evaluation during training has nothing to score with: add a reward that knows the "
                "answers, or set eval_strategy to no",
                field="eval_strategy",
            )

    def _batch_conflicts(self, setup: Setup) -> Iterator[Conflict]:
        trainer = setup.trainer
        per_device = trainer.get("per_device_train_batch_size")
        if per_device is None:
            return
        steps = trainer.get("steps_per_generation")
        if steps is None and trainer.get("generation_batch_size") is not None:
            steps = trainer["generation_batch_size"] // (per_device * setup.ranks)
        steps = steps or trainer.get("gradient_accumulation_steps", 1)
        if per_device * steps % self.n_votes:
            yield Conflict(
                f"TTRL trains on {self.n_samples} of {self.n_votes} samples, so each rank must hold whole "
                f"groups: found per_device_train_batch_size={per_device} * {steps} micro-steps, which is not "
                f"a multiple of {self.n_votes}. Raise either, or set n_samples to {self.n_votes}",
                field="per_device_train_batch_size",
            )
        elif per_device * self.n_samples % self.n_votes:
            unit = self.n_votes // math.gcd(self.n_votes, self.n_samples)
            yield Conflict(
                f"TTRL keeps {self.n_samples} of {self.n_votes} samples, so a micro-step of "
                f"per_device_train_batch_size={per_device} rows would keep "
                f"{per_device * self.n_samples / self.n_votes:g} of them: set it to a multiple of {unit}",
                field="per_device_train_batch_size",
            )

    def label(self, rewards: torch.Tensor, samples: Samples) -> torch.Tensor:
        """Return the vote's rewards, (rows of all ranks, 1); ``rewards`` only serves the metrics.

        Raises:
            ValueError: Groups are not of ``n_votes`` rows, or there is more than one reward function.
        """
        if samples.group_size != self.n_votes or rewards.size(1) != 1:
            raise ValueError(
                f"TTRL needs groups of n_votes={self.n_votes} and one reward function, found groups of "
                f"{samples.group_size} and {rewards.size(1)} functions"
            )
        exclude = samples.mask_truncated if self.exclude_truncated is None else self.exclude_truncated
        asked = samples.prompts or [""] * len(samples.completions)
        here = [
            (read_answer(completion_text(text), self.extract), exclude and cut, prompt)
            for text, cut, prompt in zip(samples.completions, samples.truncated, asked, strict=True)
        ]
        gathered = samples.gather(here)
        rows = [(answer, quiet) for answer, quiet, _ in gathered]
        groups = [rows[start : start + self.n_votes] for start in range(0, len(rows), self.n_votes)]
        prompts = [prompt for _, _, prompt in gathered[:: self.n_votes]]
        votes = [self._vote(group) for group in groups]
        if samples.again:
            # further samples of a prompt are judged by the vote of its own group, not by one of theirs
            votes = [
                replace(vote, label=self._labels[prompt]) for vote, prompt in zip(votes, prompts, strict=True)
            ]
        else:
            self._labels.update({p: vote.label for p, vote in zip(prompts, votes, strict=True)})
        equal = self._grade(groups, votes, samples)
        values = [
            pseudo_rewards([answer for answer, _ in group], vote.label, known)
            for group, vote, known in zip(groups, votes, equal, strict=True)
        ]
        voted = torch.tensor(values, dtype=rewards.dtype, device=rewards.device)
        self._log(groups, votes, voted, rewards.view_as(voted), samples)
        return voted.view_as(rewards)

    def keep_rows(self, rewards: torch.Tensor) -> torch.Tensor | None:
        """Keep the first ``n_samples`` rows of each group."""
        if self.n_samples == self.n_votes:
            return None
        kept = torch.zeros(rewards.shape[:2], dtype=torch.bool, device=rewards.device)
        kept[:, : self.n_samples] = True
        return kept

    def optimizer_step(self) -> None:
        """Forget the labels: every generation batch votes anew."""
        self._labels.clear()

    def _vote(self, group: Sequence[tuple[str | None, bool]]) -> Vote:
        return majority_vote(
            [answer for answer, _ in group],
            silent=[quiet for _, quiet in group],
            drop_empty=self.drop_empty,
            tie=self.tie,
            min_majority=self.min_majority,
        )

    def _grade(
        self, groups: Sequence[Any], votes: Sequence[Vote], samples: Samples
    ) -> list[dict[str, bool | None]]:
        """Return per group what the grader says about each spelling that is not the label's."""
        if self.equivalence == "exact":
            return [{} for _ in groups]
        # each rank grades its share and all learn the result: a timeout must not differ between ranks
        items: list[tuple[int, str, str]] = []
        for number in range(samples.rank, len(groups), samples.ranks):
            label = votes[number].label
            others = dict.fromkeys(answer for answer, _ in groups[number] if answer and answer != label)
            if label is not None and others:
                # the label against itself first: a label that cannot be read proves nothing about the others
                items += [(number, answer, label) for answer in (label, *others)]
        judged = []
        if items:
            verdicts = self._grader().verify([a for _, a, _ in items], [{"answer": x} for _, _, x in items])
            judged = [
                (number, answer, None if verdict.failed else verdict.status == "correct")
                for (number, answer, _), verdict in zip(items, verdicts, strict=True)
            ]
        equal: list[dict[str, bool | None]] = [{} for _ in groups]
        for number, answer, same in samples.gather(judged):
            equal[number][answer] = same
        return [
            known if known.get(vote.label or "") else {} for known, vote in zip(equal, votes, strict=True)
        ]

    def _grader(self) -> VerifierPool:
        if self._pool is None:
            spec = VerifierSpec("math", {"extract": "text"})
            self._pool = VerifierPool(spec, deadline=self.deadline, workers=self.workers)
        return self._pool

    def _log(
        self,
        groups: Sequence[Any],
        votes: Sequence[Vote],
        voted: torch.Tensor,
        verified: torch.Tensor,
        samples: Samples,
    ) -> None:
        """Log what the vote did; every rank knows all groups, so the means are the same everywhere."""
        gauges, kept = samples.gauges, slice(0, self.n_samples)
        known = ~verified.isnan()
        right = verified >= TOP_SCORE
        counted = ~voted.isnan()

        def share(values: Sequence[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=voted.device)

        gauges.mean("empty_answers", share([[not answer for answer, _ in group] for group in groups]))
        gauges.mean("excluded_rows", share([[quiet for _, quiet in group] for group in groups]))
        gauges.mean("grader_failures", (~counted).double())
        gauges.mean("verifier_reward", verified, known)
        gauges.mean("reward_accuracy", (right == (voted == 1)).double(), known & counted)
        subset = [self._vote(group[kept]) for group in groups]
        for prefix, ballot in (("", votes), ("kept_", subset)):
            gauges.mean(f"{prefix}majority_ratio", share([vote.ratio for vote in ballot]))
            gauges.mean(f"{prefix}vote_entropy", share([vote.entropy for vote in ballot]))
            gauges.mean(f"{prefix}distinct_answers", share([vote.distinct for vote in ballot]))
            gauges.mean(f"{prefix}labelled_groups", share([vote.label is not None for vote in ballot]))
            gave = share(
                [
                    [vote.label is not None and answer == vote.label for answer, _ in group]
                    for group, vote in zip(groups, ballot, strict=True)
                ]
            ).bool()
            # the verifier may fail to read the same answer in another sentence: one that it accepts is enough
            gauges.mean(f"{prefix}label_accuracy", (gave & right).any(dim=1), (gave & known).any(dim=1))
        gauges.mean("pseudo_reward", voted, counted)
        gauges.mean("kept_pseudo_reward", voted[:, kept], counted[:, kept])

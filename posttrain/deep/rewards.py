r"""Reward lint: what each reward pays for answers that nobody would want, beside what it pays for gold.

A policy finds what pays. Before it does, a handful of completions that take no skill are scored on a few
training rows: nothing at all, the prompt again, every option listed, words up to the limit. None of them may
be paid like the right answer, and the right answer has to be paid, in some form (bare, in ``\boxed{}``, in
tags). The rewards are the run's own processes with their deadlines, so a verifier that hangs is found here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from posttrain.config.schema import RewardConfig
from posttrain.data.files import PLACE
from posttrain.deep.findings import Finding, Section, first, share, short
from posttrain.deep.subject import Subject, spread
from posttrain.errors import describe
from posttrain.rewards.pool import VerifierStartError
from posttrain.rewards.reward import MODEL_PREFIX, Reward, VerifierFailure, build_rewards

ROWS = 8
GOLD_ROWS = 64
"""Rows whose gold answer is scored: labels that cannot be read are rare and cost a run."""

SLOW_SECONDS = 1.0
OPTIONS = 20
"""Answers that are listed at most, where the data has many."""

LISTED = re.compile(r"(?m)^\s*[-*(]?\s*([A-H])[).:]")
"""Options of a multiple-choice question, one a line."""

TOTAL = "total"

FORMS = {
    "gold": "{}",
    "gold in a sentence": "The answer is {}.",
    "gold in \\boxed{}": "The answer is $\\boxed{{{}}}$.",
    "gold in <answer>": "<think>I work it out.</think>\n<answer>{}</answer>",
    "gold behind ####": "I work it out.\n#### {}",
}
EASY = ("empty", "prompt again", "all options", "words up to the limit")


@dataclass(frozen=True)
class Scored:
    """What one completion was paid.

    Attributes:
        row: Index of its row among those looked at.
        kind: One of :data:`EASY` or :data:`FORMS`.
        pay: By reward; None where it does not judge.
        total: Weighted sum of what is there.
    """

    row: int
    kind: str
    pay: Mapping[str, float | None]
    total: float


def look_at_rewards(subject: Subject) -> Section | None:
    """Return what the rewards of a run pay; None for a run without any.

    Rewards that are models are left out, as asking them would load weights.
    """
    configs = [entry for entry in subject.config.rewards if not entry.name.startswith(MODEL_PREFIX)]
    if not subject.config.rewards or subject.data is None or subject.rows is None:
        return None
    findings = []
    if len(configs) < len(subject.config.rewards):
        findings.append(
            Finding("note", "rewards that are models are not asked: that would load their weights")
        )
    if not configs:
        return Section("rewards", "Rewards", tuple(findings))
    try:
        rewards = build_rewards(configs, subject.data)
    except (ValueError, VerifierStartError) as error:
        return Section("rewards", "Rewards", (*findings, Finding("error", str(error))))
    try:
        lint = _Lint(subject, rewards, configs)
        findings += lint.findings()
        return Section("rewards", "Rewards", tuple(findings), lint.facts())
    finally:
        for reward in rewards:
            reward.close()


class _Lint:
    """Scores completions and says what is wrong with the pay."""

    def __init__(self, subject: Subject, rewards: Sequence[Reward], configs: Sequence[RewardConfig]) -> None:
        self.subject, self.rewards = subject, rewards
        self.failures: list[Finding] = []
        self.slowest: dict[str, float] = {}
        self.golds = next(
            (str(c.params["gold"]) for c in configs if isinstance(c.params.get("gold"), str)), "answer"
        )
        assert subject.rows is not None
        rows = spread(subject.rows, ROWS)
        self.rows = rows
        self.scored: list[Scored] = []
        # a verifier that hangs would do so on every row: the first row shows it
        for index in range(len(rows)):
            wanted = {
                **dict(zip(EASY, self._easy(rows[index]), strict=True)),
                **self._gold(rows[index]),
            }
            self.scored += self._score(rows.select([index] * len(wanted)), wanted, [index] * len(wanted))
            if self.failures:
                break
        self.unpaid: list[str] = []
        if not self.failures and self.golds in rows.column_names:
            self._read_labels(spread(subject.rows, GOLD_ROWS))

    # ---- completions ------------------------------------------------------------------------------------

    def _easy(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return "", _text(row.get("prompt", "")), self._options(row), self._words()

    def _options(self, row: Mapping[str, Any]) -> str:
        """Return every option of a question, in an order that has nothing to do with the right one."""
        listed = sorted(set(LISTED.findall(_text(row.get("prompt", "")))))
        if len(listed) > 1:
            return ", ".join(listed)
        rows = self.subject.rows
        assert rows is not None
        if self.golds not in rows.column_names:
            return "yes, no, true, false, A, B, C, D, 0, 1"
        known = sorted({str(value) for value in rows[self.golds][:] if value is not None})
        own = str(row.get(self.golds))
        if len(known) > OPTIONS:
            known = sorted({own, *known[:: len(known) // (OPTIONS - 1)]})
        return ", ".join(known)

    def _words(self) -> str:
        limit = int(self.subject.trainer.get("max_completion_length") or 256)
        ids = self.subject.tokenizer(" so" * limit, add_special_tokens=False)["input_ids"]
        return str(self.subject.tokenizer.decode(ids[:limit]))

    def _gold(self, row: Mapping[str, Any]) -> dict[str, str]:
        gold = row.get(self.golds)
        return {} if gold is None else {kind: form.format(gold) for kind, form in FORMS.items()}

    # ---- scoring ----------------------------------------------------------------------------------------

    def _score(self, rows: Dataset, wanted: Mapping[str, str], indices: Sequence[int]) -> list[Scored]:
        """Call the rewards as the trainer does."""
        texts = list(wanted.values())
        columns = {name: rows[name][:] for name in rows.column_names if name not in ("prompt", PLACE)}
        for taken in ("completion", "completions"):
            columns.pop(taken, None)
        prompts = rows["prompt"][:] if "prompt" in rows.column_names else [""] * len(texts)
        spoken = bool(prompts) and isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if spoken else texts
        ids = [self.subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        pays: list[dict[str, float | None]] = [{} for _ in texts]
        for reward in self.rewards:
            try:
                values = reward(prompts, completions, completion_ids=ids, **columns)
            except VerifierFailure:
                values = [verdict.score for verdict in reward.verdicts]
            except Exception as error:  # of a column that JSON cannot hold
                self.failures.append(Finding("error", f"reward {reward.__name__!r}: {describe(error)}"))
                values = [None] * len(texts)
            self._blame(reward, list(wanted), rows)
            for pay, value in zip(pays, values, strict=True):
                pay[reward.__name__] = value
        return [
            Scored(index, kind, pay, self._total(pay))
            for index, kind, pay in zip(indices, wanted, pays, strict=True)
        ]

    def _total(self, pay: Mapping[str, float | None]) -> float:
        return math.fsum(
            reward.weight * value for reward in self.rewards if (value := pay[reward.__name__]) is not None
        )

    def _blame(self, reward: Reward, kinds: Sequence[str], rows: Dataset) -> None:
        name, verdicts = reward.__name__, reward.verdicts
        for verdict in verdicts:
            self.slowest[name] = max(self.slowest.get(name, 0.0), verdict.seconds or 0.0)
        for status, what in (("timeout", "takes longer than its deadline"), ("error", "fails")):
            hit = [place for place, verdict in enumerate(verdicts) if verdict.status == status]
            if hit:
                place = hit[0]
                self.failures.append(
                    Finding(
                        "error",
                        f"reward {name!r} {what} on {', '.join(dict.fromkeys(kinds[p] for p in hit))}: "
                        f"{verdicts[place].message}",
                        "a policy writes such completions sooner or later, and each costs the deadline of "
                        f"{reward.config.deadline:g} s"
                        if status == "timeout"
                        else "",
                        "make it answer for any text; see rewards.deadline and rewards.max_failures for what "
                        "the run does then",
                        first([f"{rows[place].get(PLACE, 'row 1')}: {short(rows[place].get('prompt'))}"]),
                    )
                )

    def _read_labels(self, rows: Dataset) -> None:
        """Score the gold answer of more rows, in the form that pays best on those before."""
        best = self._best_form()
        if best is None:
            return
        for start in range(0, len(rows), ROWS):
            part = rows.select(range(start, min(start + ROWS, len(rows))))
            texts = {str(i): FORMS[best].format(row[self.golds]) for i, row in enumerate(part)}
            top = max(scored.total for scored in self.scored if scored.kind == best)
            for scored in self._score(part, texts, list(range(len(part)))):
                if scored.total < top - 1e-9:
                    row = part[scored.row]
                    self.unpaid.append(f"{row.get(PLACE)}: {short(row[self.golds])}")
        self.read = len(rows)

    # ---- findings ---------------------------------------------------------------------------------------

    def _best_form(self) -> str | None:
        """Return the form of the gold answer that is paid best; None where there is no gold."""
        kinds = [kind for kind in FORMS if any(scored.kind == kind for scored in self.scored)]
        return max(kinds, key=self._mean, default=None)

    def _mean(self, kind: str, name: str = TOTAL) -> float:
        values = [
            scored.total if name == TOTAL else scored.pay[name]
            for scored in self.scored
            if scored.kind == kind
        ]
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if known else math.nan

    def findings(self) -> Iterable[Finding]:
        """Yield what is wrong."""
        yield from self.failures
        if self.failures:
            return
        yield from self._constant()
        yield from self._easy_pay()
        yield from self._gold_pay()
        for name, seconds in self.slowest.items():
            if seconds > SLOW_SECONDS:
                yield Finding(
                    "warning",
                    f"reward {name!r} took {seconds:.1f} s for one completion",
                    cure="raise rewards.workers, or make it faster: the trainer waits for the slowest",
                )

    def _constant(self) -> Iterable[Finding]:
        for reward in self.rewards:
            name = reward.__name__
            values = {scored.pay[name] for scored in self.scored}
            if len(values) == 1:
                (value,) = values
                alone = len(self.rewards) == 1
                what = "judges none of them" if value is None else f"pays {value:g} for all of them"
                yield Finding(
                    "error" if alone and self.subject.spec.generates else "warning",
                    f"reward {name!r} is constant: of {len(self.scored)} completions as different as "
                    "these it "
                    f"{what}",
                    "groups with equal rewards have no advantage, so nothing is learned from them",
                    "look at what it reads: the column with the gold answer, and the form it expects",
                )

    def _easy_pay(self) -> Iterable[Finding]:
        best = self._best_form()
        if best is None:
            return
        gold = {scored.row: scored.total for scored in self.scored if scored.kind == best}
        for kind in EASY:
            rows = [scored for scored in self.scored if scored.kind == kind]
            paid = [scored for scored in rows if scored.total >= gold[scored.row] - 1e-9]
            if not paid or (kind == "all options" and len(paid) * 2 <= len(rows)):
                continue  # listing everything is right by chance now and then
            yield Finding(
                "error" if len(paid) * 2 > len(rows) else "warning",
                f"{share(len(paid), len(rows))} rows: {_WORDS[kind]} is paid as much as the gold answer "
                f"({paid[0].total:g})",
                "the reward looks for the answer anywhere, or does not look at it",
                _CURES[kind],
                first(
                    [f"{self.rows[s.row].get(PLACE)}: {short(self.rows[s.row].get('prompt'))}" for s in paid]
                ),
            )

    def _gold_pay(self) -> Iterable[Finding]:
        best = self._best_form()
        if best is None:
            return
        others = [self._mean(kind) for kind in EASY]
        if self._mean(best) <= max(others) + 1e-9:
            yield Finding(
                "error",
                f"no form of the gold answer is paid more ({self._mean(best):g}) than completions "
                "without skill "
                f"({max(others):g})",
                f"the reward does not recognise the column {self.golds!r}, or is about something else",
                "name the column with the answer in the params of the reward, or map it with data.columns",
            )
            return
        lower = [kind for kind in FORMS if kind != best and self._mean(kind) < self._mean(best) - 1e-9]
        if lower:
            yield Finding(
                "note",
                f"the gold answer is paid {self._mean(best):g} as {FORMS[best].format('...')!r}, and less as "
                + ", ".join(f"{FORMS[kind].format('...')!r} ({self._mean(kind):g})" for kind in lower),
                cure="say in the prompt which form is wanted, or the first steps only teach the form",
            )
        if self.unpaid:
            yield Finding(
                "error" if len(self.unpaid) * 2 > self.read else "warning",
                f"{share(len(self.unpaid), self.read)} gold answers are not paid in full themselves",
                "labels that the verifier cannot read, or that are wrong",
                "correct or remove these rows: no completion can be right there",
                first(self.unpaid),
            )

    def facts(self) -> dict[str, Any]:
        """Return the table of mean pay, kinds by rewards."""
        names = [reward.__name__ for reward in self.rewards]
        kinds = [kind for kind in (*EASY, *FORMS) if any(scored.kind == kind for scored in self.scored)]
        table = {
            kind: {
                name: None if math.isnan(value := self._mean(kind, name)) else round(value, 6)
                for name in (*names, TOTAL)
            }
            for kind in kinds
        }
        return {
            "rows": len({scored.row for scored in self.scored}),
            "weights": {reward.__name__: reward.weight for reward in self.rewards},
            "pay": table,
            "slowest_seconds": {name: round(value, 3) for name, value in self.slowest.items()},
        }


_WORDS = {
    "empty": "saying nothing",
    "prompt again": "repeating the prompt",
    "all options": "listing all options",
    "words up to the limit": "writing one word up to the limit",
}
_CURES = {
    "empty": "return 0 for text without an answer; rewards.unparseable says what that is worth",
    "prompt again": "take the answer from one place (extract: boxed or answer_tag), not from the whole text",
    "all options": "accept one answer only: the last, or the one in the box",
    "words up to the limit": "return 0 for text without an answer; soft_overlong takes from what is too long",
}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(str(m.get("content") or "") for m in value if m.get("role") != "system")
    return str(value)

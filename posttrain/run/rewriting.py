"""S3FT carried out: rows rewritten with the model's own answers, in batches that survive a kill.

::

    rows.jsonl              the rows, once all are finished
    rows.statistics.json    what they were made with, and the counts
    rows.jsonl.progress     finished rows of a job that is not done
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import set_seed

from posttrain.config.schema import RunConfig, S3FTConfig
from posttrain.data.errors import DataError
from posttrain.data.length import apply_length_policy
from posttrain.data.load import load_data, row_fingerprint
from posttrain.data.prompts import put_column, render
from posttrain.evaluation.generate import (
    Completion,
    encode_prompt,
    generation_mode,
    occurrences,
    prompt_digest,
    sample,
)
from posttrain.models.load import load_model
from posttrain.rewards.pool import VerifierStartError
from posttrain.rewards.reward import Reward, VerifierFailure, build_rewards
from posttrain.rewards.verdict import Verdict
from posttrain.run.directory import (
    RunError,
    append_json_lines,
    keep_json_lines,
    read_json_lines,
    write_json,
)
from posttrain.run.ranks import Ranks
from posttrain.sft.s3ft import (
    FAILED,
    Candidate,
    Outcome,
    Stage,
    Target,
    check_columns,
    prompt_and_gold,
    put_answer,
    rephrase,
    statistics,
    targets,
)
from posttrain.stored import finished_file, stored_json

_ENOUGH = 20  # judgements after which a broken judge stops the job before its end


def rewrite_to(config: RunConfig, to: Path) -> dict[str, Any]:
    """Write the training rows that the ``s3ft`` section of a configuration gives; see the module page.

    Returns:
        The file under ``rows_file``, and the counts; the same on every rank.

    Raises:
        RunError: There is no such section, or ``to`` holds other rows.
        VerifierFailure: The judge failed on more answers than ``max_failures`` allows.
    """
    if config.s3ft is None:
        raise RunError("the configuration has no 's3ft' section: add s3ft: {}")
    if to.suffix != ".jsonl":
        raise RunError(f"--to names a file that ends in .jsonl, found {to}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = Ranks()
    seed = int(config.trainer.get("seed", 42))
    set_seed(seed)
    hold_out = config.evaluate is not None or config.trainer.get("eval_strategy", "no") != "no"
    data = load_data(config.data, config.task, hold_out=hold_out)
    try:
        rewards = build_rewards(config.rewards[:1], data)
    except (ValueError, VerifierStartError) as error:
        raise RunError(str(error)) from error
    try:
        model, tokenizer = load_model(config.model, seed=seed)
        rows = render(data.train, tokenizer, config.data)
        limits = (config.data.max_prompt_tokens, config.data.over_length)
        rows, _ = apply_length_policy(rows, tokenizer, *limits)
        job = Rewriting(config.s3ft, model, tokenizer, rewards[0], to.expanduser(), ranks)
        job.carry_out(rows)
    finally:
        for reward in rewards:
            reward.close()
    return {"rows_file": str(to), **job.statistics}


class Rewriting:
    """One job: all rows of a data set.

    Args:
        settings: The ``s3ft`` section.
        model: The start model, with its adapter if it has one; its state is the same afterwards.
        tokenizer: Its tokenizer.
        reward: The judge.
        to: The file of the rows; a job that was stopped, or is done, is recognised by it.
        ranks: The processes, between which rows are shared.

    Attributes:
        statistics: See :func:`posttrain.sft.s3ft.statistics`, after :meth:`carry_out`.
    """

    def __init__(
        self, settings: S3FTConfig, model: Any, tokenizer: Any, reward: Reward, to: Path, ranks: Ranks
    ) -> None:
        self.settings, self.model, self.tokenizer, self.reward = settings, model, tokenizer, reward
        self.to, self.ranks = to, ranks
        self.progress = to.with_name(to.name + ".progress")
        self.summary = to.with_suffix(".statistics.json")
        self.statistics: dict[str, Any] = {}
        self._complaint = ""

    def carry_out(self, rows: Dataset) -> Dataset:
        """Return the rendered ``rows`` with their targets, ``source`` and ``judge_score``, in their order.

        Raises:
            DataError: The rows have no answers to replace, or no prompt fits the model.
            RunError: ``to`` belongs to other rows, another model, judge or settings.
            VerifierFailure: The judge failed on more answers than its ``max_failures``.
        """
        check_columns(rows.column_names)
        identity = self._identity(rows)
        done, self.statistics = self.ranks.on_main(lambda: self._earlier(identity))
        if done:
            self.ranks.say(f"s3ft: {len(done)} of {len(rows)} rows are done already")
        self._rows = [dict(row) for row in rows]
        self._split = [prompt_and_gold(row) for row in self._rows]
        pending = [index for index in range(len(rows)) if index not in done]
        if pending:
            self._encode()
            self._finish(pending, done, identity)
        found = [done[index] for index in range(len(rows))]
        if not self.statistics:
            self.statistics = statistics(found)
            self.ranks.on_main(lambda: self._write(found, identity))
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.statistics["shares"].items())
        self.ranks.say(f"s3ft: {len(rows)} rows: {shares}")
        column = "messages" if "messages" in rows.column_names else "completion"
        new = [put_answer(row, target) for row, target in zip(self._rows, found, strict=True)]
        for name in (column, "source", "judge_score"):
            rows = put_column(rows, name, [row[name] for row in new])
        return rows

    # ---- what is there already --------------------------------------------------------------------------

    def _identity(self, rows: Dataset) -> dict[str, Any]:
        """Return what the result hangs on; not the batch size, the processes and the judge's patience."""
        template = str(getattr(self.tokenizer, "chat_template", None))
        return {
            "rows": row_fingerprint(rows),
            "model": _weights_digest(self.model),
            "template": hashlib.sha256(template.encode()).hexdigest(),
            "judge": {"name": self.reward.spec.name, "params": self.reward.spec.params},
            "s3ft": self.settings.model_dump(mode="json", exclude={"batch_size"}),
        }

    def _earlier(self, identity: dict[str, Any]) -> tuple[dict[int, Target], dict[str, Any]]:
        """Return the finished rows, and the counts of a job that is done.

        Rows whose judge failed are not finished while the job is not.
        """
        identity = json.loads(json.dumps(identity))
        finished = self.to.exists()
        if finished and not self.summary.exists():
            raise RunError(f"{self.to} exists already and s3ft did not write it: choose another file")
        lines = read_json_lines(self.progress)
        told = stored_json(self.summary) if finished else (lines or [{}])[0]
        if (finished or lines) and told.get("identity") != identity:
            then = told.get("identity") or {}
            other = [name for name in identity if then.get(name) != identity[name]]
            raise RunError(
                f"{self.to if finished else self.progress} was written with other {' and '.join(other)}: "
                "choose another file, or delete it to start again"
            )
        if finished:
            rows = map(_written_target, read_json_lines(self.to))
            return dict(enumerate(rows)), {key: value for key, value in told.items() if key != "identity"}
        kept = keep_json_lines(
            self.progress, lambda line: "row" not in line or not _target(line).judge_failed
        )
        return {line["row"]: _target(line) for line in kept if "row" in line}, {}

    # ---- the work ---------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """Tokenise all prompts: equal ones are told apart by their number."""
        self._ids: list[list[int]] = [
            [] if gold is None else encode_prompt(self.tokenizer, prompt) for prompt, gold in self._split
        ]
        self._streams = occurrences([prompt_digest(ids) for ids in self._ids])
        self._context: int | None = getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )
        shortest = min((len(ids) for ids in self._ids if ids), default=0)
        if self._context is not None and not self._fits(shortest):
            raise DataError(
                f"s3ft: no prompt fits the context of {self._context} tokens together with an answer of "
                f"{self.settings.max_new_tokens}; the shortest has {shortest} tokens. Set "
                f"s3ft.max_new_tokens to at most {max(self._context - shortest, 0)}"
            )
        self.model.to(self.ranks.state.device)

    def _fits(self, tokens: int) -> bool:
        return self._context is None or tokens + self.settings.max_new_tokens <= self._context

    def _finish(self, pending: Sequence[int], done: dict[int, Target], identity: dict[str, Any]) -> None:
        """Add the pending rows to ``done``, batch by batch, each written down before the next begins."""
        world, rank = self.ranks.state.num_processes, self.ranks.state.process_index
        size, total = self.settings.batch_size * world, len(done) + len(pending)
        outcomes: Counter[str] = Counter()
        told = len(done)
        if not done:
            self.ranks.on_main(lambda: append_json_lines(self.progress, [{"identity": identity}]))
        for start in range(0, len(pending), size):
            mine = list(pending[start + rank : start + size : world])
            failure: Exception | None = None
            found: list[Target] = []
            try:
                found = targets(mine, self._generate, self._judge, self._mean_log_probs, self.settings)
            except Exception as error:  # told to all ranks first, which would wait for this one
                failure = error
            shares = gather_object([(mine, found, failure and repr(failure))])
            if failure is not None:
                raise failure
            broken = [text for _, _, text in shares if text is not None]
            if broken:
                raise RuntimeError(f"another process failed in s3ft: {broken[0]}")
            batch = {row: one for rows, some, _ in shares for row, one in zip(rows, some, strict=True)}
            lines = [{"row": row, **batch[row].to_dict()} for row in sorted(batch)]
            self.ranks.on_main(functools.partial(append_json_lines, self.progress, lines))
            done |= batch
            outcomes.update(o for one in batch.values() for tried in one.outcomes.values() for o in tried)
            self._stop_if_broken(outcomes, last=start + size >= len(pending))
            if len(done) - told >= total / 10 and len(done) < total:
                told = len(done)
                self.ranks.say(f"s3ft: {told} of {total} rows")

    def _generate(self, stage: Stage, indices: list[int]) -> list[Sequence[Candidate] | Outcome]:
        asked: dict[int, Any] = {}
        groups: dict[int, Sequence[Candidate] | Outcome] = {}
        for index in indices:
            prompt, gold = self._split[index]
            if gold is None:
                groups[index] = "no_answer"
                continue
            if stage == "paraphrase":
                prompt = rephrase(prompt, gold, self.settings.paraphrase_template)
            ids = self._ids[index] if stage == "model" else encode_prompt(self.tokenizer, prompt)
            if self._fits(len(ids)):
                asked[index] = prompt
            else:
                groups[index] = "too_long"
        drawn = sample(
            self.model,
            self.tokenizer,
            list(asked.values()),
            n=self.settings.samples if stage == "model" else 1,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            streams=[self._streams[index] for index in asked],
        )
        for index, completions in zip(asked, drawn, strict=True):
            groups[index] = [self._candidate(index, stage, asked[index], one) for one in completions]
        return [groups[index] for index in indices]

    def _candidate(self, index: int, stage: Stage, asked: Any, completion: Completion) -> Candidate:
        """Give an answer the text that leads back to its tokens behind the prompt it will stand behind."""
        tokenizer, written = self.tokenizer, completion.token_ids
        prompt = self._split[index][0]
        # not completion.text: cleaned of spaces, or decoded without what stands before, it may lose some
        if isinstance(asked, str):
            before = self._ids[index] if stage == "model" else encode_prompt(tokenizer, asked)
            start, whole = self._decode(before, before + written)
            text = whole[len(start) :] if whole.startswith(start) else self._decode(written)[0]
            again = tokenizer(prompt + text)["input_ids"]
        else:
            text = self._decode(written)[0]
            answered = [*prompt, {"role": "assistant", "content": text}]
            again = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True)["input_ids"]
        wanted = self._ids[index] + (written[:-1] if completion.finished else written)
        same = list(again[: len(wanted)]) == wanted
        return Candidate(text, len(written), completion.finished, same, (index, tuple(written)))

    def _decode(self, *rows: list[int]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(
            list(rows), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def _judge(self, indices: list[int], texts: list[str]) -> list[Verdict]:
        rows = [self._rows[index] | {"prompt": self._split[index][0]} for index in indices]
        verdicts = self.reward.verify(texts, rows)
        for verdict in verdicts:
            if verdict.failed and not self._complaint:
                self._complaint = f" The first said: {verdict.message}."
        return verdicts

    def _mean_log_probs(self, index: int, candidates: Sequence[Candidate]) -> list[float]:
        """Return the mean log-probability of each answer behind its prompt, at temperature 1."""
        values = []
        prompt = self._ids[index]
        with generation_mode(self.model), torch.no_grad():
            device = self.model.get_input_embeddings().weight.device
            for candidate in candidates:
                written = torch.tensor(candidate.place[1], device=device)
                ids = torch.tensor(prompt, device=device)
                logits = self.model(input_ids=torch.cat([ids, written])[None]).logits[0, len(prompt) - 1 : -1]
                chosen = logits.float().log_softmax(-1).gather(1, written[:, None])
                values.append(chosen.mean().item())
        return values

    def _stop_if_broken(self, outcomes: Counter[str], *, last: bool) -> None:
        failed = sum(outcomes[name] for name in FAILED)
        judged = failed + sum(outcomes[name] for name in ("correct", "wrong", "unparseable", "skipped"))
        limit = self.reward.config.max_failures
        if failed <= limit * judged or (judged < _ENOUGH and not last):
            return
        raise VerifierFailure(
            f"reward {self.reward.__name__!r}: {failed} of {judged} answers ended in error "
            f"({outcomes['error']}) or timeout ({outcomes['timeout']}); at most {limit:.0%} may "
            f"(max_failures). The judge is at fault, not the model.{self._complaint} Fix it, or raise its "
            "deadline, workers or params.memory_gib; the finished rows are kept, the others are tried again"
        )

    def _write(self, found: Sequence[Target], identity: dict[str, Any]) -> None:
        """Write counts, then rows: that the rows are there says that all is done."""
        write_json(self.summary, {**self.statistics, "identity": identity})
        new = (put_answer(row, target) for row, target in zip(self._rows, found, strict=True))
        with finished_file(self.to) as partial:
            partial.touch()  # also without rows
            append_json_lines(partial, new)
        self.progress.unlink(missing_ok=True)


def _target(line: dict[str, Any]) -> Target:
    return Target(**{name: value for name, value in line.items() if name != "row"})


def _written_target(row: dict[str, Any]) -> Target:
    text = None if row["source"] == "gold" else prompt_and_gold(row)[1]
    return Target(row["source"], text, row["judge_score"], None, True, {})


def _weights_digest(model: torch.nn.Module) -> str:
    """Return a digest of the names and the first numbers of all weights: another model has another one."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:256].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + first.tobytes())
    return digest.hexdigest()

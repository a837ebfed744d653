"""All parts of a deep check, in order."""

from __future__ import annotations

from posttrain.config.launch import processes
from posttrain.config.schema import RunConfig
from posttrain.data.length import apply_length_policy
from posttrain.deep.batch import look_at_batches
from posttrain.deep.findings import DeepReport, Finding, Section
from posttrain.deep.memory import Forecast, forecast, look_at_memory
from posttrain.deep.rewards import look_at_rewards
from posttrain.deep.rows import look_at_rows
from posttrain.deep.stand_in import Encoding, StandIn
from posttrain.deep.subject import Subject, alone, load_subject
from posttrain.deep.tokens import SHOWN_SEQUENCES, STAND_IN_ANSWER, look_at_tokens
from posttrain.deep.trace import Device
from posttrain.errors import describe


def deep_check(config: RunConfig, device: Device = "cpu") -> DeepReport:
    """Look at everything that can be seen of a run before it trains. Writes nothing, loads no weights.

    Args:
        config: The checked configuration (:func:`posttrain.config.check.load_run_config`). Counts are for
            WORLD_SIZE processes, none of which has to be there.
        device: What the memory forecast is for.

    Returns:
        One section per part; what cannot be looked at, for want of data or tokenizer, is left out after the
        error that says why.
    """
    ranks = processes()
    with alone():
        return DeepReport(tuple(_sections(load_subject(config, ranks), device)))


def forecast_run(config: RunConfig, device: Device) -> Forecast | None:
    """Return the memory forecast of a run alone; None when its rows cannot be loaded.

    Args:
        config: The checked configuration.
        device: What it will run on.
    """
    ranks = processes()
    with alone():
        subject = load_subject(config, ranks)
        encoding, _ = _encoding(subject)
        longest = _longest(subject, encoding)
        return None if longest is None else forecast(subject, longest, device)


def _longest(subject: Subject, encoding: Encoding | None) -> int | None:
    """Return the tokens of the longest sequence of the run, or None when there is none."""
    if encoding is None or not encoding.sequences:
        return None
    values = subject.trainer
    if not subject.spec.generates:
        if values.get("packing"):
            return int(values["max_length"])
        return max(len(sequence.ids) for sequence in encoding.sequences)
    _, report = apply_length_policy(subject.rows, subject.tokenizer, None)
    limit = subject.config.data.max_prompt_tokens
    prompt = report.longest if limit is None else min(report.longest, limit)
    return prompt + int(values["max_completion_length"])


def _sections(subject: Subject, device: Device) -> list[Section]:
    sections = []
    encoding, refused = _encoding(subject)
    trouble = [*subject.trouble["tokens"], *refused]
    if encoding is not None:
        seen = look_at_tokens(subject, encoding)
        sections.append(Section(seen.name, seen.title, (*trouble, *seen.findings), seen.facts))
    elif trouble:
        sections.append(Section("tokens", "Tokenizer and template", tuple(trouble)))
    if subject.data is not None:
        rows = look_at_rows(subject, encoding)
        sections.append(rows)
        paid = look_at_rewards(subject)
        sections += [] if paid is None else [paid]
        sections.append(look_at_batches(subject, _tokens_per_row(subject, encoding)))
    else:
        sections.append(Section("data", "Data", tuple(subject.trouble["data"])))
    longest = _longest(subject, encoding)
    if longest is not None:
        sections.append(look_at_memory(subject, longest, device))
    return sections


def _encoding(subject: Subject) -> tuple[Encoding | None, list[Finding]]:
    if subject.rows is None or subject.model is None:
        return None, []
    try:
        trainer = StandIn(subject)
        if not subject.spec.generates:
            return trainer.encode(subject.rows), []
        shown = subject.rows.select(range(min(SHOWN_SEQUENCES, len(subject.rows))))
        answers = [short_answer(row) for row in shown]
        return trainer.roll_out(shown, answers), []
    except Exception as error:  # whatever the trainer of the run would say of these rows
        return None, [
            Finding(
                "error",
                f"the trainer refuses the rows: {describe(error)}",
                "it does so on a stand-in of the same vocabulary, so it would after loading the model",
                "rows of prompt and completion train the completion only, without "
                "assistant_only_loss: leave it "
                "out, or put {% generation %} markers into the chat template"
                if subject.config.trainer.get("assistant_only_loss")
                else "",
            )
        ]


def short_answer(row: dict[str, object]) -> str:
    """Return what stands for a completion in the token table: the gold answer, where there is one."""
    answer = row.get("answer")
    return STAND_IN_ANSWER if answer is None else str(answer)


def _tokens_per_row(subject: Subject, encoding: Encoding | None) -> float | None:
    if encoding is None or not encoding.sequences:
        return None
    rows = {sequence.row for sequence in encoding.sequences}
    if subject.spec.generates:
        prompts = sum(len(s.ids) - sum(s.trained) for s in encoding.sequences)
        return prompts / len(rows)
    return sum(len(sequence.ids) for sequence in encoding.sequences) / len(rows)

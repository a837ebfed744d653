"""Tokenizer and template: what rows look like to the model, and which tokens train.

The causes told here are the ones that users of other toolkits lose days to: a stop token that is masked out
or never there, a text that begins twice, a prompt that is tokenized differently alone and with its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from posttrain.data.contracts import is_conversational
from posttrain.data.files import PLACE
from posttrain.deep.findings import Finding, Section, first, share, short
from posttrain.deep.stand_in import Encoded, Encoding
from posttrain.deep.subject import Subject

SHOWN_SEQUENCES = 2
"""In the token table: two rows, or the two answers of one pair."""

STAND_IN_ANSWER = "..."
"""Text that stands for a completion where a row has no answer of its own."""


def look_at_tokens(subject: Subject, encoding: Encoding) -> Section:
    """Return the findings, and the token table of the first rows."""
    tokenizer = subject.tokenizer
    findings = [
        *_template(subject),
        *_end(subject, encoding),
        *_beginning(subject, encoding),
        *_prefix(subject, encoding),
        *_vocabulary(subject, encoding),
        *_nothing_trains(subject, encoding),
    ]
    shown = encoding.sequences[:SHOWN_SEQUENCES]
    facts = {
        "chat_template": bool(tokenizer.chat_template),
        "special_tokens": {
            name: {"token": getattr(tokenizer, f"{name}_token"), "id": getattr(tokenizer, f"{name}_token_id")}
            for name in ("bos", "eos", "pad", "unk")
        },
        "ends": [token_text(tokenizer, token) for token in sorted(ends(subject))],
        "table": [token_rows(subject, sequence) for sequence in shown],
    }
    return Section("tokens", "Tokenizer and template", tuple(findings), facts)


def ends(subject: Subject) -> set[int]:
    """Return the tokens at which generation stops: of the tokenizer and of the generation settings."""
    generation = getattr(subject.model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    several = found if isinstance(found, list) else [found]
    return {token for token in (*several, subject.tokenizer.eos_token_id) if token is not None}


def token_rows(subject: Subject, sequence: Encoded) -> dict[str, Any]:
    """Return one sequence for the token table: every token with text, role, and whether it trains."""
    assert subject.rows is not None
    row = subject.rows[sequence.row]
    roles = _roles(subject, row, sequence)
    special = set(subject.tokenizer.all_special_ids)
    return {
        "place": row.get(PLACE, f"row {sequence.row + 1}"),
        "part": sequence.part,
        "cut": sequence.cut,
        "tokens": [
            {
                "id": token,
                "text": token_text(subject.tokenizer, token),
                "role": role,
                "special": token in special,
                "trained": trained,
            }
            for token, role, trained in zip(sequence.ids, roles, sequence.trained, strict=True)
        ],
    }


# ---- roles -------------------------------------------------------------------------------------------------


def _roles(subject: Subject, row: dict[str, Any], sequence: Encoded) -> list[str]:
    """Return whose each token is: the role of its message, or prompt and completion."""
    parts = _parts(row, sequence.part)
    bounds: list[tuple[int, str]] = []
    for upto in range(1, len(parts)):
        ids = _rendered(subject.tokenizer, [value for _, value in parts[:upto]])
        bounds.append((_shared(ids, sequence.ids), parts[upto - 1][0]))
    roles = []
    for place in range(len(sequence.ids)):
        roles.append(next((role for bound, role in bounds if place < bound), parts[-1][0]))
    return roles


def _parts(row: dict[str, Any], part: str) -> list[tuple[str, Any]]:
    """Return the pieces of a row with their roles, in order."""
    answer = part or ("completion" if "completion" in row else "")
    if "prompt" not in row:
        column = next(name for name in ("messages", "text") if name in row)
        if isinstance(row[column], str):
            return [("text", row[column])]
        return [(message["role"], message) for message in row[column]]
    if isinstance(row["prompt"], str):
        return [("prompt", row["prompt"]), (answer or "completion", row.get(answer, ""))]
    pieces = [(message["role"], message) for message in row["prompt"]]
    replies = row.get(answer) if answer else None
    return [*pieces, *((m["role"], m) for m in replies)] if replies else [*pieces, ("completion", "")]


def _rendered(tokenizer: Any, pieces: Sequence[Any]) -> list[int]:
    if all(isinstance(piece, str) for piece in pieces):
        return list(tokenizer("".join(pieces))["input_ids"])
    # the opening of the next turn belongs to the one before: nothing of it is an answer
    opening = pieces[-1]["role"] != "assistant"
    return list(
        tokenizer.apply_chat_template(
            list(pieces), tokenize=True, return_dict=True, add_generation_prompt=opening
        )["input_ids"]
    )


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return index
    return min(len(one), len(two))


def token_text(tokenizer: Any, token: int) -> str:
    """Return one token as it stands inside a text, with the space before it; half a character by its name."""
    # behind another token, since some tokenizers drop the space before the first word
    ahead = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    text = str(tokenizer.decode([*ahead, token])).removeprefix(str(tokenizer.decode(ahead)))
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))


# ---- findings ----------------------------------------------------------------------------------------------


def _template(subject: Subject) -> Iterable[Finding]:
    tokenizer, rows, data = subject.tokenizer, subject.rows, subject.config.data
    assert rows is not None
    column = next(name for name in ("prompt", "messages", "text") if name in rows.column_names)
    spoken = is_conversational(rows, column)
    if tokenizer.chat_template and not spoken:
        why = (
            "data.chat_template is 'never'" if data.chat_template == "never" else "the rows are a text column"
        )
        yield Finding(
            "warning",
            f"the tokenizer has a chat template, and it is not used: {why}",
            "an instruction model answers plain text worse than the form it was tuned on",
            "give prompt and completion (or messages) and leave data.chat_template: auto, unless "
            "this is meant",
        )
    elif not tokenizer.chat_template:
        yield Finding(
            "note", "no chat template: prompts and answers are plain text, and the end token goes behind them"
        )
    if subject.config.trainer.get("assistant_only_loss") and spoken:
        template = tokenizer.chat_template
        own = has_generation_markers(template)
        if own and not is_chat_template_stop_token_trained(tokenizer):
            yield Finding(
                "error",
                "assistant_only_loss leaves the end of the assistant's turn out of the loss",
                "the template puts the end-of-turn token behind {% endgeneration %}",
                "move it inside {% generation %}...{% endgeneration %}, or set assistant_only_loss: false",
            )


def _end(subject: Subject, encoding: Encoding) -> Iterable[Finding]:
    """Is there an end token, and is it learned?"""
    if subject.spec.scores:
        return
    tokenizer, stops = subject.tokenizer, ends(subject)
    whole = [sequence for sequence in encoding.sequences if not sequence.cut]
    missing: list[Encoded] = []
    masked: list[Encoded] = []
    other: list[Encoded] = []
    for sequence in whole:
        place = _last_end(tokenizer, sequence, stops)
        if place is None:
            place = _last_special(tokenizer, sequence)
            (missing if place is None else other).append(sequence)
        elif not sequence.trained[place] and any(sequence.trained):
            masked.append(sequence)
    if masked:
        same = tokenizer.pad_token_id == tokenizer.eos_token_id
        yield Finding(
            "error",
            f"the end-of-turn token is not trained in {share(len(masked), len(whole))} sequences: the model "
            "would not learn to stop",
            "it is the pad token too, and padding is masked" if same else "the loss mask ends before it",
            "give the tokenizer a pad token of its own"
            if same
            else "correct the chat template, or set assistant_only_loss: false",
            _places(subject, masked),
        )
    if other:
        ends_with = {token_text(tokenizer, s.ids[_last_special(tokenizer, s) or 0]) for s in other}
        names = ", ".join(map(repr, sorted(ends_with)))
        yield Finding(
            "error" if subject.spec.generates else "warning",
            f"{share(len(other), len(whole))} sequences end with {names}, at which generation does not stop "
            f"(it stops at {', '.join(repr(token_text(tokenizer, token)) for token in sorted(stops))})",
            "the template ends turns with another token than tokenizer and generation_config.json name",
            "set trainer.eos_token to that token, or eos_token_id in generation_config.json to both"
            if not subject.spec.generates
            else "set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            _places(subject, other),
        )
    if missing:
        yield Finding(
            "warning",
            f"{share(len(missing), len(whole))} sequences have no end token: the model would not "
            "learn to stop",
            "the chat template does not close the last turn",
            "add the end token to the template's assistant turn",
            _places(subject, missing),
        )


def _last_end(tokenizer: Any, sequence: Encoded, stops: set[int]) -> int | None:
    """Return the place of the end token that closes a sequence; white space may follow it."""
    for place in range(len(sequence.ids) - 1, 0, -1):
        if sequence.ids[place] in stops:
            return place
        if str(tokenizer.decode([sequence.ids[place]])).strip():
            return None
    return None


def _last_special(tokenizer: Any, sequence: Encoded) -> int | None:
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return _last_end(tokenizer, sequence, special)


def _beginning(subject: Subject, encoding: Encoding) -> Iterable[Finding]:
    bos = subject.tokenizer.bos_token_id
    if bos is None:
        return
    twice = [s for s in encoding.sequences if len(s.ids) > 1 and s.ids[0] == s.ids[1] == bos]
    if twice:
        token = subject.tokenizer.bos_token
        yield Finding(
            "error",
            f"{share(len(twice), len(encoding.sequences))} sequences begin with {token!r} twice",
            "the text or the template has it already, and the tokenizer puts it in front again",
            f"take {token} out of the data and of data.prompt_template, or out of the chat template",
            _places(subject, twice),
        )


def _prefix(subject: Subject, encoding: Encoding) -> Iterable[Finding]:
    """Is a prompt alone the same tokens as at the start of prompt and answer?"""
    rows = subject.rows
    assert rows is not None
    if "prompt" not in rows.column_names or subject.spec.generates or subject.spec.scores:
        return
    broken: list[tuple[Encoded, list[int]]] = []
    seen = 0
    prompts: dict[int, list[int]] = {}
    for sequence in encoding.sequences:
        if sequence.row not in prompts:
            prompt = rows[sequence.row]["prompt"]
            prompts[sequence.row] = _rendered(
                subject.tokenizer, [prompt] if isinstance(prompt, str) else prompt
            )
        ids = prompts[sequence.row]
        if sequence.cut and len(ids) > len(sequence.ids):
            continue  # cut inside the prompt; told elsewhere
        seen += 1
        same = _shared(ids, sequence.ids)
        if same < len(ids):
            broken.append((sequence, ids[same:]))
    if broken:
        sequence, rest = broken[0]
        yield Finding(
            "warning",
            f"in {share(len(broken), seen)} sequences the prompt alone is tokenized differently than "
            "with its "
            f"answer: it ends with {subject.tokenizer.decode(rest)!r} when the model answers, and not "
            "when it "
            "trains",
            "the template renders a last turn differently (thinking tags do), or a token spans "
            "prompt and answer",
            "end prompts without a space and begin answers with one, or use a template whose turns "
            "do not depend "
            "on what follows",
            _places(subject, [sequence for sequence, _ in broken]),
        )


def _vocabulary(subject: Subject, encoding: Encoding) -> Iterable[Finding]:
    tokenizer, sequences = subject.tokenizer, encoding.sequences
    size = int(subject.model.get_input_embeddings().num_embeddings)
    outside = [s for s in sequences if max(s.ids, default=0) >= size]
    if outside:
        worst = max(max(s.ids) for s in outside)
        yield Finding(
            "error",
            f"{share(len(outside), len(sequences))} sequences hold tokens outside the vocabulary, up to id "
            f"{worst} ({token_text(tokenizer, worst)!r}), where the model has {size} rows",
            "the tokenizer was given special tokens that the model was not",
            "use the tokenizer of the model, or resize the model before training",
            _places(subject, outside),
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in {tokenizer.pad_token_id, tokenizer.eos_token_id}:
        found = [s for s in sequences if unknown in s.ids]
        if found:
            lost = sum(s.ids.count(unknown) for s in found)
            yield Finding(
                "warning",
                f"{share(len(found), len(sequences))} sequences hold {lost} unknown tokens "
                f"({tokenizer.unk_token!r})",
                "the vocabulary lacks characters of the data",
                "normalise the text (quotes, dashes, line ends), or use another model",
                _places(subject, found),
            )
    yield from _written_out(subject)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "note",
            f"padding and end are the same token, {tokenizer.eos_token!r}; labels are made before "
            "padding, so "
            "the end trains and padding does not (the table shows it)",
        )
    context = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    over = [s for s in sequences if context is not None and len(s.ids) > context]
    if over:
        yield Finding(
            "error",
            f"{share(len(over), len(sequences))} sequences are longer than the {context} tokens the "
            "model knows",
            cure=f"set trainer.max_length: {context}, or data.max_prompt_tokens with "
            "data.over_length: filter",
            examples=_places(subject, over),
        )


def _written_out(subject: Subject) -> Iterable[Finding]:
    """Names of special tokens inside the data are read as those tokens."""
    rows, tokenizer = subject.rows, subject.tokenizer
    assert rows is not None
    names = [name for name in dict.fromkeys(tokenizer.all_special_tokens) if len(name) > 1]
    found: list[str] = []
    for index, row in enumerate(rows):
        text = "\n".join(_strings([value for name, value in row.items() if name != PLACE]))
        hit = next((name for name in names if name in text), None)
        if hit is not None:
            found.append(f"{row.get(PLACE, f'row {index + 1}')}: {hit!r}")
    if found:
        yield Finding(
            "warning",
            f"{share(len(found), len(rows))} rows hold the name of a special token, which becomes that token",
            "the data was rendered with a template already, or quotes one",
            "give prompts and answers without template tokens; the chat template adds them",
            first(found),
        )


def _nothing_trains(subject: Subject, encoding: Encoding) -> Iterable[Finding]:
    idle = [s for s in encoding.sequences if not any(s.trained)]
    if idle:
        yield Finding(
            "error" if len(idle) == len(encoding.sequences) else "warning",
            f"{share(len(idle), len(encoding.sequences))} sequences have no token that trains",
            "the answer is empty, cut off, or masked",
            "raise trainer.max_length, or look at the mask in the token table",
            _places(subject, idle),
        )


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _places(subject: Subject, sequences: Sequence[Encoded]) -> tuple[str, ...]:
    assert subject.rows is not None
    named = []
    for sequence in sequences[:3]:
        row = subject.rows[sequence.row]
        value = row.get(sequence.part) or row.get("completion") or row.get("prompt") or row.get("messages")
        named.append(f"{row.get(PLACE, f'row {sequence.row + 1}')}: {short(value or row.get('text'))}")
    return first(named)

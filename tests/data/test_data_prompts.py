"""Templates, chat rendering and the length policy."""

from __future__ import annotations

import copy
import logging
import string

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from posttrain.config.schema import DataConfig
from posttrain.data.errors import DataError
from posttrain.data.files import Table
from posttrain.data.length import apply_length_policy, count_tokens
from posttrain.data.prompts import apply_pattern, apply_template, render, template_fields

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    """One token per character, and one token in front of every text."""
    vocabulary = {character: i for i, character in enumerate(["[B]", "[U]", *string.printable])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="[B] $A", special_tokens=[("[B]", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="[B]", unk_token="[U]")


@pytest.fixture(scope="module")
def chat(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = CHAT
    return tokenizer


def config(**fields):
    return DataConfig(source="rows.jsonl", **fields)


def templated(template, aliases=None, **columns):
    return apply_template(Table(Dataset.from_dict(columns), "rows.jsonl"), template, aliases or {}).dataset


def test_a_template_fills_columns_and_braces():
    rows = templated("{{{q}}} {n} {nums}: {q}\n", q=["a {n} {q.x} %s"], n=[3], nums=[[1, 2]])
    # what is in the data is never read as a field
    assert rows["prompt"][0] == "{a {n} {q.x} %s} 3 [1, 2]: a {n} {q.x} %s\n"
    assert rows.column_names == ["prompt", "q", "n", "nums"]


def test_a_template_may_use_old_names_and_replace_the_prompt():
    assert templated("{question}!", {"question": "prompt"}, prompt=["a"], answer=["b"]).to_list() == [
        {"prompt": "a!", "answer": "b"}
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{a.b}",
        "{a[0]}",
        "{a!r}",
        "{a:>9}",
        "{a:{b}}",
        "{}",
        "{0}",
        "{a",
        "a}",
        "{a b}",
        "{__class__.x}",
        "no column",
    ],
)
def test_anything_but_a_column_is_refused(template):
    with pytest.raises(DataError, match=r"data\.prompt_template"):
        template_fields(template)


def test_template_columns_must_exist_and_hold_something():
    with pytest.raises(DataError, match=r"needs column 'b'\. Found: a, old"):
        templated("{b}", {"old": "a"}, a=["x"])
    with pytest.raises(DataError, match="row 2: column 'a' of the template holds nothing"):
        templated("{a}", a=["x", None])


@given(st.text(max_size=30))
def test_any_template_text_is_kept_or_refused(text):
    escaped = text.replace("{", "{{").replace("}", "}}")
    try:
        escaped.encode()
    except UnicodeEncodeError:
        return
    assert templated(escaped + "{a}", a=["{x}"])["prompt"][0] == text + "{x}"


def test_without_a_chat_template_text_stays(plain):
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    assert render(rows, plain, config()).to_list() == [{"prompt": "a", "completion": "b"}]


def test_with_one_text_becomes_messages(chat):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"], "answer": ["1", "2"]})
    rendered = render(rows, chat, config(system_prompt="be kind"))
    assert rendered.column_names == ["prompt", "completion", "answer"]
    assert rendered[1] == {
        "prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "b"}],
        "completion": [{"role": "assistant", "content": "y"}],
        "answer": "2",
    }
    assert render(rows, chat, config(chat_template="never")).to_list() == rows.to_list()


def test_messages_stay_as_they_are(chat):
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = Dataset.from_dict({"prompt": [prompt]})
    assert render(rows, chat, config()).to_list() == [{"prompt": prompt}]
    with_system = render(Dataset.from_dict({"messages": [prompt]}), chat, config(system_prompt="s"))
    assert with_system[0]["messages"] == [{"role": "system", "content": "s"}, *prompt]


@pytest.mark.parametrize(
    ("columns", "fields", "has_template", "message"),
    [
        (
            {"prompt": [[{"role": "user", "content": "a"}]]},
            {},
            False,
            "holds messages, but the tokenizer has no chat",
        ),
        ({"prompt": [[{"role": "user", "content": "a"}]]}, {"chat_template": "never"}, True, "is 'never'"),
        ({"messages": [[{"role": "assistant", "content": "a"}]]}, {}, False, "'messages' holds messages"),
        ({"prompt": ["a"]}, {"chat_template": "always"}, False, "is 'always', but the tokenizer has no"),
        ({"prompt": ["a"]}, {"system_prompt": "s"}, False, "system_prompt needs a chat template"),
        ({"text": ["a"]}, {"system_prompt": "s"}, True, "the rows are plain text"),
        (
            {"prompt": [[{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]]},
            {"system_prompt": "s"},
            True,
            "row 1 has a system message of its own",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused(plain, chat, columns, fields, has_template, message):
    with pytest.raises(DataError, match=message):
        render(Dataset.from_dict(columns), chat if has_template else plain, config(**fields))


def test_tokens_are_counted_as_trl_counts_them(plain, chat):
    rows = Dataset.from_dict({"prompt": ["ab", "abcd"] * 200})
    assert count_tokens(rows, plain) == [3, 5] * 200  # with the token in front
    spoken = render(rows, chat, config())
    # <user>ab<assistant> and no token in front: the template writes all there is
    expected = [len("<user>ab<assistant>"), len("<user>abcd<assistant>")] * 200
    assert count_tokens(spoken, chat) == expected


ROWS = {"prompt": ["a" * n for n in (3, 9, 4, 20, 5)], "n": [3, 9, 4, 20, 5]}


def test_within_the_limit_nothing_changes(plain):
    rows = Dataset.from_dict(ROWS)
    kept, report = apply_length_policy(rows, plain, 21, "refuse")
    assert kept is rows
    assert (report.rows, report.over, report.kept, report.longest, report.limit) == (5, 0, 5, 21, 21)
    assert report.mean == pytest.approx((4 + 10 + 5 + 21 + 6) / 5)
    assert report.percentiles == {50: 6, 90: 21, 99: 21}
    assert report.to_dict()["column"] == "prompt"
    assert apply_length_policy(rows, plain, None)[1].over == 0


def test_refuse_names_count_longest_and_the_fix(plain):
    with pytest.raises(DataError) as caught:
        apply_length_policy(Dataset.from_dict(ROWS), plain, 6, "refuse")
    message = str(caught.value)
    assert "2 of 5 rows (40.0%) have a prompt over 6 tokens; the longest has 21" in message
    assert "row 4: 21 tokens" in message
    assert "data.max_prompt_tokens to 21" in message


def test_filter_keeps_whole_rows_and_says_so(plain, caplog):
    with caplog.at_level(logging.WARNING):
        kept, report = apply_length_policy(Dataset.from_dict(ROWS), plain, 6, "filter")
    assert kept["n"][:] == [3, 4, 5]
    assert kept["prompt"][:] == ["aaa", "aaaa", "aaaaa"]
    assert (report.over, report.kept) == (2, 3)
    assert "2 of 5 rows" in caplog.text
    assert "3 rows remain" in caplog.text
    with pytest.raises(DataError, match="Nothing would be left"):
        apply_length_policy(Dataset.from_dict(ROWS), plain, 1, "filter")


def test_a_pattern_without_end_is_stopped_and_its_row_named(monkeypatch):
    monkeypatch.setattr("posttrain.patterns.LIMIT_SECONDS", 0.2)
    rows = Dataset.from_dict({"prompt": ["aab", "a" * 60], "answer": ["x", "y"]})
    assert apply_pattern(Table(rows.select([0]), "rows.jsonl"), "((?:a+)+)b").dataset["prompt"][:] == ["aa"]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: data\.prompt_pattern.* no end after .*a\+ for"):
        apply_pattern(Table(rows, "rows.jsonl"), "((?:a+)+)b")


@pytest.mark.parametrize(("pattern", "kept"), [(": (.*)", "1 {e<=1}\n2"), (r"(1 {e<=1})", "1 {e<=1}")])
def test_a_pattern_keeps_its_group(pattern, kept):
    # the second means something else to other engines than re
    table = Table(Dataset.from_dict({"prompt": ["say: 1 {e<=1}\n2"], "answer": ["3"]}), "rows.jsonl")
    assert apply_pattern(table, pattern).dataset["prompt"][:] == [kept]
    with pytest.raises(
        DataError, match=r"rows\.jsonl, row 1: data\.prompt_pattern .* does not match 'say: 1"
    ):
        apply_pattern(table, r"say: (\d{2})")

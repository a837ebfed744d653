"""Regular expressions of the configuration, searched in data."""

from __future__ import annotations

import re

import pytest
import regex
from datasets import Dataset

from posttrain.data import patterns, prompts
from posttrain.data.errors import DataError
from posttrain.data.files import Table

# nested repetitions that the regex module does not see through either
ENDLESS = r"^((?:a|b|ab)*)$"


def test_a_pattern_keeps_its_group():
    table = Table(
        Dataset.from_dict({"prompt": ["say: 1 +\n2", "x: y: z"], "answer": ["3", "?"]}), "rows.jsonl"
    )
    kept = prompts.apply_pattern(table, ": (.*)").dataset
    assert kept["prompt"] == ["1 +\n2", "y: z"]
    with pytest.raises(
        DataError, match=r"rows\.jsonl, row 2: data\.prompt_pattern .* does not match 'x: y: z'"
    ):
        prompts.apply_pattern(table, r"say: (\d)")


@pytest.mark.parametrize(
    "pattern", [r"(?i)THE (?P<n>\w+)", r"[[a]", r"\bb(?=c)|a{2,}?", "(?x) a  b # c", "."]
)
@pytest.mark.parametrize("text", ["the bc aaa", "[a]", "\n", "ab"])
def test_searches_are_those_of_re(pattern, text):
    for flags in (0, re.DOTALL):
        ours, theirs = patterns.search("a", pattern, text, flags=int(flags)), re.search(pattern, text, flags)
        assert (ours and (ours.span(), ours.groups())) == (theirs and (theirs.span(), theirs.groups()))


def test_an_endless_search_names_row_pattern_and_cure(monkeypatch):
    endless = "ab" * 40 + "c"
    with pytest.raises(TimeoutError):  # not a pattern that the module sees through
        regex.search(ENDLESS, endless, timeout=0.2)
    monkeypatch.setattr(patterns.search, "__kwdefaults__", {"flags": 0, "seconds": 0.2})
    table = Table(Dataset.from_dict({"prompt": ["ab", endless]}), "rows.jsonl")
    with pytest.raises(
        DataError, match=r"rows\.jsonl, row 2: data\.prompt_pattern .* within 0\.2 s .*\(a\+\)\+"
    ):
        prompts.apply_pattern(table, ENDLESS)

"""Columns and rows against the contract of the task."""

from __future__ import annotations

import pytest
from datasets import Dataset

from posttrain.data.contracts import check, rename
from posttrain.data.errors import DataError
from posttrain.data.files import Table

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def table(lines=None, **columns):
    return Table(Dataset.from_dict(columns), "rows.jsonl", lines)


@pytest.mark.parametrize(
    ("task", "columns", "fix"),
    [
        ("rlvr", ("question", "final"), "{prompt: question}"),
        ("rlvr", ("Problem", "gold"), "{prompt: Problem}"),
        ("rlvr", ("promt",), "{prompt: promt}"),
        ("sft", ("conversations",), "{messages: conversations}"),
        ("sft", ("prompt", "response"), "{completion: response}"),
        ("sft", ("instruction", "output"), "{prompt: instruction, completion: output}"),
        ("sft", ("story",), "{text: story}"),
    ],
)
def test_missing_columns_name_found_needed_and_the_renaming(task, columns, fix):
    with pytest.raises(DataError) as caught:
        check(table(**{name: ["x"] for name in columns}), task)
    message = str(caught.value)
    assert f"Found: {', '.join(columns)}. Likely fix: data.columns: {fix}" in message
    assert f"rows.jsonl: task {task!r} needs column" in message
    # the fix works
    pairs = dict(pair.split(": ") for pair in fix.strip("{}").split(", "))
    value = [TALK] if "messages" in pairs else ["x"]
    check(rename(table(**dict.fromkeys(columns, value)), pairs), task)


def test_no_fix_is_invented():
    with pytest.raises(DataError, match=r"Found: zzz\. Rename with data\.columns"):
        check(table(zzz=[1]), "rlvr")


@pytest.mark.parametrize(
    ("task", "columns", "chosen"),
    [
        ("rlvr", {"prompt": ["a"]}, ["prompt"]),
        ("rlvr", {"prompt": [TALK[:1]], "answer": [3]}, ["prompt"]),
        ("rlvr", {"prompt": ["a", "b"], "answer": [None, None]}, ["prompt"]),
        ("sft", {"messages": [TALK], "text": ["a"]}, ["messages"]),
        ("sft", {"prompt": ["a"], "completion": ["b"], "answer": ["c"]}, ["prompt", "completion"]),
        ("sft", {"prompt": ["a"], "answer": ["c"]}, ["prompt", "answer"]),
        ("sft", {"text": ["a"]}, ["text"]),
    ],
)
def test_good_rows_pass(task, columns, chosen):
    assert list(check(table(**columns), task)) == chosen


@pytest.mark.parametrize(
    ("task", "columns", "problem"),
    [
        ("rlvr", {"prompt": ["a", None]}, "column 'prompt' holds nothing (null) where text or a list"),
        ("rlvr", {"prompt": ["a", " \n"]}, "column 'prompt' is empty"),
        ("rlvr", {"prompt": [TALK[:1], []]}, "is an empty list of messages"),
        (
            "rlvr",
            {"prompt": [TALK[:1], [{"role": "user", "content": None}]]},
            "message 1 has no content (found: role)",
        ),
        (
            "rlvr",
            {"prompt": [TALK[:1], [{"role": None, "content": "a"}]]},
            "message 1 has no role (found: content)",
        ),
        ("rlvr", {"prompt": ["a", "b"], "answer": ["1", None]}, "column 'answer' holds nothing"),
        ("rlvr", {"prompt": ["a", "b"], "answer": ["1", ""]}, "column 'answer' holds str ''"),
        ("sft", {"prompt": ["a", "b"], "completion": ["1", None]}, "column 'completion' holds nothing"),
        ("sft", {"text": ["a", ""]}, "column 'text' is empty"),
        ("sft", {"messages": [TALK, TALK[:1]]}, "has no message of the assistant"),
    ],
)
def test_a_bad_row_is_named_by_its_line(task, columns, problem):
    with pytest.raises(DataError) as caught:
        check(table(lines=[4, 9], **columns), task)
    assert f"1 of 2 rows cannot be used for task {task!r}" in str(caught.value)
    assert "\n  line 9: column" in str(caught.value)
    assert problem in str(caught.value)
    assert "line 4" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": [3, 4]}, "holds int 3 where text or a list of messages is needed"),
        ({"prompt": [{"a": 1}, {"a": 2}]}, "holds dict {'a': 1}"),
        ({"prompt": [["a"], ["b"]]}, "message 1 is str 'a', an object with role and content is needed"),
        ({"prompt": ["a", "b"], "answer": [["1"], ["2"]]}, "holds list ['1'] where text or a number"),
        ({"prompt": [[{"from": "human", "value": "a"}]]}, "message 1 has no role (found: from, value)"),
    ],
)
def test_a_column_of_the_wrong_type(columns, problem):
    with pytest.raises(DataError) as caught:
        check(table(**columns), "rlvr")
    count = len(columns["prompt"])
    assert f"{count} of {count} rows" in str(caught.value)
    assert "row 1: column" in str(caught.value)
    assert problem in str(caught.value)


def test_all_bad_rows_are_counted_and_five_are_shown():
    with pytest.raises(DataError) as caught:
        check(table(prompt=["a", *[None] * 30, "b"]), "rlvr")
    assert "30 of 32 rows" in str(caught.value)
    assert "row 2:" in str(caught.value)
    assert "row 6:" in str(caught.value)
    assert "row 7:" not in str(caught.value)
    assert "... and 25 more" in str(caught.value)


@pytest.mark.parametrize("name", ["completion", "completions", "trainer_state", "log_metric", "prompts"])
def test_names_that_trl_uses_itself_are_refused(name):
    with pytest.raises(DataError, match=rf"column '{name}'.*my_{name}: {name}"):
        check(table(**{"prompt": ["a"], name: ["b"]}), "rlvr")


def test_renaming():
    renamed = rename(
        table(question=["q"], answer=["long"], final=["1"]), {"prompt": "question", "answer": "final"}
    )
    assert renamed.dataset.to_list() == [{"prompt": "q", "answer": "1"}]
    assert renamed.notes == ("columns replaced by renaming: answer",)
    swapped = rename(table(prompt=["p"], answer=["a"]), {"prompt": "answer", "answer": "prompt"})
    assert swapped.dataset.to_list() == [{"prompt": "a", "answer": "p"}]
    with pytest.raises(DataError, match=r"column 'qestion'.*Found: question \(did you mean 'question'\?\)"):
        rename(table(question=["q"]), {"prompt": "qestion"})
    with pytest.raises(DataError, match="one column for two names"):
        rename(table(q=["q"]), {"prompt": "q", "answer": "q"})

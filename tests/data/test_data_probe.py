"""Answers in no pair: from a file, or prompts with answers of other prompts."""

import json

import pytest
from datasets import Dataset
from pydantic import ValidationError

from posttrain.config.schema import DataConfig, RunConfig
from posttrain.data import DataError
from posttrain.data.probe import load_probe

PAIRS = Dataset.from_list(
    [{"prompt": f"p{i // 2}", "chosen": f"c{i // 2}", "rejected": f"r{i // 2}"} for i in range(20)]
)


def load(train=PAIRS, **probe):
    return load_probe(DataConfig(source="x/y", probe=probe), train)


def test_answers_of_other_prompts():
    rows = load(size=12, seed=3)
    assert len(rows) == 12
    for number, row in enumerate(rows):
        assert row["completion"][0] == "cr"[number % 2]
        assert row["completion"][1:] != row["prompt"][1:]
    assert load(size=12, seed=3)[:] == rows[:] != load(size=12, seed=4)[:]
    assert len(load()) == 20
    messages = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a"}]
    spoken = Dataset.from_list(
        [
            {"prompt": messages[0], "chosen": messages[1], "rejected": messages[1]},
            {"prompt": [{"role": "user", "content": "q"}], "chosen": messages[1], "rejected": messages[1]},
        ]
    )
    assert load(spoken)[0]["completion"] == messages[1]
    assert load_probe(DataConfig(source="x/y"), PAIRS) is None


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "probe.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "completion": f" {i}", "n": i}) + "\n" for i in range(9))
    )
    assert load(file=str(path)).column_names == ["prompt", "completion"]
    assert len(load(file=str(path))) == 9
    assert len(load(file=str(path), size=4)) == 4


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="asks for 21 rows, there are 20"):
        load(size=21)
    with pytest.raises(DataError, match="every training row has the same"):
        load(PAIRS.select(range(2)))
    path = tmp_path / "probe.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(DataError, match="needs the columns prompt and completion, found text"):
        load(file=str(path))
    with pytest.raises(ValidationError, match="by preference runs only, found task 'reward'"):
        RunConfig(task="reward", data={"source": "x/y", "probe": {}})

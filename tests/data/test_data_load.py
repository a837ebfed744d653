"""Loading: splits that do not overlap, fingerprints that repeat, sources that explain themselves."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.schema import DataConfig, SplitConfig
from posttrain.data import DataError, load_data, load_warm_start
from posttrain.data.generate import distinct_problems
from posttrain.data.load import row_fingerprint

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count, repeat=1):
    return [{"prompt": f"p{i // repeat}", "answer": str(i)} for i in range(count)]


def prompts(dataset):
    return list(dataset["prompt"])


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "rows.jsonl", numbered(100))


def test_held_out_rows_are_taken_out_of_the_training_rows(file):
    data = load_data(DataConfig(source=file), "rlvr")
    assert (len(data.train), len(data.eval)) == (90, 10)
    assert sorted(prompts(data.train) + prompts(data.eval)) == sorted(f"p{i}" for i in range(100))
    assert "10 rows were taken out of the training data" in " ".join(data.describe["notes"])
    again = load_data(DataConfig(source=file), "rlvr")
    assert prompts(again.eval) == prompts(data.eval)
    other = load_data(DataConfig(source=file, eval=SplitConfig(seed=3)), "rlvr")
    assert prompts(other.eval) != prompts(data.eval)


def test_rows_with_one_prompt_stay_on_one_side(tmp_path):
    source = write(tmp_path / "rows.jsonl", numbered(90, repeat=3))
    data = load_data(DataConfig(source=source, eval=SplitConfig(size=30)), "rlvr")
    assert (len(data.train), len(data.eval)) == (60, 30)
    assert not set(prompts(data.train)) & set(prompts(data.eval))


def test_sizes_sample_without_replacement_and_keep_the_order(file):
    data = load_data(
        DataConfig(source=file, train=SplitConfig(size=20, seed=5), eval=SplitConfig(size=7)), "rlvr"
    )
    assert (len(set(prompts(data.train))), len(data.eval)) == (20, 7)
    numbers = [int(p[1:]) for p in prompts(data.train)]
    assert numbers == sorted(numbers)
    assert not set(prompts(data.train)) & set(prompts(data.eval))


def test_nothing_is_held_out_when_not_asked_for(file):
    data = load_data(DataConfig(source=file), "rlvr", hold_out=False)
    assert (len(data.train), data.eval, data.describe["eval_rows"]) == (100, None, None)


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ({"size": 101}, {}, r"data\.train\.size asks for 101 rows, there are 90"),
        ({}, {"size": 100}, "100 held-out rows cannot be taken from 100 rows"),
        ({}, {"size": 101}, "held-out rows cannot be taken from 100 rows|only 100 can be taken"),
    ],
)
def test_impossible_sizes_are_refused(file, train, held_out, message):
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(source=file, train=SplitConfig(**train), eval=SplitConfig(**held_out)), "rlvr")


def test_a_file_of_held_out_rows_is_used_and_overlap_is_announced(tmp_path, file, caplog):
    other = write(
        tmp_path / "test.jsonl", [{"prompt": "p3", "answer": "3"}, {"prompt": "new", "answer": "0"}]
    )
    with caplog.at_level(logging.WARNING):
        data = load_data(DataConfig(source=file, eval=SplitConfig(file=other)), "rlvr")
    assert (len(data.train), prompts(data.eval)) == (100, ["p3", "new"])
    assert "1 of 2 held-out rows have a prompt that is also in the training rows" in caplog.text
    assert "1 of 2 held-out rows" in data.describe["notes"][-1]


def test_sft_takes_the_answer_as_completion_exactly(tmp_path):
    source = write(
        tmp_path / "a.jsonl", [{"question": f"q{i}", "final": f" {i} ", "text": "t"} for i in range(20)]
    )
    data = load_data(DataConfig(source=source, columns={"prompt": "question", "answer": "final"}), "sft")
    assert data.train.column_names == ["prompt", "answer", "completion"]
    assert data.train[0]["completion"] == data.train[0]["answer"]
    assert data.train[0]["completion"].startswith(" ")


def test_the_template_sees_old_and_new_names(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"question": f"q{i}"} for i in range(20)])
    for name in ("question", "prompt"):
        config = DataConfig(source=source, columns={"prompt": "question"}, prompt_template=f"{{{name}}} =")
        assert load_data(config, "rlvr", hold_out=False).train[3]["prompt"] == "q3 ="


def test_fingerprints_depend_on_every_value_and_on_the_split(file):
    data = load_data(DataConfig(source=file), "rlvr")
    assert (
        data.fingerprint
        == load_data(DataConfig(source=file), "rlvr").fingerprint
        == data.describe["fingerprint"]
    )
    changed = data.train.map(lambda row, i: {"answer": "x" if i == 7 else row["answer"]}, with_indices=True)
    assert row_fingerprint(changed, data.eval) != data.fingerprint
    assert row_fingerprint(data.eval, data.train) != data.fingerprint
    assert row_fingerprint(data.train, None) != data.fingerprint
    assert len(data.fingerprint) == 64


GYM = {"source": "reasoning_gym:chain_sum", "params": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}


def test_generated_held_out_questions_are_new_and_replaced_ones_are_counted():
    config = DataConfig(**GYM, train=SplitConfig(size=80), eval=SplitConfig(size=60, seed=1_000_003))
    data = load_data(config, "rlvr")
    assert (len(data.train), len(data.eval)) == (80, 60)
    assert data.train.column_names == ["prompt", "answer", "rg_index", "rg_seed", "rg_size"]
    assert not set(prompts(data.train)) & set(prompts(data.eval))
    assert len(set(prompts(data.eval))) == 60
    repeated = int(data.describe["notes"][1].split()[0])
    assert repeated > 10  # 200 questions in all: many repeat
    assert data.train["rg_index"][:] == list(range(80))
    assert all(seed >= 1_000_003 for seed in data.eval["rg_seed"])


def test_a_task_that_runs_out_of_questions_says_so():
    config = DataConfig(**GYM, train=SplitConfig(size=80), eval=SplitConfig(size=400, seed=1_000_003))
    data = load_data(config, "rlvr")
    assert len(data.eval) < 200
    assert (
        f"has only {len(data.eval)} questions outside the training split, 400 were asked for"
        in data.describe["notes"][-1]
    )
    with pytest.raises(DataError, match="every question of the held-out split is also in the training split"):
        load_data(DataConfig(**GYM, train=SplitConfig(size=5000), eval=SplitConfig(size=5)), "rlvr")


def test_distinct_problems_count_and_order():
    def make(seed, size):
        return [{"question": str((seed + i) % 7), "seed": seed} for i in range(size)]

    rows, repeated = distinct_problems(make, seed=0, size=4, known={"1", "2"})
    assert [(row["question"], row["seed"]) for row in rows] == [("0", 0), ("3", 0), ("4", 4), ("5", 4)]
    assert repeated == 2
    rows, repeated = distinct_problems(make, seed=0, size=6, known={"1", "2"})
    assert [row["question"] for row in rows] == ["0", "3", "4", "5", "6"]


@pytest.mark.parametrize("size", [1, 3, 10])
def test_few_held_out_questions_that_are_all_known_do_not_exhaust_a_task(size):
    """Nine in ten problems of the quickstart's task are in its training split."""
    known = {str(i) for i in range(900)}
    drawn = []

    def make(seed, count):
        for i in range(seed, seed + count):
            drawn.append(i)
            yield {"question": str(i)}

    rows, repeated = distinct_problems(make, seed=0, size=size, known=known)
    assert [row["question"] for row in rows] == [str(900 + i) for i in range(size)]
    assert repeated == 900
    assert len(drawn) == 900 + size  # not one more than needed


def test_warm_start_rows_never_show_a_held_out_question(file):
    template = {"prompt_template": "{question} ->"}
    config = DataConfig(
        **GYM, **template, train=SplitConfig(size=50), eval=SplitConfig(size=40, seed=1_000_003)
    )
    data = load_data(config, "rlvr")
    rows = load_warm_start(data, 500)
    assert set(rows["rg_seed"]) == {1}
    assert 300 < len(rows) < 500
    assert not set(prompts(rows)) & set(prompts(data.eval))
    assert all(row["completion"] == row["answer"] and row["prompt"].endswith(" ->") for row in rows)
    local = load_data(DataConfig(source=file), "rlvr")
    sampled = load_warm_start(local, 30)
    assert len(sampled) == 30
    assert set(prompts(sampled)) <= set(prompts(local.train))
    assert len(load_warm_start(local, 1000)) == 90


@pytest.mark.parametrize("task", ["isomorphic_strings", "polynomial_multiplication", "chain_sum"])
def test_generated_rows_do_not_depend_on_the_hash_seed_of_the_process(task):
    script = (
        "from posttrain.config.schema import DataConfig, SplitConfig\n"
        "from posttrain.data import load_data\n"
        f"config = DataConfig(source='reasoning_gym:{task}', train=SplitConfig(size=5), "
        "eval=SplitConfig(size=5, seed=9))\n"
        "print(load_data(config, 'rlvr').fingerprint)\n"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1
    assert len(prints.pop().strip()) == 64


def test_tasks_without_a_single_answer_have_no_answer_column():
    config = DataConfig(source="reasoning_gym:graph_color", train=SplitConfig(size=3))
    assert load_data(config, "rlvr", hold_out=False).train.column_names == [
        "prompt",
        "rg_index",
        "rg_seed",
        "rg_size",
    ]
    with pytest.raises(DataError, match="task 'sft' needs column"):
        load_data(config, "sft", hold_out=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "reasoning_gym:chain_sun"}, "did you mean chain_sum"),
        ({"source": "reasoning_gym:chain_sum", "params": {"min_term": 1}}, r"did you mean 'min_terms'"),
        ({"source": "reasoning_gym:chain_sum", "params": {"seed": 1}}, r"set data\.train\.seed"),
        (
            {"source": "reasoning_gym:chain_sum", "params": {"min_terms": 5, "max_terms": 2}},
            "max_terms must be >= min_terms",
        ),
        (
            {"source": "reasoning_gym:chain_sum", "train": {"file": "x"}},
            r"data\.train\.file does not go with",
        ),
        ({"source": "some-user/no-such-data"}, r"cannot be loaded from the Hub.*HF_HUB_OFFLINE"),
        ({"source": "a/b/c"}, "neither 'reasoning_gym:TASK', a Hub id"),
        ({"source": "some-user/x", "params": {"nam": "main"}}, r"did you mean 'name'"),
        ({"source": "no/such/file.jsonl"}, "no such file"),
        ({"source": "x.jsonl", "params": {"a": 1}}, r"data\.params are for generated tasks"),
    ],
)
def test_sources_that_do_not_work_say_why(fields, message, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(**fields), "rlvr")


def test_named_splits(monkeypatch):
    from datasets import Dataset, DatasetDict

    from posttrain.data import sources

    def fake(source, **params):
        assert (source, params) == ("user/data", {"name": "main"})
        return DatasetDict(
            {
                "train": Dataset.from_dict({"prompt": [f"a{i}" for i in range(20)]}),
                "test": Dataset.from_dict({"prompt": ["b0", "b1"]}),
                "dev": Dataset.from_dict({"prompt": ["c0"]}),
            }
        )

    monkeypatch.setattr(sources, "load_dataset", fake)
    hub = {"source": "user/data", "params": {"name": "main"}}
    data = load_data(DataConfig(**hub), "rlvr")
    assert (len(data.train), prompts(data.eval)) == (20, ["b0", "b1"])
    data = load_data(
        DataConfig(**hub, train=SplitConfig(split="test"), eval=SplitConfig(split="dev")), "rlvr"
    )
    assert (prompts(data.train), prompts(data.eval)) == (["b0", "b1"], ["c0"])
    data = load_data(DataConfig(**hub, train=SplitConfig(split="test")), "rlvr")
    assert sorted(prompts(data.train) + prompts(data.eval)) == ["b0", "b1"]
    with pytest.raises(
        DataError, match=r"no split 'tset' \(did you mean 'test'\?\); it has: train, test, dev"
    ):
        load_data(DataConfig(**hub, eval=SplitConfig(split="tset")), "rlvr")


def test_a_local_folder_is_loaded_like_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", numbered(10))
    write(folder / "test.jsonl", [{"prompt": "t", "answer": "0"}])
    data = load_data(DataConfig(source=str(folder)), "rlvr")
    assert (len(data.train), prompts(data.eval)) == (10, ["t"])


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("gsm8k/train.jsonl", {"prompt": "question", "answer": "final"}, 7473),
        ("countdown/train.jsonl", {}, 4000),
        ("tinystories_pairs/train.jsonl", {}, 570),
    ],
)
def test_shared_files_load(name, columns, rows):
    if not (SHARED / name).is_file():
        pytest.skip("shared/data is not beside the repository")
    data = load_data(DataConfig(source=str(SHARED / name), columns=columns), "rlvr")
    assert len(data.train) + len(data.eval) == rows
    assert not set(prompts(data.train)) & set(prompts(data.eval))

"""Whatever a data file holds, it becomes rows or a DataError that says what is wrong; it is left alone."""

from __future__ import annotations

import gzip
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_data import hostile_data_file
from fuzz_judge import fingerprint, invoke, limited
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.schema import DataConfig
from posttrain.data.errors import DataError
from posttrain.data.load import load_data

seeds = st.integers(0, 2**32).map(random.Random)
COLUMNS = [{}, {"prompt": "question"}, {"prompt": "answer"}, {"answer": "prompt", "prompt": "answer"}]


@settings(max_examples=100, deadline=None)
@given(
    rng=seeds,
    task=st.sampled_from(["rlvr", "sft", "preference", "reward"]),
    columns=st.sampled_from(COLUMNS),
    template=st.sampled_from([None, None, "{prompt}!", "{nope}"]),
    places=st.booleans(),
)
def test_any_file(rng, task, columns, template, places):
    with tempfile.TemporaryDirectory() as folder:
        path = hostile_data_file(rng, Path(folder))
        before = fingerprint(Path(folder))
        config = DataConfig(source=str(path), columns=columns, prompt_template=template)
        said = "rows"
        try:
            with limited():
                assert len(load_data(config, task, places=places).train) >= 1
        except DataError as error:
            said = str(error)
        assert said.strip()
        assert len(said) < 5000
        assert fingerprint(Path(folder)) == before


def refused(path, task="sft", **options):
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(source=str(path)), task, **options)
    return str(caught.value)


def test_numbers_of_more_digits_than_python_reads(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}\n")
    assert "line 2: a number has too many digits" in refused(path)
    other = tmp_path / "rows.json"
    other.write_text('[{"text": "b", "n": ' + "9" * 5000 + "}]")
    assert "too many digits" in refused(other)


def test_values_nested_deeply(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "x": ' + "[" * 300 + "]" * 300 + "}\n")
    assert "nested too deeply" in refused(path)


def test_a_csv_of_nothing_but_a_mark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert "column names must be there" in refused(path)
    path.write_bytes(b"\xef\xbb\xbf")
    assert "column names must be there" in refused(path)


def test_parquet_columns_of_one_name_and_of_strange_types(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["a", "b"], ["c", "d"]], names=["text", "text"]), path)
    assert "several columns are called 'text'" in refused(path)
    strange = pa.nulls(2, pa.map_(pa.string(), pa.int32()))
    pq.write_table(pa.table([["a", "b"], strange], names=["text", "x"]), path)
    assert "a column cannot be used" in refused(path)


def test_a_column_of_our_own_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "posttrain_place": "b"}\n')
    assert "'posttrain_place' is written here" in refused(path, places=True)


def test_a_packed_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert "not UTF-8" in refused(path)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_all_cut_before_their_answer(tmp_path, packing):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "0 + 1 =", "completion": " 1"}\n' * 2)
    (tmp_path / "run.yaml").write_text(
        f"task: sft\nmodel: {{path: 'embedded:char-llama'}}\ndata: {{source: {tmp_path}/rows.jsonl}}\n"
        f"run_dir: {tmp_path}/run\nthreads: 1\nevaluate: null\nexport: null\n"
        f"trainer: {{max_length: 4, max_steps: 1, packing: {packing}, save_strategy: 'no'}}\n"
    )
    assert invoke("check", "--deep", tmp_path / "run.yaml").code == 2
    answer = invoke("train", tmp_path / "run.yaml")
    assert answer.code == 2
    assert "none of 2 rows has a token to learn, because trainer.max_length = 4" in answer.output

"""Local files: every kind of broken file is refused with the file, the line and the fix."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.errors import DataError
from posttrain.data.files import read_file

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b\u2028c", "n": 2}]


def write(tmp_path, name, content):
    path = tmp_path / name
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def test_the_four_kinds_give_the_same_rows(tmp_path):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    files = [
        write(tmp_path, "a.jsonl", "\ufeff" + lines + "\n\n"),
        write(tmp_path, "a.json", json.dumps(ROWS)),
    ]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in [*files, tmp_path / "a.parquet"]:
        assert read_file(path).dataset.to_list() == ROWS
    table = read_file(write(tmp_path, "a.csv", 'prompt,n\r\na,1\r\n"b\u2028c",2\r\n'))
    assert table.dataset.to_list() == [{"prompt": "a", "n": "1"}, {"prompt": "b\u2028c", "n": "2"}]


def test_a_key_that_only_later_rows_have_is_kept(tmp_path):
    table = read_file(write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2, "b": "x"}\n'))
    assert table.dataset.to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_lines_are_counted_in_the_file(tmp_path):
    table = read_file(write(tmp_path, "a.jsonl", '\n{"a": 1}\n\n\n{"a": 2}\n'))
    assert [table.where(0), table.where(1)] == ["line 2", "line 5"]
    table = read_file(write(tmp_path, "a.csv", 'a,b\n"two\nlines",1\nx,2\n'))
    assert [table.where(0), table.where(1)] == ["line 2", "line 4"]


def test_long_csv_cells_are_read(tmp_path):
    assert (
        len(read_file(write(tmp_path, "a.csv", "a,b\n" + "x" * 300_000 + ",1\n")).dataset[0]["a"]) == 300_000
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", " \n\n", "the file is empty"),
        ("a.json", "[]", "the file has no rows"),
        ("a.csv", "a,b\n", "the file has no rows"),
        ("a.txt", "x", r"unknown kind of file; one of \.jsonl, \.json, \.csv, \.parquet"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": "cut of',
            r"1 lines are not JSON objects\n  line 2: Unterminated string",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n[1]\n3\nnull',
            r"3 lines.*\n  line 2: a list .*\n  line 3: a number .*\n  line 4: null",
        ),
        ("a.jsonl", '[{"a": 1}]', r"a file with one list of objects is \.json"),
        ("a.jsonl", "{" * 3 + '"a": ' + "[" * 100_000, "line 1"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"line 2: not JSON \(one object per line is \.jsonl\)"),
        ("a.json", '{"a": 1}', "an object where a list of objects is needed"),
        ("a.json", '[{"a": 1}, 2]', "row 2: a number where an object is needed"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', r"line 2: byte 0xe9 is not UTF-8.*iconv"),
        ("a.csv", '"a"\n'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", '{"a": "x"}\n{"a": 1}\n', r"line 2: column 'a' holds a number, but text in line 1"),
        (
            "a.jsonl",
            '{"a": true}\n{"a": null}\n{"a": 1}\n',
            "line 3: column 'a' holds a number, but true/false",
        ),
        ("a.jsonl", '{"a": [1]}\n{"a": {"b": 1}}\n', "line 2: column 'a' holds an object, but a list"),
        ("a.jsonl", '{"a": "\\ud800"}\n', "line 1: column 'a' has a lone surrogate"),
        ("a.jsonl", '{"a": 99999999999999999999999}\n', "cannot be made into a table"),
        ("a.jsonl", '{"a": [1, "x"]}\n', "cannot be made into a table"),
        (
            "a.csv",
            "a,b\n1\n2,3\n4,5,6\n",
            r"2 lines.*\n  line 2: 1 cells, the header has 2\n  line 4: 3 cells",
        ),
        ("a.csv", 'a,b\n1,"open\n', "line .*: not CSV"),
        ("a.csv", "a,a\n1,2\n", r"column names must be there and differ, found \['a', 'a'\]"),
        ("a.parquet", b"PAR1 no", "not a readable parquet file"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_file(write(tmp_path, name, content))
    assert name in str(caught.value)


def test_only_the_first_problems_are_listed(tmp_path):
    with pytest.raises(DataError, match=r"40 lines are not JSON objects") as caught:
        read_file(write(tmp_path, "a.jsonl", "x\n" * 40))
    assert "... and 35 more" in str(caught.value)
    assert "line 6" not in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file.*train\.jsonl"):
        read_file(tmp_path / "trian.jsonl")

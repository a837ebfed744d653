"""What may be written where, and that nothing of an earlier run is lost."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from posttrain.run.directory import (
    RunDirectory,
    RunError,
    append_json_lines,
    keep_json_lines,
    read_json_lines,
    write_json,
)


def used(path, marker="old"):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("task: rlvr\n")
    (path / "metrics.jsonl").write_text(marker)
    return RunDirectory(path)


def test_a_new_folder_is_created_with_its_parents(tmp_path):
    run = RunDirectory(tmp_path / "a b" / "ü" / "run")
    run.begin(resume=False, overwrite=False)
    assert run.root.is_dir()


@pytest.mark.parametrize(
    ("resume", "overwrite", "message"),
    [
        (False, False, "already holds a run.*--resume.*--overwrite.*run_dir="),
        (True, False, None),
        (False, True, None),
    ],
)
def test_a_used_folder_needs_a_word(tmp_path, resume, overwrite, message):
    run = used(tmp_path / "run")
    if message:
        with pytest.raises(RunError, match=message):
            run.begin(resume=resume, overwrite=overwrite)
    else:
        run.begin(resume=resume, overwrite=overwrite)
    assert run.metrics.read_text() == "old"  # begin() touches nothing


def test_nothing_to_resume(tmp_path):
    with pytest.raises(RunError, match=r"nothing to resume.*no config\.yaml.*without --resume"):
        RunDirectory(tmp_path / "run").begin(resume=True, overwrite=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds files but no run"):
        RunDirectory(tmp_path).begin(resume=False, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot be used.*Choose another folder"):
        RunDirectory(tmp_path / "file" / "run").begin(resume=False, overwrite=False)


def test_a_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(RunError, match="not writable"):
        RunDirectory(tmp_path / "run").begin(resume=False, overwrite=False)


def test_the_replaced_run_is_kept_once(tmp_path):
    for marker in ("first", "second"):
        run = RunDirectory(tmp_path / "run")
        if marker == "second":
            run.begin(resume=False, overwrite=True)
            run.move_aside()
            assert list(run.root.iterdir()) == []
        else:
            used(tmp_path / "run", marker)
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "metrics.jsonl").write_text("second")
    assert (tmp_path / "run.old" / "metrics.jsonl").read_text() == "first"
    run.move_aside()
    assert (tmp_path / "run.old" / "metrics.jsonl").read_text() == "second"


def test_overwriting_does_not_delete_a_folder_that_happens_to_be_called_old(tmp_path):
    run = used(tmp_path / "run")
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.old" / "photo.jpg").write_text("x")
    with pytest.raises(RunError, match=r"run\.old.*is no run: move it away"):
        run.begin(resume=False, overwrite=True)
    assert (tmp_path / "run.old" / "photo.jpg").exists()


def test_one_process_holds_the_folder_and_its_death_frees_it(tmp_path):
    run = used(tmp_path / "run")
    code = (
        "import sys, time; from pathlib import Path; from posttrain.run.directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is writing to"), run.held():
            pass
    finally:
        holder.kill()
        holder.wait()
    with run.held() as hold_again:
        run.move_aside()
        hold_again()
        with pytest.raises(RunError, match="another process"), run.held():
            pass
    with run.held():
        pass


def test_json_lines_survive_odd_values_and_a_torn_end(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": math.nan, "list": [math.inf, 1.5], "numpy": np.float32(0.25)},
        {"step": 2, "text": "line\u2028separator \ud800 ü\n"},
    ]
    append_json_lines(path, rows)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    found = read_json_lines(path)
    assert found == [
        {"step": 1, "loss": None, "list": [None, 1.5], "numpy": 0.25},
        {"step": 2, "text": "line\u2028separator \ud800 ü\n"},
    ]
    kept = keep_json_lines(path, lambda row: row["step"] >= 2)
    assert kept == found[1:] == read_json_lines(path)
    assert path.read_text().count("\n") == 1


def test_written_json_is_strict_and_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": math.nan, "y": np.array([1.0, math.inf]), "z": tmp_path})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": None, "y": [1.0, None], "z": str(tmp_path)}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_damaged_lines_are_kept_beside_what_goes_on(tmp_path):
    path = tmp_path / "completions.jsonl"
    for text, name in (('{"step": 1}\n{"st', None), ('{"step": 1}\n{}\n', ""), ('[]\n{"step": 1}\n', "1")):
        path.write_text(text)
        assert keep_json_lines(path, lambda row: row["step"] == 1) == [{"step": 1}]
        assert path.read_text() == '{"step": 1}\n'
        copies = sorted(tmp_path.glob("*.damaged*"))
        assert len(copies) == {None: 0, "": 1, "1": 2}[name]
        assert name is None or (tmp_path / f"completions.jsonl.damaged{name}").read_text() == text

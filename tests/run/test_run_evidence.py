"""The scripts beside the evidence configurations: what a comparison logged last, and the sums."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "evidence"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "comparison.json").write_text(json.dumps({"arms": {"a": []}, "seeds": 2}))
    # six logs each: the last third is two of them
    for seed, values in enumerate(([0, 0, 0, 0, 0.5, 0.7], [0, 0, 0, 0, 0.58, 0.6])):
        folder = tmp_path / "a" / f"seed-{seed}"
        folder.mkdir(parents=True)
        rows = [{"step": 5 * (i + 1), "rewards/x/mean": value} for i, value in enumerate(values)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_misses_and_means_of_the_last_third(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("thresholds")
    script.main([str(out), "--equal", "x=0.6", "--at-least", "x=0.58", "--json"])
    found = json.loads(capsys.readouterr().out)
    equal, lower = found["x = 0.6"]["a"], found["x >= 0.58"]["a"]
    assert equal["seed_means"] == pytest.approx([0.6, 0.59])
    assert (equal["lowest"], equal["highest"]) == (0.5, 0.7)
    assert (equal["largest_miss"], equal["seeds_held"]) == (pytest.approx(0.1), 1)
    assert (lower["largest_miss"], lower["seeds_held"]) == (pytest.approx(0.08), 1)
    script.main([str(out), "--equal", "x=0.6"])
    assert "held within 0.05: 1/2" in capsys.readouterr().out


def test_a_reward_that_was_not_logged_is_refused_by_name(out: Path) -> None:
    script = load("thresholds")
    with pytest.raises(SystemExit, match="no reward 'y'; it has x"):
        script.main([str(out), "--equal", "y=0.6"])


def test_last_third_with_differences_paired_by_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"arms": {"a": [], "b": [], "c": []}, "seeds": 2}))
    logs = {"a": ([9, 9, 9, 9, 1, 3], [7, 9, 9, 9, 4, 4]), "b": ([0, 0, 0, 0, 3, 3], [0, 0, 0, 0, 4, 6])}
    for arm, seeds in {**logs, "c": ([], [])}.items():
        for seed, values in enumerate(seeds):
            folder = tmp_path / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            rows = [{"step": 5 * (i + 1), "loss": 1.0, "x": value} for i, value in enumerate(values)]
            rows.append({"step": 40, "loss": 1.0})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = load("last_third")
    script.main([str(tmp_path), "--metric", "x", "--json"])
    found = json.loads(capsys.readouterr().out)["x"]
    assert found.keys() == {"a", "b"}  # c did not log it
    assert (found["a"]["first"], found["a"]["seed_means"]) == (8.0, [2.0, 4.0])
    assert (found["b"]["seed_means"], found["b"]["difference"]["value"]) == ([3.0, 5.0], 1.0)
    assert "difference" not in found["a"]
    script.main([str(tmp_path), "--metric", "x"])
    assert "seeds 3.000 5.000  difference 1.000" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no run in .* logged 'y'"):
        script.main([str(tmp_path), "--metric", "y"])


def test_sums_are_distinct_right_and_the_same_every_time(tmp_path: Path) -> None:
    script = load("sums")
    for name in ("one", "two"):
        script.main([str(tmp_path / name), "--rows", "300", "--terms", "3"])
    text = (tmp_path / "one").read_text()
    assert text == (tmp_path / "two").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["prompt"] for row in rows}) == 300
    for row in rows:
        total = sum(int(term) for term in re.findall(r"[+-]?\d", row["prompt"]))
        steps = [line.partition("=") for line in row["answer"].splitlines()]
        assert all(sum(map(int, re.findall(r"[+-]?\d+", left))) == int(right) for left, _, right in steps)
        assert (len(steps), steps[-1][2], row["final"]) == (2, str(total), str(total))


def test_more_sums_than_there_are_easily_found_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="more than half of the 162 sums"):
        load("sums").main([str(tmp_path / "out"), "--rows", "100", "--terms", "2"])

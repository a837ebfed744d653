"""The table of thresholds, on a comparison written by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "scripts" / "evidence" / "thresholds.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("thresholds", FILE)
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


def test_misses_and_means_of_the_last_third(
    script: ModuleType, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([str(out), "--equal", "x=0.6", "--at-least", "x=0.58", "--json"])
    found = json.loads(capsys.readouterr().out)
    equal, lower = found["x = 0.6"]["a"], found["x >= 0.58"]["a"]
    assert equal["seed_means"] == pytest.approx([0.6, 0.59])
    assert (equal["lowest"], equal["highest"]) == (0.5, 0.7)
    assert (equal["largest_miss"], equal["seeds_held"]) == (pytest.approx(0.1), 1)
    assert (lower["largest_miss"], lower["seeds_held"]) == (pytest.approx(0.08), 1)
    script.main([str(out), "--equal", "x=0.6"])
    assert "held within 0.05: 1/2" in capsys.readouterr().out


def test_a_reward_that_was_not_logged_is_refused_by_name(script: ModuleType, out: Path) -> None:
    with pytest.raises(SystemExit, match="no reward 'y'; it has x"):
        script.main([str(out), "--equal", "y=0.6"])

"""LaTeX bombs and odd gold answers: a verdict each, in time, and none of them is correct."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_answers import BOMBS, GOLD
from fuzz_judge import limited

from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.registry import VerifierSpec

ROW = {"answer": "7", "nums": [1, 2, 4], "target": 7}


@pytest.fixture(scope="module", params=["math", "expression", "format"])
def pool(request):
    pool = VerifierPool(VerifierSpec(request.param), deadline=1.0, memory_gib=4.0)
    yield pool
    pool.close()


def test_bombs(pool):
    with limited():
        verdicts = pool.verify(BOMBS, [ROW] * len(BOMBS))
    assert len(verdicts) == len(BOMBS)
    if pool.spec.name != "format":
        assert not any(verdict.status == "correct" for verdict in verdicts)
    assert pool.verify(["\\boxed{7}"], [ROW])[0].status != "timeout"  # it goes on


def test_odd_gold_answers(pool):
    with limited():
        verdicts = pool.verify(["\\boxed{7}"] * len(GOLD), [ROW | {"answer": gold} for gold in GOLD])
    assert len(verdicts) == len(GOLD)
    if pool.spec.name == "math":
        right = [gold for gold, verdict in zip(GOLD, verdicts, strict=True) if verdict.status == "correct"]
        assert right == [7, "7"]


def test_the_script_runs():
    script = Path(__file__).parents[2] / "scripts" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, script, "--cases", "6"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 cases" in done.stdout

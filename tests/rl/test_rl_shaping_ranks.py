"""Constrained rewards and GARDO do the same however 32 rows are split over micro-steps and ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def run(tmp_path, name, *, per_device, accumulation=1, ranks=1):
    out = tmp_path / name / "result.json"
    out.parent.mkdir()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        *launcher,
        str(TESTS / "rl" / "shaping_ranks.py"),
        str(out),
        str(per_device),
        str(accumulation),
    ]
    path = os.pathsep.join([str(TESTS), str(TESTS / "rl"), str(TESTS.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]
    return json.loads(out.read_text()), states


def same(left, right):
    assert len(left["logs"]) == 6
    for a, b in zip(left["logs"], right["logs"], strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=5e-6)
    assert left["weights"] == pytest.approx(right["weights"], abs=3e-4)


@pytest.mark.slow
def test_micro_steps_and_ranks_change_nothing(tmp_path):
    one, (state,) = run(tmp_path, "one", per_device=32)
    split, (split_state,) = run(tmp_path, "split", per_device=8, accumulation=4)
    two, states = run(tmp_path, "two", per_device=16, ranks=2)
    same(split, one)
    same(two, one)
    # everything was at work: the KL after the copy is 0 again, rows are gated, distances differ
    kl = [row[6] for row in one["logs"]]
    assert kl[3] < 1e-7 < 1e-5 < kl[2]
    assert all(0.03 < row[4] < 0.5 and row[8] != 1 for row in one["logs"])
    # both ranks hold the same state, to the last bit; one process the same to rounding
    assert states[0] == states[1]
    assert states[0][0]["multipliers"] == pytest.approx(state[0]["multipliers"], abs=1e-9)
    assert split_state[0] == state[0]
    assert states[0][1] == state[1] == split_state[1]
    assert states[0][2] == state[2] == {"steps": 3, "stale": True}

"""The same 32 rows a step give the same run however they are split over micro-steps and ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def run(tmp_path, name, *, per_device, accumulation=1, ranks=1, loss_type="dapo"):
    out = tmp_path / name / "result.json"
    out.parent.mkdir()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        *launcher,
        str(TESTS / "rl" / "ranks.py"),
        str(out),
        str(per_device),
        str(accumulation),
        loss_type,
    ]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def same(left, right):
    for a, b in zip(left["logs"], right["logs"], strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-6)
    assert left["weights"] == pytest.approx(right["weights"], abs=1e-4)
    assert left["logs"][-1][3] > 1e-4  # the drift is not zero, so the weights were at work


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo"])
def test_four_times_eight_is_thirty_two(loss_type, tmp_path):
    once = run(tmp_path, "once", per_device=32, loss_type=loss_type)
    split = run(tmp_path, "split", per_device=8, accumulation=4, loss_type=loss_type)
    same(split, once)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    one = run(tmp_path, "one", per_device=32)
    two = run(tmp_path, "two", per_device=16, ranks=2)
    same(two, one)

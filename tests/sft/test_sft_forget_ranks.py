"""Unlearning losses, SGTM and the statistics of SSD on two ranks equal those of one with the same rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    script = str(TESTS / "sft" / "forget_ranks.py")
    path = os.pathsep.join([str(TESTS), str(TESTS / "sft"), str(TESTS.parent)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable, script, str(tmp_path), "1"], [*launch, script, str(tmp_path), "2"]):
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("unlearn", "sgtm", "ssd"):
        one, two = (torch.load(tmp_path / f"{name}{ranks}.pt") for ranks in (1, 2))
        for key, value in one["weights"].items():
            torch.testing.assert_close(
                two["weights"][key], value, rtol=1e-3, atol=0 if name == "ssd" else 2e-5, msg=f"{name} {key}"
            )
        for left, right in zip(one["logs"][:3], two["logs"][:3], strict=True):
            for key in left:
                if key in ("loss", "grad_norm") or key.startswith(name):
                    assert right[key] == pytest.approx(left[key], rel=2e-3), (name, key)

"""A preference run on two ranks is that of one with the same pairs: weights, losses, gauges and probe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    script = str(TESTS / "preference" / "preference_ranks.py")
    path = os.pathsep.join([str(TESTS), str(TESTS / "preference"), str(TESTS.parent)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable, script, str(tmp_path), "1"], [*launch, script, str(tmp_path), "2"]):
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-3, atol=2e-5, msg=key)
    seen = set()
    for left, right in zip(one["logs"], two["logs"], strict=True):
        assert left.keys() == right.keys()
        for key in left:
            seen.add(key)
            assert right[key] == pytest.approx(left[key], rel=2e-3, abs=2e-5), key
    assert {"rpo/nll", "shift/chosen", "eval_saturated", "drop/rate", "probe/kl_forward"} <= seen

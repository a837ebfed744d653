"""Streams of sharded weights: the same tensors as from a model in one piece, on every rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_fsdp2_weights_are_gathered_one_at_a_time_and_merged_the_same(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(
        map(str, [TESTS, TESTS / "rollout", TESTS.parent, os.environ.get("PYTHONPATH", "")])
    )
    done = subprocess.run(
        [*launcher, str(TESTS / "rollout" / "stream_ranks.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert list(first) == list(second)
    for kind in first:
        support.assert_same(first[kind], second[kind])

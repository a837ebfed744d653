"""Two gloo ranks: a resume gives what an uninterrupted run gives, bit for bit, in later epochs too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def run(kind, folder, stop, mode="new", ranks=2):
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(TESTS / "checkpointing" / "ranks.py"), kind, str(folder), str(stop), mode]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )


def result(kind, folder, stop, mode="new"):
    done = run(kind, folder, stop, mode)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "k"), [("grpo", 10), ("sft", 9)])
def test_two_ranks_resume_bit_exact(kind, k, tmp_path):
    """Epochs have 6 steps, so 9 and 10 lie in the second; GRPO generates every 3, so 10 lies between."""
    whole = result(kind, tmp_path / "whole", 0)
    result(kind, tmp_path / "cut", k)
    resumed = result(kind, tmp_path / "cut", 0, "resume")
    assert resumed == whole
    assert len(whole["logs"]) >= 7


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_between_generations_only(tmp_path):
    assert run("grpo", tmp_path / "between", 4).returncode == 0
    refused = run("grpo", tmp_path / "between", 0, "resume", ranks=1)
    assert refused.returncode != 0
    assert "world_size: 2 then, 1 now" in refused.stderr
    assert run("grpo", tmp_path / "boundary", 6, ranks=1).returncode == 0
    grown = run("grpo", tmp_path / "boundary", 0, "resume", ranks=2)
    assert grown.returncode == 0, grown.stderr[-3000:]
    logs = json.loads((tmp_path / "boundary" / "result.json").read_text())["logs"]
    assert len(logs) == 7

"""The check for owners of a GPU: its code runs at toy size, and says what failed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


def check(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_a_dry_run():
    report = json.loads(check("--dry-run").stdout)
    parts = report["parts"]
    assert list(parts) == ["kernels", "tests", "grpo", "dpo", "sft", "vllm", "processes"]
    assert {part["state"] for name, part in parts.items() if name != "vllm"} == {"done"}, parts
    assert report["versions"]["trl"]
    assert report["hardware"]
    values = parts["kernels"]["result"]
    assert 0 < values["float32"]["score/kl/dweight"] < 1e-4 < values["bfloat16"]["score/kl/dweight"] < 2e-2
    (case,) = parts["grpo"]["result"]["results"]
    assert case["arms"]["ace+spine+lp_reg"]["seconds"]["to_trl"]["median_ratio"] > 0
    assert parts["dpo"]["result"]["time"]["sparse_po"]["seconds"] > 0
    assert parts["sft"]["result"]["time"]["packed"]["seconds"] > 0
    assert parts["processes"]["result"]["largest_difference"] < 1e-4


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("has one")
    assert "there is no CUDA device here" in check(code=2).stderr
    assert "unknown part kernel; there are kernels" in check("--dry-run", "--only", "kernel", code=2).stderr

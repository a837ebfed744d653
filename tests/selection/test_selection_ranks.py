"""A selection on two ranks, plain and sharded, against one process with twice the batch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("selection_ranks.py")

pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (pip install '.[deepspeed]')"
)


def run(folder, backend, launcher):
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), backend],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def zero(folder, stage):
    path = folder / "accelerate.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "DEEPSPEED",
                "use_cpu": True,
                "num_processes": 2,
                "num_machines": 1,
                "machine_rank": 0,
                "main_process_port": 0,
                "mixed_precision": "no",
                "deepspeed_config": {
                    "zero_stage": stage,
                    "gradient_accumulation_steps": "auto",
                    "zero3_save_16bit_model": stage == 3,
                },
            }
        )
    )
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]


DDP = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def check(folder, tolerance=1e-5):
    alone, first, second = (
        json.loads((folder / f"rank{name}.json").read_text()) for name in ("0of1", "0of2", "1of2")
    )
    assert first["weights"] == second["weights"]
    assert first["plan"] == second["plan"] == alone["plan"]
    for one in (alone, first):
        assert one["strays"] == 0
        assert 0.9 * one["selected"] < one["moved"] <= one["selected"]
    for name, values in alone["weights"].items():
        assert first["weights"][name] == pytest.approx(values, abs=tolerance), name
    return first


@pytest.mark.parametrize("backend", ["freeze", "packed", "masked"])
def test_two_ranks_train_as_one_process(backend, tmp_path):
    run(tmp_path, backend, [sys.executable])
    run(tmp_path, backend, DDP)
    assert check(tmp_path)["ranks"] == 2


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "backend"), [(1, "packed"), (2, "freeze"), (2, "packed"), (3, "freeze"), (3, "composed")]
)
def test_sharded_by_deepspeed(stage, backend, tmp_path):
    run(tmp_path, backend, [sys.executable])
    run(tmp_path, backend, zero(tmp_path, stage))
    assert check(tmp_path)["sharded"]

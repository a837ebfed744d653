"""The bar: one process, two DDP ranks, ZeRO-2 and ZeRO-3 give the same 20-step runs at equal global batch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch_runs import RUNS, STEPS, difference

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("launch_runs.py")

pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (pip install '.[deepspeed]')"
)


def launch(folder: Path, config: str | None, *arguments: str, timeout: int = 500) -> None:
    """Run the script as it stands, or on two processes under one of the configurations."""
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable]
    if config is not None:
        path = ROOT / "configs" / "accelerate" / f"{config}.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(path)]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    launch(folder, None)
    results = {name: torch.load(folder / f"{name}.pt") for name in RUNS}
    for result in results.values():
        assert result["mode"] == "NO"
        assert len(result["losses"]) == STEPS
        assert result["losses"][-1] != pytest.approx(result["losses"][0], rel=1e-3)
    return results


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ("cpu_ddp", "MULTI_CPU"),
        pytest.param("cpu_zero2", "DEEPSPEED", marks=needs_deepspeed),
        pytest.param("cpu_zero3", "DEEPSPEED", marks=needs_deepspeed),
    ],
)
def test_two_processes_are_one(config, mode, alone, tmp_path):
    launch(tmp_path / config, config)
    for name, expected in alone.items():
        found = torch.load(tmp_path / config / f"{name}.pt")
        assert found["mode"] == mode
        losses, weights = difference(expected, found)
        print(f"{config} {name}: losses {losses:.1e}, weights {weights:.1e}")
        assert losses < 1e-5, (name, losses)
        assert weights < 1e-4, (name, weights)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), name

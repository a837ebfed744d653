"""Two ranks with an engine each: DDP, FSDP2 and ZeRO-3 keep both engines up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
from test_vllm import PYTHON, ROOT
from test_vllm import pytestmark as pytestmark

from posttrain.models.embedded import build_model, build_tokenizer

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ZERO3 = (
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "configs" / "accelerate" / "cpu_zero3.yaml"),
)
LAUNCHES = [
    pytest.param(TORCHRUN, {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}, id="torchrun"),
    pytest.param(
        ZERO3,
        {"zero3": "DEEPSPEED"},
        id="deepspeed",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("deepspeed") is None,
            reason="needs deepspeed (pip install '.[deepspeed]')",
        ),
    ),
]


@pytest.mark.parametrize(("launcher", "modes"), LAUNCHES)
def test_each_rank_has_an_engine_that_follows(launcher, modes, tmp_path: Path) -> None:
    start = tmp_path / "start"
    build_model(1, hidden_size=64, layers=2, heads=2, intermediate_size=96).save_pretrained(start)
    build_tokenizer().save_pretrained(start)
    script = str(Path(__file__).parent / "vllm_ranks.py")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [PYTHON, "-m", *launcher, script, str(tmp_path), *modes],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, mode in modes.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["mode"] == mode
        assert len(found["gap"]) == 4
        assert max(found["gap"]) < 1e-5
        assert found["share"][0] == 1.0
        assert max(found["share"][1:]) < 0.4

"""posttrain train and a recipe under accelerate, with the shipped configurations, on two real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_jobs import STEPS, assert_same, json_lines, timeless, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
SMALL = {
    "warm_start": {"trainer": {"max_steps": 4, "per_device_train_batch_size": 8}},
    "trainer": {"per_device_train_batch_size": 8, "save_total_limit": 3},
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (pip install '.[deepspeed]')"
)
sharded = [pytest.param(name, marks=needs_deepspeed) for name in ("cpu_zero2", "cpu_zero3")]


def accelerate(config: str, *command: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    done = subprocess.run(
        [*launcher, str(CONFIGS / f"{config}.yaml"), *map(str, command)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def weights(folder: Path) -> dict:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", *sharded])
def test_train_ends_with_a_plain_model_and_resumes_exactly(config, tmp_path):
    """Warm start, evaluation, training, evaluation, export; then again from the third step."""
    run = tmp_path / "run"
    path = write_config(tmp_path, run, SMALL)
    accelerate(config, "-m", "posttrain", "train", path)
    rows = json_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1), STEPS]
    assert json.loads((run / "manifest.json").read_text())["launch"]["processes"] == 2
    assert (run / "report.html").exists()
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    last = weights(run / "checkpoints" / f"checkpoint-{STEPS}")
    state = exported.state_dict()
    assert state.keys() == last.keys()
    assert_same({name: state[name] for name in last}, last)

    again = tmp_path / "again"
    shutil.copytree(run, again)
    for folder in ("checkpoints/checkpoint-6", f"checkpoints/checkpoint-{STEPS}", "export"):
        shutil.rmtree(again / folder)
    accelerate(config, "-m", "posttrain", "train", write_config(tmp_path / "b", again, SMALL), "--resume")
    assert_same(weights(again / "export"), weights(run / "export"))
    assert timeless(json_lines(again / "metrics.jsonl")) == timeless(rows)


@pytest.mark.slow
def test_a_recipe_goes_under_the_same_launcher(tmp_path):
    out = tmp_path / "recipe"
    recipe = ROOT / "recipes" / "sft.py"
    done = accelerate("cpu_ddp", recipe, "--out", out, "--steps", "4")
    assert done.stdout.count("exported to") == 1
    assert AutoModelForCausalLM.from_pretrained(out / "export")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    text = yaml.safe_load(path.read_text())
    assert config.num_processes == text["num_processes"]
    kind = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "cpu_ddp": "MULTI_GPU"}
    assert str(config.distributed_type.value) == kind.get(path.stem, "DEEPSPEED")
    # nothing that accelerate does not know would be an error there, but a misspelt value goes by
    if "deepspeed_config" in text:
        assert text["deepspeed_config"]["zero_stage"] in (2, 3)
    assert f"configs/accelerate/{path.name}" in path.read_text()

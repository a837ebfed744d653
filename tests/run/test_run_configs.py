"""Every shipped configuration; the one on a real checkpoint is carried out where that is at hand."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from run_jobs import json_lines, posttrain
from transformers import AutoModelForCausalLM

from posttrain.config import method_pages
from posttrain.config.check import check_config
from posttrain.config.launch import as_launched
from posttrain.config.load import load_document
from posttrain.config.schema import expand_shorthands
from posttrain.config.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("accelerate", "deepspeed")
)


def test_there_are_configurations():
    assert {"quickstart.yaml", "stories_lora.yaml", "chain_sum_cpu.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_can_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    errors = [problem for problem in check_config(path).problems if problem.severity == "error"]
    assert [problem for problem in errors if not absent_here(problem)] == []


def launches(path):
    """The launch files that the head of a configuration names."""
    head = re.split("^[a-z]", path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    return [ROOT / name for name in re.findall(r"--config_file (\S+)", head)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_loses_no_steps_as_it_is_launched(path, monkeypatch):
    """Weights in bf16 need the launch that keeps them in fp32: the file's head names it, and it fits."""
    monkeypatch.chdir(ROOT)
    for launch in launches(path) or [None]:
        with as_launched(launch):
            found = [problem for problem in check_config(path).problems if not absent_here(problem)]
        assert [p for p in found if p.severity == "error" or p.key == "model.dtype"] == [], launch


def absent_here(problem):
    """What may be missing where the tests run: the folder beside the checkout, vLLM, what a script makes."""
    if "needs the package vllm" in problem.message:
        return importlib.util.find_spec("vllm") is None
    made = re.search(r"runs/[\w/]+\.jsonl", str(problem))  # its configuration says how to make it
    if made:
        return not (ROOT / made[0]).exists()
    return "../shared/" in str(problem) and not SHARED.exists()


def test_every_method_is_enabled_by_a_shipped_configuration():
    enabled = set()
    for path in CONFIGS:
        data = expand_shorthands(load_document(path).data)
        task = "rlvr" if TASKS[data["task"]].generates else data["task"]  # a method of rlvr is one of ttrl
        enabled |= {(task, name) for name in data.get("methods") or ()}
        enabled |= {("selection", (data.get("selection") or {}).get("method"))}
    known = {(method_pages.task_of(cls), cls.name) for cls in method_pages.available().values()}
    assert known - enabled == set()


@pytest.mark.slow
def test_the_lora_run_on_a_real_checkpoint_raises_the_reward(tmp_path, monkeypatch):
    checkpoint = SHARED / "checkpoints" / "stories260K"
    if not checkpoint.is_dir() or not (SHARED / "data" / "tinystories_pairs").is_dir():
        pytest.skip("the stories checkpoint and data (../shared) are not beside this checkout")
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    smaller = ("trainer.max_steps=12", "trainer.warmup_steps=2", "data.eval.size=16", "trainer.save_steps=6")
    posttrain("train", ROOT / "configs" / "rlvr" / "stories_lora.yaml", f"run_dir={run}", *smaller, "--json")
    rows = [row for row in json_lines(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.05, [row["reward"] for row in rows]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["difference"]["metrics"]["score"]["value"] > 0
    # the adapter loads in plain peft, and does something to the base it names
    base_path = json.loads((run / "export" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(base_path)
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, run / "export")(tokens).logits
    assert (adapted - plain).abs().max() > 0.1
    assert json.loads((run / "export" / "posttrain_export.json").read_text())["format"] == "adapter"

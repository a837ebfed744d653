"""Runs with a selection: plan files, what moves, going on, exports."""

import json

import pytest
import support
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from posttrain import SelectionPlan, load_delta
from posttrain.cli import app

CONFIG = {
    "task": "sft",
    "threads": 1,
    "model": {"path": "base"},
    "data": {"source": "rows.jsonl"},
    "selection": {"random": {"budget": 300}},
    "trainer": {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
    },
    "export": {"format": "delta"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    support.model(tied=True).save_pretrained("base")
    support.tokenizer().save_pretrained("base")
    rows = [{"prompt": f"say {i}", "completion": f" it is {i * i}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def posttrain(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done


def changed(before, after):
    return {name: (before[name] != tensor).nonzero().flatten().tolist() for name, tensor in after.items()}


def test_a_run_its_plan_and_its_delta(folder):
    posttrain("train", "run.yaml", "run_dir=one")
    plan = SelectionPlan.load("one/selection.safetensors")
    assert (plan.method, plan.count) == ("random", 300)
    base = dict(AutoModelForCausalLM.from_pretrained("base").named_parameters())
    trained = dict(load_delta("one/export").named_parameters())
    newest = dict(AutoModelForCausalLM.from_pretrained("one/checkpoints/checkpoint-4").named_parameters())
    moved = 0
    for name, part in plan.tensors.items():
        different = trained[name] != base[name]
        assert not (different & ~part.mask()).any()
        assert torch.equal(trained[name], newest[name]), "a checkpoint is the plain model"
        moved += int(different.sum())
    assert 250 < moved <= 300
    row = json.loads((folder / "one" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.8 < row["selection/changed"] <= 1
    assert "hft" not in (folder / "one" / "export" / "README.md").read_text()
    assert "random(" in (folder / "one" / "export" / "README.md").read_text()

    # the same plan, made elsewhere and given as a file, is the same run
    made = json.loads(posttrain("plan", "make", "run.yaml", "--to", "plan.safetensors", "--json").stdout)
    assert (made["selected"], made["fingerprint"]) == (300, plan.fingerprint())
    posttrain("train", "run.yaml", "run_dir=two", "selection=null", "selection.plan=plan.safetensors")
    two = load_file("two/export/delta.safetensors")
    assert all(
        torch.equal(tensor, two[name]) for name, tensor in load_file("one/export/delta.safetensors").items()
    )

    # stopped after two steps and gone on with
    posttrain("train", "run.yaml", "run_dir=three", "trainer.max_steps=2")
    posttrain("train", "run.yaml", "run_dir=three", "--resume")
    three = load_file("three/export/delta.safetensors")
    assert all(torch.equal(tensor, three[name]) for name, tensor in two.items())
    other = posttrain("train", "run.yaml", "run_dir=three", "--resume", "selection.random.seed=1", code=2)
    assert "selection.params.seed was 0, now 1" in other.stderr

    shown = posttrain("plan", "inspect", "plan.safetensors").stdout
    assert "300" in shown
    assert "made with" in shown
    assert "budget=300" in shown


def test_wrong_plans_are_refused(folder):
    posttrain("plan", "make", "run.yaml", "--to", "plan.safetensors")
    support.model(seed=1, tied=True).save_pretrained("base")
    error = posttrain(
        "train", "run.yaml", "run_dir=one", "selection=null", "selection.plan=plan.safetensors", code=2
    ).stderr
    assert "error: selection: the weights of" in error
    assert (
        "no 'selection' section"
        in posttrain("plan", "make", "run.yaml", "selection=null", "--to", "x", code=2).stderr
    )
    posttrain("plan", "inspect", "rows.jsonl", code=2)

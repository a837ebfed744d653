"""The doctor on run directories that ``posttrain train`` wrote: each symptom is made by a run that has it."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.doctor.run import examine
from posttrain.models.embedded import build_model, build_tokenizer

sys.path.insert(0, str(Path(__file__).parent))

GRPO = {
    "task": "rlvr",
    "threads": 1,
    "data": {"source": "rows.jsonl"},
    "rewards": [],
    "trainer": {
        "learning_rate": 1e-4,
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    },
}
SFT = {
    "task": "sft",
    "threads": 1,
    "data": {"source": "rows.jsonl"},
    "trainer": {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 5,
        "report_to": "none",
    },
}


def findings(tmp_path, base, code=0, **changes):
    """Train, and return what the doctor says, by name."""
    rows = [
        {"prompt": f"{i}+{i}=", "answer": str(2 * i + i % 2), "completion": str(2 * i)} for i in range(16)
    ]
    keep = ("prompt", "answer") if base is GRPO else ("prompt", "completion")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({key: row[key] for key in keep}) + "\n" for row in rows))
    run = {**base, "run_dir": str(tmp_path / "run"), "data": {"source": str(data)}, **changes}
    run["trainer"] = base["trainer"] | changes.get("trainer", {})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == code, (done.stdout[-2000:], done.stderr[-2000:], done.exception)
    return {row.name: row for row in examine(tmp_path / "run")[1]}


def test_a_constant_reward_whose_completions_are_cut(tmp_path):
    found = findings(tmp_path, GRPO, rewards=[{"format": {"params": {"pattern": "never said"}}}])
    assert found["constant_reward"].severity == "error"
    assert "clipped_completions" in found
    assert "max_completion_length" in found["clipped_completions"].advice


def test_dead_groups(tmp_path):
    found = findings(tmp_path, GRPO, rewards=["python:doctor_rewards.by_prompt"])
    assert "constant_reward" not in found  # prompts differ, answers to one do not
    assert "100% of the groups have equal rewards" in found["dead_groups"].found


@pytest.mark.slow
def test_collapsed_entropy(tmp_path):
    trainer = {
        "learning_rate": 1e-2,
        "max_steps": 40,
        "per_device_train_batch_size": 32,
        "num_generations": 8,
    }
    found = findings(tmp_path, GRPO, rewards=["python:doctor_rewards.share_of_a"], trainer=trainer)
    assert found["entropy_collapse"].found.startswith("entropy fell from")


def test_an_adapter_that_never_moved(tmp_path):
    """Groups with equal rewards throughout have no gradient."""
    changes = {"model": {"adapter": {"r": 4}}, "trainer": {"max_steps": 5, "save_strategy": "steps"}}
    found = findings(tmp_path, GRPO, rewards=["python:doctor_rewards.by_prompt"], **changes)
    assert found["adapter_never_moved"].severity == "error"
    assert "groups with equal rewards" in found["adapter_never_moved"].cause


def test_a_loss_that_is_not_finite(tmp_path):
    model = build_model(hidden_size=32, layers=1, heads=4, intermediate_size=32)
    with torch.no_grad():
        model.get_output_embeddings().weight[:, 0] = float("nan")  # as an overflow leaves it
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    found = findings(tmp_path, SFT, code=1, model={"path": str(tmp_path / "model")})
    assert found["not_finite"].severity == "error"
    assert "nonfinite" in found["nonfinite_rows"].found

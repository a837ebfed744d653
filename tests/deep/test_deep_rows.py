"""Counts and places of what is wrong with rows, and batch arithmetic that is the trainer's."""

from __future__ import annotations

import json
import os

import pytest
from deep_runs import checkpoint, finding, look, rows_file, section
from support import grpo_config, letter_reward, model, prompts, sft_config, tokenizer
from typer.testing import CliRunner

from posttrain import GRPOTrainer, SFTTrainer
from posttrain.cli import app


def run(tmp_path, task, rows, held_out=None, **data):
    source = rows_file(tmp_path / "rows.jsonl", rows)
    if held_out is not None:
        data["eval"] = {"file": str(rows_file(tmp_path / "held.jsonl", held_out))}
    config = {"task": task, "data": {"source": str(source), **data}}
    if held_out is not None:
        config["trainer"] = {"eval_strategy": "steps", "eval_steps": 1}
    return config


def test_lengths(tmp_path):
    rows = [{"prompt": "a" * n, "completion": "b" * 4} for n in (3, 8, 20)]
    report = look(tmp_path, run(tmp_path, "sft", rows), "trainer.max_length=10")
    cut = finding(report, "data", "are cut at trainer.max_length=10")
    assert cut.message.startswith("1 of 2 (50.0%)")
    assert "by 3 tokens" in cut.message
    assert cut.examples == (f"{tmp_path}/rows.jsonl:2: 13 tokens",)
    dropped = finding(report, "data", "dropped by TRL without a word")
    assert dropped.examples[0].startswith(f"{tmp_path}/rows.jsonl:3: ")
    limits = ("data.max_prompt_tokens=5", "data.over_length=filter")
    assert finding(look(tmp_path, run(tmp_path, "sft", rows), *limits), "data", "2 of 3").level == "warning"
    assert finding(look(tmp_path, run(tmp_path, "sft", rows), limits[0]), "data", "2 of 3").level == "error"


def test_pairs_that_do_not_fit(tmp_path):
    rows = [{"prompt": "a" * n, "chosen": "b", "rejected": "c"} for n in (3, 30)]
    refused = look(tmp_path, run(tmp_path, "preference", rows), "trainer.max_length=10")
    assert finding(refused, "data", "leaves no room").level == "error"
    config = run(tmp_path, "preference", rows, over_length="filter")
    left_out = look(tmp_path, config, "trainer.max_length=10")
    assert finding(left_out, "data", "1 of 2 (50.0%) rows are left out").level == "warning"


def test_rows_among_each_other(tmp_path):
    told = (("one?", "1"), ("one?", "1"), ("One ?", "2"), ("two?", "2"))
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in told]
    held_out = [{"prompt": "two?", "answer": "2"}, {"prompt": "TWO?", "answer": "2"}]
    rows.append({"prompt": "one?", "answer": "3"})
    config = run(tmp_path, "rlvr", rows, held_out) | {"rewards": ["math"]}
    config["trainer"] |= {"per_device_eval_batch_size": 8}
    report = look(tmp_path, config)
    where = f"{tmp_path}/rows.jsonl"
    assert finding(report, "data", "word for word").examples == (f"{where}:2 repeats {where}:1",)
    clash = finding(report, "data", "different gold answers")
    assert clash.examples == (f"{where}:1: '1' and {where}:5: '3'",)
    assert finding(report, "data", "are also in the training rows").message.startswith("1 of 2")
    assert finding(report, "data", "differ from one only in case").message.startswith("1 of 2")


def test_pairs_among_each_other(tmp_path):
    pairs = [("a", "b c", "d"), ("a", "d", "b  C"), ("e", "f", "F"), ("g", "", "h")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    report = look(tmp_path, run(tmp_path, "preference", rows))
    assert finding(report, "data", "say the opposite").message.startswith("1 pairs")
    assert finding(report, "data", "differ only in case").message.startswith("1 of 4")
    assert finding(report, "data", "empty chosen").message.startswith("1 of 4")


def test_wrong_columns_are_told_as_the_run_would(tmp_path):
    report = look(tmp_path, run(tmp_path, "sft", [{"question": "a", "response": "b"}]))
    found = finding(report, "data", "needs column")
    assert "data.columns: {prompt: question, completion: response}" in found.message
    assert "posttrain_place" not in found.message
    assert not report.ok


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (24, {"per_device_train_batch_size": 8, "num_generations": 4}),
        (24, {"per_device_train_batch_size": 4, "num_generations": 8, "gradient_accumulation_steps": 4}),
        (24, {"per_device_train_batch_size": 8, "num_generations": 4, "steps_per_generation": 2,
              "num_iterations": 3, "gradient_accumulation_steps": 4}),
        (23, {"per_device_train_batch_size": 4, "num_generations": 4, "generation_batch_size": 16}),
    ],
)  # fmt: skip
def test_steps_of_reinforcement_are_those_of_the_trainer(tmp_path, rows, settings):
    args = grpo_config(tmp_path / "out", max_steps=-1, num_train_epochs=2, **settings)
    trainer = GRPOTrainer(
        model=model(), args=args, reward_funcs=letter_reward, train_dataset=prompts(rows),
        processing_class=tokenizer(), methods=[],
    )  # fmt: skip
    loader = trainer.get_train_dataloader()
    epochs, per_epoch, _, _, _, _, steps = trainer.set_initial_training_values(args, loader)
    data = [{"prompt": row["prompt"], "answer": "1"} for row in prompts(rows)]
    config = run(tmp_path, "rlvr", data) | {"rewards": ["math"]}
    config["trainer"] = settings | {"num_train_epochs": 2}
    facts = section(look(tmp_path, config), "batch").facts
    assert (facts["steps_per_epoch"], facts["steps"]) == (per_epoch, steps)
    assert epochs == 2


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}, {"dataloader_drop_last": True}])
def test_steps_of_supervised_training_are_those_of_the_trainer(tmp_path, settings):
    rows = [{"prompt": "a", "completion": f"{i}"} for i in range(23)]
    config = run(tmp_path, "sft", rows)
    config["trainer"] = settings | {"per_device_train_batch_size": 4}
    facts = section(look(tmp_path, config), "batch").facts
    from datasets import Dataset

    args = sft_config(tmp_path / "out", max_steps=-1, **config["trainer"])
    trainer = SFTTrainer(
        model=model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        methods=[],
    )
    loader = trainer.get_train_dataloader()
    _, per_epoch, _, _, _, _, steps = trainer.set_initial_training_values(args, loader)
    assert (facts["steps_per_epoch"], facts["steps"]) == (per_epoch, steps)


def test_the_verb(tmp_path, monkeypatch):
    """Eight processes that are not there are only counted; the answer is one JSON."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = run(tmp_path, "sft", [{"prompt": "a", "completion": "b"}] * 64)
    look(tmp_path, config)
    result = CliRunner().invoke(app, ["check", "--deep", str(tmp_path / "run.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["deep"]["batch"]["rows_per_step"] == 64
    assert report["deep"]["batch"]["steps_per_epoch"] == 1
    assert os.environ["WORLD_SIZE"] == "8"
    text = CliRunner().invoke(app, ["check", "--deep", str(tmp_path / "run.yaml")]).stdout
    assert "One optimiser step: 64 rows (8 x 1 accumulated x 8 processes)" in text
    assert "deep check: ok" in text
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_start_ends_with_2(tmp_path):
    config = run(tmp_path, "sft", [{"question": "a", "response": "b"}])
    config["model"] = {"path": str(checkpoint(tmp_path / "model"))}
    look(tmp_path, config)
    result = CliRunner().invoke(app, ["check", "--deep", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "not ready" in result.stdout

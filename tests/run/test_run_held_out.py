"""Evaluating while training changes nothing but the log, and a resumed run logs the same."""

import torch

from posttrain.checkpointing.folders import newest_checkpoint
from tests.run.run_jobs import json_lines, posttrain, timeless, write_config

EVERY = {
    "evaluate": {"every": 2},
    "methods": {"ace": {"alpha": 0.5}},
    # a schedule that does not look at the number of steps: one test trains fewer first
    "trainer": {"logging_steps": 3, "lr_scheduler_type": "constant"},
}
PLAIN = {**EVERY, "evaluate": {"every": None}}


def weights(run):
    folder = newest_checkpoint(run / "checkpoints")
    return torch.load(folder / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"]


def test_training_is_the_same_bit_for_bit_and_pass_at_k_is_in_its_log(tmp_path):
    with_, without = tmp_path / "with", tmp_path / "without"
    posttrain("train", write_config(tmp_path / "a", with_, EVERY))
    posttrain("train", write_config(tmp_path / "b", without, PLAIN))
    assert torch.equal(weights(with_), weights(without))
    rows = [row for row in json_lines(with_ / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if "held_out/pass@2" in row] == [2, 4, 6]  # 7 is the last one
    assert all(0 <= row["held_out/pass@1"] <= 1 for row in rows if row["step"] in (2, 4, 6))
    assert not any("held_out" in key for row in json_lines(without / "metrics.jsonl") for key in row)
    assert "Held-out, during training" in (with_ / "report.html").read_text()


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    posttrain("train", write_config(tmp_path / "a", whole, EVERY))
    config = write_config(tmp_path / "b", cut, EVERY)
    posttrain("train", config, "trainer.max_steps=4")
    posttrain("train", config, "--resume")
    expected = timeless([row for row in json_lines(whole / "metrics.jsonl") if "held_out/pass@1" in row])
    found = timeless([row for row in json_lines(cut / "metrics.jsonl") if "held_out/pass@1" in row])
    assert [row["step"] for row in found] == [2, 6]  # 4 was the last step of the shorter run
    by_step = {row["step"]: row for row in expected}
    for row in found:
        assert {k: v for k, v in row.items() if k.startswith("held_out/")} == {
            k: v for k, v in by_step[row["step"]].items() if k.startswith("held_out/")
        }

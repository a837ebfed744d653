"""Real runs of two processes: one is killed, hangs or fails, and the other says which and where."""

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "run"))

from fault_jobs import Job, lines, reason
from run_jobs import assert_same, outcome, write_config

pytestmark = pytest.mark.slow

LONG = {
    "warm_start": {"trainer": {"max_steps": 8, "per_device_train_batch_size": 8}},
    "trainer": {"per_device_train_batch_size": 8, "max_steps": 9, "save_steps": 3, "save_total_limit": 3},
    "export": None,
}
HOST = socket.gethostname()


def train(folder: Path, run: Path, *more, changes=None) -> Job:
    config = write_config(folder, run, LONG, changes or {})
    return Job(folder / "log", "-m", "posttrain", "train", config, *more)


def test_a_killed_rank_is_named_and_the_resumed_run_is_the_undisturbed_one(tmp_path):
    run = tmp_path / "run"
    with train(tmp_path, run) as job:
        job.until(lambda: lines(run / "metrics.jsonl") >= 5)
        victim = job.ranks()[1]
        os.kill(victim, signal.SIGKILL)
        assert job.ended() != 0
    said = re.findall(r"^stopped: (.*)$", job.text, re.MULTILINE)
    assert len(said) == 1, job.text[-4000:]
    assert said[0].startswith(f"rank 1 (host {HOST}, pid {victim}) is gone: ")
    assert re.search(r"last seen in '\w+' of step \d+", said[0])
    assert re.search(r"the newest checkpoint is checkpoint-\d+, go on with --resume\.$", said[0])
    why = reason(run / "watchdog")
    assert (why["kind"], why["rank"]) == ("gone", 1)
    assert why["seconds"] < 60
    with train(tmp_path, run, "--resume") as job:
        assert job.ended(200) == 0, job.text[-4000:]
    assert "going on from checkpoint-" in job.text
    whole = tmp_path / "whole"
    with train(tmp_path / "other", whole) as job:
        assert job.ended(200) == 0, job.text[-4000:]
    assert not (whole / "watchdog").exists()
    assert_same(outcome(run), outcome(whole))

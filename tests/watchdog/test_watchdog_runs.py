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

from posttrain.checkpointing.folders import newest_checkpoint

pytestmark = pytest.mark.slow

LONG = {
    "warm_start": {"trainer": {"max_steps": 8, "per_device_train_batch_size": 8}},
    "trainer": {"per_device_train_batch_size": 8, "max_steps": 12, "save_steps": 3, "save_total_limit": 3},
    "export": None,
}
HOST = socket.gethostname()


def train(folder: Path, run: Path, *more, changes=None) -> Job:
    config = write_config(folder, run, LONG, changes or {})
    return Job(folder / "log", "-m", "posttrain", "train", config, *more)


def test_a_killed_rank_is_named_and_the_resumed_run_is_the_undisturbed_one(tmp_path):
    run = tmp_path / "run"
    with train(tmp_path, run) as job:
        job.until(lambda: lines(run / "metrics.jsonl") >= 1)
        victim = job.ranks()[1]
        job.until(lambda: lines(run / "metrics.jsonl") >= 5)
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


def script(tmp_path, mode):
    """Return what a script of two ranks printed, what was written down, and how it ended."""
    with Job(tmp_path / "log", Path(__file__).with_name("fault_ranks.py"), tmp_path / "out", mode) as job:
        code = job.ended()
    return job.text, reason(tmp_path / "out" / "watchdog"), code


def test_a_reward_function_that_hangs_on_one_rank_is_named_within_a_minute(tmp_path):
    text, why, code = script(tmp_path, "sleeps")
    assert code != 0
    message = why["message"]
    assert (why["kind"], why["rank"]) == ("hung", 1)
    assert why["seconds"] < 60
    assert re.match(
        rf"rank 1 \(host {re.escape(HOST)}, pid \d+\) has been in 'rewards' of step 4, in reward ", message
    )
    assert "(fault_ranks.py:17) for 4" in message
    assert "rank 0 waits for it" in message
    assert (
        "the newest checkpoint is checkpoint-2, go on with trainer.train(resume_from_checkpoint=True)"
        in message
    )
    assert text.count(f"stopped: {message}") == 1
    stack = (tmp_path / "out" / "watchdog" / "stack_rank1.txt").read_text()
    assert 'fault_ranks.py", line 17 in reward' in stack


def test_native_code_that_keeps_the_interpreter_is_silence_and_leaves_its_stack(tmp_path):
    text, why, code = script(tmp_path, "never-yields")
    assert code != 0
    assert (why["kind"], why["rank"]) == ("silent", 1)
    assert "nothing was heard of rank 1" in why["message"]
    assert "'rewards' of step 4" in why["message"]
    assert text.count(f"stopped: {why['message']}") == 1
    assert text.count("stopped: ") == 1  # the code gave the interpreter back at the launcher's signal
    stack = tmp_path / "out" / "watchdog" / "stack_rank1.txt"
    assert f"Its Python stack: {stack}." in why["message"]
    assert 'fault_ranks.py", line 19 in reward' in stack.read_text()


def test_an_error_of_one_rank_is_what_the_others_report(tmp_path):
    text, why, code = script(tmp_path, "raises")
    assert code != 0
    assert (why["kind"], why["rank"], why["by"]) == ("failed", 1, 0)
    message = why["message"]
    assert re.match(
        r"rank 1 \(host .*\) failed in 'rewards' of step 4, in reward \(fault_ranks.py:20\): ", message
    )
    assert ": ValueError: no reward for this one. The run stops; the newest" in message
    assert f"RankFailure: {message}" in text  # what rank 0 ends with, in place of a broken connection


def test_a_verifier_that_hangs_is_cut_by_its_deadline_and_its_rank_is_the_one_that_speaks(tmp_path):
    changes = {
        "warm_start": None,
        "evaluate": None,
        "rewards": [{"python:hanging_rewards.hangs_on_rank_1": {"deadline": 1.0}}],
    }
    with train(tmp_path, tmp_path / "run", changes=changes) as job:
        assert job.ended() != 0
    assert "failed (rank 1): reward 'hangs_on_rank_1': " in job.text
    assert "timeout: no verdict within the deadline of 1 s; the process was killed" in job.text
    assert job.text.count("failed (rank") == 1  # not the broken connection that rank 0 saw
    assert "stopped: " not in job.text


def test_signals_to_the_launcher_stop_all_ranks_and_leave_a_checkpoint_to_go_on_from(tmp_path):
    run = tmp_path / "run"
    endless = {"evaluate": None, "warm_start": None, "trainer": {"max_steps": 100_000, "save_steps": 5}}
    enough = 6
    for sent in (signal.SIGTERM, signal.SIGINT):
        resume = ["--resume"] if run.exists() else []
        with train(tmp_path, run, *resume, changes=endless) as job:
            job.until(lambda enough=enough: lines(run / "metrics.jsonl") >= enough)
            os.kill(job.process.pid, sent)
            assert job.ended() != 0
            assert not job.ranks()
        assert (
            len(re.findall(r"^(terminated|interrupted); go on with --resume$", job.text, re.MULTILINE)) == 1
        )
        assert "stopped: " not in job.text
        enough = lines(run / "metrics.jsonl") + 6
    assert "going on from checkpoint-" in job.text
    assert newest_checkpoint(run / "checkpoints") is not None

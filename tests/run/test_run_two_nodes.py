"""Two nodes: namespaces with their own addresses. One dies, the other says so, and both go on exactly."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_jobs import assert_same, json_lines, outcome, write_config
from test_run_ranks import launch

ROOT = Path(__file__).resolve().parents[2]
NODES = f"pt{os.getpid()}"
LONG = {
    "warm_start": {"trainer": {"max_steps": 4, "per_device_train_batch_size": 8}},
    "trainer": {"per_device_train_batch_size": 8, "max_steps": 9, "save_steps": 3, "save_total_limit": 3},
    "export": None,
}


def namespaces_allowed() -> bool:
    if shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", f"{NODES}-try"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", f"{NODES}-try"], capture_output=True, check=False)
    return made.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces_allowed(), reason="needs network namespaces (root, iproute2)"),
]


def start(log: Path, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "two_nodes.sh"), *map(str, arguments)],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"POSTTRAIN_NODES": NODES, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(json_lines(path)) if path.exists() else 0


def test_a_node_dies_and_the_resumed_run_is_that_of_one_machine(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    config = write_config(tmp_path, run, LONG)
    job = start(log, config)
    try:
        deadline = time.monotonic() + 300
        while steps(run) < 4:
            assert job.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        there = subprocess.run(
            ["ip", "netns", "pids", f"{NODES}-1"], capture_output=True, text=True, check=True
        )
        for pid in there.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        assert job.wait(120) != 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
            job.wait(60)
    said = re.findall(r"^stopped: rank 1 .*$", log.read_text(), re.MULTILINE)
    assert len(said) == 1, log.read_text()[-4000:]
    assert "is gone" in said[0]
    assert "go on with --resume" in said[0]
    again = start(tmp_path / "log2", config, "--resume")
    assert again.wait(300) == 0, (tmp_path / "log2").read_text()[-4000:]
    assert "going on from checkpoint-3" in (tmp_path / "log2").read_text()

    other = tmp_path / "other"
    codes, _, err = launch(other, "train", write_config(other, other / "run", LONG))
    assert codes == [0, 0], err[-4000:]
    assert_same(outcome(run), outcome(other / "run"))
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert NODES not in left.stdout

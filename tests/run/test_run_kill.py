"""Killed by SIGKILL anywhere and resumed until done, a run equals one that nobody disturbed, bit for bit.

Real processes. What is watched to hit a stage is what the stage leaves on disk.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_jobs import LORA, STEPS, assert_same, json_lines, outcome, posttrain, start, write_config
from safetensors.torch import load_file

from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.doctor.run import examine

pytestmark = pytest.mark.slow

# Rollouts serve two or three steps: the steps that are saved fall on and off a generation boundary.
VARIANTS = {
    "full": {},  # saves at 3, 6 and 7
    "lora": {**LORA, "trainer": {"steps_per_generation": 3, "save_steps": 2, "save_total_limit": 1}},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the outcome of a variant that ran through, made once per variant."""
    outcomes = {}

    def run(name):
        if name not in outcomes:
            folder = tmp_path_factory.mktemp(name)
            posttrain("train", write_config(folder, folder / "run", VARIANTS[name]), "--json")
            outcomes[name] = outcome(folder / "run")
        return outcomes[name]

    return run


def saving(run: Path) -> bool:
    return (run / "checkpoints" / "_saving").exists()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


STAGES = {
    "in the warm start": lambda run: lines(run / "warm_start" / "metrics.jsonl") >= 3,
    "while the warm start is kept": lambda run: (run / "warm_start" / "model.partial").exists(),
    "in the evaluation before": lambda run: (run / "warm_start" / "model").exists(),
    "in a save": saving,
    "between two saves": lambda run: lines(run / "metrics.jsonl") >= 5,
    "in the evaluation after": lambda run: (run / "checkpoints" / f"checkpoint-{STEPS}").exists(),
    "in the export": lambda run: (run / ".export.partial").exists(),
}


def kill_when(config: Path, run: Path, reached, log: Path) -> bool:
    """Start or resume the run and kill it as soon as ``reached``; return whether it was killed."""
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    process = start("train", config, *resume, log=log)
    until = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < until:
            if reached(run):
                process.kill()
                return process.wait() == -signal.SIGKILL
            time.sleep(0.0005)
        assert process.poll() == 0, log.read_text()
        return False
    finally:
        process.kill()
        process.wait()


def newest_loads(run: Path) -> None:
    """Whatever has the name of a checkpoint is complete."""
    for folder in (run / "checkpoints", run / "warm_start" / "checkpoints"):
        newest = newest_checkpoint(folder)
        if newest is None:
            continue
        step = int(newest.name.rpartition("-")[2])
        assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == step
        (weights,) = newest.glob("*.safetensors")
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "posttrain_state_0.pt"} <= {
            path.name for path in newest.iterdir()
        }


def finish(config: Path, run: Path, log: Path) -> str:
    process = start("train", config, *(["--resume"] if (run / "config.yaml").exists() else []), log=log)
    assert process.wait(timeout=180) == 0, log.read_text()
    return log.read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_every_stage_in_turn(variant, undisturbed, tmp_path):
    run = tmp_path / "run"
    config, log = write_config(tmp_path, run, VARIANTS[variant]), tmp_path / "log"
    killed = []
    for stage, reached in STAGES.items():
        if kill_when(config, run, reached, log):
            killed.append(stage)
        newest_loads(run)
    # what is left now is done without training again
    assert "rlvr" not in finish(config, run, log)
    assert len(killed) >= 5, killed
    assert_same(outcome(run), undisturbed(variant))
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_killed_at_random_moments(undisturbed, tmp_path):
    variant = "full"
    run = tmp_path / "run"
    config, log = write_config(tmp_path, run, VARIANTS[variant]), tmp_path / "log"
    moments = random.Random(0)
    for _ in range(4):
        delay = time.monotonic() + moments.uniform(4.0, 12.0)
        if not kill_when(config, run, lambda run, until=delay: time.monotonic() > until, log):
            break
        newest_loads(run)
    finish(config, run, log)
    assert_same(outcome(run), undisturbed(variant))


def test_every_save_of_a_run_survives_a_kill_in_it(tmp_path):
    """Kill in save after save; the run never falls back behind the last complete checkpoint."""
    run = tmp_path / "run"
    every = {
        "warm_start": None,
        "evaluate": None,
        "export": None,
        "trainer": {"save_steps": 1, "max_steps": 20},
    }
    config, log = write_config(tmp_path, run, every), tmp_path / "log"
    inside, last = 0, 0
    for attempt in range(4):

        def reached(run, last=last):
            newest = newest_checkpoint(run / "checkpoints")
            return saving(run) and newest is not None and int(newest.name.rpartition("-")[2]) > last

        assert kill_when(config, run, reached, log), (attempt, log.read_text())
        inside += saving(run)
        newest_loads(run)
        step = int(newest_checkpoint(run / "checkpoints").name.rpartition("-")[2])
        assert step > last
        last = step
    assert inside >= 2  # the save was really under way when the process died
    finish(config, run, log)
    rows = [row for row in json_lines(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))


# ---- ended on request ------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_signal_leaves_no_verifier_behind_and_says_how_to_go_on(sent, tmp_path):
    run = tmp_path / "run"
    endless = {"warm_start": None, "evaluate": None, "trainer": {"max_steps": 100_000, "save_steps": 50}}
    config, log = write_config(tmp_path, run, endless), tmp_path / "log"
    # as from a terminal: the signal goes to the run, not to the tests
    process = start("train", config, log=log, start_new_session=True)
    try:
        while lines(run / "metrics.jsonl") < 52:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        workers = children(process.pid)
        assert workers
        os.kill(process.pid, sent)
        code = process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    state, found = examine(run)
    assert state.state == ("killed" if sent is signal.SIGKILL else "stopped")
    assert f"run_{state.state}" in {row.name for row in found}
    if sent is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        word = "interrupted" if sent is signal.SIGINT else "terminated"
        assert code == 1
        assert text.strip().splitlines()[-1] == f"{word}; go on with --resume"
        assert "Traceback" not in text
    until = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [worker for worker in workers if alive(worker)]
    if sent is signal.SIGKILL:  # and one can: the folder is free again, the checkpoint is there
        text = finish(write_config(tmp_path, run, endless, {"trainer": {"max_steps": 52}}), run, log)
        assert "going on from checkpoint-" in text


# ---- no space left ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a file system of its own, 24 MB large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system of its own")
    yield folder
    # lazily: the weights that were compared are still mapped into this process
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_once_there_is_space(small_disk, tmp_path):
    # a checkpoint takes about 9 MB: the first fits, the second does not once the ballast is there
    changes = {"warm_start": None, "evaluate": None, "export": None, "trainer": {"save_total_limit": 1}}
    run = small_disk / "run"
    config, log = write_config(tmp_path, run, changes), tmp_path / "log"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (8 << 20))
    process = start("train", config, log=log)
    assert process.wait(timeout=120) == 1
    text = log.read_text()
    assert "could not write checkpoint 6" in text
    assert "the last good one is checkpoint-3" in text
    assert "Free disk space" in text
    newest_loads(run)
    assert "disk_full" in {row.name for row in examine(run)[1]}
    ballast.unlink()
    assert "going on from checkpoint-3" in finish(config, run, log)
    whole = tmp_path / "whole"
    posttrain("train", write_config(tmp_path / "other", whole, changes), "--json")
    for name in ("model.safetensors",):
        left, right = (
            load_file(path / "checkpoints" / f"checkpoint-{STEPS}" / name) for path in (run, whole)
        )
        assert_same(left, right)
    rows = [row["step"] for row in json_lines(run / "metrics.jsonl")]
    assert rows == [row["step"] for row in json_lines(whole / "metrics.jsonl")]

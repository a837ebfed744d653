"""Runs that went wrong in known ways: each is found, with its step, and a good run is left in peace."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.doctor import failures, history
from posttrain.doctor import run as run_module
from posttrain.doctor.history import Logs, course
from posttrain.doctor.run import examine
from posttrain.run.directory import RunDirectory, RunError, last_json_lines
from posttrain.run.rules import RULES
from posttrain.run.status import record_end, write_status

GOOD = {
    "loss": 0.01, "grad_norm": 0.5, "learning_rate": 1e-5, "reward": 0.4, "reward_std": 0.3, "entropy": 1.0,
    "frac_reward_zero_std": 0.2, "groups/useful": 0.8, "completions/mean_length": 100,
    "completions/clipped_ratio": 0.05, "verifier/math/error": 0.0, "verifier/math/unparseable": 0.1,
    "verifier/math/correct": 0.4, "step_time": 2.0,
}  # fmt: skip
SUPERVISED = {"loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-5, "mean_token_accuracy": 0.4}


def logs(*rows, generates=True, **options):
    """``rows``: changes of a good log, with how many logs they last."""
    base = GOOD if generates else SUPERVISED
    flat = [base | change for change, count in rows for _ in range(count)]
    return Logs([(10.0 * (i + 1), row) for i, row in enumerate(flat)], generates=generates, **options)


CASES = {
    "constant_reward": (logs(({"reward": 0.0, "reward_std": 0.0, "verifier/math/unparseable": 1.0,
                              "verifier/math/correct": 0.0, "frac_reward_zero_std": 1.0,
                              "groups/useful": 0.0, "grad_norm": 0.0}, 6)), "error", 10),
    "learning_rate_zero": (logs(({"learning_rate": 0.0, "grad_norm": 0.1}, 5)), "error", 10),
    "learning_rate_low_for_adapter": (logs(({"learning_rate": 1e-6}, 5), adapter=True), "warning", 10),
    "no_gradient": (logs(({"grad_norm": 0.0}, 5)), "error", 10),
    "gradient_spike": (logs(({}, 8), ({"grad_norm": 40.0}, 1), ({}, 3)), "warning", 90),
    "loss_spike": (logs(({}, 8), ({"loss": 9.0}, 1), ({}, 3), generates=False), "warning", 90),
    "loss_rose": (logs(*(({"loss": 2.0 + 0.1 * i}, 1) for i in range(12)), generates=False), "warning", 120),
    "overfitting": (logs(({"eval_loss": 1.5}, 2), ({"eval_loss": 1.2}, 1), ({"eval_loss": 1.6}, 2),
                         generates=False), "warning", 30),
    "wasted_groups": (logs(({"groups/useful": 0.3}, 6)), "note", None),
    "unreadable_answers": (logs(({"verifier/math/unparseable": 0.9}, 6)), "warning", 60),
    "slowing": (logs(({}, 6), ({"step_time": 9.0}, 6)), "note", 100),
    "not_finite": (logs(({}, 6), not_finite={"loss": [30.0, 40.0]}), "error", 30),
    "entropy_collapse": (logs(({}, 6), ({"entropy": 0.01}, 8)), "warning", 110),
    "dead_groups": (logs(({"frac_reward_zero_std": 0.9}, 12)), "warning", 100),
    "failing_verifier": (logs(({"verifier/math/error": 0.3}, 12)), "error", 100),
    "clipped_completions": (logs(({"completions/clipped_ratio": 0.97, "reward": 0.0, "reward_std": 0.1}, 5)),
                            "warning", 40),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_course(name):
    stored, severity, step = CASES[name]
    found = course(stored)
    assert [(row.name, row.severity, row.step) for row in found] == [(name, severity, step)]
    assert all((found[0].found, found[0].cause, found[0].advice))


def test_a_good_course_has_no_findings():
    assert course(logs(({}, 30))) == []
    assert course(logs(({}, 30), generates=False)) == []
    assert course(Logs([])) == []


def test_what_looks_wrong_and_is_not():
    assert course(logs(({"learning_rate": 0.0}, 1))) == []  # the first step of a warm-up
    assert course(logs(({"grad_norm": 0.01}, 8), ({"grad_norm": 0.3}, 1), ({"grad_norm": 0.01}, 3))) == []
    # groups without spread have no gradient; that is said once
    found = course(logs(({}, 2), ({"grad_norm": 0.0, "frac_reward_zero_std": 0.9}, 12)))
    assert [row.name for row in found] == ["dead_groups"]


def test_every_rule_has_a_cause():
    assert history._CAUSES.keys() == RULES.keys()


def test_a_constant_reward_names_the_verdict_behind_it():
    (found,) = course(CASES["constant_reward"][0])
    assert "100% 'unparseable'" in found.found
    assert "no answer is found" in found.cause


def test_five_logs_are_enough_for_an_alarm():
    rows = [{}] * 2 + [{"entropy": 0.001}] * 3
    found = course(logs(*((row, 1) for row in rows)))
    assert [row.name for row in found] == ["entropy_collapse"]


def test_what_passed_is_a_note():
    found = course(logs(({}, 6), ({"entropy": 0.01}, 8), ({}, 20)))
    assert [(row.name, row.severity) for row in found] == [("entropy_collapse", "note")]


# ---- run directories ---------------------------------------------------------------------------------------


def make(folder: Path, count=12, **files) -> RunDirectory:
    """A run of ``count`` logs that finished; ``files`` replaces contents (None: no such file)."""
    run = RunDirectory(folder)
    folder.mkdir(parents=True)
    rows = [{"step": i + 1, "seconds": 2.0 * i} | GOOD for i in range(count)]
    contents = {
        "config.yaml": yaml.safe_dump(
            {"task": "rlvr", "model": {"path": "a/b"}, "trainer": {"max_steps": 12}}
        ),
        "manifest.json": json.dumps({"versions": {}}),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "status.json": json.dumps({"state": "finished", "started": "2026-01-01T00:00:00+00:00"}),
    } | {name.replace("__", "."): text for name, text in files.items()}
    for name, text in contents.items():
        if text is not None:
            (folder / name).write_text(text)
    return run


def names(folder):
    return {row.name: row for row in examine(folder)[1]}


def test_a_good_run_has_no_findings(tmp_path):
    run = make(tmp_path / "run")
    state, found = examine(run.root)
    assert found == []
    assert (state.state, state.steps, state.of, state.task) == ("finished", 12, 12, "rlvr")
    done = CliRunner().invoke(app, ["doctor", str(run.root)])
    assert done.exit_code == 0
    assert done.stdout == "rlvr: finished, step 12 of 12, no checkpoint\nnothing was found\n"


FAILURES = {
    "out_of_gpu_memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "out_of_memory": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "disk_full": OSError(28, "No space left on device"),
    "no_permission": PermissionError(13, "Permission denied", "/data/runs/checkpoint-3"),
    "not_finite": FloatingPointError("the loss is nan after 3 optimiser steps"),
    "collective_timeout": RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL"),
    "device_assert": RuntimeError("CUDA error: device-side assert triggered"),
    "no_kernels_for_gpu": RuntimeError("CUDA error: no kernel image is available for execution"),
    "adapter_targets": ValueError("Target modules {'q'} not found in the base model."),
    "no_gradient": RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn"),
    "hub_access": OSError("couldn't connect to 'https://huggingface.co' to load the files"),
    "nothing_changed": RuntimeError("the merge changes no weight; the adapter is all zeros"),
    "missing_optional": ImportError(
        "You need to install `bitsandbytes` in order to use bitsandbytes optimizers"
    ),
    "rank_gone": RuntimeError("rank 1 (host a, pid 3) is gone: its process ended without a word (killed)"),
    "rank_hung": RuntimeError(
        "rank 1 (host a, pid 3) has been in 'rewards' for 99 s, and rank 0 waits for it."
    ),
    "rank_silent": RuntimeError("nothing was heard of rank 1 (host a, pid 3) for 20 s."),
    "deadlock": RuntimeError("all ranks have waited for each other for 900 s: rank 0"),
    "tracker_login": RuntimeError("wandb: api_key not configured (no-tty). call wandb login"),
    "broken_packages": ImportError("cannot import name 'x' from 'trl'"),
    "columns": KeyError("answer"),
    "gpu_memory_for_vllm": ValueError("Free memory on device is less than desired GPU memory utilization"),
    "broken_checkpoint": type("SafetensorError", (Exception,), {})("MetadataIncompleteBuffer"),
    "verifier_failure": RuntimeError("reward 'm': 9 of 9 completions ended in error; (max_failures)."),
}


def test_every_known_error_has_a_case():
    assert FAILURES.keys() == {row.name for row in failures.KNOWN}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_run_is_explained(name, tmp_path):
    run = make(tmp_path / "run", status__json=None)
    write_status(run, "running")
    record_end(run, FAILURES[name])
    state, found = examine(run.root)
    assert state.state == "failed"
    assert [(row.name, row.severity) for row in found] == [(name, "error")]
    assert "--resume starts anew" in found[0].advice


def test_an_unknown_error_is_told_as_it_is_without_secrets(tmp_path):
    run = make(tmp_path / "run", status__json=None)
    write_status(run, "running")
    record_end(run, RuntimeError("the dog ate hf_abcdefghijkl"))
    (found,) = examine(run.root)[1]
    assert (found.name, found.step) == ("run_failed", 12)
    assert found.found == "RuntimeError: the dog ate ***"
    assert "hf_abc" not in run.failures.read_text()
    (row,) = last_json_lines(run.failures, 1)
    assert row["traceback"][-1].startswith("RuntimeError")


def test_the_first_rank_that_failed_is_the_one_to_read(tmp_path):
    run = make(tmp_path / "run", status__json=None)
    write_status(run, "running")
    record_end(run, MemoryError("rank 3 first"), rank=3)
    record_end(run, RuntimeError("Connection closed by peer"), rank=0)
    (found,) = examine(run.root)[1]
    assert found.name == "out_of_memory"
    assert "(rank 3, and 1 more after it)" in found.found


def test_the_rank_with_an_error_of_its_own_is_the_cause(tmp_path):
    """Others that report it, or see a broken connection, may write theirs first."""
    run = make(tmp_path / "run", status__json=None)
    write_status(run, "running")
    record_end(
        run, type("RankFailure", (RuntimeError,), {})("rank 1 failed in 'rewards': out of memory"), rank=0
    )
    record_end(run, RuntimeError("Connection closed by peer [127.0.0.1]"), rank=2)
    record_end(run, MemoryError(), rank=1)
    (found,) = examine(run.root)[1]
    assert (found.name, found.found) == ("out_of_memory", "MemoryError (rank 1, and 2 more after it)")


def test_what_the_watchdog_wrote_stands_for_errors_that_could_not_be_raised(tmp_path):
    run = make(tmp_path / "run", status__json=None)
    write_status(run, "running")
    run.watchdog.mkdir()
    text = "rank 1 (host a, pid 9) has been in 'rewards' of step 7 for 99 s, and rank 0 waits for it."
    (run.watchdog / "stopped_rank0.json").write_text(json.dumps({"kind": "hung", "by": 0, "message": text}))
    (run.watchdog / "stopped_rank1.json").write_text("{")
    state, (found,) = examine(run.root)
    assert (state.state, found.name, found.found) == ("failed", "rank_hung", text)
    os.utime(run.watchdog / "stopped_rank0.json", (0, 0))  # of an earlier start
    assert [row.name for row in examine(run.root)[1]] == ["run_killed"]


def test_a_checkpoint_without_our_state_is_named(tmp_path):
    run = make(tmp_path / "run", status__json=json.dumps({"state": "stopped"}))
    adapter(run.checkpoints / "checkpoint-12", moved=3)
    assert names(run.root).keys() == {"run_stopped", "inexact_resume"}
    (run.checkpoints / "checkpoint-12" / "posttrain_state_0.pt").touch()
    assert names(run.root).keys() == {"run_stopped"}


def test_errors_from_before_a_resume_are_past(tmp_path):
    run = make(tmp_path / "run", status__json=None)
    write_status(run, "running")
    record_end(run, RuntimeError("old"))
    rows = [json.loads(line) | {"time": "2020-01-01T00:00:00+00:00"} for line in run.failures.open()]
    run.failures.write_text(json.dumps(rows[0]) + "\n")
    write_status(run, "running")
    write_status(run, "finished")
    assert examine(run.root)[1] == []


@pytest.mark.parametrize(("error", "by"), [(KeyboardInterrupt(), "Ctrl-C"), (None, "SIGTERM")])
def test_a_stop_is_no_failure(error, by, tmp_path):
    from posttrain.cli_common import Terminated

    run = make(tmp_path / "run", status__json=None)
    write_status(run, "running")
    record_end(run, error or Terminated())
    assert json.loads(run.status.read_text())["by"] == by
    assert not run.failures.exists()
    assert [(row.name, row.severity) for row in examine(run.root)[1]] == [("run_stopped", "note")]


def test_running_and_killed(tmp_path):
    """A process that holds the folder is a running run; when it is gone without a word it was killed."""
    run = make(tmp_path / "run", status__json=None)
    code = (
        "import sys, time; from pathlib import Path; from posttrain.run.directory import RunDirectory\n"
        "from posttrain.run.status import write_status; run = RunDirectory(Path(sys.argv[1]))\n"
        "with run.held():\n write_status(run, 'running'); print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(run.root)], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert examine(run.root)[0].state == "running"
        assert examine(run.root)[1] == []
        old = time.time() - 7200
        for path in (run.metrics, run.manifest):
            os.utime(path, (old, old))
        (found,) = examine(run.root)[1]
        assert (found.name, found.severity) == ("silent", "warning")
        assert "120 min; 2 s between two logs" in found.found
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    (found,) = examine(run.root)[1]
    assert (found.name, found.severity, found.step) == ("run_killed", "error", 12)


def adapter(folder: Path, *, moved: int, count: int = 3, value: float = 1.0) -> None:
    folder.mkdir(parents=True)
    tensors = {f"m.{i}.lora_A.weight": torch.ones(2, 4) for i in range(count)}
    tensors |= {f"m.{i}.lora_B.weight": torch.full((4, 2), value * (i < moved)) for i in range(count)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 40}))


def test_an_adapter_that_never_moved(tmp_path):
    run = make(tmp_path / "run")
    adapter(run.checkpoints / "checkpoint-12", moved=0)
    found = names(run.root)
    assert found.keys() == {"adapter_never_moved"}
    assert found["adapter_never_moved"].severity == "error"
    assert "all 3 B matrices" in found["adapter_never_moved"].found
    assert examine(run.root)[0].of == 40


def test_an_adapter_that_moved_in_part_and_one_that_did(tmp_path):
    run = make(tmp_path / "run")
    adapter(run.checkpoints / "checkpoint-12", moved=2)
    assert {name: row.severity for name, row in names(run.root).items()} == {
        "adapter_partly_still": "warning"
    }
    adapter(run.checkpoints / "checkpoint-24", moved=3)
    assert names(run.root) == {}


def weights(folder: Path, value: float, dtype=torch.bfloat16) -> None:
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(4, dtype=dtype), "b": torch.full((4,), value, dtype=dtype)},
              folder / "model.safetensors")  # fmt: skip


def test_full_weights_that_never_moved(tmp_path):
    base = tmp_path / "base"
    weights(base, 1.0, torch.float32)
    config = {"task": "rlvr", "model": {"path": str(base), "dtype": "bfloat16"}, "trainer": {}}
    run = make(tmp_path / "run", config__yaml=yaml.safe_dump(config))
    weights(run.checkpoints / "checkpoint-6", 1.0)
    found = names(run.root)
    assert found.keys() == {"weights_never_moved"}
    assert "rounded away" in found["weights_never_moved"].cause
    weights(run.checkpoints / "checkpoint-12", 1.5)
    assert names(run.root) == {}


def test_weights_that_are_not_finite(tmp_path):
    run = make(tmp_path / "run")
    weights(run.checkpoints / "checkpoint-12", float("nan"))
    assert "4 values of b" in names(run.root)["weights_not_finite"].found


def test_damaged_files(tmp_path):
    run = make(tmp_path / "run")
    adapter(run.checkpoints / "checkpoint-6", moved=3)
    adapter(run.checkpoints / "checkpoint-12", moved=3)
    path = run.checkpoints / "checkpoint-12" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    (run.checkpoints / "checkpoint-6" / "trainer_state.json").write_text("{")
    found = [row for row in examine(run.root)[1] if row.name == "damaged_checkpoint"]
    assert len(found) == 2
    assert "not valid JSON" in found[0].found
    assert "does not open" in found[1].found
    run.export.mkdir()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (run.export / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-1.safetensors is missing; model-2" in names(run.root)["damaged_export"].found


def test_empty_completions(tmp_path):
    def rows(reward):
        row = {"step": 1, "prompt": "p", "completion": " ", "rewards": {"m": reward}}
        return "".join(json.dumps(row) + "\n" for _ in range(4))

    assert names(make(tmp_path / "a", completions__jsonl=rows(0.0)).root).keys() == {"empty_completions"}
    assert (
        names(make(tmp_path / "b", completions__jsonl=rows(1.0)).root)["empty_rewarded"].severity == "error"
    )


def test_held_out_score(tmp_path):
    def part(value, low, high):
        metrics = {"pass@1": {"value": value, "low": low, "high": high}}
        return json.dumps({"difference": {"metrics": metrics}})

    fell = names(make(tmp_path / "a", evaluation__json=part(-0.2, -0.3, -0.1)).root)["held_out_fell"]
    assert fell.severity == "error"
    assert "-0.200 [-0.300, -0.100]" in fell.found
    assert names(make(tmp_path / "b", evaluation__json=part(0.1, -0.3, 0.4)).root).keys() == {
        "no_measurable_change"
    }
    assert names(make(tmp_path / "c", evaluation__json=part(0.2, 0.1, 0.3)).root) == {}


def test_rows_of_a_loss_that_was_not_finite(tmp_path):
    run = make(tmp_path / "run")
    run.checkpoints.mkdir()
    (run.checkpoints / "nonfinite_rank1.json").write_text("{}")
    assert "nonfinite_rank1.json" in names(run.root)["nonfinite_rows"].found


def test_no_room_for_the_next_checkpoint(tmp_path, monkeypatch):
    run = make(tmp_path / "run", status__json=json.dumps({"state": "stopped"}))
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: type("U", (), {"free": 2**28})())
    assert names(run.root)["disk_full"].severity == "error"


def test_other_versions_and_a_cpu_run_on_a_gpu_machine(tmp_path):
    manifest = {"versions": {"trl": "1.15.0", "cuda": "13"}, "hardware": {"gpus": [{"name": "H100"}]}}
    config = {"task": "rlvr", "trainer": {"use_cpu": True}}
    found = names(
        make(tmp_path / "run", manifest__json=json.dumps(manifest), config__yaml=json.dumps(config)).root
    )
    assert found.keys() == {"other_versions", "cpu_on_gpu_machine"}
    assert "trl 1.15.0 then" in found["other_versions"].found


BROKEN = {
    "only a config": {"manifest__json": None, "metrics__jsonl": None, "status__json": None},
    "everything empty": dict.fromkeys(
        ("config__yaml", "manifest__json", "metrics__jsonl", "status__json", "evaluation__json"), ""),
    "a truncated last line": {"metrics__jsonl": json.dumps({"step": 1} | GOOD) + '\n{"step": 2, "lo'},
    "lines of other "
    "things": {"metrics__jsonl": '[1]\nnull\n"a"\n{"step": "x"}\n{"loss": 1}\n{"step": 1e400}\n'},
    "numbers beyond floats": {"metrics__jsonl": '{"step": 1, "loss": 1' + "0" * 400 + ', "reward": NaN}\n'},
    "digits beyond integers": {"metrics__jsonl": '{"step": 1, "loss": 1' + "0" * 5000 + "}\n"},
    "deep nesting": {"metrics__jsonl": "[" * 100_000 + "\n", "manifest__json": "[" * 100_000,
                     "evaluation__json": "[" * 100_000, "completions__jsonl": "{\"a\":" * 100_000 + "\n",
                     "status__json": "[" * 100_000},
    "wrong kinds": {"config__yaml": "- 1\n", "manifest__json": "[]", "status__json": "7",
                    "evaluation__json": '{"difference": {"metrics": {"pass@1": 3}}}',
                    "completions__jsonl": '{"completion": null}\n{"completion": [1, {"content": 2}]}\n'},
    "no YAML": {"config__yaml": "a: [\x00"},
    "other kinds in the config": {"config__yaml": "task: [1]\nmodel: 3\ntrainer: x\nwarm_start: 1\n"},
    "bytes": {"status__json": "\udcff\udcfe"},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_runs_do_not_break_the_doctor(name, tmp_path):
    files = {key: value for key, value in BROKEN[name].items() if "\udcff" not in str(value)}
    run = make(tmp_path / "run", **files)
    if files != BROKEN[name]:
        run.status.write_bytes(b"\xff\xfe")
    done = CliRunner().invoke(app, ["doctor", str(run.root), "--json"])
    assert done.exit_code in (0, 1), done.output
    assert json.loads(done.stdout)["run"]["state"] in ("finished", "unknown")


def test_the_end_of_a_large_file_is_read_alone(tmp_path):
    path = tmp_path / "completions.jsonl"
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"step": i, "completion": "x" * 200}) + "\n")
        file.write('{"step": 20000, "comp')
    assert [row["step"] for row in last_json_lines(path, 3)] == [19997, 19998, 19999]
    assert last_json_lines(path, 10**9, most_bytes=2**17)[-1]["step"] == 19999
    assert len(last_json_lines(path, 10**9, most_bytes=2**17)) < 2000
    assert last_json_lines(tmp_path / "none", 3) == []
    path.write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in last_json_lines(path, 5)] == [1, 2]


def test_what_is_no_run_is_a_wrong_request(tmp_path):
    make(tmp_path / "arms" / "ace" / "seed-0")
    with pytest.raises(RunError, match=r"holds 1: name one, for example .*seed-0"):
        examine(tmp_path / "arms")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "nowhere")])
    assert done.exit_code == 2

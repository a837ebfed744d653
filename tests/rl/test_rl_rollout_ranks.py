"""Replaced, appended and skipped rows: two ranks give the run of one, groups that straddle ranks included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def run(tmp_path, name, methods, keys=(), *, ranks=1, script="rollout_ranks.py", **trainer):
    out = tmp_path / name / "result.json"
    out.parent.mkdir()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    settings = json.dumps({"trainer": trainer, "methods": methods, "keys": list(keys)})
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [*launcher, str(TESTS / "rl" / script), str(out), settings],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def same(left, right):
    assert len(left["logs"]) == 5
    for a, b in zip(left["logs"], right["logs"], strict=True):
        assert a == pytest.approx(b, rel=3e-4, abs=3e-6)
    assert left["weights"] == pytest.approx(right["weights"], abs=1e-4)
    for (prompt, text, advantage), (prompt2, text2, advantage2) in zip(
        left["table"], right["table"], strict=True
    ):
        assert (prompt, text) == (prompt2, text2)
        assert advantage == pytest.approx(advantage2, abs=1e-5)


DYNAMIC = [f"dynamic_sampling/{name}" for name in ("dead_groups", "left_dead", "rounds")]


@pytest.mark.slow
def test_refill_of_groups_that_straddle_two_ranks(tmp_path):
    """Ten rows a rank, groups of four: the third group is on both ranks."""
    methods = {"dynamic_sampling": {"max_rounds": 4}}
    one = run(tmp_path, "one", methods, DYNAMIC, per_device_train_batch_size=20)
    two = run(tmp_path, "two", methods, DYNAMIC, ranks=2, per_device_train_batch_size=10)
    assert sum(row["dynamic_sampling/dead_groups"] for row in one["logs"]) > 0.2
    assert any(row["dynamic_sampling/dead_groups"] > row["dynamic_sampling/left_dead"] for row in one["logs"])
    same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_ranks_with_different_numbers_of_live_rows(loss_type, tmp_path):
    """Half of the micro-batches of a rank are dead; no rank waits for another, and nothing changes."""
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "loss_type": loss_type}
    plain = run(tmp_path, "plain", {}, ranks=2, **shape)
    skipping = run(tmp_path, "skip", {"skip_zero_advantage": {}}, ranks=2, **shape)
    assert any(advantage == 0 for _, _, advantage in plain["table"])
    same(skipping, plain)


AEPO = [f"aepo/{name}" for name in ("entropy", "temperature", "used_rows", "positive")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "loss_type"), [("replace", "dapo"), ("alpha", "grpo")], ids=["replace", "alpha"]
)
def test_tempered_rows_on_two_ranks(mode, loss_type, tmp_path):
    """Ten rows a rank, groups of four; the aux rows and the controller are those of one rank."""
    methods = {
        "aepo": {
            "mode": mode,
            "max_aux_rows": 5,
            "aux_prompt_fraction": 0.4,
            "target_entropy": 3.75,
            "alpha": 0.2,
        }
    }
    one = run(tmp_path, "one", methods, AEPO, per_device_train_batch_size=20, loss_type=loss_type)
    two = run(tmp_path, "two", methods, AEPO, ranks=2, per_device_train_batch_size=10, loss_type=loss_type)
    assert sum(row["aepo/positive"] for row in one["logs"]) > 0.3
    same(two, one)

"""Lists on two ranks, whose micro-batches differ in rows and pairs, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_preference_lists import rows

HERE = Path(__file__).parent
TESTS = HERE.parent


def run(folder, ranks, *, forward_rows=0, precompute=False):
    out = folder / f"{ranks}_{forward_rows}_{precompute}.json"
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [str(out), str(4 // ranks), str(forward_rows), str(int(precompute))]
    done = subprocess.run(
        [*launcher, str(HERE / "lists_ranks.py"), *arguments],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(TESTS), str(TESTS.parent)]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    for name, count in (("a", 8), ("b", 6)):
        rows(count).to_json(tmp_path / name)
    one = run(tmp_path, 1)
    for options in ({}, {"forward_rows": 2, "precompute": True}):
        two = run(tmp_path, 2, **options)
        assert two["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-5)
        for left, right in zip(two["logs"], one["logs"], strict=True):
            assert left.keys() == right.keys()
            for name in left:
                # of a share per micro-batch the mean depends on how the prompts are cut
                if name.startswith(("loss", "grad_norm", "entropy", "num_tokens", "eval_rewards/chosen")):
                    assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5), name

"""accelerate's FSDP2 on two ranks against one process with the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import fsdp_ranks
import launch_runs
import pytest
import runs
import support
import torch

HERE = Path(__file__).parent
TESTS = HERE.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came out on both ranks: one launch for everything."""
    folder = tmp_path_factory.mktemp("fsdp")
    runs.prepare(folder)
    path = [TESTS, HERE, TESTS.parent, os.environ.get("PYTHONPATH", "")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(HERE / "fsdp_ranks.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    said = "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    assert done.returncode == 0, said[-4000:]
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))
    return folder, first, second


@pytest.mark.parametrize("name", launch_runs.RUNS)
def test_the_bar(name, found):
    """20 steps: losses within 1e-5, weights within 1e-4 of one process."""
    folder, first, second = found
    alone = launch_runs.carry_out(launch_runs.RUNS[name], folder / f"{name}-1", 1)
    assert first["bar"][name]["mode"] == "FSDP"
    losses, weights = launch_runs.difference(first["bar"][name], alone)
    print(f"{name}: losses differ by {losses:.1e}, weights by {weights:.1e}")
    assert losses < 1e-5
    assert weights < 1e-4
    assert first["bar"][name]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    support.assert_same(first["bar"][name]["weights"], second["bar"][name]["weights"])


@pytest.mark.parametrize("name", runs.RUNS)
def test_two_ranks_train_as_one_process(name, found):
    folder, first, second = found
    trainer = runs.RUNS[name](folder / f"{name}1", 1)
    trainer.train()
    alone, two = fsdp_ranks.outcome(trainer), first[name]
    assert two["split"]
    for one, other in zip(alone["logs"], two["logs"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert alone["weights"].keys() == two["weights"].keys()
    for key, values in alone["weights"].items():
        assert torch.allclose(values, two["weights"][key], rtol=0, atol=1e-4), key
        assert torch.equal(two["weights"][key], second[name]["weights"][key]), key

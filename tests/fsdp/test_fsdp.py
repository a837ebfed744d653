"""accelerate's FSDP2 on two ranks against one process with the same batch."""

import json
import math
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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.export.export import is_verified

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
        timeout=900,
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
    alone, two = fsdp_ranks.outcome(trainer), first["runs"][name]
    assert two["split"]
    for one, other in zip(alone["logs"], two["logs"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert alone["weights"].keys() == two["weights"].keys()
    for key, values in alone["weights"].items():
        assert torch.allclose(values, two["weights"][key], rtol=0, atol=1e-4), key
        assert torch.equal(two["weights"][key], second["runs"][name]["weights"][key]), key


@pytest.mark.parametrize("name", runs.RESUMED)
def test_a_stopped_run_goes_on_exactly(name, found):
    folder, first, second = found
    straight, resumed = first["resumed"][name]["straight"], first["resumed"][name]["resumed"]
    support.assert_same(straight["weights"], resumed["weights"])
    support.assert_same(straight["weights"], second["resumed"][name]["resumed"]["weights"])
    assert len(straight["logs"]) == len(resumed["logs"]) == 6
    for one, other in zip(straight["logs"], resumed["logs"], strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert any(row["loss"] != 0 for row in straight["logs"][3:])
    # whatever kind of checkpoints, what is saved in the end is a plain model
    saved, weights = folder / f"saved-{name}", straight["weights"]
    if (saved / "adapter_model.safetensors").exists():
        held = load_file(saved / "adapter_model.safetensors")
        held = {key.replace(".weight", ".default.weight"): value for key, value in held.items()}
        assert len(held) == 8
    else:
        held = dict(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).named_parameters())
        assert {key for key in weights if key.startswith("model.")} <= held.keys()
    for key, value in held.items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("name", ["packed", "adapter"])
def test_an_engine_is_told_what_changed(name, found):
    for rank in found[1:]:
        told = rank["stream"][name]
        for key, tensor in told["wanted"].items():
            assert torch.equal(told["held"][key], tensor), key
    names = found[1]["stream"][name]["names"]
    assert len(names) == 4
    if name == "packed":
        size = sum(tensor.numel() for tensor in told["wanted"].values())
        assert 0 < found[1]["stream"][name]["numbers"] < 0.11 * size
    else:
        assert all("q_proj" in key or "v_proj" in key for key in names[-1])


def test_ranks_wait_for_the_longest_answer(found):
    one, other = found[1]["lengths"], found[2]["lengths"]
    assert len(one) == len(other) == 3
    assert one != other


def test_methods_get_what_the_model_computed(found):
    """accelerate's mixed precision rounds outputs to 16 bits; TRL trains on that, methods do not."""
    for values, rounded in ((found[1]["half"]["ours"][0], False), (found[1]["half"]["trl"][0], True)):
        # means over rows of numbers with 8 bits near 3.8 are multiples of 2 ** -6, divided by few tokens
        spread = {value - float(torch.tensor(value).bfloat16()) for value in values}
        assert (spread == {0.0}) == rounded, values
    assert found[1]["half"]["ours"][1] == pytest.approx(math.log(2), abs=1e-6)


def test_a_head_beside_an_adapter_is_refused(found):
    assert "modules_to_save.default.weight" in found[1]["refused"]
    assert "would be that of one rank" in found[2]["refused"]


def test_a_run_of_the_command_line(found):
    run = found[0] / "whole" / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert is_verified(run / "export") is None
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["after"]["tokens"] > 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][:3] == [1, 2, 3]

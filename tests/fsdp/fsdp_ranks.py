"""Run by test_fsdp.py on two ranks under accelerate's FSDP2: python fsdp_ranks.py FOLDER."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))

import launch_runs
import runs
import support
import torch
from accelerate import PartialState
from sharding import sharded

from posttrain.sharding import is_split


def train(name, folder, ranks):
    """Train a run to its end under FSDP2; return what came out, on ranks but the first without logs."""
    options = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"} if name == "loaded" else {}
    with sharded(**options):
        trainer = runs.RUNS[name](folder / f"{name}{ranks}", ranks)
        trainer.train()
        split = all(is_split(parameter) for parameter in trainer.model.parameters())
        return outcome(trainer) | {"split": split}


def outcome(trainer):
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"logs": logs, "weights": support.weights(trainer.plain_model())}


def equal(name, folder):
    """One of the four runs of the bar."""
    with sharded():
        return launch_runs.carry_out(launch_runs.RUNS[name], folder / f"{name}-2", 2)


def main(folder):
    torch.set_num_threads(1)
    PartialState(cpu=True)
    bar = {name: equal(name, folder) for name in launch_runs.RUNS}
    found = {name: train(name, folder, 2) for name in runs.RUNS}
    torch.save({"bar": bar, **found}, folder / f"rank{torch.distributed.get_rank()}.pt")
    support.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

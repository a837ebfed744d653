"""Carry out the cases alone or under any launcher, and write down what came of each.

python matrix_ranks.py FOLDER MODE [CASE...]; FOLDER/CASE.pt gets losses and weights, why it was refused, or
how it broke. A case that does not end within three minutes ends the process with the stacks of its threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import launch_runs
import support
import torch
from accelerate import PartialState
from sharding import sharded

LIMIT = 180  # seconds a case may take, on a machine that does other things too


def carry_out(name: str, folder: Path, ranks: int, *, bare: bool = False) -> dict[str, Any]:
    """Train a case, or the same without its methods."""
    case = cases.CASES[name]
    torch.manual_seed(0)
    try:
        run = case.build(folder, ranks, [] if bare else case.methods())
    except (ValueError, NotImplementedError) as error:
        return {"refused": str(error)}
    except Exception:
        return {"broken": traceback.format_exc()}
    try:
        return launch_runs.carry_out(lambda *_: run, folder, ranks)
    except Exception:
        return {"broken": traceback.format_exc()}


def main(folder: Path, mode: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage after every training, and libraries are most of what there is
    ranks = PartialState(cpu=True).num_processes
    main_process = PartialState().is_main_process
    for name in names:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        with sharded() if mode == "fsdp2" else contextlib.nullcontext():
            result = carry_out(name, folder / "run", ranks)
        launch_runs.reset()
        if mode == "single" and cases.CASES[name].parts.get("method"):
            result["bare"] = carry_out(name, folder / "run", ranks, bare=True)
            launch_runs.reset()
        faulthandler.cancel_dump_traceback_later()
        if main_process:
            torch.save(result, folder / f"{name.replace('/', '.')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or list(cases.CASES))
    support.leave()

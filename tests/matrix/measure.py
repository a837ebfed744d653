"""Launch the cases in each mode, and compare them with one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cases
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("matrix_ranks.py")
#: The modes, and how two processes of each are launched; FSDP2 is put on by the script, see tests/fsdp.
MODES = {"ddp": "cpu_ddp", "zero2": "cpu_zero2", "zero3": "cpu_zero3", "fsdp2": "cpu_ddp"}
#: Relative difference of losses, and absolute one of weights, up to which two processes are one.
LOSSES, WEIGHTS = 1e-5, 1e-4
_KIND = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}


def launch(folder: Path, mode: str, names: Iterable[str] = (), timeout: int = 540) -> str:
    """Carry out cases in a mode, ``single`` included; return the standard error of a launch that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if mode != "single":
        config = ROOT / "configs" / "accelerate" / f"{MODES[mode]}.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), mode, *names],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.stderr if done.returncode else ""


def run(folder: Path, mode: str) -> dict[str, dict[str, Any]]:
    """Carry out all cases in a mode; after one that ends the launch the rest is launched again."""
    folder.mkdir(parents=True, exist_ok=True)
    cases.prepare(folder)
    left = [name for name in cases.CASES if name not in found(folder)]
    while left:
        error = launch(folder, mode, left)
        done = found(folder)
        stuck = next((name for name in left if name not in done), None)
        if stuck is not None:
            print(f"{mode}: {stuck} does not end\n{error[-4000:]}", file=sys.stderr)
            left = left[left.index(stuck) + 1 :]
        else:
            left = []
    return found(folder)


def found(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the cases of a folder came to."""
    paths = {name: folder / f"{name.replace('/', '.')}.pt" for name in cases.CASES}
    return {name: torch.load(path) for name, path in paths.items() if path.is_file()}


def verdict(one: dict[str, Any], two: dict[str, Any] | None, mode: str) -> dict[str, Any]:
    """Return what a mode makes of a case: it works, is refused, or is broken."""
    if two is None:
        return {"verdict": "broken", "reason": "it does not end, or ends the process"}
    if "refused" in two:
        return {"verdict": "refused", "reason": two["refused"]}
    if "broken" in two:
        return {"verdict": "broken", "reason": two["broken"]}
    if two["mode"] != _KIND[mode]:
        return {"verdict": "broken", "reason": f"it runs as {two['mode']}"}
    if "losses" not in one:
        return {"verdict": "broken", "reason": "one process refuses it, or breaks"}
    losses, weights = difference(one, two)
    works = losses < LOSSES and weights < WEIGHTS
    measured = {"losses": float(f"{losses:.1e}"), "weights": float(f"{weights:.1e}")}
    return measured | (
        {"verdict": "works"} if works else {"verdict": "broken", "reason": f"it differs: {measured}"}
    )


def table(
    single: dict[str, dict[str, Any]], modes: dict[str, dict[str, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return the verdicts by case and mode; what one process refuses has that one only."""
    rows: dict[str, dict[str, Any]] = {}
    for name, one in single.items():
        if "refused" in one:
            rows[name] = {"single": {"verdict": "refused", "reason": one["refused"]}}
        else:
            rows[name] = {mode: verdict(one, found.get(name), mode) for mode, found in modes.items()}
    return rows


def difference(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float]:
    """Largest relative difference of losses, and largest absolute one of weights; else infinite."""
    weights = one["weights"], two["weights"]
    if weights[0].keys() != weights[1].keys() or len(one["losses"]) != len(two["losses"]):
        return float("inf"), float("inf")
    # a policy-gradient loss passes through 0, as terms of size 1 cancel: relative to its size over the run
    size = max(sum(map(abs, one["losses"])) / len(one["losses"]), 0.1)
    losses = max(abs(a - b) / max(abs(a), size) for a, b in zip(one["losses"], two["losses"], strict=True))
    return losses, max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])

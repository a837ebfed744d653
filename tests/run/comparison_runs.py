"""A stand-in for ``posttrain train``: it leaves a run directory with numbers that follow from the seed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import yaml

LOGS = 10


def main(file: str, *flags: str) -> None:
    config = yaml.safe_load(Path(file).read_text())
    root = Path(config["run_dir"])
    seed, arm = config["trainer"]["seed"], root.parent.name
    with (root.parents[1] / "calls.txt").open("a") as calls:
        calls.write(
            f"start {arm} {seed} {' '.join(flags)} {os.environ.get('OMP_NUM_THREADS')}\n".replace("  ", " ")
        )
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(Path(file).read_text())
    if arm == "broken":
        sys.exit("some line\nfailed: the judge\nis out")
    time.sleep(0.5)
    if config["warm_start"]:
        (root / "warm_start" / "model").mkdir(parents=True, exist_ok=True)
        (root / "warm_start" / "model" / "config.json").write_text("{}")
    else:
        assert Path(config["model"]["path"]).is_dir(), config["model"]
    hold = root.parents[1] / "hold"
    while hold.exists():
        time.sleep(0.05)
    write(root, seed, gain=0.1 if arm == "better" else 0.0)
    with (root.parents[1] / "calls.txt").open("a") as calls:
        calls.write(f"end {arm} {seed}\n")


def write(root: Path, seed: int, gain: float, fingerprint: str = "f") -> None:
    """Logs 1 to 10 with reward step/100 + seed/10 + gain, and pass@1 of seed/100 before and + gain after."""
    rows = [
        {
            "step": step, "seconds": float(step), "reward": step / 100 + seed / 10 + gain,
            "num_tokens": 50 * step, "completions/mean_length": step, "grad_norm": None,
        }
        for step in range(2, 2 * LOGS + 1, 2)
    ]  # fmt: skip
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = {
        when: {"metrics": {"pass@1": {"value": seed / 100 + extra, "low": 0.0, "high": 1.0}}}
        for when, extra in (("before", 0.0), ("after", gain))
    }
    (root / "evaluation.json").write_text(json.dumps({**sides, "steps": {"before": 0, "after": 20}}))
    (root / "manifest.json").write_text(
        json.dumps({"data": {"fingerprint": fingerprint}, "launch": {"processes": 2}})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

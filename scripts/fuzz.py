"""Throw hostile input at the command line, the loaders and the verifiers: scripts/fuzz.py --minutes 10.

Each case is drawn from its own seed, which is printed with what it found: --seed S --cases 1 plays it again.
Exit code 1 when an exception came out, a message was an exception's, a case did not end, or a file was lost.
"""

# ruff: noqa: E402, the modules of tests/fuzz are found through sys.path
from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz")]
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import yaml
from fuzz_answers import GOLD, hostile_answer
from fuzz_configs import BASE, hostile_config, hostile_override, hostile_text
from fuzz_data import hostile_data_file
from fuzz_judge import Finding, Hang, fingerprint, invoke, limited

from posttrain.config.schema import DataConfig
from posttrain.data.errors import DataError
from posttrain.data.load import load_data
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.registry import VerifierSpec


def config(rng: random.Random, folder: Path) -> None:
    """Check a file with wrong values, or with wrong text."""
    path = folder / "config.yaml"
    text = yaml.dump(hostile_config(rng)).encode("utf-8", "surrogatepass")
    path.write_bytes(rng.choice([text, hostile_text(rng)]))
    invoke("check", path)


def override(rng: random.Random, folder: Path) -> None:
    """Check a good file with wrong overrides."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(BASE))
    invoke("check", path, "--", *(hostile_override(rng) for _ in range(rng.randint(1, 3))))


def data(rng: random.Random, folder: Path) -> None:
    """Load a wrong data file: rows or a DataError, and the file as it was."""
    path = hostile_data_file(rng, folder)
    before = fingerprint(folder)
    task = rng.choice(["rlvr", "sft", "preference", "reward"])
    with limited(), contextlib.suppress(DataError):
        load_data(DataConfig(source=str(path)), task)
    if fingerprint(folder) != before:
        raise Finding(f"{path.name} was changed")


def answers(rng: random.Random, pools: dict[str, VerifierPool]) -> None:
    """Judge hostile completions: a verdict each, in time."""
    name = rng.choice(sorted(pools))
    batch = [hostile_answer(rng) for _ in range(4)]
    row = {"answer": rng.choice(GOLD), "nums": [1, 2, 3], "target": 7}
    with limited():
        verdicts = pools[name].verify(batch, [row] * len(batch))
    if len(verdicts) != len(batch) or any(
        verdict.status == "correct" and not verdict.score for verdict in verdicts
    ):
        raise Finding(f"{name} gave {verdicts}")


def main() -> None:
    """Draw cases until the time or their number is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next")
    parser.add_argument("--cases", type=int, default=None, help="at most so many")
    options = parser.parse_args()
    end, seed = time.monotonic() + 60 * options.minutes, options.seed
    tried: Counter[str] = Counter()
    found = 0
    specs = (VerifierSpec("math"), VerifierSpec("expression"), VerifierSpec("format"))
    pools = {spec.name: VerifierPool(spec, deadline=2.0, memory_gib=4.0) for spec in specs}
    try:
        while time.monotonic() < end and (options.cases is None or seed < options.seed + options.cases):
            rng = random.Random(seed)
            family = rng.choice(["config", "override", "data", "data", "answers"])
            with tempfile.TemporaryDirectory() as folder:
                try:
                    if family == "answers":
                        answers(rng, pools)
                    else:
                        {"config": config, "override": override, "data": data}[family](rng, Path(folder))
                except (Exception, Hang) as error:  # a finding, or what came out of a loader
                    found += 1
                    print(f"seed {seed} ({family}): {type(error).__name__}: {error}"[:2000], flush=True)
            tried[family] += 1
            seed += 1
    finally:
        for pool in pools.values():
            pool.close()
    counts = ", ".join(f"{count} {name}" for name, count in sorted(tried.items()))
    print(f"{tried.total()} cases ({counts}): {found} findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

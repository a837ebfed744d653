r"""Rows per second of the verifiers: through worker processes, and their bare functions; JSON on stdout.

Each batch holds right, wrong and unreadable answers, a third each. The bare function has no deadline and can
hang a run; the difference to it is what the processes cost. Batches take turns, so that a busy machine slows
all alike. ``first`` is the first batch of a pool that is ready, ``start_seconds`` the start of a pool of one
worker.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import reasoning_gym
from common import parser, quiet, report

from posttrain.rewards import VerifierPool, VerifierSpec
from posttrain.rewards.registry import resolve
from posttrain.rewards.safe_eval import tame_reasoning_gym

Rows = list[dict[str, Any]]


def problems(count: int) -> dict[str, tuple[VerifierSpec, Rows, list[str]]]:
    """Return verifier, data rows and right answers by name."""
    source = reasoning_gym.create_dataset("chain_sum", seed=0, size=count)
    entries = [source[i] for i in range(count)]
    generated = [
        {"rg_index": i, "rg_seed": 0, "rg_size": count, "answer": e["answer"]} for i, e in enumerate(entries)
    ]
    fractions = [{"answer": rf"\frac{{{2 * i + 1}}}{{{2**12}}}"} for i in range(count)]
    sums = [{"nums": [i, 3, 5, 7], "target": i * 3 + 5 - 7} for i in range(1, count + 1)]
    return {
        "reasoning_gym": (
            VerifierSpec("reasoning_gym", {"task": "chain_sum"}),
            generated,
            [e["answer"] for e in entries],
        ),
        "math": (
            VerifierSpec("math"),
            fractions,
            [rf"So it is \boxed{{{row['answer']}}}." for row in fractions],
        ),
        "expression": (VerifierSpec("expression"), sums, [f"{row['nums'][0]} * 3 + 5 - 7" for row in sums]),
        "format": (
            VerifierSpec("format"),
            [{} for _ in sums],
            ["<think>\nlong\n</think>\n<answer>\n3\n</answer>" for _ in sums],
        ),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(
    spec: VerifierSpec, rows: Rows, answers: list[str], workers: list[int], rounds: int
) -> dict[str, Any]:
    """Return rows per second by number of workers, and of the bare function."""
    completions = [(answer, "12345", "no answer")[i % 3] for i, answer in enumerate(answers)]
    function = resolve(spec)
    pools = {n: VerifierPool(spec, workers=n) for n in workers}
    for pool in pools.values():
        pool.wait_ready()
    times: dict[str, list[float]] = {}
    verdicts: list[Any] = []
    for _ in range(rounds):
        for n, pool in pools.items():
            seconds, verdicts = timed(lambda pool=pool: pool.verify(completions, rows))
            times.setdefault(f"workers_{n}", []).append(seconds)
        seconds, bare = timed(lambda: [function(c, dict(r)) for c, r in zip(completions, rows, strict=True)])
        times.setdefault("bare_function", []).append(seconds)
        if [v.status for v in bare] != [v.status for v in verdicts]:
            raise RuntimeError(f"{spec.name}: the processes and the bare function disagree")
    for pool in pools.values():
        pool.close()
    started, pool = timed(lambda: VerifierPool(spec))
    waited, _ = timed(pool.wait_ready)
    pool.close()
    return {
        "verdicts": dict(Counter(verdict.status for verdict in verdicts)),
        "start_seconds": started + waited,
        "rows_per_second": {
            name: {"median": len(rows) / statistics.median(found), "first": len(rows) / found[0]}
            for name, found in times.items()
        },
    }


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--rows", type=int, default=256, help="rows of a batch (256)")
    options_.add_argument("--rounds", type=int, default=7, help="batches (7)")
    options_.add_argument("--workers", type=int, action="append", help="processes, repeatable (1, 2)")
    options_.add_argument("--verifier", action="append", help="repeatable (all)")
    options = options_.parse_args()
    quiet(options)
    tame_reasoning_gym()  # as in the worker
    results = {
        name: measure(*given, options.workers or [1, 2], options.rounds)
        for name, given in problems(options.rows).items()
        if name in (options.verifier or [name])
    }
    report(options, results=results)


if __name__ == "__main__":
    main()

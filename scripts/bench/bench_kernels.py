"""Time and peak memory of the tile-by-tile token statistics, against full logits; JSON on stdout.

Both give log-probability, largest probability, entropy and kept mass of a min-p filter for the same tokens.
They take turns in one process; memory is that of a process that does one of them, above the inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import (
    QWEN_VOCABULARY,
    Stopwatch,
    in_own_processes,
    parser,
    peak_resident,
    quiet,
    ratios,
    report,
    resident,
)

from posttrain.kernels import TokenStatistics, token_statistics

MIN_RATIO = 0.02


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> TokenStatistics:
    """Return the same as :func:`posttrain.kernels.token_statistics`, from an (N, V) tensor in fp32."""
    logps = (hidden @ weight.t()).float().log_softmax(dim=-1)
    p = logps.exp()
    chosen, top = logps.gather(1, ids.unsqueeze(1)).squeeze(1), logps.amax(dim=-1)
    bound = top + math.log(MIN_RATIO)
    return TokenStatistics(
        logps=chosen,
        max_logps=top,
        entropies=-(p * logps).sum(dim=-1),
        kept=chosen >= bound,
        log_mass=p.masked_fill(logps < bound.unsqueeze(1), 0.0).sum(dim=-1).log(),
    )


def tiled(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> TokenStatistics:
    return token_statistics(hidden, weight, ids, min_ratio=MIN_RATIO, entropy=True)


ARMS: dict[str, Callable[..., TokenStatistics]] = {"full_logits": full_logits, "tiled": tiled}


def inputs(vocabulary: int, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.hidden, device=device).to(dtype)
    weight = (3 * torch.randn(vocabulary, options.hidden, device=device) / options.hidden**0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (options.tokens,), device=device)


def peak(arm: str, vocabulary: int, options: argparse.Namespace) -> int:
    """Return the bytes this process needs above the inputs."""
    given = inputs(vocabulary, options)
    with torch.no_grad():
        ARMS[arm](*(x[:1] if i != 1 else x for i, x in enumerate(given)))  # libraries load
        before = resident()
        ARMS[arm](*given)
    return peak_resident() - before


@torch.no_grad()
def compare(vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is reported of one vocabulary."""
    given = inputs(vocabulary, options)
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    found = {}
    for _ in range(options.rounds + 1):
        for arm, function in ARMS.items():
            watch = Stopwatch()
            found[arm] = function(*given)
            times[arm].append(watch.read())
    difference = max(
        (getattr(found["tiled"], name) - getattr(found["full_logits"], name)).abs().max().item()
        for name in ("logps", "max_logps", "entropies", "log_mass")
    )
    memory = in_own_processes([("--peak", json.dumps([arm, vocabulary])) for arm in ARMS])
    row: dict[str, Any] = {"vocabulary": vocabulary, "largest_difference": difference}
    for clock, name in enumerate(("seconds", "processor_seconds")):
        own = {arm: [pair[clock] for pair in times[arm][1:]] for arm in ARMS}
        row[name] = {arm: statistics.median(values) for arm, values in own.items()}
        row[name]["tiled_to_full"] = ratios(own["tiled"], own["full_logits"])
    row["peak_bytes"] = dict(zip(ARMS, memory, strict=True))
    row["logits_bytes"] = 4 * options.tokens * vocabulary
    return row


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument(
        "--vocabulary", type=int, action="append", help=f"repeatable ({QWEN_VOCABULARY}, 512)"
    )
    options_.add_argument("--tokens", type=int, default=1024, help="tokens (1024)")
    options_.add_argument("--hidden", type=int, default=256, help="size of the hidden state (256)")
    options_.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the inputs")
    options_.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    options_.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    options = options_.parse_args()
    quiet(options)
    if options.peak:
        print(json.dumps(peak(*options.peak, options)))
        return
    results = [compare(vocabulary, options) for vocabulary in options.vocabulary or [QWEN_VOCABULARY, 512]]
    report(options, hidden=("peak", "vocabulary"), results=results)


if __name__ == "__main__":
    main()

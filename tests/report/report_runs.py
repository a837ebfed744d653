"""A small run directory with known numbers, for the tests of the page."""

import json
from pathlib import Path
from typing import Any

import yaml

from posttrain.evaluation.results import Evaluation, Problem, Sample, compare, summarise

HOSTILE = "<script>alert('x')</script><img src=http://example.invalid/a.png onerror=alert(1)>&amp;"
SETTINGS = {"k": [1, 2], "samples": 4, "temperature": 1.0, "confidence": 0.9, "resamples": 300, "seed": 0}


def evaluation(correct: list[int], *, timeouts: int = 0) -> Evaluation:
    """Problem i has ``correct[i]`` right samples of four; the last ``timeouts`` of problem 0 time out."""
    problems = []
    for index, count in enumerate(correct):
        statuses = ["correct"] * count + ["wrong"] * (4 - count)
        if index == 0 and timeouts:
            statuses[-timeouts:] = ["timeout"] * timeouts
        samples = [
            Sample(f"answer {s}", s, None if s == "timeout" else float(s == "correct"), s[0], 3, True)
            for s in statuses
        ]
        problems.append(Problem(index, f"problem {index}", "c", samples))
    distinct = {"distinct-1": 0.125}
    return summarise(problems, distinct=distinct, settings=SETTINGS, seconds=2.0, tokens=1000)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(root: Path, *, before: list[int] | None = None, after: list[int] | None = None) -> Path:
    """Write a complete run: 30 logs, 3 x 30 completions, a warm start and an export."""
    (root / "warm_start").mkdir(parents=True)
    (root / "export").mkdir()
    config = {
        "task": "rlvr",
        "model": {"path": "embedded:char-llama"},
        "data": {"source": "reasoning_gym:chain_sum"},
        "methods": {"ace": {"alpha": 1.0}},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = {"command": ["posttrain", "train", "my config.yaml"], "versions": {"torch": "2.13.0"}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    logs = [
        {
            "step": step, "epoch": step / 10, "loss": 1 / step, "reward": step / 40, "entropy": 0.5,
            "completions/mean_length": 7 + step % 2, "frac_reward_zero_std": 0.25,
            "rewards/verifier/mean": step / 40, "verifier/verifier/timeout": 0, "ace/shift_mean": -step / 100,
        }
        for step in range(1, 31)
    ]  # fmt: skip
    (root / "metrics.jsonl").write_text(lines([*logs, {"step": 30, "train_runtime": 250.0}]))
    (root / "status.json").write_text('{"state": "finished"}')
    completions = [
        {
            "step": step, "prompt": f"prompt {step}",
            "completion": HOSTILE if step == 1 else f"text {step}.{i}",
            "rewards": {"verifier": 1.0}, "advantage": -0.5, "status": "wrong",
        }
        for step in range(1, 31) for i in range(5)
    ]  # fmt: skip
    (root / "completions.jsonl").write_text(lines(completions))
    first = evaluation(before or [0, 1, 2, 2] * 5)
    second = evaluation(after or [2, 3, 4, 3] * 5)
    parts = {
        "before": first.to_dict(),
        "after": second.to_dict(),
        "difference": compare(first, second).to_dict(),
    }
    (root / "evaluation.json").write_text(json.dumps(parts))
    (root / "warm_start" / "metrics.jsonl").write_text(lines([{"step": s, "loss": 3 - s} for s in (1, 2)]))
    (root / "export" / "adapter_model.safetensors").write_bytes(b"x" * 2048)
    return root

r"""Time and memory of an optimiser step, ours against TRL's; JSON on stdout.

All arms live in one process and take turns step by step, so that a busy or warming machine slows all of
them alike; the ratios are of neighbouring steps, or of neighbouring generation batches where one serves
several steps. Rollouts are given, not generated: generation is the same code in every arm and would hide
what ours adds. With one thread on a CPU the processor time of the step is the better measure on a busy
machine. Memory is the peak of a process (on Linux) or device that runs one arm alone, in full and above what
is there before the model.

Arms: ``trl`` (``trl.GRPOTrainer``), ``trl_reference`` (the same with ``beta`` 1e-8, so that TRL makes a
reference forward and keeps a reference model), ``off`` (ours with ``methods=[]``), then one per ``--method``;
``a+b`` is both together. Every arm is compared with both baselines; where an arm has a reference forward,
``beyond_reference`` also compares it with ``trl`` plus that arm's measured reference forward.

Schedules: ``on_policy``; ``off_policy`` takes four optimiser steps per generation batch, so that old
log-probabilities are made. Lp-Reg acts on 1 % of the negative tokens, from two on: ``gauges`` says how many.

At a large vocabulary on a CPU more than half of a step of TRL goes to page faults: glibc maps every tile of
logits anew, some 680,000 pages a step with ``--size wide --tokens 32``, and how many depends on what else the
process allocates. That hides differences of a few percent; with glibc told to keep its memory they show::

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \\
        python scripts/bench/bench_step.py --size wide --tokens 32 --rollouts 30 --no-memory

What is left of ours there is the gradient of SPINE's band: the logits of the forks outside it, some 7 % of
the positions that TRL scores, are computed once more. Lp-Reg finds no token to act on below ``--tokens 128``.

On a GPU (about 60 GB of memory and 3 minutes; nothing is downloaded)::

    python scripts/bench/bench_step.py --size qwen0.5b --dtype bfloat16 --tokens 512 --rollouts 20 \\
        --adapter full --adapter lora --method ace --method spine --method lp_reg --method ace+spine+lp_reg
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    SIZES,
    Stopwatch,
    Turns,
    in_own_processes,
    model,
    parser,
    peak_resident,
    quiet,
    ratios,
    report,
    resident,
    tokenizer,
)
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import registry

ROWS = 8
STEPS_PER_ROLLOUT = {"on_policy": 1, "off_policy": 4}
BASELINES = ("trl", "trl_reference")


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Return completions of every length from a quarter of the limit up to it, the same in every arm."""
    longest, vocabulary = trainer.max_completion_length, trainer.model.config.vocab_size
    draw = torch.Generator().manual_seed(trainer.state.global_step)
    lengths = torch.randint(longest // 4, longest + 1, (len(prompts),), generator=draw).tolist()
    ids = [torch.randint(2, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    return {"prompt_ids": [[2] * 8 for _ in prompts], "completion_ids": ids, "logprobs": None}


def rewards(dead: float) -> Any:
    """Return a reward function that treats the first ``dead`` of the groups of a batch alike."""

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        del columns
        constant = round(dead * len(completion_ids) / 4) * 4
        return [0.0 if i < constant else float(ids[0] % 2) for i, ids in enumerate(completion_ids)]

    return reward


class TakeTurns(TrainerCallback):
    """Lets one arm at a time take one step, and times it."""

    def __init__(self, turns: Turns, arm: int) -> None:
        self.turns, self.arm = turns, arm
        self.steps: list[tuple[float, float]] = []
        self.reference: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.turns.wait(self.arm)
        self._watch = Stopwatch()
        self.reference.append((0.0, 0.0))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.steps.append(self._watch.read())
        self.turns.next()

    def time_reference(self, trainer: Any) -> None:
        """Time the reference forward of ours, which is part of the step."""
        original = trainer._reference_logps

        def timed(batch: dict[str, Any]) -> Any:
            watch = Stopwatch()
            result = original(batch)
            self.reference[-1] = watch.read()
            return result

        trainer._reference_logps = timed


def times_in_turns(
    trainers: dict[str, Any], base: str, *, threads: int, warmup: int
) -> dict[str, dict[str, Any]]:
    """Train all arms in turns; return seconds a step, and ratios of neighbouring steps against ``base``.

    Args:
        trainers: By the name of their arm.
        base: One of these names.
        threads: Of torch, for each arm.
        warmup: Steps left out.
    """
    turns = Turns(len(trainers))
    clocks = {name: TakeTurns(turns, place) for place, name in enumerate(trainers)}
    failures: list[BaseException] = []

    def train(name: str) -> None:
        try:
            torch.set_num_threads(threads)
            trainers[name].add_callback(clocks[name])
            trainers[name].train()
        except BaseException as error:
            failures.append(error)
            raise

    running = [threading.Thread(target=train, args=(name,), daemon=True) for name in trainers]
    for thread in running:
        thread.start()
    for thread in running:
        while thread.is_alive():
            thread.join(0.5)
            if failures:
                raise failures[0]
    steps = {name: list(zip(*clock.steps[warmup:], strict=True)) for name, clock in clocks.items()}
    return {
        name: {
            "seconds": sum(wall) / len(wall),
            "wall": ratios(wall, steps[base][0]),
            "processor": ratios(processor, steps[base][1]),
        }
        for name, (wall, processor) in steps.items()
    }


def build(arm: str, case: dict[str, str], steps: int, options: argparse.Namespace, folder: Path) -> Any:
    """Return the trainer of an arm."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / f"run_{arm}"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": case["dtype"] == "autocast_bfloat16",
        "per_device_train_batch_size": ROWS,
        "steps_per_generation": STEPS_PER_ROLLOUT[case["schedule"]],
        "num_generations": 4 if options.dead else ROWS,
        "max_completion_length": options.tokens,
        "learning_rate": 1e-5,
        "max_steps": steps,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "beta": 1e-8 if arm == "trl_reference" else 0.0,
    }
    dtype = torch.bfloat16 if case["dtype"] == "bfloat16" else torch.float32
    policy = model(case["size"], dtype, options.layers)
    if arm == "trl_reference" and case["adapter"] == "full":
        # TRL reads its reference from where the policy came from
        policy.save_pretrained(folder / "policy")
        policy = type(policy).from_pretrained(folder / "policy", dtype=dtype)
    arguments: dict[str, Any] = {
        "model": policy,
        "args": GRPOConfig(**settings),
        "reward_funcs": rewards(options.dead),
        "train_dataset": Dataset.from_dict({"prompt": ["a"] * 64}),
        "processing_class": tokenizer(),
        "rollout_func": rollout,
    }
    if case["adapter"] == "lora":
        arguments["peft_config"] = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    if arm in BASELINES:
        trainer = TRLGRPOTrainer(**arguments)
    else:
        names = [] if arm == "off" else arm.split("+")
        chosen = registry.build({name: options.parameters.get(name, {}) for name in names})
        trainer = GRPOTrainer(**arguments, methods=chosen)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def times(
    arms: list[str], case: dict[str, str], options: argparse.Namespace, folder: Path
) -> tuple[dict[str, TakeTurns], dict[str, dict[str, float]]]:
    """Run all arms in turn and return their clocks (the i-th steps are neighbours) and gauges."""
    turns, clocks, trainers, threads = Turns(len(arms)), {}, {}, []
    every = STEPS_PER_ROLLOUT[case["schedule"]]
    for number, arm in enumerate(arms):
        trainer = build(arm, case, (options.rollouts + options.warmup) * every, options, folder)
        clocks[arm], trainers[arm] = TakeTurns(turns, number), trainer
        trainer.add_callback(clocks[arm])
        if hasattr(trainer, "_reference_logps"):
            clocks[arm].time_reference(trainer)
        threads.append(threading.Thread(target=trainer.train, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for arm, clock in clocks.items():
        if len(clock.steps) != (options.rollouts + options.warmup) * every:
            raise RuntimeError(f"arm {arm} stopped after {len(clock.steps)} steps")
    return clocks, {arm: _gauges(trainer) for arm, trainer in trainers.items()}


def _release() -> None:
    """Give back what trainers of the last case held, which refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gauges(trainer: Any) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in trainer.state.log_history:
        for key, value in row.items():
            if "/" in key and key.split("/")[0] in registry.available():
                found.setdefault(key, []).append(value)
    return {key: statistics.mean(values) for key, values in found.items()}


def peak(arm: str, case: dict[str, str], options: argparse.Namespace) -> dict[str, int]:
    """Return the memory of this process before the model and at its peak, in bytes."""
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        steps = options.peak_rollouts * STEPS_PER_ROLLOUT[case["schedule"]]
        build(arm, case, steps, options, Path(folder)).train()
    return {"before": before, "peak": peak_resident()}


def compare(arms: list[str], case: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Return what is reported of one case, by arm."""
    every = STEPS_PER_ROLLOUT[case["schedule"]]
    memory = {}  # first, while this process holds nothing on the device
    if not options.no_memory:
        calls = [("--peak", json.dumps([arm, case])) for arm in arms]
        memory = dict(zip(arms, in_own_processes(calls), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        clocks, gauges = times(arms, case, options, Path(folder))
    _release()

    def blocks(measured: list[tuple[float, float]], clock: int) -> list[float]:
        kept = [pair[clock] for pair in measured[options.warmup * every :]]
        return [sum(kept[i : i + every]) for i in range(0, len(kept), every)]

    names = {"seconds": 0} if torch.cuda.is_available() else {"seconds": 0, "processor_seconds": 1}
    found: dict[str, Any] = {}
    for arm in arms:
        found[arm] = row = {"gauges": gauges[arm]} if gauges[arm] else {}
        for name, clock in names.items():
            own = blocks(clocks[arm].steps, clock)
            row[name] = {"median_of_a_step": statistics.median(own) / every}
            for base in BASELINES:
                row[name][f"to_{base}"] = ratios(own, blocks(clocks[base].steps, clock))
            reference = blocks(clocks[arm].reference, clock)
            if any(reference):
                row[name]["reference_forward"] = statistics.median(reference) / every
                base = [t + r for t, r in zip(blocks(clocks["trl"].steps, clock), reference, strict=True)]
                row[name]["beyond_reference"] = ratios(own, base)
        if memory:
            row["memory"] = {"peak_bytes": memory[arm]["peak"]}
            for base in BASELINES:
                row["memory"][f"to_{base}"] = memory[arm]["peak"] / memory[base]["peak"]
                above = [memory[name]["peak"] - memory[name]["before"] for name in (arm, base)]
                row["memory"][f"above_start_to_{base}"] = above[0] / above[1]
    return found


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument(
        "--method", action="append", help="arm: method or a+b; repeatable (ace+spine+lp_reg)"
    )
    options_.add_argument("--parameters", type=json.loads, default={}, help="JSON: parameters by method")
    options_.add_argument(
        "--size", action="append", choices=sorted(SIZES), help="model, repeatable (char, wide)"
    )
    options_.add_argument("--adapter", action="append", choices=["full", "lora"], help="repeatable (full)")
    options_.add_argument(
        "--schedule", action="append", choices=sorted(STEPS_PER_ROLLOUT), help="repeatable (on_policy)"
    )
    options_.add_argument(
        "--dtype",
        action="append",
        choices=["float32", "bfloat16", "autocast_bfloat16"],
        help="of the weights, or float32 weights under autocast; repeatable (float32)",
    )
    options_.add_argument("--rollouts", type=int, default=60, help="timed generation batches per arm (60)")
    options_.add_argument("--warmup", type=int, default=4, help="generation batches that do not count (4)")
    options_.add_argument("--tokens", type=int, default=128, help="longest completion (128)")
    options_.add_argument("--layers", type=int, help="layers of the model (those of the size)")
    options_.add_argument("--dead", type=float, default=0.0, help="share of groups without advantage (0)")
    options_.add_argument("--no-memory", action="store_true", help="leave the memory out")
    options_.add_argument(
        "--peak-rollouts", type=int, default=3, help="generation batches for the memory (3)"
    )
    options_.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    options = options_.parse_args()
    quiet(options)
    if options.peak:
        print(json.dumps(peak(*options.peak, options)))
        return
    arms = [*BASELINES, "off", *(options.method or ["ace+spine+lp_reg"])]
    cases = itertools.product(
        options.size or ["char", "wide"],
        options.adapter or ["full"],
        options.schedule or ["on_policy"],
        options.dtype or ["float32"],
    )
    results = []
    for values in cases:
        case = dict(zip(("size", "adapter", "schedule", "dtype"), values, strict=True))
        results.append({**case, "arms": compare(arms, case, options)})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)  # a long run may be stopped
    report(options, hidden=("peak", "size", "adapter", "schedule", "dtype"), results=results)


if __name__ == "__main__":
    main()

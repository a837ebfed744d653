"""Reward per second where groups are dead, ours against TRL's: ``python scripts/bench/bench_waste.py``, JSON.

Plain ``trl.GRPOTrainer`` and ours train on the task of a configuration, from one warm start, with the same
seeds. The arms of a seed live in one process and take turns step by step, so that a busy machine slows all of
them alike; each has its own random state, so that they start with the same rollouts. Arms:

- ``trl``;
- ``skip``: skip_zero_advantage, the trajectory of ``trl`` up to rounding;
- ``both``: dynamic_sampling and skip_zero_advantage, all else equal: more useful groups per step;
- ``both_half``: the same with half the rows per step: where half of the groups are dead, about as many useful
  groups as in ``trl``.

The reward is that of the first generation of a step in every arm, of prompts that nobody selected, each new
to the policy as long as the run is shorter than the data set; it is smoothed over the last steps. What it is
set against: ``processor``, processor seconds of the arm's thread (one thread computes); ``seconds`` of wall
clock; ``tokens``, completion tokens generated, those of thrown-away groups included. Measured are what each
arm spends until the reward has risen by a share of what ``trl`` gains in the whole run, as ratio of ``trl``
to the arm (above 1 the arm is cheaper), and the reward when the cheapest arm is through. Means and 95 %
intervals over seeds, ratios in logarithms.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Stopwatch, Turns, parser, quiet, report
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.config.check import check_and_load
from posttrain.config.schema import ModelConfig, RunConfig
from posttrain.data import LoadedData, load_data, render
from posttrain.evaluation.seeds import over_seeds
from posttrain.models.load import load_model
from posttrain.rewards import build_rewards
from posttrain.rl import registry
from posttrain.run.directory import RunDirectory
from posttrain.run.trainers import trl_config

CONFIG = Path(__file__).parents[2] / "configs/evidence/dynamic_sampling.yaml"
ARMS = ("skip", "both", "both_half")
SPENT = ("processor", "seconds", "tokens")
SHARES = (0.5, 0.7, 0.9)
SMOOTH = 10


class Clock(TrainerCallback):
    """Lets one arm at a time take one step with its own random state, times it and keeps what it logs."""

    def __init__(self, turns: Turns, arm: int, seed: int) -> None:
        self.turns, self.arm = turns, arm
        self.random = torch.Generator().manual_seed(seed).get_state()
        self.steps: list[tuple[float, float]] = []
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.turns.wait(self.arm)
        torch.set_rng_state(self.random)
        self._watch = Stopwatch()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.steps.append(self._watch.read())
        self.random = torch.get_rng_state()
        self.turns.next()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        del args, state, control, kwargs
        if "reward" in logs:
            self.logs.append(logs)

    def spent(self, rows: int) -> dict[str, list[float]]:
        """Return what was spent up to the end of each step."""
        generated = [
            rows * logs["completions/mean_length"] + logs.get("dynamic_sampling/extra_tokens", 0.0)
            for logs in self.logs
        ]
        wall, processor = zip(*self.steps, strict=True)
        per_step = {"processor": processor, "seconds": wall, "tokens": generated}
        return {name: list(itertools.accumulate(values)) for name, values in per_step.items()}


def warm_start(config: Path, folder: str, overrides: Sequence[str]) -> str:
    """Train one warm start and return its folder."""
    command = [sys.executable, "-m", "posttrain", "train", str(config), *overrides, f"run_dir={folder}/warm"]
    done = subprocess.run(
        [*command, "trainer.max_steps=1", "evaluate=null", "export=null"], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"the warm start failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    return str(RunDirectory(Path(folder) / "warm").warm_start.model)


def build(arm: str, config: RunConfig, data: LoadedData, model_path: str, folder: str, seed: int) -> Any:
    """Return the trainer of an arm."""
    model, tokenizer = load_model(ModelConfig(path=model_path), seed=seed)
    fields = {**config.trainer, "seed": seed, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    if arm == "both_half":
        fields["per_device_train_batch_size"] //= 2
    arguments: dict[str, Any] = {
        "model": model,
        "args": trl_config(GRPOConfig, fields, RunDirectory(Path(folder) / f"{arm}-{seed}")),
        "reward_funcs": list(build_rewards(config.rewards, data)),
        "train_dataset": render(data.train, tokenizer, config.data),
        "processing_class": tokenizer,
    }
    if arm == "trl":
        return TRLGRPOTrainer(**arguments)
    methods: dict[str, dict[str, Any]] = {"skip_zero_advantage": {}}
    if arm != "skip":
        methods["dynamic_sampling"] = config.methods.get("dynamic_sampling", {})
    return GRPOTrainer(**arguments, methods=registry.build(methods))


def run(arms: Sequence[str], seed: int, **made: Any) -> dict[str, Any]:
    """Train all arms in turn; return the numbers of this seed."""
    turns, clocks, threads, trainers = Turns(len(arms)), {}, [], []
    for number, arm in enumerate(arms):
        trainer = build(arm, seed=seed, **made)
        trainer.remove_callback(PrinterCallback)
        clocks[arm] = Clock(turns, number, seed)
        trainer.add_callback(clocks[arm])
        trainers.append(trainer)
        threads.append(threading.Thread(target=trainer.train, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for trainer in trainers:
        for reward in trainer.reward_funcs:
            reward.close()
    rows = {
        arm: trainer.args.per_device_train_batch_size for arm, trainer in zip(arms, trainers, strict=True)
    }
    return measure(clocks, {arm: clock.spent(rows[arm]) for arm, clock in clocks.items()})


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and those up to SMOOTH - 1 places before it."""
    return [statistics.fmean(values[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(values))]


def spent_until(reward: Sequence[float], spent: Sequence[float], target: float) -> float | None:
    """Return what was spent when a smoothed reward first reached a target after SMOOTH steps, or None."""
    pairs = list(zip(reward, spent, strict=True))[SMOOTH - 1 :]
    return next((cost for value, cost in pairs if value >= target), None)


def measure(clocks: dict[str, Clock], spent: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return the numbers of one seed."""
    rewards = {arm: smoothed([logs["reward"] for logs in clock.logs]) for arm, clock in clocks.items()}
    # trl and skip begin with the same rollouts: one estimate of where all arms start
    start = rewards["trl"][SMOOTH - 1]
    gain = max(rewards["trl"]) - start
    found: dict[str, Any] = {}
    for name in SPENT:
        common = min(costs[name][-1] for costs in spent.values())
        found[name] = {
            arm: {
                "per_step": costs[name][-1] / len(costs[name]),
                "until": {
                    str(share): spent_until(rewards[arm], costs[name], start + share * gain)
                    for share in SHARES
                },
                "reward_at_common": [
                    value for value, cost in zip(rewards[arm], costs[name], strict=True) if cost <= common
                ][-1],
            }
            for arm, costs in spent.items()
        }
    every = slice(SMOOTH - 1, None, SMOOTH)
    dead = {
        arm: smoothed([logs["frac_reward_zero_std"] for logs in clock.logs]) for arm, clock in clocks.items()
    }
    found["reward"] = {arm: [round(value, 4) for value in values[every]] for arm, values in rewards.items()}
    found["dead_groups"] = {arm: [round(value, 4) for value in values[every]] for arm, values in dead.items()}
    return found


def summary(seeds: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """Return means over seeds: dead groups of ``trl``, ratios of cost, and the rewards at equal cost."""
    dead = [statistics.fmean(seed["dead_groups"]["trl"]) for seed in seeds]
    found: dict[str, Any] = {"dead_groups_of_trl": over_seeds(dead).to_dict()}
    for name in SPENT:
        found[name] = {}
        for arm in arms[1:]:
            pairs = [(seed[name]["trl"], seed[name][arm]) for seed in seeds]
            found[name][arm] = {
                **{
                    f"until_{share}_of_gain": ratio(
                        [(a["until"][str(share)], b["until"][str(share)]) for a, b in pairs]
                    )
                    for share in SHARES
                },
                "per_step": ratio([(a["per_step"], b["per_step"]) for a, b in pairs]),
                "reward_more_at_equal_cost": over_seeds(
                    [b["reward_at_common"] - a["reward_at_common"] for a, b in pairs]
                ).to_dict(),
            }
    return found


def ratio(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Return the geometric mean over seeds of first / second with its interval."""
    logs = [None if a is None or b is None else math.log(a / b) for a, b in pairs]
    found = over_seeds(logs).to_dict()
    return {key: None if found[key] is None else math.exp(found[key]) for key in ("value", "low", "high")} | {
        "seeds": found["seeds"],
        "not_reached": found["left_out"],
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--config", type=Path, default=CONFIG, help="configuration of the task")
    arguments.add_argument("--model", help="folder of a finished warm start (one is made)")
    arguments.add_argument("--arm", action="append", choices=ARMS, help="arms beside trl (all)")
    arguments.add_argument("--seeds", type=int, default=5, help="seeds (5)")
    arguments.add_argument("--first-seed", type=int, default=0, help="the first of them (0)")
    arguments.add_argument("--steps", type=int, default=60, help="steps per arm (60)")
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the configuration")
    options: argparse.Namespace = arguments.parse_args()
    quiet(options)
    checked, config = check_and_load(
        options.config, [*options.overrides, f"trainer.max_steps={options.steps}"]
    )
    if config is None:
        sys.exit(checked.text())
    arms = ["trl", *(options.arm or ARMS)]
    data = load_data(config.data, config.task, hold_out=False)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or warm_start(options.config, folder, options.overrides)
        seeds = [
            run(arms, seed, config=config, data=data, model_path=model, folder=folder)
            for seed in range(options.first_seed, options.first_seed + options.seeds)
        ]
    options.config = options.config.name
    report(
        options,
        ("model",),
        trainer=config.trainer,
        data=config.data.params,
        summary=summary(seeds, arms),
        seeds=seeds,
    )


if __name__ == "__main__":
    main()

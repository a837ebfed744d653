"""Time of one optimiser step, ours against TRL's: ``python scripts/bench/bench_step.py``, JSON on stdout.

All arms live in one process and take turns step by step, so that a busy or warming machine slows all of them
alike; the ratios are of neighbouring steps. Rollouts are given, not generated: generation is the same code in
every arm and would hide what ours adds. With one thread on a CPU the processor time of the step is the better
measure on a busy machine. Memory is the peak of a process (on Linux) or device that runs one arm alone.

Arms: ``trl`` (``trl.GRPOTrainer``), ``off`` (ours with ``methods=[]``), then one per ``--method``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import registry

SIZES = {
    "tiny": {"vocab_size": 64, "hidden_size": 64},
    "wide": {"vocab_size": 151_936, "hidden_size": 64},  # the vocabulary of Qwen, for the LM head's share
}


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="a", padding_side="left"
    )


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Return completions of every length from a quarter of the limit up to it, the same in every arm."""
    longest, vocabulary = trainer.max_completion_length, trainer.model.config.vocab_size
    draw = torch.Generator().manual_seed(trainer.state.global_step)
    lengths = torch.randint(longest // 4, longest + 1, (len(prompts),), generator=draw).tolist()
    ids = [torch.randint(2, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    return {"prompt_ids": [[2] * 8 for _ in prompts], "completion_ids": ids, "logprobs": None}


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    del columns
    return [float(ids[0] % 2) for ids in completion_ids]


class TakeTurns(TrainerCallback):
    """Lets one arm at a time take one step, and times it."""

    def __init__(self, turns: Turns, arm: int) -> None:
        self.turns, self.arm = turns, arm
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.turns.wait(self.arm)
        _synchronise()
        self._started = time.perf_counter(), time.thread_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        _synchronise()
        self.seconds.append(time.perf_counter() - self._started[0])
        self.processor.append(time.thread_time() - self._started[1])
        self.turns.next()


class Turns:
    """Whose turn it is; the arms go round."""

    def __init__(self, arms: int) -> None:
        self.arms, self.current, self.changed = arms, 0, threading.Condition()

    def wait(self, arm: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.current == arm)

    def next(self) -> None:
        with self.changed:
            self.current = (self.current + 1) % self.arms
            self.changed.notify_all()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build(arm: str, size: str, steps: int, options: argparse.Namespace, folder: str) -> Any:
    """Return the trainer of an arm."""
    config = LlamaConfig(
        **SIZES[size],
        intermediate_size=256,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    args = GRPOConfig(
        output_dir=str(Path(folder) / arm.replace(":", "_")),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=options.tokens,
        learning_rate=1e-5,
        max_steps=steps,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "model": LlamaForCausalLM(config),
        "args": args,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": ["a"] * 64}),
        "processing_class": tokenizer(),
        "rollout_func": rollout,
    }
    if arm == "trl":
        return TRLGRPOTrainer(**arguments)
    methods = [] if arm == "off" else registry.build({arm: options.parameters.get(arm, {})})
    return GRPOTrainer(**arguments, methods=methods)


def times(arms: list[str], size: str, options: argparse.Namespace, folder: str) -> dict[str, TakeTurns]:
    """Run all arms in turn and return their clocks; the i-th steps are neighbours."""
    turns, callbacks, threads = Turns(len(arms)), [], []
    for number, arm in enumerate(arms):
        trainer = build(arm, size, options.steps + options.warmup, options, folder)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        callback = TakeTurns(turns, number)
        trainer.add_callback(callback)
        callbacks.append(callback)
        threads.append(threading.Thread(target=trainer.train, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(zip(arms, callbacks, strict=True))


def peak(arm: str, size: str, options: argparse.Namespace) -> int:
    """Return the peak of memory in bytes of a process that runs the arm alone: device, or resident set."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(arm, size, 3, options, folder)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # not ru_maxrss, which a child process inherits from the one that started it
    status = Path("/proc/self/status").read_text().split("\n")
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def peaks(arms: list[str], size: str) -> dict[str, int]:
    """Return :func:`peak` of every arm, each measured in a process of its own."""
    own = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    found = {}
    for arm in arms:
        done = subprocess.run([*own, "--peak", f"{arm},{size}"], capture_output=True, text=True, check=True)
        found[arm] = int(done.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", action="append", help="method to time; may be repeated (ace)")
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON: parameters by method")
    parser.add_argument("--size", action="append", choices=sorted(SIZES), help="model (all)")
    parser.add_argument("--steps", type=int, default=60, help="timed steps per arm (60)")
    parser.add_argument("--warmup", type=int, default=5, help="steps that do not count (5)")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion (64)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.peak:
        arm, size = options.peak.rsplit(",", 1)
        print(peak(arm, size, options))
        return
    arms = ["trl", "off", *(options.method or ["ace"])]
    results = {}
    for size in options.size or sorted(SIZES):
        with tempfile.TemporaryDirectory() as folder:
            clocks = times(arms, size, options, folder)
        wall = {arm: clock.seconds[options.warmup :] for arm, clock in clocks.items()}
        processor = {arm: clock.processor[options.warmup :] for arm, clock in clocks.items()}
        memory = peaks(arms, size)
        results[size] = {
            arm: {
                "median_seconds": statistics.median(wall[arm]),
                "seconds": _ratios(wall[arm], wall["trl"]),
                "processor_seconds": _ratios(processor[arm], processor["trl"]),
                "peak_bytes": memory[arm],
                "peak_ratio": memory[arm] / memory["trl"],
            }
            for arm in arms
        }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {name: getattr(options, name) for name in ("steps", "tokens", "layers", "threads")}
    print(json.dumps({"device": device, "settings": settings, "sizes": SIZES, "results": results}, indent=2))


def _ratios(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"median_ratio": median, "quartiles": [low, high]}


if __name__ == "__main__":
    main()

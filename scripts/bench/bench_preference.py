r"""Time and memory of a step of preference methods, against ``trl.DPOTrainer``'s ``sigmoid``; JSON on stdout.

Time: all arms live in one process and take turns step by step, on the same pairs of random tokens; the ratios
are of neighbouring steps. With one thread on a CPU the processor time of the step is the better measure on a
busy machine. Memory is the peak of a process (on Linux) or device that runs one arm alone, in full and above
what is there before the trainer is made. Every arm trains all weights against a reference model;
``--adapter`` trains LoRA against the model without it.

A step of TRL reads the LM head five times (forward of both models; backward of the policy for the logits, the
hidden states and the weights), one with the exact divergence six times (the reference's logits once more). On
a CPU, TRL's head also scores prompts and padding, the exact divergence completions only; ``--prompt 1
--shortest 64`` leaves nearly nothing of either.

Arms: ``trl``, ``off`` (ours with ``methods=[]``), then one per ``--arm NAME=METHODS``, where METHODS is JSON
of names and parameters::

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \
        python scripts/bench/bench_preference.py

runs the arms of :data:`ARMS` at the vocabulary of Qwen, with glibc told to keep its memory (otherwise page
faults are more than half of TRL's step, see ``bench_step.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_step import times_in_turns
from common import (
    SIZES,
    in_own_processes,
    model,
    parser,
    peak_resident,
    quiet,
    report,
    resident,
)
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig
from trl import DPOTrainer as TRLDPOTrainer

from posttrain import DPOTrainer
from posttrain.preference import registry

ARMS = {
    "tdpo": {"tdpo": {"variant": 2}},
    "sparse_po": {"sparse_po": {}},
    "mapo": {"sparse_po": {"token_mask": "mapo"}},
    "rpo": {"rpo": {}},
    "flex_dpo": {"flex_dpo": {"beta_rejected": 0.08}},
    "lipo": {"lipo": {}},
}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the numbers of its tokens."""
    words = {"<pad>": 0, "<eos>": 1, **{str(number): number for number in range(2, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def pairs(options: argparse.Namespace) -> Dataset:
    """Return pairs of random tokens; responses have from the shortest length up to the longest."""
    draw = torch.Generator().manual_seed(1)
    vocabulary = SIZES[options.size]["vocab_size"]

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (1,), generator=draw)) - 1  # and the end
        return " " + " ".join(map(str, torch.randint(3, vocabulary, (length,), generator=draw).tolist()))

    rows = range(options.pairs * 8)
    names = ("chosen", "rejected")
    return Dataset.from_dict(
        {"prompt": [text(options.prompt + 1, options.prompt + 1) for _ in rows]}
        | {name: [text(options.shortest, options.tokens) + " " for _ in rows] for name in names}
    )


def build(arm: str, options: argparse.Namespace, folder: Path) -> TRLDPOTrainer:
    """Return the trainer of an arm."""
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    adapter = options.adapter == "lora"
    arguments: dict[str, Any] = {
        "model": model(options.size, dtype, options.layers),
        "ref_model": None if adapter else model(options.size, dtype, options.layers),
        "args": DPOConfig(
            output_dir=str(folder / arm),
            use_cpu=not torch.cuda.is_available(),
            bf16=options.dtype == "autocast_bfloat16",
            per_device_train_batch_size=options.pairs,
            learning_rate=1e-5,
            max_steps=options.steps,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=options.checkpointing,
            max_length=None,
        ),
        "train_dataset": pairs(options),
        "processing_class": tokenizer(SIZES[options.size]["vocab_size"]),
        "peft_config": LoraConfig(r=8, target_modules="all-linear") if adapter else None,
    }
    torch.manual_seed(0)
    if arm == "trl":
        trainer = TRLDPOTrainer(**arguments)
    else:
        trainer = DPOTrainer(**arguments, methods=registry.build(options.arms.get(arm, {})))
    trainer.remove_callback(PrinterCallback)  # stdout is for the JSON
    return trainer


def memory_of(arm: str, options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Train one arm for a few steps; return bytes."""
    before = resident()
    build(arm, options, folder).train()
    return {"before": before, "peak": peak_resident()}


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument(
        "--arm", action="append", default=[], metavar="NAME=METHODS", help="instead of the built-in arms"
    )
    made.add_argument("--size", default="wide", choices=sorted(SIZES), help="model (wide)")
    made.add_argument("--layers", type=int, help="layers of the model (those of the size)")
    made.add_argument("--adapter", default="full", choices=["full", "lora"], help="what trains (full)")
    made.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "autocast_bfloat16"], help="(float32)"
    )
    made.add_argument("--checkpointing", action="store_true", help="recompute activations")
    made.add_argument("--no-time", action="store_true", help="memory only")
    made.add_argument("--no-memory", action="store_true", help="time only")
    for name, default in {
        "pairs": 4, "prompt": 8, "shortest": 16, "tokens": 64, "steps": 24, "warmup": 4
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    made.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = made.parse_args()
    written = {
        name: json.loads(methods or "{}") for name, _, methods in (a.partition("=") for a in options.arm)
    }
    known = registry.available()
    options.arms = written or {name: methods for name, methods in ARMS.items() if set(methods) <= set(known)}
    quiet(options)
    disable_progress_bars()
    names = ["trl", "off", *options.arms]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.memory_of:
            options.steps = 3
            print(json.dumps(memory_of(options.memory_of, options, folder)))
            return
        results: dict[str, Any] = {}
        if not options.no_memory:
            # first, while this process holds nothing
            found = dict(zip(names, in_own_processes([["--memory-of", arm] for arm in names]), strict=True))
            base = found["trl"]
            results["memory"] = {
                arm: {
                    **row,
                    "to_trl": row["peak"] / base["peak"],
                    "above_start_to_trl": (row["peak"] - row["before"]) / (base["peak"] - base["before"]),
                }
                for arm, row in found.items()
            }
        if not options.no_time:
            results["time"] = times_in_turns(
                {arm: build(arm, options, folder) for arm in names},
                "trl",
                threads=options.threads,
                warmup=options.warmup,
            )
    report(options, hidden=("memory_of", "arms", "arm"), arms=options.arms, **results)


if __name__ == "__main__":
    sys.exit(main())

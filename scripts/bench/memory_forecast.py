"""Memory forecast of ``posttrain check --deep`` against what runs take; JSON on stdout.

Each arm is a configuration, forecast in one process and carried out by ``posttrain train`` in two others, for
a few steps on a decoder with random weights. ``resident`` is the growth of the process from before the model
is loaded to its highest point (VmHWM of Linux), after the same run was done once on a tiny model, so that
libraries are loaded, and with glibc told to give freed blocks back at once. ``tensors`` is the largest sum
of living tensors of the run (:class:`posttrain.deep.live.LiveTensors`), without what an operation takes and
gives back inside itself, and with what TRL's head reserves and never writes to. The bar is 15 % of
``resident``::

    python scripts/bench/memory_forecast.py
    python scripts/bench/memory_forecast.py --configs

The second is about the runs of configs/ that are made for a CPU, with their own data, rows of all lengths and
all their steps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from common import in_own_processes, parser, peak_resident, quiet, report, resident
from datasets import disable_progress_bars

from posttrain.config.check import load_run_config
from posttrain.config.schema import RunConfig
from posttrain.deep.check import forecast_run
from posttrain.deep.live import LiveTensors
from posttrain.deep.memory import PROCESS_BYTES
from posttrain.models.embedded import build_model, build_tokenizer
from posttrain.run.train import train

STEPS = 2
GLIBC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TRAINER = {
    "max_steps": STEPS,
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"task": "sft"},
    "sft_checkpointed": {"task": "sft", "trainer": {"gradient_checkpointing": True}},
    "sft_accumulated": {"task": "sft", "trainer": {"gradient_accumulation_steps": 2}},
    "sft_lora": {"task": "sft", "model": {"adapter": {"type": "lora", "r": 8}}},
    "sft_hft": {"task": "sft", "selection": "hft"},
    "sft_random": {"task": "sft", "selection": {"random": {"budget": 0.05}}},
    "dpo": {"task": "preference"},
    "dpo_lora": {"task": "preference", "model": {"adapter": {"type": "lora", "r": 8}}},
    "sparse_po": {"task": "preference", "methods": {"sparse_po": {}}},
    "rpo": {"task": "preference", "methods": {"rpo": {}}},
    "grpo": {"task": "rlvr"},
    "grpo_kl": {"task": "rlvr", "trainer": {"beta": 0.04}},
    # many completions sampled at once: the cache is what counts
    "grpo_sampling": {
        "task": "rlvr",
        "trainer": {"gradient_accumulation_steps": 32, "per_device_train_batch_size": 4},
    },
    "grpo_lora": {"task": "rlvr", "model": {"adapter": {"type": "lora", "r": 8}}},
}
# CPU-size runs of configs/, all their steps, without what comes before and after; with other settings
ALONE = ("evaluate=null", "export=null", "warm_start=null", "trainer.save_strategy=no")
CONFIGS: dict[str, tuple[str, ...]] = {
    "sft/chain_sum_cpu.yaml": (),
    "selection/packed_stories.yaml": (),
    "preference/dpo_stories.yaml": (),
    "preference/dpo_stories.yaml + SparsePO": ("methods.sparse_po={}",),
    "preference/dpo_stories.yaml + LoRA": ("model.adapter={r: 8}",),
    "rlvr/quickstart.yaml": ("trainer.max_steps=20",),
    "rlvr/stories_lora.yaml": (),
}
ROOT = Path(__file__).resolve().parents[2]


def checkpoint(folder: Path, options: argparse.Namespace, *, tiny: bool) -> Path:
    """Write a checkpoint of the size of the benchmark, or one of nothing to warm up with."""
    sizes: dict[str, Any] = {"hidden_size": 32, "layers": 1, "heads": 4, "intermediate_size": 32}
    if not tiny:
        sizes = {
            "hidden_size": options.hidden,
            "layers": options.layers,
            "heads": 8,
            "intermediate_size": 3 * options.hidden,
        }
    model = build_model(**sizes)
    if options.vocabulary > model.config.vocab_size and not tiny:
        model.resize_token_embeddings(options.vocabulary, mean_resizing=False)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def configuration(arm: str, model: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Write the configuration of an arm; every row has the same number of tokens."""
    prompt = options.tokens // 4
    rest = options.tokens - prompt
    rows = {
        "sft": lambda i: {"prompt": "a" * prompt, "completion": chr(97 + i % 26) * (rest - 1)},
        "preference": lambda i: {
            "prompt": "a" * prompt,
            "chosen": chr(97 + i % 26) * (rest - 1),
            "rejected": chr(65 + i % 26) * (rest - 1),
        },
        "rlvr": lambda i: {"prompt": chr(97 + i % 26) * prompt, "answer": str(i)},
    }
    own = ARMS[arm]
    file = folder / f"{own['task']}.jsonl"
    count = options.rows * STEPS * 2
    file.write_text("".join(json.dumps(rows[own["task"]](i)) + "\n" for i in range(count)))
    trainer = TRAINER | {
        "per_device_train_batch_size": options.rows,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    config: dict[str, Any] = {
        "task": own["task"],
        "run_dir": str(folder / f"run-{model.name}"),
        "threads": options.threads,
        "model": {"path": str(model), **own.get("model", {})},
        "data": {"source": str(file)},
        "trainer": trainer | own.get("trainer", {}),
    }
    if own["task"] == "rlvr":
        config["rewards"] = [{"format": {"params": {"pattern": "[a-z]", "match": "search"}}}]
        config["trainer"] |= {"num_generations": options.rows, "max_completion_length": rest}
    config |= {section: own[section] for section in ("selection", "methods") if section in own}
    path = folder / f"{arm}-{model.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_of(arm: str, folder: Path, options: argparse.Namespace, *, tiny: bool = False) -> RunConfig:
    """Return the run of an arm; ``tiny`` for one that only loads what a run needs."""
    if arm in CONFIGS:
        given = [*ALONE, *CONFIGS[arm], f"run_dir={folder / 'run'}{tiny:d}", "trainer.report_to=none"]
        if not arm.startswith("rlvr/"):
            given.append("rewards=[]")  # they are for the evaluation
        given += ["trainer.disable_tqdm=true", *(["trainer.max_steps=1"] if tiny else [])]
        os.chdir(ROOT)  # paths in there are of the checkout
        return load_run_config(ROOT / "configs" / arm.split(" + ")[0], given)
    model = checkpoint(folder / ("tiny" if tiny else "model"), options, tiny=tiny)
    return load_run_config(configuration(arm, model, folder, options))


def measured(arm: str, options: argparse.Namespace, folder: Path, *, tensors: bool) -> dict[str, int]:
    """Carry out an arm in this process; return the bytes it took."""
    train(run_of(arm, folder, options, tiny=True))
    config = run_of(arm, folder, options)
    gc.collect()
    if tensors:
        with LiveTensors() as live:
            train(config)
        return {"tensors": live.peak}
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    train(config)
    return {"resident": peak_resident() - before}


def forecast_of(arm: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what the check says, from shapes."""
    found = forecast_run(run_of(arm, folder, options), device="cpu")
    assert found is not None
    return found.as_json()


def main() -> None:
    """Forecast, measure and print."""
    made = parser(__doc__)
    made.add_argument("--arm", action="append", choices=sorted(ARMS | CONFIGS), help="(all)")
    made.add_argument("--configs", action="store_true", help="the runs of configs/")
    for name, default in {
        "hidden": 256, "layers": 4, "vocabulary": 4096, "tokens": 128, "rows": 8
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    made.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = made.parse_args()
    quiet(options)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only:
            what, arm = options.only
            saved, sys.stdout = sys.stdout, sys.stderr
            try:
                found = (
                    forecast_of(arm, options, folder)
                    if what == "forecast"
                    else measured(arm, options, folder, tensors=what == "tensors")
                )
            finally:
                sys.stdout = saved
            print(json.dumps(found))
            return
        os.environ.update(GLIBC)  # for the processes that are started
        arms = {}
        for arm in options.arm or (CONFIGS if options.configs else ARMS):
            kinds = ("forecast", "resident") if arm in CONFIGS else ("forecast", "resident", "tensors")
            found, *taken = in_own_processes([["--only", kind, arm] for kind in kinds])
            took = {name: value for one in taken for name, value in one.items()}
            arms[arm] = {
                "forecast": found["peak"],
                **took,
                "to_resident": found["peak"] / took["resident"],
                "moment": found["moment"],
                "terms": found["terms"],
            }
            if "tensors" in took:
                arms[arm]["to_tensors"] = (found["peak"] - PROCESS_BYTES + found["unused"]) / took["tensors"]
            print(f"{arm}: {arms[arm]['to_resident']:.3f}", file=sys.stderr)
    report(options, hidden=("only", "arm"), glibc=GLIBC, arms=arms)


if __name__ == "__main__":
    sys.exit(main())

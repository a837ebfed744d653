r"""Time and memory of supervised steps with a selection, against full fine-tuning with TRL; JSON on stdout.

Time: all arms live in one process and take turns step by step; ratios are of neighbouring steps. With one
thread on a CPU the processor time of the step is the better measure on a busy machine. ``flop_bound`` is
what the matrix products alone would give for arms that freeze whole matrices: forward and input gradients
stay, the weight gradient of a frozen matrix is not computed.

Memory: one process per arm with bfloat16 weights. ``state`` are the bytes of optimiser state (fp32 masters
included where the arm has them), ``gradients`` those that stand at the optimiser's step, ``selection``
indices and old values; ``beyond_weights`` is the sum of the three per weight of the model. ``peak`` is what
the process held above the model at the highest point (resident, on Linux), activations and transient
gradients included.

Arms: ``full`` (``trl.SFTTrainer``), then one per ``--arm NAME=SELECTION``, a selector with JSON parameters::

    python scripts/bench/bench_selection.py --arm 'hft=hft {}' --arm 'packed=random {"budget": 0.01}' \
        --arm 'id3=id3 {"budget": 0.01}'
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
    parser,
    peak_resident,
    quiet,
    report,
    resident,
    tokenizer,
)
from common import model as sized
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from posttrain import Select, SFTTrainer
from posttrain.selection import registry


def model(options: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    """Return a decoder with random weights, the same at every call."""
    if options.size is not None:
        return sized(options.size, dtype)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(config).to(dtype)


def selection(text: str) -> Select:
    """Return what ``NAME {"parameter": value}`` selects."""
    name, _, params = text.partition(" ")
    return Select(registry.resolve(name)(**json.loads(params or "{}")))


def build(
    arm: str, options: argparse.Namespace, folder: Path, dtype: torch.dtype = torch.float32
) -> TRLSFTTrainer:
    """Return the trainer of an arm."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(2, options.vocabulary, (options.rows * 4, options.tokens), generator=draw)
    arguments: dict[str, Any] = {
        "model": model(options, dtype),
        "args": SFTConfig(
            output_dir=str(folder / arm),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            per_device_train_batch_size=options.rows,
            learning_rate=1e-4,
            max_steps=options.steps,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            max_length=None,
        ),
        "train_dataset": Dataset.from_dict({"input_ids": rows.tolist()}),
        "processing_class": tokenizer(),
    }
    if arm == "full":
        trainer = TRLSFTTrainer(**arguments)
    else:
        trainer = SFTTrainer(**arguments, selection=selection(options.arms[arm]))
    trainer.remove_callback(PrinterCallback)  # stdout is for the JSON
    return trainer


# ---- time --------------------------------------------------------------------------------------------------


def time_arms(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all arms in turns; return seconds and ratios against full fine-tuning."""
    trainers = {name: build(name, options, folder) for name in ("full", *options.arms)}
    found = times_in_turns(trainers, "full", threads=options.threads, warmup=options.warmup)
    return {name: {**values, **bound(trainers[name], options)} for name, values in found.items()}


def bound(trainer: Any, options: argparse.Namespace) -> dict[str, float]:
    """Return the share of the floating-point operations of matrix products that remains."""
    plan = getattr(getattr(trainer, "selection", None), "plan", None)
    if plan is None or plan.partial:
        return {}
    matrices = {n: part for n, part in plan.tensors.items() if len(part.shape) == 2 and "embed" not in n}
    total = sum(part.numel for part in matrices.values())
    trained = sum(part.numel for part in matrices.values() if part.kind == "all")
    # per token and layer, queries against keys and weights against values, forward and twice backward
    attention = options.tokens * options.hidden * options.layers
    return {"flop_bound": (2 * total + trained + 3 * attention) / (3 * total + 3 * attention)}


# ---- memory ------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Counts what stands at the optimiser's step."""

    gradients = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        self.gradients = max(self.gradients, held)


def memory_of(arm: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one arm for a few steps; return bytes."""
    trainer = build(arm, options, folder, torch.bfloat16)
    watch = Watch()
    trainer.add_callback(watch)
    before = resident()
    trainer.train()
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    state = sum(
        value.nbytes
        for values in optimizer.state.values()
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and name not in ("step", "index", "start")
    )
    weights = sum(p.numel() for p in model(options, torch.bfloat16).parameters())
    extra, selected = 0, weights
    chosen: Any = getattr(trainer, "selection", None)
    if chosen is not None:
        selected = chosen.plan.count
        for packed in chosen.packed.values():
            state += packed.values.nbytes  # the fp32 masters
            extra += packed.index.nbytes + packed.base.nbytes
        extra += sum(
            value.nbytes
            for values in optimizer.state.values()
            for name, value in values.items()
            if name in ("index", "start")
        )
    return {
        "weights": weights,
        "selected": selected,
        "state": state,
        "state_per_selected": state / selected,
        "gradients": watch.gradients,
        "selection": extra,
        "beyond_weights": (state + watch.gradients + extra) / weights,
        "peak": peak_resident() - before,
    }


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--arm", action="append", default=[], metavar="NAME=SELECTION", help="one more arm")
    for name, default in {
        "hidden": 512, "layers": 8, "vocabulary": 2048, "tokens": 64, "rows": 8, "steps": 24, "warmup": 4
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    made.add_argument(
        "--size", choices=sorted(SIZES), help="a model of the benchmarks instead of these numbers"
    )
    made.add_argument("--no-memory", action="store_true", help="time only")
    made.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.size is not None:
        known = {"hidden": "hidden_size", "layers": "num_hidden_layers", "vocabulary": "vocab_size"}
        vars(options).update({name: SIZES[options.size][key] for name, key in known.items()})
    options.arms = dict(text.partition("=")[::2] for text in options.arm)
    quiet(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.memory_of:
            options.steps = 4
            print(json.dumps(memory_of(options.memory_of, options, folder)))
            return
        names = ["full", *options.arms]
        calls = [] if options.no_memory else [["--memory-of", arm] for arm in names]
        memory = dict(zip(names[: len(calls)], in_own_processes(calls), strict=True))
        for arm in memory:
            for part in ("state", "gradients"):
                memory[arm][f"{part}_of_full"] = memory[arm][part] / memory["full"][part]
        times = time_arms(options, folder)
    report(options, hidden=("memory_of", "arms", "arm"), arms=options.arms, memory=memory, time=times)


if __name__ == "__main__":
    sys.exit(main())

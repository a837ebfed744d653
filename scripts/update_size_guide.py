"""Rewrite configs/README.md: which launch file and micro-batch for which model on how many GPUs, by forecast.

Every cell is a memory forecast (:mod:`posttrain.deep.memory`) of a step of 2048 tokens a row, with gradient
checkpointing, on models that have shapes and no weights; nothing here was measured on those GPUs. It takes
some ten minutes; a test compares rows of the smallest model with the file::

    python scripts/update_size_guide.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from posttrain.config.schema import RunConfig
from posttrain.config.tasks import TASKS
from posttrain.config.trainer_check import check_trainer
from posttrain.deep.memory import GIB, forecast, what_trains
from posttrain.deep.subject import Subject
from posttrain.deep.trace import Shape, Traced, trace_step

FILE = Path(__file__).resolve().parents[1] / "configs" / "README.md"
CARD, BAR = 80e9 / GIB, 1.15
"""GiB of a card, and how far a run may lie above its forecast."""

TOKENS = 2048
GPUS = (1, 4, 8)
ROWS = (8, 2)
"""Sequences of a micro-batch that are tried; a pair is two."""

VLLM = 8 * GIB
"""Cache that an engine beside the trainer should have at least, besides its weights."""

SHAPES: dict[str, tuple[int, ...]] = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
    "14B": (5120, 13_824, 48, 40, 8, 152_064),
}
"""Of Qwen2.5: width, MLP width, layers, heads, key heads, vocabulary; the small two tie embeddings."""

TASK_NAMES = {"sft": "SFT", "preference": "DPO", "rlvr": "GRPO"}
# launch file, key among the ways to shard, type of the weights when all of them train
WHOLE = (("ddp", "DDP", "float32"), ("zero2", "ZeRO-2", "bfloat16"), ("zero3", "ZeRO-3", "bfloat16"))
ADAPTER = (("ddp", "DDP", "bfloat16"), ("zero3", "ZeRO-3", "bfloat16"))


@dataclass(frozen=True)
class Way:
    """A way to train that fits.

    Attributes:
        file: Launch file in configs/accelerate/.
        rows: Sequences of a micro-batch.
        peak: Bytes of each GPU.
    """

    file: str
    rows: int
    peak: int

    def text(self, pairs: bool) -> str:
        """Return a cell of the table."""
        return f"`{self.file}`, {self.rows // 2 if pairs else self.rows}: {self.peak / GIB:.0f} GiB"


class Sizes:
    """Forecasts of one model; a step is traced once for all tasks and numbers of GPUs."""

    def __init__(self, size: str) -> None:
        self.size = size
        self._traced: dict[tuple[str, bool, int], Traced] = {}

    def way(self, task: str, gpus: int, *, adapter: bool) -> Way | None:
        """Return the first way that fits with a miss of 15 %: the simplest launch, then the larger batch."""
        for file, key, dtype in ADAPTER if adapter else WHOLE:
            if gpus == 1 and key != "DDP":
                return None
            for rows in ROWS:
                peak = self._peak(task, gpus, key, dtype, rows, adapter)
                if peak is not None and peak * BAR <= CARD * GIB:
                    return Way("single" if gpus == 1 else file, rows, peak)
        return None

    def _peak(self, task: str, gpus: int, key: str, dtype: str, rows: int, adapter: bool) -> int | None:
        model = skeleton(self.size, dtype)
        count = sum(p.numel() * p.element_size() for p in model.parameters())
        if not adapter and key == "DDP" and 4 * count > CARD * GIB:  # weights, gradients, two moments
            return None
        subject = subject_of(model, task, gpus, dtype, rows, adapter=adapter)
        place = (dtype, adapter, rows)
        if place not in self._traced:
            self._traced[place] = _trace(subject, rows)
        found = forecast(subject, TOKENS, "cuda", self._traced[place])
        terms = found.terms if gpus == 1 else found.sharded[key]
        peak = sum(terms.values())
        if task != "rlvr":
            return peak
        passing = ("gradients", "activations", "logits of the LM head", "DDP buckets", "layers in use")
        sampling = sum(size for name, size in terms.items() if name not in passing)
        return max(peak, sampling + count * 2 // torch.empty(0, dtype=getattr(torch, dtype)).itemsize + VLLM)


def skeleton(size: str, dtype: str) -> Any:
    """Return a model without weights."""
    width, inner, layers, heads, kv_heads, vocabulary = SHAPES[size]
    settings = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=size in ("0.5B", "1.5B"),
    )
    with torch.device("meta"):
        return Qwen2ForCausalLM(settings).to(getattr(torch, dtype))


def subject_of(model: Any, task: str, gpus: int, dtype: str, rows: int, *, adapter: bool) -> Subject:
    """Return a run that is not there: a configuration and shapes."""
    spec = TASKS[task]  # type: ignore[index]
    section: dict[str, Any] = {"path": "a/model", "dtype": dtype}
    if adapter:
        section["adapter"] = {"type": "lora", "r": 16, "target_modules": "all-linear"}
    trainer: dict[str, Any] = {
        "per_device_train_batch_size": rows // 2 if spec.pairs else rows,
        "gradient_checkpointing": True,
        "bf16": True,
    }
    if spec.generates:
        own = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": True,
            "num_generations": rows,
        }
        trainer |= own
    run = {"task": task, "run_dir": "runs/none", "model": section, "data": {"source": "rows.jsonl"}}
    config = RunConfig.model_validate(
        {**run, "trainer": trainer, "rewards": ["math"] if spec.generates else []}
    )
    values = check_trainer(config.trainer, spec, ("trainer",), adapter=adapter)[1]
    return Subject(
        config=config, spec=spec, trainer=values, processes=gpus, data=None, model=model, tokenizer=None,
        rows=None, held_out=None, trouble={},
    )  # fmt: skip


def _trace(subject: Subject, rows: int) -> Traced:
    return trace_step(
        subject.model,
        Shape(rows, TOKENS),
        "sft",  # the heads of the tasks differ on CPUs only
        device="cuda",
        checkpointing=True,
        autocast=torch.bfloat16,
        prepare=what_trains(subject).prepare,
    )


def rows_of(size: str) -> Iterator[str]:
    """Yield the rows of the table for one model."""
    sizes = Sizes(size)
    for task, name in TASK_NAMES.items():
        for gpus in GPUS:
            ways = [sizes.way(task, gpus, adapter=adapter) for adapter in (False, True)]
            cells = ["-" if way is None else way.text(TASKS[task].pairs) for way in ways]  # type: ignore[index]
            yield f"| {size} | {name} | {gpus} | {cells[0]} | {cells[1]} |"


HEAD = """# Which launch for which model

**A forecast, not measured on these GPUs.** Memory of each GPU by `posttrain check --deep --device cuda`,
for models of the shapes of Qwen2.5, {tokens} tokens a row, gradient checkpointing and bf16. Each cell:
launch file in `configs/accelerate/`, `per_device_train_batch_size` (pairs for DPO), and what a GPU holds
at the peak. Of the ways that stay below {limit:.0f} GiB, so that a GPU of 80 GB has room for a forecast
that is 15 % too low, it names the simplest launch, and of the micro-batches tried ({rows} sequences) the
larger. Reach the batch you want by `gradient_accumulation_steps`.

- *All weights*: `single` and `ddp` with `model.dtype: float32`; `zero2` and `zero3` with `bfloat16` and
  the weights in fp32 beside them. DPO holds a frozen copy as reference, GRPO with `beta: 0` none.
- *LoRA*: `adapter: {{type: lora, r: 16, target_modules: all-linear}}` on a base in `bfloat16`; needs no
  copy.
- *GRPO* with `use_vllm: true, vllm_mode: colocate, vllm_enable_sleep_mode: true`: while completions are
  sampled, the engine's weights and {cache:.0f} GiB of cache fit beside what the trainer keeps. Without
  vLLM the cache of the rollout takes their place: ask the check.
- *-*: nothing tried fits. More GPUs, `zero3_offload`, a shorter `max_length`, or a selection.

What else a run holds (NCCL, the CUDA context, fragments of the allocator: 1 to 3 GiB) is in the margin.
Ask for your own settings: `WORLD_SIZE=8 posttrain check --deep --device cuda CONFIG.yaml`. Forecasts
beside measurements on a CPU: [scripts/bench/README.md](../scripts/bench/README.md).

| model | task | GPUs | all weights | LoRA |
|---|---|---|---|---|
"""


def head() -> str:
    """Return what stands above the rows."""
    limit, rows = CARD / BAR, " or ".join(map(str, ROWS))
    return HEAD.format(tokens=TOKENS, limit=limit, rows=rows, cache=VLLM / GIB)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    table = [row for size in SHAPES for row in rows_of(size)]
    FILE.write_text(head() + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()

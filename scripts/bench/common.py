"""What the benchmarks share: models built in code, clocks, memory of a process, ratios, JSON on stdout."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

QWEN_VOCABULARY = 151_936

#: Models by name; their weights are random.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
    # the shape of the embedded model of the quickstart
    "char": {
        "vocab_size": 100,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    # the vocabulary of Qwen on a small body: the LM head is nearly the whole step
    "wide": {
        "vocab_size": QWEN_VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
    },
    # the shape of Qwen2.5-0.5B, for owners of a GPU
    "qwen0.5b": {
        "vocab_size": QWEN_VOCABULARY,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
    },
}


def model(size: str, dtype: torch.dtype = torch.float32, layers: int | None = None) -> PreTrainedModel:
    """Return a model of :data:`SIZES` with random weights, the same at every call."""
    settings: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    } | SIZES[size]
    if layers is not None:
        settings["num_hidden_layers"] = layers
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if size.startswith("qwen"):
            return Qwen2ForCausalLM(Qwen2Config(**settings)).to(dtype)
        return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="a", padding_side="left"
    )


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds of wall clock and of processor time of this thread since it was made."""

    def __init__(self) -> None:
        synchronise()
        self._wall, self._processor = time.perf_counter(), time.thread_time()

    def read(self) -> tuple[float, float]:
        synchronise()
        return time.perf_counter() - self._wall, time.thread_time() - self._processor


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


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles of the ratios of neighbours."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"median_ratio": median, "quartiles": [low, high]}


def resident() -> int:
    """Return the memory of this process in bytes: on the device, or resident on Linux."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak_resident() -> int:
    """Return the largest :func:`resident` so far."""
    # not ru_maxrss, which a child process inherits from the one that started it
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().split("\n")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def in_own_processes(calls: Sequence[Sequence[str]]) -> list[Any]:
    """Run this script once more per call, with these arguments added; return the JSON on each last line.

    One after the other: on a GPU they share its memory, with what this process holds besides.
    """
    return [_in_own_process(call) for call in calls]


def _in_own_process(arguments: Sequence[str]) -> Any:
    own = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], *arguments]
    done = subprocess.run(own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(own)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    return made


def quiet(options: argparse.Namespace) -> None:
    """Silence progress and warnings, and set the number of threads."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)


def report(options: argparse.Namespace, hidden: Sequence[str] = (), **results: Any) -> None:
    """Print device, settings and results as JSON."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {name: value for name, value in vars(options).items() if name not in hidden}
    print(json.dumps({"device": device, "settings": settings, **results}, indent=2))

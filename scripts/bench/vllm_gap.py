"""How far vLLM's log-probabilities are from the trainer's over a run, and what each sync sends; JSON.

    .venv-vllm/bin/python scripts/bench/vllm_gap.py            (a GPU: the environment with posttrain[vllm])

Each arm is a GRPO run of the embedded character model with rollouts by vLLM in the same process. The gap is
the mean over sampled tokens of |log p(vLLM) - log p(trainer)| in nats, at every generation; the trainer's
comes from a forward of its own over the same tokens, as it stands then. The reward is the share of vowels,
which a policy that moves finds within some ten steps.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import torch
import transformers
from common import in_own_processes, parser, quiet, report
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from posttrain import GRPOTrainer
from posttrain.models.embedded import build_model, build_tokenizer
from posttrain.selection.random_mask import RandomMask
from posttrain.selection.settings import Select

ARMS = ("untied", "tied", "lora", "packed", "lora-bf16", "bf16")


def vowels(completions: list[str], **columns: Any) -> list[float]:
    del columns
    return [sum(character in "aeiou" for character in text) / max(len(text), 1) for text in completions]


def run(arm: str, steps: int, learning_rate: float) -> dict[str, Any]:
    """Train one arm and return what it logged."""
    gpu = torch.cuda.is_available()
    model = build_model(1, tie_word_embeddings=arm != "untied")
    if "bf16" in arm:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.config.dtype = torch.bfloat16
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    options: dict[str, Any] = {}
    if arm.startswith("lora"):
        options["peft_config"] = LoraConfig(
            r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"]
        )
    if arm == "packed":
        options["selection"] = Select(RandomMask(budget=0.05), backend="packed")
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=not gpu,
            bf16=False,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=32,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_steps=steps,
            logging_steps=1,
            use_vllm=True,
            vllm_gpu_memory_utilization=0.1,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=vowels,
            train_dataset=Dataset.from_dict({"prompt": [f"{i}: " for i in range(64)]}),
            processing_class=build_tokenizer(),
            **options,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun

    def column(key: str) -> list[float]:
        return [row[key] for row in trainer.state.log_history if key in row]

    assert trainer.weight_sync is not None
    model_bytes = trainer.weight_sync.stream.nbytes
    gaps, rewards = column("sampling/sampling_logp_difference/mean"), column("reward")
    sent = column("rollout/sync_bytes")
    tail = column("rollout_gap/over_10_percent")
    tenth = max(1, steps // 10)
    merged = trainer.model.merge_and_unload() if "peft_config" in options else trainer.model
    trainer.end_selection()
    change = {
        name: ((parameter.float() - start[name].float()).norm() / start[name].float().norm()).item()
        for name, parameter in merged.named_parameters()
    }
    moved = [name for name, size in change.items() if size > 0]
    changed = sum(start[name].nbytes for name in moved)
    if arm == "packed":
        now = dict(merged.named_parameters())
        changed = sum(int((now[n] != t.to(now[n].device)).sum()) * t.element_size() for n, t in start.items())
    return {
        "arm": arm,
        "gap_mean": sum(gaps) / len(gaps),
        "gap_max_of_steps": max(gaps),
        "gap_first_tenth": sum(gaps[:tenth]) / tenth,
        "gap_last_tenth": sum(gaps[-tenth:]) / tenth,
        "tokens_off_by_10_percent": max(tail),
        "reward_first_tenth": sum(rewards[:tenth]) / tenth,
        "reward_last_tenth": sum(rewards[-tenth:]) / tenth,
        "largest_relative_change_of_a_tensor": max(change.values()),
        "sync_bytes_first": sent[0],
        "sync_bytes_last": sent[-1],
        "model_bytes": model_bytes,
        "changed_bytes": changed,
        "sent_over_changed": sent[-1] / changed,
        "steps": steps,
        "learning_rate": learning_rate,
        "seconds": seconds,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--learning-rate", type=float, default=2e-3)
    options.add_argument("--arm", choices=ARMS, help="one arm, in this process")
    arguments = options.parse_args()
    quiet(arguments)
    if arguments.arm:
        print(json.dumps(run(arguments.arm, arguments.steps, arguments.learning_rate)))
        return
    done = in_own_processes([["--arm", arm] for arm in arguments.arms])
    report(arguments, ["arm"], results=done)


if __name__ == "__main__":
    main()

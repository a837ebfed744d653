"""Run by test_vllm_ranks.py on two ranks, each with an engine of its own; rank 0 writes FOLDER/NAME.json.

python vllm_ranks.py FOLDER NAME...      NAME: ddp, fsdp2 or zero3 (the last under accelerate launch)
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1")
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "fsdp")]

import support
import torch
from accelerate import PartialState
from peft import LoraConfig
from sharding import sharded
from transformers import AutoModelForCausalLM

from posttrain import GRPOTrainer
from posttrain.models.embedded import build_tokenizer


def run(folder: Path, name: str) -> dict[str, Any]:
    args = support.grpo_config(
        folder / name,
        max_steps=4,
        per_device_train_batch_size=8,
        max_completion_length=12,
        learning_rate=5e-3,
        use_vllm=True,
        vllm_gpu_memory_utilization=0.05,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32),
        args=args,
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    trainer.train()
    trainer.end_rollouts()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "mode": str(trainer.accelerator.distributed_type.value),
        "gap": [row["sampling/sampling_logp_difference/mean"] for row in logs],
        "share": [row["rollout/sync_share"] for row in logs],
        "lengths": [row["completions/mean_length"] for row in logs],
    }


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    for name in names:
        with sharded() if name == "fsdp2" else contextlib.nullcontext():
            found = run(folder, name)
        if torch.distributed.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))
    support.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

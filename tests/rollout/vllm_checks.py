"""Runs with a real vLLM on this machine's CPU, in one process; FOLDER/found.json has what each found.

.venv-vllm/bin/python tests/rollout/vllm_checks.py FOLDER [CHECK...]
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import support
import torch
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from posttrain import GRPOTrainer
from posttrain.models.embedded import build_model, build_tokenizer
from posttrain.rl import AEPO, DynamicSampling, GardoReference
from posttrain.rollout.updates import RolloutError
from posttrain.selection.hft import HFT
from posttrain.selection.id3 import ID3
from posttrain.selection.random_mask import RandomMask
from posttrain.selection.settings import Select

FOLDER = Path(sys.argv[1])
STEPS = 9
SMALL = {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 96}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def config(name: str, **overrides: Any) -> Any:
    settings = {
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "max_completion_length": 12,
        "use_vllm": True,
        "vllm_gpu_memory_utilization": 0.05,
    }
    return support.grpo_config(FOLDER / name, **(settings | overrides))


def trainer_of(name: str, model: Any, *, args: dict[str, Any] | None = None, **options: Any) -> GRPOTrainer:
    return GRPOTrainer(
        model=model,
        args=config(name, **(args or {})),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=build_tokenizer(),
        **options,
    )


def column(trainer: GRPOTrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def story(trainer: GRPOTrainer) -> dict[str, Any]:
    """Return what a run logged at each step."""
    return {
        "gap": column(trainer, "sampling/sampling_logp_difference/mean"),
        "bytes": column(trainer, "rollout/sync_bytes"),
        "share": column(trainer, "rollout/sync_share"),
        "syncs": trainer.weight_sync.count,
        "model_bytes": trainer.weight_sync.stream.nbytes,
    }


def moved(before: dict[str, torch.Tensor], trainer: GRPOTrainer) -> float:
    """Return the largest change of a weight."""
    now = support.weights(trainer.model)
    return max((now[name] - tensor).abs().max().item() for name, tensor in before.items() if name in now)


def whole(tied: bool) -> dict[str, Any]:
    model = build_model(1, tie_word_embeddings=tied, **SMALL)
    before = support.weights(model)
    trainer = trainer_of(f"whole-{tied}", model)
    trainer.train()
    return story(trainer) | {"moved": moved(before, trainer)}


def upstream_fails() -> dict[str, Any]:
    """TRL's own sync on this backend: the reason for ours."""
    trainer = trainer_of("upstream", build_model(1, **SMALL))
    try:
        VLLMGeneration.sync_weights(trainer.vllm_generation)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def qwen() -> Any:
    """Grouped attention with biases on q, k and v, embeddings tied."""
    torch.manual_seed(2)
    settings = Qwen2Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(settings)


def lora_bf16() -> dict[str, Any]:
    model = qwen().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    before = support.weights(model)
    trainer = trainer_of("lora", model, peft_config=LoraConfig(**LORA))
    trainer.train()
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in trainer.model.state_dict().items()
        if "lora_" not in name
    }
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, base[name])]
    merged = [name for name in before if any(f"{part}.weight" in name for part in LORA["target_modules"])]
    return story(trainer) | {
        "base_changed": changed,
        "adapted_bytes": sum(before[name].nbytes for name in merged),
    }


def dora_qwen() -> dict[str, Any]:
    trainer = trainer_of("dora", qwen(), peft_config=LoraConfig(**LORA, use_dora=True))
    trainer.train()
    return story(trainer)


def packed() -> dict[str, Any]:
    model = build_model(1, tie_word_embeddings=True, **SMALL)
    before = support.weights(model)
    trainer = trainer_of("packed", model, selection=Select(RandomMask(budget=0.05), backend="packed"))
    trainer.train()
    trainer.end_selection()
    after = support.weights(trainer.model)
    changed = sum(
        int((after[n] != t).sum()) * t.element_size() for n, t in before.items() if n != "lm_head.weight"
    )
    return story(trainer) | {"changed_bytes": changed}


def halves() -> dict[str, Any]:
    trainer = trainer_of("halves", build_model(1, **SMALL), selection=HFT())
    trainer.train()
    plan = trainer.selection.plan
    return story(trainer) | {"touched_bytes": 4 * sum(part.numel for part in plan.touched.values())}


def growing() -> dict[str, Any]:
    trainer = trainer_of("growing", build_model(1, **SMALL), selection=ID3(budget=0.1))
    trainer.train()
    return story(trainer)


def methods() -> dict[str, Any]:
    """A checkpoint on disk; refills, rows at another temperature, a reference that moves, evaluation."""
    start = FOLDER / "start"
    build_model(1, **SMALL).save_pretrained(start)
    build_tokenizer().save_pretrained(start)
    trainer = trainer_of(
        "methods",
        str(start),
        args={"eval_strategy": "steps", "eval_steps": 4, "max_steps": 5, "beta": 0.01},
        eval_dataset=support.prompts(8),
        methods=[DynamicSampling(max_rounds=1), AEPO(), GardoReference(max_steps=2)],
    )
    temperatures = []
    inner = trainer.vllm_generation.llm.generate

    def generate(prompts: Any, sampling_params: Any, **rest: Any) -> Any:
        temperatures.append(round(sampling_params.temperature, 4))
        return inner(prompts, sampling_params=sampling_params, **rest)

    trainer.vllm_generation.llm.generate = generate
    trainer.train()
    return story(trainer) | {
        "temperatures": sorted(set(temperatures)),
        "generations": len(temperatures),
        "eval_rewards": column(trainer, "eval_reward"),
    }


def resumed() -> dict[str, Any]:
    """Six steps at once, and three and three; rollouts are used twice, so that some are buffered."""

    def make(folder: str, steps: int) -> GRPOTrainer:
        args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "num_iterations": 2}
        trainer = trainer_of(folder, build_model(1, **SMALL), args=args, peft_config=LoraConfig(**LORA))
        trainer.args.max_steps = steps
        return trainer

    straight = make("straight", 6)
    straight.train()
    again = make("again", 6)
    again.train(resume_from_checkpoint=str(FOLDER / "straight" / "checkpoint-3"))
    left, right = support.weights(straight.model), support.weights(again.model)
    return {
        "different": [name for name in left if not torch.equal(left[name], right[name])],
        "shares": [column(straight, "rollout/sync_share"), column(again, "rollout/sync_share")],
    }


def refused() -> dict[str, Any]:
    model = build_model(1, tie_word_embeddings=True, **SMALL)
    started = time.perf_counter()
    try:
        trainer_of("refused", model, peft_config=LoraConfig(r=2, target_modules=["embed_tokens"]))
    except RolloutError as error:
        return {"error": str(error), "seconds": time.perf_counter() - started}
    return {"error": None}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "upstream_fails": upstream_fails,
    "untied": lambda: whole(False),
    "tied": lambda: whole(True),
    "lora_bf16": lora_bf16,
    "dora_qwen": dora_qwen,
    "packed": packed,
    "halves": halves,
    "growing": growing,
    "methods": methods,
    "resumed": resumed,
    "refused": refused,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for check in sys.argv[2:] or CHECKS:
        begun = time.perf_counter()
        found[check] = CHECKS[check]()
        print(f"{check}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    (FOLDER / "found.json").write_text(json.dumps(found))

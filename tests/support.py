"""Small models, data and rewards built in code, shared by the trainer tests."""

from __future__ import annotations

import contextlib
import string
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, SFTConfig

CHARACTERS = string.ascii_lowercase + string.digits + " +-=.?"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(
    seed: int = 0, *, tied: bool = False, dtype: torch.dtype = torch.float32, **overrides: Any
) -> LlamaForCausalLM:
    """A two-layer Llama that answers in microseconds."""
    settings: dict[str, Any] = {
        "vocab_size": len(CHARACTERS) + 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).to(dtype)


def prompts(rows: int = 16) -> Dataset:
    words = ["add", "count the", "what is", "say", "name a", "spell", "how many", "list"]
    return Dataset.from_dict({"prompt": [f"{words[i % len(words)]} {i}?" for i in range(rows)]})


def answers(rows: int = 24) -> Dataset:
    """Prompts of different lengths with completions of different lengths."""
    words = ["one", "two and two", "three", "four plus 1", "five", "a 6", "seven or 7"]
    prompts_ = [f"{words[i % 7]} {i}?" for i in range(rows)]
    return Dataset.from_dict(
        {"prompt": prompts_, "completion": [" " + words[i % 5] * (1 + i % 3) for i in range(rows)]}
    )


def sft_config(output_dir: Any, **overrides: Any) -> SFTConfig:
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_steps": 10,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return SFTConfig(**(settings | overrides))


def letter_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of the letter e; differs within groups from the first step on."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def lora(**overrides: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(settings | overrides))


def grpo_config(output_dir: Any, **overrides: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return GRPOConfig(**(settings | overrides))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters in full, fp32, gathered where ZeRO-3 or FSDP2 has cut them up. Collective."""
    found = {}
    for name, parameter in module.named_parameters():
        gathering: Any = contextlib.nullcontext()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            gathering = deepspeed.zero.GatheredParameters([parameter])
        with gathering:
            value: Any = parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name] = value.float().clone()
    return found


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} tensors differ, first {different[:3]}"


def logged(trainer: Any, *keys: str) -> list[tuple[Any, ...]]:
    """The values of ``keys`` in every log that has the first of them."""
    return [tuple(row.get(key) for key in keys) for row in trainer.state.log_history if keys[0] in row]


def leave() -> None:
    """End a rank's script by leaving its process group, as torch asks."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""How our engine arguments and our sync get into TRL's trainer, with a stand-in for vLLM: runs anywhere."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import support
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM
from trl.generation import vllm_generation

from posttrain import GRPOTrainer
from posttrain.rollout.updates import RolloutError


class Engine:
    """Takes weights as vLLM does, and remembers how it was started."""

    started: list[dict[str, Any]]

    def __init__(self, **arguments: Any) -> None:
        type(self).started.append(arguments)
        self.model = support.model(7)
        self.model.load_weights = self._load_weights
        config = SimpleNamespace(max_model_len=128)
        core = SimpleNamespace(_finalizer=SimpleNamespace(detach=lambda: None))
        self.llm_engine = SimpleNamespace(model_config=config, engine_core=core)
        self.worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: self.model))
        self.resets = 0

    def _load_weights(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            self.model.get_parameter(name).copy_(tensor)
        return {name for name, _ in weights}

    def collective_rpc(self, function: Any, args: tuple[Any, ...]) -> None:
        function(self.worker, *args)

    def reset_prefix_cache(self) -> None:
        self.resets += 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put the stand-in where TRL looks for vLLM; return the arguments of the engines that start."""
    Engine.started = []
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True, device_type="cpu"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # TRL writes them; they are put back after the test
        monkeypatch.delenv(name)
    return Engine.started


def make(folder: Any, model: Any = None, **options: Any) -> GRPOTrainer:
    args = support.grpo_config(folder, use_vllm=True, max_steps=3, **options.pop("args", {}))
    return GRPOTrainer(
        model=support.model() if model is None else model,
        args=args,
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        **options,
    )


def generating(trainer: GRPOTrainer) -> list[float]:
    """Let the stand-in answer; return, filled as the run goes on, how far its policy is off each time."""
    gaps: list[float] = []
    generation: Any = trainer.vllm_generation

    def generate(prompts: Any, num_generations: int, **_: Any) -> tuple[Any, ...]:
        ids = [[5 + (i * t) % 9 for t in range(1, 5)] for i in range(len(prompts))]
        told, own = [], []
        with torch.no_grad():
            for prompt, answer in zip(prompts, ids, strict=True):
                for model, into in ((generation.llm.model, told), (trainer.model, own)):
                    logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                    at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
                    into.append(logps[at, torch.tensor(answer)])
        gaps.append(max((a - b).abs().max().item() for a, b in zip(told, own, strict=True)))
        return None, ids, [[[value] for value in row.tolist()] for row in told], None

    generation.generate = generate
    return gaps


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_every_generation_is_by_the_current_policy(tmp_path, started, adapter: bool) -> None:
    config = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if adapter else {}
    trainer = make(tmp_path, **config)
    assert vllm_generation.LLM is Engine  # nothing stays replaced
    gaps = generating(trainer)
    trainer.train()
    assert len(gaps) == trainer.weight_sync.count == trainer.vllm_generation.llm.resets == 3
    assert max(gaps) < 1e-5
    sent = support.logged(trainer, "rollout/sync_bytes", "rollout/sync_share")
    whole, q = trainer.weight_sync.stream.nbytes, 2 * 4 * 32 * 32
    assert [row[0] for row in sent] == ([whole, q, q] if adapter else [whole] * 3)
    assert [row[1] for row in sent] == [row[0] / whole for row in sent]


def test_a_model_without_an_address_is_written_down_and_its_type_kept(tmp_path, started) -> None:
    trainer = make(tmp_path, support.model(dtype=torch.bfloat16))
    (arguments,) = started
    assert arguments["load_format"] == "dummy"
    assert arguments["dtype"] == torch.bfloat16
    assert arguments["enforce_eager"]
    assert trainer.vllm_generation.llm is not None
    assert LlamaForCausalLM.config_class.from_pretrained(arguments["model"]).hidden_size == 32


def test_a_checkpoint_on_disk_is_where_the_engine_starts(tmp_path, started) -> None:
    support.model().save_pretrained(tmp_path / "there")
    make(tmp_path / "run", str(tmp_path / "there"))
    (arguments,) = started
    assert arguments["model"] == str(tmp_path / "there")
    assert "load_format" not in arguments
    assert arguments["tokenizer"] != arguments["model"]  # which has none
    assert arguments["dtype"] == torch.float32


def test_weights_that_were_loaded_are_sent_before_the_next_generation(tmp_path, started) -> None:
    trainer = make(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    gaps = generating(trainer)
    trainer.train()
    trainer._resync()
    trainer.evaluate(support.prompts(8))
    assert trainer.weight_sync.share == 1.0
    assert gaps[-1] < 1e-5


def test_an_engine_that_does_not_start_says_what_to_change(tmp_path, started, monkeypatch) -> None:
    def full(**arguments: Any) -> Any:
        raise ValueError("Free memory on device is less than desired")

    monkeypatch.setattr(vllm_generation, "LLM", full)
    with pytest.raises(RolloutError, match=r"less than desired.*vllm_gpu_memory_utilization=0.3"):
        make(tmp_path)
    assert vllm_generation.LLM is full


def test_a_build_for_another_device_is_refused(tmp_path, started, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "is_cpu", lambda: False)
    with pytest.raises(RolloutError, match=r"setup_vllm_cpu\.sh"):
        make(tmp_path)
    assert not started


def test_what_vllm_has_no_place_for_is_named(tmp_path, started) -> None:
    trainer = make(tmp_path)
    engine: Any = trainer.vllm_generation.llm
    engine.model.load_weights = lambda weights: set()
    with pytest.raises(RolloutError, match=r"no place for model\.embed_tokens\.weight"):
        trainer.weight_sync()

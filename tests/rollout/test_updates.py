"""The stream of weights: what leaves after a step is what changed, and the base stays as it is."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoHaConfig, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from support import model as small_model
from torch import nn
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from posttrain.rollout.updates import RolloutError, Update, WeightStream
from posttrain.selection.apply import apply
from posttrain.selection.explicit import Explicit
from posttrain.selection.hft import HFT
from posttrain.selection.random_mask import RandomMask

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Engine:
    """What an engine would hold: the plain tensors, as the updates leave them."""

    def __init__(self, stream: WeightStream) -> None:
        self.stream, self.tensors, self.index = stream, {}, {}
        self.take(stream.everything())

    def take(self, updates) -> list[Update]:
        taken = []
        for update in updates:
            if update.part:
                index = self.index[update.name] if update.index is None else update.index.long()
                self.index[update.name] = index
                self.tensors[update.name].view(-1)[index] = update.values.clone()
            else:
                self.tensors[update.name] = update.values.clone()
            assert self.tensors[update.name].shape == update.shape
            taken.append(update)
        return taken

    def sync(self) -> list[Update]:
        return self.take(self.stream.changed())


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def plain_weights(plain: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in plain.named_parameters()}


def merged(peft_model) -> dict[str, torch.Tensor]:
    """PEFT's own answer, from a copy."""
    return plain_weights(copy.deepcopy(peft_model).merge_and_unload())


def step(model: nn.Module, size: float = 0.1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "rslora": LoraConfig(r=2, target_modules=LINEAR, use_rslora=True),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True),
    "bias": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_bias=True),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
    "saved": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "loha": LoHaConfig(r=2, target_modules=["o_proj"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_leaves_as_peft_merges_it(kind: str, dtype: torch.dtype) -> None:
    plain = small_model(dtype=dtype, attention_bias=kind == "bias")
    model = get_peft_model(plain, copy.deepcopy(ADAPTERS[kind]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = Engine(WeightStream(model))
    same(engine.tensors, merged(model))
    for seed in range(2):
        step(model, seed=seed)
        sent = engine.sync()
        same(engine.tensors, merged(model))
        names = {update.name for update in sent}
        assert len(names) == len(sent)
        assert names == engine.stream.moving
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    if kind == "lora":
        assert names == {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in "qv"}


def _trl_stream(model: nn.Module):
    """TRL's own walk, which merges in place and unmerges."""
    accelerator = Accelerator(cpu=True)
    stand_in = SimpleNamespace(model=model, accelerator=accelerator, _dist=DistributedBackend(accelerator))
    stand_in._fix_param_name_to_vllm = lambda name, extra_prefixes=None: (
        VLLMGeneration._fix_param_name_to_vllm(stand_in, name, extra_prefixes)
    )
    return VLLMGeneration._iter_named_params(stand_in)


def test_two_hundred_syncs_leave_a_bf16_base_bit_identical_where_trl_drifts() -> None:
    def run(sync) -> float:
        model = get_peft_model(small_model(dtype=torch.bfloat16), copy.deepcopy(ADAPTERS["rslora"]))
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        stream = WeightStream(model)
        for seed in range(200):
            step(model, 0.02, seed)
            for _ in sync(model, stream):
                pass
        now = dict(model.named_parameters())
        return sum(int((now[n] != p).sum()) for n, p in frozen.items()) / sum(
            p.numel() for p in frozen.values()
        )

    assert run(lambda _, stream: stream.changed()) == 0.0
    drift = run(lambda model, _: _trl_stream(model))
    assert drift > 0.2, f"TRL changed {drift:.1%} of the base: is its merge out of place now?"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_packed_selection_sends_its_values_and_positions_once(tied: bool, dtype: torch.dtype) -> None:
    model = small_model(tied=tied, dtype=dtype)
    plan = RandomMask(budget=0.05).select(model)
    selection = apply(model, plan, "packed")
    engine = Engine(WeightStream(model, lambda: selection))
    for seed in range(3):
        step(model, seed=seed)
        before = {name: tensor.clone() for name, tensor in engine.tensors.items()}
        sent = engine.sync()
        state = selection.plain(model.state_dict())
        same(engine.tensors, {name: state[name] for name in engine.tensors})
        assert all(update.part for update in sent)
        changed = sum(
            int((before[name] != tensor).sum()) * tensor.element_size()
            for name, tensor in engine.tensors.items()
        )
        values = sum(update.values.nbytes for update in sent)
        assert values == plan.count * torch.empty((), dtype=dtype).element_size()
        assert changed > 0.95 * values
        assert sum(update.nbytes for update in sent) == values + (4 * plan.count if seed == 0 else 0)


def test_a_composed_selection_leaves_with_its_values_in() -> None:
    model = small_model()
    selection = apply(model, RandomMask(budget=0.05).select(model), "composed")
    step(model)
    engine = Engine(WeightStream(model, lambda: selection))
    for seed in (1, 2):
        step(model, seed=seed)
        engine.sync()
    engine_tensors = dict(engine.tensors)
    selection.remove()
    same(engine_tensors, plain_weights(model))


@pytest.mark.parametrize("backend", ["packed", "composed", "masked"])
def test_selected_scalars_of_an_adapter_leave_merged(backend: str) -> None:
    """The copy that PEFT merges into must not take the original's values for written."""
    model = get_peft_model(small_model(), copy.deepcopy(ADAPTERS["lora"]))
    with torch.no_grad():  # B starts at 0: A would not be seen
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    selection = apply(model, RandomMask(budget=0.3).select(model), backend)
    engine = Engine(WeightStream(model, lambda: selection))
    for seed in range(2):
        step(model, seed=seed)
        engine.sync()
        found = dict(engine.tensors)
        state = selection.plain(model.state_dict())
        other = get_peft_model(small_model(), copy.deepcopy(ADAPTERS["lora"]))
        other.load_state_dict(state)
        same(found, merged(other))


def test_frozen_halves_are_not_sent() -> None:
    model = small_model()
    plan = HFT().select(model)
    selection = apply(model, plan, "freeze")
    engine = Engine(WeightStream(model, lambda: selection))
    step(model)
    sent = engine.sync()
    assert {update.name for update in sent} == set(plan.touched) < set(engine.tensors)
    same(engine.tensors, plain_weights(model))


def test_a_masked_selection_sends_what_it_has_released_and_what_it_dropped_once() -> None:
    model = small_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    name = "model.layers.0.mlp.up_proj.weight"
    plan = Explicit(parameters=["up_proj.weight$"]).select(model)
    selection = apply(model, plan, "masked", shrinks=True)
    engine = Engine(WeightStream(model, lambda: selection))

    def move(index: torch.Tensor, size: float) -> None:
        with torch.no_grad():
            weight.view(-1)[index.long()] += size

    few, more = torch.arange(0, 9), torch.arange(0, 40)
    selection.select(weight, few)
    move(few, 1.0)
    engine.sync()
    same(engine.tensors, plain_weights(model))
    selection.select(weight, more)
    move(more, 1.0)
    (sent,) = [update for update in engine.sync() if update.name == name]
    assert sent.part
    assert len(sent.values) == 40
    same(engine.tensors, plain_weights(model))
    move(more, 1.0)  # a step of all, and then fewer go on
    selection.select(weight, few)
    (sent,) = [update for update in engine.sync() if update.name == name]
    assert not sent.part
    same(engine.tensors, plain_weights(model))


def test_a_tensor_that_is_frozen_in_mid_run_is_sent_once_more() -> None:
    model = small_model()
    engine = Engine(WeightStream(model))
    step(model)
    model.model.norm.weight.requires_grad_(False)
    assert "model.norm.weight" in {update.name for update in engine.sync()}
    same(engine.tensors, plain_weights(model))
    assert "model.norm.weight" not in {update.name for update in engine.sync()}


def test_bytes_are_those_of_the_type_in_which_tensors_leave() -> None:
    stream = WeightStream(small_model(), dtype=torch.bfloat16)
    sent = list(stream.everything())
    assert {update.values.dtype for update in sent} == {torch.bfloat16}
    assert (
        sum(update.nbytes for update in sent)
        == stream.nbytes
        == 2 * sum(p.numel() for p in stream.model.parameters())
    )
    # never wider than in the model
    wide = WeightStream(small_model(dtype=torch.bfloat16), dtype=torch.float32)
    assert sum(update.nbytes for update in wide.everything()) == wide.nbytes == stream.nbytes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=2, target_modules=["lm_head"]), "ties them"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "ensure_weight_tying"),
        (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "trains a prompt"),
    ],
    ids=["head", "saved", "prompt"],
)
def test_adapters_that_no_engine_could_take_are_refused(config, words: str) -> None:
    with pytest.raises(RolloutError, match=words):
        WeightStream(get_peft_model(small_model(tied=True), config))


def test_tied_embeddings_that_train_together_leave_once() -> None:
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
        task_type=TaskType.CAUSAL_LM,
    )
    model = get_peft_model(small_model(tied=True), config)
    engine = Engine(WeightStream(model))
    step(model)
    names = [update.name for update in engine.sync()]
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names

"""The forecast: counting is exact, fake steps equal real ones, terms add up, advice helps."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from deep_runs import look, rows_file, section
from peft import get_peft_model
from safetensors.torch import load_file
from support import lora, sft_config
from support import model as toy
from trl.trainer.utils import add_fused_lm_head

from posttrain import SFTTrainer
from posttrain.config.check import load_run_config
from posttrain.deep.check import forecast_run
from posttrain.deep.live import LiveTensors
from posttrain.deep.memory import GIB, PROCESS, PROCESS_BYTES
from posttrain.deep.trace import HEAD_OUTPUTS, Shape, trace_step
from posttrain.models.embedded import build_model, build_tokenizer

SHAPE = Shape(rows=4, tokens=24)


def test_living_tensors():
    weight = torch.nn.Parameter(torch.zeros(10, 10))
    with LiveTensors([weight]) as live:
        live.watch([weight])
        assert (live.held, live.current) == (400, 400)
        first = torch.ones(50)
        view = first[:10].view(2, 5)
        assert live.current == 600  # a view is no memory
        del first
        assert live.current == 600
        del view
        assert live.current == 400
        (weight.clone().sum()).backward()
        assert live.gradients == 400
        assert weight.grad is not None
        weight.grad = None
        assert (live.gradients, live.current) == (0, 400)
    # the clone, its sum, the gradient of the sum as one number; the gradient is that number, expanded
    assert live.peak > 800


def real_step(model, shape, task, checkpointing):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if inner is not model:
            model.enable_input_require_grads()
    model.train()
    add_fused_lm_head(inner, outputs=HEAD_OUTPUTS[task])
    ids = torch.randint(3, 30, (shape.rows, shape.tokens))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a batch without padding would need no mask
    with LiveTensors([*model.parameters(), *model.buffers()]) as live:
        for _ in range(shape.passes):
            outputs = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
            (outputs.log_probs.sum() + outputs.loss).backward()
            del outputs
    return live.peak - live.held


@pytest.mark.parametrize(
    ("checkpointing", "adapter", "passes"),
    [(False, False, 1), (True, False, 1), (False, True, 1), (True, True, 1), (False, False, 2)],
)
def test_a_fake_step_is_a_real_one(checkpointing, adapter, passes):
    shape = Shape(SHAPE.rows, SHAPE.tokens, passes)

    def add(model):
        return get_peft_model(model, lora())

    wide = {"tied": True, "hidden_size": 64, "vocab_size": 200, "num_hidden_layers": 3}
    real = toy(**wide)
    skeleton = copy.deepcopy(real).to("meta")
    skeleton.tie_weights()
    traced = trace_step(skeleton, shape, "sft", checkpointing=checkpointing, prepare=add if adapter else None)
    found = real_step(add(real) if adapter else real, shape, "sft", checkpointing)
    assert traced.peak + traced.unused == pytest.approx(found, rel=0.02)
    assert traced.weights == sum(p.numel() * 4 for p in real.parameters()) + sum(
        buffer.numel() * buffer.element_size() for buffer in real.buffers()
    )


def test_states_of_the_reference_count():
    skeleton = toy(hidden_size=64, vocab_size=40, num_hidden_layers=12).to("meta")
    without = trace_step(skeleton, SHAPE, "preference", kl=True)
    kept = trace_step(skeleton, SHAPE, "preference", kl=True, states=True)
    # at least those of the layers above the last, which is kept anyway
    assert kept.peak - without.peak >= 11 * SHAPE.rows * (SHAPE.tokens - 1) * 64 * 4


def checkpoint(folder, **sizes):
    build_model(**sizes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def config(tmp_path, task="sft", **more):
    model = tmp_path / "model"
    if not model.exists():
        checkpoint(model, hidden_size=64, layers=2, intermediate_size=128)
    rows = {
        "sft": {"prompt": "a" * 20, "completion": "b" * 11},
        "preference": {"prompt": "a" * 20, "chosen": "b" * 11, "rejected": "c" * 11},
        "rlvr": {"prompt": "a" * 20, "answer": "1"},
    }[task]
    data = rows_file(tmp_path / f"{task}.jsonl", [rows] * 16)
    trainer = {"per_device_train_batch_size": 4, "gradient_checkpointing": False}
    run = {"task": task, "model": {"path": str(model)}, "data": {"source": str(data)}, "trainer": trainer}
    if task == "rlvr":
        run["rewards"] = ["math"]
        trainer |= {"num_generations": 4, "max_completion_length": 12}
    return {**run, **more}


def predict(tmp_path, run, *overrides, device="cpu"):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), **run}))
    found = forecast_run(load_run_config(file, overrides), device)
    assert found is not None
    return found


def size_of(path):
    return sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())


def test_terms(tmp_path):
    full = predict(tmp_path, config(tmp_path))
    weights = size_of(tmp_path / "model")
    assert full.shape == Shape(4, 32, 1)
    assert full.terms["weights"] == pytest.approx(weights, rel=0.01)
    assert full.terms["optimiser"] == 2 * weights
    assert "reference model" not in full.terms
    assert sum(full.terms.values()) == full.peak == full.moments[full.moment]
    pairs = predict(tmp_path, config(tmp_path, "preference"))
    assert pairs.terms["reference model"] == weights
    assert pairs.shape.rows == 8
    scored = predict(tmp_path, config(tmp_path, "preference"), "trainer.precompute_ref_log_probs=true")
    assert "reference model" not in scored.terms
    # the head of the exact divergence works in tiles of its own, small on a CPU
    divergence = predict(tmp_path, config(tmp_path, "preference", methods={"tdpo": {}}))
    assert divergence.terms.get("logits of the LM head", 0) < pairs.terms["logits of the LM head"]
    assert PROCESS not in predict(tmp_path, config(tmp_path), device="cuda").terms
    adapter = predict(tmp_path, config(tmp_path, "preference"), "model.adapter={r: 4}")
    assert "reference model" not in adapter.terms
    assert adapter.terms["optimiser"] == 8 * adapter.trainable < full.terms["optimiser"] / 5


def test_selections(tmp_path):
    full = predict(tmp_path, config(tmp_path))
    half = predict(tmp_path, config(tmp_path), "selection=hft")
    assert 0.3 < half.terms["optimiser"] / full.terms["optimiser"] < 0.7
    some = predict(tmp_path, config(tmp_path), "selection={random: {budget: 100}}")
    assert some.terms["packed values"] == 1600
    assert some.terms["optimiser"] == 800
    dense = predict(tmp_path, config(tmp_path), "selection={id3: {budget: 100}}")
    assert dense.terms["optimiser"] == 1200
    assert dense.moments["optimiser"] > some.moments["optimiser"]


def test_a_selection_in_half_precision_keeps_copies(tmp_path, monkeypatch):
    """Two moments and a copy in fp32 for a scalar of 2 bytes; without copies the moments are in bf16."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen = ("model.dtype=bfloat16", "selection={hft: {}}")
    copies = predict(tmp_path, config(tmp_path), *chosen)
    plain = predict(tmp_path, config(tmp_path), *chosen, "selection.master_weights=false")
    assert copies.terms["optimiser"] == 12 * copies.trainable
    assert plain.terms["optimiser"] == 4 * copies.trainable
    # DeepSpeed keeps copies of its own, once, whatever the setting
    assert copies.sharded["ZeRO-2"]["optimiser"] == plain.sharded["ZeRO-2"]["optimiser"]
    assert copies.sharded["ZeRO-2"]["optimiser"] == 12 * copies.trainable // 2
    other = predict(tmp_path, config(tmp_path), *chosen, "trainer.optim=sgd")
    assert "optimiser" not in other.terms


def test_rollouts(tmp_path):
    long = ("trainer.gradient_accumulation_steps=64", "trainer.max_completion_length=100")
    found = predict(tmp_path, config(tmp_path, "rlvr"), *long)
    assert found.moment == "generation"
    # keys and values of 2 layers, 64 wide, of 4 x 64 rows and all tokens but the last, in fp32
    assert found.terms["cache of the rollout"] == 2 * 2 * 64 * 256 * (20 + 100 - 1) * 4
    # a layer's cache is copied as it grows, one layer at a time
    assert found.terms["sampling"] < 0.7 * found.terms["cache of the rollout"]
    assert "reference model" not in found.terms
    assert "reference model" in predict(tmp_path, config(tmp_path, "rlvr"), "trainer.beta=0.1").terms
    gated = predict(tmp_path, config(tmp_path, "rlvr", methods={"ace": {"alpha": 1.0}}))
    assert "reference model" in gated.terms


def test_ways_to_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = predict(tmp_path, config(tmp_path))
    ddp, zero2, zero3, fsdp = (found.sharded[name] for name in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2"))
    weights = size_of(tmp_path / "model")
    assert ddp["DDP buckets"] == weights
    assert zero2["optimiser"] == zero3["optimiser"] == fsdp["optimiser"] == 2 * weights // 4
    assert zero2["weights"] == ddp["weights"] == pytest.approx(weights, rel=0.01)
    assert zero3["weights"] == fsdp["weights"] == ddp["weights"] // 4


def test_advice_lowers_what_it_is_about(tmp_path):
    checkpoint(tmp_path / "model", hidden_size=64, layers=6, intermediate_size=256)
    run = config(tmp_path)
    run["trainer"] |= {"per_device_train_batch_size": 16}
    before = predict(tmp_path, run)
    assert before.largest == "activations"
    assert before.advice[0].startswith("trainer.gradient_checkpointing: true (saves ")
    after = predict(tmp_path, run, "trainer.gradient_checkpointing=true")
    assert after.terms["activations"] < 0.6 * before.terms["activations"]
    fewer = predict(tmp_path, run, "trainer.per_device_train_batch_size=8")
    assert fewer.terms["activations"] < 0.6 * before.terms["activations"]


def test_a_gpu_has_other_heads_and_types(tmp_path):
    run = config(tmp_path)
    here, there = predict(tmp_path, run), predict(tmp_path, run, device="cuda")
    # a tile of TRL's chunk for every token of the pass but the last of each row, in bf16
    assert there.terms["logits of the LM head"] == pytest.approx(4 * 31 * 32768 * 2, rel=0.1)
    assert there.terms["optimiser"] == here.terms["optimiser"]  # bf16 is autocast: weights stay as they are
    halves = predict(tmp_path, run, "model.dtype=bfloat16")
    assert halves.terms["optimiser"] == here.terms["optimiser"] // 2


def test_the_trainer_takes_what_was_forecast(tmp_path):
    """Living tensors of a real run, optimiser included, within the bar."""
    run = config(tmp_path)
    found = predict(tmp_path, run)
    rows = Dataset.from_list([{"prompt": "a" * 20, "completion": "b" * 11}] * 16)
    args = sft_config(tmp_path / "out", max_steps=2)
    with LiveTensors() as live:
        trainer = SFTTrainer(
            model=build_model(hidden_size=64, layers=2, intermediate_size=128),
            args=args,
            train_dataset=rows,
            processing_class=build_tokenizer(),
            methods=[],
        )
        trainer.train()
    assert found.peak - PROCESS_BYTES + found.unused == pytest.approx(live.peak, rel=0.15)


def test_the_section_says_what_to_do(tmp_path):
    report = look(tmp_path, config(tmp_path))
    part = section(report, "memory")
    (said,) = part.findings
    assert said.level == "note"
    assert said.message.startswith(f"{part.facts['peak'] / GIB:.2f} GiB at the peak")
    assert said.cure


def test_a_selection_that_does_not_fit_is_an_error(tmp_path):
    report = look(tmp_path, config(tmp_path, selection={"explicit": {"parameters": ["nothing_like_it"]}}))
    (said,) = section(report, "memory").findings
    assert said.level == "error"
    assert "nothing_like_it" in said.message


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["sft_random", "sparse_po"])
def test_the_process_takes_what_was_forecast(arm):
    """Resident memory of ``posttrain train`` in a process of its own, within the bar of 15 %."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "memory_forecast.py"
    done = subprocess.run(
        [sys.executable, str(script), "--arm", arm, "--vocabulary", "512", "--layers", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["arms"][arm]["to_resident"] == pytest.approx(1, abs=0.15)

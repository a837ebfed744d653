"""COFS: the simplex, combinations that are exact, gradients to the coefficients, fits that find the best."""

import json
import subprocess
import sys
from pathlib import Path

import pairs
import pytest
import support
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain.merging.average import average
from posttrain.models.load import load_for_evaluation
from posttrain.preference.cofs import Buffer, buffer_loss, combined, fit, project_simplex
from posttrain.preference.passes import parameters_of

ROOT = Path(__file__).resolve().parents[2]
LORA = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])


def test_projection_by_hand():
    def project(*values):
        return project_simplex(torch.tensor(values, dtype=torch.float64)).tolist()

    assert project(0.2, 0.3, 0.5) == pytest.approx([0.2, 0.3, 0.5])
    assert project(1.0, 1.0) == pytest.approx([0.5, 0.5])
    assert project(2.0, 0.0, -1.0) == pytest.approx([1, 0, 0])
    assert project(0.6, 0.5, -0.4) == pytest.approx([0.55, 0.45, 0])


def test_a_sum_of_deltas_is_no_average_of_factors():
    factors = [(2.0, 3.0), (-1.0, 4.0)]
    assert sum(0.5 * a * b for a, b in factors) == 1.0
    assert sum(0.5 * a for a, _ in factors) * sum(0.5 * b for _, b in factors) == 1.75


def policy_with(count, size=0.3, base=None):
    policy = get_peft_model(support.model() if base is None else base, LORA, adapter_name="a0")
    for number in range(1, count):
        policy.add_adapter(f"a{number}", LORA)
    draw = torch.Generator().manual_seed(1)
    for number in range(count):
        for parameter in parameters_of(policy, f"a{number}").values():
            parameter.data = size * torch.randn(parameter.shape, generator=draw)
    return policy


def batch(place=0, count=6):
    trainer = pairs.trainer("unused", data=pairs.rows(place + count))
    return trainer.data_collator([trainer.train_dataset[i] for i in range(place, place + count)])


IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 3, 4, 9, 12]])


def test_the_combination_is_pefts_cat_and_not_its_linear():
    policy = policy_with(2)
    policy.add_weighted_adapter(["a0", "a1"], [0.3, 0.7], "cat", combination_type="cat")
    policy.add_weighted_adapter(["a0", "a1"], [0.3, 0.7], "linear", combination_type="linear")
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    with combined(policy, ["a0", "a1"], torch.tensor([0.3, 0.7])), torch.no_grad():
        found = policy(IDS).logits
    assert policy.active_adapter == "a0"
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
    assert policy.base_model.model.model.layers[0].mlp.down_proj.scaling["a0"] == 3.0
    for name, same in (("cat", True), ("linear", False)):
        policy.set_adapter(name)
        with torch.no_grad():
            difference = (policy(IDS).logits - found).abs().max().item()
        assert (difference < 2e-5) == same, (name, difference)


def test_gradients_reach_the_coefficients():
    policy = policy_with(3).double()
    buffer = Buffer.of(policy, batch())
    point = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def loss(at):
        with combined(policy, ["a0", "a1", "a2"], at):
            return buffer_loss(policy, buffer, 0.5)

    at = point.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(at), at)
    for k in range(3):
        ahead, behind = point.clone(), point.clone()
        ahead[k] += 1e-3
        behind[k] -= 1e-3
        with torch.no_grad():
            slope = (loss(ahead) - loss(behind)) / 2e-3
        assert found[k].item() == pytest.approx(slope.item(), rel=2e-3, abs=1e-4)
    with torch.no_grad(), combined(policy, ["a0", "a1", "a2"], 0 * point):
        assert buffer_loss(policy, buffer, 0.5).item() == pytest.approx(0.693147, abs=1e-5)


def test_a_grid_for_two_and_descent_for_three_agree():
    policy = policy_with(2, size=0.15)
    buffers = [Buffer.of(policy, batch()), Buffer.of(policy, batch(6))]
    found = fit(policy, ["a0", "a1"], buffers, beta=0.5)
    assert sum(found.coefficients.values()) == pytest.approx(1)
    assert sum(found.losses) <= min(sum(losses) for losses in found.alone.values()) + 1e-6

    def value(x):
        with torch.no_grad(), combined(policy, ["a0", "a1"], torch.tensor([1 - x, x])):
            return sum(buffer_loss(policy, buffer, 0.5).item() for buffer in buffers)

    assert sum(found.losses) == pytest.approx(min(value(k / 20) for k in range(21)), abs=1e-6)
    # the third adapter does nothing but take weight away
    policy.add_adapter("a2", LORA)
    three = fit(policy, ["a0", "a1", "a2"], buffers, beta=0.5)
    assert sum(three.losses) <= sum(found.losses) + 2e-3
    assert min(three.coefficients.values()) >= 0
    assert sum(three.coefficients.values()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="needs two adapters"):
        fit(policy, ["a0"], buffers, beta=0.5)


def test_the_average_on_disk_is_the_combination(tmp_path):
    base = support.model()
    base.save_pretrained(tmp_path / "base")
    support.tokenizer().save_pretrained(tmp_path / "base")
    policy = policy_with(2, base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    for name in ("a0", "a1"):
        policy.save_pretrained(tmp_path / name, selected_adapters=[name])
    average([tmp_path / n / n for n in ("a0", "a1")], tmp_path / "both", weights=[0.25, 0.75])
    model, _ = load_for_evaluation(str(tmp_path / "both"))
    with combined(policy, ["a0", "a1"], torch.tensor([0.25, 0.75])), torch.no_grad():
        wanted = policy(IDS).logits
    assert (model(IDS).logits - wanted).abs().max().item() < 2e-5


def test_dora_is_refused():
    policy = get_peft_model(support.model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="plain LoRA"), combined(policy, ["default"], torch.ones(1)):
        pass


@pytest.mark.slow
def test_the_script_tells_what_each_domain_leaves(tmp_path):
    support.model(max_position_embeddings=512).save_pretrained(tmp_path / "base")
    support.tokenizer().save_pretrained(tmp_path / "base")
    for name, file in (("tinystories_pairs", "train"), ("instruct_pref", "train"), ("hh_harmless", "pairs")):
        (tmp_path / name).mkdir()
        data = pairs.rows(90)
        data.to_json(tmp_path / name / f"{file}.jsonl")
    command = [sys.executable, str(ROOT / "scripts" / "evidence" / "online_preference.py"), "--steps", "2"]
    command += ["--model", str(tmp_path / "base"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "result-0.json").read_text())
    assert [len(result[arm]) for arm in ("dpo", "ofs", "cofs")] == [3, 3, 3]
    assert [len(row.get("coefficients", [])) for row in result["cofs"]] == [0, 2, 3]
    for rows in result.values():
        assert all(0 < loss < 2 and 0 <= share <= 1 for row in rows for loss, share in row["tests"].values())

"""SparsePO and MaPO: golden values, float64 full logits through the trainer, and the network in training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pairs
import pytest
import support
import torch
from peft import LoraConfig
from pydantic import ValidationError
from safetensors.torch import load_file
from test_preference_tdpo import exact, example, gemma
from torch.nn.functional import logsigmoid
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from posttrain.preference.sparse_po import SparsePO, l1_penalty
from posttrain.preference.tdpo import TDPO
from posttrain.preference.token_masks import (
    Activations,
    MaskNetwork,
    row_scaled,
    watch_activations,
    watch_states,
)
from posttrain.rl.method import Setup

TESTS = Path(__file__).parents[1]
DOUBLE = torch.float64


def objective(batch, reward, kl, strengths=None, shared=False):
    """The loss of the formula, from masks."""
    scores = (reward * batch.log_ratios + kl * batch.kl).sum(dim=1)
    chosen, rejected = scores.chunk(2)
    loss = -logsigmoid(batch.beta * (chosen - rejected)).mean()
    if strengths:
        masks = {"reward": reward, "kl": kl}
        loss = loss + l1_penalty(masks, dict.fromkeys(masks, strengths), shared=shared)
    return loss


# ---- pure functions ---------------------------------------------------------------------------------------


def test_golden_values():
    batch = example()
    reward = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=DOUBLE)
    kl = torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=DOUBLE)
    ones, zeros = torch.ones_like(kl), torch.zeros_like(kl)
    found = [
        objective(batch, reward, kl),
        objective(batch, reward, kl, 0.001),
        objective(batch, reward, reward),
        objective(batch, reward, reward, 0.001, shared=True),
        objective(batch, ones, ones),
        objective(batch, ones, zeros),
        objective(batch, zeros, zeros),
    ]
    wanted = [
        0.5804418213, 0.5864418213, 0.5900260247, 0.5935260247, 0.5212968424, 0.5247673207, 0.6931471806,
    ]  # fmt: skip
    assert [value.item() for value in found] == pytest.approx(wanted, abs=1e-10)


def test_gradient_of_masks():
    batch = example()
    common = torch.ones(2, 2, dtype=DOUBLE, requires_grad=True)
    (grad,) = torch.autograd.grad(objective(batch, common, common), common)
    assert grad[0].tolist() == pytest.approx([-0.0466761318, -0.0940471731], abs=1e-10)
    sigma = 1 - torch.exp(-objective(batch, common, common).detach())
    assert torch.allclose(grad[1], (0.5 * sigma * (batch.log_ratios + batch.kl))[1].detach())
    apart = [torch.ones(2, 2, dtype=DOUBLE, requires_grad=True) for _ in range(2)]
    grads = torch.autograd.grad(objective(batch, *apart), apart)
    assert torch.allclose(grads[0][0], (-0.5 * sigma * batch.log_ratios)[0])
    assert (grads[1][0] < 0).all()
    assert (grads[1][1] > 0).all()


def network(std=None, **options):
    return MaskNetwork(2, 2, eps=0.0, std=std, **options)


def test_golden_network():
    net = network()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, 1.0], [1.0, 0.5]]))
        net.bias.copy_(torch.tensor([0.1, 0.2]))
        net.mix.copy_(torch.tensor([0.7, 0.2]))
    states = [torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[0.0, 4.0], [5.0, 1.0]])]
    assert net(states).tolist() == pytest.approx([0.42, 0.14], abs=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_network_equals_its_definition_with_gradients(half):
    layers, width = 3, 16
    net = MaskNetwork(layers, width, std=0.5, eps=1e-3)
    with torch.no_grad():
        net.norm_weight += 0.3 * torch.randn(width)
        net.norm_bias += 0.3 * torch.randn(width)
        net.bias += 0.2
        net.mix.abs_()
    states = [2 + 3 * torch.randn(20, width) for _ in range(layers)]
    if half:
        states = [h.bfloat16() for h in states]
    wanted = 0
    for h, w, b, v in zip(states, net.weight, net.bias, net.mix, strict=True):
        normed = torch.nn.functional.layer_norm(h.float(), (width,), net.norm_weight, net.norm_bias, eps=1e-3)
        wanted = wanted + v * (normed @ w + b).relu()
    wanted = wanted.relu()
    found = net(states)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=1e-5)
    factor = torch.randn(20)
    parameters = list(net.parameters())
    assert len(parameters) == 5
    assert sum(p.numel() for p in parameters) == layers * (width + 1) + layers + 2 * width
    for a, b in zip(
        torch.autograd.grad((found * factor).sum(), parameters),
        torch.autograd.grad((wanted * factor).sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-4)


def test_start_at_ones_and_dropout():
    net = MaskNetwork(3, 8, std=None)
    states = [torch.randn(5, 8) for _ in range(3)]
    assert net(states).tolist() == pytest.approx([1.0] * 5)
    dropping = MaskNetwork(3, 8, std=None, dropout=0.5)
    torch.manual_seed(0)
    assert (dropping(states) - 1).abs().max() > 0.1
    assert torch.equal(dropping.eval()(states), net(states))
    with pytest.raises(ValueError, match="3 layers of width 8, the reference has 2 of 8"):
        net(states[:2])


def test_golden_activations():
    mask = torch.ones(1, 4, dtype=torch.bool)
    seen = Activations(mask)
    seen.add_rows("mlp", torch.tensor([[0.2, 0.5, -0.1, 0.9]], dtype=DOUBLE))
    seen.add_rows("mlp", torch.tensor([[2.0, 1.0, 4.0, 3.0]], dtype=DOUBLE))
    wanted = [0.3166666667, 0.3, 0.5, 0.8333333333]
    assert seen.mask_values()[0].tolist() == pytest.approx(wanted, abs=1e-10)
    seen.add_rows("attn", torch.zeros(1, 4, dtype=DOUBLE))  # groups count alike, whatever they hold
    assert seen.mask_values()[0].tolist() == pytest.approx([(x + 1) / 2 for x in wanted], abs=1e-10)


def test_rescaling_of_rows():
    """One token, constant rows, no tokens; what lies outside does not count, nor do affine maps."""
    nan = torch.nan
    values = torch.tensor([[3.0, nan, nan], [5.0, 5.0, 5.0], [nan, nan, nan], [1.0, 2.0, 100.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]]).bool()
    found = row_scaled(values, mask)
    assert found.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]]
    draw = torch.randn(2, 6, dtype=DOUBLE)
    everywhere = torch.ones(2, 6, dtype=torch.bool)
    standard = (draw - draw.mean(1, keepdim=True)) / (draw.std(1, keepdim=True) + 1e-12)
    assert torch.allclose(row_scaled(draw, everywhere), row_scaled(standard, everywhere), atol=1e-12)


# ---- what is watched in a model ---------------------------------------------------------------------------

TINY = {"vocab_size": 44, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def gpt2():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **TINY)
    return GPT2LMHeadModel(config)


def neox(parallel=True):
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        use_parallel_residual=parallel, initializer_range=0.3, **TINY,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def gptj():
    config = GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **TINY)
    return GPTJForCausalLM(config)


# tensors per group: mlp and attention per block, streams per block and two more
MODELS = {
    "llama": (lambda: support.model(initializer_range=0.3), 6),
    "gemma2": (gemma, 6),
    "gpt2": (gpt2, 6),
    "neox": (neox, 5),
    "neox in sequence": (lambda: neox(parallel=False), 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_activations_of_architectures(name):
    make, streams = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(3, 40, (2, 9))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 4:], mask[1, 3:7] = True, True
    with torch.no_grad(), watch_activations(model, mask) as seen, watch_states(model, mask) as states:
        out = model(input_ids=ids, output_hidden_states=True)
    counts = {group: count for group, (_, count) in seen.sums.items()}
    assert counts == {"mlp": 2, "attn": 8, "resid": 2 * streams + 2, "logits": 1}
    values = seen.mask_values()
    assert (values[~mask] == 0).all()
    assert values[mask].min() >= 0
    assert values[mask].max() <= 1
    assert values[mask].std() > 0.01
    logits = row_scaled(out.logits.mean(-1)[:, :-1], mask)
    assert torch.allclose(seen.sums["logits"][0], logits, atol=2e-3 if name == "gemma2" else 1e-4)
    for state, wanted in zip(states, out.hidden_states[1:], strict=True):
        assert torch.equal(state, wanted[:, :-1][mask])
    assert not model.base_model._forward_hooks
    assert not model.base_model._forward_pre_hooks
    # the streams of a block, built from what goes into it
    with torch.no_grad(), watch_activations(model, mask, ("resid",)) as alone:
        model(input_ids=ids)
    assert set(alone.sums) == {"resid"}
    assert torch.equal(alone.sums["resid"][0], seen.sums["resid"][0])


def test_blocks_without_a_stream_between_their_parts():
    torch.manual_seed(0)
    model = gptj().eval()
    mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="leave resid out"), watch_activations(model, mask):
        pass
    with torch.no_grad(), watch_activations(model, mask, ("mlp", "attn", "logits")) as seen:
        model(input_ids=torch.randint(3, 40, (1, 6)))
    assert {group: count for group, (_, count) in seen.sums.items()} == {"mlp": 2, "attn": 8, "logits": 1}


def test_activations_of_llama_by_hand():
    """Every tensor from the weights, without hooks."""
    model = support.model(initializer_range=0.3).eval()
    ids = torch.randint(3, 40, (1, 7))
    mask = torch.ones(1, 6, dtype=torch.bool)
    with torch.no_grad(), watch_activations(model, mask, ("mlp", "attn", "resid")) as seen:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    wanted = Activations(mask)
    with torch.no_grad():
        wanted.add("resid", states[0])
        rotation = model.model.rotary_emb(states[0], torch.arange(7)[None])
        h = states[0]
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            normed = block.input_layernorm(h)
            update, _ = attention(normed, position_embeddings=rotation, attention_mask=None)
            inverse = torch.linalg.solve(attention.o_proj.weight, update.transpose(1, 2)).transpose(1, 2)
            for part in (
                attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed), inverse
            ):  # fmt: skip
                wanted.add("attn", part)
            middle = h + update
            second = block.post_attention_layernorm(middle)
            inside = mlp.act_fn(mlp.gate_proj(second)) * mlp.up_proj(second)
            wanted.add("mlp", inside)
            h = middle + mlp.down_proj(inside)
            for part in (normed, update, middle, second, mlp.down_proj(inside), h):
                wanted.add("resid", part)
        wanted.add("resid", model.model.norm(h))
    for group in ("mlp", "attn", "resid"):
        assert seen.sums[group][1] == wanted.sums[group][1]
        assert torch.allclose(seen.sums[group][0], wanted.sums[group][0], atol=2e-3), group


def test_unknown_blocks_are_named():
    model = support.model()
    del model.model.layers[0].mlp.down_proj
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"leave mlp out of mapo_groups"), watch_activations(model, mask):
        pass
    assert not model.base_model._forward_hooks


# ---- through the trainer ----------------------------------------------------------------------------------


def direct(run, inputs, method):
    """Loss and gradients of policy and networks from full logits in float64."""
    policy = exact(run.accelerator.unwrap_model(run.model))
    networks = {name: exact(net) for name, net in run.modules_of_methods["sparse_po"].items()}
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
    call = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    log_p = policy(**call).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        if run.ref_model is None:
            with policy.disable_adapter():
                out = policy(**call, output_hidden_states=True)
        else:
            out = exact(run.ref_model)(**call, output_hidden_states=True)
    log_q = out.logits[:, :-1].log_softmax(-1)
    ratios = (log_p - log_q).gather(2, ids[:, 1:, None]).squeeze(2)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)

    def values(net):
        total = 0
        for h, w, b, v in zip(out.hidden_states[1:], net.weight, net.bias, net.mix, strict=True):
            normed = torch.nn.functional.layer_norm(
                h[:, :-1], h.shape[-1:], net.norm_weight, net.norm_bias, eps=net.eps
            )
            total = total + v * (normed @ w + b).relu()
        return torch.where(mask, total.relu(), 0.0)

    reward = values(networks.get("both", networks.get("reward")))
    divergence = values(networks.get("both", networks.get("kl")))
    score = torch.where(mask, reward * ratios + divergence * kl, 0.0)
    chosen, rejected = score.sum(1).chunk(2)
    loss = -logsigmoid(run.beta * (chosen - rejected)).mean()
    half = 0.5 if method.shared else 1.0
    count = len(ids) // 2
    loss = loss + half * method.mask_l1_reward * reward.sum() / count
    loss = loss + half * method.mask_l1_kl * divergence.sum() / count
    loss.backward()
    found = {f"policy.{name}": p.grad for name, p in policy.named_parameters() if p.requires_grad}
    for name, net in networks.items():
        found |= {f"{name}.{key}": p.grad for key, p in net.named_parameters()}
    return loss, found


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
def test_loss_and_gradients_of_full_logits(tmp_path, shared, adapter):
    method = SparsePO(shared=shared, mask_l1_reward=0.01, mask_l1_kl=0.003)
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if adapter else None
    make = lambda: support.model(tied=True, initializer_range=0.2)  # noqa: E731
    run = pairs.trainer(
        tmp_path, methods=[method], model=make(), reference=None if adapter else make(),
        peft_config=peft_config, beta=0.4, gradient_checkpointing=adapter,
    )  # fmt: skip
    module = run.modules_of_methods["sparse_po"]
    assert list(module) == (["both"] if shared else ["reward", "kl"])
    if not shared:
        assert not torch.equal(module["reward"].weight, module["kl"].weight)
    inputs = next(iter(run.get_train_dataloader()))
    model = run.accelerator.unwrap_model(run.model)
    run.compute_loss(run.model, inputs)  # the trainer looks whether policy and reference agree at the start
    run._metrics["train"].clear()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in [*model.parameters(), *module.parameters()]:
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        for net in module.values():
            net.mix.abs_().add_(0.1)
            net.weight *= 3
    loss = run.compute_loss(run.model, inputs)
    loss.backward()
    wanted, grads = direct(run, inputs, method)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = {f"policy.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    found |= {n: p.grad for n, p in module.named_parameters()}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        scale = grad.abs().max().clamp(min=1e-6)
        assert (found[name].double() - grad).abs().max() < 1e-3 * scale, name
        assert grad.abs().max() > 1e-7, name
    metrics = run._metrics["train"]
    assert 0.1 < metrics["sparse_po/density_reward"][0] < 1
    assert metrics["sparse_po/dead_pairs"] == [0.0]


def weights_after(folder, method, **settings):
    run = pairs.trainer(folder, methods=[method], max_steps=3, **settings)
    logs = pairs.history(run)
    return support.weights(run.model), logs, run


def test_no_mask_is_tdpo_and_ones_begin_as_tdpo(tmp_path):
    tdpo, logs, _ = weights_after(tmp_path / "t", TDPO(variant=1))
    unmasked, _, run = weights_after(tmp_path / "u", SparsePO(mask_reward=False, mask_kl=False))
    support.assert_same(tdpo, unmasked)
    assert run.modules_of_methods == {}
    _, found, _ = weights_after(tmp_path / "o", SparsePO(mask_init="ones", mask_weight_decay=0.0))
    assert found[0]["loss"] == pytest.approx(0.6931471806, abs=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-5)
    assert found[0]["sparse_po/mean_reward"] == pytest.approx(1.0, abs=1e-6)
    assert found[-2]["sparse_po/mean_reward"] != 1.0
    # with masks that do not move, the same to the end
    _, still, _ = weights_after(tmp_path / "s", SparsePO(mask_init="ones", mask_max=0.999), beta=0.1)
    assert still[-2]["sparse_po/mean_reward"] == pytest.approx(0.999)
    _, dpo, _ = weights_after(tmp_path / "d", SparsePO(mask_init="ones", mask_kl=False))
    assert "sparse_po/density_kl" not in dpo[0]


def test_padding_and_accumulation_change_nothing(tmp_path):
    data = pairs.rows(8)
    settings = {
        "whole": {},
        "parts": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "padded": {"pad_to_multiple_of": 32},
    }
    found = {}
    for name, options in settings.items():
        method = SparsePO(mask_init="ones", shared=False, mask_l1_reward=0.01)
        run = pairs.trainer(
            tmp_path / name,
            methods=[method],
            data=data,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            **options,
        )
        run.train()
        found[name] = support.weights(run.model) | support.weights(run.modules_of_methods["sparse_po"])
    for name in ("parts", "padded"):
        for key, value in found["whole"].items():
            assert torch.allclose(found[name][key], value, atol=3e-6), (name, key)
    assert (found["whole"]["reward.mix"] - 0.5).abs().max() > 1e-3


def test_the_optimiser_decays_matrices_only(tmp_path):
    run = pairs.trainer(tmp_path, methods=[SparsePO(mask_weight_decay=0.3)], learning_rate=2e-3)
    optimizer = run.create_optimizer()
    net = run.modules_of_methods["sparse_po"]["both"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in net.named_parameters()} == {
        "weight": 0.3, "mix": 0.3, "bias": 0.0, "norm_weight": 0.0, "norm_bias": 0.0,
    }  # fmt: skip
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}


def test_an_optimiser_without_the_network_is_refused(tmp_path):
    """It would train the policy only, and the masks would stay where they start."""
    model = support.model()
    given = {"model": model, "optimizers": (torch.optim.AdamW(model.parameters()), None)}
    with pytest.raises(ValueError, match="sparse_po trains weights of its own, which the optimizer"):
        pairs.trainer(tmp_path, methods=[SparsePO()], **given)
    pairs.trainer(tmp_path, methods=[SparsePO(token_mask="mapo")], **given)


def test_the_best_model_has_its_network(tmp_path):
    run = pairs.trainer(
        tmp_path, methods=[SparsePO(mask_init="ones")], eval_data=pairs.rows(4), max_steps=2,
        load_best_model_at_end=True, greater_is_better=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    saved = load_file(best / "sparse_po.safetensors")
    support.assert_same(saved, support.weights(run.modules_of_methods["sparse_po"]))


def test_half_precision_with_lora_checkpointing_and_truncation(tmp_path):
    run = pairs.trainer(
        tmp_path, methods=[SparsePO(mask_init="ones", mask_dropout=0.1)], dtype=torch.bfloat16, bf16=True,
        gradient_checkpointing=True, gradient_accumulation_steps=2, max_length=14, max_steps=3,
        peft_config=LoraConfig(r=4, target_modules="all-linear"), eval_data=pairs.rows(4),
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    before = support.weights(run.modules_of_methods["sparse_po"])
    logs = pairs.history(run)
    module = run.modules_of_methods["sparse_po"]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all((before[n] != p).any() for n, p in support.weights(module).items())
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert any("eval_sparse_po/density_reward" in log for log in logs)
    (first, second, *_) = run.methods[0].pictures()
    assert (first.title, second.title) == ("chosen", "rejected")
    assert len(first.ids) == len(first.values["reward"]) > 0


def test_dead_masks_are_counted_and_warned_about(tmp_path, caplog):
    run = pairs.trainer(tmp_path, methods=[SparsePO()], max_steps=20)
    with torch.no_grad():
        run.modules_of_methods["sparse_po"]["both"].mix.copy_(torch.tensor([-1.0, -1.0]))
    before = support.weights(run.model)
    logs = pairs.history(run)
    assert [log["sparse_po/dead_pairs"] for log in logs[:-1]] == [1.0] * 20
    assert logs[0]["loss"] == pytest.approx(0.6931471806, abs=1e-6)
    support.assert_same(before, support.weights(run.model))
    assert caplog.text.count("more than half of the pairs have masks that are 0") == 1


def test_activations_weigh_both_terms(tmp_path):
    method = SparsePO(token_mask="mapo")
    _, logs, run = weights_after(tmp_path, method, reference=support.model(initializer_range=0.3))
    assert run.modules_of_methods == {}
    assert 0.1 < logs[0]["sparse_po/mean_reward"] < 0.9
    assert logs[0]["sparse_po/mean_reward"] == logs[0]["sparse_po/mean_kl"]
    picture = method.pictures()[0]
    assert picture.values["reward"] == picture.values["kl"]


@pytest.mark.parametrize("mask", ["learned", "mapo"])
def test_one_pair_alone_is_scored_as_in_a_batch(tmp_path, mask):
    """Rows do not see one another, nor their padding."""
    options = {} if mask == "mapo" else {"mask_init": "ones"}
    run = pairs.trainer(
        tmp_path,
        methods=[SparsePO(token_mask=mask, **options)],
        model=support.model(seed=1),
        data=pairs.rows(4),
    )
    run.model.eval()
    rows = [run.train_dataset[i] for i in range(4)]
    together = run.compute_loss(run.model, run.data_collator(rows)).item()
    alone = [run.compute_loss(run.model, run.data_collator([row])).item() for row in rows]
    assert together == pytest.approx(sum(alone) / 4, abs=1e-6)


def test_resume_is_exact_and_the_network_is_beside_the_model(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "optim": "adamw_torch"}

    def build(folder):
        return pairs.trainer(
            folder, methods=[SparsePO(mask_init="ones", shared=False, mask_dropout=0.2)], **settings
        )

    whole = build(tmp_path / "whole")
    whole.train()
    again = build(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for run in (whole, again):
        module = run.modules_of_methods["sparse_po"]
        saved = load_file(Path(run.args.output_dir) / "checkpoint-4" / "sparse_po.safetensors")
        support.assert_same(saved, support.weights(module))
    support.assert_same(support.weights(whole.model), support.weights(again.model))
    support.assert_same(*(support.weights(r.modules_of_methods["sparse_po"]) for r in (whole, again)))
    assert (
        support.logged(whole, "loss", "sparse_po/mean_kl")[2:]
        == support.logged(again, "loss", "sparse_po/mean_kl")[2:]
    )
    assert not torch.equal(whole.modules_of_methods["sparse_po"]["kl"].bias, torch.ones(2))


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    """The same pairs on two ranks: the same weights of policy and networks, equal on both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "preference" / "sparse_po_ranks.py"), str(tmp_path)]
    path = os.pathsep.join([str(TESTS), str(TESTS / "preference"), str(TESTS.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "result.json").read_text())
    assert results.keys() == {"full", "lora"}
    for result in results.values():
        assert result["ranks_equal"], result
        assert result["difference"] < 1e-5, result
        assert result["moved"] > 1e-4, result


def test_what_does_not_go_with_it():
    def found(method, methods=("sparse_po",), **trainer):
        conflicts = method.conflicts(Setup(trainer=trainer, methods=methods))
        return [(conflict.field, conflict.fatal) for conflict in conflicts]

    assert found(SparsePO()) == []
    assert found(SparsePO(), precompute_ref_log_probs=True) == [("precompute_ref_log_probs", True)]
    assert found(SparsePO(), loss_type=["nca_pair"]) == [("loss_type", True)]
    assert found(SparsePO(), sync_ref_model=True) == [(None, False)]
    assert found(SparsePO(), methods=("tdpo", "sparse_po")) == [(None, False)]
    with pytest.raises(ValidationError, match="has no network: drop mask_l1_kl"):
        SparsePO(token_mask="mapo", mask_l1_kl=0.1)
    with pytest.raises(ValidationError, match="mapo_groups needs token_mask='mapo'"):
        SparsePO(mapo_groups=["mlp"])
    with pytest.raises(ValidationError, match="mask_l1_kl needs mask_kl"):
        SparsePO(mask_kl=False, mask_l1_kl=0.1)

"""TDPO: golden values, and the exact divergence of full logits through the trainer."""

import copy

import pairs
import pytest
import support
import torch
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM

from posttrain.preference.tdpo import TDPO, tdpo_terms
from posttrain.rl.method import Setup

REF = [[[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [[0.4, 0.4, 0.2], [0.7, 0.2, 0.1]]]
POLICY = [[[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]], [[0.5, 0.4, 0.1], [0.6, 0.2, 0.2]]]
TOKENS = [[0, 1], [1, 0]]


def example(**fields):
    """The example of the sheet: V = 3, T = 2, one pair."""
    ref, policy = (torch.tensor(values, dtype=torch.float64).log() for values in (REF, POLICY))
    tokens = torch.tensor(TOKENS).unsqueeze(2)
    kl = (ref.exp() * (ref - policy)).sum(-1)
    logps, ref_logps = (values.gather(2, tokens).squeeze(2) for values in (policy, ref))
    return pairs.batch(logps, ref_logps, kl=kl.requires_grad_(), beta=0.5, **fields)


def loss_of(batch, terms):
    chosen, rejected = (batch.log_ratios + terms).sum(dim=1).chunk(2)
    return -logsigmoid(batch.beta * (chosen - rejected)).mean()


def test_golden_values():
    batch = example()
    assert batch.log_ratios.tolist() == [
        pytest.approx([0.1823215568, 0.4054651081], abs=1e-10),
        pytest.approx([0.0, -0.1541506798], abs=1e-10),
    ]
    assert batch.kl.tolist() == [
        pytest.approx([0.0474686577, 0.0575364145], abs=1e-10),
        pytest.approx([0.0493720156, 0.0385907578], abs=1e-10),
    ]
    found = {
        "dpo": loss_of(batch, 0),
        "tdpo1": loss_of(batch, TDPO(variant=1).token_scores(batch)),
        "tdpo2": loss_of(batch, TDPO(variant=2, alpha=0.5).token_scores(batch)),
    }
    wanted = {"dpo": 0.5247673207, "tdpo1": 0.5212968424, "tdpo2": 0.5230298905}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted, abs=1e-10)


def test_the_second_variant_with_weight_one_has_the_value_of_the_first_and_another_gradient():
    batch = example()
    losses = [loss_of(batch, tdpo_terms(batch.kl, batch.chosen, variant=v, alpha=1.0)) for v in (1, 2)]
    assert losses[0].item() == losses[1].item()
    first, second = (torch.autograd.grad(loss, batch.kl)[0] for loss in losses)
    assert (first[0] < 0).all()
    assert second[0].tolist() == [0, 0]
    assert torch.equal(first[1], second[1])


def test_equal_responses():
    """log 2 for both, no gradient at all for the first variant, one for the second."""
    batch = example()
    twins = pairs.batch(
        batch.logps[:1].repeat(2, 1),
        batch.ref_logps[:1].repeat(2, 1),
        kl=batch.kl[:1].detach().repeat(2, 1).requires_grad_(),
        beta=0.5,
    )
    shared = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)  # moves both responses alike
    for variant, moves in ((1, False), (2, True)):
        terms = tdpo_terms(twins.kl * shared, twins.chosen, variant=variant)
        loss = loss_of(twins, terms)
        assert loss.item() == pytest.approx(0.6931471806, abs=1e-10)
        (grad,) = torch.autograd.grad(loss, shared)
        assert (grad.abs() > 1e-6) == moves


def exact(model):
    """A copy in float64 with the forward of its class; TRL's stays bound to the original."""
    model = copy.deepcopy(model).double()
    vars(model.get_base_model() if hasattr(model, "peft_config") else model).pop("forward", None)
    return model


def direct(run, inputs, method):
    """Loss and gradients from full logits in float64."""
    policy = exact(run.accelerator.unwrap_model(run.model))
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
    call = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    log_p = policy(**call).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        if run.ref_model is None:
            with policy.disable_adapter():
                log_q = policy(**call).logits[:, :-1].log_softmax(-1)
        else:
            log_q = exact(run.ref_model)(**call).logits[:, :-1].log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    ratios = (log_p - log_q).gather(2, ids[:, 1:, None]).squeeze(2)
    rows = torch.arange(len(ids)) < len(ids) // 2
    score = torch.where(mask, ratios + tdpo_terms(kl, rows, variant=method.variant, alpha=method.alpha), 0.0)
    chosen, rejected = score.sum(1).chunk(2)
    loss = -logsigmoid(run.beta * (chosen - rejected)).mean()
    loss.backward()
    grads = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    return loss, grads, torch.where(mask, kl, 0.0).sum(1)


def gemma():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=44, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            final_logit_softcapping=1.0, initializer_range=0.3,
        )  # fmt: skip
        return Gemma2ForCausalLM(config)


def tied():
    return support.model(tied=True, initializer_range=0.2)


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
MODELS = {
    "plain": (lambda: support.model(initializer_range=0.2), None, {}),
    "tied, checkpointing": (tied, None, {"gradient_checkpointing": True}),
    "softcap": (gemma, None, {}),
    "lora": (tied, LORA, {"gradient_checkpointing": True}),
    "lora and head": (support.model, LORA | {"modules_to_save": ["lm_head"]}, {}),
    "truncated": (tied, None, {"max_length": 14}),
}


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("case", MODELS)
def test_loss_and_gradients_of_full_logits(tmp_path, case, variant):
    make, adapter, settings = MODELS[case]
    method = TDPO(variant=variant, alpha=0.7)
    peft_config = None if adapter is None else LoraConfig(**adapter)
    policy, reference = make(), None if adapter else make()
    run = pairs.trainer(
        tmp_path, methods=[method], model=policy, reference=reference, peft_config=peft_config, beta=0.4,
        **settings,
    )  # fmt: skip
    inputs = next(iter(run.get_train_dataloader()))
    model = run.accelerator.unwrap_model(run.model)
    start = run.compute_loss(run.model, inputs)
    assert start.item() == pytest.approx(0.6931471806, abs=1e-6)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    run._metrics["train"].clear()
    own = run.compute_loss(run.model, inputs)
    own.backward()
    loss, grads, kl = direct(run, inputs, method)
    assert own.item() == pytest.approx(loss.item(), rel=1e-5)
    assert abs(loss.item() - 0.6931471806) > 1e-3
    metrics = run._metrics["train"]
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        scale = grad.abs().max().clamp(min=1e-6)
        assert (found[name].double() - grad).abs().max() < 2e-4 * scale, name
    chosen, rejected = kl.chunk(2)
    assert metrics["tdpo/kl_chosen"][0] == pytest.approx(chosen.mean().item(), rel=1e-3)
    assert metrics["tdpo/kl_rejected"][0] == pytest.approx(rejected.mean().item(), rel=1e-3)
    assert chosen.mean() > 1e-4


def test_experts_keep_their_loss_and_small_weights_give_trl(tmp_path):
    """The load-balancing loss survives, and next to no divergence is TRL's sigmoid."""

    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MixtralForCausalLM(
                MixtralConfig(
                    vocab_size=44, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
                    eos_token_id=1, bos_token_id=None, output_router_logits=True, router_aux_loss_coef=0.5,
                )
            )  # fmt: skip

    runs = [
        pairs.trainer(tmp_path / str(i), model=model(), reference=model(), max_steps=3, **options)
        for i, options in enumerate(({"methods": [TDPO(alpha=1e-30)]}, {"trl": True}))
    ]
    ours, theirs = (pairs.history(run) for run in runs)
    assert len(ours) == len(theirs) == 4
    assert "aux_loss" in theirs[0]
    for left, right in zip(ours, theirs, strict=True):
        assert {name: left[name] for name in right} == pytest.approx(right, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("variant", [1, 2])
def test_padding_and_accumulation_change_nothing(tmp_path, variant):
    """Batches of one pair with another multiple of padding: the same weights."""
    data = pairs.rows(8)
    settings = {
        "whole": {},
        "parts": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "padded": {"pad_to_multiple_of": 32},
    }
    weights = {}
    for name, options in settings.items():
        run = pairs.trainer(
            tmp_path / name, methods=[TDPO(variant=variant)], data=data, max_steps=2, optim="sgd",
            learning_rate=0.1, **options,
        )  # fmt: skip
        run.train()
        weights[name] = support.weights(run.model)
    for name in ("parts", "padded"):
        for key, value in weights["whole"].items():
            assert torch.allclose(weights[name][key], value, atol=2e-6), (name, key)
    assert not torch.equal(weights["whole"]["lm_head.weight"], support.model().lm_head.weight)


def test_swapped_pairs_give_the_mirrored_loss(tmp_path):
    """Of the symmetric variant: the margin changes its sign."""
    losses = []
    for names in (("chosen", "rejected"), ("rejected", "chosen")):
        data = pairs.rows(4)
        columns = {"prompt": data["prompt"], names[0]: data["chosen"], names[1]: data["rejected"]}
        run = pairs.trainer(
            tmp_path / names[0],
            methods=[TDPO(variant=1)],
            data=data.from_dict(columns),
            model=support.model(seed=1),
            beta=0.5,
            per_device_train_batch_size=1,
            dataloader_pin_memory=False,
        )
        run.model.eval()
        batches = [run.data_collator([row]) for row in run.train_dataset]
        losses.append([run.compute_loss(run.model, b).item() for b in batches])
    for there, back in zip(*losses, strict=True):
        margin = -torch.log(torch.expm1(torch.tensor(there))).item()
        assert back == pytest.approx(there + margin, abs=1e-5)


def test_half_precision_trains(tmp_path):
    run = pairs.trainer(
        tmp_path, methods=[TDPO()], bf16=True, gradient_checkpointing=True, peft_config=LoraConfig(**LORA),
        gradient_accumulation_steps=2, eval_data=pairs.rows(4), eval_strategy="steps", eval_steps=2,
        use_weighting=True,
    )  # fmt: skip
    logs = pairs.history(run)
    assert logs[0]["loss"] > 0
    assert any("eval_tdpo/kl_chosen" in log for log in logs)


def test_what_does_not_go_with_it():
    def messages(**trainer):
        setup = Setup(trainer=trainer, methods=("tdpo",))
        return [conflict.field for conflict in TDPO().conflicts(setup)]

    assert messages() == []
    assert messages(precompute_ref_log_probs=True) == ["precompute_ref_log_probs"]
    assert messages(ld_alpha=0.5) == ["ld_alpha"]
    assert messages(loss_type=["bco_pair"]) == ["loss_type"]
    assert messages(f_divergence_type="js_divergence") == ["f_divergence_type"]
    assert TDPO(alpha=0).neutral
    assert not TDPO(variant=1, alpha=0).neutral

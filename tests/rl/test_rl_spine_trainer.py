"""SPINE in the trainer: what reaches the loss, and the example of all methods together."""

import math

import numpy
import pytest
import support
import torch
from peft import get_peft_model
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.kernels import Scored
from posttrain.rl import ACE, LpReg, Spine
from posttrain.rl.spine import quantile_forks


def build(tmp_path, methods=(), **options):
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, **options),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        methods=list(methods),
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def with_reference(tmp_path, monkeypatch):
    """A reference that is not the policy, so that the KL is not zero."""
    support.model(seed=9).save_pretrained(tmp_path / "base")
    monkeypatch.setattr("trl.trainer.grpo_trainer.get_config_model_id", lambda config: str(tmp_path / "base"))


def rows(n=8):
    return [{"prompt": f"say {i // 4}?"} for i in range(n)]


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


EXAMPLE_OLD = [[-0.1, -0.7, -1.2], [-0.2, -3.0, -2.5]]
EXAMPLE_LIVE = [[-0.08, -0.6, -1.2], [-0.25, -3.4, -2.5]]
EXAMPLE_H = [[0.1, 1.0, 1.5], [0.2, 1.8, 0.9]]


def example(tmp_path, monkeypatch, methods, dtype=torch.float64):
    """Two rows of three tokens; returns the loss and its gradients by log-probability and entropy."""
    live = torch.tensor(EXAMPLE_LIVE, dtype=dtype, requires_grad=True)
    entropies = torch.tensor(EXAMPLE_H, dtype=dtype, requires_grad=True)
    monkeypatch.setattr(
        TRLGRPOTrainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: (live, entropies, None)
    )
    trainer = build(tmp_path, methods, loss_type="dapo", epsilon=1.0, epsilon_high=9.0)
    ids = torch.full((2, 3), 5)
    old = torch.tensor(EXAMPLE_OLD, dtype=dtype)
    batch = {
        "prompt_ids": ids,
        "completion_ids": ids,
        **{name: torch.ones_like(ids) for name in ("prompt_mask", "completion_mask")},
        "advantages": torch.tensor([1.0, -1.0], dtype=dtype),
        "old_per_token_logps": old,
        "ref_per_token_logps": old - torch.tensor([[0.1], [0.2]], dtype=dtype),
        "num_items_in_batch": torch.tensor(6),
        "posttrain/reward": torch.tensor([1.0, 0.0]),
        "posttrain/tied": torch.tensor([False, False]),
    }
    if any(method.name == "lp_reg" for method in methods):
        # log proxy of the sheet minus log pi_old; row 0 has a positive advantage and is never looked at
        proxy = torch.tensor([[-math.inf] * 3, [-0.18, -2.9, -math.inf]], dtype=dtype)
        batch["posttrain/carry/lp_reg/gap"] = proxy - old
    trainer.wants_head = trainer.wants_old_head = False  # no model runs here
    loss = trainer.compute_loss(trainer.model, batch)
    by_logp, by_entropy = torch.autograd.grad(loss, [live, entropies], allow_unused=True)
    return loss.item(), by_logp, by_entropy


def test_integration_example_ace_and_mask(tmp_path, monkeypatch):
    mask_only = Spine(fork_ratio=0.5, band_weight_low=0, band_weight_high=0)
    loss, by_logp, by_entropy = example(tmp_path, monkeypatch, [ACE(), mask_only])
    assert loss == pytest.approx(0.1497160802, abs=5e-11)
    assert by_logp[:, 0].tolist() == [0, 0]
    assert by_entropy is None
    ratio = (torch.tensor(EXAMPLE_LIVE) - torch.tensor(EXAMPLE_OLD)).double().exp()
    weight = 1 + math.log1p(math.exp(0.2))
    expected = torch.tensor([[-1.0], [weight]]) * ratio / 6 * torch.tensor([0, 1, 1])
    assert torch.allclose(by_logp, expected, atol=1e-7)


@pytest.mark.parametrize("order", [1, -1])
def test_integration_example_of_all_methods(order, tmp_path, monkeypatch):
    """Loss and both gradients of the sheet, whatever the order of the methods."""
    methods = [ACE(), LpReg(rho=0.67), Spine(fork_ratio=0.5)][::order]
    loss, by_logp, by_entropy = example(tmp_path, monkeypatch, methods)
    assert loss == pytest.approx(0.1759029586, abs=5e-11)
    expected = [[0, -0.1841951530, -0.1666666667], [0, 0.0927678765, 0.2996898116]]
    assert torch.allclose(by_logp, torch.tensor(expected).double(), atol=5e-8)
    expected = [[0, -0.0016666667, 0.0016666667], [0, 0.0016666667, -0.0016666667]]
    assert torch.allclose(by_entropy, torch.tensor(expected).double(), atol=5e-10)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([], -0.0839704646),
        ([ACE()], 0.2647562905),
        ([ACE(), LpReg(rho=0.67)], 0.2895431689),
        ([ACE(), Spine(fork_ratio=0.5, band_weight_low=0, band_weight_high=0)], 0.1497160802),
    ],
    ids=lambda value: "-".join(m.name for m in value) if isinstance(value, list) else "",
)
def test_integration_example_row_by_row(methods, expected, tmp_path, monkeypatch):
    assert example(tmp_path, monkeypatch, methods)[0] == pytest.approx(expected, abs=5e-11)


def test_integration_example_order_does_not_matter(tmp_path, monkeypatch):
    methods = [ACE(), Spine(fork_ratio=0.5)]
    forward = example(tmp_path, monkeypatch, methods)
    backward = example(tmp_path, monkeypatch, methods[::-1])
    assert forward[0] == pytest.approx(backward[0], abs=1e-15)
    # bands [1.05, 1.25] and [.99, 1.35]: 1.0 and .9 are below, 1.5 and 1.8 above
    assert forward[0] == pytest.approx(0.1497160802 + 0.01 * (0.05 + 0.25 + 0.45 + 0.09) / 6, abs=5e-11)
    expected = [[0, -1, 1], [0, 1, -1]]
    assert torch.allclose(forward[2], torch.tensor(expected).double() * 0.01 / 6, atol=1e-15)


@pytest.mark.parametrize("ratio", [0.2, 0.35])
def test_one_row_is_trls_entropy_quantile(ratio, tmp_path):
    """With one row in the batch TRL's top_entropy_quantile is the same set; loss and gradients are equal."""
    options = {"loss_type": "dapo", "max_completion_length": 12}
    ours = build(tmp_path, [Spine(fork_ratio=ratio, band_weight_low=0, band_weight_high=0)], **options)
    batch = ours._generate_and_score_completions(rows())
    batch["advantages"] = torch.linspace(-1, 1, 8)
    single = {key: value[3:4] if value.dim() else value for key, value in batch.items()}
    loss = ours.compute_loss(ours.model, dict(single))
    theirs = build(tmp_path, [], top_entropy_quantile=ratio, **options)
    expected = theirs.compute_loss(theirs.model, dict(single))
    assert loss.item() == expected.item()
    for left, right in zip(gradients(loss, ours.model), gradients(expected, theirs.model), strict=True):
        assert torch.equal(left, right)
    assert loss.item() != build(tmp_path, [], **options).compute_loss(ours.model, dict(single)).item()


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_kl_of_trl_acts_on_forks_only(loss_type, bias_correction, tmp_path, monkeypatch):
    """Against a float64 loss written out from full logits: policy and beta terms on forks only."""
    with_reference(tmp_path, monkeypatch)
    beta, temperature = 0.3, 0.8
    trainer = build(
        tmp_path,
        [Spine(fork_ratio=0.4, band_weight_low=0, band_weight_high=0)],
        loss_type=loss_type,
        beta=beta,
        temperature=temperature,
        use_bias_correction_kl=bias_correction,
        steps_per_generation=2,
    )
    batch = trainer._generate_and_score_completions(rows())
    batch["completion_mask"][0, 3:] = 0
    batch["completion_mask"][5] = 0  # what TRL makes of a truncated row
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    batch["advantages"] = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(
                0.05
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    loss = trainer.compute_loss(trainer.model, dict(batch))
    found = gradients(loss, trainer.model)

    mask = batch["completion_mask"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], mask], 1)
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -mask.size(1) - 1 : -1].double()
    logp = torch.log_softmax(logits / temperature, -1)
    live = logp.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    forks = torch.zeros_like(mask, dtype=torch.bool)
    for i in range(8):
        valid = entropy[i][mask[i].bool()]
        if len(valid):
            forks[i] = (entropy[i] >= numpy.quantile(valid.numpy(), 0.6) - 1e-12) & mask[i].bool()
    ratio = (live - batch["old_per_token_logps"].double()).exp()
    advantages = batch["advantages"].double().unsqueeze(1)
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    d = batch["ref_per_token_logps"].double() - live
    kl = (d.exp() - d - 1) * (ratio if bias_correction else 1.0)
    terms = ((policy + beta * kl) * forks).masked_fill(~forks, 0.0)
    expected = {
        "dapo": terms.sum() / (mask.sum() / 2),
        "bnpo": terms.sum() / mask.sum(),
        "dr_grpo": terms.sum() / (8 * 8),
        "grpo": (terms.sum(1) / mask.sum(1).clamp(min=1)).mean(),
    }[loss_type]
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    assert (kl * forks).sum() > 0.1
    for left, right in zip(found, gradients(expected, trainer.model), strict=True):
        assert torch.allclose(left, right.to(left.dtype), atol=2e-5)


def test_tokens_outside_the_forks_have_no_direct_gradient(tmp_path, monkeypatch):
    """Policy term and TRL's KL are exactly zero there, not small."""
    with_reference(tmp_path, monkeypatch)
    trainer = build(tmp_path, [Spine(fork_ratio=0.4)], beta=0.5, steps_per_generation=2)
    batch = trainer._generate_and_score_completions(rows())
    batch["old_per_token_logps"] = batch["old_per_token_logps"] - 0.07
    batch["advantages"] = torch.linspace(-1, 1, 8)
    kept = {}
    upstream = TRLGRPOTrainer._get_per_token_logps_and_entropies

    def watch(self, *args, **kwargs):
        logps, entropies, rest = upstream(self, *args, **kwargs)
        kept["logps"], kept["entropies"] = logps, entropies
        return logps, entropies, rest

    monkeypatch.setattr(TRLGRPOTrainer, "_get_per_token_logps_and_entropies", watch)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    by_logp, by_entropy = torch.autograd.grad(loss, [kept["logps"], kept["entropies"]])
    forks = quantile_forks(kept["entropies"], batch["completion_mask"], 0.4)
    assert (by_logp[~forks] == 0).all()
    assert (by_entropy[~forks] == 0).all()
    assert (by_logp[forks] != 0).all()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variant": "otsu"},
        {"band_weight_low": 0.0},
        {"band_weight_high": 0.0, "band_skip_zero_advantage": True},
    ],
)
def test_gradient_of_the_band_at_a_large_vocabulary(settings, adapter, tmp_path, monkeypatch):
    """There only the tokens outside the band go through the head again, with the same result."""
    weights = {"band_weight_low": 0.3, "band_weight_high": 0.5} | settings
    trainer = build(tmp_path, [Spine(**weights)], temperature=0.7)
    if adapter:
        peft = get_peft_model(trainer.model, support.lora(init_lora_weights=False))
        trainer.model = trainer.model_wrapped = peft
    batch = trainer._generate_and_score_completions(rows())
    batch["advantages"] = torch.linspace(-1, 1, 8)
    batch["posttrain/tied"] = torch.arange(8) < 2
    losses = [trainer.compute_loss(trainer.model, dict(batch))]
    monkeypatch.setattr("posttrain.kernels.head.LARGE_VOCABULARY", 1)
    used = []
    original = Scored.entropies

    def watch(self, where, values):
        used.append(where)
        return original(self, where, values)

    monkeypatch.setattr(Scored, "entropies", watch)
    losses.append(trainer.compute_loss(trainer.model, dict(batch)))
    assert 0 < used[0].sum() < batch["completion_mask"].sum() / 2
    assert losses[0].item() == losses[1].item()
    for left, right in zip(*(gradients(loss, trainer.model) for loss in losses), strict=True):
        assert left.abs().max() > 0
        assert torch.allclose(left, right, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("variant", ["quantile", "otsu"])
def test_splitting_over_micro_batches_changes_nothing(loss_type, variant, tmp_path):
    trainer = build(
        tmp_path, [Spine(variant=variant, fork_ratio=0.4)], loss_type=loss_type, steps_per_generation=2
    )
    batch = trainer._generate_and_score_completions(rows())
    batch["completion_mask"][2, 4:] = 0
    batch["completion_mask"][7] = 0
    batch["advantages"] = torch.linspace(-1, 1, 8)

    def step(parts):
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = parts
        size = 8 // parts
        losses = [
            trainer.compute_loss(
                trainer.model, {k: v[i : i + size] if v.dim() else v for k, v in batch.items()}
            )
            for i in range(0, 8, size)
        ]
        return sum(losses)

    once, split = step(1), step(4)
    assert split.item() == pytest.approx(once.item(), abs=1e-6)
    for left, right in zip(gradients(split, trainer.model), gradients(once, trainer.model), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_kl_term_is_divided_by_accumulation_only(tmp_path):
    """It is a mean over forks: with one micro-batch at half the accumulation it counts double, whatever T."""
    options = {"loss_type": "dapo", "gradient_accumulation_steps": 3, "steps_per_generation": 2}
    method = Spine(fork_ratio=0.4, kl_coef=0.25)
    without = Spine(fork_ratio=0.4)
    trainer, plain = build(tmp_path, [method], **options), build(tmp_path, [without], **options)
    batch = trainer._generate_and_score_completions(rows())
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"] - 0.3 * torch.rand(
        batch["ref_per_token_logps"].shape, generator=torch.Generator().manual_seed(0)
    )
    term = trainer.compute_loss(trainer.model, dict(batch)) - plain.compute_loss(plain.model, dict(batch))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    live, entropies, _ = plain._get_per_token_logps_and_entropies(
        plain.model, ids, attention, batch["completion_ids"].size(1), compute_entropy=True
    )
    forks = quantile_forks(entropies, batch["completion_mask"], 0.4)
    d = (batch["ref_per_token_logps"] - live)[forks].double()
    assert term.item() == pytest.approx(0.25 / 3 * (d.exp() - d - 1).mean().item(), rel=1e-4)
    assert trainer._metrics["train"]["spine/kl"] == [pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-4)]


def test_rows_the_sampler_correction_threw_out_have_no_band(tmp_path):
    """TRL's mask on the vLLM ratio is for the policy term; the band goes with it."""
    trainer = build(tmp_path, [Spine(band_weight_high=1.0, fork_ratio=0.6)], loss_type="dapo")
    batch = trainer._generate_and_score_completions(rows())
    batch["advantages"] = torch.zeros(8)
    whole = trainer.compute_loss(trainer.model, dict(batch))
    ratio = torch.ones(8, 1)
    ratio[2:] = 0
    part = trainer.compute_loss(trainer.model, dict(batch) | {"importance_sampling_ratio": ratio})
    mask = batch["completion_mask"].clone()
    mask[2:] = 0
    first = {key: value[:2] if value.dim() else value for key, value in batch.items()}
    expected = trainer.compute_loss(trainer.model, first)
    assert part.item() == pytest.approx(expected.item(), abs=1e-7)
    assert 0 < part.item() < whole.item()


@pytest.mark.parametrize("method", [Spine(), Spine(variant="otsu", kl_coef=0.01)], ids=["v1", "v2"])
def test_a_run_logs_its_gauges(method, tmp_path):
    trainer = build(tmp_path, [ACE(), method], max_steps=3, mask_truncated_completions=True)
    trainer.train()
    shares = support.logged(trainer, "spine/fork_share", "spine/band_high", "spine/above_band")
    assert len(shares) == 3
    assert all(0 < share < 1 and high > 0 for share, high, _ in shares)


def test_neutral_is_not_there(tmp_path):
    neutral = Spine(fork_ratio=1, band_weight_low=0, band_weight_high=0)
    weights = []
    for methods in ([], [neutral]):
        trainer = build(tmp_path, methods, max_steps=3)
        trainer.train()
        weights.append(support.weights(trainer.model))
    support.assert_same(*weights)


def test_all_tokens_are_the_base_loss(tmp_path):
    """fork_ratio 1 through the whole machinery (a weight of 1e-30 keeps it from being skipped)."""
    nearly = Spine(fork_ratio=1, band_weight_low=0, band_weight_high=1e-30)
    trainer, plain = build(tmp_path, [nearly], loss_type="grpo"), build(tmp_path, loss_type="grpo")
    batch = trainer._generate_and_score_completions(rows())
    batch["advantages"] = torch.linspace(-1, 2, 8)
    loss, expected = (t.compute_loss(t.model, dict(batch)) for t in (trainer, plain))
    assert loss.item() == expected.item()
    for left, right in zip(gradients(loss, trainer.model), gradients(expected, plain.model), strict=True):
        assert torch.allclose(left, right, atol=1e-9)


def test_refused_before_the_model_loads(tmp_path):
    with pytest.raises(ValueError, match=r"top_entropy_quantile=0\.2.*entropy_coef=0\.1"):
        build(tmp_path, [Spine()], top_entropy_quantile=0.2, entropy_coef=0.1)

"""ACE against the numbers of its definition (arXiv 2602.21420) and against independent references."""

import inspect
import math

import pytest
import support
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import ACE
from posttrain.rl.ace import confidence_shift, error_weights
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import Setup, Tokens

POLICY = [[-0.1, -0.2], [-0.5] * 3, [-1.0, -2.0], [-0.3] * 4]
REFERENCE = [[-0.2, -0.2], [-1.5] * 3, [-0.9, -1.1], [-0.3] * 4]
ADVANTAGES = [1.4997000600, -0.4999000200, -0.4999000200, -0.4999000200]


def padded(rows, width=4, fill=-7.0):
    values = torch.full((len(rows), width), fill, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[i, : len(row)] = 1
    return values, mask


def sheet():
    policy, mask = padded(POLICY)
    reference, _ = padded(REFERENCE, fill=-3.0)
    return policy, reference, mask


def tokens(advantages=ADVANTAGES, reward=(1, 0, 0, 0), tied=False, **overrides):
    policy, reference, mask = sheet()
    fields = {
        "logps": policy,
        "entropies": torch.zeros_like(policy),
        "old_logps": policy,
        "ref_logps": reference,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "reward": torch.tensor(reward, dtype=torch.float64),
        "tied": torch.full((4,), tied),
        "mask": mask,
        "gauges": Gauges(),
    }
    return Tokens(**(fields | overrides))


def near(values):
    return pytest.approx(values, abs=5e-8)


def test_shift_of_the_sheet():
    policy, reference, mask = sheet()
    assert confidence_shift(policy, reference, mask).tolist() == near([0.05, 1.0, -0.5, 0.0])
    total = confidence_shift(policy, reference, mask, length_normalize=False)
    assert total.tolist() == near([0.1, 3.0, -1.0, 0.0])


def test_weights_and_advantages_of_the_sheet():
    weights = ACE().token_weights(tokens()).squeeze(1)
    assert weights.tolist() == near([1, 2.3132617, 1.4740770, 1.6931472])
    shaped = weights * torch.tensor(ADVANTAGES, dtype=torch.float64)
    assert shaped.tolist() == near([1.4997000600, -1.1563995638, -0.7368911139, -0.8464043094])
    assert shaped.sum().item() == near(-1.2399949)
    softplus = torch.nn.functional.softplus(confidence_shift(*sheet()))
    assert softplus.tolist() == near([0.7184596, 1.3132617, 0.4740770, 0.6931472])


def test_ablations_of_the_sheet():
    assert ACE(activation="relu").token_weights(tokens()).flatten().tolist() == near([1, 2, 1, 1])
    constant = ACE(activation="constant", alpha=2.0).token_weights(tokens()).flatten().tolist()
    assert constant == near([1, 2.3862944, 2.3862944, 2.3862944])
    unnormalised = ACE(length_normalize=False).token_weights(tokens()).flatten().tolist()
    assert unnormalised == near([1, 4.0485874, 1.3132617, 1.6931472])


def test_clip_bounds_the_shift_from_above_only():
    clipped = ACE(c_clip=0.5).token_weights(tokens()).flatten().tolist()
    assert clipped == near([1, 1 + math.log1p(math.exp(0.5)), 1.4740770, 1.6931472])


def test_policy_side():
    live = torch.full((4, 4), -0.5, dtype=torch.float64)
    given_live = tokens(logps=live)
    assert torch.equal(ACE().token_weights(given_live), ACE().token_weights(tokens()))
    shift = confidence_shift(live, given_live.ref_logps, given_live.mask)
    expected = error_weights(shift, torch.tensor([False, True, True, True]))
    assert torch.equal(ACE(policy_logps="live").token_weights(given_live).squeeze(1), expected)


def test_error_sets():
    below = ACE(error_set="reward_below", reward_threshold=0.5)
    # row 1 is a right answer with a length penalty: negative advantage, but not an error
    weights = below.token_weights(tokens(reward=(1, 0.9, 0, 0.5))).flatten()
    assert (weights > 1).tolist() == [False, False, True, False]
    # a failed answer with a non-negative advantage is left alone
    weights = below.token_weights(tokens(advantages=[-1.0, 0.5, 0.0, -0.1], reward=(0, 0, 0, 0))).flatten()
    assert (weights > 1).tolist() == [True, False, False, True]


def test_all_equal_rewards_have_no_errors():
    # eight times 0.1 leaves -7.4e-5 in float32: not an error
    assert torch.equal(
        ACE().token_weights(tokens(advantages=[-7.4e-5] * 4, tied=True)), torch.ones(4, 1).double()
    )


def test_per_token_advantages_go_by_their_sum():
    advantages = torch.tensor([[0.5, 0.5, 9.0, 9.0]] + [[-1.0, 0.4, 0.0, 0.0]] * 3)
    weights = ACE().token_weights(tokens(advantages=advantages.tolist())).flatten()
    assert (weights > 1).tolist() == [False, True, True, True]


def test_empty_row_has_no_drift():
    policy, reference, mask = sheet()
    mask[1] = 0
    policy[1, 0] = float("nan")  # what a masked row may hold
    assert confidence_shift(policy, reference, mask)[1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_broken_reference_is_refused(value):
    policy, reference, mask = sheet()
    reference[2, 1] = value
    with pytest.raises(FloatingPointError, match=r"rows \[2\]"):
        confidence_shift(policy, reference, mask)


def test_weight_carries_no_gradient():
    policy, reference, mask = sheet()
    policy.requires_grad_()
    weights = error_weights(confidence_shift(policy, reference, mask), torch.ones(4, dtype=torch.bool))
    assert not weights.requires_grad


def test_bfloat16_is_summed_in_float32():
    policy = torch.full((1, 4096), -0.01, dtype=torch.bfloat16)
    reference = torch.full((1, 4096), -0.02, dtype=torch.bfloat16)
    exact = (policy.double() - reference.double()).mean().item()
    shift = confidence_shift(policy, reference, torch.ones(1, 4096))
    assert shift.dtype == torch.float32
    assert shift.item() == pytest.approx(exact, rel=1e-5)


def test_gauges():
    seen = tokens()
    ACE().token_weights(seen)

    class OneProcess:
        def gather(self, tensor):
            return tensor

    values, maxima = seen.gauges.flush(OneProcess())
    assert values["shift_mean"] == near(0.1375)
    assert maxima == {"shift_max": near(1.0)}
    assert values["amplified_rows"] == 0.75
    assert values["weight_mean"] == near((1 + 2.3132617 + 1.4740770 + 1.6931472) / 4)


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=8),
    st.floats(0, 4),
    st.sampled_from(["softplus", "relu", "constant"]),
)
def test_weights_properties(shifts, alpha, activation):
    shift = torch.tensor(sorted(shifts), dtype=torch.float64)
    errors = torch.ones(len(shifts), dtype=torch.bool)
    weights = error_weights(shift, errors, alpha=alpha, activation=activation)
    assert (weights >= 1).all()
    assert (weights.diff() >= 0).all()
    assert torch.equal(error_weights(shift, ~errors, alpha=alpha), torch.ones_like(shift))


@given(st.integers(0, 5))
def test_padding_changes_nothing(columns):
    policy, reference, mask = sheet()
    more = [
        torch.nn.functional.pad(t, (0, columns), value=v)
        for t, v in ((policy, -9.0), (reference, 4.0), (mask, 0))
    ]
    assert torch.equal(confidence_shift(*more), confidence_shift(policy, reference, mask))


def test_theorem_one_identity():
    """grad J_ACE - grad J_base = -alpha a (grad R_sel - residual), exact expectations over four answers."""
    logits = torch.tensor([0.2, -0.1, 0.4, -0.5], dtype=torch.float64, requires_grad=True)
    log_ref = torch.log_softmax(torch.tensor([0.0, 0.3, -0.4, 0.1], dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    p = logp.exp().detach()
    wrong = torch.tensor([False, True, True, True])
    a_correct, a_wrong = math.sqrt((1 - p[0]) / p[0]), -math.sqrt(p[0] / (1 - p[0]))
    advantage = wrong.double() * a_wrong + (~wrong).double() * a_correct
    shift = confidence_shift(logp.unsqueeze(1), log_ref.unsqueeze(1), torch.ones(4, 1))
    weights = error_weights(shift, wrong)
    assert a_wrong == near(-0.6377315)
    difference = torch.autograd.grad((p * (weights - 1) * advantage * logp).sum(), logits, retain_graph=True)[
        0
    ]
    assert difference.tolist() == near([0.1064308, 0.0100663, -0.1300581, 0.0135610])
    c = logp - log_ref
    r_sel = (logp.exp() * wrong * torch.nn.functional.softplus(c)).sum()
    assert r_sel.item() == near(0.5772391)
    grad_r_sel = torch.autograd.grad(r_sel, logits, retain_graph=True)[0]
    assert grad_r_sel.tolist() == near([-0.2757929, -0.0117281, 0.3127697, -0.0252487])
    residual = torch.autograd.grad((p * wrong * torch.sigmoid(c).detach() * logp).sum(), logits)[0]
    assert residual.tolist() == near([-0.1089032, 0.0040564, 0.1088311, -0.0039843])
    assert torch.allclose(difference, a_wrong * (grad_r_sel - residual), atol=1e-15, rtol=0)


def test_parameters_are_checked():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        ACE(alpha=-1)
    with pytest.raises(ValidationError, match="go together"):
        ACE(error_set="reward_below")
    with pytest.raises(ValidationError, match="Extra inputs"):
        ACE(alpa=1)


def test_moving_reference_is_refused(tmp_path):
    assert [c.field for c in ACE().conflicts(Setup(trainer={"sync_ref_model": True}))] == ["sync_ref_model"]
    with pytest.raises(ValueError, match="ACE measures drift from a fixed reference"):
        GRPOTrainer(
            model=support.model(),
            args=support.grpo_config(tmp_path, beta=0.1, sync_ref_model=True),
            reward_funcs=support.letter_reward,
            train_dataset=support.prompts(),
            processing_class=support.tokenizer(),
            methods=[ACE()],
        )


def test_ttrl_is_only_a_warning():
    (conflict,) = ACE().conflicts(Setup(trainer={}, methods=("ace", "ttrl")))
    assert not conflict.fatal


# ---- through the trainer ----------------------------------------------------------------------------------


def build(tmp_path, methods=(), **settings):
    adapter = settings.pop("adapter", False)
    return GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, **settings),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora() if adapter else None,
        methods=list(methods),
    )


def test_integration_example(tmp_path, monkeypatch):
    """Two rows, three tokens, wide clip bounds: base loss -0.0839704646, with ACE 0.2647562905."""
    old = torch.tensor([[-0.1, -0.7, -1.2], [-0.2, -3.0, -2.5]])
    live = torch.tensor([[-0.08, -0.6, -1.2], [-0.25, -3.4, -2.5]], requires_grad=True)
    monkeypatch.setattr(
        TRLGRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda *args, **kwargs: (live, torch.ones_like(live), None),
    )
    ids = torch.full((2, 3), 5)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_per_token_logps": old,
        "ref_per_token_logps": old - torch.tensor([[0.1], [0.2]]),
        "num_items_in_batch": torch.tensor(6),
        "posttrain/reward": torch.tensor([1.0, 0.0]),
        "posttrain/tied": torch.tensor([False, False]),
    }
    losses, gradients = {}, {}
    for name, methods in {"base": [], "ace": [ACE()]}.items():
        trainer = build(tmp_path / name, methods, loss_type="dapo", epsilon=1.0, epsilon_high=9.0)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        losses[name] = loss.item()
        (gradients[name],) = torch.autograd.grad(loss, live)
    assert losses["base"] == pytest.approx(-0.0839704646, abs=1e-7)
    assert losses["ace"] == pytest.approx(0.2647562905, abs=1e-7)
    ratio = (live - old).exp().detach()
    w = 1.7981389
    assert torch.allclose(gradients["ace"], torch.tensor([[-1.0], [w]]) * ratio / 6, atol=1e-6)


LOSSES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "dapo", "epsilon_high": 0.28},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "sapo"},
    {"loss_type": "vespo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "beta": 0.1},
]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_loss_is_trl_on_reweighted_advantages(settings, adapter, tmp_path, monkeypatch):
    """The weights come from full logits in float64, independently of the fused head and of the trainer."""
    base = support.model()
    if settings.get("beta") and not adapter:
        base.save_pretrained(tmp_path / "base")
        monkeypatch.setattr(
            "trl.trainer.grpo_trainer.get_config_model_id", lambda config: str(tmp_path / "base")
        )
    trainer = build(
        tmp_path, [ACE(alpha=1.3)], adapter=adapter, temperature=0.7, steps_per_generation=2, **settings
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.reward_funcs = [
        lambda completions, **kwargs: [float(i % 4 == 0) for i in range(len(completions))]
    ]
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    trainer.model.train()
    rows = [{"prompt": f"say {i // 4}?"} for i in range(8)]
    batch = trainer._generate_and_score_completions(rows)
    assert (batch["advantages"] < 0).any()

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    columns = batch["completion_ids"].size(1)

    def full_logps(model):
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -columns - 1 : -1].double() / 0.7
        return torch.log_softmax(logits, -1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)

    with torch.no_grad():
        shift = (full_logps(trainer.model) - full_logps(base if not adapter else support.model())) * batch[
            "completion_mask"
        ]
        c = shift.sum(1) / batch["completion_mask"].sum(1)
        w = torch.where(batch["advantages"] < 0, 1 + 1.3 * torch.log1p(c.exp()), 1.0).float()
    assert (c.abs() > 0.01).all()

    ours = trainer.compute_loss(trainer.model, dict(batch))
    trainer.hooked = False
    expected = trainer.compute_loss(trainer.model, dict(batch) | {"advantages": batch["advantages"] * w})
    plain = trainer.compute_loss(trainer.model, dict(batch))
    assert ours.item() == pytest.approx(expected.item(), abs=2e-5)
    assert abs(ours.item() - plain.item()) > 1e-3
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for left, right in zip(
        torch.autograd.grad(ours, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        assert torch.allclose(left, right, atol=1e-4, rtol=1e-3)


def test_pretrained_adapter_is_its_own_reference(tmp_path):
    """A model that comes with a trained adapter drifts from that adapter, not from the bare base."""
    from peft import get_peft_model

    model = get_peft_model(support.model(), support.lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    trainer = GRPOTrainer(
        model=model,
        args=support.grpo_config(tmp_path, max_steps=3),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        methods=[ACE()],
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".ref." in n}
    assert before
    trainer.train()
    first, *_, last = (row["ace/shift_max"] for row in trainer.state.log_history if "ace/shift_max" in row)
    assert first == pytest.approx(0, abs=1e-5)
    assert last > 1e-3
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            assert not parameter.requires_grad
            assert torch.equal(parameter, before[name])


def test_own_reference_stays_frozen(tmp_path):
    trainer = build(tmp_path, [ACE()], max_steps=6)
    before = support.weights(trainer._own_reference)
    trainer.train()
    support.assert_same(support.weights(trainer._own_reference), before)
    history = [row["ace/shift_max"] for row in trainer.state.log_history if "ace/shift_max" in row]
    assert history[0] == pytest.approx(0, abs=1e-5)
    assert history[-1] > 1e-3


def first_shift(tmp_path, *, adapter, **settings):
    """(rows, tokens) of log pi - log pi_ref of the first rollout, both from full logits of the live model."""
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, max_steps=1, temperature=0.7, **settings),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=adapter,
        methods=[ACE()],
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": f"say {i // 4}?"} for i in range(8)])
    assert trainer.model.training
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    columns = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids, attention_mask=attention).logits[:, -columns - 1 : -1]
        logps = torch.log_softmax(logits.double() / 0.7, -1)
        logps = logps.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    return (logps - batch["ref_per_token_logps"]) * batch["completion_mask"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters_that_move_weights_have_the_right_reference(beta, tmp_path):
    """PiSSA starts as the base model but keeps a part of its weights in the adapter."""
    shift = first_shift(tmp_path, adapter=support.lora(init_lora_weights="pissa"), beta=beta)
    assert shift.abs().max() < 1e-5


def test_reference_has_no_dropout(tmp_path):
    """Neither of the adapter that is its own reference, nor of the model."""
    adapter = support.lora(lora_dropout=0.5, init_lora_weights="olora")
    assert first_shift(tmp_path, adapter=adapter).abs().max() < 1e-5


def test_reference_leaves_saved_modules_out(tmp_path):
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, max_steps=3),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora(modules_to_save=["lm_head"]),
        methods=[ACE()],
    )
    trainer.train()
    initial = support.model().lm_head.weight
    policy = trainer.accelerator.unwrap_model(trainer.model)
    assert not torch.equal(policy.get_base_model().get_output_embeddings().weight, initial)
    with trainer._reference_model():
        assert torch.equal(policy.get_base_model().get_output_embeddings().weight, initial)


def test_drift_is_of_the_policy_that_generated(tmp_path):
    """Later iterations on the same rollouts move the policy, not the weights; the live side does move."""
    seen = {}
    for side in ("old", "live"):
        trainer = build(tmp_path / side, [ACE(policy_logps=side)], num_iterations=3, max_steps=6)
        trainer.train()
        seen[side] = [row[0] for row in support.logged(trainer, "ace/shift_mean")]
    first, second = seen["old"][:3], seen["old"][3:]
    assert first == [first[0]] * 3
    assert second == [second[0]] * 3
    assert first[0] != second[0]
    assert len(set(seen["live"])) == 6


def fixed_rollout(prompts, trainer):
    """Completions that depend on the place in the batch and the step alone, so that no draw is shared."""
    tokenizer, step = support.tokenizer(), trainer.state.global_step
    ids = [[5 + (7 * i + 3 * step + t) % 30 for t in range(2 + (i + step) % 5)] for i in range(len(prompts))]
    return {
        "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
        "completion_ids": ids,
        "logprobs": None,
    }


def test_evaluation_does_not_disturb_training(tmp_path):
    """With an evaluation after every step, training logs the same losses and gauges as without."""
    logs, runs = {}, {}
    for name, settings in {
        "plain": {},
        "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
    }.items():
        trainer = GRPOTrainer(
            model=support.model(),
            args=support.grpo_config(tmp_path / name, max_steps=6, logging_steps=2, **settings),
            reward_funcs=support.letter_reward,
            train_dataset=support.prompts(),
            eval_dataset=support.prompts(2),
            processing_class=support.tokenizer(),
            rollout_func=fixed_rollout,
            methods=[ACE()],
        )
        trainer.train()
        keys = ("loss", "grad_norm", "ace/shift_mean", "ace/shift_max", "ace/error_rows", "ace/weight_mean")
        logs[name], runs[name] = support.logged(trainer, *keys), trainer
    # evaluation draws random numbers, as in TRL, so the rows of a batch come in another order
    for left, right in zip(logs["evaluated"], logs["plain"], strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-7)
    assert logs["plain"][-1][3] > 1e-3
    evaluated = support.logged(runs["evaluated"], "eval_loss", "eval_ace/shift_max")
    assert len(evaluated) == 6
    assert all(math.isfinite(value) for row in evaluated for value in row)


def test_page_teaches():
    page = inspect.getmodule(ACE).__doc__
    for claim in (
        "softplus",
        "When not to use it",
        "pass@1",
        "frozen copy",
        "reward_below",
        "1.69",
        "c_clip",
    ):
        assert claim in page

"""Flex-DPO: golden numbers, the two strengths through TRL's losses and metrics, and what is refused."""

import importlib.util
import logging
from pathlib import Path

import pairs
import pytest
import support
import torch
from peft import LoraConfig
from pydantic import ValidationError

from posttrain.preference.flex_dpo import FlexDPO, flex_weights
from posttrain.preference.rpo import RPO
from posttrain.preference.tdpo import TDPO

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def margin(ratios, beta, beta_rejected):
    weights = flex_weights(ratios, torch.tensor([True, False]), beta=beta, beta_rejected=beta_rejected)
    scores = beta * weights * ratios
    return scores[0] - scores[1]


def test_golden_values():
    logps = torch.tensor([-12.0, -20.0], dtype=torch.float64, requires_grad=True)
    z = margin(logps - torch.tensor([-13.0, -18.0]), 0.1, 0.08)
    loss = -torch.nn.functional.logsigmoid(z)
    loss.backward()
    assert z.item() == pytest.approx(0.26, abs=1e-12)
    assert loss.item() == pytest.approx(0.5715734864, abs=1e-10)
    assert logps.grad.tolist() == pytest.approx([-0.0435363708, 0.0348290967], abs=1e-10)


def test_probability_space():
    """DPO's slopes to the probabilities themselves differ by -p/q."""
    p = torch.tensor([0.2, 0.05], dtype=torch.float64, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(margin((p / 0.1).log(), 0.1, 0.1))
    loss.backward()
    assert loss.item() == pytest.approx(0.6262328064, abs=1e-10)
    assert p.grad.tolist() == pytest.approx([-0.2326990193, 0.9307960772], abs=1e-10)
    assert (p.grad[1] / p.grad[0]).item() == pytest.approx(-4)


def test_softmax_over_answers():
    logits = torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    ratios = logits.log_softmax(0)[:2] - torch.tensor(1 / 3).double().log()
    loss = -torch.nn.functional.logsigmoid(margin(ratios, 0.1, 0.1))
    loss.backward()
    assert loss.item() == pytest.approx(0.6684596480, abs=1e-10)
    assert logits.grad.tolist() == pytest.approx([-0.0487502604, 0.0487502604, 0], abs=1e-10)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "discopop", "robust"])
def test_loss_metrics_and_gradient_from_full_logits(tmp_path, loss):
    beta, rejected = 0.3, 0.12
    run = pairs.trainer(
        tmp_path,
        methods=[FlexDPO(beta_rejected=rejected)],
        reference=support.model(seed=1),
        beta=beta,
        loss_type=loss,
    )
    inputs = run.data_collator(list(run.train_dataset)[:4])
    value = run.compute_loss(run.model, dict(inputs))
    value.backward()

    def sums(model):
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        logits = model.double()(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return torch.where(mask, logps, 0.0).sum(1)

    policy = support.model()
    ratios = sums(policy) - sums(support.model(seed=1)).detach()
    rewards = torch.cat([beta * ratios[:4], rejected * ratios[4:]])
    lengths = inputs["completion_mask"].sum(1)
    if loss in ("sigmoid_norm", "ipo"):
        z = (rewards / lengths)[:4] - (rewards / lengths)[4:]
    else:
        z = rewards[:4] - rewards[4:]
    logistic = -torch.nn.functional.logsigmoid(z)
    blend = torch.sigmoid(z / 0.05)
    expected = {
        "sigmoid": logistic,
        "sigmoid_norm": logistic,
        "robust": logistic,
        "hinge": torch.relu(1 - z),
        "ipo": ((z - 0.5) / beta) ** 2,
        "discopop": logistic * (1 - blend) + (-z).exp() * blend,
    }[loss].mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in policy.named_parameters():
        found = run.model.get_parameter(name).grad.double()
        assert torch.allclose(found, parameter.grad, rtol=2e-3, atol=1e-5), name
    logs = run._metrics["train"]
    assert logs["rewards/rejected"] == [pytest.approx(rewards[4:].mean().item(), rel=1e-4)]
    assert logs["rewards/margins"] == [pytest.approx((rewards[:4] - rewards[4:]).mean().item(), rel=1e-3)]
    assert logs["rewards/accuracies"] == [(rewards[:4] > rewards[4:]).double().mean().item()]


def test_no_strength_leaves_rejected_answers_alone(tmp_path):
    """With 0 the gradient is that of imitation within a bound: rejected rows may hold anything."""
    run = pairs.trainer(tmp_path, methods=[FlexDPO(beta_rejected=0)], reference=support.model(seed=1))
    gradients = []
    for change in (0, 3):
        inputs = run.data_collator(list(run.train_dataset)[:4])
        inputs["input_ids"][4:] = (inputs["input_ids"][4:] + change) % 40
        run.model.zero_grad()
        run.compute_loss(run.model, inputs).backward()
        gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters()})
    for name, value in gradients[0].items():
        assert value.abs().max() > 0
        assert torch.allclose(value, gradients[1][name], atol=1e-6), name


def test_equal_strengths_are_trl_bit_for_bit(tmp_path):
    settings = {"beta": 0.3, "max_steps": 3}
    ours = pairs.trainer(tmp_path, methods=[FlexDPO(beta_rejected=0.3)], **settings)
    pairs.assert_trl_equal(ours, pairs.trainer(tmp_path, trl=True, **settings))


def test_swapped_pairs_swap_the_strengths(tmp_path):
    data = pairs.rows(4)
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    margins = []
    for rows, beta, rejected in ((data, 0.3, 0.1), (swapped, 0.1, 0.3)):
        run = pairs.trainer(
            tmp_path,
            methods=[FlexDPO(beta_rejected=rejected)],
            data=rows,
            beta=beta,
            reference=support.model(seed=1),
        )
        run.compute_loss(run.model, run.data_collator(list(run.train_dataset)))
        margins.append(run._metrics["train"]["rewards/margins"][0])
    assert margins[0] == pytest.approx(-margins[1], abs=1e-4)
    assert abs(margins[0]) > 0.01


def test_lora_bf16_precomputed_with_rpo(tmp_path):
    """Weaker pressure on rejected answers lets them fall less, whether references are precomputed or not."""
    falls = {}
    for rejected, precompute in ((None, False), (0.03, False), (0.03, True)):
        run = pairs.trainer(
            tmp_path,
            methods=[FlexDPO(beta_rejected=rejected), RPO(eta=0.1)],
            peft_config=LORA,
            bf16=True,
            precompute_ref_log_probs=precompute,
            learning_rate=1e-2,
            max_steps=6,
        )
        falls[rejected, precompute] = pairs.history(run)[-2]["logps/rejected"]
    assert falls[0.03, False] > falls[None, False] + 0.5
    assert falls[0.03, True] == pytest.approx(falls[0.03, False], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "exo_pair", "label_smoothing": 0.1}, "label smoothing swaps"),
        ({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}, "label smoothing swaps"),
        ({"f_divergence_type": "js_divergence"}, "reverse KL"),
        ({"loss_type": "bco_pair"}, "bco_pair does not use"),
        ({"beta": 0.0}, "needs beta > 0"),
    ],
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        pairs.trainer(tmp_path, methods=[FlexDPO(beta_rejected=0.05)], **settings)


def test_warns_of_the_larger_rejected_strength(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pairs.trainer(tmp_path, methods=[FlexDPO(beta_rejected=0.2)], beta=0.1)
    assert "larger than beta=0.1" in caplog.text
    with pytest.raises(ValidationError):
        FlexDPO(beta_rejected=-0.1)


def test_toy_experiment():
    """On four prompts with ten answers DPO loses most to answers in no pair; the docstring has the output."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "preference_toy.py"
    spec = importlib.util.spec_from_file_location("preference_toy", path)
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    masses = toy.means()
    unseen = {name: mass[2] for name, mass in masses.items()}
    assert unseen["DPO"] > unseen["Flex-DPO, beta_rejected 0.05"] + 0.1
    assert unseen["DPO"] > unseen["DPO + 0.02 NLL"] + 0.1
    for name, (chosen, rejected, rest) in masses.items():
        assert chosen + rejected + rest == pytest.approx(1, abs=1e-5)
        (line,) = (line for line in toy.__doc__.splitlines() if f"    {name:<30}" in line)
        assert [chosen, rest] == pytest.approx([float(line.split()[place]) for place in (-3, -1)], abs=0.02)
        assert name == "reference" or rejected < 1e-6


def test_padding_and_accumulation_change_nothing(tmp_path):
    method = FlexDPO(beta_rejected=0.1)
    run = pairs.trainer(tmp_path, methods=[method], beta=0.3, reference=support.model(seed=1))
    inputs = run.data_collator(list(run.train_dataset)[:4])
    padded = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in inputs.items()}
    losses = [run.compute_loss(run.model, dict(batch)).item() for batch in (inputs, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    logs = [
        pairs.history(pairs.trainer(tmp_path, methods=[method], beta=0.3, max_steps=2, **settings))
        for settings in ({}, parts)
    ]
    for left, right in zip(*logs, strict=True):
        for key in {"loss", "grad_norm", "rewards/margins", "grad_scale", "shift/chosen"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-6), key


def test_the_kl_term_of_tdpo_keeps_beta_and_rpo_its_own(tmp_path):
    """z = beta rho(y_w) - beta_rejected rho(y_l) - beta alpha (SeqKL(y_l) - SeqKL(y_w)); RPO comes on top."""
    beta, rejected, alpha, eta = 0.3, 0.12, 0.5, 0.02
    run = pairs.trainer(
        tmp_path,
        methods=[FlexDPO(beta_rejected=rejected), TDPO(variant=2, alpha=alpha), RPO(eta=eta)],
        reference=support.model(seed=1),
        beta=beta,
    )
    inputs = run.data_collator(list(run.train_dataset)[:4])
    value = run.compute_loss(run.model, dict(inputs)).item()
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        p, q = (
            model.double()(input_ids=ids, attention_mask=inputs["attention_mask"])
            .logits[:, :-1]
            .log_softmax(-1)
            for model in (support.model(), support.model(seed=1))
        )
    tokens = ids[:, 1:, None]
    sums = torch.where(mask, p.gather(2, tokens).squeeze(2), 0.0).sum(1)
    ratios = sums - torch.where(mask, q.gather(2, tokens).squeeze(2), 0.0).sum(1)
    kl = torch.where(mask, (q.exp() * (q - p)).sum(-1), 0.0).sum(1)
    z = beta * ratios[:4] - rejected * ratios[4:] - beta * alpha * (kl[4:] - kl[:4])
    expected = -torch.nn.functional.logsigmoid(z).mean() - eta * beta * sums[:4].mean()
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert run._metrics["train"]["grad_scale"] == [
        pytest.approx((beta * torch.sigmoid(-z)).mean().item(), rel=1e-3)
    ]

"""RPO: the golden numbers of its equations, and the term through the trainer with everything it goes with."""

import pairs
import pytest
import support
import torch
from peft import LoraConfig

from posttrain.preference.flex_dpo import FlexDPO
from posttrain.preference.rpo import RPO, imitation_loss

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def golden(method, *, beta=0.1, width=20, loss=torch.nn.functional.logsigmoid):
    """Loss and slopes at log pi = (-12, -20), log ref = (-13, -18), spread evenly over ``width`` tokens."""
    logps = (torch.tensor([[-12.0], [-20.0]]).double() / width).expand(2, width).clone().requires_grad_()
    ref = (torch.tensor([[-13.0], [-18.0]]).double() / width).expand(2, width)
    batch = pairs.batch(logps, ref, beta=beta)
    ratios = batch.sums - batch.ref_sums
    value = -loss(beta * (ratios[0] - ratios[1])) + method.penalty(batch)
    value.backward()
    return value.item(), logps.grad[:, 0].tolist()


def test_golden_values():
    loss, (chosen, rejected) = golden(RPO(eta=0.005))
    assert loss == pytest.approx(0.5603552445, abs=1e-10)
    assert (chosen, rejected) == pytest.approx((-0.0430557483, 0.0425557483), abs=1e-10)
    assert golden(RPO(eta=0.2, normalization="token_mean"))[0] == pytest.approx(0.6743552445, abs=1e-10)
    assert golden(RPO(eta=0.0))[0] == pytest.approx(0.5543552445, abs=1e-10)
    # TRL's recipe, sigmoid + 0.005 sft, gives 0.5573552445; the weight that makes it RPO here is 0.01
    trl = golden(RPO(eta=0.005, normalization="token_mean"))[0]
    assert trl == pytest.approx(0.5573552445, abs=1e-10)
    assert golden(RPO(eta=0.01, normalization="token_mean"))[0] == pytest.approx(loss, abs=1e-12)


def test_sums_and_means_agree_at_equal_length():
    for width in (1, 7, 20):
        mean, slopes = golden(RPO(eta=0.005 * 0.1 * width, normalization="token_mean"), width=width)
        loss, expected = golden(RPO(eta=0.005), width=width)
        assert loss == pytest.approx(mean, abs=1e-12)
        assert slopes == pytest.approx(expected, abs=1e-12)


def test_rows_without_tokens_and_what_lies_outside_the_mask():
    logps = torch.tensor([[-1.0, -3.0, torch.nan], [torch.inf, torch.nan, -torch.inf]]).double()
    logps.requires_grad_()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert imitation_loss(logps, mask).tolist() == [4.0, 0.0]
    values = imitation_loss(logps, mask, normalization="token_mean")
    assert values.tolist() == [2.0, 0.0]
    values.sum().backward()
    assert logps.grad.tolist() == [[-0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]
    assert imitation_loss(torch.zeros(2, 3).bfloat16(), mask).dtype == torch.float32


def losses(folder, methods, *, inputs=None, data=None, **settings):
    """Loss of one micro-batch under an untrained policy that differs from its reference, and the gradient."""
    settings = {"reference": support.model(seed=1), "beta": 0.3} | settings
    run = pairs.trainer(folder, methods=methods, data=data, **settings)
    inputs = run.data_collator(list(run.train_dataset)[:4]) if inputs is None else inputs
    loss = run.compute_loss(run.model, dict(inputs))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}, run


def imitation(run, inputs, weight, *, mean=False):
    """The term and its gradient from full logits, in float64."""
    model = support.model().double()
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
    logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    sums = torch.where(mask, logps, 0.0).sum(1) / (mask.sum(1).clamp(min=1) if mean else 1)
    value = -weight * sums[: len(ids) // 2].mean()
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": ["ipo", "apo_zero"], "loss_weights": [0.5, 2.0]},
        {"loss_type": "bco_pair", "use_weighting": True},
        {"loss_type": "sigmoid", "ld_alpha": 0.4, "f_divergence_type": "js_divergence"},
        {"loss_type": "aot", "max_length": 12},
    ],
    ids=lambda settings: str(settings["loss_type"]),
)
def test_term_and_gradient_from_full_logits(tmp_path, settings):
    eta, beta = 0.05, 0.3
    for method, weight, mean in [
        (RPO(eta=eta), eta * beta, False),
        (RPO(eta=eta, normalization="token_mean"), eta, True),
    ]:
        plain, before, run = losses(tmp_path, [], **settings)
        inputs = run.data_collator(list(run.train_dataset)[:4])
        with_term, after, _ = losses(tmp_path, [method], **settings)
        expected, gradients = imitation(run, inputs, weight, mean=mean)
        assert with_term - plain == pytest.approx(expected, rel=1e-4)
        for name in before:
            found = (after[name] - before[name]).double()
            assert torch.allclose(found, gradients[name], rtol=2e-3, atol=5e-6), name


def test_padding_and_accumulation_change_nothing(tmp_path):
    method = RPO(eta=0.05)
    loss, gradient, run = losses(tmp_path, [method])
    padded = run.data_collator(list(run.train_dataset)[:4])
    for name, value in {"input_ids": 0, "attention_mask": 0, "completion_mask": 0}.items():
        padded[name] = torch.nn.functional.pad(padded[name], (0, 5), value=value)
    again, wider, _ = losses(tmp_path, [method], inputs=padded)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, value in gradient.items():
        assert torch.allclose(value, wider[name], rtol=1e-3, atol=1e-6), name
    whole = pairs.trainer(tmp_path, methods=[method], max_steps=2)
    parts = pairs.trainer(
        tmp_path,
        methods=[method],
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    a, b = (pairs.history(trainer) for trainer in (whole, parts))
    for left, right in zip(a, b, strict=True):
        for key in {"loss", "rpo/nll", "grad_norm"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-3), key


def test_off_is_trl_bit_for_bit(tmp_path):
    ours = pairs.trainer(tmp_path, methods=[RPO(eta=9e-7), FlexDPO()], beta=0.3)
    theirs = pairs.trainer(tmp_path, trl=True, beta=0.3)
    pairs.assert_trl_equal(ours, theirs)


def test_an_empty_chosen_answer(tmp_path):
    data = pairs.rows(4)
    data = data.map(lambda row, i: {"chosen": "" if i == 1 else row["chosen"]}, with_indices=True)
    run = pairs.trainer(tmp_path, methods=[RPO(eta=0.1, normalization="token_mean")], data=data)
    inputs = run.data_collator(list(run.train_dataset))
    inputs["completion_mask"][1] = 0  # TRL appends an end token; a row that truncation has emptied
    loss, _, _ = losses(tmp_path, [RPO(eta=0.1, normalization="token_mean")], inputs=inputs)
    plain, _, _ = losses(tmp_path, [], inputs=inputs)
    assert 0 < loss - plain < 1


def test_lora_bf16_precomputed_and_evaluation(tmp_path):
    """The term keeps chosen answers likelier than DPO alone, on a LoRA in bfloat16 with fixed references."""
    shifts = []
    for methods in ([], [RPO(eta=1.0)]):
        run = pairs.trainer(
            tmp_path,
            methods=methods,
            peft_config=LORA,
            bf16=True,
            gradient_checkpointing=True,
            gradient_accumulation_steps=2,
            precompute_ref_log_probs=True,
            learning_rate=1e-2,
            max_steps=8,
            eval_strategy="steps",
            eval_steps=8,
            eval_data=pairs.rows(6),
        )
        logs = pairs.history(run)
        shifts.append(logs[-2]["eval_logps/chosen"])
    assert shifts[1] > shifts[0] + 0.5
    assert logs[-2]["eval_rpo/nll"] == pytest.approx(-logs[-2]["eval_logps/chosen"], rel=1e-4)


def test_sft_is_refused(tmp_path):
    for loss in ("sft", ["sigmoid", "sft"]):
        with pytest.raises(ValueError, match="found sft in loss_type"):
            pairs.trainer(tmp_path, methods=[RPO()], loss_type=loss)

"""SSD: values by hand, per-sequence statistics against autograd, the edit, its marker, the search."""

import math

import pytest
import support
import torch
from transformers import AutoModelForCausalLM

from posttrain.selection.gradient_sums import gradient_sums, mean_squared_logits
from posttrain.selection.plan import PlanError
from posttrain.selection.ssd import MARKER, SSD, Importances, dampen, factors, importances, search, ssd

THETA, FULL, FORGET = [0.6, -0.3, 0.2, 0.5], [1.0, 2.0, 4.0, 0.0], [15.0, 30.0, 8.0, 0.0]


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def batches(rows, seed, size=2, masked=True):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(0, rows, size):
        ids = torch.randint(3, 40, (size, 9), generator=draw)
        labels = ids.clone()
        if masked:
            labels[:, :4] = -100
            ids[0, 7:], labels[0, 7:] = 0, -100
        found.append({"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()})
    return found


# ---- by hand -----------------------------------------------------------------------------------------------


def test_the_example_of_the_sheet():
    assert factors(t(FORGET), t(FULL)).tolist() == pytest.approx([1 / 15, 1 / 15, 1, 1])
    assert dampen(t(THETA), t(FORGET), t(FULL), 10, 1, 1).tolist() == pytest.approx([0.04, -0.02, 0.2, 0.5])
    erased = dampen(t(THETA), t([15.0, 30.0, 8.0, 1e-3]), t(FULL), 10, 1, 1)
    assert erased.tolist() == pytest.approx([0.04, -0.02, 0.2, 0.0])


def test_infinite_alpha_is_the_identity_and_lambda_above_the_ratio_is_clamped():
    forget = t([15.0, 30.0, 8.0, 1e-3])
    assert torch.equal(dampen(t(THETA), forget, t(FULL), math.inf), t(THETA))
    # ratio 15 lies between alpha 10 and lambda 20: selected, factor 1
    assert torch.equal(factors(t([15.0]), t([1.0]), alpha=10, lam=20), t([1.0]))
    assert factors(t([15.0]), t([1.0]), alpha=10, lam=3, exponent=2).item() == pytest.approx(0.04)
    # strict, and a product: a ratio of exactly alpha stays
    assert factors(t([10.0]), t([1.0]), alpha=10).item() == 1.0
    # twice is not once
    once = dampen(t(THETA), t(FORGET), t(FULL))
    assert dampen(once, t(FORGET), t(FULL))[0].item() == pytest.approx(0.6 / 225)


def test_nothing_grows_or_changes_sign_in_half_precision():
    draw = torch.Generator().manual_seed(0)
    theta = torch.randn(2000, generator=draw).bfloat16()
    forget, full = (torch.rand(2000, generator=draw) for _ in range(2))
    found = dampen(theta, forget, full, 1.5, 0.9)
    assert found.dtype == torch.bfloat16
    assert (found.abs() <= theta.abs()).all()
    assert (found.sign() * theta.sign() >= 0).all()
    assert 0.2 < (found != theta).float().mean() < 0.45  # P(a > 1.5 b) = 1/3


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["nll", "logits"])
def test_statistics_are_per_sequence_and_leave_the_model_as_it_was(loss):
    model = support.model(tied=True).train()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    forget, retain = batches(4, 1), batches(6, 2)
    found = importances(model, forget, retain, SSD(loss=loss))
    assert found.rows == (4, 6)
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(p.grad is None for p in model.parameters())
    assert not any("norm" in name or "embed" in name for name in found.forget)

    double = support.model(tied=True, dtype=torch.float64).eval()
    weights = {n: p for n, p in double.named_parameters() if n in found.forget}

    def mean(sets):
        total, rows = {n: torch.zeros_like(p) for n, p in weights.items()}, 0
        for batch in sets:
            for i in range(2):
                valid = batch["attention_mask"][i].bool()
                ids, labels = batch["input_ids"][i : i + 1, valid], batch["labels"][i, valid][1:]
                logits = double(input_ids=ids).logits[0, :-1][labels != -100]
                if loss == "nll":
                    value = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
                else:
                    value = logits.square().sum(-1).mean()
                grads = torch.autograd.grad(value, list(weights.values()))
                for name, g in zip(weights, grads, strict=True):
                    total[name] += g.square() if loss == "nll" else g.abs()
                rows += 1
        return {n: v / rows for n, v in total.items()}

    in_forget, everything = mean(forget), mean([*forget, *retain])
    for name in found.forget:
        torch.testing.assert_close(found.forget[name].double(), in_forget[name], rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(found.full[name].double(), everything[name], rtol=1e-3, atol=1e-8)
    shared = importances(model, forget, retain, SSD(loss=loss, forget_share=0.01))
    name = next(iter(found.forget))
    wanted = 0.01 * in_forget[name] + 0.99 * mean(retain)[name]
    torch.testing.assert_close(shared.full[name].double(), wanted, rtol=1e-3, atol=1e-8)


def test_squares_of_a_batch_are_another_statistic():
    model = support.model()
    (batch,) = batches(2, 1)
    whole, _ = gradient_sums(model, SSD().candidates(model), [batch], statistic="square")
    rows = importances(model, [batch], batches(2, 2)).forget
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(whole[name], rows[name], rtol=0.1)


def test_rows_without_a_label_do_not_count_and_empty_sets_are_refused():
    model = support.model()
    forget, nothing = batches(2, 1), batches(2, 3)
    nothing[0]["labels"][:] = -100
    some = importances(model, [*forget, *nothing], batches(2, 2))
    assert some.rows == (2, 2)
    with pytest.raises(ValueError, match="forget set has no row with a label"):
        ssd(model, nothing, forget)
    with pytest.raises(ValueError, match="retain set has no row"):
        ssd(model, forget, [])
    unlabelled = [{"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]} for b in forget]
    found = mean_squared_logits(model, unlabelled[0])
    logits = model(**unlabelled[0]).logits[unlabelled[0]["attention_mask"].bool()]
    assert found.item() == pytest.approx(logits.square().sum(-1).mean().item(), rel=1e-5)
    # the label-free variant needs none
    assert importances(model, unlabelled, unlabelled, SSD(loss="logits")).rows == (2, 2)
    with pytest.raises(ValueError, match="needs input_ids and labels"):
        importances(model, unlabelled, unlabelled)


# ---- the edit ----------------------------------------------------------------------------------------------


def test_the_edit_is_that_of_the_formula_reported_and_marked(tmp_path):
    model, start = support.model(), support.model()
    forget, retain = batches(4, 1), batches(4, 2)
    settings = SSD(alpha=1.5, lam=0.5)
    found = importances(start, forget, retain, settings)
    report = ssd(model, iter(forget), iter(retain), settings)
    for name, before in start.named_parameters():
        after = dict(model.named_parameters())[name]
        if name not in found.forget:
            assert torch.equal(after, before), name
            continue
        assert torch.equal(after, dampen(before, found.forget[name], found.full[name], 1.5, 0.5)), name
        numel, selected, changed = report.tensors[name]
        assert numel == before.numel()
        assert selected == int((found.forget[name] > 1.5 * found.full[name]).sum())
        assert changed == int((after != before).sum())
    assert 0 < report.fraction < 1
    assert f"{report.fraction:.3%}" in report.summary()
    # the marker travels with the saved model
    with pytest.raises(PlanError, match="dampened before"):
        ssd(model, forget, retain, settings)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="dampened before"):
        ssd(again, forget, retain, settings)
    ssd(again, forget, retain, settings, again=True)
    assert [edit["alpha_used"] for edit in getattr(again.config, MARKER)] == [1.5, 1.5]


def test_forget_set_as_all_data_selects_nothing_from_alpha_one_on(caplog):
    model, start = support.model(), support.model()
    same = batches(4, 1)
    report = ssd(model, same, same, SSD(alpha=2.0))
    assert report.fraction == 0
    assert "at most 2 F_D" in caplog.text
    assert ssd(support.model(), same, same, SSD(alpha=1.0)).fraction == 0
    # as with different rows whose share is too large for this alpha
    two = {"forget": same, "retain": batches(4, 2)}
    with pytest.raises(PlanError, match=r"50\.00%.*forget_share"):
        SSD().select(support.model(), batches=two)
    assert SSD(forget_share=0.01).select(support.model(), batches=two).count > 0
    support.assert_same(support.weights(model), support.weights(start))


def test_alpha_by_fraction_is_the_smallest_that_keeps_within_it():
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.0, 0.0, 0.0])
    found = Importances({"a": values[:4], "b": values[4:]}, {"a": torch.ones(4), "b": torch.ones(6)}, (1, 1))
    alpha = found.alpha_for(0.35)
    assert alpha == pytest.approx(2.0, rel=1e-5)
    assert found.selected(alpha) == 3
    assert found.selected(found.alpha_for(0.7)) == 7
    assert found.selected(found.alpha_for(0.9)) == 7  # no more than matter at all
    only = Importances({"a": torch.ones(4)}, {"a": torch.tensor([0.0, 0, 0, 1])}, (1, 1))
    with pytest.raises(ValueError, match="3 scalars matter for the forget set alone"):
        only.alpha_for(0.5)


def test_search_keeps_the_largest_accepted_fraction():
    model, start = support.model(), support.model()
    found = importances(model, batches(4, 1), batches(4, 2))
    tried = []

    def accept(candidate):
        changed = sum(
            int((a != b).sum()) for a, b in zip(candidate.parameters(), start.parameters(), strict=True)
        )
        tried.append(changed / found.numel)
        return tried[-1] < 0.06

    report = search(model, found, [0.1, 0.01, 0.05], accept)
    assert tried == pytest.approx([0.01, 0.05, 0.1], rel=0.1)
    assert report.fraction == pytest.approx(0.05, rel=0.1)
    other = support.model()
    ssd(other, batches(4, 1), batches(4, 2), SSD(fraction=0.05))
    support.assert_same(support.weights(model), support.weights(other))
    untouched = support.model()
    assert search(untouched, found, [0.1], lambda m: False) is None
    support.assert_same(support.weights(untouched), support.weights(start))
    assert not getattr(untouched.config, MARKER, None)


def test_the_plan_selects_what_the_edit_would_change_and_adapters_are_refused():
    model = support.model()
    forget, retain = batches(4, 1), batches(4, 2)
    plan = SSD(fraction=0.02).select(model, batches={"forget": forget, "retain": retain})
    report = ssd(model, forget, retain, SSD(fraction=0.02))
    assert plan.count == sum(selected for _, selected, _ in report.tensors.values())
    assert plan.config["alpha_used"] == report.alpha
    from peft import get_peft_model

    with pytest.raises(PlanError, match="merge it first"):
        ssd(get_peft_model(support.model(), support.lora()), forget, retain)
    with pytest.raises(ValueError, match="exclude each other"):
        SSD(alpha=3.0, fraction=0.1)
    # settings go through a file
    assert SSD(**SSD(fraction=0.1).model_dump(mode="json")).fraction == 0.1
    assert SSD().threshold(Importances({}, {}, (1, 1))) == 10.0

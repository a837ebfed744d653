"""SaRA's masks, its shrinking, and the worked values of its penalty and learning rate."""

import logging

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from posttrain.selection.magnitude import Magnitude
from posttrain.selection.plan import PlanError, SelectionPlan
from posttrain.selection.sara import SaRA, masked_nuclear, paper_learning_rate

P = [[0.001, 1.0], [-0.5, 0.0015]]
Q = [[0.001, -0.0005, 0.9], [0.0012, 0.7, -0.0015]]


def toy(*tensors, dtype=torch.float64):
    model = nn.Module()
    for number, values in enumerate(tensors):
        model.register_parameter(f"t{number}", nn.Parameter(torch.tensor(values, dtype=dtype)))
    return model


def picks(plan):
    return {n: s.flat().tolist() for n, s in plan.touched.items()}


def test_the_learning_rate_of_a_threshold():
    expected = {2e-4: 9.3239e-4, 8e-4: 7.5578e-4, 2e-3: 4.9659e-4, 5e-3: 1.7377e-4, 1e-2: 3.0197e-5}
    for threshold, rate in expected.items():
        assert paper_learning_rate(threshold) == pytest.approx(rate, rel=5e-5)


def test_nuclear_norm_of_the_masked_matrix():
    weight = torch.tensor(P, dtype=torch.float64)
    norm, gradient = masked_nuclear(weight, weight.abs() < 2e-3)
    assert norm.item() == pytest.approx(0.0025, rel=1e-12)
    assert torch.allclose(gradient, torch.eye(2, dtype=torch.float64), atol=1e-12)
    weight = torch.tensor(Q, dtype=torch.float64)
    norm, gradient = masked_nuclear(weight, weight.abs() < 2e-3)
    assert norm.item() == pytest.approx(0.0029158708, abs=1e-10)
    expected = torch.tensor([[0.776176, -0.526720, 0], [0.469304, 0, -0.875447]], dtype=torch.float64)
    assert torch.allclose(gradient, expected, atol=1e-6)
    step = 1e-9  # and it is the derivative
    for i, j in ((0, 0), (0, 1), (1, 2)):
        moved = weight.clone()
        moved[i, j] += step
        other, _ = masked_nuclear(moved, weight.abs() < 2e-3)
        assert (other - norm).item() / step == pytest.approx(gradient[i, j].item(), abs=1e-4)
    norm, gradient = masked_nuclear(weight, torch.zeros(2, 3))  # nothing selected: no norm, no direction
    assert norm == 0
    assert not gradient.any()
    assert masked_nuclear(weight.bfloat16(), weight.abs() < 2e-3)[0].dtype == torch.float32


def test_an_absolute_threshold():
    plan = SaRA(threshold=2e-3).select(toy(P, Q, [5.0]))
    assert picks(plan) == {"t0": [0, 3], "t1": [0, 1, 3, 5]}
    assert plan.tensors["t2"].kind == "none"
    assert picks(SaRA(threshold=1e-3).select(toy(P, Q))) == {"t1": [1]}  # strictly below
    with pytest.raises(PlanError, match="nothing to train"):
        SaRA(threshold=1e-9).select(toy(P))


def test_a_budget_is_that_of_the_smallest_magnitudes():
    model = support.model(dtype=torch.bfloat16)
    assert SaRA(budget=0.05).select(model) == Magnitude(budget=0.05).select(model)
    assert SaRA().select(model) == Magnitude(budget=0.1).select(model)
    plan = SaRA(per_tensor=True, budget=0.1).select(model)
    for name, parameter in model.named_parameters():
        selection = plan.tensors[name]
        assert selection.count == int(0.1 * parameter.numel())
        order = parameter.detach().flatten().double().abs().argsort(stable=True)[: selection.count]
        assert torch.equal(selection.flat().long(), order.sort().values)
    assert SaRA(per_tensor=True).select(model) == plan


def test_what_trains_whole_is_charged():
    model = support.model()
    n, head = sum(p.numel() for p in model.parameters()), model.lm_head.weight.numel()
    plan = SaRA(budget=0.2, always_train=("lm_head",)).select(model)
    assert plan.count == int(0.2 * n)
    plan = SaRA(budget=0.2, per_tensor=True, always_train=("lm_head",)).select(model)
    part = (int(0.2 * n) - head) / (n - head)
    for name, selection in plan.tensors.items():
        assert selection.count == (head if "lm_head" in name else int(part * selection.numel))
    assert plan.count <= int(0.2 * n)


def test_reselection_by_hand():
    model = toy(P, Q, [9.0])
    selector = SaRA(threshold=2e-3, always_train=("t2",))
    plan = selector.select(model)
    with torch.no_grad():
        model.t0[0, 0] = -0.0021  # moved away
        model.t0[0, 1] = 0.0001  # tiny now, but it never was selected
        model.t1[1, 0] = 0.002  # at the threshold, which is strict
        model.t1[0, 0] = -0.0019
    after = selector.reselect(model, plan)
    assert picks(after) == {"t0": [3], "t1": [0, 1, 5], "t2": [0]}
    assert after.tensors["t2"].kind == "all"
    assert not after.hashes
    assert picks(plan)["t0"] == [0, 3]  # the first plan is what it was


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_budget_keeps_the_threshold_it_had(tmp_path, per_tensor):
    model = toy([0.1, -0.2, 0.3, 0.4], [[1.0, 2.0], [-3.0, 4.0]])
    selector = SaRA(budget=0.5, per_tensor=per_tensor)
    plan = selector.select(model)
    assert plan.config["in_force"] == ({"t0": 0.2, "t1": 2.0} if per_tensor else 0.4)
    plan.save(tmp_path / "plan.safetensors")
    plan = SelectionPlan.load(tmp_path / "plan.safetensors")
    assert picks(selector.reselect(model, plan)) == picks(plan)  # nothing moved
    with torch.no_grad():
        model.t0[0] = 0.35
    expected = {"t0": [1], "t1": [0, 1]} if per_tensor else {"t0": [0, 1, 2, 3]}
    assert picks(selector.reselect(model, plan)) == expected


def test_where_nothing_stays_tiny_the_first_set_goes_on(caplog):
    model = toy(P)
    selector = SaRA(threshold=2e-3)
    plan = selector.select(model)
    with torch.no_grad():
        model.t0 += 1
    with caplog.at_level(logging.WARNING):
        assert selector.reselect(model, plan) is plan
    assert "none of 2 weights is still tiny" in caplog.text


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["threshold", "budget", "per_tensor"]), st.booleans())
def test_the_second_set_is_part_of_the_first(seed, kind, half):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, shape in (("a", (7,)), ("b", (5, 6)), ("c", (3, 4))):
        values = torch.randn(shape, generator=generator)
        model.register_parameter(name, nn.Parameter(values.bfloat16() if half else values))
    selector = SaRA(
        **{"threshold": {"threshold": 0.8}, "budget": {"budget": 20}}.get(
            kind, {"per_tensor": True, "budget": 0.4}
        )
    )
    plan = selector.select(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    after = selector.reselect(model, plan)
    assert 0 < after.count <= plan.count
    for name, selection in after.tensors.items():
        assert not (selection.mask() & ~plan.tensors[name].mask()).any()
    assert selector.reselect(model, after) == after


def test_most_weights_are_not_tiny(caplog):
    model = support.model()
    with caplog.at_level(logging.WARNING):
        SaRA(budget=0.4).select(model)
        assert not caplog.text
        SaRA(threshold=0.1).select(model)
    assert "more than half: these are not tiny weights; lower the threshold" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.1, "budget": 5}, "takes a threshold or a budget"),
        ({"threshold": 0.1, "per_tensor": True}, "takes a threshold or a budget"),
        ({"budget": 5, "per_tensor": True}, "give a fraction"),
        ({"threshold": 0.0}, "greater than 0"),
        ({"reselect_at": 1.0}, "less than 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValidationError, match=message):
        SaRA(**settings)


@pytest.mark.parametrize("backend", ["auto", "packed", "masked"])
@pytest.mark.parametrize("budget", [{"budget": 0.1}, {"threshold": 1.005, "include": ("norm", "q_proj")}])
def test_a_run_goes_on_with_what_stayed_tiny(tmp_path, backend, budget):
    """Also where tensors were selected whole at first, as norms are by the large threshold."""
    from posttrain.selection.settings import Select
    from posttrain.sft.trainer import SFTTrainer

    model = support.model(tied=True)
    selector = SaRA(**budget)
    first = selector.select(model)
    trainer = SFTTrainer(
        model=model,
        args=support.sft_config(tmp_path, max_steps=4, learning_rate=3e-3),
        train_dataset=support.answers(),
        processing_class=support.tokenizer(),
        selection=Select(selector, backend=backend),
    )
    trainer.train()
    last = trainer.selection.plan
    assert 0 < last.count < first.count
    trainer.end_selection()
    start = dict(support.model(tied=True).named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert not (last.tensors[name].mask() & ~first.tensors[name].mask()).any()
        assert not ((parameter != start[name]) & ~first.tensors[name].mask()).any()

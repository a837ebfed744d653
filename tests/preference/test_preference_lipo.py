"""LiPO's losses and labels against hand-computed values."""

import math

import pytest
import torch

from posttrain.preference.lipo import (
    LiPO,
    labels_from_preferences,
    labels_from_ranks,
    lambda_weights,
    list_losses,
    ndcg,
    pair_mask,
    ranks_of,
    unit_labels,
)
from posttrain.rl.method import Setup

OBJECTIVES = ["lambda", "pair_logistic", "pair_hinge", "list_mle", "softmax", "point_mse", "point_sigmoid"]
PSI, S = [0.9, 0.5, 0.5, 0.1], [0.2, 0.4, -0.1, 0.0]


def lists(*rows):
    """(B, K) float64 tensors, padded with numbers that must not count."""
    size = max(len(row) for row in rows)
    valid = torch.tensor([[i < len(row) for i in range(size)] for row in rows])
    padded = [list(row) + [7.0] * (size - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.float64), valid


def loss(objective, scores, labels, **options):
    values, valid = lists(scores)
    return list_losses(objective, values, lists(labels)[0], valid, **options).item()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("lambda", 0.3509768162),
        ("pair_logistic", 3.2080448957),
        ("pair_hinge", 4.4),
        ("list_mle", 2.8971656377),
        ("softmax", 1.3649757589),
        ("point_mse", 0.87),
        ("point_sigmoid", 2.7186979624),
    ],
)
def test_worked_example(objective, expected):
    assert loss(objective, S, PSI) == pytest.approx(expected, abs=1e-9)


def test_worked_weights():
    scores, valid = lists(S)
    labels, _ = lists(PSI)
    assert ranks_of(scores, valid).tolist() == [[2, 1, 4, 3]]
    assert pair_mask(labels, valid).sum() == 5
    delta = lambda_weights(scores, labels, valid, discount="log")[0]
    assert torch.equal(delta, delta.T)
    expected = {(0, 1): 0.240591, (0, 2): 0.130542, (0, 3): 0.150035, (1, 3): 0.247018, (2, 3): 0.034248}
    for (i, j), value in expected.items():
        assert delta[i, j].item() == pytest.approx(value, abs=1e-6)
    assert delta[1, 2] == 0  # a tie
    assert loss("lambda", S, PSI, discount="log") == pytest.approx(0.5063525121, abs=1e-9)
    assert loss("lambda", S, PSI) * 4 / 5 == pytest.approx(0.2807814529, abs=1e-9)


@pytest.mark.parametrize("objective", ["pair_logistic", "list_mle", "softmax"])
def test_a_pair_is_dpo(objective):
    assert loss(objective, [0.3, -0.2], [1, 0]) == pytest.approx(0.4740769842, abs=1e-9)


def test_a_pair_under_lambda():
    assert loss("lambda", [0.3, -0.2], [1, 0], discount="log") == pytest.approx(0.2524250466, abs=1e-9)
    ratio = loss("lambda", [0.3, -0.2], [1, 0]) / 0.4740769842
    assert ratio == pytest.approx(0.3690702464, abs=1e-9)
    assert loss("lambda", [0.3, -0.2], [1, 0], discount="none") == pytest.approx(0.4740769842, abs=1e-9)
    assert loss("lambda", [0.3, -0.2], [0.75, 0.25], gain="linear", discount="none") == pytest.approx(
        0.4740769842 / 2, abs=1e-9
    )


def test_log_base_rescales():
    ratio = loss("lambda", S, PSI, discount="log") / loss("lambda", S, PSI)
    assert ratio == pytest.approx(1 / math.log(2), rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_order_of_the_list_and_padding_do_not_matter(objective):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, generator=generator).tolist()
    labels = torch.rand(6, generator=generator).tolist()
    whole = loss(objective, scores, labels)
    order = torch.randperm(6, generator=generator).tolist()
    assert loss(objective, [scores[i] for i in order], [labels[i] for i in order]) == pytest.approx(whole)
    values, valid = lists(scores, S, [0.5])
    psi, _ = lists(labels, PSI, [0.5])
    together = list_losses(objective, values, psi, valid)
    alone = [whole, loss(objective, S, PSI), loss(objective, [0.5], [0.5])]
    assert together.tolist() == pytest.approx(alone)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients(objective):
    """Against differences, with ragged lists; nothing reaches absent places or flows through Delta."""
    scores, valid = lists(S, [0.3, -0.6], [0.1])
    labels, _ = lists(PSI, [0.2, 0.8], [0.4])
    weights = lambda_weights(scores, labels, valid)

    def total(values):
        if objective != "lambda":
            return list_losses(objective, values, labels, valid).sum()
        gaps = values.unsqueeze(2) - values.unsqueeze(1)  # with constant weights
        return torch.where(pair_mask(labels, valid), weights * torch.log1p((-gaps).exp()), 0.0).sum()

    leaf = scores.clone().requires_grad_()
    list_losses(objective, leaf, labels, valid).sum().backward()
    step = 1e-6
    for place in valid.nonzero().tolist():
        unit = torch.zeros_like(scores)
        unit[tuple(place)] = step
        moved = (scores + unit, scores - unit)
        slope = (total(moved[0]) - total(moved[1])) / (2 * step)
        assert leaf.grad[tuple(place)].item() == pytest.approx(slope.item(), abs=1e-6)
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[~valid].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lists_without_pairs(objective):
    for scores, labels in ([[0.4], [0.7]], [[0.4, -0.2], [0.5, 0.5]]):
        values, valid = lists(scores)
        values.requires_grad_()
        value = list_losses(objective, values, lists(labels)[0], valid).sum()
        value.backward()
        assert torch.isfinite(values.grad).all()
        if objective in ("lambda", "pair_logistic", "pair_hinge"):
            assert value.item() == 0
            assert not values.grad.any()
        elif objective in ("list_mle", "softmax"):
            assert (value.item() == pytest.approx(0)) == (len(labels) == 1)
        else:
            assert value.item() > 0


def test_softmax_without_labels_is_uniform():
    expected = -sum(math.log(math.exp(s) / (math.exp(0.3) + math.exp(-0.2))) for s in (0.3, -0.2)) / 2
    assert loss("softmax", [0.3, -0.2], [0, 0]) == pytest.approx(expected)
    three = loss("softmax", [0.3, -0.2, 20.0], [0, 0, 0])
    assert three == pytest.approx(-sum(x - 20.0 for x in (0.3, -0.2, 20.0)) / 3, abs=1e-7)  # in float64


def test_slope_where_policy_is_reference():
    """At equal scores the slope of the logistic is a half, not one."""
    scores, valid = lists([0.0, 0.0])
    scores.requires_grad_()
    list_losses("pair_logistic", scores, lists([1, 0])[0], valid).sum().backward()
    assert scores.grad.tolist() == [[-0.5, 0.5]]


def test_ndcg():
    scores, valid = lists([0.1, 0.9], [0.9, 0.1], [0.0], [0.3, 0.2])
    labels, _ = lists([1, 0], [1, 0], [0.0], [0, 0])
    assert ndcg(scores, labels, valid).tolist() == pytest.approx([1 / math.log2(3), 1, 1, 1])


def test_labels():
    matrix = [[0.5, 0.9, 0.8], [0.1, 0.5, 0.4], [0.2, 0.6, 0.5]]
    expected = [0.7333333333, 0.3333333333, 0.4333333333]
    assert labels_from_preferences(matrix) == pytest.approx(expected, abs=1e-9)
    assert labels_from_ranks([1, 2, 3]) == pytest.approx([5 / 6, 1 / 2, 1 / 6])
    assert labels_from_ranks([3, 1, 1]) == pytest.approx([1 / 6, 2 / 3, 2 / 3])
    assert labels_from_ranks([7]) == [0.5]
    assert unit_labels([3, -1, 1], "min_max") == [1, 0, 0.5]
    assert unit_labels([2, 2], "min_max") == [0.5, 0.5]
    assert unit_labels([0, 1, 0.25]) == [0, 1, 0.25]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unit_labels([0.5, 10]), r"0.5 to 10: gains .* min_max"),
        (lambda: unit_labels([-0.1, 0.5]), r"\[0, 1\]"),
        (lambda: unit_labels([0.5, math.nan]), "scores has nan at response 1"),
        (lambda: unit_labels([None], "min_max"), "scores has None at response 0"),
        (lambda: labels_from_ranks([1, math.inf]), "ranks has inf at response 1"),
        (lambda: labels_from_preferences([[0.5, 1.2], [0, 0.5]]), "0.5 to 1.2"),
        (lambda: labels_from_preferences([[0.5], [0, 0.5]]), r"2 x 2, found rows of \[1, 2\]"),
    ],
)
def test_bad_labels(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("trainer", "methods", "message"),
    [
        ({"loss_type": ["ipo"]}, (), "choose lipo's objective"),
        ({"f_divergence_type": "js_divergence"}, (), "f_divergence_type"),
        ({"ld_alpha": 0.5}, (), "ld_alpha"),
        ({"use_weighting": True}, (), "use_weighting"),
        ({"label_smoothing": 0.1}, (), "label_smoothing"),
    ],
)
def test_conflicts(trainer, methods, message):
    found = [c.message for c in LiPO().conflicts(Setup(trainer=trainer, methods=("lipo", *methods)))]
    assert len(found) == 1
    assert message in found[0]
    assert not list(LiPO().conflicts(Setup(trainer={"loss_type": "sigmoid"}, methods=("lipo",))))

"""PaFi picks the smallest magnitudes over all tensors, ties by position."""

import pytest
import support
import torch
from torch import nn

from posttrain.selection.magnitude import Magnitude


def toy(*tensors, dtype=torch.float64):
    model = nn.Module()
    for number, values in enumerate(tensors):
        model.register_parameter(f"t{number}", nn.Parameter(torch.tensor(values, dtype=dtype)))
    return model


def picks(plan):
    return {n: s.flat().tolist() for n, s in plan.touched.items()}


THETA = [0.5, -0.1, 0.0, 1.0, 0.2, -2.0]


def test_worked_example():
    assert picks(Magnitude(budget=2).select(toy(THETA))) == {"t0": [1, 2]}  # as D3 with a large exponent
    assert picks(Magnitude(budget=2, largest=True).select(toy(THETA))) == {"t0": [3, 5]}
    # one threshold over all tensors
    plan = Magnitude(budget=3).select(toy(THETA[:3], [[1.0, 0.2], [-2.0, 0.05]]))
    assert picks(plan) == {"t0": [1, 2], "t1": [3]}


def test_ties_go_to_the_first_tensor_and_position():
    # in bf16 0.3001 and 0.3 are one number
    model = toy([0.3001, -0.3, 0.5], [0.3, 0.0, -0.3], dtype=torch.bfloat16)
    assert picks(Magnitude(budget=3).select(model)) == {"t0": [0, 1], "t1": [1]}
    assert picks(Magnitude(budget=4).select(model)) == {"t0": [0, 1], "t1": [0, 1]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_a_sort(tied, dtype):
    model = support.model(tied=tied, dtype=dtype)
    flat = torch.cat([p.detach().flatten().double().abs() for p in model.parameters()])
    plan = Magnitude(budget=0.1).select(model)
    budget = int(0.1 * len(flat))
    mask = torch.cat([selection.mask().flatten() for selection in plan.tensors.values()])
    assert torch.equal(mask.nonzero().flatten(), flat.argsort(stable=True)[:budget].sort().values)
    assert plan.count == budget
    assert plan == Magnitude(budget=0.1).select(model, round=3)  # no draw


def test_always_train_is_charged():
    plan = Magnitude(budget=5, always_train=("t0",)).select(toy([9.0, 8.0], THETA))
    assert picks(plan) == {"t0": [0, 1], "t1": [1, 2, 4]}


def test_a_broken_weight_is_named():
    with pytest.raises(FloatingPointError, match="t0 at flat position 1"):
        Magnitude(budget=1).select(toy([1.0, float("nan")]))


@pytest.mark.parametrize(
    "budget", [1.0, 2.0, True, False, 0, 0.0, -1, float("nan"), float("inf"), "0.1", None]
)
def test_what_is_neither_a_count_nor_a_fraction_is_refused(budget):
    """1.0 is meant as all and would be taken for one scalar."""
    with pytest.raises(ValueError, match="a budget is a whole number"):
        Magnitude(budget=budget)

"""The optimiser that moves selected scalars only: equal to torch where torch is right."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.selection.adamw import SelectiveAdamW

LR = 0.1


def parameter(values, dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def gradients(shape, steps, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for _ in range(steps)]


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 11), min_size=1), st.integers(0, 100))
def test_a_fixed_selection_is_torch_with_zeroed_gradients_to_the_bit(chosen, seed):
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(3, 4, generator=draw)
    ours, theirs, whole = (torch.nn.Parameter(start.clone()) for _ in range(3))
    index = torch.tensor(sorted(chosen))
    selective = SelectiveAdamW([ours, whole], {ours: index}, lr=LR)
    plain = torch.optim.AdamW([theirs], lr=LR, weight_decay=0)
    alone = torch.nn.Parameter(start.clone())
    dense = torch.optim.AdamW([alone], lr=LR, weight_decay=0)
    mask = torch.zeros(12).index_fill(0, index, 1.0).view(3, 4)
    for gradient in gradients((3, 4), 6, seed):
        ours.grad, theirs.grad = gradient.clone(), gradient * mask
        whole.grad, alone.grad = gradient.clone(), gradient.clone()
        selective.step(), plain.step(), dense.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(whole, alone)  # without a selection everything moves
    state = selective.state[ours]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (len(chosen),)
    assert "start" not in state


def test_decay_does_not_reach_the_others():
    weight = parameter([1.0, 1.0])
    optimiser = SelectiveAdamW([weight], {weight: torch.tensor([1])}, lr=LR, weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.tensor([5.0, 0.0])
        optimiser.step()
    assert weight[0].item() == 1.0
    assert weight[1].item() == pytest.approx(0.970299)  # (1 - lr wd)^3


@pytest.mark.parametrize(("corrected", "sizes"), [(True, [1.0] * 12), (False, None)])
def test_a_scalar_released_late_begins_with_its_own_age(corrected, sizes):
    weight = parameter([0.0, 0.0])
    optimiser = SelectiveAdamW([weight], {weight: torch.tensor([0])}, lr=1.0, age_correction=corrected)
    for _ in range(2000):
        weight.grad = torch.ones(2)
        optimiser.step()
    assert weight[1].item() == 0.0
    optimiser.select(weight, torch.tensor([0, 1]))
    moved = []
    for _ in range(12):
        before = weight[1].item()
        weight.grad = torch.ones(2)
        optimiser.step()
        moved.append(before - weight[1].item())
    if corrected:
        assert moved == pytest.approx(sizes, rel=1e-4)
    else:  # the sheet's 3.16, 4.25, 4.95, ..., 6.57 for a long constant gradient
        assert moved[0] == pytest.approx(3.1623, rel=0.1)
        assert moved[-1] == pytest.approx(6.57, rel=0.1)


def test_a_scalar_that_leaves_stops_at_once_and_begins_anew():
    weight = parameter([0.0, 0.0])
    optimiser = SelectiveAdamW([weight], {weight: torch.tensor([0, 1])}, lr=LR)
    for _ in range(5):
        weight.grad = torch.ones(2)
        optimiser.step()
    optimiser.select(weight, torch.tensor([1]))
    stopped = weight[0].item()
    for _ in range(5):
        weight.grad = torch.ones(2)
        optimiser.step()
    assert weight[0].item() == stopped
    assert weight[1].item() == pytest.approx(-10 * LR, rel=1e-4)
    optimiser.select(weight, torch.tensor([0, 1]))
    weight.grad = torch.full((2,), 0.01)
    optimiser.step()
    assert weight[0].item() == pytest.approx(stopped - LR, rel=1e-4)  # age 1


def test_growing_keeps_state_and_empty_is_nothing():
    weight = parameter([0.0] * 6)
    optimiser = SelectiveAdamW([weight], {weight: torch.tensor([], dtype=torch.long)}, lr=LR)
    reference = parameter([0.0] * 6)
    torch_adam = torch.optim.AdamW([reference], lr=LR, weight_decay=0)
    for gradient in gradients((6,), 3):
        weight.grad = gradient.clone()
        optimiser.step()
    assert torch.equal(weight, torch.zeros(6))
    optimiser.select(weight, torch.tensor([2, 4]))
    for step, gradient in enumerate(gradients((6,), 6, seed=1)):
        if step == 3:
            optimiser.select(weight, torch.tensor([0, 2, 4, 5]))
        weight.grad, reference.grad = gradient.clone(), gradient.clone()
        optimiser.step(), torch_adam.step()
    assert weight[[2, 4]].tolist() == pytest.approx(reference[[2, 4]].tolist(), rel=1e-5)
    assert weight[[1, 3]].tolist() == [0.0, 0.0]


def test_half_precision_accumulates_in_masters():
    weight = parameter([1.0, 1.0, 1.0], torch.bfloat16)
    optimiser = SelectiveAdamW([weight], {weight: torch.tensor([0, 2])}, lr=1e-4)
    for _ in range(100):  # each step is below half the spacing of bf16 at 1
        weight.grad = torch.ones(3, dtype=torch.bfloat16)
        optimiser.step()
    assert weight.tolist() == pytest.approx([0.99, 1.0, 0.99], abs=2**-9)
    assert weight[1].item() == 1.0
    assert optimiser.state[weight]["master"].tolist() == pytest.approx([0.99, 0.99], rel=1e-4)


def test_state_round_trip_is_exact():
    def build():
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8).bfloat16())
        return weight, SelectiveAdamW([weight], {weight: torch.tensor([1, 5])}, lr=LR)

    weight, optimiser = build()
    draws = gradients((8,), 8)
    for step in range(4):
        if step == 2:
            optimiser.select(weight, torch.tensor([1, 3, 5]))
        weight.grad = draws[step].bfloat16()
        optimiser.step()
    saved, values = copy.deepcopy(optimiser.state_dict()), weight.detach().clone()
    again, other = build()
    other.load_state_dict(saved)
    with torch.no_grad():
        again.copy_(values)
    for step in range(4, 8):
        for w, o in ((weight, optimiser), (again, other)):
            w.grad = draws[step].bfloat16()
            o.step()
    assert torch.equal(weight, again)
    assert other.state[again]["index"].dtype == torch.int32
    assert torch.equal(optimiser.state[weight]["master"], other.state[again]["master"])


def test_wrong_settings_are_refused():
    weight = parameter([1.0])
    with pytest.raises(ValueError, match="must be >= 0"):
        SelectiveAdamW([weight], lr=-1)
    with pytest.raises(ValueError, match="in no group"):
        SelectiveAdamW([weight], {parameter([1.0]): torch.tensor([0])})


@pytest.mark.parametrize(("index", "share"), [(None, 2 / 4), ([0, 1, 2], 1 / 3), ([0, 2], 0.0)])
def test_what_a_step_changes_in_the_type_of_the_weights(index, share):
    """The first steps are the learning rate; half of bf16's last place is 2e-3 below 1 and 0.5 below 256."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 1e-3, 256.0, 0.0], dtype=torch.bfloat16))
    chosen = {} if index is None else {weight: torch.tensor(index)}
    optimiser = SelectiveAdamW([weight], chosen, lr=5e-4)
    assert optimiser.visible() is None
    for _ in range(2):  # of the last step, not of all
        weight.grad = torch.ones_like(weight)
        optimiser.step()
        assert optimiser.visible() == pytest.approx(share)

"""The random control: exact budgets, every subset equally likely, the same for a seed and round."""

from itertools import combinations

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.selection import random_mask
from posttrain.selection.plan import PlanError
from posttrain.selection.random_mask import RandomMask, uniform_subset


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.data(), st.integers(1, 30))
def test_exactly_as_many_as_asked_for(sizes, data, block):
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    count = data.draw(st.integers(0, sum(sizes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_mask, "_BLOCK", block)
        drawn = uniform_subset(named, count, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assert sum(map(len, drawn.values())) == count
    for name, index in drawn.items():
        assert len(index)
        assert index.tolist() == sorted(set(index.tolist()))
        assert 0 <= int(index[0]) <= int(index[-1]) < named[name]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_subset_is_equally_likely(count):
    """All subsets of 5 scalars in tensors of 2, 0 and 3: chi-square against the uniform distribution."""
    generator = torch.Generator().manual_seed(1)
    subsets = dict.fromkeys(combinations(range(5), count), 0)
    draws = 200 * len(subsets)
    for _ in range(draws):
        drawn = uniform_subset({"a": 2, "empty": 0, "b": 3}, count, generator)
        subsets[
            tuple(drawn.get("a", torch.empty(0)).tolist() + [2 + int(i) for i in drawn.get("b", [])])
        ] += 1
    chi = sum((seen - 200) ** 2 / 200 for seen in subsets.values())
    assert chi < 30  # at most 9 degrees of freedom: p = 4e-4


def test_out_of_range():
    for count in (-1, 6):
        with pytest.raises(ValueError, match="of 5 scalars cannot be drawn"):
            uniform_subset({"a": 5}, count, torch.Generator())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [0.01, 0.3, 0.9, 77])
def test_budgets_are_exact(tied, budget):
    model = support.model(tied=tied)
    n = sum(parameter.numel() for parameter in model.parameters())
    plan = RandomMask(budget=budget).select(model)
    assert plan.count == (int(budget * n) if isinstance(budget, float) else budget)
    assert RandomMask(budget=budget).select(model) == plan
    others = [
        RandomMask(budget=budget).select(model, round=1),
        RandomMask(budget=budget, seed=1).select(model),
    ]
    assert len({plan.fingerprint(), *(other.fingerprint() for other in others)}) == 3
    assert plan.config["round"] == 0
    assert others[0].config["round"] == 1


def test_what_trains_whole_is_charged_and_what_is_left_out_is_no_candidate():
    model = support.model()
    head = model.lm_head.weight.numel()
    plan = RandomMask(budget=head + 100, always_train=("lm_head",)).select(model)
    assert plan.tensors["lm_head.weight"].kind == "all"
    assert plan.count == head + 100
    with pytest.raises(ValueError, match="always_train takes"):
        RandomMask(budget=head, always_train=("lm_head",)).select(model)
    plan = RandomMask(budget=0.5, embeddings=False, norms=False, exclude=("down_proj",)).select(model)
    assert not [n for n in plan.touched if "embed" in n or "norm" in n or "lm_head" in n or "down" in n]
    candidates = sum(p.numel() for n, p in model.named_parameters() if n in plan.touched)
    assert plan.count == candidates // 2


def test_whole_tensors_at_matched_density():
    model = support.model()
    n = sum(parameter.numel() for parameter in model.parameters())
    plans = [RandomMask(budget=0.5, level="tensor").select(model, round=round_) for round_ in range(4)]
    for plan in plans:
        assert not plan.partial
        assert 0.5 * n - 32 * 64 < plan.count <= 0.5 * n  # what is left is below the largest matrix
    assert len({plan.fingerprint() for plan in plans}) == 4
    with pytest.raises(PlanError, match="no tensor fits into the budget of 31 scalars, the smallest has 32"):
        RandomMask(budget=31, level="tensor").select(model)

"""The exact top-B against a plain sort in float64, with ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.selection import top_b as module
from posttrain.selection.top_b import ByBlock, budget_of, top_b


def by_sorting(scores, budget):
    """(tensor order, position) of the best, by Python's sort on float64."""
    entries = [
        (-value, order, position)
        for order, tensor in enumerate(scores.values())
        for position, value in enumerate(tensor.flatten().double().tolist())
    ]
    names, chosen = list(scores), {}
    for _, order, position in sorted(entries)[:budget]:
        chosen.setdefault(names[order], []).append(position)
    return {name: sorted(positions) for name, positions in chosen.items()}


def plain(chosen):
    return {name: index.tolist() for name, index in chosen.items()}


@st.composite
def many_tensors(draw):
    """Tensors of scores with few distinct values (heavy ties), signs, zeros of both signs, tiny and large."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scale = draw(st.sampled_from([1e-40, 1e-6, 1.0, 1e30]))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    scores = {}
    for number in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 60))
        values = torch.randint(-levels, levels + 1, (size,), generator=generator) / levels * scale
        scores[f"t{number}"] = torch.where(values == 0, -values, values).to(dtype)
    total = sum(tensor.numel() for tensor in scores.values())
    return scores, draw(st.integers(0, total))


@pytest.mark.parametrize("way", ["pool", "histogram"])
@settings(max_examples=150, deadline=None)
@given(many_tensors(), st.integers(1, 40))
def test_equals_a_plain_sort(way, case, block):
    scores, budget = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)  # so that tensors span several blocks
        patch.setattr(module, "_SMALL", 10**9 if way == "pool" else 0)
        patch.setattr(module, "_CHUNK", 3)
        expected = by_sorting(scores, budget)
        assert plain(top_b(scores, budget)) == expected
        lazily = {name: (lambda tensor=tensor: tensor) for name, tensor in scores.items()}
        assert plain(top_b(lazily, budget)) == expected
        blocks = {
            name: ByBlock(tensor.numel(), lambda start, stop, tensor=tensor: tensor[start:stop], block + 1)
            for name, tensor in scores.items()
        }
        assert plain(top_b(blocks, budget)) == expected


@pytest.mark.parametrize("small", [0, 10**9])
def test_large_bf16_scores(monkeypatch, small):
    monkeypatch.setattr(module, "_SMALL", small)
    generator = torch.Generator().manual_seed(0)
    scores = {f"t{i}": torch.randn(300, 200, generator=generator).abs().bfloat16() for i in range(4)}
    flat = torch.cat([tensor.flatten().double() for tensor in scores.values()])
    for budget in (1, 1000, 120_000, 239_999, 240_000):
        order = torch.argsort(-flat, stable=True)[:budget].sort().values
        got = top_b(scores, budget)
        offsets = {name: i * 60_000 for i, name in enumerate(scores)}
        assert torch.equal(torch.cat([index + offsets[name] for name, index in got.items()]), order)


@pytest.mark.parametrize("small", [0, 10**9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(monkeypatch, small, bad):
    monkeypatch.setattr(module, "_SMALL", small)
    with pytest.raises(FloatingPointError, match=r"score of b at flat position 2 is"):
        top_b({"a": torch.ones(3), "b": torch.tensor([1.0, 0.0, bad])}, 2)


@pytest.mark.parametrize("small", [0, 10**9])
def test_impossible_budgets_are_refused(monkeypatch, small):
    monkeypatch.setattr(module, "_SMALL", small)
    scores = {"a": torch.ones(3), "empty": torch.ones(0)}
    assert top_b(scores, 0) == {}
    assert plain(top_b(scores, 3)) == {"a": [0, 1, 2]}
    with pytest.raises(ValueError, match="above the number of scores, 3"):
        top_b(scores, 4)
    with pytest.raises(ValueError, match="0 or more"):
        top_b(scores, -1)


def test_a_fraction_is_rounded_down():
    assert budget_of(0.5, 7) == 3
    assert budget_of(0.29, 100) == 28  # 0.29 * 100 is 28.999... in floating point, and floor is floor
    assert budget_of(3, 7) == 3
    for budget, candidates in ((0.1, 5), (8, 7), (0, 7)):
        with pytest.raises(ValueError, match="at least 1 and at most all"):
            budget_of(budget, candidates)

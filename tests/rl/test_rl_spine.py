"""SPINE against the numbers of its definition (arXiv 2511.17938) and against independent references."""

import math
import statistics

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.rl import Spine
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import Setup, Tokens
from posttrain.rl.quantiles import row_quantile
from posttrain.rl.spine import (
    band_hinge,
    fork_kl,
    mad_band,
    otsu_forks,
    quantile_band,
    quantile_forks,
)

V1 = [0.02, 0.05, 0.10, 0.30, 0.01, 1.20, 0.04, 2.00, 0.08, 0.90]
V2 = [0.02, 0.05, 0.10, 0.08, 0.01, 1.20, 0.04, 2.00, 0.03, 0.90]


def row(values, dtype=torch.float64):
    entropies = torch.tensor([values], dtype=dtype)
    return entropies, torch.ones_like(entropies, dtype=torch.long)


def chosen(mask):
    return mask[0].nonzero().flatten().tolist()


def micro_batch(entropies, mask=None, **fields):
    entropies = torch.as_tensor(entropies)
    defaults = {
        "logps": torch.zeros_like(entropies),
        "entropies": entropies,
        "old_logps": torch.zeros_like(entropies),
        "ref_logps": None,
        "advantages": torch.ones(entropies.size(0)),
        "reward": torch.ones(entropies.size(0)),
        "tied": torch.zeros(entropies.size(0), dtype=torch.bool),
        "mask": torch.ones_like(entropies, dtype=torch.long) if mask is None else mask,
        "gauges": Gauges(),
    }
    return Tokens(**(defaults | fields))


def near(values, abs=1e-12):
    return pytest.approx(values, abs=abs)


# ---- forks and band ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "forks", "band", "terms"),
    [
        (0.2, [5, 7], (1.28, 1.60), {5: 0.08, 7: 0.40}),
        (0.5, [2, 3, 5, 7, 9], (0.18, 0.90), {2: 0.08, 5: 0.30, 7: 1.10}),
    ],
)
def test_first_version_of_the_sheet(ratio, forks, band, terms):
    entropies, mask = row(V1)
    found = quantile_forks(entropies, mask, ratio)
    assert chosen(found) == forks
    low, high = quantile_band(entropies, found)
    assert (low.item(), high.item()) == near(band)
    hinge = band_hinge(entropies, found, low, high, weight_low=1.0, weight_high=1.0)[0]
    assert hinge.tolist() == near([terms.get(i, 0.0) for i in range(10)])


def test_first_version_aggregates_over_all_tokens():
    tokens = micro_batch(torch.tensor([V1], dtype=torch.float64))
    method = Spine(band_weight_low=1.0, band_weight_high=1.0)
    term = method.token_penalty(tokens)
    assert term.sum().item() == near(0.48)
    assert (term.sum() / tokens.mask.sum()).item() == near(0.048)
    assert (term.sum() / method.forks(tokens).sum()).item() == near(0.24)


def test_second_version_of_the_sheet():
    entropies, mask = row(V2)
    forks = otsu_forks(entropies, mask)
    assert chosen(forks) == [5, 7, 9]
    low, high = mad_band(entropies, forks)
    assert (low.item(), high.item()) == near((0.75522, 1.20))
    hinge = band_hinge(entropies, forks, low, high, weight_low=1.0, weight_high=1.0)[0]
    assert hinge.tolist() == near([0.8 if i == 7 else 0.0 for i in range(10)])
    assert (hinge.sum() / 10).item() == near(0.080)


def test_second_version_with_the_centre_rule():
    """The band has its median between two values: torch.median would give 0.90."""
    entropies, mask = row(V2)
    forks = otsu_forks(entropies, mask, rule="center")
    assert chosen(forks) == [2, 5, 7, 9]
    low, high = mad_band(entropies, forks)
    assert (low.item(), high.item()) == near((0.23457, 1.05))
    hinge = band_hinge(entropies, forks, low, high, weight_low=1.0, weight_high=1.0)
    assert hinge.sum().item() == near(1.23457)


def test_lower_bound_of_the_second_band_is_not_negative():
    entropies, mask = row([0.1, 1.0, 5.0, 9.0, 0.2])
    low, high = mad_band(entropies, mask.bool())
    assert (low.item(), high.item()) == (0.0, 1.0)


def test_quantile_is_per_response():
    """TRL's single threshold 3.2 would take two tokens of the first row and none of the second."""
    entropies = torch.tensor([[1.0, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]], dtype=torch.float64)
    mask = torch.ones(2, 5)
    assert row_quantile(entropies, mask.bool(), 0.8).tolist() == near([4.2, 0.42])
    assert quantile_forks(entropies, mask, 0.2).tolist() == [[False] * 4 + [True]] * 2


def test_whole_number_positions_keep_their_token():
    """fp32 quantiles can land above the order statistic and drop it (rho 0.4, 46 tokens)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        entropies = torch.rand(1, 46, generator=generator) * 3
        assert quantile_forks(entropies, torch.ones(1, 46), 0.4).sum() == 19  # ranks 27 to 45
    for count, ratio in [(11, 0.9), (21, 0.7), (1001, 0.3), (101, 0.01)]:
        entropies = torch.rand(1, count, generator=generator, dtype=torch.float64)
        expected = round(ratio * (count - 1)) + 1
        assert quantile_forks(entropies, torch.ones(1, count), ratio).sum() == expected


def test_ties_at_the_threshold_all_count():
    entropies, mask = row([0.1, 2.0, 2.0, 2.0, 0.3])
    assert chosen(quantile_forks(entropies, mask, 0.2)) == [1, 2, 3]


def reference_otsu(values, bins, rule):
    """Otsu in plain Python over numpy's histogram."""
    values = numpy.asarray(values, dtype=numpy.float64)
    low, high = values.min(), values.max()
    counts, edges = numpy.histogram(values, bins=bins, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    scores = []
    for k in range(bins - 1):
        w0, w1 = counts[: k + 1].sum(), counts[k + 1 :].sum()
        mu0 = (counts[: k + 1] * centres[: k + 1]).sum() / w0
        mu1 = (counts[k + 1 :] * centres[k + 1 :]).sum() / w1
        scores.append(w0 * w1 * (mu0 - mu1) ** 2)
    best = max(scores)
    k = next(i for i, score in enumerate(scores) if math.isclose(score, best, rel_tol=1e-9))
    width = (high - low) / bins
    if rule == "center":
        return [bool(v >= low + (k + 0.5) * width) for v in values]
    return [bool(v > low + (k + 1) * width) for v in values]


@given(
    st.lists(st.floats(0, 4, allow_subnormal=False), min_size=2, max_size=40),
    st.sampled_from([2, 7, 100]),
    st.sampled_from(["upper_edge", "center"]),
)
def test_otsu_is_the_plain_definition(values, bins, rule):
    if max(values) - min(values) < 1e-6:
        return
    entropies, mask = row(values)
    assert otsu_forks(entropies, mask, bins=bins, rule=rule)[0].tolist() == reference_otsu(values, bins, rule)


@pytest.mark.parametrize("values", [[0.7] * 6, [0.7], [0.0, 0.0]])
def test_otsu_falls_back_to_the_quantile(values):
    entropies, mask = row(values)
    forks = otsu_forks(entropies, mask, fallback_ratio=0.2)
    assert torch.equal(forks, quantile_forks(entropies, mask, 0.2))
    assert forks.all()  # all are ties


@given(st.lists(st.lists(st.floats(0, 5), min_size=0, max_size=9), min_size=1, max_size=5), st.integers(0, 4))
@settings(max_examples=60)
def test_rows_are_independent_and_padding_does_not_matter(rows, columns):
    width = max(len(values) for values in rows) + columns
    if width == 0:
        return
    entropies = torch.full((len(rows), width), float("nan"), dtype=torch.float64)  # what padding may hold
    mask = torch.zeros(len(rows), width)
    for i, values in enumerate(rows):
        entropies[i, : len(values)] = torch.tensor(values, dtype=torch.float64)
        mask[i, : len(values)] = 1
    for forks_of, band_of in ((quantile_forks, quantile_band), (otsu_forks, mad_band)):
        forks = forks_of(entropies, mask)
        low, high = band_of(entropies, forks)
        hinge = band_hinge(entropies, forks, low, high)
        assert torch.isfinite(hinge).all()
        for i, values in enumerate(rows):
            assert not forks[i, len(values) :].any()
            if not values:
                assert hinge[i].sum() == 0
                continue
            single = forks_of(*row(values))
            assert forks[i, : len(values)].tolist() == single[0].tolist()
            assert single.any()
            alone = band_of(row(values)[0], single)
            assert (low[i].item(), high[i].item()) == (alone[0].item(), alone[1].item())
            kept = [value for value, fork in zip(values, single[0].tolist(), strict=True) if fork]
            assert low[i] <= high[i]
            assert high[i].item() == near(statistics.median(kept))


@given(st.lists(st.floats(0, 5), min_size=1, max_size=30), st.floats(0, 1))
def test_quantile_is_numpys(values, q):
    entropies, mask = row(values)
    assert row_quantile(entropies, mask.bool(), q).item() == near(numpy.quantile(values, q), abs=1e-9)


def test_one_fork_has_no_band():
    tokens = micro_batch([[0.1, 0.2, 3.0]])
    assert chosen(Spine().forks(tokens)) == [2]
    assert Spine(band_weight_low=1, band_weight_high=1).token_penalty(tokens).sum() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["quantile", "otsu"])
def test_entropy_that_is_not_finite_is_refused(variant, value):
    entropies = torch.ones(3, 4)
    entropies[1, 2] = value
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        Spine(variant=variant).forks(micro_batch(entropies))
    mask = torch.ones(3, 4)
    mask[1, 2] = 0
    assert not Spine(variant=variant).forks(micro_batch(entropies, mask=mask))[1, 2]


def test_tokens_of_tools_are_no_forks():
    """They are out of the mask, in the middle of a row, and do not enter the quantile."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    entropies = torch.tensor([[0.1, 0.2, 9.0, 9.0, 0.3, 0.4]])
    tokens = micro_batch(entropies, mask=mask)
    assert chosen(Spine(fork_ratio=0.5).forks(tokens)) == [4, 5]
    low, high = quantile_band(entropies, Spine(fork_ratio=0.5).forks(tokens))
    assert (low.item(), high.item()) == near((0.31, 0.35), abs=1e-6)


# ---- gradients --------------------------------------------------------------------------------------------


def test_gradient_of_the_entropy():
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, 0)
    entropy = -(logp.exp() * logp).sum()
    assert entropy.item() == near(0.8323956, abs=5e-8)
    hinge = band_hinge(
        entropy.view(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        torch.zeros(1),
        torch.zeros(1),
        weight_high=1.0,
    )
    (gradient,) = torch.autograd.grad(hinge.sum(), logits)
    assert gradient.tolist() == near([-0.2825875, 0.1407704, 0.1418171], abs=5e-8)


@pytest.mark.parametrize("variant", ["quantile", "otsu"])
def test_no_gradient_through_the_bounds(variant):
    entropies = torch.tensor([V1], dtype=torch.float64, requires_grad=True)
    tokens = micro_batch(entropies)
    method = Spine(variant=variant, fork_ratio=0.5, band_weight_low=0.3, band_weight_high=0.7)
    (gradient,) = torch.autograd.grad(method.token_penalty(tokens).sum(), entropies)
    forks = method.forks(tokens)
    low, high = (quantile_band if variant == "quantile" else mad_band)(entropies.detach(), forks)
    values = entropies.detach()
    expected = 0.7 * (values > high).double() - 0.3 * (values < low).double()
    assert torch.equal(gradient, expected * forks)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("low", "high", "sign"), [(0.0, 1.0, -1), (1.0, 0.0, 1)])
def test_one_step_moves_the_entropy_into_the_band(low, high, sign):
    torch.manual_seed(0)
    logits = (
        torch.randn(1, 12, 9, dtype=torch.float64) * torch.linspace(0.2, 3, 12).view(1, -1, 1)
    ).requires_grad_()

    def entropy_of(z):
        logp = torch.log_softmax(z, -1)
        return -(logp.exp() * logp).sum(-1)

    entropies = entropy_of(logits)
    method = Spine(fork_ratio=0.7, band_weight_low=low, band_weight_high=high)
    tokens = micro_batch(entropies)
    method.token_penalty(tokens).sum().backward()
    bounds = quantile_band(entropies.detach(), method.forks(tokens))
    outside = entropies > bounds[1] if high else (entropies < bounds[0]) & method.forks(tokens)
    after = entropy_of(logits.detach() - 1e-3 * logits.grad)
    moved = (after - entropies.detach()) * sign
    assert outside.any()
    assert (moved[outside] > 0).all()
    assert torch.equal(moved[~outside], torch.zeros_like(moved[~outside]))


def test_kl_is_a_mean_over_forks():
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -0.2]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, float("nan")], [-0.4, -3.0, -0.9]], dtype=torch.float64)
    forks = torch.tensor([[True, True, False], [True, False, False]])
    d = [-0.5, 1.0, -0.3]
    value = fork_kl(logps, ref, forks)
    assert value.item() == near(sum(math.exp(x) - x - 1 for x in d) / 3)
    (gradient,) = torch.autograd.grad(value, logps)
    expected = [[(1 - math.exp(-0.5)) / 3, (1 - math.e) / 3, 0], [(1 - math.exp(-0.3)) / 3, 0, 0]]
    assert gradient.tolist() == [near(line) for line in expected]
    nothing = fork_kl(logps, ref, torch.zeros_like(forks))
    assert nothing.item() == 0
    assert nothing.requires_grad
    with pytest.raises(FloatingPointError, match=r"rows \[0\]"):
        fork_kl(logps, ref, torch.ones_like(forks))


def test_dead_groups_keep_the_band_unless_told():
    entropies = torch.tensor([V1, V1])
    tied = torch.tensor([True, False])
    on = Spine(band_weight_high=1.0).token_penalty(micro_batch(entropies, tied=tied))
    off = Spine(band_weight_high=1.0, band_skip_zero_advantage=True).token_penalty(
        micro_batch(entropies, tied=tied)
    )
    assert on[0].sum() > 0
    assert torch.equal(on[0], on[1])
    assert off[0].sum() == 0
    assert torch.equal(off[1], on[1])


def test_gauges():
    tokens = micro_batch(torch.tensor([V1, [9.0] * 10]), mask=torch.tensor([[1] * 10, [0] * 10]))
    method = Spine(fork_ratio=0.5)
    method.token_mask(tokens)
    method.token_penalty(tokens)

    class OneProcess:
        def gather(self, tensor):
            return tensor

    values, _ = tokens.gauges.flush(OneProcess())
    assert values == {
        "fork_share": 0.5,
        "fork_entropy": near(0.9, abs=1e-6),
        "follower_entropy": near(0.04, abs=1e-6),
        "band_low": near(0.18, abs=1e-6),
        "band_high": near(0.9, abs=1e-6),
        "below_band": 0.2,
        "above_band": 0.4,
    }


# ---- configuration ----------------------------------------------------------------------------------------


def test_parameters_are_checked():
    with pytest.raises(ValidationError, match="greater than 0"):
        Spine(fork_ratio=0)
    with pytest.raises(ValidationError, match="band_low_q must be below band_high_q, found"):
        Spine(band_low_q=0.5)
    assert Spine(fork_ratio=1, band_weight_low=0, band_weight_high=0).neutral
    assert not Spine(fork_ratio=1, band_weight_low=0, band_weight_high=0, variant="otsu").neutral
    assert not Spine(fork_ratio=1, band_weight_low=0).neutral
    assert not Spine(fork_ratio=1, band_weight_low=0, band_weight_high=0, kl_coef=0.1).neutral
    assert Spine(kl_coef=0.1).needs == {"head", "ref_logps"}
    assert Spine().needs == {"head"}  # no forward of its own
    assert not Spine(band_weight_low=0, band_weight_high=0).needs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_entropy_quantile", 0.2),
        ("entropy_coef", 0.01),
        ("use_adaptive_entropy", True),
        ("importance_sampling_level", "sequence"),
    ],
)
def test_conflicts(field, value):
    (conflict,) = Spine().conflicts(Setup(trainer={field: value}))
    assert conflict.field == field
    assert conflict.fatal
    assert field in conflict.message


def test_aepo_is_a_warning_while_the_upper_hinge_is_on():
    (conflict,) = Spine().conflicts(Setup(trainer={}, methods=("spine", "aepo")))
    assert not conflict.fatal
    assert conflict.field == "band_weight_high"
    assert not list(Spine(band_weight_high=0).conflicts(Setup(trainer={}, methods=("spine", "aepo"))))


@pytest.mark.parametrize("values", [[0.9, 0.2, 1.6], [0.2, 2.2, 0.9, 2.3, 2.7]])
def test_values_on_an_edge_are_compared_as_the_formula_is_written(values):
    """Rounding decides there: bins are numpy's, the edge is min + (k + 1)(max - min) / bins."""
    values = numpy.asarray(values)
    counts, _ = numpy.histogram(values, bins=100)
    levels, scores = numpy.arange(100), []
    for k in range(99):
        parts = [(counts[part], levels[part]) for part in (slice(0, k + 1), slice(k + 1, None))]
        (n0, m0), (n1, m1) = ((c.sum(), (c * x).sum() / max(c.sum(), 1)) for c, x in parts)
        scores.append(n0 * n1 * (m0 - m1) ** 2)
    k = next(k for k, score in enumerate(scores) if score >= max(scores) * (1 - 1e-12))
    above = values > values.min() + (k + 1) * (values.max() - values.min()) / 100
    forks = otsu_forks(torch.tensor(values)[None], torch.ones(1, len(values)))
    assert forks[0].tolist() == above.tolist()

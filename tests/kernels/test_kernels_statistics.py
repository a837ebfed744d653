"""Tile-wise statistics against full logits in float64, and the bound on what is held at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.kernels import entropies_with_gradient, filtered_forward_kl, token_statistics

N, H, V = 13, 8, 53  # V is prime: no tile divides it


def inputs(dtype=torch.float32, *, with_bias=True, n=N, v=V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=generator).to(dtype)
    weight = torch.randn(v, H, generator=generator).to(dtype)
    bias = torch.randn(v, generator=generator).to(dtype) if with_bias else None
    ids = torch.randint(v, (n,), generator=generator)
    ids[::3] = (hidden[::3].float() @ weight.float().t() + (0 if bias is None else bias.float())).argmax(-1)
    return hidden, weight, bias, ids


def full_logps(hidden, weight, bias=None, temperature=1.0, logit_scale=1.0, softcap=None):
    """All log-probabilities in float64."""
    logits = hidden.double() @ weight.double().t()
    logits = (logits if bias is None else logits + bias.double()) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def expected(logps, ids, *, min_ratio=None, threshold=None):
    p = logps.exp()
    kept = p >= (threshold if min_ratio is None else min_ratio * p.amax(-1, keepdim=True))
    return {
        "logps": logps.gather(1, ids[:, None])[:, 0],
        "max_logps": logps.amax(-1),
        "entropies": -(p * logps).sum(-1),
        "kept": kept.gather(1, ids[:, None])[:, 0],
        "log_mass": (p * kept).sum(-1).log(),
    }


HEADS = [
    {},
    {"temperature": 0.6},
    {"logit_scale": 0.4},
    {"softcap": 3.0},
    {"softcap": 2.0, "logit_scale": 1.7, "temperature": 1.3},
]


@pytest.mark.parametrize("tile", [1, V, 3 * V + 1, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(h) or "plain")
@pytest.mark.parametrize("rule", [{"min_ratio": 0.07}, {"threshold": 0.03}], ids=["minp", "fixed"])
def test_equals_full_logits(tile, dtype, head, rule):
    hidden, weight, bias, ids = inputs(dtype, with_bias=dtype != torch.float64)
    found = token_statistics(hidden, weight, ids, bias=bias, entropy=True, tile=tile, **head, **rule)
    wanted = expected(full_logps(hidden, weight, bias, **head), ids, **rule)
    assert 0 < wanted["kept"].sum() < N
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert found.logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value in wanted.items():
        got = getattr(found, name)
        assert got.shape == (N,)
        if name == "kept":
            assert torch.equal(got, value)
        else:
            assert torch.allclose(got.double(), value, atol=tolerance, rtol=tolerance), name


def test_mixed_precision_is_not_rounded_by_autocast():
    hidden, weight, bias, ids = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_statistics(hidden.bfloat16(), weight, ids, bias=bias)
    exact = expected(full_logps(hidden.bfloat16(), weight, bias), ids, threshold=0)
    assert torch.allclose(found.logps.double(), exact["logps"], atol=3e-6)


def test_proxy_mass_of_the_sheet():
    """p = [.80, .15, .03, .012, .008], kappa .02: kept {0, 1, 2}, Z = .98."""
    p = torch.tensor([0.80, 0.15, 0.03, 0.012, 0.008], dtype=torch.float64)
    rows = p.log().expand(5, 5)
    found = token_statistics(rows, torch.eye(5, dtype=torch.float64), torch.arange(5), min_ratio=0.02)
    assert found.kept.tolist() == [True, True, True, False, False]
    assert (-found.log_mass).tolist() == pytest.approx([0.0202027] * 5, abs=5e-8)
    assert (found.logps - found.log_mass).exp()[:3].tolist() == pytest.approx(
        [0.8163265, 0.1530612, 0.0306122], abs=5e-8
    )
    fixed = token_statistics(rows, torch.eye(5, dtype=torch.float64), torch.arange(5), threshold=0.1)
    assert fixed.kept.tolist() == [True, True, False, False, False]
    assert fixed.log_mass[0].item() == pytest.approx(math.log(0.95))


def test_ends_of_the_filter():
    hidden, weight, bias, ids = inputs()
    # nothing dropped: exactly 0, so that a gate on it stays closed
    for rule in ({"min_ratio": 0.0}, {"threshold": 0.0}):
        everything = token_statistics(hidden, weight, ids, bias=bias, **rule)
        assert torch.equal(everything.log_mass, torch.zeros(N))
        assert everything.kept.all()
    only_best = token_statistics(hidden, weight, ids, bias=bias, min_ratio=1.0)
    assert torch.allclose(only_best.log_mass, only_best.max_logps, atol=1e-6)
    nothing = token_statistics(hidden, weight, ids, bias=bias, threshold=1.0)
    assert not nothing.kept.any()
    assert (nothing.log_mass == -math.inf).all()


def test_tiny_dropped_mass_is_not_lost_to_rounding():
    logits = torch.tensor([[0.0, 0.0, -20.0]])
    found = token_statistics(logits, torch.eye(3), torch.tensor([0]), min_ratio=1e-3)
    assert found.log_mass.item() == pytest.approx(-math.exp(-20) / 2, rel=1e-5)


def test_masked_vocabulary_has_finite_entropy():
    hidden, weight, bias, ids = inputs()
    bias[5] = -math.inf
    found = token_statistics(hidden, weight, ids.clamp(max=4), bias=bias, entropy=True, min_ratio=0.1)
    assert torch.isfinite(found.entropies).all()
    assert torch.isfinite(found.log_mass).all()


def test_no_rows():
    hidden, weight, _, ids = inputs()
    for dtype in (torch.float32, torch.bfloat16):
        found = token_statistics(hidden[:0].to(dtype), weight.to(dtype), ids[:0], min_ratio=0.1, entropy=True)
        assert found.logps.shape == found.log_mass.shape == found.entropies.shape == (0,)


def test_only_what_is_asked_for():
    hidden, weight, _, ids = inputs()
    hidden.requires_grad_()
    found = token_statistics(hidden, weight, ids)
    assert found.entropies is found.kept is found.log_mass is None
    assert not found.logps.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_is_not_rounded(dtype):
    hidden, weight, bias, ids = (t.cuda() for t in inputs(dtype))
    found = token_statistics(hidden, weight, ids, bias=bias, entropy=True, min_ratio=0.07)
    wanted = expected(full_logps(hidden, weight, bias), ids, min_ratio=0.07)
    for name in ("logps", "max_logps", "entropies", "log_mass"):
        assert torch.allclose(getattr(found, name).double(), wanted[name], atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary(dtype):
    n, v, tile = 500, 1000, 4000
    hidden, weight, bias, ids = inputs(dtype, n=n, v=v)
    with Largest() as seen:
        token_statistics(hidden, weight, ids, bias=bias, min_ratio=0.1, entropy=True, tile=tile)
    assert seen.elements <= max(tile, v * H) < n * v / 50
    hidden.requires_grad_()
    weight.requires_grad_()
    with Largest() as seen:
        filtered_forward_kl(hidden, weight, bias=bias, min_ratio=0.1, tile=tile).sum().backward()
        entropies_with_gradient(torch.ones(n), hidden, weight, bias=bias, tile=tile).sum().backward()
    assert seen.elements <= max(tile, v * H)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(N, H + 1)}, r"\(13, 9\) and \(53, 8\)"),
        ({"weight": torch.zeros(0)}, "sharded head has to be gathered"),
        ({"ids": torch.zeros(N + 1, dtype=torch.long)}, r"\(14,\) for 13 rows"),
        ({"temperature": 0.0}, "temperature must be > 0, found 0.0"),
        ({"threshold": 0.1}, "not both"),
    ],
)
def test_bad_input(change, message):
    hidden, weight, bias, ids = inputs()
    fields = {"hidden": hidden, "weight": weight, "ids": ids, "bias": bias, "min_ratio": 0.1} | change
    with pytest.raises(ValueError, match=message):
        token_statistics(fields.pop("hidden"), fields.pop("weight"), fields.pop("ids"), **fields)


@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 400))
@settings(max_examples=50, deadline=None)
def test_mass_properties(seed, kappa, tile):
    hidden, weight, bias, ids = inputs(torch.float64, seed=seed)
    found = token_statistics(hidden, weight, ids, bias=bias, min_ratio=kappa, tile=tile)
    assert (found.log_mass <= 0).all()
    assert (found.log_mass >= found.max_logps - 1e-12).all()  # the best token always stays
    more = token_statistics(hidden, weight, ids, bias=bias, min_ratio=kappa / 2, tile=tile)
    assert (more.log_mass >= found.log_mass - 1e-12).all()
    assert (more.kept | ~found.kept).all()


# ---- KL over the whole vocabulary ----------------------------------------------------------------------


def reference_kl(hidden, weight, bias, proxy_hidden=None, *, min_ratio=None, threshold=None, **head):
    logps = full_logps(hidden, weight, bias, **head)
    with torch.no_grad():
        q = (logps if proxy_hidden is None else full_logps(proxy_hidden, weight, bias, **head)).exp()
        keep = q >= (threshold if min_ratio is None else min_ratio * q.amax(-1, keepdim=True))
        q = q * keep
        q = q / q.sum(-1, keepdim=True)
    return torch.where(q > 0, q * (q.log() - logps), 0.0).sum(-1)


def test_full_kl_of_the_sheet():
    p = torch.tensor([[0.80, 0.15, 0.03, 0.012, 0.008]], dtype=torch.float64)
    theta = torch.tensor([[0.85, 0.12, 0.012, 0.010, 0.008]], dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    found = filtered_forward_kl(theta.log(), eye, proxy_hidden=p.log(), min_ratio=0.02)
    assert found.item() == pytest.approx(0.0329176, abs=5e-8)
    # of a policy with its own filtered copy it is -ln Z
    assert filtered_forward_kl(p.log(), eye, min_ratio=0.02).item() == pytest.approx(-math.log(0.98))


@pytest.mark.parametrize("tile", [1, 2 * V + 3, 2**20])
@pytest.mark.parametrize("other", [False, True], ids=["own", "other"])
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(h) or "plain")
@pytest.mark.parametrize("rule", [{"min_ratio": 0.07}, {"threshold": 0.01}], ids=["minp", "fixed"])
def test_full_kl_and_gradient(tile, other, head, rule):
    hidden, weight, bias, _ = inputs(torch.float64)
    proxy_hidden = hidden + 0.3 * inputs(torch.float64, seed=1)[0] if other else None
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    copies = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    found = filtered_forward_kl(
        leaves[0], leaves[1], bias=leaves[2], proxy_hidden=proxy_hidden, tile=tile, **head, **rule
    )
    wanted = reference_kl(*copies, proxy_hidden, **head, **rule)
    assert torch.allclose(found, wanted, atol=1e-12)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(wanted, copies, upstream),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_full_kl_with_a_frozen_half_precision_head():
    hidden, weight, _, _ = inputs(torch.bfloat16)
    hidden.requires_grad_()
    found = filtered_forward_kl(hidden, weight, min_ratio=0.1)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    copy = hidden.detach().double().requires_grad_()
    wanted = reference_kl(copy, weight, None, min_ratio=0.1)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert gradient.dtype == torch.bfloat16
    (exact,) = torch.autograd.grad(wanted.sum(), copy)
    assert torch.allclose(gradient.double(), exact, atol=1e-2, rtol=2e-2)


def test_full_kl_of_a_row_that_keeps_nothing():
    hidden, weight, _, _ = inputs()
    hidden.requires_grad_()
    found = filtered_forward_kl(hidden, weight, threshold=1.0)
    assert torch.equal(found, torch.zeros(N))
    assert torch.equal(torch.autograd.grad(found.sum(), hidden)[0], torch.zeros(N, H))


def test_full_kl_needs_one_filter():
    hidden, weight, _, _ = inputs()
    for rule in ({}, {"min_ratio": 0.1, "threshold": 0.1}):
        with pytest.raises(ValueError, match="either min_ratio or threshold"):
            filtered_forward_kl(hidden, weight, **rule)


@pytest.mark.parametrize("tile", [1, 3 * V + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(h) or "plain")
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradient_of_entropies_is_that_of_full_logits(tile, dtype, head, with_bias):
    hidden, weight, bias, _ = inputs(dtype, with_bias=with_bias)
    if with_bias:
        bias[5] = -math.inf  # a token that cannot be
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    logps = full_logps(doubles[0], doubles[1], doubles[2] if with_bias else None, **head)
    wanted = torch.special.entr(logps.exp()).sum(-1)
    factor = torch.linspace(-2, 3, N)
    found = entropies_with_gradient(wanted.to(dtype), hidden, weight, bias=bias, tile=tile, **head)
    assert torch.equal(found, wanted.to(dtype))
    grads = torch.autograd.grad((found * factor.to(dtype)).sum(), leaves)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    # entropy of each row is a function of finite logits only: drop the impossible token from the reference
    logits = torch.ones(V, dtype=torch.bool)
    if with_bias and "softcap" not in head:
        logits[5] = False
    reference = full_logps(doubles[0], doubles[1][logits], doubles[2][logits] if with_bias else None, **head)
    expected_grads = torch.autograd.grad(
        (-(reference.exp() * reference).sum(-1) * factor).sum(), doubles, materialize_grads=True
    )
    for grad, value in zip(grads, expected_grads, strict=True):
        value = torch.where(value.isnan(), 0.0, value)
        assert torch.allclose(grad.double(), value, atol=tolerance, rtol=tolerance)
        assert grad.abs().max() > 0.01

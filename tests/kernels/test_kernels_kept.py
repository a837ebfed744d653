"""The kept set of truncated sampling: against transformers' own samplers, by hand, and its gradient."""

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from posttrain.kernels import Truncation, log_kept

FOUR = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("truncation", "mass"),
    [
        (Truncation(top_p=0.9), 0.95),  # 0.5 + 0.3 is not enough
        (Truncation(top_p=0.79), 0.8),
        (Truncation(top_p=0.3), 0.5),
        (Truncation(top_k=2), 0.8),
        (Truncation(top_k=9), 1.0),
        (Truncation(min_p=0.2), 0.95),  # at least 0.1
        (Truncation(min_p=0.5), 0.8),
        (Truncation(top_k=3, top_p=0.55), 0.8),  # 0.5 / 0.95 is below 0.55
        (Truncation(top_p=0.6, min_p=0.5), 0.5),  # first 0.5 and 0.3 stay, of which 0.5 has 0.625
        (Truncation(top_p=0.6, min_p=0.5, min_p_first=False), 0.8),
    ],
)
def test_mass_by_hand(truncation, mass):
    found = log_kept(FOUR.log(), torch.eye(4, dtype=torch.float64), torch.tensor([0]), truncation)
    assert found.item() == pytest.approx(math.log(mass), abs=1e-12)


def test_a_drawn_token_is_kept_whatever_rounding_says():
    found = log_kept(FOUR.log(), torch.eye(4, dtype=torch.float64), torch.tensor([3]), Truncation(top_p=0.3))
    assert found.item() == pytest.approx(math.log(0.55), abs=1e-12)


@pytest.mark.parametrize("top_k", [0, 3, 40])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_the_set_is_that_of_the_sampler(top_k, top_p, min_p):
    torch.manual_seed(0)
    scores = torch.randn(200, 37) * 2
    cut = scores
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        cut = cut if warper is None else warper(torch.zeros(200, 1), cut)
    found = Truncation(top_p, top_k, min_p, min_p_first=False).kept(scores.log_softmax(-1))
    assert torch.equal(found, cut > -math.inf)


@pytest.mark.parametrize("tile", [1, 10**6])
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (2.0, True)])
def test_gradient(tile, softcap, bias):
    torch.manual_seed(1)
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(11, dtype=torch.float64, requires_grad=True) if bias else None
    ids, truncation = torch.arange(6), Truncation(top_p=0.7, top_k=6)
    inputs = [x for x in (hidden, weight, shift) if x is not None]
    factors = torch.linspace(-1, 2, 6, dtype=torch.float64)

    raw = 1.5 * (hidden @ weight.t() + (0 if shift is None else shift))
    logps = ((raw if softcap is None else softcap * (raw / softcap).tanh()) / 0.7).log_softmax(-1)
    keep = truncation.kept(logps.detach())
    keep[torch.arange(6), ids] = True
    expected = logps.masked_fill(~keep, -math.inf).logsumexp(-1)
    wanted = torch.autograd.grad((factors * expected).sum(), inputs)

    settings = {"bias": shift, "temperature": 0.7, "logit_scale": 1.5, "softcap": softcap, "tile": tile}
    found = log_kept(hidden, weight, ids, truncation, **settings)
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(torch.autograd.grad((factors * found).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_a_constant_advantage_pulls_nowhere_only_over_the_kept_tokens():
    """E_q[grad log q] = 0 and E_q[grad log p] = grad log Z, by enumeration of what can be drawn."""
    truncation, eye = Truncation(top_p=0.79), torch.eye(4, dtype=torch.float64)
    logits = FOUR.log().clone().requires_grad_()
    tokens = truncation.kept(FOUR.log())[0].nonzero().flatten()
    rows = logits.expand(len(tokens), -1)
    log_z = log_kept(rows, eye, tokens, truncation)
    logps = rows.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    q = (logps - log_z).detach().exp()
    (over_kept,) = torch.autograd.grad((q * (logps - log_z)).sum(), logits, retain_graph=True)
    (over_all,) = torch.autograd.grad((q * logps).sum(), logits, retain_graph=True)
    (of_mass,) = torch.autograd.grad(log_z[0], logits)
    torch.testing.assert_close(over_kept, torch.zeros_like(over_kept), atol=1e-12, rtol=0)
    torch.testing.assert_close(over_all, of_mass)
    assert of_mass.abs().max() > 0.1

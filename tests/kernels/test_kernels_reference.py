"""Policy against reference in one pass: values gradients of full logits in float64, and TRL's head."""

import copy

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from posttrain.kernels import LMHead, score_against_reference

N, H, V = 11, 7, 53
DOUBLE = torch.float64


def head(seed, *, bias=False, dtype=DOUBLE, width=H, **shape):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LMHead(torch.nn.Linear(width, V, bias=bias, dtype=DOUBLE).to(dtype), **shape)


def states(seed, rows=N, width=H, dtype=DOUBLE):
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, width, generator=draw, dtype=DOUBLE)).to(dtype).requires_grad_()


def tokens(rows=N):
    return torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(3))


def logits(hidden, head):
    z = torch.nn.functional.linear(hidden, head.module.weight, head.module.bias) * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def full(hidden, head, ref_hidden, ref_head, ids):
    """What is to come out, from (N, V) tensors."""
    z = logits(hidden, head)
    log_p = z.log_softmax(-1)
    log_q = logits(ref_hidden, ref_head).log_softmax(-1).detach()
    q = log_q.exp()
    p = log_p.exp()
    return {
        "logps": log_p.gather(1, ids[:, None])[:, 0],
        "ref_logps": log_q.gather(1, ids[:, None])[:, 0],
        "kl": torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1),
        "entropies": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == ids,
        "log_sum_sq_probs": (p * p).sum(-1).log(),
    }


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 1.5, "logit_scale": 2.0},
    "temperature": {"temperature": 0.7, "softcap": 3.0, "bias": True},
}


@pytest.mark.parametrize("tile", [1, 37, 10**6])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_full_logits(case, tile):
    hidden, ref_hidden, ids = states(1), states(2, width=5), tokens()
    policy, reference = head(1, **CASES[case]), head(2, width=5, **CASES[case])
    with torch.no_grad():
        ids[4] = logits(hidden, policy)[4].argmax()
    found = score_against_reference(
        hidden, policy, ref_hidden, reference, ids, log_sum_sq_probs=True, tile=tile
    )
    wanted = full(hidden, policy, ref_hidden, reference, ids)
    for name, value in wanted.items():
        assert torch.allclose(getattr(found, name), value, rtol=1e-12, atol=1e-12), name
    assert found.is_top1[4]
    assert not found.is_top1.all()
    assert not found.entropies.requires_grad
    assert not found.ref_logps.requires_grad
    factors = torch.linspace(-1, 2, N, dtype=DOUBLE), torch.linspace(3, -1, N, dtype=DOUBLE)
    inputs = [hidden, *policy.module.parameters()]
    both = [
        torch.autograd.grad((scores["logps"] * factors[0] + scores["kl"] * factors[1]).sum(), inputs)
        for scores in (vars(found), wanted)
    ]
    for a, b in zip(*both, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 4), slice(6, 7), slice(3, 11)])
def test_gradient_of_a_part_of_the_rows(rows):
    """The KL of a stopped side has no gradient, and its reference is then not computed again."""
    hidden, ref_hidden, ids, policy = states(1), states(2), tokens(), head(1)
    found = score_against_reference(hidden, policy, ref_hidden, policy, ids, tile=40)
    wanted = full(hidden, policy, ref_hidden, policy, ids)
    inputs = [hidden, policy.module.weight]
    sums = [scores["logps"].sum() - 0.5 * scores["kl"][rows].sum() for scores in (vars(found), wanted)]
    for a, b in zip(*(torch.autograd.grad(value, inputs) for value in sums), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("term", ["logps", "kl"])
def test_one_term_alone(term):
    hidden, ref_hidden, ids, policy, reference = states(1), states(2), tokens(), head(1), head(2)
    found = score_against_reference(hidden, policy, ref_hidden, reference, ids)
    wanted = full(hidden, policy, ref_hidden, reference, ids)
    (a,) = torch.autograd.grad(getattr(found, term).sum(), hidden)
    (b,) = torch.autograd.grad(wanted[term].sum(), hidden)
    assert torch.allclose(a, b, atol=1e-12)
    assert ref_hidden.grad is None


def test_equal_models_have_no_divergence_at_all():
    hidden, ids, policy = states(1, dtype=torch.float32), tokens(), head(1, dtype=torch.float32)
    found = score_against_reference(
        hidden, policy, hidden.detach().clone(), copy.deepcopy(policy), ids, tile=90
    )
    assert found.kl.tolist() == [0.0] * N
    assert torch.equal(found.logps, found.ref_logps)


def test_no_rows():
    hidden, policy = states(1, rows=0), head(1, bias=True)
    found = score_against_reference(
        hidden, policy, states(2, rows=0), policy, tokens(0), log_sum_sq_probs=True
    )
    assert {value.shape for value in vars(found).values()} == {(0,)}
    assert found.is_top1.dtype == torch.bool
    grads = torch.autograd.grad(found.logps.sum() + found.kl.sum(), [hidden, policy.module.weight])
    assert grads[1].abs().max() == 0


@pytest.mark.parametrize("grown", [False, True])
def test_tokens_that_the_reference_excludes_add_nothing(grown):
    """Padded vocabularies: a logit of -inf under both models, or under the reference alone."""
    hidden, ref_hidden, ids = states(1), states(2), tokens() % (V - 6)
    policy, reference = head(1, bias=True), head(2, bias=True)
    with torch.no_grad():
        reference.module.bias[-6:] = -torch.inf
        if not grown:
            policy.module.bias[-6:] = -torch.inf
    found = score_against_reference(hidden, policy, ref_hidden, reference, ids, tile=60)
    wanted = full(hidden, policy, ref_hidden, reference, ids)
    for name in ("logps", "ref_logps", "kl", "entropies"):
        assert torch.allclose(getattr(found, name), wanted[name], atol=1e-12)
    (grad,) = torch.autograd.grad((found.logps + found.kl).sum(), hidden)
    p, q = (logits(s, h).softmax(-1) for s, h in ((hidden, policy), (ref_hidden, reference)))
    slope = torch.nn.functional.one_hot(ids, V) - p + p - q
    assert torch.allclose(grad, slope @ policy.module.weight, atol=1e-12)


def test_a_token_that_only_the_policy_excludes_is_infinitely_far():
    policy, reference = head(1, bias=True), head(2, bias=True)
    with torch.no_grad():
        policy.module.bias[-1] = -torch.inf
    found = score_against_reference(states(1), policy, states(2), reference, tokens() % (V - 1))
    assert torch.isinf(found.kl).all()
    assert torch.isfinite(found.logps).all()


def test_tiny_reference_probabilities_do_not_underflow_to_nan():
    hidden, policy = states(1, dtype=torch.float32), head(1, dtype=torch.float32, logit_scale=1.0)
    reference = head(1, dtype=torch.float32, logit_scale=400.0)
    found = score_against_reference(hidden, policy, hidden, reference, tokens())
    wanted = full(hidden.double(), head(1), hidden.double(), head(1, logit_scale=400.0), tokens())
    assert torch.allclose(found.kl.double(), wanted["kl"], rtol=1e-3)  # logits of some 2000


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_accumulated_in_float32(tied, autocast):
    """The result is that of float64 on the rounded inputs, also under autocast."""
    half = torch.bfloat16
    hidden, ref_hidden, ids = states(1, dtype=half), states(2, dtype=half), tokens()
    policy = head(1, dtype=half)
    reference = policy if tied else head(2, dtype=half)
    with torch.autocast("cpu", half, enabled=autocast):
        found = score_against_reference(hidden, policy, ref_hidden, reference, ids, tile=100)
    exact = [hidden.detach().double().requires_grad_(), ref_hidden.double()]
    heads = [LMHead(copy.deepcopy(h.module).double()) for h in (policy, reference)]
    wanted = full(exact[0], heads[0], exact[1], heads[1], ids)
    for name in ("logps", "ref_logps", "kl", "entropies", "mean_logits"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.allclose(getattr(found, name).double(), wanted[name], atol=3e-6), name
    (found.logps.sum() + found.kl.sum()).backward()
    (wanted["logps"].sum() + wanted["kl"].sum()).backward()
    for a, b in ((hidden, exact[0]), (policy.module.weight, heads[0].module.weight)):
        assert a.grad.dtype == half
        assert torch.allclose(a.grad.double(), b.grad, rtol=2**-8, atol=1e-4)


def test_frozen_head_costs_no_weight_gradient_and_may_be_shared():
    hidden, ref_hidden, ids, policy = states(1), states(2), tokens(), head(1)
    policy.module.requires_grad_(False)
    found = score_against_reference(hidden, policy, ref_hidden, policy, ids)
    (found.logps.sum() + found.kl.sum()).backward()
    assert policy.module.weight.grad is None
    wanted = full(again := states(1), policy, ref_hidden, policy, ids)
    (wanted["logps"].sum() + wanted["kl"].sum()).backward()
    assert torch.allclose(hidden.grad, again.grad, atol=1e-12)


def test_only_the_bias_trains():
    hidden, policy = states(1), head(1, bias=True)
    policy.module.weight.requires_grad_(False)
    score_against_reference(hidden, policy, states(2), policy, tokens()).kl.sum().backward()
    assert policy.module.weight.grad is None
    assert policy.module.bias.grad.abs().max() > 0


def test_statistics_are_those_trl_logs():
    hidden, ids = states(1, dtype=torch.float32), tokens()
    policy = head(1, dtype=torch.float32, bias=True, softcap=2.0, logit_scale=1.5)
    with torch.no_grad():
        policy.module.weight[7] = policy.module.weight[20]  # a tie, which the earlier token wins
        policy.module.bias[7] = policy.module.bias[20] = 9.0
        ids[:4] = torch.tensor([7, 20, 7, 20])
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    theirs = ChunkedLogProbFunction.apply(
        hidden, policy.module.weight, policy.module.bias, ids, 1.0, 16, 2.0, 1.5, outputs
    )
    for tile in (33, 10**6):
        found = score_against_reference(hidden, policy, hidden, policy, ids, log_sum_sq_probs=True, tile=tile)
        ours = (found.logps, found.entropies, found.log_sum_sq_probs, found.mean_logits, found.is_top1)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-5)
    assert found.is_top1[:4].tolist() == [True, False, True, False]


def test_what_does_not_fit_is_named():
    policy = head(1)
    with pytest.raises(ValueError, match="one row per token"):
        score_against_reference(states(1), policy, states(2, rows=3), policy, tokens())
    with pytest.raises(ValueError, match=r"\(V, H\): found \(11, 5\)"):
        score_against_reference(states(1, width=5), policy, states(2), policy, tokens())
    other = LMHead(torch.nn.Linear(H, V + 1, bias=False, dtype=DOUBLE))
    with pytest.raises(ValueError, match="found 53 and 54"):
        score_against_reference(states(1), policy, states(2), other, tokens())


def test_a_sharded_head_is_gathered_when_frozen_and_refused_when_trained():
    class Shard(torch.nn.Parameter):
        """Looks like a DTensor."""

        gathered = 0

        def full_tensor(self):
            Shard.gathered += 1
            return self.data

    policy = head(1)
    whole = policy.module.weight
    policy.module.weight = Shard(whole.data.clone())
    hidden, ref_hidden, ids = states(1), states(2), tokens()
    with pytest.raises(ValueError, match="sharded here"):
        score_against_reference(hidden, policy, ref_hidden, policy, ids)
    policy.module.weight.requires_grad_(False)
    found = score_against_reference(hidden, policy, ref_hidden, policy, ids)
    found.kl.sum().backward()
    assert Shard.gathered == 2  # once on the way there, once on the way back
    with torch.no_grad():
        policy.module.weight.requires_grad_()
        again = score_against_reference(hidden, policy, ref_hidden, policy, ids)
    assert torch.equal(found.kl, again.kl)


def test_no_tensor_of_tokens_times_vocabulary():
    """The largest tensor made on the way is a tile, whatever N is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return out

    hidden, ref_hidden, policy = states(1, rows=200), states(2, rows=200), head(1)
    with Watch():
        found = score_against_reference(hidden, policy, ref_hidden, policy, tokens(200), tile=400)
        (found.logps.sum() + found.kl.sum()).backward()
    assert largest <= 200 * H  # of tiles, hidden states and the weight; all logits would be 200 * 53

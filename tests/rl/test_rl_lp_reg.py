"""Lp-Reg against the numbers of its definition (arXiv 2510.03222) and against full-logits references."""

import math

import pytest
import support
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_rl_equals_trl import run, same_run
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.kernels import Scored, token_statistics
from posttrain.rl import ACE, LpReg, Spine
from posttrain.rl.gauges import Gauges
from posttrain.rl.lp_reg import k3, kth_smallest, log_quantile, lowest, proxy_gap
from posttrain.rl.method import Rollout, Setup, Tokens

P = [0.80, 0.15, 0.03, 0.012, 0.008]
SELECTION = [-0.05, -3.2, -0.6, -4.1, -0.02, -2.5, -0.9, -5.0, -0.3, -1.1]  # the first six have A < 0


def near(values, tolerance=5e-8):
    return pytest.approx(values, abs=tolerance)


def gaps(p=P, kappa=0.02):
    rows = torch.tensor(p, dtype=torch.float64).log().expand(len(p), -1)
    ids = torch.arange(len(p))
    return proxy_gap(token_statistics(rows, torch.eye(len(p), dtype=torch.float64), ids, min_ratio=kappa))


# ---- pure functions -----------------------------------------------------------------------------------


def test_proxy_of_the_sheet():
    gap = gaps()
    assert gap[:3].tolist() == near([0.0202027] * 3)
    assert gap[3:].tolist() == [-math.inf] * 2
    proxy = (torch.tensor(P, dtype=torch.float64).log() + gap).exp()
    assert proxy.tolist() == near([0.8163265, 0.1530612, 0.0306122, 0, 0])


@pytest.mark.parametrize(
    ("now", "d", "value", "slope"),
    [(0.03, 0.0202027, 2.0546e-4, -0.0204082), (0.012, 0.9364934, 0.6145270, -1.5510204)],
    ids=["on-policy", "drifted"],
)
def test_k3_of_the_sheet(now, d, value, slope):
    live = torch.tensor(now, dtype=torch.float64).log().requires_grad_()
    log_ratio = math.log(0.03) + gaps()[2] - live
    estimate = k3(log_ratio)
    (gradient,) = torch.autograd.grad(estimate, live)
    assert log_ratio.item() == near(d)
    assert estimate.item() == near(value)
    assert gradient.item() == near(slope)


def test_k3_bound():
    d = torch.tensor(
        [-1.0, 0.0, 2.5, 2.6108, 2.6110, 2.7, 90.0, 1e5], dtype=torch.float64, requires_grad=True
    )
    estimate = k3(d)
    (slope,) = torch.autograd.grad(estimate.sum(), d)
    assert estimate[:2].tolist() == near([math.exp(-1), 0])
    assert estimate[2].item() == near(math.exp(2.5) - 3.5)
    assert estimate[4:].tolist() == [10.0] * 4
    assert slope[:4].tolist() == near([math.exp(x) - 1 for x in (-1, 0, 2.5, 2.6108)])
    assert slope[4:].tolist() == [0.0] * 4  # not NaN where exp overflows


def test_selection_of_the_sheet():
    logps = torch.tensor(SELECTION).view(2, 5)
    negative = (torch.arange(10) < 6).view(2, 5)
    for rho, expected in {0.01: [], 0.3: [], 0.5: [1, 3, 5], 1.0: [0, 1, 2, 3, 4, 5]}.items():
        assert lowest(logps, negative, rho).flatten().nonzero().flatten().tolist() == expected
    values = torch.tensor(SELECTION[:6])
    assert kth_smallest(values, 0.5).item() == near(-2.5)
    assert kth_smallest(values, 0.3) == -math.inf
    assert kth_smallest(values[:0], 0.5) == -math.inf


def test_percentile_of_the_sheet():
    logps = torch.tensor(SELECTION, dtype=torch.float64)
    delta = log_quantile(logps, 0.3)
    assert delta.exp().item() == near(0.0696882)
    below = (logps < delta) & (torch.arange(10) < 6)
    assert below.nonzero().flatten().tolist() == [1, 3]
    assert log_quantile(logps[:0], 0.3) == -math.inf
    assert log_quantile(logps, 1.0).item() == near(-0.02)


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=40), st.floats(0, 1))
def test_quantile_is_the_usual_one(values, rho):
    logps = torch.tensor(values, dtype=torch.float64)
    assert log_quantile(logps, rho).exp().item() == pytest.approx(
        torch.quantile(logps.exp(), rho).item(), rel=1e-9
    )


def test_a_quantile_that_is_a_value_is_that_value():
    # through exp and log it can land a rounding step above, and "below the quantile" would let it through
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        logps = -20 * torch.rand(31, generator=draw)
        for rho, index in [(0.1, 3), (0.7, 21), (1.0, 30), (0.0, 0)]:
            assert torch.equal(log_quantile(logps, rho), logps.sort().values[index])
    assert log_quantile(torch.full((4,), -0.1), 0.5) == torch.tensor(-0.1)
    assert log_quantile(torch.tensor([-math.inf, math.log(0.5)]), 0.5).item() == near(math.log(0.25), 1e-6)


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=40), st.floats(0, 1))
def test_lowest_properties(values, rho):
    logps = torch.tensor(values, dtype=torch.float64).unsqueeze(0)
    among = torch.arange(len(values)).unsqueeze(0) % 3 > 0
    chosen = lowest(logps, among, rho)
    k = int(rho * int(among.sum()))
    assert int(chosen.sum()) == (k if k > 1 else 0)
    assert not (chosen & ~among).any()
    if chosen.any() and (among & ~chosen).any():
        assert logps[chosen].max() <= logps[among & ~chosen].min()


def test_expectation_of_the_k3_gradient_is_the_one_of_the_full_kl():
    """E_{y~pi}[(1 - px/pi) grad log pi] = grad KL(px || pi) on a random 7-way categorical."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    proxy = torch.softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0)
    logps = torch.log_softmax(logits, 0)
    sampled = (logps.detach().exp() * k3(proxy.log() - logps)).sum()
    full = (proxy * (proxy.log() - logps)).sum()
    left, right = (torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (sampled, full))
    assert left.abs().max() > 0.01
    assert torch.allclose(left, right, atol=1e-15, rtol=0)


# ---- the method ---------------------------------------------------------------------------------------


def tokens(logps, gap, advantages, *, old=None, mask=None, tied=None, **overrides):
    logps = torch.as_tensor(logps, dtype=torch.float64)
    fields = {
        "logps": logps,
        "entropies": torch.zeros_like(logps),
        "old_logps": logps.detach() if old is None else torch.as_tensor(old, dtype=torch.float64),
        "ref_logps": None,
        "advantages": torch.as_tensor(advantages, dtype=torch.float64),
        "reward": torch.zeros(len(logps), dtype=torch.float64),
        "tied": torch.zeros(len(logps), dtype=torch.bool) if tied is None else torch.tensor(tied),
        "mask": torch.ones_like(logps, dtype=torch.long) if mask is None else torch.as_tensor(mask),
        "gauges": Gauges(),
        "carry": {"lp_reg/gap": torch.as_tensor(gap, dtype=torch.float64)},
    }
    return Tokens(**(fields | overrides))


OPEN = 0.1  # a gap at which the gate is open on-policy
TERM = math.exp(OPEN) - OPEN - 1


def test_drifted_token_is_pushed_up():
    """A = -1, r = 0.4: with the clip range [0, 10] the token's loss is 1.0145270 and its slope -1.1510204."""
    live = torch.tensor([[0.012, 0.5]], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([[0.03, 0.5]], dtype=torch.float64).log()
    gap = torch.stack([gaps()[2], gaps()[0]]).unsqueeze(0)
    term = LpReg(rho=1.0).token_penalty(tokens(live, gap, [-1.0], old=old))
    loss = (live - old).exp() + term
    (slope,) = torch.autograd.grad(loss[0, 0], live, retain_graph=True)
    assert loss[0, 0].item() == near(1.0145270)
    assert slope[0].tolist() == near([-1.1510204, 0])


def test_only_negative_valid_untied_tokens_get_the_term():
    logps = [[-3.0, -4.0, -5.0], [-6.0, -7.0, -8.0], [-9.0, -9.5, -9.9], [-2.0, -2.5, -2.7]]
    seen = tokens(
        logps,
        torch.full((4, 3), OPEN),
        [-1.0, 1.0, -1e-6, 0.0],
        mask=[[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
        tied=[False, False, True, False],
    )
    term = LpReg(rho=1.0, beta=2.0).token_penalty(seen)
    assert term.tolist() == [near([2 * TERM] * 2 + [0]), *[[0.0] * 3] * 3]


def test_the_positive_branch_is_the_twin_of_the_other():
    logps, gap = [[-3.0, -4.0, -5.0], [-6.0, -7.0, -8.0]], torch.full((2, 3), OPEN)
    term = LpReg(rho=1.0, rho_pos=0.67).token_penalty(tokens(logps, gap, [-1.0, 1.0]))
    assert term.tolist() == [near([TERM] * 3), near([0, TERM, TERM])]
    twin = LpReg(rho=0.67, rho_pos=1.0).token_penalty(tokens(logps, gap, [1.0, -1.0]))
    assert torch.equal(twin, term)
    alone = LpReg(rho=0.0, rho_pos=0.34)
    assert not alone.neutral
    assert not alone.token_penalty(tokens(logps, gap, [-1.0, 1.0])).any()  # k = 1


def test_advantages_per_token():
    advantages = [[-1.0, 1.0, -1.0, -1.0]]
    term = LpReg(rho=1.0).token_penalty(tokens([[-1.0] * 4], [[OPEN] * 4], advantages))
    assert (term > 0).tolist() == [[True, False, True, True]]


def test_the_gate_needs_a_kept_token_below_its_proxy():
    # candidates all; dropped, nothing filtered, rounding, risen above the proxy, below it
    gap = [[-math.inf, 0.0, 5e-7, 0.1, 0.1]]
    old = [[-2.0, -2.0, -2.0, -2.0, -2.0]]
    live = [[-2.0, -2.0, -2.0, -1.8, -2.05]]
    term = LpReg(rho=1.0).token_penalty(tokens(live, gap, [-1.0], old=old))
    d = 0.15
    assert term.tolist() == [near([0, 0, 0, 0, math.exp(d) - d - 1])]
    # off-policy the gate opens where nothing was filtered, once the token has fallen
    fallen = LpReg(rho=1.0).token_penalty(tokens([[-2.3] * 2], [[0.0] * 2], [-1.0], old=[[-2.0] * 2]))
    assert fallen.tolist() == [near([math.exp(0.3) - 1.3] * 2)]
    # the paper's gate asks for a kept token only: above its proxy it is pulled down
    seen = tokens([live[0] + [-0.1]], [gap[0] + [0.1]], [[-1.0] * 5 + [1.0]], old=[old[0] + [-0.1]])
    paper = LpReg(rho=1.0, gate="paper").token_penalty(seen)
    assert paper[0, 5] == 0
    assert paper[0, 3].item() == near(math.exp(-0.1) + 0.1 - 1)
    assert paper[0, 0] == 0


def test_filtered_tokens_count_among_the_lowest():
    gap = torch.full((1, 10), OPEN)
    gap[0, [3, 5]] = -math.inf
    logps, advantages = [SELECTION], [[-1.0] * 6 + [1.0] * 4]
    term = LpReg(rho=0.5).token_penalty(tokens(logps, gap, advantages))
    assert term.nonzero()[:, 1].tolist() == [1]
    for inactive in (0.01, 0.3):
        assert not LpReg(rho=inactive).token_penalty(tokens(logps, gap, advantages)).any()


def test_paper_gate_of_the_sheet():
    gap, advantages = torch.full((1, 10), OPEN), [[-1.0] * 6 + [1.0] * 4]
    term = LpReg(rho=0.3, gate="paper").token_penalty(tokens([SELECTION], gap, advantages))
    assert term.nonzero()[:, 1].tolist() == [1, 3]


def test_live_proxy_is_measured_from_the_live_policy():
    seen = {"logps": [[-3.0, -3.0]], "gap": [[OPEN, OPEN]], "advantages": [-1.0], "old": [[-2.0, -2.5]]}
    assert LpReg(rho=1.0, proxy="live").token_penalty(tokens(**seen)).tolist() == [near([TERM] * 2)]
    old = LpReg(rho=1.0).token_penalty(tokens(**seen))
    assert old.tolist() == [near([math.exp(1.1) - 2.1, math.exp(0.6) - 1.6])]


def test_another_methods_mask_is_applied_after_the_selection():
    gap, advantages = torch.full((1, 10), OPEN), [[-1.0] * 6 + [1.0] * 4]
    focus = torch.zeros(1, 10, dtype=torch.bool)
    focus[0, [0, 2, 3]] = True
    seen = {"logps": [SELECTION], "gap": gap, "advantages": advantages, "focus": focus}
    assert LpReg(rho=0.5).token_penalty(tokens(**seen)).nonzero()[:, 1].tolist() == [3]
    everywhere = LpReg(rho=0.5, outside_focus=True).token_penalty(tokens(**seen))
    assert everywhere.nonzero()[:, 1].tolist() == [1, 3, 5]


def test_gradient_flows_through_the_policy_alone():
    live = torch.tensor([[-3.0, -4.0, -0.1]], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([[0.2, 0.4, -math.inf]], dtype=torch.float64)
    old = torch.tensor([[-2.9, -3.0, -0.1]], dtype=torch.float64)

    def term(logps):
        return LpReg(rho=1.0, beta=0.7).token_penalty(tokens(logps, gap, [-1.0], old=old))

    assert torch.autograd.gradcheck(term, live)
    (gradient,) = torch.autograd.grad(term(live).sum(), live)
    assert gradient.tolist() == [near([0.7 * (1 - math.exp(0.3)), 0.7 * (1 - math.exp(1.4)), 0])]


@given(st.integers(0, 4), st.integers(0, 3))
def test_padding_and_order_change_nothing(columns, shift):
    logps = torch.tensor([SELECTION, [x - 0.3 for x in SELECTION]], dtype=torch.float64)
    gap = torch.full((2, 10), OPEN)
    plain = LpReg(rho=0.4).token_penalty(tokens(logps, gap, [-1.0, -0.5]))
    rows = [1, 0] if shift % 2 else [0, 1]
    pad = torch.nn.functional.pad
    padded = tokens(
        pad(logps, (0, columns), value=-30.0)[rows],
        pad(gap, (0, columns), value=OPEN),
        [-0.5, -1.0] if shift % 2 else [-1.0, -0.5],
        mask=pad(torch.ones(2, 10, dtype=torch.long), (0, columns)),
    )
    found = LpReg(rho=0.4).token_penalty(padded)
    assert torch.equal(found[:, :10][rows], plain)
    assert not found[:, 10:].any()


def test_no_negative_rows_and_empty_rows():
    for advantages, mask in (([1.0, 0.0], [[1] * 3] * 2), ([-1.0, -1.0], [[0] * 3] * 2)):
        seen = tokens([[-9.0] * 3] * 2, torch.full((2, 3), OPEN), advantages, mask=mask)
        for method in (LpReg(rho=1.0), LpReg(rho=1.0, gate="paper")):
            assert not method.token_penalty(seen).any()


def test_gauges():
    gap = torch.full((1, 10), OPEN)
    gap[0, 3] = -math.inf
    seen = tokens([SELECTION], gap, [[-1.0] * 6 + [1.0] * 4], mask=[[1] * 9 + [0]])
    LpReg(rho=0.5).token_penalty(seen)

    class OneProcess:
        def gather(self, tensor):
            return tensor

    values, _ = seen.gauges.flush(OneProcess())
    assert values == {
        "negative_tokens": 6,
        "candidates": 3,
        "gated_tokens": 2,
        "gated_share": near(2 / 9),
        "log_ratio_mean": near(OPEN),
        "bounded_share": 0,
    }


# ---- thresholds over the generation batch -------------------------------------------------------------


def rollout(old, advantages, **overrides):
    old = torch.tensor(old)
    fields = {
        "rewards": torch.zeros(len(old), 1),
        "reward": torch.zeros(len(old)),
        "tied": torch.zeros(len(old), dtype=torch.bool),
        "advantages": torch.tensor(advantages),
        "mask": torch.ones_like(old, dtype=torch.long),
        "old_logps": old,
        "ref_logps": None,
        "gauges": Gauges(),
    }
    return Rollout(**(fields | overrides))


@pytest.mark.parametrize("gate", ["code", "paper"])
def test_threshold_is_taken_over_all_ranks(gate):
    """This rank has five columns, the other six; NaN marks what is not there."""
    mine = rollout([SELECTION[:5]], [-1.0])
    theirs = torch.tensor([[-2.5, math.nan, math.nan, math.nan, math.nan, math.nan]])
    if gate == "paper":
        theirs = torch.tensor([[-2.5, *SELECTION[6:], math.nan]])
    mine.gather = lambda values: torch.cat([torch.nn.functional.pad(values, (0, 1), value=math.nan), theirs])
    method = LpReg(rho=0.5 if gate == "code" else 0.3, scope="generation_batch", gate=gate)
    assert torch.equal(method.advantages(mine), mine.advantages)
    threshold = mine.carry["lp_reg/threshold"]
    assert threshold.tolist() == near([-2.5 if gate == "code" else math.log(0.0696882)], 1e-6)

    seen = tokens([SELECTION[:5]], torch.full((1, 5), OPEN), [-1.0])
    seen.carry.update(mine.carry)
    assert method.token_penalty(seen).nonzero()[:, 1].tolist() == [1, 3]


def test_threshold_leaves_out_tied_positive_and_masked_tokens():
    batch = rollout(
        [[-9.0, -1.0], [-8.0, -7.0], [-6.0, -5.0], [-2.0, -3.0]],
        [1.0, -1e-6, -1.0, -1.0],
        tied=torch.tensor([False, True, False, False]),
        mask=torch.tensor([[1, 1], [1, 1], [0, 1], [1, 1]]),
    )
    LpReg(rho=0.7, scope="generation_batch").advantages(batch)  # of -5, -2, -3 the second
    assert batch.carry["lp_reg/threshold"].tolist() == [-3.0] * 4
    few = rollout([[-5.0, -6.0]], [-1.0])
    LpReg(rho=0.5, scope="generation_batch").advantages(few)
    assert few.carry["lp_reg/threshold"].tolist() == [-math.inf]


# ---- configuration ------------------------------------------------------------------------------------


def found(method=None, **trainer):
    fields = {"epsilon": 1.0, "loss_type": "dapo"} | trainer
    return [(c.field, c.fatal) for c in (method or LpReg()).conflicts(Setup(trainer=fields))]


def test_conflicts():
    assert found() == []
    for loss_type in ("grpo", "bnpo", "dr_grpo"):
        assert found(loss_type=loss_type) == []
    for loss_type in ("cispo", "sapo", "vespo", "luspo"):
        assert found(loss_type=loss_type) == [("loss_type", True)]
    assert found(importance_sampling_level="sequence") == [("importance_sampling_level", True)]
    assert found(delta=4.0) == [("delta", True)]
    assert found(delta=10.0) == []
    assert found(epsilon=0.2) == [("epsilon", False)]
    assert found(entropy_coef=0.01) == [("entropy_coef", False)]
    assert found(use_adaptive_entropy=True) == [("use_adaptive_entropy", False)]


def test_full_kl_needs_the_policy_that_generated():
    off_policy = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    full = LpReg(kl="forward")
    assert found(full, **off_policy) == [("kl", True)]
    assert found(full, num_iterations=2) == [("kl", True)]
    assert found(LpReg(kl="forward", proxy="live"), **off_policy) == []
    assert found(full, gradient_accumulation_steps=4, steps_per_generation=2) == []
    assert found(full, gradient_accumulation_steps=4) == []


def test_refused_by_the_trainer(tmp_path):
    with pytest.raises(ValueError, match=r"found loss_type='cispo': use one of grpo, bnpo, dr_grpo, dapo"):
        build(tmp_path, [LpReg()], loss_type="cispo")


def test_parameters_are_checked():
    for field, value in {"beta": -1, "rho": 1.5, "kappa": 1.1}.items():
        with pytest.raises(ValidationError):
            LpReg(**{field: value})
    assert LpReg(beta=0).neutral
    assert LpReg(rho=0).neutral
    assert not LpReg(kappa=0).neutral  # off-policy it still holds tokens at their old probability


# ---- through the trainer ------------------------------------------------------------------------------


def build(tmp_path, methods=(), **settings):
    adapter = settings.pop("adapter", False)
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, **({"epsilon": 1.0, "epsilon_high": 9.0} | settings)),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora() if adapter else None,
        methods=list(methods),
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def sharpen(trainer, scale=6.0):
    """Make the distributions peaked, so that the filter drops something."""
    with torch.no_grad():
        trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight.mul_(scale)


def generate(trainer):
    trainer.reward_funcs = [
        lambda completions, **kwargs: [float(i % 4 == 0) for i in range(len(completions))]
    ]
    return trainer._generate_and_score_completions([{"prompt": f"say {i // 4}?"} for i in range(8)])


def full_logps(model, batch, temperature):
    """(B, C, V) log-probabilities in float64 from plain logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    columns = batch["completion_ids"].size(1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -columns - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1)


def reference_term(live_all, old_all, batch, *, rho, kappa, kl="k3"):
    """The term per token, written down anew from full distributions."""
    ids = batch["completion_ids"].unsqueeze(2)
    live = live_all.gather(2, ids)[..., 0]
    q = old_all.exp()
    q = torch.where(q >= kappa * q.amax(-1, keepdim=True), q, 0.0)
    q = q / q.sum(-1, keepdim=True)
    proxy = q.log().gather(2, ids)[..., 0]
    negative = ((batch["advantages"] < 0)[:, None] & batch["completion_mask"].bool()).flatten()
    order = sorted(negative.nonzero().flatten().tolist(), key=lambda i: live.flatten()[i].item())
    chosen = torch.zeros_like(negative)
    chosen[order[: math.floor(rho * len(order))]] = True
    gate = chosen.view_as(live) & (proxy - live.detach() > 1e-6)
    if kl == "forward":
        term = torch.where(q > 0, q * (q.log() - live_all), 0.0).sum(-1)
    else:
        term = torch.exp(proxy - live) - (proxy - live) - 1
    return torch.where(gate, torch.where(gate, term, 0.0).clamp(max=10), 0.0), gate, chosen


def integration_example(tmp_path, monkeypatch, methods, **settings):
    """Return the loss and its gradients by log-probability and by entropy."""
    old = torch.tensor([[-0.1, -0.7, -1.2], [-0.2, -3.0, -2.5]], dtype=torch.float64)
    live = torch.tensor([[-0.08, -0.6, -1.2], [-0.25, -3.4, -2.5]], dtype=torch.float64, requires_grad=True)
    entropies = torch.tensor([[0.1, 1.0, 1.5], [0.2, 1.8, 0.9]], dtype=torch.float64, requires_grad=True)
    # row 0 has A > 0: never gated, whatever its proxy
    proxy = torch.tensor([[9.0, 9.0, 9.0], [-0.18, -2.9, -math.inf]], dtype=torch.float64)
    monkeypatch.setattr(
        TRLGRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda *args, **kwargs: (live, entropies, None),
    )
    ids = torch.full((2, 3), 5)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
        "old_per_token_logps": old,
        "ref_per_token_logps": old - torch.tensor([[0.1], [0.2]], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(6),
        "posttrain/reward": torch.tensor([1.0, 0.0]),
        "posttrain/tied": torch.tensor([False, False]),
        "posttrain/carry/lp_reg/gap": proxy - old,
    }
    # off-policy, as the example is
    trainer = build(tmp_path, methods, loss_type="dapo", num_iterations=2, **settings)
    loss = trainer.compute_loss(trainer.model, batch)
    return loss.item(), *torch.autograd.grad(loss, [live, entropies], allow_unused=True)


def test_integration_example(tmp_path, monkeypatch):
    rows = {
        -0.0839704646: [],
        0.2647562905: [ACE()],
        0.2895431689: [ACE(), LpReg(rho=0.67)],
    }
    found = [integration_example(tmp_path, monkeypatch, methods) for methods in rows.values()]
    assert [loss for loss, *_ in found] == near(list(rows), 5e-11)
    (_, without, _), (_, with_term, _) = found[1:]
    expected = torch.zeros(2, 3, dtype=torch.float64)
    expected[1, 1] = (1 - math.exp(0.5)) / 6
    assert torch.allclose(with_term - without, expected, atol=1e-12)


@pytest.mark.parametrize("methods", [[], [ACE(), Spine(fork_ratio=0.5)]], ids=["alone", "composed"])
def test_the_clip_does_not_stop_a_gated_token(methods, tmp_path, monkeypatch):
    """r is below 1 - epsilon at the gated token alone: the usual clip range gives what the wide one gives."""
    both = [
        integration_example(tmp_path, monkeypatch, [*methods, LpReg(rho=rho)], **clip)
        for rho in (0.67, 0.0)
        for clip in ({}, {"epsilon": 0.2, "epsilon_high": 0.28})
    ]
    (wide, wide_slope, _), (tight, tight_slope, _), (without, *_), (clipped, clipped_slope, _) = both
    assert tight == near(wide, 1e-12)
    assert torch.allclose(tight_slope, wide_slope, atol=1e-12)
    assert clipped > without  # (0.8 - 0.67) / 6 for each unit of weight
    assert clipped_slope[1, 1].abs() < 1e-6 < tight_slope[1, 1].abs()


def test_unclipping_what_trl_takes_out_is_refused():
    for field, value in (("top_entropy_quantile", 0.2), ("off_policy_mask_threshold", 0.5)):
        assert (field, True) in found(epsilon=0.2, **{field: value})
        assert found(epsilon=1.0, **{field: value}) == []


@pytest.mark.parametrize("turn", range(3))
def test_integration_example_of_all(turn, tmp_path, monkeypatch):
    """ACE, Lp-Reg and SPINE's mask and band: 0.1759029586, in any order."""
    methods = [ACE(), LpReg(rho=0.67), Spine(fork_ratio=0.5)]
    loss, by_logp, by_entropy = integration_example(tmp_path, monkeypatch, methods[turn:] + methods[:turn])
    assert loss == near(0.1759029586, 5e-11)
    assert by_logp[0].tolist() == near([0, -0.1841951530, -0.1666666667], 5e-11)
    assert by_logp[1].tolist() == near([0, 0.0927678765, 0.2996898116], 5e-11)
    assert by_entropy[0].tolist() == near([0, -0.0016666667, 0.0016666667], 5e-11)
    assert by_entropy[1].tolist() == near([0, 0.0016666667, -0.0016666667], 5e-11)


SCHEDULES = [
    (loss, schedule, False)
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo")
    for schedule in ("on", "off", "live")
]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("loss_type", "schedule", "checkpointing"), [*SCHEDULES, ("dapo", "on", True), ("dapo", "off", True)]
)
def test_loss_and_gradient_are_those_of_full_logits(adapter, schedule, loss_type, checkpointing, tmp_path):
    """TRL's loss plus the term of the definition, from plain logits in float64.

    on: on-policy; off: two updates per rollout; live: the same with the proxy of the live policy.
    """
    off_policy = schedule != "on"
    method = LpReg(rho=0.5, kappa=0.3, beta=1.7, proxy="live" if schedule == "live" else "old")
    trainer = build(
        tmp_path,
        [method],
        adapter=adapter,
        loss_type=loss_type,
        temperature=0.8,
        num_iterations=2 if off_policy else 1,
        gradient_checkpointing=checkpointing,
    )
    sharpen(trainer)
    batch = generate(trainer)
    assert ("posttrain/carry/lp_reg/gap" in batch) == (schedule == "off")
    with torch.no_grad():
        old_all = full_logps(trainer.model, batch, 0.8)
        if off_policy:
            for name, p in trainer.model.named_parameters():
                if p.requires_grad:
                    generator = torch.Generator().manual_seed(len(name))
                    p.add_(0.05 * p.abs().mean().clamp(min=0.05) * torch.randn(p.shape, generator=generator))
    live_all = full_logps(trainer.model, batch, 0.8)
    if schedule != "off":
        old_all = live_all.detach()
    term, gate, chosen = reference_term(live_all, old_all, batch, rho=0.5, kappa=0.3)
    assert 0 < gate.sum() < chosen.sum()

    ours = trainer.compute_loss(trainer.model, dict(batch))
    trainer.hooked = False
    plain = trainer.compute_loss(trainer.model, dict(batch))
    expected = plain + trainer.aggregate(1.7 * term.float(), batch)
    assert (expected - plain).abs() > 1e-3
    assert ours.item() == pytest.approx(expected.item(), abs=2e-5)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    left, right = (torch.autograd.grad(loss, trained) for loss in (ours, expected))
    for a, b in zip(left, right, strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_full_kl_through_the_trainer(adapter, tmp_path):
    trainer = build(tmp_path, [LpReg(rho=0.5, kappa=0.3, kl="forward")], adapter=adapter, temperature=0.8)
    sharpen(trainer)
    batch = generate(trainer)
    live_all = full_logps(trainer.model, batch, 0.8)
    term, gate, _ = reference_term(live_all, live_all.detach(), batch, rho=0.5, kappa=0.3, kl="forward")
    ours = trainer.compute_loss(trainer.model, dict(batch))
    trainer.hooked = False
    expected = trainer.compute_loss(trainer.model, dict(batch)) + trainer.aggregate(term.float(), batch)
    assert gate.any()
    assert ours.item() == pytest.approx(expected.item(), abs=2e-5)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    left, right = (torch.autograd.grad(loss, trained) for loss in (ours, expected))
    for a, b in zip(left, right, strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "method", [LpReg(beta=0), LpReg(rho=0), LpReg(kappa=0, rho=0.5)], ids=["beta", "rho", "kappa"]
)
def test_neutral_settings_are_trl(method, adapter, tmp_path):
    settings = {"epsilon": 1.0, "epsilon_high": 9.0, "adapter": adapter, "steps": 8}
    upstream = run(TRLGRPOTrainer, tmp_path / "trl", **settings)
    same_run(run(GRPOTrainer, tmp_path / "ours", methods=[method], **settings), upstream)


def count_forwards(trainer, monkeypatch):
    calls = []
    backbone = trainer.accelerator.unwrap_model(trainer.model).base_model
    backbone.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize(
    ("method", "settings", "extra"),
    [
        (LpReg(rho=0.5), {}, 0),
        (LpReg(rho=0.5), {"num_iterations": 2}, 0),
        (LpReg(rho=0.5, proxy="live"), {"num_iterations": 2}, 0),
        (LpReg(rho=0.5, scope="generation_batch"), {}, 1),
        (LpReg(rho=0.5, scope="generation_batch"), {"num_iterations": 2}, 0),
    ],
    ids=["on-policy", "off-policy", "live", "batch", "batch-off-policy"],
)
def test_forwards_it_adds(method, settings, extra, tmp_path, monkeypatch):
    """On-policy none at all; a threshold over the rollout costs the old log-prob pass that TRL leaves out."""
    counts = {}
    for name, methods in {"plain": [LpReg(beta=0)], "ours": [method]}.items():
        trainer = build(tmp_path / name, methods, **settings)
        calls = count_forwards(trainer, monkeypatch)
        torch.manual_seed(0)
        batch = generate(trainer)
        trainer.compute_loss(trainer.model, batch)
        counts[name] = len(calls)
    assert counts["ours"] == counts["plain"] + extra


def test_the_head_sees_only_selected_tokens_on_policy(tmp_path, monkeypatch):
    trainer = build(tmp_path, [LpReg(rho=0.25)])
    batch = generate(trainer)
    seen = []
    original = Scored.statistics

    def spy(self, where, **kwargs):
        seen.append(int(where.sum()))
        return original(self, where, **kwargs)

    monkeypatch.setattr(Scored, "statistics", spy)
    trainer.compute_loss(trainer.model, batch)
    negative = int(batch["completion_mask"][batch["advantages"] < 0].sum())
    assert seen == [int(0.25 * negative)]
    assert trainer.live_head is None  # hidden states are not kept beyond the loss


def test_generation_batch_scope_does_not_depend_on_micro_batches(tmp_path):
    losses = {}
    for rows, steps in ((8, 1), (2, 4)):
        trainer = build(
            tmp_path / str(rows),
            [LpReg(rho=0.9, kappa=0.2, scope="generation_batch")],
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
        )
        sharpen(trainer)
        torch.manual_seed(0)
        batch = generate(trainer)
        parts = []
        for i in range(steps):
            part = {
                key: value[i * rows : (i + 1) * rows] if torch.is_tensor(value) and value.dim() else value
                for key, value in batch.items()
            }
            part["num_items_in_batch"] = batch["num_items_in_batch"]
            parts.append(trainer.compute_loss(trainer.model, part).item())
        losses[rows] = sum(parts)
        gated = trainer._metrics["train"]["lp_reg/gated_tokens"]
        assert sum(gated) > 0
    assert losses[8] == pytest.approx(losses[2], abs=1e-5)


def test_runs_and_logs(tmp_path):
    trainer = build(tmp_path, [ACE(), LpReg(rho=0.9, kappa=0.2)], num_iterations=2, max_steps=4)
    sharpen(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "lp_reg/gated_tokens" in row]
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["lp_reg/gated_tokens"] <= row["lp_reg/candidates"]
        assert row["lp_reg/candidates"] == math.floor(0.9 * row["lp_reg/negative_tokens"])
        assert row["lp_reg/log_ratio_mean"] > 0

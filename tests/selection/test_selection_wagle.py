"""WAGLE: scores by hand, sums and means, picks of a model against autograd, settings."""

import math

import pytest
import support
import torch

from posttrain.selection.gradient_sums import gradient_sums, mean_token_nll
from posttrain.selection.top_b import top_b
from posttrain.selection.wagle import WAGLE, attribution

THETA, FORGET, RETAIN = [1, -2, 0.5, 0.1], [0.1, 0.2, -0.4, 0.3], [0.01, 0, 0.002, -0.005]


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def batches(count, seed):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 40, (2, 8), generator=draw)
        found.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})
    return found


@pytest.mark.parametrize(
    ("mu", "scores", "best"),
    [
        (1e-2, [0, -0.4, -0.12, 0.18], {1, 3}),
        (1e-6, [-999.9, -0.4, 799.8, 1500.03], {3, 0}),
        (None, [0.1, -0.4, -0.2, 0.03], {1, 2}),
        (math.inf, [0.1, -0.4, -0.2, 0.03], {1, 2}),
    ],
)
def test_the_example_of_the_sheet(mu, scores, best):
    found = attribution(t(THETA), t(FORGET), t(RETAIN), mu)
    assert found.tolist() == pytest.approx(scores, abs=1e-12)
    assert set(top_b({"w": found.abs()}, 2)["w"].tolist()) == best


@pytest.mark.parametrize("normalise", [False, True])
def test_picks_of_a_model_are_those_of_float64_gradients(normalise):
    model = support.model(tied=True)
    forget, retain = batches(2, 1), batches(3, 2)
    mu = 1e-2 if normalise else 3e-2  # sums over n retain batches with mu are means with mu / n
    plan = WAGLE(mu=mu, budget=0.4, normalise=normalise).select(
        model, batches={"forget": forget, "retain": retain}
    )
    total = sum(p.numel() for p in model.parameters())
    assert plan.count == math.floor(0.4 * total)
    double = support.model(tied=True, dtype=torch.float64).eval()

    def gradients(sets):
        sums = {n: torch.zeros_like(p) for n, p in double.named_parameters()}
        for batch in sets:
            logits = double(input_ids=batch["input_ids"]).logits[:, :-1]
            value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
            for (name, _), g in zip(
                double.named_parameters(), torch.autograd.grad(value, list(double.parameters())), strict=True
            ):
                sums[name] += g
        return sums

    in_forget, in_retain = gradients(forget), gradients(retain)
    score = torch.cat(
        [((p - in_retain[n] / 3e-2) * in_forget[n]).abs().flatten() for n, p in double.named_parameters()]
    )
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[score.detach().argsort(descending=True)[: plan.count]] = True
    found = torch.cat([plan.tensors[n].mask().flatten() for n, _ in double.named_parameters()])
    assert (found != wanted).sum() <= 20  # of 15,000, near the threshold: fp32 against float64


def test_an_unreached_parameter_scores_nothing_and_mu_none_needs_no_retain_set():
    model = support.model()
    model.unused = torch.nn.Parameter(torch.ones(50))
    sets = {"forget": batches(1, 1), "retain": []}
    plan = WAGLE(mu=None, budget=200, embeddings=False, norms=False).select(model, batches=sets)
    assert plan.tensors["unused"].kind == "none"
    assert plan.count == 200
    # an empty retain set is the score without it
    assert plan == WAGLE(mu=1e-6, budget=200, embeddings=False, norms=False).select(model, batches=sets)
    assert model.unused.grad is None
    everything = WAGLE(budget=None).select(model, batches=sets)
    assert everything.density == 1.0


def test_settings_that_cannot_be_are_refused():
    model = support.model()
    with pytest.raises(ValueError, match="compares two sets of examples"):
        WAGLE().select(model, batches=batches(1, 1))
    with pytest.raises(ValueError, match="compares two sets of examples"):
        WAGLE().select(model)
    empty = batches(1, 1)
    empty[0]["labels"][:] = -100
    with pytest.raises(ValueError, match="no batch with a label"):
        WAGLE().select(model, batches={"forget": empty, "retain": []})
    assert mean_token_nll(model, empty[0]) is None
    broken = support.model()
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        gradient_sums(broken, dict(broken.named_parameters()), batches(1, 1))
    assert all(p.grad is None for p in broken.parameters())

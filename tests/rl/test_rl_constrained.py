"""The constrained controller against the numbers of its definition (arXiv 2310.04373)."""

import math

import pytest
import support
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import TrainerCallback
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import Constrained
from posttrain.rl.constrained import bounded_weights, mixed_advantages, multiplier_gradient, multiplier_step
from posttrain.rl.formulas import group_advantages
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import AllRows, Rollout, Setup

NO, YES = torch.tensor([False, False]), torch.tensor([True, True])
PLUS = torch.ones(2, dtype=torch.float64)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def near(values, tolerance=5e-7):
    return pytest.approx(values, abs=tolerance)


# ---- the numbers of the sheet ------------------------------------------------------------


@pytest.mark.parametrize(
    ("equality", "weights", "task", "mixed"),
    [
        (NO, [0.598688, 0.425557], 0.975755, [0.873786, -1.361664, 0.620708, -0.132831]),
        (YES, [0.379949, -0.291313], 1.911364, [1.481287, -2.436969, 0.090960, 0.864722]),
    ],
    ids=["sigmoid", "tanh"],
)
def test_weights_and_mixture(equality, weights, task, mixed):
    found, rest = bounded_weights(f64(0.4, -0.3), equality)
    assert found.tolist() == near(weights)
    assert rest.item() == near(task)
    columns = torch.stack([f64(1, -1, 0, 0), f64(-0.5, 0.5, 1, -1)], dim=1)
    assert mixed_advantages(f64(0.5, -1, 0.2, 0.3), columns, found, rest, PLUS).tolist() == near(mixed)


@pytest.mark.parametrize(
    ("equality", "first", "after_first", "second", "after_second"),
    [
        (NO, [-0.045, 0.005], [0.0045, -0.0005], [0.00499997, 0.00500000], [0.00445000, -0.00105000]),
        (YES, [-0.18, 0.02], [0.018, -0.002], None, [0.01780065, -0.00419999]),
    ],
    ids=["sigmoid", "tanh"],
)
def test_two_updates(equality, first, after_first, second, after_second):
    theta = f64(0.48, 0.23)
    mu, buffers = torch.zeros(2, dtype=torch.float64), torch.full((2,), torch.nan, dtype=torch.float64)
    gradient = multiplier_gradient(mu, equality, f64(0.30, 0.25), theta, PLUS)
    assert gradient.tolist() == near(first, 1e-12)
    mu, buffers = multiplier_step(mu, buffers, gradient, lr=0.1, momentum=0.1)
    assert mu.tolist() == near(after_first, 1e-12)
    gradient = multiplier_gradient(mu, equality, f64(0.50, 0.25), theta, PLUS)
    if second:
        assert gradient.tolist() == near(second, 5e-9)
    mu, buffers = multiplier_step(mu, buffers, gradient, lr=0.1, momentum=0.1)
    assert mu.tolist() == near(after_second, 5e-9)


@given(
    st.lists(st.floats(-6, 6), min_size=1, max_size=4),
    st.booleans(),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_invariants(multipliers, equality, value, threshold):
    mu = f64(*multipliers)
    n = len(mu)
    flags = torch.full((n,), equality)
    weights, task = bounded_weights(mu, flags)
    assert (task + weights.sum()).item() == near(n, 1e-12)
    assert 0 <= task <= (2 * n if equality else n)
    for sign in (1.0, -1.0) if not equality else (1.0,):
        signs = torch.full((n,), sign, dtype=torch.float64)
        gradient = multiplier_gradient(
            mu, flags, torch.full_like(mu, value), torch.full_like(mu, threshold), signs
        )
        after, _ = multiplier_step(mu, torch.full_like(mu, torch.nan), gradient, lr=1.0, momentum=0.1)
        # short of the threshold the weight grows; at_most the other way round
        wanted = sign * (threshold - value)
        assert ((after - mu) * wanted >= 0).all()
        if abs(value - threshold) > 1e-3:
            assert (after != mu).all()


@pytest.mark.parametrize("equality", [NO, YES], ids=["sigmoid", "tanh"])
def test_gradient_is_that_of_the_multiplier_loss(equality):
    mu = f64(0.7, -1.1).requires_grad_()
    values, theta, signs = f64(0.2, 0.9), f64(0.6, 0.5), f64(1, -1)
    weights, _ = bounded_weights(mu, equality)
    (weights * signs * (values - theta)).sum().backward()
    found = multiplier_gradient(mu.detach(), equality, values, theta, signs)
    assert torch.allclose(found, mu.grad, atol=1e-14, rtol=0)


def test_steps_are_those_of_torch_sgd_with_clipping():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    sgd = torch.optim.SGD([parameter], lr=0.3, momentum=0.1)
    mu, buffers = torch.zeros(3, dtype=torch.float64), torch.full((3,), torch.nan, dtype=torch.float64)
    clipped = 0
    for _ in range(12):
        gradient = torch.randn(3, generator=generator, dtype=torch.float64) * 0.6
        parameter.grad = gradient.clone()
        clipped += int(torch.nn.utils.clip_grad_norm_([parameter], 0.5) > 0.5)
        sgd.step()
        mu, buffers = multiplier_step(mu, buffers, gradient, lr=0.3, momentum=0.1, max_grad=0.5)
    assert clipped > 3
    assert torch.allclose(mu, parameter.detach(), atol=1e-5, rtol=0)  # torch's clipping adds 1e-6 to the norm


def test_at_most_is_at_least_of_the_negative():
    values, theta = f64(0.31, 41.7), f64(0.6, 40.0)
    mu, signs = f64(0.2, -0.4), f64(-1, -1)
    left = multiplier_gradient(mu, NO, values, theta, signs)
    right = multiplier_gradient(mu, NO, -values, -theta, PLUS)
    assert torch.equal(left, right)
    assert left[0] > 0 > left[1]  # 0.31 stays below 0.6, so its weight falls; 41.7 is over the limit
    weights, rest = bounded_weights(mu, NO)
    columns, task = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.equal(
        mixed_advantages(task, columns, weights, rest, signs),
        mixed_advantages(task, -columns, weights, rest, PLUS),
    )


def test_cap_and_missing_rewards():
    mu, buffers = f64(4.99, 1.0, -4.99), f64(0.5, 0.25, torch.nan)
    after, moved = multiplier_step(mu, buffers, f64(-3.0, torch.nan, 4.0), lr=1.0, momentum=0.1, cap=5.0)
    assert after.tolist() == [5.0, 1.0, -5.0]
    assert moved.tolist() == near([-2.95, 0.25, 4.0], 1e-12)
    # the missing one does not count in the norm either: 3-4-5, cut to 2.5
    after, _ = multiplier_step(
        mu * 0, buffers * torch.nan, f64(-3.0, torch.nan, 4.0), lr=1.0, momentum=0.1, max_grad=2.5
    )
    assert after.tolist() == near([1.5, 0.0, -2.0], 1e-12)


def test_the_policy_loss_does_not_train_the_multipliers():
    mu = f64(0.4, -0.3).requires_grad_()
    weights, rest = bounded_weights(mu, NO)
    assert not mixed_advantages(
        f64(1, -1), torch.ones(2, 2, dtype=torch.float64), weights, rest, PLUS
    ).requires_grad


# ---- the stage ------------------------------------------------------------


def rollout(
    rewards, *, scored=None, names=("a", "b"), group_size=2, scale="group", weights=None, **overrides
):
    rewards = torch.tensor(rewards)
    n = len(rewards)
    one = torch.ones(1)
    fields = {
        "rewards": rewards,
        "reward": rewards.nansum(dim=1),
        "tied": torch.zeros(n, dtype=torch.bool),
        "advantages": torch.full((n,), 99.0),
        "mask": torch.ones(n, 3),
        "old_logps": None,
        "ref_logps": None,
        "gauges": Gauges(),
        "everyone": AllRows(
            rewards=rewards,
            scored=rewards if scored is None else torch.tensor(scored),
            names=names,
            weights=torch.ones(len(names)) if weights is None else torch.tensor(weights),
            group_size=group_size,
            normalise=lambda values: group_advantages(values.unsqueeze(1), one, group_size, scale=scale),
        ),
    }
    return Rollout(**(fields | overrides))


def centred(values, group_size, scale):
    """Independent: plain Python, one reward, TRL's conventions, exact zero in a constant group."""
    known = [v for v in values if not math.isnan(v)]
    mean_all = sum(known) / len(known)
    std_all = math.sqrt(sum((v - mean_all) ** 2 for v in known) / (len(known) - 1))
    out = []
    for start in range(0, len(values), group_size):
        group = [v for v in values[start : start + group_size] if not math.isnan(v)]
        for v in values[start : start + group_size]:
            if math.isnan(v) or len(set(group)) < 2:
                out.append(0.0)
                continue
            mean = sum(group) / len(group)
            std = (
                std_all
                if scale == "batch"
                else math.sqrt(sum((u - mean) ** 2 for u in group) / (len(group) - 1))
            )
            out.append((v - mean) / (1.0 if scale == "none" else std + 1e-4))
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_mixed_per_reward(scale):
    nan = math.nan
    matrix = [
        [1.0, 30.0],
        [0.0, 20.0],
        [0.0, nan],
        [1.0, 25.0],
        [0.1, 7.0],
        [0.1, 9.0],
        [0.1, 9.5],
        [0.1, 7.0],
    ]
    method = Constrained(at_least={"a": 0.6}, at_most={"b": 20.0}, task="none", init=0.3, lr=0.0)
    found = method.advantages(rollout(matrix, group_size=4, scale=scale))
    w = 1 / (1 + math.exp(-0.3))
    a, b = (centred([row[i] for row in matrix], 4, scale) for i in (0, 1))
    assert found.tolist() == pytest.approx([w * x - w * y for x, y in zip(a, b, strict=True)], abs=1e-5)
    assert a[4:] == [0.0] * 4  # TRL's own would leave rounding of 0.1 there
    assert b[2] == 0.0


def test_the_state_moves_once_per_batch_from_all_sampled_rows():
    method = Constrained(at_least={"b": 0.5, "a": 0.48}, task="none")
    batch = rollout([[1.0, 0.0], [0.0, 1.0]], scored=[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.2, math.nan]])
    before = method.weights()
    method.advantages(batch)
    assert before == {"b": 0.5, "a": 0.5}
    # b: mean 2/3, a: mean 0.3 over the four sampled rows
    assert method.state_dict()["multipliers"] == near([-0.1 * 0.25 * (2 / 3 - 0.5), 0.1 * 0.25 * 0.18], 1e-8)
    values = dict(zip(["b", "a"], method.state_dict()["history"][0], strict=True))
    assert values == near({"b": 2 / 3, "a": 0.3})
    batch.training = False
    state = method.state_dict()
    method.advantages(batch)
    assert method.state_dict() == state


def test_a_reward_missing_in_the_whole_batch_leaves_its_multiplier():
    method = Constrained(at_least={"a": 0.5, "b": 0.5}, task="none", window=3)
    method.advantages(rollout([[1.0, 0.0], [0.0, 0.0]]))
    before = method.state_dict()
    method.advantages(rollout([[1.0, math.nan], [1.0, math.nan]]))
    after = method.state_dict()
    assert after["multipliers"][1] == before["multipliers"][1]
    assert after["buffers"][1] == before["buffers"][1] == near(-0.125)
    assert after["multipliers"][0] != before["multipliers"][0]


def test_window_averages_measured_rewards():
    method = Constrained(at_least={"a": 0.5}, task="none", window=2, momentum=0.0, max_grad=None)
    for value in (0.9, 0.4, 0.2):
        mu = method.state_dict()["multipliers"][0]
        method.advantages(rollout([[value], [value]], names=("a",)))
    slope = 1 / (1 + math.exp(-mu)) * (1 - 1 / (1 + math.exp(-mu)))
    assert method.state_dict()["multipliers"][0] == near(mu - 0.1 * slope * (0.3 - 0.5), 1e-8)


def test_kl_task():
    old = torch.tensor([[-1.0, -1.0, -9.0], [-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -1.5, 5.0], [-1.0, -1.0, -1.0], [-2.0, -2.0, -1.0], [-2.0, -1.0, -1.0]])
    mask = torch.ones(4, 3)
    mask[0, 2] = 0
    drift = [1.5, 0.0, -1.0, 1.0]  # log pi_old - log pi_ref, summed over the tokens of the row
    matrix = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [math.nan, math.nan]]
    method = Constrained(at_least={"a": 0.5, "b": 0.5}, init=1.0, lr=0.0)
    assert method.needs == {"ref_logps", "old_logps"}
    found = method.advantages(rollout(matrix, mask=mask, old_logps=old, ref_logps=ref))
    w = 1 / (1 + math.exp(-1.0))
    # the last row has no reward: nothing acts on it, and its group of one scored row is constant
    task = centred([-drift[0], -drift[1], -drift[2], math.nan], 2, "group")
    a, b = (centred([row[i] for row in matrix], 2, "group") for i in (0, 1))
    expected = [(2 - 2 * w) * t + w * x + w * y for t, x, y in zip(task, a, b, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found[3] == 0
    assert expected[0] < 0 < expected[1]  # row 0 drifted most; the rewards of its group cancel


def test_rewards_task_takes_what_has_no_constraint():
    matrix = [
        [1.0, 0.0, 3.0, 5.0],
        [0.0, 1.0, 1.0, 4.0],
        [0.0, 0.5, math.nan, 0.0],
        [1.0, 0.0, math.nan, 9.0],
    ]
    method = Constrained(at_least={"a": 0.5}, task="rewards", lr=0.0, init=-0.7)
    batch = rollout(matrix, names=("a", "x", "y", "logged"), weights=[1.0, 2.0, 0.5, 0.0])
    w = 1 / (1 + math.exp(0.7))
    task = centred([2 * 0 + 0.5 * 3, 2 * 1 + 0.5 * 1, 2 * 0.5, 0.0], 2, "group")
    a = centred([row[0] for row in matrix], 2, "group")
    assert method.advantages(batch).tolist() == pytest.approx(
        [(1 - w) * t + w * x for t, x in zip(task, a, strict=True)], abs=1e-6
    )


def test_tied_means_that_nothing_acts():
    method = Constrained(at_least={"a": 0.5, "b": 0.5}, task="none", lr=0.0)
    # the sums are equal in both groups, the rewards only in the first
    batch = rollout([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    batch.tied[:] = True
    method.advantages(batch)
    assert batch.tied.tolist() == [True, True, True, True]  # equal weights: the mixture cancels as well
    method = Constrained(at_least={"a": 0.5}, equal={"b": 0.5}, task="none", init=0.4, lr=0.0)
    method.advantages(batch)
    assert batch.tied.tolist() == [True, True, False, False]


def test_gauges():
    batch = rollout([[1.0, math.nan], [0.0, math.nan]])
    Constrained(at_least={"a": 0.5}, equal={"b": 0.5}, task="none", init=0.4).advantages(batch)

    class OneProcess:
        def gather(self, tensor):
            return tensor

    means, _ = batch.gauges.flush(OneProcess())
    assert means == {
        "value/a": 0.5,
        "weight/a": near(0.598688),
        "weight/b": near(0.379949),
        "task_weight": near(2 - 0.598688 - 0.379949, 1e-6),
    }


def test_state_round_trip_and_foreign_state():
    batches = [[[1.0, 0.2], [0.0, 0.9]], [[0.4, 0.2], [0.3, 0.1]], [[0.0, 0.2], [0.9, 0.8]]]
    one, two = (Constrained(at_least={"a": 0.7}, equal={"b": 0.1}, task="none", window=2) for _ in range(2))
    for matrix in batches[:2]:
        one.advantages(rollout(matrix))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.advantages(rollout(batches[2])), two.advantages(rollout(batches[2])))
    assert one.state_dict() == two.state_dict()
    with pytest.raises(ValueError, match=r"constraints on \['a', 'b'\], this run on \['b'\]"):
        Constrained(at_least={"b": 0.7}).load_state_dict(one.state_dict())


# ---- configuration ------------------------------------------------------------


def test_parameters_are_checked():
    with pytest.raises(ValidationError, match="no constraint: give at_least, at_most or equal"):
        Constrained()
    with pytest.raises(ValidationError, match="one constraint, found more for a"):
        Constrained(at_least={"a": 0.5}, at_most={"a": 0.9})
    with pytest.raises(ValidationError, match=r"outside -cap\.\.cap"):
        Constrained(at_least={"a": 0.5}, init=7)
    with pytest.raises(ValidationError, match="finite number"):
        Constrained(at_least={"a": math.inf})


def messages(method, **setup):
    setup = {"trainer": {}, "reward_names": ("right", "short"), "reward_weights": (1.0, 1.0)} | setup
    return [
        (conflict.fatal, conflict.field, conflict.message) for conflict in method.conflicts(Setup(**setup))
    ]


def test_conflicts():
    both = Constrained(at_least={"right": 0.6}, at_most={"short": 3})
    assert messages(both) == []
    ((fatal, _, message),) = messages(Constrained(at_least={"rigth": 0.6}), reward_weights=None)
    assert fatal
    assert "no reward 'rigth' to constrain, did you mean 'right'?" in message
    ((fatal, _, message),) = messages(both, reward_names=("right", "short", "short"), reward_weights=None)
    assert fatal
    assert "two rewards are called 'short'" in message
    ((fatal, field, message),) = messages(both, reward_weights=(1.0, 0.5))
    assert (fatal, field) == (True, "reward_weights")
    assert "leave it at 1" in message
    one = Constrained(at_least={"right": 0.6})
    ((fatal, field, message),) = messages(one)
    assert (fatal, field) == (True, "task")
    assert "nothing acts on short" in message
    assert messages(one, reward_weights=(1.0, 0.0)) == []
    assert messages(Constrained(at_least={"right": 0.6}, task="rewards")) == []
    ((fatal, field, _),) = messages(
        Constrained(at_least={"right": 1}, task="rewards"), reward_weights=(1.0, 0.0)
    )
    assert (fatal, field) == (True, "task")
    ((fatal, field, _),) = messages(Constrained(at_least={"right": 1, "short": 1}, task="beta"))
    assert (fatal, field) == (True, "beta")
    ((fatal, field, _),) = messages(both, trainer={"beta": 0.1})
    assert (fatal, field) == (False, "beta")
    ((fatal, field, _),) = messages(both, trainer={"multi_objective_aggregation": "normalize_then_sum"})
    assert (fatal, field) == (True, "multi_objective_aggregation")
    ((fatal, field, _),) = messages(both, trainer={"scale_rewards": "none"})
    assert (fatal, field) == (False, "scale_rewards")
    ((fatal, _, message),) = messages(both, methods=("gardo_diversity", "constrained"))
    assert fatal
    assert "list it before gardo_diversity" in message
    assert messages(both, methods=("constrained", "gardo_diversity")) == []


# ---- through the trainer ------------------------------------------------------------


def length_reward(completions, **kwargs):
    return [float(len(text)) for text in completions]


def build(cls, folder, *, adapter=False, rewards=None, callbacks=None, **settings):
    kwargs = {key: settings.pop(key) for key in ("methods",) if key in settings}
    return cls(
        model=support.model(),
        args=support.grpo_config(folder, **settings),
        reward_funcs=rewards or support.letter_reward,
        train_dataset=support.prompts(),
        eval_dataset=support.prompts(4),
        processing_class=support.tokenizer(),
        peft_config=support.lora() if adapter else None,
        callbacks=callbacks,
        **kwargs,
    )


def test_unknown_reward_is_refused_before_the_model_is_touched(tmp_path):
    with pytest.raises(ValueError, match="no reward 'letters' to constrain"):
        build(GRPOTrainer, tmp_path, methods=[Constrained(at_least={"letters": 0.5})])


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "grpo", "scale_rewards": "batch"}], ids=["dapo", "grpo"]
)
def test_one_reward_with_all_the_weight_is_trl(settings, adapter, tmp_path):
    """mu -> infinity with one constraint: w = 1, no task: plain GRPO, bit for bit over 20 steps."""
    method = Constrained(at_least={"letter_reward": 0.5}, task="none", init=50, cap=None, lr=0)
    common = {"adapter": adapter, "max_steps": 20} | settings
    upstream = build(TRLGRPOTrainer, tmp_path / "trl", **common)
    upstream.train()
    ours = build(GRPOTrainer, tmp_path / "ours", methods=[method], **common)
    ours.train()
    keys = ("loss", "grad_norm", "reward", "entropy")
    assert support.logged(ours, *keys) == support.logged(upstream, *keys)
    support.assert_same(support.weights(ours.model), support.weights(upstream.model))


def prepared(folder, **settings):
    trainer = build(GRPOTrainer, folder, **settings)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return trainer


PROMPTS = [{"prompt": f"say {i // 4}?"} for i in range(8)]


def test_kl_task_through_the_trainer(tmp_path):
    """Drift from full logits in float64, strictly on-policy, where TRL keeps no old log-probabilities."""
    method = Constrained(at_least={"letter_reward": 0.5}, at_most={"length_reward": 6}, init=0.3, lr=0)
    rewards = [support.letter_reward, length_reward]
    trainer = prepared(tmp_path, rewards=rewards, methods=[method], temperature=0.7)
    batch = trainer._generate_and_score_completions(PROMPTS)
    assert "old_per_token_logps" not in batch
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    columns = batch["completion_ids"].size(1)

    def logps(model):
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -columns - 1 : -1].double() / 0.7
        return torch.log_softmax(logits, -1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)

    with torch.no_grad():
        drift = ((logps(trainer.model) - logps(support.model())) * batch["completion_mask"]).sum(1)
    assert drift.abs().min() > 0.01
    matrix = trainer._gathered_rewards
    w = 1 / (1 + math.exp(-0.3))
    task, a, b = (centred(values, 4, "group") for values in ((-drift).tolist(), *matrix.T.tolist()))
    expected = [(2 - 2 * w) * t + w * x - w * y for t, x, y in zip(task, a, b, strict=True)]
    assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-3)
    assert max(map(abs, task)) > 0.5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_beta_task_scales_trls_own_kl(loss_type, tmp_path):
    """w = 0.25 for the reward leaves 0.75 of beta: the loss is TRL's with beta 0.15, value and gradient."""
    method = Constrained(at_least={"letter_reward": 0.5}, task="beta", init=-math.log(3), lr=0)
    trainer = prepared(tmp_path, adapter=True, methods=[method], beta=0.2, loss_type=loss_type)
    batch = trainer._generate_and_score_completions(PROMPTS)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    ours = trainer.compute_loss(trainer.model, dict(batch))
    gradients = torch.autograd.grad(ours, trained)
    trainer.hooked, trainer.beta = False, 0.15
    expected = trainer.compute_loss(trainer.model, dict(batch))
    for left, right in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        assert torch.allclose(left, right, atol=1e-6, rtol=1e-4)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    trainer.beta = 0.2
    assert abs(trainer.compute_loss(trainer.model, dict(batch)).item() - ours.item()) > 1e-4
    # and the advantages are a quarter of TRL's
    plain = trainer.advantages_of(trainer._gathered_rewards, 4)
    assert torch.allclose(batch["advantages"], 0.25 * plain, atol=1e-6)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 2}], ids=["on-policy", "buffered"])
def test_resume_is_exact(settings, tmp_path):
    def method():
        return Constrained(equal={"letter_reward": 0.2}, at_most={"length_reward": 6}, window=2)

    rewards = [support.letter_reward, length_reward]
    common = {"rewards": rewards, "max_steps": 7} | settings
    whole = build(GRPOTrainer, tmp_path / "whole", methods=[method()], **common)
    whole.train()
    first = build(GRPOTrainer, tmp_path / "cut", methods=[method()], callbacks=[StopAt()], **common)
    first.train()
    assert first.state.global_step == 3
    second = build(GRPOTrainer, tmp_path / "cut", methods=[method()], **common)
    second.train(resume_from_checkpoint=True)
    support.assert_same(support.weights(second.model), support.weights(whole.model))
    assert second.methods[0].state_dict() == whole.methods[0].state_dict()
    assert len(set(whole.methods[0].state_dict()["multipliers"])) == 2
    keys = ("loss", "constrained/weight/letter_reward", "constrained/value/length_reward")
    assert support.logged(second, *keys) == support.logged(whole, *keys)


def test_evaluation_does_not_move_the_multipliers(tmp_path):
    method = Constrained(at_least={"letter_reward": 0.9})
    trainer = build(GRPOTrainer, tmp_path, methods=[method], max_steps=2)
    trainer.train()
    before = method.state_dict()
    assert before["multipliers"][0] > 0
    trainer.evaluate()
    assert method.state_dict() == before


def test_accumulation_over_two_generations_moves_them_twice(tmp_path):
    method = Constrained(at_least={"letter_reward": 0.9}, task="none", momentum=0.0)
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1}
    trainer = build(GRPOTrainer, tmp_path, methods=[method], **settings)
    trainer.train()
    # each generation batch gives about 0.1 * 0.25 * (0.9 - a small value)
    assert 0.03 < method.state_dict()["multipliers"][0] < 0.05

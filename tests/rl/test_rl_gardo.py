"""GARDO's three parts against the numbers of their definition (arXiv 2512.24138)."""

import math
from types import SimpleNamespace

import pytest
import support
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import TrainerCallback
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import ACE, GardoDiversity, GardoKL, GardoReference
from posttrain.rl.gardo_diversity import diversity_factor, nearest_distance, shaped_advantages
from posttrain.rl.gardo_kl import gate_trend, next_fraction, uncertainty, uncertainty_gate, win_rates
from posttrain.rl.gardo_reference import kl_sum, reference_is_stale
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import AllRows, Rollout, Setup

PROXY = [1.0, 0.9, 0.5, 0.2]
FIRST = [0.1, 0.8, 0.6, 0.4]
SECOND = [0.2, 0.9, 0.5, 0.7]
PROMPTS = [{"prompt": f"say {i // 4}?"} for i in range(8)]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def near(values, tolerance=5e-7):
    return pytest.approx(values, abs=tolerance)


# ---- the numbers of the sheet -------------------------------------------------------------


def test_uncertainty_and_gate():
    assert win_rates(f64(PROXY)).tolist() == [0.75, 0.5, 0.25, 0]
    assert win_rates(f64(FIRST)).tolist() == [0, 0.75, 0.5, 0.25]
    assert win_rates(f64(SECOND)).tolist() == [0, 0.75, 0.25, 0.5]
    found = uncertainty(f64(PROXY), torch.stack([f64(FIRST), f64(SECOND)], dim=1))
    assert found.tolist() == [0.75, -0.25, -0.125, -0.375]
    # the paper's sign: what the proxy likes more than the others is gated; threshold 0.09375
    assert uncertainty_gate(found, 0.25).tolist() == [True, False, False, False]
    assert uncertainty_gate(found + 0.09375 - 0.75, 0.25).tolist() == [True, False, False, False]
    assert gate_trend(found) == 0.75
    assert found.mean() == 0


@pytest.mark.parametrize(
    ("trend", "after"), [(0.09, 0.11), (0.04, 0.09), (0.07, 0.1), (0.08, 0.1), (0.05, 0.1)]
)
def test_share_follows_the_trend(trend, after):
    window = [0.05, 0.08, 0.06]
    assert next_fraction(0.1, window, trend, window=3) == near(after, 1e-12)
    assert next_fraction(0.1, [9.0, *window], trend, window=3) == near(
        after, 1e-12
    )  # only the last three count
    assert next_fraction(0.1, window, trend, window=4) == 0.1  # not full yet


def test_share_stays_in_its_bounds():
    assert next_fraction(0.19, [0.1], 0.2, window=1) == 0.2
    assert next_fraction(0.021, [0.1], 0.0, window=1) == 0.02
    assert next_fraction(0.95, [0.1], 0.2, window=1, bounds=(0.0, 1.0)) == 1.0


def test_diversity():
    embeddings = f64([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]])
    distance = nearest_distance(embeddings, 4)
    assert distance.tolist() == near([0.2, 0.04, 0.2, 0.04], 1e-12)
    advantages = f64([0.35, 0.25, -0.15, -0.45])
    raw = shaped_advantages(advantages, diversity_factor(distance, 4, normalize="none"))
    assert raw.tolist() == near([0.07, 0.01, -0.15, -0.45], 1e-12)
    assert shaped_advantages(advantages, diversity_factor(distance, 4)).tolist() == near(
        [0.583333, 0.083333, -0.15, -0.45]
    )
    columns = advantages.unsqueeze(1) * f64([[1.0, -1.0]])
    by_token = shaped_advantages(columns, diversity_factor(distance, 4, normalize="none"))
    assert by_token[0].tolist() == near([0.07, -0.35], 1e-12)
    assert by_token[2].tolist() == near([-0.15, 0.03], 1e-12)


@pytest.mark.parametrize(
    ("kl", "steps", "settings", "stale"),
    [
        (0.06, 1, {"max_kl": 0.05, "max_steps": 100}, True),
        (0.05, 99, {"max_kl": 0.05, "max_steps": 100}, False),
        (0.0, 100, {"max_kl": 0.05, "max_steps": 100}, True),
        (9.0, 99, {"max_kl": None, "max_steps": 100}, False),
        (0.06, 999, {"max_kl": 0.07, "max_steps": None}, False),
    ],
)
def test_when_the_reference_is_stale(kl, steps, settings, stale):
    assert reference_is_stale(kl, steps, **settings) is stale


def test_measured_kl_leaves_out_masked_tokens():
    logps, ref = (
        f64([[-1.0, -2.0, -1.0], [-0.5, -0.5, 7.0]]),
        f64([[-1.5, -1.0, math.nan], [-0.5, -0.2, -math.inf]]),
    )
    total, count = kl_sum(logps, ref, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert count == 3
    assert total.item() == near(math.exp(-0.5) + 0.5 - 1 + math.exp(1) - 1 - 1, 1e-6)


# ---- properties and edges -----------------------------------------------------------------


def slow_win_rates(values, ties, size):
    out = []
    for start in range(0, len(values), size):
        group = values[start : start + size]
        known = [v for v in group if not math.isnan(v)]
        for i, v in enumerate(group):
            wins = sum(v > u for j, u in enumerate(group) if j != i)
            equal = sum(v == u for j, u in enumerate(group) if j != i)
            rate = (wins + (0.5 * equal if ties == "half" else 0)) / max(len(known), 1)
            out.append(math.nan if math.isnan(v) else rate)
    return out


scores = st.sampled_from([math.nan, -1.0, 0.0, 0.25, 0.5, 1.0, 2.0])


@given(
    st.lists(scores, min_size=6, max_size=6),
    st.sampled_from(["strict", "half"]),
    st.sampled_from([None, 2, 3]),
)
def test_win_rates_against_a_loop(values, ties, group_size):
    found = win_rates(f64(values), ties=ties, group_size=group_size)
    expected = slow_win_rates(values, ties, group_size or 6)
    assert found.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(
    st.lists(st.tuples(scores, scores, scores), min_size=2, max_size=9),
    st.floats(0, 1),
    st.sampled_from(["strict", "half"]),
    st.randoms(),
)
def test_uncertainty_properties(rows, fraction, ties, random):
    matrix = f64(rows)
    found = uncertainty(matrix[:, 0], matrix[:, 1:], ties=ties)
    known = ~found.isnan()
    assert torch.equal(known, ~matrix[:, 0].isnan() & ~matrix[:, 1:].isnan().all(dim=1))
    assert (found[known].abs() < 1).all()
    # any increasing transform of a reward changes nothing
    transformed = torch.stack([matrix[:, 0] ** 3, matrix[:, 1].exp(), 5 * matrix[:, 2] - 1], dim=1)
    assert torch.equal(
        uncertainty(transformed[:, 0], transformed[:, 1:], ties=ties).nan_to_num(9), found.nan_to_num(9)
    )
    order = list(range(len(rows)))
    random.shuffle(order)
    moved = uncertainty(matrix[order, 0], matrix[order][:, 1:], ties=ties)
    assert torch.equal(moved.nan_to_num(9), found[order].nan_to_num(9))
    gate = uncertainty_gate(found, fraction)
    if fraction < 1:
        assert not gate[~known].any()
        assert gate.sum() <= math.ceil(fraction * known.sum().item())
        assert torch.equal(uncertainty_gate(moved, fraction), gate[order])
    assert uncertainty_gate(found, 1.0).all()
    assert not uncertainty_gate(found, 0.0).any()


def test_the_gate_counts_from_the_order_statistic_where_the_quantile_is_one():
    # 1 - 0.8 is a rounding step below 0.2, and 0.2 * 15 would then let the fourth smallest through
    for rows, fraction, gated in [(16, 0.8, 12), (21, 0.9, 18), (11, 0.3, 3)]:
        found = torch.arange(rows, dtype=torch.float64) / rows
        assert uncertainty_gate(found, fraction).sum() == gated


@given(st.lists(scores, min_size=2, max_size=9), st.integers(1, 7), st.floats(0.01, 0.99))
def test_an_auxiliary_like_the_proxy_gates_nothing(values, copies, fraction):
    proxy = f64(values)
    found = uncertainty(proxy, proxy.unsqueeze(1).expand(-1, copies))
    assert (found[~found.isnan()] == 0).all()
    assert not uncertainty_gate(found, fraction).any()


def test_half_ties_of_a_constant_reward():
    assert win_rates(torch.ones(4, dtype=torch.float64), ties="half").tolist() == [0.375] * 4  # (B - 1) / 2B


def test_rows_without_an_opinion():
    nan = math.nan
    found = uncertainty(f64([3.0, 2.0, nan, 1.0]), f64([[0.0, nan], [nan, nan], [1.0, 1.0], [2.0, 5.0]]))
    # win rates of the proxy: 2/3, -, -, 0; of the auxiliaries: 0 and -, 2/3 and 1/2
    assert found.tolist() == pytest.approx([2 / 3, nan, nan, -(2 / 3 + 1 / 2) / 2], nan_ok=True, abs=1e-12)
    assert uncertainty_gate(found, 0.5).tolist() == [True, False, False, False]
    assert uncertainty_gate(torch.full((3,), nan, dtype=torch.float64), 0.5).tolist() == [False] * 3
    assert gate_trend(torch.full((3,), nan, dtype=torch.float64)) == 0.0


def test_diversity_edges():
    assert nearest_distance(torch.randn(3, 5), 1).tolist() == [1.0] * 3  # nobody to compare with
    same = torch.tensor([[1.0, 2.0]] * 4)
    distance = nearest_distance(same, 4)
    assert distance.tolist() == near([0.0] * 4, 1e-6)
    zero = torch.zeros(4)
    assert diversity_factor(zero, 4).tolist() == [1.0] * 4
    ones = torch.ones(4, 3)
    assert diversity_factor(nearest_distance(ones, 4), 4).tolist() == [1.0] * 4  # rounding is no distance
    assert diversity_factor(zero, 4, normalize="none").tolist() == [0.0] * 4
    # opposite is at distance 2, an empty completion is no neighbour, neighbours are in the group only
    pairs = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    apart, together = nearest_distance(pairs, 2), nearest_distance(pairs, 4)
    assert apart.tolist() == pytest.approx([2.0, 2.0, math.nan, 1.0], nan_ok=True)
    assert together.tolist() == pytest.approx([0.0, 2.0, math.nan, 0.0], nan_ok=True)
    assert diversity_factor(together, 4).tolist() == near([0.0, 3.0, 1.0, 0.0])
    assert diversity_factor(together, 4, normalize="none").tolist() == [0.0, 2.0, 1.0, 0.0]
    assert nearest_distance(same.bfloat16(), 2).dtype == torch.float32
    assert nearest_distance(same.double() * 1e6, 2).amax() < 1e-12  # scale does not matter


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=4, max_size=4))
def test_nearest_distance_against_a_loop(rows):
    assume(all(math.hypot(*row) > 1e-6 for row in rows))  # shorter is an empty completion or its rounding
    found = nearest_distance(f64(rows), 4)
    for i, left in enumerate(rows):
        cosines = [
            sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))
            for j, right in enumerate(rows)
            if j != i
        ]
        assert found[i].item() == pytest.approx(1 - max(cosines), abs=1e-9)


# ---- the stages ---------------------------------------------------------------------------


def rollout(matrix, weights, *, names=("proxy", "one", "two"), group_size=2, **overrides):
    rewards = torch.tensor(matrix)
    n = len(rewards)
    fields = {
        "rewards": rewards,
        "reward": rewards[:, 0],
        "tied": torch.zeros(n, dtype=torch.bool),
        "advantages": torch.linspace(-1, 1, n),
        "mask": torch.ones(n, 3),
        "old_logps": None,
        "ref_logps": None,
        "gauges": Gauges(),
        "everyone": AllRows(
            rewards, rewards, names, torch.tensor(weights), group_size, lambda values: values
        ),
    }
    return Rollout(**(fields | overrides))


MATRIX = [list(row) for row in zip(PROXY, FIRST, SECOND, strict=True)]
WEIGHTS = [1.0, 0.0, 0.0]


class OneProcess:
    def gather(self, tensor):
        return tensor


def test_gate_stage():
    method = GardoKL(fraction=0.25, bounds=(0.02, 0.5), window=1)
    batch = rollout(MATRIX, WEIGHTS)
    before = batch.advantages.clone()
    assert torch.equal(method.advantages(batch), before)
    assert batch.carry["gardo_gate"].tolist() == [1.0, 0.0, 0.0, 0.0]
    means, _ = batch.gauges.flush(OneProcess())
    assert means == {"gated_rows": 0.25, "uncertainty": 0.75, "share": 0.25}
    gated = rollout(MATRIX, WEIGHTS)
    GardoKL(fraction=0.25, bounds=(0.02, 0.5), normalize="gated").advantages(gated)
    assert gated.carry["gardo_gate"].tolist() == [4.0, 0.0, 0.0, 0.0]
    nothing = rollout([[1.0, 1.0, 1.0]] * 4, WEIGHTS)
    GardoKL(normalize="gated").advantages(nothing)
    assert nothing.carry["gardo_gate"].tolist() == [0.0] * 4


def test_gate_uses_the_weighted_proxy_the_chosen_auxiliaries_and_the_scope():
    names, weights = ("a", "b", "judge", "length"), [2.0, -1.0, 0.0, 0.0]
    matrix = [[1.0, 0.0, 5.0, 1.0], [1.0, 3.0, 4.0, 2.0], [0.0, 0.0, 3.0, 3.0], [2.0, 1.0, 2.0, 4.0]]
    batch = rollout(matrix, weights, names=names)
    method = GardoKL(auxiliaries=["judge"], fraction=0.5, bounds=(0.02, 0.5))
    method.advantages(batch)
    # proxy 2, -1, 0, 3: win rates 0.5, 0, 0.25, 0.75; judge 0.75, 0.5, 0.25, 0; U = -0.25, -0.5, 0, 0.75
    assert batch.carry["gardo_gate"].tolist() == [0.0, 0.0, 1.0, 1.0]
    inside = rollout(matrix, weights, names=names)
    GardoKL(auxiliaries=["length"], fraction=0.5, bounds=(0.02, 0.5), scope="group").advantages(inside)
    # in groups: proxy 0.5, 0, 0, 0.5; length 0, 0.5, 0, 0.5; U = 0.5, -0.5, 0, 0
    assert inside.carry["gardo_gate"].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_share_moves_in_training_only_and_its_state_travels():
    one = GardoKL(fraction=0.1, bounds=(0.02, 0.9), window=1)
    high = rollout(MATRIX, WEIGHTS)  # trend 0.75
    low = rollout([[1.0, 1.0, 1.0]] * 4, WEIGHTS)  # trend 0
    one.advantages(low)
    assert one.state_dict() == {"share": 0.1, "trends": [0.0]}
    one.advantages(high)
    assert one.state_dict() == {"share": near(0.11), "trends": [0.75]}
    two = GardoKL(fraction=0.1, bounds=(0.02, 0.9), window=1)
    two.load_state_dict(one.state_dict())
    for method in (one, two):
        method.advantages(low)
    assert one.state_dict() == two.state_dict() == {"share": near(0.099), "trends": [0.0]}
    high.training = False
    one.advantages(high)
    assert one.state_dict() == two.state_dict()


def embed_by_vowels(texts):
    return [[float(text.count(letter)) for letter in "aeiou"] for text in texts]


def broken_embedding(texts):
    return [[math.nan] for _ in texts]


def test_diversity_with_a_function_of_the_user():
    texts = ["aa", "ae", "", "o", "ii", "i", "iu", "u"]  # an empty one stays as it is
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    batch = rollout(
        [[0.0]] * 8, [1.0], names=("a",), group_size=4, texts=lambda: texts, advantages=advantages
    )
    method = GardoDiversity(embedding=f"python:{__name__}.embed_by_vowels", normalize="none")
    assert method.needs == frozenset()
    half = 1 - 1 / math.sqrt(2)
    assert method.advantages(batch).tolist() == near([half, -1.0, 1.0, 1.0, 0.0, 0.0, half, -1.0], 1e-6)
    with pytest.raises(
        ValueError, match=r"one finite vector per text, shape \(8, H\); found shape \(8, 1\), finite: False"
    ):
        GardoDiversity(embedding=f"python:{__name__}.broken_embedding").advantages(batch)
    with pytest.raises(ValueError, match=r"cannot load the embedding 'python:no\.such\.thing'"):
        GardoDiversity(embedding="python:no.such.thing").advantages(batch)


# ---- configuration ------------------------------------------------------------------------


def messages(method, **setup):
    setup = {"trainer": {"beta": 0.04}, "reward_names": ("a", "b"), "reward_weights": (1.0, 0.0)} | setup
    return [
        (conflict.fatal, conflict.field, conflict.message) for conflict in method.conflicts(Setup(**setup))
    ]


def test_gate_conflicts():
    assert messages(GardoKL()) == []
    assert messages(GardoKL(), reward_names=None) == []  # not known yet
    ((fatal, field, _),) = messages(GardoKL(), trainer={"beta": 0.0})
    assert (fatal, field) == (True, "beta")
    ((fatal, field, message),) = messages(GardoKL(), reward_weights=(1.0, 1.0))
    assert (fatal, field) == (True, "auxiliaries")
    assert "add a reward with weight 0" in message
    ((_, _, message),) = messages(GardoKL(), reward_weights=(0.0, 0.0))
    assert "no proxy to distrust" in message
    ((_, _, message),) = messages(GardoKL(auxiliaries=["a"]))
    assert "'a' is optimised (weight 1.0)" in message
    ((_, _, message),) = messages(GardoKL(auxiliaries=["c"]))
    assert "no reward 'c'; the rewards are a, b" in message


def test_reference_conflicts():
    assert messages(GardoReference(), methods=("gardo_reference", "gardo_kl")) == []
    ((fatal, field, _),) = messages(GardoReference(), trainer={"beta": 0.1, "sync_ref_model": True})
    assert (fatal, field) == (True, "sync_ref_model")
    ((fatal, _, message),) = messages(GardoReference(), methods=("ace", "gardo_reference"))
    assert fatal
    assert "ACE measures drift from a fixed reference" in message
    ((fatal, field, _),) = messages(GardoReference(), trainer={"beta": 0.0}, methods=("gardo_reference",))
    assert (fatal, field) == (True, "beta")
    ((fatal, _, _),) = messages(GardoReference(), trainer={}, methods=("gardo_reference", "spine"))
    assert not fatal


def test_diversity_conflicts_are_warnings():
    assert messages(GardoDiversity(), trainer={"scale_rewards": "none"}) == []
    found = messages(GardoDiversity(), trainer={"scale_rewards": "group", "entropy_coef": 0.1})
    assert [(fatal, field) for fatal, field, _ in found] == [
        (False, "scale_rewards"),
        (False, "entropy_coef"),
    ]


def test_parameters_are_checked():
    with pytest.raises(ValidationError, match=r"found fraction=0\.5 and bounds=\[0\.02, 0\.2\]"):
        GardoKL(fraction=0.5)
    with pytest.raises(ValidationError, match="pattern"):
        GardoDiversity(embedding="sentence-transformer")
    with pytest.raises(ValidationError, match="greater than 0"):
        GardoReference(max_kl=0)


# ---- through the trainer ------------------------------------------------------------------


def length_reward(completions, **kwargs):
    return [float(len(text)) for text in completions]


def build(cls, folder, *, adapter=True, callbacks=None, model=None, **settings):
    kwargs = {key: settings.pop(key) for key in ("methods",) if key in settings}
    rewards = settings.pop("rewards", [support.letter_reward, length_reward])
    weights = {"reward_weights": [1.0, 0.0]} if len(rewards) == 2 else {}
    return cls(
        model=model or support.model(),
        args=support.grpo_config(folder, **(weights | settings)),
        reward_funcs=rewards,
        train_dataset=support.prompts(),
        eval_dataset=support.prompts(4),
        processing_class=support.tokenizer(),
        peft_config=support.lora() if adapter else None,
        callbacks=callbacks,
        **kwargs,
    )


def same_run(left, right):
    keys = ("loss", "grad_norm", "reward", "entropy")
    assert support.logged(left, *keys) == support.logged(right, *keys)
    support.assert_same(
        {name: value for name, value in support.weights(left.model).items() if ".ref." not in name},
        support.weights(right.model),
    )


ALL = {"fraction": 1.0, "bounds": (0.02, 1.0), "step": 0.0}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_neutral_settings_are_trl(loss_type, tmp_path):
    """Gate open for all, no copy, factors of 1: TRL with KL, bit for bit over 20 steps."""
    common = {"max_steps": 20, "beta": 0.1, "loss_type": loss_type}
    upstream = build(TRLGRPOTrainer, tmp_path / "trl", **common)
    upstream.train()
    runs = {
        "skipped": [GardoKL(**ALL), GardoReference(max_kl=None, max_steps=None)],
        # these do run: the share stays 1, nothing is ever stale, all texts are at the same distance
        "active": [
            GardoKL(fraction=1.0, bounds=(0.9, 1.0), window=30, normalize="gated"),
            GardoReference(max_kl=None, max_steps=1000),
            GardoDiversity(embedding=f"python:{__name__}.embed_alike"),
        ],
    }
    for name, methods in runs.items():
        ours = build(GRPOTrainer, tmp_path / name, methods=methods, **common)
        ours.train()
        same_run(ours, upstream)


def embed_alike(texts):
    return torch.ones(len(texts), 3)


def test_closed_gate_is_trl_without_kl(tmp_path):
    upstream = build(TRLGRPOTrainer, tmp_path / "trl", max_steps=8, beta=0.0)
    upstream.train()
    method = GardoKL(fraction=0.0, bounds=(0.0, 0.2))
    ours = build(GRPOTrainer, tmp_path / "ours", max_steps=8, beta=0.1, methods=[method])
    ours.train()
    left, right = support.weights(ours.model), support.weights(upstream.model)
    for name, value in left.items():
        assert torch.allclose(value, right[name], atol=1e-6, rtol=0), name
    assert max(row["kl"] for row in ours.state.log_history if "kl" in row) == 0


def prepared(folder, **settings):
    trainer = build(GRPOTrainer, folder, **settings)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    perturb(trainer.model)
    return trainer


def perturb(model, scale=0.2):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo"},
        {"loss_type": "dapo", "steps_per_generation": 2},
        {"loss_type": "bnpo", "use_bias_correction_kl": False},
        {"loss_type": "dr_grpo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "steps_per_generation": 2},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
@pytest.mark.parametrize("normalize", ["all", "gated"])
def test_loss_has_the_gated_kl(settings, normalize, tmp_path):
    """Against TRL's policy term plus a KL written out here, in value and gradient."""
    method = GardoKL(fraction=0.4, bounds=(0.02, 0.5), normalize=normalize)
    trainer = prepared(tmp_path, methods=[method], beta=0.3, **settings)
    batch = trainer._generate_and_score_completions(PROMPTS)
    if "old_per_token_logps" in batch:
        batch["old_per_token_logps"] = batch["old_per_token_logps"] - 0.1
    matrix = trainer._gathered_rewards.double()
    score = uncertainty(matrix[:, 0], matrix[:, 1:])
    gate = (score > torch.quantile(score, 0.6)).float()
    assert 0 < gate.sum() < 8
    if normalize == "gated":
        gate = gate * 8 / gate.sum()

    kept = {}
    watched = trainer.on_tokens

    def on_tokens(batch, logps, entropies):
        kept["logps"] = logps
        return watched(batch, logps, entropies)

    trainer.on_tokens = on_tokens
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    ours = trainer.compute_loss(trainer.model, dict(batch))
    gradients = torch.autograd.grad(ours, trained)

    trainer.hooked, trainer.beta = False, 0.0
    inner = trainer._get_per_token_logps_and_entropies

    def keep(*args, **kwargs):
        result = inner(*args, **kwargs)
        kept["logps"] = result[0]
        return result

    trainer._get_per_token_logps_and_entropies = keep
    policy = trainer.compute_loss(trainer.model, dict(batch))
    logps, mask = kept["logps"], batch["completion_mask"]
    difference = batch["ref_per_token_logps"] - logps
    kl = torch.expm1(difference) - difference
    if settings.get("use_bias_correction_kl", True):
        log_ratio = logps - batch.get("old_per_token_logps", logps.detach())
        if "importance_sampling_level" in settings:
            log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1)).unsqueeze(1)
        kl = kl * torch.exp(log_ratio)
    per_token = 0.3 * gate.unsqueeze(1) * kl * mask
    divisor = {"dapo": mask.sum() / 2, "bnpo": mask.sum(), "dr_grpo": 8 * 8}.get(settings["loss_type"])
    penalty = (per_token.sum(1) / mask.sum(1)).mean() if divisor is None else per_token.sum() / divisor
    expected = policy + penalty
    assert penalty > 1e-3
    assert ours.item() == pytest.approx(expected.item(), abs=2e-6)
    for left, right in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        assert torch.allclose(left, right, atol=2e-6, rtol=1e-3)


def test_hidden_embeddings_and_their_advantages(tmp_path):
    """The mean final hidden state over completion tokens, from transformers' own output."""
    trainer = prepared(
        tmp_path, methods=[GardoDiversity()], rewards=[support.letter_reward], per_device_train_batch_size=8
    )
    seen = []
    watched = trainer.on_rollout

    def on_rollout(batch, rewards):
        seen.append((batch["posttrain/embeddings"], batch["advantages"]))
        return watched(batch, rewards)

    trainer.on_rollout = on_rollout
    trainer.reward_funcs = [
        lambda completions, **kwargs: [float(i % 3 == 0) for i in range(len(completions))]
    ]
    trainer.args.per_device_train_batch_size = 3  # several parts, the last one smaller
    batch = trainer._generate_and_score_completions(PROMPTS)
    ((embeddings, advantages),) = seen
    assert "posttrain/embeddings" not in batch
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        hidden = trainer.model(
            input_ids=ids, attention_mask=attention, output_hidden_states=True
        ).hidden_states[-1]
    mask = batch["completion_mask"]
    means = [state[-mask.size(1) :][row.bool()].mean(0) for state, row in zip(hidden, mask, strict=True)]
    assert torch.allclose(embeddings, torch.stack(means), atol=1e-5)
    unit = torch.nn.functional.normalize(torch.stack(means).double(), dim=1)
    factor = []
    for start in (0, 4):
        distance = 1 - unit[start : start + 4] @ unit[start : start + 4].T
        nearest = distance.masked_fill(torch.eye(4, dtype=torch.bool), 9.0).min(dim=1).values
        factor += (nearest / nearest.mean()).tolist()
    expected = [a * f if a > 0 else a for a, f in zip(advantages.tolist(), factor, strict=True)]
    assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-3)
    assert max(factor) > 1.05


def measured(trainer):
    return [row["gardo_reference/kl"] for row in trainer.state.log_history if "gardo_reference/kl" in row]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_reference_is_replaced_after_so_many_steps(adapter, tmp_path):
    """After 3 and 6 steps the policy becomes the reference: the KL is 0 at steps 4 and 7."""
    support.model().save_pretrained(tmp_path / "base")
    method = GardoReference(max_kl=None, max_steps=3)
    model = None if adapter else str(tmp_path / "base")
    settings = {"max_steps": 7, "beta": 0.1, "learning_rate": 1e-2}
    trainer = build(GRPOTrainer, tmp_path / "run", adapter=adapter, model=model, methods=[method], **settings)
    references = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            references[state.global_step] = [
                left.detach().clone() for left, _ in trainer._reference_tensors()
            ]
            references[-state.global_step] = [
                right.detach().clone() for _, right in trainer._reference_tensors()
            ]

    trainer.add_callback(Watch())
    trainer.train()
    found = measured(trainer)
    assert len(found) == 7
    zero = [i for i, kl in enumerate(found) if kl < 1e-7]
    assert zero == [0, 3, 6]
    assert min(found[1], found[2], found[4], found[5]) > 1e-6

    def equal(left, right):
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    assert equal(references[1], references[3])
    assert equal(references[4], references[-3])  # the policy after step 3
    assert equal(references[7], references[-6])
    assert not equal(references[4], references[3])
    if adapter:
        assert not any(left.requires_grad for left, _ in trainer._reference_tensors())
    assert trainer.methods[0].state_dict() == {"steps": 1, "stale": False}


def test_reference_is_replaced_when_the_kl_is_large(tmp_path):
    def run(name, max_kl):
        method = GardoReference(max_kl=max_kl, max_steps=None)
        trainer = build(
            GRPOTrainer, tmp_path / name, methods=[method], max_steps=6, beta=0.1, learning_rate=1e-2
        )
        trainer.train()
        return measured(trainer)

    plain = run("plain", 1e9)
    step = next(i for i, kl in enumerate(plain) if kl > plain[1] * 1.5)
    found = run(
        "found",
        (plain[step - 1] + plain[step]) / 2 if plain[step] > max(plain[:step]) else plain[step] * 0.999,
    )
    assert found[: step + 1] == plain[: step + 1]  # until the threshold nothing changed
    assert found[step + 1] < 1e-7
    assert plain[step + 1] > 1e-5


def test_buffered_rollouts_keep_their_reference(tmp_path):
    """With two steps per generation the copy waits for the next generation."""
    method = GardoReference(max_kl=None, max_steps=1)
    settings = {"max_steps": 6, "beta": 0.1, "learning_rate": 1e-2, "steps_per_generation": 2}
    trainer = build(GRPOTrainer, tmp_path, methods=[method], **settings)
    trainer.train()
    found = measured(trainer)
    assert [kl < 1e-7 for kl in found] == [True, False, True, False, True, False]


def test_only_gated_tokens_count_in_the_measured_kl(tmp_path):
    methods = [GardoKL(fraction=0.0, bounds=(0.0, 0.2)), GardoReference(max_kl=1e-9, max_steps=None)]
    trainer = build(GRPOTrainer, tmp_path, methods=methods, max_steps=4, beta=0.1, learning_rate=1e-2)
    trainer.train()
    assert measured(trainer) == [0.0] * 4
    assert trainer.methods[1].state_dict() == {"steps": 4, "stale": False}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_resume_is_exact_around_a_copy(stop, adapter, tmp_path):
    """Two steps per generation: copies after steps 2, 4 and 6, pending where the run stops there."""
    support.model().save_pretrained(tmp_path / "base")

    def methods():
        return [
            GardoKL(fraction=0.5, bounds=(0.1, 0.6), window=1),
            GardoReference(max_kl=None, max_steps=2),
            GardoDiversity(),
        ]

    def run(name, stop=None, **kwargs):
        trainer = build(
            GRPOTrainer,
            tmp_path / name,
            adapter=adapter,
            model=None if adapter else str(tmp_path / "base"),
            methods=methods(),
            callbacks=[StopAt(stop)] if stop else None,
            max_steps=7,
            beta=0.2,
            learning_rate=1e-2,
            steps_per_generation=2,
        )
        trainer.train(**kwargs)
        return trainer

    whole = run("whole")
    run("cut", stop)
    second = run("cut", resume_from_checkpoint=True)
    support.assert_same(support.weights(second.model), support.weights(whole.model))
    for (left, _), (right, _) in zip(second._reference_tensors(), whole._reference_tensors(), strict=True):
        assert torch.equal(left, right)
    keys = ("loss", "gardo_reference/kl", "gardo_kl/share", "gardo_diversity/distance", "kl")
    assert support.logged(second, *keys) == support.logged(whole, *keys)
    for left, right in zip(second.methods, whole.methods, strict=True):
        assert left.state_dict() == right.state_dict()


def test_ace_and_a_moving_reference_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ACE measures drift from a fixed reference, but gardo_reference"):
        build(GRPOTrainer, tmp_path, methods=[ACE(), GardoReference()], beta=0.1)
    with pytest.raises(ValueError, match="add a reward with weight 0"):
        build(GRPOTrainer, tmp_path, methods=[GardoKL()], beta=0.1, reward_weights=[1.0, 1.0])


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    trainer = build(GRPOTrainer, tmp_path, methods=[GardoReference()], beta=0.1)
    trainer.is_deepspeed_enabled = True
    state = type(trainer.accelerator.state)
    monkeypatch.setattr(state, "deepspeed_plugin", SimpleNamespace(zero_stage=3))
    with pytest.raises(ValueError, match="cannot be moved while DeepSpeed ZeRO-3 shards"):
        trainer._refuse_sharded_reference()


def test_evaluation_changes_no_state(tmp_path):
    methods = [GardoKL(window=1), GardoReference(max_kl=1e-9), GardoDiversity()]
    trainer = build(GRPOTrainer, tmp_path, methods=methods, max_steps=2, beta=0.1, learning_rate=1e-2)
    trainer.train()
    before = [method.state_dict() for method in methods]
    references = [left.clone() for left, _ in trainer._reference_tensors()]
    trainer.evaluate()
    assert [method.state_dict() for method in methods] == before
    assert before[1]["stale"]
    assert all(torch.equal(a, b) for a, (b, _) in zip(references, trainer._reference_tensors(), strict=True))

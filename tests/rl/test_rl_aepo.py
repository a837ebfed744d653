"""AEPO: controller, mechanism, which tempered rows train and how much, and that nobody else touches them."""

import math

import pytest
import support
import torch
from rollout_ranks import FixedRollouts, even, written
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import ACE, AEPO, LpReg, Spine
from posttrain.rl.aepo import aux_temperature, row_weights
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import Extra, Tokens

# ---- controller and mechanism -----------------------------------------------------------------------------


def test_temperatures_of_the_sheet():
    entropies = (0.1, 0.5, 0.9)
    assert [aux_temperature(h, 0.5) for h in entropies] == [1.2, 1.2, 0.8]
    linear = [aux_temperature(h, 0.5, schedule="linear") for h in entropies]
    assert linear == pytest.approx([1.2, 1.0, 0.8])
    assert aux_temperature(0.45, 0.5, schedule="linear") == pytest.approx(1.05)
    assert aux_temperature(None, 0.5) == 1.2  # the first step is hot
    assert aux_temperature(None, 0.5, schedule="linear") == 1.0


@pytest.mark.parametrize(
    ("temperature", "gradient", "product"),
    [
        (0.8, [0.0654382, -0.0353854, -0.0300528], -0.0277352),
        (1.0, [0.0, 0.0, 0.0], 0.0),
        (1.2, [-0.0492778, 0.0229680, 0.0263098], 0.0208897),
    ],
)
def test_tempered_positives_move_the_entropy_the_way_of_the_temperature(temperature, gradient, product):
    logits = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    entropy = -(logps.exp() * logps).sum()
    assert entropy.item() == pytest.approx(0.8323956, abs=1e-7)
    tempered = (logits.detach() / temperature).softmax(0)
    (moved,) = torch.autograd.grad((tempered * logps).sum(), logits, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(entropy, logits)
    assert moved.tolist() == pytest.approx(gradient, abs=1e-7)
    assert (moved @ by_entropy).item() == pytest.approx(product, abs=1e-7)


def test_weights_of_the_sheet():
    main, aux = row_weights(16, 2, 1 / 8)
    assert (main, aux) == pytest.approx((1.1428571, 1.0))
    losses = torch.tensor([0.2] * 14 + [-1.0] * 2)
    weights = torch.tensor([main] * 14 + [aux] * 2)
    assert (losses * weights).mean().item() == pytest.approx(0.075)


def extra(advantages, rewards=None, tokens=None, rows=16):
    n = len(advantages)
    return Extra(
        rewards=torch.tensor(rewards or [[0.0]] * n),
        advantages=torch.tensor(advantages),
        tokens=torch.tensor(tokens or [3] * n),
        names=tuple("abc"[: len(rewards[0]) if rewards else 1]),
        rows=rows,
        gauges=Gauges(),
    )


def test_replace_takes_the_first_positive_rows_and_half_of_them_when_too_hot():
    rows = extra([0.06, 0.05, -1.0, 0.9, 0.8, 0.7, 2.0], tokens=[3, 3, 3, 0, 3, 3, 3])
    for limit, entropy, expected in [
        (60, None, [0, 4, 5, 6]),
        (3, 0.5, [0, 4, 5]),
        (60, 0.51, [0, 4]),
        (3, 0.51, [0]),
        (1, 0.51, []),
    ]:
        method = AEPO(max_aux_rows=limit)
        method._entropy = entropy
        used = method.admit(rows)
        assert used.rows.tolist() == expected
        assert used.advantages.tolist() == [1.0] * len(expected)
        assert (used.weight, used.main_weight) == (1.0, 1.0)
    method = AEPO(max_aux_rows=3, halve_when_above=False)
    method._entropy = 9.0
    assert method.admit(rows).rows.tolist() == [0, 4, 5]
    assert AEPO().admit(extra([0.0, -1.0])).rows.tolist() == []  # nothing positive: m = 0
    assert AEPO().admit(extra([1.0] * 8, rows=4)).rows.tolist() == [0, 1, 2, 3]  # no more than there are


def test_too_many_rows_are_said_once(caplog):
    method = AEPO(max_aux_rows=2)
    for _ in range(2):
        method.admit(extra([1.0], rows=16))
    assert caplog.text.count("up to 2 of 16 rows (12 %)") == 1
    AEPO(max_aux_rows=2).admit(extra([1.0], rows=40))
    assert len(caplog.records) == 1


def test_alpha_takes_every_row_and_rewards_the_right_ones():
    nan = float("nan")
    rewards = [[1.0, 0.0], [0.0, 1.0], [0.9999, 0.0], [nan, 1.0]]
    used = AEPO(mode="alpha", alpha=1 / 8).admit(extra([0.0] * 4, rewards, rows=28))
    assert used.rows.tolist() == [0, 1, 2, 3]
    assert used.advantages.tolist() == [1.0, 0.0, 0.0, 0.0]  # an all-correct group counts, too
    assert (used.main_weight, used.weight) == pytest.approx((32 / 28, 1 / 8 * 32 / 4))
    other = AEPO(mode="alpha", signal="b", positive_rule="reward").admit(extra([0.0] * 4, rewards))
    assert other.advantages.tolist() == [0.0, 1.0, 0.0, 1.0]
    by_rank = AEPO(mode="alpha", positive_rule="advantage").admit(extra([1.0, 0.0, 1.0, -1.0]))
    assert by_rank.advantages.tolist() == [1.0, 0.0, 1.0, 0.0]


def tokens(entropy, count, *, extra_count=0, reduce=lambda values: values, training=True):
    """``count`` main tokens of ``entropy`` nats and surprisal 3, ``extra_count`` aux tokens of 9 nats."""
    c = count + extra_count + 1
    mask, aux = torch.zeros(1, c), torch.zeros(1, c)
    mask[0, :count], aux[0, count : count + extra_count] = 1, 1
    entropies = torch.full((1, c), float("nan"))
    entropies[0, :count], entropies[0, count : count + extra_count] = entropy, 9.0
    blank = torch.zeros(1)
    return Tokens(
        logps=torch.full((1, c), -3.0),
        entropies=entropies,
        old_logps=torch.zeros(1, c),
        ref_logps=None,
        advantages=blank,
        reward=blank,
        tied=blank.bool(),
        mask=mask,
        extra_mask=aux,
        gauges=Gauges(),
        reduce=reduce,
        training=training,
    )


def measured(method):
    method.plan_extra()
    return method._entropy


def test_the_measurement_is_a_mean_over_tokens_of_the_whole_rollout():
    method = AEPO()
    assert measured(method) is None
    assert method.token_weights(tokens(1.0, 3, extra_count=5)) is None
    method.token_weights(tokens(2.0, 1))
    method.optimizer_step()
    method.token_weights(tokens(100.0, 9, training=False))  # evaluation changes nothing
    method.token_weights(tokens(4.0, 4))
    method.optimizer_step()
    assert measured(method) == pytest.approx((3 * 1 + 2 + 4 * 4) / 8)
    assert measured(method) == pytest.approx(21 / 8)  # until something new is measured
    everything = AEPO(measure_on_main_only=False)
    everything.token_weights(tokens(1.0, 3, extra_count=1))
    everything.optimizer_step()
    assert measured(everything) == pytest.approx((3 + 9) / 4)
    surprised = AEPO(measure="surprisal")
    surprised.token_weights(tokens(1.0, 3))
    surprised.optimizer_step()
    assert measured(surprised) == pytest.approx(3.0)


def test_the_measurement_is_reduced_and_saved():
    method = AEPO()
    method.token_weights(tokens(1.0, 2, reduce=lambda values: values + torch.tensor([6.0, 1.0])))
    method.optimizer_step()
    again = AEPO()
    again.load_state_dict(method.state_dict())
    assert measured(again) == measured(method) == pytest.approx((2 + 6) / 3)
    assert again.state_dict() == {"entropy": pytest.approx(8 / 3), "sums": [0.0, 0.0]}


def bandit(start, *, method=None, steps=1500, seed=0):
    """Mean entropy over the last third of GRPO on an eight-armed bandit with noisy 0/1 rewards."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.tensor([0.9, 0.85, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1])
    logits, history = start.clone(), []

    def sample(n, temperature=1.0):
        arms = torch.multinomial((logits / temperature).softmax(0), n, replacement=True, generator=generator)
        return arms, (torch.rand(n, generator=generator) < chance[arms]).float()

    def ascent(arms, advantages):
        one_hot = torch.nn.functional.one_hot(arms, 8).float()
        return ((one_hot - logits.softmax(0)) * advantages.unsqueeze(1)).sum(0)

    for _ in range(steps):
        arms, rewards = sample(64)
        grouped = rewards.view(8, 8)
        advantages = (
            (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        ).flatten()
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        history.append(entropy.item())
        step = ascent(arms, advantages)
        if method is not None:
            plan = method.plan_extra()
            assert plan is not None
            hot, hot_rewards = sample(64, plan.temperature)
            made = extra([0.0] * 64, [[r] for r in hot_rewards.tolist()], rows=64)
            used = method.admit(made)
            step = ascent(arms[len(used.rows) :], advantages[len(used.rows) :])
            step = step + ascent(hot[used.rows], used.advantages)
            method.token_weights(tokens(entropy.item(), 8))
            method.optimizer_step()
        logits = logits + 0.1 * step / 64
    return sum(history[-steps // 3 :]) / (steps // 3)


@pytest.mark.parametrize("start", ["above", "below"])
def test_the_entropy_settles_at_the_target_where_it_would_collapse(start):
    logits = torch.zeros(8) if start == "above" else torch.tensor([3.5, 0, 0, 0, 0, 0, 0, 0])
    entropy = torch.distributions.Categorical(logits=logits).entropy().item()
    assert (entropy > 1.0) == (start == "above")
    method = AEPO(
        target_entropy=1.0,
        max_aux_rows=40,
        positive_rule="reward",
        temperature_high=2.0,
        temperature_low=0.5,
        halve_when_above=False,
    )
    assert bandit(logits, method=method) == pytest.approx(1.0, abs=0.1)
    assert bandit(logits) < 0.4


# ---- in the trainer ---------------------------------------------------------------------------------------


def build(tmp_path, methods, cls=FixedRollouts, rewards=even, **options):
    kwargs = {} if cls is TRLGRPOTrainer else {"methods": methods}
    trainer = cls(
        model=support.model(),
        args=support.grpo_config(tmp_path, **options),
        reward_funcs=rewards,
        train_dataset=support.prompts(40),
        processing_class=support.tokenizer(),
        **kwargs,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def inputs(trainer, *numbers):
    return [dict(trainer.train_dataset[n]) for n in numbers for _ in range(trainer.num_generations)]


def written_rows(batch):
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]


def answers(trainer, number, temperature=1.0):
    prompt = trainer.train_dataset[number]["prompt"]
    rows = [written(prompt, i, temperature) for i in range(4)]
    texts = [trainer._tokenizer.decode(row) for row in rows]
    return rows, [reward == 1 for reward in even(texts)]


def test_replaced_rows(tmp_path):
    trainer = build(tmp_path, [AEPO(max_aux_rows=3, aux_prompt_fraction=0.5)], per_device_train_batch_size=16)
    plain = build(tmp_path / "plain", [], per_device_train_batch_size=16)
    torch.manual_seed(0)
    given = inputs(trainer, 10, 11, 12, 13)
    batch, base = (t._generate_and_score_completions(given) for t in (trainer, plain))
    hot = [(row, good) for n in (10, 11) for row, good in zip(*answers(trainer, n, 1.2), strict=True)]
    per_group = [sum(good for _, good in hot[i : i + 4]) for i in (0, 4)]
    assert per_group == [2, 2]  # mixed, so that the right rows have an advantage
    positive = [row for row, good in hot if good]
    used = positive[:3]
    assert len(used) == 3
    m = len(used)
    assert written_rows(batch) == used + written_rows(base)[m:]
    assert batch["advantages"].tolist() == pytest.approx([1.0] * m + base["advantages"][m:].tolist())
    assert batch["posttrain/extra"].tolist() == [True] * m + [False] * (16 - m)
    assert batch["posttrain/weight"].tolist() == [1.0] * 16
    assert batch["posttrain/reward"].tolist()[:m] == [1.0] * m
    assert not batch["posttrain/tied"][:m].any()
    assert batch["num_items_in_batch"] == sum(len(row) for row in written_rows(batch))
    metrics, expected = trainer._metrics["train"], plain._metrics["train"]
    for name in ("reward", "frac_reward_zero_std", "completions/mean_length"):
        assert metrics[name] == expected[name]  # TRL's log is that of the main rows
    assert trainer.last_completions() == plain.last_completions()
    assert metrics["aepo/temperature"] == pytest.approx([1.2])
    assert metrics["aepo/used_rows"] == [float(m)]
    assert metrics["aepo/aux_rows"] == [8.0]
    assert trainer.generation_config.temperature == trainer.temperature == 1.0


def test_the_aux_gradient_is_reinforce_with_reward_one(tmp_path):
    trainer = build(
        tmp_path, [AEPO(max_aux_rows=3)], loss_type="grpo", per_device_train_batch_size=16, beta=0.0
    )
    batch = trainer._generate_and_score_completions(inputs(trainer, 10, 11, 12, 13))
    extra_rows = batch["posttrain/extra"]
    assert extra_rows.any()
    batch["advantages"] = torch.where(extra_rows, batch["advantages"], 0.0)
    parameters = list(trainer.model.parameters())
    loss = trainer.compute_loss(trainer.model, dict(batch))
    found = torch.autograd.grad(loss, parameters)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, batch["completion_ids"].size(1)
    )
    mask = batch["completion_mask"]
    rows = (logps * mask).sum(1) / mask.sum(1)
    expected = torch.autograd.grad(-rows[extra_rows].sum() / 16, parameters)
    assert loss.item() == pytest.approx(-int(extra_rows.sum()) / 16, abs=1e-6)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-6


def moved_reference(trainer):
    """A reference that is not the policy, so that the KL is not zero."""
    model = trainer.ref_model if trainer.ref_model is not None else trainer._own_reference
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def test_alpha_mode_is_the_main_loss_plus_alpha_times_the_aux_mean_without_kl(tmp_path, monkeypatch):
    support.model().save_pretrained(tmp_path / "base")
    monkeypatch.setattr("trl.trainer.grpo_trainer.get_config_model_id", lambda config: str(tmp_path / "base"))
    settings = {"loss_type": "grpo", "per_device_train_batch_size": 16, "beta": 0.3}
    method = AEPO(mode="alpha", alpha=1 / 4, aux_prompt_fraction=0.5)
    trainer, plain = build(tmp_path, [method], **settings), build(tmp_path / "plain", [], **settings)
    for each in (trainer, plain):
        torch.manual_seed(5)
        moved_reference(each)
    given = inputs(trainer, 10, 11, 12, 13)
    batch, base = (t._generate_and_score_completions(given) for t in (trainer, plain))
    hot = [(row, good) for n in (10, 11) for row, good in zip(*answers(trainer, n, 1.2), strict=True)]
    assert written_rows(batch) == written_rows(base) + [row for row, _ in hot]
    assert batch["posttrain/extra"].tolist() == [False] * 16 + [True] * 8
    main, aux = 24 / 16, 1 / 4 * 24 / 8
    expected = [aux * good for _, good in hot]
    assert batch["advantages"][16:].tolist() == pytest.approx(expected)
    assert batch["advantages"][:16].tolist() == pytest.approx((base["advantages"] * main).tolist())
    loss = trainer.compute_loss(trainer.model, dict(batch))
    main_loss = plain.compute_loss(plain.model, dict(base))
    right = sum(good for _, good in hot) / 8
    assert 0 < right < 1
    assert loss.item() == pytest.approx(main_loss.item() - 1 / 4 * right, abs=2e-6)
    found = torch.autograd.grad(loss, list(trainer.model.parameters()))
    by_main = torch.autograd.grad(main_loss, list(plain.model.parameters()))
    only_aux = dict(batch)
    only_aux["advantages"] = torch.where(batch["posttrain/extra"], batch["advantages"], 0.0)
    only_aux["posttrain/weight"] = torch.zeros(24)  # no KL of the main rows
    by_aux = torch.autograd.grad(
        trainer.compute_loss(trainer.model, only_aux), list(trainer.model.parameters())
    )
    for a, b, c in zip(found, by_main, by_aux, strict=True):
        assert (a - b - c).abs().max() < 2e-6


def test_no_other_method_touches_aux_rows(tmp_path, monkeypatch):
    """Mask, factor, penalty and gauges of SPINE, ACE and Lp-Reg are those of the main rows alone."""
    methods = [
        AEPO(max_aux_rows=3),
        ACE(),
        Spine(fork_ratio=0.2, band_weight_low=0.3, band_weight_high=0),
        LpReg(rho=1.0),
    ]
    trainer = build(
        tmp_path, methods, per_device_train_batch_size=16, epsilon=1.0, epsilon_high=9.0, loss_type="dr_grpo"
    )
    moved_reference(trainer)
    batch = trainer._generate_and_score_completions(inputs(trainer, 10, 11, 12, 13))
    m = int(batch["posttrain/extra"].sum())
    assert m > 0
    seen = {}
    upstream = trainer.on_tokens
    penalties = {}

    def on_tokens(inner, logps, entropies):
        advantages = upstream(inner, logps, entropies)
        seen["advantages"] = advantages
        return advantages

    for cls in (Spine, LpReg):
        original = cls.token_penalty

        def penalty(self, t, original=original, name=cls.name):
            penalties[name] = original(self, t)
            return penalties[name]

        monkeypatch.setattr(cls, "token_penalty", penalty)
    monkeypatch.setattr(trainer, "on_tokens", on_tokens)
    whole = trainer.compute_loss(trainer.model, dict(batch)).item()
    mask = batch["completion_mask"][:m].bool()
    assert (seen["advantages"][:m][mask] == 1.0).all()
    assert (seen["advantages"][m:] == 0).float().mean() > 0.5  # elsewhere SPINE cuts four of five
    assert penalties["spine"][:m].abs().max() == 0
    assert penalties["lp_reg"][:m].abs().max() == 0
    # without the aux rows the other terms are the same: with dr_grpo each row has its own divisor
    main = trainer.select_rows(batch, torch.arange(m, 16))
    rest = trainer.compute_loss(trainer.model, main).item() * (16 - m) / 16
    aux = -mask.sum().item() / (16 * trainer.max_completion_length)
    assert whole == pytest.approx(rest + aux, abs=1e-6)


def test_the_sampler_correction_is_off_on_aux_rows(tmp_path):
    trainer = build(tmp_path, [AEPO(max_aux_rows=3)], per_device_train_batch_size=16)
    raw = trainer.raw_rollout

    def with_ratios(given):
        batch = raw(given)
        batch["importance_sampling_ratio"] = torch.full(batch["completion_ids"].shape, 0.5)
        return batch

    trainer.raw_rollout = with_ratios
    batch = trainer._generate_and_score_completions(inputs(trainer, 10, 11, 12, 13))
    where = batch["posttrain/extra"]
    width = batch["completion_mask"].sum(1).max()
    assert where.any()
    assert (batch["importance_sampling_ratio"][where] == 1).all()
    assert (batch["importance_sampling_ratio"][~where, : width // 2] == 0.5).all()


def test_the_temperature_is_that_of_the_generation_alone(tmp_path):
    """With a real model: nearly cold samples are the greedy ones, and scores keep dividing by 1."""
    trainer = build(tmp_path, [], cls=GRPOTrainer, rewards=support.letter_reward)
    with trainer.generation_temperature(1e-7):
        cold = trainer.raw_rollout(inputs(trainer, 0, 1))
    assert trainer.generation_config.temperature == 1.0
    for first in (0, 4):
        assert len({tuple(row) for row in written_rows(cold)[first : first + 4]}) == 1
    warm = trainer.raw_rollout(inputs(trainer, 0, 1))
    assert len({tuple(row) for row in written_rows(warm)}) > 4
    ids = torch.cat([cold["prompt_ids"], cold["completion_ids"]], 1)
    mask = torch.cat([cold["prompt_mask"], cold["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits
    with trainer.generation_temperature(1e-7):
        scored = trainer._logps_of_batch(trainer.model, cold, 8)
    columns = cold["completion_ids"].size(1)
    expected = logits[:, -columns - 1 : -1].log_softmax(-1).gather(2, cold["completion_ids"].unsqueeze(2))
    kept = cold["completion_mask"].bool()
    assert scored[kept].tolist() == pytest.approx(expected.squeeze(2)[kept].tolist(), abs=1e-5)


def trained(trainer, **kwargs):
    trainer.train(**kwargs)
    return trainer


@pytest.mark.parametrize("method", [AEPO(max_aux_rows=0), AEPO(mode="alpha", alpha=0)], ids=["m", "alpha"])
def test_neutral_settings_are_trl(method, tmp_path):
    upstream = trained(build(tmp_path / "a", [], TRLGRPOTrainer, support.letter_reward, max_steps=20))
    ours = trained(build(tmp_path / "b", [method], GRPOTrainer, support.letter_reward, max_steps=20))
    keys = ("loss", "grad_norm", "reward", "entropy", "num_tokens")
    assert support.logged(ours, *keys) == support.logged(upstream, *keys)
    assert len(support.logged(ours, *keys)) == 20
    support.assert_same(support.weights(ours.model), support.weights(upstream.model))


@pytest.mark.parametrize("mode", ["replace", "alpha"])
def test_resume_in_the_middle_of_a_buffer_is_exact(mode, tmp_path):
    settings = {
        "per_device_train_batch_size": 8,
        "steps_per_generation": 4,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 6,
        "rewards": support.letter_reward,
        "cls": GRPOTrainer,
    }

    def method():
        return AEPO(mode=mode, max_aux_rows=4, target_entropy=3.0, positive_rule="advantage")

    whole = trained(build(tmp_path / "a", [method()], **settings))
    cut = build(tmp_path / "b", [method()], **settings)
    trained(cut, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    support.assert_same(support.weights(cut.model), support.weights(whole.model))
    keys = ("loss", "grad_norm")
    assert support.logged(cut, *keys)[-4:] == support.logged(whole, *keys)[-4:]
    (state,) = (t.methods[0].state_dict() for t in (cut,))
    assert state == whole.methods[0].state_dict()
    assert state["entropy"] == pytest.approx(math.log(41), abs=0.3)  # near uniform over 43 tokens
    temperatures = [row["aepo/temperature"] for row in whole.state.log_history if "aepo/temperature" in row]
    assert temperatures == pytest.approx([1.2, 0.8, 0.8])


def test_evaluation_generates_nothing_more(tmp_path):
    trainer = build(tmp_path, [AEPO()], per_device_train_batch_size=16, per_device_eval_batch_size=8)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(inputs(trainer, 0, 1))
    trainer.compute_loss(trainer.model, batch)
    assert "posttrain/extra" not in batch
    assert trainer.methods[0].state_dict() == {"entropy": None, "sums": [0.0, 0.0]}


def test_two_methods_with_extra_rows_and_a_rollout_function_are_refused(tmp_path):
    class Second(AEPO):
        name = "second"

    with pytest.raises(ValueError, match="one method may ask for extra rows, found aepo and second"):
        build(tmp_path, [AEPO(), Second()])
    with pytest.raises(ValueError, match="temperature of its own, which a rollout_func does not know"):
        GRPOTrainer(
            model=support.model(),
            args=support.grpo_config(tmp_path),
            reward_funcs=even,
            train_dataset=support.prompts(),
            processing_class=support.tokenizer(),
            rollout_func=lambda prompts, trainer: {},
            methods=[AEPO()],
        )


def test_temperatures_in_the_wrong_order():
    with pytest.raises(ValueError, match=r"temperature_low=1.3 is above temperature_high=1.2: swap"):
        AEPO(temperature_low=1.3)

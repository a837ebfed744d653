"""Each alarm goes off on the run it is for, once, and stays quiet on a healthy one."""

import json
from types import SimpleNamespace

import pytest

from posttrain.run.alarms import Alarms
from posttrain.run.callbacks import usefulness
from posttrain.run.rules import RULES, Limits

HEALTHY = {
    "entropy": 0.8,
    "reward": 0.5,
    "completions/mean_length": 100,
    "completions/clipped_ratio": 0.05,
    "frac_reward_zero_std": 0.3,
    "verifier/math/timeout": 0.0,
    "sampling/sampling_logp_difference/mean": 0.002,
}
# answers of 50 tokens, 1 nat each
PAIRS = {
    "rewards/margins": 0.2,
    "logps/chosen": -50.0,
    "logps_per_token/chosen": -1.0,
    "logps/rejected": -50.0,
    "logps_per_token/rejected": -1.0,
    "shift/chosen": 1.0,
    "shift/rejected": -1.0,
    "shift/both_declined": 0.3,
    "saturated": 0.0,
    "probe/logps_shift": 0.0,
    "probe/kl_forward": 0.01,
}


def raised(before, after, tmp_path=None):
    alarms = Alarms(tmp_path / "alarms.jsonl" if tmp_path else None, Limits(patience=3))
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    for logs in [HEALTHY | before] * 3 + [HEALTHY | after] * 6:
        state.global_step += 10
        alarms.on_log(None, state, None, logs=logs)
    return alarms.raised


CASES = {
    "no_gradient": ({"grad_norm": 0.4}, {"grad_norm": 0.0}),
    "entropy_collapse": ({}, {"entropy": 0.01}),
    "entropy_blow_up": ({}, {"entropy": 2.5}),
    "length_collapse": ({}, {"completions/mean_length": 20}),
    "clipped_completions": ({"reward": 0.5}, {"completions/clipped_ratio": 0.9, "reward": 0.1}),
    "dead_groups": ({}, {"frac_reward_zero_std": 0.95}),
    "failing_verifier": ({}, {"verifier/math/timeout": 0.2}),
    "rollout_gap": ({}, {"sampling/sampling_logp_difference/mean": 0.2}),
    "reward_without_gain": ({"eval_reward": 0.5}, {"reward": 0.9, "eval_reward": 0.3}),
    "suppression": (PAIRS, PAIRS | {"shift/chosen": -6.0, "rewards/margins": 0.9}),
    "drastic_drop": (PAIRS, PAIRS | {"shift/rejected": -40.0, "rewards/margins": 4.0}),
    "saturation": (PAIRS, PAIRS | {"saturated": 0.95}),
    "both_declined": (PAIRS, PAIRS | {"shift/both_declined": 0.9, "shift/chosen": -4.0}),
    "dispersion": (PAIRS, PAIRS | {"probe/kl_forward": 0.8}),
}


def test_every_rule_has_a_case():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("name", CASES)
def test_alarm(name, tmp_path):
    found = raised(*CASES[name], tmp_path)
    assert list(found) == [name]
    lines = (tmp_path / "alarms.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == [name]  # once, however long it lasts
    assert found[name].advice
    assert 30 < found[name].step <= 60  # after the healthy part, within its patience


def test_a_heavy_tail_is_a_gap_whatever_the_mean():
    found = raised({"rollout_gap/over_10_percent": 0.08}, {"rollout_gap/over_10_percent": 0.4})
    assert list(found) == ["rollout_gap"]
    assert "40% of the tokens" in found["rollout_gap"].message
    assert raised({}, {"rollout_gap/over_10_percent": 0.08}) == {}


def test_narrowing_shows_in_pass_at_k_and_names_what_to_try():
    before = {"held_out/pass@1": 0.3, "held_out/pass@16": 0.9}
    after = {"reward": 0.9, "held_out/pass@1": 0.6, "held_out/pass@16": 0.7}
    found = raised(before, after)["reward_without_gain"]
    assert "held-out pass@16 fell from 0.9 to 0.7" in found.message
    assert "ace" in found.advice
    assert raised(before, after | {"held_out/pass@16": 0.88}) == {}  # within the limit
    assert raised(before, after | {"reward": 0.5}) == {}  # no rise, no alarm


def test_preference_alarms_need_both_halves_of_what_they_say():
    falling = PAIRS | {"shift/chosen": -6.0}
    assert raised(PAIRS, falling) == {}  # the margin did not grow
    assert raised(PAIRS, PAIRS | {"rewards/margins": 0.9, "shift/chosen": -4.0}) == {}  # within the limit
    assert (
        raised(PAIRS, PAIRS | {"shift/rejected": -40.0, "shift/chosen": 20.0}) == {}
    )  # chosen ones are learned
    assert raised(PAIRS, PAIRS | {"shift/both_declined": 0.9}) == {}  # by next to nothing
    assert raised(PAIRS, PAIRS | {"probe/logps_shift": 5.0}) == {}  # everything rises
    found = raised(PAIRS, PAIRS | {"probe/logps_shift": 5.0, "shift/chosen": -1.0})
    assert "likelier by 5 nats, while chosen ones fell by 1" in found["dispersion"].message
    found = raised(PAIRS, falling | {"rewards/margins": 0.9})["suppression"]
    assert "by 0.12 nats per token, while the margin grew from 0.2 to 0.9" in found.message
    assert all(word in found.advice for word in ("rpo", "flex_dpo", "learning rate"))


def test_entropy_of_a_preference_run_has_advice_of_its_own():
    advice = raised(PAIRS, PAIRS | {"entropy": 0.01})["entropy_collapse"].advice
    assert "rpo" in advice
    assert "epsilon_high" not in advice


def test_a_reward_that_tells_nothing_apart_is_named_within_its_first_logs():
    alarms = Alarms(None, Limits())
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    for _ in range(Limits().patience):
        assert not alarms.raised
        state.global_step += 1
        alarms.on_log(None, state, None, logs=HEALTHY | {"frac_reward_zero_std": 1.0, "reward": 1.0})
    assert list(alarms.raised) == ["dead_groups"]
    assert "100% of the groups" in alarms.raised["dead_groups"].message
    assert "constant reward" in alarms.raised["dead_groups"].advice


def test_a_healthy_run_is_quiet():
    assert (
        raised({}, {"reward": 0.8, "entropy": 0.5, "completions/mean_length": 90, "eval_reward": 0.7}) == {}
    )


def test_missing_and_broken_numbers_are_left_out():
    assert raised({"entropy": None}, {"entropy": float("nan"), "reward": None}) == {}


def test_clipping_that_pays_is_no_alarm():
    assert raised({"reward": 0.1}, {"completions/clipped_ratio": 1.0, "reward": 1.0}) == {}


def test_a_resumed_run_does_not_repeat_itself(tmp_path):
    raised(*CASES["dead_groups"], tmp_path)
    alarms = Alarms(tmp_path / "alarms.jsonl", Limits(patience=3))
    history = [HEALTHY | {"frac_reward_zero_std": 0.95} for _ in range(6)]
    state = SimpleNamespace(is_world_process_zero=True, global_step=90, log_history=history)
    alarms.on_train_begin(None, state, None)
    alarms.on_log(None, state, None, logs=history[0])
    assert len((tmp_path / "alarms.jsonl").read_text().splitlines()) == 1
    # resumed from before the alarm, the history is that of the checkpoint and the line is written anew
    state.global_step = 10
    alarms.on_train_begin(None, state, None)
    assert (tmp_path / "alarms.jsonl").read_text() == ""


def test_usefulness():
    rows = [
        {"completion": "a", "advantage": 0.0},
        {"completion": "a", "advantage": 0.0},
        {"completion": "a", "advantage": 1.0},
        {"completion": "b", "advantage": -1.0},
    ]
    assert usefulness(rows, 2) == {"groups/useful": 0.5, "completions/distinct": 0.75}
    assert usefulness([], 2) == {}


def test_weights_that_get_no_gradient_are_named_within_the_first_logs():
    alarms = Alarms(None, Limits())
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    for state.global_step in range(1, Limits().patience + 1):
        assert not alarms.raised
        alarms.on_log(None, state, None, logs={"loss": 2.0, "grad_norm": 0.0})
    assert list(alarms.raised) == ["no_gradient"]
    assert "use_reentrant" in alarms.raised["no_gradient"].advice
    # groups with equal rewards have no gradient, which is no fault of the model
    dead = {"grad_norm": 0.0, "frac_reward_zero_std": 1.0}
    assert "no_gradient" not in raised({"grad_norm": 0.4}, dead)

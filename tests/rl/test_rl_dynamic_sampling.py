"""Dynamic sampling: which groups are dead and why, what takes their place, and that nothing else changes."""

import logging
import math

import pytest
import support
import torch
from rollout_ranks import written
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import ACE, DynamicSampling
from posttrain.rl.dynamic_sampling import dead_groups, why_dead
from posttrain.rl.rollouts import PromptOrder

NAN = float("nan")


# ---- which groups are dead --------------------------------------------------------------------------------


def test_groups_are_dead_when_outcomes_agree_within_the_tolerance():
    outcomes = torch.tensor(
        [[1, 1, 1], [0, 0, 0], [0.1, 0.1, 0.1 + 5e-7], [0, 0, 1], [0.5, NAN, 0.5], [NAN, NAN, 1], [NAN] * 3]
    )
    assert dead_groups(outcomes).tolist() == [True, True, True, False, True, True, True]
    assert dead_groups(outcomes, tolerance=1.0).all()
    assert dead_groups(torch.tensor([[0.0, 1e-5]]), tolerance=0.0).tolist() == [False]


def test_every_dead_group_has_one_reason():
    outcomes = torch.tensor([[1, 1], [0, 0], [0.5, 0.5], [NAN, NAN], [0, 1], [-1, -1], [NAN, 1]])
    dead = torch.tensor([True, True, True, True, False, True, True])
    reasons = why_dead(outcomes, dead)
    assert reasons["all_solved"].tolist() == [True, False, False, False, False, False, True]
    assert reasons["all_failed"].tolist() == [False, True, False, False, False, True, False]
    assert reasons["constant"].tolist() == [False, False, True, False, False, False, False]
    assert reasons["unscored"].tolist() == [False, False, False, True, False, False, False]
    assert torch.equal(torch.stack(list(reasons.values())).sum(dim=0), dead.long())


def test_prompts_are_drawn_once_per_pass_in_an_order_that_a_number_restores():
    order = PromptOrder(5, seed=3)
    drawn = [order.next() for _ in range(12)]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert drawn[:5] != drawn[5:10]
    again = PromptOrder(5, seed=3)
    again.position = 7
    assert [again.next() for _ in range(5)] == drawn[7:]


# ---- in the trainer ---------------------------------------------------------------------------------------


def rollout(prompts, trainer):
    tokenizer = support.tokenizer()
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [written(prompt, i % trainer.num_generations) for i, prompt in enumerate(prompts)],
        "logprobs": None,
    }


def number(prompt):
    return int(prompt.removesuffix("?").split()[-1])


def graded(prompts, completions, **_):
    """Prompts divisible by 3 are solved by everybody, by 5 by nobody; of others every second row."""
    return [
        1.0 if number(p) % 3 == 0 else 0.0 if number(p) % 5 == 0 else float(i % 2)
        for i, p in enumerate(prompts)
    ]


def shaped(completions, **_):
    """A length penalty, which differs within every group."""
    return [-0.01 * len(text) for text in completions]


def build(tmp_path, methods, rewards=graded, rows=40, cls=GRPOTrainer, model=None, **options):
    kwargs = {} if cls is TRLGRPOTrainer else {"methods": methods}
    trainer = cls(
        model=model or support.model(),
        args=support.grpo_config(tmp_path, **options),
        reward_funcs=rewards,
        train_dataset=support.prompts(rows),
        processing_class=support.tokenizer(),
        rollout_func=rollout,
        **kwargs,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def inputs(trainer, *numbers):
    return [dict(trainer.train_dataset[n]) for n in numbers for _ in range(trainer.num_generations)]


def groups_of(trainer, batch):
    """The prompt of each group, from the token ids that train."""
    texts = [
        trainer._tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    size = trainer.num_generations
    assert all(len(set(texts[i : i + size])) == 1 for i in range(0, len(texts), size))
    return texts[::size]


def test_dead_groups_are_replaced_and_every_tensor_follows(tmp_path):
    trainer = build(
        tmp_path,
        [ACE(), DynamicSampling(max_rounds=5)],
        per_device_train_batch_size=8,
        steps_per_generation=2,
        max_completion_length=16,
    )
    with torch.no_grad():
        for parameter in trainer._own_reference.parameters():  # the reference is not the policy
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = trainer._generate_and_score_completions(inputs(trainer, 1, 3, 2, 5))
    prompts = groups_of(trainer, batch)
    assert [number(prompts[0]), number(prompts[2])] == [1, 2]  # the live groups keep their places
    new = [number(prompts[1]), number(prompts[3])]
    assert not {*new} & {1, 2, 3, 5}
    assert len({*new}) == 2
    assert all(n % 3 and n % 5 for n in new)
    for i, (ids, mask) in enumerate(zip(batch["completion_ids"], batch["completion_mask"], strict=True)):
        assert ids[mask.bool()].tolist() == written(prompts[i // 4], i % 4)
        assert (ids[~mask.bool()] == trainer._tokenizer.pad_token_id).all()
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    # rewards 0, 1, 0, 1: the mean is 1/2 and the deviation 1/sqrt(3)
    size = 0.5 / (1 / math.sqrt(3) + 1e-4)
    assert batch["advantages"].tolist() == pytest.approx([-size, size] * 8)
    assert batch["posttrain/reward"].tolist() == [0, 1] * 8
    assert not batch["posttrain/tied"].any()
    live = trainer._logps_of_batch(trainer.model, batch, 4)
    kept = batch["completion_mask"].bool()
    assert batch["old_per_token_logps"][kept].tolist() == pytest.approx(live[kept].tolist(), abs=1e-5)
    reference = trainer._reference_logps(batch)
    assert batch["ref_per_token_logps"][kept].tolist() == pytest.approx(reference[kept].tolist(), abs=1e-5)
    assert (reference - live)[kept].abs().max() > 0.01


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_only_rows_that_stay_are_scored(beta, tmp_path):
    model = support.model()
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")  # where TRL finds its reference
    trainer = build(
        tmp_path,
        [ACE(), DynamicSampling(max_rounds=5)],
        model=model,
        per_device_train_batch_size=8,
        steps_per_generation=2,
        beta=beta,
    )
    reference = trainer.ref_model if beta else trainer._own_reference
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = {"policy": 0, "reference": 0}

    def count(name):
        def hook(module, args, kwargs):
            rows[name] += len(kwargs["input_ids"])

        return hook

    trainer.model.register_forward_pre_hook(count("policy"), with_kwargs=True)
    reference.register_forward_pre_hook(count("reference"), with_kwargs=True)
    batch = trainer._generate_and_score_completions(inputs(trainer, 1, 3, 2, 5))
    assert trainer._metrics["train"]["dynamic_sampling/extra_rows"][0] > 0
    assert rows == {"policy": 16, "reference": 16}
    kept = batch["completion_mask"].bool()
    live, far = trainer._logps_of_batch(trainer.model, batch, 4), trainer._reference_logps(batch)
    assert batch["old_per_token_logps"][kept].tolist() == pytest.approx(live[kept].tolist(), abs=1e-5)
    assert batch["ref_per_token_logps"][kept].tolist() == pytest.approx(far[kept].tolist(), abs=1e-5)
    assert (far - live)[kept].abs().max() > 0.01


def test_the_log_says_what_was_generated_and_the_table_what_trains(tmp_path):
    trainer = build(tmp_path, [DynamicSampling(max_rounds=5)], per_device_train_batch_size=16)
    batch = trainer._generate_and_score_completions(inputs(trainer, 1, 3, 2, 5))
    metrics = trainer._metrics["train"]
    # the first generation: two groups of half right, one of all, one of none
    assert metrics["reward"] == [0.5]
    assert metrics["frac_reward_zero_std"] == [0.5]
    shares = {
        name: metrics[f"dynamic_sampling/{name}"] for name in ("dead_groups", "all_solved", "all_failed")
    }
    assert shares == {"dead_groups": [0.5], "all_solved": [0.25], "all_failed": [0.25]}
    assert metrics["dynamic_sampling/left_dead"] == [0.0]
    (rounds,), (rows,) = metrics["dynamic_sampling/rounds"], metrics["dynamic_sampling/extra_rows"]
    order, found, wanted, made = trainer.prompt_order.seed, 0, 2, 0
    again = PromptOrder(40, order)
    while found < 2:  # by hand: in each round as many as are missing
        made, fresh = made + 1, []
        while len(fresh) < wanted - found:
            drawn = again.next()
            if drawn not in (1, 3, 2, 5):
                fresh.append(drawn)
        rows -= 4 * len(fresh)
        found += sum(bool(n % 3 and n % 5) for n in fresh)
    assert (made, rows) == (rounds, 0)
    assert again.position == trainer.prompt_order.position
    table = trainer.last_completions()
    assert [row["prompt"] for row in table[::4]] == groups_of(trainer, batch)
    assert [row["completion"] for row in table] == trainer.texts_of(batch)
    assert [row["advantage"] for row in table] == pytest.approx(batch["advantages"].tolist())
    assert [row["rewards"]["graded"] for row in table] == [0, 1] * 8
    assert trainer.state.num_input_tokens_seen > batch["num_items_in_batch"] + batch["prompt_mask"].sum()
    (extra,) = metrics["dynamic_sampling/extra_tokens"]
    first = sum(len(written(trainer.train_dataset[n]["prompt"], i)) for n in (1, 3, 2, 5) for i in range(4))
    generated = metrics["completions/mean_length"][0] * 16
    assert generated == pytest.approx(first)  # lengths are those of the first generation
    assert extra > 0


def test_the_signal_is_the_outcome_and_not_the_shaped_sum(tmp_path):
    trainer = build(
        tmp_path, [DynamicSampling(max_rounds=5)], [graded, shaped], per_device_train_batch_size=8
    )
    batch = trainer._generate_and_score_completions(inputs(trainer, 3, 1))
    replaced, kept = groups_of(trainer, batch)
    assert number(replaced) % 3
    assert number(replaced) % 5
    assert number(kept) == 1


def test_a_named_signal(tmp_path):
    method = DynamicSampling(max_rounds=5, signal="graded")
    trainer = build(tmp_path, [method], [shaped, graded], per_device_train_batch_size=8)
    batch = trainer._generate_and_score_completions(inputs(trainer, 3, 1))
    assert number(groups_of(trainer, batch)[0]) % 3
    with pytest.raises(ValueError, match="reward function 'grade', found shaped, graded"):
        build(tmp_path, [DynamicSampling(signal="grade")], [shaped, graded])


def test_what_is_still_dead_has_no_advantage_and_the_warning_says_why(tmp_path, caplog):
    def failing(completions, **_):
        return [0.0] * len(completions)

    trainer = build(
        tmp_path, [DynamicSampling(max_rounds=2)], [failing, shaped], per_device_train_batch_size=8
    )
    with caplog.at_level(logging.WARNING):
        batch = trainer._generate_and_score_completions(inputs(trainer, 3, 1))
    assert [number(prompt) for prompt in groups_of(trainer, batch)] == [3, 1]
    assert batch["advantages"].tolist() == [0.0] * 8  # the sum differs by the length penalty
    assert batch["posttrain/tied"].all()
    metrics = trainer._metrics["train"]
    assert metrics["dynamic_sampling/rounds"] == [2.0]
    assert metrics["dynamic_sampling/extra_rows"] == [16.0]
    assert metrics["dynamic_sampling/left_dead"] == [1.0]
    assert "2 of 2 groups carry no signal after 2 generations more" in caplog.text
    assert "Mostly all_failed: the prompts are too hard" in caplog.text


def test_nothing_is_generated_when_there_are_no_other_prompts(tmp_path):
    trainer = build(tmp_path, [DynamicSampling()], rows=2, per_device_train_batch_size=8)
    trainer._generate_and_score_completions(inputs(trainer, 0, 1))
    assert trainer._metrics["train"]["dynamic_sampling/extra_rows"] == [0.0]
    assert trainer._metrics["train"]["dynamic_sampling/left_dead"] == [0.5]


def test_evaluation_is_left_alone(tmp_path):
    trainer = build(
        tmp_path, [DynamicSampling()], per_device_eval_batch_size=8, per_device_train_batch_size=8
    )
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(inputs(trainer, 3, 5))
    assert [number(prompt) for prompt in groups_of(trainer, batch)] == [3, 5]
    assert not any("dynamic" in name for name in trainer._metrics["eval"])


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="streamed data set"):
        GRPOTrainer(
            model=support.model(),
            args=support.grpo_config(tmp_path),
            reward_funcs=graded,
            train_dataset=support.prompts().to_iterable_dataset(),
            processing_class=support.tokenizer(),
            methods=[DynamicSampling()],
        )


def trained(trainer, **kwargs):
    trainer.train(**kwargs)
    return trainer


@pytest.mark.parametrize("name", ["off", "nothing dead"])
def test_without_dead_groups_the_run_is_trls(name, tmp_path):
    """Off, and on with a reward that always differs within a group: bit for bit, over 20 steps."""
    rewards = graded if name == "off" else shaped_apart
    method = DynamicSampling(max_rounds=0) if name == "off" else DynamicSampling()
    settings = {"rewards": rewards, "max_steps": 20, "per_device_train_batch_size": 8}
    upstream = trained(build(tmp_path / "trl", [], cls=TRLGRPOTrainer, **settings))
    ours = trained(build(tmp_path / "ours", [method], **settings))
    keys = ("loss", "grad_norm", "reward", "entropy", "num_tokens")
    assert support.logged(ours, *keys) == support.logged(upstream, *keys)
    assert len(support.logged(ours, *keys)) == 20
    support.assert_same(support.weights(ours.model), support.weights(upstream.model))


def shaped_apart(completions, **_):
    return [float(i % 4) + len(text) / 100 for i, text in enumerate(completions)]


def test_resume_in_the_middle_of_a_buffer_is_exact(tmp_path):
    settings = {
        "per_device_train_batch_size": 8,
        "steps_per_generation": 4,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    methods = [DynamicSampling()]
    whole = trained(build(tmp_path / "a", methods, **settings))
    cut = build(tmp_path / "b", [DynamicSampling()], **settings)
    trained(cut, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert whole.prompt_order.position > 0
    assert cut.prompt_order.position == whole.prompt_order.position
    support.assert_same(support.weights(cut.model), support.weights(whole.model))
    keys = ("loss", "grad_norm", "dynamic_sampling/dead_groups")
    assert support.logged(cut, *keys)[-2:] == support.logged(whole, *keys)[-2:]

"""One row per method, crossed with what every method owes: a new method without a row fails here by name."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import support
import torch
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import registry
from posttrain.rl.trainer import check_methods


@dataclass(frozen=True)
class Row:
    """What the table needs to know about a method.

    Attributes:
        active: Parameters with which it acts on a tiny run.
        exact: Whether even then it trains as TRL does, up to rounding, only cheaper.
        neutral: Parameters with which it is TRL bit for bit, or why there are none.
        tied: None when groups with all rewards equal are TRL's business alone, else why not.
        trainer: Settings of the trainer that ``active`` needs.
        refused: Settings of the trainer, one at a time, that the method refuses.
        rewards: Reward functions by the names the parameters use.
        adapter: Whether an adapter is trained; with ``beta`` a whole model would have to lie on disk.
    """

    active: dict[str, Any]
    neutral: dict[str, Any] | str
    exact: bool = False
    tied: str | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, Any] = field(default_factory=dict)
    rewards: tuple[Any, ...] = (support.letter_reward,)
    adapter: bool = False


def short_reward(completions, **kwargs):
    """An auxiliary reward that often disagrees with the first."""
    return [1.0 / (1 + len(text)) for text in completions]


ROWS = {
    "aepo": Row(
        active={"max_aux_rows": 4, "target_entropy": 5.0},
        neutral={"max_aux_rows": 0},
        refused={"entropy_coef": 0.1, "use_adaptive_entropy": True},
    ),
    "dynamic_sampling": Row(
        active={"max_rounds": 2},
        neutral={"max_rounds": 0},
        tied="groups that stay dead get advantage 0, rounding included",
    ),
    "skip_zero_advantage": Row(
        active={},
        neutral="it changes nothing but the order of sums",
        exact=True,
        refused={"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    ),
    "ace": Row(active={"alpha": 2.0}, neutral={"alpha": 0.0}, refused={"sync_ref_model": True}),
    "constrained": Row(
        active={"at_least": {"letter_reward": 0.5}},
        neutral="its weights never stand still at those of TRL",
        tied="it makes advantages of its own, which are exactly zero then",
        refused={"multi_objective_aggregation": "normalize_then_sum"},
    ),
    "gardo_diversity": Row(active={}, neutral="it has no strength"),
    "gardo_kl": Row(
        active={"fraction": 0.2},
        neutral={"fraction": 1.0, "step": 0.0, "bounds": (0.0, 1.0)},
        tied="it weighs the KL term, which is there without rewards",
        trainer={"beta": 0.5, "reward_weights": [1.0, 0.0], "num_iterations": 2},
        refused={"beta": 0.0},
        rewards=(support.letter_reward, short_reward),
        adapter=True,
    ),
    "gardo_reference": Row(
        active={"max_steps": 1},
        neutral={"max_kl": None, "max_steps": None},
        trainer={"beta": 0.5},
        refused={"sync_ref_model": True, "beta": 0.0},
        adapter=True,
    ),
    "lp_reg": Row(
        active={"rho": 1.0, "kappa": 0.9},
        neutral={"beta": 0.0},
        trainer={"epsilon": 1.0, "epsilon_high": 9.0},
        refused={"loss_type": "cispo", "importance_sampling_level": "sequence", "delta": 2.0},
    ),
    "spine": Row(
        active={"fork_ratio": 0.5, "band_weight_low": 0.5, "band_weight_high": 0.5},
        neutral={"fork_ratio": 1.0, "band_weight_low": 0.0, "band_weight_high": 0.0},
        tied="the entropy band does not ask for rewards",
        refused={"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "importance_sampling_level": "sequence"},
    ),
    "ttrl": Row(
        active={"n_votes": 4, "n_samples": 2, "extract": "text", "equivalence": "exact"},
        neutral="the vote replaces the verifier",
        tied="the vote replaces the verifier",
        refused={"num_generations": 2},
    ),
}


every_method = pytest.mark.parametrize("name", sorted(ROWS))


def test_every_method_has_a_row():
    missing, gone = registry.available().keys() - ROWS, ROWS.keys() - registry.available()
    assert not missing, (
        f"no row in tests/rl/test_rl_table.py for {', '.join(sorted(missing))}: add one to ROWS with a "
        "setting in which the method acts, its neutral setting and what it refuses"
    )
    assert not gone, f"rows in tests/rl/test_rl_table.py for methods that are gone: {', '.join(sorted(gone))}"


def build(folder, row, parameters=None, *, name="", cls=GRPOTrainer, **settings):
    given = {} if cls is TRLGRPOTrainer else {"methods": [registry.resolve(name)(**parameters)]}
    return cls(
        model=support.model(),
        args=support.grpo_config(folder, **(row.trainer | settings)),
        reward_funcs=list(row.rewards),
        train_dataset=support.prompts(),
        eval_dataset=support.prompts(2),
        processing_class=support.tokenizer(),
        peft_config=support.lora() if row.adapter else None,
        **given,
    )


def one_batch(trainer):
    """A generation batch of two groups, as it reaches the loss."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": f"say {i // 4}?"} for i in range(8)])


def gradients(trainer, loss):
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)
    ]


def same_state(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_state, left, right))
    return left == right


@every_method
def test_documented(name):
    cls = registry.available()[name]
    page = __import__(cls.__module__, fromlist=["_"]).__doc__
    for section in ("Idea", "Formula", "Needs", "When not to use it"):
        assert f"\n{section}\n" in page, f"the page of {name} has no section {section!r}"
    assert cls.paper is None or cls.paper in page
    assert all(info.description for info in cls.model_fields.values())


@every_method
def test_neutral_is_trl_and_active_is_not(name, tmp_path):
    row = ROWS[name]
    upstream = build(tmp_path / "trl", row, cls=TRLGRPOTrainer)
    upstream.train()
    if isinstance(row.neutral, dict):
        neutral = build(tmp_path / "neutral", row, row.neutral, name=name)
        neutral.train()
        assert support.logged(neutral, "loss", "grad_norm") == support.logged(upstream, "loss", "grad_norm")
        support.assert_same(support.weights(neutral.model), support.weights(upstream.model))
    active = build(tmp_path / "active", row, row.active, name=name)
    active.train()
    ours, theirs = (support.logged(trainer, "grad_norm") for trainer in (active, upstream))
    if row.exact:
        assert [value for (value,) in ours] == pytest.approx(
            [value for (value,) in theirs], rel=1e-4, abs=1e-6
        )
    else:
        assert ours != theirs


@every_method
def test_rows_without_tokens_give_a_differentiable_zero(name, tmp_path):
    row = ROWS[name]
    trainer = build(tmp_path, row, row.active, name=name)
    batch = one_batch(trainer)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(trainer, loss))


@every_method
def test_equal_rewards(name, tmp_path):
    """Eight times 0.1 leaves a rounding in the advantages; no method may build on it."""
    row = ROWS[name]
    if row.tied is not None:
        pytest.skip(row.tied)

    def constant(completions, **kwargs):
        return [0.1] * len(completions)

    trainer = build(tmp_path, row, row.active, name=name, num_generations=8)
    trainer.reward_funcs = [constant for _ in trainer.reward_funcs]
    batch = one_batch(trainer)
    assert (batch["advantages"] != 0).any()
    ours = gradients(trainer, trainer.compute_loss(trainer.model, dict(batch)))
    trainer.hooked = False
    upstream = gradients(trainer, trainer.compute_loss(trainer.model, dict(batch)))
    assert all(torch.equal(a, b) for a, b in zip(ours, upstream, strict=True))


@every_method
def test_one_token_rows(name, tmp_path):
    row = ROWS[name]
    trainer = build(tmp_path, row, row.active, name=name, max_completion_length=1, max_steps=3)
    trainer.train()
    values = [value for logs in support.logged(trainer, "loss", "grad_norm") for value in logs]
    assert len(values) == 6
    assert torch.tensor(values).isfinite().all()


@every_method
def test_padding_changes_nothing(name, tmp_path):
    row = ROWS[name]
    trainer = build(
        tmp_path, row, row.active, name=name, steps_per_generation=2, per_device_train_batch_size=4
    )
    batch = one_batch(trainer)
    columns = batch["completion_ids"].size(1)
    wider = {}
    for key, value in batch.items():
        wider[key] = value
        if not key.startswith("prompt_") and value.dim() == 2 and value.size(1) == columns:
            # what stands in a padded column must not matter, so it is nothing sensible
            fill = 0 if value.dtype == torch.bool or key.endswith(("_ids", "_mask")) else -7
            wider[key] = torch.nn.functional.pad(value, (0, 3), value=fill)
    narrow = trainer.compute_loss(trainer.model, batch)
    wide = trainer.compute_loss(trainer.model, wider)
    assert wide.item() == pytest.approx(narrow.item(), abs=1e-5, rel=1e-5)
    for left, right in zip(gradients(trainer, wide), gradients(trainer, narrow), strict=True):
        assert torch.allclose(left, right, atol=1e-5)


@every_method
def test_state_survives_a_round_trip_and_an_evaluation(name, tmp_path):
    row = ROWS[name]
    trainer = build(tmp_path, row, row.active, name=name, max_steps=3, per_device_eval_batch_size=4)
    trainer.train()
    (method,) = trainer.methods
    state = copy.deepcopy(method.state_dict())
    trainer.evaluate()
    assert same_state(method.state_dict(), state)
    torch.save(state, tmp_path / "state.pt")
    fresh = registry.resolve(name)(**row.active)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_state(fresh.state_dict(), state)


@every_method
def test_conflicts_are_refused(name, tmp_path):
    row = ROWS[name]
    method = registry.resolve(name)(**row.active)
    names = tuple(function.__name__ for function in row.rewards)
    config = support.grpo_config(tmp_path, **row.trainer)
    check_methods([method], config, adapter=row.adapter, reward_names=names)
    for key, value in row.refused.items():
        config = support.grpo_config(tmp_path, **(row.trainer | {key: value}))
        with pytest.raises(ValueError, match=key):
            check_methods([method], config, adapter=row.adapter, reward_names=names)

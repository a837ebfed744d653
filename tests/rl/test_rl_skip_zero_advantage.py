"""Rows without advantage skip the forward; loss and gradients are those of all rows."""

import pytest
import support
import torch

from posttrain import GRPOTrainer
from posttrain.rl import ACE, LpReg, SkipZeroAdvantage, Spine
from posttrain.rl.rows import kept_share
from posttrain.rl.skip_zero_advantage import live_rows

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]


def build(tmp_path, methods, **options):
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, **options),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        methods=list(methods),
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def micro_batch(rows=6, columns=5, *, per_token=False):
    """Rows of lengths 5, 4, 3, 2, 1, 5; the advantages of three are zero, two of these between live ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (rows, columns), generator=generator)
    lengths = torch.tensor([5, 4, 3, 2, 1, 5])
    mask = (torch.arange(columns) < lengths.unsqueeze(1)).long()
    advantages = torch.tensor([1.5, 0.0, -0.5, 0.0, 0.0, -0.5])
    if per_token:
        advantages = advantages.unsqueeze(1) * torch.linspace(0.5, 1.5, columns)
    return {
        "prompt_ids": torch.randint(3, 40, (rows, 3), generator=generator),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum() * 2,
        "old_per_token_logps": -3.7 + 0.3 * torch.randn(rows, columns, generator=generator),
        "posttrain/reward": torch.arange(rows).float(),
        "posttrain/tied": advantages.view(rows, -1)[:, 0] == 0,
    }


def outcome(trainer, batch):
    """(loss, gradients, rows that went through the model)."""
    seen = []
    handle = trainer.model.model.register_forward_hook(
        lambda module, args, output: seen.append(len(output.last_hidden_state))
    )
    loss = trainer.compute_loss(trainer.model, dict(batch))
    handle.remove()
    return loss.item(), torch.autograd.grad(loss, list(trainer.model.parameters())), seen


def same_gradients(left, right):
    largest = max(b.abs().max() for b in right)
    assert largest > 1e-4
    for a, b in zip(left, right, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, largest)


@pytest.mark.parametrize("per_token", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients_are_those_of_all_rows(loss_type, per_token, tmp_path):
    level = "sequence" if loss_type == "luspo" else "token"
    settings = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "importance_sampling_level": level}
    batch = micro_batch(per_token=per_token)
    plain = outcome(build(tmp_path, [ACE(alpha=0)], **settings), batch)
    skipping = outcome(build(tmp_path, [SkipZeroAdvantage()], **settings), batch)
    assert (plain[2], skipping[2]) == ([6], [3])
    assert skipping[0] == pytest.approx(plain[0], abs=1e-6, rel=1e-6)
    assert abs(plain[0]) > 1e-3
    same_gradients(skipping[1], plain[1])


def test_shares_by_hand():
    tokens, of = torch.tensor(13), torch.tensor(20)
    for loss_type in ("grpo", "sapo", "dr_grpo", "luspo"):
        assert kept_share(loss_type, 3, 6, tokens, of) == 0.5
    assert kept_share("bnpo", 3, 6, tokens, of).item() == pytest.approx(0.65)
    assert kept_share("dapo", 3, 6, tokens, of) == 1.0
    with pytest.raises(ValueError, match="loss_type='new'"):
        kept_share("new", 1, 1, tokens, of)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_without_a_live_row_the_loss_is_a_differentiable_zero(loss_type, tmp_path):
    level = "sequence" if loss_type == "luspo" else "token"
    trainer = build(tmp_path, [SkipZeroAdvantage()], loss_type=loss_type, importance_sampling_level=level)
    batch = micro_batch()
    batch["advantages"] = torch.zeros(6)
    loss, gradients, seen = outcome(trainer, batch)
    assert loss == 0
    assert seen == [1]  # the shortest
    assert all((gradient == 0).all() for gradient in gradients)
    assert trainer._metrics["train"]["skip_zero_advantage/live_share"] == [0.0]


def test_what_is_logged_says_over_which_rows(tmp_path):
    trainer, batch = build(tmp_path, [SkipZeroAdvantage()]), micro_batch()
    outcome(trainer, batch)
    live = {key: value[[0, 2, 5]] if getattr(value, "dim", int)() else value for key, value in batch.items()}
    other = build(tmp_path, [ACE(alpha=0)])
    outcome(other, live)
    assert trainer._metrics["train"]["skip_zero_advantage/live_share"] == [0.5]
    assert trainer._metrics["train"]["entropy"] == pytest.approx(other._metrics["train"]["entropy"])


def test_a_live_row_has_an_advantage_on_a_token_that_counts():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    assert live_rows(torch.tensor([1.0, 0.0, 2.0, -1.0]), mask).tolist() == [True, False, False, True]
    tokens = torch.tensor([[0.0, 0, 5], [0, 1, 1], [1, 1, 1], [0, 0, -1]])
    assert live_rows(tokens, mask).tolist() == [False, False, False, True]


def test_with_ace_lp_reg_and_the_mask_of_spine(tmp_path):
    settings = {"epsilon": 1.0, "epsilon_high": 9.0, "steps_per_generation": 2}
    batch = micro_batch()
    batch["ref_per_token_logps"] = batch["old_per_token_logps"] - 0.2
    batch["posttrain/carry/lp_reg/gap"] = torch.full((6, 5), 0.7)
    methods = [ACE(), LpReg(rho=1.0), Spine(band_weight_low=0, band_weight_high=0, kl_coef=0)]
    plain = outcome(build(tmp_path, methods, **settings), batch)
    skipping = outcome(build(tmp_path, [*methods, SkipZeroAdvantage()], **settings), batch)
    assert (plain[2], skipping[2]) == ([6], [3])
    assert skipping[0] == pytest.approx(plain[0], abs=1e-6)
    same_gradients(skipping[1], plain[1])


@pytest.mark.parametrize(
    ("settings", "methods", "message"),
    [
        ({"beta": 0.1}, [], "KL term acts on them, found beta=0.1: set it to 0.0"),
        ({"entropy_coef": 0.01}, [], "entropy bonus acts on them"),
        ({"use_adaptive_entropy": True}, [], "set it to false"),
        ({"top_entropy_quantile": 0.5}, [], "is taken over all rows"),
        ({}, [Spine()], "spine acts on them"),
        ({"epsilon": 1.0}, [LpReg(gate="paper")], "lp_reg acts on them"),
    ],
)
def test_refused_with_what_acts_on_rows_without_advantage(settings, methods, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, [*methods, SkipZeroAdvantage()], **settings)


def test_evaluation_sees_every_row(tmp_path):
    trainer = build(tmp_path, [SkipZeroAdvantage()])
    trainer.model.eval()
    assert outcome(trainer, micro_batch())[2] == [6]

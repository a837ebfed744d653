"""Feasible learning: the recursion by hand, DPO bit for bit when off, the table over ranks and resumes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pairs
import pytest
import support
import torch
from transformers import TrainerCallback

from posttrain.feasible import Multipliers, clamped_losses, cvar, dual_step, mean_per_row
from posttrain.preference.feasible import Feasible, pair_losses

TESTS = Path(__file__).resolve().parents[1]


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def steps(start, losses, **settings):
    settings = {"tolerance": 0.3, "dual_lr": 1.0, "alpha": 1.0} | settings
    found = [t(start)]
    for loss in losses:
        found.append(dual_step(found[-1], t(loss), **settings))
    return [value.item() for value in found]


# ---- by hand -----------------------------------------------------------------------------------------------


def test_the_published_setting_has_no_memory():
    table = steps(1.0, [0.693147, 0.5, 0.35, 0.25, 0.4])
    assert table == pytest.approx([1, 0.393147, 0.2, 0.05, 0, 0.1])


def test_slack_and_no_slack():
    assert steps(1.0, [0.7, 0.5, 0.2], alpha=2.0, dual_lr=0.5)[1:] == pytest.approx([0.95, 0.8125, 0.559375])
    found = steps(0.0, [0.7, 0.5, 0.2, 0.1], alpha=None, dual_lr=0.5)[1:]
    assert found == pytest.approx([0.2, 0.3, 0.25, 0.15])
    assert steps(0.0, [0.7] * 200, alpha=2.0, dual_lr=0.5)[-1] == pytest.approx(0.8)
    assert steps(0.0, [9.0] * 3, alpha=None, cap=10.0)[1:] == pytest.approx([8.7, 10, 10])


def test_a_loss_that_is_no_number_moves_nothing_and_multipliers_leave_no_gradient():
    lam, losses = t(0.4, 0.4, 0.4).requires_grad_(), t(torch.nan, torch.inf, 0.0).requires_grad_()
    found = dual_step(lam, losses, tolerance=0.3, dual_lr=5.0, alpha=1.0)
    assert found.tolist() == pytest.approx([0.4, 0.4, 0.0])
    assert not found.requires_grad


def test_the_clamped_loss_pulls_as_the_fixed_point_does():
    margin = t(0.2).requires_grad_()
    loss = -torch.nn.functional.logsigmoid(margin)
    assert loss.item() == pytest.approx(0.598139, abs=1e-6)
    (pull,) = torch.autograd.grad(clamped_losses(loss, tolerance=0.3, alpha=1.0).sum(), margin)
    assert pull.item() == pytest.approx(-0.134212, abs=1e-6)
    loss = -torch.nn.functional.logsigmoid(margin)
    fixed = (loss - 0.3).clamp(min=0).detach()
    (other,) = torch.autograd.grad((fixed * loss).sum(), margin)
    assert other.item() == pytest.approx(pull.item(), abs=1e-12)


def test_a_margin_of_ten_and_a_half_is_feasible():
    for margin, within in ((10.502257, True), (10.502255, False)):
        (loss,) = pair_losses(t(margin, 0.0), torch.ones(2), loss_type="sigmoid", beta=0.1)
        assert (loss.item() <= 0.3) == within
    assert 1 / (1 + math.exp(-1.0502256)) == pytest.approx(0.740818, abs=1e-6)


def test_losses_by_hand():
    lengths = torch.tensor([2, 4])
    for name, wanted in (
        ("hinge", 0.5),
        ("ipo", (2.0 / 2 + 3.0 / 4 - 5) ** 2),
        ("sigmoid", math.log1p(math.e**-0.5)),
    ):
        (found,) = pair_losses(t(2.0, -3.0), lengths, loss_type=name, beta=0.1)
        assert found.item() == pytest.approx(wanted), name


def test_the_tail():
    losses = t(0.1, 0.2, 0.5, 0.9, 1.4, 0.3, 0.05, 0.6, 0.2, 2.0)
    assert cvar(losses).item() == pytest.approx(1.7)
    assert losses.mean().item() == pytest.approx(0.625)
    assert cvar(t(3.0)).item() == 3.0


def test_a_row_that_occurs_twice_moves_once():
    ids, losses = mean_per_row(torch.tensor([5, 2, 5, 7, 2]), t(1.0, 0.5, 2.0, torch.nan, torch.nan))
    assert ids.tolist() == [2, 5]
    assert losses.tolist() == [0.5, 1.5]
    table = Multipliers(8, "x", 1.0)
    table.record(torch.tensor([5, 5, 7, 1]), t(1.0, 2.0, torch.nan, 9.0), torch.tensor([1, 1, 1, 0]).bool())
    table.update(tolerance=0.3, dual_lr=1.0, alpha=1.0)
    assert table.values.tolist() == pytest.approx([1, 1, 1, 1, 1, 1.2, 1, 1])
    assert table.visits.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert table.hardest().tolist() == [5]
    with pytest.raises(ValueError, match="8 training rows"):
        Multipliers(7, "x", 1.0).load_state_dict(table.state_dict())
    with pytest.raises(ValueError, match="fingerprint"):
        Multipliers(8, "y", 1.0).load_state_dict(table.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": None}, "set max"),
        ({"alpha": None, "mode": "clamped"}, "give alpha a number"),
        ({"max": 0.5}, "above max"),
        ({"alpha": 0.0}, "greater than 0"),
        ({"tolerance": math.nan}, "finite"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Feasible(**fields)


# ---- in the trainer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("method", [Feasible(dual_lr=0.0), Feasible(mode="erm")], ids=["no dual", "erm"])
def test_off_it_is_trl(tmp_path, loss, method):
    settings = {
        "loss_type": loss, "beta": 0.3, "max_steps": 3, "gradient_accumulation_steps": 2,
        "bf16": loss == "hinge", "gradient_checkpointing": loss == "hinge", "weight_decay": 0.1,
    }  # fmt: skip
    if loss == "ipo":  # and TRL's lengths where truncation leaves nothing of the prompt
        settings |= {"peft_config": support.lora(), "truncation_mode": "keep_end", "max_length": 6}
    ours = pairs.trainer(tmp_path / "a", methods=[method], **settings)
    theirs = pairs.trainer(tmp_path / "b", trl=True, **settings)
    pairs.assert_trl_equal(ours, theirs)


class Watched(Feasible):
    """Keeps what each micro-step saw."""

    name = "watched"

    def row_objective(self, losses, ids, where, gauges):
        found = super().row_objective(losses, ids, where, gauges)
        SEEN.append((None if ids is None else ids.tolist(), losses.tolist(), found.tolist()))
        assert where.all()
        return found


SEEN = []


@pytest.mark.parametrize("order", ["primal_first", "dual_first"])
def test_every_pair_has_its_own_multiplier_over_epochs(tmp_path, order):
    SEEN.clear()
    method = Watched(tolerance=0.5, dual_lr=0.5, alpha=2.0, order=order)
    run = pairs.trainer(
        tmp_path,
        methods=[method],
        data=pairs.rows(10),
        eval_data=pairs.rows(3),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        beta=1.0,
        learning_rate=3e-3,
    )
    logs = pairs.history(run)
    table, wanted = [1.0] * 10, []
    train = [seen for seen in SEEN if seen[0] is not None]
    assert {seen[0] is None for seen in SEEN} == {True, False}
    assert len(train) == 10  # two epochs of five micro-batches: 2 + 2 + 1 per epoch
    for step in ([0, 1], [2, 3], [4], [5, 6], [7, 8], [9]):
        moved = {}
        for ids, losses, found in (train[place] for place in step):
            for row, loss, weighed in zip(ids, losses, found, strict=True):
                moved[row] = max(0.0, table[row] + 0.5 * (loss - 0.5 - table[row] / 2))
                weight = moved[row] if order == "dual_first" else table[row]
                assert weighed == pytest.approx(weight * loss, rel=1e-5)
        for row, value in moved.items():
            table[row] = value
        wanted.append(sum(table) / 10)
    assert method.table.values.tolist() == pytest.approx(table, rel=1e-5)
    assert method.table.visits.tolist() == [2] * 10
    assert len(set(table)) > 5
    for seen in SEEN:  # an evaluation is not weighed
        assert seen[0] is not None or seen[1] == seen[2]
    steps_ = [log for log in logs if "watched/multiplier_mean" in log]
    # a log shows the table as its step began
    assert [log["watched/multiplier_mean"] for log in steps_] == pytest.approx([1.0, *wanted[:-1]], rel=1e-5)
    assert 0 < steps_[1]["watched/cvar_0.8"] < 5
    report = json.loads((tmp_path / "watched.json").read_text())
    assert report["id"][0] == max(range(10), key=lambda row: table[row])
    assert report["multiplier"] == pytest.approx(sorted(table, reverse=True), rel=1e-5)
    assert any("eval_watched/loss" in log for log in logs)


def test_dropped_pairs_keep_their_places_and_own_ids_are_kept(tmp_path):
    data = pairs.rows(8)
    long = data.map(
        lambda row, place: {"prompt": row["prompt"] + " x" * (40 * (place == 3))}, with_indices=True
    )
    method = Feasible()
    pairs.trainer(tmp_path, methods=[method], data=long, max_length=40, max_steps=4).train()
    assert method.table.visits.tolist() == [2, 2, 2, 0, 2, 2, 2, 2]
    own = data.add_column("posttrain_id", [3, 1, 4, 15, 9, 2, 6, 5])
    method = Feasible()
    pairs.trainer(tmp_path, methods=[method], data=own, max_steps=2).train()
    assert method.table.visits.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 9, 15]
    with pytest.raises(ValueError, match="whole numbers from 0"):
        pairs.trainer(tmp_path, methods=[Feasible()], data=data.add_column("posttrain_id", [-1] * 8))
    with pytest.raises(ValueError, match="a stream does not have"):
        pairs.trainer(tmp_path, methods=[Feasible()], data=data.to_iterable_dataset())


def test_zero_multipliers_give_no_gradient_and_clamped_learns(tmp_path):
    run = pairs.trainer(tmp_path / "a", methods=[Feasible(init=0.0, tolerance=5.0)], max_steps=3)
    logs = pairs.history(run)
    assert [log["grad_norm"] for log in logs[:3]] == [0.0] * 3
    assert logs[0]["feasible/loss"] == pytest.approx(math.log(2))
    assert logs[0]["feasible/feasible"] == 1
    assert logs[1]["feasible/multiplier_zero"] == 1
    run = pairs.trainer(
        tmp_path / "b",
        methods=[Feasible(mode="clamped", alpha=2.0)],
        max_steps=8,
        beta=1.0,
        learning_rate=3e-3,
    )
    logs = pairs.history(run)
    assert logs[0]["loss"] == pytest.approx((math.log(2) - 0.3) ** 2, rel=1e-4)
    assert logs[7]["feasible/loss"] < logs[0]["feasible/loss"] - 0.05
    assert "feasible/multiplier_mean" not in logs[0]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_resume_is_exact_and_compares_the_rows(tmp_path):
    fields = {"dual_lr": 0.3, "alpha": 2.0, "tolerance": 0.5}
    settings = {"max_steps": 9, "save_strategy": "no", "beta": 1.0, "learning_rate": 3e-3}
    whole = pairs.trainer(tmp_path / "whole", methods=[Feasible(**fields)], **settings)
    logs = pairs.history(whole)
    pairs.trainer(tmp_path / "cut", methods=[Feasible(**fields)], callbacks=[StopAt(5)], **settings).train()
    method = Feasible(**fields)
    resumed = pairs.trainer(tmp_path / "cut", methods=[method], **settings)
    resumed.train(resume_from_checkpoint=True)
    support.assert_same(support.weights(whole.model), support.weights(resumed.model))
    assert torch.equal(whole.methods[0].table.values, method.table.values)
    keys = ("loss", "feasible/multiplier_mean", "feasible/cvar_0.8")
    assert support.logged(resumed, *keys) == [
        tuple(log.get(k) for k in keys) for log in logs if "loss" in log
    ]
    data = pairs.rows().select(range(15, -1, -1))
    other = pairs.trainer(tmp_path / "cut", methods=[Feasible(**fields)], data=data, **settings)
    with pytest.raises(ValueError, match="same rows in the same order"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ["sigmoid", "hinge"]}, "one loss per pair"),
        ({"loss_type": "aot"}, "sigmoid, hinge, ipo"),
        ({"use_weighting": True}, "use_weighting"),
        ({"loss_weights": [0.5], "loss_type": ["sigmoid"]}, "loss_weights"),
        ({"f_divergence_type": "js_divergence"}, "reverse KL"),
    ],
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        pairs.trainer(tmp_path, methods=[Feasible()], **settings)


def test_overshoot_is_a_warning(tmp_path, caplog):
    pairs.trainer(tmp_path, methods=[Feasible(dual_lr=2.0)])
    assert "overshoot" in caplog.text


@pytest.mark.slow
def test_two_ranks_hold_one_table(tmp_path):
    """Batches of 2 x 2 on two ranks are those of 4 on one; 10 pairs leave duplicates in the last batch."""
    script = str(TESTS / "preference" / "feasible_ranks.py")
    path = os.pathsep.join([str(TESTS), str(TESTS / "preference"), str(TESTS.parent)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable, script, str(tmp_path), "1"], [*launch, script, str(tmp_path), "2"]):
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "1-0.pt")
    left, right = (torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1))
    for key in ("values", "losses", "visits"):
        assert torch.equal(left[key], right[key])
    assert left["visits"].tolist() == [2] * 8
    torch.testing.assert_close(left["values"], one["values"], rtol=1e-3, atol=1e-4)
    # 10 pairs: the last batch of an epoch is filled up with pairs that were there already
    left, right = (torch.load(tmp_path / f"odd-2-{rank}.pt") for rank in (0, 1))
    assert torch.equal(left["values"], right["values"])
    assert sorted(left["visits"].tolist())[0] == 2

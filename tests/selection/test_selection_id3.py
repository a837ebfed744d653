"""ID3: scores, schedule and releases by hand, then under a trainer against an independent loop."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import GRPOTrainer, SFTTrainer
from posttrain.checkpointing.resume import CheckpointError
from posttrain.selection.adamw import SelectiveAdamW
from posttrain.selection.apply import apply
from posttrain.selection.grow import Growth, best
from posttrain.selection.id3 import ID3, d3_scores
from posttrain.selection.plan import PlanError

THETA = [0.5, -0.1, 0.0, 1.0, 0.2, -2.0]
G0 = [0.3, -0.1, 0.07, 0.4, 0.2, 0.9]
G1 = [0.1, 0.2, 0.04, 0.5, 0.1, 0.8]
TESTS = Path(__file__).resolve().parents[1]


class Toy(torch.nn.Module):
    """Parameters called p0, p1, ..."""

    def __init__(self, *values, dtype=torch.float32):
        super().__init__()
        for number, value in enumerate(values):
            self.register_parameter(
                f"p{number}", torch.nn.Parameter(torch.as_tensor(value).to(dtype, copy=True))
            )


def growing(selector, *values, lr=0.1, dtype=torch.float32):
    """A toy model, what drives its selection, and its optimiser."""
    model = Toy(*values, dtype=dtype)
    plan, candidates, budget = selector.begin(model)
    selection = apply(model, plan, candidates=candidates)
    optimizer = SelectiveAdamW(list(model.parameters()), selection.positions, lr=lr)
    return model, Growth(selector, selection, candidates, budget), optimizer


def run(selector, steps, theta, gradients, **options):
    """Released sets after each step, and the model after the last."""
    model, growth, optimizer = growing(selector, theta, **options)
    sets = []
    for gradient in gradients:
        model.p0.grad = torch.tensor(gradient).to(model.p0.dtype)
        growth.release(optimizer, steps)
        sets.append(set(growth.selection.positions[model.p0].tolist()))
        optimizer.step()
    return sets, model


# ---- scores and schedule ---------------------------------------------------------------------------------


def test_the_sheets_scores():
    scores = d3_scores(torch.tensor(G0).double(), torch.tensor(THETA).double(), eps=0.1, exp=1)
    assert scores.exp().tolist() == pytest.approx([0.5, 0.5, 0.7, 0.363636, 0.666667, 0.428571], abs=1e-6)
    second = d3_scores(torch.tensor(G1), torch.tensor([0.5, -0.1, -0.007, 1.0, 0.18, -2.0]), eps=0.1, exp=1)
    assert second.exp()[[0, 1, 3, 5]].tolist() == pytest.approx([0.1667, 1.0, 0.4545, 0.3810], abs=1e-4)


@pytest.mark.parametrize("exp", [-50.0, 50.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_exponents_neither_over_nor_underflow(exp, dtype):
    gradient = torch.tensor([1e-30, 0.0, 1e30, -1.0]).to(dtype)
    scores = d3_scores(gradient, torch.tensor([1e-8, 1.0, 3.0, 1e4]).to(dtype), eps=1e-8, exp=exp)
    assert scores.dtype == torch.float32
    assert scores[1] == -math.inf
    assert torch.isfinite(scores[[0, 2, 3]]).all()


def test_the_sheets_schedules():
    def releases(budget, steps):
        done = [ID3().released(step, steps, budget) for step in range(steps + 1)]
        return [after - before for before, after in itertools.pairwise(done)]

    assert releases(10, 4) == [3, 3, 2, 2]
    assert releases(3, 5) == [1, 1, 1, 0, 0]
    assert sum(ID3().released(step + 1, 4, 8) for step in range(4)) == 20  # scalar updates, (T + 1) / 2 B
    assert sum(ID3().released(step + 1, 1000, 320_000) for step in range(1000)) == 160_160_000
    assert ID3().released(2000, 1000, 320_000) == 320_000


# ---- releases --------------------------------------------------------------------------------------------


def test_the_sheets_worked_example():
    """SGD with lr 0.1, as the sheet; the optimiser's part is done by hand."""
    selector = ID3(budget=3, d3_eps=0.1)
    theta, taken = torch.tensor(THETA), torch.empty(0, dtype=torch.long)
    moved, values = [], []
    for step, gradient in enumerate((G0, G1)):
        theta.grad = torch.tensor(gradient)
        due = selector.released(step + 1, 2, 3) - len(taken)
        new = best(selector.score, {"theta": theta}, {"theta": taken}, due)["theta"]
        taken = torch.cat([taken, new]).sort().values
        theta[taken] -= 0.1 * theta.grad[taken]
        moved.append(taken.tolist())
        values.append(theta.tolist())
    assert moved == [[2, 4], [1, 2, 4]]
    assert values[0] == pytest.approx([0.5, -0.1, -0.007, 1.0, 0.18, -2.0])
    assert values[1] == pytest.approx([0.5, -0.12, -0.011, 1.0, 0.17, -2.0])
    assert sum(map(len, moved)) == 5


@pytest.mark.parametrize(("exp", "first"), [(1, {2, 4}), (0, {5, 3}), (50, {2, 1})])
def test_the_sheets_exponents_in_the_driver(exp, first):
    sets, model = run(ID3(budget=3, d3_eps=0.1, d3_exp=exp), 2, THETA, [G0, G1])
    assert sets[0] == first
    assert sets[0] < sets[1]
    assert len(sets[1]) == 3
    untouched = [i for i in range(6) if i not in sets[1]]
    assert torch.equal(model.p0[untouched], torch.tensor(THETA)[untouched])
    assert all(model.p0[i] != THETA[i] for i in sets[1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 9), st.integers(1, 4), st.sampled_from([0, 1])
)
def test_releases_equal_a_plain_sort_and_use_up_the_budget(seed, budget, steps, every, exp):
    """Few levels of gradients, so ties and zeros are common; two tensors; B below and above T."""
    draw = torch.Generator().manual_seed(seed)
    selector = ID3(budget=budget, d3_exp=exp, every=every)
    model, growth, optimizer = growing(selector, torch.randn(10, generator=draw), torch.ones(2, 7))
    start = [p.detach().clone() for p in model.parameters()]
    released: list[int] = []
    for step in range(steps + 2):
        for p in model.parameters():
            p.grad = torch.randint(-1, 2, p.shape, generator=draw) / 4
        scores = torch.cat(
            [d3_scores(p.grad, p.detach(), eps=1e-3, exp=exp).flatten() for p in model.parameters()]
        )
        growth.release(optimizer, steps)
        now = torch.cat([
            growth.selection.positions[p] + 10 * number for number, p in enumerate(model.parameters())
        ]).tolist()  # fmt: skip
        new = [place for place in now if place not in released]
        order = [i for i in torch.argsort(-scores, stable=True).tolist() if i not in released]
        assert sorted(new) == sorted(order[: len(new)])
        assert set(released) <= set(now)
        ahead = step - step % every + every
        assert len(now) == selector.released(min(ahead, steps), steps, budget)
        released = now
        optimizer.step()
    assert len(released) == budget == growth.selection.plan.count
    for number, (p, before) in enumerate(zip(model.parameters(), start, strict=True)):
        mask = torch.zeros(p.numel(), dtype=torch.bool)
        mask[[i - 10 * number for i in released if i // 10 == number or (number and i >= 10)]] = True
        assert torch.equal(p.view(-1)[~mask], before.view(-1)[~mask])


def test_zero_gradients_come_last_lowest_position_first_and_missing_ones_too():
    model, growth, optimizer = growing(ID3(budget=4), [1.0, 1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    model.p0.grad, model.p2.grad = torch.zeros(3), torch.tensor([0.0, -1e-30])
    growth.release(optimizer, 1)
    found = {name: growth.selection.positions[p].tolist() for name, p in model.named_parameters()}
    assert found == {"p0": [0, 1, 2], "p1": [], "p2": [1]}
    everything, *_ = run(ID3(budget=3), 1, [1.0, 2.0, 3.0], [[0.0, 0.0, 0.0]])
    assert everything == [{0, 1, 2}]
    with pytest.raises(ValueError, match="8 scalars are to be released and 7 are left"):
        best(ID3().score, dict(model.named_parameters()), {}, 8)


def test_a_released_scalar_has_its_own_age():
    """Constant gradient: each scalar moves by lr at each step from its release on, masters in bf16 too."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        _, model = run(ID3(budget=2, d3_exp=0), 2, [1.0, 1.0, 1.0], [[1.0, 2.0, 0.5]] * 10, dtype=dtype)
        assert model.p0.tolist() == pytest.approx([1 - 0.9, 1 - 1.0, 1.0], abs=tolerance)
        assert model.p0[2].item() == 1.0


def test_a_schedule_that_does_not_fit_into_the_run_is_warned_of(caplog):
    for steps, total, count in ((4, 8, 1), (4, 4, 0), (6, 8, 0)):  # of 6 scalars; the third has all by step 6
        _, growth, optimizer = growing(ID3(budget=6, total_steps=total), THETA)
        growth.parameters["p0"].grad = torch.tensor(G0)
        caplog.clear()
        growth.release(optimizer, steps)
        growth.release(optimizer, steps)
        assert (
            caplog.text.count("6 scalars in 8 steps, and the run has 4: only 4 of them will train") == count
        )


def test_weights_that_are_not_contiguous_are_refused_before_training():
    model = torch.nn.Module()
    model.p0 = torch.nn.Parameter(torch.randn(3, 4).t())
    plan, candidates, _ = ID3(budget=2).begin(model)
    with pytest.raises(PlanError, match=r"p0 is not contiguous; call \.contiguous\(\)"):
        apply(model, plan, candidates=candidates)


def test_broken_gradients_are_named_and_release_nothing():
    model, growth, optimizer = growing(ID3(budget=2), [1.0, 1.0, 1.0])
    for bad in (math.nan, math.inf):
        model.p0.grad = torch.tensor([1.0, bad, 1.0])
        with pytest.raises(FloatingPointError, match="p0 at flat position 1"):
            growth.release(optimizer, 2)
    assert (growth.count, growth.step) == (0, 0)


def test_whole_tensors_are_charged_and_settings_checked():
    selector = ID3(budget=5, always_train=("p1",))
    model, growth, optimizer = growing(selector, [1.0] * 6, [1.0, 1.0])
    assert growth.budget == 3
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    growth.release(optimizer, 1)
    optimizer.step()
    assert growth.selection.plan.count == 5
    assert (model.p1 != 1).all()
    assert model.p0.tolist()[3:] == [1.0] * 3
    with pytest.raises(ValueError, match="the whole budget"):
        ID3(budget=2, always_train=("p1",)).begin(Toy([1.0] * 6, [1.0, 1.0]))
    with pytest.raises(ValueError, match="of 8 candidate"):
        ID3(budget=9).begin(Toy([1.0] * 6, [1.0, 1.0]))
    with pytest.raises(PlanError, match=r"trainer\.selection\.plan"):
        selector.select(model)
    frozen = Toy([1.0] * 6, [1.0])
    plan, candidates, _ = ID3(budget=1, exclude=("p1",)).begin(frozen)
    apply(frozen, plan, candidates=candidates)
    assert not frozen.p1.requires_grad  # no candidate: no gradient either


# ---- under a trainer -------------------------------------------------------------------------------------

SETTINGS = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.0}


def sft(folder, selector, rows=24, model=None, **options):
    return SFTTrainer(
        model=support.model(tied=True) if model is None else model,
        args=support.sft_config(folder, **(SETTINGS | {"optim": "adamw_torch"} | options)),
        train_dataset=support.answers(rows),
        processing_class=support.tokenizer(),
        selection=selector,
    )


def recorded(trainer):
    """Keep the reduced gradient of every optimiser step."""
    steps = []
    inner = trainer._moving_gradients

    def record(optimizer):
        steps.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return inner(optimizer)

    trainer._moving_gradients = record
    return steps


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_run_equals_an_independent_loop(tmp_path, clip):
    """Float64 from the definition: rank everything, release, clip by the masked norm, AdamW by age."""
    start = {name: p.detach().double() for name, p in support.model(tied=True).named_parameters()}
    budget = 50
    trainer = sft(tmp_path, ID3(budget=budget), max_grad_norm=clip, gradient_accumulation_steps=2)
    gradients = recorded(trainer)
    trainer.train()
    sizes = [p.numel() for p in start.values()]
    theta = torch.cat([p.flatten() for p in start.values()])
    released, first = torch.zeros(len(theta), dtype=torch.bool), torch.zeros(len(theta))
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, step in enumerate(gradients):
        g = torch.cat([step[name].double().flatten() for name in start])
        # ranked in fp32, as the method is defined
        scores = d3_scores(g.float(), theta.float(), eps=1e-3, exp=1.0)
        scores[released] = -torch.inf
        new = scores.topk(8 + (t < 2)).indices
        released[new], first[new] = True, t
        norm = g[released].norm()
        assert support.logged(trainer, "grad_norm")[t][0] == pytest.approx(norm.item(), rel=1e-4)
        if clip:
            g = g * min(1.0, clip / (norm.item() + 1e-6))
        m[released] = 0.9 * m[released] + 0.1 * g[released]
        v[released] = 0.999 * v[released] + 0.001 * g[released] ** 2
        age = t - first + 1
        update = (m / (1 - 0.9**age)) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
        theta = torch.where(released, theta - 1e-2 * update, theta)
    assert released.sum() == budget == trainer.selection.plan.count
    assert [row[0] for row in support.logged(trainer, "selection/released")][:6] == [9, 18, 26, 34, 42, 50]
    for (name, p), expected in zip(trainer.model.named_parameters(), theta.split(sizes), strict=True):
        assert torch.allclose(p.detach().flatten().double(), expected, atol=1e-5), name
        changed = (p.detach() != start[name].float()).flatten()
        assert torch.equal(changed, trainer.selection.plan.tensors[name].mask().flatten()), name


def test_neutral_ends_one_step_and_all_scalars(tmp_path):
    """total_steps 1: with exp 0 a static mask of the first gradient; with B = N ordinary training."""
    one = sft(tmp_path / "one", ID3(budget=100, d3_exp=0, total_steps=1))
    gradients = recorded(one)
    one.train()
    assert len(gradients) == 6
    mask = torch.cat([one.selection.plan.tensors[name].mask().flatten() for name in gradients[0]])
    size = torch.cat([g.flatten().abs() for g in gradients[0].values()])
    assert mask.sum() == 100
    assert size[mask].min() >= size[~mask].max()
    count = sum(p.numel() for p in support.model(tied=True).parameters())
    every = sft(tmp_path / "all", ID3(budget=count, total_steps=1), max_grad_norm=0.0)
    every.train()
    plain = sft(tmp_path / "plain", None, max_grad_norm=0.0)
    plain.train()
    support.assert_same(support.weights(every.model), support.weights(plain.model))


@pytest.mark.parametrize("every", [1, 4])
def test_resume_in_the_middle_is_exact(tmp_path, every):
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 7,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "linear",
    }
    selector = ID3(budget=40, every=every)
    whole = sft(tmp_path / "whole", selector, **options)
    whole.train()
    again = sft(tmp_path / "again", selector, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    support.assert_same(support.weights(whole.model), support.weights(again.model))
    assert whole.selection.plan == again.selection.plan
    assert again.selection.plan.count == 40
    left, right = whole._selective.state_dict(), again._selective.state_dict()
    for number, state in left["state"].items():
        support.assert_same(state, right["state"][number])
    for other in (ID3(budget=41, every=every), None):
        wrong = sft(tmp_path / "other", other, **options)
        with pytest.raises((CheckpointError, ValueError), match=r"another selection|parameter group"):
            wrong.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_a_step_that_the_loss_scaler_skips_releases_nothing(tmp_path):
    trainer = sft(tmp_path, ID3(budget=12), logging_steps=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    forward, calls = trainer.compute_loss, []

    def broken(*args, **kwargs):
        calls.append(None)
        loss = forward(*args, **kwargs)
        return loss * 1e38 if len(calls) == 3 else loss  # overflows once scaled and propagated

    trainer.compute_loss = broken
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    assert [row[0] for row in support.logged(trainer, "selection/released")][:6] == [2, 4, 4, 6, 8, 10]


def test_lora_and_reinforcement(tmp_path):
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, max_steps=3, learning_rate=1e-2),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora(),
        selection=ID3(budget=0.1, d3_eps=0.01),
    )
    start = support.weights(trainer.model)
    candidates = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in candidates)
    assert trainer.selection.plan.count == 0
    trainer.train()
    plan = trainer.selection.plan
    assert plan.count == trainer.selected_in_the_end == sum(start[name].numel() for name in candidates) // 10
    for name, value in trainer.model.named_parameters():
        assert not ((value != start[name]) & ~plan.tensors[name].mask()).any(), name
    assert any((value != start[name]).any() for name, value in trainer.model.named_parameters())


def test_what_cannot_work_is_refused(tmp_path):
    selector = ID3(budget=5)
    with pytest.raises(PlanError, match="optim=sgd"):
        sft(tmp_path, selector, optim="sgd")
    trainer = sft(tmp_path, None)
    model = support.model()
    plan, candidates, _ = selector.begin(model)
    for options, reason in (
        ({"deepspeed": True}, "between backward and step"),
        ({"sharded": True}, "use DDP"),
    ):
        with pytest.raises(PlanError, match=reason):
            apply(model, plan, candidates=candidates, **options)
    with pytest.raises(PlanError, match="without weight decay"):
        trainer._begin(selector, model, "selected")


# ---- two ranks -------------------------------------------------------------------------------------------


def _ranks(folder: str) -> None:
    """Run under torchrun, or alone with twice the batch."""
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    trainer = sft(
        folder,
        ID3(budget=60),
        model=support.model(tied=True, dtype=torch.float64),
        per_device_train_batch_size=4 // ranks,
        max_steps=5,
    )
    trainer.train()
    plan = trainer.selection.plan.fingerprint()
    weights = {name: p.flatten().tolist() for name, p in trainer.model.named_parameters()}
    Path(folder, f"rank{trainer.args.process_index}of{ranks}.json").write_text(json.dumps([plan, weights]))


@pytest.mark.slow
def test_two_ranks_release_the_same_and_train_as_one_process(tmp_path):
    for ranks in (1, 2):
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*launcher, __file__, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (
        json.loads((tmp_path / f"rank{name}.json").read_text()) for name in ("0of1", "0of2", "1of2")
    )
    assert first == second  # plan and weights
    assert first[0] == alone[0]
    for name, values in alone[1].items():
        assert first[1][name] == pytest.approx(values, abs=1e-7), name  # some of the model computes in fp32


if __name__ == "__main__":
    _ranks(sys.argv[1])
    support.leave()

"""OFS-DPO: values by hand, two DPO runs when off, gradients of both, roles, resume, ranks, refusals."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pairs
import pytest
import support
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_preference_feasible import StopAt
from torch.optim import SGD
from transformers import TrainerCallback

from posttrain import DPOTrainer, Select
from posttrain.preference.feasible import Feasible
from posttrain.preference.ofs_dpo import FAST, OFSDPO, SLOW, chase, objectives
from posttrain.preference.passes import parameters_of, refuse
from posttrain.preference.rpo import RPO
from posttrain.selection.hft import HFT

TESTS = Path(__file__).resolve().parents[1]


def t(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def dpo(margin, beta=0.1):
    return -torch.nn.functional.logsigmoid(beta * margin).mean()


# ---- by hand -----------------------------------------------------------------------------------------------


def test_values_and_gradients_by_hand():
    logps = {"F": (-12.0, -20.0), "S": (-12.6, -19.0), "ref": (-13.0, -18.0)}
    fast, slow = (t((logps[m][0] - logps["ref"][0]) - (logps[m][1] - logps["ref"][1])) for m in ("F", "S"))
    assert (fast.item(), slow.item()) == pytest.approx((3.0, 1.4))
    losses = dpo(fast), dpo(slow)
    assert [loss.item() for loss in losses] == pytest.approx([0.5543552445, 0.6255951823], abs=1e-9)
    assert chase(fast, slow, beta=0.1).item() == pytest.approx(0.6163437730, abs=1e-9)
    first, second = objectives(losses, (fast, slow), alpha=0.1, beta=0.1)
    assert (first.item(), second.item()) == pytest.approx((0.6159896218, 0.5639608050), abs=1e-9)
    found = torch.autograd.grad(first, (fast, slow), allow_unused=True, retain_graph=True)
    assert found[0].item() == pytest.approx(-0.0471565995, abs=1e-9)
    assert found[1] is None
    found = torch.autograd.grad(second, (fast, slow), allow_unused=True)
    assert found[0] is None
    assert found[1].item() == pytest.approx(-0.0511065566, abs=1e-9)


def test_of_one_sum_the_chase_cancels():
    fast, slow = t(3.0), t(1.4)
    both = chase(fast, slow, beta=0.1).mean()
    total = dpo(fast) + 0.1 * both + dpo(slow) - 0.1 * both
    found = [value.item() for value in torch.autograd.grad(total, (fast, slow))]
    assert found == pytest.approx([-0.0425557483, -0.0465057055], abs=1e-9)


def test_equal_modules_are_pulled_by_half_of_alpha_beta():
    fast, slow = t(2.0), t(2.0)
    losses = dpo(fast), dpo(slow)
    assert chase(fast, slow, beta=0.1).item() == pytest.approx(math.log(2))
    with_chase = objectives(losses, (fast, slow), alpha=0.3, beta=0.1)
    for margin, loss, plain in zip((fast, slow), with_chase, losses, strict=True):
        (a,) = torch.autograd.grad(loss, margin, retain_graph=True)
        (b,) = torch.autograd.grad(plain, margin, retain_graph=True)
        assert (a - b).item() == pytest.approx(-0.3 * 0.1 / 2)
    assert objectives(losses, (fast, slow), alpha=0.0, beta=0.1) == losses


def test_beyond_the_clamp_there_is_no_pull():
    fast, slow = t(50.0), t(1.0)
    assert chase(fast, slow, beta=1.0, clamp=10.0).item() == pytest.approx(math.log1p(math.exp(-10)))
    loss, _ = objectives((dpo(fast), dpo(slow)), (fast, slow), alpha=1.0, beta=1.0, clamp=10.0)
    (found,) = torch.autograd.grad(loss, fast)
    (plain,) = torch.autograd.grad(dpo(fast), fast)
    assert found.item() == plain.item()


def test_the_trap_a_switch_takes_the_gradient_of_the_other_adapter():
    policy = get_peft_model(support.model(), support.lora())
    policy.add_adapter(SLOW, support.lora())
    policy.set_adapter(SLOW)
    assert not any(p.requires_grad for p in parameters_of(policy, FAST).values())
    assert parameters_of(policy, FAST).keys() == parameters_of(policy, SLOW).keys()


# ---- in the trainer ----------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def ofs(folder, callbacks=None, methods=(), adapter=LORA, model=None, **options):
    fields = ("alpha", "slow_lr_ratio", "interval", "clamp", "seed")
    method = OFSDPO(**{name: options.pop(name) for name in fields if name in options})
    return pairs.trainer(
        folder,
        methods=[method, *methods],
        peft_config=None if model is not None else adapter,
        model=model,
        reference=None,
        callbacks=callbacks,
        **options,
    )


class Kept(TrainerCallback):
    """Both adapters before the first step, their gradients at each, and both at the end."""

    def __init__(self):
        self.gradients, self.start, self.end, self.active = [], {}, {}, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        policy = model.module if hasattr(model, "module") else model
        both = {name: parameters_of(policy, name) for name in (FAST, SLOW)}
        self.gradients.append({a: {n: p.grad.clone() for n, p in ps.items()} for a, ps in both.items()})
        if not self.start:
            self.start = copy(both)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        policy = model.module if hasattr(model, "module") else model
        self.active.append(policy.active_adapter)
        self.end = copy({name: parameters_of(policy, name) for name in (FAST, SLOW)})


def copy(both):
    return {a: {n: p.detach().clone() for n, p in ps.items()} for a, ps in both.items()}


HARD = {
    "max_steps": 5,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "beta": 0.5,
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"bf16": True, "gradient_checkpointing": True, "loss_type": "ipo"},
        {"precompute_ref_log_probs": True, "loss_type": "hinge"},
    ],
    ids=["plain", "bf16, checkpointing, ipo", "precomputed, hinge"],
)
def test_without_chase_it_is_two_dpo_runs_bit_for_bit(tmp_path, extra):
    """Accumulation, decay, clipping and a change of roles included."""
    kept = Kept()
    run = ofs(tmp_path / "both", [kept], alpha=0.0, slow_lr_ratio=0.5, interval=2, **HARD, **extra)
    logs = pairs.history(run)
    for adapter, rate in ((FAST, 1e-3), (SLOW, 5e-4)):
        policy = get_peft_model(support.model(), LORA)
        for name, parameter in parameters_of(policy, FAST).items():
            parameter.data.copy_(kept.start[adapter][name])
        alone = pairs.trainer(tmp_path / adapter, model=policy, learning_rate=rate, **HARD, **extra)
        theirs = pairs.history(alone)
        for name, parameter in parameters_of(alone.model, FAST).items():
            assert torch.equal(parameter, kept.end[adapter][name]), name
        if adapter == FAST:
            assert theirs[0]["loss"] == logs[0]["loss"]
            assert theirs[1]["grad_norm"] == logs[1]["grad_norm"]
    assert any((kept.start[FAST][n] != kept.start[SLOW][n]).any() for n in kept.start[FAST])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_both_modules_from_full_logits(tmp_path, checkpointing):
    kept = Kept()
    settings = {"max_steps": 2, "beta": 0.5, "learning_rate": 2e-2, "max_grad_norm": 0.0}
    run = ofs(tmp_path, [kept], alpha=0.4, interval=100, gradient_checkpointing=checkpointing, **settings)
    seen = []
    original = run._compute_loss

    def watched(model, inputs, outputs):
        seen.append((inputs, copy({a: parameters_of(run.model, a) for a in (FAST, SLOW)})))
        return original(model, inputs, outputs)

    run._compute_loss = watched
    run.train()
    inputs, weights = seen[1]  # away from the start, where both are the reference
    policy = get_peft_model(support.model(), LORA).double()

    def margin(adapter):
        own = parameters_of(policy, FAST)
        for name, parameter in own.items():
            parameter.data.copy_(0 * parameter if adapter is None else weights[adapter][name])
        mask = inputs["completion_mask"][:, 1:].bool()
        logits = policy(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
        chosen, rejected = torch.where(mask, logps, 0.0).sum(1).chunk(2)
        return chosen - rejected, own

    with torch.no_grad():
        reference, _ = margin(None)
        constants = {adapter: margin(adapter)[0] - reference for adapter in (FAST, SLOW)}
    for adapter, other, sign in ((FAST, SLOW, 1), (SLOW, FAST, -1)):
        found, own = margin(adapter)
        found = found - reference
        gap = sign * (found - constants[other])
        loss = dpo(found, 0.5) + sign * 0.4 * dpo(gap, 0.5)
        wanted = torch.autograd.grad(loss, list(own.values()))
        for name, value in zip(own, wanted, strict=True):
            torch.testing.assert_close(
                kept.gradients[1][adapter][name].double(),
                value,
                rtol=2e-3,
                atol=2e-6,
                msg=f"{adapter} {name}",
            )
    logs = run.state.log_history
    assert logs[0]["ofs_dpo/margin_fast"] == pytest.approx(0, abs=1e-4)
    assert logs[0]["ofs_dpo/chase"] == pytest.approx(math.log(2), abs=1e-5)
    assert logs[1]["ofs_dpo/margin_fast"] == pytest.approx(constants[FAST].mean().item(), rel=1e-3)
    assert logs[1]["ofs_dpo/margin_slow"] == pytest.approx(constants[SLOW].mean().item(), rel=1e-3)
    assert logs[1]["rewards/margins"] == pytest.approx(0.5 * constants[FAST].mean().item(), rel=1e-3)


def test_the_one_with_the_lower_loss_takes_over_and_is_what_remains(tmp_path):
    kept = Kept()
    run = ofs(
        tmp_path, [kept], slow_lr_ratio=8.0, interval=2, max_steps=5, beta=0.5, eval_data=pairs.rows(4),
        eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=5,
    )  # fmt: skip
    logs = pairs.history(run)
    assert kept.active == [FAST, SLOW, SLOW, SLOW, SLOW]
    roles = [log["ofs_dpo/default_is_fast"] for log in logs if "ofs_dpo/default_is_fast" in log]
    assert roles == [1, 1, 0, 0, 0]
    assert any("eval_rewards/margins" in log for log in logs)
    assert run.finished
    assert list(run.model.peft_config) == [FAST]
    assert run.model.active_adapter == FAST
    for name, parameter in parameters_of(run.model, FAST).items():
        assert torch.equal(parameter, kept.end[SLOW][name])
    # the finished model is what is saved and served
    run.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / SLOW).exists()
    served = PeftModel.from_pretrained(support.model(), tmp_path / "final")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(served(ids).logits, run.model.eval()(ids).logits)
    saved = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert {SLOW, "adapter_model.safetensors"} <= saved


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained before"])
def test_resume_is_exact_with_roles(tmp_path, trained):
    def start():
        if not trained:
            return None
        policy = get_peft_model(support.model(), LORA)
        draw = torch.Generator().manual_seed(3)
        for parameter in parameters_of(policy, FAST).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
        return policy

    settings = {"max_steps": 7, "beta": 0.5, "interval": 3, "slow_lr_ratio": 6.0, "alpha": 0.3}
    whole_, cut_ = Kept(), Kept()
    whole = ofs(tmp_path / "whole", [whole_], model=start(), **settings)
    logs = pairs.history(whole)
    ofs(tmp_path / "cut", [StopAt(4)], model=start(), **settings).train()
    resumed = ofs(tmp_path / "cut", [cut_], model=start(), **settings)
    resumed.train(resume_from_checkpoint=True)
    for adapter in (FAST, SLOW):
        support.assert_same(whole_.end[adapter], cut_.end[adapter])
    assert whole_.active[4:] == cut_.active
    assert SLOW in cut_.active
    key = ("loss", "grad_norm", "ofs_dpo/loss_slow")
    assert support.logged(resumed, *key) == [tuple(log[k] for k in key) for log in logs if key[2] in log]
    if trained:  # both begin as the adapter that was given, which is the reference
        support.assert_same(whole_.start[FAST], whole_.start[SLOW])
        assert logs[0]["loss"] == pytest.approx(math.log(2) * 1.3, rel=1e-3)


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(tmp_path):
    class Break(TrainerCallback):
        def __init__(self, steps):
            self.steps, self.seen = steps, []

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.seen.append(copy({FAST: parameters_of(model, FAST)})[FAST])
            method._policy = model
            parameter = next(iter(parameters_of(model, SLOW).values()))
            if state.global_step in self.steps:
                self.hook = parameter.register_hook(lambda grad: grad * torch.nan)
            elif hasattr(self, "hook"):
                self.hook.remove()

    breaking = Break({1})
    run = ofs(tmp_path / "a", [breaking], max_steps=4)
    method = run.methods[0]
    logs = pairs.history(run)
    support.assert_same(breaking.seen[1], breaking.seen[2])
    assert any((breaking.seen[2][name] != value).any() for name, value in breaking.seen[3].items())
    assert [log["ofs_dpo/skipped"] for log in logs if "ofs_dpo/skipped" in log] == [0, 0, 1, 0]
    run = ofs(tmp_path / "b", [Break(set(range(20)))], max_steps=20)
    method = run.methods[0]
    with pytest.raises(FloatingPointError, match="10 optimiser steps in a row"):
        run.train()


def test_rpo_acts_in_both_modules(tmp_path):
    kept, plain = Kept(), Kept()
    ofs(tmp_path / "a", [kept], methods=[RPO(eta=0.5)], max_steps=2).train()
    ofs(tmp_path / "b", [plain], max_steps=2).train()
    for adapter in (FAST, SLOW):
        left, right = (found.gradients[0][adapter] for found in (kept, plain))
        assert any((left[name] - right[name]).abs().max() > 1e-4 for name in left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": None, "reference": True}, "full fine-tuning would need two models"),
        ({"adapter": LoraConfig(target_modules="all-linear", bias="all")}, "bias none"),
        ({"sync_ref_model": True}, "sync_ref_model to false"),
        ({"methods": [Feasible()]}, "feasible is made for one"),
        ({"optimizers": (SGD([torch.zeros(1)]), None)}, "which the optimizer in `optimizers` does not hold"),
        ({"loss_type": "apo_zero"}, "apo_zero does not use"),
    ],
)
def test_refusals(tmp_path, options, message):
    options = dict(options)
    methods = [OFSDPO(), *options.pop("methods", [])]
    adapter = options.pop("adapter", LORA)
    if options.pop("reference", False):
        options["reference"] = support.model()
    with pytest.raises(ValueError, match=message):
        pairs.trainer(tmp_path, methods=methods, peft_config=adapter, **options)


def test_prompts_and_selections_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LoRA adapter inside the layers"):
        ofs(tmp_path, adapter=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    policy, args = get_peft_model(support.model(), LORA), pairs.trainer(tmp_path).args
    with pytest.raises(ValueError, match="drop the selection"):
        DPOTrainer(
            model=policy,
            args=args,
            train_dataset=pairs.rows(),
            processing_class=support.tokenizer(),
            methods=[OFSDPO()],
            selection=Select(HFT()),
        )


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_launchers_that_shard_are_refused(kind):
    launched = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value=kind)))
    with pytest.raises(ValueError, match=f"which {kind} does not follow"):
        refuse(launched, OFSDPO(), None)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    script = str(TESTS / "preference" / "ofs_ranks.py")
    path = os.pathsep.join([str(TESTS), str(TESTS / "preference"), str(TESTS.parent)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable, script, str(tmp_path), "1"], [*launch, script, str(tmp_path), "2"]):
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("plain", "checkpointing"):
        one, left, right = (torch.load(tmp_path / f"{name}-{which}.pt") for which in ("1-0", "2-0", "2-1"))
        assert one["active"] == left["active"] == right["active"]
        assert SLOW in one["active"]
        for adapter in (FAST, SLOW):
            support.assert_same(left["end"][adapter], right["end"][adapter])
            for key, value in one["end"][adapter].items():
                torch.testing.assert_close(left["end"][adapter][key], value, rtol=1e-3, atol=2e-5)
        for a, b in zip(one["logs"], left["logs"], strict=True):
            for key in ("ofs_dpo/margin_fast", "ofs_dpo/loss_slow", "grad_norm"):
                if key in a:
                    assert b[key] == pytest.approx(a[key], rel=5e-3, abs=1e-4), key

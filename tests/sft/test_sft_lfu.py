"""LfU: values by hand, gradients against float64 autograd, SFT bit for bit when off, weights put back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
from torch.func import functional_call
from transformers import TrainerCallback
from trl import SFTTrainer as TRLSFTTrainer
from typer.testing import CliRunner

from posttrain import SFTTrainer
from posttrain.cli import app
from posttrain.sft.lfu import LfU, ascent_step, consistency, moved

TESTS = Path(__file__).resolve().parents[1]


# ---- by hand -----------------------------------------------------------------------------------------------


def test_scalar_example():
    theta, x, y = torch.tensor([1.0], dtype=torch.float64, requires_grad=True), 2.0, 1.0
    clean = theta * x
    (0.5 * (clean - y) ** 2).sum().backward()
    assert theta.grad.item() == 2.0
    steps, norm = ascent_step([theta.grad.clone()], 0.1)
    assert norm.item() == 2.0
    with moved([theta], steps):
        assert theta.item() == pytest.approx(1.1)
        found = consistency([clean.view(1, 1)], [(theta * x).view(1, 1)])
        (5.0 * found).backward()
    assert theta.item() == 1.0
    assert 0.5 + 5 * found.item() == pytest.approx(0.7)
    assert theta.grad.item() == pytest.approx(6.0)


class Two(torch.nn.Module):
    """h1 = tanh(w1 x), h2 = w2 h1."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (torch.nn.Linear(1, 1, bias=False).double() for _ in range(2))
        self.one.weight.data.fill_(0.5)
        self.two.weight.data.fill_(-1.0)

    def forward(self):
        first = torch.tanh(self.one(torch.ones(1, 1, dtype=torch.float64)))
        return [first, self.two(first)]


def sft_loss(states):
    return (0.5 * (states[1] - 0.5) ** 2).sum()


def test_two_layers_and_the_wrong_orders_of_the_backwards():
    model = Two()
    weights = list(model.parameters())
    clean = model()
    loss = sft_loss(clean)
    assert loss.item() == pytest.approx(0.462834712)
    loss.backward()
    gradient = [w.grad.clone() for w in weights]
    steps, norm = ascent_step(gradient, 0.1)
    assert norm.item() == pytest.approx(0.877613455)
    assert [s.item() for s in steps] == pytest.approx([0.086217326, -0.050661352], abs=1e-9)
    with moved(weights, steps):
        there = model()
        found = consistency(clean, there)
        (5.0 * found).backward()
    assert [h.item() for h in there] == pytest.approx([0.527169617, -0.553876743], abs=1e-9)
    assert found.item() == pytest.approx(0.006325822, abs=1e-9)
    assert loss.item() + 5 * found.item() == pytest.approx(0.494463823)
    assert [w.grad.item() for w in weights] == pytest.approx([1.339602452, -0.686475175], abs=1e-9)

    def joint(put_on, take_off):
        """One backward at the end, as one must not do it."""
        model = Two()
        weights = list(model.parameters())
        clean = model()
        loss = sft_loss(clean)
        steps, _ = ascent_step(torch.autograd.grad(loss, weights, retain_graph=True), 0.1)
        saved = [w.detach().clone() for w in weights]
        put_on(weights, steps)
        total = loss + 5.0 * consistency(clean, model())
        take_off(weights, saved)
        total.backward()
        return [w.grad.item() for w in weights]

    def add(weights, steps):
        for w, step in zip(weights, steps, strict=True):
            w.data.add_(step)

    def repoint(weights, saved):
        for w, original in zip(weights, saved, strict=True):
            w.data = original

    def copy_back(weights, saved):
        for w, original in zip(weights, saved, strict=True):
            w.data.copy_(original)

    # that they are other numbers is what makes the test above one of the order
    assert joint(add, repoint) == pytest.approx([1.377935610, -0.686475175], abs=1e-8)
    assert joint(add, copy_back) == pytest.approx([1.322818629, -0.686475175], abs=1e-8)


def test_the_step_has_length_alpha_over_all_weights_together():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(7, 5, generator=generator), None, 100 * torch.randn(3, generator=generator)]
    steps, norm = ascent_step(gradients, 0.1)
    assert steps[1] is None
    length = torch.cat([s.flatten() for s in steps if s is not None]).double().norm()
    assert length.item() == pytest.approx(0.1, abs=1e-6)
    assert norm.item() == pytest.approx(torch.cat([gradients[0].flatten(), gradients[2]]).norm().item())
    assert ascent_step([torch.zeros(3), None], 0.1)[0] == [None, None]
    assert ascent_step([None], 0.1)[0] == [None]
    with pytest.raises(FloatingPointError, match="ascent gradient is inf"):
        ascent_step([torch.tensor([torch.inf])], 0.1)


def test_consistency_is_a_mean_over_layers_and_tokens_and_a_mean_or_sum_over_the_hidden_size():
    clean = [torch.zeros(2, 4), torch.ones(2, 4)]
    perturbed = [torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 2.0]]), torch.ones(2, 4)]
    assert consistency(clean, perturbed).item() == (1 / 4 + 4 / 4) / 2 / 2
    assert consistency(clean, perturbed, reduce_hidden="sum").item() == (1 + 4) / 2 / 2
    half = [h.bfloat16() for h in perturbed]
    assert consistency([h.bfloat16() for h in clean], half).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_bit_also_when_something_fails(dtype):
    weight = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(dtype)
    other = torch.ones(2)
    original = weight.clone()

    def fail():
        with moved([weight, other], [torch.full_like(weight, 0.3), None]):
            assert not torch.equal(weight, original)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(weight, original)


# ---- in the trainer ----------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimiser step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def trainer(
    folder,
    methods=(),
    *,
    adapter=None,
    cls=SFTTrainer,
    callbacks=(),
    dtype=torch.float32,
    model=None,
    selection=None,
    **settings,
):
    extra = {} if cls is TRLSFTTrainer else {"methods": methods, "selection": selection}
    return cls(
        model=support.model(dtype=dtype) if model is None else model,
        args=support.sft_config(folder, **({"max_steps": 3, "max_grad_norm": 0.0} | settings)),
        train_dataset=support.answers(24),
        processing_class=support.tokenizer(),
        peft_config=adapter,
        callbacks=list(callbacks),
        **extra,
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"weight": 0.0}])
def test_switched_off_it_is_trls_trainer_bit_for_bit(adapter, off, tmp_path):
    runs = []
    for name, cls, methods in (("a", TRLSFTTrainer, []), ("b", SFTTrainer, [LfU(**off)])):
        peft = support.lora(lora_dropout=0.1) if adapter else None
        runs.append(trainer(tmp_path / name, methods, adapter=peft, cls=cls))
        runs[-1].train()
    plain, ours = runs
    support.assert_same(support.weights(plain.model), support.weights(ours.model))
    assert support.logged(plain, "loss", "grad_norm") == support.logged(ours, "loss", "grad_norm")


def test_a_tiny_weight_leaves_dropout_and_order_of_sft_as_they_are(tmp_path):
    """The extra passes draw no random numbers from the training's stream."""
    runs = []
    for number, methods in enumerate(([], [LfU(weight=1e-30)])):
        run = trainer(tmp_path / str(number), methods, adapter=support.lora(lora_dropout=0.3), max_steps=4)
        run.train()
        runs.append(run)
    support.assert_same(*(support.weights(run.model) for run in runs))


def reference(model, batches, others, alpha, weight, names, *, reduce="mean", layers=None):
    """Gradient of the sum over micro-batches, in float64, without touching a weight: functional_call."""
    model = model.double().eval()
    everything = dict(model.named_parameters())
    weights = {name: everything[name] for name in names}
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = "base_model.model." if core is not model else ""
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    def nll(parameters, batch):
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
        logits = functional_call(model, parameters, kwargs=inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def hidden(parameters, batch):
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
        inner = {name.removeprefix(prefix): value for name, value in parameters.items()}
        states = functional_call(core, inner, kwargs=inputs | {"output_hidden_states": True}).hidden_states
        chosen = states if layers is None else [states[i] for i in layers]
        return torch.stack([h[batch["labels"] != -100] for h in chosen])  # (K, T, d)

    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    added = 0.0
    for batch, other in zip(batches, others, strict=True):
        pieces = torch.autograd.grad(nll(weights, batch) / tokens, list(weights.values()))
        climb = torch.autograd.grad(nll(weights, other), list(weights.values()))
        norm = torch.cat([g.flatten() for g in climb]).norm()
        there = {n: w + alpha * g / norm for (n, w), g in zip(weights.items(), climb, strict=True)}
        target = hidden(weights, batch).detach()
        square = (target - hidden(there, batch)).square()
        penalty = (square.mean(-1) if reduce == "mean" else square.sum(-1)).mean() * weight / len(batches)
        more = torch.autograd.grad(penalty, list(weights.values()), allow_unused=True)
        added += penalty.item()
        for name, one, two in zip(weights, pieces, more, strict=True):
            total[name] += one if two is None else one + two
    return {name: value.detach() for name, value in total.items()}, added


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("adapter", "accumulation", "method"),
    [
        (False, 1, LfU()),
        (True, 1, LfU()),
        (True, 2, LfU(ascent_batch="same", alpha=0.5, weight=2.0)),
        (False, 2, LfU(reduce_hidden="sum", layers=(1, -1), weight=0.3)),
    ],
)
def test_the_gradient_is_that_of_the_formula(adapter, accumulation, method, checkpointing, tmp_path):
    gradients = Gradients()
    run = trainer(
        tmp_path,
        [method],
        adapter=support.lora() if adapter else None,
        callbacks=[gradients],
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    if adapter:  # B is zero in a new adapter, and the step would not reach the hidden states
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(7))
    seen = {"batches": [], "others": []}
    original, draw = run._micro_step, run._another

    def watched_step(model, inputs):
        seen["batches"].append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return original(model, inputs)

    def watched_draw():
        seen["others"].append(draw())
        return {k: v.clone() if torch.is_tensor(v) else v for k, v in seen["others"][-1].items()}

    run._micro_step, run._another = watched_step, watched_draw
    before = support.weights(run.model)
    run.train()
    logs = support.logged(run, "loss", "lfu/consistency", "lfu/gradient_norm")
    assert len(seen["batches"]) == accumulation
    others = seen["others"] if method.ascent_batch == "fresh" else seen["batches"]
    model = run.model
    model.load_state_dict(before)
    model.gradient_checkpointing_disable()
    (found,) = gradients.found
    wanted, added = reference(
        model,
        seen["batches"],
        others,
        method.alpha,
        method.weight,
        list(found),
        reduce=method.reduce_hidden,
        layers=method.layers,
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-4, atol=2e-6, msg=name)
    assert added > 1e-5
    assert logs[0][1] * method.weight == pytest.approx(added, rel=1e-4)
    # the penalty is no rounding error of the gradient, so the comparison above sees it
    plain, _ = reference(model, seen["batches"], others, method.alpha, 0.0, list(found))
    assert max((wanted[n] - plain[n]).abs().max().item() for n in wanted) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_put_back_before_the_optimiser_steps(dtype, tmp_path):
    """With a learning rate of 0 nothing may move."""
    run = trainer(tmp_path, [LfU(alpha=1.0)], dtype=dtype, learning_rate=0.0, weight_decay=0.0)
    before = support.weights(run.model)
    run.train()
    support.assert_same(before, support.weights(run.model))
    assert all(value > 0 for (value,) in support.logged(run, "lfu/consistency"))


def test_fresh_batches_are_another_shuffle_that_covers_the_data(tmp_path):
    run = trainer(tmp_path, [LfU()])
    drawn = [row for _ in range(12) for row in run._another()["input_ids"].tolist()]
    pad = run.processing_class.pad_token_id
    rows = [tuple(token for token in row if token != pad) for row in drawn]
    assert sorted(rows[:24]) == sorted(rows[24:])
    assert len(set(rows[:24])) == len({tuple(r["input_ids"]) for r in run.train_dataset})
    assert rows[:24] != rows[24:]
    assert rows[:24] != [tuple(r["input_ids"]) for r in run.train_dataset]


@pytest.mark.parametrize("adapter", [False, True])
def test_resume_is_exact(adapter, tmp_path):
    settings = {"max_steps": 9, "gradient_accumulation_steps": 2, "logging_steps": 2, "max_grad_norm": 1.0}

    def build(folder, **more):
        peft = support.lora(lora_dropout=0.1) if adapter else None
        return trainer(folder, [LfU()], adapter=peft, **settings, **more)

    whole = build(tmp_path / "whole")
    whole.train()
    build(tmp_path / "cut", callbacks=[StopAt(5)]).train()
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    support.assert_same(support.weights(whole.model), support.weights(resumed.model))
    keys = ("loss", "grad_norm", "lfu/consistency", "lfu/gradient_norm")
    assert support.logged(whole, *keys) == support.logged(resumed, *keys)
    with pytest.raises(ValueError, match="written with methods"):
        trainer(tmp_path / "cut", adapter=support.lora() if adapter else None, **settings).train(
            resume_from_checkpoint=True
        )


def test_a_micro_batch_without_a_token_that_counts_adds_nothing(tmp_path):
    run = trainer(tmp_path, [LfU()], max_steps=1)
    run.current_gradient_accumulation_steps = 1
    step = run._micro_step(run.model, run._another())
    step.inputs["labels"].fill_(-100)
    step.inputs["use_cache"] = False
    with run.methods[0].around(step) as seen:
        step.model(**step.inputs, fused_lm_head=True)
    assert run.methods[0].after_backward(step, seen).item() == 0.0
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fsdp": "full_shard"}, "which FSDP2 shards"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant: false",
        ),
    ],
)
def test_what_it_cannot_go_with_is_refused_before_the_model_loads(settings, words, tmp_path):
    args = support.sft_config(tmp_path)
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=words):
        SFTTrainer(model="nowhere", args=args, train_dataset=support.answers(4), methods=[LfU()])


def test_wrong_methods_are_refused(tmp_path):
    with pytest.raises(ValueError, match="given once"):
        trainer(tmp_path, [LfU(), LfU(alpha=0.2)])
    with pytest.raises(TypeError, match="LfU"):
        trainer(tmp_path, ["lfu"])
    with pytest.raises(ValueError, match=r"\[9\] do not exist"):
        trainer(tmp_path, [LfU(layers=(0, 9))]).train()


@pytest.mark.slow
def test_two_ranks_average_the_penalty_of_local_steps(tmp_path):
    """Each rank climbs by its own gradient; what is added is the mean over ranks, and both stay equal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "sft" / "lfu_ranks.py"), str(tmp_path)]
    path = os.pathsep.join([str(TESTS), str(TESTS / "sft"), str(TESTS.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for result in json.loads((tmp_path / "result.json").read_text()):
        assert result["difference"] < 2e-6, result
        assert result["ranks_equal"], result
        assert result["effect"] > 1e-4, result


# ---- configuration -----------------------------------------------------------------------------------------


def test_the_configuration_knows_it(tmp_path):
    text = "task: sft\ndata: {source: 'reasoning_gym:chain_sum'}\nmethods: {lfu: {alpha: 0.05}}\n"
    (tmp_path / "run.yaml").write_text(text)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    for wrong, words in (
        ("methods.lfu.alpha=-1", "alpha"),
        ("methods={ace: }", "unknown method 'ace'"),
        ("trainer.fp16=true", "use bf16"),
    ):
        done = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml"), wrong])
        assert done.exit_code == 2, done.output
        assert words in " ".join(done.output.split())


def test_the_list_of_methods_has_it():
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    tasks = {entry["name"]: entry["task"] for entry in listed}
    assert tasks["lfu"] == "sft"
    assert tasks["ace"] == "rlvr"
    page = CliRunner().invoke(app, ["methods", "lfu"])
    assert page.exit_code == 0
    assert "Order of the two backwards" in page.stdout
    missing = CliRunner().invoke(app, ["methods", "lfuu"])
    assert missing.exit_code == 2
    assert "did you mean 'lfu'" in missing.stderr

"""SGTM: the MLP by hand, units of decoders, what each mode moves, mixed batches, the optimiser, ablation."""

import json
import shutil
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file
from test_sft_lfu import Gradients, StopAt
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTTrainer as TRLSFTTrainer

from posttrain import SFTTrainer
from posttrain.config.check import load_run_config
from posttrain.run.train import train
from posttrain.run.verbs import export_path, model_of
from posttrain.selection.plan import PlanError
from posttrain.selection.strict import StrictAdamW
from posttrain.selection.units import (
    Units,
    ablate,
    last_units,
    layers,
    redraw,
    silence,
    smallest_units,
    without,
)
from posttrain.sft.relearn import relearn, steps_to
from posttrain.sft.sgtm import SGTM, in_mode, parts, trained

# ---- by hand -----------------------------------------------------------------------------------------------


class MLP(torch.nn.Module):
    """The example of the method's sheet: ReLU, three hidden units, the last to forget."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1, bias=False)
        self.double()
        self.up_proj.weight.data = torch.tensor([[0.5, -0.2], [0.1, 0.3], [0.4, 0.2]]).double()
        self.down_proj.weight.data = torch.tensor([[0.3, -0.5, 0.2]]).double()

    def forward(self):
        return self.down_proj(torch.relu(self.up_proj(torch.tensor([1.0, 2.0], dtype=torch.float64))))


@pytest.mark.parametrize(
    ("mode", "output", "loss", "first", "second"),
    [
        (
            "default",
            -0.16,
            0.6728,
            [[-0.348, -0.696], [0.58, 1.16], [-0.232, -0.464]],
            [-0.116, -0.812, -0.928],
        ),
        ("forget", -0.16, 0.6728, [[0, 0], [0, 0], [-0.232, -0.464]], [0, 0, -0.928]),
        ("retain", -0.32, 0.8712, [[-0.396, -0.792], [0.66, 1.32], [0, 0]], [-0.132, -0.924, 0]),
    ],
)
def test_the_mlp_of_the_sheet(mode, output, loss, first, second):
    model = MLP()
    units = last_units(model, mlp=1, attention=0)
    with in_mode(model, units, mode):
        found = model()
        value = 0.5 * (found - 1.0).square().sum()
        value.backward()
    assert found.item() == pytest.approx(output)
    assert value.item() == pytest.approx(loss)
    for row, wanted in zip(model.up_proj.weight.grad.tolist(), first, strict=True):
        assert row == pytest.approx(wanted)
    assert model.down_proj.weight.grad[0].tolist() == pytest.approx(second)
    ablate(model, units)
    assert model().item() == pytest.approx(-0.32)
    assert not model.up_proj.weight[2].any()
    # the hooks are gone
    model.zero_grad()
    model().sum().backward()
    assert model.up_proj.weight.grad[0].any()


# ---- units -------------------------------------------------------------------------------------------------


def qwen(seed=0):
    """Biases on q, k and v; tied head; grouped queries."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(support.CHARACTERS) + 3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        return model


def ids(seed=0, rows=3):
    return torch.randint(3, 40, (rows, 10), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("build", [support.model, qwen])
def test_units_are_linked_rows_and_columns(build):
    model = build()
    assert [(layer.kind, layer.count) for layer in layers(model)] == [
        ("attention", 2),
        ("mlp", model.config.intermediate_size),
    ] * 2
    units = last_units(model, mlp=5, attention=1)
    slices = units.slices(model)
    assert slices["model.layers.1.mlp.gate_proj.weight"][1].tolist() == list(
        range(model.config.intermediate_size - 5, model.config.intermediate_size)
    )
    # KV head 1 of 8 rows, and its query heads 2 and 3
    assert slices["model.layers.0.self_attn.k_proj.weight"] == (0, pytest.approx(torch.arange(8, 16)))
    assert slices["model.layers.0.self_attn.q_proj.weight"][1].tolist() == list(range(16, 32))
    assert slices["model.layers.0.self_attn.o_proj.weight"][0] == 1
    assert slices["model.layers.0.self_attn.o_proj.weight"][1].tolist() == list(range(16, 32))
    assert ("model.layers.0.self_attn.q_proj.bias" in slices) == (build is qwen)
    tokens = ids()
    with torch.no_grad():
        whole = model(tokens).logits
        with without(model, units):
            masked = model(tokens).logits
        silent = build()
        silence(silent, units)
        gone = build()
        ablate(gone, units)
        assert not torch.allclose(whole, masked, atol=1e-3)
        torch.testing.assert_close(masked, gone(tokens).logits)
        torch.testing.assert_close(masked, silent(tokens).logits)
    # a unit that is silent can still learn, one that is zero cannot
    for found, learns in ((silent, True), (gone, False)):
        found(tokens, labels=tokens).loss.backward()
        for layer in found.model.layers:
            assert bool(layer.mlp.down_proj.weight.grad[:, -5:].any()) == learns


def test_smallest_units_by_hand_and_the_last_of_equals():
    model = support.model().double()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, 7] = 0
        mlp.up_proj.weight[11] = 0
        model.model.layers[0].self_attn.o_proj.weight[:, :16] *= 1e-3
    batch = {"input_ids": ids(), "attention_mask": torch.ones(3, 10).long()}
    batch["attention_mask"][0, 6:] = 0
    units = smallest_units(model, [batch], mlp=2, attention=1)
    found = {layer.output: chosen.tolist() for layer, chosen in units.chosen}
    assert found["model.layers.1.mlp.down_proj"] == [7, 11]
    assert found["model.layers.0.self_attn.o_proj"] == [0]
    # against activations that are recorded another way
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, o: seen.append(a[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    activations = seen[0][batch["attention_mask"].bool()]
    scores = activations.norm(dim=0) * model.model.layers[0].mlp.down_proj.weight.norm(dim=0)
    assert found["model.layers.0.mlp.down_proj"] == sorted(scores.argsort()[:2].tolist())
    with torch.no_grad():
        mlp.down_proj.weight.zero_()
    equal = smallest_units(model, [batch], mlp=2, attention=0)
    assert equal.chosen[-1][1].tolist() == [62, 63]
    with pytest.raises(ValueError, match="rows to retain, found none"):
        smallest_units(model, [], mlp=2, attention=0)


def test_units_that_cannot_be_are_refused():
    model = support.model()
    with pytest.raises(PlanError, match="leave nothing for the rest"):
        last_units(model, mlp=64, attention=0)
    with pytest.raises(PlanError, match="2 of 2 KV groups"):
        last_units(model, mlp=1, attention=2)
    with pytest.raises(PlanError, match="no units are chosen"):
        last_units(model, mlp=0, attention=0)
    with pytest.raises(PlanError, match="Llama and Qwen"):
        layers(torch.nn.Linear(2, 2))


def test_redrawn_units_have_the_spread_of_the_rest():
    model, start = support.model(intermediate_size=256), support.model(intermediate_size=256)
    units = last_units(model, mlp=100, attention=0)
    redraw(model, units, torch.Generator().manual_seed(0))
    weight, before = (m.model.layers[0].mlp.up_proj.weight for m in (model, start))
    assert torch.equal(weight[:156], before[:156])
    assert not torch.equal(weight[156:], before[156:])
    assert weight[156:].std().item() == pytest.approx(before[:156].std().item(), rel=0.05)


# ---- the strict optimiser ----------------------------------------------------------------------------------


def test_strict_adamw_is_adamw_for_what_takes_part():
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=draw)
    gradients = [torch.randn(6, 4, generator=draw) for _ in range(8)]
    index, rest = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    settings = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    ours = torch.nn.Parameter(start.clone())
    optimizer = StrictAdamW([ours], {ours: [("forget", 0, index), ("retain", 0, rest)]}, **settings)
    places = {"forget": index, "retain": rest}
    alone = {label: torch.nn.Parameter(start[where].clone()) for label, where in places.items()}
    others = {label: torch.optim.AdamW([p], foreach=False, **settings) for label, p in alone.items()}
    one, two = {"forget"}, {"retain"}
    plan = [one | two, one, two, two, one, one | two, set(), one]
    for labels, gradient in zip(plan, gradients, strict=True):
        ours.grad = gradient.clone()
        optimizer.mark(labels)
        optimizer.step()
        for label, where in places.items():
            if label in labels:
                alone[label].grad = gradient[where].clone()
                others[label].step()
            assert torch.equal(ours[where], alone[label])
    # state goes through a file and on as it was, also for half precision
    again = torch.nn.Parameter(ours.detach().clone())
    second = StrictAdamW([again], {again: [("forget", 0, index), ("retain", 0, rest)]}, **settings)
    second.load_state_dict(optimizer.state_dict())
    for parameter, o in ((ours, optimizer), (again, second)):
        parameter.grad = gradients[0].clone()
        o.mark({"retain"})
        o.step()
    assert torch.equal(ours, again)


def test_strict_adamw_keeps_a_master_of_half_precision():
    start = torch.ones(4, 2, dtype=torch.bfloat16)
    half = torch.nn.Parameter(start.clone())
    own = [("a", 0, torch.tensor([0])), ("b", 0, torch.tensor([1, 2, 3]))]
    optimizer = StrictAdamW([half], {half: own}, lr=1e-3)
    for _ in range(10):
        half.grad = torch.ones_like(half)
        optimizer.mark({"a"})
        optimizer.step()
    assert half[0, 0].item() == pytest.approx(0.99, abs=4e-3)  # each step alone would round away
    assert torch.equal(half[1:], start[1:])


# ---- in the trainer ----------------------------------------------------------------------------------------


def rows(count=24, pattern=(True, False, None)):
    return support.answers(count).add_column("forget", [pattern[i % len(pattern)] for i in range(count)])


def trainer(folder, method, *, data=None, build=support.model, callbacks=(), dtype=None, **settings):
    settings = {"max_steps": 3, "max_grad_norm": 0.0} | settings
    model = build()
    return SFTTrainer(
        model=model if dtype is None else model.to(dtype),
        args=support.sft_config(folder, **settings),
        train_dataset=rows() if data is None else data,
        processing_class=support.tokenizer(),
        callbacks=list(callbacks),
        methods=[method],
    )


def moved(run, start):
    """Which parts of the weights moved."""
    found = set()
    for name, own in parts(run.model, run.methods[0].units).items():
        parameter = dict(run.model.named_parameters())[name]
        for label, dim, index in own:
            pieces = [w if index is None else w.index_select(dim, index) for w in (parameter, start[name])]
            if not torch.equal(*pieces):
                found.add(label)
    return found


@pytest.mark.parametrize("build", [support.model, qwen])
@pytest.mark.parametrize(
    ("mark", "settings", "wanted"),
    [
        (True, {}, {"forget"}),
        (True, {"mask_joint": False}, {"forget", "joint"}),
        (False, {"retain_mask_prob": 1.0}, {"retain", "joint"}),
        (False, {"retain_mask_prob": 0.0}, {"forget", "retain", "joint"}),
        (None, {}, {"forget", "retain", "joint"}),
    ],
)
def test_each_mode_moves_its_part_and_leaves_the_rest_to_the_bit(mark, settings, wanted, build, tmp_path):
    """AdamW with decay, warm: five steps of everything first, so that momentum is there to leak."""
    method = SGTM(mlp_units=4, kv_groups=1, choose="last", at_end="keep", silence_first=False, **settings)
    run = trainer(tmp_path / "a", method, data=rows(8, (None,)), build=build, max_steps=5)
    run.train()
    assert moved(run, support.weights(build())) == {"forget", "retain", "joint"}
    second = trainer(tmp_path / "b", method, data=rows(8, (mark,)), build=build, max_steps=3)
    second.model.load_state_dict(run.model.state_dict())
    second.create_optimizer()
    second.optimizer.load_state_dict(run.optimizer.optimizer.state_dict())
    start = support.weights(second.model)
    second.train()
    assert (
        moved(second, start)
        == wanted
        == set(trained(second_mode(mark, settings), mask_joint=method.mask_joint))
    )


def second_mode(mark, settings):
    if mark:
        return "forget"
    return "retain" if mark is False and settings["retain_mask_prob"] else "default"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_of_a_mixed_batch_is_the_sum_of_the_modes(accumulation, tmp_path):
    gradients = Gradients()
    method = SGTM(mlp_units=6, kv_groups=1, choose="last", retain_mask_prob=1.0, silence_first=False)
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    run = trainer(tmp_path, method, callbacks=[gradients], **settings)
    seen, original = [], run._passes

    def watched(inputs):
        seen.append(dict(inputs))
        return original(inputs)

    run._passes = watched
    start = support.weights(run.model)
    run.train()
    model = run.model
    model.load_state_dict(start)
    model.zero_grad()
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in seen)
    total = 0.0
    modes = []
    for batch in seen:
        for i, mark in enumerate(batch["forget"].tolist()):
            modes.append({1.0: "forget", 0.0: "retain", -1.0: "default"}[mark])
            with in_mode(model, method.units, modes[-1]):
                logits = model(
                    input_ids=batch["input_ids"][i : i + 1], attention_mask=batch["attention_mask"][i : i + 1]
                ).logits[0, :-1]
                labels = batch["labels"][i, 1:]
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / tokens
                loss.backward()
                total += loss.item()
    assert set(modes) == {"forget", "retain", "default"}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients.found[0][name], parameter.grad, rtol=2e-4, atol=2e-6, msg=name)
    assert support.logged(run, "loss")[0][0] == pytest.approx(total, rel=1e-3)
    logged = support.logged(run, "sgtm/forget", "sgtm/retain", "sgtm/default")[0]
    assert logged == pytest.approx([modes.count(m) / len(modes) for m in ("forget", "retain", "default")])


def test_the_draws_of_retain_mode_hang_on_the_seed():
    marks = {"forget": torch.zeros(2)}

    def draws(seed):
        method = SGTM(retain_mask_prob=0.5, seed=seed)
        places = [(step, micro) for step in range(100) for micro in range(2)]
        return [bool(method.groups(marks, place)["retain"].all()) for place in places]

    found = [draws(seed) for seed in (0, 1, 20260101, 2**31)]
    assert draws(1) == found[1]
    for number, one in enumerate(found):
        assert 70 < sum(one) < 130  # 100, deviation 7
        for other in found[:number]:
            assert 70 < sum(a == b for a, b in zip(one, other, strict=True)) < 130


def test_without_labels_and_rho_it_is_plain_training(tmp_path):
    settings = {"optim": "adamw_torch", "max_steps": 4, "max_grad_norm": 1.0}
    method = SGTM(mlp_units=4, choose="last", retain_mask_prob=0.0, silence_first=False, at_end="keep")
    ours = trainer(tmp_path / "a", method, data=rows(24, (False, None)), **settings)
    ours.train()
    plain = TRLSFTTrainer(
        model=support.model(),
        args=support.sft_config(tmp_path / "b", **settings),
        train_dataset=support.answers(24),
        processing_class=support.tokenizer(),
    )
    plain.train()
    for name, value in support.weights(plain.model).items():
        torch.testing.assert_close(support.weights(ours.model)[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_end_removes_the_units_and_the_start_silences_them(tmp_path):
    method = SGTM(mlp_units=4, kv_groups=1, examples=8)
    run = trainer(tmp_path, method, max_steps=2)
    tokens = ids()
    with torch.no_grad():
        silent = run.model(tokens).logits
        with without(run.model, method.units):
            torch.testing.assert_close(run.model(tokens).logits, silent)
    run.train()
    weights = dict(run.model.named_parameters())
    for name, (dim, index) in method.units.slices(run.model).items():
        assert not weights[name].index_select(dim, index).any(), name
    redrawn = trainer(tmp_path, SGTM(mlp_units=4, at_end="redraw", choose="last"), max_steps=1)
    redrawn.train()
    assert redrawn.model.model.layers[0].mlp.down_proj.weight[:, -4:].abs().min() > 0
    early = trainer(tmp_path, SGTM(mlp_units=4, choose="last"), max_steps=3, callbacks=[StopAt(1)])
    early.train()
    assert early.model.model.layers[0].mlp.up_proj.weight[-4:].any()


def test_a_run_keeps_the_finished_model_and_its_export_is_that_one(tmp_path):
    lines = [
        {"prompt": f"Say {i}", "completion": f" word {i}", "forget": [True, False, None][i % 3]}
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, tokenizer = support.model(), support.tokenizer()
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "start")
    values = {
        "task": "sft",
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "start")},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "methods": [{"sgtm": {"mlp_units": 4, "choose": "last", "seed": 20260101}}],
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "use_cpu": True},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    config = load_run_config(tmp_path / "run.yaml")

    def units(folder):
        weights = load_file(Path(folder) / "model.safetensors")
        return weights["model.layers.0.mlp.up_proj.weight"][-4:]

    train(config)
    assert units(tmp_path / "run/checkpoints/checkpoint-2").any()
    assert model_of(tmp_path / "run") == str(tmp_path / "run/finished_model")
    assert not units(tmp_path / "run/finished_model").any()
    done = export_path(tmp_path / "run", to=None, format="auto", push_to=None, private=True)
    assert not units(done["folder"]).any()
    # a run that goes on has no finished model until it ends again
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-2")
    train(config, resume=True)
    assert not units(model_of(tmp_path / "run")).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact_and_knows_its_units(dtype, tmp_path):
    method = SGTM(mlp_units=4, kv_groups=1, retain_mask_prob=0.5, examples=8)
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "dtype": dtype}
    whole = trainer(tmp_path / "whole", method, **settings)
    whole.train()
    trainer(tmp_path / "cut", method, callbacks=[StopAt(3)], **settings).train()
    resumed = trainer(tmp_path / "cut", method, **settings)
    resumed.train(resume_from_checkpoint=True)
    support.assert_same(support.weights(whole.model), support.weights(resumed.model))
    keys = ("loss", "grad_norm", "sgtm/retain")
    assert support.logged(whole, *keys) == support.logged(resumed, *keys)
    assert len({values[2] for values in support.logged(whole, *keys)}) > 1  # rho was drawn both ways
    other = trainer(tmp_path / "cut", SGTM(mlp_units=4, kv_groups=1, choose="last"), **settings)
    with pytest.raises(ValueError, match="other choices of sgtm"):
        other.train(resume_from_checkpoint=True)


def test_what_it_cannot_go_with_is_refused(tmp_path):
    def build(**more):
        SFTTrainer(
            model="nowhere",
            args=support.sft_config(tmp_path, **more.pop("settings", {})),
            train_dataset=rows(),
            methods=[SGTM(), *more.pop("methods", [])],
            **more,
        )

    from posttrain.sft.unlearn import Unlearn

    for more, words in (
        ({"peft_config": support.lora()}, "which an adapter freezes"),
        ({"methods": [Unlearn()]}, "does not go with unlearn"),
        ({"settings": {"optim": "sgd"}}, "set adamw_torch"),
        ({"settings": {"packing": True}}, "packing joins them"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**more)
    assert Units(()).outputs() == {}


# ---- relearning --------------------------------------------------------------------------------------------


def test_relearning_counts_steps_and_leaves_the_model(tmp_path):
    model, start = support.model(), support.model()
    batches = [{"input_ids": ids(seed), "labels": ids(seed)} for seed in (1, 2)]
    curve = relearn(model, batches, batches[:1], learning_rate=1e-2, steps=21, every=5)
    assert [step for step, _ in curve] == [0, 5, 10, 15, 20, 21]
    support.assert_same(support.weights(model), support.weights(start))
    assert curve[-1][1] < curve[0][1] - 1
    learned = steps_to(curve, curve[2][1])
    assert learned == 10
    assert steps_to(curve, 0.0) is None
    with pytest.raises(ValueError, match="found none"):
        relearn(model, [], batches, learning_rate=1e-2, steps=1)
    nothing = [{"input_ids": ids(), "labels": torch.full_like(ids(), -100)}]
    with pytest.raises(ValueError, match="to train on has a label"):
        relearn(model, nothing, batches, learning_rate=1e-2, steps=1)
    # a rate whose steps round away in half precision: the copy is one of fp32
    half = support.model(dtype=torch.bfloat16)
    curve = relearn(half, batches, batches[:1], learning_rate=1e-5, steps=4)
    assert curve == relearn(half.float(), batches, batches[:1], learning_rate=1e-5, steps=4)
    assert [nll for _, nll in curve] == sorted((nll for _, nll in curve), reverse=True)

"""Packed values train exactly like a masked dense model, and nothing else moves."""

import copy

import pytest
import support
import torch

from posttrain.selection.packed import SUFFIX, pack, packed_tensors, pull_to_base
from posttrain.selection.plan import PlanError, TensorSelection


def places_of(model, name):
    """(module, attribute) of a tensor, tied ones included."""
    wanted = dict(model.named_parameters())[name]
    return [
        (module, attribute)
        for module in model.modules()
        for attribute, parameter in module._parameters.items()
        if parameter is wanted
    ]


def some(parameter, share, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TensorSelection.from_mask(torch.rand(parameter.shape, generator=draw) < share)


def packed_model(names, *, composed=False, dtype=torch.float32, share=0.1):
    model = support.model(tied=True).to(dtype)
    selections = {name: some(dict(model.named_parameters())[name], share) for name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, selection in selections.items():
        pack(places_of(model, name), selection, composed=composed)
    return model, selections


def batch(step):
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (2, 9), generator=draw)
    return {"input_ids": ids, "labels": ids}


NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]


@pytest.mark.parametrize("fused", [False, True])
def test_the_weight_follows_every_optimiser(fused):
    """A fused step does not count as a new version of the values."""
    model, _ = packed_model(NAMES[1:2])
    (packed,) = packed_tensors(model)
    optimiser = torch.optim.AdamW([packed.values], lr=0.1, fused=fused)
    for step in range(2):
        model(**batch(step)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            weight = model.model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight.detach().flatten()[packed.index], packed.values)
        assert packed.changed() == len(packed.values)


@pytest.mark.parametrize("composed", [False, True])
def test_the_same_weights_as_a_masked_dense_model_to_the_bit(composed):
    model, selections = packed_model(NAMES, composed=composed)
    dense = support.model(tied=True)
    start = copy.deepcopy(dense.state_dict())
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in selections)
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    theirs = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for step in range(5):
        for micro in range(2):  # accumulation
            losses = [m(**batch(10 * step + micro)).loss for m in (model, dense)]
            assert losses[0].item() == losses[1].item()
            for loss in losses:
                loss.backward()
        for name, parameter in dense.named_parameters():
            if name in selections:
                parameter.grad *= selections[name].mask()
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
    for packed in list(packed_tensors(model)):
        packed.remove()
    trained, expected = model.state_dict(), dense.state_dict()
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor, expected[name]), name
        if name in selections:
            moved = tensor != start[name]
            assert not (moved & ~selections[name].mask()).any()
            assert moved.sum() > 0.9 * selections[name].count
    assert type(model.lm_head) is torch.nn.Linear


def test_a_tied_head_and_embedding_share_one_parameter():
    model, _ = packed_model(NAMES[:1])
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [NAMES[0] + SUFFIX]
    model(**batch(0)).loss.backward()
    dense = support.model(tied=True)
    dense(**batch(0)).loss.backward()
    (packed,) = packed_tensors(model)
    gradient = dense.model.embed_tokens.weight.grad.flatten()[packed.index]
    assert torch.allclose(packed.values.grad, gradient, rtol=1e-6, atol=1e-9)


def test_half_precision_weights_have_fp32_masters():
    model, selections = packed_model(NAMES[1:2], dtype=torch.bfloat16)
    (packed,) = packed_tensors(model)
    assert packed.values.dtype == torch.float32
    weight = packed.weight
    for _ in range(40):  # each step far below the spacing of bf16 at most weights
        with torch.no_grad():
            packed.values.add_(1e-5)
        model(**batch(0))
    assert weight.dtype == torch.bfloat16
    selected = weight.detach().flatten()[packed.index]
    assert torch.equal(selected, packed.values.bfloat16())
    assert packed.changed() == (selected != packed.base).sum() > 0.5 * len(packed.index)
    untouched = ~selections[NAMES[1]].mask()
    assert torch.equal(
        weight[untouched], support.model(tied=True).bfloat16().state_dict()[NAMES[1]][untouched]
    )


def test_nothing_of_the_size_of_the_weight_is_saved_for_backward():
    saved = {}
    for name in ("dense", "packed", "composed"):
        layer = torch.nn.Linear(256, 256, bias=False)
        if name != "dense":
            layer.weight.requires_grad_(False)
            pack([(layer, "weight")], some(layer.weight, 0.01), composed=name == "composed")
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(torch.randn(4, 256, requires_grad=True))
        own = {id(p) for p in layer.parameters()}
        storage = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        saved[name] = sum(
            t.numel() for t in kept if id(t) not in own and t.untyped_storage().data_ptr() not in storage
        )
    assert saved["packed"] == saved["dense"]
    assert saved["composed"] >= 256 * 256


def test_reads_without_gradients_give_the_parameter_itself():
    model, _ = packed_model(NAMES[1:2])
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        assert layer.weight is layer._parameters["weight"]
        model.tie_weights()
    assert layer.weight.grad_fn is not None
    layer.weight = layer._parameters["weight"]  # tying again
    with pytest.raises((AttributeError, TypeError)):
        layer.weight = torch.zeros(3)


def test_a_checkpoint_restores_the_parameter(tmp_path):
    model, _ = packed_model(NAMES)
    for packed in packed_tensors(model):
        with torch.no_grad():
            packed.values.add_(0.5)
    model(**batch(0))
    state = copy.deepcopy(model.state_dict())
    again, _ = packed_model(NAMES)
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(**batch(1)).logits, model(**batch(1)).logits)


def test_decay_towards_the_base():
    model, _ = packed_model(NAMES[1:2])
    (packed,) = packed_tensors(model)
    with torch.no_grad():
        packed.values.add_(1.0)
    pull_to_base(packed, 0.1)
    assert torch.allclose(packed.values, packed.base + 0.9)


def test_copies_do_not_share_values():
    model, _ = packed_model(NAMES[1:2])
    twin = copy.deepcopy(model)
    next(packed_tensors(model)).remove()
    (packed,) = packed_tensors(twin)
    assert dict(twin.named_parameters())[NAMES[1] + SUFFIX] is packed.values
    twin(**batch(0)).loss.backward()
    assert packed.values.grad is not None


def test_what_cannot_be_packed_is_refused():
    layer = torch.nn.Linear(4, 4)
    selection = some(layer.weight, 0.5)
    pack([(layer, "weight")], selection)
    with pytest.raises(PlanError, match="packed already"):
        pack([(layer, "weight")], selection)
    quantised = torch.nn.Module()
    quantised.register_parameter(
        "weight", torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    )
    with pytest.raises(PlanError, match="quantised"):
        pack([(quantised, "weight")], selection)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_share_a_weight_may_be_recomputed(reentrant):
    """One read is in the graph while the recomputation of another reads again."""
    from torch.utils.checkpoint import checkpoint

    def train(packs):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        inputs = torch.randn(2, 4, requires_grad=True)
        mask = torch.rand(4, 4) < 0.5
        packed = None
        if packs:
            packed = pack([(layer, "weight")], TensorSelection.from_mask(mask))
        trained = layer.weight if packed is None else packed.values
        optimizer = torch.optim.AdamW([trained], lr=0.1, weight_decay=0.0, foreach=False)
        for _ in range(3):
            hidden = torch.tanh(layer(inputs))
            for _ in range(2):
                hidden = checkpoint(lambda x: torch.tanh(layer(x)), hidden, use_reentrant=reentrant)
            hidden.sum().backward()
            if packed is None:
                layer.weight.grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
        if packed is not None:
            packed.remove()
        return layer.weight.detach()

    assert torch.allclose(train(True), train(False), rtol=0, atol=1e-6)


def test_nothing_is_selected_while_weights_are_packed():
    from posttrain.selection.magnitude import Magnitude

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    packed = pack([(model[0], "weight")], Magnitude(budget=3).select(model).tensors["0.weight"])
    with pytest.raises(PlanError, match="a selection is in force"):
        Magnitude(budget=3).select(model)
    packed.remove()

"""A plan is exact, refuses what does not fit, and comes back from its file as it was."""

import json

import pytest
import support
import torch
from safetensors.torch import load_file, save_file

from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection, tensor_hash, tied_names

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def plan(model, **extra):
    selected = {
        Q: TensorSelection.elements((32, 32), torch.tensor([1000, 3, 77])),
        DOWN: TensorSelection.of("columns", (32, 64), torch.tensor([5, 0])),
        EMBEDDING: TensorSelection.of("rows", model.get_input_embeddings().weight.shape, torch.tensor([4])),
        "model.norm.weight": TensorSelection.all((32,)),
    }
    return SelectionPlan.for_model(model, selected | extra, method="mixed", config={"seed": 1})


def test_counts_positions_and_masks():
    made = plan(support.model())
    assert made.count == 3 + 2 * 32 + 32 + 32
    assert made.tensors[Q].index.tolist() == [3, 77, 1000]
    assert made.tensors[Q].index.dtype == torch.int32
    assert made.tensors[DOWN].flat().tolist() == sorted([r * 64 + c for r in range(32) for c in (0, 5)])
    assert made.tensors[EMBEDDING].flat().tolist() == list(range(4 * 32, 5 * 32))
    for selection in made.tensors.values():
        assert selection.mask().sum() == selection.count
        assert torch.equal(selection.mask().flatten().nonzero().flatten(), selection.flat().long())
    assert list(made.tensors) == [name for name, _ in support.model().named_parameters()]
    assert made.partial
    assert not SelectionPlan.for_model(
        support.model(), {"model.norm.weight": TensorSelection.all((32,))}
    ).partial


def test_everything_and_nothing_have_one_form():
    assert TensorSelection.elements((2, 2), torch.arange(4)) == TensorSelection.all((2, 2))
    assert TensorSelection.of("rows", (2, 2), torch.arange(2)) == TensorSelection.all((2, 2))
    assert TensorSelection.elements((2, 2), torch.tensor([], dtype=torch.long)) == TensorSelection.none(
        (2, 2)
    )
    assert TensorSelection.from_mask(torch.tensor([[True, False], [False, True]])).index.tolist() == [0, 3]


def test_positions_beyond_int32_are_int64():
    # a meta-sized selection: 2^31 scalars are described, not allocated
    index = torch.tensor([2**31 - 1, 5])
    selection = TensorSelection.elements((2**16, 2**15), index)
    assert selection.index.dtype == torch.int64
    assert TensorSelection.elements((2**16, 2**15 - 1), index[1:]).index.dtype == torch.int32


@pytest.mark.parametrize("tied", [False, True])
def test_file_round_trip(tmp_path, tied):
    model = support.model(tied=tied)
    made = plan(model)
    path = tmp_path / "plan.safetensors"
    made.save(path)
    read = SelectionPlan.load(path)
    assert read == made
    assert read.fingerprint() == made.fingerprint()
    assert (read.method, read.config, read.base_hash) == ("mixed", {"seed": 1}, made.base_hash)
    assert read.tied == ({"lm_head.weight": EMBEDDING} if tied else {})
    read.check(model)
    assert set(load_file(path)) == {f"{name}.idx" for name in (Q, DOWN, EMBEDDING)}


def test_tied_tensors_count_once():
    model = support.model(tied=True)
    shape = model.get_input_embeddings().weight.shape
    assert tied_names(model) == {"lm_head.weight": EMBEDDING}
    by_head = SelectionPlan.for_model(model, {"lm_head.weight": TensorSelection.all(shape)})
    assert by_head == SelectionPlan.for_model(model, {EMBEDDING: TensorSelection.all(shape)})
    assert by_head.count == shape.numel()
    assert by_head.numel == sum(p.numel() for p in model.parameters())
    with pytest.raises(PlanError, match="name each tensor once"):
        SelectionPlan.for_model(model, {n: TensorSelection.all(shape) for n in ("lm_head.weight", EMBEDDING)})


def test_fingerprint_follows_positions_only():
    model = support.model()
    made = plan(model)
    assert made.fingerprint() == plan(support.model(seed=5)).fingerprint()
    moved = plan(model, **{Q: TensorSelection.elements((32, 32), torch.tensor([1000, 3, 78]))})
    assert moved.fingerprint() != made.fingerprint()
    assert moved != made


def test_hash_sees_type_shape_and_every_bit():
    weight = torch.tensor([[0.0, 1.0]])
    known = tensor_hash(weight)
    assert known == tensor_hash(weight.clone())
    assert known == tensor_hash(torch.tensor([[0.0], [1.0]]).T)  # same content, other strides
    for other in (weight.T, weight.to(torch.bfloat16), torch.tensor([[-0.0, 1.0]])):
        assert tensor_hash(other) != known
    assert tensor_hash(torch.tensor(1.0, dtype=torch.bfloat16)) == tensor_hash(torch.tensor(1.0).bfloat16())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TensorSelection.elements((2, 2), torch.tensor([4])), "from 0 to 3"),
        (lambda: TensorSelection.elements((2, 2), torch.tensor([-1])), "from 0 to 3"),
        (lambda: TensorSelection.elements((2, 2), torch.tensor([1, 1])), "position 1 is given twice"),
        (lambda: TensorSelection.elements((2, 2), torch.tensor([1.0])), "vector of integers"),
        (lambda: TensorSelection.of("columns", (4,), torch.tensor([0])), "need a matrix"),
        (lambda: TensorSelection.of("rows", (), torch.tensor([0])), "at least one dimension"),
    ],
)
def test_impossible_positions_are_refused(build, message):
    with pytest.raises(PlanError, match=message):
        build()


def test_other_models_are_refused():
    made = plan(support.model())
    with pytest.raises(PlanError, match=r"not those the plan was made for.*Load the base checkpoint"):
        made.check(support.model(seed=1))
    with pytest.raises(PlanError, match="not those the plan was made for"):
        made.check(support.model().bfloat16())
    made.check(support.model(seed=1), hashes=False)
    with pytest.raises(PlanError, match="tensors that the plan does not know"):
        made.check(support.model(num_hidden_layers=3))
    with pytest.raises(PlanError, match="tensors that the model does not have"):
        made.check(support.model(num_hidden_layers=1))
    with pytest.raises(PlanError, match="has shape"):
        made.check(support.model(intermediate_size=48))
    with pytest.raises(PlanError, match=r"nearest name is 'model.norm.weight'"):
        SelectionPlan.for_model(support.model(), {"model.norm.weigh": TensorSelection.all((32,))})
    with pytest.raises(PlanError, match="leaves nothing to train"):
        SelectionPlan.for_model(support.model(), {})


def test_untouched_weights_may_differ():
    model = support.model()
    made = plan(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    made.check(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(version=2), "has version 2"),
        (lambda a: a.update(count=7), "its count or its base hash"),
        (lambda a: a.update(base_hash="0"), "its count or its base hash"),
        (lambda a: a["tensors"][Q].update(count=9), "announces 9 scalars"),
        (lambda a: a["tensors"][Q].update(kind="heads"), "kind 'heads'"),
        (lambda a: a["tensors"][Q].update(shape=[1, 1]), "from 0 to 0"),
        (lambda a: a["tensors"].pop(Q), "missing or not announced"),
        (lambda a: a.pop("tied"), "cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    tensors, metadata = plan(support.model()).to_state()
    about = json.loads(metadata["plan"])
    change(about)
    path = tmp_path / "plan.safetensors"
    save_file(tensors, path, metadata | {"plan": json.dumps(about)})
    with pytest.raises(PlanError, match=message):
        SelectionPlan.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "plan.safetensors"
    with pytest.raises(PlanError, match="cannot be read"):
        SelectionPlan.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(PlanError, match="cannot be read"):
        SelectionPlan.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(PlanError, match="no selection plan"):
        SelectionPlan.load(path)


def test_summary_groups_by_kind_of_tensor():
    lines = plan(support.model()).summary().splitlines()
    assert lines[0] == "selection mixed"
    [row] = [line for line in lines if "q_proj" in line]
    assert row.split() == ["model.layers.*.self_attn.q_proj.weight", "1", "of", "2", "2,048", "3", "0.15%"]
    assert lines[-1].split()[:4] == ["total", "4", "of", "21"]

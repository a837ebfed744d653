"""What two checkpoints differ in is selected: bitwise, beyond a tolerance, or the largest changes."""

import pytest
import support
import torch
from pydantic import ValidationError

from posttrain.selection.delta import write_delta
from posttrain.selection.delta_file import DeltaError
from posttrain.selection.plan import PlanError
from posttrain.selection.rl_subnetwork import RLSubnetwork

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"

START = torch.tensor([1.0, 0.5, -0.25, 0.001, 0.0, 3.0, -2.0, 0.02])
ADDED = torch.tensor([3e-3, 2e-3, -2e-3, 1e-6, 5e-6, 1e-2, 0.0, 1e-3])


def saved(model, path, **settings):
    model.config.dtype = model.dtype
    model.save_pretrained(path, **settings)
    return str(path)


def pair(tmp_path, change, **settings):
    """Folders of a model before and after ``change`` of its weights in place, and the model before."""
    first, second = support.model(**settings), support.model(**settings)
    with torch.no_grad():
        for model in (first, second):
            model.get_parameter(UP).view(-1)[:8] = START
        change(second)
    folders = {"before": saved(first, tmp_path / "a"), "after": saved(second, tmp_path / "b")}
    return folders, first


def add_(model):
    model.get_parameter(UP).view(-1)[:8] = START + ADDED
    model.get_parameter(NORM)[3] += 0.25
    model.get_input_embeddings().weight[5, :2] -= torch.tensor([0.125, 2.0])


def picks(plan):
    return {name: selection.flat().tolist() for name, selection in plan.touched.items()}


EMBEDDED = [5 * 32, 5 * 32 + 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_differs(tmp_path, dtype, tied):
    """The worked example of the sheet: rounding to bf16 hides the additions 0, 3 and 6."""
    folders, model = pair(tmp_path, add_, tied=tied)
    if dtype == "bfloat16":
        for name in folders:
            rounded = type(model).from_pretrained(folders[name], dtype=torch.bfloat16)
            folders[name] = saved(rounded, tmp_path / f"{name}16")
        model = type(model).from_pretrained(folders["before"], dtype=torch.bfloat16)
    changed = [1, 2, 4, 5, 7] if dtype == "bfloat16" else [0, 1, 2, 3, 4, 5, 7]
    everything = {EMBEDDING: EMBEDDED, UP: changed, NORM: [3]}
    assert picks(RLSubnetwork(**folders).select(model)) == everything
    beyond = RLSubnetwork(**folders, tolerance=1e-5).select(model)
    assert picks(beyond)[UP] == ([1, 2, 5, 7] if dtype == "bfloat16" else [0, 1, 2, 5, 7])
    # sizes: embedding 2.0, norm 0.25, embedding 0.125, up[5] 0.01, then up[0] or up[1]
    assert picks(RLSubnetwork(**folders, budget=4).select(model)) == {
        EMBEDDING: EMBEDDED,
        UP: [5],
        NORM: [3],
    }
    assert RLSubnetwork(**folders, budget=5).select(model).tensors[UP].index.tolist() == (
        [1, 5] if dtype == "bfloat16" else [0, 5]
    )
    assert RLSubnetwork(**folders).select(model).config["changed"] == len(changed) + 3


def test_a_bf16_run_of_fp32_weights_is_compared_in_bf16(tmp_path):
    folders, model = pair(tmp_path, add_)
    rounded = type(model).from_pretrained(folders["after"], dtype=torch.bfloat16)
    folders["after"] = saved(rounded, tmp_path / "c")
    assert picks(RLSubnetwork(**folders).select(model))[UP] == [1, 2, 4, 5, 7]


@pytest.mark.parametrize("old_values", [True, False])
def test_a_delta_file_is_as_good_as_the_checkpoints(tmp_path, old_values):
    folders, model = pair(tmp_path, add_)
    delta = tmp_path / "delta.safetensors"
    write_delta(folders["before"], folders["after"], delta, old_values=old_values)
    for settings in ({}, {"budget": 5}, {"tolerance": 1e-5}, {"budget": 3, "exclude": ("embed",)}):
        assert RLSubnetwork(delta=str(delta), **settings).select(model) == (
            RLSubnetwork(**folders, **settings).select(model)
        )
    other = support.model(seed=9)
    assert picks(RLSubnetwork(delta=str(delta)).select(other))[NORM] == [3]  # positions need no base
    if old_values:
        assert RLSubnetwork(delta=str(delta), budget=5).select(other).count == 5
    else:
        with pytest.raises(PlanError, match=r"holds no old values, and .* is not that of its base"):
            RLSubnetwork(delta=str(delta), budget=5).select(other)


def test_shards_and_large_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    from posttrain.evaluation import checkpoint

    folders, model = pair(tmp_path, add_)
    expected = RLSubnetwork(**folders, budget=6).select(model)
    sharded = type(model).from_pretrained(folders["after"])
    folders["after"] = saved(sharded, tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    blocks = checkpoint.Checkpoint.blocks
    monkeypatch.setattr(checkpoint.Checkpoint, "blocks", lambda self, name: blocks(self, name, 70))
    assert RLSubnetwork(**folders, budget=6).select(model) == expected


def test_signs_of_zero_are_changes_of_size_zero(tmp_path):
    def change(model):
        model.get_parameter(UP).view(-1)[4] = -0.0
        model.get_parameter(NORM)[1] += 1.0

    folders, model = pair(tmp_path, change)
    assert picks(RLSubnetwork(**folders).select(model)) == {UP: [4], NORM: [1]}
    assert picks(RLSubnetwork(**folders, budget=1).select(model)) == {NORM: [1]}
    assert picks(RLSubnetwork(**folders, tolerance=1e-9).select(model)) == {NORM: [1]}


def test_the_control_has_as_many_of_each_tensor(tmp_path):
    folders, model = pair(tmp_path, add_)
    plan = RLSubnetwork(**folders).select(model)
    controls = [RLSubnetwork(**folders, shuffled=True, seed=seed).select(model) for seed in (0, 0, 1)]
    assert controls[0] == controls[1]
    assert len({control.fingerprint() for control in [plan, *controls]}) == 3
    for control in controls:
        assert {n: s.count for n, s in control.tensors.items()} == {
            n: s.count for n, s in plan.tensors.items()
        }


def test_always_train_and_candidates(tmp_path):
    folders, model = pair(tmp_path, add_)
    plan = RLSubnetwork(**folders, always_train=("model.norm",), budget=32 + 2).select(model)
    assert plan.tensors[NORM].kind == "all"
    assert plan.count == 34
    plan = RLSubnetwork(**folders, embeddings=False, norms=False).select(model)
    assert picks(plan) == {UP: [0, 1, 2, 3, 4, 5, 7]}
    assert plan.config["changed"] == 10


def test_errors(tmp_path):
    folders, model = pair(tmp_path, add_)
    with pytest.raises(ValueError, match=r"leaves 11 scalars to what changed, and only 10 candidates did"):
        RLSubnetwork(**folders, budget=11).select(model)
    with pytest.raises(PlanError, match="of 0 scalars that changed none is a candidate"):
        RLSubnetwork(before=folders["before"], after=folders["before"]).select(model)
    with pytest.raises(PlanError, match="of 10 scalars that changed none is a candidate"):
        RLSubnetwork(**folders, include=("lm_head",)).select(model)
    wider = saved(support.model(intermediate_size=80), tmp_path / "wide")
    with pytest.raises(DeltaError, match="has the shape"):
        RLSubnetwork(before=folders["before"], after=wider).select(model)
    with pytest.raises(PlanError, match=r"shape \[64, 32\] in the checkpoints and \[80, 32\] in the model"):
        RLSubnetwork(**folders).select(support.model(intermediate_size=80))
    with pytest.raises(
        PlanError, match="changed, and the model has no parameter of that name, but for example"
    ):
        RLSubnetwork(**folders).select(model.model)


def test_an_untied_checkpoint_and_a_tied_model(tmp_path):
    def change(model):
        model.lm_head.weight[0, 0] += 1.0
        model.get_input_embeddings().weight[5, 1] += 1.0

    folders, _ = pair(tmp_path, change)
    with pytest.raises(PlanError, match="are one tensor in the model and two in the checkpoints"):
        RLSubnetwork(**folders).select(support.model(tied=True))


@pytest.mark.parametrize("settings", [{}, {"before": "a"}, {"before": "a", "after": "b", "delta": "c"}])
def test_one_source(settings):
    with pytest.raises(ValidationError, match="takes before and after, or delta: found before="):
        RLSubnetwork(**settings)


def test_a_change_that_is_not_finite_has_no_rank(tmp_path):
    def change(model):
        model.get_parameter(NORM)[1] = torch.nan

    folders, model = pair(tmp_path, change)
    assert picks(RLSubnetwork(**folders).select(model)) == {NORM: [1]}
    with pytest.raises(FloatingPointError, match=r"model\.norm\.weight"):
        RLSubnetwork(**folders, budget=1).select(model)

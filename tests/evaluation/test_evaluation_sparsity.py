"""The update-sparsity report against hand-computed numbers, on real shards and on broken ones."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from posttrain.evaluation import checkpoint as reading
from posttrain.evaluation.changes import (
    compared_dtype,
    count_changes,
    count_overlap,
    magnitude,
    update_rank,
)
from posttrain.evaluation.sparsity import compare_checkpoints, kind_of, layer_of
from posttrain.evaluation.sparsity_table import print_sparsity
from posttrain.models.load import ModelLoadError

START = torch.tensor([1.0, 0.5, -0.25, 0.001, 0.0, 3.0, -2.0, 0.02])
ADDED = torch.tensor([3e-3, 2e-3, -2e-3, 1e-6, 5e-6, 1e-2, 0, 1e-3])
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def save(folder, tensors, config=None, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    names = list(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors")
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# ---- formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "expected"), [(0.0, 0.375), (1e-8, 0.375), (1e-6, 0.375), (1e-5, 0.5), (1e-3, 0.625)]
)
def test_sparsity_of_the_worked_example_in_bfloat16(tau, expected):
    counts = count_changes(START.to(bf16), (START + ADDED).to(bf16), [tau])
    assert counts.sparsity == (expected,)
    assert counts.density == (1 - expected,)


def test_deltas_of_the_worked_example():
    size = magnitude(START.to(bf16), (START + ADDED).to(bf16))
    expected = torch.tensor([0, 0.00390625, 0.001953125, 0, 5.00679e-6, 0.015625, 0, 0.0009765625])
    assert size.dtype == fp32
    torch.testing.assert_close(size, expected, rtol=1e-5, atol=0)


def test_without_rounding_more_has_changed():
    assert count_changes(START, START + ADDED, [0.0, 1e-5]).sparsity == (0.125, 0.375)


def test_the_tolerance_itself_counts_as_unchanged():
    before, after = torch.tensor([0.0, 0.0]), torch.tensor([0.25, -0.25])
    assert count_changes(before, after, [0.25, 0.2499]).changed == (0, 2)


def test_nan_is_changed_and_equal_infinities_are_not():
    inf, nan = float("inf"), float("nan")
    before = torch.tensor([nan, 1.0, nan, inf, -inf, inf, 1.0])
    after = torch.tensor([1.0, nan, nan, inf, -inf, -inf, inf])
    counts = count_changes(before, after, [1e-5, 1e30])
    assert counts.changed == (5, 5)
    assert counts.nan == 3


def test_float64_is_not_cut_to_float32():
    before = torch.ones(1, dtype=torch.float64)
    assert count_changes(before, before + 1e-12, [0.0]).changed == (1,)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, found torch.Size\(\[2\]\) and torch.Size\(\[1\]\)"):
        count_changes(torch.zeros(2), torch.zeros(1), [0.0])


def test_overlap_of_the_worked_example():
    base, first, second = torch.zeros(20), torch.zeros(20), torch.zeros(20)
    first[0:6], second[4:8] = 1.0, 2.0
    (overlap,) = count_overlap(base, first, second, [0.0])
    values = overlap.to_dict()
    assert values["o1"] == 1 / 3
    assert values["o2"] == 1 / 2
    assert values["chance_o1"] == 0.2
    assert values["chance_o2"] == 0.3
    assert values["jaccard"] == 0.25


def test_overlap_without_changes_is_undefined_not_zero():
    values = count_overlap(torch.zeros(4), torch.zeros(4), torch.ones(4), [0.0])[0].to_dict()
    assert (values["o1"], values["o2"], values["chance_o1"], values["jaccard"]) == (None, 0.0, 1.0, 0.0)


def test_update_rank():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 4, generator=generator)
    low = torch.randn(6, 2, generator=generator) @ torch.randn(2, 4, generator=generator)
    assert update_rank(before, before.clone()) == 0.0
    assert update_rank(torch.zeros(6, 4), low) == 0.5
    assert update_rank(before, torch.randn(6, 4, generator=generator)) == 1.0
    assert update_rank(torch.zeros(2, 6, 4), torch.stack([low, torch.zeros(6, 4)])) == 0.25
    assert update_rank(before, before + float("nan")) is None


@pytest.mark.parametrize(
    ("stored", "expected"),
    [([fp32, bf16], bf16), ([fp16, bf16], bf16), ([fp32, fp16, fp32], fp16), ([fp32, fp32], fp32)],
)
def test_stored_compares_in_the_coarsest_type(stored, expected):
    assert compared_dtype(stored, "stored") == expected
    assert compared_dtype(stored, "float32") == fp32


def test_kinds_and_layers():
    name = "model.layers.12.mlp.experts.3.w1.weight"
    assert kind_of(name) == "model.layers.*.mlp.experts.*.w1.weight"
    assert layer_of(name) == "model.layers.12"
    assert layer_of("model.embed_tokens.weight") == "outside layers"


# ---- checkpoints -----------------------------------------------------------------------------------------


def model(change=0.0):
    """Two layers of very different size; ``change`` is put on every element of the small one."""
    return {
        "model.embed_tokens.weight": torch.ones(10, 8),
        "model.layers.0.mlp.up_proj.weight": torch.ones(4, 2) + change,
        "model.layers.1.mlp.up_proj.weight": torch.ones(64, 3),
        "model.norm.weight": torch.ones(8),
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_groups_are_sums_of_counts_not_means_of_shares(tmp_path, shards):
    base = save(tmp_path / "base", model(), shards=shards)
    tuned = save(tmp_path / "tuned", model(0.5), shards=2)
    report = compare_checkpoints(base, tuned)
    n = 80 + 8 + 192 + 8
    assert report.total.elements == n
    assert report.total.changed == (8, 8)
    assert report.total.sparsity[0] == (n - 8) / n
    kinds = report.grouped(kind_of)
    assert kinds["model.layers.*.mlp.up_proj.weight"].density == (8 / 200, 8 / 200)
    assert report.grouped(layer_of)["model.layers.0"].sparsity == (0.0, 0.0)
    assert report.grouped(layer_of)["outside layers"].elements == 88
    values = report.to_dict()
    assert values["total"]["changed"] == [8, 8]
    assert values["kinds"]["model.norm.weight"]["sparsity"] == [1.0, 1.0]
    assert [tensor["name"] for tensor in values["tensors"]] == list(model())
    assert values["tensors"][1] == {
        "name": "model.layers.0.mlp.up_proj.weight", "shape": [4, 2], "dtype": "bfloat16", "rank": None,
        "elements": 8, "changed": [8, 8], "nan": 0, "sparsity": [0.0, 0.0],
    }  # fmt: skip
    json.dumps(values, allow_nan=False)


def test_blocks_of_rows_give_the_same_counts_as_whole_tensors(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    base = {"a": torch.randn(37, 5, generator=generator), "b": torch.randn(11, generator=generator)}
    base["c"] = torch.tensor(1.0)
    tuned = {
        name: value * torch.randint(0, 2, value.shape, generator=generator) for name, value in base.items()
    }
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    sizes = []
    read = reading.Checkpoint.blocks

    def small(self, name, size=7):
        for block in read(self, name, size):
            sizes.append(block.numel())
            yield block

    whole = compare_checkpoints(tmp_path / "base", tmp_path / "tuned", tmp_path / "tuned", dtype="float32")
    monkeypatch.setattr(reading.Checkpoint, "blocks", small)
    pieces = compare_checkpoints(tmp_path / "base", tmp_path / "tuned", tmp_path / "tuned", dtype="float32")
    assert max(sizes) <= 7
    assert pieces.to_dict() == whole.to_dict()
    assert whole.total.changed[0] == sum(int((base[name] != tuned[name]).sum()) for name in base)


def test_the_type_is_named_and_rounding_is_pointed_out(tmp_path):
    save(tmp_path / "base", {"w": START})
    save(tmp_path / "tuned", {"w": START + ADDED})
    rounded = compare_checkpoints(tmp_path / "base", tmp_path / "tuned")
    exact = compare_checkpoints(tmp_path / "base", tmp_path / "tuned", dtype="stored")
    assert rounded.total.sparsity == (0.375, 0.5)
    assert exact.total.sparsity == (0.125, 0.375)
    assert [rounded.tensors[0].dtype, exact.tensors[0].dtype] == ["bfloat16", "float32"]
    assert any("F32 were rounded to bfloat16" in note for note in rounded.notes)
    assert not exact.notes
    console = Console(width=120, record=True, file=io.StringIO())
    print_sparsity(rounded, console)
    text = console.export_text()
    assert "compared in bfloat16: 1 tensors, 8 elements" in text
    assert "base: 1 tensors in F32" in text
    assert "37.50%" in text
    assert "50.00%" in text


def test_mixed_types_do_not_count_rounding_as_training(tmp_path):
    save(tmp_path / "base", {"w": START})
    save(tmp_path / "tuned", {"w": START.to(bf16)})
    assert compare_checkpoints(tmp_path / "base", tmp_path / "tuned").total.changed == (0, 0)
    report = compare_checkpoints(tmp_path / "base", tmp_path / "tuned", dtype="stored")
    assert report.total.changed == (0, 0)
    assert any("mixed (BF16, F32)" in note for note in report.notes)


def test_missing_renamed_and_resized_tensors_are_listed_and_not_counted(tmp_path):
    base, tuned = model(), model()
    base["old.weight"] = torch.ones(3)
    tuned["new.weight"] = torch.ones(5)
    tuned["model.embed_tokens.weight"] = torch.ones(12, 8)
    base["mask"] = tuned["mask"] = torch.ones(7, dtype=torch.bool)
    report = compare_checkpoints(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned))
    found = {item.name: (item.base_elements, item.tuned_elements) for item in report.excluded}
    assert found.pop("model.embed_tokens.weight") == (80, 96)
    assert found == {"old.weight": (3, 0), "new.weight": (0, 5), "mask": (7, 7)}
    assert report.total.elements == 8 + 192 + 8
    console = Console(width=120, record=True, file=io.StringIO())
    print_sparsity(report, console, tensors=True)
    text = console.export_text()
    assert "not compared: 4 tensors (90 elements of the base, 108 of the tuned model)" in text
    assert "model.embed_tokens.weight: shape [10, 8] became [12, 8]" in text
    assert f"old.weight: not in {tmp_path / 'tuned'}" in text.replace("\n", "")
    assert "model.layers.1.mlp.up_proj.weight" in text


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {}])
def test_tied_embeddings_count_once(tmp_path, said):
    base, tuned = model(), model()
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    tuned["model.embed_tokens.weight"] = tuned["model.embed_tokens.weight"] + 1
    report = compare_checkpoints(save(tmp_path / "base", base, said), save(tmp_path / "tuned", tuned, said))
    assert report.total.changed[0] == 80
    assert report.total.elements == 288
    assert not report.excluded
    assert report.notes[0].startswith("lm_head.weight is tied to the input embedding")


def test_untied_heads_and_projections_called_output_are_counted(tmp_path):
    base = model() | {
        "lm_head.weight": torch.ones(10, 8),
        "model.layers.0.attention.output.weight": torch.ones(10, 8),
    }
    said = {"tie_word_embeddings": False}
    report = compare_checkpoints(save(tmp_path / "base", base, said), save(tmp_path / "tuned", base, said))
    assert report.total.elements == 288 + 160
    tied = {"tie_word_embeddings": True}
    report = compare_checkpoints(save(tmp_path / "base", base, tied), save(tmp_path / "tuned", base, tied))
    assert report.total.elements == 288 + 80


def test_overlap_of_two_runs_leaves_out_what_the_second_lacks(tmp_path):
    base = {"a": torch.zeros(4, 5), "b": torch.zeros(30)}
    first, second = torch.zeros(20), torch.zeros(20)
    first[0:6], second[4:8] = 1.0, 1.0
    save(tmp_path / "base", base)
    save(tmp_path / "one", {"a": first.view(4, 5), "b": torch.ones(30)})
    save(tmp_path / "two", {"a": second.view(4, 5)})
    report = compare_checkpoints(tmp_path / "base", tmp_path / "one", tmp_path / "two", tolerances=[0.0])
    values = report.to_dict()["overlaps"][0]
    assert (values["elements"], values["first"], values["second"], values["both"]) == (20, 6, 4, 2)
    assert (values["o1"], values["chance_o1"]) == (1 / 3, 0.2)
    assert report.total.elements == 50
    assert f"1 tensors (30 elements) are not in {tmp_path / 'two'}" in report.notes[0]


def test_mean_rank_counts_untouched_matrices_and_skips_norms(tmp_path):
    base, tuned = model(), model()
    norm = "model.layers.0.input_layernorm.weight"
    base[norm], tuned[norm] = torch.ones(2, 2), torch.ones(2, 2)
    tuned["model.layers.0.mlp.up_proj.weight"] = torch.ones(4, 2) + torch.eye(4)[:, :2]
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    report = compare_checkpoints(tmp_path / "base", tmp_path / "tuned", rank=True)
    ranks = {tensor.name: tensor.rank for tensor in report.tensors}
    assert ranks["model.layers.0.mlp.up_proj.weight"] == 1.0
    assert ranks["model.layers.1.mlp.up_proj.weight"] == 0.0
    assert ranks["model.norm.weight"] is None
    assert ranks[norm] is None
    assert report.mean_rank == 1 / 3


def test_nan_weights_are_listed_by_name(tmp_path):
    tuned = model()
    tuned["model.norm.weight"] = tuned["model.norm.weight"].clone()
    tuned["model.norm.weight"][3] = float("nan")
    report = compare_checkpoints(save(tmp_path / "base", model()), save(tmp_path / "tuned", tuned))
    assert report.total.changed == (1, 1)
    assert "NaN, counted as changed: model.norm.weight (1)." in report.notes


# ---- bad input -------------------------------------------------------------------------------------------


def test_adapters_are_refused_with_the_way_out(tmp_path):
    base = save(tmp_path / "base", model())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"is an adapter.*posttrain export .* --format merged"):
        compare_checkpoints(base, adapter)


def test_quantised_weights_are_refused(tmp_path):
    base = save(tmp_path / "base", model())
    save(tmp_path / "tuned", model(), {"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(ModelLoadError, match=r"is quantised: .*dequantize"):
        compare_checkpoints(base, tmp_path / "tuned")


def test_damaged_missing_and_pickled_weights_are_refused(tmp_path):
    base = save(tmp_path / "base", model())
    cut = save(tmp_path / "cut", model())
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(ModelLoadError, match=r"model.safetensors cannot be read, it is missing"):
        compare_checkpoints(base, cut)
    lacking = save(tmp_path / "lacking", model(), shards=2)
    (lacking / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00002.safetensors cannot be read"):
        compare_checkpoints(base, lacking)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"no safetensors weights .found: pytorch_model.bin."):
        compare_checkpoints(base, pickled)
    with pytest.raises(ModelLoadError, match=r"no folder .*nowhere"):
        compare_checkpoints(base, tmp_path / "nowhere")


def test_other_files_beside_the_shards_are_not_read(tmp_path):
    base = save(tmp_path / "base", model(), shards=2)
    save_file({"model.norm.weight": torch.zeros(8)}, base / "consolidated.safetensors")
    tuned = save(tmp_path / "tuned", model())
    save_file({"model.norm.weight": torch.zeros(8)}, tuned / "optimizer.safetensors")
    assert compare_checkpoints(base, tuned).total.changed == (0, 0)


def test_models_with_nothing_in_common_and_bad_tolerances(tmp_path):
    base = save(tmp_path / "base", {"a": torch.ones(2)})
    tuned = save(tmp_path / "tuned", {"b": torch.ones(2)})
    with pytest.raises(ModelLoadError, match=r"share no tensor .* a \[2\] against b \[2\]"):
        compare_checkpoints(base, tuned)
    for wrong in ([], [-1e-5], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite numbers from 0 up"):
            compare_checkpoints(base, base, tolerances=wrong)

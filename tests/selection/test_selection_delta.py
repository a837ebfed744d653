"""Deltas give the trained checkpoint to the bit, come off again, add up, and refuse a wrong base."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.evaluation.checkpoint import Checkpoint
from posttrain.models.load import ModelLoadError
from posttrain.selection.delta import merge_deltas, write_delta
from posttrain.selection.delta_apply import apply_delta, load_delta, remove_delta
from posttrain.selection.delta_file import DeltaError, DeltaFile, decode, encode
from posttrain.selection.plan import tensor_hash

REAL = Path(__file__).parents[3] / "shared/checkpoints/stories260K"
UP = "model.layers.0.mlp.up_proj.weight"


def folder(path, **tensors):
    """A checkpoint of bare tensors."""
    path.mkdir(parents=True)
    save_file(
        {name.replace("_", "."): tensor for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    return path


def same_bits(one, two):
    return one.dtype == two.dtype and one.shape == two.shape and tensor_hash(one) == tensor_hash(two)


def same_weights(a, b):
    with Checkpoint(a) as one, Checkpoint(b) as two:
        assert one.tensors.keys() == two.tensors.keys()
        return all(same_bits(one.tensor(name), two.tensor(name)) for name in one.tensors)


def nudged(model, *, share=0.03, seed=0):
    """Change a share of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < share
            noise = torch.randn(parameter.shape, generator=generator)
            parameter[chosen] += noise[chosen].to(parameter.dtype)
    return model


def saved(model, path, **settings):
    model.config.dtype = model.dtype
    model.save_pretrained(path, **settings)
    return path


def pair(tmp_path, *, share=0.03, **settings):
    base = saved(support.model(**settings), tmp_path / "base")
    tuned = saved(nudged(support.model(**settings), share=share), tmp_path / "tuned")
    return base, tuned


# ---- what differs ------------------------------------------------------------------------------------------


def test_bits_decide_zero_signs_differ_and_equal_nans_do_not(tmp_path):
    nan = float("nan")
    base = folder(tmp_path / "base", w=torch.tensor([0.0, nan, 1.0, 2.0, nan]))
    tuned = folder(tmp_path / "tuned", w=torch.tensor([-0.0, nan, 1.0, 2.5, nan]))
    header = write_delta(base, tuned, tmp_path / "d")
    assert (header.changed, header.elements) == (2, 5)
    with DeltaFile(tmp_path / "d") as file:
        entry = file.entry("w")
        assert entry.positions.tolist() == [0, 3]
        assert same_bits(entry.values, torch.tensor([-0.0, 2.5]))
    apply_delta(tmp_path / "d", tmp_path / "out")
    assert same_weights(tmp_path / "out", tuned)


def test_another_nan_pattern_is_a_change(tmp_path):
    one, two = (torch.tensor([pattern, 0, 0]).view(torch.float32) for pattern in (0x7FC00000, 0x7FC00001))
    bits = [t.view(torch.int32)[0].item() for t in (one, two)]
    assert bits[0] != bits[1]
    header = write_delta(folder(tmp_path / "a", w=one), folder(tmp_path / "b", w=two), tmp_path / "d")
    assert header.changed == 1


@pytest.mark.parametrize("form", ["one file", "shards", "tied twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_and_remove_give_both_sides_to_the_bit(tmp_path, form, dtype):
    base, tuned = pair(tmp_path, tied=form == "tied twice", dtype=dtype)
    if form == "shards":
        saved(AutoModelForCausalLM.from_pretrained(tuned), tmp_path / "parts", max_shard_size="20KB")
        tuned = tmp_path / "parts"
        assert len(list(tuned.glob("*.safetensors"))) > 1
        saved(AutoModelForCausalLM.from_pretrained(base), tmp_path / "base parts", max_shard_size="30KB")
        base = tmp_path / "base parts"
    if form == "tied twice":  # as some tools write it
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    header = write_delta(base, tuned, tmp_path / "d", old_values=form == "shards")
    model = AutoModelForCausalLM.from_pretrained(tuned)
    assert header.elements == sum(p.numel() for p in model.parameters())  # tied once
    assert 0.02 < header.density < 0.04
    apply_delta(tmp_path / "d", tmp_path / "applied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "applied")
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert same_bits(one, two), name
    with Checkpoint(tmp_path / "applied") as made:
        for name in made.tensors:
            wanted = (
                "model.embed_tokens.weight" if name == "lm_head.weight" and form == "tied twice" else name
            )
            assert same_bits(made.tensor(name), model.get_parameter(wanted)), name
    # the base is not needed when its values are in the file
    if form == "shards":
        base.rename(tmp_path / "elsewhere")
        base = tmp_path / "elsewhere"
    remove_delta(tmp_path / "d", tmp_path / "applied", tmp_path / "removed")
    assert same_weights(tmp_path / "removed", base)


def test_the_hashes_are_those_of_selection_plans(tmp_path):
    base, tuned = pair(tmp_path, dtype=torch.bfloat16)
    header = write_delta(base, tuned, tmp_path / "d")
    for side, kind in ((base, "before"), (tuned, "after")):
        model = AutoModelForCausalLM.from_pretrained(side)
        for name, touched in header.tensors.items():
            assert getattr(touched, kind) == tensor_hash(model.get_parameter(name))


def test_a_bf16_run_from_fp32_weights_goes_on_either_form_of_the_base(tmp_path):
    base = saved(support.model(), tmp_path / "base")
    half = saved(support.model(dtype=torch.bfloat16), tmp_path / "half")
    tuned = saved(nudged(support.model(dtype=torch.bfloat16)), tmp_path / "tuned")
    header = write_delta(base, tuned, tmp_path / "d")
    assert header.density < 0.04  # rounding is not counted as a change
    for start in (base, half):
        apply_delta(tmp_path / "d", tmp_path / f"on {start.name}", base=start)
        assert same_weights(tmp_path / f"on {start.name}", tuned)
        assert json.loads((tmp_path / f"on {start.name}/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_function_loads_a_plain_model(tmp_path, tied, dtype):
    base, tuned = pair(tmp_path, tied=tied, dtype=dtype)
    write_delta(base, tuned, tmp_path / "d")
    model = load_delta(tmp_path / "d")
    wanted = AutoModelForCausalLM.from_pretrained(tuned)
    assert type(model) is type(wanted)
    assert not model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert load_delta(tmp_path / "d", dtype=torch.float64).dtype == torch.float64


def test_files_beside_the_delta_take_the_place_of_the_bases(tmp_path):
    base, tuned = pair(tmp_path)
    (base / "added.txt").write_text("of the base")
    out = tmp_path / "delta"
    write_delta(base, tuned, out / "delta.safetensors")
    (out / "README.md").write_text("about the delta")
    config = json.loads((tuned / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    apply_delta(out, tmp_path / "applied")
    assert json.loads((tmp_path / "applied/config.json").read_text())["eos_token_id"] == 7
    assert {p.name for p in (tmp_path / "applied").iterdir()} == {
        "added.txt", "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    assert load_delta(out).config.eos_token_id == 7


# ---- size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "density", "kind", "limit"),
    [
        (torch.bfloat16, 1e-6, "gap", 6),
        (torch.bfloat16, 1e-4, "gap", 4.3),
        (torch.bfloat16, 0.01, "gap", 3.3),
        (torch.bfloat16, 0.1, "gap", 3.01),
        (torch.bfloat16, 0.4, "map", 2.32),
        (torch.float32, 1e-5, "gap", 7),
        (torch.float32, 5e-4, "gap", 6),
        (torch.float32, 0.01, "gap", 5.5),
        (torch.float32, 0.1, "gap", 5.01),
        (torch.float32, 0.2, "map", 4.63),
    ],
)
def test_at_most_six_bytes_per_value(dtype, density, kind, limit):
    elements = 10_000_000
    generator = torch.Generator().manual_seed(0)
    where = torch.rand(elements, generator=generator).argsort()[: int(density * elements)].sort().values
    found, stored = encode(where, elements)
    assert found == kind
    assert stored.nbytes / len(where) + dtype.itemsize <= limit
    assert torch.equal(decode(found, stored, elements), where)


@pytest.mark.parametrize("where", [[0], [7], [0, 1, 2, 7], [3, 131, 132, 20_000, 3_000_000_000]])
def test_positions_come_back_at_the_edges(where):
    positions = torch.tensor(where)
    for elements in (8, 9, 3_000_000_001):
        if where[-1] < elements and (elements < 10 or where[-1] > 10):
            kind, stored = encode(positions, elements)
            assert torch.equal(decode(kind, stored, elements), positions)


def test_positions_that_are_far_apart_stay_plain():
    positions = torch.tensor([2**28, 2**29 + 5, 2**30])  # five digits each
    kind, stored = encode(positions, 2**31 - 1)
    assert (kind, stored.dtype) == ("idx", torch.int32)
    assert stored.tolist() == positions.tolist()
    kind, stored = encode(positions * 16, 2**35)
    assert (kind, stored.dtype) == ("gap", torch.uint8)
    assert torch.equal(decode(kind, stored, 2**35), positions * 16)


def test_gaps_by_hand():
    # gaps 5, 0, 127 -> 05 00 7f; 128 -> 80 01; 16384 -> 80 80 01
    positions = torch.tensor([5, 6, 134, 263, 16648])
    kind, stored = encode(positions, 10**7)
    assert kind == "gap"
    assert stored.tolist() == [5, 0, 127, 0x80, 1, 0x80, 0x80, 1]


def test_above_half_the_delta_is_refused_and_nothing_is_written(tmp_path):
    base, tuned = pair(tmp_path, share=0.6)
    with pytest.raises(DeltaError, match=r"more than 50%.*format full"):
        write_delta(base, tuned, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    header = write_delta(base, tuned, tmp_path / "d", max_density=1.0)
    assert header.density > 0.5
    apply_delta(tmp_path / "d", tmp_path / "out")
    assert same_weights(tmp_path / "out", tuned)


# ---- refusals ----------------------------------------------------------------------------------------------


def test_a_wrong_base_is_refused_and_leaves_nothing(tmp_path):
    base, tuned = pair(tmp_path)
    write_delta(base, tuned, tmp_path / "d")
    other = saved(support.model(1), tmp_path / "other")
    wide = saved(support.model(intermediate_size=96), tmp_path / "wide")
    shallow = saved(support.model(num_hidden_layers=1), tmp_path / "shallow")
    for wrong, words in ((other, "hash differs"), (wide, "with the shape"), (shallow, "no such tensor")):
        with pytest.raises(DeltaError, match=words):
            apply_delta(tmp_path / "d", tmp_path / "out", base=wrong)
        with pytest.raises(DeltaError, match=words):
            load_delta(tmp_path / "d", base=wrong)
    with pytest.raises(DeltaError, match="trained checkpoint"):
        remove_delta(tmp_path / "d", base, tmp_path / "out")
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelLoadError):
        apply_delta(tmp_path / "d", tmp_path / "out")
    apply_delta(tmp_path / "d", tmp_path / "out", base=tmp_path / "moved")
    with pytest.raises(DeltaError, match="in use"):
        apply_delta(tmp_path / "d", tmp_path / "out", base=tmp_path / "moved")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "d", "moved", "other", "out", "shallow", "tuned", "wide"
    ]  # fmt: skip


def test_different_models_and_no_change_are_refused(tmp_path):
    base, _ = pair(tmp_path)
    with pytest.raises(DeltaError, match="same weights"):
        write_delta(base, base, tmp_path / "d")
    with pytest.raises(DeltaError, match="on one side only"):
        write_delta(base, saved(support.model(tied=True), tmp_path / "tied"), tmp_path / "d")
    with pytest.raises(DeltaError, match="cannot resize"):
        write_delta(base, saved(support.model(vocab_size=50), tmp_path / "more"), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def damaged(path, change):
    """Rewrite a delta file after ``change(tensors, header)``."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["delta"])
    change(tensors, header)
    save_file(tensors, path, metadata | {"delta": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, h: t["w.idx"].__setitem__(2, 99), r"lie in \[0, 64\)"),
        (lambda t, h: t["w.idx"].__setitem__(0, -1), r"lie in \[0, 64\)"),
        (lambda t, h: t["w.idx"].__setitem__(0, 60), "sorted"),
        (lambda t, h: t["w.val"].__setitem__(0, 3.0), "is damaged"),
        (lambda t, h: t.__setitem__("w.val", t["w.val"][:2].clone()), "header says 3 values"),
        (lambda t, h: t.__setitem__("w.val", t["w.val"].float()), "values of torch.float32"),
        (lambda t, h: h["tensors"]["w"].__setitem__("changed", 10**12), "1000000000000 values of 64"),
        (lambda t, h: t.pop("w.idx"), "disagree about w.idx"),
        (lambda t, h: h.__setitem__("version", 2), "update posttrain"),
        (lambda t, h: h.pop("base"), "damaged header"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, words):
    weight = torch.arange(64, dtype=torch.bfloat16)
    base = folder(tmp_path / "base", w=weight)
    tuned = folder(tmp_path / "tuned", w=torch.where(weight % 30 == 1, -weight, weight))
    write_delta(base, tuned, tmp_path / "d")
    with DeltaFile(tmp_path / "d") as file:
        assert file.header.tensors["w"].positions == "gap"  # 3 of 64
    damaged(
        tmp_path / "d",
        lambda t, h: (
            t.pop("w.gap"),
            t.__setitem__("w.idx", torch.tensor([1, 31, 61], dtype=torch.int32)),
            h["tensors"]["w"].__setitem__("positions", "idx"),
        ),
    )
    apply_delta(tmp_path / "d", tmp_path / "fine")
    damaged(tmp_path / "d", change)
    with pytest.raises(DeltaError, match=words):
        apply_delta(tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_delta_is_named(tmp_path):
    base, _ = pair(tmp_path)
    (tmp_path / "short").write_bytes((base / "model.safetensors").read_bytes()[:100])
    for path, words in (
        (base / "model.safetensors", "not a delta"),
        (tmp_path / "short", "cannot be read"),
        (tmp_path / "missing", "cannot be read"),
        (base, "cannot be read"),
    ):
        with pytest.raises(DeltaError, match=words):
            apply_delta(path, tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    base, tuned = pair(tmp_path)
    write_delta(base, tuned, tmp_path / "d")
    script = f"""
import errno, resource, signal
from posttrain.selection.delta import write_delta
from posttrain.selection.delta_apply import apply_delta
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for call in (
    lambda: write_delta({str(base)!r}, {str(tuned)!r}, {str(tmp_path / "e")!r}),
    lambda: write_delta({str(base)!r}, {str(tuned)!r}, {str(tmp_path / "d")!r}, old_values=True),
    lambda: apply_delta({str(tmp_path / "d")!r}, {str(tmp_path / "out")!r}),
):
    try:
        call()
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["EFBIG"] * 3, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "d", "tuned"]
    apply_delta(tmp_path / "d", tmp_path / "out")  # the earlier file is as it was
    assert same_weights(tmp_path / "out", tuned)


# ---- several -----------------------------------------------------------------------------------------------


def test_merge_by_hand(tmp_path):
    base = folder(tmp_path / "base", w=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    one = folder(tmp_path / "one", w=torch.tensor([1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 8.0]))
    two = folder(tmp_path / "two", w=torch.tensor([1.25, 2.5, 3.0, 4.0, 5.0, 6.0, 6.5, 8.0]))
    write_delta(base, one, tmp_path / "a")
    write_delta(base, two, tmp_path / "b")
    header = merge_deltas([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    apply_delta(tmp_path / "m", tmp_path / "sum")
    # 1 + .5 + .25, 2 + .5, 7 + .5 - .5 (unchanged after all)
    wanted = torch.tensor([1.75, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert same_bits(load_file(tmp_path / "sum/model.safetensors")["w"], wanted)
    assert header.changed == 2
    merge_deltas([tmp_path / "a", tmp_path / "b"], tmp_path / "m", weights=[2.0, -1.0])
    apply_delta(tmp_path / "m", tmp_path / "scaled")
    wanted = torch.tensor([1.75, 1.5, 3.0, 4.0, 5.0, 6.0, 8.5, 8.0])
    assert same_bits(load_file(tmp_path / "scaled/model.safetensors")["w"], wanted)


def test_merge_in_bf16_rounds_once_and_keeps_lone_values(tmp_path):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=generator).bfloat16()
    sides = []
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(seed)) < 0.2
        noise = 1e-2 * torch.randn(64, 64, generator=torch.Generator().manual_seed(10 + seed))
        sides.append(torch.where(mask, (start.float() + noise).bfloat16(), start))
        base = tmp_path / "base" if (tmp_path / "base").exists() else folder(tmp_path / "base", w=start)
        write_delta(base, folder(tmp_path / f"side {name}", w=sides[-1]), tmp_path / name)
    merge_deltas([tmp_path / n for n in "abc"], tmp_path / "m")
    apply_delta(tmp_path / "m", tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")["w"]
    wanted = start.double() + sum(side.double() - start.double() for side in sides)
    assert same_bits(found, wanted.bfloat16())
    touched = sum((side != start).int() for side in sides)
    for side in sides:
        alone = (touched == 1) & (side != start)
        assert alone.any()
        assert torch.equal(found[alone], side[alone])
    # weight 1 of one delta is that delta
    merge_deltas([tmp_path / "a"], tmp_path / "copy")
    apply_delta(tmp_path / "copy", tmp_path / "copied")
    assert same_bits(load_file(tmp_path / "copied/model.safetensors")["w"], sides[0])


def test_merge_refuses_what_does_not_belong_together(tmp_path):
    base, tuned = pair(tmp_path)
    write_delta(base, tuned, tmp_path / "a")
    other = saved(support.model(1), tmp_path / "other")
    write_delta(other, saved(nudged(support.model(1)), tmp_path / "other tuned"), tmp_path / "b")
    half = saved(nudged(support.model(dtype=torch.bfloat16)), tmp_path / "half")
    write_delta(base, half, tmp_path / "c")
    for deltas, settings, words in (
        (["a", "b"], {}, "which base is meant"),
        (["a", "b"], {"base": base}, "hash differs"),
        (["a", "c"], {}, "different models or types"),
        (["a"], {"weights": [1.0, 2.0]}, "one weight per delta"),
        (["a"], {"weights": [float("nan")]}, "finite"),
        (["a"], {"weights": [0.0]}, "changes 0 of"),
        (["a"], {"weights": [3e38]}, "not finite"),
    ):
        with pytest.raises(DeltaError, match=words):
            merge_deltas([tmp_path / name for name in deltas], tmp_path / "m", **settings)
    assert not (tmp_path / "m").exists()


# ---- a real one --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/checkpoints/stories260K")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_on_a_real_checkpoint(tmp_path, dtype):
    model = nudged(AutoModelForCausalLM.from_pretrained(REAL, dtype=dtype), share=0.01)
    tuned = saved(model, tmp_path / "tuned")
    header = write_delta(REAL, tuned, tmp_path / "d")
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "d").values())
    assert stored <= (5.4 if dtype == torch.float32 else 3.4) * header.changed
    assert (tmp_path / "d").stat().st_size <= stored + 550 * len(header.tensors)
    apply_delta(tmp_path / "d", tmp_path / "applied")
    with Checkpoint(tmp_path / "applied") as one, Checkpoint(tuned) as two:
        for name in two.tensors:
            assert same_bits(one.tensor(name), two.tensor(name)), name
    loaded = load_delta(tmp_path / "d")
    assert all(same_bits(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    remove_delta(tmp_path / "d", tmp_path / "applied", tmp_path / "removed")
    rounded = AutoModelForCausalLM.from_pretrained(REAL, dtype=dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "removed")
    assert all(same_bits(a, b) for a, b in zip(again.parameters(), rounded.parameters(), strict=True))

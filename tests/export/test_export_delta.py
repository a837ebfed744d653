"""An export that holds only the changed weights: written against its base, read back, published, loaded."""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
import yaml
from export_hub_stand_in import TOKEN, HubStandIn
from export_models import tiny_llama, trained_adapter
from huggingface_hub import ModelCard, snapshot_download
from test_export_card import run_loading_code
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from posttrain import load_delta
from posttrain.cli import app
from posttrain.export.card import CardData
from posttrain.export.export import MARKER, ExportError, export_model, is_verified
from posttrain.export.push import PushError, push
from posttrain.models.embedded import build_tokenizer
from posttrain.models.load import ModelLoadError, load_for_evaluation
from posttrain.run.directory import RunDirectory, write_json
from posttrain.run.manifest import build_manifest
from posttrain.selection.delta_apply import apply_delta
from posttrain.selection.delta_file import DeltaError, DeltaFile


def trained(model, share=0.1):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < share
            parameter[chosen] *= 1.5
    return model


@pytest.fixture
def base(tmp_path):
    tiny_llama(tied=True).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return tmp_path / "base"


@pytest.fixture
def in_cache(base, tmp_path, monkeypatch):
    """The base as ``org/base`` in the cache of the Hub, which cannot be reached."""
    repo = tmp_path / "hub/models--org--base"
    shutil.copytree(base, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(base)
    return "org/base"


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_delta_is_written_read_back_and_described(base, tmp_path):
    model = trained(tiny_llama(tied=True))
    result = export_model(
        model,
        build_tokenizer(),
        tmp_path / "out",
        format="delta",
        base_path=str(base),
        card=CardData(task="sft", base_model=str(base)),
        about={"selection": {"method": "hft"}},
    )
    assert result.comparison.max_difference == 0
    assert 0.08 < result.density < 0.12
    assert result.base == str(base)
    assert is_verified(tmp_path / "out") is None
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"delta.safetensors", "config.json", "tokenizer.json", "README.md", MARKER} <= files
    assert "model.safetensors" not in files
    with DeltaFile(tmp_path / "out") as file:
        assert file.header.about == {"selection": {"method": "hft"}}
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "apache-2.0"
    assert "A sparse delta" in card.text
    assert f"{result.density:.2%}" in card.text
    variables, _ = run_loading_code(tmp_path / "out")
    assert same(variables["model"], model)
    apply_delta(tmp_path / "out", tmp_path / "whole")
    again, _ = load_for_evaluation(tmp_path / "whole")
    assert same(again, model)


def test_an_adapter_is_folded_in(base, tmp_path):
    model = trained_adapter(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"])
    export_model(model, build_tokenizer(), tmp_path / "out", format="delta")
    merged = load_delta(tmp_path / "out")
    with DeltaFile(tmp_path / "out") as file:
        assert set(file.header.tensors) == {
            f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
        }
    export_model(model, build_tokenizer(), tmp_path / "merged", format="merged")
    assert same(merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


def test_what_cannot_be_a_delta_is_refused_and_leaves_nothing(base, tmp_path):
    def export(model, **settings):
        export_model(model, build_tokenizer(), tmp_path / "out", format="delta", **settings)

    with pytest.raises(ExportError, match="base_path"):
        export(trained(tiny_llama(tied=True)))
    with pytest.raises(DeltaError, match="format full"):
        export(trained(tiny_llama(tied=True), share=0.7), base_path=str(base))
    with pytest.raises(DeltaError, match="same weights"):
        export(tiny_llama(tied=True), base_path=str(base))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_delta_folder_is_not_taken_for_a_model(base, tmp_path):
    model = trained(tiny_llama(tied=True))
    export_model(model, build_tokenizer(), tmp_path / "out", format="delta", base_path=str(base))
    with pytest.raises(ModelLoadError, match="posttrain delta apply"):
        load_for_evaluation(tmp_path / "out")
    done = CliRunner().invoke(app, ["sparsity", str(base), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "posttrain delta apply" in done.stderr


def test_published_against_a_base_on_the_hub_it_loads_elsewhere(in_cache, tmp_path, monkeypatch):
    model = trained(tiny_llama(tied=True))
    export_model(model, build_tokenizer(), tmp_path / "out", format="delta", base_path=in_cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with HubStandIn() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        push(tmp_path / "out", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
        there = snapshot_download(
            "user/tiny", endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "elsewhere"
        )
        files = hub.repos["user/tiny"].branches["main"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(load_delta(there), model)
    with DeltaFile(there) as file:
        assert (file.header.base, file.header.revision) == ("org/base", "a" * 40)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/base"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "posttrain"
    assert 'folder = snapshot_download("user/tiny")' in card.text
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name


def test_a_delta_of_a_local_base_is_not_published(base, tmp_path):
    model = trained(tiny_llama(tied=True))
    export_model(model, build_tokenizer(), tmp_path / "out", format="delta", base_path=str(base))
    with HubStandIn() as hub:
        with pytest.raises(PushError, match="--base user/name"):
            push(tmp_path / "out", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
        assert hub.requests == []


def test_the_command_takes_the_base_from_the_run(base, tmp_path):
    run = RunDirectory(tmp_path / "run")
    checkpoint = run.checkpoints / "checkpoint-3"
    model = trained(tiny_llama(tied=True))
    model.save_pretrained(checkpoint)
    build_tokenizer().save_pretrained(checkpoint)
    write_json(checkpoint / "trainer_state.json", {"global_step": 3})
    config = {
        "task": "sft",
        "model": {"path": str(base), "revision": None, "dtype": "auto", "trust_remote_code": False},
        "data": {"source": "x"},
        "trainer": {},
    }
    run.config.write_text(yaml.safe_dump(config))
    write_json(run.manifest, build_manifest(config, data={}, command=["posttrain"]))
    done = CliRunner().invoke(app, ["export", str(run.root), "--format", "delta", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["folder"] == str(run.root / "export-delta")
    assert result["base"] == str(base)
    assert same(load_delta(result["folder"]), model)
    done = CliRunner().invoke(app, ["export", str(run.root), "--base", str(base)])
    assert done.exit_code == 2
    assert "--format delta" in done.stderr


def test_a_configuration_cannot_ask_for_a_delta_of_the_embedded_model(tmp_path):
    text = "task: sft\ndata: {source: 'reasoning_gym:chain_sum'}\nexport: {format: delta}\n"
    (tmp_path / "run.yaml").write_text(text)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")])
    assert done.exit_code == 2
    assert "base that others can load" in " ".join(done.output.split())

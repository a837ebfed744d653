"""The card: valid front matter, true numbers, loading code that runs."""

import contextlib
import io
import re

import pytest
import yaml
from export_models import tiny_llama, trained_adapter
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.export.card import card_of, for_hub, is_hub_id
from posttrain.export.export import export_model
from posttrain.models.embedded import build_tokenizer
from posttrain.run.directory import RunDirectory, write_json
from posttrain.run.manifest import build_manifest

CONFIG = {
    "task": "rlvr",
    "model": {"path": "org/some-base", "dtype": "float32"},
    "data": {"source": "reasoning_gym:chain_sum"},
    "trainer": {},
    "methods": {"ace": {"alpha": 0.5}},
    "selection": {"method": "hft", "params": {"ratio": 0.25}},
}
ESTIMATES = {
    "before": {"metrics": {"pass@1": {"value": 0.25, "low": 0.125, "high": 0.375}}},
    "after": {"metrics": {"pass@1": {"value": 0.75, "low": 0.5, "high": 0.875}, "maj@4": {"value": 0.5}}},
    "difference": {"metrics": {"pass@1": {"value": 0.5, "low": 0.25, "high": 0.625}}},
}


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.root.mkdir()
    directory.config.write_text(yaml.safe_dump(CONFIG))
    command = ["posttrain", "train", "my config.yaml"]
    write_json(directory.manifest, build_manifest(CONFIG, data={"fingerprint": "abc123"}, command=command))
    write_json(directory.evaluation, ESTIMATES)
    return directory


def export(run, model, **settings):
    card = card_of(run)
    return export_model(
        model, build_tokenizer(), run.export, card=card, probe_texts=['say "1 + 2" = '], **settings
    )


def run_loading_code(folder):
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    printed = io.StringIO()
    variables = {}
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(code, variables)
    return variables, printed.getvalue()


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_card_tells_what_the_run_was(run, format):
    export(run, trained_adapter(tiny_llama()), format=format)
    card = ModelCard.load(run.export / "README.md")
    assert card.data.library_name == {"adapter": "peft", "merged": "transformers"}[format]
    assert card.data.base_model == "org/some-base"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["trl", "posttrain", "rlvr", "ace", "hft"]
    text = card.text
    assert "[arXiv 2602.21420](https://arxiv.org/abs/2602.21420)): `ace(alpha=0.5)`" in text
    assert "[arXiv 2404.18466](https://arxiv.org/abs/2404.18466)): `hft(ratio=0.25)`" in text
    assert "| metric | before | after | difference |" in text
    assert "| pass@1 | 0.250 [0.125, 0.375] | 0.750 [0.500, 0.875] | 0.500 [0.250, 0.625] |" in text
    assert "| maj@4 |  | 0.500 |  |" in text
    assert "- fingerprint: `abc123`" in text
    assert "posttrain train 'my config.yaml'" in text
    (shown,) = re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    assert yaml.safe_load(shown) == CONFIG


@pytest.mark.parametrize("format", ["adapter", "merged", "full"])
def test_loading_code_runs_and_gives_the_trained_model(run, format):
    model = tiny_llama() if format == "full" else trained_adapter(tiny_llama())
    export(run, model, format=format)
    variables, printed = run_loading_code(run.export)
    prompt = variables["inputs"]
    expected = model.generate(**prompt, max_new_tokens=32)
    assert variables["output"].tolist() == expected.tolist()
    assert printed.startswith('say "1 + 2" = ')


def test_loading_code_with_the_base_elsewhere(run, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: mit\n---\n")
    model = trained_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    export(run, model)
    variables, _ = run_loading_code(run.export)
    assert variables["output"].tolist() == model.generate(**variables["inputs"], max_new_tokens=32).tolist()
    assert ModelCard.load(run.export / "README.md").data.license == "mit"


def test_card_without_anything_known(tmp_path):
    export_model(tiny_llama(), build_tokenizer(), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model is None
    assert card.data.license is None
    assert card.text.lstrip().startswith("# out\n")
    assert "## Evaluation" not in card.text
    assert card_of(RunDirectory(tmp_path / "nothing")) == {}


def test_hub_version_downloads_first(run):
    export(run, tiny_llama())
    text = for_hub((run.export / "README.md").read_text(), "user/tiny")
    assert text.count('folder = snapshot_download("user/tiny")') == 1
    assert 'folder = "."' not in text


def test_what_counts_as_a_hub_id(tmp_path):
    assert is_hub_id("Qwen/Qwen2.5-0.5B")
    assert not any(
        map(is_hub_id, [None, "", "embedded:char-llama", "reasoning_gym:chain_sum", str(tmp_path), "a/b/c"])
    )


def test_a_token_in_a_configuration_is_refused(tmp_path):
    text = "task: sft\ndata: {source: 'reasoning_gym:chain_sum'}\ntrainer: {hub_token: hf_secretSecret}\n"
    (tmp_path / "run.yaml").write_text(text)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")])
    assert done.exit_code == 2
    assert "HF_TOKEN" in done.output
    assert "hf_secretSecret" not in done.output


def test_secrets_of_the_configuration_stay_out(run):
    secret = {**CONFIG, "trainer": {"hub_token": "plain-secret", "learning_rate": 0.001}}
    run.config.write_text(yaml.safe_dump(secret))
    export(run, tiny_llama())
    text = (run.export / "README.md").read_text()
    assert "plain-secret" not in text
    assert "learning_rate: 0.001" in text

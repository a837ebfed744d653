"""``posttrain sparsity`` on small checkpoints and on requests that cannot be carried out."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from posttrain.cli import app


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """base, tuned (first two of four elements changed, one by 1e-6) and other (last two)."""
    monkeypatch.chdir(tmp_path)
    changes = {"base": [0, 0, 0, 0], "tuned": [1, 1e-6, 0, 0], "other": [0, 1e-6, 1, 1]}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        weight = torch.tensor([[1.0, 0.0], [0.5, 0.25]]) + torch.tensor(change).view(2, 2)
        save_file({"model.layers.0.up.weight": weight}, tmp_path / name / "model.safetensors")
    return tmp_path


def sparsity(*arguments):
    return CliRunner().invoke(app, ["sparsity", *arguments])


def test_json_and_table_tell_the_same(folders):
    done = sparsity("base", "tuned", "--other", "other", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["dtype"] == "bfloat16"
    assert content["tolerances"] == [0.0, 1e-5]
    assert content["total"]["sparsity"] == [0.5, 0.75]
    assert content["kinds"]["model.layers.*.up.weight"]["changed"] == [2, 1]
    exact, tolerant = content["overlaps"]
    assert (exact["o1"], exact["o2"], exact["chance_o1"], exact["jaccard"]) == (0.5, 1 / 3, 0.75, 0.25)
    assert (tolerant["o1"], tolerant["first"], tolerant["second"]) == (0.0, 1, 2)
    text = sparsity("base", "tuned", "--other", "other").stdout
    assert "compared in bfloat16: 1 tensors, 4 elements" in text
    row = next(line for line in text.splitlines() if line.startswith("model.layers.*"))
    assert row.split() == ["model.layers.*.up.weight", "4", "50.00%", "75.00%"]
    assert ["0", "50.00%", "75.00%", "33.33%", "50.00%", "25.00%"] in [
        line.split() for line in text.splitlines()
    ]


def test_options_reach_the_report(folders):
    text = sparsity("base", "tuned", "--tolerance", "0.5", "--dtype", "stored", "--rank", "--tensors").stdout
    assert "tau = 0.5" in text
    assert "mean update rank 50.0% of full" in text
    row = next(line for line in text.splitlines() if line.startswith("model.layers.0.up.weight"))
    assert row.split() == ["model.layers.0.up.weight", "4", "75.00%", "50.0%"]
    assert "compared in the coarsest type" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "tuned", "--dtype", "int8"], "--dtype is one of bfloat16, float16, float32, stored"),
        (["base", "nowhere/at/all"], "there is no folder 'nowhere/at/all'"),
        (["base", "adapter"], "'adapter' is an adapter"),
        (["base", "tuned", "--tolerance", "-1"], "Invalid value for '--tolerance'"),
    ],
)
def test_wrong_requests_end_with_2_and_say_what_to_do(folders, arguments, message):
    (folders / "adapter").mkdir()
    (folders / "adapter" / "adapter_config.json").write_text("{}")
    done = sparsity(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())

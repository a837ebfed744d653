"""``posttrain delta`` from making to removing, and requests that cannot be carried out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from posttrain.cli import app


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """base; one (elements 0 and 1 of 8 changed) and two (elements 1 and 2)."""
    monkeypatch.chdir(tmp_path)
    for name, changed in {"base": [], "one": [0, 1], "two": [1, 2]}.items():
        (tmp_path / name).mkdir()
        weight = torch.arange(8.0)
        weight[changed] += 0.5
        save_file({"up.weight": weight}, tmp_path / name / "model.safetensors")
    return tmp_path


def delta(*arguments):
    return CliRunner().invoke(app, ["delta", *arguments])


def answer(*arguments):
    done = delta(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def weights(folder):
    return load_file(f"{folder}/model.safetensors")["up.weight"].tolist()


def test_make_apply_remove_merge_inspect(folders):
    made = answer("make", "base", "one", "--to", "one.delta")
    assert (made["changed"], made["elements"], made["density"]) == (2, 8, 0.25)
    assert made["base"] == str(folders / "base")
    assert made["bytes"] == (folders / "one.delta").stat().st_size == 2 * made["bytes_per_value"]
    assert made["tensors"]["up.weight"]["positions"] == "map"
    assert answer("apply", "one.delta", "--to", "applied")["changed"] == 2
    assert weights("applied") == weights("one")
    assert answer("remove", "one.delta", "applied", "--to", "removed")["folder"] == "removed"
    assert weights("removed") == weights("base")
    (folders / "there").mkdir()
    answer("make", "base", "two", "--to", "there", "--old-values")
    merged = answer("merge", "one.delta", "there", "--weight", "1", "--weight", "2", "--to", "sum")
    assert merged["changed"] == 3
    assert [part["weight"] for part in merged["about"]["merged"]] == [1.0, 2.0]
    answer("apply", "sum", "--to", "summed")
    assert weights("summed") == [0.5, 2.5, 3.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    shown = delta("inspect", "there", "--tensors")
    assert shown.exit_code == 0
    assert "old values: yes" in shown.stdout
    assert "changed: 2" in shown.stdout
    row = next(line for line in shown.stdout.splitlines() if line.startswith("up.weight"))
    assert row.split() == ["up.weight", "F32", "map", "8", "2", "25.00%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply", "missing", "--to", "out"], "cannot be read as a delta"),
        (["apply", "one.delta", "--to", "out", "--base", "two"], "hash differs"),
        (["apply", "one.delta", "--to", "base"], "in use"),
        (["apply", "one.delta", "--to", "out", "--base", "nowhere"], "no folder 'nowhere'"),
        (["make", "base", "base", "--to", "new"], "same weights"),
        (["make", "base", "one", "--to", "new", "--max-density", "0.1"], "format full"),
        (["merge", "one.delta", "--weight", "1", "--weight", "2", "--to", "new"], "one weight per delta"),
        (["inspect", "base/model.safetensors"], "not a delta"),
    ],
)
def test_a_wrong_request_ends_with_2_and_says_what_to_do(folders, arguments, message):
    assert delta("make", "base", "one", "--to", "one.delta").exit_code == 0
    done = delta(*arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert not (folders / "out").exists()
    assert not (folders / "new").exists()

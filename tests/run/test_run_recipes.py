"""The recipes are the shipped configurations, line by line: same steps, same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_jobs import assert_same, posttrain
from safetensors.torch import load_file

from posttrain.config.check import load_run_config

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def small_copy(name, folder, numbers):
    """Copy a recipe with smaller numbers; each must stand in it exactly once, as in its configuration."""
    text = (ROOT / "recipes" / name).read_text()
    for old, new in numbers.items():
        assert text.count(old) == 1, f"{name} does not hold {old!r} once: recipe and configuration differ"
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text)
    return path


def run(path, *arguments):
    command = [sys.executable, str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def column(table, name, metric):
    """The number under ``name`` in the table that a recipe prints."""
    rows = {line.split("  ")[0].strip(): line for line in table.splitlines()}
    fields = rows[metric][len(metric) :].replace(", ", ",").split()
    return float(fields[0 if name == "before" else 2])


def test_rlvr_recipe_equals_its_configuration(tmp_path):
    config = ROOT / "configs" / "rlvr" / "quickstart.yaml"
    full = load_run_config(config)
    recipe = small_copy(
        "rlvr.py",
        tmp_path,
        {
            f'train={{"size": {full.data.train.size}, "seed": 0}}': 'train={"size": 400, "seed": 0}',
            f'eval={{"size": {full.data.eval.size}, ': 'eval={"size": 12, ',
            f"load_warm_start(data, {full.warm_start.size:_})": "load_warm_start(data, 600)",
            f"per_device_train_batch_size={full.trainer['per_device_train_batch_size']}": (
                "per_device_train_batch_size=32"
            ),
            f"default={full.trainer['max_steps']}": "default=2",
            f"default={full.warm_start.trainer['max_steps']}": "default=20",
        },
    )
    shown = run(recipe, "--out", tmp_path / "recipe")
    smaller = ("data.train.size=400", "data.eval.size=12", "warm_start.size=600", "trainer.max_steps=2")
    smaller += ("trainer.per_device_train_batch_size=32", "warm_start.trainer.max_steps=20")
    posttrain("train", config, f"run_dir={tmp_path / 'verb'}", *smaller)
    for verb, own in (("warm_start/model", "warm_start"), ("export", "export")):
        assert_same(
            load_file(tmp_path / "verb" / verb / "model.safetensors"),
            load_file(tmp_path / "recipe" / own / "model.safetensors"),
            own,
        )
    assert_same_table(shown, tmp_path / "verb", ("pass@1", "pass@16", "length"))
    assert "reloaded logits differ by at most 0" in shown


def test_sft_recipe_equals_its_configuration(tmp_path):
    config = ROOT / "configs" / "sft" / "chain_sum_cpu.yaml"
    full = load_run_config(config)
    recipe = small_copy(
        "sft.py",
        tmp_path,
        {
            f'train={{"size": {full.data.train.size}, "seed": 0}}': 'train={"size": 600, "seed": 0}',
            f'eval={{"size": {full.data.eval.size}, ': 'eval={"size": 5, ',
            f"default={full.trainer['max_steps']}": "default=20",
        },
    )
    shown = run(recipe, "--out", tmp_path / "recipe")
    smaller = ("data.train.size=600", "data.eval.size=5", "trainer.max_steps=20")
    posttrain("train", config, f"run_dir={tmp_path / 'verb'}", *smaller)
    assert_same(
        load_file(tmp_path / "verb" / "export" / "model.safetensors"),
        load_file(tmp_path / "recipe" / "export" / "model.safetensors"),
    )
    assert_same_table(shown, tmp_path / "verb", ("pass@1", "length"))


def assert_same_table(shown, verb, metrics):
    evaluation = json.loads((verb / "evaluation.json").read_text())
    for part in ("before", "after"):
        for metric in metrics:
            expected = evaluation[part]["metrics"][metric]["value"]
            assert column(shown, part, metric) == pytest.approx(expected, abs=6e-4), (part, metric)


def test_continual_recipe_equals_its_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    numbers = {}
    for name, smaller in (("words", 3), ("sums", 2)):
        full = load_run_config(ROOT / "configs" / "continual" / f"{name}.yaml")
        train = f'train={{"size": {full.data.train.size:_}, "seed": 0}}'.replace("1_500", "1500")
        numbers[train] = 'train={"size": 200, "seed": 0}'
        numbers[f'"{name}": {full.trainer["max_steps"]}'] = f'"{name}": {smaller}'
    recipe = small_copy("continual.py", tmp_path, numbers)
    recipe.write_text(recipe.read_text().replace('eval={"size": 200}', 'eval={"size": 8}'))
    lines = run(recipe, "--out", tmp_path / "recipe").splitlines()
    assert [line.rpartition(":")[0] for line in lines if line.startswith("after")] == [
        "after words", "after words", "after sums", "after sums",
    ]  # fmt: skip
    for name, smaller in (("words", 3), ("sums", 2)):
        (tmp_path / f"{name}.yaml").write_text(
            f"extends: {ROOT}/configs/continual/{name}.yaml\ntrainer: {{max_steps: {smaller}}}\n"
            "data: {train: {size: 200}, eval: {size: 8}}\n"
        )
    verb = ("continual", tmp_path / "sums.yaml", "--base", tmp_path / "words.yaml", "--seeds", 1)
    posttrain(*verb, "--arm", "hft:selection=hft", "--out", tmp_path / "verb")
    for task, place in (("words", "base/seed-0"), ("sums", "hft/seed-0/round-0")):
        assert_same(
            load_file(tmp_path / "verb" / place / "export" / "model.safetensors"),
            load_file(tmp_path / "recipe" / task / "model.safetensors"),
            task,
        )


STORIES = ROOT.parent / "shared" / "data" / "tinystories_pairs"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories data (../shared) are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "metrics"),
    [("preference", ("accuracy", "kl", "score")), ("reward", ("accuracy", "log_loss"))],
)
def test_recipes_on_pairs_equal_their_configurations(tmp_path, monkeypatch, name, metrics):
    monkeypatch.chdir(ROOT)
    for part in ("train", "test"):
        lines = (STORIES / f"{part}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{part}.jsonl").write_text("".join(lines[: 8 if part == "test" else 40]))
    config = (
        ROOT / "configs" / ("preference/dpo_stories.yaml" if name == "preference" else "reward/stories.yaml")
    )
    recipe = ROOT / "recipes" / f"{name}.py"
    assert f"default={load_run_config(config).trainer['max_steps']}" in recipe.read_text()
    # another number of steps is another schedule, so both sides get it
    shown = run(recipe, "--out", tmp_path / "recipe", "--steps", 3, "--data", tmp_path)
    files = (f"data.source={tmp_path}/train.jsonl", f"data.eval.file={tmp_path}/test.jsonl")
    posttrain("train", config, f"run_dir={tmp_path / 'verb'}", "trainer.max_steps=3", *files)
    assert_same(
        load_file(tmp_path / "verb" / "export" / "model.safetensors"),
        load_file(tmp_path / "recipe" / "export" / "model.safetensors"),
    )
    assert_same_table(shown, tmp_path / "verb", metrics)

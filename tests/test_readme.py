"""What the README says is what the code does."""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import support
import torch
import typer
import yaml
from datasets import Dataset
from pydantic import BaseModel
from safetensors.torch import load_file
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from posttrain.cli import ORDER, app
from posttrain.config import method_pages
from posttrain.config.check import check_config
from posttrain.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def script():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_up_to_date():
    assert script().updated(README) == README, "run python scripts/update_readme.py"


PAGES = tuple(ROOT / name for name in ("README.md", "scripts/bench/README.md", "posttrain/rollout/README.md"))
BLOCKS = [
    (path.name, kind, body)
    for path in PAGES
    for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.M | re.S)
]
PYTHON = [body for _, kind, body in BLOCKS if kind == "python"]
YAML = [body for _, kind, body in BLOCKS if kind == "yaml"]
COMMANDS = [
    line.partition("  #")[0].strip()
    for _, kind, body in BLOCKS
    if kind == "bash"
    for line in body.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_every_block_is_of_a_kind_that_is_run_below():
    assert {kind for _, kind, _ in BLOCKS} == {"bash", "python", "yaml"}
    assert len(COMMANDS) >= 10
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert fences == 2 * len(BLOCKS), "a block is indented or not closed, and would escape these tests"


# what a block of Python stands in: the names that the reader's own script has
SETTINGS = {
    "GRPOTrainer": lambda folder: {
        "model": support.model(),
        "args": support.grpo_config(folder, max_steps=1),
        "reward": support.letter_reward,
        "dataset": support.prompts(),
    },
    "SFTTrainer": lambda folder: {
        "model": support.model(),
        "args": support.sft_config(folder, max_steps=1),
        "rows": support.answers(),
    },
    "DPOTrainer": lambda folder: {
        "model": support.model(),
        "args": DPOConfig(
            output_dir=str(folder),
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        "pairs": Dataset.from_dict({"prompt": ["a"] * 8, "chosen": [" b"] * 8, "rejected": [" c"] * 8}),
    },
}


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_runs(block, tmp_path):
    """Trainers train a step of a toy model; a file of a method is found and explained by the command line."""
    used = [name for name in SETTINGS if f"import {name}" in block or f", {name}" in block]
    if not used:
        (name,) = re.findall(r"^class (\w+)\(Method\)", block, re.M)
        (tmp_path / "from_readme.py").write_text(block)
        done = subprocess.run(
            [sys.executable, "-m", "posttrain", "methods", f"from_readme:{name}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "weigh short completions up" in done.stdout
        assert "0 switches the method off" in done.stdout
        return
    (name,) = used
    names = SETTINGS[name](tmp_path)
    before = {key: value.clone() for key, value in names["model"].state_dict().items()}
    # a tokenizer in the model's folder, as Hub models have one
    names["model"].save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    names["model"].config._name_or_path = str(tmp_path / "model")
    exec(compile(block, "README.md", "exec"), names)
    if names["trainer"].state.global_step == 0:
        names["trainer"].train()
    assert names["trainer"].state.global_step == 1
    names["trainer"].save_model(str(tmp_path / "trained"))
    after = load_file(tmp_path / "trained" / "model.safetensors")
    assert any(not torch.equal(after[key], value) for key, value in before.items())


def test_configurations_are_accepted(tmp_path):
    run, selection, preference = YAML  # a further block needs a line here
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    preference = preference.replace("pairs.jsonl", str(tmp_path / "pairs.jsonl"))
    for text in (run + selection, preference):
        (tmp_path / "run.yaml").write_text(text)
        report = check_config(tmp_path / "run.yaml")
        assert report.ok, report.text()


PARSE_ONLY = """
import argparse, runpy, sys
parse = argparse.ArgumentParser.parse_args
def parsed(self, *rest, **named):
    parse(self, *rest, **named)
    raise SystemExit(0)
argparse.ArgumentParser.parse_args = parsed
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
raise SystemExit("it has read no arguments")
"""


def parse_verb(words, tmp_path):
    """Read the command as the program does, and check its configuration; nothing is carried out."""
    stand_in = tmp_path / "CONFIG.yaml"
    stand_in.write_text(YAML[0])
    words = [str(stand_in) if word in ("CONFIG", "CONFIG.yaml") else word for word in words]
    program = typer.main.get_command(app)
    command = program.commands[words[0]]
    context = command.make_context(words[0], words[1:])  # refuses unknown options and missing arguments
    if words[0] in ("train", "check"):
        report = check_config(context.params["config"], context.params["overrides"] or ())
        assert report.ok, report.text()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    """Scripts are there and parse, options exist, configurations pass the check.

    What they do is run by other tests: the quickstart and the recipes, shortened, in tests/run, launches in
    tests/launch, the doctor in tests/doctor; this file's own tests are ``scripts/test.sh`` at work.
    """
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "export":  # of a variable
        assert all("=" in word for word in words[1:])
        return
    if words[:2] == ["accelerate", "launch"]:
        at = words.index("--config_file") + 1
        assert yaml.safe_load((ROOT / words[at]).read_text())["compute_environment"] == "LOCAL_MACHINE"
        rest = words[at + 1 :]
        if rest[0] == "--num_processes":
            rest = rest[2:]
        words = ["posttrain", *rest[2:]] if rest[:2] == ["-m", "posttrain"] else ["python", *rest]
    if words[0] == "bash":
        subprocess.run(["bash", "-n", words[1]], check=True, timeout=20)
    elif words[0] == "python":
        done = subprocess.run(
            [sys.executable, "-c", PARSE_ONLY, *words[1:]], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
    else:
        assert words[0] == "posttrain", f"no test knows what to do with {command!r}"
        parse_verb(words[1:], tmp_path)


def test_the_table_of_verbs_is_whole():
    table = README.partition("| verb | what it does |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `posttrain ([a-z][\w-]*)", table, re.M)) == set(ORDER)


def test_the_keys_for_those_who_come_from_elsewhere_exist():
    section = README.partition("## Coming from another toolkit")[2].partition("\n## ")[0]
    ours = [line.split(" | ")[-1] for line in section.splitlines() if line.startswith("|")]
    keys = {key for cell in ours for key in re.findall(r"`([a-z_]+(?:\.\w+)+)`", cell)}
    assert len(keys) > 25
    trainer = {
        field.name
        for config in (GRPOConfig, SFTConfig, DPOConfig, RewardConfig)
        for field in dataclasses.fields(config)
    }
    for key in keys:
        section, *rest = key.split(".")
        if section == "trainer":
            assert rest[0] in trainer, key
        elif section == "methods":
            assert rest[0] in {cls.name for cls in method_pages.available().values()}, key
        else:
            model = RunConfig
            for part in key.split("."):
                assert part in model.model_fields, key
                model = next(
                    (
                        kind
                        for kind in (
                            model.model_fields[part].annotation,
                            *get_args(model.model_fields[part].annotation),
                        )
                        if isinstance(kind, type) and issubclass(kind, BaseModel)
                    ),
                    model,
                )


def test_its_pictures_are_there_and_light():
    found = re.findall(r'(?:srcset|src)="([^"]+)"', README)
    assert len(found) == 2
    for name in found:
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG"), name
        assert (ROOT / name).stat().st_size < 200_000, name


def test_every_file_it_names_exists():
    for page in PAGES:
        for name in set(
            re.findall(r"`((?:posttrain|scripts|configs|recipes|tests)/[\w./]+)`", page.read_text())
        ):
            assert (ROOT / name).exists(), (page, name)
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"(?:bash|train|check) ((?:scripts|configs)/[\w./]+)", README)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("method", "caveat", "place"),
    [
        ("hft", "-0.092 [-0.260, 0.076]", "posttrain/selection/hft.py"),
        ("spine", "first five", "posttrain/rl/spine.py"),
        ("rpo", "0.005", "posttrain/preference/rpo.py"),
        ("posttrain warm", "ne to three of the four members", "posttrain/run/warm.py"),
        ("dynamic_sampling", "bar missed", "scripts/bench/README.md"),
        ("dynamic_sampling", "0.84 [0.79, 0.90]", "scripts/bench/README.md"),
    ],
)
def test_the_table_of_claims_says_what_the_pages_take_back(method, caveat, place):
    cells = [line for line in README.splitlines() if line.startswith(f"| `{method}` | ")]
    assert caveat in cells[-1]
    page = " ".join((ROOT / place).read_text().replace("(+", " ").split())
    assert caveat in page

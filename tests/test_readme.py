"""What the README says is what the code does."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def script():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_up_to_date():
    assert script().updated(README) == README, "run python scripts/update_readme.py"


def test_the_example_method_is_found_and_works(tmp_path):
    """The file of 'Add your method', saved as a module, is a method that the command line explains."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "LengthTilt" in block]
    (tmp_path / "length_tilt.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "methods", "length_tilt:LengthTilt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "weigh short completions up" in done.stdout
    assert "0 switches the method off" in done.stdout


def test_the_example_configuration_is_accepted(tmp_path):
    from posttrain.config.check import check_config

    run, selection, preference = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    preference = preference.replace("pairs.jsonl", str(tmp_path / "pairs.jsonl"))
    for text in (run + selection, preference):
        (tmp_path / "run.yaml").write_text(text)
        report = check_config(tmp_path / "run.yaml")
        assert report.ok, report.text()


@pytest.mark.parametrize(
    "verb",
    ["check", "train", "eval", "export", "report", "compare", "sparsity", "methods", "doctor", "samples"],
)
def test_every_verb_of_the_table_exists(verb):
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", verb, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"posttrain {verb}" in README
    assert "Usage" in done.stdout


def test_its_pictures_are_there_and_light():
    found = re.findall(r'(?:srcset|src)="([^"]+)"', README)
    assert len(found) == 2
    for name in found:
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG"), name
        assert (ROOT / name).stat().st_size < 200_000, name


def test_every_file_it_names_exists():
    for name in set(re.findall(r"`((?:posttrain|scripts|configs|recipes|tests)/[\w./]+)`", README)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"(?:bash|train|check) ((?:scripts|configs)/[\w./]+)", README)):
        assert (ROOT / name).exists(), name

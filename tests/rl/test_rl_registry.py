"""Someone adds a method: one file, and everything finds it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.rl import registry
from posttrain.rl.ace import ACE
from posttrain.rl.method import Method

PACKAGE = Path(registry.__file__).resolve().parents[1]

CONFIG = """
task: rlvr
model: {path: some/model}
data: {source: "reasoning_gym:chain_sum"}
rewards: [verifier]
methods: {ace_two: {alpha: 0.5}}
"""


@pytest.fixture(scope="module")
def copy_with_one_more(tmp_path_factory):
    """A copy of the package with ACE's file copied and renamed, and nothing else touched."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, root / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    text = (PACKAGE / "rl" / "ace.py").read_text()
    text = text.replace("class ACE(", "class AceTwo(").replace("-> ACE:", "-> AceTwo:")
    text = text.replace('name = "ace"', 'name = "ace_two"').replace("ACE: asym", "ACE, the second: asym")
    (root / "posttrain" / "rl" / "ace_two.py").write_text(text)
    return root


def run(root, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_copied_file_is_a_method(copy_with_one_more, tmp_path):
    root = copy_with_one_more
    code, text = run(root, "-m", "posttrain", "methods", "ace_two")
    assert code == 0
    assert "ACE, the second: asymmetric" in text
    assert "When not to use it" in text
    code, text = run(root, "-m", "posttrain", "methods", "--json")
    assert {"ace", "ace_two"} <= {method["name"] for method in json.loads(text)}
    config = root / "config.yaml"
    config.write_text(CONFIG)
    code, text = run(root, "-m", "posttrain", "check", str(config))
    assert code == 0, text
    config.write_text(CONFIG.replace("alpha: 0.5", "alpha: -1"))
    code, text = run(root, "-m", "posttrain", "check", str(config))
    assert code == 2
    assert "alpha" in text
    imported = "from posttrain.rl import AceTwo; print(AceTwo(alpha=2).name)"
    assert run(root, "-c", imported) == (0, "ace_two\n")


def test_two_methods_of_one_name_are_refused(copy_with_one_more):
    twin = copy_with_one_more / "posttrain" / "rl" / "zz_twin.py"
    twin.write_text((PACKAGE / "rl" / "ace.py").read_text())
    code, text = run(copy_with_one_more, "-m", "posttrain", "methods")
    twin.unlink()
    assert code != 0
    assert "two methods are called 'ace'" in text


def test_methods_without_a_name_are_refused(copy_with_one_more):
    file = copy_with_one_more / "posttrain" / "rl" / "zz_nameless.py"
    file.write_text("from posttrain.rl.method import Method\n\n\nclass Nameless(Method):\n    title = 'x'\n")
    code, text = run(copy_with_one_more, "-m", "posttrain", "methods")
    file.unlink()
    assert code != 0
    assert "posttrain.rl.zz_nameless.Nameless has no name" in text


def test_the_registry_does_not_import_torch():
    code = (
        "import sys; from posttrain.rl import registry; registry.available(); print('torch' in sys.modules)"
    )
    assert run(PACKAGE.parent, "-c", code) == (0, "False\n")


def test_methods_outside_the_package(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(
        "from posttrain.rl.method import Method\n\n\n"
        "class Mine(Method):\n    name = 'mine'\n    title = 'mine'\n    strength: float = 1.0\n\n\n"
        "class NotOne:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (mine,) = registry.build({"my_methods:Mine": {"strength": 2.0}})
    assert isinstance(mine, Method)
    assert (mine.name, mine.strength) == ("mine", 2.0)
    with pytest.raises(TypeError, match="not a subclass"):
        registry.resolve("my_methods:NotOne")
    with pytest.raises(KeyError, match="cannot load method 'my_methods:Absent'"):
        registry.resolve("my_methods:Absent")


def test_names():
    assert registry.resolve("ace") is ACE
    with pytest.raises(KeyError, match="did you mean 'ace'"):
        registry.resolve("acee")

"""Every selector is found by its name, without torch, and has a page, a title and its paper."""

import json
import re
import subprocess
import sys

import pytest

from posttrain.config.method_pages import page, parameters
from posttrain.selection import registry
from posttrain.selection.selector import Selector


@pytest.mark.parametrize("name", registry.available())
def test_a_selector_is_documented(name):
    cls = registry.resolve(name)
    assert cls.name == name
    assert cls.title
    assert cls.paper is None or re.fullmatch(r"\d{4}\.\d{5}", cls.paper)
    text = page(cls)
    assert text.split()[0].strip(":,") == cls.title.split()[0].strip(":,")
    assert cls.paper is None or cls.paper in text
    for heading in ("Idea", "When not to use it"):
        assert f"\n{heading}\n" in text
    undocumented = [entry["name"] for entry in parameters(cls) if not entry["description"]]
    assert not undocumented


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hft", {"categories": ["attention"], "always_train": [], "router": "train"}),
        ("random", {"budget": 0.02, "exclude": ["norm"]}),
        ("magnitude", {"budget": 100, "always_train": ["lm_head"]}),
        ("bitfit", {"mode": "one_dim", "budget": 50}),
        ("explicit", {"parameters": ["norm"], "rows": {"embed": [1, "4:", -2]}, "columns": {"down": [0]}}),
        ("rl_subnetwork", {"before": "a", "after": "b", "budget": 0.1}),
        ("sara", {}),
        ("sara", {"threshold": 0.002}),
    ],
)
def test_settings_come_back_from_a_configuration(name, settings):
    """Strictly checked as JSON, and what is filled in is checked again when the run reads it."""
    cls = registry.resolve(name)
    selector = cls.model_validate_json(json.dumps(settings), strict=True)
    assert cls.model_validate_json(selector.model_dump_json(), strict=True) == selector


def test_no_torch_is_imported():
    code = (
        "import sys; from posttrain.selection import registry; "
        "assert registry.available(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_and_foreign_selectors():
    with pytest.raises(KeyError, match="did you mean 'hft'"):
        registry.resolve("htf")
    assert issubclass(registry.resolve("posttrain.selection.hft:HFT"), Selector)
    with pytest.raises(TypeError, match="is not a subclass"):
        registry.resolve("posttrain.selection.hft:Matrix")

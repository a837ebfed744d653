"""Whatever stands on the command line, every verb ends in 0, 1 or 2 with a sentence; what is there stays."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
import yaml
from fuzz_configs import BASE, hostile_override
from fuzz_judge import fingerprint, invoke
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.errors import describe

PATHS = [
    *(
        "",
        ".",
        "/",
        "folder",
        "file",
        "empty",
        "dangling",
        "loop",
        "nowhere",
        "no/where",
        "file/x",
        "/dev/null",
    ),
    *(
        "/proc/self/mem",
        "config.yaml",
        "~nobody_of_that_name/a",
        "x" * 300,
        "y/" * 2100,
        "a\0b",
        "[red]x[/]",
        "-",
    ),
    *("http://a/b", "user/name", "reasoning_gym:x", "\udcff", "\u202e"),
]
VERBS = [
    *("check", "train", "eval", "export", "report", "doctor", "samples", "sparsity", "merge", "compare"),
    *("s3ft", "warm", "best-of", "continual", "methods"),
    *(
        "delta make",
        "delta apply",
        "delta remove",
        "delta merge",
        "delta inspect",
        "plan make",
        "plan inspect",
    ),
]


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").touch()
    (tmp_path / "dangling").symlink_to("nowhere_at_all")
    (tmp_path / "loop").symlink_to("loop")
    # a model that is not there: whatever is asked for, no training begins
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE | {"model": {"path": "./nowhere_at_all"}}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    verb=st.sampled_from(VERBS),
    first=st.lists(st.sampled_from(PATHS), max_size=2),
    to=st.sampled_from([None, *PATHS]),
    rng=st.integers(0, 2**32).map(random.Random),
)
def test_any_verb(tmp_path, verb, first, to, rng):
    takes = {"report": "--out", "eval": "--out", "compare": "--out", "continual": "--out", "warm": "--out"}
    options = [] if to is None or to == "." else [takes.get(verb, "--to"), to]
    overrides = [hostile_override(rng)] if first == ["config.yaml"] else []
    before, device = fingerprint(tmp_path), Path("/dev/null").is_char_device()
    invoke(*verb.split(), *options, *first, *overrides)
    after = fingerprint(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert Path("/dev/null").is_char_device() == device


@pytest.mark.parametrize("path", ["x" * 300, "~nobody_of_that_name/a", "file/x", "loop"])
@pytest.mark.parametrize(
    "verb", [["samples"], ["report"], ["doctor"], ["sparsity", "."], ["export", "--to", "o"]]
)
def test_paths_that_cannot_be_looked_at(verb, path):
    answer = invoke(*verb, path)
    assert answer.code in (1, 2)
    assert "Errno" not in answer.output


def test_system_errors_in_words():
    error = PermissionError(errno.EACCES, "Permission denied", "/a/b")
    assert describe(error) == "Permission denied: '/a/b'"
    assert (
        describe(OSError(errno.EXDEV, "Cross-device link", "a", None, "b"))
        == "Cross-device link: 'a' and 'b'"
    )
    assert describe(OSError("odd")) == "OSError: odd"

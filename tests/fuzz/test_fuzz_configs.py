"""Whatever a configuration file or an override holds, ``check`` answers with sentences and 0 or 2."""

from __future__ import annotations

import random

import pytest
import yaml
from fuzz_configs import BASE, hostile_config, hostile_override, hostile_text
from fuzz_judge import invoke
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

many = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32).map(random.Random)


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    return path


def test_the_base_is_right(tmp_path):
    assert invoke("check", written(tmp_path, BASE)).code == 0


@many
@given(rng=seeds)
def test_wrong_values(tmp_path, rng):
    path = written(tmp_path, hostile_config(rng))
    assert invoke("check", path).code in (0, 2)
    assert invoke("train", path, "model.path=./nowhere").code == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@many
@given(rng=seeds)
def test_wrong_text(tmp_path, rng):
    answer = invoke("check", written(tmp_path, hostile_text(rng)))
    assert answer.code == 0 or "config.yaml" in answer.output


@many
@given(rng=seeds)
def test_wrong_overrides(tmp_path, rng):
    override = hostile_override(rng)
    answer = invoke("check", written(tmp_path, BASE), "--", override)
    assert answer.code in (0, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer." + "a." * 500 + "b=1", "more than 100 parts"),
        ("run_dir=" + "x" * 5000, "cannot be used: File name too long"),
        ("run_dir=~nobody_of_that_name/x", "there is no such user"),
        ('model.path="a\\0b"', "NUL"),
        ('data.columns={"": prompt}', "data.columns"),
    ],
)
def test_what_used_to_crash(tmp_path, override, said):
    answer = invoke("check", written(tmp_path, BASE), override)
    assert answer.code == 2
    assert said in answer.output


@pytest.mark.parametrize("text", ["a: " + "[" * 150 + "]" * 150, "a: " + "[" * 5000, "- " * 3000 + "a"])
def test_nested_deeply(tmp_path, text):
    answer = invoke("check", written(tmp_path, text.encode()))
    assert answer.code == 2
    assert "nested more than 100 deep" in answer.output

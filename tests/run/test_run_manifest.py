"""The manifest repeats the run and gives nothing away."""

import json
import shlex
import subprocess
import sys

import peft
import pytest
import torch
import trl

from posttrain.run.manifest import build_manifest, hardware, redact, repeat_command, source_commit, versions


def test_manifest_is_json_and_complete():
    manifest = build_manifest(
        {"task": "sft", "trainer": {"learning_rate": 1e-3}},
        data={"source": "x.jsonl", "fingerprint": "abc"},
        seeds={"run": 3},
        command=["posttrain", "train", "a b.yaml"],
    )
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["command"] == "posttrain train 'a b.yaml'"
    assert manifest["seeds"] == {"run": 3}
    assert manifest["data"] == {"source": "x.jsonl", "fingerprint": "abc"}
    assert manifest["config"]["trainer"] == {"learning_rate": 1e-3}
    assert manifest["time"].endswith("+00:00")


def test_versions_are_those_that_run():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["trl"] == trl.__version__
    assert found["peft"] == peft.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_hardware():
    found = hardware()
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0.1
    assert found["cpu"]
    assert len(found["gpus"]) == torch.cuda.device_count()


SECRET = "hf_abcdefghijklmnopqrstuvwx"


@pytest.mark.parametrize(
    "arguments",
    [
        ["posttrain", "train", "c.yaml", f"trainer.hub_token={SECRET}"],
        ["posttrain", "export", "--token", SECRET],
        ["posttrain", "export", f"--token={SECRET}"],
        ["posttrain", "train", "c.yaml", "api_key=plain-secret"],
        ["posttrain", "train", "c.yaml", "data.source=https://me:plain-secret@host/x"],
    ],
)
def test_no_secret_in_the_command(arguments):
    for command in (arguments, shlex.join(arguments)):
        text = json.dumps(build_manifest({}, command=command))
        assert SECRET not in text
        assert "plain-secret" not in text
        assert "***" in text


def test_no_secret_in_the_configuration_but_all_that_matters(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    config = {
        "trainer": {
            "hub_token": "plain-secret",
            "max_new_tokens": 5,
            "pad_token": "<pad>",
            "eos_token": "</s>",
        },
        "model": {"revision": "0123456789abcdef0123456789abcdef01234567", "tokenizer": "user/tok"},
        "notes": [f"log in with {SECRET}", None, 1.5, True],
    }
    manifest = build_manifest(config, command=["posttrain"])
    assert SECRET not in json.dumps(manifest)
    assert manifest["config"] == {
        "trainer": {"hub_token": "***", "max_new_tokens": 5, "pad_token": "<pad>", "eos_token": "</s>"},
        "model": config["model"],
        "notes": ["log in with ***", None, 1.5, True],
    }
    assert redact({"hub_token": None}) == {"hub_token": None}


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_of_the_checkout(tmp_path):
    assert source_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert source_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert source_commit(tmp_path) == {"commit": head, "dirty": True}
    (tmp_path / "installed").mkdir()
    assert source_commit(tmp_path / "installed") is None


@pytest.mark.parametrize("processes", [1, 2])
def test_command_of_a_module_run(processes, tmp_path):
    package = tmp_path / "tool"
    package.mkdir()
    (package / "__main__.py").write_text(
        "import json\nfrom posttrain.run.manifest import "
        "repeat_command\nprint(json.dumps(repeat_command()))\n"
    )
    (package / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tool", "train", "c.yaml"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "WORLD_SIZE": str(processes)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", "2"]
    assert json.loads(done.stdout) == [*launcher, "-m", "tool", "train", "c.yaml"]


def test_command_of_an_entry_point(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/posttrain", "train", "c.yaml"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert repeat_command() == ["posttrain", "train", "c.yaml"]

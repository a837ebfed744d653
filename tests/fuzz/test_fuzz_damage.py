"""What a damaged file of a run becomes: a sentence that names it, never an exception's words."""

from __future__ import annotations

import json

import pytest
import torch
from fuzz_judge import fingerprint, invoke
from peft import get_peft_model

from posttrain.export.export import MARKER, is_verified
from posttrain.models import embedded
from posttrain.stored import StoredFileError, stored_config, stored_json

CONFIG = "task: rlvr\nmodel: {path: a/b, dtype: auto}\ndata: {source: c/d}\ntrainer: {}\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"3", b"{", b"\xff\xfe", b"\0", b"[" * 5000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_object(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(StoredFileError, match=r"state\.json cannot be read"):
        stored_json(path)
    with pytest.raises(StoredFileError, match=r"state\.json cannot be read"):
        stored_config(path)
    assert path.read_bytes() == content


def test_what_is_there(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(StoredFileError, match="No such file"):
        stored_config(path)
    path.write_text(CONFIG)
    assert stored_config(path)["model"]["path"] == "a/b"
    for wrong in (
        CONFIG.replace("task", "tusk"),
        CONFIG.replace("dtype: auto", "dtype: 3"),
        CONFIG.replace("trainer: {}", "trainer: []"),
    ):
        path.write_text(wrong)
        with pytest.raises(StoredFileError, match="not there"):
            stored_config(path)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("adapters")
    for name in ("one", "two"):
        torch.manual_seed(0)
        model = get_peft_model(
            embedded.build_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", b""),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"\xff"),
        ("adapter_config.json", None),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"\0" * 64),
        ("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    ],
)
def test_a_damaged_adapter_is_not_averaged(adapters, tmp_path, file, content):
    path = adapters / "two" / file
    whole = path.read_bytes()
    if content is None:
        settings = json.loads(whole)
        content = json.dumps(settings | {"lora_alpha": ""}).encode()
    path.write_bytes(content)
    before = fingerprint(adapters)
    try:
        answer = invoke("merge", adapters / "one", adapters / "two", "--to", tmp_path / "out")
        assert answer.code == 2
        assert file in answer.output
        assert not (tmp_path / "out").exists()
        assert fingerprint(adapters) == before
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {}}'])
def test_a_damaged_marker_is_no_verified_export(tmp_path, content):
    (tmp_path / MARKER).write_text(content)
    assert MARKER in str(is_verified(tmp_path))


@pytest.mark.parametrize("verb", ["report", "doctor", "samples"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"null", b"[]", b'{"step": {}}\n', b"\0" * 99, b"[" * 5000]
)
def test_verbs_that_read_a_run_go_on_without_what_is_damaged(tmp_path, verb, content):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "manifest.json").write_text("{}")
    for name in (
        "metrics.jsonl",
        "completions.jsonl",
        "evaluation.json",
        "status.json",
        "manifest.json",
        "config.yaml",
    ):
        path = tmp_path / name
        kept = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        assert invoke(verb, tmp_path).code in (0, 1, 2)
        assert path.read_bytes() == content
        path.unlink() if kept is None else path.write_bytes(kept)

"""Push against a stand-in Hub on the loopback interface; what arrives is downloaded and loaded again."""

import json

import huggingface_hub.constants
import pytest
import torch
from export_hub_stand_in import TOKEN, HubStandIn
from export_models import tiny_llama, trained_adapter
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.export.export import export_model, is_verified
from posttrain.export.push import PushError, push
from posttrain.export.verify import logits
from posttrain.models.embedded import build_tokenizer
from posttrain.models.load import load_for_evaluation

IDS = [torch.tensor([[20, 21, 22, 23, 24]])]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubStandIn() as server:
        yield server


@pytest.fixture
def adapter(tmp_path):
    model = trained_adapter(tiny_llama())
    export_model(model, build_tokenizer(), tmp_path / "adapter")
    return model, tmp_path / "adapter"


def download(hub, tmp_path, revision=None):
    return snapshot_download(
        "user/tiny",
        endpoint=hub.endpoint,
        token=TOKEN,
        revision=revision,
        cache_dir=tmp_path / "cache",
    )


def test_adapter_comes_back_and_loads_with_plain_peft(hub, adapter, tmp_path):
    model, folder = adapter
    url = push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/user/tiny"
    assert hub.repos["user/tiny"].private is True
    there = download(hub, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(f"{there}/base")
    again = PeftModel.from_pretrained(base, there)
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)
    again, _ = load_for_evaluation(there)
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)
    assert is_verified(there) is None


def test_nothing_of_this_machine_or_the_token_is_published(hub, adapter, tmp_path):
    _, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    files = hub.repos["user/tiny"].branches["main"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "./base"
    assert 'folder = snapshot_download("user/tiny")' in files["README.md"].decode()
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name
        assert TOKEN.encode() not in data, name
    # the folder itself is as it was
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "base"
    )
    assert is_verified(folder) is None


def test_interrupted_upload_sends_only_what_is_missing_the_second_time(hub, adapter, tmp_path):
    model, folder = adapter
    hub.faults[("POST", "/commit/")] = "drop"
    with pytest.raises(PushError, match=r"Nothing was published\. Push again") as failure:
        push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert TOKEN not in str(failure.value)
    assert hub.repos["user/tiny"].branches["main"] == {}
    assert hub.count("PUT", "/lfs/") == 2  # the adapter and its base
    hub.faults.clear()
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.count("PUT", "/lfs/") == 2
    again, _ = load_for_evaluation(download(hub, tmp_path))
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)


def test_pushing_the_same_again_makes_no_commit(hub, adapter):
    _, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    commits = hub.count("POST", "/commit/")
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.count("POST", "/commit/") == commits == 1


def test_merged_after_adapter_leaves_no_mixture(hub, adapter, tmp_path):
    model, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    hub.repos["user/tiny"].branches["main"]["notes.txt"] = b"mine"
    export_model(model, build_tokenizer(), tmp_path / "merged", format="merged")
    push(tmp_path / "merged", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    files = hub.repos["user/tiny"].branches["main"]
    assert "adapter_config.json" not in files
    assert not [name for name in files if "adapter_model" in name or name == "base/model.safetensors"]
    assert files["notes.txt"] == b"mine"
    again = AutoModelForCausalLM.from_pretrained(download(hub, tmp_path))
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=1e-5)


def test_revision_writes_to_its_own_branch(hub, adapter, tmp_path):
    _, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint, revision="seed-1")
    branches = hub.repos["user/tiny"].branches
    assert branches["main"] == {}
    assert 'snapshot_download("user/tiny", revision="seed-1")' in branches["seed-1"]["README.md"].decode()
    load_for_evaluation(download(hub, tmp_path, revision="seed-1"))


def test_public_push_and_private_push_to_a_public_repository(hub, adapter):
    _, folder = adapter
    push(folder, "user/tiny", private=False, token=TOKEN, endpoint=hub.endpoint)
    assert hub.repos["user/tiny"].private is False
    before = dict(hub.repos["user/tiny"].branches["main"])
    with pytest.raises(PushError, match="exists and is public"):
        push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.repos["user/tiny"].branches["main"] == before


def test_bad_token(hub, adapter):
    _, folder = adapter
    with pytest.raises(PushError, match=r"failed with 401: .*hf auth login") as failure:
        push(folder, "user/tiny", token="hf_wrongTokenThatIsSecret", endpoint=hub.endpoint)
    assert "hf_wrongTokenThatIsSecret" not in str(failure.value)
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "may not write to user"),
        (404, "was not found"),
        (500, "answered with an error. Nothing was published"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub, adapter, status, message):
    _, folder = adapter
    hub.faults[("POST", "/commit/")] = status
    with pytest.raises(PushError, match=f"failed with {status}: .*{message}"):
        push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)


def test_unreachable_hub(adapter, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _, folder = adapter
    with HubStandIn() as server:
        endpoint = server.endpoint
    with pytest.raises(PushError, match=r"connection to .* failed"):
        push(folder, "user/tiny", token=TOKEN, endpoint=endpoint)


def test_switched_off_hub(adapter, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, folder = adapter
    with pytest.raises(PushError, match="unset HF_HUB_OFFLINE"):
        push(folder, "user/tiny", token=TOKEN, endpoint="http://127.0.0.1:9")


def test_only_verified_folders_are_pushed(hub, adapter, tmp_path):
    _, folder = adapter
    (folder / "adapter_model.safetensors").write_bytes(b"something else")
    with pytest.raises(PushError, match=r"changed after the export: adapter_model\.safetensors"):
        push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    (tmp_path / "stranger").mkdir()
    with pytest.raises(PushError, match="not written by posttrain export"):
        push(tmp_path / "stranger", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.requests == []


def test_adapter_over_a_local_base_is_not_published_without_it(hub, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = trained_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    export_model(model, build_tokenizer(), tmp_path / "out")
    with pytest.raises(PushError, match="bundle_base=True"):
        push(tmp_path / "out", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.requests == []


def test_wrong_name_and_missing_token(hub, adapter, monkeypatch):
    _, folder = adapter
    with pytest.raises(PushError, match="write user/name"):
        push(folder, "a/b/c", token=TOKEN, endpoint=hub.endpoint)
    monkeypatch.setattr("posttrain.export.push.get_token", lambda: None)
    with pytest.raises(PushError, match="hf auth login"):
        push(folder, "user/tiny", endpoint=hub.endpoint)

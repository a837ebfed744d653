"""Push against a stand-in Hub on the loopback interface; what arrives is downloaded and loaded again."""

import json
import re
import traceback
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from export_hub_stand_in import TOKEN, HubStandIn, Repo
from export_models import tiny_llama, trained_adapter
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.export.export import export_model, is_verified
from posttrain.export.push import PushError, PushRefusedError, preflight, push
from posttrain.export.verify import logits
from posttrain.models.embedded import build_tokenizer

IDS = [torch.tensor([[20, 21, 22, 23, 24]])]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("posttrain.export.push.WAITS", (0.0, 0.0))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    with HubStandIn() as server:
        yield server


@pytest.fixture
def adapter(tmp_path):
    model = trained_adapter(tiny_llama())
    export_model(model, build_tokenizer(), tmp_path / "adapter")
    return model, tmp_path / "adapter"


def download(hub, tmp_path, revision=None, repo="user/tiny"):
    return snapshot_download(
        repo,
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
    base = AutoModelForCausalLM.from_pretrained(download(hub, tmp_path, repo="user/tiny-base"))
    again = PeftModel.from_pretrained(base, there)
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)
    assert is_verified(there) is None
    assert hub.repos["user/tiny-base"].private is True
    assert "user/tiny" in hub.repos["user/tiny-base"].branches["main"]["README.md"].decode()


def test_nothing_of_this_machine_or_the_token_is_published(hub, adapter, tmp_path):
    _, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    files = hub.repos["user/tiny"].branches["main"]
    config, base = json.loads(files["adapter_config.json"]), hub.repos["user/tiny-base"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("user/tiny-base", base.sha("main"))
    assert 'folder = snapshot_download("user/tiny")' in files["README.md"].decode()
    assert not [name for name in files if name.startswith("base/")]
    files = {**files, **{f"base/{name}": data for name, data in base.branches["main"].items()}}
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
    hub.faults[("POST", "/user/tiny/commit/")] = "drop"
    with pytest.raises(
        PushError, match=f"Push again: posttrain export {folder} --push user/tiny$"
    ) as failure:
        push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert "files that have arrived are not sent twice" in str(failure.value)
    assert TOKEN not in str(failure.value)
    assert hub.repos["user/tiny"].branches["main"] == {}
    assert hub.count("POST", "/user/tiny/commit/") == 3
    assert hub.count("PUT", "/lfs/") == 2  # the adapter and its base
    assert is_verified(folder) is None
    hub.faults.clear()
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.count("PUT", "/lfs/") == 2
    base = AutoModelForCausalLM.from_pretrained(download(hub, tmp_path, repo="user/tiny-base"))
    again = PeftModel.from_pretrained(base, download(hub, tmp_path))
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)


def test_a_hub_that_is_full_in_the_middle_keeps_what_arrived(hub, tmp_path):
    extras = [tmp_path / f"extra-{number}.safetensors" for number in range(4)]
    for number, path in enumerate(extras):
        save_file({"x": torch.full((3,), float(number))}, path)
    export_model(tiny_llama(), build_tokenizer(), tmp_path / "out", extras=extras)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 5
    hub.room = 2
    with pytest.raises(PushError, match=r"507: the Hub has no room left") as failure:
        push(tmp_path / "out", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert "Push again: posttrain export" in str(failure.value)
    arrived = set(hub.blobs)
    assert len(arrived) == 2
    hub.room, hub.requests = None, []
    push(tmp_path / "out", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.count("PUT", "/lfs/") == len(shards) - 2
    assert not [path for method, path in hub.requests if method == "PUT" and path.split("/")[-1] in arrived]
    assert set(shards) <= set(hub.repos["user/tiny"].branches["main"])


@pytest.mark.parametrize("fault", ["drop", 500, 503, 429])
def test_what_passes_is_tried_again(hub, adapter, fault):
    _, folder = adapter
    hub.faults[("POST", "/user/tiny/commit/")] = [fault, fault]
    hub.faults[("POST", "/user/tiny/preupload/")] = [fault]
    hub.faults[("POST", "/api/repos/create")] = [fault]
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert "adapter_model.safetensors" in hub.repos["user/tiny"].branches["main"]


def test_the_command_pushes_a_finished_export_as_it_is(hub, adapter, tmp_path, monkeypatch):
    _, folder = adapter
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)  # after huggingface_hub was imported
    done = CliRunner().invoke(app, ["export", str(folder), "--push", "user/tiny", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pushed"] == f"{hub.endpoint}/user/tiny"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    assert TOKEN not in done.output


REFUSED = {
    "offline": ("unset HF_HUB_OFFLINE", {}),
    "no token": ("no access token: run 'hf auth login'", {}),
    "wrong token": (r"does not accept the access token \(401\)", {}),
    "reading token": ("may only read", {}),
    "no account in the name": ("write user/name, with the account", {"name": "tiny"}),
    "no name": ("not a repository name", {"name": "user/with a space"}),
    "public": ("exists and is public, but a private push was asked for.*--public", {}),
    "private": ("exists and is private, but a public push was asked for", {"options": ["--public"]}),
    "unreachable": ("connection to .* failed", {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_the_export(case, hub, tmp_path, monkeypatch):
    message, request = REFUSED[case]
    monkeypatch.setenv("HF_TOKEN", "" if case == "no token" else TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9" if case == "unreachable" else hub.endpoint)
    if case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrongTokenThatIsSecret")
    hub.role = "read" if case == "reading token" else "write"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", case == "offline")
    if case in ("public", "private"):
        hub.repos["user/tiny"] = Repo(private=case == "private")
    # no such run: whoever looked at it first would say so
    arguments = ["export", str(tmp_path / "run"), "--push", request.get("name", "user/tiny")]
    done = CliRunner().invoke(app, [*arguments, *request.get("options", [])])
    assert done.exit_code == 2
    assert re.search(message, " ".join(done.stderr.split())), done.stderr
    assert "hf_" not in done.output.replace("HF_", "")
    assert not [method for method, _ in hub.requests if method in ("POST", "PUT")]


def test_a_hub_that_tells_less_is_good_enough(hub, adapter):
    _, folder = adapter
    for part in ("/api/whoami-v2", "/xet-write-token/"):
        hub.faults[("GET", part)] = 404
    hub.tells_visibility = False
    preflight("user/tiny", token=TOKEN, endpoint=hub.endpoint)
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    preflight("user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert "adapter_model.safetensors" in hub.repos["user/tiny"].branches["main"]


def test_the_token_is_in_no_traceback(hub, adapter):
    _, folder = adapter
    hub.faults[("POST", "/commit/")] = 500
    hub.echo = True  # a server that repeats what it was sent
    endpoint = hub.endpoint.replace("://", "://name:password@")
    with pytest.raises(PushError) as failure:
        push(folder, "user/tiny", token=TOKEN, endpoint=endpoint)
    shown = "".join(traceback.format_exception(failure.value))
    assert "push to user/tiny" in shown
    assert TOKEN not in shown
    assert "password" not in shown


def test_pushing_the_same_again_makes_no_commit(hub, adapter):
    _, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    commits = hub.count("POST", "/commit/")
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.count("POST", "/commit/") == commits == 2  # the adapter and its base


def test_merged_after_adapter_leaves_no_mixture(hub, adapter, tmp_path):
    model, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    hub.repos["user/tiny"].branches["main"]["notes.txt"] = b"mine"
    export_model(model, build_tokenizer(), tmp_path / "merged", format="merged")
    push(tmp_path / "merged", "user/tiny", token=TOKEN, endpoint=hub.endpoint)
    files = hub.repos["user/tiny"].branches["main"]
    assert "adapter_config.json" not in files
    assert not [name for name in files if "adapter_model" in name]
    assert files["notes.txt"] == b"mine"
    again = AutoModelForCausalLM.from_pretrained(download(hub, tmp_path))
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=1e-5)


def test_revision_writes_to_its_own_branch(hub, adapter, tmp_path):
    _, folder = adapter
    push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint, revision="seed-1")
    branches = hub.repos["user/tiny"].branches
    assert branches["main"] == {}
    assert 'snapshot_download("user/tiny", revision="seed-1")' in branches["seed-1"]["README.md"].decode()
    there = download(hub, tmp_path, revision="seed-1")
    assert is_verified(there) is None
    assert (Path(there) / "adapter_model.safetensors").is_file()


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
        (500, "answered with an error .*Push again: posttrain export"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub, adapter, status, message):
    _, folder = adapter
    hub.faults[("POST", "/commit/")] = status
    with pytest.raises(PushError, match=f"failed with {status}: .*{message}"):
        push(folder, "user/tiny", token=TOKEN, endpoint=hub.endpoint)


def test_unreachable_hub(adapter, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("posttrain.export.push.WAITS", ())
    _, folder = adapter
    with HubStandIn() as server:
        endpoint = server.endpoint
    with pytest.raises(PushError, match=r"connection to .* failed"):
        push(folder, "user/tiny", token=TOKEN, endpoint=endpoint)


def test_switched_off_hub(adapter, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, folder = adapter
    with pytest.raises(PushRefusedError, match="unset HF_HUB_OFFLINE"):
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
    with pytest.raises(PushError, match="not a repository name: write user/name"):
        push(folder, "a/b/c", token=TOKEN, endpoint=hub.endpoint)
    monkeypatch.setattr("posttrain.export.push.get_token", lambda: None)
    with pytest.raises(PushError, match="hf auth login"):
        push(folder, "user/tiny", endpoint=hub.endpoint)

"""Weights in files, and the client of a vLLM server that dies: against a stand-in that speaks HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.rl.seams.server import NCCLSync
from posttrain.rollout import server as module
from posttrain.rollout.files import MANIFEST, WeightFiles, read_updates, write_updates
from posttrain.rollout.server import FileClient, ServerSync
from posttrain.rollout.updates import RolloutError, Update

UPDATES = [
    Update("a", torch.Size([2, 3]), torch.arange(6.0).view(2, 3).to(torch.bfloat16)),
    Update("b", torch.Size([4, 4]), torch.tensor([7.0, 8.0]), True, torch.tensor([3, 9], dtype=torch.int32)),
    Update("c", torch.Size([8]), torch.arange(8.0)[::2], True),
]


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_updates_survive_the_way(tmp_path, shard_bytes):
    manifest = write_updates(tmp_path / "new", UPDATES, "r-3", {"b", "a"}, shard_bytes=shard_bytes)
    assert len(list(manifest.parent.glob("*.safetensors"))) == (3 if shard_bytes == 1 else 1)
    version, moving, updates = read_updates(manifest)
    assert (version, moving) == ("r-3", ["a", "b"])
    for found, given in zip(updates, UPDATES, strict=True):
        assert (found.name, found.shape, found.part) == (given.name, given.shape, given.part)
        assert torch.equal(found.values, given.values)
        assert found.values.dtype == given.values.dtype
        assert (found.index is None) == (given.index is None)
        if given.index is not None:
            assert torch.equal(found.index, given.index)


def test_no_manifest_before_everything_is_written(tmp_path):
    def broken():
        yield UPDATES[0]
        raise KeyError("x")

    with pytest.raises(KeyError):
        write_updates(tmp_path / "new", broken(), "r-1", None, shard_bytes=1)
    assert not (tmp_path / "new" / MANIFEST).exists()
    with pytest.raises(RolloutError, match="one folder for trainer and server"):
        read_updates(tmp_path / "new" / MANIFEST)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RolloutError, match="room for one copy"):
        write_updates(tmp_path / "file" / "new", UPDATES, "r-1", None)


def test_a_worker_that_failed_has_no_version(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.rollout.engine.load_updates", lambda *_: None)
    worker = WeightFiles()
    assert worker.posttrain_version() == {"version": ""}
    manifest = str(write_updates(tmp_path / "new", UPDATES, "r-1", None))
    assert worker.posttrain_load(manifest) == {"version": "r-1"} == worker.posttrain_version()
    assert "does not see" in worker.posttrain_load(str(tmp_path / "nothing"))["error"]
    assert worker.posttrain_version() == {"version": ""}


class StandIn:
    """Answers as vLLM's server does, on a port of its own; can be killed and started again."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.loads: list[list[str]] = []
        self.on_request = lambda path, body: 200
        self.port = 0
        self.start()

    def start(self) -> None:
        self.version, stand_in = "", self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(stand_in.on_request(self.path, {}), {"data": [{"id": "m"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
                status = stand_in.on_request(self.path, body)
                if status is None:  # gone in mid-request
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.reply(status, stand_in.answer(self.path, body) if status == 200 else {"why": "no"})

            def reply(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_port
        self.http.handle_error = lambda *_: None  # clients leave
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        self.requests.append((path, body))
        if body.get("method") == "posttrain_load":
            self.version, _, updates = read_updates(Path(body["args"][0]))
            self.loads.append([update.name for update in updates])
        if path == "/collective_rpc":
            return {"results": [{"version": self.version}]}
        if path == "/v1/completions":
            (prompt,) = body["prompt"]
            ids = [prompt[0], body["seed"] % 97]
            logprobs = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-1.0, -2.0]}
            logprobs["top_logprobs"] = [None, None]
            choice = {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs}
            return {"choices": [choice] * body["n"]}
        return {"success": True}


class Stream:
    """Two tensors, one of which trains."""

    moving = frozenset({"b"})
    nbytes = 48

    def everything(self):
        yield Update("a", torch.Size([4]), torch.zeros(4))
        yield Update("b", torch.Size([4]), torch.ones(4))

    def changed(self):
        yield Update("b", torch.Size([4]), torch.ones(4))


@pytest.fixture
def stand_in():
    server = StandIn()
    yield server
    server.stop()


@pytest.fixture
def sync(stand_in, tmp_path, monkeypatch):
    """A sync without TRL's trainer: generation is what ``VLLMGeneration`` does on one rank."""
    monkeypatch.setattr(module, "broadcast_object_list", lambda box, from_process: box)
    monkeypatch.setattr(module, "_HEALTH_EVERY", 0.05)
    monkeypatch.setattr(module, "_HEALTH_TIMEOUT", 0.2)
    client = FileClient(f"http://127.0.0.1:{stand_in.port}")
    client.dtype, client.patience = "float32", 10.0

    def generate(prompts):
        answer = client.generate(prompts=prompts, n=2)
        every = len(answer["completion_ids"]) // 2
        return answer["prompt_ids"], answer["completion_ids"][::2][:every], answer["logprobs"], None

    names = iter(range(100))
    generation = SimpleNamespace(vllm_client=client, generate=generate)
    return ServerSync(
        generation, Stream(), tmp_path / "weights", main=True, name_request=lambda: f"0/{next(names)}"
    )


def test_what_is_sent_and_seeds_of_the_prompts(sync, stand_in, tmp_path):
    sync()
    sync()
    assert stand_in.loads == [["a", "b"], ["b"]]
    assert (sync.count, sync.sent, stand_in.version) == (2, 16, sync.version)
    assert list((tmp_path / "weights").iterdir()) == []
    prompts = [[5], [6], [7]]
    _, ids, *_ = sync.generation.generate(prompts)
    assert [row[0] for row in ids] == [5, 6, 7]
    assert len({row[1] for row in ids}) == 3
    assert sync.generation.generate(prompts)[1] != ids


def test_another_server_gets_everything_before_it_answers(sync, stand_in):
    sync()
    sync()
    stand_in.stop()
    stand_in.start()
    sync.generation.generate([[5]])
    assert stand_in.loads[2:] == [["a", "b"]]
    stand_in.version = "of-another-run-7"
    sync()
    assert stand_in.loads[3:] == [["a", "b"]]


def test_lost_while_it_generates_and_back(sync, stand_in, caplog):
    sync()
    straight = sync.generation.generate([[5], [6]])[1]
    state = {"left": 1}

    def request(path, body):
        if path == "/v1/completions" and state["left"]:
            state["left"] = 0
            stand_in.version = ""  # what comes back has the weights it started with
            return None
        return 200

    stand_in.on_request = request
    sync._name_request = lambda: "0/0"
    assert sync.generation.generate([[5], [6]])[1] == straight
    assert sync.losses == 1
    assert stand_in.loads[-1] == ["a", "b"]
    assert "lost while generating" in caplog.text


def test_lost_while_it_takes_weights(sync, stand_in):
    sync()
    state = {"left": 1}

    def request(path, body):
        if body.get("method") == "posttrain_load" and state["left"]:
            state["left"] = 0
            return None
        return 200

    stand_in.on_request = request
    sync()
    assert stand_in.loads == [["a", "b"], ["a", "b"]]


@pytest.mark.parametrize("phase", ["generating", "comparing weights"])
def test_lost_for_good_names_the_phase(sync, stand_in, phase):
    sync()
    sync.client.patience = 0.3

    def request(path, body):
        if path == "/health" or path == "/v1/completions" or phase == "comparing weights":
            return None if body else 503
        return 200

    stand_in.on_request = request
    began = time.monotonic()
    with pytest.raises(RolloutError, match=f"lost while {phase}.*server_patience=0.3 .*--resume"):
        sync.generation.generate([[5]])
    assert time.monotonic() - began < 10


def test_one_that_keeps_dying_is_given_up(sync, stand_in):
    sync()
    stand_in.on_request = lambda path, body: 500 if path == "/v1/completions" else 200
    with pytest.raises(RolloutError, match="lost 3 times while generating"):
        sync.generation.generate([[5]])


def test_silence_is_a_loss_too(sync, stand_in):
    """A machine without power breaks no connection: it answers nothing any more."""
    sync()
    sync.client.patience = 0.2
    free = threading.Event()

    def request(path, body):
        if path == "/v1/completions":
            stand_in.on_request = lambda *_: free.wait(10)
            free.wait(10)
        return 200

    stand_in.on_request = request
    with pytest.raises(RolloutError, match="has stopped answering"):
        sync.generation.generate([[5]])
    free.set()


def test_a_request_it_refuses_is_no_loss(sync, stand_in):
    sync()
    stand_in.on_request = lambda path, body: 400 if path == "/v1/completions" else 200
    with pytest.raises(RolloutError, match=r"refuses .*400"):
        sync.generation.generate([[5]])


def test_a_server_started_otherwise(sync, monkeypatch):
    info = {"parallel_config": {"worker_extension_cls": ""}}
    info["model_config"] = {"dtype": "torch.bfloat16", "logprobs_mode": "processed_logprobs"}
    monkeypatch.setattr(FileClient, "get_server_info", lambda self: info)
    with pytest.raises(RolloutError, match=r"'bfloat16' and should be 'float32'.*VLLM_SERVER_DEV_MODE=1"):
        sync.client.init_communicator()


@pytest.mark.parametrize("main", [True, False])
def test_over_nccl_everything_is_announced_and_sent(main):
    """TRL's client, of which this is what it is called with; NCCL itself needs two GPUs."""
    sent = []
    client = SimpleNamespace(
        update_named_params=lambda metadata, named: sent.append(
            (metadata, [(n, v.clone()) for n, v in named])
        ),
        reset_prefix_cache=lambda: sent.append("reset"),
    )
    sync = NCCLSync(SimpleNamespace(vllm_client=client), Stream(), main=main)
    sync()
    sync()
    assert (sync.count, sync.sent, sync.share) == (2, 32, 32 / 48)
    if not main:
        assert sent == []
        return
    (metadata, named), reset, *again = sent
    assert metadata == [("a", "float32", [4]), ("b", "float32", [4])]
    assert [name for name, _ in named] == ["a", "b"]
    assert reset == "reset"
    assert again[0][0] == metadata

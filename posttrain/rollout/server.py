"""Rollouts from a vLLM server of its own (``vllm_mode: server``), which may die and come back.

TRL's server mode sends weights over NCCL, so it needs a second GPU. With ``rollout: {weights_dir: FOLDER}``
they go through files instead (:mod:`posttrain.rollout.files`, which has the command that starts the server):
on CPUs, on one GPU beside the trainer's, or across nodes.

Which weights the server has
    Every sync gives them a name, which the server reports. A server that was started again, or that serves
    another run, reports another one; before each generation and each sync the name is compared, and where it
    differs every tensor is sent anew. An answer is never sampled from weights that are not the trainer's.

A server that is lost
    in mid-request shows as a broken connection, or as a ``/health`` that stops answering. The run then waits
    ``rollout.server_patience`` seconds for it to come back (said in the log), sends every tensor and asks
    again; if it does not come back, every rank stops with a message that names the phase. So does a server
    that is lost three times within one request. All ranks decide alike: the main one asks and tells the
    others.

Exact resume
    Each prompt is sampled with a seed of its own, made from the run's seed, the step and the number of the
    request, not from how much the server has sampled before: a run that is resumed, or whose server was
    started again, goes on with the same answers, as far as the server's arithmetic repeats.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Waiting
from pathlib import Path
from typing import Any

import httpx
from accelerate.utils import broadcast_object_list
from trl.generation.vllm_client import VLLMClient

from posttrain.rollout.files import EXTENSION, write_updates
from posttrain.rollout.sync import WeightSync
from posttrain.rollout.updates import RolloutError, WeightStream

logger = logging.getLogger(__name__)

CONCURRENT = 64
"""Requests at a time."""

TRIES = 3
"""How often a server may be lost within one request of the run."""

_HEALTH_EVERY = 5.0
_HEALTH_TIMEOUT = 5.0


class ServerLost(Exception):
    """The connection broke, or the server's engine is dead."""


def start_command(model: str, dtype: str) -> str:
    """Return how a server that takes weights from files is started (the CPU package lacks ``vllm serve``)."""
    return (
        f"VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model {model} "
        f"--dtype {dtype} --logprobs-mode processed_logprobs --worker-extension-cls {EXTENSION}"
    )


class FileClient(VLLMClient):
    """TRL's client of a vLLM server, without NCCL and without silent retries.

    Attributes:
        patience: Seconds to wait for a server that was lost.
        dtype: Type in which the trainer computes, ``"float32"`` for example.
        request: Name from which the seeds of the next request are made, or None for seeds of the server.
    """

    patience: float = 50.0
    dtype: str = ""
    request: str | None = None

    def __init__(
        self,
        base_url: str | None = None,
        host: str = "0.0.0.0",
        server_port: int = 8000,
        group_port: int = 0,
        connection_timeout: float = 0.0,
    ) -> None:
        # TRL's constructor opens a session that repeats a request for a minute; here a lost server is for the
        # caller to see, and a proxy is never asked
        del group_port
        self.base_url = (base_url or f"http://{host}:{server_port}").rstrip("/")
        limits = httpx.Limits(max_connections=CONCURRENT + 2, max_keepalive_connections=CONCURRENT + 2)
        self.session = httpx.Client(timeout=None, limits=limits, trust_env=False)
        self.communicator = None
        self._first(connection_timeout)
        self.model = self._get(f"{self.base_url}/v1/models")["data"][0]["id"]

    def _first(self, seconds: float) -> None:
        start = time.monotonic()
        while not self.alive():
            if time.monotonic() - start > seconds:
                raise RolloutError(
                    f"no vLLM server answers at {self.base_url} after vllm_server_timeout={seconds:g} "
                    f"seconds: start it with {start_command('MODEL', self.dtype or 'TYPE')}"
                )
            time.sleep(1.0)

    def init_communicator(self, device: Any = 0) -> None:
        """Check that the server is one that takes weights from files; nothing is opened.

        Raises:
            RolloutError: It was started otherwise; the message has the command.
        """
        del device
        try:
            info = self.get_server_info()
        except RuntimeError as error:
            raise RolloutError(f"{error} Start it with: {start_command(self.model, self.dtype)}") from error
        found = info["parallel_config"].get("worker_extension_cls")
        dtype = str(info["model_config"]["dtype"]).removeprefix("torch.")
        mode = info["model_config"]["logprobs_mode"]
        wrong = [
            f"{name} is {value!r} and should be {wanted!r}"
            for name, value, wanted in (
                ("--worker-extension-cls", found, EXTENSION),
                ("--dtype", dtype, self.dtype or dtype),
                ("--logprobs-mode", mode, "processed_logprobs"),
            )
            if value != wanted
        ]
        if wrong:
            raise RolloutError(
                f"the vLLM server at {self.base_url} was started otherwise than this run needs it: "
                f"{'; '.join(wrong)}. Start it with: {start_command(self.model, self.dtype or dtype)}"
            )

    # ---- requests ---------------------------------------------------------------------------------------

    def _post(self, url: str, **kwargs: Any) -> Any:
        try:
            response = self.session.post(url, **kwargs)
        except httpx.HTTPError as error:
            raise ServerLost(f"{type(error).__name__} at {url}") from error
        if response.status_code >= 500:
            raise ServerLost(f"{response.status_code} at {url}: {response.text[:500]}")
        if response.status_code != 200:
            raise RolloutError(
                f"the vLLM server refuses {url}: {response.status_code}, {response.text[:2000]}"
            )
        return response.json()

    def alive(self) -> bool:
        """Whether the server answers that it is well."""
        try:
            # a connection of its own: all others may be waiting for answers
            answer = httpx.get(f"{self.base_url}/health", timeout=_HEALTH_TIMEOUT, trust_env=False)
            return answer.status_code == 200
        except httpx.HTTPError:
            return False

    def watched(self, call: Callable[[], Any]) -> Any:
        """Return ``call()``, unless the server stops answering meanwhile.

        Raises:
            ServerLost: It was silent for three checks in a row: a machine that is gone breaks no connection.
        """
        executor, silent = ThreadPoolExecutor(max_workers=1), 0
        try:
            future = executor.submit(call)
            while True:
                try:
                    return future.result(timeout=_HEALTH_EVERY)
                except Waiting:
                    silent = 0 if self.alive() else silent + 1
                    if silent == 3 and not future.done():
                        raise ServerLost(f"{self.base_url} has stopped answering") from None
        finally:
            executor.shutdown(wait=False)

    def wait(self, phase: str, why: str) -> None:
        """Wait for a lost server.

        Raises:
            RolloutError: It did not come back.
        """
        logger.warning(
            "the vLLM server at %s was lost while %s (%s): waiting up to %.0f s for it to come back",
            self.base_url,
            phase,
            why,
            self.patience,
        )
        start = time.monotonic()
        while not self.alive():
            if time.monotonic() - start > self.patience:
                raise RolloutError(
                    f"the vLLM server at {self.base_url} was lost while {phase} ({why}) and did not come "
                    f"back within rollout.server_patience={self.patience:g} seconds. Start it again with: "
                    f"{start_command(self.model, self.dtype)}; then go on from the last checkpoint (--resume)"
                )
            time.sleep(1.0)
        logger.warning("the vLLM server is back after %.0f s", time.monotonic() - start)

    def version(self) -> str:
        """Return the name of the weights the server has; empty for none of ours or different ones."""
        found = {row["version"] for row in self._rpc("posttrain_version")}
        return found.pop() if len(found) == 1 else ""

    def load(self, manifest: Path) -> None:
        """Let every worker take the updates of a manifest, and forget what it computed with the old weights.

        Raises:
            RolloutError: A worker does not take them.
        """
        for row in self._rpc("posttrain_load", str(manifest)):
            if "error" in row:
                raise RolloutError(f"the vLLM server did not take the weights: {row['error']}")
        self.reset_prefix_cache()

    def _rpc(self, method: str, *args: str) -> list[dict[str, str]]:
        body = {"method": method, "args": list(args)}
        answer: list[dict[str, str]] = self.watched(
            lambda: self._post(f"{self.base_url}/collective_rpc", json=body)["results"]
        )
        return answer

    # ---- generation -------------------------------------------------------------------------------------

    def generate(self, prompts: list[Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Generate as TRL's client does, each prompt in a request with a seed of its own."""
        ask: Callable[..., dict[str, Any]] = super().generate
        given = dict(kwargs.pop("generation_kwargs", None) or {})
        features = kwargs.pop("features", None)
        settings = dict(kwargs)
        start = None if "seed" in given else self.request

        def one(number: int) -> dict[str, Any]:
            own = dict(given) if start is None else {**given, "seed": seed_of(start, number)}
            picture = None if features is None else [features[number]]
            return ask([prompts[number]], features=picture, generation_kwargs=own, **settings)

        def everyone() -> list[dict[str, Any]]:
            with ThreadPoolExecutor(max_workers=min(CONCURRENT, len(prompts))) as executor:
                return list(executor.map(one, range(len(prompts))))

        rows = self.watched(everyone)
        joined: dict[str, Any] = {}
        for name in rows[0]:
            lists = [row[name] for row in rows]
            joined[name] = None if lists[0] is None else [entry for each in lists for entry in each]
        return joined


def seed_of(start: str, number: int) -> int:
    """Return a seed below 2**31 for the ``number``-th prompt of a request."""
    return int.from_bytes(hashlib.sha256(f"{start}/{number}".encode()).digest()[:4]) >> 1


class ServerSync(WeightSync):
    """Sync and generation with a server; stands in for both of TRL's on one ``VLLMGeneration``.

    Args:
        generation: TRL's object, in server mode, whose client on the main process is a :class:`FileClient`.
        stream: The weights of the model that trains.
        folder: Where files go.
        main: Whether this is the main process.
        name_request: Returns a name for the next request; the same in a run that is resumed.

    Attributes:
        version: Name of the weights last sent.
        losses: How often the server was lost so far.
    """

    def __init__(
        self,
        generation: Any,
        stream: WeightStream,
        folder: Path,
        *,
        main: bool,
        name_request: Callable[[], str] | None = None,
    ) -> None:
        super().__init__(generation, stream)
        self._name_request = name_request
        self.folder, self.main = folder.expanduser().resolve(), main
        self.run, self.version, self.losses = uuid.uuid4().hex[:12], "", 0
        self._ask: Callable[..., Any] = generation.generate
        self._lost = ""
        if main:
            self._request = generation.vllm_client.generate
            generation.vllm_client.generate = self._answer
        generation.generate = self.generate

    @property
    def client(self) -> FileClient:
        """The client, on the main process."""
        client: FileClient = self.generation.vllm_client
        return client

    def __call__(self) -> None:
        """Send what the server lacks.

        Raises:
            RolloutError: The server does not take some tensor, or was lost and did not come back.
        """
        for _ in range(TRIES):
            if self._everywhere(lambda: self.client.version() != self.version, "comparing weights"):
                self.forget()
            moving = self.stream.moving
            everything = self._everything or not moving <= self._kept
            self.sent = 0
            updates = self._counted(self.stream.everything() if everything else self.stream.changed())
            version = f"{self.run}-{self.count + 1}"
            manifest = self._write(version, updates, moving if everything else None)
            if self._everywhere(functools.partial(self._send, manifest), "sending weights"):
                self.forget()
                continue
            self.version = version
            if everything:
                self._kept = moving
            self._everything = False
            self.count += 1
            for hook in self.on_synced:
                hook(self)
            return
        raise RolloutError(self._often("sending weights"))

    def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Generate as TRL does, from the weights last sent.

        Raises:
            RolloutError: The server was lost and did not come back.
        """
        name = None if self._name_request is None else self._name_request()
        for _ in range(TRIES):
            if self.main:
                self.client.request = name
            if self._everywhere(lambda: self.client.version() != self.version, "comparing weights"):
                logger.warning("the vLLM server has other weights than this run: sending every tensor")
                self.forget()
                self()
            result = self._ask(prompts, *args, **kwargs)
            if len(result[1]) == len(prompts):
                return result
            self._everywhere(lambda: self._waited("generating"), "generating")
        raise RolloutError(self._often("generating"))

    def _answer(self, prompts: list[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Stand in for the client's generation: no answers at all where the server is lost.

        Every rank then sees that it got fewer than it asked for, and they recover together.
        """
        try:
            answer: dict[str, Any] = self._request(prompts, *args, **kwargs)
            return answer
        except ServerLost as error:
            self._lost = str(error)
            return {"prompt_ids": [], "completion_ids": [], "logprobs": None}

    def _send(self, manifest: Path | None) -> bool:
        """Return whether the server was lost meanwhile; it is back then."""
        assert manifest is not None
        try:
            self.client.load(manifest)
        except ServerLost as error:
            self._lost = str(error)
            return self._waited("sending weights")
        finally:
            shutil.rmtree(manifest.parent, ignore_errors=True)
        return False

    def _waited(self, phase: str) -> bool:
        self.losses += 1
        self.client.wait(phase, self._lost)
        return True

    def _write(self, version: str, updates: Any, moving: Any) -> Path | None:
        if self.main:
            return write_updates(self.folder / version, updates, version, moving)
        for _ in updates:  # gathering is collective
            pass
        return None

    def _everywhere(self, ask: Callable[[], Any], phase: str) -> Any:
        """Return on every rank what ``ask`` says on the main one; its failure fails everywhere."""
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = self._asked(ask, phase)
            except RolloutError as error:
                box[1] = str(error)
        broadcast_object_list(box, from_process=0)
        if box[1] is not None:
            raise RolloutError(box[1])
        return box[0]

    def _asked(self, ask: Callable[[], Any], phase: str) -> Any:
        """Return ``ask()``; a server that is lost in it is waited for."""
        for _ in range(TRIES):
            try:
                return ask()
            except ServerLost as error:
                self._lost = str(error)
                self._waited(phase)
        raise RolloutError(self._often(phase))

    def _often(self, phase: str) -> str:
        return (
            f"the vLLM server was lost {TRIES} times while {phase} ({self._lost}): see the server's log; out "
            "of memory is the usual cause (lower --max-num-seqs or --gpu-memory-utilization)"
        )

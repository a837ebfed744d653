"""A vLLM server as the engine: TRL's client is one of ours while its constructor runs, its sync is ours.

With ``weights_dir`` weights go through files (:mod:`posttrain.rollout.server`). Without it TRL's transport,
NCCL, stays, but what travels is our stream: adapters are merged into copies and the base stays bit-identical.
There every tensor goes, every time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl.generation import vllm_generation

from posttrain.rl.seams.vllm import VLLMSeams
from posttrain.rollout.server import FileClient, ServerSync, start_command
from posttrain.rollout.settings import RolloutSettings
from posttrain.rollout.sync import WeightSync, engine_dtype
from posttrain.rollout.updates import RolloutError, WeightStream


class ServerSeams(VLLMSeams):
    """With ``use_vllm`` in server mode, our client and our sync.

    Attributes:
        rollout_settings: The section ``rollout`` of a configuration; set by the subclass before its
        constructor.
    """

    rollout_settings: RolloutSettings = RolloutSettings()
    _requests: tuple[Any, int] = (None, 0)

    @contextlib.contextmanager
    def engine_arguments(self) -> Iterator[None]:
        """Let TRL's constructor make our client in here."""
        upstream: Any = vllm_generation
        original = upstream.VLLMClient
        upstream.VLLMClient = lambda **arguments: self._client(original, arguments)
        try:
            with super().engine_arguments():
                yield
        finally:
            upstream.VLLMClient = original

    def _client(self, original: Any, arguments: dict[str, Any]) -> Any:
        policy: Any = self.accelerator.unwrap_model(self.model)
        dtype = str(engine_dtype(policy, bf16=self.args.bf16, fp16=self.args.fp16)).removeprefix("torch.")
        if self.rollout_settings.weights_dir is None:
            if self.accelerator.device.type == "cpu":
                raise RolloutError(
                    "vllm_mode: server sends weights over NCCL, which a CPU does not have: set "
                    "rollout.weights_dir to a folder that trainer and server see, and start the server with "
                    f"{start_command(policy.name_or_path or 'MODEL', dtype)}"
                )
            return original(**arguments)
        client = FileClient(**arguments)
        client.dtype, client.patience = dtype, self.rollout_settings.server_patience
        return client

    def _request_name(self) -> str:
        """Return a name for the next request that depends on nothing but the run's place in its schedule."""
        place = (self.state.global_step, self.mode)
        self._requests = (place, self._requests[1] + 1 if self._requests[0] == place else 0)
        return f"{self.args.seed}/{place}/{self._requests[1]}"

    def start_sync(self) -> None:
        """Let our sync stand in for TRL's, on this trainer's engine alone."""
        super().start_sync()
        if not self.use_vllm or self.vllm_mode != "server":
            return
        policy: Any = self.accelerator.unwrap_model(self.model)
        dtype = engine_dtype(policy, bf16=self.args.bf16, fp16=self.args.fp16)
        stream = WeightStream(policy, lambda: getattr(self, "selection", None), dtype=dtype)
        generation: Any = self.vllm_generation
        main = self.accelerator.is_main_process
        folder = self.rollout_settings.weights_dir
        if folder is None:
            self.weight_sync = NCCLSync(generation, stream, main=main)
        else:
            self.weight_sync = ServerSync(
                generation, stream, Path(folder), main=main, name_request=self._request_name
            )
        generation.sync_weights = self.weight_sync
        self.weight_sync.on_synced.append(self._log_sync)


class NCCLSync(WeightSync):
    """TRL's sync over NCCL with our stream: every tensor, merged into copies."""

    def __init__(self, generation: Any, stream: WeightStream, *, main: bool) -> None:
        super().__init__(generation, stream)
        self.main = main
        self._metadata: list[tuple[str, str, list[int]]] | None = None

    def __call__(self) -> None:
        """Send every tensor. Collective."""
        if self._metadata is None:
            self._metadata = [
                (update.name, str(update.values.dtype).removeprefix("torch."), list(update.shape))
                for update in self.stream.everything()
            ]
        self.sent = 0
        updates = self._counted(self.stream.everything())
        if self.main:
            client = self.generation.vllm_client
            client.update_named_params(self._metadata, ((update.name, update.values) for update in updates))
            client.reset_prefix_cache()
        else:
            for _ in updates:  # gathering is collective
                pass
        self.count += 1
        for hook in self.on_synced:
            hook(self)

"""The engine that makes rollouts: started with settings that fit the trainer, kept up to date by our sync.

TRL builds the engine in its constructor with arguments of its own choice, and has no place for others. While
that constructor runs, the name it calls is one that adds ours (:func:`engine_arguments`); nothing stays
replaced. Ours are: the type the trainer computes in (vLLM takes bf16 for a float32 checkpoint), the revision,
eager execution on a CPU (where compiling takes half a minute and gains nothing on small models), and random
weights for a model that has no address on disk: the first sync sends all of them anyway.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from trl.generation import vllm_generation
from trl.generation.vllm_generation import empty_cache

from posttrain.rl.seams.batch import BatchSeams
from posttrain.rollout.sync import WeightSync, engine_dtype
from posttrain.rollout.updates import RolloutError, WeightStream

logger = logging.getLogger(__name__)

KV_CACHE_GIB = "1"
"""GiB that the CPU backend sets aside for keys and values, unless VLLM_CPU_KVCACHE_SPACE is set."""


class VLLMSeams(BatchSeams):
    """With ``use_vllm`` in colocate mode, our engine settings and our sync.

    Attributes:
        weight_sync: The sync, or None where vLLM does not generate in this process.
    """

    weight_sync: WeightSync | None = None
    _stream: WeightStream | None = None

    @contextlib.contextmanager
    def engine_arguments(self) -> Iterator[None]:
        """Add our arguments to the engine that TRL's constructor makes in here."""
        if not hasattr(vllm_generation, "LLM"):
            yield  # vLLM is not installed: TRL says so if it is asked for
            return
        upstream: Any = vllm_generation
        original = upstream.LLM

        def start(**arguments: Any) -> Any:
            ours = self._engine(arguments)
            alone = not torch.distributed.is_initialized()
            try:
                engine = original(**ours)
            except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
                raise RolloutError(
                    f"vLLM's engine did not start with {ours['model']}: {error} (memory: lower "
                    f"vllm_gpu_memory_utilization={ours['gpu_memory_utilization']:g} or set "
                    f"vllm_max_model_length, now {ours['max_model_len']}; an architecture that vLLM does not "
                    "know: vllm_model_impl: transformers)"
                ) from error
            # at its end it would destroy the process groups, which are the trainer's as well
            engine.llm_engine.engine_core._finalizer.detach()
            if alone:
                atexit.register(_leave_group)
            return engine

        upstream.LLM = start
        try:
            yield
        finally:
            upstream.LLM = original

    def _engine(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the engine; and refuse what it could never be sent, before it starts."""
        from vllm.platforms import current_platform

        model: Any = self.accelerator.unwrap_model(self.model)
        on_cpu = self.accelerator.device.type == "cpu"
        if current_platform.is_cpu() != on_cpu:
            raise RolloutError(
                f"vLLM is built for {current_platform.device_type}, and the trainer is on "
                f"{self.accelerator.device.type}: install vLLM for the device that trains "
                "(scripts/setup_vllm_cpu.sh for CPUs), or set use_vllm: false"
            )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            raise RolloutError(
                "weights sharded by FSDP 1 cannot be gathered one at a time: set fsdp_version: 2 in the "
                "accelerate configuration"
            )
        dtype = engine_dtype(model, bf16=self.args.bf16, fp16=self.args.fp16)
        self._stream = WeightStream(model, lambda: getattr(self, "selection", None), dtype=dtype)
        arguments |= {"dtype": dtype}
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)
            arguments |= {"enforce_eager": True}
        path = str(arguments["model"])
        if Path(path).is_dir() and path and not any(Path(path).glob("*token*")):
            arguments |= {"tokenizer": self._written(model)}
        if not path or (not Path(path).is_dir() and getattr(model.config, "_commit_hash", None) is None):
            arguments |= {"model": self._written(model), "load_format": "dummy"}
        elif not Path(path).is_dir():
            arguments |= {"revision": model.config._commit_hash}
        return arguments

    def _written(self, model: Any) -> str:
        """Return a folder with configuration and tokenizer of a model that was not loaded from one."""
        folder = self._engine_folder = tempfile.TemporaryDirectory(prefix="posttrain-engine-")
        model.config.save_pretrained(folder.name)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder.name)
        self.processing_class.save_pretrained(folder.name)  # type: ignore[union-attr]
        return folder.name

    def start_sync(self) -> None:
        """Let our sync stand in for TRL's, on this trainer's engine alone."""
        if self._stream is None:
            return
        generation: Any = self.vllm_generation
        self.weight_sync = generation.sync_weights = WeightSync(generation, self._stream)
        self.weight_sync.on_synced.append(self._log_sync)

    def end_rollouts(self) -> None:
        """Give the memory of an engine in this process back; the trainer cannot generate after this."""
        generation: Any = getattr(self, "vllm_generation", None)
        if generation is None or getattr(generation, "llm", None) is None:
            return
        from vllm.distributed import parallel_state

        generation.llm.llm_engine.engine_core.engine_core.model_executor.shutdown()
        generation.llm = None
        # vLLM's own groups; the trainer's stays
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        gc.unfreeze()  # vLLM froze what was there when it started
        gc.collect()
        empty_cache()

    def _log_sync(self, sync: WeightSync) -> None:
        metrics: Any = self._metrics[self.mode]
        metrics["rollout/sync_bytes"].append(float(sync.sent))
        metrics["rollout/sync_share"].append(sync.share)

    def _resync(self) -> None:
        """Make the next generation send every weight: they changed otherwise than by a step."""
        if self.weight_sync is not None:
            self.weight_sync.forget()
            self._last_loaded_step = -1

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._resync()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._resync()


def _leave_group() -> None:
    """Leave the process group of one that vLLM made, as torch asks of a process that ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

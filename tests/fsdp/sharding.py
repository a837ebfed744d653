"""accelerate's own FSDP2 on CPU ranks, where by itself it runs such a configuration as plain DDP."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

#: What ``accelerate launch`` puts into the environment of a process for an FSDP2 configuration.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


@contextlib.contextmanager
def sharded(**options: str) -> Iterator[None]:
    """Have the trainer made inside run accelerate's FSDP2: its wrapping, clipping, gathering and saving.

    accelerate asks for a GPU at one place, when it finds out how the process was launched; past it nothing
    depends on the device. So the answer is put there, and what follows is what runs on GPUs, over gloo.

    Args:
        **options: Settings of the launcher over :data:`LAUNCHED`, such as ``FSDP_STATE_DICT_TYPE``.
    """
    detect = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        detect(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with (
        mock.patch.dict(os.environ, LAUNCHED | options),
        mock.patch.object(AcceleratorState, "__init__", init),
    ):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            if torch.distributed.is_initialized():  # a verb has left the group, and a new one may hang
                PartialState(cpu=True)

"""Parameters that FSDP2 has split over ranks: DTensors, of which every rank holds some rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from posttrain._lazy import torch

RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Set to true by the launcher, it makes transformers load weights on the first rank only."""


class ShardingError(ValueError):
    """What is asked for cannot be trained on weights that are sharded like this."""


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part only."""
    return hasattr(tensor, "full_tensor")


def forward_dtype() -> torch.dtype | None:
    """Return the type to which FSDP2 casts weights while a forward has them together; None for their own."""
    from accelerate.state import AcceleratorState

    policy = getattr(AcceleratorState._shared_state.get("fsdp_plugin"), "mixed_precision_policy", None)
    dtype: torch.dtype | None = getattr(policy, "param_dtype", None)
    return dtype


def rows_here(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the rows that this rank holds, which share the tensor's memory, and the number of the first.

    FSDP2 cuts dimension 0 into as many pieces as ranks, of equal size but for the last ones, which may be
    smaller or empty. A plain tensor is all here.
    """
    if not is_split(tensor):
        return tensor, 0
    split: Any = tensor
    first, rows = 0, split.size(0)
    for place, placement in enumerate(split.placements):
        if placement.is_shard():
            assert placement.dim == 0
            size = -(-rows // split.device_mesh.size(place))
            begin = min(split.device_mesh.get_local_rank(place) * size, rows)
            first, rows = first + begin, min(size, rows - begin)
    here = split.to_local()
    assert here.size(0) == rows
    return here, first


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return all rows, without gradient. Collective where the tensor is split."""
    if not is_split(tensor):
        return tensor.detach()
    split: Any = tensor.detach()
    # an offloaded part has to be where the ranks talk
    whole: torch.Tensor = split.to(split.device_mesh.device_type).full_tensor()
    return whole


def summed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the sum of a number over the ranks that hold parts of ``like``. Collective where it is split."""
    if not is_split(like):
        return value
    from torch.distributed.tensor import DTensor, Partial

    mesh = like.device_mesh  # type: ignore[attr-defined]
    # copies on other dimensions of the mesh (hybrid sharding) count once
    kinds = [Partial() if placement.is_shard() else placement for placement in like.placements]  # type: ignore[attr-defined]
    total: torch.Tensor = DTensor.from_local(value.to(mesh.device_type), mesh, kinds).full_tensor()
    return total


@contextmanager
def before_training(model: Any) -> Iterator[None]:
    """Let a model that nothing has wrapped yet go forward, also where DeepSpeed ZeRO-3 is asked for.

    TRL's fused head asks its weight whether ZeRO-3 has gathered it: one that was loaded whole says yes here,
    and a model that was loaded in pieces is put together. Collective in the latter case.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            yield
        return
    head = model.get_output_embeddings()
    told = [] if head is None else list(head.parameters())
    for parameter in told:
        parameter.ds_status = ZeroParamStatus.AVAILABLE
    try:
        yield
    finally:
        for parameter in told:
            del parameter.ds_status


def same_everywhere(model: torch.nn.Module) -> None:
    """Send the weights of the first rank to the others, which have loaded none; collective.

    Does nothing unless FSDP loads like that.
    """
    from transformers.integrations import is_fsdp_enabled

    if not is_fsdp_enabled():
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast

    device = PartialState().device
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            raise ShardingError("a model on the meta device has no weights to begin with: load them first")
        there = tensor.data.to(device)
        broadcast(there)
        tensor.data.copy_(there)

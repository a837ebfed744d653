"""Models that DeepSpeed ZeRO-3 partitions: loaded whole, trained in pieces, whole again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from posttrain._lazy import torch


def is_partitioned(model: torch.nn.Module) -> bool:
    """Whether parameters are in pieces, which only DeepSpeed's own forward puts together."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def together(
    parameters: Iterable[torch.Tensor | None], *, write: bool = False
) -> AbstractContextManager[Any]:
    """Return a context in which ZeRO-3 has put parameters together; collective where it has cut one up.

    What is together already (a tied weight inside of its owner's forward) is left to who did it.

    Args:
        parameters: Whatever there is; plain ones and None need nothing.
        write: Whether they are written inside; what the first rank has is kept then.
    """
    cut = [p for p in parameters if p is not None and hasattr(p, "ds_status")]
    if not cut:
        return contextlib.nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [p for p in cut if p.ds_status != ZeroParamStatus.AVAILABLE]
    if not missing:
        return contextlib.nullcontext()
    gathering: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        missing, modifier_rank=0 if write else None
    )
    return gathering


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Let transformers load and run whole models inside, also where ZeRO-3 is configured.

    A partitioned model works only once an engine runs it, and a run evaluates, plans and scores before; and
    the ranks of an evaluation do not generate in step.
    """
    from transformers.integrations import deepspeed

    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configured


def put_together(model: Any, engine: Any) -> None:
    """Give a model that an engine has partitioned its whole weights back, on every rank. Collective.

    The engine cannot train it after that.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from trl.models.utils import remove_hooks

    unset_hf_deepspeed_config()
    remove_hooks(engine)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if not hasattr(parameter, "ds_tensor"):
                continue
            if id(parameter) not in made:
                with together([parameter]):
                    value = parameter.detach().clone()
                made[id(parameter)] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def next_trainer() -> None:
    """Let another trainer of this process bring its own DeepSpeed settings; accelerate keeps the first ones.

    A trainer that came before it, such as that of a warm start, cannot go on then.
    """
    from accelerate.state import AcceleratorState, GradientState

    if AcceleratorState._shared_state.get("deepspeed_plugins") is not None:
        GradientState._reset_state()
        AcceleratorState._reset_state()

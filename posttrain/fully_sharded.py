"""What a trainer checks and puts right where accelerate shards with FSDP2.

accelerate's FSDP2 runs beneath TRL's trainers as it is: wrapping, gathering, clipping, checkpoints. Under it

- a configuration that asks for FSDP without GPUs, which accelerate takes for plain DDP, is an error;
- mixed precision leaves what the model returns as it is. accelerate's policy rounds it to 16 bits, and a
  log-probability of -3.8 is then off by up to 0.008: ratios, thresholds and entropies of methods are noise.
  With ``methods=[]`` that stays as TRL has it;
- ``cpu_ram_efficient_loading`` leaves the ranks but the first with memory in place of weights until training
  starts. TRL's reference, adapters that start from weights and selections are made before: models that a
  trainer is given are sent to all ranks first, and what it loads itself is loaded everywhere;
- an LM head that trains beside an adapter (``modules_to_save``) is refused: TRL reads it outside its own
  forward, and FSDP2 then reduces its gradient over no ranks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from peft import PeftModel
from transformers import Trainer

from posttrain.partitioned import is_partitioned, next_trainer, put_together
from posttrain.sharding import RAM_EFFICIENT, ShardingError, gathered, same_everywhere

logger = logging.getLogger(__name__)


class FullySharded(Trainer):
    """Mixin; put it before the TRL trainer in the bases."""

    _active: tuple[Any, ...] = ()
    _skeleton: torch.nn.Module | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for model in _models([*args, *kwargs.values()]):
            same_everywhere(model)
        with _loading_everywhere():
            super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            self._refuse_head_beside_adapter()

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator.

        Raises:
            ShardingError: FSDP is asked for and is not what runs, or methods meet FSDP1.
        """
        next_trainer()
        super().create_accelerator_and_postprocess()
        if RAM_EFFICIENT in os.environ:  # the plugin has written it
            os.environ[RAM_EFFICIENT] = "false"
        asked = bool(self.args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if asked and not self.is_fsdp_enabled:
            kind = self.accelerator.distributed_type.value
            raise ShardingError(
                f"FSDP is asked for, and accelerate runs {kind} instead: it shards on GPUs only, and between "
                "several processes. On this machine use DDP, or DeepSpeed, which shards on CPUs too."
            )
        if not self.is_fsdp_enabled or not self._active:
            return
        names = ", ".join(method.name for method in self._active)
        if not self.accelerator.is_fsdp2:
            raise ShardingError(
                f"{names} cannot go with FSDP1, which flattens weights: set fsdp_version to 2"
            )
        plugin: Any = self.accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy
        if policy is not None and policy.output_dtype is not None:
            logger.info("what the model returns is not rounded to %s, for %s", policy.output_dtype, names)
            plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser, without empty groups: a sharded checkpoint forgets their settings."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2 and self.model is self.model_wrapped:
            self._skeleton = skeleton(self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as a plain one; for checkpoints of shards, transformers' own way is left alone."""
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or _internal_call or "FULL" in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
            return
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type("SHARDED_STATE_DICT")

    def plain_model(self) -> Any:
        """Return the model without wrappers; what is sharded is put together, on every rank. Collective.

        Under FSDP2 that is another model then, in the types that the weights had before training; under
        ZeRO-3 the engine cannot go on.
        """
        policy: Any = self.accelerator.unwrap_model(self.model)
        if is_partitioned(policy) and self.model_wrapped is not policy:
            put_together(policy, self.model_wrapped)
        if self._skeleton is None:
            return policy
        bones, self._skeleton = self._skeleton, None
        sharded = dict(fsdp2_canonicalize_names(dict(policy.named_parameters())))
        names = {parameter: name for name, parameter in bones.named_parameters()}
        made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for module in bones.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if parameter not in made:
                    value = gathered(sharded[names[parameter]]).to(parameter.dtype)
                    made[parameter] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
                module._parameters[attribute] = made[parameter]
        return bones.to(self.args.device)

    def _refuse_head_beside_adapter(self) -> None:
        model: Any = self.model
        if not isinstance(model, PeftModel):
            return
        head = model.get_output_embeddings()
        trained = [] if head is None else [n for n, p in head.named_parameters() if p.requires_grad]
        if trained:
            raise ShardingError(
                f"the LM head trains beside the adapter ({trained[0]}), and under FSDP its gradient would be "
                "that of one rank: leave it out of modules_to_save and target_modules, or launch with DDP or "
                "DeepSpeed"
            )


def skeleton(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model whose parameters are on the meta device, without TRL's forward."""
    memo: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    bones = copy.deepcopy(model, memo)
    for module in bones.modules():
        module.__dict__.pop("forward", None)
    return bones


def _models(values: Iterable[Any]) -> Iterator[torch.nn.Module]:
    for value in values:
        if isinstance(value, torch.nn.Module):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _models(value)


@contextlib.contextmanager
def _loading_everywhere() -> Iterator[None]:
    """Load what is loaded inside on every rank."""
    before = os.environ.get(RAM_EFFICIENT)
    try:
        if before is not None:
            os.environ[RAM_EFFICIENT] = "false"
        yield
    finally:
        if before is not None:
            os.environ[RAM_EFFICIENT] = before

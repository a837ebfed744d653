"""How a vLLM model takes updates, tensor by tensor; runs where the model is (a vLLM worker).

vLLM's ``load_weights`` maps names of a checkpoint onto fused and sharded parameters, and takes a single
tensor as well as all of them. On a GPU that is all there is to it.

On CPU
    the backend packs the weight of each linear layer into a format of its own after loading and throws the
    weight away, so that nothing can be loaded into it any more. Here the weights of the layers that can
    change stay (:meth:`EngineWeights.load`, ``moving``), take the update, and are packed again: twice the
    memory for those layers, and no neighbours of a fused tensor (q, k, v) have to be sent along. Where the
    embeddings are tied, the head is a layer of its own with its own packed copy of the same tensor, and is
    packed again too; with vLLM's own reload it keeps the old one, and the gap to the trainer grows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from posttrain.rollout.updates import RolloutError, Update


class EngineWeights:
    """The weights of one vLLM model.

    Args:
        model: The vLLM model; unquantised.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._index: dict[str, torch.Tensor] = {}
        self._kept: set[nn.Module] = set()

    @torch.no_grad()
    def load(self, updates: Iterable[Update], moving: Collection[str] | None = None) -> None:
        """Take ``updates``.

        Args:
            updates: Every tensor of the checkpoint if ``moving`` is given; else some of those in ``moving``
                of the last such call.
            moving: Names that later calls may have updates of.

        Raises:
            RolloutError: vLLM has no tensor of some name, or one of a name not in ``moving`` comes later.
        """
        everything = moving is not None
        if everything:
            self._index = {}
            for layer in _packed_layers(self.model):
                _restore(layer)
        touched: set[nn.Module] = set()
        kept: set[nn.Module] = set()
        for update in updates:
            layers = self._layers(self._take(update), update.name)
            touched |= layers
            if everything and update.name in (moving or ()):
                kept |= layers
        if everything:
            self._kept = self._with_same_tensor(kept)
        for layer in self._with_same_tensor(touched):
            _pack(layer, keep=layer in self._kept)

    def _take(self, update: Update) -> set[str]:
        """Load one update, and return the names of vLLM's parameters that took it."""
        try:
            if not update.part:
                loaded = self.model.load_weights([(update.name, update.values)])  # type: ignore[operator]
            else:
                if update.index is not None:
                    self._index[update.name] = update.index
                loaded = _load_part(self.model, update, self._index[update.name])
        except (AttributeError, KeyError, ValueError, RuntimeError) as error:
            raise RolloutError(
                f"vLLM's {type(self.model).__name__} does not take {update.name} "
                f"{list(update.shape)}: {error}"
            ) from error
        if not loaded:
            raise RolloutError(
                f"vLLM's {type(self.model).__name__} has no place for {update.name}: its implementation of "
                "this architecture differs; try vllm_model_impl: transformers"
            )
        return set(loaded)

    def _layers(self, names: Iterable[str], tensor: str) -> set[nn.Module]:
        modules = [self.model.get_submodule(name.rpartition(".")[0]) for name in names]
        gone = [module for module in modules if _is_packed(module)]
        if gone:
            raise RolloutError(
                f"{tensor} was said to stay as it is, and its weight is not kept: send everything"
            )
        return set(modules)

    def _with_same_tensor(self, layers: set[nn.Module]) -> set[nn.Module]:
        """Return ``layers`` and those that share a tensor with them: the head, where embeddings are tied."""
        tensors = {id(weight) for layer in layers if (weight := layer._parameters.get("weight")) is not None}
        return layers | {m for m in self.model.modules() if id(m._parameters.get("weight")) in tensors}


def load_updates(worker: Any, updates: Iterable[Update], moving: Collection[str] | None = None) -> None:
    """Let a vLLM worker's model take ``updates`` (:class:`EngineWeights`); for ``LLM.collective_rpc``."""
    weights = getattr(worker, "_posttrain_weights", None)
    if weights is None:
        weights = worker._posttrain_weights = EngineWeights(worker.model_runner.get_model())
    weights.load(updates, moving)


def _load_part(model: nn.Module, update: Update, index: torch.Tensor) -> Collection[str]:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    values = update.values
    patch = CheckpointWeightPatch(update.name, tuple(update.shape), values.dtype, values, index)
    loaded: Collection[str] = load_checkpoint_weight_patches(model, [patch], validate_unique_indices=False)
    return loaded


def _packed_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if _is_packed(layer)]


def _is_packed(layer: nn.Module) -> bool:
    """Whether the CPU backend has packed the weight of a layer and thrown it away."""
    weight = layer._parameters.get("weight")
    return hasattr(layer, "cpu_linear") and weight is not None and weight.numel() == 0


def _restore(layer: nn.Module) -> None:
    """Give a packed layer a weight that can be loaded into, with its loader; its content is undefined."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    parameters, _ = get_layerwise_info(layer).restore_metadata
    layer.register_parameter(
        "weight", restore_layer_refs(materialize_meta_tensor(parameters["weight"]), layer)
    )


def _pack(layer: nn.Module, *, keep: bool) -> None:
    """Pack the weight of a layer of the CPU backend again; nothing elsewhere."""
    if not hasattr(layer, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    # embeddings are read as they are
    keep = keep or isinstance(layer, VocabParallelEmbedding)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=not keep)

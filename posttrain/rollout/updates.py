"""What an engine has to be told after an optimiser step: the weights that can have changed, one at a time.

What is sent
    ==========================  ============================================================================
    in the trainer              in the stream
    ==========================  ============================================================================
    frozen tensor               nothing, after the first time
    tensor that trains          the tensor
    packed selection            its ``(k,)`` values; their positions once
    masked selection            the same of a dense tensor
    adapter on a layer          the weight of that layer with the adapter merged into a copy
    ``modules_to_save``         the tensors of the trained copy, under the name of the original
    ==========================  ============================================================================

    :meth:`WeightStream.everything` begins, and begins again where an engine may have other weights than the
    stream remembers (a resumed run, a restarted server). Names are those of a checkpoint of the plain model.

The base is never touched
    TRL merges adapters into the base and takes them out again, which rounds each time: in bf16 the base
    drifts. Here the layer is copied (one at a time, freed when the consumer asks for the next one) and PEFT
    merges into the copy, so whatever PEFT can merge (LoRA, rsLoRA, DoRA, LoHa, OFT, ...) is right by its own
    definition, and the base stays bit-identical.

Why not A and B alone
    vLLM can serve adapters, which would be less to send. It then multiplies by A and B at every token, takes
    ranks and layers of its choice, and neither DoRA nor ``modules_to_save`` nor other adapters; and where
    engine and trainer share a process, nothing crosses a wire. What is sent is what changes in the engine.

Sharded weights
    A tensor of ZeRO-3 or FSDP2 is gathered for as long as it is in the consumer's hands; of an adapted layer,
    the tensors of that layer. Gathering is collective: every rank has to go through the whole stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel, PromptLearningConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from posttrain.partitioned import together
from posttrain.selection.apply import is_packed_name
from posttrain.sharding import gathered

if TYPE_CHECKING:
    from posttrain.selection.apply import Selection

# Wrappers of activation checkpointing and torch.compile, which are in names but not in checkpoints.
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


class RolloutError(RuntimeError):
    """Weights that cannot be handed to an engine; the message says which, and what to do."""


@dataclass(frozen=True, eq=False)
class Update:
    """New values of one tensor of the checkpoint.

    Attributes:
        name: Its name.
        shape: Its shape.
        values: The tensor itself, or (k,) values of it if ``part``.
        part: Whether only some scalars are given.
        index: (k,) int32 or int64 flat positions of them; None for the positions given last time.
    """

    name: str
    shape: torch.Size
    values: torch.Tensor
    part: bool = False
    index: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)


class WeightStream:
    """The weights of a training model, in the order in which its modules are walked.

    Args:
        model: The unwrapped model; a PEFT model or a plain one.
        selection: Returns the selection in force, or None.
        dtype: Type in which tensors leave, where theirs is wider; None for their own.

    Raises:
        RolloutError: The model is quantised, its adapter is a prompt, or an adapter unties tied embeddings.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Callable[[], Selection | None] = lambda: None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.dtype = model, dtype
        self._selection = selection
        self._index: dict[str, torch.Tensor] = {}
        self._moving: set[str] = set()
        _refuse(model)

    @property
    def moving(self) -> frozenset[str]:
        """Names of the tensors that can change from now on."""
        return frozenset(name for name, source in self._walk() if self._moves(source))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model, as :meth:`everything` sends it."""
        return sum(
            shape.numel() * min(dtype.itemsize, (self.dtype or dtype).itemsize)
            for shape, dtype in (_shape_and_type(source) for _, source in self._walk())
        )

    @torch.no_grad()
    def everything(self) -> Iterator[Update]:
        """Yield every tensor whole."""
        self._begin()
        self._index, self._moving = {}, set(self.moving)
        for name, source in self._walk():
            yield from self._whole(name, source)

    @torch.no_grad()
    def changed(self) -> Iterator[Update]:
        """Yield what can have changed since the last call of this or of :meth:`everything`."""
        self._begin()
        moving = self.moving
        before, self._moving = self._moving, set(moving)
        for name, source in self._walk():
            # a tensor that was frozen in between has moved until then
            if name not in moving and name not in before:
                continue
            index = self._positions(source)
            known = self._index.pop(name, None)
            if index is None:
                yield from self._whole(name, source)
            elif known is not None and len(index) < len(known):
                # what a selection dropped may have moved before it did
                yield from self._whole(name, source)
            elif len(index):
                same = known is not None and (known is index or torch.equal(known, index.to(known.device)))
                self._index[name] = index
                yield from self._part(name, source, index, None if same else index)

    def _begin(self) -> None:
        selection = self._selection()
        if selection is not None:
            selection.refresh()

    # ---- what there is ----------------------------------------------------------------------------------

    def _walk(self) -> Iterator[tuple[str, _Source]]:
        model: Any = self.model
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        selection = self._selection()
        packed = {} if selection is None else {id(one.weight): one for one in selection.packed.values()}
        positions = {} if selection is None else selection.positions
        seen: set[int] = set()
        for name, owner, attribute in _tensors(plain):
            if isinstance(owner, BaseTunerLayer):
                parameter = owner.get_base_layer()._parameters[attribute]
            else:
                parameter = owner._parameters[attribute]
            assert parameter is not None
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield (
                name,
                _Source(owner, attribute, parameter, packed.get(id(parameter)), positions.get(parameter)),
            )

    def _moves(self, source: _Source) -> bool:
        if source.merged:
            return any(parameter.requires_grad for parameter in source.owner.parameters())
        return source.parameter.requires_grad or source.packed is not None

    def _positions(self, source: _Source) -> torch.Tensor | None:
        if source.merged:
            return None
        return source.packed.index if source.packed is not None else source.positions

    # ---- what leaves ------------------------------------------------------------------------------------

    def _whole(self, name: str, source: _Source) -> Iterator[Update]:
        if source.merged:
            yield from self._merged(name, source)
            return
        packed = source.packed
        with together([source.parameter] if packed is None else [source.parameter, packed.values]):
            values = gathered(source.parameter)
            if packed is not None and packed.composed:
                values = packed.whole(values, gathered(packed.values))
            yield Update(name, values.shape, self._cast(values))

    def _part(
        self, name: str, source: _Source, index: torch.Tensor, new: torch.Tensor | None
    ) -> Iterator[Update]:
        weight, packed = source.parameter, source.packed
        shape, dtype = _shape_and_type(source)
        if packed is None:
            yield Update(
                name, shape, self._cast(weight.detach().view(-1)[index.to(weight.device).long()]), True, new
            )
            return
        with together([packed.values]):
            yield Update(name, shape, self._cast(gathered(packed.values).to(dtype)), True, new)

    def _merged(self, name: str, source: _Source) -> Iterator[Update]:
        """Yield one tensor of an adapted layer, from a copy of the layer into which PEFT merged."""
        layer, attribute = source.owner, source.attribute
        with together(layer.parameters()):
            base = layer.get_base_layer()
            owned = {id(parameter) for parameter in base.parameters()}
            twin: Any = _twin(layer, lambda p: gathered(p).clone() if id(p) in owned else gathered(p))
            for part in twin.modules():
                if isinstance(part, BaseTunerLayer):
                    part.merge(safe_merge=False)
            values = twin.get_base_layer()._parameters[attribute].detach()
            yield Update(name, values.shape, self._cast(values))

    def _cast(self, values: torch.Tensor) -> torch.Tensor:
        narrower = self.dtype is not None and values.is_floating_point()
        return values.to(self.dtype) if narrower and self.dtype.itemsize < values.itemsize else values  # type: ignore[union-attr]


class _Source(NamedTuple):
    """Where a tensor of the checkpoint comes from."""

    owner: Any
    attribute: str
    parameter: nn.Parameter
    packed: Any
    positions: torch.Tensor | None

    @property
    def merged(self) -> bool:
        """Whether an adapter changes it."""
        layer = self.owner
        if not isinstance(layer, LoraLayer):
            return isinstance(layer, BaseTunerLayer)
        biased = self.attribute == "bias" and any(layer.lora_bias.values())
        # adapters on parameters of a module (experts) are stacked, one for each parameter
        targets = {getattr(part, "parameter_name", "weight") for part in self.owner.modules()}
        return biased or self.attribute in targets


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (name in a checkpoint, owner, attribute); the owner of an adapted tensor is the adapted layer."""
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    elif isinstance(module, ModulesToSaveWrapper):
        if module.active_adapters:
            (name,) = module.active_adapters
            module = module.modules_to_save[name]
        else:
            module = module.original_module
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise RolloutError(f"{prefix.rstrip('.')}: a {type(module).__name__} of PEFT has no plain weights")
    if isinstance(module, BaseTunerLayer):
        yield from ((prefix + name, module, name) for name in _own(module.get_base_layer()))
        return
    yield from ((prefix + name, module, name) for name in _own(module))
    for name, child in module.named_children():
        yield from _tensors(child, prefix if name in _WRAPPERS else f"{prefix}{name}.")


def _own(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None and not is_packed_name(name)]


def _twin(module: nn.Module, take: Callable[[nn.Parameter], torch.Tensor]) -> nn.Module:
    """Return a copy of a module tree with other tensors; what PEFT writes down while it merges is its own."""
    twin = object.__new__(type(module))
    twin.__dict__.update(
        {
            key: copy.copy(value) if isinstance(value, (dict, list, set)) else value
            for key, value in module.__dict__.items()
        }
    )
    twin.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(take(p), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, take) for name, child in module._modules.items()
    }
    return twin


def _shape_and_type(source: _Source) -> tuple[torch.Size, torch.dtype]:
    parameter: Any = source.parameter
    return getattr(parameter, "ds_shape", parameter.shape), parameter.dtype


def _refuse(model: Any) -> None:
    if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in model.parameters()):
        raise RolloutError(
            "the model is quantised, and vLLM cannot take merged weights of such a one: load it unquantised "
            "(in bf16), or set use_vllm: false"
        )
    if not isinstance(model, PeftModel):
        return
    if any(isinstance(config, PromptLearningConfig) for config in model.peft_config.values()):
        raise RolloutError(
            "an adapter that trains a prompt has no weights that vLLM could take: use LoRA, or set "
            "use_vllm: false"
        )
    plain: Any = model.get_base_model()
    if not getattr(plain.config, "tie_word_embeddings", False):
        return
    ends = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    named = {id(module): name for name, module in plain.named_modules()}
    adapted = [named.get(id(end), "?") for end in ends if isinstance(end, BaseTunerLayer)]
    if adapted:
        raise RolloutError(
            f"an adapter on {adapted[0]} gives input and output embeddings different weights, and this model "
            "ties them: vLLM has one tensor for both. Leave the embeddings out of target_modules (or train "
            "them whole in modules_to_save), or set use_vllm: false"
        )
    trained = [
        end.modules_to_save[end.active_adapters[0]]
        for end in ends
        if isinstance(end, ModulesToSaveWrapper) and end.active_adapters
    ]
    if trained and (len(trained) == 1 or trained[0].weight is not trained[1].weight):
        raise RolloutError(
            "modules_to_save trains one of two tied embeddings by itself, and vLLM has one tensor for both: "
            "set ensure_weight_tying=True in the LoraConfig, or use_vllm: false"
        )

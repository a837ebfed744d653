r"""Packed values: only the selected scalars of a tensor are parameters; the rest cannot move.

Idea
    Of a tensor W (frozen) with selected flat positions ``index`` (k,), a parameter ``values`` (k,) in fp32
    holds the *absolute* weights. Gradients, optimiser state, all-reduce and clipping are those of ``values``:
    memory follows the budget. Weight decay on it pulls towards 0, see :func:`pull_to_base` for the other
    choice.

In place (the default)
    W holds ``values`` cast to its type at all times, so the model is always the trained model. Whoever reads
    ``module.weight`` while gradients are recorded (a linear layer, an embedding, a fused LM head, a tied
    head) gets W itself, and the backward hands on ``dL/dW.flatten()[index]``: one dense gradient of one
    tensor exists at a time, and nothing is saved beyond what a dense layer saves. After an optimiser step
    ``values`` is written into W at the next read, by its version counter.

Composed
    W stays the base, and a read gives W with ``values`` put in, out of place. For sharded weights
    (ZeRO-3, FSDP2), where a write into a gathered W is lost. ``values`` are then sharded as every parameter.
    Costs one copy of a tensor per read until its backward.

How a read is noticed
    The module that owns the tensor gets a class of its own, a subclass of its class with ``weight`` as a
    property; ``state_dict`` and ``named_parameters`` keep the name and have ``weight_selected`` beside it.
    ``Packed.remove`` undoes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from posttrain.selection.plan import PlanError, TensorSelection
from posttrain.sharding import gathered, is_split, rows_here

SUFFIX = "_selected"
"""What a packed parameter's name has after the tensor's."""

_RECORDS = "_posttrain_packed"


class _InPlace(torch.autograd.Function):
    """Read W; the gradient of the selected scalars goes to ``values``."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, values: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed, ctx.dtype = packed, values.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        # an optimiser will change the values now, and fused ones do not count it as a new version
        ctx.packed.stale = True
        return None, grads[0].reshape(-1).index_select(0, ctx.packed.index).to(ctx.dtype), None


class _Composed(torch.autograd.Function):
    """W with ``values`` put in, as a new tensor."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, values: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed, ctx.dtype = packed, values.dtype
        out = weight.detach().clone(memory_format=torch.contiguous_format)
        out.view(-1)[packed.index] = values.to(out.dtype)
        return out

    backward = _InPlace.backward


@dataclass(eq=False)
class Packed:
    """One packed tensor.

    Attributes:
        index: (k,) sorted flat positions, on the device of the weight.
        base: (k,) the weights at these positions before training, in the type of the weight.
        composed: Whether W stays the base.
        original: With FSDP2 to come, W as it was packed; while a module has it, or its part of a W that is
            split, reads give that itself: the values are those of W, and FSDP2 looks for it.
        places: (module, attribute) of the tensor; several where it is tied.
        stale: Whether W may be behind ``values``.
    """

    index: torch.Tensor
    base: torch.Tensor
    composed: bool = False
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    stale: bool = True
    original: weakref.ref[nn.Parameter] | None = None
    _written: int = -1

    def read(self, weight: nn.Parameter) -> torch.Tensor:
        """Return what a module sees as its weight."""
        if self.original is not None and (is_split(weight) or weight.is_meta or self.original() is weight):
            return weight
        if self.index.device != weight.device:
            self.index, self.base = self.index.to(weight.device), self.base.to(weight.device)
        if self.composed:
            # read where they live: ZeRO-3 then gathers them for a tied weight's other module too
            whole: torch.Tensor = _Composed.apply(weight, self.values, self)
            if hasattr(weight, "ds_status"):  # TRL asks an LM head under ZeRO-3 whether it has to be gathered
                whole.ds_status = type(weight.ds_status).AVAILABLE  # type: ignore[attr-defined]
            return whole
        self.write(weight)
        if not torch.is_grad_enabled() or not self.values.requires_grad:
            return weight
        return _InPlace.apply(weight, self.values, self)

    @torch.no_grad()
    def write(self, weight: nn.Parameter, *, always: bool = False) -> None:
        """Bring W up to date with ``values``, if they may have changed since the last time or ``always``."""
        changed = self._written != self.values._version
        if always or self.stale or changed:
            # a read while a backward runs (recomputation of shared layers) writes what is there already, and
            # must not count as a change of W to the rest of that backward: .data has no version
            target = weight.detach() if always or changed else weight.data
            if is_split(target):
                self._write_rows(target)
            else:
                target.view(-1)[self.index] = self.values.to(weight.dtype)
            self._written, self.stale = self.values._version, False

    def _write_rows(self, weight: torch.Tensor) -> None:
        """Write what falls into this rank's rows of W; the values are gathered for it."""
        values = gathered(self.values)
        rows, first = rows_here(weight)
        flat = rows.reshape(-1)
        assert flat.data_ptr() == rows.data_ptr()
        start = first * weight.stride(0)
        low, high = torch.searchsorted(
            self.index,
            torch.tensor([start, start + flat.numel()], device=self.index.device, dtype=self.index.dtype),
        ).tolist()
        flat[self.index[low:high] - start] = values[low:high].to(flat)

    @torch.no_grad()
    def whole(self, weight: torch.Tensor | None = None, values: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``weight`` with ``values`` put in (its own unless others are given), as a new tensor."""
        weight = self.weight if weight is None else weight
        values = self.values if values is None else values
        out = weight.detach().clone(memory_format=torch.contiguous_format)
        out.view(-1)[self.index.to(out.device)] = values.detach().to(out)
        return out

    @property
    def values(self) -> nn.Parameter:
        """The parameter that trains, (k,) fp32 (float64 for float64 weights); FSDP2 replaces it."""
        module, attribute = self.places[0]
        values = module._parameters[attribute + SUFFIX]
        assert values is not None
        return values

    @property
    def weight(self) -> nn.Parameter:
        """The tensor W itself."""
        module, attribute = self.places[0]
        weight = module._parameters[attribute]
        assert weight is not None
        return weight

    @torch.no_grad()
    def keep(self, places: torch.Tensor) -> None:
        """Go on with a part of the values, by their sorted places; the others stay in W as they are."""
        self.write(self.weight, always=True)
        self.values.grad = None
        self.values.data = self.values.data[places.to(self.values.device)]
        places = places.to(self.index.device)
        self.index, self.base, self.stale = self.index[places], self.base[places], True

    @torch.no_grad()
    def changed(self) -> torch.Tensor:
        """Return how many selected scalars differ from the base in the type of the weight; of this rank's."""
        values, base = self._with_base()
        return (values.to(base.dtype) != base).sum()

    def _with_base(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values that this rank holds, and the base at the same places."""
        values, first = rows_here(self.values.detach())
        return values, self.base[first:][: len(values)].to(values.device)

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """See :func:`pull_to_base`."""
        values, base = self._with_base()
        values.lerp_(base.to(values), strength)

    @torch.no_grad()
    def remove(self) -> None:
        """Leave the plain model with the trained weights; ``values`` is no longer part of it."""
        self.write(self.weight, always=True)
        for module, attribute in self.places:
            records = module.__dict__[_RECORDS]
            del records[attribute]  # the property stays on a class that copies of the model may share
            module._parameters.pop(attribute + SUFFIX, None)
            if not records:
                # FSDP2 puts a class of its own on top, which has to stay
                if attribute in vars(type(module)):
                    module.__class__ = type(module).__bases__[0]
                del module.__dict__[_RECORDS]


def pack(
    places: list[tuple[nn.Module, str]],
    selection: TensorSelection,
    *,
    composed: bool = False,
    split_later: bool = False,
) -> Packed:
    """Make the selected scalars of one tensor a parameter of the module that owns it.

    Args:
        places: (module, attribute) of the tensor; the first one gets the parameter ``ATTRIBUTE_selected``.
        selection: What trains of it.
        composed: See the module page.
        split_later: Whether FSDP2 will split the tensor.

    Raises:
        PlanError: The tensor is not floating-point, not contiguous, or packed already.
    """
    owner, attribute = places[0]
    weight = owner._parameters[attribute]
    assert weight is not None
    if not weight.is_floating_point():
        raise PlanError(
            f"{attribute} of {type(owner).__name__} has type {weight.dtype}: quantised weights cannot be "
            "trained scalar by scalar. Load the model unquantised, or select among the scalars of an adapter."
        )
    if not weight.is_contiguous():
        raise PlanError(f"{attribute} of {type(owner).__name__} is not contiguous; call .contiguous() on it")
    if attribute in owner.__dict__.get(_RECORDS, {}):
        raise PlanError(
            f"{attribute} of {type(owner).__name__} is packed already: remove that selection first"
        )
    index = selection.flat().to(weight.device)
    base = weight.detach().view(-1)[index]
    values = nn.Parameter(base.to(torch.promote_types(weight.dtype, torch.float32)).clone())
    weight.requires_grad_(False)
    weight.grad = None
    owner.register_parameter(attribute + SUFFIX, values)
    packed = Packed(index, base.clone(), composed, places)
    if split_later:
        packed.original = weakref.ref(weight)
    for module, name in places:
        _own_class(module)
        setattr(type(module), name, _property(name))
        module.__dict__[_RECORDS][name] = packed
    return packed


def pull_to_base(packed: Packed, strength: float) -> None:
    """Decay ``values`` towards the base instead of 0: values -= strength * (values - base)."""
    packed.pull(strength)


def packed_tensors(model: nn.Module) -> Iterator[Packed]:
    """Yield what is packed in a model, once each."""
    seen: set[int] = set()
    for module in model.modules():
        for packed in module.__dict__.get(_RECORDS, {}).values():
            if id(packed) not in seen:
                seen.add(id(packed))
                yield packed


def _own_class(module: nn.Module) -> None:
    if _RECORDS not in module.__dict__:
        cls = type(module)
        module.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        module.__dict__[_RECORDS] = {}


def _property(name: str) -> property:
    def get(self: nn.Module) -> torch.Tensor:
        weight = self._parameters[name]
        assert weight is not None
        packed: Packed | None = self.__dict__.get(_RECORDS, {}).get(name)
        return weight if packed is None else packed.read(weight)

    def set_(self: nn.Module, value: Any) -> None:
        # tying again hands a module the tensor it has
        if value is self._parameters[name]:
            return
        raise AttributeError(
            f"{name} of {type(self).__name__} is packed, and cannot be replaced: remove the selection first"
        )

    return property(get, set_)

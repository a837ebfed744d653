"""Enforce a plan on a model: which backend, what is trainable, and how to undo it.

=========  ============================================================================================
backend    what it does
=========  ============================================================================================
freeze     whole tensors train or do not; no gradient, state or reduction for the others
packed     the selected scalars of a tensor are a parameter, written into the weight after each step
composed   the same, put into the weight out of place at each read; for weights that ZeRO-3 or FSDP2 shard
masked     dense gradients, :class:`~posttrain.selection.adamw.SelectiveAdamW` moves the selected scalars;
           for selections that change at every step, or that hold most of a tensor
=========  ============================================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, get_args

import torch
from torch import nn

from posttrain.partitioned import together
from posttrain.selection.adamw import SelectiveAdamW
from posttrain.selection.packed import SUFFIX, Packed, pack
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection
from posttrain.selection.settings import Backend
from posttrain.sharding import summed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger(__name__)

DENSE_FROM = 0.7
"""Density from which packed values (20 bytes each) take more memory than dense gradients and state."""


@dataclass(eq=False)
class Selection:
    """A plan that is in force.

    Attributes:
        model: The model.
        start: The plan it began with.
        backend: Which one enforces it.
        packed: Packed tensors by the name of the weight (packed, composed).
        positions: Flat positions by parameter (masked).
    """

    model: nn.Module
    start: SelectionPlan
    backend: str
    packed: dict[str, Packed] = field(default_factory=dict)
    positions: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    _trainable_before: dict[str, bool] = field(default_factory=dict)
    _plan: SelectionPlan | None = None

    @property
    def plan(self) -> SelectionPlan:
        """What may move now, with the hashes of the weights before training."""
        if self._plan is None:
            moving = {
                name: TensorSelection.elements(p.shape, self.positions[p])
                for name, p in self.model.named_parameters()
                if p in self.positions
            }
            tensors = {name: moving.get(name, part) for name, part in self.start.tensors.items()}
            hashes = {n: h for n, h in self.start.hashes.items() if tensors[n].kind != "none"}
            self._plan = replace(self.start, tensors=tensors, hashes=hashes)
        return self._plan

    def select(self, parameter: nn.Parameter, index: torch.Tensor) -> None:
        """Note what of a dense parameter moves from now on; the optimiser is told by the caller."""
        self.positions[parameter], self._plan = index, None

    def shrink(self, plan: SelectionPlan, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on with a part of what moves: it keeps its state, and the rest stays as it is now.

        Args:
            plan: Selects nothing that does not move now.
            optimizer: Whose state and groups follow; None before there is one.

        Raises:
            PlanError: The plan selects more, or what moves whole cannot shrink (see ``shrinks`` of apply).
        """
        names = dict(self.model.named_parameters())
        before = self.plan
        for name, part in plan.tensors.items():
            old = before.tensors[name]
            if part == old:
                continue
            if old.kind != "none" and name not in self.packed and names[name] not in self.positions:
                raise PlanError(f"{name} moves whole in this run, and cannot shrink to some of its scalars")
            was, now = old.flat().long(), part.flat().long()
            places = torch.searchsorted(was, now)
            if len(now) > len(was) or not torch.equal(was[places.clamp(max=max(len(was) - 1, 0))], now):
                raise PlanError(f"the new selection of {name} is no part of the one before")
            if name in self.packed:
                self._keep(name, places, optimizer)
            else:
                index = now.to(self.positions[names[name]])
                self.positions[names[name]] = index
                if isinstance(optimizer, SelectiveAdamW):
                    optimizer.select(names[name], index)
        hashes = {name: before.hashes[name] for name in plan.touched if name in before.hashes}
        self._plan = replace(before, tensors=plan.tensors, config=plan.config, hashes=hashes)

    def _keep(self, name: str, places: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        packed = self.packed[name]
        values, shape = packed.values, packed.values.shape
        packed.keep(places)
        if not len(places):  # a parameter of size 0 is trouble for optimisers
            packed.remove()
            del self.packed[name]
        if optimizer is None:
            return
        if not len(places):
            optimizer.state.pop(values, None)
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not values]
            return
        state = optimizer.state.get(values, {})
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == shape:
                state[key] = value[places.to(value.device)]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimiser has to get."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def refresh(self) -> None:
        """Write packed values into the weights now, whatever their version counters say."""
        for packed in self.packed.values():
            if not packed.composed:
                packed.write(packed.weight, always=True)

    def plain(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``state_dict`` of the model as that of a plain one, with the values in the weights.

        Args:
            state_dict: Whole tensors; where weights are sharded, those gathered by the launcher.
        """
        self.refresh()
        plain = {name: tensor for name, tensor in state_dict.items() if not is_packed_name(name)}
        for name, packed in self.packed.items():
            # a copy made before the refresh (ZeRO-1 and 2) is as much behind as a base that is composed
            live = (
                not packed.composed and name in plain and plain[name].data_ptr() == packed.weight.data_ptr()
            )
            if name in plain and not live:
                values = state_dict.get(name + SUFFIX, packed.values)
                whole = packed.whole(plain[name], values)
                others = [other for other, first in self.start.tied.items() if first == name]
                plain |= {other: whole for other in (name, *others) if other in plain}
        return plain

    def changed(self) -> float | None:
        """Return the share of packed scalars that differ from the base as the weights' type has them."""
        # between two steps ZeRO-3 may have taken values apart
        whole = [packed for packed in self.packed.values() if len(packed.values) == len(packed.base)]
        total = sum(len(packed.values) for packed in whole)
        if not total:
            return None
        changed = torch.stack([packed.changed() for packed in whole]).sum()
        return int(summed(changed, whole[0].values)) / total

    def remove(self) -> None:
        """Leave a plain model with the trained weights, trainable as before; the plan stays readable."""
        self._plan = self.plan
        for packed in self.packed.values():
            with together([packed.weight, packed.values], write=True):
                packed.remove()
        self.packed, self.positions = {}, {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable_before[name])


def apply(
    model: nn.Module,
    plan: SelectionPlan,
    backend: Backend = "auto",
    *,
    candidates: Collection[str] = (),
    shrinks: bool = False,
    sharded: bool = False,
    deepspeed: bool = False,
) -> Selection:
    """Make only what the plan selects trainable; before the optimiser, DDP, FSDP or DeepSpeed see the model.

    Args:
        model: Unwrapped. Its weights must be those the plan was made for.
        plan: What may move.
        backend: ``auto`` chooses, and logs what and why.
        candidates: Tensors of which more may be selected while the run goes on (ID3), beside the plan's.
        shrinks: Whether :meth:`Selection.shrink` may be called: tensors of which all scalars are selected are
            then treated as single scalars too.
        sharded: Whether weights will be sharded (ZeRO-3, FSDP2).
        deepspeed: Whether DeepSpeed will own the optimiser.

    Raises:
        PlanError: The plan is for another model, touches what is frozen, or the backend cannot enforce it.
    """
    plan.check(model)
    changing = bool(candidates)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    frozen = [name for name in plan.touched if not before[name]]
    if frozen:
        raise PlanError(
            f"the plan trains {len(frozen)} tensors that are frozen, first {frozen[0]}: with an adapter only "
            "its own scalars can be selected. Train without it, or make a plan for the model with it."
        )
    chosen, reason = _choose(
        plan, backend, changing=changing, shrinks=shrinks, sharded=sharded, deepspeed=deepspeed
    )
    logger.info(
        "selection %s: %d of %d scalars (%.2f %%) train; backend %s, %s",
        plan.method, plan.count, plan.numel, 100 * plan.density, chosen, reason,
    )  # fmt: skip
    selection = Selection(model, plan, chosen, _trainable_before=before, _plan=None if changing else plan)
    places = _places(model)
    try:
        for name, parameter in list(model.named_parameters()):
            part = plan.tensors[name]
            scalars = shrinks and part.kind == "all"
            if part.kind == "none" and name not in candidates:
                parameter.requires_grad_(False)
            elif (part.partial or scalars) and chosen in ("packed", "composed"):
                selection.packed[name] = pack(
                    places[parameter],
                    part,
                    composed=chosen == "composed",
                    split_later=sharded and not deepspeed,
                )
            elif chosen == "masked" and (part.partial or part.kind == "none" or scalars):
                if not parameter.is_contiguous():
                    raise PlanError(f"{name} is not contiguous; call .contiguous() on it")
                selection.positions[parameter] = (
                    torch.empty(0, dtype=torch.int32) if part.kind == "none" else part.flat()
                )
    except PlanError:
        selection.remove()
        raise
    return selection


def is_packed_name(name: str) -> bool:
    """Whether a name of ``state_dict`` or ``named_parameters`` is that of packed values."""
    return name.endswith(SUFFIX)


def _choose(
    plan: SelectionPlan, backend: str, *, changing: bool, shrinks: bool, sharded: bool, deepspeed: bool
) -> tuple[str, str]:
    """Return the backend and why it is the right one.

    Raises:
        PlanError: The one that was asked for cannot do it.
    """
    if backend not in get_args(Backend):
        raise PlanError(f"unknown backend {backend!r}; there are {', '.join(get_args(Backend))}")
    if changing and deepspeed:
        raise PlanError(
            "a selection that changes while it trains needs the gradient between backward and step, and "
            "DeepSpeed has no such place: use DDP or one process, or a selection that stays"
        )
    if sharded and changing:
        raise PlanError("a selection that changes cannot be enforced on sharded weights: use DDP")
    needs_scalars = plan.partial or changing or shrinks
    impossible = {
        "freeze": needs_scalars and "the plan moves parts of tensors, or will",
        "packed": (changing and "the selection changes while it trains")
        or (sharded and "a write into a gathered weight is lost: use composed"),
        "composed": changing and "the selection changes while it trains",
        "masked": (deepspeed and "DeepSpeed brings its own optimiser")
        or (sharded and "sharded weights have no flat positions: use composed"),
    }
    if backend != "auto":
        if impossible[backend]:
            raise PlanError(f"backend {backend!r} cannot enforce this: {impossible[backend]}")
        return backend, "as asked for"
    if not needs_scalars:
        return "freeze", "because whole tensors train or do not"
    if changing:
        return "masked", "because the selection changes while it trains"
    if sharded:
        return "composed", "because weights are sharded"
    partial = [part for part in plan.touched.values() if part.partial or shrinks]
    density = sum(part.count for part in partial) / sum(part.numel for part in partial)
    if density > DENSE_FROM and not deepspeed:
        return "masked", f"because {density:.0%} of the tensors in question train"
    return "packed", "because single scalars train"


def _places(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Return where each parameter lives, in the order in which modules are walked."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    return places

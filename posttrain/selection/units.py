"""Linked units of Llama and Qwen style decoders: which rows and columns make up one hidden unit or head.

A unit of an MLP is a row (and bias) of ``gate_proj`` and ``up_proj`` and a column of ``down_proj``. A unit of
an attention is a KV group: the rows (and biases) of ``k_proj`` and ``v_proj`` of one KV head, those of
``q_proj`` of all query heads that share it, and their columns of ``o_proj``. Zeroing the input of the output
matrix at a unit's columns takes the unit out of the model; what else belongs to it then gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from posttrain._lazy import torch
from posttrain.selection.plan import PlanError

if TYPE_CHECKING:
    from torch import nn

    Slices = Mapping[str, tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Layer:
    """The units of one MLP or attention.

    Attributes:
        kind: mlp or attention.
        inputs: Names of the matrices whose rows belong to units, with rows per unit.
        output: Name of the matrix whose columns do.
        width: Columns per unit.
        count: Units.
    """

    kind: Literal["mlp", "attention"]
    inputs: Mapping[str, int]
    output: str
    width: int
    count: int


@dataclass(frozen=True)
class Units:
    """Chosen units: per layer its (k,) sorted indices on the CPU; layers without any are left out."""

    chosen: tuple[tuple[Layer, torch.Tensor], ...]

    def slices(self, model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
        """Return per parameter name the dimension and the sorted positions along it of the chosen units."""
        found: dict[str, tuple[int, torch.Tensor]] = {}
        parameters = dict(model.named_parameters())
        for layer, units in self.chosen:
            for name, rows in layer.inputs.items():
                for part in ("weight", "bias"):
                    if f"{name}.{part}" in parameters:
                        found[f"{name}.{part}"] = (0, _spread(units, rows))
            found[f"{layer.output}.weight"] = (1, _spread(units, layer.width))
        return found

    def outputs(self) -> dict[str, torch.Tensor]:
        """Return per output matrix the sorted positions of its input that the chosen units feed."""
        return {layer.output: _spread(units, layer.width) for layer, units in self.chosen}


def layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a decoder in order.

    Raises:
        PlanError: There are none of a known shape, or the shapes do not fit one another.
    """
    found: list[Layer] = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        names = {child: f"{name}.{child}" if name else child for child in children}
        if {"up_proj", "down_proj"} <= set(children):
            inputs = [child for child in ("gate_proj", "up_proj") if child in children]
            count = _linear(children["down_proj"], names["down_proj"]).in_features
            for child in inputs:
                if _linear(children[child], names[child]).out_features != count:
                    raise PlanError(f"{names[child]} has another number of units than {names['down_proj']}")
            found.append(Layer("mlp", {names[c]: 1 for c in inputs}, names["down_proj"], 1, count))
        elif {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(children):
            q, k, v, o = (_linear(children[c], names[c]) for c in ("q_proj", "k_proj", "v_proj", "o_proj"))
            size = int(module.head_dim)
            groups = k.out_features // size
            width = o.in_features // groups
            if (q.out_features, k.out_features, v.out_features) != (
                o.in_features,
                groups * size,
                groups * size,
            ):
                raise PlanError(f"{name} has no heads of {size} rows in groups, so its units are not known")
            rows = {names["q_proj"]: width, names["k_proj"]: size, names["v_proj"]: size}
            found.append(Layer("attention", rows, names["o_proj"], width, groups))
    if not found:
        raise PlanError(
            "found no MLP (up_proj, down_proj) and no attention (q_proj, k_proj, v_proj, o_proj) in this "
            "model: units are known for decoders of the Llama and Qwen kind"
        )
    return found


def last_units(model: nn.Module, *, mlp: int, attention: int) -> Units:
    """Choose the last units of each layer.

    Args:
        model: Unwrapped, without an adapter.
        mlp: Hidden units per MLP.
        attention: KV groups per attention.

    Raises:
        PlanError: That would be all of a layer, or nothing at all.
    """
    return _chosen(layers(model), mlp, attention, None)


def smallest_units(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, mlp: int, attention: int
) -> Units:
    """Choose the units that feed the least into the model on ``batches``.

    The score of a unit is the root of the sum over its columns c of ||a_c||^2 ||W_c||^2: the norm of the
    activation over the tokens that are attended to times the norm of the column. Of equal scores the last.

    Args:
        model: Unwrapped, on its device; run in eval mode.
        batches: (B, T) ``input_ids`` and optionally ``attention_mask``.
        mlp: Hidden units per MLP.
        attention: KV groups per attention.

    Raises:
        PlanError: See :func:`last_units`.
        ValueError: There is no batch.
    """
    found = layers(model)
    modules = dict(model.named_modules())
    sums: dict[str, torch.Tensor] = {}
    where: dict[str, torch.Tensor] = {}
    handles = []

    def watcher(name: str) -> Any:
        def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            del module
            squares = args[0].detach().float().square()
            if "mask" in where:
                squares = squares * where["mask"].unsqueeze(-1)
            total = squares.flatten(0, -2).sum(dim=0)
            sums[name] = sums[name] + total if name in sums else total

        return watch

    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        handles = [modules[layer.output].register_forward_pre_hook(watcher(layer.output)) for layer in found]
        with torch.no_grad():
            for batch in batches:
                inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask") if k in batch}
                if "attention_mask" in inputs:
                    where["mask"] = inputs["attention_mask"].to(torch.float32)
                else:
                    where.pop("mask", None)
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not sums:
        raise ValueError(
            "choosing the smallest units needs rows to retain, found none: choose the last instead"
        )
    scores = {}
    for layer in found:
        weight: Any = modules[layer.output].weight
        square = sums[layer.output].to(weight.device) * weight.detach().float().square().sum(dim=0)
        scores[layer.output] = square.view(layer.count, layer.width).sum(dim=1).cpu()
    return _chosen(found, mlp, attention, scores)


def ablate(model: nn.Module, units: Units) -> None:
    """Set everything that belongs to the units to zero, in place."""
    with torch.no_grad():
        for parameter, dim, index in _places(model, units.slices(model)):
            parameter.index_fill_(dim, index, 0)


def silence(model: nn.Module, units: Units) -> None:
    """Zero the units' columns of the output matrices: the function of the ablated model, with a gradient."""
    with torch.no_grad():
        for parameter, dim, index in _places(model, units.slices(model)):
            if dim == 1:
                parameter.index_fill_(dim, index, 0)


def redraw(model: nn.Module, units: Units, generator: torch.Generator) -> None:
    """Draw what belongs to the units anew from N(0, s^2), s the deviation of the rest of each tensor.

    Args:
        model: Unwrapped.
        units: Which.
        generator: On the CPU, so that all ranks and devices draw the same.
    """
    with torch.no_grad():
        for parameter, dim, index in _places(model, units.slices(model)):
            keep = torch.ones(parameter.shape[dim], dtype=torch.bool)
            keep[index.cpu()] = False
            rest = parameter.index_select(dim, keep.nonzero().flatten().to(parameter.device))
            shape = list(parameter.shape)
            shape[dim] = len(index)
            drawn = torch.randn(shape, generator=generator) * float(rest.float().std(correction=0))
            parameter.index_copy_(dim, index, drawn.to(parameter.device, parameter.dtype))


@contextmanager
def without(model: nn.Module, units: Units) -> Iterator[None]:
    """Take the units out of the forward meanwhile, by zeroing what they give to the output matrices."""
    modules = dict(model.named_modules())

    def masker(index: torch.Tensor) -> Any:
        def mask(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            del module
            return (args[0].index_fill(-1, index.to(args[0].device), 0), *args[1:])

        return mask

    handles = [modules[n].register_forward_pre_hook(masker(index)) for n, index in units.outputs().items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chosen(
    found: Sequence[Layer], mlp: int, attention: int, scores: Mapping[str, torch.Tensor] | None
) -> Units:
    wanted = {"mlp": mlp, "attention": attention}
    what = {"mlp": "hidden units of an MLP", "attention": "KV groups of an attention"}
    chosen = []
    for layer in found:
        count = wanted[layer.kind]
        if not count:
            continue
        if count >= layer.count:
            raise PlanError(
                f"{count} of {layer.count} {what[layer.kind]} leave nothing for the rest ({layer.output}): "
                "take fewer" + (", or 0 and hidden units only" if layer.kind == "attention" else "")
            )
        if scores is None:
            units = torch.arange(layer.count - count, layer.count)
        else:
            order = scores[layer.output].flip(0).argsort(stable=True)  # of equal scores the last
            units = (layer.count - 1 - order[:count]).sort().values
        chosen.append((layer, units))
    if not chosen:
        raise PlanError("no units are chosen: ask for hidden units, KV groups or both")
    return Units(tuple(chosen))


def _places(model: nn.Module, slices: Slices) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
    parameters = dict(model.named_parameters())
    for name, (dim, index) in slices.items():
        yield parameters[name], dim, index.to(parameters[name].device)


def _spread(units: torch.Tensor, width: int) -> torch.Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def _linear(module: nn.Module, name: str) -> nn.Linear:
    if not isinstance(module, torch.nn.Linear):
        raise PlanError(
            f"{name} is a {type(module).__name__}, units are rows and columns of plain linear layers: merge "
            "the adapter, or load the weights unquantised"
        )
    return module

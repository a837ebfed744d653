r"""RL subnetwork: train only the weights that an earlier run changed (arXiv 2505.11711).

Idea
    After reinforcement learning in bf16 most weights are bit for bit what they were; 5 to 30 % moved, spread
    over nearly all matrices. Training that set alone, from the same start with the same data, is reported to
    give almost the same final weights. So a finished run says what a later, cheaper run has to move.

Formula
    For the weights theta0 before and theta1 after a run, both in the type of theta1::

        S = { i : bits(theta1_i) != bits(theta0_i) }             tolerance = 0, the default
        S = { i : |theta1_i - theta0_i| > tolerance }            in fp32; NaN on a side counts as changed

    With a budget of B scalars, the B of S with the largest |theta1_i - theta0_i|, ties by (tensor order,
    flat position). ``shuffled`` is the control: per tensor as many scalars as S has there, drawn uniformly.

Where the change comes from
    Two folders or Hub ids, ``before`` and ``after``, read block by block from their shards; or the ``delta``
    file of such a pair (``posttrain export --format delta``). A delta without old values needs the model to
    be its base, for the sizes of the changes that a budget asks for.

Defaults and where they come from
    tolerance 0, bitwise (the paper's formal text; its report counts changes above 1e-5). No budget: all that
    changed. Weight decay acts on no unselected scalar.

Needs
    The two checkpoints, under the parameter names and shapes of the model. In memory are the selected
    positions, and one tensor.

Composes with
    Every loss and trainer; with an adapter only its own scalars could be selected, so none of these.

When not to use it
    - As evidence that the other weights do not matter: a random mask of 1 % is reported to match full RL as
      well (arXiv 2602.01599). Run ``shuffled``, or the selector ``random``, beside it.
    - On a run stored in fp32, or a long one: nearly all weights changed. ``posttrain sparsity`` tells.

What to watch
    The log: how many scalars changed, and how many of these are candidates. ``posttrain plan inspect``: their
    spread over the tensors.

Official code
    SagnikMukherjee/sparsity_in_rl compares checkpoints; the mask training is not in it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from posttrain._lazy import torch
from posttrain.selection.plan import PlanError, SelectionPlan, tensor_hash
from posttrain.selection.random_mask import uniform_subset
from posttrain.selection.selector import ElementSelector, all_names
from posttrain.selection.top_b import top_b

if TYPE_CHECKING:
    from torch import nn

    from posttrain.evaluation.checkpoint import Checkpoint
    from posttrain.selection.delta_file import DeltaFile

    Changed = tuple[torch.Tensor, torch.Tensor]
    """Sorted flat positions (k,) of what changed in a tensor; the sizes (k,) of it where asked for."""

    Read = Callable[[str, bool], Changed]
    """By the name of a tensor, and whether sizes are asked for."""

logger = logging.getLogger(__name__)


class RLSubnetwork(ElementSelector):
    """Select what an earlier run changed. See the module page."""

    name = "rl_subnetwork"
    title = "RL subnetwork: the weights that an earlier run changed"
    paper = "2505.11711"
    needs = "checkpoints"

    before: str | None = Field(None, description="Folder or Hub id of the weights before the earlier run.")
    after: str | None = Field(None, description="Folder or Hub id of the weights after it.")
    delta: str | None = Field(
        None, description="Delta file, or folder with one, instead of before and after."
    )
    tolerance: float = Field(0.0, ge=0, description="Changes up to this size do not count; 0 compares bits.")
    shuffled: bool = Field(
        False, description="As many scalars of each tensor, drawn uniformly: the control at equal density."
    )
    seed: int = Field(0, ge=0, description="Of the draw of shuffled.")

    @model_validator(mode="after")
    def _one_source(self) -> RLSubnetwork:
        pair = (self.before is not None, self.after is not None)
        if pair not in ((True, True), (False, False)) or all(pair) == (self.delta is not None):
            raise ValueError(
                f"rl_subnetwork takes before and after, or delta: found before={self.before!r}, "
                f"after={self.after!r}, delta={self.delta!r}"
            )
        return self

    def select(self, model: nn.Module, *, round: int = 0, batches: object = None) -> SelectionPlan:
        """Return the plan, see :meth:`Selector.select`.

        Raises:
            PlanError: The checkpoints are of another model, or changed nothing that may be selected.
            ValueError: The budget is above what changed, or a checkpoint cannot be read.
            FloatingPointError: With a budget, a change is not finite.
        """
        del batches
        ranked, whole, budget = self.split(model)
        with ExitStack() as stack:
            shapes, read = self._source(stack, model)
            stored = _names_in(model, shapes)
            chosen: dict[str, torch.Tensor] = {}
            counts: dict[str, int] = {}
            for known in shapes:
                where, _ = read(known, self.tolerance > 0)
                if not len(where):
                    continue
                name = _only(known, stored, shapes, model)
                counts[name] = len(where)
                if budget is None and name in ranked:
                    chosen[name] = where
            total, n = sum(counts.values()), sum(counts.get(name, 0) for name in ranked)
            logger.info("rl_subnetwork: %d scalars changed, %d of them candidates", total, n)
            if not n:
                raise PlanError(
                    f"of {total:,} scalars that changed none is a candidate: compare other checkpoints, "
                    "lower the tolerance, or change include and exclude"
                )
            if budget is not None:
                if budget > n:
                    raise ValueError(
                        f"the budget leaves {budget:,} scalars to what changed, and only {n:,} candidates "
                        "did: lower it, or leave it out to take them all"
                    )
                names = {name: stored_name for stored_name, name in stored.items() if counts.get(name)}
                sizes = {
                    name: functools.partial(_sizes, read, names[name]) for name in ranked if name in names
                }
                chosen = {name: read(names[name], False)[0][i] for name, i in top_b(sizes, budget).items()}
        if self.shuffled:
            generator = self.generator(round, self.seed)
            for name in [name for name in ranked if name in chosen]:
                size = {name: ranked[name].numel()}
                chosen[name] = uniform_subset(size, len(chosen[name]), generator)[name]
        return self.elements(model, chosen, whole, round=round, changed=total)

    def _source(self, stack: ExitStack, model: nn.Module) -> tuple[Mapping[str, tuple[int, ...]], Read]:
        """Return the shapes of the tensors that may have changed, and how to read what did."""
        if self.delta is not None:
            from posttrain.selection.delta_file import DeltaFile

            file = stack.enter_context(DeltaFile(self.delta))
            return {name: t.shape for name, t in file.header.tensors.items()}, self._from_delta(file, model)
        from posttrain.evaluation.checkpoint import Checkpoint, tied_heads
        from posttrain.selection.delta import same_tensors

        assert self.before is not None
        assert self.after is not None
        first, second = (stack.enter_context(Checkpoint(path)) for path in (self.before, self.after))
        names = same_tensors(first, second, tied_heads([first, second]))
        return {name: second.tensors[name].shape for name in names}, self._from_pair(first, second)

    def _from_pair(self, first: Checkpoint, second: Checkpoint) -> Read:
        from posttrain.selection.delta import aligned_blocks
        from posttrain.selection.delta_file import bits

        def read(name: str, sized: bool) -> Changed:
            places, sizes, offset = [torch.empty(0, dtype=torch.long)], [torch.empty(0)], 0
            for one, two in aligned_blocks(first, second, name):
                here = (bits(one) != bits(two)).nonzero().flatten()
                if sized:
                    here, size = self._beyond(here, one[here], two[here])
                    sizes.append(size)
                places.append(here + offset)
                offset += len(two)
            return torch.cat(places), torch.cat(sizes)

        return read

    def _from_delta(self, file: DeltaFile, model: nn.Module) -> Read:
        parameters = dict(model.named_parameters(remove_duplicate=False))

        def read(name: str, sized: bool) -> Changed:
            entry = file.entry(name)
            if not sized:
                return entry.positions, torch.empty(0)
            old = entry.old
            if old is None:
                weight = parameters[name].detach().cpu() if name in parameters else torch.empty(0)
                if tensor_hash(weight) != file.header.tensors[name].before:
                    raise PlanError(
                        f"{self.delta} holds no old values, and {name} of the model is not that of its base, "
                        "so the sizes of the changes are unknown: load the base in the type of the run, or "
                        "name the checkpoints before and after"
                    )
                old = weight.flatten()[entry.positions]
            return self._beyond(entry.positions, old, entry.values)

        return read

    def _beyond(self, where: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> Changed:
        """Return the positions whose change counts, and its size."""
        from posttrain.evaluation.changes import magnitude

        size = magnitude(before, after).float()
        if self.tolerance == 0:  # 0.0 and -0.0 differ by nothing, and their bits do
            return where, size
        return where[size > self.tolerance], size[size > self.tolerance]


def _sizes(read: Read, name: str) -> torch.Tensor:
    return read(name, True)[1]


def _names_in(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the model's first name of each tensor of a checkpoint that it has."""
    first = {other: name for name, known in all_names(model).items() for other in known}
    return {name: first[name] for name in shapes if name in first}


def _only(
    known: str, stored: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], model: nn.Module
) -> str:
    """Return the model's name of a tensor that changed.

    Raises:
        PlanError: The model has no such tensor, has it in another shape, or ties what changed apart.
    """
    name = stored.get(known)
    if name is None:
        raise PlanError(
            f"{known} changed, and the model has no parameter of that name, but for example "
            f"{next(iter(all_names(model)))}: compare checkpoints of this model, saved by the same library"
        )
    shape = tuple(model.get_parameter(name).shape)
    if shape != tuple(shapes[known]):
        raise PlanError(
            f"{known} has shape {list(shapes[known])} in the checkpoints and {list(shape)} in the model: it "
            "is another model, or its vocabulary was resized"
        )
    twins = [other for other, first in stored.items() if first == name]
    if len(twins) > 1:
        raise PlanError(
            f"{' and '.join(twins)} are one tensor in the model and two in the checkpoints: load the model "
            "untied (tie_word_embeddings: false)"
        )
    return name

r"""Explicit selection: tensors, rows and columns by name, or a plan file made elsewhere.

Idea
    When it is known what may move, say so: the last layers, a fresh head, the rows of new tokens, the units
    an analysis pointed to. Or make a plan where there is memory for it, and train with it on another machine.

What may be said
    ``parameters``: regular expressions, each of which selects whole tensors. ``rows`` and ``columns``: per
    regular expression the positions ``[i, ...]`` or ``[:, j]``, as numbers or ``"start:stop"``; negative
    ones count from the end. Patterns are searched in full names, in all of them where tensors are tied; one
    that finds nothing is an error, and so is a tensor that two entries select differently. Rows of a linear
    layer's weight are its outputs, columns its inputs; rows of an embedding are tokens.

    ``file``: a plan of ``posttrain plan make`` or :meth:`SelectionPlan.save`. Names, shapes and the hashes of
    the weights have to be those of the model; ``other_weights`` drops the hashes, for a mask that is carried
    over to another checkpoint of the same architecture or to another type.

Formula
    None: S is what was named.

Defaults and where they come from
    None; something has to be named.

Needs
    Nothing beside the names and shapes of the weights; the file where one is named.

Composes with
    Every loss and trainer. Whole tensors are frozen or not; rows and columns are packed scalar by scalar.

When not to use it
    - To freeze all but a few tensors of a model that also has an adapter: only the adapter's are trainable.
    - To select single scalars by hand: make a :class:`~posttrain.selection.plan.SelectionPlan` in Python.

What to watch
    ``posttrain plan inspect``: what the patterns caught.

Official code
    None; the interface is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from posttrain._lazy import torch
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection
from posttrain.selection.selector import Pattern, Selector, all_names, matching

if TYPE_CHECKING:
    from torch import nn

Position = int | Annotated[str, StringConstraints(pattern=r"^(-?\d+)?:(-?\d+)?$")]
"""A row or column, or a range of them as in Python: ``"32000:"``."""


class Explicit(Selector):
    """Select what is named. See the module page."""

    name = "explicit"
    title = "Explicit selection: named tensors, rows and columns, or a plan file"

    parameters: tuple[Pattern, ...] = Field((), description="Tensors that train whole.")
    rows: dict[Pattern, tuple[Position, ...]] = Field(
        {}, description="Rows that train, of the tensors found by each pattern."
    )
    columns: dict[Pattern, tuple[Position, ...]] = Field(
        {}, description="Columns that train, of the matrices found by each pattern."
    )
    file: str | None = Field(None, description="A plan file instead of names.")
    other_weights: bool = Field(
        False, description="With a file: accept other weights of the same names and shapes."
    )

    @model_validator(mode="after")
    def _names_or_a_file(self) -> Explicit:
        named = bool(self.parameters or self.rows or self.columns)
        if named == (self.file is not None):
            raise ValueError(
                "explicit takes either names (parameters, rows, columns) or a plan file: found "
                f"{'both' if named else 'neither'}"
            )
        if self.file is not None and (self.include or self.exclude):
            raise ValueError("a plan file is taken as it is: drop include and exclude")
        if self.other_weights and self.file is None:
            raise ValueError("other_weights goes with a plan file: drop it, or name the file")
        return self

    def select(self, model: nn.Module, *, round: int = 0, batches: object = None) -> SelectionPlan:
        """Return the plan, see :meth:`Selector.select`."""
        del batches
        kept = self.candidates(model)
        if self.file is not None:
            return self._read(model, self.file, round)
        names = {name: known for name, known in all_names(model).items() if name in kept}
        selected: dict[str, TensorSelection] = {}

        def add(name: str, selection: TensorSelection) -> None:
            if selected.setdefault(name, selection) != selection:
                raise PlanError(
                    f"{name} is selected in two ways, {selected[name].kind} and {selection.kind}: name "
                    "it once"
                )

        for name in matching(self.parameters, names, "parameters"):
            add(name, TensorSelection.all(kept[name].shape))
        sides: tuple[tuple[Literal["rows", "columns"], Mapping[str, Sequence[Position]]], ...] = (
            ("rows", self.rows),
            ("columns", self.columns),
        )
        for kind, entries in sides:
            for pattern, positions in entries.items():
                for name in matching((pattern,), names, kind):
                    add(name, _some_of(name, kind, tuple(kept[name].shape), positions))
        return self.plan(model, selected, round=round)

    def _read(self, model: nn.Module, file: str, round: int) -> SelectionPlan:
        from pathlib import Path

        plan = SelectionPlan.load(Path(file).expanduser())
        plan.check(model, hashes=not self.other_weights)
        return self.plan(model, plan.touched, round=round, made_by=plan.method, made_with=dict(plan.config))


def _some_of(
    name: str,
    kind: Literal["rows", "columns"],
    shape: tuple[int, ...],
    positions: Sequence[Position],
) -> TensorSelection:
    """Return rows or columns of a tensor.

    Raises:
        PlanError: A position is outside of the tensor, given twice, or the tensor has no columns.
    """
    if len(shape) != 2 and (kind == "columns" or not shape):
        raise PlanError(
            f"{kind}: {name} has shape {list(shape)}, and columns need a matrix; correct the pattern"
        )
    size = shape[0] if kind == "rows" else shape[1]
    numbers: list[int] = []
    for position in positions:
        if isinstance(position, str):
            ends = [int(end) if end else None for end in position.split(":")]
            span = range(*slice(*ends).indices(size))
            if not span or any(end is not None and abs(end) > size for end in ends):
                raise PlanError(
                    f"{kind} {position} are not all in {name}, which has {size}: correct the range"
                )
            numbers += span
        else:
            numbers.append(position + size if position < 0 else position)
    try:
        return TensorSelection.of(kind, shape, torch.tensor(numbers, dtype=torch.long))
    except PlanError as error:
        raise PlanError(f"{kind} of {name}: {error}") from None

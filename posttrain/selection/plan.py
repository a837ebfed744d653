r"""A selection plan: which scalars of a model may move. Data, independent of how it is enforced.

Per parameter tensor, by its name in ``model.named_parameters()`` (a tied tensor has one name, its first)::

    none            nothing of it trains
    all             all of it trains
    rows            whole rows i: positions [i, ...]
    columns         whole columns j of a matrix: positions [:, j]
    elements        single scalars, as flat positions (row-major)

Positions are sorted and unique, int32 (int64 for tensors of 2^31 scalars and more). A plan says what it was
made of (method and its settings) and for which weights: a SHA-256 hash per touched tensor.

File format
    One safetensors file. ``NAME.idx`` holds the positions of a tensor of kind rows, columns or elements.
    The metadata entry ``format`` is ``posttrain-selection``, ``plan`` is JSON::

        {"version": 1, "method": str, "config": {...}, "count": int, "base_hash": str | null,
         "tied": {other name: name}, "tensors": {NAME: {"kind": str, "shape": [int], "count": int,
                                                         "hash": str | absent}}}

    ``count`` is the number of scalars that may move. ``base_hash`` covers the hashes of all touched tensors
    in their order. Tensors that are not mentioned do not exist in the model the plan was made for.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain._lazy import torch
from posttrain.stored import finished_file

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["none", "all", "rows", "columns", "elements"]

FORMAT = "posttrain-selection"
VERSION = 1
_KINDS = ("none", "all", "rows", "columns", "elements")


class PlanError(ValueError):
    """A plan is damaged, or does not fit the model it is to be used with."""


def index_dtype(numel: int) -> torch.dtype:
    """Return the integer type of flat positions in a tensor of ``numel`` scalars."""
    return torch.int32 if numel < 2**31 else torch.int64


@dataclass(frozen=True, eq=False)
class TensorSelection:
    """What of one tensor may move.

    Attributes:
        kind: See the module page.
        shape: Of the tensor.
        index: (k,) sorted unique positions on the CPU: rows, columns or flat elements; None for none and all.
    """

    kind: Kind
    shape: tuple[int, ...]
    index: torch.Tensor | None = None

    @classmethod
    def none(cls, shape: tuple[int, ...] | torch.Size) -> TensorSelection:
        """Nothing trains."""
        return cls("none", tuple(shape))

    @classmethod
    def all(cls, shape: tuple[int, ...] | torch.Size) -> TensorSelection:
        """Everything trains."""
        return cls("all", tuple(shape))

    @classmethod
    def of(cls, kind: Kind, shape: tuple[int, ...] | torch.Size, index: torch.Tensor) -> TensorSelection:
        """Build a selection from positions in any order; nothing becomes ``none`` and everything ``all``.

        Args:
            kind: rows, columns or elements.
            shape: Of the tensor.
            index: (k,) integers without repetition.

        Raises:
            PlanError: A position is out of range or given twice, or the tensor has no rows or columns.
        """
        shape = tuple(shape)
        index = index.detach().cpu()
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise PlanError(f"positions are a vector of integers, found {index.dtype} {tuple(index.shape)}")
        index = index.sort().values
        selection = cls(kind, shape, index.to(index_dtype(_numel(shape))))
        limit = selection._limit()
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= limit):
            raise PlanError(
                f"positions of {kind} go from 0 to {limit - 1} in a tensor of shape {list(shape)}, found "
                f"{int(index[0])} to {int(index[-1])}"
            )
        if len(index) > 1 and bool((index[1:] == index[:-1]).any()):
            twice = int(index[1:][index[1:] == index[:-1]][0])
            raise PlanError(f"position {twice} is given twice; a scalar is selected once or not at all")
        if not len(index):
            return cls.none(shape)
        return cls.all(shape) if len(index) == limit else selection

    @classmethod
    def elements(cls, shape: tuple[int, ...] | torch.Size, index: torch.Tensor) -> TensorSelection:
        """Single scalars by flat positions, in any order."""
        return cls.of("elements", shape, index)

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> TensorSelection:
        """Build a selection from a bool tensor of the parameter's shape."""
        return cls.elements(mask.shape, mask.flatten().nonzero().flatten())

    def _limit(self) -> int:
        """Number of positions that could be selected."""
        if self.kind == "elements":
            return self.numel
        axis = {"rows": 0, "columns": 1}[self.kind]
        if len(self.shape) <= axis or (self.kind == "columns" and len(self.shape) != 2):
            needed = "a matrix" if self.kind == "columns" else "a tensor with at least one dimension"
            raise PlanError(f"{self.kind} need {needed}, found shape {list(self.shape)}")
        return self.shape[axis]

    @property
    def numel(self) -> int:
        """Scalars of the tensor."""
        return _numel(self.shape)

    @property
    def count(self) -> int:
        """Scalars that may move."""
        if self.index is None:
            return self.numel if self.kind == "all" else 0
        return len(self.index) * (1 if self.kind == "elements" else self.numel // self._limit())

    @property
    def partial(self) -> bool:
        """Whether some scalars move and others do not."""
        return self.index is not None

    def mask(self) -> torch.Tensor:
        """Return the bool tensor of the parameter's shape, True where a scalar may move."""
        mask = torch.full(self.shape, self.kind == "all", dtype=torch.bool)
        if self.index is not None:
            index = self.index.long()
            if self.kind == "rows":
                mask[index] = True
            elif self.kind == "columns":
                mask[:, index] = True
            else:
                mask.view(-1)[index] = True
        return mask

    def flat(self) -> torch.Tensor:
        """Return the (count,) sorted flat positions that may move."""
        if self.kind == "elements":
            assert self.index is not None
            return self.index
        return self.mask().view(-1).nonzero().flatten().to(index_dtype(self.numel))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorSelection):
            return NotImplemented
        same = self.kind == other.kind and self.shape == other.shape
        if not same or self.index is None or other.index is None:
            return same and self.index is other.index
        return torch.equal(self.index, other.index)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class SelectionPlan:
    """Which scalars of a model may move.

    Attributes:
        tensors: One entry per parameter of the model, in the order of ``named_parameters()``.
        method: Name of the selector.
        config: Its settings, as plain JSON values.
        hashes: SHA-256 per touched tensor, see :func:`tensor_hash`; may be empty.
        tied: Other names of shared tensors, each with the name used here.
    """

    tensors: Mapping[str, TensorSelection]
    method: str = "custom"
    config: Mapping[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    # ---- making one --------------------------------------------------------------------------------------

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        selected: Mapping[str, TensorSelection],
        *,
        method: str = "custom",
        config: Mapping[str, Any] | None = None,
        hashed: bool = True,
    ) -> SelectionPlan:
        """Complete ``selected`` to a plan for ``model``: what is not mentioned does not train.

        Raises:
            PlanError: A name or shape is not the model's, or nothing at all is selected.
        """
        parameters, tied = dict(model.named_parameters()), tied_names(model)
        named = {tied.get(name, name): selection for name, selection in selected.items()}
        if len(named) < len(selected):
            both = sorted(name for name in selected if name in tied and tied[name] in selected)
            raise PlanError(f"{both} are other names of tensors that are selected too; name each tensor once")
        tensors = {
            name: named.get(name) or TensorSelection.none(tensor.shape) for name, tensor in parameters.items()
        }
        hashes = {
            name: tensor_hash(parameters[name])
            for name, selection in tensors.items()
            if hashed and selection.kind != "none"
        }
        plan = cls(
            tensors | {n: s for n, s in named.items() if n not in tensors}, method, config or {}, hashes, tied
        )
        plan.check(model, hashes=False)
        if not plan.count:
            raise PlanError(
                f"the selection {method!r} leaves nothing to train in this model: select at least one scalar"
            )
        return plan

    # ---- looking at it -----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Scalars that may move."""
        return sum(selection.count for selection in self.tensors.values())

    @property
    def numel(self) -> int:
        """Scalars of the model, tied tensors once."""
        return sum(selection.numel for selection in self.tensors.values())

    @property
    def density(self) -> float:
        """Part of the scalars that may move."""
        return self.count / max(self.numel, 1)

    @property
    def partial(self) -> bool:
        """Whether any tensor moves in part; False for a plan that freezes whole tensors only."""
        return any(selection.partial for selection in self.tensors.values())

    @property
    def touched(self) -> dict[str, TensorSelection]:
        """The tensors of which something moves."""
        return {name: selection for name, selection in self.tensors.items() if selection.kind != "none"}

    @property
    def base_hash(self) -> str | None:
        """One hash for all touched tensors, or None when they were not hashed."""
        return combined_hash({name: self.hashes[name] for name in self.touched}) if self.hashes else None

    def fingerprint(self) -> str:
        """Return a hash of names, shapes and positions, the same for equal plans; settings are left out."""
        digest = hashlib.sha256()
        for name, selection in self.tensors.items():
            digest.update(f"{name} {selection.kind} {selection.shape}\n".encode())
            if selection.index is not None:
                digest.update(selection.index.numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SelectionPlan):
            return NotImplemented
        return list(self.tensors) == list(other.tensors) and dict(self.tensors) == dict(other.tensors)

    __hash__ = None  # type: ignore[assignment]

    def summary(self) -> str:
        """Return a table for people: per kind of tensor, how many of them and of their scalars train."""
        groups: dict[str, list[TensorSelection]] = {}
        for name, selection in self.tensors.items():
            groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(selection)
        rows = [("tensors", "trained", "scalars", "selected", "share")]
        for name, members in groups.items():
            numel, count = (sum(getattr(s, part) for s in members) for part in ("numel", "count"))
            moving = sum(s.kind != "none" for s in members)
            share = f"{count / max(numel, 1):.2%}"
            rows.append((name, f"{moving} of {len(members)}", f"{numel:,}", f"{count:,}", share))
        moving = len(self.touched)
        rows.append(
            (
                "total",
                f"{moving} of {len(self.tensors)}",
                f"{self.numel:,}",
                f"{self.count:,}",
                f"{self.density:.2%}",
            )
        )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([f"selection {self.method}", *lines])

    # ---- holding it against a model ----------------------------------------------------------------------

    def check(self, model: nn.Module, *, hashes: bool = True) -> None:
        """Refuse a model this plan was not made for.

        Args:
            model: Unwrapped (not DDP or a DeepSpeed engine).
            hashes: Also compare the weights of the touched tensors, where the plan knows their hashes.

        Raises:
            PlanError: Names, shapes or weights differ; the message says which, and what to do.
        """
        parameters = dict(model.named_parameters())
        unknown = [name for name in self.tensors if name not in parameters]
        if unknown:
            near = difflib.get_close_matches(unknown[0], parameters, n=1)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise PlanError(
                f"the plan names {len(unknown)} tensors that the model does not have, first {unknown[0]!r}"
                f"{hint}. Use the model the plan was made for (with its adapter, if it had one), or make "
                "a new plan."
            )
        missing = [name for name in parameters if name not in self.tensors]
        if missing:
            raise PlanError(
                f"the model has {len(missing)} tensors that the plan does not know, first {missing[0]!r}: it "
                "was made for another model. Make a new plan."
            )
        for name, selection in self.tensors.items():
            if tuple(parameters[name].shape) != selection.shape:
                raise PlanError(
                    f"{name} has shape {list(parameters[name].shape)}, the plan needs {list(selection.shape)}"
                    ": it was made for another size of the model, or before the vocabulary was resized."
                )
        if hashes:
            other = [n for n, known in self.hashes.items() if tensor_hash(parameters[n]) != known]
            if other:
                dtype = str(parameters[other[0]].dtype).removeprefix("torch.")
                raise PlanError(
                    f"the weights of {len(other)} of {len(self.hashes)} selected tensors are not those the "
                    f"plan was made for, first {other[0]} ({dtype}). Load the base checkpoint in the type it "
                    "had then, or make a new plan."
                )

    # ---- files -------------------------------------------------------------------------------------------

    def to_state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors and the metadata of the file format."""
        tensors = {f"{n}.idx": s.index for n, s in self.tensors.items() if s.index is not None}
        about: dict[str, Any] = {
            "version": VERSION,
            "method": self.method,
            "config": dict(self.config),
            "count": self.count,
            "base_hash": self.base_hash,
            "tied": dict(self.tied),
            "tensors": {},
        }
        for name, selection in self.tensors.items():
            entry: dict[str, Any] = {
                "kind": selection.kind,
                "shape": list(selection.shape),
                "count": selection.count,
            }
            if name in self.hashes:
                entry["hash"] = self.hashes[name]
            about["tensors"][name] = entry
        return tensors, {"format": FORMAT, "plan": json.dumps(about)}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: str = "the plan"
    ) -> SelectionPlan:
        """Read back what :meth:`to_state` returned.

        Raises:
            PlanError: It is something else, of a newer version, or damaged.
        """
        if metadata.get("format") != FORMAT:
            raise PlanError(f"{source} is no selection plan: its format is {metadata.get('format')!r}")
        try:
            about = json.loads(metadata["plan"])
            if about["version"] != VERSION:
                raise PlanError(
                    f"{source} has version {about['version']}, this posttrain reads {VERSION}: update it, or "
                    "make the plan again"
                )
            entries = about["tensors"]
            for name, entry in entries.items():
                if entry["kind"] not in _KINDS:
                    raise PlanError(f"{source}: {name} has kind {entry['kind']!r}, needed one of {_KINDS}")
            needed = {f"{n}.idx" for n, e in entries.items() if e["kind"] in ("rows", "columns", "elements")}
            if needed != set(tensors):
                raise PlanError(
                    f"{source} is damaged: positions of {sorted(needed ^ set(tensors))[:3]} are missing or "
                    "not announced"
                )
            read: dict[str, TensorSelection] = {}
            for name, entry in entries.items():
                shape, index = tuple(entry["shape"]), tensors.get(f"{name}.idx")
                try:
                    read[name] = (
                        TensorSelection(entry["kind"], shape)
                        if index is None
                        else TensorSelection.of(entry["kind"], shape, index)
                    )
                except PlanError as error:
                    raise PlanError(f"{source} is damaged: {name}: {error}") from None
                if read[name].count != entry["count"]:
                    raise PlanError(
                        f"{source} is damaged: {name} announces {entry['count']} scalars and holds "
                        f"{read[name].count}"
                    )
            hashes = {name: entry["hash"] for name, entry in entries.items() if "hash" in entry}
            plan = cls(read, about["method"], about["config"], hashes, about["tied"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise PlanError(f"{source} is damaged: its description cannot be read ({error!r})") from error
        if plan.count != about["count"] or plan.base_hash != about["base_hash"]:
            raise PlanError(f"{source} is damaged: its count or its base hash is not that of its tensors")
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors, metadata = self.to_state()
        with finished_file(Path(path)) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> SelectionPlan:
        """Read a plan.

        Raises:
            PlanError: The file is missing, something else, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise PlanError(f"{path} cannot be read as a selection plan: {error}") from error
        return cls.from_state(tensors, metadata, str(path))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the other names of shared parameters, each with its first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes (row-major, as in a safetensors file)."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)}\n".encode())
    digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combined_hash(hashes: Mapping[str, str]) -> str:
    """Return one hash for named tensor hashes, in their order."""
    text = "".join(f"{name} {value}\n" for name, value in hashes.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel

"""The sparse delta file: the weights that a training changed, at their positions.

One safetensors file. For each tensor NAME that changed it holds ``NAME.val``, the new values in the type of
the trained checkpoint (k of them), perhaps ``NAME.base``, the old ones (k), and the positions in the
flattened tensor in whichever of these forms is smallest:

==============  ========================================================  =========================
positions       content                                                   bytes per value, density d
==============  ========================================================  =========================
``NAME.idx``    sorted int32; int64 from 2^31 elements on                 4 (8)
``NAME.map``    one bit per element, lowest bit first                     1 / (8 d)
``NAME.gap``    distance to the position before, minus 1 (the first one:  1 below a distance of 129,
                its position), in base 128, lowest digit first, highest   2 below 16,513, 3, ...
                bit set on all but the last byte
none            every element is there                                    0
==============  ========================================================  =========================

Position and value of a 16-bit weight need at most 6 bytes together at every density in tensors of less than
2^31 elements (at random positions about 3.3 at 1 %, 4 at 0.1 %, 2.3 at 40 %). An fp32 value leaves 2 bytes
for its position, which ``gap`` keeps to where at least about one element in 5,000 changed; sparser, value and
position need 7 bytes (8 below one in a million).

The metadata entry ``format`` is ``posttrain-delta``; ``delta`` is JSON: :class:`Header`, with ``version`` and
``mode`` (``absolute``). It has the base's address and, for every tensor, the hash
(:func:`posttrain.selection.plan.tensor_hash`) before and after, so that a wrong base is refused and a result
is known to be right. Beside the values the file takes about 500 bytes per tensor, which is most of it where
a tensor has only some hundreds of values.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from posttrain.models.load import DELTA_FILE
from posttrain.selection.plan import index_dtype
from posttrain.stored import finished_file

FORMAT = "posttrain-delta"
VERSION = 1
Positions = Literal["idx", "map", "gap", "all"]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DeltaError(ValueError):
    """The delta, its base and the request do not go together; the message says what was found and the fix."""


@dataclass(frozen=True)
class Touched:
    """What the header says about a tensor that changed.

    Attributes:
        shape: Its shape.
        dtype: Its type after training, such as BF16.
        changed: k, number of values.
        positions: Form of the positions.
        before: Hash of the base's tensor in ``dtype``, see :func:`posttrain.selection.plan.tensor_hash`.
        after: Hash of it after training.
    """

    shape: tuple[int, ...]
    dtype: str
    changed: int
    positions: Positions
    before: str
    after: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Header:
    """What a delta file says about itself.

    Attributes:
        base: Hub id or absolute folder of the base.
        revision: Commit of a base from the Hub.
        dtype: ``dtype`` of the trained configuration, such as bfloat16, or None.
        elements: Elements of the whole model, tied ones once.
        tensors: The tensors that changed.
        cast: Type after training of untouched tensors whose type the base stores differently.
        tied: Output heads that are the input embedding: their name, and its name.
        old_values: Whether the old values are in the file.
        about: Free JSON: the selection that was trained, or the deltas that were merged.
    """

    base: str | None
    revision: str | None
    dtype: str | None
    elements: int
    tensors: dict[str, Touched]
    cast: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    old_values: bool = False
    about: Any = None

    @property
    def changed(self) -> int:
        """Number of values in the file."""
        return sum(tensor.changed for tensor in self.tensors.values())

    @property
    def density(self) -> float:
        """Share of the model's elements that are in the file."""
        return self.changed / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Entry:
    """The changed elements of one tensor: ``positions`` (k,) int64, sorted; ``values`` and ``old`` (k,)."""

    positions: torch.Tensor
    values: torch.Tensor
    old: torch.Tensor | None


# ---- bits --------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as integers: 0.0 and -0.0 differ, equal NaN patterns do not."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


class StreamedHash:
    """:func:`posttrain.selection.plan.tensor_hash` of a tensor that comes in blocks."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._digest = hashlib.sha256(f"{str(dtype).removeprefix('torch.')} {list(shape)}\n".encode())

    def add(self, block: torch.Tensor) -> None:
        """Add the next rows."""
        self._digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the hash of all that was added."""
        return self._digest.hexdigest()


# ---- positions ---------------------------------------------------------------------------------------------


def encode(positions: torch.Tensor, elements: int) -> tuple[Positions, torch.Tensor | None]:
    """Return the smallest form of sorted positions (k,) of a tensor; see the module page.

    Args:
        positions: (k,) int64, strictly increasing, k > 0.
        elements: Size of the tensor.
    """
    count = positions.numel()
    if count == elements:
        return "all", None
    index = index_dtype(elements)
    plain = {"idx": count * index.itemsize, "map": -(-elements // 8)}
    kind: Positions = "map" if plain["map"] < plain["idx"] else "idx"
    if count < plain[kind]:  # a gap needs at least one byte
        gaps = _encode_gaps(positions)
        if gaps.numel() < plain[kind]:
            return "gap", gaps
    if kind == "idx":
        return "idx", positions.to(index)
    flags = np.zeros(elements, dtype=np.bool_)
    flags[positions.numpy()] = True
    return "map", torch.from_numpy(np.packbits(flags, bitorder="little"))


def decode(kind: Positions, stored: torch.Tensor | None, elements: int) -> torch.Tensor:
    """Return positions (k,) int64, not yet checked against the size of the tensor (a bitmap apart).

    Raises:
        ValueError: A bitmap of another size, or gaps that end in the middle of a number.
    """
    if kind == "all":
        return torch.arange(elements)
    assert stored is not None
    if kind == "idx":
        return stored.long()
    raw = stored.numpy()
    if kind == "gap":
        return _decode_gaps(raw)
    flags = np.unpackbits(raw, bitorder="little")
    if len(raw) != -(-elements // 8) or flags[elements:].any():
        raise ValueError("the bitmap is not that of a tensor of this size")
    return torch.from_numpy(np.flatnonzero(flags))


def _encode_gaps(positions: torch.Tensor) -> torch.Tensor:
    where = positions.numpy()
    gaps = np.diff(where, prepend=-1) - 1
    length = np.ones(len(gaps), dtype=np.int64)
    for digits in range(1, 9):
        length += gaps >> (7 * digits) > 0
    ends = np.cumsum(length)
    out = np.zeros(ends[-1], dtype=np.uint8)
    for digit in range(int(length.max())):
        has = length > digit
        more = (length[has] > digit + 1).astype(np.int64) << 7
        out[(ends - length)[has] + digit] = (gaps[has] >> (7 * digit)) & 127 | more
    return torch.from_numpy(out)


def _decode_gaps(raw: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    if len(raw) == 0 or raw[-1] & 128:
        raise ValueError("the gaps end in the middle of a number")
    last = raw < 128
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    number: np.ndarray[Any, np.dtype[np.int64]] = np.cumsum(last) - last  # which gap a byte belongs to
    digit = np.arange(len(raw)) - starts[number]
    if digit.max() > 8:
        raise ValueError("a gap has more than nine digits")
    gaps = np.add.reduceat((raw & 127).astype(np.int64) << (7 * digit), starts)
    return torch.from_numpy(np.cumsum(gaps + 1) - 1)


# ---- writing -----------------------------------------------------------------------------------------------


class DeltaWriter:
    """Collects the entries of a delta, encoded, and writes them at once.

    What is in memory is the file. ``about`` and the rest of the header are given at the end.
    """

    def __init__(self, *, old_values: bool = False) -> None:
        self.old_values = old_values
        self.tensors: dict[str, Touched] = {}
        self._stored: dict[str, torch.Tensor] = {}

    def add(
        self, name: str, shape: tuple[int, ...], entry: Entry, *, dtype: str, before: str, after: str
    ) -> None:
        """Add a tensor that changed; one without a changed element is left out."""
        count, elements = entry.positions.numel(), int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return
        kind, stored = encode(entry.positions, elements)
        if stored is not None:
            self._stored[f"{name}.{kind}"] = stored
        self._stored[f"{name}.val"] = entry.values
        if self.old_values:
            assert entry.old is not None
            self._stored[f"{name}.base"] = entry.old
        self.tensors[name] = Touched(shape, dtype, count, kind, before, after)

    def write(
        self,
        path: str | Path,
        *,
        base: str | None,
        revision: str | None,
        dtype: str | None,
        elements: int,
        cast: Mapping[str, str],
        tied: Mapping[str, str],
        about: Any = None,
    ) -> Header:
        """Write the file under a name of its own and then rename it: a file of this name is complete.

        Raises:
            OSError: It cannot be written, for example because the disk is full; nothing is left behind.
        """
        header = Header(
            base, revision, dtype, elements, self.tensors, dict(cast), dict(tied), self.old_values, about
        )
        content = {"version": VERSION, "mode": "absolute", **asdict(header)}
        metadata = {"format": FORMAT, "delta": json.dumps(content, ensure_ascii=False)}
        with finished_file(Path(path)) as partial:
            save_tensors(self._stored, partial, metadata)
        return header


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file and wait until it is on the disk; a full disk is an OSError, as elsewhere."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise as_os_error(error, path) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def as_os_error(error: SafetensorError, path: Path) -> Exception:
    """Return the OSError that safetensors put into words, or ``error`` itself where it is another one."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return error if found is None else OSError(int(found[1]), os.strerror(int(found[1])), str(path))


# ---- reading -----------------------------------------------------------------------------------------------


class DeltaFile:
    """A delta file, or a folder that holds one; use as a context manager to read tensors.

    Args:
        path: File, or folder with :data:`~posttrain.models.load.DELTA_FILE` in it.

    Attributes:
        header: See :class:`Header`.
        folder: The folder, or None when a file was given.

    Raises:
        DeltaError: No such file, not a delta, damaged, or written by a later version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.folder = self.path if self.path.is_dir() else None
        if self.folder is not None:
            self.path /= DELTA_FILE
        self._file: Any = None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                self._names = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise DeltaError(f"{self.path} cannot be read as a delta: {error}") from error
        self.header = _read_header(metadata, self.path)
        self._check_names()

    def __enter__(self) -> DeltaFile:
        self._file = safe_open(self.path, framework="pt")
        return self

    def __exit__(self, *error: object) -> None:
        self._file = None

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def entry(self, name: str) -> Entry:
        """Return the changed elements of a tensor.

        Raises:
            DeltaError: Positions out of range, unsorted, or not as many as there are values.
        """
        touched = self.header.tensors[name]
        stored = None if touched.positions == "all" else self._get(f"{name}.{touched.positions}")
        values = self._get(f"{name}.val")
        old = self._get(f"{name}.base") if self.header.old_values else None
        try:
            if not 0 < touched.changed <= touched.elements:
                raise ValueError(f"{touched.changed} values of {touched.elements} elements")
            # before positions are made of it: a damaged size may be huge
            if not all(side.shape == (touched.changed,) for side in (values, old) if side is not None):
                raise ValueError(f"the header says {touched.changed} values, found {tuple(values.shape)}")
            where = decode(touched.positions, stored, touched.elements)
            if where.numel() != touched.changed:
                raise ValueError(f"{where.numel()} positions for {touched.changed} values")
        except ValueError as error:
            raise DeltaError(f"{self.path} is damaged at {name}: {error}") from error
        if where[0] < 0 or where[-1] >= touched.elements or not bool((where[1:] > where[:-1]).all()):
            raise DeltaError(
                f"{self.path} is damaged at {name}: positions are sorted and lie in [0, {touched.elements}), "
                f"found {int(where.min())} to {int(where.max())}"
            )
        return Entry(where, values, old)

    def _get(self, key: str) -> torch.Tensor:
        value: torch.Tensor = self._file.get_tensor(key)
        return value

    def _check_names(self) -> None:
        wanted = set()
        for name, touched in self.header.tensors.items():
            kinds = ["val", *(["base"] if self.header.old_values else [])]
            kinds += [] if touched.positions == "all" else [touched.positions]
            wanted |= {f"{name}.{kind}" for kind in kinds}
        if wanted != self._names:
            odd = sorted(wanted ^ self._names)
            raise DeltaError(
                f"{self.path} is damaged: its header and its tensors disagree about {', '.join(odd[:3])}"
            )


def _read_header(metadata: Mapping[str, str], path: Path) -> Header:
    if metadata.get("format") != FORMAT:
        raise DeltaError(
            f"{path} is a safetensors file, but not a delta: its format is {metadata.get('format')!r}, "
            f"needed {FORMAT!r}"
        )
    try:
        content = json.loads(metadata["delta"])
        version, mode = content.pop("version"), content.pop("mode")
        if (version, mode) != (VERSION, "absolute"):
            raise DeltaError(
                f"{path} is a delta of version {version!r}, mode {mode!r}; this posttrain reads version "
                f"{VERSION}, mode 'absolute': update posttrain"
            )
        tensors = {
            name: Touched(**{**about, "shape": tuple(about["shape"])})
            for name, about in content.pop("tensors").items()
        }
        return Header(tensors=tensors, **content)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise DeltaError(f"{path} is a delta with a damaged header: {error!r}") from error

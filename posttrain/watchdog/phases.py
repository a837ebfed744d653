"""Where this process is in its run: written by the code that works, read by the watchdog.

Ranks run the same phases in the same order, so their places compare: a rank whose place is smaller is behind.
Setting a phase costs about a microsecond and asks no other process.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

LIMITS: dict[str, float] = {
    "loading": 1800,
    "data": 600,
    "generation": 1800,
    "rewards": 40,
    "weight_sync": 600,
    "log_probs": 900,
    "backward": 900,
    "optimizer": 600,
    "callbacks": 300,
    "saving": 1800,
    "evaluation": 1800,
    "export": 1800,
}
"""Phases, with the seconds a rank may stay in one without getting on while others wait for it.

Short only where work has time limits of its own: verifiers have (:mod:`posttrain.rewards.pool`), and a reward
function that takes long beside the others is one that hangs. A phase that took longer before may take longer
again: :data:`posttrain.watchdog.judging.HEALTHY` times the longest that a rank has worked in it. Generation,
saving and evaluation differ between ranks by minutes in healthy runs.
"""


class Place(NamedTuple):
    """A moment of a run.

    Attributes:
        chapter: Counts the parts of a run (loading, evaluation, training ...).
        step: The optimiser step under way, from 1; 0 outside training.
        order: Changes of phase since the step or chapter began.
        phase: A key of :data:`LIMITS`.
        since: ``time.monotonic()`` of the last change.
    """

    chapter: int
    step: int
    order: int
    phase: str
    since: float

    @property
    def position(self) -> tuple[int, int, int]:
        """What compares between ranks."""
        return self.chapter, self.step, self.order


_place = Place(0, 0, 0, "loading", time.monotonic())
_beats = 0
_mirror: mmap.mmap | None = None
_MIRROR_BYTES = 128


def place() -> Place:
    """Return where this process is."""
    return _place


def beats() -> int:
    """Return how often :func:`beat` was called."""
    return _beats


def beat() -> None:
    """Say that long work within a phase gets on; a reward function of yours may call it too."""
    global _beats
    _beats += 1


def chapter(phase: str) -> None:
    """Begin another part of the run; every rank does."""
    _go(_place.chapter + 1, 0, 0, phase)


def step(number: int, phase: str = "data") -> None:
    """Begin an optimiser step; every rank does."""
    _go(_place.chapter, number, 0, phase)


def enter(phase: str) -> None:
    """Go on to another phase of the same step; every rank does."""
    _go(_place.chapter, _place.step, _place.order + 1, phase)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Be in another phase for a while; every rank is. After an error the place stays, to be named."""
    before = _place.phase
    enter(name)
    yield
    enter(before)


def mirror(path: Path) -> None:
    """Keep the place in a file too, so that other processes know it after this one was killed."""
    global _mirror
    path.write_bytes(bytes(_MIRROR_BYTES))
    with path.open("r+b") as file:
        _mirror = mmap.mmap(file.fileno(), _MIRROR_BYTES)
    _reflect()


def mirrored(path: Path) -> Place | None:
    """Return the place in a file of :func:`mirror`, whose ``since`` compares on one machine; None without."""
    try:
        chapter, step, order, phase, since = path.read_bytes().rstrip(b"\0 ").decode().split()
        return Place(int(chapter), int(step), int(order), phase, float(since))
    except (OSError, ValueError):
        return None


def _go(chapter: int, step: int, order: int, phase: str) -> None:
    global _place
    _place = Place(chapter, step, order, phase, time.monotonic())
    if _mirror is not None:
        _reflect()


def _reflect() -> None:
    assert _mirror is not None
    text = " ".join(map(str, _place)).encode()
    _mirror[:] = text.ljust(_MIRROR_BYTES)

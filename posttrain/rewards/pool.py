"""Verifier processes that can be killed: one deadline per item, no item lost, none judged twice."""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.rewards import registry
from posttrain.rewards.process import EXIT_PATIENCE_SECONDS, WorkerProcess, describe_exit, import_path
from posttrain.rewards.registry import VerifierSpec
from posttrain.rewards.verdict import Verdict
from posttrain.watchdog.phases import beat

WINDOW_ITEMS = 64
WINDOW_BYTES = 1 << 20
TICK_SECONDS = 0.2
ATTEMPTS_BEFORE_START = 2


class VerifierStartError(RuntimeError):
    """A verifier process could not be started or did not become ready; the message says why."""


class VerifierPool:
    """Processes that run one verifier, each item under a deadline.

    A process that overruns is killed with everything it started, its item becomes ``timeout`` and the process
    is replaced; a process that dies makes its item ``error``; items behind it are given to another one. The
    processes start with the pool, in the background; they end with :meth:`close`, with the pool (garbage
    collection, interpreter exit) and with the parent, even if that is killed.

    Args:
        spec: The verifier.
        deadline: Seconds one item may take, counted from when a process begins it.
        workers: Number of processes.
        memory_gib: Address space of each process in GiB, or None for no limit.
        start_timeout: Seconds a process may take to import what it needs, and to begin an item it was sent.

    Raises:
        ValueError: No such verifier, parameters it does not take, or a number out of range.
    """

    def __init__(
        self,
        spec: VerifierSpec,
        *,
        deadline: float = 10.0,
        workers: int = 1,
        memory_gib: float | None = 4.0,
        start_timeout: float = 120.0,
    ) -> None:
        registry.check(spec)
        if not (deadline > 0 and math.isfinite(deadline)) or workers < 1:
            raise ValueError(f"deadline must be > 0 and workers >= 1, found {deadline} and {workers}")
        if memory_gib is not None and not memory_gib > 0:
            raise ValueError(f"memory_gib must be > 0 or None, found {memory_gib}")
        self.spec = spec
        self.deadline = deadline
        self.workers = workers
        self.start_timeout = start_timeout
        self.restarts = 0
        memory = None if memory_gib is None else int(memory_gib * 2**30)
        self._hello = {"name": spec.name, "params": spec.params, "deadline": deadline, "memory": memory}
        self._columns = spec.sent_columns()
        self._lock = threading.Lock()
        self._slots: list[_Slot] = []
        self._closed = False
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _end_all, self._slots, self._owner)
        self._fill()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. The pool cannot be used afterwards; closing again does nothing."""
        self._closed = True
        self._finalizer()

    def wait_ready(self) -> None:
        """Wait until every process has loaded its verifier.

        Raises:
            VerifierStartError: One could not.
        """
        self._run([], [])

    def verify(self, completions: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge each completion against its row, in order.

        Args:
            completions: Texts; for a user function whatever JSON can hold, such as lists of messages.
            rows: One data row per completion; only the columns the verifier reads are sent.

        Returns:
            One verdict per completion.

        Raises:
            VerifierStartError: A process could not be started.
            TypeError: A row holds something JSON cannot.
        """
        if len(completions) != len(rows):
            raise ValueError(
                f"found {len(completions)} completions and {len(rows)} rows; one row each is needed"
            )
        payloads = [self._encode(text, row) for text, row in zip(completions, rows, strict=True)]
        return self._run(payloads, list(range(len(payloads))))

    def _encode(self, completion: Any, row: Mapping[str, Any]) -> bytes:
        kept = row if self._columns is None else {name: row[name] for name in self._columns if name in row}
        try:
            return json.dumps({"completion": completion, "row": dict(kept)}, default=_plain).encode()
        except (TypeError, ValueError) as error:
            kinds = {name: type(value).__name__ for name, value in kept.items()}
            raise TypeError(
                f"verifier {self.spec.name!r} gets its rows as JSON; this one cannot be written: {error}. "
                f"Columns and types: {kinds}. Drop or convert the column."
            ) from error

    def _fill(self) -> None:
        hello = self._hello | {"path": import_path()}
        while len(self._slots) < self.workers:
            self._slots.append(_Slot(WorkerProcess(hello)))

    def _run(self, payloads: list[bytes], waiting: list[int]) -> list[Verdict]:
        with self._lock:
            if self._closed:
                raise RuntimeError("this verifier pool is closed")
            if os.getpid() != self._owner:
                raise RuntimeError(
                    "a verifier pool belongs to the process that made it; make one after the fork"
                )
            batch = _Batch(payloads, waiting)
            try:
                while batch.open or not all(slot.process.ready for slot in self._slots):
                    self._step(batch)
            except BaseException:
                # whatever was under way is void: the next call starts with fresh processes
                _end_all(self._slots, self._owner)
                raise
            return [verdict for verdict in batch.verdicts if verdict is not None]

    def _step(self, batch: _Batch) -> None:
        beat()  # what hangs below has a deadline
        self._fill()
        now = time.monotonic()
        for slot in self._slots:
            slot.feed(batch, now)
        read = self._wait(now)
        now = time.monotonic()
        for slot in list(self._slots):
            # what has arrived is taken before the clock is looked at
            ended = slot.take(batch, now) if slot in read else False
            if ended or slot.process.exited():
                slot.take(batch, now)
                self._replace(slot, batch, None)
            elif slot not in read and (problem := slot.overdue(now, self.deadline, self.start_timeout)):
                self._replace(slot, batch, problem)

    def _wait(self, now: float) -> set[_Slot]:
        limits = [slot.since + self.deadline - now for slot in self._slots if slot.started is not None]
        with selectors.DefaultSelector() as selector:
            for slot in self._slots:
                selector.register(slot.process.output, selectors.EVENT_READ, slot)
                if slot.process.outgoing:
                    selector.register(slot.process.input, selectors.EVENT_WRITE, slot)
            ready = selector.select(max(0.0, min([TICK_SECONDS, *limits])))
        for key, events in ready:
            if events & selectors.EVENT_WRITE:
                key.data.process.flush()
        return {key.data for key, events in ready if events & selectors.EVENT_READ}

    def _replace(self, slot: _Slot, batch: _Batch, problem: str | None) -> None:
        """End a process that overran (``problem``) or died, and settle its items."""
        self._slots.remove(slot)
        code = slot.process.end(0.0 if problem else EXIT_PATIENCE_SECONDS)
        how = problem or describe_exit(code)
        if not slot.process.ready:
            raise VerifierStartError(
                f"verifier {self.spec.name!r} did not start: {slot.failure or how}. "
                "What it wrote is on stderr."
            )
        self.restarts += 1
        seconds = time.monotonic() - slot.since
        if slot.started is not None and (problem or code == -signal.SIGALRM):
            message = f"no verdict within the deadline of {self.deadline:g} s; the process was killed"
            batch.settle(slot.inflight.popleft(), Verdict("timeout", None, None, message, seconds))
        elif slot.started is not None:
            message = f"the verifier process died ({how})"
            batch.settle(slot.inflight.popleft(), Verdict("error", None, None, message, seconds))
        elif slot.inflight:
            batch.blame(slot.inflight[0], f"the verifier process died before it began this item ({how})")
        batch.take_back(slot.inflight)


class _Batch:
    """The items of one call: what waits, and the verdicts so far."""

    def __init__(self, payloads: list[bytes], waiting: list[int]) -> None:
        self.payloads = payloads
        self.waiting = deque(waiting)
        self.verdicts: list[Verdict | None] = [None] * len(payloads)
        self.open = len(payloads)
        self._blamed: dict[int, int] = {}

    def settle(self, index: int, verdict: Verdict) -> None:
        assert self.verdicts[index] is None
        self.verdicts[index] = verdict
        self.open -= 1

    def blame(self, index: int, message: str) -> None:
        """Count a death in front of an item that had not begun; it fails when that happens again."""
        self._blamed[index] = self._blamed.get(index, 0) + 1
        if self._blamed[index] >= ATTEMPTS_BEFORE_START:
            self.settle(index, Verdict("error", None, None, message))

    def take_back(self, indices: deque[int]) -> None:
        self.waiting.extendleft(index for index in reversed(indices) if self.verdicts[index] is None)


class _Slot:
    """A process with the items it was given, in order; the first may have begun."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.inflight: deque[int] = deque()
        self.started: int | None = None
        self.since = time.monotonic()
        self.failure: str | None = None

    def feed(self, batch: _Batch, now: float) -> None:
        """Hand out items ahead of need, so that the process never waits for us."""
        process = self.process
        while (
            process.ready
            and batch.waiting
            and len(self.inflight) < WINDOW_ITEMS
            and (not self.inflight or len(process.outgoing) < WINDOW_BYTES)
        ):
            index = batch.waiting.popleft()
            if not self.inflight:
                self.since = now
            self.inflight.append(index)
            process.outgoing += b"%d %b\n" % (index, batch.payloads[index])
        if process.outgoing:
            process.flush()

    def take(self, batch: _Batch, now: float) -> bool:
        """Read what the process has said; return whether its output ended."""
        lines, ended = self.process.read_lines()
        for line in lines:
            word, _, rest = line.partition(b" ")
            if word == b"start":
                self.started, self.since = int(rest), now
                assert self.started == self.inflight[0]
            elif word == b"done":
                identifier, _, fields = rest.partition(b" ")
                assert int(identifier) == self.started
                status, score, answer, message = json.loads(fields)
                verdict = Verdict(status, score, answer, message, now - self.since)
                batch.settle(self.inflight.popleft(), verdict)
                self.started, self.since = None, now
            elif word == b"ready":
                self.process.ready, self.since = True, now
            else:
                self.failure = json.loads(rest)
        return ended

    def overdue(self, now: float, deadline: float, start_timeout: float) -> str | None:
        """Return what took too long, or None."""
        elapsed = now - self.since
        if self.started is not None:
            return "deadline" if elapsed > deadline else None
        waits = bool(self.inflight) or not self.process.ready
        return f"not ready after {start_timeout:g} s" if waits and elapsed > start_timeout else None


def _end_all(slots: list[_Slot], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner: the processes are not ours to end
    while slots:
        slots.pop().process.end()


def _plain(value: Any) -> Any:
    """Turn numpy and torch values into JSON ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"an object of type {type(value).__name__}")

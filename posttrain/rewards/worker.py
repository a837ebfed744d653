"""The verifier process: ``python -m posttrain.rewards.worker``.

It reads a hello and then items from its standard input, and answers on a private copy of its standard output;
both streams are then pointed elsewhere, so that verifiers that print or read do no harm. Lines, in order::

    in   {"name": ..., "params": {...}, "deadline": s, "memory": bytes or null, "path": [...]}
    out  ready                            or   failed "message"
    in   ID {"completion": ..., "row": {...}}
    out  start ID                         when work on the item begins: the parent's deadline runs from here
    out  done ID [status, score, answer, message]

JSON is pure ASCII, so NUL bytes and lone surrogates pass. The parent kills a process that overruns. Should
the parent itself die, a thread that watches the input pipe ends this process, and an alarm does so when a
verifier holds the interpreter lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable

from posttrain.rewards.registry import VerifierSpec, resolve
from posttrain.rewards.verdict import MESSAGE_LIMIT, Verdict

ALARM_GRACE_SECONDS = 5.0
"""How much later than the deadline the process ends itself, should nobody have killed it."""


def main() -> None:
    """Serve items until the parent closes the pipe."""
    source, sink = _private_streams()
    threading.Thread(target=_end_with_parent, args=(source,), daemon=True).start()
    lines = _Lines(source)
    hello = json.loads(lines.next())
    try:
        _limit_memory(hello["memory"])
        sys.path[:] = hello["path"]
        verify = resolve(VerifierSpec(hello["name"], hello["params"]))
    except BaseException as error:
        _write(sink, b"failed " + json.dumps(_describe(error)).encode() + b"\n")
        raise SystemExit(1) from error
    _write(sink, b"ready\n")
    _serve(lines, sink, verify, hello["deadline"])


def _serve(lines: _Lines, sink: int, verify: Callable[..., Verdict], deadline: float) -> None:
    outgoing = b""
    while True:
        # a result waits for the next start mark only when that can be written without waiting for input
        if outgoing and not lines.available():
            _write(sink, outgoing)
            outgoing = b""
        identifier, _, payload = lines.next().partition(b" ")
        _write(sink, outgoing + b"start " + identifier + b"\n")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # an earlier item may have left a handler of its own
        signal.setitimer(signal.ITIMER_REAL, deadline + ALARM_GRACE_SECONDS)
        verdict = _judge(verify, payload)
        signal.setitimer(signal.ITIMER_REAL, 0)
        fields = json.dumps([verdict.status, verdict.score, verdict.answer, verdict.message])
        outgoing = b"done " + identifier + b" " + fields.encode() + b"\n"


def _judge(verify: Callable[..., Verdict], payload: bytes) -> Verdict:
    try:
        item = json.loads(payload)
        return verify(item["completion"], item["row"])
    except BaseException as error:  # SystemExit and the like come from the verifier, not from us
        return Verdict("error", None, None, _describe(error))


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:
        text = f"(its message raised {type(second).__name__})"
    return f"{type(error).__name__}: {text}"[:MESSAGE_LIMIT]


def _private_streams() -> tuple[int, int]:
    source, sink = os.dup(0), os.dup(1)  # not inherited by programs that a verifier starts
    nothing, end = os.pipe()  # empty for certain: what stands at /dev/null is up to the machine
    os.close(end)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return source, sink


def _end_with_parent(source: int) -> None:
    poll = select.poll()
    poll.register(source, 0)  # only hang-up and error, which are always reported
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _limit_memory(limit: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS knows the limit but does not take it
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _write(sink: int, data: bytes) -> None:
    while data:
        data = data[os.write(sink, data) :]


class _Lines:
    """Lines of a file descriptor, with a look at whether one is at hand."""

    def __init__(self, source: int) -> None:
        self._source = source
        self._ready: list[bytes] = []
        self._rest: list[bytes] = []

    def available(self) -> bool:
        return bool(self._ready)

    def next(self) -> bytes:
        while not self._ready:
            chunk = os.read(self._source, 1 << 18)
            if not chunk:
                raise SystemExit(0)
            self._rest.append(chunk)
            if b"\n" in chunk:
                *complete, rest = b"".join(self._rest).split(b"\n")
                self._ready = complete[::-1]
                self._rest = [rest] if rest else []
        return self._ready.pop()


if __name__ == "__main__":
    main()

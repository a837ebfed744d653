"""The judge of what the command line makes of hostile input."""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

CASE_SECONDS = 60
"""What one case may take on a busy machine; the slow ones take 2."""

# "failed: KeyError: 'x'": a library's or our own exception where a sentence for the user belongs.
_INTERNAL = re.compile(
    r"^failed(?: \(rank \d+\))?: [A-Za-z_.]*(?:Error|Exception|Interrupt|Exit|Warning|\b[A-Z]\w+)(?::|$)",
    re.M,
)


class Hang(BaseException):
    """A case took longer than its limit; no handler of ours or of a library's catches it."""


class Finding(AssertionError):
    """The program did what it never may."""


@contextlib.contextmanager
def limited(seconds: int = CASE_SECONDS) -> Iterator[None]:
    """Raise :class:`Hang` in the main thread after ``seconds``."""

    def ring(number: int, frame: Any) -> None:
        raise Hang(f"no end after {seconds} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


@dataclass
class Answer:
    """What a command said: its exit code and all its output."""

    arguments: tuple[str, ...]
    code: int
    output: str
    error: str = field(default="")


def invoke(*arguments: Any, seconds: int = CASE_SECONDS) -> Answer:
    """Run a command in this process and judge it.

    Raises:
        Finding: An exception came out, the exit code is none of 0, 1 and 2, an error has no message, or the
            message is an exception's.
        Hang: It did not end.
    """
    from posttrain.cli import app

    words = tuple(map(str, arguments))
    with limited(seconds):
        result = CliRunner().invoke(app, list(words))
    said = f"posttrain {' '.join(map(ascii, words))}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        if isinstance(result.exception, Hang):
            raise result.exception
        raise Finding(
            f"{said} raised {type(result.exception).__name__}: {result.exception}"
        ) from result.exception
    output = result.output
    if result.exit_code not in (0, 1, 2):
        raise Finding(f"{said} ended with {result.exit_code}\n{output[-2000:]}")
    if "Traceback (most recent call last)" in output:
        raise Finding(f"{said} printed a traceback\n{output[-3000:]}")
    if result.exit_code and not output.strip():
        raise Finding(f"{said} ended with {result.exit_code} and said nothing")
    if match := _INTERNAL.search(output):
        raise Finding(f"{said} gave an exception for a message: {match[0]}\n{output[-2000:]}")
    return Answer(words, result.exit_code, output, result.stderr)


def fingerprint(*paths: Path) -> dict[str, str]:
    """Return the digest of every file below ``paths``, to see later that none was changed or lost."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}

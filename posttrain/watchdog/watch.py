"""The watchdog of a process: threads that publish its place and judge all ranks, and the way out."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.watchdog import phases
from posttrain.watchdog.judging import Limits, Peer, Verdict, at_place, judge, sentence, update, whereabouts

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
GRACE_SECONDS = 8.0
"""How long the main thread may take to come out by itself once the run has to stop."""

_BEAT_SECONDS = 1.0
_STORE_SECONDS = 10.0
"""How long the end waits for a call of the store that is under way."""
_RANKS_PER_SECOND = 64
_INSTANCES = 0


class RankFailure(RuntimeError):
    """A rank died, hung or failed; the message, printed already, says which, where, and how to go on."""


class Watchdog:
    """Publishes the place of this rank and judges all ranks; one per run and process.

    Args:
        folder: Where stacks and the reason of a stop are written.
        limits: In seconds.
        rank: This rank.
        world: Number of ranks.
        checkpoints: Folder of the checkpoints, to name the newest.
        go_on: How to go on, in words.
    """

    def __init__(
        self, folder: Path, limits: Limits, *, rank: int, world: int, checkpoints: Path, go_on: str
    ) -> None:
        self.folder, self.limits, self.rank, self.world = folder, limits, rank, world
        self.checkpoints, self.go_on = checkpoints, go_on
        self.verdict: Verdict | None = None
        self.message = ""
        self._main = threading.main_thread()
        self._me = _identity(rank)
        self._left = self._error = self._where = ""
        self._peers: dict[int, Peer] = {}
        self._clock = self._contact = 0.0
        self._beat, self._lock = 0, threading.RLock()
        self._ended = threading.Event()
        self._warned: tuple[int, ...] | None = None
        self._store: Any = None
        self._exchanging: threading.Thread | None = None
        self._address = ""
        self._published = -1.0
        self._stacks: Any = None
        self._seen: tuple[int, ...] = ()
        self._seen_at = self._armed = 0.0
        self._hurry = threading.Event()
        self._exchanges = 0
        self._explaining = False

    # ---- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to publish and to judge, in threads."""
        if self.world > 1:
            self._store = self._connect()
            if self._store is None:
                return
            # beforehand and elsewhere: what stands still can open nothing, and the run directory may move
            self._stacks = Path(self._me["frozen"]).open("w")  # noqa: SIM115
            self._arm()  # a process may stand still within its first second
            phases.mirror(Path(self._me["mirror"]))
            self._exchanging = threading.Thread(target=self._exchange, name="posttrain-beat", daemon=True)
            self._exchanging.start()
        threading.Thread(target=self._watch, name="posttrain-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End the threads; what was said last stays in the store."""
        self._ended.set()
        self._hurry.set()
        if self._exchanging is not None:
            # the store's calls are C++: one that comes back while the interpreter ends aborts the process
            self._exchanging.join(_STORE_SECONDS)
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            Path(self._me["frozen"]).unlink(missing_ok=True)
            Path(self._me["mirror"]).unlink(missing_ok=True)

    def _connect(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        global _INSTANCES
        _INSTANCES += 1
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if not host or not port:
            logger.warning("no MASTER_ADDR and MASTER_PORT: ranks that die or hang will not be named")
            return None
        self._address = f"{host}:{port}"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        wait = timedelta(seconds=60)
        try:
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=wait)
        except (RuntimeError, ValueError) as error:
            logger.warning(
                "no store at %s (%s): ranks that die or hang will not be named", self._address, error
            )
            return None
        return PrefixStore(f"posttrain/watchdog/{attempt}/{_INSTANCES}", store)

    # ---- what is said -----------------------------------------------------------------------------------

    def _say(self) -> dict[str, Any]:
        place, (waiting, where) = phases.place(), _main_thread(self._main)
        self._beat += 1
        return {
            **self._me,
            "beat": self._beat,
            "position": list(place.position),
            "beats": phases.beats(),
            "phase": place.phase,
            "step": place.step,
            "seconds": time.monotonic() - place.since,
            "waiting": waiting,
            "where": self._where or where,
            "left": self._left,
            "error": self._error,
            "verdict": None if self.verdict is None else asdict(self.verdict),
        }

    def _exchange(self) -> None:
        interval = max(_BEAT_SECONDS, self.world / _RANKS_PER_SECOND)
        names = [str(rank) for rank in range(self.world)]
        unseen = set(names)
        while True:
            over = self._ended.is_set()
            try:
                self._store.set(str(self.rank), json.dumps(self._say()))
                self._published = time.monotonic()
                unseen = {name for name in unseen if not self._store.check([name])}
                known = [name for name in names if name not in unseen]
                said = {
                    int(n): json.loads(v) for n, v in zip(known, self._store.multi_get(known), strict=True)
                }
            except RuntimeError:  # the store is gone
                with self._lock:
                    self._contact = -1e9
                return
            with self._lock:
                self._exchanges += 1
                self._contact = self._clock
                update(self._peers, said, self._clock)
            if over:
                return
            if self._left or self.verdict:
                self._ended.wait(0.2)
            else:
                self._hurry.wait(interval)
                self._hurry.clear()

    # ---- judging ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(TICK_SECONDS):
            now = time.monotonic()
            # the clock stands still while the process does, so that it does not blame others for its own stop
            self._clock += min(now - last, 4 * TICK_SECONDS)
            last = now
            if self._stacks is not None and self._clock - self._armed > 1:
                self._arm()
            if self.world == 1 or self._store is None:
                self._name_slow()
                continue
            if self._left:
                continue
            with self._lock:
                verdict = self._judge()
            if verdict is not None and verdict.kind == "gone":
                # it may have said why, and the others may know more, since the store was last read
                exchanges = self._exchanges
                self._hurry.set()
                self._await(lambda now=exchanges: self._exchanges > now, 3.0)
                with self._lock:
                    verdict = self._judge()
            if verdict is not None:
                self.verdict = verdict = self._precisely(verdict)
                self._hurry.set()
                self._end(verdict)
                return

    def _arm(self) -> None:
        """Have the stacks written when this process stands still from now on."""
        self._armed = self._clock
        faulthandler.dump_traceback_later(max(1.0, 0.5 * self.limits.silence), file=self._stacks)

    def _judge(self) -> Verdict | None:
        gone = {
            rank: not _alive(peer.said)
            for rank, peer in self._peers.items()
            if rank != self.rank and peer.said["machine"] == self._me["machine"]
        }
        return judge(self._peers, self.rank, self._clock, self.limits, gone=gone, contact=self._contact)

    def _precisely(self, verdict: Verdict) -> Verdict:
        """Take the place of a rank that is gone from its mirror: what it last said is up to a second old."""
        if verdict.kind not in ("gone", "silent") or verdict.said["machine"] != self._me["machine"]:
            return verdict
        place = phases.mirrored(Path(verdict.said["mirror"]))
        if verdict.kind == "gone":
            for name in ("mirror", "frozen"):
                Path(verdict.said[name]).unlink(missing_ok=True)
        if place is None:
            return verdict
        said = {**verdict.said, "phase": place.phase, "step": place.step, "position": list(place.position)}
        if said["position"] != verdict.said["position"]:
            said["where"] = ""
        said["seconds"] = max(0.0, time.monotonic() - place.since)
        return replace(verdict, said=said)

    def _name_slow(self) -> None:
        """Warn once of a phase beyond its limit, where there is no other rank to wait."""
        place = phases.place()
        seen = (*place.position, phases.beats())
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock
        limit = self.limits.of(place.phase)
        if limit is None or self._clock - self._seen_at <= limit or self._warned == seen:
            return
        self._warned = seen
        path = self._dump("slow")
        said = {**self._say()}
        logger.warning(
            "the run has been in %s for %.0f s without getting on%s; it goes on waiting.",
            at_place(said),
            said["seconds"],
            f" (the stack is in {path})" if path else "",
        )

    def _end(self, verdict: Verdict) -> None:
        """Write stacks and the reason down, let the main thread go, and end the process where it does not."""
        stack = None
        if verdict.kind in ("hung", "deadlock", "silent"):
            cause = self.folder / f"stack_rank{verdict.rank}.txt"
            if verdict.kind == "silent" and verdict.rank == self.rank:  # where it stood still is over by now
                stack = cause
            else:
                stack = self._dump("stack")
            if verdict.rank not in (self.rank, -1):
                self._await_knowledge(verdict.rank)
                stack = cause
            if verdict.kind == "silent":
                self._fetch_frozen(verdict.said, cause)
        with self._lock:
            self.message = self._text(verdict, stack)
        self._write(verdict)
        self.tell()
        self._await_everyone()
        self._ended.wait(2.0)  # the main thread may come out by itself, and the others may speak first
        if self._stuck():
            signal.pthread_kill(self._main.ident, signal.SIGINT)  # type: ignore[arg-type]
        if not self._ended.wait(GRACE_SECONDS):
            os._exit(1)

    def _stuck(self) -> bool:
        """Whether the main thread is in Python code that a signal brings out."""
        waiting, _ = _main_thread(self._main)
        if self._explaining or self._ended.is_set():
            return False
        return not waiting and self._main.is_alive() and callable(signal.getsignal(signal.SIGINT))

    def _text(self, verdict: Verdict, stack: Path | None) -> str:
        text = sentence(verdict, self._peers, self.limits, self._address)
        if stack is not None and stack.exists() and stack.stat().st_size:
            text += f" Its Python stack: {stack}." if verdict.rank >= 0 else f" Stacks: {self.folder}."
        newest = newest_checkpoint(self.checkpoints)
        kept = f"the newest checkpoint is {newest.name}" if newest else "no checkpoint was written yet"
        text = text if text.endswith((".", "!", "?")) else f"{text}."
        return f"{text} The run stops; {kept}, {self.go_on}."

    def _write(self, verdict: Verdict) -> None:
        """Write down why the run stops, for people and tools; any rank may, they say the same."""
        row = {
            "kind": verdict.kind,
            "rank": verdict.rank,
            "seconds": round(verdict.seconds, 2),
            "by": self.rank,
            "last": verdict.said,
            "message": self.message,
        }
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"stopped_rank{self.rank}.json").write_text(json.dumps(row, indent=1) + "\n")

    def _dump(self, name: str) -> Path | None:
        path = self.folder / f"{name}_rank{self.rank}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                place = phases.place()
                file.write(
                    f"{whereabouts(self._me)}, {at_place({**self._say()})}, position {place.position}\n"
                )
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            return None
        return path

    def _fetch_frozen(self, said: Mapping[str, Any], to: Path) -> None:
        """Keep what faulthandler wrote for a process that stands still, if it is of this machine."""
        with contextlib.suppress(OSError):
            if said["machine"] == self._me["machine"] and Path(said["frozen"]).stat().st_size:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(said["frozen"], to)

    # ---- leaving ----------------------------------------------------------------------------------------

    def _await(self, done: Any, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not done() and self._contact >= 0:
            time.sleep(0.05)

    def _await_knowledge(self, rank: int) -> None:
        """Give a rank the time to write its stack."""
        self._await(lambda: self._peers[rank].said["verdict"], 4.0)
        time.sleep(0.3)

    def _await_everyone(self) -> None:
        """Stay until the others have seen what this rank knows: the store may end with this process."""

        def seen() -> bool:
            with self._lock:
                others = [peer for rank, peer in self._peers.items() if rank != self.rank]
                return all(
                    peer.said["verdict"] or peer.said["left"] or self._clock - peer.heard > 2
                    for peer in others
                )

        self._await(seen, 3.0)

    def explain(self, error: BaseException) -> BaseException:
        """Return what to raise for an error of the main thread: itself, or the other rank that caused it."""
        interrupted = isinstance(error, KeyboardInterrupt)
        if self._store is None:
            return error
        self._explaining = True
        echo = interrupted or is_collective_error(error)
        if self.verdict is None and echo:
            # another's end is seen at once on this machine, elsewhere when it has been silent for long
            patience = 2.5 if interrupted else self.limits.silence + 5
            until = time.monotonic() + patience
            while self.verdict is None and time.monotonic() < until:
                try:
                    time.sleep(0.05)
                except KeyboardInterrupt as other:  # the launcher ends those that are left
                    error, interrupted = other, True
        if self.verdict is not None and echo:
            until = time.monotonic() + 10
            while not self.message and time.monotonic() < until:
                with contextlib.suppress(KeyboardInterrupt):
                    time.sleep(0.05)
            if self.verdict.kind == "interrupted":
                return error if interrupted else KeyboardInterrupt()
            return RankFailure(self.message)
        from posttrain.errors import describe

        self._error, self._where = describe(error), _outside_libraries(traceback.walk_tb(error.__traceback__))
        self._left = "interrupted" if interrupted else "failed"
        self._hurry.set()
        if not interrupted:
            self._await_everyone()
        else:
            said = time.monotonic()
            self._await(lambda: self._published > said, 2.0)
        return error

    def done(self) -> None:
        """Say that this rank has come to its end, so that nobody misses it."""
        self._left = "done"
        self._hurry.set()
        if self._store is not None:
            said = time.monotonic()
            self._await(lambda: self._published > said, 2.0)

    def _speaks(self) -> bool:
        """Whether this rank prints for its machine: the first that is alive and not the cause."""
        assert self.verdict is not None
        with self._lock:
            here = {
                rank: rank == self.rank or _alive(peer.said)
                for rank, peer in self._peers.items()
                if peer.said["machine"] == self._me["machine"]
            }
        if self.verdict.kind == "failed" and self.verdict.rank in here:
            return False  # it prints its error itself
        others = [rank for rank in here if rank != self.verdict.rank]
        if self.rank == self.verdict.rank:
            return not others  # they have spoken, though they may have ended since
        return min(rank for rank in others if here[rank]) == self.rank

    def tell(self) -> None:
        """Print the message, once per machine."""
        assert self.verdict is not None
        if self.verdict.kind != "interrupted" and self._speaks():
            sys.stderr.write(f"stopped: {self.message}\n")
            sys.stderr.flush()


_CURRENT: Watchdog | None = None


@contextlib.contextmanager
def watching(
    folder: Path, limits: Limits | None, *, rank: int, world: int, checkpoints: Path, go_on: str
) -> Iterator[None]:
    """Watch over what is done inside; within another watch, or with ``limits`` None, nothing is added.

    Raises:
        RankFailure: Another rank died, hung or failed; instead of the error that this caused here.
    """
    global _CURRENT
    if limits is None or _CURRENT is not None:
        yield
        return
    _CURRENT = watchdog = Watchdog(
        folder, limits, rank=rank, world=world, checkpoints=checkpoints, go_on=go_on
    )
    watchdog.start()
    restore = _heard_signals() if world > 1 else None
    try:
        yield
        watchdog.done()
    except BaseException as error:
        cause = watchdog.explain(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        _CURRENT = None
        watchdog.stop()
        if restore is not None:
            restore()


def _heard_signals() -> Callable[[], object] | None:
    """Make SIGTERM, with which launchers end the others, an exception where it ends without a word."""
    if threading.current_thread() is not threading.main_thread():
        return None
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None

    def terminated(number: int, frame: Any) -> None:
        del number, frame
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, terminated)
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_collective_error(error: BaseException) -> bool:
    """Whether an error may be the echo of what happened to another rank."""
    from torch.distributed import DistError

    words = (
        "gloo",
        "nccl",
        "processgroup",
        "connection closed by peer",
        "connection reset by peer",
        "broken pipe",
    )
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _identity(rank: int) -> dict[str, Any]:
    pid, folder = os.getpid(), Path(tempfile.gettempdir())
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": pid,
        "born": _born(pid),
        "machine": _machine(),
        "frozen": str(folder / f"posttrain-frozen-{pid}.txt"),
        "mirror": str(folder / f"posttrain-place-{pid}"),
    }


def _machine() -> str:
    """Return what processes share that can see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; empty for none, or one that is only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _alive(said: Mapping[str, Any]) -> bool:
    if said["born"]:
        return _born(said["pid"]) == said["born"]
    try:  # no /proc
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _main_thread(main: threading.Thread) -> tuple[bool, str]:
    """Return whether the main thread is inside a collective, and the innermost place outside of libraries."""
    stack = list(traceback.walk_stack(sys._current_frames().get(main.ident or 0)))
    waiting = any(frame.f_code.co_filename.endswith(_COLLECTIVES) for frame, _ in stack)
    return waiting, _outside_libraries(reversed(stack))


def _outside_libraries(stack: Iterable[tuple[Any, int]]) -> str:
    """Return the last place of a stack, innermost last, in code that is not of a library."""
    where = ""
    for frame, line in stack:
        path = frame.f_code.co_filename
        if "site-packages" not in path and not path.startswith((_STDLIB, "<")):
            where = f"{frame.f_code.co_name} ({Path(path).name}:{line})"
    return where


_STDLIB = str(Path(os.__file__).parent)
_COLLECTIVES = ("distributed_c10d.py", "torch/distributed/utils.py")

"""Which rank is to blame, from what all have said, and in what words. No threads, no clocks, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.watchdog.phases import LIMITS

SILENCE_SECONDS = 20.0
COLLECTIVE_SECONDS = 900.0
HEALTHY = 3.0
"""Work in a phase of up to this many times the longest of this run so far is healthy, whatever the limit."""


@dataclass(frozen=True)
class Limits:
    """Seconds; None never stops.

    Attributes:
        silence: Without a sign of life of a process.
        collective: All ranks waiting for each other.
        phases: Per phase, on top of :data:`posttrain.watchdog.phases.LIMITS`.
    """

    silence: float = SILENCE_SECONDS
    collective: float | None = COLLECTIVE_SECONDS
    phases: Mapping[str, float | None] = field(default_factory=dict)

    def of(self, phase: str) -> float | None:
        """Return the limit of a phase."""
        return {**LIMITS, **self.phases}.get(phase)


@dataclass
class Peer:
    """What a rank has last said, and when that changed on this rank's clock.

    Attributes:
        worked: Seconds in the present phase before it began to wait for others, as far as heard.
        longest: The most of that in phases it has left.
    """

    said: dict[str, Any]
    heard: float
    moved: float
    behind: float | None = None
    worked: float = 0.0
    longest: dict[str, float] = field(default_factory=dict)

    @property
    def position(self) -> tuple[int, ...]:
        """Place that compares between ranks."""
        return tuple(self.said["position"])

    @property
    def waiting(self) -> bool:
        """Whether it is inside a collective."""
        return bool(self.said["waiting"])


@dataclass(frozen=True)
class Verdict:
    """What ends the run.

    Attributes:
        kind: gone, silent, hung, failed, interrupted, deadlock or contact.
        rank: The rank to blame; -1 for all.
        said: What it has last said.
        seconds: How long the condition had lasted, on the clock of the rank that judged.
    """

    kind: str
    rank: int
    said: dict[str, Any]
    seconds: float


def update(peers: dict[int, Peer], said: Mapping[int, dict[str, Any]], now: float) -> None:
    """Take in what ranks have said; ``now`` is this rank's clock."""
    for rank, message in said.items():
        peer = peers.get(rank)
        if peer is None:
            peers[rank] = Peer(message, now, now)
            continue
        if message["beat"] != peer.said["beat"]:
            peer.heard = now
        if (message["position"], message["beats"]) != (peer.said["position"], peer.said["beats"]):
            peer.moved, peer.behind = now, None
        if message["position"] != peer.said["position"]:
            left = peer.said["phase"]
            peer.longest[left] = max(peer.worked, peer.longest.get(left, 0.0))
            peer.worked = 0.0
        if not message["waiting"]:
            peer.worked = message["seconds"]
        peer.said = message


def judge(
    peers: dict[int, Peer], me: int, now: float, limits: Limits, *, gone: Mapping[int, bool], contact: float
) -> Verdict | None:
    """Return what ends the run, or None.

    Args:
        peers: What is known, this rank included.
        me: This rank.
        now: This rank's clock, which does not run while the process is stopped.
        limits: In seconds.
        gone: For ranks of this machine whether their process has ended.
        contact: When the store last answered.
    """
    others = {rank: peer for rank, peer in peers.items() if rank != me}
    for peer in others.values():
        if peer.said["verdict"]:  # one who has stood still learns what the others think of it
            return Verdict(**peer.said["verdict"])
    for kind in ("failed", "interrupted"):
        for rank, peer in others.items():
            if peer.said["left"] == kind:
                return Verdict(kind, rank, peer.said, 0.0)
    working = {rank: peer for rank, peer in others.items() if not peer.said["left"]}
    for rank, peer in working.items():
        if gone.get(rank):
            return Verdict("gone", rank, peer.said, now - peer.heard)
    if now - contact > limits.silence:
        if not working:
            return None
        return Verdict("contact", 0, peers[0].said if 0 in peers else {}, now - contact)
    for rank, peer in working.items():
        if contact - peer.heard > limits.silence:
            return Verdict("silent", rank, peer.said, now - peer.heard)
    return _late(peers, now, limits)


def _late(peers: dict[int, Peer], now: float, limits: Limits) -> Verdict | None:
    present = {rank: peer for rank, peer in peers.items() if not peer.said["left"]}
    if len(present) < 2:
        return None
    front = max(peer.position for peer in present.values())
    for rank, peer in sorted(present.items(), key=lambda item: (item[1].position, item[0])):
        others = [other for number, other in present.items() if number != rank]
        behind = peer.position < front or any(
            other.waiting and other.position == peer.position for other in others
        )
        if peer.waiting or not behind:
            peer.behind = None
            continue
        if peer.behind is None:
            peer.behind = now
        limit = _limit(peers, limits, peer.said["phase"])
        if limit is not None and now - peer.behind > limit:
            return Verdict("hung", rank, peer.said, now - peer.behind)
    still = now - max(peer.moved for peer in present.values())
    waiting = all(peer.waiting for peer in present.values())
    if waiting and limits.collective is not None and still > limits.collective:
        return Verdict("deadlock", -1, {}, still)
    return None


def _limit(peers: Mapping[int, Peer], limits: Limits, phase: str) -> float | None:
    """Return the limit of a phase, given how long ranks have worked in it so far."""
    limit = limits.of(phase)
    if limit is None:
        return None
    took = [peer.longest.get(phase, 0.0) for peer in peers.values()]
    took += [peer.worked for peer in peers.values() if peer.waiting and peer.said["phase"] == phase]
    return max(limit, HEALTHY * max(took))


def whereabouts(said: Mapping[str, Any]) -> str:
    """Return 'rank 1 (host a, pid 123)' of what a rank has said."""
    return f"rank {said['rank']} (host {said['host']}, pid {said['pid']})"


def at_place(said: Mapping[str, Any]) -> str:
    """Return "'rewards' of step 7, in score (mine.py:12)" of what a rank has said."""
    step = f" of step {said['step']}" if said["step"] else ""
    inside = f", in {said['where']}" if said["where"] else ""
    return f"'{said['phase']}'{step}{inside}"


def sentence(verdict: Verdict, peers: Mapping[int, Peer], limits: Limits, store: str) -> str:
    """Return what has happened, in words; how to go on is added by the caller."""
    said, kind = verdict.said, verdict.kind
    if kind == "gone":
        return (
            f"{whereabouts(said)} is gone: its process ended without a word (killed, out of memory, or a "
            f"crash in native code). It was last seen in {at_place(said)}, {said['seconds']:.0f} s into it."
        )
    if kind == "failed":
        return f"{whereabouts(said)} failed in {at_place(said)}: {said['error']}"
    if kind == "interrupted":
        return f"{whereabouts(said)} was asked to stop in {at_place(said)}."
    if kind == "silent":
        return (
            f"nothing was heard of {whereabouts(said)} for {verdict.seconds:.0f} s. It was last seen in "
            f"{at_place(said)}: its machine or network is down, or the whole process stands still (a stop "
            "signal, swapping, native code that keeps the interpreter). The limit is watchdog.silence."
        )
    if kind == "contact":
        if not said:
            return f"the store at {store} no longer answers, so the ranks have lost each other."
        return (
            f"the machine of {whereabouts(said)} no longer answers at {store}: the launcher there has ended, "
            f"or the machine or network is down. The rank was last seen in {at_place(said)}."
        )
    if kind == "deadlock":
        where = "; ".join(f"{whereabouts(peer.said)} in {at_place(peer.said)}" for peer in peers.values())
        return (
            f"all ranks have waited for each other for {verdict.seconds:.0f} s: {where}. They called "
            "different collectives, or the network between them is broken. The limit is watchdog.collective."
        )
    waiting = ", ".join(str(rank) for rank in sorted(peers) if rank != verdict.rank)
    likely = {
        "rewards": "a reward function that hangs (put a time limit into it)",
        "saving": "a disk that does not answer",
        "export": "a disk or hub that does not answer",
        "data": "a data source that does not answer",
        "callbacks": "a callback or tracker that hangs",
    }.get(said["phase"], "something in it that hangs")
    return (
        f"{whereabouts(said)} has been in {at_place(said)} for {said['seconds']:.0f} s, and rank {waiting} "
        f"waits for it. Likely {likely}; if it is only slow, raise watchdog.{said['phase']} "
        f"(now {_limit(peers, limits, said['phase']):.0f} s)."
    )

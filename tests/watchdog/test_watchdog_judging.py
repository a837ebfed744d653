"""Which rank is blamed, and when: the rules on clocks that are made up."""

import re
from pathlib import Path

import pytest

from posttrain.config.schema import WatchdogConfig
from posttrain.watchdog import phases
from posttrain.watchdog.judging import Limits, judge, sentence, update


class Ranks:
    """Three ranks that say what they are told to, once a second."""

    def __init__(self, limits=None):
        self.limits = limits or Limits()
        self.peers, self.now, self.contact, self.gone = {}, 0.0, 0.0, {}
        self.said = {
            rank: {
                "rank": rank,
                "host": f"host{rank}",
                "pid": 100 + rank,
                "beat": 0,
                "position": [1, 7, 3],
                "beats": 0,
                "phase": "backward",
                "step": 7,
                "seconds": 0.0,
                "waiting": False,
                "where": "",
                "left": "",
                "error": "",
                "verdict": None,
            }
            for rank in range(3)
        }
        self.mute = set()

    def says(self, rank, **what):
        self.said[rank].update(what)

    def run(self, seconds):
        """Let time pass; return the verdict of rank 0, or None."""
        until = self.now + seconds
        while self.now < until:
            self.now += 1
            for rank, said in self.said.items():
                if rank not in self.mute:
                    said["beat"] += 1
                    said["seconds"] += 1
            heard = {rank: dict(said) for rank, said in self.said.items() if rank not in self.mute}
            if self.contact is not None:
                self.contact = self.now
                update(self.peers, heard, self.now)
            verdict = judge(self.peers, 0, self.now, self.limits, gone=self.gone, contact=self.contact or 0.0)
            if verdict is not None:
                return verdict
        return None


@pytest.fixture
def ranks():
    return Ranks()


def test_healthy_ranks_that_work_side_by_side_go_on_for_ever(ranks):
    assert ranks.run(10_000) is None


def test_a_process_that_ended_is_blamed_at_once_unless_it_said_that_it_was_done(ranks):
    ranks.run(2)
    ranks.gone = {2: True}
    verdict = ranks.run(1)
    assert (verdict.kind, verdict.rank) == ("gone", 2)
    ranks.says(2, left="done")
    assert ranks.run(100) is None


def test_an_error_is_passed_on_before_the_end_of_its_process_is_noticed(ranks):
    ranks.says(1, left="failed", error="ValueError: no")
    ranks.gone = {1: True}
    verdict = ranks.run(1)
    assert (verdict.kind, verdict.rank) == ("failed", 1)
    assert sentence(verdict, ranks.peers, ranks.limits, "") == (
        "rank 1 (host host1, pid 101) failed in 'backward' of step 7: ValueError: no"
    )


def test_silence_counts_from_the_last_sign_of_life(ranks):
    ranks.run(5)
    ranks.mute = {1}
    assert ranks.run(20) is None
    verdict = ranks.run(2)
    assert (verdict.kind, verdict.rank, verdict.seconds) == ("silent", 1, 21)


def test_without_the_store_nobody_else_is_blamed(ranks):
    ranks.run(5)
    ranks.contact = None
    verdict = ranks.run(30)
    assert (verdict.kind, verdict.rank) == ("contact", 0)


@pytest.mark.parametrize("ahead", [{"position": [1, 7, 4]}, {"waiting": True}, {"position": [1, 8, 0]}])
def test_a_rank_that_hangs_while_others_wait_is_stopped_at_the_limit_of_its_phase(ranks, ahead):
    for rank in (0, 1, 2):
        ranks.says(rank, phase="rewards")
    assert ranks.run(10) is None
    ranks.says(0, **ahead)
    ranks.says(2, **ahead)
    assert ranks.run(phases.LIMITS["rewards"]) is None
    verdict = ranks.run(2)
    assert (verdict.kind, verdict.rank) == ("hung", 1)
    assert verdict.seconds < 60  # within a minute, by default
    text = sentence(verdict, ranks.peers, ranks.limits, "")
    assert "rank 1 (host host1, pid 101) has been in 'rewards' of step 7 for 52 s," in text
    assert "rank 0, 2 waits for it" in text
    assert "raise watchdog.rewards (now 40 s)" in text


def test_slow_phases_have_long_limits_and_progress_starts_them_anew(ranks):
    ranks.says(1, phase="generation")
    ranks.says(0, waiting=True)
    ranks.says(2, waiting=True)
    assert ranks.run(1700) is None
    ranks.says(1, beats=1)
    assert ranks.run(1700) is None
    assert ranks.run(200).kind == "hung"


def test_what_took_long_before_may_take_long_again_but_waiting_does_not_count(ranks):
    ranks.says(2, phase="rewards", seconds=0.0, position=[1, 7, 4])
    ranks.says(0, phase="rewards", seconds=0.0, position=[1, 7, 4])
    assert ranks.run(5) is None
    ranks.says(0, waiting=True)  # for rank 2, within the phase
    assert ranks.run(25) is None
    assert ranks.peers[0].worked == 5.0
    for rank in range(3):
        ranks.says(rank, phase="backward", seconds=0.0, position=[1, 7, 5])
    ranks.run(1)
    assert [ranks.peers[rank].longest.get("rewards") for rank in range(3)] == [5.0, None, 30.0]
    ranks.says(0, waiting=True)
    ranks.says(2, waiting=True)
    ranks.says(1, phase="rewards")
    assert ranks.run(85) is None  # 40 s is the limit of rewards that were fast so far
    verdict = ranks.run(10)
    assert (verdict.kind, verdict.rank) == ("hung", 1)
    assert "(now 90 s)" in sentence(verdict, ranks.peers, ranks.limits, "")


def test_others_wait_three_times_what_they_took_themselves_and_all_together_may_take_any_time(ranks):
    for rank in range(3):
        ranks.says(rank, phase="rewards", seconds=0.0, position=[1, 7, 4])
    assert ranks.run(1000) is None
    ranks.says(0, waiting=True)
    ranks.says(2, waiting=True)
    assert ranks.run(2990) is None
    assert ranks.run(20).kind == "hung"


def test_a_limit_of_none_never_stops():
    ranks = Ranks(Limits(collective=None, phases={"rewards": None}))
    ranks.says(1, phase="rewards")
    ranks.says(0, waiting=True)
    ranks.says(2, waiting=True)
    assert ranks.run(100_000) is None


def test_ranks_that_wait_for_each_other_are_named_together(ranks):
    for rank in (0, 1, 2):
        ranks.says(rank, waiting=True, where=f"call{rank} (a.py:{rank})")
    assert ranks.run(900) is None
    verdict = ranks.run(10)
    assert (verdict.kind, verdict.rank) == ("deadlock", -1)
    text = sentence(verdict, ranks.peers, ranks.limits, "")
    assert all(f"call{rank} (a.py:{rank})" in text for rank in (0, 1, 2))


def test_every_phase_that_code_enters_has_a_limit_and_a_key():
    root = Path(phases.__file__).parents[1]
    calls = re.compile(r'(?:phases\.(?:phase|enter|chapter)|(?<![.\w])(?:phase|chapter))\("(\w+)"\)')
    used = {name for path in root.rglob("*.py") for name in calls.findall(path.read_text())}
    assert {"rewards", "saving", "evaluation"} <= used <= set(phases.LIMITS)
    fields = WatchdogConfig.model_fields
    assert {name: fields[name].default for name in phases.LIMITS} == phases.LIMITS
    assert fields["silence"].default == Limits().silence
    assert fields["collective"].default == Limits().collective

"""A real vLLM server on the CPU: its answers are of the trainer's weights, also after it was killed."""

from __future__ import annotations

import json

import pytest
import test_vllm

pytestmark = test_vllm.pytestmark


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    """What each run found; one process, a server that is started twice."""
    folder = tmp_path_factory.mktemp("server")
    test_vllm.run_with_vllm("server_checks.py", str(folder), timeout=900)
    return json.loads((folder / "found.json").read_text())


def test_sampler_and_trainer_agree_while_weights_move(found) -> None:
    run = found["straight"]
    assert run["moved"] > 0.05
    assert max(run["gap"]) < 1e-5
    assert run["tail"] == [0.0] * 6
    assert run["bytes"] == [run["model"]] * 6


def test_an_adapter_sends_what_it_changes(found) -> None:
    run = found["adapted"]
    assert max(run["gap"]) < 1e-5
    assert run["bytes"][0] == found["straight"]["model"]
    assert max(run["bytes"][1:]) < 0.3 * run["bytes"][0]


def test_the_kept_tokens_are_those_of_vllm(found) -> None:
    """The trainer finds vLLM's kept sets again, or the gap would be their mass (min-p comes first there)."""
    assert max(found["cut"]["gap"]) < 1e-5


def test_resumed_bit_for_bit(found) -> None:
    assert found["resumed"]["different"] == []


def test_killed_and_started_again_goes_on_bit_for_bit(found) -> None:
    run = found["killed"]
    assert run["losses"] == 1
    assert run["different"] == []
    assert run["gap"] == found["straight"]["gap"]


def test_a_server_that_stays_away_stops_every_rank_with_a_message(found) -> None:
    for text in found["gone"]["errors"]:
        seconds, message = text.split(" s: ", 1)
        assert int(seconds) < 60
        assert message.startswith("RolloutError: the vLLM server at http://127.0.0.1:")
        assert "was lost while comparing weights" in message

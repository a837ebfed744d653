"""Rewards that pay for nothing are found on a handful of completions, and good ones pass."""

from __future__ import annotations

import pytest
from deep_runs import finding, look, rows_file, section

ROWS = [{"prompt": f"{i}0 and 1 is?", "answer": str(10 * i + 1)} for i in range(1, 9)]


def run(tmp_path, reward, rows=ROWS):
    data = {"source": str(rows_file(tmp_path / "rows.jsonl", rows))}
    trainer = {"max_completion_length": 256}
    return {"task": "rlvr", "data": data, "rewards": reward, "trainer": trainer}


def test_a_reward_without_fault(tmp_path):
    report = look(tmp_path, run(tmp_path, ["math"]))
    part = section(report, "rewards")
    assert not [one for one in part.findings if one.level != "note"]
    pay = part.facts["pay"]
    assert [pay[kind]["total"] for kind in ("empty", "prompt again")] == [0, 0]
    assert pay["all options"]["total"] == 1 / 8  # for the question whose answer is listed last
    assert pay["gold in \\boxed{}"]["math"] == 1
    assert part.facts["rows"] == 8


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("constant", "is constant"),
        ("anywhere", "8 of 8 (100.0%) rows: listing all options is paid as much"),
        ("short", "no form of the gold answer is paid more"),
        ("fails_on_nothing", "fails on empty: IndexError"),
    ],
)
def test_faults(tmp_path, function, words):
    report = look(tmp_path, run(tmp_path, [f"python:deep_rewards.{function}"]))
    found = finding(report, "rewards", words)
    assert found.level == "error"
    assert found.cure
    assert not report.ok


def test_a_verifier_that_hangs_costs_its_deadline_once(tmp_path):
    report = look(tmp_path, run(tmp_path, [{"python:deep_rewards.hangs_on_length": {"deadline": 0.5}}]))
    found = finding(report, "rewards", "takes longer than its deadline on words up to the limit")
    assert "0.5 s" in found.cause
    assert section(report, "rewards").facts["rows"] == 1


def test_the_sum_decides(tmp_path):
    """A format reward alone pays without looking; with the answer beside it nothing is wrong."""
    both = [{"format": {"weight": 0.1, "params": {"pattern": ".*"}}}, "math"]
    report = look(tmp_path, run(tmp_path, both))
    assert finding(report, "rewards", "'format' is constant").level == "warning"
    assert section(report, "rewards").facts["pay"]["gold in a sentence"]["total"] == pytest.approx(1.1)
    assert report.ok


def test_labels_that_cannot_be_read(tmp_path):
    rows = [*ROWS, {"prompt": "what?", "answer": "\\frac{1"}]
    report = look(tmp_path, run(tmp_path, ["math"], rows))
    found = finding(report, "rewards", "gold answers are not paid in full")
    assert found.message.startswith("1 of 9")
    assert found.examples[0].startswith(f"{tmp_path}/rows.jsonl:9")


def test_a_column_that_is_not_there(tmp_path):
    rows = [{"prompt": row["prompt"], "final": row["answer"]} for row in ROWS]
    report = look(tmp_path, run(tmp_path, ["math"], rows))
    assert "columns: {answer: " in finding(report, "rewards", "reads column 'answer'").message

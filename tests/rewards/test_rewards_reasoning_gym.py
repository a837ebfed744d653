"""reasoning-gym's own verifiers, with rows that went through a table and problems made again elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.schema import DataConfig, RewardConfig, SplitConfig
from posttrain.data.load import load_data
from posttrain.rewards import build_rewards
from posttrain.rewards.reasoning_gym import prepare, verify
from posttrain.rewards.safe_eval import EXPRESSION_MODULES, LITERAL_MODULES, check_expression

TASKS = [
    *("chain_sum", "basic_arithmetic", "gcd", "countdown", "simple_equations", "polynomial_multiplication"),
    *("number_sorting", "word_sorting", "n_queens", "isomorphic_strings", "ransom_note", "maze", "sudoku"),
    *("knights_knaves", "acre", "spiral_matrix", "word_ladder"),
]


def loaded(task, size=3, **params):
    config = DataConfig(
        source=f"reasoning_gym:{task}",
        params=params,
        train=SplitConfig(size=size),
        eval=SplitConfig(size=size, seed=77),
    )
    return load_data(config, "rlvr")


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_own_answers_are_correct_in_both_splits(task):
    data = loaded(task)
    (reward,) = build_rewards([RewardConfig(name="verifier", deadline=60)], data)
    for split in (data.train, data.eval):
        rows = [dict(row) for row in split]
        verdicts = reward.verify([row["answer"] for row in rows], rows)
        assert [(v.status, v.score) for v in verdicts] == [("correct", 1.0)] * 3
        nonsense = reward.verify(["certainly not this"] * 3, rows)
        assert {v.status for v in nonsense} == {"wrong"}
    reward.close()


def test_answers_of_other_rows_are_wrong_and_the_index_survives_filtering():
    data = loaded("chain_sum", size=50, min_terms=3)
    rows = [dict(row) for row in data.train.filter(lambda row: row["rg_index"] % 7 == 3)]
    assert [row["rg_index"] for row in rows] == [3, 10, 17, 24, 31, 38, 45]
    (reward,) = build_rewards([RewardConfig(name="verifier")], data)
    answers = [row["answer"] for row in rows]
    assert [v.status for v in reward.verify(answers, rows)] == ["correct"] * 7
    shifted = answers[1:] + answers[:1]
    assert [v.status for v in reward.verify(shifted, rows)] == ["wrong"] * 7
    reward.close()


ROW = {"rg_index": 0, "rg_seed": 5, "rg_size": 10}


def test_extraction_partial_scores_and_spelling():
    import reasoning_gym

    answer = reasoning_gym.create_dataset("chain_sum", seed=5, size=10)[0]["answer"]
    task = {"task": "chain_sum"}
    assert verify(f" {answer}\n", ROW, **task).answer == answer
    assert verify(f"+0{answer}.0" if answer[0] != "-" else answer, ROW, **task).answer == answer
    assert verify(f"x <answer>{answer}</answer>", ROW, extract="answer_tag", **task).status == "correct"
    assert verify("x", ROW, extract="answer_tag", **task).status == "unparseable"
    assert verify(" \n", ROW, **task).status == "unparseable"
    wordy = verify("1 + 1", {"rg_index": 0, "rg_seed": 1, "rg_size": 1}, task="countdown")
    assert (wordy.status, wordy.score) == ("wrong", 0.05)  # the task's partial score is kept


def test_rows_of_another_task_or_version_are_errors():
    with pytest.raises(ValueError, match="rg_index"):
        verify("1", {"answer": "1"}, task="chain_sum")
    with pytest.raises(ValueError, match="other parameters or another reasoning-gym version"):
        verify("1", ROW | {"answer": "no such answer"}, task="chain_sum")


def test_scorers_do_not_run_model_output(tmp_path):
    # in a process of its own, because taking eval away is meant for verifier processes
    mark = tmp_path / "ran"
    script = f"""
from posttrain.rewards.reasoning_gym import prepare, verify
text = "__import__('pathlib').Path({str(mark)!r}).touch()"
for task in {[*(m.rpartition(".")[2] for m in LITERAL_MODULES + EXPRESSION_MODULES)]!r}:
    prepare(task=task)
    row = {{"rg_index": 0, "rg_seed": 1, "rg_size": 1}}
    verdict = verify(text, row, task=task)
    assert verdict.status == "wrong", (task, verdict)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
    assert not mark.exists()


def test_the_modules_that_evaluate_answers_are_the_ones_we_know():
    """Fails after an upgrade of reasoning-gym that evaluates somewhere else: look at it, then "
    "extend the lists."""
    root = Path(importlib.util.find_spec("reasoning_gym").origin).parent
    own_text_only = {  # these evaluate what they generated themselves, never an answer
        "arithmetic.basic_arithmetic",
        "arithmetic.bitwise_arithmetic",
        "arithmetic.gsm_symbolic.generators_00_49",
        "arithmetic.gsm_symbolic.generators_50_99",
        "code.codeio",
        "logic.propositional_logic",  # a parser of its own, called parse_expr
    }
    call = re.compile(
        r"(?<![\w.])(?:eval|exec|parse_expr|sympify|literal_eval)\(|sympy\.(?:parse_expr|sympify)\(|sp\.(?:parse_expr|sympify)\("
    )
    found = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if call.search(path.read_text())
    }
    known = {name.removeprefix("reasoning_gym.") for name in LITERAL_MODULES + EXPRESSION_MODULES}
    assert found - own_text_only == known


@pytest.mark.parametrize(
    "text", ["(1+2)*3/4-5", "2*x**3 + sin(x)/2 - C", "x^2", "1.5e-3*y", "exp(-x)*log(x)", "pi"]
)
def test_ordinary_expressions_pass_the_guard(text):
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "x.__class__",
        "1 .real",
        "'a'",
        "x[0]",
        "lambda: 0",
        "open(1)",
        "eval(x)",
        "Symbol(x)",
        "a_b",
        "x;y",
        "x\\y",
        "é",
        "factorial(9)",
        "2..x",
        "{x}",
        "x=1",
    ],
)
def test_everything_else_does_not(text):
    with pytest.raises(ValueError, match="not allowed"):
        check_expression(text)


def test_a_named_symbol_passes():
    check_expression("2*speed", frozenset({"speed"}))


def test_prepare_refuses_an_unknown_task():
    with pytest.raises(ValueError, match="no_such_task"):
        prepare(task="no_such_task")

"""TTRL's vote and rewards against the numbers of its definition (arXiv 2504.16084)."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.rewards.extract import Extract
from posttrain.rl import ACE, TTRL
from posttrain.rl.formulas import group_advantages
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import Samples, Setup
from posttrain.rl.ttrl import Reading, majority_vote, pseudo_rewards, read_answer, unlabelled

SHEET = ["12", "7", "12", "12", "", "7", "12", "3"]


def test_vote_of_the_sheet():
    vote = majority_vote(SHEET)
    assert vote.label == "12"
    assert vote.ratio == 0.5  # over all eight, the empty one included
    assert vote.distinct == 3
    shares = [4 / 7, 2 / 7, 1 / 7]
    assert vote.entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)
    assert pseudo_rewards(SHEET, vote.label) == [1, 0, 1, 1, 0, 0, 1, 0]


def test_advantages_of_the_sheet():
    rewards = torch.tensor(pseudo_rewards(SHEET, "12"), dtype=torch.float64)[:4].unsqueeze(1)
    found = group_advantages(rewards, torch.ones(1, dtype=torch.float64), 4)
    assert found.tolist() == pytest.approx([0.4999000, -1.4997001, 0.4999000, 0.4999000], abs=1e-7)


@pytest.mark.parametrize(
    ("answers", "options", "label", "ratio"),
    [
        (["7", "12", "12", "7"], {}, "7", 0.5),  # the tie goes to the answer that occurs first
        (["7", "12", "12", "7"], {"tie": "skip"}, None, 0.5),
        (["", None, ""], {}, None, 0.0),  # nobody said anything
        (["", None, ""], {"drop_empty": False}, None, 1.0),
        (["", None, "", "5", "5"], {}, "5", 0.4),
        (["", None, "", "5", "5"], {"drop_empty": False}, None, 0.6),  # empty wins, and is no label
        (["", "5", "5", "5"], {"drop_empty": False}, "5", 0.75),
        (["5", "5", "6", "7"], {"min_majority": 0.5}, "5", 0.5),  # strictly below
        (["5", "5", "6", "7"], {"min_majority": 0.51}, None, 0.5),
        (["5", "5", "5", "6"], {"silent": [True, True, True, False]}, "6", 0.25),
        (["5", "6"], {"silent": [True, True]}, None, 0.0),
    ],
)
def test_edge_cases_of_the_vote(answers, options, label, ratio):
    vote = majority_vote(answers, **options)
    assert (vote.label, vote.ratio) == (label, ratio)
    if label is None:
        assert pseudo_rewards(answers, vote.label) == [0.0] * len(answers)


def test_silent_rows_still_get_their_reward():
    answers = ["5", "5", "5", "6", "6"]
    vote = majority_vote(answers, silent=[True, True, False, False, False])
    assert vote.label == "6"
    assert pseudo_rewards(answers, vote.label) == [0, 0, 0, 1, 1]


def test_grader_decides_on_other_spellings():
    answers = ["0.5", "1/2", "0.5", "", "x", "2/4", "9"]
    equal = {"1/2": True, "x": False, "2/4": None}
    found = pseudo_rewards(answers, "0.5", equal)
    assert found[:5] == [1, 1, 1, 0, 0]
    assert math.isnan(found[5])  # the grader failed: not 0
    assert found[6] == 0
    # without a label nothing is rewarded, whatever the grader said
    assert pseudo_rewards(answers, None, {"1/2": True}) == [0] * 7


@given(st.lists(st.sampled_from(["1", "2", "3", "", None]), min_size=1, max_size=12), st.randoms())
def test_permuting_rows_permutes_rewards(answers, random):
    vote = majority_vote(answers, tie="skip")
    order = list(range(len(answers)))
    random.shuffle(order)
    shuffled = [answers[i] for i in order]
    again = majority_vote(shuffled, tie="skip")
    assert (again.label, again.ratio) == (vote.label, vote.ratio)
    rewards = pseudo_rewards(answers, vote.label)
    assert pseudo_rewards(shuffled, again.label) == [rewards[i] for i in order]
    assert vote.label != ""
    if vote.label:
        assert sum(rewards) == answers.count(vote.label)
        assert vote.ratio * len(answers) == pytest.approx(sum(rewards))


# ---- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{5}. The final answer is $7$. I hope it is correct.", "7"),
        ("the final answer is $7$, clearly \\boxed{8}", "8"),  # not the quoted form
        ("\\boxed{3} no, \\boxed{\\frac{1}{2}} and then 99", "\\frac{1}{2}"),
        ("\\boxed{\\dfrac {1} {2}}", "\\frac{1}{2}"),
        ("\\boxed{\\left(1,2\\right)}", "(1,2)"),
        ("\\boxed{12\\text{ apples}}", "12"),
        ("\\boxed{\\text{east}}", "east"),
        ("\\boxed{50\\%}", "50"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{x=5}", "5"),
        ("\\boxed{1,000.0}", "1000"),
        ("\\boxed{}, the answer is 4.", "4"),
        ("The answer is 12.", "12"),
        ("The answer is: 1\n2", "12"),
        ("答案是 -3", "-3"),
        ("first 3, then 4 and 17 apples", "17"),
        ("\\boxed{unclosed 8", "8"),
        ("3/4", "3/4"),
        ("nothing", None),
        ("", None),
        ("the answer is", None),
        ("\\boxed{ }", None),
    ],
)
def test_reading_mathematics(text, answer):
    assert read_answer(text, "math") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("A or B? I say (C).", "C"), ("BAD CAB", None), ("d", None), ("Answer:B", "B"), ("A\nD\nE", "D")],
)
def test_reading_a_choice(text, answer):
    assert read_answer(text, "choice") == answer


def test_reading_like_the_rewards():
    assert set(get_args(Reading)) == {"math", "choice", *get_args(Extract)}
    assert read_answer("<answer> +07.50 </answer>", "answer_tag") == "7.5"
    assert read_answer("two words", "text") == "two words"
    assert read_answer("\\boxed{5}", "answer_tag") is None


@given(st.text(max_size=200))
def test_reading_never_fails(text):
    for how in get_args(Reading):
        answer = read_answer(text, how)
        assert answer is None or answer.strip()


# ---- the reward stage -------------------------------------------------------------------------------------


def samples(completions, size, **fields):
    fields.setdefault("truncated", [False] * len(completions))
    return Samples(completions=completions, group_size=size, gauges=Gauges(), **fields)


def gauges_of(given):
    class OneProcess:
        def gather(self, tensor):
            return tensor

    return {name.removeprefix("/"): value for name, value in given.gauges.flush(OneProcess())[0].items()}


def matrix(values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def test_label_replaces_the_rewards_and_counts():
    method = TTRL(n_votes=4, n_samples=2, extract="last_number", equivalence="exact")
    given_samples = samples(["12", "7", "12", "12", "1", "", "2", "2"], 4)
    gold = matrix([1, 0, 1, 0.3, 1, 0, math.nan, 0])  # label 12 is right; label 2 is wrong where known
    voted = method.label(gold, given_samples)
    assert voted.flatten().tolist() == [1, 0, 1, 1, 0, 0, 1, 1]
    assert voted.shape == gold.shape
    seen = gauges_of(given_samples)
    assert seen["majority_ratio"] == pytest.approx((0.75 + 0.5) / 2)
    assert seen["label_accuracy"] == 0.5
    assert seen["empty_answers"] == 1 / 8
    assert seen["distinct_answers"] == 2
    assert seen["pseudo_reward"] == 5 / 8
    assert seen["kept_pseudo_reward"] == 1 / 4
    assert seen["verifier_reward"] == pytest.approx(3.3 / 7)
    # rows 3, 4 and 7 are judged differently, row 6 is unknown
    assert seen["reward_accuracy"] == pytest.approx(4 / 7)
    # among the first two of each group: {12, 7} and {1, ""}: labels 12 and 1, both right
    assert seen["kept_majority_ratio"] == 0.5
    assert seen["kept_label_accuracy"] == 1.0
    assert seen["kept_vote_entropy"] == pytest.approx(math.log(2) / 2)
    assert (seen["labelled_groups"], seen["grader_failures"], seen["excluded_rows"]) == (1, 0, 0)


def test_gold_answers_do_not_matter():
    method = TTRL(n_votes=4, n_samples=4, extract="last_number", equivalence="exact")
    texts = ["12", "7", "12", "12"]
    results = [
        method.label(matrix(gold), samples(texts, 4)).tolist()
        for gold in ([1, 0, 1, 1], [0, 1, 0, 0], [math.nan] * 4, [5.0, -3.0, 0.0, 1.0])
    ]
    assert all(result == [[1], [0], [1], [1]] for result in results)


def test_without_gold_there_is_no_label_accuracy():
    given_samples = samples(["12", "12"], 2)
    TTRL(n_votes=2, n_samples=2, equivalence="exact").label(matrix([math.nan] * 2), given_samples)
    seen = gauges_of(given_samples)
    assert "label_accuracy" not in seen
    assert "verifier_reward" not in seen
    assert seen["majority_ratio"] == 1


@pytest.mark.parametrize(
    ("option", "masked", "excluded"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_truncated_rows(option, masked, excluded):
    method = TTRL(n_votes=3, n_samples=3, equivalence="exact", exclude_truncated=option)
    given_samples = samples(["4", "4", "5"], 3, truncated=[True, True, False], mask_truncated=masked)
    voted = method.label(matrix([0, 0, 0]), given_samples).flatten().tolist()
    assert voted == ([0, 0, 1] if excluded else [1, 1, 0])
    assert gauges_of(given_samples)["excluded_rows"] == pytest.approx(2 / 3 if excluded else 0)


def test_messages_are_read():
    said = [[{"role": "assistant", "content": f"\\boxed{{{n}}}"}] for n in (4, 5, 4)]
    method = TTRL(n_votes=3, n_samples=3, equivalence="exact")
    assert method.label(matrix([0, 0, 0]), samples(said, 3)).flatten().tolist() == [1, 0, 1]


def test_grader_judges_spellings_and_each_rank_its_share():
    """Two ranks of one group each: together they give what one process gives."""
    texts = ["\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "\\boxed{3}"]
    texts += ["\\boxed{2}", "\\boxed{\\sqrt{4}}", "\\boxed{x+1}", "\\boxed{2}"]
    method = TTRL(n_votes=4, n_samples=4)
    alone = method.label(matrix([0] * 8), samples(texts, 4))
    assert alone.flatten().tolist() == [1, 1, 1, 0, 1, 1, 0, 1]
    judged = []

    class Grader:
        def __init__(self, rank):
            self.rank = rank

        def verify(self, completions, rows):
            judged.append((self.rank, [row["answer"] for row in rows]))
            return method._grader().verify(completions, rows)

    # rank 1 waits for what rank 0 gathered: run rank 0 first with the other's answers put in
    answers = [(read_answer(text, "math"), False, "") for text in texts]
    shares = {}
    for rank in (0, 1):
        part = TTRL(n_votes=4, n_samples=4)
        part._pool = Grader(rank)
        calls = iter([lambda _: answers, lambda here, rank=rank: shares.setdefault(rank, here)])
        part.label(
            matrix([0] * 8),
            samples(
                texts[4 * rank :][:4],
                4,
                rank=rank,
                ranks=2,
                gather=lambda here, calls=calls: next(calls)(here),
            ),
        )
    assert [(rank, set(labels)) for rank, labels in judged] == [(0, {"0.5"}), (1, {"2"})]
    merged = shares[0] + shares[1]
    for rank in (0, 1):
        calls = iter([answers, merged])
        part = TTRL(n_votes=4, n_samples=4)
        part._pool = Grader(rank)
        here = samples(
            texts[4 * rank :][:4], 4, rank=rank, ranks=2, gather=lambda _, calls=calls: next(calls)
        )
        assert torch.equal(part.label(matrix([0] * 8), here), alone)
    method._grader().close()


def test_label_that_the_grader_cannot_read_is_compared_by_spelling():
    texts = ["\\boxed{east}", "\\boxed{east}", "\\boxed{12}", "\\boxed{south}"]
    method = TTRL(n_votes=4, n_samples=4)
    given_samples = samples(texts, 4)
    assert method.label(matrix([0] * 4), given_samples).flatten().tolist() == [1, 1, 0, 0]
    assert gauges_of(given_samples)["grader_failures"] == 0
    method._grader().close()


def test_comparison_that_times_out_leaves_its_row_out():
    class Grader:
        def verify(self, completions, rows):
            from posttrain.rewards.verdict import Verdict

            return [
                Verdict("correct", 1.0) if a == r["answer"] else Verdict("timeout")
                for a, r in zip(completions, rows, strict=True)
            ]

    method = TTRL(n_votes=4, n_samples=4)
    method._pool = Grader()
    given_samples = samples(["5", "5", "10/2", ""], 4)
    voted = method.label(matrix([1, 1, 1, 0]), given_samples).flatten()
    assert voted[[0, 1, 3]].tolist() == [1, 1, 0]
    assert voted[2].isnan()
    seen = gauges_of(given_samples)
    assert seen["grader_failures"] == 0.25
    assert seen["pseudo_reward"] == pytest.approx(2 / 3)


def test_rows_that_train_are_the_first():
    kept = TTRL(n_votes=5, n_samples=2).keep_rows(torch.zeros(3, 5, 1))
    assert kept.tolist() == [[True, True, False, False, False]] * 3
    assert TTRL(n_votes=5, n_samples=5).keep_rows(torch.zeros(3, 5, 1)) is None


def test_wrong_groups_are_refused():
    method = TTRL(n_votes=4, n_samples=4, equivalence="exact")
    with pytest.raises(ValueError, match="n_votes=4 and one reward function, found groups of 2 and 1"):
        method.label(matrix([0] * 4), samples(["1"] * 4, 2))
    with pytest.raises(ValueError, match="groups of 4 and 2 functions"):
        method.label(torch.zeros(4, 2), samples(["1"] * 4, 4))


def test_unlabelled_scores_nothing():
    assert unlabelled(["a", "b"], answer=["a", "b"]) == [0.0, 0.0]


# ---- configuration ----------------------------------------------------------------------------------------


def conflicts(method=None, rewards=1, methods=("ttrl",), ranks=1, **trainer):
    method = method or TTRL(n_votes=8, n_samples=4)
    fields = {"num_generations": 8, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    setup = Setup(trainer=fields | trainer, methods=methods, rewards=rewards, ranks=ranks)
    return [(conflict.field, conflict.message) for conflict in method.conflicts(setup)]


def test_settings_that_fit():
    assert not conflicts()
    assert not conflicts(per_device_train_batch_size=4, steps_per_generation=2)
    assert not conflicts(per_device_train_batch_size=4, generation_batch_size=16, ranks=2)
    assert not conflicts(TTRL(n_votes=8, n_samples=8), per_device_train_batch_size=1)
    assert not conflicts(rewards=0)
    assert not conflicts(rewards=None)


@pytest.mark.parametrize(
    ("trainer", "field", "message"),
    [
        ({"num_generations": 4}, "num_generations", "n_votes=8 samples per prompt, found num_generations=4"),
        ({"per_device_train_batch_size": 12}, "per_device_train_batch_size", "not a multiple of 8"),
        (
            {"per_device_train_batch_size": 4, "generation_batch_size": 16, "ranks": 4},
            "per_device_train_batch_size",
            "4 * 1 micro-steps, which is not a multiple of 8",
        ),
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
            "per_device_train_batch_size",
            "would keep 0.5 of them: set it to a multiple of 2",
        ),
        ({"rewards": 2}, None, "the only reward, found 2"),
        ({"rewards": 0, "eval_strategy": "steps"}, "eval_strategy", "nothing to score with"),
    ],
)
def test_settings_that_do_not_fit(trainer, field, message):
    ((where, text),) = conflicts(**trainer)
    assert where == field
    assert message in text


def test_parameters_are_checked():
    with pytest.raises(ValidationError, match="n_samples=65 rows cannot train when only n_votes=64"):
        TTRL(n_samples=65)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        TTRL(min_majority=2)


def test_ace_warns():
    (conflict,) = ACE().conflicts(Setup(trainer={}, methods=("ttrl", "ace")))
    assert not conflict.fatal

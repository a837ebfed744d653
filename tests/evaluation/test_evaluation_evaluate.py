"""Verdicts, records, metrics and comparison; one process equals two."""

import json
import math
import socket
import string

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.config.schema import EvaluateConfig
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.results import Evaluation, Problem, Sample, compare, summarise
from posttrain.rewards.verdict import Verdict

SETTINGS = {"k": [1, 2], "confidence": 0.95, "resamples": 200, "seed": 0}


def problem(index: int, *verdicts: tuple[str, str | None], prompt: str = "p") -> Problem:
    samples = []
    for i, (status, answer) in enumerate(verdicts):
        score = None if status in ("error", "timeout", "skipped") else float(status == "correct")
        samples.append(Sample(f"t{i}", status, score, answer, length=2 + i, finished=i > 0))
    return Problem(index, f"{prompt}{index}", "7", samples)


def summary(*problems: Problem) -> Evaluation:
    return summarise(list(problems), distinct={"distinct-1": 0.5}, settings=SETTINGS, seconds=2.0, tokens=10)


MIXED = (
    problem(0, ("correct", "7"), ("wrong", "8"), ("correct", "7")),
    problem(1, ("wrong", "8"), ("unparseable", None), ("timeout", None)),
    problem(2, ("error", None), ("correct", "7"), ("skipped", None)),
)


def test_errors_timeouts_and_skipped_rows_are_neither_right_nor_wrong() -> None:
    result = summary(*MIXED)
    assert [(p.n, p.c) for p in result.problems] == [(3, 2), (2, 0), (1, 1)]
    assert result.verdicts == {
        "correct": 3,
        "wrong": 2,
        "unparseable": 1,
        "error": 1,
        "timeout": 1,
        "skipped": 1,
    }
    assert result.metrics["pass@1"].value == pytest.approx((2 / 3 + 0 + 1) / 3)
    # problem 2 has one valid sample: no pass@2, and it is counted
    assert result.metrics["pass@2"].value == pytest.approx((1 + 0) / 2)
    assert (result.metrics["pass@2"].problems, result.metrics["pass@2"].left_out) == (2, 1)
    # maj@2 of problem 0: pair 77 wins, the two pairs 78 tie -> (1 + 0.5 + 0.5) / 3
    assert result.metrics["maj@2"].value == pytest.approx((2 / 3 + 0) / 2)
    assert result.metrics["coverage"].value == pytest.approx(2 / 3)
    assert result.solved == [0, 2]
    assert result.metrics["distinct_answers"].value == pytest.approx((2 + 1 + 1) / 3)
    assert result.metrics["score"].value == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert result.metrics["length"].value == 3
    assert result.median_length == 3
    assert result.metrics["clipped"].value == pytest.approx(1 / 3)
    assert result.tokens_per_second == 5


def test_a_verifier_that_never_works_gives_no_number() -> None:
    result = summary(problem(0, ("error", None), ("timeout", None)))
    assert result.metrics["pass@1"].value is None
    assert result.metrics["pass@1"].left_out == 1
    assert result.metrics["coverage"].value is None
    assert "score" not in result.metrics
    assert "maj@1" not in result.metrics
    assert result.solved == []


def test_json_round_trip_is_lossless_and_strict() -> None:
    result = summary(*MIXED, problem(3, ("error", None), ("error", None)))
    text = result.to_json()
    assert "NaN" not in text
    assert Evaluation.from_json(text) == result
    assert json.loads(text)["problems"][2]["n"] == 1


def test_compare_pairs_problems() -> None:
    before = summary(*(problem(i, ("wrong", "8"), ("wrong", "9")) for i in range(3)),
                     problem(3, ("correct", "7"), ("wrong", "8")))  # fmt: skip
    after = summary(*(problem(i, ("correct", "7"), ("wrong", "9")) for i in range(3)),
                    problem(3, ("wrong", "8"), ("wrong", "8")))  # fmt: skip
    difference = compare(before, after)
    assert difference.newly_solved == [0, 1, 2]
    assert difference.lost == [3]
    assert difference.metrics["pass@1"].value == pytest.approx((0.5 * 3 - 0.5) / 4)
    assert difference.metrics["coverage"].value == pytest.approx(0.5)
    assert difference.metrics["distinct_answers"].value == pytest.approx(-0.25)
    assert not difference.metrics["pass@1"].excludes_zero
    assert json.loads(json.dumps(difference.to_dict()))["newly_solved"] == [0, 1, 2]


def test_compare_refuses_other_problems_and_other_k() -> None:
    with pytest.raises(ValueError, match="found 3 before, 2 after, 2 equal in place"):
        compare(summary(*MIXED), summary(*MIXED[:2]))
    other = summarise(list(MIXED), distinct={}, settings=SETTINGS | {"k": [3]}, seconds=1, tokens=1)
    with pytest.raises(ValueError, match=r"\[1, 2\].*\[3\]"):
        compare(summary(*MIXED), other)


def tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    return LlamaForCausalLM(config), tokenizer


def vowel(completions: list[str], rows: list[dict]) -> list[Verdict]:
    """Right when the completion starts with a vowel; the row's answer must come along."""
    verdicts = []
    for text, row in zip(completions, rows, strict=True):
        assert row["answer"] == row["prompt"].upper()
        if not text:
            verdicts.append(Verdict("unparseable", 0.0))
        elif text[0] == "x":
            verdicts.append(Verdict("error", message="no x"))
        else:
            right = text[0] in "aeiou"
            verdicts.append(Verdict("correct" if right else "wrong", float(right), text[0]))
    return verdicts


def dataset() -> Dataset:
    prompts = ["ab", "c", "abcd", "ab", "zz"]  # one prompt twice: it must not get the same samples twice
    return Dataset.from_list([{"prompt": prompt, "answer": prompt.upper()} for prompt in prompts])


CONFIG = EvaluateConfig(k=[1, 4], samples=8, batch_size=5, resamples=200)


def test_evaluate_end_to_end() -> None:
    model, tokenizer = tiny()
    model.train()
    result = evaluate(model, tokenizer, dataset(), vowel, CONFIG, max_new_tokens=6, progress=False)
    assert model.training
    assert [p.prompt for p in result.problems] == ["ab", "c", "abcd", "ab", "zz"]
    assert result.problems[2].gold == "ABCD"
    assert all(len(p.samples) == 8 for p in result.problems)
    assert sum(result.verdicts.values()) == 40
    # every verdict belongs to its own completion
    for sample in (sample for p in result.problems for sample in p.samples):
        assert (sample.status == "correct") == (sample.text[:1] in tuple("aeiou"))
        assert sample.answer == (sample.text[0] if sample.status in ("correct", "wrong") else None)
        assert sample.message == ("no x" if sample.text[:1] == "x" else None)
    share = [p.c / p.n for p in result.problems]
    assert result.metrics["pass@1"].value == pytest.approx(sum(share) / 5)
    assert [s.text for s in result.problems[0].samples] != [s.text for s in result.problems[3].samples]
    assert result.tokens == sum(s.length for p in result.problems for s in p.samples)
    assert result.settings["max_new_tokens"] == 6
    again = evaluate(model, tokenizer, dataset(), vowel, CONFIG, max_new_tokens=6, progress=False)
    assert again.problems == result.problems
    assert again.metrics == result.metrics
    assert Evaluation.from_json(result.to_json()).problems == result.problems


def test_the_sections_own_limit_wins() -> None:
    model, tokenizer = tiny()
    config = EvaluateConfig(k=[1], samples=1, max_new_tokens=3, temperature=0)
    result = evaluate(model, tokenizer, dataset(), vowel, config, max_new_tokens=6, progress=False)
    assert max(s.length for p in result.problems for s in p.samples) == 3


@pytest.mark.parametrize(
    ("verify", "message"),
    [
        (lambda completions, rows: [Verdict("wrong", 0.0)], "1 verdicts for 5"),
        (lambda completions, rows: [Verdict("fine")] * len(completions), "status 'fine'"),
    ],
)
def test_a_verifier_that_breaks_its_contract_is_refused(verify, message: str) -> None:
    model, tokenizer = tiny()
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, dataset(), verify, CONFIG, max_new_tokens=2, progress=False)


def test_a_score_that_is_not_a_number_counts_as_an_error() -> None:
    model, tokenizer = tiny()

    def verify(completions: list[str], rows: list[dict]) -> list[Verdict]:
        return [Verdict("correct", math.nan if row["prompt"] == "c" else 1.0, "7") for row in rows]

    result = evaluate(model, tokenizer, dataset(), verify, CONFIG, max_new_tokens=2, progress=False)
    assert result.verdicts["error"] == 8
    assert result.metrics["score"].value == 1.0
    assert result.metrics["pass@1"].left_out == 1


def test_wrong_data_is_refused_with_the_renaming_that_fixes_it() -> None:
    model, tokenizer = tiny()
    wrong = Dataset.from_list([{"question": "a"}])
    with pytest.raises(ValueError, match=r"found \['question'\].*prompt: YOUR_COLUMN"):
        evaluate(model, tokenizer, wrong, vowel, CONFIG, max_new_tokens=2, progress=False)
    with pytest.raises(ValueError, match="empty data set"):
        evaluate(model, tokenizer, dataset().select([]), vowel, CONFIG, max_new_tokens=2, progress=False)


def _fails_on_c(completions: list[str], rows: list[dict]) -> list[Verdict]:
    if any(row["prompt"] == "c" for row in rows):
        raise OSError("verifier down")
    return vowel(completions, rows)


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, tokenizer = tiny()
    result = evaluate(model, tokenizer, dataset(), vowel, CONFIG, max_new_tokens=6, progress=False)
    try:
        evaluate(model, tokenizer, dataset(), _fails_on_c, CONFIG, max_new_tokens=2, progress=False)
        failure = "none"
    except (OSError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"result": result.to_dict(), "failure": failure}, file)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_and_fail_together(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["result"] == second["result"]
    model, tokenizer = tiny()
    alone = evaluate(model, tokenizer, dataset(), vowel, CONFIG, max_new_tokens=6, progress=False).to_dict()
    for name in ("problems", "metrics", "distinct", "verdicts", "solved", "tokens", "median_length"):
        assert first["result"][name] == json.loads(json.dumps(alone))[name]
    # row 1 is on rank 1: it raises its own error, rank 0 says whose it was
    assert second["failure"] == "OSError: verifier down"
    assert first["failure"].startswith("RuntimeError: rank 0 stops")
    assert "1: \"OSError('verifier down')\"" in first["failure"]

"""Evaluations on pairs: golden numbers, full-logits references, and what a model against itself gives."""

import contextlib
import math
import os
import socket

import numpy as np
import pytest
import support
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaForSequenceClassification

from posttrain.config.schema import EvaluateConfig
from posttrain.data.pairs import encode_pair
from posttrain.evaluation import preference
from posttrain.evaluation.estimators import bootstrap_of, calibration_error, self_bleu
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.likelihood import sequence_logps
from posttrain.evaluation.preference import (
    divergence_values,
    evaluate_preferences,
    pair_values,
    win_rate,
)
from posttrain.evaluation.results import Evaluation, compare
from posttrain.evaluation.scoring import evaluate_scorer, margin_values
from posttrain.rewards.verdict import Verdict

CONFIG = EvaluateConfig(k=[1], samples=3, resamples=200, batch_size=8)
ROWS = Dataset.from_list(
    [{"prompt": f"p {n}", "chosen": f" a{n} b" * (1 + n % 2), "rejected": f" c{n}"} for n in range(5)]
)


def at(model):
    return lambda: contextlib.nullcontext(model)


def scorer():
    config = support.model().config
    config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def vowels(completions, rows):
    return [Verdict("wrong", float(sum(text.count(v) for v in "aeiou"))) for text in completions]


def run(model, reference, **options):
    settings = {"beta": 0.5, "max_length": None, "max_new_tokens": 6, "progress": False} | options
    return evaluate_preferences(model, support.tokenizer(), ROWS, CONFIG, reference=reference, **settings)


# ---- formulas --------------------------------------------------------------------------------------------


def test_self_bleu_by_hand():
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1.0)
    assert self_bleu([[1, 2]]) is None
    # unigrams 2 of 3, bigrams 1 of 2, trigrams 0.1 of 1, and no 4-gram: 0.1 of 1; no brevity penalty
    expected = math.exp((math.log(2 / 3) + math.log(1 / 2) + 2 * math.log(0.1)) / 4)
    assert self_bleu([[1, 2, 3], [1, 2, 4]]) == pytest.approx(expected)
    # the shorter one: penalty exp(1 - 3 / 2), unigrams 2 of 2, bigrams 1 of 1
    short = math.exp(2 * math.log(0.1) / 4 + 1 - 3 / 2)
    long = math.exp((math.log(2 / 3) + math.log(1 / 2) + 2 * math.log(0.1)) / 4)
    assert self_bleu([[1, 2], [1, 2, 3]]) == pytest.approx((short + long) / 2)
    # a repeated word matches once; of two bigrams none
    repeated = math.exp((math.log(1 / 3) + math.log(0.1 / 2) + 2 * math.log(0.1)) / 4)
    assert self_bleu([[1, 1, 1], [1, 5, 6]]) == pytest.approx(repeated)


def test_calibration_error_by_hand():
    def logit(p):
        return math.log(p / (1 - p))

    # four pairs said 0.75, three of them right; two said 0.95, one right
    margins = np.array([logit(0.75)] * 3 + [-logit(0.75)] + [logit(0.95), -logit(0.95)])
    assert calibration_error(margins) == pytest.approx((4 * 0.0 + 2 * abs(0.5 - 0.95)) / 6)
    assert calibration_error(np.zeros(3)) == 0.0
    found = bootstrap_of(calibration_error, margins, resamples=300)
    assert found.value == pytest.approx(0.15)
    assert found.low <= 0.15 <= found.high


def test_values_of_a_pair_and_of_divergences_by_hand():
    found = pair_values(torch.tensor([0.5, 0.25]), torch.tensor([-1.0]), beta=0.1)
    assert found == pytest.approx(
        {"chosen_shift": 0.75, "rejected_shift": -1.0, "accuracy": 1.0, "margin": 0.175}
    )
    assert pair_values(torch.zeros(2), torch.zeros(1), 0.1)["accuracy"] == 0.5
    # r = 1/2 and 2: k3 = 1/2 - 1 + ln 2 and 2 - 1 - ln 2
    found = divergence_values([torch.tensor([math.log(2)]), torch.tensor([-math.log(2)])])
    assert found["kl"] == pytest.approx(0.0, abs=1e-7)
    assert found["kl_k3"] == found["kl_k3_per_token"] == pytest.approx(0.25)
    assert win_rate([1, 2], [1, 1, 3]) == pytest.approx((0.5 + 0.5 + 0 + 1 + 1 + 0) / 6)
    assert math.isnan(win_rate([], [1]))


def test_values_of_a_reward_model_by_hand():
    found = margin_values(2.0, 1.0)
    sigma = 1 / (1 + math.exp(-1))
    assert found == pytest.approx(
        {"accuracy": 1.0, "margin": 1.0, "log_loss": -math.log(sigma), "brier": (1 - sigma) ** 2}
    )
    assert margin_values(0.0, 1000.0)["log_loss"] == 1000.0
    with pytest.raises(FloatingPointError):
        margin_values(math.nan, 0.0)


# ---- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, ["q_proj"], ["lm_head"]], ids=["whole", "lora", "head"])
def test_log_probabilities_are_those_of_the_full_logits(adapter):
    model = support.model(1)
    if adapter:
        model = get_peft_model(model, support.lora(target_modules=adapter, init_lora_weights=False))
    model.train()
    sequences = [(list(range(3, 3 + n)), begin) for n, begin in ((9, 4), (5, 1), (12, 11), (7, 3))]
    found = sequence_logps(model, sequences, pad=0, batch_size=3)
    assert model.training
    for (ids, begin), logps in zip(sequences, found, strict=True):
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].double()
        expected = torch.log_softmax(logits, -1)[range(begin - 1, len(ids) - 1), ids[begin:]]
        torch.testing.assert_close(logps.double(), expected, atol=2e-6, rtol=1e-5)


def test_a_model_against_itself_changed_nothing():
    model = support.model(0)
    alone = run(model, None, verify=vowels)
    again = run(model, at(model), verify=vowels, start=alone)
    for name in ("chosen_shift", "rejected_shift", "margin", "kl", "kl_k3_per_token"):
        assert alone.metrics[name].value == again.metrics[name].value == 0.0
    for name in ("accuracy", "win_rate"):
        assert alone.metrics[name].value == again.metrics[name].value == 0.5
    assert alone.metrics == again.metrics
    assert all(part.value == 0 for part in compare(alone, again).metrics.values())
    assert Evaluation.from_json(again.to_json()) == again


def test_numbers_of_two_models_are_those_of_single_forwards():
    tokenizer, model, start = support.tokenizer(), support.model(0), support.model(7)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # otherwise all tokens are as likely
    found = run(model, at(start), verify=vowels, max_length=7)
    assert found.settings["k"] == []
    assert not any(name.startswith(("pass@", "coverage")) for name in found.metrics)

    def shift(ids, begin):
        pair = []
        for one in (model, start):
            logps = torch.log_softmax(one(torch.tensor([ids])).logits[0].double(), -1)
            pair.append(logps[range(begin - 1, len(ids) - 1), ids[begin:]])
        return pair[0] - pair[1]

    chosen, rejected = zip(*(encode_pair(tokenizer, row, 7)[:2] for row in ROWS), strict=True)
    begins = [encode_pair(tokenizer, row, 7)[2] for row in ROWS]
    with torch.no_grad():
        better = [shift(ids, begin).sum().item() for ids, begin in zip(chosen, begins, strict=True)]
        worse = [shift(ids, begin).sum().item() for ids, begin in zip(rejected, begins, strict=True)]
    assert found.metrics["chosen_shift"].value == pytest.approx(np.mean(better), abs=1e-5)
    assert found.metrics["accuracy"].value == np.mean(np.array(better) > np.array(worse))
    assert found.metrics["margin"].value == pytest.approx(0.5 * np.mean(np.array(better) - worse), abs=1e-5)
    # continuations are those that any evaluation samples; the win rate is against the start's
    plain = evaluate(model, tokenizer, ROWS, vowels, CONFIG, max_new_tokens=6, progress=False)
    theirs = evaluate(start, tokenizer, ROWS, vowels, CONFIG, max_new_tokens=6, progress=False)
    assert [p.samples for p in found.problems] == [p.samples for p in plain.problems]
    wins = [
        win_rate([s.score for s in one.samples], [s.score for s in two.samples])
        for one, two in zip(plain.problems, theirs.problems, strict=True)
    ]
    assert found.metrics["win_rate"].value == pytest.approx(np.mean(wins))
    before = run(start, None, verify=vowels)
    assert run(model, at(start), verify=vowels, max_length=7, start=before).metrics == found.metrics
    assert found.metrics["kl_k3"].value > 0


def test_the_estimates_of_the_divergence_agree_with_the_exact_one():
    tokenizer, model, start = support.tokenizer(), support.model(0), support.model(7)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    rows = Dataset.from_list([{"prompt": "p", "chosen": " a", "rejected": " b"}])
    config = EvaluateConfig(k=[1], samples=600, resamples=100)
    found = evaluate_preferences(
        model, tokenizer, rows, config, reference=at(start), beta=1, max_length=None, max_new_tokens=1,
        progress=False,
    )  # fmt: skip
    ids = torch.tensor([tokenizer("p")["input_ids"]])
    with torch.no_grad():
        one, two = (torch.log_softmax(m(ids).logits[0, -1].double(), -1) for m in (model, start))
    exact = (one.exp() * (one - two)).sum().item()
    assert found.metrics["kl_k3"].value == pytest.approx(exact, rel=0.2)
    assert found.metrics["kl"].value == pytest.approx(exact, rel=0.35)


def test_divergences_are_left_out_where_samples_are_not_the_models_own():
    config = CONFIG.model_copy(update={"temperature": 0.7})
    found = evaluate_preferences(
        support.model(0), support.tokenizer(), ROWS, config, reference=at(support.model(1)), beta=1,
        max_length=None, max_new_tokens=3, progress=False,
    )  # fmt: skip
    assert not any(name.startswith("kl") for name in found.metrics)
    assert "win_rate" not in found.metrics
    assert "score" not in found.metrics
    assert 0 < found.metrics["self_bleu"].value <= 1


def test_the_evaluation_of_the_start_must_be_on_the_same_prompts():
    model = support.model(0)
    other = preference.evaluate_preferences(
        model, support.tokenizer(), ROWS.select([0]), CONFIG, reference=None, beta=1, max_length=None,
        max_new_tokens=3, progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="made on other prompts"):
        run(model, at(model), start=other)


def test_a_reward_model_is_evaluated_without_samples():
    model = scorer()
    found = evaluate_scorer(model, support.tokenizer(), ROWS, CONFIG)
    assert set(found.metrics) == {"accuracy", "margin", "log_loss", "brier", "calibration_error"}
    margins = []
    for row in ROWS:
        chosen, rejected, _ = encode_pair(support.tokenizer(), row, None)
        with torch.no_grad():
            margins.append(
                (model(torch.tensor([chosen])).logits - model(torch.tensor([rejected])).logits).item()
            )
    assert found.metrics["margin"].value == pytest.approx(np.mean(margins), abs=1e-6)
    assert Evaluation.from_json(found.to_json()) == found
    difference = compare(found, found)
    assert difference.metrics["log_loss"].value == 0
    assert (found.tokens, found.median_length, found.problems[0].samples) == (0, 0.0, [])


def both():
    """Both evaluations, as plain values without times."""
    found = [
        run(support.model(0), at(support.model(7)), verify=vowels),
        evaluate_scorer(scorer(), support.tokenizer(), ROWS, CONFIG),
    ]
    return [{"metrics": part.to_dict()["metrics"], "problems": part.to_dict()["problems"]} for part in found]


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(both(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    for part, alone in zip(first, both(), strict=True):
        assert part["metrics"].keys() == alone["metrics"].keys()
        for name, estimate in alone["metrics"].items():
            assert part["metrics"][name] == pytest.approx(estimate, abs=1e-6), name
        assert [p["index"] for p in part["problems"]] == [p["index"] for p in alone["problems"]]

"""Best-of-N: what is picked, by whom, and what it is worth in a reward that does not pick."""

import json
import math

import pytest
import support
import torch
import yaml
from run_jobs import json_lines, posttrain
from transformers import LlamaForSequenceClassification

from posttrain.evaluation.results import Problem, Sample
from posttrain.merging.formulas import best_of_n_kl
from posttrain.rewards.model import ModelReward
from posttrain.run.best_of import _measured


def sample(text, score):
    return Sample(text=text, status="wrong", score=score, answer=None, length=1, finished=True)


def test_picks_are_valued_in_gold_and_compared_on_the_same_samples():
    gold = [[1.0, 0.0, 3.0, 2.0], [0.0, 4.0, 2.0, 9.0]]
    problems = [Problem(i, f"p{i}", None, [sample(str(g), g) for g in row]) for i, row in enumerate(gold)]
    scores = {
        "good": [[1.0, 0.0, 3.0, 2.0], [0.0, 2.0, 1.0, math.nan]],  # one text was too long for it
        "bad": [[-1.0, 0.0, -3.0, -2.0], [0.0, -2.0, -1.0, 5.0]],
    }
    found = _measured(problems, scores, [1, 2, 3])
    assert found["left_out_samples"] == 1
    assert found["kl"]["3"] == best_of_n_kl(3)
    value = {name: {n: e["value"] for n, e in row["gold"].items()} for name, row in found["rewards"].items()}
    mean = (1.5 + 2.0) / 2
    assert value["good"]["1"] == value["bad"]["1"] == value["oracle"]["1"] == pytest.approx(mean)
    # best of three of four: the best with 3/4, the second with 1/4; of three: the best
    assert value["good"]["3"] == pytest.approx(((0.75 * 3 + 0.25 * 2) + 4.0) / 2)
    assert value["bad"]["3"] == pytest.approx(((0.75 * 0 + 0.25 * 1) + 0.0) / 2)
    assert value["oracle"] == value["good"]
    # good and bad cancel to a draw among all: ties share their places
    assert value["ensemble"]["3"] == pytest.approx(mean)
    assert found["rewards"]["oracle"]["win_rate"]["3"]["value"] == pytest.approx(
        ((0.75 * 3.5 / 4 + 0.25 * 2.5 / 4) + 2.5 / 3) / 2
    )
    assert found["differences"]["bad"]["3"]["value"] == pytest.approx(value["bad"]["3"] - value["good"]["3"])


@pytest.fixture
def job(tmp_path):
    model = support.model()
    known = {key: value for key, value in model.config.to_dict().items() if "label" not in key}
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            scorer = LlamaForSequenceClassification(type(model.config)(**known, num_labels=1))
        scorer.save_pretrained(tmp_path / f"scorer-{seed}")
        support.tokenizer().save_pretrained(tmp_path / f"scorer-{seed}")
    model.save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"say {i}"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "rlvr",
        "threads": 1,
        "run_dir": str(tmp_path / "run"),
        "data": {"source": str(tmp_path / "rows.jsonl"), "eval": {"file": str(tmp_path / "rows.jsonl")}},
        "rewards": [{"word_list": {"params": {"positive": ["a", "e"], "negative": ["x"]}}}],
        "evaluate": {"k": [1], "samples": 1, "max_new_tokens": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_verb_picks_what_the_reward_model_likes_best(job):
    arguments = ["best-of", job / "model", "--config", job / "run.yaml", "--n", 4, "--n", 2]
    arguments += ["--reward", job / "scorer-0", "--reward", job / "scorer-1"]
    found = json.loads(posttrain(*arguments, "--to", job / "picked.jsonl", "--json").stdout)
    assert found["prompts"] == 5
    assert found["samples"] == 4
    assert set(found["rewards"]) == {str(job / "scorer-0"), str(job / "scorer-1"), "ensemble", "oracle"}
    own = found["rewards"][str(job / "scorer-0")]["own"]
    assert own["4"]["value"] > own["2"]["value"]
    judge = ModelReward(job / "scorer-0")
    rows = json_lines(job / "picked.jsonl")
    again = judge.scores([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert again == pytest.approx([row["score"] for row in rows], abs=1e-5)
    assert sum(again) / 5 == pytest.approx(own["4"]["value"], abs=1e-5)
    assert "exists: name another file" in posttrain(*arguments, "--to", job / "picked.jsonl", code=2).stderr


def test_requests_that_cannot_be_met(job):
    base = ["best-of", job / "model", "--config", job / "run.yaml"]
    twice = ["--reward", job / "scorer-0", "--reward", job / "scorer-0"]
    assert "named twice" in posttrain(*base, *twice, code=2).stderr
    greedy = posttrain(*base, "evaluate.temperature=0", *twice[:2], code=2)
    assert "greedy samples are all the same" in greedy.stderr

"""Preference and reward runs from end to end: files, resume, adapters, what the verbs make of them."""

import json
import math

import pytest
import torch
import yaml
from peft import PeftModel
from run_jobs import assert_same, json_lines, merged, posttrain
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

WORDS = ("sun", "moon", "star", "sea", "hill", "tree", "bird", "fish")
LORA = {"model": {"adapter": {"r": 4}}}


@pytest.fixture
def job(tmp_path):
    """Write pairs and a configuration; carry it out."""

    def job(task, *changes, name="run", arguments=()):
        rows = [
            {"prompt": f"say {word} {n}:", "chosen": f" good {word}", "rejected": f" bad {word}"}
            for n, word in enumerate(WORDS * 3)
        ]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task": task,
            "threads": 1,
            "run_dir": str(tmp_path / name),
            "data": {"source": str(tmp_path / "pairs.jsonl"), "eval": {"size": 6}},
            "trainer": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
                "logging_steps": 1,
                "save_steps": 2,
            },
            "export": {},
        }
        for change in changes:
            config = merged(config, change)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        result = posttrain("train", tmp_path / f"{name}.yaml", *arguments)
        return tmp_path / name, result

    return job


def weights(run):
    return {
        str(path.relative_to(run)): load_file(path)
        for path in sorted((run / "export").rglob("*.safetensors"))
    }


@pytest.mark.parametrize("task", ["preference", "reward"])
@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_a_run_stopped_and_resumed_is_the_run_in_one_go(job, task, adapter):
    parts, _ = job(
        task, adapter, {"trainer": {"max_steps": 2, "lr_scheduler_type": "constant"}}, name="parts"
    )
    straight, _ = job(task, adapter, {"trainer": {"lr_scheduler_type": "constant"}}, name="straight")
    posttrain("train", parts.with_suffix(".yaml"), "--resume", "trainer.max_steps=4")
    assert_same(weights(straight), weights(parts))
    rows = [row for row in json_lines(parts / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    if task == "preference":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    exported = straight / "export"
    kind = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    if adapter:
        base = kind.from_pretrained(exported / "base", **({"num_labels": 1} if task == "reward" else {}))
        model = PeftModel.from_pretrained(base, exported)
    else:
        model = kind.from_pretrained(exported)
    ids = torch.arange(4, 24).unsqueeze(0)
    assert model(ids).logits.shape == ((1, 1) if task == "reward" else (1, 20, 100))


def test_label_noise_is_said_and_in_the_manifest(job):
    run, result = job(
        "reward", {"data": {"label_noise": {"share": 0.25, "seed": 3}}, "trainer": {"max_steps": 1}}
    )
    assert "exchanged in 6 of 24 training rows (drawn with seed 3)" in result.stderr
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["label_noise"] == {"rows": 24, "share": 0.25, "seed": 3, "flipped": 6}


def test_a_probe_is_scored_at_evaluations(job):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    run, _ = job("preference", LORA, {"data": {"probe": {"size": 5}}, "trainer": settings, "export": None})
    rows = [row for row in json_lines(run / "metrics.jsonl") if "probe/kl_forward" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["probe/kl_forward"] > 0
    assert "probe/kl_forward" in (run / "report.html").read_text()


def test_pairs_that_do_not_fit_are_refused_before_anything_is_written(job, tmp_path):
    with pytest.raises(AssertionError, match=r"24 of 24 pairs have a prompt that leaves no room"):
        job("preference", {"trainer": {"max_length": 5}})
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_lists_whose_labels_are_none_are_a_wrong_request(tmp_path):
    rows = [{"prompt": f"say {i}", "completions": [" a", " b"], "scores": [7, i]} for i in range(4)]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "preference",
        "threads": 1,
        "run_dir": str(tmp_path / "run"),
        "data": {"source": str(tmp_path / "lists.jsonl")},
        "methods": {"lipo": {}},
        "trainer": {"max_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    refused = posttrain("train", tmp_path / "run.yaml", code=2).stderr
    assert "set labels to min_max (prompt 'say 0')" in refused


def test_a_reward_run_is_a_reward_of_another_run(job, tmp_path):
    scorer, _ = job("reward", LORA, name="scorer")
    trainer = {"num_generations": 2, "max_completion_length": 4, "max_steps": 2, "max_length": None}
    run, _ = job(
        "rlvr", {"rewards": [f"model:{scorer}/export"], "trainer": trainer, "export": None}, name="policy"
    )
    rows = [row for row in json_lines(run / "metrics.jsonl") if "loss" in row]
    assert all(row["reward_std"] > 0 and row["verifier/model/error"] == 0 for row in rows)
    assert json_lines(run / "completions.jsonl")[0]["rewards"]["model"] is not None


SCORED = {
    "rewards": [{"word_list": {"params": {"positive": ["e"], "negative": ["x"], "bound": 9}}}],
    "evaluate": {"samples": 2, "max_new_tokens": 4, "resamples": 100, "every": 2},
}


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_a_preference_run_is_evaluated_against_its_start(job, adapter):
    run, result = job("preference", SCORED, adapter, {"trainer": {"beta": 0.5, "learning_rate": 3e-3}})
    evaluation = json.loads((run / "evaluation.json").read_text())
    before, after = (evaluation[side]["metrics"] for side in ("before", "after"))
    assert (before["accuracy"]["value"], before["win_rate"]["value"], before["kl"]["value"]) == (
        0.5,
        0.5,
        0.0,
    )
    assert after["accuracy"]["value"] > 0.5
    assert after["margin"]["value"] == pytest.approx(
        0.5 * (after["chosen_shift"]["value"] - after["rejected_shift"]["value"])
    )
    assert after["kl_k3"]["value"] > 0
    assert {"score", "length", "clipped", "self_bleu", "prompt_distinct-1"} <= after.keys()
    assert evaluation["difference"]["metrics"]["accuracy"]["low"] is not None
    rows = json_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_out/accuracy" in row] == [2]
    for shown in ("accuracy", "win_rate", "kl"):
        assert f"{shown} " in result.stdout
    # the verb gives the same numbers from the files alone
    asked = json.loads(posttrain("eval", run / "export" if adapter else run, "--json").stdout)
    same = {name: estimate for name, estimate in asked["metrics"].items() if name != "win_rate"}
    assert same == {name: pytest.approx(after[name], abs=1e-5) for name in same}
    page = (run / "report.html").read_text()
    assert "Held-out preference accuracy went from 0.500 to" in page
    card = (run / "export" / "README.md").read_text()
    assert "by preference optimisation" in card
    assert "| win_rate |" in card


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_a_reward_run_is_evaluated_on_held_out_pairs(job, adapter, monkeypatch, capsys):
    run, _ = job("reward", adapter, {"evaluate": {"resamples": 100}, "trainer": {"learning_rate": 3e-3}})
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert set(evaluation["after"]["metrics"]) == {
        "accuracy",
        "margin",
        "log_loss",
        "brier",
        "calibration_error",
    }
    assert evaluation["difference"]["metrics"]["log_loss"]["value"] < 0
    asked = json.loads(posttrain("eval", run / "export" if adapter else run, "--json").stdout)
    assert asked["metrics"]["margin"] == pytest.approx(evaluation["after"]["metrics"]["margin"], abs=1e-5)
    # what the card says to load it with does load it
    card = (run / "export" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(run / "export")
    exec(compile(code, "card", "exec"), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) != 0.0


def test_what_a_method_trains_besides_is_kept_exported_and_shown(job):
    method = {"methods": {"sparse_po": {"shared": False, "mask_init": "ones"}}}
    run, _ = job("preference", method, {"trainer": {"learning_rate": 1e-2}})
    kept = load_file(run / "modules" / "sparse_po.safetensors")
    for folder in (run / "checkpoints" / "checkpoint-4", run / "export"):
        assert_same(kept, load_file(folder / "sparse_po.safetensors"))
    assert {name.split(".")[0] for name in kept} == {"reward", "kl"}
    assert (kept["reward.mix"] - 1 / len(kept["reward.mix"])).abs().max() > 1e-3
    AutoModelForCausalLM.from_pretrained(run / "export")  # the file beside it is in nobody's way
    (first, *_) = json.loads((run / "mask_examples.json").read_text())["pictures"]
    assert first["title"] == "chosen"
    assert "".join(first["tokens"]).startswith(" good ")
    assert len(first["values"]["reward"]) == len(first["values"]["kl"]) == len(first["tokens"])
    assert "sparse_po: kl, rejected response" in (run / "report.html").read_text()
    # the verb exports it too
    posttrain("export", run, "--to", run.parent / "again")
    assert_same(kept, load_file(run.parent / "again" / "sparse_po.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["preference", "reward"])
def test_arms_are_compared_by_what_is_measured_on_pairs(job, task, tmp_path):
    evaluate = SCORED if task == "preference" else {"evaluate": {"resamples": 100}}
    run, _ = job(task, evaluate, {"export": None, "trainer": {"max_steps": 1}})
    arms = ("--arm", "slow", "--arm", "fast:trainer.learning_rate=3e-3")
    result = posttrain(
        "compare",
        run.with_suffix(".yaml"),
        *arms,
        "--seeds",
        1,
        "--out",
        tmp_path / "out",
        "trainer.max_steps=3",
    )
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    names = ("accuracy", "kl", "win_rate", "self_bleu") if task == "preference" else ("accuracy", "log_loss")
    for name in names:
        both = found["means"][f"after/{name}"]
        assert found["differences"][f"after/{name}"]["fast"]["value"] == pytest.approx(
            both["fast"]["value"] - both["slow"]["value"]
        )
        assert name in result.stdout
    shown = "rewards/margins" if task == "preference" else "margin"
    assert found["means"][f"end/{shown}"]["slow"]["value"] is not None

"""One small run per kind of training, inspected from all sides: files, numbers, answers of the verbs."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from run_jobs import LORA, STEPS, json_lines, posttrain, timeless, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config.check import load_run_config

MODULE = "module"


def logits(folder, text="1 + 2 ="):
    """Load as anyone would: transformers, and PEFT for an adapter; nothing of posttrain."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits


@pytest.fixture(scope=MODULE)
def job(tmp_path_factory):
    """Carry out a run and return (folder, result of the command line)."""

    def carry_out(name, *changes):
        folder = tmp_path_factory.mktemp(name)
        config = write_config(folder, folder / "my run", *changes)  # a space, as users have
        return folder / "my run", posttrain("train", config, "--json")

    return carry_out


@pytest.fixture(scope=MODULE)
def rlvr(job):
    return job("rlvr")


@pytest.fixture(scope=MODULE)
def lora(job):
    return job("lora", LORA)


# ---- what lies in the run directory ----------------------------------------------------------------------


def test_a_run_leaves_exactly_its_files(rlvr):
    run, _ = rlvr
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "manifest.json",
        "status.json",
        "metrics.jsonl",
        "completions.jsonl",
        "evaluation.json",
        "report.html",
        "checkpoints",
        "warm_start",
        "export",
    }
    checkpoints = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
    assert checkpoints == {"checkpoint-6", "checkpoint-7"}
    assert {path.name for path in (run / "warm_start").iterdir()} == {"metrics.jsonl", "checkpoints", "model"}


def test_the_resolved_configuration_round_trips(rlvr):
    run, _ = rlvr
    original = load_run_config(run.parent / "config.yaml")
    assert load_run_config(run / "config.yaml") == original
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["evaluate"]["confidence"] == 0.95  # defaults are spelled out
    assert written["methods"]["ace"]["alpha"] == 1.0
    assert written["methods"]["ace"]["activation"] == "softplus"


def test_the_manifest_says_how_to_repeat_the_run(rlvr):
    manifest = json.loads((rlvr[0] / "manifest.json").read_text())
    assert manifest["seeds"] == {"run": 42, "train": 0, "eval": 1_000_003}
    assert manifest["data"]["train_rows"] == 40
    assert manifest["data"]["eval_rows"] == 6
    assert len(manifest["data"]["fingerprint"]) == 64
    assert manifest["config"]["trainer"]["max_steps"] == STEPS
    assert "resumed" not in manifest


def test_metrics_hold_every_step_once_and_a_summary(rlvr):
    rows = json_lines(rlvr[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1), STEPS]
    assert "train_runtime" in rows[-1]
    assert all("loss" in row for row in rows[:-1])
    assert all(
        {"ace/shift_mean", "ace/weight_mean", "reward", "entropy"} <= rows[step].keys() for step in (0, 2, 4)
    )
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    shares = ["correct", "wrong", "unparseable", "error", "timeout"]
    assert sum(rows[0][f"verifier/verifier/{name}"] for name in shares) == pytest.approx(1.0)
    assert rows[0]["verifier/verifier/error"] == rows[0]["verifier/verifier/timeout"] == 0.0


def test_warm_start_learns_and_logs_on_its_own(rlvr):
    rows = json_lines(rlvr[0] / "warm_start" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 12]
    assert losses[-1] < losses[0] - 0.5
    assert (rlvr[0] / "warm_start" / "model" / "model.safetensors").exists()


def test_completions_carry_rewards_and_status(rlvr):
    rows = json_lines(rlvr[0] / "completions.jsonl")
    # rollouts are used for two steps, and logged once
    assert [row["step"] for row in rows] == [step for step in (1, 3, 5, 7) for _ in range(8)]
    for row in rows:
        assert set(row) == {"step", "prompt", "completion", "advantage", "rewards", "status"}
        assert row["status"] in ("correct", "wrong", "unparseable")
        assert (row["rewards"]["verifier"] >= 1.0) == (row["status"] == "correct")
        assert len(row["completion"]) <= 4


def test_evaluation_before_after_and_difference(rlvr):
    evaluation = json.loads((rlvr[0] / "evaluation.json").read_text())
    assert evaluation["steps"] == {"before": 0, "after": STEPS}
    for part in ("before", "after"):
        problems = evaluation[part]["problems"]
        assert len(problems) == 6
        assert all(len(problem["samples"]) == 2 for problem in problems)
        solved = sum(sample["status"] == "correct" for problem in problems for sample in problem["samples"])
        assert evaluation[part]["metrics"]["pass@1"]["value"] == pytest.approx(solved / 12)
        assert sum(evaluation[part]["verdicts"].values()) == 12
    for name, estimate in evaluation["difference"]["metrics"].items():
        after, before = (evaluation[part]["metrics"][name]["value"] for part in ("after", "before"))
        assert estimate["value"] == pytest.approx(after - before)


def test_training_changed_what_is_exported(rlvr):
    run, _ = rlvr
    before, after = logits(run / "warm_start" / "model"), logits(run / "export")
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, logits(run / "checkpoints" / f"checkpoint-{STEPS}"), rtol=0, atol=0)


def test_the_report_is_one_file(rlvr):
    page = (rlvr[0] / "report.html").read_text()
    assert "pass@1" in page
    assert "shift_mean" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


# ---- what the command line says --------------------------------------------------------------------------


def test_stdout_holds_json_only(rlvr):
    run, result = rlvr
    answer = json.loads(result.stdout)
    assert answer["run_dir"] == str(run)
    assert answer["steps"] == STEPS
    assert answer["export"] == str(run / "export")
    assert answer["report"] == str(run / "report.html")
    assert answer["pushed"] is None
    assert "problems" not in answer["evaluation"]["after"]
    stored = json.loads((run / "evaluation.json").read_text())
    assert answer["evaluation"]["after"]["metrics"] == stored["after"]["metrics"]
    assert answer["evaluation"]["difference"] == stored["difference"]


def test_the_console_shows_our_lines_and_no_bars(rlvr):
    text = rlvr[1].stderr
    assert "training: 40 rows, prompt length median 7, longest 7 tokens" in text
    assert "held-out: 6 rows" in text
    assert f"rlvr {STEPS}/{STEPS}  reward" in text
    assert "evaluating after training: 6 problems x 2 samples" in text
    assert "reloaded logits differ by at most 0" in text
    assert "\r" not in text
    assert "\x1b" not in text
    for noise in ("Loading weights", "Writing model shards", "Map:", "examples/s", "it/s"):
        assert noise not in text


def test_eval_of_run_checkpoint_and_export_agree_with_the_run(rlvr, tmp_path):
    run, _ = rlvr
    expected = json.loads((run / "evaluation.json").read_text())["after"]
    for target in (run, run / "export", run / "checkpoints" / f"checkpoint-{STEPS}"):
        out = tmp_path / "evaluation.json"
        found = json.loads(posttrain("eval", target, "--json", "--out", out).stdout)
        assert found["metrics"] == expected["metrics"]
        assert json.loads(out.read_text())["problems"] == expected["problems"]


def test_eval_of_the_warm_start_is_the_evaluation_before(rlvr):
    run, _ = rlvr
    expected = json.loads((run / "evaluation.json").read_text())["before"]
    config = run.parent / "config.yaml"
    found = posttrain("eval", run / "warm_start" / "model", "--config", config, "--json")
    assert json.loads(found.stdout)["metrics"] == expected["metrics"]


def test_eval_takes_overrides_and_prints_a_table(rlvr):
    shown = posttrain("eval", rlvr[0], "evaluate.samples=3", "evaluate.k=[1, 3]", "data.eval.size=2").stdout
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert {"pass@1", "pass@3", "coverage", "tokens/s"} <= lines.keys()
    counts = [int(line.split()[-1]) for line in shown.splitlines() if line.startswith("verdicts:")]
    assert sum(counts) == 6


def test_report_again(rlvr, tmp_path):
    out = tmp_path / "page.html"
    answer = json.loads(posttrain("report", rlvr[0], "--out", out, "--json").stdout)
    assert answer == {"report": str(out)}
    assert out.read_text() == (rlvr[0] / "report.html").read_text()


def test_export_a_checkpoint_elsewhere(rlvr, tmp_path):
    run, _ = rlvr
    target = tmp_path / "sent out"
    answer = json.loads(
        posttrain("export", run / "checkpoints" / "checkpoint-6", "--to", target, "--json").stdout
    )
    assert answer["folder"] == str(target)
    assert answer["format"] == "full"
    assert answer["max_difference"] == 0.0
    torch.testing.assert_close(logits(target), logits(run / "checkpoints" / "checkpoint-6"), rtol=0, atol=0)


# ---- an adapter ------------------------------------------------------------------------------------------


def test_the_adapter_is_exported_with_the_base_the_run_made(lora):
    run, _ = lora
    assert (run / "export" / "adapter_model.safetensors").exists()
    torch.testing.assert_close(
        logits(run / "export"), logits(run / "checkpoints" / f"checkpoint-{STEPS}"), rtol=0, atol=0
    )
    marker = json.loads((run / "export" / "posttrain_export.json").read_text())
    assert marker["format"] == "adapter"
    assert marker["base_bundled"] is True


def test_the_base_under_the_adapter_is_the_warm_start(lora):
    run, _ = lora
    torch.testing.assert_close(
        logits(run / "export" / "base"), logits(run / "warm_start" / "model"), rtol=0, atol=0
    )
    assert (logits(run / "export") - logits(run / "export" / "base")).abs().max() > 1e-4


def test_merging_leaves_the_adapter_where_it_is(lora):
    run, _ = lora
    answer = json.loads(posttrain("export", run, "--format", "merged", "--json").stdout)
    assert answer["folder"] == str(run / "export-merged")
    assert (run / "export" / "adapter_model.safetensors").exists()
    torch.testing.assert_close(logits(run / "export-merged"), logits(run / "export"), rtol=1e-4, atol=1e-5)
    assert not (run / "export-merged" / "adapter_config.json").exists()


def test_an_adapter_checkpoint_is_evaluated_after_the_run_was_moved(lora, tmp_path):
    run, _ = lora
    expected = json.loads((run / "evaluation.json").read_text())["after"]["metrics"]
    moved = run.rename(tmp_path / "moved")
    try:
        assert json.loads(posttrain("eval", moved, "--json").stdout)["metrics"] == expected
    finally:
        moved.rename(run)


# ---- supervised runs, and runs that leave things out -----------------------------------------------------


def test_supervised_run(job):
    supervised = {"task": "sft", "warm_start": None, "methods": None, "rewards": ["verifier"]}
    trainer = {"num_generations": None, "steps_per_generation": None, "max_completion_length": None}
    run, result = job("sft", supervised, {"trainer": trainer, "evaluate": {"max_new_tokens": 4}})
    rows = json_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1), STEPS]
    assert rows[STEPS - 1]["loss"] < rows[0]["loss"]
    assert not (run / "completions.jsonl").exists()
    assert not (run / "warm_start").exists()
    assert json.loads(result.stdout)["evaluation"]["after"]["verdicts"]["error"] == 0
    assert logits(run / "export").shape[-1] > 10


def test_without_evaluation_export_and_checkpoints(job):
    run, result = job(
        "bare", {"evaluate": None, "export": None, "warm_start": None, "trainer": {"save_strategy": "no"}}
    )
    answer = json.loads(result.stdout)
    assert answer["evaluation"] is None
    assert answer["export"] is None
    assert not (run / "evaluation.json").exists()
    assert not (run / "export").exists()
    refused = posttrain("eval", run, "evaluate.k=[1]", "evaluate.samples=1", code=2)
    assert "holds no checkpoint and no export yet" in refused.stderr


def test_a_run_without_checkpoints_is_evaluated_by_its_export(job):
    run, result = job("no-checkpoints", {"warm_start": None, "trainer": {"save_strategy": "no"}})
    expected = json.loads(result.stdout)["evaluation"]["after"]["metrics"]
    assert json.loads(posttrain("eval", run, "--json").stdout)["metrics"] == expected


def test_trainer_evaluation_keeps_the_best_and_so_does_eval(job):
    run, _ = job(
        "best",
        {
            "trainer": {
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_steps": 1,
                "per_device_eval_batch_size": 8,
            }
        },
        {"trainer": {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "max_steps": 3}},
        {"trainer": {"save_total_limit": 3, "greater_is_better": True}, "warm_start": None},
    )
    rewards = {
        row["step"]: row["eval_reward"] for row in json_lines(run / "metrics.jsonl") if "eval_reward" in row
    }
    assert sorted(rewards) == [1, 2, 3]
    best = max(rewards, key=rewards.get)
    torch.testing.assert_close(
        logits(run / "export"), logits(run / "checkpoints" / f"checkpoint-{best}"), rtol=0, atol=0
    )
    expected = json.loads((run / "evaluation.json").read_text())["after"]["metrics"]
    assert json.loads(posttrain("eval", run, "--json").stdout)["metrics"] == expected


# ---- going on --------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_nothing_and_says_so(job):
    run, _ = job("again")
    metrics = timeless(json_lines(run / "metrics.jsonl"))
    completions = (run / "completions.jsonl").read_text()
    evaluation = (run / "evaluation.json").read_text()
    result = posttrain("train", run.parent / "config.yaml", "--resume", "--json")
    assert f"going on from checkpoint-{STEPS}" in result.stderr
    assert "evaluating" not in result.stderr
    assert timeless(json_lines(run / "metrics.jsonl")) == metrics
    assert (run / "completions.jsonl").read_text() == completions
    assert (run / "evaluation.json").read_text() == evaluation
    assert len(json.loads((run / "manifest.json").read_text())["resumed"]) == 1


def test_a_longer_run_is_evaluated_anew(job):
    run, _ = job("longer")
    before = json.loads((run / "evaluation.json").read_text())
    result = posttrain("train", run.parent / "config.yaml", "--resume", "--json", "trainer.max_steps=9")
    assert "note: trainer.max_steps was 7, now 9" in result.stderr
    assert "evaluating before" not in result.stderr
    assert "evaluating after" in result.stderr
    after = json.loads((run / "evaluation.json").read_text())
    assert after["steps"] == {"before": 0, "after": 9}
    assert after["before"] == before["before"]
    assert [row["step"] for row in json_lines(run / "metrics.jsonl")] == [*range(1, 10), 9]


def test_other_evaluation_settings_evaluate_both_sides_anew(job):
    run, _ = job("settings", {"warm_start": None})
    result = posttrain("train", run.parent / "config.yaml", "--resume", "--json", "evaluate.samples=3")
    assert "evaluating before" in result.stderr
    assert "evaluating after" in result.stderr
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert all(len(p["samples"]) == 3 for part in ("before", "after") for p in evaluation[part]["problems"])


def test_overwriting_keeps_the_old_run(job):
    run, _ = job("overwrite", {"warm_start": None, "evaluate": None})
    posttrain("train", run.parent / "config.yaml", "--overwrite", "trainer.max_steps=2")
    assert [row["step"] for row in json_lines(run / "metrics.jsonl")] == [1, 2, 2]
    assert [row["step"] for row in json_lines(run.with_name("my run.old") / "metrics.jsonl")][-1] == STEPS
    # what cannot start does not move anything
    posttrain("train", run.parent / "config.yaml", "--overwrite", "data.source=nowhere.jsonl", code=2)
    assert [row["step"] for row in json_lines(run / "metrics.jsonl")] == [1, 2, 2]

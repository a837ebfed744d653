"""train, eval, export and report: exit codes and messages when something is wrong."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from posttrain import cli_common
from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.errors import describe, is_request_error


def _helpers(folder, name):
    """Modules of other tests; test folders are no packages."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


run_jobs, stand_in = _helpers("run", "run_jobs"), _helpers("export", "export_hub_stand_in")
posttrain, write_config = run_jobs.posttrain, run_jobs.write_config

QUICK = {"warm_start": None, "evaluate": None, "export": None, "trainer": {"max_steps": 2}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *changes: write_config(tmp_path, tmp_path / "run", QUICK, *changes)


REWARDS = """
def fails(completions, **columns):
    raise KeyError("no such column")

def infinite(completions, **columns):
    return [float("inf")] * len(completions)

def prints(completions, **columns):
    print("a line on stdout")
    return [float(len(text)) for text in completions]
"""


# ---- 2: the request was wrong ----------------------------------------------------------------------------


def test_every_mistake_of_a_configuration_at_once(config):
    path = config({"trainer": {"learning_rat": 1e-4, "temperature": -1}, "data": {"train": {"size": 0}}})
    result = posttrain("train", path, "methods.ace.alfa=1", code=2)
    for wrong in ("learning_rat", "temperature", "data.train.size", "alfa"):
        assert wrong in result.stderr
    assert f"{path}:" in result.stderr
    assert result.stdout == ""
    assert not (path.parent / "run").exists()


def test_missing_configuration(config):
    assert "cannot read nowhere.yaml" in posttrain("train", "nowhere.yaml", code=2).stderr


def test_missing_data_file(config):
    path = config({"data": {"source": "nowhere.jsonl", "params": None}, "rewards": ["math"]})
    assert "nowhere.jsonl" in posttrain("train", path, code=2).stderr


def test_wrong_columns_name_the_renaming(config, tmp_path):
    rows = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = config(
        {"data": {"source": "rows.jsonl", "params": None, "prompt_pattern": None}, "rewards": ["math"]}
    )
    result = posttrain("train", path, code=2)
    assert "prompt" in result.stderr
    assert "question" in result.stderr
    assert "columns" in result.stderr
    # nothing was started: the next try needs neither --resume nor --overwrite
    small = {"train": {"size": 6}, "eval": {"size": 2}, "columns": {"prompt": "question"}}
    config(
        {
            "data": {"source": "rows.jsonl", "params": None, "prompt_pattern": None, **small},
            "rewards": ["math"],
        }
    )
    posttrain("train", path)


def test_a_folder_that_is_no_checkpoint(config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    result = posttrain("train", config({"model": {"path": "./model"}}), code=2)
    assert "holds no weights" in result.stderr


def test_adapter_modules_that_do_not_exist(config):
    path = config({"model": {"adapter": {"target_modules": ["query"]}}})
    result = posttrain("train", path, code=2)
    assert "model.adapter.target_modules: no module is called ['query']" in result.stderr
    assert "q_proj" in result.stderr
    posttrain("train", path, "model.adapter.target_modules=[q_proj]")  # no --overwrite needed


def test_a_verifier_that_cannot_be_loaded(config):
    result = posttrain("train", config({"rewards": ["python:rewards_of_mine.fals"]}), code=2)
    assert "fals" in result.stderr


def test_an_evaluation_that_cannot_fit_is_refused_before_the_training(config, tmp_path):
    path = config({"evaluate": {"k": [1], "samples": 1, "max_new_tokens": 506, "before": False}})
    result = posttrain("train", path, code=2)
    assert "longest prompt has 7 tokens, and with 506 new ones it exceeds the context of 512" in result.stderr
    assert "evaluate.max_new_tokens to at most 505" in result.stderr
    assert list((tmp_path / "run").iterdir()) == []
    posttrain(
        "train", path, "evaluate.max_new_tokens=5", "--overwrite"
    )  # a folder that is new or empty will do


def test_run_dir_in_use(config, tmp_path):
    path = config()
    posttrain("train", path)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    result = posttrain("train", path, code=2)
    assert "already holds a run. Continue it with --resume, replace it with --overwrite" in result.stderr
    assert (
        "methods.ace.alpha was 1.0, now 2.0"
        in posttrain("train", path, "--resume", "methods.ace.alpha=2.0", code=2).stderr
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_nothing_to_resume(config):
    assert "nothing to resume" in posttrain("train", config(), "--resume", code=2).stderr


def test_resume_and_overwrite_together(config):
    assert "give one of them" in posttrain("train", config(), "--resume", "--overwrite", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "does not lie in a run directory: say what to evaluate on with --config"),
        (["eval", "./nowhere", "--config", "CONFIG", "rewards=[verifier]"], "no such folder"),
        (["eval", "embedded:char-llama", "--config", "CONFIG", "rewards=[]", "task=sft"], "needs a verifier"),
        (["export", "nowhere"], "name a target folder with --to"),
        (["export", "./nowhere", "--to", "x"], "no such folder"),
        (
            ["export", "nowhere", "--format", "gguf"],
            "--format is one of auto, adapter, merged, full, delta, found 'gguf'",
        ),
        (["report", "nowhere"], "no run directory at nowhere"),
        (["report", "."], "is not a run directory: it holds none of"),
    ],
)
def test_wrong_requests_of_the_other_verbs(config, arguments, message):
    path = config()
    path.rename(path.with_name("job.yaml"))
    named = ["job.yaml" if argument == "CONFIG" else argument for argument in arguments]
    if "methods" in path.with_name("job.yaml").read_text() and "task=sft" in named:
        named += ["methods=[]", "trainer=null"]
    result = posttrain(*named, code=2)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stdout == ""


# ---- 1: the run failed -----------------------------------------------------------------------------------


def test_a_verifier_that_always_fails_stops_the_evaluation_before(config, tmp_path):
    path = config({"rewards": ["python:rewards_of_mine.fails"], "evaluate": {"k": [1], "samples": 1}})
    result = posttrain("train", path, code=1)
    assert "reward 'fails': 6 of 6 held-out completions ended in error (6) or timeout (0)" in result.stderr
    assert "no such column" in result.stderr
    assert result.stderr.count("Traceback") == 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert f"posttrain doctor {tmp_path / 'run'} says what to try)" in result.stderr
    told = json.loads(posttrain("doctor", tmp_path / "run", "--json", code=1).stdout)
    assert (told["run"]["state"], told["findings"][0]["name"]) == ("failed", "verifier_failure")
    assert "no such column" in told["findings"][0]["found"]


def test_a_verifier_that_always_fails_stops_the_training(config):
    result = posttrain("train", config({"rewards": ["python:rewards_of_mine.fails"]}), code=1)
    assert "completions ended in error (32) or timeout (0)" in result.stderr
    assert "failed: reward 'fails'" in result.stderr


def test_infinite_rewards_never_reach_the_weights(config):
    result = posttrain("train", config({"rewards": ["python:rewards_of_mine.infinite"]}), code=1)
    assert "finite" in result.stderr


def test_numbers_that_blow_up_stop_the_run_before_they_are_saved(config, tmp_path):
    path = config({"trainer": {"max_steps": 40, "save_steps": 1, "lr_scheduler_type": "constant"}})
    # each step multiplies the weights by 1 - 1e7
    result = posttrain("train", path, "trainer.weight_decay=1e6", "trainer.learning_rate=10", code=1)
    assert "failed: the weights are not finite after" in result.stderr
    assert "Lower the learning rate or the weight decay, and go on with --resume." in result.stderr
    last = newest_checkpoint(tmp_path / "run" / "checkpoints")
    weights = load_file(last / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_sampling_from_broken_weights_names_them(config, tmp_path):
    path = config({"trainer": {"max_steps": 40, "save_strategy": "no", "lr_scheduler_type": "constant"}})
    result = posttrain("train", path, "trainer.weight_decay=1e6", "trainer.learning_rate=10", code=1)
    assert "failed: the model gives probabilities that are not finite" in result.stderr
    assert "Lower the learning rate" in result.stderr


def test_what_users_print_stays_off_stdout(config):
    result = posttrain("train", config({"rewards": ["python:rewards_of_mine.prints"]}), "--json")
    assert json.loads(result.stdout)["steps"] == 2


def test_completions_printed_by_trl_stay_off_stdout(config):
    path = config({"trainer": {"log_completions": True, "disable_tqdm": True}})
    assert json.loads(posttrain("train", path, "--json").stdout)["steps"] == 2


def test_export_that_cannot_be_done(config, tmp_path):
    path = config()
    posttrain("train", path)
    result = posttrain("export", tmp_path / "run", "--format", "merged", code=2)
    assert "format 'merged' needs an adapter" in result.stderr


def test_pushing_without_a_token(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("posttrain.export.push.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    result = posttrain("train", config({"export": {"push": "someone/model"}}), code=2)
    assert "no access token" in result.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()  # known before anything was trained


def test_a_push_that_fails_after_training_loses_nothing_and_goes_on(config, tmp_path, monkeypatch):
    token = stand_in.TOKEN
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("posttrain.export.push.WAITS", ())
    with stand_in.HubStandIn() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.faults[("POST", "/commit/")] = "drop"
        result = posttrain("train", config({"export": {"push": "user/tiny"}}), code=1)
        export = tmp_path / "run/export"
        assert f"Push again: posttrain export {export} --push user/tiny" in " ".join(result.stderr.split())
        assert (tmp_path / "run/report.html").is_file()
        assert hub.count("PUT", "/lfs/") == 1
        hub.faults.clear()
        again = posttrain("export", export, "--push", "user/tiny")
        assert f"pushed: {hub.endpoint}/user/tiny" in again.stdout
        assert hub.count("PUT", "/lfs/") == 1
        assert "model.safetensors" in hub.repos["user/tiny"].branches["main"]
    assert token not in result.output + again.output
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert tmp_path / "run/failures.jsonl" in files
    assert not [path for path in files if token.encode() in path.read_bytes()]


def test_a_full_disk_outside_a_checkpoint_says_what_to_do(config, monkeypatch):
    def full(path, rows):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("posttrain.run.callbacks.append_json_lines", full)
    result = posttrain("train", config(), code=1)
    assert "No space left on device" in result.stderr
    assert "The disk is full: free space, then go on with --resume" in result.stderr


# ---- signals and the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")], ids=["int", "term"]
)
def test_signals_end_with_the_way_to_go_on(config, monkeypatch, sent, word):
    handler = signal.getsignal(signal.SIGTERM)

    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), sent)

    monkeypatch.setattr("posttrain.run.train.load_data", interrupt)
    result = posttrain("train", config(), code=1)
    assert result.stderr.strip().splitlines()[-1] == f"{word}; go on with --resume"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_traceback_is_one_variable_away(config, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    with pytest.raises(Exception, match="nothing to resume"):
        posttrain("train", config(), "--resume", code=2)


def test_warnings_of_the_check_are_shown_and_do_not_stop(config):
    path = config({"evaluate": {"k": [1, 2], "samples": 2, "temperature": 0}})
    result = posttrain("train", path, "--json")
    assert "temperature 0 draws the same completion 2 times" in result.stderr
    assert json.loads(result.stdout)["steps"] == 2


def test_a_path_with_brackets_is_shown_as_it_is(config, tmp_path):
    run = tmp_path / "[bold]run[/bold] ü"
    result = posttrain("train", config({"run_dir": str(run), "export": {}}))
    assert f"run      {run} (2 steps)" in result.stdout
    assert f"exported (full) to {run / 'export'}" in result.stderr


def test_only_the_first_process_of_a_machine_speaks_about_the_request(config, monkeypatch):
    def ended(seconds):  # as the launcher does when the first process has ended
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("posttrain.cli_common.time.sleep", ended)
    assert posttrain("train", "nowhere.yaml", code=2).stderr == ""


def test_a_process_that_alone_finds_the_request_wrong_says_so(config, monkeypatch):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("posttrain.cli_common.time.sleep", waited.append)
    assert "nowhere.yaml" in posttrain("train", "nowhere.yaml", code=2).stderr
    assert waited == [cli_common.SPEAKING]  # the first had its time to speak


class VerifierFailure(Exception):  # the name of one of ours, in another module
    pass


def test_which_errors_are_requests_and_how_failures_are_told():
    from posttrain.checkpointing.resume import CheckpointError
    from posttrain.data.errors import DataError
    from posttrain.export.export import ExportError
    from posttrain.export.push import PushError
    from posttrain.models.load import ModelLoadError
    from posttrain.run.directory import RunError

    assert all(is_request_error(kind("x")) for kind in (DataError, ModelLoadError, RunError))
    failures = (CheckpointError, ExportError, PushError, FloatingPointError)
    assert not any(is_request_error(kind("x")) for kind in failures)
    assert [describe(kind("told in full")) for kind in failures] == ["told in full"] * 4
    assert describe(VerifierFailure("x")) == "VerifierFailure: x"
    assert describe(ValueError("x")) == "ValueError: x"
    assert describe(AssertionError()) == "AssertionError"

"""A resumed run is the run that was started: how it goes on may change, what it is may not."""

import json

import pytest
from run_jobs import TINY, merged

from posttrain.config.load import resolved_yaml
from posttrain.config.schema import RunConfig
from posttrain.run.directory import RunDirectory, RunError, write_json, write_text
from posttrain.run.resuming import check_continuation, check_files


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    write_text(run.config, resolved_yaml(config()))
    write_json(run.manifest, {"data": {"fingerprint": "abc"}})
    return run


def config(changes=None):
    return RunConfig.model_validate(merged(TINY, changes or {}))


def test_the_same_configuration_has_no_changes(run):
    assert check_continuation(run, config(), "abc") == []


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"trainer": {"max_steps": 9}}, ["trainer.max_steps was 7, now 9"]),
        ({"trainer": {"warmup_steps": 2}}, ["trainer.warmup_steps was null, now 2"]),
        ({"evaluate": {"samples": 4}}, ["evaluate.samples was 2, now 4"]),
        ({"rewards": [{"verifier": {"deadline": 60}}]}, ["rewards.0.deadline was 10.0, now 60.0"]),
        ({"rewards": [{"verifier": {"params": {"memory_gib": 8}}}]}, None),
        ({"model": {"attn_implementation": "sdpa"}}, ['model.attn_implementation was null, now "sdpa"']),
        ({"warm_start": {"trainer": {"max_steps": 20}}}, ["warm_start.trainer.max_steps was 12, now 20"]),
        ({"run_dir": "elsewhere/run"}, []),
    ],
)
def test_how_it_goes_on_may_change_and_is_said(run, changes, notes):
    found = check_continuation(run, config(changes), "abc")
    assert len(found) > 0 if notes is None else found == notes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"path": "some/model"}}, 'model.path was "embedded:char-llama", now "some/model"'),
        ({"model": {"adapter": {"r": 8}}}, 'model.adapter was null, now {"type": "lora", "r": 8'),
        ({"data": {"train": {"seed": 5}}}, "data.train.seed was 0, now 5"),
        ({"rewards": [{"verifier": {"weight": 2.0}}]}, "rewards.0.weight was 1.0, now 2.0"),
        ({"rewards": ["verifier", "format"]}, 'rewards was [{"name": "verifier"'),
        ({"methods": {"ace": {"alpha": 0.5}}}, "methods.ace.alpha was 1.0, now 0.5"),
    ],
)
def test_another_run_is_refused(run, changes, named):
    with pytest.raises(RunError, match="this is another one") as caught:
        check_continuation(run, config(changes), "abc")
    assert named in str(caught.value)
    assert "Put the old values back" in str(caught.value)


def test_a_finished_warm_start_is_part_of_the_run(run):
    run.warm_start.model.mkdir(parents=True)
    with pytest.raises(RunError, match=r"warm_start\.trainer\.max_steps was 12, now 20"):
        check_continuation(run, config({"warm_start": {"trainer": {"max_steps": 20}}}), "abc")


def test_changed_rows_are_refused(run):
    with pytest.raises(RunError, match="rows of reasoning_gym:chain_sum have changed since"):
        check_continuation(run, config(), "abd")


def test_without_a_manifest_the_rows_cannot_be_compared(run):
    run.manifest.write_text('{"data": ')
    assert check_continuation(run, config(), "abd") == []


@pytest.mark.parametrize("text", ["[1, 2", "- 1\n", "task: rlvr\n", ""])
def test_a_damaged_configuration_is_said(run, text):
    run.config.write_text(text)
    with pytest.raises(RunError, match=r"config\.yaml is damaged"):
        check_continuation(run, config(), "abc")


def test_notes_are_short(run):
    note = check_continuation(run, config({"trainer": {"run_name": "x" * 500}}), "abc")[0]
    assert len(note) < 150
    assert json.dumps("x" * 10)[:-1] in note


@pytest.mark.parametrize("name", ["manifest.json", "evaluation.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"before": {"k": 1}}', b'{"steps": 3}', None])
def test_a_damaged_record_is_not_taken_for_a_missing_one(run, name, content):
    write_json(run.manifest, {"data": {"fingerprint": "abc"}, "time": "t", "command": "c"})
    check_files(run)
    path = run.root / name
    path.unlink(missing_ok=True)
    check_files(run)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(RunError, match=rf"{name} is damaged\. Restore it from a copy, or move it away"):
        check_files(run)


def test_a_damaged_checkpoint_and_a_folder_in_place_of_a_log_are_named(run):
    run.manifest.unlink()
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(RunError, match=r"checkpoint-3 is damaged.*trainer_state\.json.*starts at step 0"):
        check_files(run)
    (run.checkpoints / "checkpoint-3").rmdir()
    run.metrics.mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl is a folder"):
        check_files(run)

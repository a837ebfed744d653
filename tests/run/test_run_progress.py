"""What a run shows while it trains: on a terminal, in a pipe, and to trackers."""

import io
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import TrainerControl, TrainerState
from trl import SFTConfig

from posttrain.run.callbacks import RunRecorder
from posttrain.run.directory import RunDirectory, read_json_lines
from posttrain.run.progress import ConsoleProgress, Pace
from posttrain.run.trainers import sft_trainer, trl_config

RL = {"loss": 1e-4, "reward": 0.4321, "entropy": 1.5, "groups/useful": 0.75, "num_tokens": 600.0}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def state(step, of=10, history=()):
    found = TrainerState(global_step=step, max_steps=of, log_history=list(history))
    found.is_world_process_zero = True
    return found


def test_pace():
    clock = Clock()
    pace = Pace(clock)
    pace.begin(4, 1000.0)
    assert pace.left(4, 10) is None
    for step in (5, 6):
        clock.now += 10
        pace.step(step)
    assert pace.left(6, 10) == 40
    clock.now += 3  # while the next step is under way
    assert pace.left(6, 10) == 37
    clock.now += 60
    assert pace.left(6, 10) == 0
    assert pace.tokens_per_second(1830.0) == pytest.approx(830 / 83)
    assert pace.tokens_per_second(1830.0) is None  # nothing new
    clock.now += 2
    assert pace.tokens_per_second(2030.0) == 100


def test_only_the_latest_steps_count():
    clock = Clock()
    pace = Pace(clock)
    pace.begin(0, 0)
    for step in range(1, 41):
        clock.now += 100 if step <= 10 else 2
        pace.step(step)
    assert pace.left(40, 50) == 20


def run_some(progress, clock, history=()):
    progress.on_train_begin(None, state(2, history=history), TrainerControl())
    for step in (3, 4):
        clock.now += 5
        progress.on_step_end(None, state(step), TrainerControl())


def test_a_pipe_gets_everything_on_one_line():
    out, clock = io.StringIO(), Clock()
    progress = ConsoleProgress("rlvr", Console(file=out, width=40), clock)
    run_some(progress, clock, [{"step": 2, "num_tokens": 500.0}])
    logs = RL | {"held_out/pass@1": 0.5, "held_out/pass@16": 0.9, "completions/mean_length": 20}
    progress.on_log(None, state(4), TrainerControl(), logs=logs)
    assert out.getvalue() == (
        "rlvr 4/10  reward 0.4321  entropy 1.5  useful 75%  length 20  tok/s 10  held-out pass@1 0.500  "
        "left 0:00:30\n"
    )
    # an evaluation stays in sight until the next
    progress.on_log(None, state(5), TrainerControl(), logs=RL)
    assert "held-out pass@1 0.500" in out.getvalue().splitlines()[1]


def test_a_supervised_run_shows_its_loss_and_held_out_loss():
    out = io.StringIO()
    progress = ConsoleProgress("sft", Console(file=out))
    progress.on_log(None, state(4), TrainerControl(), logs={"loss": 2.0, "eval_loss": 2.5})
    assert "loss 2  held-out loss 2.5" in out.getvalue()


def test_a_terminal_gets_a_live_display():
    out, clock = io.StringIO(), Clock()
    progress = ConsoleProgress(
        "rlvr", Console(file=out, width=100, force_terminal=True, color_system=None), clock
    )
    run_some(progress, clock)
    progress.on_log(None, state(4), TrainerControl(), logs=RL)
    progress.on_train_end(None, state(4), TrainerControl())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    last = plain.rstrip().splitlines()[-2:]
    assert re.fullmatch(r"rlvr ━+╸ +4/10 0:00:10 left 0:00:30 *", last[0])
    assert last[1].split("  ") == ["reward 0.4321", "entropy 1.5", "useful 75%", "tok/s 60"]


def test_a_narrow_terminal_parts_no_number_from_its_name():
    out, clock = io.StringIO(), Clock()
    progress = ConsoleProgress(
        "warm start", Console(file=out, width=44, force_terminal=True, color_system=None), clock
    )
    run_some(progress, clock)
    progress.on_log(None, state(4), TrainerControl(), logs=RL | {"held_out/pass@1": 0.5})
    progress.on_train_end(None, state(4), TrainerControl())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "")
    last = [line.rstrip() for line in plain.rstrip().splitlines()[-3:]]
    assert re.fullmatch(r"warm start ━+ +4/10 left 0:00:30", last[0])
    assert last[1:] == ["reward 0.4321  entropy 1.5  useful 75%", "tok/s 60  held-out pass@1 0.500"]
    assert all(len(line) <= 44 for line in last)


def test_what_libraries_log_goes_above_the_display(capsys, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    before = sys.stderr
    handler = logging.StreamHandler()
    logger = logging.getLogger("some.library")
    logger.addHandler(handler)
    progress = ConsoleProgress("rlvr", Console(file=out, width=80, force_terminal=True, color_system=None))
    try:
        progress.on_train_begin(None, state(2), TrainerControl())
        logger.warning("look here")
        assert "look here\n" in out.getvalue()
        progress.stop()
        progress.stop()
        assert handler.stream is sys.stderr is before
        assert "\x1b[?25h" in out.getvalue()  # the cursor is back
    finally:
        logger.removeHandler(handler)
    assert "look here" not in capsys.readouterr().err


def test_a_dumb_terminal_is_a_pipe(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    progress = ConsoleProgress("rlvr", Console(file=out, force_terminal=True))
    progress.on_train_begin(None, state(0), TrainerControl())
    progress.on_log(None, state(1), TrainerControl(), logs=RL)
    assert "\x1b[?25l" not in out.getvalue()
    assert "reward 0.4321" in out.getvalue()


def test_other_ranks_are_silent():
    out = io.StringIO()
    progress = ConsoleProgress("rlvr", Console(file=out, force_terminal=True))
    other = state(1)
    other.is_world_process_zero = False
    progress.on_train_begin(None, other, TrainerControl())
    progress.on_step_end(None, other, TrainerControl())
    progress.on_log(None, other, TrainerControl(), logs=RL)
    progress.on_train_end(None, other, TrainerControl())
    assert out.getvalue() == ""


def test_what_the_recorder_adds_is_in_the_log_and_its_history(tmp_path):
    recorder = RunRecorder(RunDirectory(tmp_path))
    rows = [
        {"prompt": "p", "completion": c, "advantage": a} for c, a in (("a", 1), ("b", -1), ("c", 0), ("c", 0))
    ]
    recorder.trainer = SimpleNamespace(
        last_completions=lambda: rows, num_generations=2, reward_func_names=["verifier"]
    )
    logs = {"reward": 0.5}
    now = state(4, history=[{"step": 4, "loss": 0.0}])
    recorder.on_log(None, now, TrainerControl(), logs=logs)
    assert logs["groups/useful"] == now.log_history[-1]["groups/useful"] == 0.5
    assert read_json_lines(tmp_path / "metrics.jsonl")[0]["groups/useful"] == 0.5


class Tracker(TrainerCallback):
    """Stands for that of wandb or trackio."""

    seen: list = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


class Adds(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        logs["held_out/pass@1"] = 0.5


def test_trackers_see_what_other_callbacks_add(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "runs" / "ace")
    settings = support.sft_config(tmp_path / "out").to_dict()
    fields = {key: settings[key] for key in ("max_steps", "max_length", "disable_tqdm", "logging_steps")}
    args = trl_config(SFTConfig, fields | {"report_to": "trackio", "save_strategy": "no"}, run)
    assert (args.run_name, args.project) == ("runs/ace", "posttrain")
    trainer = sft_trainer(
        run, args, support.model(), support.tokenizer(), support.answers(), watchers=[Adds()]
    )
    trainer.args.max_steps = 1
    Tracker.seen.clear()
    trainer.train()
    first = next(row for row in Tracker.seen if "loss" in row)
    assert first["held_out/pass@1"] == 0.5


def test_runs_of_a_comparison_have_names_of_their_own(tmp_path):
    run = RunDirectory(tmp_path / "cmp" / "ace" / "seed-0")
    assert trl_config(SFTConfig, {"report_to": "trackio"}, run).run_name == "cmp/ace/seed-0"
    assert trl_config(SFTConfig, {"report_to": "trackio", "run_name": "mine"}, run).run_name == "mine"
    assert trl_config(SFTConfig, {}, run).run_name is None


def test_a_tracker_that_is_not_installed_is_refused_by_the_check(tmp_path):
    from posttrain.config.check import check_config

    config = Path(tmp_path / "c.yaml")
    text = "task: sft\nmodel: {path: a/b}\ndata: {source: a/b}\ntrainer: {report_to: %s}\n"
    config.write_text(text % "dvclive")
    assert (
        "report_to: dvclive needs the package dvclive, which is not installed" in check_config(config).text()
    )
    config.write_text(text % "wandbb")
    assert "wandb" in check_config(config).text()
    config.write_text(text % "[trackio, wandb]")
    told = check_config(config).text()
    from importlib.util import find_spec

    for name in ("trackio", "wandb"):
        assert (f"pip install {name}" in told) is (find_spec(name) is None)

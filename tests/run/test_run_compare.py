"""Arms x seeds: the design, the schedule, the numbers, the page. Real runs come last."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import comparison_runs
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.report.load import read_run
from posttrain.run import compare as comparing
from posttrain.run.arms import Arm, parse_arm, plan, split_overrides
from posttrain.run.comparison import Outcome, compare_runs, numbers_of
from posttrain.run.comparison_page import band, write_page
from posttrain.run.directory import RunError

CONFIG = {
    "task": "rlvr",
    "threads": 1,
    "data": {
        "source": "reasoning_gym:chain_sum",
        "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "prompt_pattern": ": (.*)",
        "train": {"size": 40, "seed": 0},
        "eval": {"size": 6, "seed": 1_000_003},
    },
    "warm_start": {
        "size": 300,
        "trainer": {
            "max_steps": 40,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "gradient_checkpointing": False,
            "save_strategy": "no",
        },
    },
    "rewards": ["verifier"],
    "trainer": {
        "seed": 7,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 2,
    },
    "evaluate": {"k": [1, 2], "samples": 2, "resamples": 100},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"run_dir": str(tmp_path / "run")}))
    return path


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(
        comparing, "command", lambda file: [sys.executable, comparison_runs.__file__, str(file)]
    )
    monkeypatch.setattr(comparing, "_POLL_SECONDS", 0.02)


def arms(*names):
    return [Arm(name) for name in names]


def calls(out):
    return (out / "calls.txt").read_text().splitlines()


# ---- the design ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("a=1", ["a=1"]),
        ("a=1,b=2", ["a=1", "b=2"]),
        ("methods=[],x=1", ["methods=[]", "x=1"]),
        ("methods={ace: {alpha: 1}, b: {}},k=[1,4]", ["methods={ace: {alpha: 1}, b: {}}", "k=[1,4]"]),
        ("a='x,y',b=\"[,\"", ["a='x,y'", 'b="[,"']),
        ("a=1, b=2,", ["a=1", "b=2"]),
    ],
)  # fmt: skip
def test_commas_split_outside_brackets_and_quotes(text, pieces):
    assert split_overrides(text) == pieces


def test_an_arm_is_a_name_and_changes():
    assert parse_arm("ace:methods.ace.alpha=1,threads=2") == Arm("ace", ("methods.ace.alpha=1", "threads=2"))
    assert parse_arm("lr:model.path=user/x:y") == Arm("lr", ("model.path=user/x:y",))
    assert parse_arm("plain") == parse_arm("plain:") == Arm("plain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":a=1", "needs the form NAME:key=value"),
        ("../up:a=1", "needs the form NAME:key=value"),
        ("a=1", "needs the form NAME:key=value"),
        (
            "x:trainer.seed=1",
            "sets trainer.seed, which the comparison sets for each run: put it on the command line",
        ),
        ("x:run_dir=y", "sets run_dir, which the comparison sets for each run: give --out DIR"),
    ],
)
def test_arms_that_cannot_be(text, message):
    with pytest.raises(RunError, match=message):
        parse_arm(text)


def test_seed_s_is_the_base_seed_plus_s_and_the_data_stay(config, tmp_path):
    design = plan(config, arms("a", "b"), seeds=3, out=tmp_path / "out")
    assert [(run.arm, run.seed, run.config.trainer["seed"]) for run in design.runs] == [
        ("a", 0, 7), ("b", 0, 7), ("a", 1, 8), ("b", 1, 8), ("a", 2, 9), ("b", 2, 9),
    ]  # fmt: skip
    assert {run.config.data.train.seed for run in design.runs} == {0}
    assert {run.config.data.eval.seed for run in design.runs} == {1_000_003}
    assert design.runs[3].run.root == tmp_path / "out" / "b" / "seed-1"
    assert design.runs[3].beside("yaml") == tmp_path / "out" / "b" / "seed-1.yaml"


def test_without_seed_the_one_of_training_is_the_base(config):
    design = plan(config, arms("a"), seeds=2, overrides=["trainer={max_steps: 1}"])
    assert plan(config, arms("a"), seeds=1, overrides=["trainer.seed=3"]).base_seed == 3
    assert design.out == Path(f"{CONFIG.get('run_dir', config.parent / 'run')}-compare")
    config.write_text(config.read_text().replace("  seed: 7\n", ""))
    assert [run.config.trainer["seed"] for run in plan(config, arms("a"), seeds=2).runs] == [42, 43]


@pytest.mark.parametrize(
    ("share", "leaders"),
    [("once", [None, 0, 0, 0]), ("per-seed", [None, 0, None, 2]), ("no", [None] * 4)],
)
def test_a_warm_start_that_arms_agree_on_is_made_once(config, tmp_path, share, leaders):
    given = [Arm("a"), Arm("lora", ("model.adapter={r: 4}",))]
    runs = plan(config, given, seeds=2, out=tmp_path / "out", share=share).runs
    for run, leader in zip(runs, leaders, strict=True):
        if leader is None:
            assert run.warm_start_of is None
            assert run.config.warm_start.size == 300
            assert run.config.model.path == "embedded:char-llama"
        else:
            assert run.warm_start_of is runs[leader]
            assert run.config.warm_start is None
            assert run.config.model.path == str(runs[leader].run.root.resolve() / "warm_start" / "model")
        assert (run.config.model.adapter is not None) == (run.arm == "lora")


@pytest.mark.parametrize(
    "change", ["warm_start.size=100", "data.train.seed=5", "threads=2", "warm_start=null"]
)
def test_a_warm_start_that_arms_do_not_agree_on_is_not_shared(config, tmp_path, change):
    design = plan(config, [Arm("a"), Arm("b", (change,))], seeds=2, out=tmp_path / "out")
    assert all(run.warm_start_of is None for run in design.runs)


def test_no_sharing_when_the_model_needs_no_warm_start(config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    overrides = [f"model.path={tmp_path / 'model'}"]
    design = plan(config, arms("a", "b"), seeds=1, out=tmp_path / "out", overrides=overrides)
    assert all(run.warm_start_of is None for run in design.runs)
    always = plan(
        config,
        arms("a", "b"),
        seeds=1,
        out=tmp_path / "out",
        overrides=[*overrides, "warm_start.when=always"],
    )
    assert always.runs[1].warm_start_of is always.runs[0]


def test_every_mistake_of_every_arm_is_told(config):
    wrong = [Arm("a", ("trainer.learning_rat=1",)), Arm("b", ("methods.acee.alpha=1", "threads=0"))]
    with pytest.raises(RunError) as error:
        plan(config, wrong, seeds=1)
    text = str(error.value)
    assert re.search(r"arm 'a':.*learning_rat.*arm 'b':.*acee", text, re.DOTALL)
    assert "threads" in text


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("evaluate.samples=4", "evaluate"),
        ("data.eval.size=7", "data.eval"),
        ("data.params.max_terms=3", "data.params"),
        ("trainer={seed: 8, max_steps: 4}", "trainer.seed"),
    ],
)
def test_arms_judged_on_other_problems_are_refused(config, change, key):
    with pytest.raises(RunError, match=rf"arms 'a' and 'b' differ in {re.escape(key)} "):
        plan(config, [Arm("a"), Arm("b", (change,))], seeds=1)


def test_names_occur_once_and_there_is_at_least_one_seed(config):
    for given in ([], arms("a", "A")):
        with pytest.raises(RunError, match="each arm needs a name of its own"):
            plan(config, given, seeds=1)
    with pytest.raises(RunError, match="--seeds is at least 1, found 0"):
        plan(config, arms("a"), seeds=0)


def test_unequal_budgets_and_uploads_are_pointed_out(config):
    given = [Arm("a"), Arm("b", ("trainer.max_steps=8",))]
    design = plan(config, given, seeds=1, overrides=["export={push: user/name, dir: /elsewhere}"])
    assert "The arms do not have the same budget: trainer.max_steps is 4 in a, 8 in b." in design.notes
    assert any("not uploaded" in note for note in design.notes)
    assert all(run.config.export.push is None and run.config.export.dir is None for run in design.runs)


# ---- the schedule ----------------------------------------------------------------------------------------


def test_followers_wait_for_the_warm_start_and_jobs_are_bounded(config, tmp_path, stand_in, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out = tmp_path / "out"
    result = comparing.compare(plan(config, arms("a", "better"), seeds=2, out=out), jobs=2)
    assert result.ok
    log = calls(out)
    assert log[0].startswith("start a 7")
    running = peak = 0
    for line in log:
        running += 1 if line.startswith("start") else -1
        peak = max(peak, running)
    assert peak == 2
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(line.endswith(f" {threads}") for line in log if line.startswith("start"))
    assert sorted(line for line in log if line.startswith("end")) == [
        "end a 7", "end a 8", "end better 7", "end better 8",
    ]  # fmt: skip


def test_what_each_arm_trains_with_is_shown_first_and_in_the_page(config, tmp_path, capsys):
    given = [
        Arm("ace"),
        Arm("merged", ("methods={spine: {}}", "selection={random: {budget: 0.5}}")),
        Arm("alone", ("methods=[spine]",)),
    ]
    design = plan(config, given, seeds=1, out=tmp_path / "out", overrides=["methods={ace: {}}"])
    result = compare_runs(design, finished(design, {"ace": [0], "merged": [0], "alone": [0]}))
    result.print(Console(width=200))
    write_page(result, "posttrain compare x", tmp_path / "page.html")
    expected = {
        "ace": "methods ace; selection none",
        "merged": "methods ace, spine; selection random",
        "alone": "methods spine; selection none",
    }
    assert capsys.readouterr().out.splitlines()[1:4] == [f"{name}: {what}" for name, what in expected.items()]
    page = (tmp_path / "page.html").read_text()
    assert all(f"<td>{what}</td>" in page for what in expected.values())


def test_one_job_runs_one_after_the_other_in_order(config, tmp_path, stand_in):
    out = tmp_path / "out"
    said = []
    comparing.compare(plan(config, arms("a", "better"), seeds=2, out=out), say=said.append)
    assert [line.rsplit(" ", 1)[0] if "start" in line else line for line in calls(out)] == [
        "start a 7", "end a 7", "start better 7", "end better 7",
        "start a 8", "end a 8", "start better 8", "end better 8",
    ]  # fmt: skip
    assert said[0] == "arm a: methods none; selection none"
    assert said[-1].startswith("[4/4] better, seed 1: finished in")


def test_finished_runs_are_kept_failed_ones_tried_again_and_interrupted_ones_resumed(
    config, tmp_path, stand_in
):
    out = tmp_path / "out"
    first = comparing.compare(plan(config, arms("a", "broken"), seeds=2, out=out))
    assert not first.ok
    assert [outcome.status for outcome in first.outcomes] == ["finished", "failed", "finished", "failed"]
    assert first.outcomes[1].error == "exit code 1: failed: the judge is out"
    assert json.loads((out / "broken" / "seed-0.json").read_text())["status"] == "failed"
    before = len(calls(out))
    (out / "a" / "seed-1.json").unlink()  # as if killed on the way
    again = comparing.compare(plan(config, arms("a", "broken", "better"), seeds=2, out=out))
    started = [line.split(" ")[:4] for line in calls(out)[before:] if line.startswith("start")]
    assert started == [
        ["start", "broken", "7", "--resume"], ["start", "better", "7", "1"],
        ["start", "a", "8", "--resume"], ["start", "broken", "8", "--resume"], ["start", "better", "8", "1"],
    ]  # fmt: skip
    assert again.outcomes[0].seconds == first.outcomes[0].seconds
    assert "some line" in (out / "broken" / "seed-0.log").read_text()


def test_without_the_shared_warm_start_its_followers_fail_and_say_why(config, tmp_path, stand_in):
    result = comparing.compare(plan(config, arms("broken", "a"), seeds=2, out=tmp_path / "out"), jobs=2)
    assert [outcome.status for outcome in result.outcomes] == ["failed"] * 4
    assert result.outcomes[1].error == "the warm start of broken, seed 0 does not exist"
    assert result.means == {}
    assert (tmp_path / "out" / "report.html").exists()


def test_runs_of_another_configuration_are_not_mixed_in(config, tmp_path, stand_in):
    out = tmp_path / "out"
    comparing.compare(plan(config, arms("a"), seeds=1, out=out))
    other = plan(config, arms("a"), seeds=2, out=out, overrides=["trainer.learning_rate=2e-3"])
    with pytest.raises(
        RunError, match=r"seed-0 was run with another configuration \(it differs in: trainer;"
    ):
        comparing.compare(other)
    assert len(calls(out)) == 2


def test_folders_with_something_else_are_left_alone(config, tmp_path, stand_in):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds files but no comparison"):
        comparing.compare(plan(config, arms("a"), seeds=1, out=out))
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import comparison_runs
from posttrain.run import compare
compare.command = lambda file: [sys.executable, comparison_runs.__file__, str(file)]
sys.argv = ["posttrain", "compare", {config!r}, "--arm", "a", "--arm", "better", "--seeds", "1"]
sys.argv += ["--out", {out!r}]
from posttrain.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_ends_the_runs_and_the_same_command_goes_on(config, tmp_path, number):
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison.json").write_text("{}")
    (out / "hold").write_text("")
    text = SCRIPT.format(folder=str(Path(__file__).parent), config=str(config), out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", text], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "calls.txt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert other.returncode == 2
    assert "another comparison is running in" in other.stderr
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "interrupted; the same command goes on where it stopped" in said
    assert calls(out) == ["start a 7 1"]  # the run has ended: it never wrote its end
    (out / "hold").unlink()
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split(" ")[:4] for line in calls(out)[1:] if line.startswith("start")] == [
        ["start", "a", "7", "--resume"], ["start", "better", "7", "1"],
    ]  # fmt: skip


# ---- the numbers -----------------------------------------------------------------------------------------


def finished(design, gains, skip=()):
    """Run directories written directly; ``skip`` lists (arm, seed) that failed."""
    outcomes = []
    for run in design.runs:
        if (run.arm, run.seed) in skip:
            outcomes.append(Outcome(run, "failed", 1.0, "exit code 1: failed: <b>no</b>"))
            continue
        run.run.root.mkdir(parents=True)
        run.run.config.write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
        comparison_runs.write(run.run.root, run.seed, gains[run.arm][run.seed])
        outcomes.append(Outcome(run, "finished", 12.0))
    return outcomes


def test_means_and_paired_differences_by_hand(config, tmp_path):
    design = plan(config, arms("a", "b"), seeds=3, out=tmp_path / "out")
    result = compare_runs(design, finished(design, {"a": [0, 0, 0], "b": [0.1, 0.2, 0.3]}))
    # a: pass@1 after = 0, 0.01, 0.02; b: 0.1, 0.21, 0.32
    assert result.means["after/pass@1"]["a"].value == pytest.approx(0.01)
    assert result.means["after/pass@1"]["b"].value == pytest.approx(0.21)
    assert result.means["after/pass@1"]["b"].high == pytest.approx(0.21 + 4.302653 * 0.11 / 3**0.5, abs=1e-6)
    difference = result.differences["after/pass@1"]["b"]
    assert difference.value == pytest.approx(0.2)
    assert difference.low == pytest.approx(0.2 - 4.302653 * 0.1 / 3**0.5, abs=1e-6)
    assert result.means["before/pass@1"]["b"].value == pytest.approx(0.01)
    assert result.differences["change/pass@1"]["b"].value == pytest.approx(0.2)
    # last tenth of 20 steps: only the log of step 20
    assert result.means["end/reward"]["a"].value == pytest.approx(0.2 + 0.1)
    assert result.means["total/steps"]["a"].value == 20
    assert result.means["total/tokens"]["a"].value == 1000
    assert result.means["total/seconds"]["a"].value == 20
    # two steps between logs, lengths 2 to 20, 16 rows on 2 processes
    assert result.means["total/completion_tokens"]["a"].value == 2 * sum(range(2, 21, 2)) * 32
    assert result.means["total/generated_tokens"] == result.means["total/completion_tokens"]
    assert "end/grad_norm" not in result.means
    assert result.differences["end/reward"].keys() == {"b"}


def test_tokens_of_replaced_groups_count_as_generated(tmp_path):
    comparison_runs.write(tmp_path, seed=0, gain=0.0)
    config = {"trainer": {"num_iterations": 2, "gradient_accumulation_steps": 6, "steps_per_generation": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"dynamic_sampling/extra_tokens": float(row["step"])} for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = numbers_of(read_run(tmp_path, "a"))
    # one generation batch per step, two steps between logs
    more = numbers["total/generated_tokens"] - numbers["total/completion_tokens"]
    assert more == 2 * sum(range(2, 21, 2))


def test_a_failed_seed_is_in_no_mean_and_no_pair(config, tmp_path):
    design = plan(config, arms("a", "b"), seeds=3, out=tmp_path / "out")
    outcomes = finished(design, {"a": [0, 0, 0], "b": [0.1, 0.2, 0.3]}, skip=[("b", 2)])
    result = compare_runs(design, outcomes)
    estimate = result.means["after/pass@1"]["b"]
    assert (estimate.value, estimate.seeds, estimate.left_out) == (pytest.approx(0.155), 2, 1)
    assert result.differences["after/pass@1"]["b"].value == pytest.approx(0.15)
    assert result.cell(estimate).endswith("n=2")
    assert not result.ok
    assert any(note.startswith("1 of 6 runs failed: b, seed 2.") for note in result.notes)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["differences_to"] == "a"
    assert content["runs"][5]["error"] == "exit code 1: failed: <b>no</b>"
    assert content["runs"][5]["values"] == {}
    page = tmp_path / "page.html"
    write_page(result, "posttrain compare <x>", page)
    text = page.read_text()
    assert "failed: exit code 1: failed: &lt;b&gt;no&lt;/b&gt;" in text
    assert "posttrain compare &lt;x&gt;" in text
    assert "<b>0.155</b>" in text
    assert '<span class="interval">n = 2</span>' in text
    assert "Everything else that was logged" not in text  # reward and length are main curves


def test_other_rows_are_noticed(config, tmp_path):
    design = plan(config, arms("a", "b"), seeds=1, out=tmp_path / "out")
    outcomes = finished(design, {"a": [0], "b": [0]})
    assert not any("fingerprints" in note for note in compare_runs(design, outcomes).notes)
    comparison_runs.write(design.runs[1].run.root, 0, 0.0, fingerprint="g")
    assert any("fingerprints of their data differ" in note for note in compare_runs(design, outcomes).notes)


def test_bands_go_from_the_lowest_to_the_highest_seed():
    assert band([{1: 1.0, 2: 5.0}, {1: 3.0}, {1: 2.0, 3: 0.0}]) == (
        [1, 2, 3], [2.0, 5.0, 0.0], [1.0, 5.0, 0.0], [3.0, 5.0, 0.0],
    )  # fmt: skip


class Tags(HTMLParser):
    """Checks that every tag is closed and nothing is loaded from elsewhere."""

    VOID = frozenset({"input", "meta", "link", "line", "path", "circle", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.titles = [], []

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        assert not any(
            str(value).startswith(("http", "//")) for name, value in attrs if name in ("src", "href")
        )
        if tag not in self.VOID:
            self.open.append(tag)
        self.titles += [value for name, value in attrs if name == "aria-label"]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_verb_prints_a_table_and_ends_with_1_when_a_run_failed(config, tmp_path, stand_in):
    out = tmp_path / "out"
    arguments = ["compare", str(config), "--arm", "a", "--arm", "better", "--seeds", "2", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--jobs", "2"])
    assert done.exit_code == 0, done.output
    assert "better - a" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.strip().startswith("pass@1"))
    # seeds 7 and 8: the mean of 0.07 and 0.08, and t(1) = 12.7 times 0.005
    assert " ".join(row.split()) == ("pass@1 0.075 [0.011, 0.139] 0.175 [0.111, 0.239] +0.100 [0.100, 0.100]")
    parser = Tags()
    parser.feed((out / "report.html").read_text())
    assert parser.open == []
    assert any(title.startswith("Reward. a: from 0.77 at step 2") for title in parser.titles)
    failing = CliRunner().invoke(app, [*arguments, "--arm", "broken", "--json"])
    assert failing.exit_code == 1
    content = json.loads(failing.stdout)
    assert [run["status"] for run in content["runs"]] == ["finished", "finished", "failed"] * 2
    assert content["interval"] == "95% Student's t over seeds"
    stored = json.loads((out / "comparison.json").read_text())
    assert stored["means"] == content["means"]
    assert {"command", "versions", "hardware"} <= stored["manifest"].keys()
    wrong = CliRunner().invoke(app, [*arguments, "--share-warm-start", "twice"])
    assert wrong.exit_code == 2


# ---- real runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_runs_leader_and_follower_are_the_same_experiment(config, tmp_path):
    """Equal arms give equal numbers, so sharing the warm start favours no arm; a change shows up."""
    out = tmp_path / "out"
    given = [Arm("a"), Arm("b"), Arm("greedy", ("trainer.temperature=0.2",))]
    result = comparing.compare(plan(config, given, seeds=1, out=out))
    assert result.ok, [outcome.text() for outcome in result.outcomes]
    first, second, third = (result.values[name, 0] for name in ("a", "b", "greedy"))
    timed = {"end/step_time", "total/seconds"}
    assert {key: first[key] for key in first if key not in timed} == {
        key: second[key] for key in second if key not in timed
    }
    assert first["before/pass@2"] == third["before/pass@2"]
    assert first["end/entropy"] != third["end/entropy"]
    assert not (out / "b" / "seed-0" / "warm_start").exists()
    stamp = (out / "a" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    comparing.compare(plan(config, given, seeds=1, out=out))
    assert (out / "a" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == stamp

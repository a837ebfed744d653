"""Several trainings in a row: the numbers, what each round begins from, going on, and wrong requests."""

import itertools
import json

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.run.arms import Arm
from posttrain.run.continual import plan_sequence, summarise
from posttrain.run.directory import RunError

TASK = {
    "task": "sft",
    "threads": 1,
    "data": {
        "source": "reasoning_gym:chain_sum",
        "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "prompt_pattern": ": (.*)",
        "train": {"size": 32},
        "eval": {"size": 4},
    },
    "rewards": ["verifier"],
    "trainer": {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
    },
    "evaluate": {"k": [1], "samples": 1, "temperature": 0, "max_new_tokens": 4},
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, terms in {"one": 3, "two": 4, "three": 5}.items():
        task = json.loads(json.dumps(TASK)) | {"run_dir": f"runs/{name}"}
        task["data"]["params"] |= {"min_terms": terms, "max_terms": terms}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def test_numbers_of_a_sequence():
    # task 0 fell from 0.9 over 0.4 to 0.5, task 1 rose from 0.6 to 0.7 after its round
    table = [[0.9, 0.0, 0.0], [0.4, 0.6, 0.1], [0.5, 0.7, 0.8]]
    found = summarise(table)
    assert found == pytest.approx(
        {
            "new": 0.8,
            "learned": (0.9 + 0.6 + 0.8) / 3,
            "kept": (0.5 + 0.7) / 2,
            "forgetting": (0.4 + 0.0) / 2,
            "transfer": (-0.4 + 0.1) / 2,
        }
    )


def continual(*arguments):
    done = CliRunner().invoke(app, ["continual", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_rounds_begin_where_the_last_ended_and_halves_are_drawn_anew(tasks):
    arguments = ["two.yaml", "three.yaml", "--base", "one.yaml", "--seeds", "1", "--out", "out"]
    found = continual(*arguments, "--arm", "full", "--arm", "hft:selection=hft")
    assert found["tasks"] == ["one", "two", "three"]
    assert [len(rows) for rows in found["accuracy"]["hft"][0]] == [3, 3, 3]
    assert found["accuracy"]["full"][0][0] == found["accuracy"]["hft"][0][0], "one base for all arms"
    folders = [tasks / "out" / "base" / "seed-0"]
    folders += [tasks / "out" / "hft" / "seed-0" / f"round-{number}" for number in (0, 1)]
    weights = [load_file(folder / "export" / "model.safetensors") for folder in folders]
    moved = [
        {name for name, tensor in after.items() if not tensor.equal(before[name])}
        for before, after in itertools.pairwise(weights)
    ]
    assert all(0 < len(names) < len(weights[0]) for names in moved)
    assert moved[0] != moved[1]
    assert set(found["means"]) == {"new", "learned", "kept", "forgetting", "transfer", "general_loss"}
    # all of it is done: going on trains nothing, and one more arm trains that arm only
    stamp = (folders[2] / "done.json").stat().st_mtime_ns
    again = continual(
        *arguments, "--arm", "full", "--arm", "hft:selection=hft", "--arm", "lora:model.adapter.r=2"
    )
    assert (folders[2] / "done.json").stat().st_mtime_ns == stamp
    assert again["values"]["hft"] == found["values"]["hft"]
    assert set(again["values"]) == {"full", "hft", "lora"}
    wrong = CliRunner().invoke(
        app, ["continual", *arguments, "--arm", "full", "--arm", "hft:selection=random"]
    )
    assert wrong.exit_code == 2
    assert "other settings" in wrong.stderr
    more = CliRunner().invoke(app, ["continual", *arguments, "--arm", "full", "--set", "trainer.max_steps=3"])
    assert more.exit_code == 2
    assert "with another configuration than now" in more.stderr


@pytest.mark.parametrize(
    ("rounds", "arms", "base", "message"),
    [
        (["one.yaml"], ["a"], None, "forgetting takes two tasks"),
        (["one.yaml", "two.yaml"], [], None, "needs a name of its own"),
        (["one.yaml", "two.yaml"], ["a", "A"], None, "needs a name of its own"),
        (["one.yaml", "two.yaml"], ["base"], None, "not 'base'"),
        (["one.yaml"], ["a"], "none.yaml", "cannot read none.yaml"),
    ],
)
def test_wrong_requests(tasks, rounds, arms, base, message):
    with pytest.raises(RunError, match=message):
        plan_sequence(
            [tasks / name for name in rounds],
            [Arm(name) for name in arms],
            base=base,
            seeds=1,
            out=tasks / "out",
        )


def test_a_task_that_cannot_be_judged_is_refused(tasks):
    arms = [Arm("a", ("evaluate=null", "rewards=[]"))]
    with pytest.raises(RunError, match="needs 'rewards' and 'evaluate'"):
        plan_sequence([tasks / "one.yaml", tasks / "two.yaml"], arms, base=None, seeds=1, out=tasks / "out")

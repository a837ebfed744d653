"""Reward models whose weights are averaged: from the pairs to the average, its checks, and going on."""

import json

import pytest
import torch
import yaml
from run_jobs import LORA, merged, posttrain
from safetensors.torch import load_file, save_file

from posttrain.config.check import check_and_load
from posttrain.run.directory import RunError
from posttrain.run.warm import _averaged, _member, plan_warm

WORDS = ("sun", "moon", "star", "sea", "hill", "tree", "bird", "fish")


@pytest.fixture
def config(tmp_path):
    """Write pairs that are easy to tell apart, and a configuration."""

    def config(*changes):
        rows = [
            {"prompt": f"say {word} {n}:", "chosen": f" good {word}", "rejected": f" bad {word}"}
            for n, word in enumerate(WORDS * 3)
        ]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {
            "task": "reward",
            "threads": 1,
            "run_dir": str(tmp_path / "run"),
            "data": {"source": str(tmp_path / "pairs.jsonl"), "eval": {"size": 6}},
            "trainer": {
                "max_steps": 6,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
                "save_strategy": "no",
            },
        }
        for change in changes:
            content = merged(content, change)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "run.yaml"

    return config


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_members_begin_with_one_head_and_end_as_one_model(config, tmp_path):
    path, out = config(), tmp_path / "run-warm"
    posttrain("warm", path, "--members", 2)
    result = json.loads((out / "warm.json").read_text())
    (run,) = result["runs"]
    rates = [member["settings"]["trainer.learning_rate"] for member in run["members"]]
    assert rates == pytest.approx([1e-3, 4e-4])
    assert [member["settings"]["trainer.seed"] for member in run["members"]] == [42, 43]
    # probing moved the head and nothing else
    _, loaded = check_and_load(path)
    from posttrain.models.scoring import load_reward_model

    start = load_reward_model(loaded.model, seed=42)[0].state_dict()
    probe = weights(out / "probe-0" / "export")
    assert {name for name in probe if not torch.equal(probe[name], start[name])} == {"score.weight"}
    for member in ("member-0", "member-1"):
        assert yaml.safe_load((out / member / "config.yaml").read_text())["model"]["path"] == str(
            out / "probe-0" / "export"
        )
    # the average, and what is said about it
    sides = [weights(out / name / "export") for name in ("member-0", "member-1")]
    mean = weights(out / "model")
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((sides[0][name].double() + sides[1][name].double()) / 2).float()), name
        assert name == "model.norm.weight" or not torch.equal(sides[0][name], sides[1][name]), name
    scores = json.loads((out / "scores.json").read_text())
    chosen, rejected = (
        [sum(values) / 2 for values in zip(scores["member-0"][side], scores["member-1"][side], strict=True)]
        for side in (0, 1)
    )
    right = sum((a > b) + 0.5 * (a == b) for a, b in zip(chosen, rejected, strict=True)) / 6
    assert run["accuracy"]["ensemble"] == right
    assert run["accuracy_by_members"] == {"1": run["accuracy"]["best"], "2": run["accuracy"]["warm"]}
    assert set(run["members"][1]["path"]) == {"0.25", "0.5", "0.75"} or run["members"][1]["left_out"]
    # asked again, nothing is trained
    done = {path: path.stat().st_mtime_ns for path in out.rglob("done.json")}
    assert len(done) == 3
    again = json.loads(posttrain("warm", path, "--members", 2, "--json").stdout)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("done.json")} == done
    assert again == result
    assert (
        "with another configuration"
        in posttrain("warm", path, "trainer.max_steps=2", "--members", 2, code=2).stderr
    )
    # and the average is a reward like any other
    from posttrain.rewards.model import ModelReward

    assert len(ModelReward(out / "model").scores(["say sun:"], [" good sun"])) == 1


def test_adapters_wrong_labels_and_several_starts(config, tmp_path):
    noise = {"data": {"label_noise": {"share": 0.25}}, "trainer": {"max_steps": 2}}
    path = config(LORA, noise)
    posttrain("warm", path, "--members", 2, "--min-accuracy", -1, "--tolerance", 1)
    (run,) = json.loads((tmp_path / "run-warm" / "warm.json").read_text())["runs"]
    merged_folder = tmp_path / "run-warm" / "model"
    assert json.loads((merged_folder / "adapter_config.json").read_text())["r"] == 8
    assert set(run["noise"]) == {"member", "best", "ensemble", "warm"}
    # members of other starts have no base in common: whole models
    starts = ["--start", tmp_path / "run-warm" / "probe-0" / "export", "--start", merged_folder]
    options = ["--members", 2, "--out", tmp_path / "starts", "--min-accuracy", -1, "--tolerance", 1]
    starts[3] = tmp_path / "starts-of"
    posttrain("export", tmp_path / "run-warm" / "member-0", "--format", "merged", "--to", starts[3])
    posttrain("warm", path, *starts, *options)
    (run,) = json.loads((tmp_path / "starts" / "warm.json").read_text())["runs"]
    assert len({member["settings"]["start"] for member in run["members"]}) == 2
    assert (tmp_path / "starts" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "starts" / "probe-1" / "export").is_dir()


def test_members_that_are_no_good_or_far_away_are_left_out(config, tmp_path):
    path, out = config(), tmp_path / "run-warm"
    posttrain("warm", path, "--members", 1)
    good = out / "member-0" / "export"
    assert torch.equal(weights(out / "model")["score.weight"], weights(good)["score.weight"])

    def variant(name, change):
        folder = tmp_path / name / "export"
        folder.mkdir(parents=True)
        for file in good.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        tensors = weights(good)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return {"name": name, "folder": str(folder), "settings": {}}

    def mirrored(tensors):  # the same rewards from weights on the other side of zero
        tensors["score.weight"].neg_()
        tensors["model.norm.weight"].neg_()

    plan, said = plan_warm(path, members=4), []
    first = {"name": "member-0", "folder": str(good), "settings": {}}
    members = [first, variant("mirrored", mirrored), variant("bad", lambda t: t["score.weight"].neg_())]
    run = _averaged(plan, members, tmp_path / "other", said.append)
    assert run["members"][0]["accuracy"] > 0.8
    assert run["members"][1]["accuracy"] == run["members"][0]["accuracy"]
    assert run["members"][1]["path"]["0.5"] == 0.5
    assert run["averaged"] == ["member-0"]
    assert "not connected with member-0" in said[0]
    assert "is not above 0.5" in said[1]
    assert "the result is member-0 by itself" in said[2]
    with pytest.raises(RunError, match="no member tells chosen from rejected"):
        _averaged(plan, [members[2]], tmp_path / "none", said.append)


def test_members_may_vary_a_section_that_the_file_does_not_have(config, tmp_path):
    plan = plan_warm(config(), vary=["model.adapter.dropout=0.1,0.2"])
    made = [_member(plan, index, 0, tmp_path, tmp_path / "member")[0] for index in (0, 1)]
    assert [run.model.adapter.dropout for run in made] == [0.1, 0.2]
    assert made[0].export.format == "adapter"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ([{"task": "preference"}], {}, "reward models come from task: reward"),
        ([], {"vary": ["trainer.learning_rate"]}, "--vary is KEY=VALUE"),
        ([], {"vary": ["trainer.learning_rat=1"]}, "member 0"),
        ([], {"shares": [1.0]}, "between 0 and 1"),
        ([], {"members": 0}, "at least 1"),
        ([], {"starts": ["/nowhere/at/all"]}, "--start: the folder /nowhere/at/all does not exist"),
    ],
)
def test_requests_that_cannot_be_met(config, changes, options, message):
    with pytest.raises(RunError, match=message):
        plan_warm(config(*changes), **options)


def test_repetitions_have_seeds_of_their_own(config, tmp_path):
    path = config({"trainer": {"max_steps": 1}})
    posttrain("warm", path, "--members", 1, "--seeds", 2, "--min-accuracy", -1)
    out = tmp_path / "run-warm"
    seeds = {
        str(run.parent.relative_to(out)): yaml.safe_load(run.read_text())["trainer"]["seed"]
        for run in out.rglob("config.yaml")
    }
    assert seeds == {
        "seed-0/probe-0": 42,
        "seed-0/member-0": 42,
        "seed-1/probe-0": 1042,
        "seed-1/member-0": 1042,
    }
    result = json.loads((out / "warm.json").read_text())
    assert result["accuracy_means"]["warm"]["seeds"] == 2
    assert len(result["accuracy"]["member"]) == 2

"""S3FT: the choice by hand, rows to the byte, a job that is killed and goes on, and the run with it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
import torch
from datasets import Dataset
from peft import get_peft_model
from pydantic import ValidationError
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config.schema import DataConfig, S3FTConfig
from posttrain.data.errors import DataError
from posttrain.data.load import load_data
from posttrain.rewards.reward import VerifierFailure
from posttrain.rewards.verdict import Verdict
from posttrain.run.directory import RunError, read_json_lines
from posttrain.run.ranks import Ranks
from posttrain.run.rewriting import Rewriting
from posttrain.sft.s3ft import (
    Candidate,
    check_columns,
    judge_outcome,
    prompt_and_gold,
    put_answer,
    rephrase,
    statistics,
    targets,
)

TESTS = Path(__file__).resolve().parents[1]
RIGHT, WRONG = Verdict("correct", 1.0), Verdict("wrong", 0.0)

# ---- the choice --------------------------------------------------------------------------------------------


class Stub:
    """A model whose answers are known: answers[stage][row] is a list of texts, or of candidates."""

    def __init__(self, answers, right=(), verdicts=None):
        self.answers, self.right, self.verdicts = answers, set(right), verdicts or {}
        self.asked, self.judged = [], []

    def generate(self, stage, rows):
        self.asked.append((stage, rows))
        groups = [self.answers[stage][row] for row in rows]
        return [
            group
            if isinstance(group, str)
            else [one if isinstance(one, Candidate) else Candidate(one, len(one), True) for one in group]
            for group in groups
        ]

    def judge(self, rows, texts):
        self.judged += list(zip(rows, texts, strict=True))
        return [self.verdicts.get(text, RIGHT if text in self.right else WRONG) for text in texts]

    def rank(self, row, candidates):
        return [{"b": -0.5, "c": -0.5}.get(one.text, -2.0) for one in candidates]

    def choose(self, rows=4, **settings):
        return targets(range(rows), self.generate, self.judge, self.rank, S3FTConfig(**settings))


ANSWERS = {
    "model": {row: [f"own {row}"] for row in range(4)},
    "paraphrase": {row: [f"said {row}"] for row in range(4)},
}


def test_own_answer_else_rephrasing_else_gold():
    stub = Stub(ANSWERS, right={"own 0", "own 1", "said 2"})
    found = stub.choose()
    assert [one.source for one in found] == ["model", "model", "paraphrase", "gold"]
    assert [one.text for one in found] == ["own 0", "own 1", "said 2", None]
    assert [one.score for one in found] == [1.0, 1.0, 1.0, None]
    # a row that is settled costs nothing more
    assert stub.asked == [("model", [0, 1, 2, 3]), ("paraphrase", [2, 3])]
    assert len(stub.judged) == 6
    counts = statistics(found)
    assert counts["sources"] == {"model": 2, "paraphrase": 1, "gold": 1}
    assert counts["shares"] == {"model": 0.5, "paraphrase": 0.25, "gold": 0.25}
    assert counts["outcomes"] == {
        "model": {"correct": 2, "wrong": 2},
        "paraphrase": {"correct": 1, "wrong": 1},
    }
    assert counts["mean_tokens"] == (5 + 5 + 6) / 3


def test_a_judge_that_always_or_never_agrees_and_no_rephrasing():
    everything = {text for stage in ANSWERS.values() for group in stage.values() for text in group}
    assert {one.source for one in Stub(ANSWERS, everything).choose()} == {"model"}
    assert {one.source for one in Stub(ANSWERS).choose()} == {"gold"}
    stub = Stub(ANSWERS, {"own 0", "said 1", "said 2", "said 3"})
    assert [one.source for one in stub.choose(paraphrase=False)] == ["model", "gold", "gold", "gold"]
    assert stub.asked == [("model", [0, 1, 2, 3])]


@pytest.mark.parametrize(
    ("verdict", "threshold", "outcome"),
    [
        (Verdict("correct", 1.0), 1.0, "correct"),
        (Verdict("wrong", 0.6), 0.6, "correct"),
        (Verdict("wrong", 0.6), 0.7, "wrong"),
        (Verdict("correct", 3.0), 4.0, "wrong"),
        (Verdict("wrong", 0.1 + 0.2), 0.3, "correct"),
        (Verdict("wrong", 0.3), 0.1 + 0.2, "correct"),
        (Verdict("unparseable", 0.0), 0.0, "unparseable"),
        (Verdict("error"), 0.0, "error"),
        (Verdict("timeout"), 0.0, "timeout"),
        (Verdict("skipped"), 0.0, "skipped"),
        (Verdict("correct", None), 0.0, "error"),
        (Verdict("correct", math.nan), 0.0, "error"),
        (Verdict("wrong", math.inf), 0.0, "error"),
    ],
)
def test_what_a_verdict_means(verdict, threshold, outcome):
    assert judge_outcome(verdict, threshold)[0] == outcome


def test_what_cannot_be_right_is_not_judged():
    answers = {
        "model": {0: [""], 1: [" \n"], 2: [Candidate("yes", 3, False)], 3: "too_long", 4: "no_answer"},
        "paraphrase": {row: ["by the guide, yes"] for row in range(4)} | {4: "no_answer"},
    }
    stub = Stub(answers, {"", " \n", "yes", "by the guide, yes"})
    found = stub.choose(5, leak_pattern="(?i)the GUIDE")
    assert stub.judged == []
    assert [one.source for one in found] == ["gold"] * 5
    counts = statistics(found)["outcomes"]
    assert counts["model"] == {"empty": 2, "cut": 1, "too_long": 1, "no_answer": 1}
    assert counts["paraphrase"] == {"leaked": 4, "no_answer": 1}
    # without a pattern the rephrasing counts; and an own answer may speak of a guide
    assert [one.source for one in Stub(answers, {"by the guide, yes"}).choose(4)] == ["paraphrase"] * 4
    own = Stub({"model": {0: ["the guide"]}, "paraphrase": {}}, {"the guide"})
    assert own.choose(1, leak_pattern="guide")[0].source == "model"


def test_a_judge_that_fails_is_not_a_wrong_answer():
    stub = Stub(ANSWERS, {"said 1"}, {"own 0": Verdict("error"), "own 1": Verdict("timeout")})
    found = stub.choose()
    assert [one.source for one in found] == ["gold", "paraphrase", "gold", "gold"]
    assert [one.judge_failed for one in found] == [True, False, False, False]
    assert statistics(found)["judge_failed"] == 1


def test_among_several_right_ones_the_likeliest_or_shortest_and_the_first_of_equals():
    group = {"model": {0: ["aaaa", "c", "wrong", "b", "c"]}, "paraphrase": {}}
    settings = {"rows": 1, "samples": 5, "temperature": 1.0}
    right = {"aaaa", "b", "c"}
    assert Stub(group, right).choose(**settings)[0].text == "c"
    assert Stub(group, right - {"c"}).choose(**settings)[0].text == "b"
    assert Stub(group, right).choose(**settings, select="shortest")[0].text == "c"
    asked = []
    stub = Stub({"model": {0: ["c", "c", "c"]}, "paraphrase": {}}, right)
    stub.rank = lambda row, candidates: asked.append(row)
    assert stub.choose(**settings)[0].text == "c"
    assert asked == []  # equal texts need no ranking


# ---- rows --------------------------------------------------------------------------------------------------


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_the_answer_takes_the_place_of_gold_and_gold_stays_as_it_is():
    own = targets([0], lambda *_: [[Candidate("mine", 4, True)]], lambda *_: [RIGHT], None, S3FTConfig())[0]
    gold = Stub(ANSWERS).choose(1)[0]
    text = {"prompt": "a?", "completion": " b {x}", "answer": "b", "rg_index": 3}
    chat = {"prompt": talk(("user", "a?")), "completion": talk(("assistant", "b"))}
    whole = {"messages": talk(("system", "s"), ("user", "a?"), ("assistant", "b"))}
    assert put_answer(text, own) == text | {"completion": "mine", "source": "model", "judge_score": 1.0}
    assert put_answer(chat, own)["completion"] == talk(("assistant", "mine"))
    assert put_answer(whole, own)["messages"] == [*whole["messages"][:2], *talk(("assistant", "mine"))]
    for row in (text, chat, whole):
        assert put_answer(row, gold) == row | {"source": "gold", "judge_score": None}
    assert prompt_and_gold(text) == ("a?", " b {x}")
    assert prompt_and_gold(chat) == (chat["prompt"], "b")
    assert prompt_and_gold(whole) == (whole["messages"][:2], "b")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": talk(("user", "a?"))},
        {"messages": talk(("assistant", "a"))},
        {"prompt": talk(("user", "a?")), "completion": talk(("assistant", "b"), ("user", "c"))},
        {"prompt": "a", "completion": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        {"prompt": "a", "completion": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
    ],
)
def test_an_answer_that_is_not_one_text_cannot_be_replaced(row):
    assert prompt_and_gold(row)[1] is None


def test_the_rephrasing_prompt():
    template = "Q {prompt} A {gold} {{x}}"
    assert rephrase("{gold}?", "{prompt}!", template) == "Q {gold}? A {prompt}! {x}"
    prompt = talk(("system", "s"), ("user", "old"), ("assistant", "o"), ("user", "new"))
    asked = rephrase(prompt, "g", template)
    assert asked == [*prompt[:3], *talk(("user", "Q new A g {x}"))]
    assert prompt[3]["content"] == "new"
    with pytest.raises(DataError, match="paraphrase: false"):
        rephrase(talk(("system", "s")), "g", template)


def test_columns_that_do_not_go_are_refused():
    check_columns(["prompt", "completion", "answer"])
    for columns, words in (
        (["text"], "prompt and its answer"),
        (["prompt", "completion", "tools"], "tools"),
        (["messages", "source"], "rename it"),
    ):
        with pytest.raises(DataError, match=words):
            check_columns(columns)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 4}, "same answer 4 times"),
        ({"leak_pattern": "("}, "regular expression"),
        ({"paraphrase_template": "{prompt}"}, "gold"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        S3FTConfig(**settings)


# ---- the job -----------------------------------------------------------------------------------------------


class Judge:
    """Right is what has an even number of letters; breaks where it is told to."""

    def __init__(self, fail=lambda text: False, max_failures=0.2):
        self.__name__, self.fail, self.calls = "even", fail, []
        self.spec = SimpleNamespace(name="even", params={})
        self.config = SimpleNamespace(max_failures=max_failures)

    def verify(self, texts, rows):
        self.calls += [(row["prompt"], text) for text, row in zip(texts, rows, strict=True)]
        return [
            Verdict("error", message="broken judge")
            if self.fail(text)
            else (WRONG if len(text) % 2 else RIGHT)
            for text in texts
        ]


def ending():
    """A model that ends its answers: the end token is as likely as the likeliest others."""
    model = support.model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight[5] * 2
        model.lm_head.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def writer():
    return ending()


SETTINGS = {
    "temperature": 1.0,
    "max_new_tokens": 24,
    "batch_size": 4,
    "paraphrase_template": "{prompt} so {gold}",
}


def job(model, to, judge=None, tokenizer=None, **settings):
    tokenizer = tokenizer or support.tokenizer()
    return Rewriting(S3FTConfig(**(SETTINGS | settings)), model, tokenizer, judge or Judge(), to, Ranks())


def test_the_job_writes_every_row_and_its_counts(writer, tmp_path):
    rows = support.answers(24)
    work = job(writer, tmp_path / "rows.jsonl")
    new = work.carry_out(rows)
    assert len(new) == 24
    assert new["prompt"] == rows["prompt"]
    assert set(new["source"]) == {"model", "paraphrase", "gold"}  # the three are all there to be looked at
    for before, after in zip(rows, new, strict=True):
        if after["source"] == "gold":
            assert after["completion"] == before["completion"]
            assert after["judge_score"] is None
        else:
            assert len(after["completion"]) % 2 == 0
            assert after["completion"].strip()
            assert after["judge_score"] == 1.0
    written = read_json_lines(tmp_path / "rows.jsonl")
    assert written == [dict(row) for row in new]
    counts = json.loads((tmp_path / "rows.statistics.json").read_text())
    assert {key: counts[key] for key in work.statistics} == work.statistics
    assert sum(counts["sources"].values()) == 24
    assert counts["outcomes"]["model"]["cut"] > 0
    assert not (tmp_path / "rows.jsonl.progress").exists()
    # done is done: nothing is generated or judged again
    judge = Judge()
    again = job(writer, tmp_path / "rows.jsonl", judge)
    again._generate = None
    assert again.carry_out(rows).to_list() == new.to_list()
    assert again.statistics == work.statistics
    assert judge.calls == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_job_goes_on_where_it_stopped(writer, torn, tmp_path):
    rows = support.answers(24)
    whole = job(writer, tmp_path / "whole.jsonl")
    whole.carry_out(rows)
    cut, judge = job(writer, tmp_path / "cut.jsonl"), Judge()
    done = []

    def generate(stage, indices):
        if len(done) == 12:
            raise Killed
        if stage == "model":
            done.extend(indices)
        return Rewriting._generate(cut, stage, indices)

    cut._generate = generate
    with pytest.raises(Killed):
        cut.carry_out(rows)
    progress = tmp_path / "cut.jsonl.progress"
    if torn:
        with progress.open("a") as file:
            file.write('{"row": 13, "sour')
    assert not (tmp_path / "cut.jsonl").exists()
    finished = {line["row"] for line in read_json_lines(progress) if "row" in line}
    assert finished == set(range(8))
    again = job(writer, tmp_path / "cut.jsonl", judge)
    again.carry_out(rows)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert again.statistics == whole.statistics
    asked = {prompt for prompt, _ in judge.calls}
    assert asked.isdisjoint(rows["prompt"][:][index] for index in finished)


def test_neither_batch_size_nor_the_order_of_batches_changes_a_row(writer, tmp_path):
    rows = support.answers(24)
    found = [
        job(writer, tmp_path / f"{size}.jsonl", batch_size=size).carry_out(rows).to_list()
        for size in (3, 8, 24)
    ]
    assert found[0] == found[1] == found[2]
    other = job(writer, tmp_path / "seed.jsonl", seed=1).carry_out(rows).to_list()
    assert other != found[0]


def test_rows_whose_judge_failed_are_tried_again(writer, tmp_path):
    rows = support.answers(24)
    job(writer, tmp_path / "good.jsonl").carry_out(rows)
    broken = Judge(fail=lambda text: "a" in text or len(text) < 6, max_failures=0.1)
    with pytest.raises(VerifierFailure, match=r"broken judge.* tried again"):
        job(writer, tmp_path / "rows.jsonl", broken).carry_out(rows)
    lines = read_json_lines(tmp_path / "rows.jsonl.progress")
    assert len(lines) > 4
    assert not (tmp_path / "rows.jsonl").exists()
    again = job(writer, tmp_path / "rows.jsonl")
    again.carry_out(rows)
    assert again.statistics["judge_failed"] == 0
    good, mended = (read_json_lines(tmp_path / f"{name}.jsonl") for name in ("good", "rows"))
    # a row may have become a rephrasing while the judge was broken; none stayed gold that need not
    assert len(mended) == 24
    assert [row["source"] == "gold" for row in good] == [row["source"] == "gold" for row in mended]


def test_a_few_failures_leave_gold_and_are_counted(writer, tmp_path):
    work = job(writer, tmp_path / "rows.jsonl", Judge(fail=lambda text: len(text) % 2, max_failures=1.0))
    new = work.carry_out(support.answers(24))
    assert len(new) == 24
    assert work.statistics["judge_failed"] > 0
    assert sum(stage.get("error", 0) for stage in work.statistics["outcomes"].values()) > 0


def test_a_file_of_another_job_is_refused(writer, tmp_path):
    rows = support.answers(8)
    to = tmp_path / "rows.jsonl"
    job(writer, to).carry_out(rows)
    for other, words in (
        (job(writer, to, seed=2), "other s3ft"),
        (job(support.model(seed=5), to), "other model"),
    ):
        with pytest.raises(RunError, match=words):
            other.carry_out(rows)
    with pytest.raises(RunError, match="other rows"):
        job(writer, to).carry_out(support.answers(7))
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="did not write it"):
        job(writer, tmp_path / "mine.jsonl").carry_out(rows)
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"


def test_an_adapter_answers_and_is_left_as_it_was(writer, tmp_path):
    model = get_peft_model(support.model(seed=1), support.lora(lora_dropout=0.5))
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    before = support.weights(model)
    rows = support.answers(8)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = job(model, tmp_path / "a.jsonl").carry_out(rows)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    support.assert_same(before, support.weights(model))
    model.base_model.disable_adapter_layers()
    plain = job(model, tmp_path / "b.jsonl")
    plain._identity = lambda rows: {}
    assert plain.carry_out(rows)["completion"][:] != first["completion"][:]


@pytest.mark.slow
def test_two_processes_write_what_one_does(writer, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "sft" / "s3ft_ranks.py"), str(tmp_path)]
    path = os.pathsep.join([str(TESTS), str(TESTS / "sft"), str(TESTS.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = job(writer, tmp_path / "alone.jsonl")
    new = alone.carry_out(support.answers(23))
    assert (tmp_path / "ranks.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}.json").read_text() == repr((new.to_list(), alone.statistics))
        assert (tmp_path / f"stopped-{rank}").exists()


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}<eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_chat_rows(writer, form, tmp_path):
    tokenizer = support.tokenizer()
    tokenizer.chat_template = TEMPLATE
    pairs = support.answers(24)
    rows = Dataset.from_list(
        [
            {"prompt": talk(("user", one["prompt"])), "completion": talk(("assistant", one["completion"]))}
            if form == "prompt"
            else {"messages": talk(("user", one["prompt"]), ("assistant", one["completion"]))}
            for one in pairs
        ]
    )
    judge = Judge()
    work = job(writer, tmp_path / "rows.jsonl", judge, tokenizer, max_new_tokens=30)
    made, candidate = {}, work._candidate

    def watched(index, stage, asked, completion):
        found = candidate(index, stage, asked, completion)
        made[index, stage, found.text] = completion.token_ids
        return found

    work._candidate = watched
    new = work.carry_out(rows)
    column = "completion" if form == "prompt" else "messages"
    assert {"model", "gold"} <= set(new["source"])
    lost = 0
    for index, (one, row) in enumerate(zip(pairs, new, strict=True)):
        answer = row[column][-1]
        assert answer["role"] == "assistant"
        assert (answer["content"] == one["completion"]) == (row["source"] == "gold")
        if row["source"] != "gold":  # padding inside an answer has no text
            lost += bool({0, 2} & set(made[index, row["source"], answer["content"]]))
    assert work.statistics["retokenised_differently"] == lost
    assert all(isinstance(prompt, list) for prompt, _ in judge.calls)


def test_prompts_that_do_not_fit_stay_gold_and_none_that_fits_is_an_error(writer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a?", "b " * 60], "completion": [" c", " d"]})
    work = job(writer, tmp_path / "rows.jsonl")
    work.carry_out(rows)
    assert work.statistics["outcomes"]["model"]["too_long"] == 1
    assert len(read_json_lines(tmp_path / "rows.jsonl")) == 2
    with pytest.raises(DataError, match="at most 126"):
        job(writer, tmp_path / "none.jsonl", max_new_tokens=200).carry_out(rows)


def test_the_mean_log_probability_is_that_of_the_answer_behind_its_prompt(writer, tmp_path):
    work = job(writer, tmp_path / "rows.jsonl")
    prompt, answer = [5, 6, 7, 8], [9, 10, 1]
    work._ids = [prompt]
    (found,) = work._mean_log_probs(0, [Candidate("x", 3, True, True, (0, tuple(answer)))])
    model = support.model(seed=1).double()
    model.load_state_dict(writer.state_dict())
    logits = model.eval()(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    wanted = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)) / 3
    assert found == pytest.approx(wanted, abs=1e-5)
    several = job(writer, tmp_path / "several.jsonl", samples=6).carry_out(support.answers(12))
    assert "model" in several["source"]


# ---- in a configuration ------------------------------------------------------------------------------------

CONFIG = """
task: sft
run_dir: {folder}/run
threads: 1
data:
  source: reasoning_gym:chain_sum
  params: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}
  prompt_pattern: ": (.*)"
  train: {{size: 16}}
rewards: [{{word_list: {{params: {{positive: [], negative: []}}}}}}]
s3ft: {{max_new_tokens: 4, batch_size: 8}}
trainer: {{max_steps: 3, per_device_train_batch_size: 4, gradient_checkpointing: false, save_strategy: "no"}}
export: {{}}
"""


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done


def test_a_judge_that_is_never_content_leaves_supervised_training_as_it_was(tmp_path):
    """Bit for bit: the step draws nothing from the training's random numbers."""
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path))
    run("train", tmp_path / "c.yaml")
    run("train", tmp_path / "c.yaml", f"run_dir={tmp_path / 'plain'}", "s3ft=null", "rewards=null")
    first, second = ((tmp_path / name / "export" / "model.safetensors") for name in ("run", "plain"))
    assert first.read_bytes() == second.read_bytes()
    counts = json.loads((tmp_path / "run" / "s3ft.statistics.json").read_text())
    assert counts["sources"] == {"model": 0, "paraphrase": 0, "gold": 16}
    assert len(read_json_lines(tmp_path / "run" / "s3ft.jsonl")) == 16
    # the verb writes the same rows; they can be trained on as they are
    told = run("s3ft", tmp_path / "c.yaml", "--to", tmp_path / "rows.jsonl", "--json")
    assert json.loads(told.stdout)["sources"] == counts["sources"]
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "run" / "s3ft.jsonl").read_bytes()
    again = load_data(DataConfig(source=str(tmp_path / "rows.jsonl")), "sft", hold_out=False).train
    assert again.to_list() == read_json_lines(tmp_path / "rows.jsonl")


def test_wrong_configurations_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    run("check", path)
    for change, words in (
        ("rewards=null", "s3ft needs a judge"),
        ("task=rlvr", "set task: sft"),
        ("s3ft.samples=3", "temperature"),
        ("s3ft.sample=3", "did you mean"),
        ("rewards=[{soft_overlong: {params: {limit: 9, cache: 3}}}]", "only counts"),
    ):
        assert words in " ".join(run("check", path, change, code=2).output.split()), change
    assert "no 's3ft' section" in run(
        "s3ft", path, "s3ft=null", "rewards=null", "--to", tmp_path / "r.jsonl", code=2
    ).stderr.replace("\n", " ")

import copy
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.check import check_config, load_run_config
from posttrain.config.generated_tasks import check_task, task_fields, task_sources
from posttrain.config.load import resolved_yaml
from posttrain.config.plain_yaml import dump_yaml
from posttrain.config.problems import ConfigError, Problem, nearest, show
from posttrain.config.schema import RunConfig

GOOD = """\
task: rlvr
data: {source: "reasoning_gym:chain_sum", params: {min_terms: 2, max_terms: 3}, train: {size: 64}}
rewards: [verifier]
methods: {ace: {alpha: 0.5}}
trainer: {learning_rate: 1e-6, num_generations: 8}
"""
PLAIN = GOOD.replace(", params: {min_terms: 2, max_terms: 3}", "")


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write


@pytest.fixture
def problems(write):
    """Problems of the good configuration with overrides, as {key: problem}."""

    def problems(*overrides, text=GOOD):
        report = check_config(write(text), overrides)
        found = {problem.key: problem for problem in report.problems}
        assert len(found) == len(report.problems), report.text()
        return found

    return problems


def test_a_good_configuration_has_no_problems(write):
    report = check_config(write(GOOD))
    assert report.problems == ()
    assert report.text() == "run.yaml: ok (0 errors, 0 warnings)"


def test_every_mistake_at_once_with_its_line(write):
    report = check_config(
        write("""\
            task: rlvr
            modle: {path: x}
            model:
              dtype: bf16
              adapter:
                r: 0
            data:
              source: reasoning_gym:chian_sum
              train:
                size: "12"
            rewards:
              - verifer
              - math:
                  weight: a
              - format: {params: {patern: x}}
            methods:
              ace:
                alpha: -1
              acee: {}
            trainer:
              loss_type: dappo
              num_generations: 7
              lr: 1e-5
            evaluate: {k: [1, 64],
              samples: 4}
            learning_rate: 3
            """),
        ["trainer.top_p=3"],
    )
    assert [(problem.where, problem.key, problem.suggestion) for problem in report.problems] == [
        ("run.yaml:2", "modle", "did you mean 'model'?"),
        ("run.yaml:4", "model.dtype", "did you mean 'bfloat16'?"),
        ("run.yaml:6", "model.adapter.r", None),
        ("run.yaml:8", "data.source", "did you mean 'reasoning_gym:chain_sum'?"),
        ("run.yaml:10", "data.train.size", "write 12"),
        ("run.yaml:12", "rewards.0.name", "did you mean 'verifier'?"),
        ("run.yaml:14", "rewards.1.weight", None),
        ("run.yaml:15", "rewards.2.params.patern", None),
        ("run.yaml:18", "methods.ace.alpha", None),
        ("run.yaml:19", "methods.acee", "did you mean 'ace'?"),
        ("run.yaml:21", "trainer.loss_type", "did you mean 'dapo'?"),
        (
            "run.yaml:22",
            "trainer.num_generations",
            "set num_generations: 8, or gradient_accumulation_steps: 7",
        ),
        ("run.yaml:23", "trainer.lr", "use learning_rate"),
        ("run.yaml:25", "evaluate.samples", None),
        ("run.yaml:26", "learning_rate", "move it under 'trainer': trainer.learning_rate"),
        ("override 'trainer.top_p=3'", "trainer.top_p", None),
    ]
    assert report.summary() == "run.yaml: refused (16 errors, 0 warnings)"
    needed = {problem.key: problem.needed for problem in report.problems}
    assert needed["model.adapter.r"] == "a whole number at least 1"
    assert needed["methods.ace.alpha"] == "a number at least 0"
    assert needed["data.train.size"] == "a whole number at least 1, or null"


def test_a_mistake_in_an_extended_file_is_told_there(write):
    write("extends: base.yaml\ntrainer: {beta: 0.1}\n")
    write(GOOD + "threads: 0\n", "base.yaml")
    (problem,) = check_config("run.yaml").problems
    assert (problem.where, problem.key) == ("base.yaml:6", "threads")


def test_loading_gives_the_configuration_or_all_problems(write):
    config = load_run_config(write(GOOD), ["trainer.beta=0.1"])
    assert isinstance(config, RunConfig)
    assert config.trainer == {"learning_rate": 1e-6, "num_generations": 8, "beta": 0.1}
    assert config.rewards[0].name == "verifier"
    with pytest.raises(ConfigError) as caught:
        load_run_config("run.yaml", ["threads=0", "trainer.beta=-1"])
    assert [problem.key for problem in caught.value.report.problems] == ["threads", "trainer.beta"]
    assert "override 'threads=0': error: threads" in str(caught.value)
    assert "found: 0" in str(caught.value)


def test_methods_are_filled_in_with_their_defaults(write):
    config = load_run_config(write(GOOD))
    assert config.methods["ace"]["alpha"] == 0.5
    assert config.methods["ace"]["activation"] == "softplus"
    assert load_run_config("run.yaml", ["methods.ace=null"]).methods["ace"]["alpha"] == 1.0
    assert load_run_config("run.yaml", ["methods=[]"]).methods == {}


def test_the_resolved_configuration_is_the_same_configuration(write):
    rich = GOOD + "model: {adapter: {r: 4}}\nevaluate: {k: [1, 4], samples: 4}\n"
    rich += "warm_start: {trainer: {max_steps: 5}}\n"
    config = load_run_config(write(rich))
    write(resolved_yaml(config), "resolved.yaml")
    assert load_run_config("resolved.yaml") == config
    assert resolved_yaml(load_run_config("resolved.yaml")) == resolved_yaml(config)


def test_an_unreadable_file_is_one_problem_not_a_list_of_missing_sections(write):
    assert len(check_config(write("")).problems) == 1
    assert len(check_config("gone.yaml").problems) == 1


def test_required_sections_are_asked_for_together(write):
    found = {problem.key: problem for problem in check_config(write("threads: 1\n")).problems}
    assert set(found) == {"task", "data"}
    assert found["task"].needed.startswith("one of sft, rlvr")


def test_an_unknown_task_is_guessed_so_that_the_rest_is_still_checked(problems):
    found = problems("task=rlvrr", "trainer.num_generations=1")
    assert found["task"].suggestion == "did you mean 'rlvr'?"
    assert set(found) == {"task", "trainer.num_generations"}


def test_empty_sections_are_their_defaults(write):
    text = "task: rlvr\ndata: {source: 'reasoning_gym:chain_sum'}\nrewards: [verifier]\n"
    assert load_run_config(write(text + "trainer:\nmethods:\nmodel:\n")).trainer == {}


@pytest.mark.parametrize(
    ("override", "key", "needed"),
    [
        ("model.dtype=3", "model.dtype", "one of auto, float32, bfloat16, float16"),
        ("model.adapter={target_modules: 3}", "model.adapter.target_modules", "text, or a list of text"),
        ("model.trust_remote_code=yes", "model.trust_remote_code", "true or false"),
        ("data.train.size=true", "data.train.size", "a whole number at least 1, or null"),
        ("rewards=[{verifier: {weight: .nan}}]", "rewards.0.weight", "a finite number"),
        ("rewards=[3]", "rewards.0", "a mapping"),
        ("rewards=[{verifier: {deadline: 0}}]", "rewards.0.deadline", "a number above 0 and at most 3600"),
        ("evaluate.confidence=1", "evaluate.confidence", "a number above 0.5 and below 1"),
        ("evaluate.k=[]", "evaluate.k", "a list of whole numbers that is not empty"),
        ("export=x", "export", "a mapping, or null"),
        ("trainer=3", "trainer", "a mapping"),
        ("methods.ace=3", "methods.ace", "a mapping"),
        ("methods.ace.alpha='0.5'", "methods.ace.alpha", "a number at least 0"),
        ("methods.ace.c_clip=0", "methods.ace.c_clip", "a number above 0, or null"),
        ("methods.ace.length_normalize=1", "methods.ace.length_normalize", "true or false"),
        ("methods.ace.alpah=1", "methods.ace.alpah", None),
        ("run_dir=3", "run_dir", "text that is not empty"),
        ("export.push=x", "export.push", "user/name"),
        ("threads=1.5", "threads", "a whole number at least 1, or null"),
    ],
)
def test_wrong_values_say_what_is_needed(problems, override, key, needed):
    found = problems(override)
    assert list(found) == [key]
    assert found[key].needed == needed
    assert found[key].where == f"override {override!r}"


def test_rules_between_fields_are_told_although_other_fields_are_wrong(problems):
    found = problems("evaluate={k: [64], samples: 4}", "threads=0", "rewards=[]")
    assert set(found) == {"evaluate.samples", "threads", "rewards"}
    assert "pass@64 needs at least 64 samples, found samples=4" in found["evaluate.samples"].message


def test_a_validator_of_a_method_is_told(problems):
    (problem,) = problems("methods.ace.error_set=reward_below").values()
    assert problem.key == "methods.ace"
    assert "reward_threshold" in problem.message


def test_conflicts_of_methods_point_at_the_trainer_field(problems):
    found = problems("trainer.sync_ref_model=true", "trainer.beta=0.1")
    assert list(found) == ["trainer.sync_ref_model"]
    assert "ACE measures drift from a fixed reference" in found["trainer.sync_ref_model"].message


def test_methods_see_the_defaults_of_the_trainer(problems, monkeypatch):
    from posttrain.rl.ace import ACE
    from posttrain.rl.method import Conflict

    seen = []

    def conflicts(self, setup):
        seen.append(setup)
        yield Conflict("doubtful", field="alpha", fatal=False)

    monkeypatch.setattr(ACE, "conflicts", conflicts)
    found = problems("model.adapter={}")
    assert found["methods.ace.alpha"].severity == "warning"
    (setup,) = seen
    assert (setup.trainer["epsilon"], setup.trainer["learning_rate"]) == (0.2, 1e-6)
    assert (setup.methods, setup.adapter, setup.task) == (("ace",), True, "rlvr")


def test_methods_of_the_user_are_loaded_by_path(problems, write, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    write(
        """\
        from posttrain.rl.method import Method

        class Mine(Method):
            name = "mine"
            title = "mine"
            x: int = 1
        """,
        "my_method.py",
    )
    write("import nowhere_to_be_found\n", "broken_method.py")
    assert problems("methods={'my_method:Mine': {x: 3}}") == {}
    assert "methods.my_method:Mine.x" in problems("methods={'my_method:Mine': {x: a}}")
    for name in ("broken_method:X", "my_method:Gone", "my_method:Method.name", ":", "."):
        found = problems(f"methods={{'{name}': {{}}}}")
        assert list(found) == [f"methods.{name}"]


def test_a_method_listed_twice_is_refused(problems):
    assert "listed twice" in problems("methods=[ace, ace]")["methods.ace"].message


def test_sft_takes_its_own_methods_no_warm_start_and_rewards_only_for_evaluation(problems):
    found = problems("task=sft", "warm_start={}")
    assert set(found) == {"methods.ace", "warm_start", "rewards", "trainer.num_generations"}
    text = PLAIN.replace("num_generations", "max_length")
    assert problems("task=sft", "methods=[]", "evaluate={}", text=text) == {}


def test_warm_start_is_checked_against_the_supervised_fields(problems):
    found = problems("warm_start.trainer={num_generations: 8, learning_rate: -1, max_length: 64}")
    assert set(found) == {"warm_start.trainer.num_generations", "warm_start.trainer.learning_rate"}


def test_the_task_is_fixed_in_one_place():
    from typing import get_args

    from posttrain.config.tasks import TASKS, Task

    assert tuple(TASKS) == get_args(Task)


# data, model, rewards


def test_generated_tasks_are_those_of_reasoning_gym():
    import dataclasses

    from reasoning_gym.factory import DATASETS

    assert set(task_sources()) == set(DATASETS)
    for name, (_, config) in DATASETS.items():
        assert list(task_fields(name)) == [field.name for field in dataclasses.fields(config)], name


def test_defaults_of_generated_tasks_are_accepted():
    for name in task_sources():
        params = {
            key: field.default
            for key, field in task_fields(name).items()
            if key not in {"seed", "size"} and isinstance(field.default, (bool, int, float, str))
        }
        assert list(check_task(name, params)) == [], name


def test_parameters_of_generated_tasks(problems):
    found = problems("data.params={min_term: 2, max_terms: 3.5, seed: 1}")
    assert {key: problem.suggestion for key, problem in found.items()} == {
        "data.params.min_term": "did you mean 'min_terms'?",
        "data.params.max_terms": None,
        "data.params.seed": "set data.train.seed and data.eval.seed",
    }
    (problem,) = problems("data.params={min_terms: 5, max_terms: 2}").values()
    assert (problem.key, problem.needed) == ("data.params.max_terms", "max_terms >= min_terms")


def test_the_conditions_of_a_task_are_those_it_asserts_itself():
    from reasoning_gym import create_dataset

    for params in ({"min_terms": 0}, {"min_terms": 3, "max_terms": 2}, {"max_digits": 0}, {"max_terms": 9}):
        try:
            create_dataset("chain_sum", size=1, seed=0, **params)
            refused = False
        except AssertionError:
            refused = True
        assert bool(list(check_task("chain_sum", params))) == refused, params


@pytest.mark.parametrize(
    ("source", "suggestion"),
    [
        ("chain_sum", "write reasoning_gym:chain_sum"),
        ("reasoning-gym:chain_sum", "write reasoning_gym:chain_sum"),
        ("trian.jsonl", "did you mean train.jsonl?"),
        ("./nowhere/x.jsonl", "paths are relative to the folder the command runs in"),
        ("a b", None),
    ],
)
def test_sources(problems, write, source, suggestion):
    write("{}", "train.jsonl")
    found = problems(f"data.source={source}", "rewards=[math]", text=PLAIN)
    assert list(found) == ["data.source"]
    assert found["data.source"].suggestion == suggestion


def test_local_files(problems, write):
    write("{}", "rows.jsonl")
    write("{}", "rows.txt")
    text = PLAIN.replace("reasoning_gym:chain_sum", "rows.jsonl")
    assert problems("rewards=[math]", text=text) == {}
    assert problems("rewards=[math]", "data.eval.file=rows.txt", text=text)["data.eval.file"].needed == (
        ".jsonl, .json, .csv, .parquet"
    )
    assert (
        "takes no params"
        in problems("rewards=[math]", "data.params={a: 1}", text=text)["data.params"].message
    )
    # null drops what the file has, whether or not a section may be absent
    dropped = (
        "data.params={a: 1}",
        "data.params=null",
        "data.columns=null",
        "data.eval=null",
        "data.train=null",
    )
    assert problems("rewards=[math]", *dropped, text=text) == {}
    assert list(problems("rewards=[math]", "data.train.split=train", text=text)) == ["data.train.split"]
    assert list(problems("data.train.file=rows.jsonl")) == ["data.train.file"]


def test_file_kinds_and_hub_parameters_are_those_of_the_data_package():
    from posttrain.config import source_check
    from posttrain.data import files, sources

    assert set(source_check.FILE_SUFFIXES) == set(files.READERS)
    assert source_check.HUB_PARAMS == sources.HUB_PARAMS
    assert source_check.GENERATED == sources.GENERATED


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "names no column"),
        ("{}", "not a plain column name"),
        ("{0}", "not a plain column name"),
        ("{a.b}", "not a plain column name"),
        ("{a!r}", "not a plain column name"),
        ("{a", "cannot be read"),
    ],
)
def test_prompt_templates(problems, template, message):
    found = problems(f"data.prompt_template='{template}'")
    assert message in found["data.prompt_template"].message


@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "-.inf", "Infinity"])
def test_numbers_that_are_not_finite(problems, value):
    for key, needed in (
        ("methods.ace.alpha", "a finite number at"),
        ("evaluate.temperature", "a finite number at"),
    ):
        found = problems(f"{key}={value}")[key]
        assert found.message.endswith("has a value that is not finite")
        assert found.needed.startswith(needed)
        assert found.suggestion is None


def test_weights_in_half_precision_that_swallow_their_steps(problems, monkeypatch):
    def warned(*overrides):
        return "model.dtype" in problems("model.path=a/b", *overrides)

    half = "model.dtype=bfloat16"
    assert warned(half)  # GRPO's own learning rate is 1e-6
    assert warned(half, "trainer.learning_rate=5e-5")
    assert not warned(half, "trainer.learning_rate=1e-3")
    assert not warned("model.dtype=float32")
    assert not warned(half, "model.adapter={type: lora, r: 4}")
    assert not warned(half, "selection={hft: {}}")  # keeps a copy in fp32 itself
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert warned(half)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not warned(half)


def test_regular_expressions(problems):
    assert problems("data.prompt_pattern='Q: (.*)'") == {}
    assert "not a regular expression" in problems("data.prompt_pattern='('")["data.prompt_pattern"].message
    assert "too large" in problems("data.prompt_pattern='(a{9999999999})'")["data.prompt_pattern"].message
    assert problems("data.prompt_pattern='(a)(b)'")["data.prompt_pattern"].needed == "1 group"
    assert (
        problems("data.prompt_pattern=a")["data.prompt_pattern"].suggestion == "put the wanted part in (...)"
    )
    found = problems("rewards=[{format: {params: {pattern: '*'}}}]")
    assert "not a regular expression" in found["rewards.0.params.pattern"].message


def test_a_file_that_has_to_be_made_first_is_told_by_the_comments_that_name_it(problems, write):
    source = PLAIN.replace('"reasoning_gym:chain_sum"', "runs/made.jsonl")
    relative = "paths are relative to the folder the command runs in"
    assert problems(text=source)["data.source"].suggestion == relative
    told = problems(text=f"# python make.py --out runs/made.jsonl\n{source}")["data.source"].suggestion
    assert told == f"the comments of run.yaml name it and may say how it is made; {relative}"
    # said on the command line, the comments of no file are meant
    found = problems("data.source=runs/made.jsonl", text=f"# python make.py runs/made.jsonl\n{PLAIN}")
    assert found["data.source"].suggestion == relative


def test_models(problems, write, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    write("{}", "full/config.json")
    assert problems("model.path=full") == {}
    assert problems("model.path=Qwen/Qwen2.5-0.5B") == {}
    assert "holds none of config.json" in problems("model.path=./empty")["model.path"].message
    assert "does not exist" in problems("model.path=./gone")["model.path"].message
    assert problems("model.path=embedded:char-lama")["model.path"].suggestion == (
        "did you mean 'embedded:char-llama'?"
    )
    assert "neither a folder nor a Hub id" in problems("model.path='a b'")["model.path"].message


def test_rewards_need_a_source_with_a_verifier(problems):
    text = PLAIN.replace("reasoning_gym:chain_sum", "user/name")
    assert "has none" in problems(text=text)["rewards.0.name"].message
    assert problems("rewards=[math]", text=text) == {}


def test_every_wrong_parameter_of_a_reward_is_told(problems):
    found = problems("rewards=[{format: {params: {patern: x, match: 3, memory_gib: -1}}}]")
    assert set(found) == {
        "rewards.0.params.patern",
        "rewards.0.params.match",
        "rewards.0.params.memory_gib",
    }


def test_reward_functions_are_looked_up_without_importing_them(problems, write, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    write("raise SystemExit('imported')\ndef score(prompts, completions): return [1.0]\n", "my_rewards.py")
    write("def score(:\n", "bad_syntax.py")
    assert problems("rewards=['python:my_rewards.score']") == {}
    fixes = {
        "python:my_rewards.scor": "did you mean python:my_rewards.score?",
        "python:gone.score": "run the command in the folder that holds it, or set PYTHONPATH",
        "python:score": None,
        "python:bad_syntax.score": None,
        "python:": None,
    }
    for name, fix in fixes.items():
        found = problems(f"rewards=['{name}']")
        assert list(found) == ["rewards.0.name"], name
        assert found["rewards.0.name"].suggestion == fix


def test_run_rules(problems, write):
    write("", "taken")
    assert list(problems("export.format=merged")) == ["export.format"]
    assert problems("export.format=merged", "model.adapter={}") == {}
    assert list(problems("run_dir=taken")) == ["run_dir"]
    assert problems("evaluate={temperature: 0.0}")["evaluate.temperature"].severity == "warning"
    assert problems("evaluate={temperature: 0.0, k: [1], samples: 1}") == {}


# the report


def test_warnings_do_not_refuse(write):
    report = check_config(write(GOOD), ["trainer.delta=1.1"])
    assert report.ok
    assert report.summary() == "run.yaml: ok (0 errors, 1 warning)"
    assert load_run_config("run.yaml", ["trainer.delta=1.1"]).trainer["delta"] == 1.1


def test_a_problem_as_text_and_json():
    problem = Problem(
        "too small", ("a", 0, "b"), found=float("nan"), needed="more", suggestion="x", where="f:3"
    )
    assert problem.text() == "f:3: error: a.0.b: too small\n    found: .nan\n    needed: more\n    fix: x"
    assert problem.as_json()["found"] == ".nan"
    assert "found" not in Problem("gone").as_json()
    assert Problem("x", found=None).as_json()["found"] is None


def test_nearest_prefers_misspellings_then_beginnings():
    assert nearest("dappo", ["grpo", "dapo"]) == "dapo"
    assert nearest("adamw", ["grokadamw", "adamw_torch"]) == "adamw_torch"
    assert nearest("zzz", ["grpo"]) is None
    assert nearest("ACE", ["ace"]) == "ace"


def test_long_values_are_cut():
    assert len(show("x" * 500)) == 80
    assert show([1, "a"]) == '[1, "a"]'


# whatever is in the file, the answer is a report

WHOLE = {
    "task": "rlvr",
    "run_dir": "runs/x",
    "model": {"path": "embedded:char-llama", "adapter": {"r": 4}},
    "data": {"source": "reasoning_gym:chain_sum", "params": {"min_terms": 2}, "eval": {"seed": 5}},
    "rewards": [{"verifier": {"weight": 2}}, "math", {"name": "format", "params": {"pattern": "x"}}],
    "methods": {"ace": {"alpha": 1.0}},
    "trainer": {"learning_rate": 1e-5, "num_generations": 8, "beta": 0.1, "lr_scheduler_kwargs": {}},
    "warm_start": {"trainer": {"max_steps": 3}},
    "evaluate": {"k": [1, 4], "samples": 4},
    "export": {"format": "auto"},
}
words = st.sampled_from(
    [
        "",
        "x",
        "name",
        "reasoning_gym:",
        "python:",
        "python:a.b",
        "embedded:",
        ":",
        "a:b",
        "{",
        "{0.x}",
        "~",
        "..",
        "é",
    ]
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def all_places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from all_places(inner, (*at, key))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_junk_anywhere_gives_a_report(tmp_path_factory, data):
    whole = copy.deepcopy(WHOLE)
    for _ in range(data.draw(st.integers(1, 5))):
        *parents, last = data.draw(st.sampled_from(list(all_places(whole))[1:]))
        container = whole
        for step in parents:
            container = container[step]
        container[last] = data.draw(junk)
    path = tmp_path_factory.mktemp("junk") / "run.yaml"
    path.write_text(dump_yaml(whole), encoding="utf-8")
    report = check_config(path)
    assert report.text()
    assert report.as_json()["ok"] == (report.as_json()["errors"] == 0)
    for problem in report.problems:
        assert problem.where
        assert problem.message


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_a_report(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "run.yaml"
    path.write_bytes(content)
    assert not check_config(path).ok


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_overrides_give_a_report(tmp_path_factory, overrides):
    path = tmp_path_factory.mktemp("overrides") / "run.yaml"
    path.write_text(GOOD)
    assert check_config(path, overrides).text()


def test_reward_models_are_looked_for_and_their_parameters_checked(problems, tmp_path):
    found = problems(f"rewards=[{{'model:{tmp_path}': {{params: {{batch: 2, batch_size: 0}}, workers: 2}}}}]")
    assert set(found) == {
        "rewards.0.name", "rewards.0.params.batch", "rewards.0.params.batch_size", "rewards.0.workers",
    }  # fmt: skip
    assert "is no reward model" in found["rewards.0.name"].message
    assert found["rewards.0.workers"].severity == "warning"
    (tmp_path / "config.json").write_text("{}")
    assert problems(f"rewards=['model:{tmp_path}']") == {}


def test_sampling_and_servers(problems):
    """What :mod:`posttrain.rollout` asks of the configuration; its rules have tests of their own."""
    found = problems("trainer.top_p=0.9", "trainer.num_iterations=2")["trainer.top_p"]
    assert (found.severity, "after the policy has moved" in found.message) == ("error", True)
    accepted = problems("trainer.top_p=0.9", "trainer.num_iterations=2", "rollout.truncated_sampling=accept")
    assert accepted["trainer.top_p"].severity == "warning"
    assert problems("trainer.top_p=0.9") == {}
    served = ("trainer.use_vllm=true", "trainer.vllm_mode=server", "trainer.use_cpu=true")
    assert "NCCL" in problems(*served)["trainer.vllm_mode"].message
    assert "trainer.vllm_mode" not in problems(*served, "rollout.weights_dir=w")
    assert problems("rollout.weights_dir=w")["rollout.weights_dir"].severity == "warning"

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config.describe import field_needed, field_range, field_type
from posttrain.config.method_pages import parameters
from posttrain.rl.ace import ACE

GOOD = """\
task: rlvr
data: {source: "reasoning_gym:chain_sum"}
rewards: [verifier, {math: {weight: 0.5}}]
methods: {ace: {alpha: 0.5}}
trainer: {learning_rate: 1e-6, report_to: none, optim: adamw_torch}
warm_start: {trainer: {max_steps: 5}}
evaluate: {}
"""
HEAVY = ["torch", "transformers", "trl", "datasets", "reasoning_gym", "peft", "pandas"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)

    def run(*arguments):
        return CliRunner().invoke(app, list(arguments))

    return run


@pytest.mark.parametrize("override", ["threads=1", "trainer.loss_type=dappo"])
def test_check_imports_nothing_heavy(tmp_path, override):
    (tmp_path / "run.yaml").write_text(GOOD)
    code = (
        "import sys\n"
        "from posttrain.cli import main\n"
        f"sys.argv = ['posttrain', 'check', 'run.yaml', {override!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        f"    print('HEAVY', [name for name in {HEAVY} if name in sys.modules], stop.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"HEAVY [] {0 if override == 'threads=1' else 2}" in done.stdout


def test_the_module_is_the_program(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "check", "run.yaml", "threads=0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "40"},
    )
    assert done.returncode == 2
    # not wrapped and not coloured when it is no terminal
    assert done.stdout.splitlines() == [
        "override 'threads=0': error: threads: threads has a value that is not allowed",
        "    found: 0",
        "    needed: a whole number at least 1, or null",
        "run.yaml: refused (1 error, 0 warnings)",
    ]
    assert done.stderr == ""


def test_check_says_ok(run):
    result = run("check", "run.yaml")
    assert (result.exit_code, result.stdout) == (0, "run.yaml: ok (0 errors, 0 warnings)\n")


def test_check_as_json(run):
    result = run("check", "run.yaml", "trainer.top_p=3", "trainer.delta=1.1", "--json")
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert {key: report[key] for key in ("config", "ok", "errors", "warnings")} == {
        "config": "run.yaml",
        "ok": False,
        "errors": 1,
        "warnings": 1,
    }
    assert {
        "severity": "error",
        "key": "trainer.top_p",
        "where": "override 'trainer.top_p=3'",
        "message": "top_p has a value that is not allowed",
        "needed": "a number above 0 and at most 1",
        "suggestion": None,
        "found": 3,
    } in report["problems"]


def test_json_stays_json_for_values_that_json_lacks(run):
    result = run("check", "run.yaml", "trainer.beta=.nan", "threads=.inf", "--json")

    def refuse(name):
        raise AssertionError(name)

    report = json.loads(result.stdout, parse_constant=refuse)
    assert [problem["found"] for problem in report["problems"]] == [".inf", ".nan"]


def test_square_brackets_are_printed_as_they_are(run):
    result = run("check", "run.yaml", "data.prompt_template='[bold]x[/bold]'")
    assert "'[bold]x[/bold]'" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "rum.yaml"], "did you mean run.yaml?"),
        (["check"], "Missing argument 'CONFIG'"),
        (["chek", "run.yaml"], "Did you mean 'check'?"),
        (["check", "run.yaml", "--jsn"], "--json"),
        (["methods", "acee"], "did you mean 'ace'?"),
        (["methods", "json:dumps"], "not a subclass"),
        (["methods", "gone:X"], "cannot load method"),
    ],
)
def test_wrong_requests_end_with_2_and_the_fix(run, arguments, text):
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.output
    assert "Traceback" not in result.output


def test_methods_lists_every_method(run):
    from posttrain.config.method_pages import available

    result = run("methods")
    assert result.exit_code == 0
    for cls in available().values():
        assert cls.name in result.stdout
        assert (cls.paper or "") in result.stdout
    listed = json.loads(run("methods", "--json").stdout)
    assert [method["name"] for method in listed] == [cls.name for cls in available().values()]


def test_a_name_of_two_tasks_has_two_pages(run):
    pages = [run("methods", name).stdout for name in ("feasible", "preference/feasible", "sft/feasible")]
    assert pages[0] == pages[1] != pages[2]
    assert json.loads(run("methods", "sft/feasible", "--json").stdout)["task"] == "sft"


def test_a_method_is_explained_by_its_module(run):
    result = run("methods", "ace")
    assert result.exit_code == 0
    for text in ("ACE: asymmetric confidence penalties", "When not to use it", "c_clip", "at least 0", "1.0"):
        assert text in result.stdout
    record = json.loads(run("methods", "ace", "--json").stdout)
    assert record["paper"] == "2602.21420"
    assert record["class"] == "posttrain.rl.ace:ACE"
    assert record["schema"]["properties"]["alpha"]["minimum"] == 0
    assert record["page"].startswith("ACE: asymmetric")


def test_the_parameter_table():
    table = {row["name"]: row for row in parameters(ACE)}
    assert table["alpha"] == {
        "name": "alpha",
        "type": "number",
        "default": 1.0,
        "required": False,
        "range": "at least 0",
        "description": "Strength; 0 switches the method off.",
    }
    assert table["activation"]["type"] == "softplus | relu | constant"
    assert (table["c_clip"]["type"], table["c_clip"]["range"]) == ("number | null", "above 0")


def test_fields_in_words():
    from pydantic import BaseModel, Field

    class Model(BaseModel):
        a: int = Field(default=1, ge=1, lt=9)
        b: list[str] | None = None
        c: float = Field(gt=0)
        d: dict[str, int] = Field(default_factory=dict)

    fields = Model.model_fields
    assert [field_needed(info) for info in fields.values()] == [
        "a whole number at least 1 and below 9",
        "a list of text, or null",
        "a number above 0",
        "a mapping",
    ]
    assert [field_type(info) for info in fields.values()] == [
        "integer",
        "list of text | null",
        "number",
        "mapping",
    ]
    assert field_range(fields["a"]) == "at least 1 and below 9"
    assert [row["required"] for row in parameters(Model)] == [False, False, True, False]


def test_help_teaches(run):
    text = run("--help").output
    assert "posttrain check configs/rlvr/quickstart.yaml" in text
    assert "methods=[]" in " ".join(run("check", "--help").output.split())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("warm", "posttrain warm --help"),
        ("WARM", "posttrain warm --help"),
        ("s3ft", "posttrain s3ft --help"),
        ("cofs", "posttrain methods ofs_dpo"),
        ("COFS-DPO", "posttrain methods ofs_dpo"),
    ],
)
def test_what_is_no_method_is_answered_with_where_it_lives(name, words):
    from posttrain.config.method_pages import resolve

    with pytest.raises(KeyError, match=words):
        resolve(name)


def test_methods_are_found_in_any_case_and_say_where_their_evidence_is():
    from posttrain.config.method_pages import page, resolve

    assert resolve("HFT").name == "hft"
    assert resolve("Flex-DPO").name == "flex_dpo"
    assert "page of ``spine``" in page(resolve("ttrl"))
    assert "page of ``sparse_po``" in page(resolve("tdpo"))

"""The ``selection:`` section: ways to write it, parameters, and what it does not go with."""

import textwrap

import pytest

from posttrain.config.check import check_config, load_run_config

PLAIN = """\
task: sft
data: {source: "reasoning_gym:chain_sum"}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def write(text, head=PLAIN):
        (tmp_path / "run.yaml").write_text(head + textwrap.dedent(text))
        return "run.yaml"

    return write


@pytest.fixture
def problems(write):
    def problems(text, *overrides, head=PLAIN):
        return {problem.key: problem for problem in check_config(write(text, head), overrides).problems}

    return problems


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("selection: {method: hft, params: {ratio: 0.25}, round: 2}", []),
        ("selection: {hft: {ratio: 0.25}, round: 2}", []),
        ("selection: {hft: }", ["selection.hft.ratio=0.25", "selection.round=2"]),
        ("", ["selection={hft: {ratio: 0.25}, round: 2}"]),
    ],
)
def test_ways_to_write_a_selector(write, text, overrides):
    selection = load_run_config(write(text), overrides).selection
    assert selection is not None
    assert (selection.method, selection.params["ratio"], selection.round) == ("hft", 0.25, 2)


@pytest.mark.parametrize(
    "override",
    [
        "selection={random: {budget: 0.01}}",
        "selection.random={budget: 0.01}",
        "selection.random.budget=0.01",
        "selection={method: random, params: {budget: 0.01}}",
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "selection: {fish: {budget: 0.02}, round: 3}",
        "selection: {method: fish, params: {budget: 0.02}, round: 3}",
    ],
)
def test_another_selector_takes_the_place_of_the_one_below(write, text, override):
    selection = load_run_config(write(text), [override]).selection
    assert selection is not None
    assert (selection.method, selection.params["budget"], selection.round) == ("random", 0.01, 3)


def test_another_selector_takes_the_place_of_that_of_the_file_below(write, tmp_path):
    (tmp_path / "below.yaml").write_text(PLAIN + "selection: {fish: {budget: 0.02}, round: 3}\n")
    selection = load_run_config(write("extends: below.yaml\nselection: {random: {budget: 0.01}}")).selection
    assert selection is not None
    assert (selection.method, selection.round) == ("random", 3)


def test_a_bare_name_has_the_selectors_defaults(write):
    selection = load_run_config(write("selection: hft")).selection
    assert (selection.method, selection.params["ratio"], selection.backend) == ("hft", 0.5, "auto")
    assert load_run_config(write("selection: hft"), ["selection=null"]).selection is None


def test_a_plan_file_must_be_there(problems, tmp_path):
    found = problems("selection: {plan: none.safetensors}")["selection.plan"]
    assert "no plan file at none.safetensors" in found.message
    (tmp_path / "half.safetensors").write_bytes(b"")
    assert problems("selection: {plan: half.safetensors}") == {}


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("selection: hfd", "selection", "unknown selector 'hfd'"),
        ("selection: {hfd: {}}", "selection.hfd", "unknown selector 'hfd'"),
        ("selection: {hft: {ratio: 2}}", "selection.hft.ratio", "not allowed"),
        ("selection: {hft: {}, id3: {}}", "selection.id3", "one selector, found hft and id3"),
        ("selection: {method: hft, ratio: 0.5}", "selection.ratio", "selection: {hft: {ratio: ...}}"),
        ("selection: {hft: {}, ratio: 0.5}", "selection.ratio", "selection: {hft: {ratio: ...}}"),
        ("selection: {method: [hft], ratio: 0.5}", "selection.method", "wrong type"),
        ("selection: {magnitude: {budget: 1.0}}", "selection.magnitude.budget", "write 1 for one scalar"),
        (
            "selection: {magnitude: {budget: 3e5}}",
            "selection.magnitude.budget",
            "found 300000.0: write 300000",
        ),
        ("selection: {magnitude: {budget: 1%}}", "selection.magnitude.budget", "found '1%'"),
        ("selection: {magnitude: {budget: yes}}", "selection.magnitude.budget", "a fraction of"),
        ("selection: {id3: {}, weight_decay: selected}", "selection.weight_decay", "without weight decay"),
        (
            "selection: {hft: {}, weight_decay: to_base, backend: freeze}",
            "selection.backend",
            "needs packed values",
        ),
        ("selection: {random: {}, backend: freeze}", "selection.backend", "parts of tensors"),
        ("selection: {explicit: {rows: {q: [0]}}, backend: freeze}", "selection.backend", "parts of tensors"),
        ("selection: {hft: {ration: 0.5}}", "selection.hft.ration", "unknown key 'ration'"),
        ("selection: {method: hft, params: {ratio: 2}}", "selection.params.ratio", "not allowed"),
        ("selection: {method: hft, plan: x}", "selection.plan", "either a selector or a plan file"),
        ("selection: {backend: packed}", "selection.method", "either a selector or a plan file"),
        ("selection: {hft: {}, bakend: packed}", "selection.bakend", "unknown key"),
        ("selection: {bakend: packed}", "selection.bakend", "unknown key"),
        ("selection: 'no.module:Selector'", "selection", "cannot be loaded"),
        ("selection: {hft: {}, backend: pakced}", "selection.backend", "not allowed"),
        ("methods: [hft]", "methods.hft", "selects weights"),
    ],
)
def test_mistakes_are_named_where_they_stand(problems, text, key, words):
    found = problems(text)
    assert key in found, found
    assert words in found[key].message
    assert found[key].severity == "error"


@pytest.mark.parametrize(
    "selector", ["random: {level: tensor}", "bitfit: {}", "hft: {}", "explicit: {parameters: [norm]}"]
)
def test_whole_tensors_can_be_frozen(problems, selector):
    assert problems(f"selection: {{{selector}, backend: freeze}}") == {}


def test_near_names_are_suggested(problems):
    assert "'magnitude'" in problems("selection: pafi")["selection"].suggestion
    found = problems("selection: {magnitude: {exclude: embed_tokens}}")["selection.magnitude.exclude"]
    assert found.suggestion == "write a list: [embed_tokens]"
    assert "'hft'" in problems("selection: hff")["selection"].suggestion
    assert "selection: {hft" in problems("methods: [hft]")["methods.hft"].suggestion


def test_scores_on_examples_need_supervised_data(problems):
    head = 'task: rlvr\ndata: {source: "reasoning_gym:chain_sum"}\nrewards: [verifier]\n'
    head += "trainer: {num_generations: 8, learning_rate: 1.0e-6}\n"
    found = problems("selection: {fish: {budget: 0.01}}", head=head)["selection.fish"]
    assert "examples with labels" in found.message
    assert "posttrain plan make" in found.suggestion
    assert problems("selection: {fish: {budget: 0.01}}") == {}


def test_doubtful_settings_are_warned_of(problems):
    assert problems("selection: {hft: {}}\nmodel: {adapter: {r: 4}}")["selection.hft"].severity == "warning"
    assert (
        problems("selection: {magnitude: {budget: 0.1}, round: 1}")["selection.round"].severity == "warning"
    )
    decay = "selection: {random: {budget: 0.1}, weight_decay: to_base}"
    assert problems(decay)["selection.weight_decay"].severity == "warning"
    assert problems(decay, "trainer.weight_decay=0.1") == {}


def test_a_selection_that_changes_needs_an_adamw(problems):
    text = "selection: {id3: {budget: 100}}"
    assert problems(text) == {}
    found = problems(text, "trainer.optim=sgd")["trainer.optim"]
    assert (found.found, found.needed) == ("sgd", "adamw_torch")
    assert "changes the selection" in problems(text, "selection.backend=packed")["selection.backend"].message


def test_a_selection_that_changes_under_fsdp_is_refused(problems):
    found = problems("selection: {id3: {budget: 0.1}}", "trainer.fsdp=full_shard")
    assert "shards of weights cannot follow" in found["selection.id3"].message
    for text in ("selection: {hft: {}}", "selection: {random: {budget: 0.1}}"):
        assert problems(text, "trainer.fsdp=full_shard") == {}

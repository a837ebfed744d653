import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.load import load_document
from posttrain.config.plain_yaml import dump_yaml, read_yaml


def load(tmp_path, text, overrides=(), name="run.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_document(path, overrides)


def places(document):
    return [(problem.where.rsplit("/", 1)[-1], problem.key) for problem in document.problems]


def test_every_key_knows_its_line(tmp_path):
    document = load(tmp_path, "a: 1\n\n# note\nb:\n  c: [x,\n     y]\n  d: {e: 2}\n")
    where = {
        path: document.find(path)[0].where.rsplit(":", 1)[1]
        for path in [("a",), ("b",), ("b", "c"), ("b", "c", 1), ("b", "d", "e")]
    }
    assert where == {("a",): "1", ("b",): "4", ("b", "c"): "5", ("b", "c", 1): "6", ("b", "d", "e"): "7"}


def test_a_place_that_is_not_written_is_found_at_its_parent(tmp_path):
    document = load(tmp_path, "a: 1\nb:\n  c: 3\n")
    node, depth = document.find(("b", "x", "y"))
    assert node.where.endswith(":2")
    assert depth == 1


def test_shorthands_are_found_under_their_long_place(tmp_path):
    document = load(
        tmp_path,
        "rewards:\n  - verifier\n  - math:\n      weight: 2\nmethods:\n  - ace\n  - b:\n      c: 1\n",
    )
    line = {
        path: document.find(path)[0].where.rsplit(":", 1)[1]
        for path in [
            ("rewards", 0, "name"),
            ("rewards", 1, "weight"),
            ("methods", "ace"),
            ("methods", "b", "c"),
        ]
    }
    assert line == {
        ("rewards", 0, "name"): "2",
        ("rewards", 1, "weight"): "4",
        ("methods", "ace"): "6",
        ("methods", "b", "c"): "8",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1_000_003", 1_000_003),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'1e-6'", "1e-6"),
        ("1e", "1e"),
    ],
)
def test_scalars(text, value):
    found = read_yaml(f"a: {text}", "f", []).plain()["a"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_read():
    assert math.isnan(read_yaml("a: .nan", "f", []).plain()["a"])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "given twice"),
        ("a: 1\nb: {c: 1, c: 2}\n", 2, "given twice"),
        ("a: 1\n1: x\n", 2, "a key must be text"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "the tag !!python/object:os.system is not"),
        ("a: 1\nb: !custom x\n", 2, "the tag !custom is not allowed"),
        ("a: 1\nb: !!int x\n", 2, "cannot be read as int"),
        ("a: &x\n  - *x\n", 1, "inside the value it names"),
        ('a: "\\ud800"\n', 1, "half of a character"),
        ("a: 1\nb: [1,\n  2\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\nb: c: d\n", 2, "not valid YAML"),
        ("a: 1\nb: \x01\n", 2, "not allowed in YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("", 1, "is empty"),
        ("# only a comment\n", 1, "is empty"),
        ("- a\n", 1, "holds a list"),
        ("word\n", 1, "holds a single value"),
    ],
)
def test_bad_text_is_a_problem_with_its_line(tmp_path, text, line, message):
    document = load(tmp_path, text)
    (problem,) = document.problems
    assert problem.where == f"{tmp_path}/run.yaml:{line}"
    assert message in problem.message


def test_missing_binary_folder_and_null_names_are_problems(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    (tmp_path / "config.yaml").write_text("a: 1")
    assert "byte 3" in load_document(tmp_path / "latin.yaml").problems[0].message
    (missing,) = load_document(tmp_path / "confg.yaml").problems
    assert "No such file" in missing.message
    assert missing.suggestion == f"did you mean {tmp_path}/config.yaml?"
    assert "directory" in load_document(tmp_path).problems[0].message
    assert load_document("a\0b").problems


def test_text_that_unfolds_without_end_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "unfolds to more than" in load(tmp_path, "\n".join(lines)).problems[0].message
    assert "nested more than 100 deep" in load(tmp_path, "a: " + "[" * 5000).problems[0].message


def test_merge_keys_inherit_and_give_way(tmp_path):
    document = load(tmp_path, "base: &b {x: 1, y: 2}\nc:\n  y: 3\n  <<: *b\n")
    assert document.data["c"] == {"x": 1, "y": 3}
    assert document.problems == []


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("a: {x: 1, y: 2}\nl: [1, 2]\ndrop: {z: 1}\nkeep: 5\n")
    document = load(
        tmp_path, "extends: ../base.yaml\na: {y: 3, w: 4}\nl: [9]\ndrop: null\n", name="sub/child.yaml"
    )
    assert document.problems == []
    assert document.data == {"a": {"x": 1, "y": 3, "w": 4}, "l": [9], "drop": None, "keep": 5}
    assert document.find(("a", "x"))[0].where.endswith("base.yaml:1")
    assert document.find(("a", "y"))[0].where.endswith("child.yaml:2")


def test_later_bases_win_over_earlier_ones(tmp_path):
    (tmp_path / "one.yaml").write_text("a: 1\nb: 1\n")
    (tmp_path / "two.yaml").write_text("b: 2\nc: 2\n")
    assert load(tmp_path, "extends: [one.yaml, two.yaml]\nc: 3\n").data == {"a": 1, "b": 2, "c": 3}


def test_the_same_base_twice_is_no_circle(tmp_path):
    (tmp_path / "root.yaml").write_text("a: 1\n")
    for name in ("left", "right"):
        (tmp_path / f"{name}.yaml").write_text(f"extends: root.yaml\n{name}: 1\n")
    document = load(tmp_path, "extends: [left.yaml, right.yaml]\n")
    assert document.data == {"a": 1, "left": 1, "right": 1}
    assert document.problems == []


def test_circles_missing_bases_and_wrong_types_of_extends(tmp_path):
    (tmp_path / "other.yaml").write_text("extends: run.yaml\nb: 1\n")
    document = load(tmp_path, "a: 1\nextends:\n  - other.yaml\n  - gone.yaml\n  - 3\n")
    assert places(document) == [
        ("other.yaml:1", "extends"),
        ("run.yaml:4", "extends"),
        ("run.yaml:5", "extends"),
    ]
    assert "run.yaml -> other.yaml -> run.yaml" in document.problems[0].message
    assert document.data == {"a": 1, "b": 1}


def test_overrides_set_nest_index_and_name_themselves(tmp_path):
    document = load(
        tmp_path,
        "a: {b: 1}\nl: [x, {w: 1}]\nmethods: [ace]\nn: null\n",
        ["a.b=1e-5", "a.c.d=[p, q]", "l.1.w=2", "methods.ace.alpha=0.5", "n.m=yes", "z={k: v}"],
    )
    assert document.problems == []
    assert document.data == {
        "a": {"b": 1e-5, "c": {"d": ["p", "q"]}},
        "l": ["x", {"w": 2}],
        "methods": {"ace": {"alpha": 0.5}},
        "n": {"m": "yes"},
        "z": {"k": "v"},
    }
    assert document.find(("a", "b"))[0].where == "override 'a.b=1e-5'"


def test_override_of_a_key_that_holds_dots(tmp_path):
    document = load(tmp_path, "methods:\n  pkg.mod:Cls: {x: 1}\n", ["methods.pkg.mod:Cls.x=2"])
    assert document.data == {"methods": {"pkg.mod:Cls": {"x": 2}}}


def test_override_with_a_mapping_merges_and_with_a_list_replaces(tmp_path):
    text = "methods: {ace: {alpha: 1}}\n"
    assert load(tmp_path, text, ["methods={b: {}}"]).data == {"methods": {"ace": {"alpha": 1}, "b": {}}}
    assert load(tmp_path, text, ["methods=[b]"]).data == {"methods": ["b"]}


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("novalue", "", "not an override"),
        ("=3", "", "not an override"),
        ("a..b=3", "", "not an override"),
        ("l.7=1", "l.7", "without an entry '7'"),
        ("l.x=1", "l.x", "without an entry 'x'"),
        ("s.x=1", "s.x", "is a single value"),
        ("s={", "s", "not valid YAML"),
        ("extends=x.yaml", "extends", "works in a file"),
    ],
)
def test_bad_overrides_are_problems_and_change_nothing(tmp_path, override, key, message):
    text = "l: [1]\ns: 2\n"
    document = load(tmp_path, text, [override])
    (problem,) = document.problems
    assert (problem.where, problem.key) == (f"override {override!r}", key)
    assert message in problem.message
    assert document.data == {"l": [1], "s": 2}


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=8), plain, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back(data):
    problems = []
    assert read_yaml(dump_yaml(data), "f", problems).plain() == data
    assert problems == []


@pytest.mark.parametrize(
    "text", ["1e-6", "no", "2024-01-01", "1_0", "null", "12:30", "0x1f", "~", "<<", "=", ".nan"]
)
def test_text_that_looks_like_something_else_survives(text):
    assert read_yaml(dump_yaml({"a": text}), "f", []).plain() == {"a": text}

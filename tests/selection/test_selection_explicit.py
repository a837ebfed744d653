"""What is named is selected, and nothing else; plan files travel between machines."""

import os
import subprocess
import sys

import pytest
import support
from pydantic import ValidationError

from posttrain.selection.explicit import Explicit
from posttrain.selection.magnitude import Magnitude
from posttrain.selection.plan import PlanError

EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
SIZE = len(support.CHARACTERS) + 3
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_tensors_rows_and_columns():
    model = support.model()
    plan = Explicit(
        parameters=(r"layers\.0\.self_attn", "^lm_head"),
        rows={"embed_tokens": (3, "40:", 30 - SIZE), r"layers\.1\.mlp\.up": ("10:12",)},
        columns={r"layers\.1\.mlp\.down": (10, 11)},
    ).select(model)
    assert plan.touched.keys() == {
        EMBEDDING,
        UP,
        DOWN,
        "lm_head.weight",
        *(f"model.layers.0.self_attn.{m}_proj.weight" for m in "qkvo"),
    }
    assert plan.tensors[EMBEDDING].index.tolist() == [3, 30, *range(40, SIZE)]
    assert plan.tensors[UP].kind == "rows"
    assert plan.tensors[UP].index.tolist() == [10, 11]
    assert plan.tensors[DOWN].kind == "columns"
    assert plan.tensors[DOWN].mask().nonzero()[:, 1].unique().tolist() == [10, 11]
    assert plan.tensors["lm_head.weight"].kind == "all"


def test_a_tied_head_is_found_by_either_name():
    model = support.model(tied=True)
    one = Explicit(rows={"lm_head": (1,)}).select(model)
    assert one == Explicit(rows={"embed_tokens": (1,)}).select(model)
    assert list(one.touched) == [EMBEDDING]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": ("nothing",)}, "parameters: 'nothing' is found in none of"),
        ({"rows": {"nothing": (1,)}}, "rows: 'nothing' is found in none of"),
        ({"rows": {"mlp.up": (64,)}}, r"rows of .*up_proj.weight: positions of rows go from 0 to 63"),
        ({"rows": {"mlp.up": (3, "2:5")}}, r"rows of .*up_proj.weight: position 3 is given twice"),
        ({"rows": {"mlp.up": ("60:70",)}}, r"rows 60:70 are not all in .*up_proj.weight, which has 64"),
        ({"rows": {"mlp.up": ("5:5",)}}, r"rows 5:5 are not all in"),
        ({"rows": {"mlp.up": ("-65:",)}}, r"rows -65: are not all in"),
        ({"columns": {"norm": (1,)}}, r"columns need a matrix; correct the pattern"),
        (
            {"parameters": ("mlp.up",), "rows": {r"1\.mlp\.up": (1,)}},
            "up_proj.weight is selected in two ways, all and rows: name it once",
        ),
    ],
)
def test_errors(settings, message):
    with pytest.raises(PlanError, match=message):
        Explicit(**settings).select(support.model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "found neither"),
        ({"parameters": ("a",), "file": "x"}, "found both"),
        ({"file": "x", "include": ("a",)}, "drop include and exclude"),
        ({"parameters": ("a",), "other_weights": True}, "goes with a plan file"),
        ({"parameters": ("(",)}, "is no regular expression"),
        ({"rows": {"a": ("1-3",)}}, "string_pattern_mismatch|match pattern"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValidationError, match=message):
        Explicit(**settings)


MAKE = """
import sys, support
from posttrain.selection.magnitude import Magnitude
Magnitude(budget=100).select(support.model(seed=5)).save(sys.argv[1])
"""


def test_a_plan_of_another_process(tmp_path):
    path = tmp_path / "plan.safetensors"
    subprocess.run(
        [sys.executable, "-c", MAKE, str(path)],
        check=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    model = support.model(seed=5)
    plan = Explicit(file=str(path)).select(model)
    assert plan == Magnitude(budget=100).select(model)
    assert (plan.method, plan.config["made_by"], plan.config["made_with"]["budget"]) == (
        "explicit",
        "magnitude",
        100,
    )
    other = support.model(seed=6)
    with pytest.raises(PlanError, match="not those the plan was made for"):
        Explicit(file=str(path)).select(other)
    carried = Explicit(file=str(path), other_weights=True).select(other)
    assert carried == plan
    carried.check(other)  # its hashes are those of the weights it is used on
    assert carried.hashes != plan.hashes
    with pytest.raises(PlanError, match="has shape"):
        Explicit(file=str(path), other_weights=True).select(support.model(hidden_size=16))
    with pytest.raises(PlanError, match="cannot be read"):
        Explicit(file=str(tmp_path / "missing")).select(model)

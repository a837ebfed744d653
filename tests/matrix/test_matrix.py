"""The matrix of launches: it covers all there is, the check refuses what it refuses, and it repeats."""

import importlib.util
import json
import os
from unittest import mock

import cases
import measure
import pytest
from test_rl_table import ROWS
from trl import DPOConfig, GRPOConfig, SFTConfig
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config import launch, launch_matrix
from posttrain.config.schema import SelectionConfig
from posttrain.config.selection_check import check_selection
from posttrain.methods import setup_of
from posttrain.preference import registry as preference_registry
from posttrain.rl import registry as rl_registry
from posttrain.rollout.settings import RolloutSettings
from posttrain.rollout.truncation import truncation_problem
from posttrain.selection import registry as selectors
from posttrain.sft import registry as sft_registry

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (pip install '.[deepspeed]')"
)
ENVIRONMENT = {
    "single": {},
    "ddp": {"WORLD_SIZE": "2"},
    "zero2": {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp1": {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
    "fsdp2": {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}
CELLS = launch_matrix.matrix()["cells"]


def launched(mode):
    """Be a process of such a launch."""
    bare = {name: value for name, value in os.environ.items() if name not in launch.LAUNCHED}
    return mock.patch.dict(os.environ, bare | ENVIRONMENT[mode], clear=True)


# ---- the file ----------------------------------------------------------------------------------------------


def test_every_method_and_selector_has_a_case():
    for registry, table in (
        (rl_registry, ROWS),
        (preference_registry, cases.PREFERENCE),
        (sft_registry, cases.SFT),
        (selectors, cases.SELECTORS),
    ):
        missing = registry.available().keys() - table
        assert not missing, f"no settings in tests/matrix/cases.py for {', '.join(sorted(missing))}: add them"


def test_the_file_has_every_case_in_every_mode():
    assert list(CELLS) == list(cases.CASES), "run python scripts/update_launch_matrix.py"
    for name, row in CELLS.items():
        assert list(row) in (["single"], list(launch_matrix.MODES)), name
        for cell in row.values():
            if cell["verdict"] == "works":
                assert cell["losses"] < measure.LOSSES
                assert cell["weights"] < measure.WEIGHTS
            else:
                assert cell["verdict"] == "refused"
                assert cell["reason"]
    refused = [n for n, row in CELLS.items() if "ddp" in row and row["ddp"]["verdict"] == "refused"]
    assert refused == ["selection/sara:packed"]


def refusals(name, mode):
    """What the check of a configuration has against a case in this mode."""
    parts = cases.CASES[name].parts
    if "selector" in parts:
        section = SelectionConfig(
            method=parts["selector"],
            params=json.loads(json.dumps(parts["parameters"])),
            backend=parts["backend"],
        )
        problems, _ = check_selection(section, "sft", {"optim": "adamw_torch"}, adapter=False)
        return [problem.message for problem in problems if problem.severity == "error"]
    methods = cases.CASES[name].methods()
    config = {"rlvr": GRPOConfig, "preference": DPOConfig}.get(parts["task"], SFTConfig)
    more = {"num_generations": 4} if parts["task"] == "rlvr" else {}
    if more and methods:
        more |= ROWS[parts["method"]].trainer
    with launched("single"):  # the real arguments of a launched process want its process group
        args = config(use_cpu=True, bf16=False, **more)
    setup = setup_of(methods, args, config, adapter=parts["lora"])
    return [conflict.message for m in methods for conflict in m.conflicts(setup) if conflict.fatal]


def test_the_check_refuses_what_one_process_refuses():
    for name, row in CELLS.items():
        with launched("single"):
            assert bool(refusals(name, "single")) == ("single" in row), name


@pytest.mark.parametrize("mode", launch_matrix.MODES)
def test_the_check_refuses_what_is_refused(mode):
    for name, row in CELLS.items():
        if "single" in row:
            continue
        with launched(mode):
            found = refusals(name, mode)
        assert bool(found) == (row[mode]["verdict"] == "refused"), (name, found, row[mode])
        if found and not name.startswith("selection/"):
            assert row[mode]["reason"] in "; ".join(found)


# ---- how a process was launched ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ENVIRONMENT)
def test_the_environment_tells_the_mode(mode):
    with launched(mode):
        assert launch.launch_mode({}) == mode
        assert launch.processes() == (1 if mode == "single" else 2)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "zero3"),
        ({"deepspeed": '{"zero_optimization": {"stage": 2}}'}, "zero2"),
        ({"deepspeed": {"train_batch_size": "auto"}}, "zero1"),
        ({"fsdp": True}, "fsdp2"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp1"),
        ({"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}, "fsdp2"),
    ],
)
def test_the_configuration_tells_the_mode(fields, mode):
    with launched("single"):
        assert launch.launch_mode(fields) == mode


def test_a_file_of_deepspeed_tells_the_stage(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    with launched("ddp"):
        assert launch.launch_mode({"deepspeed": str(path)}) == "zero3"
        with mock.patch.dict(
            os.environ, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path)
        ):
            assert launch.launch_mode({}) == "zero3"


@pytest.mark.parametrize(
    ("name", "mode"), [("cpu_ddp", "ddp"), ("cpu_zero2", "zero2"), ("cpu_zero3", "zero3")]
)
def test_files_of_accelerate(name, mode):
    before = dict(os.environ)
    with launch.as_launched(measure.ROOT / "configs" / "accelerate" / f"{name}.yaml"):
        assert launch.launch_mode({}) == mode
        assert launch.processes() == 2
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("name", "mode"), [("fsdp2", "fsdp2"), ("zero3_offload", "zero3"), ("zero2", "zero2")]
)
def test_files_for_gpus(name, mode):
    with launch.as_launched(measure.ROOT / "configs" / "accelerate" / f"{name}.yaml"):
        assert launch.launch_mode({}) == mode


def test_truncated_sampling_needs_the_whole_head():
    fields = {"top_p": 0.9, "num_iterations": 1, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    for mode, refused in (("ddp", False), ("zero2", False), ("zero3", True), ("fsdp2", True)):
        with launched(mode):
            found = truncation_problem(fields, RolloutSettings(truncated_sampling="correct"), ranks=2)
        assert (found is not None and launch.TITLES[mode] in found.message) == refused, (mode, found)


def test_a_fully_sharded_file(tmp_path):
    path = tmp_path / "fsdp.yaml"
    path.write_text("distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_version: 2}\n")
    with launch.as_launched(path):
        assert (launch.launch_mode({}), launch.processes()) == ("fsdp2", 4)


CONFIG = """
task: sft
run_dir: {folder}/run
model: {{path: "embedded:char-llama"}}
data: {{source: "reasoning_gym:chain_sum", train: {{size: 8, seed: 0}}}}
methods: {{lfu: {{}}}}
trainer: {{use_cpu: true, max_steps: 1}}
"""


def test_check_knows_the_launch(tmp_path):
    path, no = tmp_path / "run.yaml", tmp_path / "no.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    folder = measure.ROOT / "configs" / "accelerate"

    def check(*more):
        return CliRunner().invoke(app, ["check", str(path), *more])

    assert check().exit_code == 0, check().output
    assert check("--launch", str(folder / "cpu_ddp.yaml")).exit_code == 0
    refused = check("--launch", str(folder / "cpu_zero3.yaml"))
    assert refused.exit_code == 2
    assert "lfu" in refused.output
    assert "DeepSpeed ZeRO-3 shards: launch with plain DDP" in refused.output
    # the same words as those that the trainer would raise, and that were measured
    assert CELLS["sft/lfu"]["zero3"]["reason"] in refused.output
    no.write_text("a: 1\n")
    for wrong, words in ((no, "distributed_type"), (tmp_path / "none.yaml", "cannot be read")):
        found = check("--launch", str(wrong))
        assert found.exit_code == 2
        assert words in found.output


def test_fsdp1_is_refused_with_methods_and_single_scalars(tmp_path):
    path = tmp_path / "run.yaml"
    with launched("fsdp1"):
        path.write_text(CONFIG.format(folder=tmp_path).replace("lfu", "feasible"))
        found = CliRunner().invoke(app, ["check", str(path)])
        assert "feasible cannot go with FSDP1" in found.output
        path.write_text(CONFIG.format(folder=tmp_path).replace("methods: {lfu: {}}", "selection: random"))
        found = CliRunner().invoke(app, ["check", str(path)])
        assert "random trains single scalars, and FSDP1" in found.output


def test_fsdp_with_use_cpu_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path).replace("methods: {lfu: {}}", ""))
    for mode, words in (("fsdp2", "FSDP shards on GPUs only"), ("zero3", "ok (0 errors")):
        with launched(mode):
            assert words in CliRunner().invoke(app, ["check", str(path)]).output, mode


OWN = """
from posttrain.sft.method import Method

class Own(Method):
    name, title = "own", "One of the user's own"

class Anywhere(Own):
    any_launch = True
"""


def test_a_method_of_ones_own_is_refused_unless_it_says_otherwise(tmp_path, monkeypatch):
    (tmp_path / "launch_methods_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "run.yaml"
    for name, mode, words in (
        ("Own", "zero2", "needs whole weights (any_launch is not set), which DeepSpeed ZeRO-2 shards"),
        ("Own", "ddp", "ok (0 errors"),
        ("Anywhere", "zero3", "ok (0 errors"),
    ):
        path.write_text(CONFIG.format(folder=tmp_path).replace("lfu", f'"launch_methods_of_mine:{name}"'))
        with launched(mode):
            assert words in CliRunner().invoke(app, ["check", str(path)]).output, (name, mode)


def test_methods_tell_where_they_run():
    for name, words in (("ace", "Launches"), ("lfu", "lfu moves the weights for a moment")):
        assert words in CliRunner().invoke(app, ["methods", name]).output
    (ace,) = [
        row
        for row in json.loads(CliRunner().invoke(app, ["methods", "--json"]).output)
        if row["name"] == "ace"
    ]
    assert ace["launches"]["full"] == CELLS["rlvr/ace"]
    assert ace["launches"]["lora"].keys() == set(launch_matrix.MODES)


# ---- measured again ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    found = measure.run(tmp_path_factory.mktemp("matrix") / "single", "single")
    for name, one in found.items():
        assert ("refused" in one) == ("single" in CELLS[name]), (name, one)
        if "bare" in one and "losses" in one:
            shared = one["weights"].keys() & one["bare"]["weights"].keys()  # methods may have their own
            losses, weights = measure.difference(
                *(
                    run | {"weights": {key: run["weights"][key] for key in shared}}
                    for run in (one, one["bare"])
                )
            )
            acts = losses > 10 * measure.LOSSES or weights > 10 * measure.WEIGHTS
            assert acts != (name.removesuffix("+lora") in cases.EXACT), (name, losses, weights)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        "ddp",
        pytest.param("zero2", marks=needs_deepspeed),
        pytest.param("zero3", marks=needs_deepspeed),
        "fsdp2",
    ],
)
def test_it_is_as_the_file_says(mode, single, tmp_path):
    measured = measure.table(single, {mode: measure.run(tmp_path / mode, mode)})
    for name, row in CELLS.items():
        if "single" in row:
            continue
        now, then = measured[name][mode], row[mode]
        assert now["verdict"] == then["verdict"], (name, now)
        assert now.get("reason") == then.get("reason"), name

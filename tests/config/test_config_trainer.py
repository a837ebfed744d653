import ast
import dataclasses
import inspect

import pytest

from posttrain.config import trainer_ranges
from posttrain.config.annotations import accepts, describe_type
from posttrain.config.tasks import TASKS
from posttrain.config.trainer_check import DEPRECATED, check_trainer
from posttrain.config.trainer_fields import OWNED, RENAMED, trainer_fields
from posttrain.config.upstream import dict_keys, enum_values

RLVR, SFT = TASKS["rlvr"], TASKS["sft"]


def check(values, spec=RLVR, **more):
    return check_trainer(values, spec, ("trainer",), **more)[0]


def errors(values, spec=RLVR, **more):
    return {p.key.removeprefix("trainer."): p for p in check(values, spec, **more) if p.severity == "error"}


def warnings(values, spec=RLVR):
    return {p.key.removeprefix("trainer."): p.message for p in check(values, spec) if p.severity == "warning"}


@pytest.mark.parametrize("task", TASKS)
def test_fields_and_literal_defaults_are_those_of_the_real_class(task):
    import trl

    spec = TASKS[task]
    real = {field.name: field for field in dataclasses.fields(getattr(trl, spec.config_class)) if field.init}
    ours = trainer_fields(spec)
    assert set(ours) == set(real)
    assert [name for name, field in ours.items() if not field.literal] == ["optim"]
    for name, field in ours.items():
        if field.literal:
            factory = real[name].default_factory
            default = real[name].default if factory is dataclasses.MISSING else factory()
            assert (name, field.default) == (name, default)
            assert type(field.default) is type(default)


def test_enumerations_are_those_of_transformers():
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    assert enum_values("transformers", "training_args", "OptimizerNames") == tuple(
        x.value for x in OptimizerNames
    )
    for enum in (IntervalStrategy, SaveStrategy, SchedulerType):
        assert enum_values("transformers", "trainer_utils", enum.__name__) == tuple(x.value for x in enum)


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    keys = dict_keys("transformers", "integrations.integration_utils", "INTEGRATION_TO_CALLBACK")
    assert keys == tuple(INTEGRATION_TO_CALLBACK)


def compared_with(method, attribute):
    """The texts that ``method`` compares ``self.attribute`` with."""
    source = inspect.cleandoc("\n" + inspect.getsource(method))
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == f"self.{attribute}":
            for part in ast.walk(node.comparators[0]):
                if isinstance(part, ast.Constant):
                    found.add(part.value)
    return found


def test_choices_are_those_that_trl_compares_with():
    from trl import GRPOTrainer

    assert compared_with(GRPOTrainer._compute_loss, "loss_type") == set(trainer_ranges.GRPO_LOSS_TYPES)
    modes = compared_with(GRPOTrainer._generate_and_score_completions, "vllm_importance_sampling_mode")
    assert modes == set(trainer_ranges.IMPORTANCE_SAMPLING_MODES)
    levels = compared_with(GRPOTrainer._compute_loss, "importance_sampling_level")
    assert levels == set(trainer_ranges._RULES["importance_sampling_level"].values)


def test_tables_name_only_fields_that_exist():
    fields = {name for spec in TASKS.values() for name in trainer_fields(spec)}
    assert set(trainer_ranges._RULES) <= fields
    assert set(trainer_ranges._ENUMS) <= fields
    assert set(OWNED) <= fields
    assert set(DEPRECATED) <= fields
    assert not set(RENAMED) & set(trainer_fields(RLVR))


@pytest.mark.parametrize("task", TASKS)
def test_every_default_passes_its_own_check(task):
    spec = TASKS[task]
    for name, field in trainer_fields(spec).items():
        if field.literal and name not in OWNED:
            assert errors({name: field.default}, spec) == {}, name


# anchors: TRL accepts all of these when the configuration is built
BAD = {
    "loss_type": ("dappo", "one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo"),
    "temperature": (-1, "a number above 0"),
    "epsilon": ("abc", "a number above 0"),
    "top_p": (3, "a number above 0 and at most 1"),
    "beta": (None, "a number at least 0"),
    "top_entropy_quantile": (5, "a number at least 0 and at most 1"),
    "importance_sampling_level": ("tok", "one of token, sequence"),
    "vllm_mode": ("x", "one of server, colocate"),
    "scale_rewards": ("grp", "one of group, batch, none, true, false"),
    "vllm_importance_sampling_mode": (
        "x",
        "one of token_truncate, token_mask, sequence_truncate, sequence_mask",
    ),
}


def test_the_settings_that_trl_accepts_are_all_refused_together():
    values = {name: value for name, (value, _) in BAD.items()} | {
        "entropy_coef_min": 0.5,
        "entropy_coef_max": 0.4,
    }
    found = errors(values)
    assert {name: problem.needed for name, problem in found.items()} == {
        name: needed for name, (_, needed) in BAD.items()
    } | {"entropy_coef_min": "at most entropy_coef_max=0.4"}
    assert found["loss_type"].suggestion == "did you mean 'dapo'?"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("learning_rate", [1e-7, 1], [0, -1e-5, float("nan"), float("inf"), True]),
        ("top_p", [1e-9, 1], [0, 1.001]),
        ("top_k", [0, 50], [-1, 1.5]),
        ("min_p", [0, 1, None], [-0.1, 1.1]),
        ("beta", [0, 0.04], [-0.01]),
        ("max_steps", [-1, 1], [0, -2]),
        ("adam_beta1", [0, 0.99], [1, -0.1]),
        ("num_generations", [2, 4], [1, 0, None]),
        ("max_completion_length", [1], [0, None]),
        ("save_steps", [1, 500, 0.25], [0, -1, 1.5]),
        ("warmup_steps", [0, 10, 0.1], [-1, 10.5]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("lr_scheduler_type", ["cosine"], ["cosin", ""]),
        ("eval_strategy", ["no"], ["none", False]),
        ("report_to", ["none", []], ["wandbb", None, ["none", "x"]]),
        ("scale_rewards", ["none", True, False], [1, "std"]),
        ("gradient_accumulation_steps", [1], [0, 8.0]),
        ("pad_to_multiple_of", ["auto", 8, None], [0]),
        ("vllm_gpu_memory_utilization", [0.3, 1.0], [0, 1.2]),
        ("generation_kwargs", [{}, {"a": 1}, None], [3, [1]]),
    ],
)
def test_ranges(name, good, bad):
    for value in good:
        # a batch of 8 holds groups of 2 and 4
        assert name not in errors({name: value}), value
    for value in bad:
        assert errors({name: value})[name].needed, value


@pytest.mark.parametrize(
    ("values", "suggestion"),
    [
        ({"learning_rate": "1e-5"}, "write 1e-5 without quotes"),
        ({"max_steps": 1e2}, "write 100"),
        ({"gradient_checkpointing": "yes"}, "write true"),
        ({"eval_steps": "none"}, "write null"),
        ({"num_generatons": 8}, "did you mean 'num_generations'?"),
        ({"lr": 1e-5}, "use learning_rate"),
        (
            {"max_prompt_length": 8},
            "use data.max_prompt_tokens; longer prompts are refused or filtered, never cut",
        ),
        ({"warmup_ratio": 0.1}, "use warmup_steps; a value below 1 is a share of all steps"),
        ({"output_dir": "x"}, OWNED["output_dir"]),
        ({"reward_weights": [1.0]}, OWNED["reward_weights"]),
        ({"resume_from_checkpoint": "x"}, OWNED["resume_from_checkpoint"]),
    ],
)
def test_the_fix_is_named(values, suggestion):
    (problem,) = check(values)
    assert problem.suggestion == suggestion
    assert problem.severity == "error"


def test_another_name_is_only_offered_where_it_exists():
    assert errors({"max_seq_length": 8}, SFT)["max_seq_length"].suggestion == "use max_length"
    assert "use max_length" not in (errors({"max_seq_length": 8})["max_seq_length"].suggestion or "")


def test_batch_arithmetic_names_the_numbers_and_a_fix_that_works(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    values = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3, "num_generations": 4}
    (problem,) = check(values)
    assert "per_device_train_batch_size=6 * gradient_accumulation_steps=3 = 18" in problem.message
    assert "num_generations=4" in problem.message
    assert problem.suggestion == "set num_generations: 3, or gradient_accumulation_steps: 4"
    assert check(values | {"num_generations": 3}) == []
    assert check(values | {"gradient_accumulation_steps": 4}) == []


def test_batch_arithmetic_counts_processes(monkeypatch):
    values = {"per_device_train_batch_size": 2, "num_generations": 8}
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert check(values) == []
    monkeypatch.setenv("WORLD_SIZE", "3")
    (problem,) = check(values)
    assert "* 3 processes = 6" in problem.message
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "= 2," in check(values)[0].message


def test_batch_arithmetic_agrees_with_trl(monkeypatch, tmp_path):
    from trl import GRPOConfig

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for size in (4, 6):
        for group in (2, 3, 4):
            for extra in (
                {},
                {"steps_per_generation": 2},
                {"generation_batch_size": 12},
                {"gradient_accumulation_steps": 3},
            ):
                values = {"per_device_train_batch_size": size, "num_generations": group} | extra
                try:
                    GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)
                    accepted = True
                except ValueError:
                    accepted = False
                assert (errors(values) == {}) == accepted, values


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"generation_batch_size": 16, "steps_per_generation": 2}, "generation_batch_size"),
        ({"generation_batch_size": 12}, "generation_batch_size"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 4}, "per_device_eval_batch_size"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"fp16": True, "bf16": True}, "fp16"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type"),
        ({"log_completions_hub_repo": "a/b"}, "log_completions_hub_repo"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "vllm_importance_sampling_clip_min"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "vllm_importance_sampling_mode",
        ),
        ({"deepspeed": "gone.json"}, "deepspeed"),
    ],
)
def test_what_does_not_go_together_is_refused(values, key, monkeypatch):
    monkeypatch.setattr("posttrain.config.trainer_rules.installed", lambda package: True)
    assert list(errors(values)) == [key]


def test_what_goes_together_is_accepted():
    assert check({"sync_ref_model": True, "beta": 0.04}) == []
    assert (
        check({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}) == []
    )
    assert check({"generation_batch_size": 16}) == []
    assert check({"packing": True}, SFT) == []


def test_sync_ref_model_is_refused_with_an_adapter():
    values = {"sync_ref_model": True, "beta": 0.04}
    assert "model.adapter" in errors(values, adapter=True)["sync_ref_model"].message


def test_a_rule_is_silent_about_a_value_that_could_not_be_read():
    assert list(errors({"sync_ref_model": True, "beta": None})) == ["beta"]
    assert list(errors({"num_generations": "7"})) == ["num_generations"]


def test_a_missing_package_is_named(monkeypatch):
    for module in ("trainer_rules", "vllm_rules"):
        monkeypatch.setattr(f"posttrain.config.{module}.installed", lambda package: False)
    monkeypatch.setattr("posttrain.config.vllm_rules.has_gpu", lambda: True)
    found = errors({"use_vllm": True, "report_to": ["wandb"]})
    assert found["use_vllm"].suggestion == "pip install 'posttrain[vllm]'"
    assert "package wandb" in found["report_to"].message
    monkeypatch.setattr("posttrain.config.vllm_rules.has_gpu", lambda: False)
    assert "scripts/setup_vllm_cpu.sh" in errors({"use_vllm": True})["use_vllm"].suggestion


def test_what_keeps_vllm_from_making_rollouts_is_said_before_it_starts(monkeypatch):
    monkeypatch.setattr("posttrain.config.vllm_rules.installed", lambda package: True)
    monkeypatch.setattr("posttrain.config.vllm_rules.has_gpu", lambda: False)
    monkeypatch.setattr("posttrain.config.vllm_rules.vllm_version", lambda: "0.31.0")
    assert errors({"use_vllm": True}) == {}
    assert (
        "sleep"
        in errors({"use_vllm": True, "vllm_enable_sleep_mode": True})["vllm_enable_sleep_mode"].message
    )
    short = {"use_vllm": True, "vllm_max_model_length": 64, "max_completion_length": 64}
    assert "no room for a prompt" in errors(short)["vllm_max_model_length"].message
    assert errors(short | {"vllm_max_model_length": 65}) == {}
    assert "live on the rest" in warnings({"use_vllm": True, "vllm_gpu_memory_utilization": 0.9}).popitem()[1]
    monkeypatch.setattr("posttrain.config.vllm_rules.vllm_version", lambda: "0.22.1")
    assert "needs vLLM 0.31, found 0.22.1" in errors({"use_vllm": True})["use_vllm"].message
    assert errors({"vllm_enable_sleep_mode": True}) == {}


def test_doubtful_settings_are_warnings():
    assert "1 + epsilon = 1.2" in warnings({"delta": 1.1})["delta"]
    assert warnings({"delta": 1.5}) == {}
    assert "luspo" in warnings({"loss_type": "luspo"})["loss_type"]
    assert "max_steps=5" in warnings({"max_steps": 5, "warmup_steps": 9})["warmup_steps"]
    assert "deprecated" in warnings({"pad_token": "x"}, SFT)["pad_token"]


def test_supervised_rules():
    assert list(errors({"padding_free": True}, SFT)) == ["padding_free"]
    assert list(errors({"packing": True, "max_length": None}, SFT)) == ["packing"]
    assert errors({"loss_type": "grpo"}, SFT)["loss_type"].needed == "one of nll, dft, chunked_nll"


def test_merged_fields_hold_written_values_and_defaults():
    _, merged = check_trainer({"beta": 0.04, "temperature": -1}, RLVR, ("trainer",))
    assert set(merged) == set(trainer_fields(RLVR))
    assert (merged["beta"], merged["temperature"], merged["epsilon"]) == (0.04, 1.0, 0.2)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [3], [3.0, True, "3", None, 2**70]),
        ("float", [3, 0.5], [True, "x", None, float("inf")]),
        ("float | None", [None, 1], ["x"]),
        ("typing.Optional[int]", [None, 1], [1.5]),
        ("str", ["x"], [1, None]),
        ("bool", [True], [1, "true"]),
        ("dict[str, Any] | str | None", [{}, "x", None], [[1]]),
        ("list[float]", [[1, 2.5], []], [["x"], 3]),
        ("list[str] | str", ["x", ["x"]], [[1]]),
        ("SchedulerType | str", ["linear"], [3]),
        ("Literal['a', 2]", ["a", 2], ["b", 2.0]),
        ("tuple[str, ...]", [["x"]], ["x"]),
    ],
)
def test_annotations(annotation, good, bad):
    assert [accepts(annotation, value) for value in good] == [True] * len(good)
    assert [accepts(annotation, value) for value in bad] == [False] * len(bad)


def test_types_in_words():
    assert describe_type("float | None") == "a number, or null"
    assert describe_type("typing.Optional[int]") == "a whole number, or null"
    assert describe_type("dict[str, Any] | str | None") == "a mapping, or text, or null"

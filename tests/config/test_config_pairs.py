"""Configurations of preference and reward runs: what is refused, with its fix, all at once."""

import inspect
import re
import subprocess
import sys

import pytest

from posttrain.config import trainer_ranges, trainer_rules
from posttrain.config.check import check_config, load_run_config
from posttrain.config.load import resolved_yaml
from posttrain.config.tasks import TASKS
from posttrain.config.trainer_check import check_trainer
from posttrain.config.trainer_fields import GONE, trainer_fields

PREFERENCE, REWARD = TASKS["preference"], TASKS["reward"]
GOOD = """\
task: preference
data: {source: user/pairs}
trainer: {loss_type: [sigmoid, sft], loss_weights: [1.0, 0.2], beta: 0.1}
"""


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """Check a configuration with overrides; return the problems by key."""
    monkeypatch.chdir(tmp_path)

    def problems(*overrides, text=GOOD):
        (tmp_path / "run.yaml").write_text(text)
        return {problem.key: problem for problem in check_config("run.yaml", overrides).problems}

    return problems


def errors(values, spec=PREFERENCE, **more):
    found = check_trainer(values, spec, ("trainer",), **more)[0]
    return {p.key.removeprefix("trainer."): p for p in found if p.severity == "error"}


def warnings(values):
    found = check_trainer(values, PREFERENCE, ("trainer",))[0]
    return {p.key.removeprefix("trainer."): p.message for p in found if p.severity == "warning"}


def test_choices_are_those_of_trl():
    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(trainer_ranges.DPO_LOSS_TYPES)
    kinds = re.findall(r'self\.f_divergence_type == "(\w+)"', source)
    assert set(kinds) == set(trainer_ranges.F_DIVERGENCES)
    listed = re.search(r"f_divergence_loss_types = \{(.*?)\}", inspect.getsource(DPOTrainer.__init__))
    assert set(re.findall(r'"(\w+)"', listed[1])) == set(trainer_rules.DIVERGENCE_LOSSES)
    assert not set(GONE["DPOConfig"]) & set(trainer_fields(PREFERENCE))


@pytest.mark.parametrize(
    ("values", "field", "needed"),
    [
        ({"loss_type": "sigmiod"}, "loss_type", "did you mean 'sigmoid'?"),
        ({"loss_type": ["sigmoid", "kto_pair"]}, "loss_type", "one of sigmoid, hinge"),
        ({"loss_type": []}, "loss_type", "empty list"),
        ({"loss_type": ["sft", "sft"]}, "loss_type", "sft twice"),
        ({"loss_type": "exo_pair"}, "loss_type", "set label_smoothing: 0.001"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing", "below 0.5"),
        ({"loss_weights": [1.0, 0.5]}, "loss_weights", "2 numbers for 1 of loss_type"),
        ({"loss_type": "apo_zero", "f_divergence_type": "js_divergence"}, "f_divergence_type", "reverse_kl"),
        ({"f_divergence_type": "kl"}, "f_divergence_type", "one of reverse_kl"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs", "false"),
        ({"use_weighting": True, "loss_type": "aot"}, "use_weighting", "sorts them"),
        ({"beta": 0}, "beta", "above 0"),
        ({"ld_alpha": 1.5}, "ld_alpha", "at most 1"),
        ({"rpo_alpha": 1.0}, "rpo_alpha", "loss_type: [sigmoid, sft] and loss_weights: [1.0, RPO_ALPHA]"),
        ({"reference_free": True}, "reference_free", "drop it"),
        ({"max_prompt_length": 512}, "max_prompt_length", "data.max_prompt_tokens"),
        ({"max_completion_length": 64}, "max_completion_length", "max_length"),
        ({"num_generations": 8}, "num_generations", "TRL's DPOConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_mistakes_in_the_trainer_section_come_with_the_fix(values, field, needed):
    found = errors(values)
    assert set(found) == {field}
    assert needed in found[field].text()


def test_what_goes_together_passes():
    for values in (
        {"loss_type": "exo_pair", "label_smoothing": 0.001},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2], "f_divergence_type": "forward_kl"},
        {"sync_ref_model": True, "ref_model_sync_steps": 10, "max_length": None},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4},
    ):
        assert errors(values) == {}
        assert warnings(values) == {}
    assert "model.adapter" in errors({"sync_ref_model": True}, adapter=True)["sync_ref_model"].message
    idle = {
        "discopop_tau": 0.1,
        "label_smoothing": 0.1,
        "ref_model_sync_steps": 5,
        "f_alpha_divergence_coef": 0.5,
    }
    assert set(warnings(idle)) == set(idle)


def test_reward_fields():
    assert errors({"center_rewards_coefficient": 0.01, "max_length": 64}, REWARD) == {}
    assert (
        "at least 0"
        in errors({"center_rewards_coefficient": -1.0}, REWARD)["center_rewards_coefficient"].text()
    )
    assert "TRL's RewardConfig" in errors({"beta": 0.1}, REWARD)["beta"].text()


def test_every_mistake_at_once(problems):
    text = """\
task: preference
model: {adapter: {target_modules: [q_proj, lm_head]}}
data: {source: user/pairs, label_noise: {share: 1.5}}
rewards: [math, math]
methods: {nothing: }
warm_start: {size: 10}
trainer: {loss_type: sigmod, rpo_alpha: 1.0}
evaluate: {temperature: 0.7}
"""
    found = problems(text=text)
    assert set(found) == {
        "model.adapter.target_modules", "data.label_noise.share", "rewards.1", "methods.nothing",
        "warm_start", "trainer.loss_type", "trainer.rpo_alpha", "evaluate.temperature",
    }  # fmt: skip
    assert "task: sft first" in found["warm_start"].suggestion
    assert found["rewards.1"].severity == found["evaluate.temperature"].severity == "warning"


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("data.source=reasoning_gym:chain_sum", "data.source", "pairs of answers"),
        ("rewards=[math]", "rewards", "add an 'evaluate' section"),
        ("evaluate={k: [1, 4], samples: 4}", "evaluate.k", "measures preferences: drop it"),
        ("data.label_noise={share: 0.2, file: a.jsonl}", "data.label_noise.file", "either a share"),
        ("data.label_noise={file: a.jsonl}", "data.label_noise.column", "go together"),
        ("data.label_noise={file: a.jsonl, column: id}", "data.label_noise.file", "does not exist"),
        ("s3ft={}", "s3ft", "set task: sft"),
    ],
)
def test_sections_that_make_no_sense_are_refused(problems, override, key, message):
    found = problems(override)
    assert set(found) == {key}
    assert message in found[key].message


def test_a_reward_run_takes_no_rewards_and_no_methods(problems):
    text = GOOD.partition("trainer")[0].replace("preference", "reward")
    assert problems(text=text) == {}
    assert "calls no rewards" in problems("rewards=[math]", text=text)["rewards"].message
    assert (
        "head of a reward model is new"
        in problems("export={format: delta}", text=text)["export.format"].message
    )
    for name, task in (("ace", "rlvr"), ("lipo", "preference")):
        found = problems(f"methods={{{name}: }}", text=text)["methods"]
        assert "no methods" in found.message
        assert f"or set task: {task}" in found.suggestion
    adapter = "model.adapter={dropout: 0.1}"
    found = problems(adapter, text=text)["model.adapter.dropout"]
    assert (found.severity, found.suggestion) == ("warning", "set trainer.disable_dropout: false")
    assert problems(adapter, "trainer.disable_dropout=false", text=text) == {}
    found = problems("data.label_noise={share: 0.2}", text=text.replace("reward", "sft"))
    assert "no chosen and rejected to exchange" in found["data.label_noise"].message


def test_evaluation_defaults_and_the_way_back(problems, tmp_path):
    problems("evaluate={}")
    config = load_run_config("run.yaml", ["evaluate={}"])
    assert (config.evaluate.k, config.evaluate.samples) == ([1], 4)
    (tmp_path / "again.yaml").write_text(resolved_yaml(config))
    assert load_run_config("again.yaml") == config


def test_a_check_imports_no_torch(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD + "evaluate: {}\nrewards: ['model:user/scorer']\n")
    code = (
        "import sys; from posttrain.config.check import check_config; report = check_config('run.yaml'); "
        "print(report.text()); assert report.ok; assert not {'torch', 'trl', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

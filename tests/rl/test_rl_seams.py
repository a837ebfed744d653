"""One contract test per seam into trl.GRPOTrainer: if TRL changes, the failing test says where."""

import inspect

import pytest
import support
import torch
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

from posttrain.rl.formulas import aggregate
from posttrain.rl.method import Method
from posttrain.rl.seams import EpochRepeatSampler, GRPOSeams
from posttrain.rl.trainer import GRPOTrainer

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]


def build(cls, folder, **settings):
    methods = {"methods": settings.pop("methods")} if "methods" in settings else {}
    trainer = cls(
        model=support.model(),
        args=support.grpo_config(folder, **settings),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        **methods,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def rows(n=8):
    return [{"prompt": f"say {i // 4}?"} for i in range(n)]


def test_rewards_seam_returns_the_gathered_matrix(tmp_path):
    trainer = build(TRLGRPOTrainer, tmp_path)
    matrix = trainer._calculate_rewards(rows(2), ["a", "b"], ["ee", "e "], [[1], [1]])
    assert matrix.tolist() == [[1.0], [0.5]]


def test_rollout_seam_carries_row_shaped_tensors_into_the_loss(tmp_path):
    trainer = build(GRPOSeams, tmp_path, steps_per_generation=2, per_device_train_batch_size=4)
    seen = []

    def on_rollout(batch, rewards):
        assert rewards.shape == (8, 1)
        batch["row"] = torch.arange(8)
        batch["first_token"] = batch["completion_ids"][:, 0]
        return batch

    def on_tokens(batch, logps, entropies):
        assert torch.equal(batch["first_token"], batch["completion_ids"][:, 0])
        seen.extend(batch["row"].tolist())
        return batch["advantages"]

    trainer.hooked, trainer.on_rollout, trainer.on_tokens = True, on_rollout, on_tokens
    for _ in range(2):
        inputs = trainer._prepare_inputs(rows())
        trainer.compute_loss(trainer.model, inputs)
        trainer._step += 1
    assert sorted(seen) == list(range(8))


def test_statistics_seam_is_called_once_before_advantages_are_read(tmp_path):
    trainer = build(GRPOSeams, tmp_path)
    calls = []

    def on_tokens(batch, logps, entropies):
        calls.append((logps.requires_grad, entropies.requires_grad, logps.shape))
        return torch.zeros_like(logps)  # (B, C): must silence the policy term

    trainer.hooked, trainer.on_tokens = True, on_tokens
    batch = trainer._generate_and_score_completions(rows())
    loss = trainer.compute_loss(trainer.model, batch)
    assert calls == [(True, True, batch["completion_ids"].shape)]
    assert loss.item() == 0


def test_loss_seam_leaves_the_buffered_batch_alone(tmp_path):
    trainer = build(GRPOSeams, tmp_path)
    trainer.hooked = True
    trainer.on_tokens = lambda batch, logps, entropies: batch["advantages"] * 2
    batch = trainer._generate_and_score_completions(rows())
    kept = batch["advantages"].clone()
    first = trainer.compute_loss(trainer.model, batch)
    second = trainer.compute_loss(trainer.model, batch)
    assert torch.equal(batch["advantages"], kept)
    assert first.item() == second.item()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_divisor_is_the_one_of_the_loss(loss_type, training, tmp_path, monkeypatch):
    """With zero advantages TRL's loss is the aggregated KL term alone: ours must reduce it identically."""
    level = "sequence" if loss_type == "luspo" else "token"
    support.model(seed=9).save_pretrained(tmp_path / "base")
    monkeypatch.setattr("trl.trainer.grpo_trainer.get_config_model_id", lambda config: str(tmp_path / "base"))
    trainer = build(
        GRPOSeams,
        tmp_path,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.7,
        gradient_accumulation_steps=3,
        steps_per_generation=2,
        per_device_train_batch_size=4,
        use_bias_correction_kl=False,
    )
    batch = trainer._generate_and_score_completions(rows())
    batch["completion_mask"][0, 3:] = 0
    batch["completion_mask"][1] = 0
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer.model.train(training)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        live, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, batch["completion_ids"].size(1)
        )
        d = batch["ref_per_token_logps"] - live
        ours = trainer.aggregate(0.7 * (d.exp() - d - 1), batch)
    assert loss.item() > 1e-4
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)


def test_divisor_of_an_unknown_loss_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="loss_type='dappo'"):
        aggregate(one, one, "dappo", accumulation=1, max_completion_length=1, items=1)


def test_every_loss_type_of_trl_has_a_divisor():
    source = inspect.getsource(TRLGRPOTrainer._compute_loss)
    assert all(f'"{name}"' in source for name in LOSSES)
    # a name that TRL adds shows up as a new branch on self.loss_type
    assert source.count("self.loss_type ==") == 8
    assert source.count("self.loss_type in") == 4


@pytest.mark.parametrize("shuffle", [True, False])
def test_sampler_follows_upstream_over_epochs_and_jumps(shuffle):
    settings = {
        "data_source": list(range(9)),
        "mini_repeat_count": 2,
        "batch_size": 3,
        "repeat_count": 2,
        "shuffle": shuffle,
        "seed": 5,
    }
    upstream, ours = RepeatSampler(**settings), EpochRepeatSampler(**settings)
    epochs = [list(upstream) for _ in range(4)]
    for epoch in (0, 1, 2, 3, 1, 3, 0):
        ours.set_epoch(epoch)
        assert list(ours) == epochs[epoch]
    if shuffle:
        assert epochs[0] != epochs[1]


def test_logs_seam_holds_the_latest_generation(tmp_path):
    trainer = build(GRPOSeams, tmp_path)
    batch = trainer._generate_and_score_completions(rows())
    latest = trainer.last_completions()
    assert [row["prompt"] for row in latest] == [row["prompt"] for row in rows()]
    assert [row["advantage"] for row in latest] == batch["advantages"].tolist()
    for row in latest:
        assert row["rewards"] == {
            "letter_reward": pytest.approx(support.letter_reward([row["completion"]])[0])
        }


def test_group_rewards(tmp_path):
    trainer = build(GRPOSeams, tmp_path)
    trainer.reward_weights = torch.tensor([1.0, 0.5])
    nan = float("nan")
    matrix = torch.tensor(
        [[0.1, 0.0]] * 4 + [[1.0, 0.0], [0.5, 1.0], [nan, nan], [1.0, nan]] + [[0.0, 0.0]] * 3 + [[1.0, 0.0]]
    )
    reward, tied = trainer.group_rewards(matrix)
    assert reward.isnan().tolist() == [False] * 6 + [True] + [False] * 5
    assert reward[[0, 4, 5, 7]].tolist() == pytest.approx([0.1, 1.0, 1.0, 1.0])
    assert tied.tolist() == [True] * 8 + [False] * 4
    trainer.multi_objective_aggregation = "normalize_then_sum"
    assert trainer.group_rewards(matrix)[1].tolist() == [True] * 4 + [False] * 8


# ---- stages, through a method that uses all of them -------------------------------------------------------


class Everything(Method):
    name = "everything"
    title = "uses every stage"

    def rewards(self, rewards):
        return rewards * 2

    def advantages(self, rollout):
        rollout.carry["double"] = rollout.reward * 2
        assert torch.equal(rollout.rewards[:, 0], rollout.reward)
        return rollout.advantages.unsqueeze(1) * rollout.mask

    def token_weights(self, tokens):
        assert torch.equal(tokens.carry["double"], tokens.reward * 2)
        weights = torch.ones_like(tokens.logps)
        weights[:, 0] = 0  # the first token does not count
        return weights

    def token_penalty(self, tokens):
        tokens.gauges.mean("entropy", tokens.entropies, tokens.mask)
        return -0.25 * tokens.entropies


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_stages_change_what_they_say(loss_type, tmp_path):
    trainer = build(GRPOTrainer, tmp_path, methods=[Everything()], loss_type=loss_type, scale_rewards="none")
    plain = build(TRLGRPOTrainer, tmp_path / "trl", loss_type=loss_type, scale_rewards="none")
    torch.manual_seed(1)
    batch = trainer._generate_and_score_completions(rows())
    torch.manual_seed(1)
    reference = plain._generate_and_score_completions(rows())
    mask = reference["completion_mask"]
    assert torch.allclose(batch["advantages"], 2 * reference["advantages"].unsqueeze(1) * mask)

    loss = trainer.compute_loss(trainer.model, batch)
    chosen = 2 * reference["advantages"].unsqueeze(1) * mask
    chosen[:, 0] = 0
    policy = plain.compute_loss(plain.model, reference | {"advantages": chosen})
    entropy = plain._metrics["train"]["entropy"][-1]
    # the entropy term has the divisor of the loss: compare with TRL's own per-token mean where they agree
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], mask], 1)
    _, entropies, _ = plain._get_per_token_logps_and_entropies(
        plain.model, ids, attention, mask.size(1), compute_entropy=True
    )
    divisor = {"grpo": None, "dapo": mask.sum(), "bnpo": mask.sum(), "dr_grpo": mask.size(0) * 8}[loss_type]
    if divisor is None:
        bonus = ((entropies * mask).sum(1) / mask.sum(1)).mean()
    else:
        bonus = (entropies * mask).sum() / divisor
    assert loss.item() == pytest.approx((policy - 0.25 * bonus).item(), abs=1e-6)
    assert trainer._metrics["train"]["everything/entropy"] == [pytest.approx(entropy, abs=1e-6)]


def test_methods_must_be_methods(tmp_path):
    with pytest.raises(TypeError, match="takes instances such as ACE"):
        build(GRPOTrainer, tmp_path, methods=["ace"])
    with pytest.raises(ValueError, match="everything more than once"):
        build(GRPOTrainer, tmp_path, methods=[Everything(), Everything()])


def test_a_second_rollout_in_the_same_step_is_whole_and_leaves_no_trace_in_the_log(tmp_path):
    """Generations of refills and extra rows: TRL scores them like the first, its log stays as it was."""
    trainer = build(
        GRPOTrainer, tmp_path, methods=[Everything()], per_device_train_batch_size=4, steps_per_generation=2
    )
    batch = trainer._generate_and_score_completions(rows())
    metrics = {
        name: list(values) for name, values in trainer._metrics["train"].items() if name != "num_tokens"
    }
    table = trainer.last_completions()
    tokens = trainer.state.num_input_tokens_seen
    made = trainer.generate_groups([{"prompt": "name a 3?"}, {"prompt": "spell 5?"}])
    assert made.rewards.shape == (8, 1)
    assert made.batch["old_per_token_logps"].shape == made.batch["completion_ids"].shape
    assert {len(value) for value in made.batch.values()} == {8}
    assert made.log["prompt",] == ["name a 3?"] * 4 + ["spell 5?"] * 4
    assert made.log["rewards", "letter_reward"] == made.rewards[:, 0].tolist()
    after = {name: list(values) for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    assert after == metrics
    assert trainer.last_completions() == table
    assert trainer.state.num_input_tokens_seen == tokens + int(made.tokens.sum()) + int(
        made.batch["prompt_mask"].sum()
    )
    assert len(batch["prompt_ids"]) == 8


def test_vllm_reads_its_temperature_at_each_generation():
    """Extra rows change it between two generations; the path without vLLM is tested with a model."""
    source = inspect.getsource(VLLMGeneration.generate)
    assert "temperature = self.temperature" in source
    assert "self.temperature = temperature" in inspect.getsource(VLLMGeneration.__init__)

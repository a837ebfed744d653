"""TTRL in the trainer: what trains, what the data may not reach, and the same run on one rank and on two."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import support
import torch
from trl import GRPOTrainer as TRLGRPOTrainer
from ttrl_ranks import build, rollout, verifier

from posttrain import GRPOTrainer
from posttrain.config.check import check_config
from posttrain.rl import ACE, AEPO, TTRL, Spine
from posttrain.rl.formulas import group_advantages
from posttrain.rl.seams import GRPOSeams
from posttrain.rl.ttrl import read_answer, unlabelled

TESTS = Path(__file__).resolve().parents[1]


def vote(n_votes=8, n_samples=8, **options):
    return TTRL(n_votes=n_votes, n_samples=n_samples, extract="last_number", equivalence="exact", **options)


def plain_majority(completions, **kwargs):
    """The vote written out once more, as an ordinary reward function over groups of eight."""
    rewards = []
    for start in range(0, len(completions), 8):
        answers = [read_answer(text, "last_number") for text in completions[start : start + 8]]
        counts = Counter(answer for answer in answers if answer)
        label = max(counts, key=lambda answer: (counts[answer], -answers.index(answer)))
        rewards += [float(answer == label) for answer in answers]
    return rewards


def trained(folder, methods, reward, **settings):
    trainer = build(folder, methods, reward, **settings)
    trainer.train()
    return trainer


def test_all_votes_train_is_grpo_on_the_vote(tmp_path):
    """Bit for bit: a supervised run whose verifier says what the majority says."""
    ours = trained(tmp_path / "ours", [vote()], verifier)
    theirs = trained(tmp_path / "theirs", [], plain_majority)
    support.assert_same(support.weights(ours.model), support.weights(theirs.model))
    losses = [support.logged(trainer, "loss", "grad_norm", "reward") for trainer in (ours, theirs)]
    assert losses[0] == losses[1]
    assert any(abs(loss) > 1e-3 or norm > 1e-2 for loss, norm, _ in losses[0])


@pytest.mark.parametrize("n_samples", [8, 4])
def test_gold_never_reaches_the_weights(n_samples, tmp_path):
    def broken(completions, **kwargs):
        return [None if i % 3 else float(i) for i in range(len(completions))]

    weights = [
        support.weights(trained(tmp_path / str(i), [vote(n_samples=n_samples)], gold).model)
        for i, gold in enumerate(
            [
                verifier,
                lambda completions, **kwargs: [1.0 - x for x in verifier(completions)],
                broken,
                unlabelled,
            ]
        )
    ]
    for other in weights[1:]:
        support.assert_same(weights[0], other)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_rows_train(loss_type, steps, tmp_path):
    """Against TRL's own loss on rows picked by hand, with advantages written out."""
    settings = {
        "loss_type": loss_type,
        "gradient_accumulation_steps": steps,
        "per_device_train_batch_size": 16 // steps,
    }
    trainer = build(tmp_path, [vote(n_samples=4)], verifier, **settings)
    trainer.current_gradient_accumulation_steps = steps
    trainer.model.train()
    rows = [{"prompt": f"what is {i // 8 + 3}?"} for i in range(16)]
    batch = trainer._generate_and_score_completions(rows)
    first = [0, 1, 2, 3, 8, 9, 10, 11]
    said = rollout([row["prompt"] for row in rows], trainer)["completion_ids"]
    assert [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ] == [said[i] for i in first]
    rewards = torch.tensor(plain_majority(support.tokenizer().batch_decode(said, skip_special_tokens=True)))[
        first
    ]
    groups = rewards.view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(batch["advantages"], expected.flatten(), atol=1e-6)
    assert batch["advantages"].abs().max() > 0.4
    assert batch["num_items_in_batch"].item() == sum(len(said[i]) for i in first)
    assert torch.equal(batch["posttrain/reward"], rewards)
    shown = list(trainer._logs["advantages"])
    assert [shown[i] for i in first] == pytest.approx(batch["advantages"].tolist())
    assert all(shown[i] == 0 for i in range(16) if i not in first)
    # the loss of the micro-steps is TRL's on those rows
    parts = [
        {k: v[i : i + 8 // steps] if v.dim() else v for k, v in batch.items()}
        for i in range(0, 8, 8 // steps)
    ]
    ours = sum(trainer.compute_loss(trainer.model, part) for part in parts)
    trainer.hooked = False
    whole = sum(trainer.compute_loss(trainer.model, part) for part in parts)
    assert ours.item() == whole.item()
    logps = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        batch["completion_ids"].size(1),
    )[0]
    mask, advantages = batch["completion_mask"], batch["advantages"].unsqueeze(1)
    surrogate = -advantages * logps.exp() / logps.exp().detach() * mask
    by_hand = {
        "dapo": surrogate.sum() / mask.sum(),
        "grpo": (surrogate.sum(1) / mask.sum(1)).mean(),
        "bnpo": sum(
            s.sum() / m.sum()
            for s, m in zip(surrogate.split(8 // steps), mask.split(8 // steps), strict=True)
        )
        / steps,
    }[loss_type]
    assert ours.item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_ties_are_of_the_rows_that_train(tmp_path):
    """A group whose kept rows agree has no errors for ACE, although the whole group disagrees."""
    trainer = build(tmp_path, [vote(n_samples=2)], verifier)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(
        [{"prompt": f"what is {(3, 8)[i // 8]}?"} for i in range(16)]
    )
    rewards = batch["posttrain/reward"].view(-1, 2)
    assert torch.equal(batch["posttrain/tied"].view(-1, 2)[:, 0], rewards[:, 0] == rewards[:, 1])
    assert batch["posttrain/tied"].tolist() == [False, False, True, True]


def test_evaluation_is_scored_by_the_verifier(tmp_path):
    trainer = build(tmp_path, [vote(n_samples=4)], verifier, per_device_eval_batch_size=16)
    trainer.eval_dataset = support.prompts(4)
    rows = [{"prompt": f"what is {i // 8 + 3}?"} for i in range(16)]
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(rows)
    said = support.tokenizer().batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert batch["posttrain/reward"].tolist() == verifier(said)
    assert batch["completion_ids"].size(0) == 16


def test_composes_with_ace_and_spine(tmp_path):
    trainer = trained(tmp_path, [vote(n_samples=4), ACE(), Spine()], verifier, max_steps=3)
    logs = support.logged(trainer, "ttrl/label_accuracy", "ace/error_rows", "spine/fork_share")
    assert len(logs) == 3
    assert all(0 < forks < 1 for _, _, forks in logs)
    assert any(errors > 0 for _, errors, _ in logs)


class Digits(GRPOTrainer):
    """Five of eight samples say the prompt's digit; among tempered ones two do, and five the next digit."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        hot = self.generation_config.temperature > 1
        ids = []
        for i, prompt in enumerate(self._tokenizer.batch_decode(prompt_ids)):
            digit = int("".join(filter(str.isdigit, prompt))) % 8
            added = ((0, 1, 1, 2, 1, 1, 0, 1) if hot else (0, 1, 0, 0, 2, 0, 0, 1))[i % 8]
            ids.append([*self._tokenizer(f"so {digit + added}")["input_ids"], 1])
        return ids, None


@pytest.mark.parametrize("n_samples", [8, 4])
@pytest.mark.parametrize("mode", ["replace", "alpha"])
def test_tempered_samples_are_judged_by_the_vote_of_the_main_group(mode, n_samples, tmp_path, caplog):
    trainer = Digits(
        model=support.model(),
        args=support.grpo_config(
            tmp_path, num_generations=8, per_device_train_batch_size=32, max_completion_length=12, max_steps=2
        ),
        reward_funcs=verifier,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        methods=[vote(n_samples=n_samples), AEPO(mode=mode, aux_prompt_fraction=0.5)],
    )
    assert "vote of the main group" in caplog.text
    batch = trainer._generate_and_score_completions([{"prompt": f"say {i // 8}?"} for i in range(32)])
    extra = batch["posttrain/extra"]
    texts = trainer.texts_of({k: batch[k][extra] for k in ("completion_ids", "completion_mask")})
    learned = [text for text, a in zip(texts, batch["advantages"][extra], strict=True) if a.max() > 0]
    assert learned == ["so 0", "so 0", "so 1", "so 1"]  # two groups were sampled again
    assert len(texts) == (4 if mode == "replace" else 16)
    trainer.train()
    assert support.logged(trainer, "aepo/positive")[0] == pytest.approx([0.25])


def test_uneven_rows_are_refused(tmp_path):
    class Uneven(TTRL):
        def keep_rows(self, rewards):
            kept = super().keep_rows(rewards)
            kept[0, 0] = False
            return kept

    method = Uneven(n_votes=8, n_samples=4, equivalence="exact")
    with pytest.raises(
        ValueError, match=r"equally many in every group.*found \[3, 4\] per group and \[7\] per rank"
    ):
        trained(tmp_path, [method], verifier)
    with pytest.raises(ValueError, match=r"would keep 0\.5 of them"):
        build(
            tmp_path,
            [vote(n_samples=4)],
            verifier,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
        )


def test_several_reward_functions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the only reward, found 2 reward functions"):
        build(tmp_path, [vote()], [verifier, unlabelled])


def test_images_cannot_be_taken_apart(tmp_path):
    trainer = build(tmp_path, [vote()], verifier)
    batch = {"prompt_ids": torch.zeros(4, 2), "pixel_values": torch.zeros(7, 3)}
    with pytest.raises(ValueError, match="batch with images"):
        trainer.select_rows(batch, torch.tensor([0]))


# ---- seams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale, aggregation, tmp_path, monkeypatch):
    """At TRL's own group size, with rows that nobody scored, equal groups and two weighted functions."""
    nan = float("nan")
    rewards = torch.tensor(
        [[0.1, 1.0], [0.7, nan], [nan, nan], [0.2, -1.0], [0.5, 2], [0.5, 2], [0.5, 2], [0.5, 2]]
    )
    trainer = GRPOSeams(
        model=support.model(),
        args=support.grpo_config(
            tmp_path, scale_rewards=scale, multi_objective_aggregation=aggregation, reward_weights=[1.0, 0.25]
        ),
        reward_funcs=[support.letter_reward, support.letter_reward],
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
    )
    trainer.model.train()
    monkeypatch.setattr(TRLGRPOTrainer, "_calculate_rewards", lambda *args: rewards.clone())
    batch = trainer._generate_and_score_completions([{"prompt": f"say {i // 4}?"} for i in range(8)])
    assert torch.equal(trainer.advantages_of(rewards, 4), batch["advantages"])
    assert batch["advantages"][[1, 3]].abs().min() > 0.05
    assert batch["advantages"][2] == 0
    halves = group_advantages(rewards, torch.tensor([1.0, 0.25]), 2, scale=scale, aggregation=aggregation)
    assert not torch.allclose(halves, batch["advantages"])


def test_which_completions_were_cut(tmp_path):
    trainer = build(tmp_path, [vote()], verifier)
    trainer._scored = (["a", "b", "c", ""], [[5, 6, 1], [5, 6, 7], [5, 0], []], ["?"] * 4)
    assert trainer.scored_completions() == (["a", "b", "c", ""], [False, True, False, True], ["?"] * 4)


# ---- resume -----------------------------------------------------------------------------------------------


def test_resume_in_the_middle_of_a_generation(tmp_path):
    """The buffered rows are the ones that train."""
    settings = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 4}
    once = trained(tmp_path / "once", [vote(n_samples=4)], verifier, **settings)
    first = build(
        tmp_path / "twice", [vote(n_samples=4)], verifier, save_strategy="steps", save_steps=3, **settings
    )
    first.train()
    again = build(tmp_path / "twice", [vote(n_samples=4)], verifier, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-3"))
    support.assert_same(support.weights(again.model), support.weights(once.model))


# ---- configuration ----------------------------------------------------------------------------------------

CONFIG = """
task: ttrl
data: {source: "reasoning_gym:chain_sum"}
rewards: REWARDS
methods: METHODS
trainer: {num_generations: 8, per_device_train_batch_size: 16}
"""


def problems(tmp_path, rewards="[]", methods="{ttrl: {n_votes: 8, n_samples: 4}}"):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("REWARDS", rewards).replace("METHODS", methods))
    return [(problem.where.rpartition(":")[2], problem.message) for problem in check_config(path).problems]


def test_task(tmp_path):
    assert problems(tmp_path) == []
    assert problems(tmp_path, rewards="[verifier]") == []
    assert problems(tmp_path, methods="{ttrl: {n_votes: 8, n_samples: 4}, ace: }") == [
        ("5", "ACE with TTRL also amplifies right answers that were outvoted")
    ]


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        ({"methods": "{}"}, "5", "task 'ttrl' needs the method 'ttrl'"),
        ({"methods": "{spine: }"}, "5", "task 'ttrl' needs the method 'ttrl'"),
        ({"rewards": "[verifier, {format: {params: {pattern: x}}}]"}, "5", "the only reward, found 2"),
        (
            {"methods": "{ttrl: {n_votes: 4, n_samples: 2}}"},
            "6",
            "n_votes=4 samples per prompt, found num_generations=8",
        ),
        ({"methods": "{ttrl: {n_votes: 4, n_samples: 8}}"}, "5", "n_samples=8 rows cannot train"),
    ],
)
def test_task_refuses(change, line, message, tmp_path):
    ((where, text),) = problems(tmp_path, **change)
    assert where == line
    assert message in text


def test_configs_load_except_for_what_this_machine_lacks():
    root = TESTS.parent / "configs" / "rlvr"
    assert check_config(root / "ttrl_cpu.yaml").ok
    errors = [
        p.message for p in check_config(root / "spine_ttrl_qwen.yaml").problems if p.severity == "error"
    ]
    assert all("needs the package vllm" in message for message in errors)


@pytest.mark.slow
def test_label_free_run_from_a_configuration(tmp_path):
    """No reward at all: the command trains, and says how the vote went."""
    config = f"""
task: ttrl
run_dir: {tmp_path / "run"}
threads: 1
model: {{path: "embedded:char-llama"}}
data: {{source: "reasoning_gym:chain_sum", train: {{size: 32}}, prompt_pattern: ": (.*)"}}
methods: {{ttrl: {{n_votes: 4, n_samples: 2, extract: text, equivalence: exact}}}}
trainer: {{max_steps: 2, per_device_train_batch_size: 8, num_generations: 4, logging_steps: 1,
          max_completion_length: 2}}
"""
    (tmp_path / "config.yaml").write_text(config)
    command = [sys.executable, "-m", "posttrain", "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ratios = [line["ttrl/majority_ratio"] for line in lines if "ttrl/majority_ratio" in line]
    assert len(ratios) == 2
    assert all(0.25 <= ratio <= 1 for ratio in ratios)


# ---- two ranks --------------------------------------------------------------------------------------------


def run(tmp_path, name, *, per_device, accumulation=1, ranks=1, n_samples=8):
    out = tmp_path / name / "result.json"
    out.parent.mkdir()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        *launcher,
        str(TESTS / "rl" / "ttrl_ranks.py"),
        str(out),
        *map(str, (per_device, accumulation, n_samples)),
    ]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("n_samples", [8, 4])
def test_two_ranks_and_two_steps_are_one(n_samples, tmp_path):
    one = run(tmp_path, "one", per_device=16, n_samples=n_samples)
    two = run(tmp_path, "two", per_device=8, ranks=2, n_samples=n_samples)
    split = run(tmp_path, "split", per_device=8, accumulation=2, n_samples=n_samples)
    for other in (two, split):
        for a, b in zip(one["logs"], other["logs"], strict=True):
            assert a == pytest.approx(b, rel=2e-4, abs=2e-6)
        assert one["weights"] == pytest.approx(other["weights"], abs=1e-4)
    assert {round(row[3], 3) for row in one["logs"]} != {1.0}


@pytest.mark.slow
def test_groups_may_lie_on_two_ranks(tmp_path):
    """One group of eight, four rows on each rank: the vote needs both halves."""
    one = run(tmp_path, "one", per_device=8)
    two = run(tmp_path, "two", per_device=4, ranks=2)
    for a, b in zip(one["logs"], two["logs"], strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-6)
    assert one["weights"] == pytest.approx(two["weights"], abs=1e-4)

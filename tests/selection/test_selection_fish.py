"""FISH: per-example squares by hand and against explicit loops; the model is left as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
import torch
from peft import get_peft_model

from posttrain import Select, SFTTrainer
from posttrain.selection.fish import FISH, fisher, negative_log_likelihood, single_rows
from posttrain.selection.plan import PlanError
from posttrain.selection.selector import norm_names

TESTS = Path(__file__).resolve().parents[1]


class Unigram(torch.nn.Module):
    """Logits are the parameter itself: d log p / d theta = counts - tokens * softmax(theta)."""

    def __init__(self, size, dtype=torch.float32):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.theta.expand(*input_ids.shape, -1))


class Linear(torch.nn.Module):
    """log p whose gradient is the row of ``gradients`` that the first token names."""

    def __init__(self, gradients):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
        self.gradients = gradients

    def forward(self, input_ids):
        value = self.gradients[input_ids[0, 0]] @ self.theta
        # log p of the first of the logits 2x and 0 has slope 1 in x at x = 0
        return SimpleNamespace(logits=torch.stack([2 * value, torch.zeros(())]).expand(*input_ids.shape, -1))


def batch(*rows, labels=None):
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids.clone() if labels is None else torch.tensor(labels)}


def test_squares_are_per_example_not_of_the_mean():
    """The sheet's rows; two equal logits give a slope of 1/2, undone by the factor 2."""
    rows = torch.tensor([[1.0, 0.5, 0.0, 0.2], [-1.0, 0.5, 0.1, 0.2]])
    model = Linear(rows)
    examples = [batch([0, 0], labels=[[-100, 0]]), batch([1, 0], labels=[[-100, 0]])]
    squares, used = fisher(model, {"theta": model.theta}, examples, power="square")
    assert squares["theta"].tolist() == pytest.approx([2, 0.5, 0.01, 0.08])
    sizes, _ = fisher(model, {"theta": model.theta}, examples, power="abs")
    assert sizes["theta"].tolist() == pytest.approx([2, 1, 0.1, 0.4])
    assert used == 2
    plan = FISH(budget=2).select(model, batches=examples)
    assert plan.tensors["theta"].flat().tolist() == [0, 1]
    plan = FISH(budget=3).select(model, batches=examples)
    assert plan.tensors["theta"].flat().tolist() == [0, 1, 3]
    assert plan.config["examples"] == 2


def test_six_weights_by_hand():
    """Uniform p = 1/6. A: tokens 3, 3, 3; B: token 1; C has no completion and adds 0.

    A = counts - 3/6: [-.5, -.5, -.5, 2.5, -.5, -.5]; B = counts - 1/6: [-1/6, 5/6, -1/6, ...].
    A mean over tokens instead of the sum would rank 1 before 3.
    """
    rows = [
        batch([0, 3, 3, 3], labels=[[-100, 3, 3, 3]]),
        batch([0, 1, 2, 2], labels=[[-100, 1, -100, -100]]),
        batch([5, 5, 5, 5], labels=[[-100] * 4]),
    ]
    model = Unigram(6)
    scores, used = fisher(model, {"theta": model.theta}, rows, power="square")
    other = 0.25 + 1 / 36
    assert scores["theta"].tolist() == pytest.approx(
        [other, 0.25 + 25 / 36, other, 6.25 + 1 / 36, other, other]
    )
    assert used == 2
    assert model.theta.grad is None
    assert FISH(budget=0.5).select(model, batches=rows).tensors["theta"].flat().tolist() == [0, 1, 3]  # tie


def test_rows_of_a_padded_batch_are_scored_one_by_one():
    model = support.model(tied=True)
    examples = [[5, 6, 7, 8, 9], [10, 11, 12]]
    alone = [batch(row) for row in examples]
    padded = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]]),
        "labels": torch.tensor([[5, 6, 7, 8, 9], [-100, -100, 10, 11, 12]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    }
    rows = list(single_rows(padded))
    assert [row["input_ids"].tolist() for row in rows] == [[row] for row in examples]
    assert FISH(budget=200).select(model, batches=[padded]) == FISH(budget=200).select(model, batches=alone)
    expected = torch.zeros_like(model.lm_head.weight)
    for row in alone:
        loss = negative_log_likelihood(model, row)
        (gradient,) = torch.autograd.grad(loss, [model.lm_head.weight])
        assert loss.item() == pytest.approx(
            model(**row, use_cache=False).loss.item() * (row["input_ids"].shape[1] - 1), rel=1e-5
        )
        expected += gradient**2
    scores, _ = fisher(model, {"head": model.lm_head.weight}, rows, power="square")
    assert torch.allclose(scores["head"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["label", "expect"])
def test_the_model_is_left_as_it_was(kind):
    """Modes (mixed), requires_grad, earlier gradients, weights, the global random state."""
    model = support.model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    weights, modes = support.weights(model), [m.training for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    selector = FISH(budget=100, kind=kind, exclude=("layers.1",))
    plan = selector.select(model, batches=[batch([5, 6, 7, 8])])
    assert plan == selector.select(model, batches=[batch([5, 6, 7, 8])])  # dropout would differ
    assert plan.count == 100
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert model.lm_head.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")
    support.assert_same(support.weights(model), weights)
    assert plan.tensors["model.norm.weight"].kind == "none"
    assert not any(plan.tensors[name].count for name in plan.tensors if "layers.1" in name)


def test_expect_samples_the_models_own_completions():
    """A model that is certain of token 7: its own completions have no gradient, those of the data do."""
    model = support.model()
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.fill_(0)
        model.lm_head.weight[7] = 1e3
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.fill_(0)
            layer.mlp.down_proj.weight.fill_(0)
    rows = [batch([5, 6, 9, 9], labels=[[-100, -100, 9, 9]])]
    model.generation_config.temperature, model.generation_config.max_new_tokens = 100.0, 1
    with pytest.raises(ValueError, match="no example with completion tokens"):
        FISH().select(model, batches=[batch([5, 6], labels=[[-100, -100]])])
    parameters = {"head": model.lm_head.weight}
    label, _ = fisher(model, parameters, rows, power="square")
    sampled = list(FISH(kind="expect")._rows(model, rows, torch.Generator(), 0, 1))
    assert sampled[0]["input_ids"].tolist() == [[5, 6, 7, 7]]
    assert sampled[0]["labels"].tolist() == [[-100, -100, 7, 7]]
    own, _ = fisher(model, parameters, sampled, power="square")
    assert label["head"].max() > 1
    assert own["head"].max() == 0
    with pytest.raises(ValueError, match="cannot generate"):
        FISH(budget=1, kind="expect").select(Unigram(4), batches=[batch([1, 2])])


def test_bf16_sums_in_fp32_and_lora_scores_the_adapter():
    model = Unigram(4, torch.bfloat16)
    rows = [batch([0, 1], labels=[[-100, 1]])] * 600
    scores, _ = fisher(model, {"theta": model.theta}, rows, power="square")
    assert scores["theta"].dtype == torch.float32
    assert scores["theta"].tolist() == pytest.approx([37.5, 337.5, 37.5, 37.5])  # bf16 would stop at 256
    adapted = get_peft_model(support.model(), support.lora())
    plan = FISH(budget=0.25).select(adapted, batches=[batch([5, 6, 7, 8])])
    assert {name for name, part in plan.tensors.items() if part.kind != "none"} <= {
        name for name in plan.tensors if "lora_B" in name
    }


def test_fresh_heads_and_mistakes():
    model = support.model()
    rows = [batch([5, 6, 7, 8])]
    head = model.lm_head.weight.numel()
    plan = FISH(budget=head + 10, always_train=("lm_head",)).select(model, batches=rows)
    assert plan.tensors["lm_head.weight"].kind == "all"
    assert plan.count == head + 10
    with pytest.raises(ValueError, match="the whole budget"):
        FISH(budget=head, always_train=("lm_head",)).select(model, batches=rows)
    for wrong, reason in (
        (None, "found none"),
        ({"forget": rows}, "several sets, forget"),
        ([{"input_ids": torch.ones(1, 3)}], "input_ids and labels"),
        ([{**batch([5, 6, 7]), "position_ids": torch.tensor([[0, 1, 0]])}], "joins several sequences"),
    ):
        with pytest.raises(ValueError, match=reason):
            FISH().select(model, batches=wrong)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(PlanError, match="finds no candidates"):
        FISH().select(model, batches=rows)


def trainer(folder, **settings):
    return SFTTrainer(
        model=support.model(tied=True),
        args=support.sft_config(folder, max_steps=3, **settings),
        train_dataset=support.answers(24),
        processing_class=support.tokenizer(),
        selection=Select(FISH(budget=0.01, norms=False), examples=12),
    )


def test_a_trainer_gives_it_the_data(tmp_path):
    made = trainer(tmp_path)
    plan = made.selection.plan
    assert plan.config["examples"] == 12
    assert not any(plan.tensors[name].count for name in norm_names(support.model(tied=True)))
    assert made.selection.backend == "packed"
    assert (
        plan.count
        == sum(p.numel() for n, p in support.model(tied=True).named_parameters() if "norm" not in n) // 100
    )
    made.train()
    start = dict(support.model(tied=True).named_parameters())
    made.selection.remove()
    for name, tensor in made.model.named_parameters():
        assert not ((tensor != start[name]) & ~plan.tensors[name].mask()).any(), name


def _ranks(folder: str) -> None:
    """Run under torchrun, or alone."""
    torch.set_num_threads(1)
    made = trainer(folder, per_device_train_batch_size=2)
    ranks = made.args.world_size
    found = {name: part.flat().tolist() for name, part in made.selection.plan.touched.items()}
    about = [found, made.selection.plan.config["examples"]]
    Path(folder, f"rank{made.args.process_index}of{ranks}.json").write_text(json.dumps(about))


@pytest.mark.slow
def test_ranks_share_the_work_and_choose_the_same(tmp_path):
    for ranks in (1, 2):
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*launcher, __file__, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (
        json.loads((tmp_path / f"rank{name}.json").read_text()) for name in ("0of1", "0of2", "1of2")
    )
    assert first == second
    assert first == alone


if __name__ == "__main__":
    _ranks(sys.argv[1])
    support.leave()

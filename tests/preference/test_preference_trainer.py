"""DPOTrainer: TRL bit for bit without methods, and the score of the stages with them."""

import math
from types import SimpleNamespace

import pairs
import pytest
import support
import torch
from peft import LoraConfig
from trl import DPOTrainer as TRLDPOTrainer

from posttrain.preference.method import Batch, Method
from posttrain.rl.method import Conflict

LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


class Ones(Method):
    """Takes part in every stage and changes nothing."""

    name = "ones"
    title = "ones"

    @property
    def needs(self):
        return frozenset({"token_logps"})

    def token_weights(self, batch):
        return torch.ones_like(batch.logps)

    def token_scores(self, batch):
        return torch.full_like(batch.logps, torch.nan).masked_fill(batch.mask, 0.0)

    def row_weights(self, batch):
        return torch.ones_like(batch.sums)


class Affine(Method):
    """S = r sum w rho + sum a with constants."""

    name = "affine"
    title = "affine"
    weight: float = 0.5
    term: float = 0.25
    row: float = 2.0
    cost: float = 0.0

    @property
    def needs(self):
        return frozenset({"token_logps"})

    def token_weights(self, batch):
        return torch.full_like(batch.logps, self.weight)

    def token_scores(self, batch):
        return self.term * batch.logps

    def row_weights(self, batch):
        return torch.where(batch.chosen, 1.0, self.row)

    def penalty(self, batch):
        return self.cost * batch.sums.mean()

    def watch(self, batch, scores):
        batch.gauges.mean("score", scores)


class Squared(Method):
    """Another loss of the scores."""

    name = "squared"
    title = "squared"
    replaces_loss = True

    @property
    def wants_ids(self):
        return True

    def loss(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        chosen, rejected = scores.chunk(2)
        self.model_config.setdefault("seen", []).append(batch.ids.tolist())
        return (chosen - rejected - 1).square().mean()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("methods", [[], [Ones()]], ids=["none", "ones"])
def test_is_trl_for_every_loss(tmp_path, loss, methods):
    smoothing = 0.1 if loss in ("exo_pair", "robust", "aot") else 0.0
    settings = {"loss_type": loss, "label_smoothing": smoothing, "beta": 0.3, "max_steps": 3}
    ours = pairs.trainer(tmp_path / "a", methods=methods, **settings)
    theirs = pairs.trainer(tmp_path / "b", trl=True, **settings)
    pairs.assert_trl_equal(ours, theirs)


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
SETTINGS = {
    "lora": {"peft_config": LORA},
    "lora bf16, checkpointing": {
        "peft_config": LORA,
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
    "ld_alpha": {"ld_alpha": 0.4},
    "wpo, mixed, js": {
        "use_weighting": True,  # upstream fails beside hinge and sft
        "loss_type": ["sigmoid", "ipo"],
        "loss_weights": [0.5, 0.2],
        "f_divergence_type": "js_divergence",
    },
    "precomputed": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "eval_data": pairs.rows(6), "max_length": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_is_trl_in_every_setting(tmp_path, name):
    ours = pairs.trainer(tmp_path / "a", max_steps=6, **SETTINGS[name])
    theirs = pairs.trainer(tmp_path / "b", trl=True, max_steps=6, **SETTINGS[name])
    pairs.assert_trl_equal(ours, theirs)


def direct_loss(run, inputs, method, beta):
    """The loss from full logits, in float64."""

    def token_logps(model):
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        logits = model.double()(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return torch.where(mask, logps, 0.0)

    policy, reference = support.model(), support.model(seed=1)
    logps, ref = token_logps(policy), token_logps(reference).detach()
    half = len(logps) // 2
    factor = torch.tensor([1.0] * half + [method.row] * half).double()
    score = factor * method.weight * (logps - ref).sum(1) + method.term * logps.sum(1)
    loss = -torch.nn.functional.logsigmoid(beta * (score[:half] - score[half:])).mean()
    loss = loss + method.cost * logps.sum(1).mean()
    loss.backward()
    return loss, {name: p.grad for name, p in policy.named_parameters()}


def test_score_and_gradient_from_full_logits(tmp_path):
    method = Affine(cost=0.01)
    run = pairs.trainer(tmp_path, methods=[method], reference=support.model(seed=1), beta=0.3)
    inputs = next(iter(run.get_train_dataloader()))
    loss = run.compute_loss(run.model, inputs)
    loss.backward()
    expected, gradients = direct_loss(run, inputs, method, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in run.model.named_parameters():
        assert torch.allclose(parameter.grad.double(), gradients[name], rtol=1e-3, atol=1e-6), name


def test_swapped_pairs_mirror_the_margin(tmp_path):
    data = pairs.rows(4)
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    losses = []
    for rows in (data, swapped):
        run = pairs.trainer(
            tmp_path, data=rows, reference=support.model(seed=1), loss_type="hinge", beta=0.01
        )
        losses.append(run.compute_loss(run.model, run.data_collator(list(run.train_dataset))).item())
    assert losses[0] - 1 == pytest.approx(1 - losses[1], abs=1e-5)
    assert losses[0] != pytest.approx(1, abs=1e-4)


def test_another_loss_and_numbered_rows(tmp_path):
    method = Squared()
    method.model_config.pop("seen", None)
    data = pairs.rows(8)
    run = pairs.trainer(tmp_path, methods=[method], data=data, max_steps=2, reference=support.model(seed=1))
    logs = pairs.history(run)
    seen = method.model_config.pop("seen")
    assert sorted(place for batch in seen for place in batch) == list(range(8))
    assert logs[0]["loss"] > 0.5  # (margin - 1)^2, not a log-sigmoid
    assert math.isfinite(logs[-1]["train_loss"])


def test_a_reference_that_moves_is_resumed(tmp_path):
    def build(name):
        return pairs.trainer(
            tmp_path / name, max_steps=4, save_strategy="steps", save_steps=3, sync_ref_model=True,
            ref_model_sync_steps=2, ref_model_mixup_alpha=0.5,
        )  # fmt: skip

    whole, again = build("whole"), build("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    support.assert_same(support.weights(whole.ref_model), support.weights(again.ref_model))
    support.assert_same(support.weights(whole.model), support.weights(again.model))
    assert not torch.equal(whole.ref_model.lm_head.weight, support.model().lm_head.weight)


def test_rows_in_memory_are_written_for_other_ranks(tmp_path, monkeypatch):
    """TRL keeps the reference's sums beside the rows; without a file every rank would look elsewhere."""
    run = pairs.trainer(tmp_path)
    seen = []
    monkeypatch.setattr(TRLDPOTrainer, "_precompute_ref_logps", lambda _, dataset, *__: seen.append(dataset))
    for ranks in (1, 2):
        run.accelerator = SimpleNamespace(
            num_processes=ranks, is_main_process=True, wait_for_everyone=lambda: None
        )
        run._precompute_ref_logps(pairs.rows(3), "train", 2)
    alone, shared = seen
    assert not alone.cache_files
    assert str(tmp_path) in shared.cache_files[0]["filename"]
    assert shared.to_list() == alone.to_list()


def test_gauges_are_logged_and_methods_compared_on_resume(tmp_path):
    run = pairs.trainer(tmp_path, methods=[Affine()], max_steps=2, save_strategy="steps", save_steps=1)
    assert "affine/score" in pairs.history(run)[0]
    other = pairs.trainer(tmp_path, methods=[], max_steps=2)
    with pytest.raises(ValueError, match=r"written with methods \['affine'\], this run has \[\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precompute_ref_log_probs": True}, "token by token"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
    ],
)
def test_needs_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        pairs.trainer(tmp_path, methods=[Affine()], **settings)


def test_refusals(tmp_path):
    class Margin(Affine):
        name = "margin"
        needs_margin = True

    class Never(Ones):
        name = "never"

        def conflicts(self, setup):
            yield Conflict(f"never beside {setup.methods}")

    for methods, error, message in [
        ([Affine(), Affine()], ValueError, "affine more than once"),
        ([1], TypeError, "RPO"),
        ([Squared(), type("Other", (Squared,), {"name": "other"})()], ValueError, "one method may replace"),
        ([Never()], ValueError, "never beside"),
    ]:
        with pytest.raises(error, match=message):
            pairs.trainer(tmp_path, methods=methods)
    with pytest.raises(ValueError, match="apo_zero does not use"):
        pairs.trainer(tmp_path, methods=[Margin()], loss_type="apo_zero")
    with pytest.raises(ValueError, match="reverse KL"):
        pairs.trainer(tmp_path, methods=[Margin()], f_divergence_type="js_divergence")

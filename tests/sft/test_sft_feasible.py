"""Feasible learning for SFT: the loss of a step in float64, the multipliers, evaluation, resume, refusals."""

import pytest
import support
import torch
from test_sft_lfu import Gradients, StopAt

from posttrain import SFTTrainer
from posttrain.sft.feasible import FeasibleSFT


def trainer(folder, method, *, data=None, adapter=None, callbacks=(), held_out=None, **settings):
    settings = {"max_steps": 2, "max_grad_norm": 0.0, "weight_decay": 0.0} | settings
    return SFTTrainer(
        model=support.model(),
        args=support.sft_config(folder, **settings),
        train_dataset=support.answers(12) if data is None else data,
        eval_dataset=held_out,
        processing_class=support.tokenizer(),
        peft_config=adapter,
        callbacks=list(callbacks),
        methods=[method],
    )


def row_losses(model, batch):
    """Mean token NLL of each row from full logits, float64."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return [-row[label != -100].mean() for row, label in zip(log_probs, labels, strict=True)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", ["feasible", "clamped", "erm"])
def test_the_gradient_of_a_step_whatever_the_micro_batches(tmp_path, mode, lora):
    found, logged = [], []
    for size, accumulation in ((6, 1), (2, 3)):
        gradients = Gradients()
        method = FeasibleSFT(mode=mode, alpha=2.0, dual_lr=0.5)
        run = trainer(
            tmp_path,
            method,
            adapter=support.lora() if lora else None,
            callbacks=[gradients],
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
        )
        method.table.values[:] = torch.arange(12) / 4
        seen, original = [], run._micro_step

        def watched(model, inputs, seen=seen, original=original):
            seen.append({k: v.clone() for k, v in inputs.items()})
            return original(model, inputs)

        run._micro_step = watched
        there = support.weights(run.model)
        run.train()
        run.model.load_state_dict(there)
        found.append(gradients.found[0])
        logged.append(support.logged(run, "loss", "feasible/loss", "feasible/feasible")[0])
        wanted_table = (torch.arange(12) / 4).tolist()
    model = run.model.double().eval()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = [loss for batch in seen for loss in row_losses(model, batch)]
    assert [row for batch in seen for row in batch["posttrain_id"].tolist()] == list(range(6))
    terms = {
        "feasible": [row / 4 * loss for row, loss in enumerate(losses)],
        "clamped": [(loss - 1).clamp(min=0) ** 2 for loss in losses],
        "erm": losses,
    }[mode]
    loss = torch.stack(terms).mean()
    wanted = torch.autograd.grad(loss, list(weights.values()))
    for gradients in found:
        for name, value in zip(weights, wanted, strict=True):
            torch.testing.assert_close(gradients[name].double(), value, rtol=2e-3, atol=1e-6, msg=name)
    for total, plain, feasible in logged:
        assert total == pytest.approx(loss.item(), rel=1e-3)
        assert plain == pytest.approx(sum(losses).item() / 6, rel=1e-3)
        assert feasible == 0
    for row, value in enumerate(losses):
        if mode == "feasible":
            wanted_table[row] = max(0.0, row / 4 + 0.5 * (value.item() - 1 - row / 8))
    assert method.table.values.tolist() == pytest.approx(wanted_table, rel=1e-4)


def test_evaluation_is_plain_and_training_brings_rows_below(tmp_path):
    method = FeasibleSFT(tolerance=2.0)
    settings = {"max_steps": 30, "learning_rate": 5e-3, "per_device_train_batch_size": 12}
    run = trainer(tmp_path, method, held_out=support.answers(6), **settings)
    assert 2 < run.evaluate()["eval_loss"] < 6
    assert method.table.visits.sum() == 0
    run.train()
    logs = support.logged(run, "feasible/feasible", "feasible/multiplier_zero", "feasible/cvar_0.8")
    assert logs[0][0] == 0
    assert logs[-1][0] > 0.5
    assert logs[-1][1] > 0.3
    assert logs[-1][2] < logs[1][2]
    assert (tmp_path / "feasible.json").exists()
    assert method.table.visits.tolist() == [30] * 12


def test_rows_without_labels_do_not_count(tmp_path):
    """A prompt that fills the row leaves no token to learn."""
    data = support.answers(4).map(
        lambda row, place: {"prompt": row["prompt"] + "x" * (40 * (place == 2))}, with_indices=True
    )
    method = FeasibleSFT()
    settings = {"max_length": 24, "per_device_train_batch_size": 4, "max_steps": 1}
    run = trainer(tmp_path, method, data=data, **settings)
    run.train()
    assert method.table.visits.tolist() == [1, 1, 0, 1]
    ((loss, plain),) = support.logged(run, "loss", "feasible/loss")
    assert loss == pytest.approx(plain, rel=1e-3)  # all weights are 1, the mean is over three rows


def test_resume_is_exact(tmp_path):
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    method = {"dual_lr": 0.3, "alpha": 2.0}
    whole = trainer(tmp_path / "whole", FeasibleSFT(**method), **settings)
    whole.train()
    trainer(tmp_path / "cut", FeasibleSFT(**method), callbacks=[StopAt(3)], **settings).train()
    resumed = trainer(tmp_path / "cut", FeasibleSFT(**method), **settings)
    resumed.train(resume_from_checkpoint=True)
    support.assert_same(support.weights(whole.model), support.weights(resumed.model))
    assert torch.equal(whole.methods[0].table.values, resumed.methods[0].table.values)
    assert support.logged(whole, "loss", "grad_norm") == support.logged(resumed, "loss", "grad_norm")
    other = trainer(tmp_path / "cut", FeasibleSFT(**method), data=support.answers(11), **settings)
    with pytest.raises(ValueError, match="multipliers of 12 training rows"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "packing"),
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"loss_type": "dft"}, "loss_type to nll"),
    ],
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FeasibleSFT(), **settings)


def test_streams_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a stream does not have"):
        trainer(tmp_path, FeasibleSFT(), data=support.answers(4).to_iterable_dataset())

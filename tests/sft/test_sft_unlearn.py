"""Unlearning losses: values by hand, the gradient of a step in float64, columns, reference, WAGLE, resume."""

import math

import pytest
import support
import torch
from datasets import Dataset
from test_sft_lfu import Gradients, StopAt

from posttrain import Select, SFTTrainer
from posttrain.selection.plan import PlanError
from posttrain.selection.wagle import WAGLE
from posttrain.sft.unlearn import Unlearn, graddiff_term, npo_term, row_nll

CHAT = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("difference", "value", "slope"), [(0, 13.862944, -1.0), (5, 9.481540, -0.755081)])
def test_npo_by_hand(difference, value, slope):
    nll = t(2.0 + difference).requires_grad_()
    found = npo_term(nll, t(2.0), 0.1)
    assert found.item() == pytest.approx(value, abs=1e-6)
    found.sum().backward()
    assert nll.grad.item() == pytest.approx(slope, abs=1e-6)
    assert npo_term(t(2.0), t(2.0), 0.1).item() == pytest.approx(20 * math.log(2))


def test_npo_towards_beta_zero_is_ascent():
    nll = t(0.1, 3.0, 9.0).requires_grad_()
    npo_term(nll, t(1.0, 1.0, 1.0), 1e-9).sum().backward()
    assert nll.grad.tolist() == pytest.approx([-1.0] * 3)
    assert graddiff_term(t(3.0)).item() == -3.0


def test_the_mean_of_a_row_is_over_its_tokens():
    log_probs = torch.tensor([[-1.0, -3.0, -7.0], [-5.0, -5.0, -5.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert row_nll(log_probs, mask).tolist() == [2.0, 0.0]
    assert row_nll(log_probs.bfloat16(), mask).dtype == torch.float32


# ---- in the trainer ----------------------------------------------------------------------------------------


def rows(count=12, every=3):
    data = support.answers(count)
    return data.add_column("forget", [i % every == 0 for i in range(count)])


def trainer(folder, method=None, *, data=None, adapter=None, callbacks=(), selection=None, **settings):
    settings = {"max_steps": 2, "max_grad_norm": 0.0, "weight_decay": 0.0} | settings
    return SFTTrainer(
        model=support.model(),
        args=support.sft_config(folder, **settings),
        train_dataset=rows() if data is None else data,
        processing_class=support.tokenizer(),
        peft_config=adapter,
        callbacks=list(callbacks),
        methods=[] if method is None else [method],
        selection=selection,
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", [Unlearn(loss_type="graddiff", retain_weight=0.5), Unlearn(beta=0.7)])
def test_the_gradient_of_a_step_is_that_of_the_formula_whatever_the_micro_batches(method, lora, tmp_path):
    found, logged = [], []
    for size, accumulation in ((6, 1), (2, 3)):
        gradients = Gradients()
        run = trainer(
            tmp_path,
            method,
            adapter=support.lora() if lora else None,
            callbacks=[gradients],
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        seen, original = [], run._micro_step

        def watched(model, inputs, seen=seen, original=original):
            seen.append({k: v.clone() for k, v in inputs.items()})
            return original(model, inputs)

        run._micro_step = watched
        with torch.no_grad():  # away from the reference, or NPO is GradDiff
            for parameter in run.model.parameters():
                if parameter.requires_grad:
                    draw = torch.Generator().manual_seed(5)
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        there = support.weights(run.model)
        run.train()
        run.model.load_state_dict(there)
        found.append(gradients.found[0])
        logged.append(support.logged(run, "loss")[0][0])
    model = run.model.double().eval()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    terms = {True: [], False: []}
    for batch in seen:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        for i, mark in enumerate(batch["forget"].tolist()):
            nll = -log_probs[i][labels[i] != -100].mean()
            if not mark:
                terms[False].append(nll)
            elif method.loss_type == "graddiff":
                terms[True].append(-nll)
            else:
                difference = nll - batch["reference_nll"][i].double()
                assert difference.abs() > 1e-3
                terms[True].append(-2 / 0.7 * torch.nn.functional.logsigmoid(0.7 * difference))
    assert len(terms[True]) + len(terms[False]) == 6
    assert terms[True]
    loss = torch.stack(terms[True]).mean() + method.retain_weight * torch.stack(terms[False]).mean()
    wanted = torch.autograd.grad(loss, list(weights.values()))
    for gradients in found:
        for name, value in zip(weights, wanted, strict=True):
            torch.testing.assert_close(gradients[name].double(), value, rtol=1e-3, atol=1e-6, msg=name)
    assert logged == pytest.approx([loss.item()] * 2, rel=1e-3, abs=1e-3)


def test_the_reference_is_the_start_model_and_the_run_forgets(tmp_path):
    settings = {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 12}
    run = trainer(tmp_path, Unlearn(), **settings)
    train = run.train_dataset
    marks, scores = train["forget"][:], train["reference_nll"][:]
    assert all((score > 0) == mark for score, mark in zip(scores, marks, strict=True))
    place = marks.index(True)
    ids, labels = (torch.tensor([train[place][key]]) for key in ("input_ids", "labels"))
    wanted = support.model()(input_ids=ids, labels=labels).loss.item()
    assert scores[place] == pytest.approx(wanted, rel=1e-5)
    run.train()
    logs = support.logged(run, "unlearn/forget_nll", "unlearn/retain_nll", "unlearn/forget_rows", "loss")
    assert logs[0][2] == pytest.approx(4 / 12)
    assert logs[0][0] == pytest.approx(sum(scores) / 4, rel=1e-5)
    assert logs[0][3] == pytest.approx(20 * math.log(2) + logs[0][1], rel=1e-4)
    assert logs[-1][0] > logs[0][0] + 0.2
    assert logs[-1][1] < logs[0][1]


def test_evaluation_is_plain_and_conversations_keep_their_marks(tmp_path):
    tokenizer = support.tokenizer()
    tokenizer.chat_template = CHAT
    talk = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"no {i}"}]
        for i in range(6)
    ]
    data = Dataset.from_dict({"messages": talk, "forget": [True, False, False] * 2})
    run = SFTTrainer(
        model=support.model(),
        args=support.sft_config(tmp_path, max_steps=1, per_device_train_batch_size=6),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        methods=[Unlearn(loss_type="graddiff")],
    )
    before = run.evaluate()["eval_loss"]
    assert 2 < before < 6  # the mean NLL, not a difference
    run.train()
    assert support.logged(run, "unlearn/forget_rows") == [(pytest.approx(1 / 3),)]


def test_wagle_takes_its_two_sets_from_the_column(tmp_path):
    selection = Select(WAGLE(budget=0.6, mu=1e-2), examples=4)
    run = trainer(tmp_path, Unlearn(loss_type="graddiff"), selection=selection)
    assert run.selection.plan.config["forget_batches"] == 4
    assert run.selection.plan.config["retain_batches"] == 4
    start = support.weights(run.model)
    run.train()
    plan = run.selection.plan
    run.end_selection()
    for name, value in run.model.named_parameters():
        assert not ((value != start[name]) & ~plan.tensors[name].mask()).any(), name
    sets = run.selection_examples(2, ("forget", "retain"))
    assert [len(sets[name]) for name in ("forget", "retain")] == [2, 2]
    assert not {"forget", "reference_nll"} & set(sets["forget"][0])
    with pytest.raises(PlanError, match="mark the rows of the training data"):
        trainer(tmp_path, data=support.answers(6), selection=selection)


def test_resume_is_exact_and_needs_the_start_model(tmp_path):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    whole = trainer(tmp_path / "whole", Unlearn(), **settings)
    whole.train()
    trainer(tmp_path / "cut", Unlearn(), callbacks=[StopAt(2)], **settings).train()
    resumed = trainer(tmp_path / "cut", Unlearn(), **settings)
    resumed.train(resume_from_checkpoint=True)
    support.assert_same(support.weights(whole.model), support.weights(resumed.model))
    assert support.logged(whole, "loss", "grad_norm") == support.logged(resumed, "loss", "grad_norm")
    other = trainer(tmp_path / "cut", Unlearn(), **settings)
    other._reference += 0.5
    with pytest.raises(ValueError, match="the model that training began with"):
        other.train(resume_from_checkpoint=True)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reads the column 'forget'"):
        trainer(tmp_path, Unlearn(), data=support.answers(6))
    data = support.answers(6).add_column("forget", [True, None, False, True, True, True])
    with pytest.raises(ValueError, match="column 'forget' is empty"):
        trainer(tmp_path, Unlearn(loss_type="graddiff"), data=data, per_device_train_batch_size=6).train()
    for settings, words in (
        ({"packing": True}, "set packing to false"),
        ({"label_smoothing_factor": 0.1}, "drop label_smoothing_factor"),
        ({"loss_type": "dft"}, "set loss_type to nll"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, Unlearn(), **settings)

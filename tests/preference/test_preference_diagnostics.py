"""The gauges of every preference run: against the loss itself, against numbers by hand, and over time."""

import itertools
import logging
import math

import pairs
import pytest
import support
import torch
from datasets import Dataset

from posttrain.preference.diagnostics import common_prefix, pull, same_kind, trends
from posttrain.preference.flex_dpo import FlexDPO
from posttrain.run.alarms import Alarms
from posttrain.run.rules import Limits


def logged(folder, *, methods=(), count=1, data=None, **settings):
    """Loss and gauges of one micro-batch under a policy that differs from its reference."""
    settings = {"reference": support.model(seed=1), "beta": 0.3} | settings
    run = pairs.trainer(folder, methods=methods, data=data or pairs.rows(4), **settings)
    inputs = run.data_collator(list(run.train_dataset)[-count:])
    loss = run.compute_loss(run.model, dict(inputs))
    loss.backward()
    return loss.item(), {name: found[-1] for name, found in run._metrics["train"].items()}, run, inputs


@pytest.mark.parametrize(
    ("settings", "rejected"),
    [
        ({"loss_type": "sigmoid"}, None),
        ({"loss_type": ["ipo", "sigmoid"], "loss_weights": [0.0, 1.0]}, None),
        ({"loss_type": "sigmoid"}, 0.1),
        ({"loss_type": "sigmoid_norm", "beta": 3.0}, None),
        ({"loss_type": "robust"}, 0.1),
        ({"loss_type": "aot"}, None),
        ({"loss_type": "aot_unpaired"}, None),
        ({"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}, None),
        ({"loss_type": "sigmoid", "f_divergence_type": "js_divergence"}, None),
        (
            {
                "loss_type": "sigmoid",
                "f_divergence_type": "alpha_divergence",
                "f_alpha_divergence_coef": 0.5,
            },
            None,
        ),
        ({"loss_type": "sigmoid", "ld_alpha": 0.3}, None),
    ],
    ids=str,
)
def test_the_pull_is_that_of_the_active_loss(tmp_path, settings, rejected):
    """A loss of -log sigma(z) of one pair is known from its value: sigma(-z) = 1 - exp(-loss)."""
    methods = [] if rejected is None else [FlexDPO(beta_rejected=rejected)]
    loss, found, _, _ = logged(tmp_path, methods=methods, **settings)
    beta = settings.get("beta", 0.3)
    assert found["grad_scale"] == pytest.approx(beta * (1 - math.exp(-loss)), rel=1e-4)
    assert found["saturated"] == float(1 - math.exp(-loss) < 0.01)
    assert found["grad_scale"] != pytest.approx(beta / 2, rel=1e-3)  # z is not 0


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_sorted_margins_give_the_loss_of_the_batch(tmp_path, loss):
    value, _, run, inputs = logged(tmp_path, loss_type=loss, count=4)
    seen = {}
    run._gauges.mean = lambda name, values, *_: seen.setdefault(name, values)
    assert run.compute_loss(run.model, dict(inputs)).item() == pytest.approx(value)
    z = -torch.logit(seen["grad_scale"].double() / 0.3)
    assert -torch.nn.functional.logsigmoid(z).mean().item() == pytest.approx(value, rel=1e-4)


def test_a_hinge_pulls_or_does_not(tmp_path):
    loss, found, _, _ = logged(tmp_path, loss_type="hinge")
    assert found["grad_scale"] == pytest.approx(0.3 * (loss > 0))
    assert pull("hinge", torch.tensor([0.5, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.0]


def test_no_margin_no_pull(tmp_path):
    for loss in ("ipo", "bco_pair", "sft", "apo_down"):
        _, found, _, _ = logged(tmp_path, loss_type=loss)
        assert "grad_scale" not in found
        assert "shift/chosen" in found


def test_numbers_from_full_logits(tmp_path):
    _, found, run, inputs = logged(tmp_path, count=4, max_length=14)

    def token_logps(model):
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        logits = model.double()(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return torch.where(mask, logps, 0.0), mask

    with torch.no_grad():
        logps, mask = token_logps(support.model())
        ref, _ = token_logps(support.model(seed=1))
    ratios, lengths = (logps - ref).sum(1), mask.sum(1)
    declined = ratios < 0
    assert found["shift/chosen"] == pytest.approx(ratios[:4].mean().item(), rel=1e-4)
    assert found["shift/rejected"] == pytest.approx(ratios[4:].mean().item(), rel=1e-4)
    assert found["shift/chosen_declined"] == declined[:4].double().mean()
    assert found["shift/both_declined"] == (declined[:4] & declined[4:]).double().mean()
    assert found["logps_per_token/chosen"] == pytest.approx((logps[:4].sum() / lengths[:4].sum()).item())
    assert found["logps_per_token/rejected"] == pytest.approx((logps[4:].sum() / lengths[4:].sum()).item())
    assert found["length/margin"] == (lengths[:4] - lengths[4:]).double().mean()
    shared = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        for x, y in ((row["chosen_ids"], row["rejected_ids"]) for row in run.train_dataset)
    ]
    expected = sum(n / length for n, length in zip(shared, lengths[:4].tolist(), strict=True)) / 4
    assert found["overlap/prefix"] == pytest.approx(expected)
    assert expected > 0


def test_common_prefix():
    tokens = torch.tensor([[9, 1, 2, 3, 4], [9, 9, 5, 6, 0], [1, 2, 7, 4, 0], [9, 9, 5, 6, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0]]).bool()
    assert common_prefix(tokens, mask).tolist() == [2, 2]
    assert common_prefix(tokens, torch.zeros_like(mask)).tolist() == [0, 0]


def test_trends_by_hand():
    def row(step, chosen, rejected, margin):
        return {
            "step": step,
            "loss": 1.0,
            "shift/chosen": chosen,
            "shift/rejected": rejected,
            "rewards/margins": margin,
        }

    first, second, third = row(5, 0.5, -1.0, 0.1), row(10, -0.5, -2.0, 0.2), row(15, -1.0, -4.0, 0.3)
    assert trends(first, [], 5) == {"drop/ratio": 2.0}
    assert trends(second, [first], 10) == {"drop/ratio": 4.0, "drop/rate": -0.2}
    assert trends(third, [second, first], 15) == {"drop/ratio": 4.0, "drop/rate": -0.4, "suppression": 1.0}
    assert trends(row(15, 1.0, -4.0, 0.3), [second, first], 15)["suppression"] == 0.0
    assert trends(row(15, -1.0, -4.0, 0.2), [second, first], 15)["suppression"] == 0.0
    assert trends(row(5, 0.0, 0.0, 0.0), [], 5) == {"drop/ratio": 0.0}
    assert trends({"train_loss": 1.0}, [first], 15) == {}
    history = [{"eval_a_loss": 1, "step": 1}, {"eval_b_loss": 1, "step": 1}, {"loss": 1, "step": 2}]
    assert same_kind(history, {"eval_b_loss": 0.0}) == [history[1]]
    assert same_kind(history, {"loss": 0.0}) == [history[2]]


def test_trends_are_logged_in_training_evaluation_and_after_resuming(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_data": {"a": pairs.rows(4), "b": pairs.rows(6)},
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
    }
    run = pairs.trainer(tmp_path, **settings)
    logs = pairs.history(run)
    steps = [row for row in logs if "loss" in row]
    for before, row in itertools.pairwise(steps):
        assert row["drop/rate"] == pytest.approx(row["shift/rejected"] - before["shift/rejected"])
    rows = [row for row in logs if "eval_b_loss" in row]
    rate = (rows[2]["eval_shift/rejected"] - rows[1]["eval_shift/rejected"]) / 2
    assert rows[2]["eval_drop/rate"] == pytest.approx(rate)
    assert "eval_suppression" in rows[2]
    again = pairs.trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    timed = ("runtime", "per_second", "flos", "epoch")
    resumed = [
        {k: v for k, v in row.items() if not any(t in k for t in timed)} for row in again.state.log_history
    ]
    assert resumed[:-1] == logs[:-1]


def test_answers_that_begin_at_different_places(tmp_path):
    """keep_end cuts the front of the longer answer's prompt: the common beginning is found all the same."""
    data = Dataset.from_dict({"prompt": ["say"], "chosen": [" abcd"], "rejected": [" abxxxxx"]})
    for cut in ({}, {"max_length": 10, "truncation_mode": "keep_end"}):
        _, found, _, _ = logged(tmp_path, data=data, **cut)
        assert found["overlap/prefix"] == pytest.approx(3 / 6)


def test_alarms_speak_up_without_a_run_directory(tmp_path, caplog):
    """callbacks=[Alarms()] watches a trainer built in Python: here all pairs are soon told apart."""
    run = pairs.trainer(
        tmp_path,
        callbacks=[Alarms(limits=Limits(patience=2))],
        beta=5.0,
        learning_rate=2e-2,
        max_steps=8,
    )
    with caplog.at_level(logging.WARNING, logger="posttrain.run.alarms"):
        run.train()
    (said,) = [text for text in caplog.messages if text.startswith("saturation")]
    assert "no longer pulls" in said
    assert "lower beta" in said


def probe(count=5):
    """Answers in no pair, of different lengths."""
    return Dataset.from_dict(
        {
            "prompt": [f"say {i}" for i in range(count)],
            "completion": [" other" * (1 + i % 3) for i in range(count)],
        }
    )


def probe_by_hand(policy, reference, rows):
    """The three numbers from full logits in float64, row by row."""
    shifts, kls, entropies = [], [], []
    for prompt, answer in zip(rows["prompt"], rows["completion"], strict=True):
        begin = support.tokenizer()(prompt)["input_ids"]
        ids = torch.tensor([support.tokenizer()(prompt + answer + "<eos>")["input_ids"]])
        with torch.no_grad():
            p, q = (
                model.double()(input_ids=ids).logits[0, len(begin) - 1 : -1].log_softmax(-1)
                for model in (policy, reference)
            )
        tokens = ids[0, len(begin) :, None]
        shifts.append((p.gather(1, tokens) - q.gather(1, tokens)).sum().item())
        kls += (q.exp() * (q - p)).sum(-1).tolist()
        entropies += (-p.exp() * p).sum(-1).tolist()
    means = [sum(values) / len(values) for values in (shifts, kls, entropies)]
    return dict(zip(("probe/logps_shift", "probe/kl_forward", "probe/entropy"), means, strict=True))


def test_the_probe_from_full_logits(tmp_path):
    rows = probe()
    run = pairs.trainer(
        tmp_path, reference=support.model(seed=1), probe_dataset=rows, per_device_eval_batch_size=2
    )
    found = run.measure_probe(run._probe)
    assert run.model.training
    expected = probe_by_hand(support.model(), support.model(seed=1), rows)
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    assert found["probe/kl_forward"] > 0


SETTINGS = {
    "full": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora, bf16, accumulated": {
        "peft_config": support.lora(),
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "lora, precomputed": {"peft_config": support.lora(), "precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_probe_changes_nothing_and_starts_at_zero(tmp_path, name):
    settings = {"learning_rate": 1e-2, "max_steps": 3, **SETTINGS[name]}
    run = pairs.trainer(tmp_path, probe_dataset=probe(), **settings)
    pairs.assert_trl_equal(run, pairs.trainer(tmp_path, trl=True, **settings))
    logs = [row for row in run.state.log_history if "loss" in row]
    assert all({"probe/logps_shift", "probe/entropy"} <= row.keys() for row in logs)
    assert all(("probe/kl_forward" in row) == (name != "precomputed") for row in logs)
    assert abs(logs[0]["probe/logps_shift"]) > 1e-3  # after the first step
    again = pairs.trainer(tmp_path, probe_dataset=probe(), **settings)
    start = again.measure_probe(again._probe)
    assert start["probe/logps_shift"] == pytest.approx(0, abs=1e-4)
    assert start.get("probe/kl_forward", 0) == pytest.approx(0, abs=1e-6)


def test_a_probe_is_measured_at_evaluations_and_once_a_step(tmp_path):
    run = pairs.trainer(
        tmp_path,
        probe_dataset=probe(),
        eval_strategy="steps",
        eval_steps=2,
        eval_data={"a": pairs.rows(4), "b": pairs.rows(4)},
    )
    run.train()
    assert [row["step"] for row in run.state.log_history if "probe/entropy" in row] == [2, 4]
    run.evaluate()
    assert len([row for row in run.state.log_history if "probe/entropy" in row]) == 2


def test_probes_of_messages_and_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="columns prompt and completion, found Dataset with prompt, chosen"):
        pairs.trainer(tmp_path, probe_dataset=pairs.rows(2))
    with pytest.raises(ValueError, match="all 5 prompts of probe_dataset fill max_length=4"):
        pairs.trainer(
            tmp_path,
            probe_dataset=probe(),
            data=Dataset.from_dict({"prompt": ["a"] * 4, "chosen": ["b"] * 4, "rejected": ["c"] * 4}),
            max_length=4,
        )
    tokenizer = support.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + '=' + m.content + '.' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a=' }}{% endif %}"
    )
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "say"}]],
            "completion": [[{"role": "assistant", "content": "yes"}]],
        }
    )
    run = pairs.trainer(tmp_path, probe_dataset=rows, processing_class=tokenizer)
    assert tokenizer.decode(run._probe[0]["chosen_ids"]).replace(" ", "") == "yes."

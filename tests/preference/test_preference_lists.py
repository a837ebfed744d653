"""Lists in DPOTrainer: equal to TRL on pairs, and to full logits, however the rows are cut and ordered."""

import math

import pairs
import pytest
import support
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from posttrain.preference.lipo import LiPO, list_losses, pair_mask
from posttrain.preference.method import Batch, Method
from posttrain.preference.rpo import RPO

OBJECTIVES = ["lambda", "pair_logistic", "pair_hinge", "list_mle", "softmax", "point_mse", "point_sigmoid"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def rows(count=8, size=None, **columns):
    """Lists of one to five responses, all different, with different labels."""
    sizes = [size or 1 + i % 5 for i in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [f"say {i}" for i in range(count)],
            "completions": [
                [f" well {i * j}" + " or more" * ((i + j) % 4) for j in range(k)] for i, k in enumerate(sizes)
            ],
            "scores": [[((7 * i + 3 * j) % 11) / 11 for j in range(k)] for i, k in enumerate(sizes)],
            **columns,
        }
    )


def trainer(folder, method=None, data=None, **settings):
    settings = {"beta": 0.3} | settings
    if not settings.get("peft_config"):
        settings.setdefault("reference", support.model(seed=1))
    return pairs.trainer(
        folder, methods=[method or LiPO()], data=rows() if data is None else data, **settings
    )


def gradients(run, inputs=None):
    """Loss and gradients of one micro-batch, by default of all training rows."""
    if inputs is None:
        inputs = run.data_collator(list(run.train_dataset))
    run.model.zero_grad()
    loss = run.compute_loss(run.model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


def close(left, right, rtol=1e-4, atol=1e-6):
    assert left[0] == pytest.approx(right[0], rel=rtol)
    assert left[1].keys() == right[1].keys()
    for name in left[1]:
        assert torch.allclose(left[1][name], right[1][name], rtol=rtol, atol=atol), name


@pytest.mark.parametrize(
    ("objective", "reduction"),
    [("pair_logistic", "pairs_mean"), ("pair_logistic", "list_sum"), ("list_mle", "list_sum")],
)
def test_pairs_are_dpo(tmp_path, objective, reduction):
    """Weights, losses and every metric of TRL after four steps."""
    settings = {"reference": support.model(seed=1), "beta": 0.3}
    ours = pairs.trainer(tmp_path / "a", methods=[LiPO(objective=objective, reduction=reduction)], **settings)
    theirs = pairs.trainer(tmp_path / "b", trl=True, **settings)
    for left, right in zip(pairs.history(ours), pairs.history(theirs), strict=True):
        for name, value in right.items():
            assert left[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize(
    ("objective", "scale"), [("lambda", 1 - 1 / math.log2(3)), ("softmax", 1), ("pair_logistic", 1)]
)
def test_gradients_on_pairs(tmp_path, objective, scale):
    ours = trainer(tmp_path, LiPO(objective=objective, reduction="list_sum"), data=pairs.rows(6))
    theirs = pairs.trainer(tmp_path, trl=True, data=pairs.rows(6), reference=support.model(seed=1), beta=0.3)
    loss, slopes = gradients(theirs)
    close(gradients(ours), (loss * scale, {name: slope * scale for name, slope in slopes.items()}))


def direct(run, inputs, method, beta, *, normalized=False):
    """Loss and gradients of a micro-batch from full logits, in float64, list by list."""

    def token_logps(model):
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        logits = model.double()(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return torch.where(mask, logps, 0.0).sum(1)

    policy, reference = support.model(), support.model(seed=1)
    scores = beta * (token_logps(policy) - token_logps(reference).detach())
    if normalized:
        scores = scores / inputs["completion_mask"][:, 1:].sum(1)
    total, count, start = 0.0, 0, 0
    for row in run.train_dataset:
        size = len(row["completion_ids"])
        s, psi = scores[None, start : start + size], torch.tensor([row["labels"]]).double()
        valid = torch.ones_like(psi, dtype=torch.bool)
        value = list_losses(method.objective, s, psi, valid, gain=method.gain, discount=method.discount)
        mean = method.reduction == "pairs_mean" and method.objective in (
            "lambda",
            "pair_hinge",
            "pair_logistic",
        )
        total = total + value.sum() * (size if mean and method.objective == "lambda" else 1)
        count += int(pair_mask(psi, valid).sum()) if mean else 1
        start += size
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_from_full_logits(tmp_path, objective):
    for method in (
        LiPO(objective=objective),
        LiPO(objective=objective, reduction="list_sum", gain="linear", discount="log"),
    ):
        run = trainer(tmp_path, method)
        inputs = run.data_collator(list(run.train_dataset))
        close(gradients(run, inputs), direct(run, inputs, method, 0.3), rtol=1e-3, atol=2e-6)


def test_length_normalized(tmp_path):
    method = LiPO(length_normalized=True)
    run = trainer(tmp_path, method, beta=5.0)
    inputs = run.data_collator(list(run.train_dataset))
    close(gradients(run, inputs), direct(run, inputs, method, 5.0, normalized=True), rtol=1e-3)


def test_padding_and_order_do_not_matter(tmp_path):
    """Also at the first step, where all scores are equal and a hash decides the ranks."""
    data = rows(6, size=4)
    turned = data.map(lambda row: {name: row[name][::-1] for name in ("completions", "scores")})
    found = [
        gradients(trainer(tmp_path, data=d, reference=support.model(seed=seed), **extra))
        for seed in (0, 1)
        for d, extra in ((data, {}), (turned, {}), (data, {"pad_to_multiple_of": 64}))
    ]
    for start in (0, 3):
        close(found[start], found[start + 1], atol=2e-6)
        close(found[start], found[start + 2], atol=2e-6)
    tied = [gradients(trainer(tmp_path, reference=support.model(), seed=seed))[0] for seed in (1, 2, 3)]
    assert len(set(tied)) > 1  # the seed decides


@pytest.mark.parametrize("method", [LiPO(), LiPO(objective="list_mle")])
def test_micro_batches_do_not_matter(tmp_path, method):
    """Ragged lists: eight prompts in one micro-batch, or in eight with a pair count each."""
    runs = [
        trainer(
            tmp_path,
            method,
            per_device_train_batch_size=8 // cut,
            gradient_accumulation_steps=cut,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        for cut in (1, 8)
    ]
    for run in runs:
        run.train()
    assert (runs[0].model.lm_head.weight - support.model().lm_head.weight).abs().max() > 1e-4
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(("checkpointing", "adapter"), [(False, None), (True, LORA)])
def test_forward_rows(tmp_path, checkpointing, adapter):
    runs = [
        trainer(
            tmp_path,
            LiPO(forward_rows=size),
            peft_config=adapter,
            gradient_checkpointing=checkpointing,
        )
        for size in (None, 3, 1)
    ]
    whole, *parts = (gradients(run) for run in runs)
    for part in parts:
        close(whole, part, atol=2e-6)


def test_forward_rows_keep_the_activations_of_one_part(tmp_path):
    saved = []
    for size in (None, 2):
        run = trainer(tmp_path, LiPO(forward_rows=size), data=rows(4, size=6))
        total = [0]

        def pack(tensor, total=total):
            total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.compute_loss(run.model, run.data_collator(list(run.train_dataset)))
        saved.append(total[0])
    assert saved[1] < saved[0] / 5


def test_reference_before_and_during_training_agree(tmp_path):
    data, held_out = rows(), rows(5)
    logs = []
    for precompute in (False, True):
        run = trainer(
            tmp_path,
            data=data,
            eval_data=held_out,
            eval_strategy="steps",
            eval_steps=2,
            precompute_ref_log_probs=precompute,
            precompute_ref_batch_size=3,
        )
        assert ("ref_logps" in run.train_dataset.column_names) == precompute
        logs.append(pairs.history(run))
    assert len(logs[0]) == len(logs[1])
    for live, cached in zip(*logs, strict=True):
        assert live.keys() == cached.keys()
        for name in live:
            assert live[name] == pytest.approx(cached[name], rel=1e-4, abs=1e-5), name
    assert "eval_lipo/ndcg" in logs[0][2] or "eval_lipo/ndcg" in logs[0][1]


@pytest.mark.parametrize("precompute", [False, True])
def test_lora_starts_at_its_base(tmp_path, precompute):
    run = trainer(
        tmp_path,
        LiPO(objective="pair_logistic"),
        peft_config=LORA,
        precompute_ref_log_probs=precompute,
        bf16=True,
        gradient_checkpointing=True,
        max_steps=3,
    )
    logs = pairs.history(run)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-2)
    assert any("lora_B" in n and p.abs().max() > 0 for n, p in run.model.named_parameters())


def test_a_trained_adapter_is_its_own_reference(tmp_path):
    model = get_peft_model(support.model(), LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    run = trainer(
        tmp_path, LiPO(objective="pair_logistic", forward_rows=3), model=model, reference=None, max_steps=2
    )
    logs = pairs.history(run)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(logs[1]["loss"] - math.log(2)) > 1e-4  # the adapter moved, its copy did not


def test_a_stream(tmp_path):
    log = pairs.history(trainer(tmp_path, data=rows(4).to_iterable_dataset()))[0]
    assert log["lipo/list_size"] == 2.5
    with pytest.raises(ValueError, match="IterableDataset"):
        trainer(tmp_path, data=rows(4).to_iterable_dataset(), precompute_ref_log_probs=True)


def test_experts(tmp_path):
    """The balance term of a mixture of experts, as in TRL."""

    def experts(seed):
        torch.manual_seed(seed)
        config = MixtralConfig(
            **{k: v for k, v in support.model().config.to_dict().items() if k in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "pad_token_id", "eos_token_id")},
            num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1,
        )  # fmt: skip
        return MixtralForCausalLM(config)

    found = [
        gradients(
            pairs.trainer(
                tmp_path, data=pairs.rows(6), model=experts(0), reference=experts(1), beta=0.3, **options
            )
        )
        for options in ({"trl": True}, {"methods": [LiPO(objective="pair_logistic")]})
    ]
    close(*found, rtol=1e-3)


def test_resume_in_an_epoch(tmp_path):
    """The order of ties in the second epoch included: labels of list-MLE are all equal."""
    data = rows(8, size=3, scores=[[0.5] * 3] * 8)
    settings = {
        "data": data,
        "per_device_train_batch_size": 2,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = trainer(tmp_path, LiPO(objective="list_mle"), **settings)
    logs = pairs.history(whole)
    again = trainer(tmp_path, LiPO(objective="list_mle"), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [log["loss"] for log in logs if "loss" in log]
    assert [log["loss"] for log in again.state.log_history if "loss" in log] == losses


def test_ties_change_with_the_epoch(tmp_path):
    data = rows(2, size=5, scores=[[0.5] * 5] * 2)
    run = trainer(tmp_path, LiPO(objective="list_mle"), data=data)
    found = []
    for epoch in (0.0, 0.5, 1.0, 2.0):
        run.state.epoch = epoch
        found.append(gradients(run)[0])
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_preparation_is_that_of_pairs(tmp_path):
    """Plain text and messages, labels from scores or ranks, the order of the data."""
    plain = pairs.rows(5)
    chat = plain.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{n: [{"role": "assistant", "content": row[n]}] for n in ("chosen", "rejected")},
        }
    )
    # the last renders the prompt alone in another way than before an answer
    for data, opening in ((plain, ""), (chat, "a."), (chat, "a.z")):
        lists = data.map(
            lambda row: {"completions": [row["chosen"], row["rejected"]], "ranks": [1, 2]},
            remove_columns=["chosen", "rejected"],
        )
        runs = []
        for given in (data, lists):
            tokenizer = support.tokenizer()
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m.role[0] }}.{{ m.content }}{{ eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}" + opening + "{% endif %}"
            )
            runs.append(_with_tokenizer(tmp_path, given, tokenizer, max_length=16))
        assert len(runs[0].train_dataset) == 5
        for name in ("prompt_ids", "completion_ids"):
            assert list(runs[0].train_dataset[name]) == list(runs[1].train_dataset[name])
        assert runs[0].train_dataset[0]["labels"] == [1, 0]
        assert runs[1].train_dataset[0]["labels"] == [0.75, 0.25]
        batches = [run.data_collator(list(run.train_dataset)) for run in runs]
        assert batches[0]["input_ids"].size(1) == 16
        for name in ("input_ids", "attention_mask", "completion_mask", "list_rows", "pairs"):
            assert torch.equal(batches[0][name], batches[1][name])


def _with_tokenizer(folder, data, tokenizer, **settings):
    original = support.tokenizer
    support.tokenizer = lambda: tokenizer
    try:
        return trainer(folder, data=data, **settings)
    finally:
        support.tokenizer = original


def test_prompts_that_fill_max_length_are_dropped(tmp_path):
    data = rows(3, size=2, prompt=["a", "a very long prompt that fills it all", "b"])
    assert len(trainer(tmp_path, data=data, max_length=12).train_dataset) == 2


def test_truncation_leaves_padding_out(tmp_path):
    """A list that is cut at max_length is the list of the cut responses."""
    method = LiPO(objective="pair_logistic")
    run = trainer(tmp_path, method, data=rows(4, size=3), max_length=14)
    inputs = run.data_collator(list(run.train_dataset))
    assert inputs["input_ids"].size(1) == 14
    close(gradients(run, inputs), direct(run, inputs, method, 0.3), rtol=1e-3)


def test_list_size_and_min_max(tmp_path):
    data = rows(2, scores=[[3, -1, 1, 5, 0]] * 2, size=5)
    run = trainer(tmp_path, LiPO(labels="min_max", list_size=3), data=data)
    assert list(run.train_dataset["labels"]) == [[1, 0, 0.5]] * 2
    assert [len(ids) for ids in run.train_dataset["completion_ids"]] == [3, 3]


def test_no_pair_in_a_step(tmp_path):
    data = rows(8, size=2, scores=[[0.5, 0.5]] * 8)
    run = trainer(tmp_path, data=data, max_steps=2, weight_decay=0.0)
    logs = pairs.history(run)
    assert logs[0]["loss"] == 0
    assert logs[0]["grad_norm"] == 0
    assert logs[0]["lipo/lists_without_pairs"] == 1
    assert "rewards/accuracies" not in logs[0]


def test_metrics(tmp_path):
    """Of one batch, by hand."""
    data = rows(3, size=3, scores=[[0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [1.0, 0.0, 1.0]])
    run = trainer(tmp_path, data=data)
    inputs = run.data_collator(list(run.train_dataset))
    run.compute_loss(run.model, inputs)
    metrics = run._metrics["train"]
    with torch.no_grad():
        sums = []
        for model in (support.model(), support.model(seed=1)):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            logps = logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
            sums.append((logps * inputs["completion_mask"][:, 1:]).sum(1))
    s = (0.3 * (sums[0] - sums[1])).tolist()
    ordered = [(1, 0), (1, 2), (2, 0), (6, 7), (8, 7)]
    assert metrics["rewards/accuracies"] == [sum(s[i] > s[j] for i, j in ordered) / 5]
    assert metrics["rewards/margins"] == pytest.approx([sum(s[i] - s[j] for i, j in ordered) / 5], rel=1e-4)
    assert metrics["rewards/chosen"] == pytest.approx([(s[1] + s[3] + s[6]) / 3], rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx([(s[0] + s[5] + s[7]) / 3], rel=1e-4)
    assert metrics["logps/chosen"] == pytest.approx([sums[0][[1, 3, 6]].mean().item()], rel=1e-4)
    assert metrics["lipo/lists_without_pairs"] == pytest.approx([1 / 3])
    assert metrics["num_tokens"] == [inputs["attention_mask"].sum()]


class Best(Method):
    """Costs of the best rows."""

    name = "best"
    title = "best"
    for_lists = True

    def penalty(self, batch: Batch):
        Best.model_config["rows"] = batch.chosen.tolist()
        return -batch.sums[batch.chosen].mean()


def test_a_penalty_on_the_best_response(tmp_path):
    data = rows(3, scores=[[0.2], [0.4, 0.9], [0.7, 0.7, 0.1]])
    plain, with_penalty = (
        pairs.trainer(tmp_path, methods=methods, data=data, reference=support.model(seed=1))
        for methods in ([LiPO()], [LiPO(), Best()])
    )
    inputs = plain.data_collator(list(plain.train_dataset))
    loss = gradients(plain, inputs)[0]
    assert gradients(with_penalty, inputs)[0] == pytest.approx(
        loss - plain._metrics["train"]["logps/chosen"][0], rel=1e-4
    )
    assert Best.model_config.pop("rows") == [True, False, True, True, False, False]


@pytest.mark.parametrize("precompute", [False, True])
def test_rpo_and_a_probe_beside_lists(tmp_path, precompute):
    run = pairs.trainer(
        tmp_path,
        methods=[LiPO(), RPO(eta=0.1)],
        data=rows(),
        precompute_ref_log_probs=precompute,
        probe_dataset=Dataset.from_dict(
            {"prompt": ["say a", "say b"], "completion": [" what", " so and so"]}
        ),
        max_steps=2,
    )
    log = pairs.history(run)[1]
    assert log["probe/logps_shift"] != 0
    assert log["rpo/nll"] == pytest.approx(-log["logps/chosen"], rel=1e-4)
    assert log["loss"] > 0.1 * 0.1 * log["rpo/nll"]


class Pairwise(Method):
    name = "pairwise"
    title = "pairwise"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": rows(2).remove_columns("scores")}, "one of scores, ranks, preferences"),
        ({"data": rows(2, ranks=[[1], [1, 2]])}, "one of scores, ranks, preferences"),
        ({"data": rows(2, scores=[[0.1], [0.1, 2.0]])}, r"row 1 of the lists: .* \[0, 1\]"),
        ({"data": rows(2, scores=[[0.1], [0.1]])}, "row 1 of the lists: 2 completions need as many scores"),
        ({"data": rows(2, scores=[[0.1], [0.1, math.nan]])}, "row 1 .* nan at response 1"),
        ({"data": rows(2, completions=[["a"], []], scores=[[0.5], []])}, "row 1 .* empty"),
        ({"methods": [LiPO(), Pairwise()]}, "pairwise acts on pairs, lipo trains on lists"),
        ({"methods": []}, "lists of responses: add a method"),
        ({"loss_type": "ipo"}, "choose lipo's objective"),
    ],
)
def test_refusals(tmp_path, change, message):
    settings = {"data": rows(2), "methods": [LiPO()]} | change
    with pytest.raises(ValueError, match=message):
        pairs.trainer(tmp_path, **settings)

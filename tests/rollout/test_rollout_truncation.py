"""Truncated sampling: what is refused, and what the loss makes of the rest."""

import math
from types import SimpleNamespace

import pytest
import support
import torch

from posttrain import GRPOTrainer
from posttrain.kernels import Truncation
from posttrain.rl import ACE, AEPO
from posttrain.rollout.settings import RolloutSettings
from posttrain.rollout.truncation import cuts, reshapes, truncation_problem

ACCEPT = RolloutSettings(truncated_sampling="accept")
PLAIN = {
    "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "temperature": 0.7,
    "gradient_accumulation_steps": 4, "use_vllm": False, "vllm_importance_sampling_correction": True,
}  # fmt: skip
CORRECTED = {"use_vllm": True}
VLLM = {"use_vllm": True, "vllm_importance_sampling_correction": False}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, {}),
        ({"top_k": -1, "min_p": 0.0}, {}),
        ({"top_p": 0.9, "generation_kwargs": {"top_k": 5}}, {"top_p": 0.9, "top_k": 5}),
        ({"top_p": 0.9, "generation_kwargs": {"top_p": 1.0}}, {}),
    ],
)
def test_what_cuts(fields, found):
    assert cuts(PLAIN | fields) == found


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"generation_kwargs": {"seed": 3, "stop": ["x"], "do_sample": True, "temperature": 0.7}}, set()),
        ({"generation_kwargs": {"do_sample": False}}, {"do_sample"}),
        ({"generation_kwargs": {"temperature": 0.5, "typical_p": 0.9}}, {"temperature", "typical_p"}),
        ({"generation_kwargs": {"repetition_penalty": 1.0}, "repetition_penalty": 1.2}, set()),
        ({"repetition_penalty": 1.2}, {"repetition_penalty"}),
        ({"vllm_structured_outputs_regex": "a+"}, set()),
        ({"vllm_structured_outputs_regex": "a+", **VLLM}, {"vllm_structured_outputs_regex"}),
    ],
)
def test_what_else_is_another_distribution(fields, found):
    assert set(reshapes(PLAIN | fields)) == found


@pytest.mark.parametrize(
    ("fields", "settings", "verdict"),
    [
        ({}, RolloutSettings(), None),
        ({"top_p": 0.9}, RolloutSettings(), None),
        ({"top_p": 0.9}, ACCEPT, "moves probability into or out of the kept tokens"),
        ({"top_p": 0.9, "num_iterations": 2}, RolloutSettings(), "! after the policy has moved"),
        ({"top_p": 0.9, "steps_per_generation": 8}, RolloutSettings(), "! after the policy has moved"),
        ({"top_p": 0.9, "num_iterations": 2}, ACCEPT, "moves probability"),
        ({"top_p": 0.9, "use_liger_kernel": True}, RolloutSettings(), "! Liger"),
        ({"repetition_penalty": 1.2}, RolloutSettings(), "! cannot compute"),
        ({"repetition_penalty": 1.2}, ACCEPT, "another distribution"),
        ({"repetition_penalty": 1.2, **VLLM}, ACCEPT, "another distribution"),
        ({"repetition_penalty": 1.2, **CORRECTED}, ACCEPT, "! error of the sampler"),
        ({"top_p": 0.9, **CORRECTED}, RolloutSettings(), None),
    ],
)
def test_rules(fields, settings, verdict):
    found = truncation_problem(PLAIN | fields, settings)
    if verdict is None:
        assert found is None
        return
    assert verdict.removeprefix("! ") in found.message
    assert found.fatal == verdict.startswith("! ")
    assert "leave it out" in found.fix


def trainer(tmp_path, settings=None, methods=(), **fields):
    args = support.grpo_config(tmp_path, **({"top_p": 0.5, "learning_rate": 0.0, "max_steps": 1} | fields))
    support.model().save_pretrained(tmp_path / "model")  # a reference is read from a folder
    return GRPOTrainer(
        model=str(tmp_path / "model"),
        args=args,
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        methods=list(methods),
        rollout=settings,
    )


def test_the_trainer_refuses_and_warns(tmp_path, caplog):
    with pytest.raises(ValueError, match="after the policy has moved"):
        trainer(tmp_path, num_iterations=2)
    with pytest.raises(ValueError, match="aepo samples at another temperature"):
        trainer(tmp_path, methods=[AEPO(target_entropy=0.5)])
    trainer(tmp_path, ACCEPT)
    assert "knows nothing of top_p=0.5" in caplog.text


def test_a_sharded_head_is_refused_before_the_first_step(tmp_path):
    trained = trainer(tmp_path)
    trained.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sharded here"):
        trained.refuse_late()
    trained.corrects_truncation = False
    trained.refuse_late()


def first_micro_batch(trained):
    """Run one step and return its loss, gradients and batch, and what was logged for it."""
    seen = {}
    inner = trained._compute_loss

    def compute(model, inputs):
        seen.setdefault("batch", {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()})
        loss = inner(model, inputs)
        model.zero_grad()
        loss.backward(retain_graph=True)
        seen["gradient"] = {n: p.grad.clone() for n, p in model.named_parameters()}
        seen["loss"] = loss.detach()
        model.zero_grad()
        return loss

    trained._compute_loss = compute
    trained.train()
    return seen


@pytest.mark.parametrize("methods", [[], [ACE(alpha=1.0)]], ids=["no methods", "ace"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_is_that_of_the_kept_tokens(tmp_path, methods, beta):
    """Against the loss written out over whole logits; beside the same run without the correction."""
    seen = first_micro_batch(
        trainer(tmp_path, methods=methods, beta=beta, loss_type="grpo", temperature=0.9, top_k=20)
    )
    batch, model = seen["batch"], support.model()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask, count = batch["completion_mask"], batch["completion_ids"].size(1)
    attention = torch.cat([batch["prompt_mask"], mask], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -count - 1 : -1] / 0.9
    logps = logits.log_softmax(-1)
    keep = Truncation(top_p=0.5, top_k=20, min_p_first=False).kept(logps.detach())
    drawn = batch["completion_ids"].unsqueeze(-1)
    assert keep.gather(-1, drawn).squeeze(-1)[mask.bool()].all()
    log_q = (logps - logps.masked_fill(~keep, -math.inf).logsumexp(-1, keepdim=True)).gather(-1, drawn)
    advantages = batch["advantages"].unsqueeze(1)
    if methods:
        reference = logps.detach().gather(-1, drawn).squeeze(-1)  # nothing has moved yet: ACE weighs by 1
        assert torch.allclose(batch["ref_per_token_logps"][mask.bool()], reference[mask.bool()], atol=1e-5)
        slope = torch.where(advantages < 0, 1 + 1.0 * math.log(2), 1.0)
        advantages = advantages * slope
    terms = -advantages * (log_q - log_q.detach()).exp().squeeze(-1)
    if beta:
        own = logps.gather(-1, drawn).squeeze(-1)
        gap = batch["ref_per_token_logps"] - own
        terms = terms + beta * (gap.exp() - gap - 1)
    ((terms * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen["gradient"][name], parameter.grad, atol=2e-6, rtol=1e-4)
    accepted = first_micro_batch(
        trainer(tmp_path, ACCEPT, methods, beta=beta, loss_type="grpo", temperature=0.9, top_k=20)
    )
    assert torch.equal(accepted["batch"]["completion_ids"], batch["completion_ids"])
    name = "lm_head.weight"
    assert (accepted["gradient"][name] - seen["gradient"][name]).norm() > 0.05 * seen["gradient"][name].norm()


@pytest.mark.parametrize("settings", [None, ACCEPT], ids=["correct", "accept"])
def test_the_correction_for_vllm_compares_like_with_like(tmp_path, settings):
    """A sampler that reports log q of the very policy has ratio 1 and gap 0, whatever Z is."""
    trained = trainer(tmp_path, settings, logging_steps=1)
    cut = Truncation(top_p=0.5)

    def rollout(prompts, trainer):
        tokenizer, model = support.tokenizer(), support.model()
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        rows, logprobs = [], []
        for i, start in enumerate(prompt_ids):
            ids, row = list(start), []
            for _ in range(1 + i % 4):
                with torch.no_grad():
                    logps = model(input_ids=torch.tensor([ids])).logits[:, -1].log_softmax(-1)
                logps = logps.masked_fill(~cut.kept(logps), -math.inf).log_softmax(-1)[0]
                ids.append(int(torch.multinomial(logps.exp(), 1)))
                row.append(float(logps[ids[-1]]))
            rows.append(ids[len(start) :])
            logprobs.append(row)
        return {"prompt_ids": prompt_ids, "completion_ids": rows, "logprobs": logprobs}

    # what GRPOConfig would make of use_vllm without starting an engine
    trained.rollout_func, trained.use_vllm = rollout, True
    trained.vllm_importance_sampling_correction = True
    trained.vllm_generation, trained._last_loaded_step = SimpleNamespace(sync_weights=lambda: None), -1
    batch = first_micro_batch(trained)["batch"]
    mask = batch["completion_mask"].bool()
    gap = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[mask]
    assert gap.abs().max() < 1e-5
    assert (batch["importance_sampling_ratio"] - 1).abs().max() < 1e-5
    (found,) = support.logged(trained, "sampling/sampling_logp_difference/max", "rollout_gap/over_10_percent")
    assert found[0] < 1e-5
    assert found[1] == 0
    # and they are of the policy, not of what the sampler drew from
    mean = batch["old_per_token_logps"][mask].mean()
    assert mean < -math.log(20)

"""BitFit trains true biases or says that there are none; vectors in order until the budget is used up."""

import pytest
import support
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from posttrain.selection.apply import apply
from posttrain.selection.bitfit import BitFit
from posttrain.selection.plan import PlanError


def qwen(tied=True):
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=None,
            eos_token_id=1,
        )
    )  # fmt: skip


def test_biases():
    plan = BitFit().select(qwen())
    assert sorted(plan.touched) == sorted(
        f"model.layers.{block}.self_attn.{m}_proj.bias" for block in range(2) for m in "qkv"
    )
    assert plan.count == 2 * (16 + 8 + 8)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4))
    names = set(BitFit().select(gpt2).touched)
    assert names == {name for name, _ in gpt2.named_parameters() if name.endswith(".bias")}
    assert "transformer.ln_f.bias" in names
    assert names > set(BitFit(norms=False).select(gpt2).touched)


def test_a_model_without_biases_is_an_error():
    with pytest.raises(PlanError, match=r"no parameters of mode 'bias' .*use mode 'norm' or 'one_dim'"):
        BitFit().select(support.model())
    with pytest.raises(PlanError, match="no parameters of mode 'norm'"):
        BitFit(mode="norm", norms=False).select(support.model())


def test_norms_and_vectors():
    model = qwen()
    norms = set(BitFit(mode="norm").select(model).touched)
    assert norms == {name for name, _ in model.named_parameters() if "norm" in name}
    vectors = set(BitFit(mode="one_dim").select(model).touched)
    assert vectors == norms | set(BitFit().select(model).touched)
    # in a model without biases the two are one
    llama = support.model()
    assert BitFit(mode="norm").select(llama) == BitFit(mode="one_dim").select(llama)


@pytest.mark.parametrize("budget", [1, 16, 40, 144])
def test_in_order_until_the_budget_is_used_up(budget):
    model = qwen()
    plan = BitFit(mode="one_dim", budget=budget).select(model)
    flat = torch.cat([s.mask().flatten() for n, s in plan.tensors.items() if len(s.shape) == 1])
    assert len(flat) == 2 * 32 + 5 * 16
    assert torch.equal(flat, torch.arange(len(flat)) < budget)
    assert plan.count == budget


def test_a_head_is_charged_and_budgets_have_bounds():
    model = qwen(tied=False)
    head = 40 * 16
    plan = BitFit(budget=head + 5, always_train=("lm_head",)).select(model)
    assert plan.count == head + 5
    assert plan.tensors["lm_head.weight"].kind == "all"
    with pytest.raises(ValueError, match=r"leaves 65 scalars to mode 'bias', and the model has 64"):
        BitFit(budget=65).select(model)


def test_whole_tensors_are_frozen_or_not():
    model = qwen()
    assert apply(model, BitFit().select(model)).backend == "freeze"

"""The LM head of real architectures, watched in a forward, against TRL's fused head and full logits."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import support
import torch
from peft import get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from posttrain.kernels import LMHead, logit_scale_of, watch_head

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
ROWS, PROMPT, COLUMNS = 3, 4, 5


def models():
    yield "llama", support.model(initializer_range=0.3)
    yield "tied", support.model(tied=True, initializer_range=0.3)
    yield "cohere", CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))
    yield "granite", GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0))
    yield "gemma2", Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0))


with torch.random.fork_rng():
    torch.manual_seed(0)
    MODELS = dict(models())


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (ROWS, PROMPT + COLUMNS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding of a prompt
    mask[1, -2:] = 0  # right padding of a completion
    return ids, mask


def run_fused(model, ids, mask):
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-COLUMNS] = -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -COLUMNS:], out.entropy[:, -COLUMNS:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wrapped", ["plain", "lora", "checkpointing"])
@pytest.mark.parametrize("name", list(MODELS))
def test_watched_head_gives_the_log_probs_of_the_fused_head(name, wrapped, dtype):
    torch.manual_seed(0)  # the adapter starts at random values
    model = copy.deepcopy(MODELS[name]).to(dtype)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    outer = model
    if wrapped == "lora":
        outer = get_peft_model(model, support.lora(init_lora_weights=False))
    elif wrapped == "checkpointing":
        model.gradient_checkpointing_enable()
        model.train()
    ids, mask = batch()
    seen = []
    with watch_head(model, ids, mask, COLUMNS, seen.append, temperature=0.7):
        logps, entropies = run_fused(outer, ids, mask)
        logps.sum().backward()  # checkpointing runs the layers again here: still one watched forward
    (scored,) = seen
    assert scored.hidden.shape == (ROWS, COLUMNS, 32)
    assert scored.hidden.requires_grad
    found = scored.statistics(scored.mask, entropy=True)
    tolerance = 2e-6 if dtype == torch.float32 else 0.05  # the fused head rounds its logits to bfloat16
    assert torch.allclose(found.logps, logps.detach()[scored.mask].float(), atol=tolerance)
    assert torch.allclose(found.entropies, entropies.detach()[scored.mask].float(), atol=tolerance)

    # and it is the model's own distribution, independently of the fused head
    with torch.no_grad():
        logits = outer(input_ids=ids, attention_mask=mask).logits[:, -COLUMNS - 1 : -1].double()
    wanted = torch.log_softmax(logits / 0.7, -1).gather(2, ids[:, -COLUMNS:, None])[..., 0]
    assert torch.allclose(found.logps.double(), wanted[scored.mask], atol=tolerance)
    assert found.logps.std() > 0.1


def test_scale_of_every_convention():
    def config(model_type="x", **fields):
        text = SimpleNamespace(model_type=model_type, **fields)
        return SimpleNamespace(get_text_config=lambda: text)

    assert logit_scale_of(config()) == 1
    assert logit_scale_of(config(logit_scale=None)) == 1
    assert logit_scale_of(config(logit_scale=0.0)) == 0
    assert logit_scale_of(config(output_multiplier=3.0)) == 3
    assert logit_scale_of(config(logits_scaling=4.0)) == 0.25
    assert logit_scale_of(config("hyperclovax", logits_scaling=4.0)) == 4
    assert logit_scale_of(FalconH1Config(lm_head_multiplier=0.5)) == 0.5


def test_consecutive_forwards_take_consecutive_rows():
    model = support.model().eval()
    ids, mask = batch()
    parts = []
    with watch_head(model, ids, mask, COLUMNS, parts.append), torch.no_grad():
        for rows in (slice(0, 2), slice(2, 3)):
            model(input_ids=ids[rows], attention_mask=mask[rows])
    assert [part.ids.size(0) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.ids for part in parts]), ids[:, -COLUMNS:])
    assert torch.equal(torch.cat([part.mask for part in parts]), mask[:, -COLUMNS:].bool())


@pytest.mark.parametrize("fails", [False, True])
def test_the_hook_goes_with_the_block(fails):
    model = support.model()
    ids, mask = batch()
    seen = []
    with (
        pytest.raises(KeyError) if fails else nullcontext(),
        watch_head(model, ids, mask, COLUMNS, seen.append),
    ):
        if fails:
            raise KeyError
    model(input_ids=ids)
    assert seen == []
    assert not model.base_model._forward_hooks


def test_where_selects_in_row_order_and_may_be_empty():
    model = support.model().eval()
    ids, mask = batch()
    seen = []
    with watch_head(model, ids, mask, COLUMNS, seen.append), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    wanted = torch.log_softmax(logits[:, -COLUMNS - 1 : -1].double(), -1).gather(2, ids[:, -COLUMNS:, None])[
        ..., 0
    ]
    where = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    assert seen[0].statistics(where, min_ratio=0.1).log_mass.shape == (0,)
    where[2, 1] = where[0, 4] = where[2, 0] = True
    found = seen[0].statistics(where).logps
    assert found.tolist() == pytest.approx(wanted[[0, 2, 2], [4, 0, 1]].tolist(), abs=1e-6)


def test_full_kl_reaches_backbone_and_head():
    model = support.model()
    ids, mask = batch()
    seen = []
    with watch_head(model, ids, mask, COLUMNS, seen.append, temperature=0.9):
        logits = model(input_ids=ids, attention_mask=mask).logits
    where = mask[:, -COLUMNS:].bool()
    found = seen[0].forward_kl(where, min_ratio=0.5).sum()
    logps = torch.log_softmax(logits[:, -COLUMNS - 1 : -1] / 0.9, -1)[where]
    with torch.no_grad():
        q = logps.exp() * (logps >= logps.amax(-1, keepdim=True) + torch.tensor(0.5).log())
        q = q / q.sum(-1, keepdim=True)
    wanted = torch.where(q > 0, q * (q.log() - logps), 0).sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters, retain_graph=True),
        torch.autograd.grad(wanted, parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", list(MODELS))
def test_entropy_gradient_reaches_backbone_and_head(name):
    model = copy.deepcopy(MODELS[name]).double()
    ids, mask = batch()
    seen = []
    with watch_head(model, ids, mask, COLUMNS, seen.append, temperature=0.9):
        logits = model(input_ids=ids, attention_mask=mask).logits
    logps = torch.log_softmax(logits[:, -COLUMNS - 1 : -1] / 0.9, -1)
    entropies = -(logps.exp() * logps).sum(-1)
    where = mask[:, -COLUMNS:].bool()
    where[0, 1] = where[2, 3] = False
    factor = torch.linspace(-1, 2, ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS)
    found = seen[0].entropies(where, entropies)
    assert torch.equal(found, entropies)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((found * factor).sum(), parameters, retain_graph=True),
        torch.autograd.grad((entropies * factor)[where].sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_entropy_gradient_is_for_large_whole_heads(monkeypatch):
    model = support.model()
    ids, mask = batch()
    seen = []
    with watch_head(model, ids, mask, COLUMNS, seen.append):
        model(input_ids=ids, attention_mask=mask)
    assert not seen[0].entropy_gradient_is_cheaper
    monkeypatch.setattr("posttrain.kernels.head.LARGE_VOCABULARY", 10)
    assert seen[0].entropy_gradient_is_cheaper
    model.lm_head.weight.ds_status = "sharded"
    assert not seen[0].entropy_gradient_is_cheaper


def test_full_kl_refuses_a_sharded_head():
    model = support.model()
    ids, mask = batch()
    seen = []
    with watch_head(model, ids, mask, COLUMNS, seen.append):
        model(input_ids=ids, attention_mask=mask)
    model.lm_head.weight.ds_status = "sharded"
    with pytest.raises(ValueError, match="kl: k3"):
        seen[0].forward_kl(seen[0].mask, min_ratio=0.1)


def test_sharded_weight_is_gathered():
    """FSDP2 keeps parameters as DTensors, which know their whole."""

    class Shard(torch.Tensor):
        def full_tensor(self):
            return torch.full((2, 3), 7.0)

    head = LMHead(SimpleNamespace(weight=torch.zeros(1, 3).as_subclass(Shard)))
    with head.gathered() as (weight, bias):
        assert weight.shape == (2, 3)
        assert weight.unique().tolist() == [7]
        assert bias is None

"""HFT trains exactly the half that the method sheet counts, on every kind of block, the same for a round."""

import logging
import math

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posttrain.selection.apply import apply
from posttrain.selection.hft import HFT, Matrix, draw, half_reset, selection_of
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection
from posttrain.selection.selector import matching, module_names, norm_names

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def build(cls, config, layers=4, **settings):
    torch.manual_seed(0)
    return cls(config(**(SMALL | {"num_hidden_layers": layers} | settings)))


def llama(layers=4, **settings):
    return build(LlamaForCausalLM, LlamaConfig, layers, **settings)


def trained(plan, *parts):
    """Names of whole trained tensors with one of ``parts`` in them."""
    return [
        name for name, s in plan.tensors.items() if s.kind == "all" and any(part in name for part in parts)
    ]


def per_block(plan, part):
    counts: dict[str, int] = {}
    for name, selection in plan.tensors.items():
        if part in name and name.endswith("weight"):
            block = name.split(".")[2]
            counts[block] = counts.get(block, 0) + (selection.kind == "all")
    return sorted(counts.values())


ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")


@pytest.mark.parametrize("round_", range(4))
def test_counts_of_the_sheet(round_):
    plan = HFT().select(llama(4), round=round_)
    assert len(trained(plan, *ATTENTION)) == 8  # of 16
    assert per_block(plan, "self_attn") == [2, 2, 2, 2]
    assert len(trained(plan, "mlp")) == 6  # of 12
    assert per_block(plan, "mlp") == [1, 1, 2, 2]
    assert per_block(plan, "layernorm") == [1, 1, 1, 1]
    assert len(trained(plan, "")) == 21  # 8 + 6 + 4 + 3
    assert len(plan.tensors) == 39
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(plan.touched)
    assert not plan.partial
    plan = HFT().select(llama(5), round=round_)
    assert len(trained(plan, "mlp")) == 8  # of 15: the odd block trains two
    assert per_block(plan, "mlp") == [1, 1, 2, 2, 2]


def test_biases_follow_their_matrix_and_a_tied_head_counts_once():
    model = build(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True)
    counts = set()
    for round_ in range(30):
        plan = HFT().select(model, round=round_)
        assert len(plan.tensors) == 50
        for name in plan.tensors:
            if name.endswith("bias"):
                assert plan.tensors[name].kind == plan.tensors[name.replace("bias", "weight")].kind
        biases = len(trained(plan, "bias"))
        counts.add(len(trained(plan, "")))
        assert len(trained(plan, "")) == 8 + 6 + 4 + 2 + biases
    assert counts <= set(range(24, 29))
    assert len(counts) > 2


def test_the_same_round_is_the_same_half_and_another_is_not():
    model = llama()
    plans = [HFT(seed=seed).select(model, round=round_) for seed in range(3) for round_ in range(6)]
    assert len({plan.fingerprint() for plan in plans}) == len(plans)
    torch.manual_seed(123)  # the global generator is neither read nor moved
    before = torch.random.get_rng_state()
    assert HFT(seed=2).select(model, round=5) == plans[-1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_are_uniform_and_independent():
    """Each pair of the four attention matrices is as likely, and so is each block to train two of three."""
    model = llama(2)
    pairs: dict[tuple[str, ...], int] = {}
    twos = [0, 0]
    for round_ in range(300):
        plan = HFT(categories=("attention", "feed_forward"), always_train=()).select(model, round=round_)
        pair = tuple(trained(plan, "layers.0.self_attn"))
        pairs[pair] = pairs.get(pair, 0) + 1
        twos[len(trained(plan, "layers.1.mlp")) == 2] += 1
    assert len(pairs) == 6
    assert all(abs(count - 50) < 27 for count in pairs.values())  # sd 6.5
    assert abs(twos[1] - 150) < 35  # sd 8.7


def test_all_and_nothing():
    model = llama()
    everything = HFT(ratio=1.0).select(model)
    assert all(selection.kind == "all" for selection in everything.tensors.values())
    embeddings = HFT(ratio=0.0).select(model)
    assert len(embeddings.touched) == 3
    with pytest.raises(PlanError, match="nothing to train"):
        HFT(ratio=0.0, always_train=()).select(model)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 20), st.integers(0, 5))
def test_the_rule_of_any_category(blocks, size, twentieths, seed):
    """n p = k + f: k everywhere, one more in floor(L f + 1/2) blocks, to the last matrix."""
    matrices = [
        Matrix(f"s.{b}.m{i}", ("s", b), "c", "c", ((f"s.{b}.m{i}", None),), 1)
        for b in range(blocks)
        for i in range(size)
    ]
    ratio = twentieths / 20
    chosen = draw(matrices, ratio, torch.Generator().manual_seed(seed))
    counts = [sum(m.block == ("s", b) for m in chosen) for b in range(blocks)]
    k, rest = divmod(size * twentieths, 20)
    assert sorted(set(counts)) in ([k], [k + 1], [k, k + 1])
    assert sum(counts) == blocks * k + (2 * blocks * rest + 20) // 40
    assert len(set(chosen)) == len(chosen)
    for level, n in (("layer", blocks), ("model", blocks * size)):
        part = draw(matrices, ratio, torch.Generator().manual_seed(seed), level=level)
        assert len(part) == (2 * n * twentieths + 20) // 40 * (size if level == "layer" else 1)


def test_layers_move_whole_and_the_model_level_counts_norms():
    plan = HFT(level="layer").select(llama(5))
    kinds = {}
    for name, selection in plan.tensors.items():
        if "layers" in name:
            kinds.setdefault(name.split(".")[2], set()).add(selection.kind)
    assert sorted(map(sorted, kinds.values())) == [["all"]] * 3 + [["none"]] * 2  # floor(5 / 2 + 1/2)
    plan = HFT(level="model").select(llama(3))
    assert len(trained(plan, "layers")) == 14  # floor(27 / 2 + 1/2)
    assert plan != HFT(level="model").select(llama(3), round=1)


def test_grouped_query_attention(caplog):
    """A block's share is 0.8, 0.2 or 0.5 of the scalars; balance takes one of each size."""
    model = llama(4, hidden_size=32, num_attention_heads=8)  # 8 heads to 2, as 32 to 8
    allowed = {0.8, 0.2, 0.5}
    with caplog.at_level(logging.INFO, logger="posttrain.selection.hft"):
        plan = HFT().select(model)
    blocks = [
        sum(plan.tensors[f"model.layers.{b}.self_attn.{m}"].count for m in ATTENTION)
        / (2 * 32 * 32 + 2 * 32 * 8)
        for b in range(4)
    ]
    assert set(blocks) <= allowed
    line = plan.config["trained"]["attention"]
    assert (line["trained"], line["matrices"]) == (8, 16)
    assert line["share"] == pytest.approx(sum(blocks) / 4)
    assert (line["least"], line["most"]) == (min(blocks), max(blocks))
    assert "attention {self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj}: 8 of 16" in (
        caplog.text
    )
    halves = set()
    for round_ in range(20):
        plan = HFT(balance="scalars").select(model, round=round_)
        assert plan.config["trained"]["attention"]["least"] == 0.5
        assert plan.config["trained"]["attention"]["most"] == 0.5
        halves.add(tuple(trained(plan, "layers.0.self_attn")))
    assert len(halves) == 4  # one of q and o, one of k and v
    plan = HFT(balance="scalars").select(llama(4, num_key_value_heads=4))  # also where all are of one size
    for block in range(4):
        names = " ".join(trained(plan, f"layers.{block}.self_attn"))
        assert ("q_proj" in names) != ("o_proj" in names)
        assert ("k_proj" in names) != ("v_proj" in names)


def of_a_large_model(cls, config, **options):
    """The trained share of a model that is never loaded, from its names and shapes."""
    with torch.device("meta"):
        model = cls(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    selector = HFT(**options)
    always = matching(selector.always_train, module_names(model), "always_train")
    matrices, _ = selector.matrices(shapes, norm_names(model), always)
    chosen = selection_of(draw(matrices, selector.ratio, selector.generator(0, 0)), shapes)
    chosen |= {name: TensorSelection.all(shapes[name]) for name in always}
    plan = SelectionPlan.for_model(model, chosen, hashed=False)
    always_scalars = sum(math.prod(shapes[name]) for name in always)
    return plan.density, always_scalars, plan.numel - always_scalars


def test_shares_with_trained_embeddings():
    llama2 = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    share, always, blocks = of_a_large_model(LlamaForCausalLM, llama2)
    assert (always, blocks) == (262_148_096, 6_476_267_520)
    assert round(100 * share, 1) == 51.9
    llama3 = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    share, _, _ = of_a_large_model(LlamaForCausalLM, llama3, balance="scalars")
    assert round(100 * share, 1) == 56.5
    qwen = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    share, _, _ = of_a_large_model(Qwen2ForCausalLM, qwen, balance="scalars")
    assert round(100 * share, 1) == 63.8


def test_norms_of_queries_and_keys_are_norms():
    model = build(Qwen3ForCausalLM, Qwen3Config, head_dim=4)
    plan = HFT().select(model)
    assert per_block(plan, "norm.weight")[-4:] == [2, 2, 2, 2]  # of 4
    assert len(trained(plan, *ATTENTION)) == 8


def test_fused_tensors_are_one_matrix():
    plan = HFT().select(build(Phi3ForCausalLM, Phi3Config))
    assert per_block(plan, "self_attn") == [1, 1, 1, 1]  # of {qkv, o}
    assert per_block(plan, "mlp") == [1, 1, 1, 1]  # of {gate_up, down}


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=4)),
        lambda: build(GPTNeoXForCausalLM, GPTNeoXConfig),
        lambda: build(LlamaForSequenceClassification, LlamaConfig, num_labels=1),
    ],
)
def test_other_architectures(model):
    model = model()
    plan = HFT().select(model)
    outside = [name for name in plan.tensors if ".0." not in name and ".1." not in name]
    outside = [name for name in outside if ".2." not in name and ".3." not in name]
    assert all(plan.tensors[name].kind == "all" for name in outside)
    half = plan.config["trained"]
    assert all(2 * half[c]["trained"] == half[c]["matrices"] for c in ("attention", "feed_forward", "norm"))


def mixture(**options):
    return build(MixtralForCausalLM, MixtralConfig, num_local_experts=6, **options)


def test_mixtures_of_experts():
    model = mixture()
    with pytest.raises(PlanError, match=r"mlp\.gate\.weight.*set router to 'train' or 'freeze'"):
        HFT().select(model)
    plan = HFT(router="freeze").select(model)
    assert not trained(plan, "mlp.gate")
    different = set()
    for block in range(4):
        for tensor in ("gate_up_proj", "down_proj"):
            selection = plan.tensors[f"model.layers.{block}.mlp.experts.{tensor}"]
            assert selection.kind == "rows"
            assert len(selection.index) == 3  # of 6
            different.add(tuple(selection.index.tolist()))
    assert len(different) > 1
    plan = HFT(router="train", experts="whole").select(model)
    assert len(trained(plan, "mlp.gate")) == 4
    assert not plan.partial
    for block in range(4):
        assert len(trained(plan, f"layers.{block}.mlp.experts")) == 1  # of {gate_up, down}


def test_experts_in_modules_of_their_own():
    """As older checkpoints and remote code have them: half of the experts of each projection."""
    shapes = {}
    for block in range(2):
        stem = f"model.layers.{block}."
        shapes |= {f"{stem}self_attn.{m}": (4, 4) for m in ATTENTION}
        shapes |= {f"{stem}moe.experts.{e}.{w}.weight": (4, 4) for e in range(6) for w in ("w1", "w2", "w3")}
        shapes |= {f"{stem}moe.gate.weight": (6, 4), f"{stem}norm1.weight": (4,), f"{stem}norm2.weight": (4,)}
    norms = {name for name in shapes if "norm" in name}
    for experts, pools, each in (("each", 3, 3), ("whole", 1, None)):
        matrices, routers = HFT(router="freeze", experts=experts).matrices(shapes, norms, set())
        assert len(routers) == 2
        assert len({m.pool for m in matrices if m.category == "feed_forward"}) == pools
        chosen = selection_of(draw(matrices, 0.5, torch.Generator().manual_seed(0)), shapes)
        for block in range(2):
            counts = [sum(f".{block}.moe" in n and f".{w}." in n for n in chosen) for w in ("w1", "w2", "w3")]
            assert counts == [each] * 3 if each else set(counts) <= {0, 6} and sum(counts) in (6, 12)


def test_errors_say_what_to_do():
    model = llama()
    with pytest.raises(PlanError, match=r"always_train: 'fresh_head' is found in none"):
        HFT(always_train=("fresh_head",)).select(model)
    with pytest.raises(PlanError, match=r"finds no attention matrices.*or correct the pattern"):
        HFT(attention="nothing", feed_forward=".").select(model)
    with pytest.raises(PlanError, match=r"does not know what 16 parameters .* always_train, leave them out"):
        HFT(attention="nothing").select(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    with pytest.raises(PlanError, match="finds no norm matrices"):
        HFT(always_train=("embed_tokens",)).select(model)
    plan = HFT(always_train=("embed_tokens",), categories=("attention", "feed_forward")).select(model)
    assert not trained(plan, "norm")


def test_the_halves_of_an_adapter():
    from peft import get_peft_model

    model = get_peft_model(llama(), support.lora(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    plan = HFT(categories=("attention",), always_train=()).select(model)
    assert len(plan.touched) == 16  # A and B of 2 of 4 modules in 4 blocks
    for name in plan.touched:
        assert plan.tensors[name.replace("lora_A", "lora_B")].kind == "all"


def test_first_gradients_are_those_of_full_fine_tuning():
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    full, half = llama(), llama()
    full(input_ids=ids, labels=ids).loss.backward()
    plan = HFT().select(half)
    selection = apply(half, plan)
    half(input_ids=ids, labels=ids).loss.backward()
    assert selection.backend == "freeze"
    for (name, one), two in zip(half.named_parameters(), full.parameters(), strict=True):
        if plan.tensors[name].kind == "all":
            assert torch.equal(one.grad, two.grad)
        else:
            assert one.grad is None


@pytest.mark.parametrize("tied", [False, True])
def test_half_reset(tied):
    base = llama(tie_word_embeddings=tied)
    for plan in (HFT().select(base), HFT(ratio=1.0).select(base)):
        tuned = llama(tie_word_embeddings=tied)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 1
        trained_ = support.weights(tuned)
        half_reset(tuned, base if tied else base.state_dict(), plan)
        for name, parameter in tuned.named_parameters():
            source = base.get_parameter(name) if plan.tensors[name].kind == "all" else trained_[name]
            assert torch.equal(parameter, source)
    assert all(torch.equal(one, two) for one, two in zip(tuned.parameters(), base.parameters(), strict=True))


def test_half_reset_of_single_scalars_and_of_another_model():
    base, tuned = llama(), llama().bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    plan = SelectionPlan.for_model(base, {name: TensorSelection.elements((32, 16), torch.tensor([3, 7]))})
    with torch.no_grad():
        tuned.get_parameter(name).fill_(2.0)
    half_reset(tuned, base, plan)
    flat = tuned.get_parameter(name).flatten()
    assert torch.equal(flat[[3, 7]], base.get_parameter(name).flatten()[[3, 7]].bfloat16())
    assert (flat == 2).sum() == 32 * 16 - 2
    with pytest.raises(PlanError, match="cannot be put back: the base has no such tensor"):
        half_reset(tuned, {}, plan)
    with pytest.raises(PlanError, match=r"the base has it as \[2\]"):
        half_reset(tuned, {name: torch.ones(2)}, plan)


def test_a_run_trains_the_half_and_all_of_it_is_full_fine_tuning(tmp_path):
    from posttrain.sft.trainer import SFTTrainer

    def run(name, selection):
        trainer = SFTTrainer(
            model=support.model(tied=True),
            args=support.sft_config(tmp_path / name, max_steps=3),
            train_dataset=support.answers(),
            processing_class=support.tokenizer(),
            selection=selection,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return trainer, losses, support.weights(trainer.model)

    _, full_losses, full = run("full", None)
    _, losses, weights = run("all", HFT(ratio=1.0))
    assert losses == full_losses
    assert all(torch.equal(weights[name], tensor) for name, tensor in full.items())
    trainer, _, weights = run("half", HFT())
    start = support.weights(support.model(tied=True))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    plan = trainer.selection.plan
    for name, parameter in trainer.model.named_parameters():
        chosen = plan.tensors[name].kind == "all"
        assert torch.equal(weights[name], start[name]) != chosen
        assert (parameter in optimizer.state) == chosen
        assert chosen or parameter.grad is None

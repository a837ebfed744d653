"""Sampling: the traps, the distribution, and independence of batches."""

import copy
import string

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

from posttrain.evaluation.generate import _InverseCDF, generation_mode, sample

PROMPTS = ["ab", "abcdefgh", "c", "hello"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_dropout=0.5,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_a_model_fresh_from_training_samples_like_a_clean_one(model, tokenizer) -> None:
    clean = sample(model, tokenizer, PROMPTS, n=4, max_new_tokens=12)
    trained = copy.deepcopy(model)
    trained.gradient_checkpointing_enable()
    trained.train()
    trained.config.use_cache = False
    assert sample(trained, tokenizer, PROMPTS, n=4, max_new_tokens=12) == clean
    assert trained.training
    assert trained.is_gradient_checkpointing
    assert trained.config.use_cache is False


def test_the_trap_is_real(model) -> None:
    """Without the context manager, training mode changes what the model says (here through dropout)."""
    ids = torch.arange(2, 12).unsqueeze(0)
    reference = model(ids).logits
    model.train()
    assert not torch.equal(model(ids).logits, reference)
    with generation_mode(model):
        assert torch.equal(model(ids).logits, reference)


def test_every_flag_comes_back_also_after_an_exception(model) -> None:
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].gradient_checkpointing = False
    settings = model.generation_config
    before = {name: module.training for name, module in model.named_modules()}

    def interrupted() -> None:
        with generation_mode(model):
            inside()
            raise KeyboardInterrupt

    def inside() -> None:
        assert not any(module.training for module in model.modules())
        assert not model.is_gradient_checkpointing
        assert model.config.use_cache is True

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.model.layers[0].gradient_checkpointing
    assert not model.model.layers[1].gradient_checkpointing
    assert model.generation_config is settings


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_samples_depend_neither_on_batch_size_nor_on_order(model, tokenizer, batch_size: int) -> None:
    reference = sample(model, tokenizer, PROMPTS, n=5, max_new_tokens=10, batch_size=7, seed=4)
    turned = sample(model, tokenizer, PROMPTS[::-1], n=5, max_new_tokens=10, batch_size=batch_size, seed=4)
    assert turned[::-1] == reference
    alone = sample(model, tokenizer, PROMPTS[2:3], n=5, max_new_tokens=10, seed=4)
    assert alone == reference[2:3]
    fewer = sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=10, seed=4)
    assert fewer == [group[:2] for group in reference]


def test_seeds_samples_and_repeated_prompts_differ(model, tokenizer) -> None:
    first, second = sample(model, tokenizer, ["ab", "ab"], n=3, max_new_tokens=12)
    texts = {item.text for item in first + second}
    assert len(texts) == 6
    (other,) = sample(model, tokenizer, ["ab"], n=3, max_new_tokens=12, seed=1)
    assert not texts & {item.text for item in other}


def test_the_global_random_state_is_neither_read_nor_moved(model, tokenizer) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=5) == first


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.9)])
def test_first_tokens_follow_the_tempered_nucleus(model, tokenizer, temperature: float, top_p: float) -> None:
    n = 4000
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("abc")["input_ids"]])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, 0)
    ranked, places = expected.sort(descending=True)
    # nucleus: the fewest tokens whose mass reaches top_p
    kept = places[: int((ranked.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else places
    nucleus = torch.zeros_like(expected)
    nucleus[kept] = expected[kept] / expected[kept].sum()
    (drawn,) = sample(
        model, tokenizer, ["abc"], n=n, max_new_tokens=1, temperature=temperature, top_p=top_p, batch_size=n
    )
    counts = torch.bincount(torch.tensor([item.token_ids[0] for item in drawn]), minlength=28)
    assert (counts[nucleus == 0] == 0).all()
    deviation = (counts / n - nucleus).abs()
    limit = 4.5 * (nucleus * (1 - nucleus) / n).sqrt()
    assert (deviation <= limit + 1e-9).all()
    assert len(kept) < 28 or top_p == 1


def test_the_checkpoints_generation_settings_do_not_leak_in(model, tokenizer) -> None:
    clean = sample(model, tokenizer, PROMPTS, n=4, max_new_tokens=10)
    greedy = sample(model, tokenizer, PROMPTS, n=1, max_new_tokens=10, temperature=0)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        eos_token_id=1,
    )
    assert sample(model, tokenizer, PROMPTS, n=4, max_new_tokens=10) == clean
    assert sample(model, tokenizer, PROMPTS, n=1, max_new_tokens=10, temperature=0) == greedy


def test_greedy_is_the_argmax_generated_once(model, tokenizer) -> None:
    calls = []
    original = model.generate
    model.generate = lambda *args, **kwargs: (
        calls.append(kwargs["input_ids"].shape) or original(*args, **kwargs)
    )
    found = sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=8, temperature=0)
    assert calls == [(4, 8)]  # four prompts, once each, padded on the left to the longest
    for prompt, group in zip(PROMPTS, found, strict=True):
        ids = list(tokenizer(prompt)["input_ids"])
        start = len(ids)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        assert [item.token_ids for item in group] == [ids[start:]] * 3


def test_end_tokens_of_checkpoint_and_tokenizer_both_end_a_completion(model, tokenizer) -> None:
    groups = sample(model, tokenizer, ["ab"], n=64, max_new_tokens=20)
    ended = [item for item in groups[0] if item.finished]
    cut = [item for item in groups[0] if not item.finished]
    assert ended
    assert cut
    assert all(item.token_ids[-1] == 1 and 1 not in item.token_ids[:-1] for item in ended)
    assert all(len(item.token_ids) == 20 and 1 not in item.token_ids for item in cut)
    assert all("<" not in item.text for item in ended)
    model.generation_config.eos_token_id = [5, 6]
    more = sample(model, tokenizer, ["ab"], n=64, max_new_tokens=20)[0]
    assert {item.token_ids[-1] for item in more if item.finished} == {1, 5, 6}


def test_progress_adds_up(model, tokenizer) -> None:
    for temperature in (0.0, 1.0):
        done: list[int] = []
        sample(
            model, tokenizer, PROMPTS, n=3, max_new_tokens=2, batch_size=5, temperature=temperature,
            progress=done.append,
        )  # fmt: skip
        assert sum(done) == 12


def test_messages_go_through_the_chat_template(model, tokenizer) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}z{% endif %}"
    )
    messages = [{"role": "user", "content": "ab"}]
    # the same token ids have the same stream, so the rendered text gives the same samples
    assert sample(model, chat, [messages], n=3, max_new_tokens=6) == sample(
        model, tokenizer, ["abz"], n=3, max_new_tokens=6
    )
    with pytest.raises(ValueError, match="no chat template"):
        sample(model, tokenizer, [messages], n=1, max_new_tokens=6)


def test_adapters_and_patched_forwards_generate(model, tokenizer) -> None:
    clean = sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=8)
    patched = copy.deepcopy(model)
    add_fused_lm_head(patched)
    adapted = get_peft_model(patched, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    adapted.train()
    adapted.generation_config.top_k = 1
    assert sample(adapted, tokenizer, PROMPTS, n=3, max_new_tokens=8) == clean
    assert adapted.generation_config.top_k == 1
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert sample(adapted, tokenizer, PROMPTS, n=3, max_new_tokens=8) != clean


def test_what_cannot_be_sampled_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 prompts do not fit the context of 64 .* at most 4"):
        sample(model, tokenizer, ["a", "a" * 60], n=1, max_new_tokens=10)
    with pytest.raises(ValueError, match="no tokens"):
        sample(model, tokenizer, [""], n=1, max_new_tokens=10)
    with pytest.raises(ValueError, match="temperature=-1"):
        sample(model, tokenizer, ["a"], n=1, max_new_tokens=10, temperature=-1)
    assert sample(model, tokenizer, [], n=1, max_new_tokens=10) == []


def test_a_broken_model_is_named_and_left_as_it_was(model, tokenizer) -> None:
    model.train()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        sample(model, tokenizer, ["ab"], n=1, max_new_tokens=4)
    assert model.training


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)])
def test_a_token_of_probability_zero_is_never_drawn(draw: float, token: int) -> None:
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    chooser = _InverseCDF(torch.tensor([[9.9, draw]], dtype=torch.float64), prompt_length=3)
    kept = chooser(torch.zeros(1, 4, dtype=torch.long), scores)  # one token written: the second draw counts
    assert torch.isfinite(kept).nonzero().tolist() == [[0, token]]

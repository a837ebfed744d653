"""The model built in code: exact text round trip, exact repetition, no trace in the random state."""

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.models.embedded import MAX_POSITIONS, build_model, build_tokenizer

ALPHABET = "".join(sorted(set(string.printable) - set("\t\r\x0b\x0c")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    build_tokenizer().save_pretrained(folder)
    build_model(3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["built", "reloaded"])
def tokenizer(request, saved):
    return build_tokenizer() if request.param == "built" else AutoTokenizer.from_pretrained(saved)


@given(text=st.text(ALPHABET, max_size=60))
def test_text_comes_back_exactly(tokenizer, text):
    if "<" in text:  # the names of special tokens are special tokens
        text = text.replace("<", "(")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokens(tokenizer):
    assert len(tokenizer) == 100
    assert tokenizer(" do n't  .\n,")["input_ids"] == [4 + ALPHABET.index(c) for c in " do n't  .\n,"]
    assert (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ) == (0, 1, 2, 3)
    assert tokenizer("é\t")["input_ids"] == [3, 3]
    assert tokenizer("1<eos>")["input_ids"] == [4 + ALPHABET.index("1"), 2]
    assert tokenizer.chat_template is None
    assert tokenizer.model_max_length == MAX_POSITIONS


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["1", "12"], padding=True)
    assert batch["input_ids"][0][0] == 0
    assert batch["attention_mask"] == [[0, 1], [1, 1]]


def test_model_has_the_documented_size():
    model = build_model()
    assert model.num_parameters() == 739_200
    assert model.get_input_embeddings().num_embeddings == 100
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 0
    assert not model.training


def test_same_seed_same_weights_and_the_global_state_is_untouched():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build_model(1)
    assert torch.equal(torch.rand(3), expected)
    again, other = build_model(1), build_model(2)
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_saved_model_is_the_same(saved):
    again = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, build_model(3)(ids).logits)


def test_reads_a_long_text_at_every_position():
    logits = build_model()(torch.full((1, MAX_POSITIONS), 9)).logits
    assert logits.shape == (1, MAX_POSITIONS, 100)
    assert logits.isfinite().all()

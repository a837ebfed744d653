"""The embedded default model: a character-level Llama of about 0.7 M parameters, built in code.

It exists so that the whole job (warm start, reinforcement learning, evaluation, export) runs on any machine
in minutes with nothing to download. It has the classes and file formats of a real checkpoint, so nothing
downstream has to know that it is small. Its weights are random: it needs a supervised warm start.
"""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "embedded:char-llama"
"""What ``model.path`` says to get this model."""

MAX_POSITIONS = 512
"""Longest sequence (prompt and completion together), in characters."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Ids 0 to 3."""

# sorted by code point, so that ids never depend on the order of string.printable
_CHARACTERS = sorted({"\n", " "} | set(string.digits + string.ascii_letters + string.punctuation))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per character, 100 tokens in all.

    Ids 0 to 3 are ``<pad> <bos> <eos> <unk>``, then newline and printable ASCII in code point order. Any
    other character is ``<unk>``. Nothing is added in front of or behind the text, decoding gives the
    text back exactly, padding goes to the left (for generation) and there is no chat template. The
    names of the special tokens inside a text are read as those tokens, as in every Hugging Face tokenizer.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *_CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    seed: int = 0,
    *,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    intermediate_size: int = 448,
    tie_word_embeddings: bool = False,
    attn_implementation: str | None = None,
) -> LlamaForCausalLM:
    """Return the model with random weights in fp32 on the CPU, in evaluation mode.

    The defaults give 739,200 parameters. The same seed gives the same weights bit for bit, and the global
    random state is left as it was.

    Args:
        seed: Seed of the weights, >= 0.
        hidden_size: Width of the residual stream; a multiple of ``heads``.
        layers: Number of transformer blocks.
        heads: Attention heads (as many key-value heads).
        intermediate_size: Width of the gated feed-forward layer.
        tie_word_embeddings: Whether input and output embeddings are one matrix.
        attn_implementation: As in transformers; its own choice when None.

    Raises:
        ValueError: ``hidden_size`` is not a multiple of ``heads``.
    """
    tokenizer = build_tokenizer()
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tie_word_embeddings,
        dtype=torch.float32,
        **ids,
    )
    config._attn_implementation = attn_implementation
    # torch.manual_seed would also reseed the accelerators, which fork_rng is told to leave alone here
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model.eval()

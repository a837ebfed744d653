"""Tiny models that the export tests share."""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.config.schema import AdapterConfig
from posttrain.models.load import build_peft_config


def tiny_llama(*, tied=False, dtype=torch.float32, seed=0):
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # model.to() would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def trained_adapter(base, *, scale=0.05, seed=1, **settings):
    model = get_peft_model(base, build_peft_config(AdapterConfig(r=4, **settings), base))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (scale * noise).to(parameter.dtype)
    return model

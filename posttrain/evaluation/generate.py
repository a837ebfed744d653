"""Sampling completions for evaluation.

Two traps are closed here. A model that comes straight out of a trainer is in training mode, often with
gradient checkpointing on, and then generates garbage without a word: :func:`generation_mode` puts it right
and puts everything back. And a checkpoint's ``generation_config.json`` may carry its own top-k, penalties
or temperature, which ``generate`` merges into whatever it is given: it is replaced while sampling, so that
only the settings given here hold.

Randomness comes from one stream per sample, seeded by (seed, prompt, number of the sample), and one uniform
number per token, turned into a token by inverting the cumulative distribution. So the samples of a problem
depend neither on the batch size nor on its neighbours or its place (up to the rounding of batched matrix
products, which can flip a token when a draw falls within about 1e-6 of a boundary), and no global random
state is read or moved.
Two models evaluated with the same seed see the same random numbers, which makes their paired difference
less noisy.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

Prompt = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        text: Decoded text without special tokens, as TRL hands it to rewards.
        token_ids: Token ids with the end token (if one was written) and without padding.
        finished: Whether it ended with an end token; False when it was cut at the limit.
    """

    text: str
    token_ids: list[int]
    finished: bool


@contextmanager
def generation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Hold ``model`` ready for generation; restore everything on the way out, also after an exception.

    Inside: evaluation mode, gradient checkpointing off, the key/value cache on, and the checkpoint's own
    generation settings out of reach. Restored: the mode of every submodule by itself, the checkpointing
    flags, ``config.use_cache`` and ``generation_config``.
    """
    modules = list(model.modules())
    saved: list[tuple[Any, str, Any]] = [(module, "training", module.training) for module in modules]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        saved.append((config, "use_cache", config.use_cache))
    for module in modules:
        # the flag itself, not gradient_checkpointing_enable(): that would lose the caller's arguments
        if getattr(module, "gradient_checkpointing", False):
            saved.append((module, "gradient_checkpointing", module.gradient_checkpointing))
        if "generation_config" in vars(module):
            saved.append((module, "generation_config", module.generation_config))
    try:
        model.eval()
        for owner, name, _ in saved:
            if name == "gradient_checkpointing":
                owner.gradient_checkpointing = False
            elif name == "generation_config":
                owner.generation_config = GenerationConfig()
            elif name == "use_cache":
                owner.use_cache = True
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


class _InverseCDF(LogitsProcessor):
    """Keep only the token that this row's uniform number points to."""

    def __init__(self, uniforms: torch.Tensor, prompt_length: int) -> None:
        self.uniforms = uniforms  # (rows, max_new_tokens), float64 in [0, 1)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_length
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)  # (rows, vocabulary)
        total = cumulative[:, -1:]
        broken = ~torch.isfinite(total).flatten()
        if broken.any():
            raise FloatingPointError(
                f"the model gives no distribution over the next token (step {step}, batch rows "
                f"{broken.nonzero().flatten().tolist()}): its logits are NaN or infinite. Check the weights "
                "and the precision (model.dtype)"
            )
        # strictly below the total, and right=True: a token of probability zero is never chosen
        below = torch.nextafter(total, torch.zeros_like(total))
        target = torch.minimum(self.uniforms[:, step : step + 1] * total, below)
        chosen = torch.searchsorted(cumulative, target, right=True)
        kept = torch.full_like(scores, float("-inf"))
        return kept.scatter_(1, chosen, 0.0)  # type: ignore[return-value]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    n: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int,
    batch_size: int = 256,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Completion]]:
    """Sample n completions of every prompt.

    Args:
        model: A causal language model with ``generate``; PEFT and DDP wrappers are fine.
        tokenizer: Its tokenizer.
        prompts: Texts, tokenised as they are, or lists of messages, rendered with the chat template.
        n: Completions per prompt.
        temperature: 0 is greedy: one completion is generated and returned n times.
        top_p: Nucleus mass; 1 switches it off. Top-k and penalties are always off.
        max_new_tokens: Longest completion, in tokens, end token included.
        batch_size: Sequences generated together.
        seed: Seed of all streams.
        streams: Tells equal prompts apart: one integer per prompt. Unset: 0 for the first occurrence of a
            prompt, 1 for the second, and so on.
        progress: Called after each batch with the number of prompt-completion pairs done in it.

    Returns:
        For each prompt, in the order given, its n completions.

    Raises:
        ValueError: A prompt has no tokens or does not fit the context of the model with its completion, or
            a setting is out of range.
    """
    if n < 1 or batch_size < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "sampling needs n, batch_size and max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1; "
            f"found n={n}, batch_size={batch_size}, max_new_tokens={max_new_tokens}, "
            f"temperature={temperature}, top_p={top_p}"
        )
    if not prompts:
        return []
    if hasattr(model, "module") and not hasattr(model, "generate"):
        model = model.module  # DDP
    token_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    _check_context(model, token_ids, max_new_tokens)
    digests = [prompt_digest(ids) for ids in token_ids]
    if streams is None:
        streams = occurrences(digests)
    ends = _end_tokens(model, tokenizer)
    greedy = temperature == 0
    copies = 1 if greedy else n
    # longest first: rows of a batch have similar lengths, and memory trouble shows at once
    order = sorted(range(len(prompts)), key=lambda index: -len(token_ids[index]))
    pairs = [(index, copy) for index in order for copy in range(copies)]
    results: list[list[Completion]] = [[] for _ in prompts]
    with generation_mode(model), torch.no_grad():
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            uniforms = None
            if not greedy:
                uniforms = [
                    _uniforms((seed, streams[index], copy, digests[index]), max_new_tokens)
                    for index, copy in batch
                ]
            rows = _generate_batch(
                model,
                [token_ids[index] for index, _ in batch],
                uniforms,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                ends=ends,
                pad=_pad_token(tokenizer, ends),
            )
            texts = tokenizer.batch_decode([row for row, _ in rows], skip_special_tokens=True)
            for (index, _), (row, finished), text in zip(batch, rows, texts, strict=True):
                results[index].append(Completion(text, row, finished))
            if progress is not None:
                progress(len(batch) * (n // copies))
    if greedy:
        results = [completions * n for completions in results]
    return results


def _generate_batch(
    model: Any,
    prompts: list[list[int]],
    uniforms: list[np.ndarray] | None,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    ends: list[int],
    pad: int,
) -> list[tuple[list[int], bool]]:
    """Generate one left-padded batch; return each row's completion ids and whether it ended by itself."""
    longest = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    processors = LogitsProcessorList()
    if uniforms is not None:
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(_InverseCDF(torch.tensor(np.stack(uniforms), device=device), longest))
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        # do_sample off: the last processor leaves one token per row, and argmax takes it
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=pad,
        ),
        logits_processor=processors,
    )
    rows = []
    for written in output[:, longest:].tolist():
        stop = next((place for place, token in enumerate(written) if token in ends), None)
        rows.append((written, False) if stop is None else (written[: stop + 1], True))
    return rows


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt exactly as TRL's ``GRPOTrainer`` feeds them to the model.

    Raises:
        ValueError: The prompt is empty, or is a list of messages and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the prompt is a list of messages, but the tokenizer has no chat template: give the prompt "
                "as text (data.chat_template: never) or set tokenizer.chat_template"
            )
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; generation needs at least one")
    return list(ids)


def prompt_digest(token_ids: Sequence[int]) -> int:
    """Return a 128-bit integer that stands for the prompt in the seed; stable across processes."""
    data = ",".join(map(str, token_ids)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "big")


def occurrences(keys: Sequence[Any]) -> list[int]:
    """Return for each key how many equal ones came before it."""
    seen: Counter[Any] = Counter()
    numbers = []
    for key in keys:
        numbers.append(seen[key])
        seen[key] += 1
    return numbers


def _uniforms(entropy: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(entropy)).random(count)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a completion, by the checkpoint and by the tokenizer; may be empty."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(ends) if isinstance(ends, list | tuple) else {ends}
    found.add(tokenizer.eos_token_id)
    return sorted(token for token in found if token is not None)


def _pad_token(tokenizer: Any, ends: list[int]) -> int:
    """Return the id put on masked positions; its value never reaches a result."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0


def _check_context(model: Any, token_ids: list[list[int]], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    too_long = [index for index, ids in enumerate(token_ids) if len(ids) + max_new_tokens > context]
    if too_long:
        longest = max(len(ids) for ids in token_ids)
        raise ValueError(
            f"{len(too_long)} of {len(token_ids)} prompts do not fit the context of {context} tokens "
            f"together with {max_new_tokens} new tokens (first: prompt {too_long[0]}; longest prompt: "
            f"{longest} tokens). Set evaluate.max_new_tokens to at most {max(context - longest, 0)}, or drop "
            "longer prompts with data.max_prompt_tokens"
        )

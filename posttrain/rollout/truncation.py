"""Truncated sampling (top_p, top_k, min_p) under losses that take ratios.

A sampler that keeps the tokens K of a context draws from q = p 1[K] / Z, with Z = p(K), where p is the
policy at the run's temperature. Losses of the GRPO family take p where q is meant:

on-policy
    the gradient is E_q[A grad log p] = E_q[A grad log q] + E_q[A grad log Z]. The second term is no part of
    any objective: wins move mass into K, losses out of it, and a constant A, which must not matter, does.
off-policy
    the ratio should be q/q_old = (p/p_old) (Z_old/Z), with K the set of the policy that sampled.
vLLM's correction
    vLLM reports log q, TRL's trainer computes log p, so the ratio "trainer over sampler" has a factor Z <=
    1 in every token. In TRL's default mode it is a product over the answer: with top_p 0.95 and Z around
    0.98, an answer of 1000 tokens counts 2e-9 times. The gauges and alarms on the gap see Z too, not the
    gap.

What is done about it, ``rollout: {truncated_sampling: ...}``:

``correct`` (default)
    The loss takes log q = log p - log Z over K, for the live policy and the one that sampled, as
    DeepSeek-V3.2 does (arXiv 2512.02556, "keep sampling mask"). log Z comes from the hidden states of the
    forward that TRL does anyway, with gradient (d log Z / d logits = q - p), tile by tile: one more product
    with the LM head. K is found again by the trainer, from the same policy: on-policy only, and not with a
    sharded head (ZeRO-3, FSDP). The KL term (``beta``), entropies and what methods see stay those of p.
``accept``
    The loss stays as the papers that sample this way have it, biased as above. Said once when the run
    starts.

In both cases vLLM's correction compares like with like: log Z is taken off the trainer's side of that ratio
and of the gauges, and nothing else.

Other changes of the distribution (``repetition_penalty`` and what ``generation_kwargs`` can say) cannot be
found again from the logits of one position; they are refused, or accepted where no correction for vLLM is
on.

What truncation can never give is the gradient for p itself: tokens outside K are never seen. To leave it
out and lower the temperature is cleaner still. This module imports no torch: the rules are those of the
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from posttrain.config.launch import SPLIT, TITLES, launch_mode
from posttrain.rollout.settings import RolloutSettings

_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}

# What may stand in generation_kwargs without changing the distribution.
_HARMLESS = frozenset(
    {"n", "seed", "logprobs", "prompt_logprobs", "max_tokens", "max_new_tokens", "max_length", "detokenize"}
    | {"stop", "stop_token_ids", "stop_strings", "include_stop_str_in_output", "skip_special_tokens"}
    | {"use_cache", "cache_implementation", "num_return_sequences", "pad_token_id", "bos_token_id"}
    | {"eos_token_id", "return_dict_in_generate", "output_scores", "output_logits", "output_kind"}
    | {"compile_config", "disable_compile", "spaces_between_special_tokens", "extra_args"}
)


class TruncationProblem(NamedTuple):
    """Why a run cannot (or, without ``fatal``, should not) sample as it says."""

    message: str
    fix: str
    field: str
    fatal: bool = True


def cuts(fields: Mapping[str, Any]) -> dict[str, float]:
    """Return which of top_p, top_k and min_p cut, with their values; ``generation_kwargs`` win, as in TRL.

    Args:
        fields: Every field of the ``GRPOConfig``.
    """
    sampling = {**{name: fields.get(name) for name in _NEUTRAL}, **(fields.get("generation_kwargs") or {})}
    found = {name: sampling[name] for name in _NEUTRAL}
    off = {name: value is None or value == _NEUTRAL[name] for name, value in found.items()}
    off["top_k"] |= found["top_k"] == -1  # vLLM's way of saying it
    return {name: value for name, value in found.items() if not off[name]}


def reshapes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else makes the sampled distribution another than the loss's, by name."""
    given = fields.get("generation_kwargs") or {}
    apart = {*_NEUTRAL, *_HARMLESS, "do_sample", "repetition_penalty", "temperature"}
    found = {name: value for name, value in given.items() if name not in apart and value}
    if given.get("do_sample", True) is False:
        found["do_sample"] = False
    penalty = given.get("repetition_penalty", fields.get("repetition_penalty"))
    if penalty not in {None, 1.0}:
        found["repetition_penalty"] = penalty
    if given.get("temperature", fields.get("temperature")) != fields.get("temperature"):
        found["temperature"] = given["temperature"]
    if fields.get("use_vllm") and fields.get("vllm_structured_outputs_regex"):
        found["vllm_structured_outputs_regex"] = fields["vllm_structured_outputs_regex"]
    return found


def off_policy(fields: Mapping[str, Any], ranks: int = 1) -> bool:
    """Return whether rollouts are used after the policy has moved, from the fields as written."""
    accumulation = fields.get("gradient_accumulation_steps") or 1
    steps, size = fields.get("steps_per_generation"), fields.get("generation_batch_size")
    if steps is None and size is not None:
        steps = size // ((fields.get("per_device_train_batch_size") or 1) * ranks)
    every = (steps or accumulation) * (fields.get("num_iterations") or 1)
    return bool(accumulation % max(every, 1))


def truncation_problem(
    fields: Mapping[str, Any],
    settings: RolloutSettings,
    *,
    ranks: int = 1,
    other_temperature: str | None = None,
) -> TruncationProblem | None:
    """Return what is wrong with the sampling of a run, or None.

    Args:
        fields: Every field of the ``GRPOConfig``.
        settings: The section ``rollout``.
        ranks: Training processes.
        other_temperature: A method that samples some rows at a temperature of its own, or None.
    """
    cut, other = cuts(fields), reshapes(fields)
    if not cut and not other:
        return None
    said = ", ".join(f"{name}={value}" for name, value in (cut | other).items())
    field = next(iter(cut | other))
    field = field if field in fields else "generation_kwargs"
    accept = "set rollout.truncated_sampling: accept"
    correct = settings.truncated_sampling == "correct"
    if other and fields.get("use_vllm") and fields.get("vllm_importance_sampling_correction"):
        return TruncationProblem(
            f"{', '.join(other)} ({said}) samples from a distribution that the trainer cannot compute, so "
            "the correction for vLLM would take it for an error of the sampler and weigh answers by it",
            "leave it out, or set vllm_importance_sampling_correction: false and "
            "rollout.truncated_sampling: accept",
            field,
        )
    if other and correct:
        return TruncationProblem(
            f"{said} samples from a distribution that the loss cannot compute, so its ratios are off",
            f"leave it out, or {accept} to train with the bias",
            field,
        )
    if not correct:
        what = "the gradient has a term that moves probability into or out of the kept tokens"
        if other:
            what = "its ratios are those of another distribution"
        return TruncationProblem(
            f"the loss knows nothing of {said}: {what}, as in the papers that sample this way",
            "leave it out, or set rollout.truncated_sampling: correct",
            field,
            fatal=False,
        )
    why = None
    if off_policy(fields, ranks):
        why = (
            f"{said} with rollouts that are used after the policy has moved: the tokens that were kept when "
            "they were sampled are not known any more",
            "generate anew for every step (steps_per_generation and num_iterations left out)",
        )
    elif (mode := launch_mode(fields)) in SPLIT:
        why = (
            f"{said} needs the gradient of the LM head, which {TITLES[mode]} shards",
            "launch with ZeRO-2 or plain DDP",
        )
    elif fields.get("use_liger_kernel"):
        why = f"{said} cannot be corrected inside Liger's loss", "set use_liger_kernel: false"
    elif other_temperature is not None:
        why = (
            f"{said} cannot be corrected on rows that {other_temperature} samples at another temperature",
            f"drop {other_temperature}",
        )
    if why is None:
        return None
    return TruncationProblem(why[0], f"{why[1]}, leave it out, or {accept} to train with the bias", field)

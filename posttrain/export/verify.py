"""Does what is on disk compute what was trained? Fingerprints of weights, and logits on probe inputs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit allowed, relative to the largest logit (at least 1), by type of the weights.

An adapter or a full model reloads exactly; a merge rounds every weight once.
"""

NOISE_SHARE = 0.5
"""The root mean square error may not exceed this share of what training changed."""

_PROBE_LENGTH = 128


@dataclass(frozen=True)
class Comparison:
    """Logits of the reloaded model against those of the trained one.

    Attributes:
        max_difference: Largest absolute difference of a logit.
        tolerance: What was allowed.
        rms_difference: Root mean square of the differences.
        rms_change: Root mean square of what training changed (trained against base), or None without an
            adapter.
        positions: Tokens compared; each has one logit per vocabulary row.
    """

    max_difference: float
    tolerance: float
    rms_difference: float
    rms_change: float | None
    positions: int

    @property
    def problem(self) -> str | None:
        """What is wrong, or None."""
        # written so that NaN fails
        if not self.max_difference <= self.tolerance:
            return f"its logits differ by up to {self.max_difference:.3g}, allowed is {self.tolerance:.3g}"
        if self.rms_change is not None and self.rms_difference > NOISE_SHARE * self.rms_change:
            return (
                f"its error (rms {self.rms_difference:.3g}) drowns what the adapter changes (rms "
                f"{self.rms_change:.3g}); after a merge that is rounding: export the adapter instead"
            )
        return None


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_fingerprints(folder: Path, *, leave_out: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder``, by relative path, without those named."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in leave_out and not name.startswith(".cache/"):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def probe_inputs(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[torch.Tensor]:
    """Return the inputs to compare on: each text, and ids spread over the whole vocabulary; (1, T) each."""
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    limit = min(_PROBE_LENGTH, getattr(model.config, "max_position_embeddings", None) or _PROBE_LENGTH)
    ids = [tokenizer(text, add_special_tokens=True)["input_ids"][:limit] for text in texts]
    ids.append(torch.linspace(0, rows - 1, min(limit, rows)).long().tolist())
    return [torch.tensor([row]) for row in ids if row]


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return fp32 logits (T, V) on the CPU for each input, in evaluation mode and without caches.

    The class's own forward is called: a trainer may have wrapped the instance's in mixed precision, which the
    reloaded model will not have.
    """
    device = next(model.parameters()).device
    forward: Any = type(model).forward
    with _evaluating(model):
        return [
            forward(model, input_ids=ids.to(device), use_cache=False).logits[0].float().cpu()
            for ids in inputs
        ]


def compare(
    trained: Sequence[torch.Tensor],
    reloaded: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor] | None,
    dtype: torch.dtype,
) -> Comparison:
    """Compare logits of the trained, the reloaded and (for adapters) the base model, (T, V) each.

    Raises:
        ValueError: The vocabularies differ.
    """
    shapes = [tuple(x.shape) for x in trained], [tuple(x.shape) for x in reloaded]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the reloaded model gives logits of shape {shapes[1]}, the trained one {shapes[0]}")
    one, two = torch.cat(list(trained)), torch.cat(list(reloaded))
    change = None if base is None else (one - torch.cat(list(base))).square().mean().sqrt().item()
    return Comparison(
        max_difference=(one - two).abs().max().item(),
        tolerance=TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) * max(1.0, one.abs().max().item()),
        rms_difference=(one - two).square().mean().sqrt().item(),
        rms_change=change,
        positions=len(one),
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

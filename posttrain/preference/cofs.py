"""COFS-DPO: one model from the fast modules of several domains (arXiv 2406.05534, beside ``ofs_dpo``).

Every domain has been learned by a LoRA of its own on one base; the combination is sum_k lambda_k Delta_k with
lambda on the simplex. How the paper finds lambda is not confirmed. Ours: the lambda that minimises the mean
over domains of the DPO loss on a few held-out pairs of each, over a grid for two domains, by projected
gradient for more. ``posttrain.merging.average.average`` then writes the combination as one adapter, exactly
(the factors side by side; an average of the factors themselves, PEFT's ``linear``, is something else).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from posttrain.evaluation.generate import generation_mode

# of projected gradient: most steps, halvings of one, and the fall in nats that is worth another
_STEPS, _HALVINGS, _GAIN = 40, 8, 1e-5


def project_simplex(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest point of the simplex (all >= 0, sum 1), (K,)."""
    ordered = values.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    count = torch.arange(1, len(values) + 1, dtype=values.dtype)
    last = int((ordered - excess / count > 0).sum()) - 1
    return (values - excess[last] / count[last]).clamp(min=0.0)


@dataclass(frozen=True)
class Buffer:
    """Held-out pairs of one domain. B pairs, chosen rows first, then rejected.

    Attributes:
        ids: (2B, T) token ids, padded.
        attention: (2B, T).
        mask: (2B, T - 1) bool, the completion tokens.
        reference: (2B,) log-probabilities of the completions under the base, nats.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    mask: torch.Tensor
    reference: torch.Tensor

    @classmethod
    def of(cls, policy: PeftModel, batch: Mapping[str, Any]) -> Buffer:
        """Make one of a batch of TRL's preference collator; the reference is ``policy`` without adapters."""
        device = policy.device
        ids, attention = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        mask = batch["completion_mask"][:, 1:].bool().to(device)
        with torch.no_grad(), generation_mode(policy), policy.disable_adapter():
            reference = _sums(policy, ids, attention, mask)
        return cls(ids, attention, mask, reference)

    def log_ratios(self, policy: PeftModel) -> torch.Tensor:
        """Return (2B,) log-ratios of the active adapters to the reference, nats, with gradient."""
        return _sums(policy, self.ids, self.attention, self.mask) - self.reference


@dataclass(frozen=True)
class Fit:
    """Coefficients and what they give.

    Attributes:
        coefficients: lambda by adapter.
        losses: DPO loss on each buffer with them.
        alone: The same with each adapter by itself, by adapter.
    """

    coefficients: dict[str, float]
    losses: list[float]
    alone: dict[str, list[float]]


def _sums(policy: Any, ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = policy(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return torch.where(mask, logps, 0.0).sum(dim=1)


def buffer_loss(policy: PeftModel, buffer: Buffer, beta: float) -> torch.Tensor:
    """Return the mean DPO loss of the adapters that are active on a buffer, 0-dim, with gradient."""
    chosen, rejected = buffer.log_ratios(policy).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


@contextmanager
def combined(policy: PeftModel, adapters: Sequence[str], coefficients: torch.Tensor) -> Iterator[None]:
    """Let ``policy`` be its base plus sum_k lambda_k Delta_k for a while; gradients reach ``coefficients``.

    Raises:
        ValueError: An adapter is no plain LoRA, whose effect is not linear in its scale.
    """
    for name in adapters:
        config: Any = policy.peft_config[name]
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" or config.use_dora:
            raise ValueError(f"a combination needs plain LoRA adapters, {name!r} is none")
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    before = policy.active_adapter
    trains = {parameter: parameter.requires_grad for parameter in policy.parameters()}
    scales = [dict(layer.scaling) for layer in layers]
    tuner: Any = policy.base_model  # a PeftModel by itself activates one
    tuner.set_adapter(list(adapters))
    policy.requires_grad_(False)
    try:
        for layer in layers:
            for name, coefficient in zip(adapters, coefficients, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] = layer.scaling[name] * coefficient
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)
        policy.set_adapter(before)
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)


def fit(
    policy: PeftModel, adapters: Sequence[str], buffers: Sequence[Buffer], *, beta: float, points: int = 21
) -> Fit:
    """Return the coefficients on the simplex with the lowest mean DPO loss over domains.

    Args:
        policy: One base with all adapters loaded.
        adapters: Their names.
        buffers: One for each domain.
        beta: As in training.
        points: Of the grid for two adapters, ends included; more adapters take projected gradient from equal
            coefficients, with halved steps where the loss does not fall.

    Raises:
        ValueError: There is nothing to combine.
    """
    if len(adapters) < 2 or not buffers:
        raise ValueError(
            f"a combination needs two adapters and a buffer, found {len(adapters)} and {len(buffers)}"
        )

    def losses(coefficients: torch.Tensor) -> torch.Tensor:
        with combined(policy, adapters, coefficients):
            return torch.stack([buffer_loss(policy, buffer, beta) for buffer in buffers])

    def value(coefficients: torch.Tensor) -> float:
        with torch.no_grad():
            return float(losses(coefficients).double().mean())

    with generation_mode(policy):
        if len(adapters) == 2:
            grid = [torch.tensor([1 - x, x]) for x in torch.linspace(0, 1, points).tolist()]
            best = min(grid, key=value)
        else:
            best = _descend(losses, value, torch.full((len(adapters),), 1 / len(adapters)))
        with torch.no_grad():
            corners = torch.eye(len(adapters))
            alone = {name: losses(row).tolist() for name, row in zip(adapters, corners, strict=True)}
            final = losses(best).tolist()
    return Fit(dict(zip(adapters, best.tolist(), strict=True)), final, alone)


def _descend(losses: Any, value: Any, start: torch.Tensor) -> torch.Tensor:
    best, lowest, step = start, value(start), 1.0
    for _ in range(_STEPS):
        point = best.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(losses(point).mean(), point)
        size = float(slope.abs().max())
        for _ in range(_HALVINGS):
            candidate = project_simplex(best - step * slope / max(size, 1e-12))
            found = value(candidate)
            if found < lowest - _GAIN:
                break
            step /= 2
        else:
            return best
        best, lowest, step = candidate, found, min(2 * step, 1.0)
    return best

"""Sums of gradients over examples, of all candidate weights at once, with one dense gradient alive at a time.

Used by what scores weights on examples (:mod:`posttrain.selection.fish`, :mod:`posttrain.selection.ssd`,
:mod:`posttrain.selection.wagle`). The model is in eval mode meanwhile and comes back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from posttrain._lazy import torch

if TYPE_CHECKING:
    from torch import nn

    Batch = Mapping[str, torch.Tensor]

Statistic = Literal["sum", "square", "absolute"]
"""What is summed over backward passes: the gradient g, g^2 or |g|."""


def mean_token_nll(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """Return the mean negative log-likelihood (nats per token) of the labels, 0-dim; None without a label.

    Args:
        model: A causal language model.
        batch: ``input_ids`` and ``labels`` (B, T), -100 where nothing counts; optionally ``attention_mask``.
    """
    labels = batch["labels"][:, 1:]
    if not bool((labels != -100).any()):
        return None
    logits = _logits(model, batch)[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def mean_squared_logits(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """Return the mean over positions of the squared 2-norm of the logits, 0-dim: a loss without labels.

    Positions are those that predict a label where the batch has ``labels``, else all that are attended to.
    """
    logits = _logits(model, batch).float()
    if "labels" in batch:
        logits, where = logits[:, :-1], batch["labels"][:, 1:] != -100
    else:
        where = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if not bool(where.any()):
        return None
    return logits[where].square().sum(dim=-1).mean()


def gradient_sums(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    loss: Callable[[nn.Module, Batch], torch.Tensor | None] = mean_token_nll,
    statistic: Statistic = "sum",
    device: torch.device | str | None = None,
) -> tuple[dict[str, torch.Tensor], int]:
    """Return per parameter the sum over batches of g, g^2 or |g|, fp32 at least, and the number of batches.

    Each gradient is added up and dropped as soon as it is complete.

    Args:
        model: Unwrapped.
        parameters: Those to look at; the others are frozen meanwhile. A parameter that the loss does not
            reach has 0.
        batches: One backward pass each; those whose loss is None are left out and not counted.
        loss: Of one batch.
        statistic: What is summed.
        device: Where the sums live; each weight's own by default. ``cpu`` off-loads 4 bytes per weight.

    Raises:
        FloatingPointError: A sum is not finite; the message names the parameter.
    """
    totals = {
        name: torch.zeros(
            p.shape,
            dtype=torch.promote_types(p.dtype, torch.float32),
            device=p.device if device is None else device,
        )
        for name, p in parameters.items()
    }

    def taker(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.to(total.dtype)
            if statistic == "square":
                gradient = gradient.square()
            elif statistic == "absolute":
                gradient = gradient.abs()
            total.add_(gradient.to(total.device))
            parameter.grad = None

        return take

    count = 0
    with scoring(model, parameters):
        hooks = [p.register_post_accumulate_grad_hook(taker(totals[name])) for name, p in parameters.items()]
        try:
            for batch in batches:
                found = loss(model, batch)
                if found is not None:
                    count += 1
                    if found.requires_grad:
                        found.backward()
        finally:
            for hook in hooks:
                hook.remove()
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError(
                f"the summed gradient of {name} is not finite: look for a broken weight or row, or use fp32"
            )
    return totals, count


def single_rows(batch: Batch, *, labelled: bool = True) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the rows of a batch one by one, (1, T) each, without padding.

    Args:
        batch: ``input_ids``, ``labels`` and optionally ``attention_mask``, (B, T).
        labelled: Whether labels are needed.

    Raises:
        ValueError: Tensors are missing or differ in shape, or a row joins several sequences.
    """
    shapes = {name: tuple(batch[name].shape) for name in ("input_ids", "labels") if name in batch}
    needed = {"input_ids", "labels"} if labelled else {"input_ids"}
    if not needed <= set(shapes) or len(set(shapes.values())) != 1 or batch["input_ids"].dim() != 2:
        raise ValueError(
            "an example needs input_ids and labels of one shape (rows, tokens), found "
            f"{shapes or list(batch)}"
        )
    shape = batch["input_ids"].shape
    positions = batch.get("position_ids")
    if positions is not None and bool((positions.reshape(-1, positions.shape[-1])[:, 1:] == 0).any()):
        raise ValueError(
            "a row joins several sequences (its position_ids start anew), and the score is per sequence: "
            "turn off packing and padding_free for making the plan"
        )
    for number in range(shape[0]):
        mask = batch["attention_mask"][number].bool() if "attention_mask" in batch else slice(None)
        yield {
            name: value[number : number + 1, mask] if value.shape[:2] == shape else value[number : number + 1]
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and name not in ("attention_mask", "position_ids")
        }


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    device = next(model.parameters()).device
    inputs = {
        k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")
    }
    output: Any = model(**inputs)
    logits: torch.Tensor = output.logits
    return logits


@contextmanager
def scoring(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients for ``parameters`` only and none of them left over; all put back afterwards."""
    kept = {id(p) for p in parameters.values()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in kept)
        parameter.grad = None
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient

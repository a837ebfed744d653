r"""AdamW that moves the parts of a tensor only in the steps they take part in.

A tensor is divided into parts along one dimension, each with a label. Before a step, :meth:`StrictAdamW.mark`
says which labels take part in it. In the parts of the others nothing happens at all: no decay, no momentum,
no counting; they go on later as if the steps in between had not been. With all labels marked it is
``torch.optim.AdamW``. (With one shared AdamW and zeroed gradients a part that pauses drifts by up to 10 lr.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from posttrain.selection.adamw import SelectiveAdamW, _fresh

Part = tuple[str, int, torch.Tensor | None]
"""Label, dimension, and the (k,) positions along it; None for the whole tensor."""


class StrictAdamW(SelectiveAdamW):
    """See the module page.

    Args:
        params: Parameters or groups, as for ``torch.optim.AdamW``.
        parts: Of each parameter; together they are all of it.
        lr: Step size.
        betas: Decay of the two moments.
        eps: Added to the square root.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        parts: Mapping[torch.nn.Parameter, Sequence[Part]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.parts = dict(parts)
        self._marked: set[str] = set()

    def mark(self, labels: Iterable[str]) -> None:
        """Let the parts with these labels take part in the next step, with those marked already."""
        self._marked.update(labels)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step with the marked parts, and forget the marks."""
        loss = super().step(closure)
        self._marked.clear()
        return loss

    def _move(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state, parts = self.state[parameter], self.parts[parameter]
        if not state:
            ages = torch.zeros(len(parts), dtype=torch.int64, device=parameter.device)
            state.update(_fresh(parameter, None), ages=ages)
        assert parameter.grad is not None
        for number, (label, dim, index) in enumerate(parts):
            if label not in self._marked:
                continue
            state["ages"][number] += 1
            wholes = [state["exp_avg"], state["exp_avg_sq"], state.get("master", parameter)]
            if index is None:
                gradient, pieces = parameter.grad, wholes
            else:
                index = index.to(parameter.device)
                gradient = parameter.grad.index_select(dim, index)
                pieces = [whole.index_select(dim, index) for whole in wholes]
            self._advance(gradient, pieces, int(state["ages"][number]), group)
            if index is not None:
                for whole, piece in zip(wholes, pieces, strict=True):
                    whole.index_copy_(dim, index, piece)
            if "master" in state:
                value = pieces[2].to(parameter.dtype)
                if index is None:
                    parameter.copy_(value)
                else:
                    parameter.index_copy_(dim, index, value)

    @staticmethod
    def _advance(
        gradient: torch.Tensor, pieces: Sequence[torch.Tensor], age: int, group: Mapping[str, Any]
    ) -> None:
        first, second, value = pieces
        gradient = gradient.to(first.dtype)
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            value.mul_(1 - group["lr"] * group["weight_decay"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second.sqrt() / (1 - beta2**age) ** 0.5).add_(group["eps"])
        value.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**age))

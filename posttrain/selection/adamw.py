r"""AdamW that moves the selected scalars of dense parameters, and keeps state for nothing else.

Formula
    For a selected scalar with gradient g at its k-th step with the mask on (its age)::

        w <- w (1 - lr * wd)
        m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
        w <- w - lr * (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

    A scalar that is not selected is not read and not written: no decay, no momentum, bit-identical.

What differs from ``torch.optim.AdamW`` with zeroed gradients
    - State (m, v, a master for half precision, the start for late ones) exists per *selected* scalar.
    - Decay does not reach unselected scalars, and a scalar that leaves the selection stops at once
      (with zeroed gradients its momentum carries it on by up to 10 lr).
    - Bias correction uses the age of each scalar. With the shared step number a scalar that is released late
      begins with up to 6.6 lr per step; ``age_correction=False`` keeps that, as the public toolkit does.
    For a selection that never changes the results are those of ``torch.optim.AdamW`` to the bit (fp32, no
    decay elsewhere).

Sources: the rules of arXiv 2408.14470 (ID3), with the age correction derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer


class SelectiveAdamW(Optimizer):
    """See the module page.

    Args:
        params: Parameters or groups, as for ``torch.optim.AdamW``.
        selections: Sorted flat positions by parameter; a parameter that is not in it moves as a whole.
        lr: Step size.
        betas: Decay of the two moments.
        eps: Added to the square root.
        weight_decay: Decoupled, on selected scalars only.
        age_correction: Use ages instead of the step number of the parameter.

    Raises:
        ValueError: A setting is out of range, or a selection is for a parameter that is in no group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        selections: Mapping[torch.nn.Parameter, torch.Tensor] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        age_correction: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "lr, eps and weight_decay must be >= 0 and betas in [0, 1), found "
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.age_correction = age_correction
        self._mastered, self._seen = 0, torch.zeros((), dtype=torch.int64)
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for parameter, index in (selections or {}).items():
            if id(parameter) not in known:
                raise ValueError("a selection is for a parameter that is in no group of this optimiser")
            self.select(parameter, index)

    @torch.no_grad()
    def select(self, parameter: torch.nn.Parameter, index: torch.Tensor) -> None:
        """Change what of a parameter moves: scalars that stay keep state and age, new ones begin with none.

        Args:
            parameter: One of this optimiser's.
            index: (k,) sorted unique flat positions; may be empty.
        """
        index = index.to(parameter.device, torch.int32 if parameter.numel() < 2**31 else torch.int64)
        state = self.state[parameter]
        fresh = _fresh(parameter, len(index))
        step = state.get("step", torch.zeros((), dtype=torch.float32))
        before = state.get("index")
        start = torch.full((len(index),), int(step), dtype=torch.int32, device=parameter.device)
        if before is not None and len(before) and len(index):
            place = torch.searchsorted(before, index).clamp(max=len(before) - 1)
            stays = before[place] == index
            place = place[stays]
            for name, values in fresh.items():
                values[stays] = state[name][place]
            start[stays] = state["start"][place] if "start" in state else 0
        if "master" in fresh:
            new = torch.ones(len(index), dtype=torch.bool, device=parameter.device)
            if before is not None and len(before) and len(index):
                new = ~stays
            fresh["master"][new] = parameter.view(-1)[index[new]].to(fresh["master"].dtype)
        state.update(fresh, index=index, step=step)
        # one number serves all while every scalar began with the parameter
        if bool((start == 0).all()):
            state.pop("start", None)
        else:
            state["start"] = start

    def visible(self) -> float | None:
        """Return the share of the scalars with a master that the last step changed in the weights' type."""
        return None if not self._mastered else int(self._seen) / self._mastered

    def selected(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return the positions of a parameter that move, None for all of them."""
        return self.state[parameter].get("index") if parameter in self.state else None

    def gradients(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return (gradient, positions that count or None for all) of every parameter that has one."""
        return [
            (parameter.grad, self.selected(parameter))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._mastered = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_fresh(parameter, None), step=torch.zeros((), dtype=torch.float32))
        index = state.get("index")
        state["step"] += 1
        if index is not None and not len(index):
            return
        assert parameter.grad is not None
        gradient = parameter.grad if index is None else parameter.grad.reshape(-1).index_select(0, index)
        gradient = gradient.to(state["exp_avg"].dtype)
        value = state.get("master")
        if value is None:
            value = parameter if index is None else parameter.view(-1)[index]
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            value.mul_(1 - group["lr"] * group["weight_decay"])
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = state["step"].item()
        if "start" in state and self.age_correction:
            age = (step - state["start"]).double()
            denominator = second.sqrt().div_((1 - beta2**age).sqrt_().to(second.dtype)).add_(group["eps"])
            value.sub_(first / denominator * (group["lr"] / (1 - beta1**age)).to(first.dtype))
        else:
            denominator = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
            value.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
        if value is parameter:
            return
        rounded = value.to(parameter.dtype)
        if "master" in state:
            self._count(parameter if index is None else parameter.view(-1)[index], rounded)
        if index is not None:
            parameter.view(-1)[index] = rounded
        else:
            parameter.copy_(rounded)

    def _count(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add what a step changes in the weights' type; on the device, for :meth:`visible` to fetch."""
        seen = (after != before).sum()
        self._seen = self._seen.to(seen.device) + seen if self._mastered else seen
        self._mastered += before.numel()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore, with the types that were saved (torch would cast everything to the parameters' type)."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        groups = zip(self.param_groups, state_dict["param_groups"], strict=True)
        for parameter, number in (
            (p, n) for ours, theirs in groups for p, n in zip(ours["params"], theirs["params"], strict=True)
        ):
            for name, value in saved.get(number, {}).items():
                device = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.to(device).clone()


def _fresh(parameter: torch.nn.Parameter, count: int | None) -> dict[str, torch.Tensor]:
    """Return empty state of ``count`` scalars, or of all in the parameter's shape."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    shape = parameter.shape if count is None else (count,)
    names = ["exp_avg", "exp_avg_sq"]
    state = {name: torch.zeros(shape, dtype=dtype, device=parameter.device) for name in names}
    if parameter.dtype != dtype:
        state["master"] = (
            parameter.detach().to(dtype) if count is None else torch.zeros_like(state["exp_avg"])
        )
    return state

"""Methods that train two adapters on one base, and their micro-step; see ``ofs_dpo``.

Each adapter gets TRL's whole loss by itself. The backward of the second one comes first, with it active, so
that gradient checkpointing recomputes layers with the adapter they were computed with; the first one's is
left to the trainer. TRL's numbers are the first one's.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from posttrain._lazy import torch
from posttrain.preference.method import Method

if TYPE_CHECKING:
    from posttrain.preference.trainer import DPOTrainer
    from posttrain.rl.gauges import Gauges

PATIENCE = 10
"""Optimiser steps in a row that may be left out."""

logger = logging.getLogger(__name__)


class TwoAdapters(Method):
    """A method with two adapters that both train; subclasses add them in ``start``, and set ``_policy``."""

    _policy: Any = PrivateAttr(default=None)
    _skipped: int = PrivateAttr(default=0)

    @property
    def adapters(self) -> tuple[str, str]:
        """Names: the one that is served, then the other."""
        raise NotImplementedError

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates by adapter, over that of the trainer."""
        return dict.fromkeys(self.adapters, 1.0)

    def joint(
        self,
        losses: tuple[torch.Tensor, torch.Tensor],
        margins: tuple[torch.Tensor, torch.Tensor],
        beta: float,
        gauges: Gauges,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the adapters minimise in this micro-batch, as :attr:`adapters` are ordered.

        Args:
            losses: TRL's loss of each, 0-dim with gradient.
            margins: (B,) score of the chosen minus that of the rejected answer, with gradient.
            beta: TRL's.
            gauges: Where numbers are logged.
        """
        raise NotImplementedError

    def activate(self, adapter: str) -> None:
        """Make an adapter the active one; both stay trainable, which PEFT by itself undoes."""
        self._policy.set_adapter(adapter)
        self._policy.set_requires_grad(list(self.adapters), True)

    def trained(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """Return the parameters of each adapter."""
        one, other = (list(parameters_of(self._policy, adapter).values()) for adapter in self.adapters)
        return one, other

    def regroup(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an adapter with a learning rate of its own groups of its own."""
        for adapter, rate in self.rates.items():
            if rate == 1:
                continue
            mine = set(parameters_of(self._policy, adapter).values())
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in mine]
                group["params"] = [parameter for parameter in group["params"] if parameter not in mine]
                if own:
                    rest = {name: value for name, value in group.items() if name != "params"}
                    optimizer.add_param_group({**rest, "params": own, "lr": rest["lr"] * rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def average_gradients(self, accelerator: Any) -> None:
        """Average the gradients over ranks; DDP does not follow two forwards and backwards."""
        parameters = [parameter for module in self.trained() for parameter in module]
        for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
            own = [parameter for parameter in parameters if parameter.dtype == dtype]
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            whole = accelerator.reduce(torch.cat([grad.flatten() for grad in found]), reduction="mean")
            for parameter, part in zip(own, whole.split([p.numel() for p in own]), strict=True):
                parameter.grad = part.view_as(parameter).clone()

    def guard(self) -> None:
        """Leave out an optimiser step of which a gradient is not finite.

        Raises:
            FloatingPointError: It is the tenth in a row.
        """
        parameters = [parameter for module in self.trained() for parameter in module]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            self._skipped = 0
            return
        self._skipped += 1
        if self._skipped >= PATIENCE:
            raise FloatingPointError(
                f"{self.name} left out {self._skipped} optimiser steps in a row, of which a gradient was not "
                "finite: lower the learning rate, or train in bfloat16 or float32"
            )
        logger.warning("%s leaves out an optimiser step: a gradient is not finite", self.name)
        for parameter in parameters:
            parameter.grad = None


def parameters_of(policy: Any, adapter: str) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of an adapter; names of two agree but for ``*`` in place of theirs."""
    found = {}
    for name, parameter in policy.named_parameters():
        parts = name.split(".")  # the name of the adapter is a key of a module or parameter dictionary
        if adapter in parts:
            found[".".join("*" if part == adapter else part for part in parts)] = parameter
    return found


def refuse(trainer: DPOTrainer, pair: TwoAdapters, selection: Any) -> None:
    """Refuse what two passes cannot go with.

    Raises:
        ValueError: The launcher shards, weights are selected, or another method keeps something per pass.
    """
    kind = trainer.accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ValueError(
            f"{pair.name} changes adapters within a step, which {kind} does not follow (weights of the other "
            "adapter have to be there as well): launch with plain DDP"
        )
    if selection is not None:
        raise ValueError(f"{pair.name} trains two whole adapters: drop the selection")
    for method in trainer.methods:
        own = type(method)
        if method is not pair and (
            "kl" in method.needs
            or method.wants_ids
            or method.lists is not None
            or own.start is not Method.start
            or own.watch_reference is not Method.watch_reference
            or own.replaces_loss
        ):
            raise ValueError(
                f"{pair.name} makes two passes per micro-batch, and {method.name} is made for one: use one "
                "of them"
            )


def two_passes(trainer: DPOTrainer, pair: TwoAdapters, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Go forward with both adapters and backward with the second; return the loss of the first."""
    first, second = pair.adapters
    losses, margins = [], []
    metrics, tokens = trainer._metrics, 0
    with trainer.one_reference():
        for adapter in (first, second):
            pair.activate(adapter)
            losses.append(trainer.one_pass(model, inputs, False))
            chosen, rejected = trainer.scores.chunk(2)
            margins.append(chosen - rejected)
            if adapter == first:  # the second pass counts and logs nothing
                tokens = trainer._total_train_tokens
                trainer._metrics = {mode: defaultdict(list) for mode in metrics}
    trainer._metrics, trainer._total_train_tokens = metrics, tokens
    del trainer.scores
    trainer._gauges.enter(pair.name)
    loss, other = pair.joint((losses[0], losses[1]), (margins[0], margins[1]), trainer.beta, trainer._gauges)
    trainer.flush_gauges()
    trainer._refuse_nonfinite(other, inputs)
    pair.activate(second)
    # as the trainer does with the loss that it is given, whose backward is not under autocast
    with torch.autocast(trainer.args.device.type, enabled=False):
        trainer.accelerator.backward(other / trainer.current_gradient_accumulation_steps)
    pair.activate(first)
    return loss

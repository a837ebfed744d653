r"""OFS-DPO: a fast and a slow LoRA on one base that chase each other (arXiv 2406.05534). Experimental.

Idea
    The gradient of DPO fades as its margin grows. Two LoRA modules of one shape, trained on the same stream
    at different learning rates, are compared with each other as well, which keeps a gradient alive: the fast
    one widens the gap between the two, the slow one closes it.

Formula
    mu_M is the margin of module M on a pair: the score of the chosen answer minus that of the rejected one,
    each the sum over tokens of log pi_M - log ref. sg is a constant::

        chase       C(mu_F, mu_S) = -log sigmoid(beta (mu_F - mu_S)), the argument kept within +- clamp
        objectives  F: L(F) + alpha C(mu_F, sg mu_S)         S: L(S) - alpha C(sg mu_F, mu_S)

    L is TRL's loss of the module by itself, any that is a function of the margin. The opposite side has to be
    constant: of one sum the two chase terms cancel, and two DPO runs are left. Both margins get an extra push
    of about alpha beta / 2 while the modules are close, and it does not end when L is saturated.

    Every ``interval`` optimiser steps the means of L over these steps are compared; the module with the lower
    one takes the role F, the other S. Learning rates stay with the modules: ``default`` learns at the
    trainer's, ``slow`` at ``slow_lr_ratio`` times it. With alpha = 0 these are two DPO runs, bit for bit.

What is not confirmed
    Only the paper's abstract could be read; equations and signs are those of a re-implementation for
    diffusion models that cites the paper's equation numbers, in the words of summaries. Summaries say that
    the chase *minimises* the gap, and that both modules share an objective. Open as well: the paper's alpha,
    ratio, interval and rank, and whether parameters or only roles change hands. Some notes call the slow
    module a moving average of the fast one; that is another method.

Defaults and where they come from
    Ours: alpha 0.1 (0.01 to 0.5 are sensible), slow_lr_ratio 0.3 (0.1 to 0.5), interval 20 (10 to 100), no
    clamp (the re-implementation keeps margins within 10; here the bound is on the argument of the chase,
    where its pull then ends, and L is left as TRL has it).

Needs
    A LoRA adapter. Two forwards and backwards per micro-batch, both graphs of activations at once, one
    forward of the reference. The reference is the model as training begins: the base with a fresh adapter, a
    frozen copy named ``ref`` of one that was trained before. A fresh slow module starts with another draw of
    A; beside an adapter that was trained it starts as its copy.

Composes with
    Every loss of the margin, precomputed references, bf16, accumulation, gradient checkpointing, DDP; methods
    that change scores or add to the loss (RPO, Flex-DPO) act in both modules. Refused: full fine-tuning (two
    copies of the model), soft prompts and other adapters, a moving reference, DeepSpeed and FSDP (modules
    change within a step), selections, and methods that keep a state per pass or train weights of their own.

When not to use it
    Where margins should come to rest: they keep growing here. Add RPO, stop early, or clamp.

What to watch
    TRL's numbers and ``loss`` are those of F. ``ofs_dpo/margin_fast`` and ``margin_slow`` are mu,
    ``loss_fast`` and ``loss_slow`` L, ``chase`` C, ``default_is_fast`` the role of ``default``; ``skipped``
    counts optimiser steps left out because a gradient was not finite (10 in a row stop the run). The modules
    are clipped each by itself, ``grad_norm`` is F's.

What is served
    F. It is the active module between steps, so evaluations during training are of it. When training ends it
    is put into ``default`` and ``slow`` is removed. A checkpoint has both, ``default`` outside and ``slow``
    in a folder; the role is in its state. :mod:`posttrain.preference.cofs` combines the F of several domains.

Official code
    None found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from posttrain._lazy import torch
from posttrain.preference.passes import TwoAdapters, parameters_of
from posttrain.rl.method import Conflict, Setup, not_sharded

if TYPE_CHECKING:
    from posttrain.rl.gauges import Gauges

FAST, SLOW = "default", "slow"
"""Names of the adapters; TRL wants the one that it is given to be called ``default``."""


def chase(fast: torch.Tensor, slow: torch.Tensor, *, beta: float, clamp: float | None = None) -> torch.Tensor:
    """Return -log sigmoid(beta (mu_F - mu_S)) per pair.

    Args:
        fast: (B,) mu_F, nats.
        slow: (B,) mu_S.
        beta: Temperature.
        clamp: Bound of the argument of the sigmoid, None for none; beyond it there is no gradient.
    """
    argument = beta * (fast - slow)
    if clamp is not None:
        argument = argument.clamp(-clamp, clamp)
    return -torch.nn.functional.logsigmoid(argument)


def objectives(
    losses: tuple[torch.Tensor, torch.Tensor],
    margins: tuple[torch.Tensor, torch.Tensor],
    *,
    alpha: float,
    beta: float,
    clamp: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what F and S minimise, each with the other held constant.

    Args:
        losses: L(F) and L(S), 0-dim.
        margins: mu_F and mu_S, (B,) nats.
        alpha: Weight of the chase; 0 returns ``losses``.
        beta: Temperature.
        clamp: See :func:`chase`.
    """
    if not alpha:
        return losses
    fast, slow = margins
    return (
        losses[0] + alpha * chase(fast, slow.detach(), beta=beta, clamp=clamp).mean(),
        losses[1] - alpha * chase(fast.detach(), slow, beta=beta, clamp=clamp).mean(),
    )


class OFSDPO(TwoAdapters):
    """A fast and a slow LoRA. See the module page."""

    name = "ofs_dpo"
    title = "OFS-DPO: a fast and a slow LoRA that chase each other (experimental)"
    paper = "2406.05534"
    needs_margin: ClassVar[bool] = True

    alpha: float = Field(0.1, ge=0, description="Weight of the chase; 0 leaves two DPO runs.")
    slow_lr_ratio: float = Field(
        0.3, gt=0, description="Learning rate of the slow module over that of the trainer."
    )
    interval: int = Field(20, ge=1, description="Optimiser steps between two decisions about the roles.")
    clamp: float | None = Field(
        None, gt=0, description="Bound of the argument of the chase's sigmoid; null for none."
    )
    seed: int = Field(1, ge=0, description="Of the slow module's draw of A.")

    _swapped: bool = PrivateAttr(default=False)
    _sums: dict[str, float] = PrivateAttr(default_factory=lambda: {FAST: 0.0, SLOW: 0.0})
    _counts: list[int] = PrivateAttr(default_factory=lambda: [0, 0])  # micro-batches, optimiser steps
    _waiting: list[Any] = PrivateAttr(default_factory=list)

    @property
    def adapters(self) -> tuple[str, str]:
        """The adapters in the roles F and S."""
        return (SLOW, FAST) if self._swapped else (FAST, SLOW)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates over that of the trainer; they stay with the modules."""
        return {FAST: 1.0, SLOW: self.slow_lr_ratio}

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse full fine-tuning and references that move."""
        yield from super().conflicts(setup)
        trainer = setup.trainer
        yield from not_sharded(
            setup, "ofs_dpo changes adapters within a step and keeps the gradients of both"
        )
        if not setup.adapter:
            yield Conflict(
                "ofs_dpo trains two LoRA modules on one base, and full fine-tuning would need two models: "
                "add an adapter (peft_config; model.adapter of type lora)"
            )
        if trainer.get("sync_ref_model"):
            yield Conflict(
                "ofs_dpo measures both modules against where they began: set sync_ref_model to false",
                field="sync_ref_model",
            )

    # ---- modules ----------------------------------------------------------------------------------------

    def start(self, model: torch.nn.Module) -> None:
        """Add the slow module.

        Raises:
            ValueError: The adapter is no plain LoRA named ``default``.
        """
        from posttrain.adapters.reference import harmless

        policy: Any = model
        config = policy.peft_config.get(FAST)
        if config is None or SLOW in policy.peft_config:
            raise ValueError(
                f"ofs_dpo needs one adapter, called {FAST!r}, and adds {SLOW!r}; found "
                f"{', '.join(policy.peft_config)}"
            )
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ValueError(f"ofs_dpo needs a LoRA adapter inside the layers, found {kind}: use type lora")
        if config.bias != "none":
            raise ValueError(f"ofs_dpo needs LoRA with bias none, the base is shared; found {config.bias!r}")
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            policy.add_adapter(SLOW, harmless(config))
        fast, slow = parameters_of(policy, FAST), parameters_of(policy, SLOW)
        trained = _is_trained(policy)
        for name, parameter in slow.items():
            values = fast[name].data if trained else parameter.data
            parameter.data = values.to(fast[name].dtype, copy=True)
        self._policy, self._swapped = policy, False
        self._sums, self._counts, self._waiting, self._skipped = {FAST: 0.0, SLOW: 0.0}, [0, 0], [], 0
        self.activate(FAST)

    # ---- a micro-step and an optimiser step -------------------------------------------------------------

    def joint(
        self,
        losses: tuple[torch.Tensor, torch.Tensor],
        margins: tuple[torch.Tensor, torch.Tensor],
        beta: float,
        gauges: Gauges,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what F and S minimise in this micro-batch.

        Args:
            losses: L(F) and L(S), 0-dim with gradient.
            margins: mu_F and mu_S, (B,) with gradient.
            beta: TRL's.
            gauges: Where numbers are logged.
        """
        self._waiting.append([loss.detach() for loss in losses])
        for name, margin, loss in zip(("fast", "slow"), margins, losses, strict=True):
            gauges.mean(f"margin_{name}", margin)
            gauges.mean(f"loss_{name}", loss)
        gauges.mean("chase", chase(margins[0].detach(), margins[1].detach(), beta=beta, clamp=self.clamp))
        gauges.mean("default_is_fast", losses[0].new_tensor(float(not self._swapped)))
        gauges.max("skipped", losses[0].new_tensor(float(self._skipped)))
        return objectives(losses, margins, alpha=self.alpha, beta=beta, clamp=self.clamp)

    def optimizer_step(self) -> None:
        """Average the losses of the step over ranks, and give the roles anew when they are due."""
        from accelerate import PartialState
        from accelerate.utils import reduce

        found = torch.stack([torch.stack(pair).float() for pair in self._waiting]).sum(dim=0)
        if PartialState().num_processes > 1:
            found = reduce(found, "mean")
        for adapter, value in zip(self.adapters, found.tolist(), strict=True):
            self._sums[adapter] += value
        self._counts = [self._counts[0] + len(self._waiting), self._counts[1] + 1]
        self._waiting = []
        if self._counts[1] < self.interval:
            return
        fast, slow = self.adapters
        if self._sums[slow] < self._sums[fast]:
            self._swapped = not self._swapped
            self.activate(self.adapters[0])
        self._sums, self._counts = {FAST: 0.0, SLOW: 0.0}, [0, 0]

    def finish(self, model: torch.nn.Module) -> None:
        """Leave F alone in ``default``."""
        policy: Any = model
        if SLOW not in policy.peft_config:
            return
        if self._swapped:
            slow = parameters_of(policy, SLOW)
            for name, parameter in parameters_of(policy, FAST).items():
                parameter.data.copy_(slow[name].data)
        policy.set_adapter(FAST)
        policy.delete_adapter(SLOW)

    def state_dict(self) -> dict[str, Any]:
        """Return the roles and what the next decision is made of, the same on every rank."""
        return {"swapped": self._swapped, "sums": dict(self._sums), "counts": list(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the roles."""
        self._swapped, self._sums, self._counts = state["swapped"], dict(state["sums"]), list(state["counts"])
        self.activate(self.adapters[0])


def _is_trained(policy: Any) -> bool:
    """Whether the adapter ``default`` does something already."""
    return any(
        "lora_B" in n or "lora_embedding_B" in n
        for n, p in parameters_of(policy, FAST).items()
        if bool(p.any())
    )

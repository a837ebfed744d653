r"""GARDO, part 2: the reference policy follows when it has been left behind (arXiv 2512.24138).

Idea
    A KL penalty to the initial policy becomes a brake once the policy has learnt something. GARDO makes the
    current policy the reference, all at once, when the KL gets large or a number of steps has passed; a
    hacked reward must then start from a policy that was penalised all the way there. The parts ``gardo_kl``
    and ``gardo_diversity`` are separate methods.

Formula
    Over one optimiser step, all ranks and all tokens the KL term acts on::

        kl = mean over tokens of ( exp(lref - l) - (lref - l) - 1 )       nats per token

        kl > max_kl   or   max_steps optimiser steps since the last copy
            =>   reference <- policy, before the next generation

    Tokens whose KL weight is 0 (``gardo_kl``) do not count; without any gated token kl is 0. The copy waits
    for the next generation because the log-probabilities of the rollouts in use come from the old reference.
    Optimiser state is kept. With an adapter the reference is a frozen copy of the adapter named ``ref``.

Defaults and where they come from
    max_steps 100: paper. max_kl 0.05 nats per token is **ours** (0.01 to 0.1 is sensible): the paper's 1e-4
    and the official 3e-4 are for image models and another KL, and do not carry over. No language-model result
    exists. Either may be null; with both null the method does nothing.

Needs
    A reference that something uses: ``beta`` above 0, or a method with a KL of its own. The measurement
    costs no forward. Memory: that of the reference; with an adapter one more copy of the adapter. A
    checkpoint after the first copy holds the reference.

Composes with
    ``gardo_kl`` (the paper's pair), every ``loss_type``, LoRA. Refused: ACE (its drift would start again
    from zero at every copy), ``sync_ref_model`` (two mechanisms that move the reference), DeepSpeed
    ZeRO-3 (FSDP2 works).

When not to use it
    When the distance to the initial policy itself matters, for example to keep a model's general abilities:
    after n copies the bound is n times as wide.

Official code
    Tests the KL averaged over an accumulation window and acts at the next epoch, after more than 15 epochs of
    two updates at the latest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, PrivateAttr

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Method, Need, Setup, Tokens

_PARTS = {"gardo_kl", "gardo_reference", "gardo_diversity"}


def kl_sum(
    logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the k3 estimate of KL(policy || reference) and the number of tokens, 0-dim, detached.

    Args:
        logps: (B, C) log-probabilities of the sampled tokens under the policy, nats.
        ref_logps: (B, C) the same under the reference.
        mask: (B, C), non-zero on tokens that count.
    """
    counts = mask != 0
    difference = (ref_logps - logps).detach().float().masked_fill(~counts, 0.0)
    return (difference.exp() - difference - 1).sum(), counts.sum()


def reference_is_stale(kl: float, steps: int, *, max_kl: float | None, max_steps: int | None) -> bool:
    """Return whether the policy should become the reference (arXiv 2512.24138).

    Args:
        kl: Measured KL of the last optimiser step, nats per token.
        steps: Optimiser steps since the last copy.
        max_kl: Copy above it, or None.
        max_steps: Copy at it, or None.
    """
    return (max_kl is not None and kl > max_kl) or (max_steps is not None and steps >= max_steps)


class GardoReference(Method):
    """Make the policy the reference when the KL is large or time has passed. See the module page."""

    name = "gardo_reference"
    title = "GARDO: reference refresh"
    paper = "2512.24138"

    max_kl: float | None = Field(0.05, gt=0, description="KL in nats per token above which to copy; ours.")
    max_steps: int | None = Field(100, ge=1, description="Optimiser steps after which to copy.")

    _kl: float = PrivateAttr(default=0.0)
    _tokens: int = PrivateAttr(default=0)
    _steps: int = PrivateAttr(default=0)
    _stale: bool = PrivateAttr(default=False)

    @property
    def neutral(self) -> bool:
        """Whether nothing can trigger a copy."""
        return self.max_kl is None and self.max_steps is None

    @property
    def needs(self) -> frozenset[Need]:
        """A reference that can be replaced."""
        return frozenset({"ref_logps", "movable_reference"})

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse a reference that nobody uses, that others move, or that must not move."""
        if setup.trainer.get("sync_ref_model"):
            yield Conflict(
                "gardo_reference and sync_ref_model both move the reference: set sync_ref_model to false",
                field="sync_ref_model",
            )
        if setup.launch == "zero3" and not self.neutral:
            yield Conflict(
                "gardo_reference moves the reference, which DeepSpeed ZeRO-3 shards: launch with FSDP2, "
                "ZeRO-2 or plain DDP, with an adapter if memory is short"
            )
        if "ace" in setup.methods:
            yield Conflict(
                "ACE measures drift from a fixed reference, but gardo_reference replaces it and the drift "
                "would start again from zero: drop one of the two"
            )
        if not setup.trainer.get("beta"):
            alone = set(setup.methods) <= _PARTS
            yield Conflict(
                "gardo_reference moves the reference of the KL term, but beta is 0"
                + (": set beta above 0" if alone else "; only the KL of another method would see it"),
                field="beta",
                fatal=alone,
            )

    def token_penalty(self, tokens: Tokens) -> torch.Tensor | None:
        """Measure the KL; nothing is added to the loss."""
        assert tokens.ref_logps is not None
        counted = tokens.mask if tokens.kl_weights is None else tokens.mask * (tokens.kl_weights > 0)
        kl, count = kl_sum(tokens.logps, tokens.ref_logps, counted)
        if tokens.training:
            kl, count = tokens.reduce(torch.stack([kl, count.to(kl)]))
            self._kl += kl.item()
            self._tokens += int(count.item())
            tokens.gauges.mean("kl", kl / count.clamp(min=1))
        return None

    def optimizer_step(self) -> None:
        """Decide from the whole optimiser step whether the reference is stale."""
        self._steps += 1
        kl = self._kl / max(self._tokens, 1)
        self._stale |= reference_is_stale(kl, self._steps, max_kl=self.max_kl, max_steps=self.max_steps)
        self._kl, self._tokens = 0.0, 0

    def refresh_reference(self) -> bool:
        """Say whether to copy now, and start counting again if so."""
        stale, self._stale = self._stale, False
        if stale:
            self._steps = 0
        return stale

    def state_dict(self) -> dict[str, Any]:
        """Steps since the last copy and whether one is due; the trainer saves the reference itself."""
        return {"steps": self._steps, "stale": self._stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._steps, self._stale = state["steps"], state["stale"]

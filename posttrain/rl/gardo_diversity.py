r"""GARDO, part 3: positive advantages weighted by how different the answer is (arXiv 2512.24138).

Idea
    Policies that hack a reward collapse onto few answers. GARDO multiplies the advantage of good answers by
    their distance to the nearest other answer of the group, so that a good answer that stands alone is worth
    more than the tenth copy of another. Bad answers are left alone, so that strangeness by itself is never
    rewarded. The parts ``gardo_kl`` and ``gardo_reference`` are separate methods.

Formula
    e_i is the embedding of completion i. Over the other completions of its prompt, right or wrong::

        d_i  = min_{j != i} ( 1 - cos(e_i, e_j) )      in [0, 2];  1 when there is nothing to compare with
        f_i  = d_i                                      normalize="none" (paper)
        f_i  = d_i / mean of d over the group           normalize="group_mean" (official code); 1 if it is 0
        A'_i = f_i A_i  where A_i > 0,  else A_i

    An empty completion (a zero embedding) has factor 1 and is no neighbour of anything, nor in the mean:
    otherwise it would stand alone and be the most rewarded. Embeddings are compared in fp32 and f is constant
    in the loss.

Defaults and where they come from
    The paper embeds images with DINOv3 and says nothing about text: **everything about embeddings here is
    ours**. ``embedding="hidden"`` is the mean over a completion's tokens of the policy's final hidden state,
    at the price of one forward per rollout. Such states lie in a narrow cone, hence ``group_mean`` by
    default: the raw form would multiply positive advantages by 0.01 to 0.3 and so starve them against
    negative ones. ``embedding="python:package.module.function"`` takes your own, for example a sentence
    encoder: it gets a list of texts and returns one vector per text. No language-model result exists in the
    paper.

Needs
    Groups of more than one completion. One forward per rollout for ``hidden``.

Composes with
    Any advantage, including per-token ones, TTRL, LoRA. Warned: ``scale_rewards`` other than ``"none"`` (the
    paper drops the division by the standard deviation and finds that this alone reduces hacking), an entropy
    bonus (two rewards for variety).

When not to use it
    When all right answers should look alike, for example with a strict output format: look at
    ``gardo_diversity/distance`` and the spread of ``factor`` first.

Official code
    Divides by the group mean, and acts where the reward is at least the group's mean, which differs at 0
    only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Method, Need, Rollout, Setup

_FUNCTION = "python:"
_ROUNDING = 1e-6  # of a cosine in fp32


def nearest_distance(embeddings: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return each row's cosine distance to the nearest other row of its group (arXiv 2512.24138).

    Args:
        embeddings: (B, H), any scale; zeros for an empty completion, which is nobody's neighbour.
        group_size: Rows per group, consecutive.

    Returns:
        (B,) fp32 at least, in [0, 2]; 1 for a row without any other, NaN for an empty completion.
    """
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    grouped = torch.nn.functional.normalize(embeddings.to(dtype), dim=1).view(
        -1, group_size, embeddings.size(1)
    )
    distance = 1 - (grouped @ grouped.transpose(1, 2)).clamp(-1, 1)
    present = (embeddings != 0).any(dim=1).view(-1, group_size)
    itself = torch.eye(group_size, dtype=torch.bool, device=embeddings.device)
    nearest = distance.masked_fill(itself | ~present.unsqueeze(1), torch.inf).amin(dim=2)
    nearest = nearest.masked_fill(nearest.isinf(), 1.0)
    return nearest.masked_fill(~present, torch.nan).flatten()


def diversity_factor(
    distance: torch.Tensor, group_size: int, *, normalize: Literal["group_mean", "none"] = "group_mean"
) -> torch.Tensor:
    """Return f, (B,): the distance itself or divided by its group's mean, 1 where that mean is 0 to rounding.

    Args:
        distance: (B,) of :func:`nearest_distance`; the factor is 1 where it is NaN.
        group_size: Rows per group, consecutive.
        normalize: ``none`` is the paper's, ``group_mean`` the official code's.
    """
    factor = distance
    if normalize == "group_mean":
        grouped = distance.view(-1, group_size)
        mean = grouped.nanmean(dim=1, keepdim=True)
        # below that the distances of equal embeddings are rounding, and their quotients noise
        factor = torch.where(mean > _ROUNDING, grouped / mean, torch.ones_like(grouped)).flatten()
    return factor.nan_to_num(nan=1.0)


def shaped_advantages(advantages: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return (B,) or (B, C) advantages with the positive ones multiplied by the (B,) factor."""
    factor = factor.to(advantages).view(-1, *[1] * (advantages.dim() - 1))
    return torch.where(advantages > 0, advantages * factor, advantages)


class GardoDiversity(Method):
    """Multiply positive advantages by the distance to the nearest neighbour. See the module page."""

    name = "gardo_diversity"
    title = "GARDO: diversity-aware advantages"
    paper = "2512.24138"

    embedding: str = Field(
        "hidden",
        pattern=r"^(hidden|python:\w+(\.\w+)+)$",
        description="hidden (the policy's), or python:package.module.function from texts to vectors.",
    )
    normalize: Literal["group_mean", "none"] = Field(
        "group_mean", description="Distance relative to the group's mean (official code), or raw (paper)."
    )

    @property
    def needs(self) -> frozenset[Need]:
        """The policy's hidden states, unless a function of the user embeds."""
        return frozenset({"embeddings"}) if self.embedding == "hidden" else frozenset()

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Warn about a divided advantage and a second reward for variety."""
        trainer = setup.trainer
        if trainer.get("scale_rewards", "none") not in ("none", False):
            yield Conflict(
                "the paper's diversity factor goes with advantages that are not divided by their standard "
                f"deviation, found scale_rewards={trainer['scale_rewards']!r}: 'none' is the paper's",
                field="scale_rewards",
                fatal=False,
            )
        if trainer.get("entropy_coef") or trainer.get("use_adaptive_entropy"):
            yield Conflict(
                "a diversity factor and an entropy bonus both pay for variety: keep one",
                field="entropy_coef",
                fatal=False,
            )

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """Multiply the positive advantages of this rank's rows."""
        everyone = rollout.everyone
        assert everyone is not None
        embeddings = self._embed(rollout)
        # a group may lie on two ranks
        distance = nearest_distance(rollout.gather(embeddings), everyone.group_size)
        factor = diversity_factor(distance, everyone.group_size, normalize=self.normalize)
        local = rollout.local(factor)
        advantages = rollout.advantages
        positive = advantages > 0 if advantages.dim() == 1 else (advantages > 0).any(dim=1)
        rollout.gauges.mean("distance", distance, ~distance.isnan())
        rollout.gauges.mean("factor", local, positive)
        rollout.gauges.max("factor_max", local)
        return shaped_advantages(advantages, local)

    def _embed(self, rollout: Rollout) -> torch.Tensor:
        """Return (B, H) fp32 embeddings of this rank's rows.

        Raises:
            ValueError: The user's function returned another number of vectors, or values that are not finite.
        """
        if self.embedding == "hidden":
            assert rollout.embeddings is not None
            return rollout.embeddings
        texts = rollout.texts()
        found = torch.as_tensor(_load(self.embedding)(texts), dtype=torch.float32)
        finite = bool(torch.isfinite(found).all())
        if found.dim() != 2 or len(found) != len(texts) or not finite:
            raise ValueError(
                f"embedding {self.embedding!r} must return one finite vector per text, shape "
                f"({len(texts)}, H); found shape {tuple(found.shape)}, finite: {finite}"
            )
        empty = torch.tensor([not text for text in texts]).unsqueeze(1)
        return found.masked_fill(empty, 0.0).to(rollout.mask.device)


def _load(name: str) -> Any:
    """Return the user's function.

    Raises:
        ValueError: It cannot be loaded.
    """
    module_name, _, function_name = name.removeprefix(_FUNCTION).rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load the embedding {name!r}: {error}") from error

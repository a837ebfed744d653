r"""SparsePO and MaPO: which tokens carry reward, and which are held to the reference (arXiv 2410.05102).

Idea
    Not every token of a response should carry preference, and not every one has to stay where the reference
    is. SparsePO multiplies the log-ratio and the divergence of every token in TDPO-1 by weights that are not
    negative. They come from the reference: either from a small network on its hidden states that is trained
    with the policy, with exact zeros from a ReLU (SparsePO), or from its activations as they are (MaPO).

Formula
    With rho_t = log pi - log ref of token t, k_t = KL(ref(.|s_t) || pi(.|s_t)), masks m^u, m^d >= 0 that
    depend on the prefix only, and |m| the sum over a response, means over pairs::

        U = sum_t m^u_t rho_t(y_w) - sum_t m^u_t rho_t(y_l)
        D = sum_t m^d_t k_t(y_l)   - sum_t m^d_t k_t(y_w)
        L = -log sigma( beta (U - D) ) + l_u (|m^u(y_w)| + |m^u(y_l)|) + l_d (|m^d(y_w)| + |m^d(y_l)|)

    learned:  m_t = ReLU( sum_l v_l ReLU( w_l . LN(h_lt) + b_l ) ), h_lt the reference's output of block l at
    the position that predicts y_t (the last one after the final norm), one LayerNorm for all blocks: L (d +
    1) + L + 2 d weights a network. ``shared`` takes one network for both masks (l_u and l_d are then halved,
    so that one mask is not charged twice), otherwise there are two.

    mapo:  of each activation tensor of the reference the mean over its features, rescaled to [0, 1] over the
    response; the mean over the tensors of a group, then over the groups. No gradient, the same for both
    masks. A response that spreads less than 1e-6 in a tensor has weight 1 there.

Defaults and where they come from
    Learned and shared, both terms masked, no L1, weight decay 0.01 on matrices: the official code's. The
    paper's runs: beta 0.8 (IMDb, TL;DR) and 0.1 (HH); L1 0.001 for both terms only for HH with a shared mask;
    learning rate 1e-6 (IMDb), 1e-4 with LoRA r 64 (TL;DR), 5e-7 (HH); cosine with warm-up 0.1. ``mask_init:
    faithful`` draws w and v from a normal with the model's initializer_range, as the library fills in weights
    that a checkpoint lacks: about half of the places then start at exactly 0, and the others are small, so
    that the effective beta is far below the nominal one. ``ones`` (ours) starts with m = 1, exactly at
    TDPO-1. ``mask_max`` is ours: a mask that grows lowers the loss wherever U > D, and nothing but decay and
    L1 resists. Dropout is 0: the official code sets 0.01 and switches every dropout off.

Needs
    The forwards of DPO, both LM heads read together (see TDPO), and the reference's hidden states at the
    completion tokens, kept in their own precision. The network is fp32; its gradient is averaged over ranks
    under DDP; where DeepSpeed or FSDP shards the policy it has an optimiser of its own. Its gradient is
    outside ``max_grad_norm``.

Composes with
    What TDPO composes with; weights of several methods multiply, terms add up: with ``tdpo`` beside it the
    divergence counts twice, so take one. Refused: what TDPO refuses. ``sync_ref_model`` moves what the masks
    look at: there is a warning. LoRA and bf16 policies, recomputation, padding and truncation change nothing.

Does it do what it claims?
    In part, and not by being sparse. ``configs/evidence/sparse_po.yaml`` (its first lines are the commands):
    a model of 260 K weights, one epoch over 570 pairs of its own stories, judged by the known word score of
    sampled continuations, five seeds, 95 % t intervals. KL is that of continuations to the start, in nats::

        arm (beta)         KL                   score                win rate             accuracy
        DPO 0.1            15.2 [13.3, 17.0]    0.752 [0.741, 0.762] 0.963 [0.955, 0.971] 0.781 [0.738, 0.823]
        DPO 0.2            11.0 [9.8, 12.2]     0.735 [0.723, 0.747] 0.952 [0.937, 0.966] 0.802 [0.749, 0.854]
        DPO 0.5             7.3 [6.6, 8.1]      0.694 [0.676, 0.712] 0.911 [0.893, 0.929] 0.808 [0.756, 0.860]
        DPO 2               5.5 [4.9, 6.1]      0.657 [0.645, 0.669] 0.867 [0.851, 0.882] 0.778 [0.732, 0.823]
        TDPO-2 0.1          4.3 [4.0, 4.5]      0.633 [0.627, 0.639] 0.834 [0.824, 0.844] 0.806 [0.771, 0.842]
        TDPO-2 0.005        5.0 [4.8, 5.2]      0.636 [0.628, 0.644] 0.842 [0.827, 0.856] 0.790 [0.754, 0.826]
        ones 0.1           19.6 [17.3, 21.9]    0.807 [0.798, 0.816] 0.984 [0.980, 0.989] 0.752 [0.717, 0.787]
        ones 0.5            8.6 [8.1, 9.1]      0.724 [0.711, 0.737] 0.937 [0.927, 0.947] 0.784 [0.732, 0.836]
        ones 2              5.8 [5.3, 6.3]      0.668 [0.648, 0.688] 0.873 [0.848, 0.897] 0.765 [0.721, 0.808]
        MaPO 0.5           12.3 [11.3, 13.3]    0.768 [0.753, 0.782] 0.967 [0.960, 0.973] 0.773 [0.738, 0.808]
        MaPO 2              6.9 [6.7, 7.2]      0.696 [0.682, 0.709] 0.907 [0.895, 0.920] 0.773 [0.712, 0.833]
        faithful 0.5       34.9 [19.0, 50.7]    0.754 [0.685, 0.823] 0.957 [0.914, 1.000] 0.632 [0.566, 0.698]
        faithful 8         31.7 [16.6, 46.7]    0.747 [0.684, 0.810] 0.953 [0.912, 0.993] 0.637 [0.565, 0.709]

    Score above DPO's curve at equal KL: ones 0.5 +0.015 [0.009, 0.021], ones 2 +0.005 [-0.008, 0.018], MaPO
    0.5 +0.027 [0.019, 0.035], MaPO 2 +0.011 [0.002, 0.020]; TDPO-2, which hardly leaves the start, -0.012
    [-0.025, 0.001]. The price is accuracy on held-out pairs, 0.018 to 0.032 lower, and more alike samples
    (self-BLEU +0.009 to +0.024). With ``ones`` the mask stays near 1 (mean 0.98, no zeros), so this is
    TDPO-1's merit; with the official start its mean falls to 0.001 and DPO is simply unregularised. Published
    gains on larger models were not looked for.

When not to use it
    - When you want to know where a model's preference lies: masks are a training device, and the loss does
    not
      change when U - D is kept.
    - When memory is for one model only.

What to watch
    ``sparse_po/density_reward`` and ``density_kl`` (share of tokens with m > 0), ``mean_*``, ``max_*``,
    ``dead_pairs`` (share of pairs whose masks are all 0: no gradient reaches anything there; above 0.5 there
    is a warning), ``reward_chosen`` and ``reward_rejected`` (beta sum m^u rho), ``kl_chosen`` and
    ``kl_rejected`` (sums without mask), ``l1``. ``rewards/*`` of the trainer include the divergence. The
    report of a run shows masks over tokens.

After training
    Checkpoints hold the network in ``sparse_po.safetensors`` beside the model (``reward.*`` and ``kl.*``, or
    ``both.*``), and so does an export of a run. Nothing needs it for generation.

Official code, and what differs
    huawei-noah/HEBO, folder SparsePO. The masks' gradients and values follow it; its logged rewards have the
    divergence with another sign. MaPO there also standardises, which the rescaling undoes, in float16, and
    includes rotated queries and keys, which are no outputs of modules in current model classes and are left
    out; a block's input norm and its attention norm are one tensor here. The learned network may have stayed
    at its start in the official LoRA recipe, which does not unfreeze it; here it always trains. The formulas
    were read in the code, the paper's own were not available.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from posttrain._lazy import torch
from posttrain.preference.method import Batch, Method, Need, TokenPicture
from posttrain.preference.tdpo import log_divergences
from posttrain.rl.method import Conflict, Setup

logger = logging.getLogger(__name__)

Group = Literal["mlp", "attn", "resid", "logits"]


class SparsePO(Method):
    """Weigh tokens by masks from the reference model. See the module page."""

    name = "sparse_po"
    title = "SparsePO and MaPO: sparse token masks on reward and divergence"
    paper = "2410.05102"
    needs_margin = True

    token_mask: Literal["learned", "mapo"] = Field(
        "learned", description="A network trained with the policy, or the reference's activations."
    )
    shared: bool = Field(True, description="learned: one network for both terms, else one for each.")
    mask_reward: bool = Field(True, description="Whether log-ratios are masked; else weight 1.")
    mask_kl: bool = Field(True, description="Whether divergences are masked; else weight 1.")
    mask_l1_reward: float = Field(
        0.0, ge=0, description="learned: sparsity of the reward mask; 0.001 for HH."
    )
    mask_l1_kl: float = Field(0.0, ge=0, description="learned: sparsity of the KL mask.")
    mask_weight_decay: float = Field(0.01, ge=0, description="learned: decay of its matrices, not of biases.")
    mask_dropout: float = Field(0.0, ge=0, lt=1, description="learned: after each ReLU.")
    mask_init: Literal["faithful", "ones"] = Field(
        "faithful", description="learned: normal with the model's range, or m = 1 at the start (ours)."
    )
    mask_max: float | None = Field(None, gt=0, description="Upper bound of a mask, ours; no gradient above.")
    mapo_groups: tuple[Group, ...] = Field(
        ("mlp", "attn", "resid", "logits"), min_length=1, description="mapo: groups of activations."
    )

    _networks: Any = PrivateAttr(default=None)
    _shown: list[TokenPicture] = PrivateAttr(default_factory=list)
    _dead: float = PrivateAttr(default=0.0)

    @model_validator(mode="after")
    def _fields_of_learned_masks(self) -> SparsePO:
        fields = ("shared", "mask_l1_reward", "mask_l1_kl", "mask_dropout", "mask_weight_decay", "mask_init")
        if self.token_mask == "mapo":
            found = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
            if found:
                raise ValueError(f"token_mask='mapo' has no network: drop {', '.join(found)}")
        elif self.mapo_groups != type(self).model_fields["mapo_groups"].default:
            raise ValueError("mapo_groups needs token_mask='mapo'")
        for name in ("reward", "kl"):
            if getattr(self, f"mask_l1_{name}") and not getattr(self, f"mask_{name}"):
                raise ValueError(f"mask_l1_{name} needs mask_{name}: a term without mask has no L1")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """The divergence and the reference token by token."""
        return frozenset({"kl", "token_logps"})

    @property
    def keeps_states(self) -> bool:
        """The network of learned masks reads them."""
        return self._masked and self.token_mask == "learned"

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse what the base refuses; warn about masks on a moving reference and a divergence twice."""
        yield from super().conflicts(setup)
        if setup.trainer.get("sync_ref_model"):
            yield Conflict(
                "sync_ref_model moves the reference, whose states the masks are made of", fatal=False
            )
        if "tdpo" in setup.methods:
            yield Conflict("sparse_po and tdpo both add the divergence: it counts twice", fatal=False)

    # ---- masks ------------------------------------------------------------------------------------------

    @property
    def _masked(self) -> bool:
        return self.mask_reward or self.mask_kl

    def start(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """Make the networks of learned masks; the same on every rank, other random states untouched."""
        if self.token_mask == "mapo" or not self._masked:
            return None
        from posttrain.preference.token_masks import MaskNetwork

        config: Any = model.config
        config = config.get_text_config()
        eps = getattr(config, "layer_norm_epsilon", getattr(config, "layer_norm_eps", None))
        draw = torch.Generator().manual_seed(torch.initial_seed())
        names = ["both"] if self.shared else ["reward", "kl"]
        self._networks = torch.nn.ModuleDict(
            {
                name: MaskNetwork(
                    config.num_hidden_layers,
                    config.hidden_size,
                    eps=getattr(config, "rms_norm_eps", 1e-5) if eps is None else eps,
                    std=None if self.mask_init == "ones" else getattr(config, "initializer_range", 0.02),
                    dropout=self.mask_dropout,
                    generator=draw,
                )
                for name in names
                if name == "both" or getattr(self, f"mask_{name}")
            }
        )
        return self._networks

    def parameter_groups(self, module: torch.nn.Module) -> list[dict[str, Any]]:
        """Return groups with weight decay on matrices only, and the policy's learning rate."""
        groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, parameter in module.named_parameters():
            groups[name.endswith((".weight", ".mix"))].append(parameter)
        return [
            {"params": groups[True], "weight_decay": self.mask_weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ]

    def watch_reference(self, reference: torch.nn.Module, mask: torch.Tensor) -> AbstractContextManager[Any]:
        """Watch the hidden states or the activations."""
        if not self._masked:
            return contextlib.nullcontext()
        from posttrain.preference import token_masks

        if self.token_mask == "mapo":
            return token_masks.watch_activations(reference, mask, self.mapo_groups)
        return token_masks.watch_states(reference, mask)

    def _masks(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the masks that are in use, (R, T) each, 0 outside completions."""
        names = [name for name in ("reward", "kl") if getattr(self, f"mask_{name}")]
        if not names:
            return {}
        if self.token_mask == "mapo":
            values = self._bounded(batch.watched.mask_values())
            return dict.fromkeys(names, values)
        networks = self._networks.train(batch.training)
        device = networks[next(iter(networks))].mix.device
        states = [state.to(device) for state in batch.watched]
        made = {}
        for name in networks:
            with torch.autocast(device.type, enabled=False):
                values = self._bounded(networks[name](states))
            target = batch.mask.to(device)
            made[name] = values.new_zeros(target.shape).masked_scatter(target, values).to(batch.mask.device)
        return {name: made["both" if self.shared else name] for name in names}

    def _bounded(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.mask_max is None else values.clamp(max=self.mask_max)

    # ---- stages -----------------------------------------------------------------------------------------

    def token_weights(self, batch: Batch) -> torch.Tensor | None:
        """Return m^u, and log what the masks do."""
        batch.extra[self.name] = masks = self._masks(batch)
        self._log(batch, masks)
        return masks.get("reward")

    def token_scores(self, batch: Batch) -> torch.Tensor:
        """Return m^d k."""
        assert batch.kl is not None
        mask = batch.extra[self.name].get("kl")
        return batch.kl if mask is None else mask * batch.kl

    def penalty(self, batch: Batch) -> torch.Tensor | None:
        """Return the L1 terms, mean over pairs."""
        if not (self.mask_l1_reward or self.mask_l1_kl):
            return None
        value = l1_penalty(
            batch.extra[self.name],
            {"reward": self.mask_l1_reward, "kl": self.mask_l1_kl},
            shared=self.shared and self.mask_reward and self.mask_kl,
        )
        batch.gauges.mean("l1", value)
        return value

    # ---- what is seen of it -----------------------------------------------------------------------------

    def _log(self, batch: Batch, masks: dict[str, torch.Tensor]) -> None:
        valid, gauges = batch.mask, batch.gauges
        log_divergences(batch)
        weights = masks.get("reward", torch.ones_like(batch.logps))
        rewards = batch.beta * torch.where(valid, weights * batch.log_ratios, 0.0).detach().sum(dim=1)
        chosen, rejected = rewards.chunk(2)
        gauges.mean("reward_chosen", chosen)
        gauges.mean("reward_rejected", rejected)
        for name, mask in masks.items():
            mask = mask.detach()
            gauges.mean(f"density_{name}", (mask > 0).float(), valid)
            gauges.mean(f"mean_{name}", mask, valid)
            gauges.max(f"max_{name}", mask[valid])
        if masks:
            alive = torch.stack([(mask > 0).any(dim=1) for mask in masks.values()]).any(dim=0)
            first, second = alive.chunk(2)
            dead = (~(first | second)).float()
            gauges.mean("dead_pairs", dead)
            if batch.training:
                self._warn_of_dead(float(dead.mean()))
            self._show(batch, masks)

    def _warn_of_dead(self, share: float) -> None:
        """Warn once when, over some 20 micro-batches, more than half of the pairs have no gradient."""
        before, self._dead = self._dead, 0.95 * self._dead + 0.05 * share
        if before <= 0.5 < self._dead:
            logger.warning(
                "more than half of the pairs have masks that are 0 on both responses, so nothing learns from "
                "them: start with mask_init=ones, or lower mask_l1_reward, mask_l1_kl and mask_weight_decay"
            )

    def _show(self, batch: Batch, masks: dict[str, torch.Tensor]) -> None:
        """Keep the masks of two pairs of this micro-batch."""
        if batch.tokens is None:
            return
        pairs = len(batch.mask) // 2
        pictures = []
        for pair in range(min(2, pairs)):
            for response, row in (("chosen", pair), ("rejected", pairs + pair)):
                valid = batch.mask[row]
                pictures.append(
                    TokenPicture(
                        title=response,
                        ids=batch.tokens[row][valid].tolist(),
                        values={name: mask[row][valid].detach().tolist() for name, mask in masks.items()},
                    )
                )
        self._shown = pictures

    def pictures(self) -> list[TokenPicture]:
        """Return the masks over the tokens of two pairs of the last micro-batch."""
        return self._shown


def l1_penalty(masks: dict[str, torch.Tensor], strengths: dict[str, float], *, shared: bool) -> torch.Tensor:
    """Return the sparsity term: sums over the tokens of both responses, mean over pairs.

    Args:
        masks: ``reward`` and ``kl`` as far as they are in use, (R, T) >= 0, 0 outside completions.
        strengths: By the same names.
        shared: Both are one mask, which is then charged half of each strength.
    """
    pairs = next(iter(masks.values())).size(0) / 2
    total = sum(strengths[name] * mask.sum() for name, mask in masks.items())
    return torch.as_tensor(total) / pairs * (0.5 if shared else 1.0)

"""The LM head of a model, and watching what goes into it during a forward that happens anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.kernels.divergence import filtered_forward_kl
from posttrain.kernels.entropy import entropies_with_gradient
from posttrain.kernels.kept import Truncation, log_kept
from posttrain.kernels.statistics import TILE, TokenStatistics, token_statistics
from posttrain.partitioned import together
from posttrain.sharding import forward_dtype

# Names under which configurations of transformers keep a factor of the logits.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


#: Smallest vocabulary at which :meth:`Scored.entropies` pays off on a CPU.
LARGE_VOCABULARY = 2**15


def logit_scale_of(config: Any) -> float:
    """Return the factor that a model of this configuration puts on its logits; 1.0 for most.

    Cohere, Muse Glimmer and Falcon-H1 multiply, Granite and MiniCPM3 divide by ``logits_scaling``,
    HyperCLOVA X multiplies by it.
    """
    text = config.get_text_config()
    for name in _MULTIPLIERS:
        factor = getattr(text, name, None)
        if factor is not None:
            return float(factor)
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if text.model_type == "hyperclovax" else 1.0 / float(scaling)


@dataclass(frozen=True)
class LMHead:
    """How a model turns hidden states into next-token distributions.

    Attributes:
        module: The output embedding, with ``weight`` (V, H) and maybe ``bias`` (V,); looked up again on every
            use, so that it may be sharded in between.
        temperature: Divides the logits.
        logit_scale: Multiplies them.
        softcap: Bound of the final soft-capping, or None.
    """

    module: torch.nn.Module
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any, temperature: float = 1.0) -> LMHead:
        """Return the head of a transformers causal language model, under the adapters that are on now."""
        config = model.config
        softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        module = model.get_output_embeddings()
        # PEFT's shell of a head in modules_to_save shows the weight of the adapter that is on at the moment
        owners = (inner for inner in module.modules() if inner._parameters.get("weight") is module.weight)
        return cls(next(owners, module), temperature, logit_scale_of(config), softcap)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield (weight, bias) in full, also where they are sharded (DeepSpeed ZeRO-3, FSDP2).

        Under sharding this is a collective: every rank has to enter it equally often.
        """
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        assert isinstance(weight, torch.Tensor)
        with together([weight, bias]):
            yield _full(weight), None if bias is None else _full(bias)

    def call(self, action: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """Return ``action(*inputs)``, called as if it were the forward of the head's module.

        DeepSpeed ZeRO-3 gathers a module's weights before its forward and backward and reduces their
        gradients behind it, by hooks on the module: what reads weight and bias inside trains them so. Only
        tensors with gradient may be returned.
        """
        before = self.module.__dict__.get("forward")
        self.module.forward = action
        try:
            return self.module(*inputs)
        finally:
            if before is None:
                del self.module.forward
            else:
                self.module.forward = before


@dataclass(frozen=True)
class Scored:
    """Hidden states that scored C completion tokens of B rows, with the head they go through.

    Attributes:
        head: The LM head.
        hidden: (B, C, H); ``hidden[i, t]`` predicts ``ids[i, t]``. Carries gradient in a training forward.
        ids: (B, C) token ids.
        mask: (B, C) bool, False on padding.
    """

    head: LMHead
    hidden: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor

    def statistics(
        self,
        where: torch.Tensor,
        *,
        min_ratio: float | None = None,
        threshold: float | None = None,
        entropy: bool = False,
        tile: int = TILE,
    ) -> TokenStatistics:
        """Return the statistics of the N tokens at which the (B, C) bool mask ``where`` is True, row by row.

        The parameters are those of :func:`~posttrain.kernels.statistics.token_statistics`. Every rank has to
        call it equally often (with an empty ``where`` if need be): a sharded head is gathered inside.
        """
        head = self.head
        with head.gathered() as (weight, bias):
            return token_statistics(
                self.hidden.detach()[where].to(weight.device),
                weight,
                self.ids[where].to(weight.device),
                bias=bias,
                temperature=head.temperature,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                min_ratio=min_ratio,
                threshold=threshold,
                entropy=entropy,
                tile=tile,
            )

    @property
    def entropy_gradient_is_cheaper(self) -> bool:
        """Whether :meth:`entropies` at few tokens costs less than the gradient of the forward's entropies.

        Without Triton, TRL's head makes its entropy gradient at all tokens, one tensor operation after the
        other; with it the gradient comes nearly free. A sharded head is left to TRL.
        """
        weight = self.head.module.weight
        assert isinstance(weight, torch.Tensor)
        sharded = hasattr(weight, "ds_status") or hasattr(weight, "full_tensor")
        return weight.device.type == "cpu" and not sharded and weight.size(0) >= LARGE_VOCABULARY

    def entropies(self, where: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return (B, C) ``values``, entropies that the forward found, with gradient at the tokens ``where``.

        See :func:`~posttrain.kernels.entropy.entropies_with_gradient`; not for a sharded head.
        """
        weight, bias = self.head.module.weight, getattr(self.head.module, "bias", None)
        assert isinstance(weight, torch.Tensor)
        chosen = entropies_with_gradient(
            values[where],
            self.hidden[where].to(weight.device),
            weight,
            bias=bias,
            temperature=self.head.temperature,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
        )
        return values.detach().masked_scatter(where, chosen)

    def forward_kl(
        self,
        where: torch.Tensor,
        *,
        min_ratio: float | None = None,
        threshold: float | None = None,
        tile: int = TILE,
    ) -> torch.Tensor:
        """Return KL(filtered policy || policy) of the N tokens at ``where``, with gradient; row by row.

        See :func:`~posttrain.kernels.divergence.filtered_forward_kl`.

        Raises:
            ValueError: The head is sharded (DeepSpeed ZeRO-3, FSDP2): its gradient would be lost.
        """
        weight, bias = self.head.module.weight, getattr(self.head.module, "bias", None)
        assert isinstance(weight, torch.Tensor)
        if hasattr(weight, "ds_status") or hasattr(weight, "full_tensor"):
            raise ValueError(
                "the KL over the whole vocabulary needs the gradient of the LM head, which is sharded here: "
                "use the sampled-token estimate (kl: k3), or ZeRO-2 or plain data parallelism"
            )
        return filtered_forward_kl(
            self.hidden[where].to(weight.device),
            weight,
            bias=bias,
            temperature=self.head.temperature,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            min_ratio=min_ratio,
            threshold=threshold,
            tile=tile,
        )

    def log_kept(self, truncation: Truncation) -> torch.Tensor:
        """Return (B, C) ln Z, the log of the mass that truncated sampling keeps; 0 on padding.

        See :func:`~posttrain.kernels.kept.log_kept`. Collective without gradient, where the head is sharded.

        Raises:
            ValueError: A gradient is needed and the head is sharded: it would be lost.
        """
        weight = self.head.module.weight
        assert isinstance(weight, torch.Tensor)
        if torch.is_grad_enabled() and (hasattr(weight, "ds_status") or hasattr(weight, "full_tensor")):
            raise ValueError(
                "the correction for truncated sampling needs the gradient of the LM head, which is sharded "
                "here: use ZeRO-2 or plain data parallelism, leave top_p, top_k and min_p out, or set "
                "rollout.truncated_sampling: accept"
            )
        where, head = self.mask.to(self.hidden.device), self.head
        with head.gathered() as (weight, bias):
            values = log_kept(
                self.hidden[where].to(weight.device),
                weight,
                self.ids[where].to(weight.device),
                truncation,
                bias=bias,
                temperature=head.temperature,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
            )
        zeros = torch.zeros(where.shape, dtype=values.dtype, device=where.device)
        return zeros.masked_scatter(where, values.to(where.device))


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(parameter, "full_tensor", None)
    if full_tensor is None:
        return parameter
    whole: torch.Tensor = full_tensor()
    return whole.to(forward_dtype() or whole.dtype)  # as it is while FSDP2 has it together


@contextlib.contextmanager
def watch_head(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    columns: int,
    receive: Callable[[Scored], None],
    *,
    temperature: float = 1.0,
) -> Iterator[None]:
    """Call ``receive`` with what every forward of ``model`` inside the block feeds to the LM head.

    The hook sits on the backbone of this one model and goes with the block. It costs no forward: the hidden
    states are those the forward computes. Consecutive forwards take consecutive rows of ``input_ids``.

    Args:
        model: A transformers causal language model, without PEFT or other wrappers around it.
        input_ids: (B, P + C) prompts and completions of all rows.
        attention_mask: (B, P + C).
        columns: C, how many last tokens are completion.
        receive: Gets one :class:`Scored` per forward.
        temperature: Divides the logits.
    """
    head = LMHead.of(model, temperature)
    done = 0

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        del module, args
        nonlocal done
        hidden = output.last_hidden_state
        rows = slice(done, done + hidden.size(0))
        done = rows.stop
        receive(
            Scored(
                head=head,
                # position t - 1 predicts token t
                hidden=hidden[:, -columns - 1 : -1],
                ids=input_ids[rows, -columns:],
                mask=attention_mask[rows, -columns:].bool(),
            )
        )

    handle = model.base_model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

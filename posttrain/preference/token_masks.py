"""Token masks from what the reference model computes: the network of SparsePO and the activations of MaPO.

arXiv 2410.05102. Masks are (R, T), at the position that predicts each completion token, fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from posttrain.kernels import LMHead
from posttrain.kernels.statistics import TILE, tempered_tiles

Group = Literal["mlp", "attn", "resid", "logits"]
GROUPS: tuple[Group, ...] = ("mlp", "attn", "resid", "logits")
_FLAT = 1e-6  # below this spread a row of activations says nothing


# ---- learned ----------------------------------------------------------------------------------------------


class MaskNetwork(torch.nn.Module):
    """m = ReLU(sum_l v_l ReLU(w_l . LayerNorm(h_l) + b_l)), one scalar per token and layer.

    Args:
        layers: L.
        width: d of the hidden states.
        eps: Of the layer norm, which all layers share.
        std: Of the normal start of w and v; None starts with m = 1 everywhere (w = 0, b = 1, v = 1 / L).
        dropout: Probability after each ReLU.
        generator: Draws the start.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        *,
        eps: float = 1e-5,
        std: float | None = 0.02,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        weight, mix = torch.zeros(layers, width), torch.full((layers,), 1 / layers)
        if std is not None:
            weight.normal_(0.0, std, generator=generator)
            mix.normal_(0.0, std, generator=generator)
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(torch.zeros(layers) if std is not None else torch.ones(layers))
        self.mix = torch.nn.Parameter(mix)
        self.norm_weight = torch.nn.Parameter(torch.ones(width))
        self.norm_bias = torch.nn.Parameter(torch.zeros(width))
        self.eps, self.dropout = eps, dropout

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (N,) masks of L constant hidden states (N, d).

        The norm is constant, so w . LayerNorm(h) is affine in h . (gain * w): nothing of the size of the
        hidden states is kept for the backward but these themselves.

        Raises:
            ValueError: The states are not those of a model of this shape.
        """
        shape = tuple(self.weight.shape)
        if (len(states), states[0].size(-1)) != shape:
            raise ValueError(
                f"the mask network was made for the policy's {shape[0]} layers of width {shape[1]}, the "
                f"reference has {len(states)} of {states[0].size(-1)}: use a reference of the same shape"
            )
        summed: Any = 0.0
        for layer, h in enumerate(states):
            w = self.weight[layer]
            gain = self.norm_weight * w
            with torch.no_grad():
                variance, mean = torch.var_mean(h.to(w.dtype), dim=-1, correction=0)
                scale = (variance + self.eps).rsqrt()
            raw = scale * (_Product.apply(h, gain) - mean * gain.sum())
            z = self._drop((raw + self.norm_bias @ w + self.bias[layer]).relu())
            summed = summed + self.mix[layer] * z
        return self._drop(summed.relu())

    def _drop(self, values: torch.Tensor) -> torch.Tensor:
        if not self.dropout:
            return values
        return torch.nn.functional.dropout(values, self.dropout, training=self.training)


class _Product(torch.autograd.Function):
    """h @ w for a constant h in any precision, in the precision of w; keeps h as it is."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h)
        return h.to(w.dtype) @ w

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        (h,) = ctx.saved_tensors
        return None, grads[0] @ h.to(grads[0].dtype)


@contextlib.contextmanager
def watch_states(reference: Any, mask: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Give a list that the forward of ``reference`` fills with the outputs of its L blocks.

    They are ``hidden_states[1:]`` of the model class, so the last one is taken after the final norm.

    Args:
        reference: A transformers causal language model.
        mask: (R, T) bool, completion tokens. Each state is (N, d), of the positions that predict these.
    """
    found: list[torch.Tensor] = []

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        del module
        return args, {**kwargs, "output_hidden_states": True}

    def take(module: Any, args: Any, output: Any) -> None:
        del module, args
        found.extend(predicting(h, mask)[mask.to(h.device)].detach() for h in output.hidden_states[1:])

    backbone = reference.base_model
    handles = [
        backbone.register_forward_pre_hook(ask, with_kwargs=True),
        backbone.register_forward_hook(take),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def predicting(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the (R, T, ...) entries of (R, S, ...) values at the positions that predict the T tokens."""
    return values[:, -mask.size(1) - 1 : -1]


# ---- from activations -------------------------------------------------------------------------------------


def row_scaled(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return values scaled to [0, 1] by the smallest and largest of the completion tokens of their row.

    Args:
        values: (R, T), any floats outside the mask.
        mask: (R, T) bool.

    Returns:
        (R, T) in fp32 at least, 0 outside the mask; 1 on all tokens of a row that spreads less than 1e-6.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    low = values.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    spread = values.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True) - low
    flat = ~(spread >= _FLAT)  # also where there are no tokens, or no finite values
    scaled = torch.where(flat, 1.0, (values - low) / torch.where(flat, 1.0, spread))
    return torch.where(mask, scaled, 0.0)


@dataclass
class Activations:
    """The means of rescaled activations of groups of tensors.

    Attributes:
        mask: (R, T) bool.
        sums: Per group, the sum of rescaled tensors and how many they are.
    """

    mask: torch.Tensor
    sums: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def add(self, group: str, values: torch.Tensor) -> None:
        """Take in a (R, S, ...) tensor of activations: its mean over features, rescaled row by row."""
        mean = values.detach().flatten(2).mean(dim=-1, dtype=_wide(values.dtype))
        self.add_rows(group, predicting(mean, self.mask).to(self.mask.device))

    def add_rows(self, group: str, rows: torch.Tensor) -> None:
        """Take in (R, T) means."""
        total, count = self.sums.get(group, (torch.zeros_like(rows), 0))
        self.sums[group] = (total + row_scaled(rows, self.mask), count + 1)

    def mask_values(self) -> torch.Tensor:
        """Return the (R, T) mask: the mean over the tensors of a group, then over the groups."""
        means = [total / count for total, count in self.sums.values()]
        return torch.stack(means).mean(dim=0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def watch_activations(
    reference: Any, mask: torch.Tensor, groups: Sequence[Group] = GROUPS
) -> Iterator[Activations]:
    """Give activations that the forward of ``reference`` fills.

    Args:
        reference: A transformers causal language model with blocks of a known shape.
        mask: (R, T) bool, completion tokens.
        groups: Which tensors: ``mlp`` what goes into the MLP's last matrix; ``attn`` queries, keys and values
            before rotation and what goes into the output matrix; ``resid`` per block the attention's norm and
            update, the stream after it, the MLP's norm and update and the stream after it, and besides them
            the embeddings and the final norm; ``logits`` the logits.

    Raises:
        ValueError: The blocks have another shape; the message names the part.
    """
    seen = Activations(mask)
    with contextlib.ExitStack() as stack:

        def on_output(
            module: Any, *names: Group, split: Callable[[Any], Sequence[Any]] | None = None
        ) -> None:
            def hook(_: Any, __: Any, output: Any) -> None:
                value = output[0] if isinstance(output, tuple) else output
                for part in [value] if split is None else split(value):
                    for name in names:
                        seen.add(name, part)

            stack.callback(module.register_forward_hook(hook).remove)

        def on_input(module: Any, name: Group) -> None:
            def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
                seen.add(name, args[0] if args else kwargs["hidden_states"])

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        blocks = find_blocks(reference)
        for block in blocks:
            if "mlp" in groups:
                on_input(_part(block, "mlp", _MLP_OUT, "mlp"), "mlp")
            if "attn" in groups:
                attention = _child(block, _ATTENTION, "attn")
                on_input(_child(attention, _ATTENTION_OUT, "attn"), "attn")
                for module, split in _queries(attention, reference.config):
                    on_output(module, "attn", split=split)
            if "resid" in groups:
                _watch_stream(block, reference.config, on_output, on_input)
        if "resid" in groups:
            on_input(blocks[0], "resid")

        def at_the_end(_: Any, __: Any, output: Any) -> None:
            if "resid" in groups:
                seen.add("resid", output.last_hidden_state)
            if "logits" in groups:
                hidden = predicting(output.last_hidden_state, mask)
                where = mask.to(hidden.device)
                means = mean_logits(hidden[where], LMHead.of(reference)).to(mask.device)
                rows = torch.zeros(mask.shape, dtype=means.dtype, device=mask.device)
                seen.add_rows("logits", rows.masked_scatter(mask, means))

        stack.callback(reference.base_model.register_forward_hook(at_the_end).remove)
        yield seen


@torch.no_grad()
def mean_logits(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Return the (N,) means over the vocabulary of the logits of (N, d) hidden states, fp32 at least."""
    with head.gathered() as (weight, bias):
        hidden = hidden.to(weight.device)
        if head.softcap is None:  # then the mean is that of the head's rows
            wide = _wide(torch.promote_types(hidden.dtype, weight.dtype))
            mean = hidden.to(wide) @ weight.mean(dim=0, dtype=wide)
            if bias is not None:
                mean = mean + bias.mean(dtype=wide)
            return mean * (head.logit_scale / head.temperature)
        tiles = tempered_tiles(hidden, weight, bias, head.temperature, head.logit_scale, head.softcap, TILE)
        return torch.cat([z.mean(dim=-1) for _, z in tiles])


# ---- finding the tensors in a block ------------------------------------------------------------------------

_ATTENTION = ("self_attn", "attn", "attention")
_ATTENTION_OUT = ("o_proj", "c_proj", "dense", "out_proj")
_MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
_ATTENTION_NORM = ("input_layernorm", "ln_1")
_MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


def find_blocks(model: Any) -> torch.nn.ModuleList:
    """Return the blocks of a decoder.

    Raises:
        ValueError: There is not one list as long as the configuration says.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in model.base_model.modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and any(hasattr(module[0], name) for name in _ATTENTION)
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of {count} blocks with an attention, one is "
            "needed: use token_mask: learned"
        )
    return lists[0]


def _child(module: Any, names: Sequence[str], group: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(
        f"{type(module).__name__} has none of {', '.join(names)}, which the activations of {group} need: "
        f"leave {group} out of mapo_groups, or use token_mask: learned"
    )


def _part(block: Any, inside: str, names: Sequence[str], group: str) -> Any:
    return _child(_child(block, (inside,), group), names, group)


def _queries(attention: Any, config: Any) -> list[tuple[Any, Callable[[Any], Sequence[Any]] | None]]:
    """Return the modules whose outputs are queries, keys and values, and how to split what is fused."""
    if hasattr(attention, "q_proj"):
        return [(getattr(attention, name), None) for name in ("q_proj", "k_proj", "v_proj")]
    if config.model_type == "gpt2":
        return [(attention.c_attn, lambda fused: fused.chunk(3, dim=-1))]
    if config.model_type == "gpt_neox":  # per head its queries, keys and values

        def split(fused: torch.Tensor) -> Sequence[torch.Tensor]:
            heads = fused.unflatten(-1, (config.num_attention_heads, 3, -1))
            return heads.unbind(dim=-2)

        return [(attention.query_key_value, split)]
    raise ValueError(
        f"{type(attention).__name__} has no q_proj, and how it packs queries, keys and values is not known: "
        "leave attn out of mapo_groups, or use token_mask: learned"
    )


def _watch_stream(block: Any, config: Any, on_output: Any, on_input: Any) -> None:
    """Watch the residual stream of one block."""
    attention, mlp = _child(block, _ATTENTION, "resid"), _child(block, ("mlp",), "resid")
    mlp_norm = _child(block, _MLP_NORM, "resid")
    on_output(_child(block, _ATTENTION_NORM, "resid"), "resid")
    if hasattr(block, "pre_feedforward_layernorm"):  # Gemma also norms what it adds
        attention, mlp = block.post_attention_layernorm, block.post_feedforward_layernorm
    on_output(attention, "resid")
    if not getattr(config, "use_parallel_residual", False):  # in parallel there is no stream between the two
        on_input(mlp_norm, "resid")
    on_output(mlp_norm, "resid")
    on_output(mlp, "resid")
    on_output(block, "resid")

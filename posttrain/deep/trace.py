"""Peak memory of a training step, from a step on tensors that have shapes and no storage.

The model's own code runs forward and backward on fake tensors (:class:`torch._subclasses.FakeTensorMode`)
with the head that TRL puts on it, under the run's precision and checkpointing, and every tensor is counted
while it lives. So the number follows the architecture, whatever it is, and a step of a model of any size
takes seconds.

What kernels allocate inside one operation is not seen, nor what an allocator keeps. On a GPU TRL's head runs
in Triton; a stand-in then takes its place that allocates what those kernels do.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, add_fused_lm_head

from posttrain.deep.live import LiveTensors
from posttrain.kernels.reference import CPU_TILE, ROWS, TILE

Device = Literal["cpu", "cuda"]
HEAD_OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "preference": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "rlvr": ("log_probs", "entropy"),
    "ttrl": ("log_probs", "entropy"),
}
"""What TRL's trainers ask of the head."""


@dataclass(frozen=True)
class Shape:
    """One forward-backward pass.

    Attributes:
        rows: Sequences in it (two for each pair).
        tokens: Tokens of each, padding included.
        passes: Passes before the optimiser steps.
    """

    rows: int
    tokens: int
    passes: int = 1


@dataclass(frozen=True)
class Traced:
    """Bytes of one process.

    Attributes:
        weights: Parameters and buffers of the model.
        trainable: Number of scalars that train.
        gradients: Of all that train, once they are there.
        activations: What forward and backward hold at the peak, beyond weights and gradients.
        head: The part of them that comes from the LM head: tiles of logits, not activations of layers.
        peak: Largest sum of gradients and activations.
        gradients_at_peak: Of those, gradients.
        unused: What TRL's head reserves beyond that and never writes to: no memory on a CPU.
        dtype: Of the weights.
    """

    weights: int
    trainable: int
    gradients: int
    activations: int
    head: int
    peak: int
    gradients_at_peak: int
    unused: int
    dtype: torch.dtype


@contextlib.contextmanager
def fake_model(skeleton: Any, prepare: Callable[[Any], Any] | None = None) -> Iterator[Any]:
    """Give a copy of a model of the meta device as fake tensors on the CPU; everything inside is fake.

    Args:
        skeleton: On the meta device.
        prepare: Wraps the copy and says what trains, on the meta device too.
    """
    model = copy.deepcopy(skeleton)
    if prepare is not None:
        with torch.device("meta"):
            model = prepare(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        unwrapped(model).tie_weights()
        yield model


def unwrapped(model: Any) -> Any:
    """Return the model inside an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trace_step(
    skeleton: Any,
    shape: Shape,
    task: str,
    *,
    device: Device = "cpu",
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    prepare: Callable[[Any], Any] | None = None,
    passing: Collection[str] = (),
    kl: bool = False,
    states: bool = False,
) -> Traced:
    """Return the memory of one optimiser step, without optimiser.

    Args:
        skeleton: The model, on the meta device (:func:`posttrain.models.skeleton.load_skeleton`).
        shape: Rows and tokens.
        task: Key of :data:`posttrain.config.tasks.TASKS`; decides the head.
        device: Whose head: that of TRL on a CPU, or what it allocates on a GPU.
        checkpointing: Whether activations of layers are recomputed.
        autocast: Type of mixed precision, None for none.
        prepare: Wraps the model and says what trains (an adapter, a selection).
        passing: Tensors whose gradient goes as soon as it is there: only some of its scalars are kept. They
            do not count as trained.
        kl: Whether the exact divergence from the reference is asked for, whose head is ours.
        states: Whether the hidden states of the reference are kept as well.
    """
    step = _Step(skeleton, shape, task, device, checkpointing, autocast, prepare, passing, kl, states)
    with_head = _traced(step, head=True)
    if task == "reward":
        return with_head
    body = _traced(step, head=False)
    unused = 0
    if device == "cpu" and not kl:
        # TRL's tile is as wide as its chunk also where the vocabulary is not; RAM is what is written to
        vocabulary = int(unwrapped(skeleton).get_output_embeddings().weight.size(0))
        size = (autocast or with_head.dtype).itemsize
        unused = max(_CHUNKED_LOGPROB_CHUNK_SIZE - vocabulary, 0) * size * _tile_rows(shape)
    peak = max(with_head.peak - unused, body.peak)
    gradients = (with_head if with_head.peak - unused > body.peak else body).gradients_at_peak
    return dataclasses.replace(
        with_head,
        activations=peak - gradients,
        head=peak - body.peak,
        peak=peak,
        gradients_at_peak=gradients,
        unused=with_head.peak - peak,
    )


def _tile_rows(shape: Shape) -> int:
    return min(shape.rows * (shape.tokens - 1), TOKEN_CHUNK_SIZE)


@dataclass(frozen=True)
class _Step:
    """The arguments of :func:`trace_step`."""

    skeleton: Any
    shape: Shape
    task: str
    device: Device
    checkpointing: bool
    autocast: torch.dtype | None
    prepare: Callable[[Any], Any] | None
    passing: Collection[str]
    kl: bool
    states: bool


def _traced(step: _Step, *, head: bool) -> Traced:
    shape, task = step.shape, step.task
    with fake_model(step.skeleton, step.prepare) as model:
        inner = unwrapped(model)
        if step.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if inner is not model:
                model.enable_input_require_grads()
        model.train()
        if task != "reward":
            add_fused_lm_head(inner, outputs=HEAD_OUTPUTS[task])
        ids = torch.ones(shape.rows, shape.tokens, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        live = LiveTensors([*model.parameters(), *model.buffers()])
        trained = [p for name, p in model.named_parameters() if p.requires_grad and name not in step.passing]
        live.watch(trained)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name in step.passing:
                parameter.register_post_accumulate_grad_hook(_drop)
        with live:
            for _ in range(shape.passes):
                context = torch.autocast("cpu", step.autocast) if step.autocast else contextlib.nullcontext()
                with context:
                    loss = _loss(model, inner, inputs, step, head)
                loss.backward()
                del loss
    return Traced(
        weights=live.held,
        trainable=sum(p.numel() for p in trained),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        activations=live.peak - live.held - live.gradients_at_peak,
        head=0,
        peak=live.peak - live.held,
        gradients_at_peak=live.gradients_at_peak,
        unused=0,
        dtype=model.dtype,
    )


def _loss(model: Any, inner: Any, inputs: dict[str, Any], step: _Step, head: bool) -> Any:
    if step.task == "reward":
        return model(**inputs, use_cache=False).logits.float().sum()
    if head and step.device == "cpu" and not step.kl:
        outputs = model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
        return outputs.log_probs.sum() + outputs.loss
    hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
    if step.kl:
        hidden = _Keep.apply(hidden, *_states_of_reference(inner, inputs, step.states))
    if not head:
        return hidden.float().sum()
    weight = inner.get_output_embeddings().weight
    flat = hidden[:, :-1].reshape(-1, hidden.size(-1))
    if not step.kl:
        return _GPUHead.apply(flat, weight).sum()
    return _HeadWithReference.apply(flat, weight, CPU_TILE if step.device == "cpu" else TILE).sum()


def _states_of_reference(inner: Any, inputs: dict[str, Any], every: bool) -> list[torch.Tensor]:
    """Return the last hidden states of a frozen forward, or those of every layer, as they are kept."""
    with torch.no_grad():
        outputs = inner.base_model(**inputs, use_cache=False, output_hidden_states=every)
        states = outputs.hidden_states[1:] if every else (outputs.last_hidden_state,)
        return [state[:, :-1].reshape(-1, state.size(-1)).clone() for state in states]


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _GPUHead(torch.autograd.Function):
    """Allocates what TRL's head does where it runs in Triton: one tile of logits, gradients in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        autocast = torch.is_autocast_enabled("cpu")
        ctx.compute = torch.get_autocast_dtype("cpu") if autocast else hidden.dtype
        _tile(hidden, weight, ctx.compute)
        return hidden.new_zeros(hidden.size(0), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, weight = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _tile(hidden, weight, ctx.compute)
        return to_hidden.to(hidden.dtype), None if to_weight is None else to_weight.to(weight.dtype)


def _tile(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Allocate a tile of logits, and the part of the weights that it is made from where that is a copy."""
    tile = hidden.new_empty(min(hidden.size(0), TOKEN_CHUNK_SIZE), _CHUNKED_LOGPROB_CHUNK_SIZE, dtype=dtype)
    part = weight[:_CHUNKED_LOGPROB_CHUNK_SIZE].to(dtype)
    del tile, part


class _Keep(torch.autograd.Function):
    """Keeps constants until the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*constants)
        ctx.count = len(constants)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], *[None] * ctx.count


class _HeadWithReference(torch.autograd.Function):
    """Allocates what :func:`posttrain.kernels.score_against_reference` does: tiles of both models in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tile: int) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.tile = tile
        # logits of both, their exponentials, and twice the part of them before the token
        _tiles_of_both(hidden, weight, tile, 5)
        return hidden.new_zeros(hidden.size(0), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _tiles_of_both(hidden, weight, ctx.tile, 2)
        return to_hidden.to(hidden.dtype), None if to_weight is None else to_weight.to(weight.dtype), None


def _tiles_of_both(hidden: torch.Tensor, weight: torch.Tensor, tile: int, count: int) -> None:
    rows = min(hidden.size(0), ROWS)
    columns = min(weight.size(0), max(1, tile // rows))
    tiles = [hidden.new_empty(rows, columns, dtype=torch.float32) for _ in range(count)]
    del tiles

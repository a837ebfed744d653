r"""LfU, learning from the undesirable: SFT that stays where it is robust (arXiv 2511.13052).

Idea
    SFT on little data overfits and forgets. LfU takes one step *up* the loss to an "undesirable" model and
    asks that the model compute nearly the same hidden states there. What is learned then lies in a flat
    region, and less of the rest is overwritten.

Formula
    With the trained weights theta (of a ``selection``: the selected scalars), the SFT loss l of another batch
    (or the same), hidden states h_{l,t} in R^d of the K = layers + 1 entries of ``output_hidden_states`` and
    the T positions whose label counts::

        theta' = theta + alpha * grad l / ||grad l||_2        one norm over all trained weights
        l_cons = 1/(T K) sum_t sum_l (1/d) || sg(h_{l,t}(theta)) - h_{l,t}(theta') ||_2^2
        loss   = l_SFT + weight * l_cons

    sg is the stop-gradient: the gradient of l_cons flows through h(theta') to theta as if the step were a
    constant. Without a gradient (norm 0) or without a position l_cons is 0.

Order of the two backwards
    SFT first, at theta. Then theta is moved in place, l_cons goes forward *and backward* there, and theta is
    put back, bit for bit, also when something fails in between. The target is detached, so the two gradients
    are independent. One joint backward with the weights put back first, as in the official code, takes the
    SFT gradient of lower layers at the wrong weights; with activation checkpointing it would recompute at
    them too.

Defaults and where they come from
    alpha 0.1 and weight 5.0 (paper, LoRA r 8 with alpha 16 on all linear layers, lr 1e-4; alpha 0.5 broke the
    model, weight 1 was below plain SFT). ``reduce_hidden="mean"`` is the official code's mean over d: the
    equation of the paper sums, and weight 5 belongs to the mean. ``ascent_batch="fresh"`` is the official
    code: a second, independently shuffled batch of the same data. All layers (a part of them was worse).

Details
    - T is pooled over the micro-batch; l_cons is divided by the number of micro-batches of the optimiser
      step, and averaged over ranks. (TRL's SFT loss is over the tokens of the whole optimiser step.)
    - Each rank climbs by its own gradient.
    - Dropout: the moved model sees the masks that the clean one saw, so l_cons goes to 0 with alpha. The
      random stream of the training is left as it was: alpha = 0 and weight = 0 are plain SFT, bit for bit.
    - With bf16 weights the step is rounded to what bf16 can hold; fp32 weights, as with a LoRA adapter, keep
      it all.

Needs
    Two more forwards and backwards per micro-batch (paper: 3.0 times the time of SFT), a copy of the trained
    weights and of their gradient, and the hidden states of all layers at the positions that count. With LoRA
    the copies are those of the adapter; with full fine-tuning, of the model.

Composes with
    LoRA, full fine-tuning and ``selection``, activation checkpointing (not the reentrant kind), accumulation,
    packing, DDP, bf16. Refused: float16 (a loss scaler between the two backwards), DeepSpeed and FSDP
    (sharded weights), streamed data sets with ``ascent_batch="fresh"``, prompt-learning adapters.

When not to use it
    - When three times the time is not affordable.
    - With a very small alpha in bf16: the step rounds away.
    - For a single linear layer it is a larger learning rate and nothing else.

What to watch
    ``lfu/consistency`` (l_cons, before the weight), ``lfu/gradient_norm`` (of the ascent).

Official code
    yunpal/LfU. Its RepS variant (steering vectors) detaches the other side and compares different batches; it
    is not what the paper writes, and is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Setup, not_sharded
from posttrain.sft.method import Method, MicroStep


def ascent_step(
    gradients: Sequence[torch.Tensor | None], alpha: float
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Return alpha * g / ||g||_2 and the norm, 0-dim fp32 at least (arXiv 2511.13052, undesirable step).

    Args:
        gradients: One per weight; None counts as zeros.
        alpha: Length of the step.

    Returns:
        Steps in the types of the gradients; all None where the norm is 0.

    Raises:
        FloatingPointError: The norm is not finite.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return [None] * len(gradients), torch.zeros(())
    wide = torch.promote_types(present[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(gradient, dtype=wide) for gradient in present]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError(
            f"LfU: the norm of the ascent gradient is {norm.item()}: the loss of that batch or its gradient "
            "is not finite. Lower the learning rate, or look for a broken row"
        )
    if float(norm) == 0.0:
        return [None] * len(gradients), norm
    return [None if g is None else (g.to(wide) * (alpha / norm)).to(g.dtype) for g in gradients], norm


@contextmanager
def moved(parameters: Sequence[torch.Tensor], steps: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Add the steps to the weights in place for a while; they come back to the bit, whatever happens."""
    touched = [(p, step) for p, step in zip(parameters, steps, strict=True) if step is not None]
    with torch.no_grad():
        saved = [parameter.detach().clone() for parameter, _ in touched]
        for parameter, step in touched:
            parameter.add_(step)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), original in zip(touched, saved, strict=True):
                parameter.copy_(original)


def consistency(
    clean: Sequence[torch.Tensor],
    perturbed: Sequence[torch.Tensor],
    *,
    reduce_hidden: Literal["mean", "sum"] = "mean",
) -> torch.Tensor:
    """Return l_cons, 0-dim (arXiv 2511.13052), mean over layers and tokens.

    Args:
        clean: K tensors (T, d); detached here.
        perturbed: K tensors (T, d), with gradient; T > 0.
        reduce_hidden: Mean over d (the official code) or sum (the equation).

    Returns:
        In fp32 at least.
    """
    terms = []
    for one, two in zip(clean, perturbed, strict=True):
        wide = torch.promote_types(two.dtype, torch.float32)
        square = (one.detach().to(wide) - two.to(wide)).square()
        per_token = square.mean(dim=-1) if reduce_hidden == "mean" else square.sum(dim=-1)
        terms.append(per_token.mean())
    return torch.stack(terms).mean()


@dataclass
class _Seen:
    """The clean pass: K hidden states (T, d) at the positions that count, and the random state before it."""

    states: list[torch.Tensor] | None = None
    random: list[torch.Tensor] = field(default_factory=list)


class LfU(Method):
    """Keep the hidden states of a one-step-worse model close to those of the model. See the module page."""

    name = "lfu"
    title = "LfU: learning from the undesirable"
    paper = "2511.13052"

    alpha: float = Field(0.1, ge=0, description="Length of the ascent step; 0 switches the method off.")
    weight: float = Field(5.0, ge=0, description="Weight of the consistency; 0 switches the method off.")
    reduce_hidden: Literal["mean", "sum"] = Field(
        "mean", description="Over the hidden size: mean (official code) or sum (equation of the paper)."
    )
    ascent_batch: Literal["fresh", "same"] = Field(
        "fresh", description="Climb on another batch of the data set, or on the batch that trains."
    )
    layers: tuple[int, ...] | None = Field(
        None, description="Entries of output_hidden_states, 0 the embeddings, -1 the last; all when unset."
    )

    @property
    def neutral(self) -> bool:
        """Without a step or without a weight nothing is added."""
        return self.alpha == 0 or self.weight == 0

    @property
    def wants_another(self) -> bool:
        """The batch to climb on."""
        return self.ascent_batch == "fresh"

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse what would put something between the two backwards."""
        if self.neutral:
            return
        if setup.trainer.get("fp16"):
            yield Conflict(
                "LfU adds a second backward, which float16's loss scaling does not cover: use bf16",
                field="fp16",
            )
        yield from not_sharded(setup, "lfu moves the weights for a moment and adds to their gradients")
        settings = setup.trainer.get("gradient_checkpointing_kwargs") or {}
        if setup.trainer.get("gradient_checkpointing") and settings.get("use_reentrant"):
            yield Conflict(
                "LfU needs gradients of hidden states, which reentrant checkpointing cuts off: set "
                "gradient_checkpointing_kwargs: {use_reentrant: false}",
                field="gradient_checkpointing_kwargs",
            )

    def around(self, step: MicroStep) -> AbstractContextManager[_Seen]:
        """Keep the hidden states of TRL's own forward."""
        return self._watching(step)

    @contextmanager
    def _watching(self, step: MicroStep) -> Iterator[_Seen]:
        seen = _Seen()
        valid = step.inputs["labels"] != -100

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            del module
            if not seen.random:
                seen.random = _random_state(valid.device)
            return args, kwargs | {"output_hidden_states": True}

        def after(module: Any, args: Any, output: Any) -> None:
            del module, args
            if seen.states is None:
                seen.states = [h.detach()[valid] for h in self._chosen(output.hidden_states)]

        handles = [
            step.decoder.register_forward_pre_hook(before, with_kwargs=True),
            step.decoder.register_forward_hook(after),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _chosen(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.layers is None:
            return list(states)
        outside = [layer for layer in self.layers if not -len(states) <= layer < len(states)]
        if outside:
            raise ValueError(
                f"lfu.layers: {outside} do not exist; this model has {len(states)} entries, 0 (embeddings) "
                f"to {len(states) - 1} (after the final norm)"
            )
        return [states[layer] for layer in self.layers]

    def after_backward(self, step: MicroStep, seen: _Seen) -> torch.Tensor | None:
        """Climb, compare, add the gradient of the comparison, climb down."""
        assert seen.states is not None, "the trainer's forward did not go through the decoder"
        valid = step.inputs["labels"] != -100
        # drawn on every rank, so that all keep step
        batch = step.another() if self.wants_another else step.inputs
        penalty = None
        norm = torch.zeros((), device=valid.device)
        with _own_random_numbers(valid.device):
            if bool(valid.any()):
                steps, norm = ascent_step(self._gradient(step, batch), self.alpha)
                if any(part is not None for part in steps):
                    with moved(step.parameters, steps):
                        penalty = self._compare(step, seen, valid)
                        step.backward(penalty * (self.weight * step.share))
            if penalty is None:
                step.backward(None)
        found = valid.new_zeros((), dtype=torch.float32) if penalty is None else penalty.detach()
        step.gauges.mean("consistency", found)
        step.gauges.mean("gradient_norm", norm.to(valid.device))
        return found * (self.weight * step.share)

    def _gradient(self, step: MicroStep, batch: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
        with step.autocast():
            outputs = step.model(**batch | {"use_cache": False}, fused_lm_head=True)
        loss = -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
        gradients: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            loss, list(step.parameters), allow_unused=True
        )
        return tuple(
            None if gradient is None else _only(gradient, step.positions.get(parameter))
            for parameter, gradient in zip(step.parameters, gradients, strict=True)
        )

    def _compare(self, step: MicroStep, seen: _Seen, valid: torch.Tensor) -> torch.Tensor:
        assert seen.states is not None
        _set_random_state(seen.random, valid.device)
        inputs = {key: value for key, value in step.inputs.items() if key not in ("labels", "shift_labels")}
        inputs |= {"use_cache": False, "output_hidden_states": True}
        with step.autocast():
            states = step.decoder(**inputs).hidden_states
        perturbed = [h[valid] for h in self._chosen(states)]
        return consistency(seen.states, perturbed, reduce_hidden=self.reduce_hidden)


def _only(gradient: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Return the gradient of the scalars that train, zero elsewhere."""
    if positions is None:
        return gradient
    flat, kept = gradient.flatten(), torch.zeros_like(gradient).flatten()
    positions = positions.to(flat.device)
    kept[positions] = flat[positions]
    return kept.view_as(gradient)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return (
        states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]
    )


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the random streams as they were."""
    states = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(states, device)

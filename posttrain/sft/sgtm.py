r"""SGTM, selective gradient masking: keep a capability in units that can be removed (arXiv 2512.05648).

Idea
    Data of a domain that may have to be deleted later only ever updates a few dedicated units; the rest
    learns to work without them. Afterwards these units are zeroed. Domain rows that nobody labelled are then
    largely absorbed by the units too, which is what filtering the data cannot do.

Modes
    The column ``forget`` says what is known of a row: true (of the domain), false (safe), or empty (nobody
    looked). theta_forget are the units' rows and columns, theta_retain the other slices of the same tensors
    and the biases behind their output matrices, theta_joint everything else (embeddings, norms, head)::

        row       mode                               forward                    what learns
        true      forget                             ordinary                   theta_forget [+ theta_joint]
        false     retain, with probability rho       units' activations are 0   theta_retain + theta_joint
                  else default                       ordinary                   everything
        empty     default                            ordinary                   everything

    theta_joint learns in forget mode only with ``mask_joint: false``. rho is ``retain_mask_prob``, drawn once
    per micro-batch. Rows of different modes may share a micro-batch: each mode goes forward and backward on
    its own, gradients are masked before they are added up, and the loss is that of TRL over all of them.

Optimiser
    An AdamW that is strict: m, v, decay and the count for the bias correction of a weight only advance in
    steps in which a mode occurred (on any rank) that trains it. The usual joint AdamW moves weights whose
    gradient was masked to zero by momentum and decay, up to 10 learning rates after one step.

Units
    A unit of an MLP is a row of gate_proj and up_proj and a column of down_proj; a unit of an attention is a
    whole KV group with its query heads. ``choose: last`` is the paper's, who trains from scratch. In a
    trained model ``smallest`` takes those that feed the least into it on rows to retain (ours; the paper has
    nothing on trained models), and ``silence_first`` zeroes their output columns: the model then starts as
    the one without them, and they can still learn.

At the end
    ``at_end``: ``ablate`` zeroes theta_forget, ``redraw`` draws it anew from N(0, std of the rest of the
    tensor) so that it can be trained again, ``keep`` leaves it. Checkpoints hold the model before that;
    ``posttrain train`` keeps the one after it as RUN/finished_model, which ``posttrain export RUN`` and other
    commands take. A run that stops early is left as it is; :func:`posttrain.selection.units.ablate` does it
    by hand.

    Whether anything was removed shows when one tries to learn it again:
    :func:`posttrain.sft.relearn.relearn`.

Defaults and where they come from
    The official code has 64 units of 2048 or 4096 per block, 1 head of 32, rho 0.25 (TinyStories) and 0.1
    (Wikipedia), mask_joint off and on. Ours: rho 0.1, mask_joint on, which for fine-tuning is the one that
    keeps domain data out of the rest. With mask_joint the final norm and the head are masked as well (the
    code leaves the final norm alone).

Needs
    As many forwards and backwards per micro-batch as it has modes, of fewer rows each. Optimiser state as
    AdamW. With rho = 0 and no row labelled true it is plain training.

Composes with
    Full fine-tuning, accumulation, bf16, activation checkpointing, DDP. Refused: adapters (train one adapter
    for the domain and one for the rest instead), selections, other methods, optimisers other than
    adamw_torch, packing, DeepSpeed and FSDP, models with other blocks than Llama's and Qwen's.

When not to use it
    On a finished model whose knowledge is to go: it removes what is learned in *this* training. Published
    evidence is of pre-training up to 254M parameters and of losses only.

What to watch
    ``sgtm/forget``, ``sgtm/retain``, ``sgtm/default``: parts of rows in each mode.

Official code
    safety-research/selective-gradient-masking. Not here: its variants (gradient routing, activation masking)
    and the logit calibration that its evaluation uses.

Evidence at laptop size
    ``python scripts/evidence/sgtm.py --seeds 1 --steps 300 --relearn 60`` trains the embedded model from
    scratch to reverse words (retain) and to add (forget); a fifth of the rows to forget lost its label.
    Held-out NLL (nats per token), one seed::

        arm      retain    forget
        plain    0.571     0.952
        filter   0.013     1.170      labelled rows dropped
        sgtm     0.025     4.295      64 of 448 hidden units per MLP, ablated
        never    0.037     7.901      no row to forget at all

    Filtering learns to add from the rows that nobody labelled, SGTM mostly does not, and retains as much. In
    60 optimiser steps no other arm relearned to within 0.1 of plain, so the relearning test says nothing
    there yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Setup, not_sharded
from posttrain.selection import units as linked
from posttrain.sft.method import Method, MicroStep

if TYPE_CHECKING:
    from torch import nn

    Parts = dict[str, list[tuple[str, int, torch.Tensor | None]]]

logger = logging.getLogger(__name__)

Mode = Literal["forget", "retain", "default"]


def trained(mode: Mode, *, mask_joint: bool) -> frozenset[str]:
    """Return which of the parts forget, retain and joint learn in a mode."""
    if mode == "forget":
        return frozenset({"forget"} if mask_joint else {"forget", "joint"})
    return frozenset({"retain", "joint"} if mode == "retain" else {"forget", "retain", "joint"})


def parts(model: nn.Module, units: linked.Units) -> Parts:
    """Return the parts of each parameter: (forget, retain or joint; dimension; positions or None for all)."""
    slices = units.slices(model)
    behind = {f"{name}.bias" for name in units.outputs()}
    found: Parts = {}
    for name, parameter in model.named_parameters():
        if name in slices:
            dim, index = slices[name]
            rest = torch.ones(parameter.shape[dim], dtype=torch.bool)
            rest[index] = False
            both = (("forget", index), ("retain", rest.nonzero().flatten()))
            found[name] = [(label, dim, place.to(parameter.device)) for label, place in both]
        else:
            found[name] = [("retain" if name in behind else "joint", 0, None)]
    return found


@contextmanager
def in_mode(
    model: nn.Module,
    units: linked.Units,
    mode: Mode,
    *,
    mask_joint: bool = True,
    pieces: Parts | None = None,
) -> Iterator[None]:
    """Make forwards and backwards meanwhile those of a mode: activations and gradients are masked.

    Gradients that are masked are zeros, before they are added to ``.grad``. ``pieces``, the :func:`parts`,
    need not be computed again.
    """
    learning = trained(mode, mask_joint=mask_joint)
    parameters = dict(model.named_parameters())

    def masker(masked: Sequence[tuple[int, torch.Tensor | None]]) -> Callable[[torch.Tensor], torch.Tensor]:
        def mask(gradient: torch.Tensor) -> torch.Tensor:
            for dim, index in masked:
                if index is None:
                    return torch.zeros_like(gradient)
                gradient = gradient.index_fill(dim, index, 0)
            return gradient

        return mask

    handles = []
    for name, own in (parts(model, units) if pieces is None else pieces).items():
        masked = [(dim, index) for label, dim, index in own if label not in learning]
        if masked and parameters[name].requires_grad:
            handles.append(parameters[name].register_hook(masker(masked)))
    try:
        if mode == "retain":
            with linked.without(model, units):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


class SGTM(Method):
    """Train domain rows into dedicated units only, and remove these at the end. See the module page."""

    name = "sgtm"
    title = "SGTM: selective gradient masking"
    paper = "2512.05648"

    mlp_units: int = Field(64, ge=0, description="Dedicated hidden units of each MLP.")
    kv_groups: int = Field(0, ge=0, description="Dedicated KV groups, with their heads, of each attention.")
    retain_mask_prob: float = Field(0.1, ge=0, le=1, description="rho, share of safe rows in retain mode.")
    mask_joint: bool = Field(True, description="Embeddings, norms and head do not learn in forget mode.")
    choose: Literal["smallest", "last"] = Field(
        "smallest", description="Units that matter least on rows to retain, or the last (from scratch)."
    )
    examples: int = Field(64, ge=1, description="smallest: rows to retain that are looked at.")
    silence_first: bool = Field(True, description="Zero the output columns of the units before training.")
    at_end: Literal["ablate", "redraw", "keep"] = Field("ablate", description="What becomes of the units.")
    seed: int = Field(0, ge=0, description="Of the draws of retain mode and of redraw.")

    _units: linked.Units | None = PrivateAttr(default=None)
    _parts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The mark."""
        return ("forget",)

    @property
    def units(self) -> linked.Units:
        """The dedicated units, once the trainer is built."""
        if self._units is None:
            raise ValueError("the units of sgtm are chosen when the trainer is built")
        return self._units

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse what has no slices, or an optimiser of its own."""
        yield from not_sharded(setup, "sgtm masks slices of weights and gradients")
        if setup.adapter:
            yield Conflict(
                "sgtm masks slices of whole weights, which an adapter freezes: train without it, or train "
                "one adapter for the domain and one for the rest"
            )
        others = [name for name in setup.methods if name != self.name]
        if others:
            yield Conflict(f"sgtm runs each mode apart and does not go with {', '.join(others)}: drop one")
        optim = str(getattr(setup.trainer.get("optim"), "value", setup.trainer.get("optim")))
        if optim not in ("None", "adamw_torch", "adamw_torch_fused"):
            yield Conflict(f"sgtm has a strict AdamW, found optim {optim}: set adamw_torch", field="optim")
        for name in ("packing", "padding_free"):
            if setup.trainer.get(name):
                yield Conflict(f"sgtm treats rows apart, and {name} joins them: set it to false", field=name)

    def start(self, model: nn.Module, examples: Callable[[int], Sequence[Mapping[str, Any]]]) -> None:
        """Choose the units, and silence them."""
        if self.choose == "last":
            self._units = linked.last_units(model, mlp=self.mlp_units, attention=self.kv_groups)
        else:
            self._units = linked.smallest_units(
                model, examples(self.examples), mlp=self.mlp_units, attention=self.kv_groups
            )
        self._parts = parts(model, self._units)
        if self.silence_first:
            linked.silence(model, self._units)

    def fingerprint(self) -> str:
        """Return which units are dedicated."""
        return repr({name: index.tolist() for name, index in self.units.outputs().items()})

    def finish(self, model: nn.Module) -> None:
        """Remove the units, or draw them anew."""
        if self.at_end == "ablate":
            linked.ablate(model, self.units)
        elif self.at_end == "redraw":
            linked.redraw(model, self.units, torch.Generator().manual_seed(self.seed))
        logger.info("sgtm: the dedicated units at the end: %s", self.at_end)

    def groups(self, columns: Mapping[str, torch.Tensor], place: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the rows of each mode, (B,) bool; see the module page."""
        marks = columns["forget"]
        # equal on all ranks, and after a resume; torch looks at the lowest 32 bits of a seed only
        seed = (self.seed * 0x9E3779B1 + (place[0] << 12) + place[1]) % 2**32
        draw = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
        forget, retain = marks > 0, (marks == 0) & (draw < self.retain_mask_prob)
        return {"forget": forget, "retain": retain, "default": ~forget & ~retain}

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]], **settings: Any) -> Any:
        """Return the strict AdamW."""
        from posttrain.selection.strict import StrictAdamW

        parameters = dict(model.named_parameters())
        owned = {parameters[name]: own for name, own in self._parts.items()}
        return StrictAdamW(groups, owned, **settings)

    def around(self, step: MicroStep) -> AbstractContextManager[None]:
        """Mask activations and gradients, and tell the optimiser what learns."""
        mode: Any = step.group
        step.optimizer.mark(trained(mode, mask_joint=self.mask_joint))
        return in_mode(step.model, self.units, mode, mask_joint=self.mask_joint, pieces=self._parts)

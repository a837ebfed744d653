"""The method protocol of supervised fine-tuning.

A method is a pure function and a small class that wires it to the micro-step. The class is a pydantic model:
its fields are the configuration, and they can be read without importing torch. The hooks are around what TRL
does by itself:

==============  =======================================  =============================================
hook            when                                     what it is for
==============  =======================================  =============================================
start, finish   before and after training                preparing the model, finishing it
optimizer       when the optimiser is made               another optimiser
counts          before the micro-steps of a step         numbers of the whole optimiser step
groups          before a forward                         rows that go forward and backward apart
around          around TRL's forward and backward        watching or changing the forward
loss            after the forward                        another loss in place of TRL's
after_backward  when TRL's gradient is in ``.grad``      adding the gradient of another loss
==============  =======================================  =============================================

To add a method, write one file in ``posttrain/sft/`` with one subclass of :class:`Method`; it is found by its
``name``. What a method refuses it says in :meth:`Method.conflicts`, in the words of
:class:`posttrain.rl.method.Conflict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from posttrain.rl.method import Conflict, Setup

if TYPE_CHECKING:
    import torch

    from posttrain.rl.gauges import Gauges


@dataclass
class MicroStep:
    """One micro-batch of this rank. B rows, T tokens.

    Attributes:
        model: The policy without wrappers of a launcher; with its adapter, if one is trained.
        decoder: The layers below its LM head, which return hidden states.
        inputs: The micro-batch on the device: ``input_ids`` (B, T), ``labels`` (B, T) with -100 where nothing
            trains, and what else the model takes.
        parameters: The tensors that train.
        positions: Flat positions (k,) of the scalars that train, for parameters of which not all do (a
            selection that is enforced by a mask).
        share: 1 / micro-batches of this optimiser step.
        autocast: Makes the context of the trainer's mixed precision.
        another: Returns another micro-batch of the training data, shuffled on its own, with as many rows.
        backward: Adds the gradient of a loss, mean over ranks, to that of the trainer; None is a loss of 0.
            Collective: every rank calls it as often.
        gauges: Where a method logs numbers.
        columns: (B,) values of the dataset columns that methods ask for, -1 for a missing value.
        totals: Per method, :meth:`Method.counts` summed over the micro-batches of this optimiser step and
            over ranks.
        group: Name of the group of rows this is (:meth:`Method.groups`), or "".
        optimizer: The optimiser, without wrappers.
    """

    model: torch.nn.Module
    decoder: torch.nn.Module
    inputs: dict[str, Any]
    parameters: Sequence[torch.nn.Parameter]
    positions: Mapping[torch.nn.Parameter, torch.Tensor]
    share: float
    autocast: Callable[[], AbstractContextManager[Any]]
    another: Callable[[], dict[str, Any]]
    backward: Callable[[torch.Tensor | None], None]
    gauges: Gauges
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    totals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    group: str = ""
    optimizer: Any = None


class Method(BaseModel):
    """Base class of every method.

    Subclasses set ``name``, ``title`` and ``paper``, declare their parameters as pydantic fields, and
    override the hooks. The docstring of their module is their documentation page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None
    replaces_loss: ClassVar[bool] = False
    """Whether :meth:`loss` takes the place of TRL's loss; one method of a run may."""
    any_launch: ClassVar[bool] = False
    """Whether the method leaves weights and gradients to the launcher, so that it may shard them."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the training data that the method reads, one number per row (`MicroStep.columns`).

        ``reference_nll`` is computed by the trainer instead: the mean token NLL of the rows whose ``forget``
        is true under the model as training begins, dropout off.
        """
        return ()

    @property
    def neutral(self) -> bool:
        """Whether the parameters make the method do nothing; it is then skipped, bit for bit."""
        return False

    @property
    def wants_ids(self) -> bool:
        """Whether the method reads the place of each row in the data, the column ``posttrain_id``."""
        return False

    @property
    def wants_another(self) -> bool:
        """Whether the method draws micro-batches of its own (:attr:`MicroStep.another`)."""
        return False

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Yield what in ``setup`` does not go with this method. Called before anything is loaded."""
        del setup
        return iter(())

    def number_rows(self, count: int, fingerprint: str) -> None:
        """Learn how many training rows there are, before :meth:`start`; for a method that wants ids.

        Args:
            count: One more than the largest id.
            fingerprint: SHA-256 of the rows as the trainer was given them.
        """
        del count, fingerprint

    def counts(self, inputs: Mapping[str, Any], columns: Mapping[str, torch.Tensor]) -> Sequence[float]:
        """Return numbers of one micro-batch, as many in each, to be summed; see :attr:`MicroStep.totals`."""
        del inputs, columns
        return ()

    def start(self, model: torch.nn.Module, examples: Callable[[int], Sequence[Mapping[str, Any]]]) -> None:
        """Prepare the model, unwrapped, when the trainer is built.

        Args:
            model: As training begins.
            examples: Returns that many rows whose column ``forget`` is false, as batches of one.
        """
        del model, examples

    def finish(self, model: torch.nn.Module) -> None:
        """Finish the model, unwrapped, when training has come to its end."""
        del model

    def fingerprint(self) -> str:
        """Return what has to be the same when a run is resumed, after :meth:`start`."""
        return ""

    def optimizer(self, model: torch.nn.Module, groups: list[dict[str, Any]], **settings: Any) -> Any:
        """Return an optimiser in place of the trainer's, or None.

        Args:
            model: Unwrapped.
            groups: Parameter groups with their weight decay.
            **settings: ``lr``, ``betas`` and ``eps`` of the trainer.
        """
        del model, groups, settings

    def groups(self, columns: Mapping[str, torch.Tensor], place: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return groups of rows that go forward and backward apart, (B,) bool each; {} for all together.

        Names are the same for every micro-batch and on every rank; together the groups hold every row once.
        One method of a run may have groups.

        Args:
            columns: See :attr:`MicroStep.columns`.
            place: Optimiser steps so far, and the number of the micro-batch in this one.
        """
        del columns, place
        return {}

    def loss(self, step: MicroStep, outputs: Any) -> torch.Tensor:
        """Return the loss of a method that :attr:`replaces_loss`, 0-dim.

        Args:
            step: The micro-step.
            outputs: Of the forward: ``log_probs`` (B, T - 1), 0 where no label counts, and ``label_mask``.

        Returns:
            This micro-batch's part of the loss of the optimiser step: parts are added up over micro-batches
            and ranks, so divide by :attr:`MicroStep.totals`.
        """
        raise NotImplementedError

    def around(self, step: MicroStep) -> AbstractContextManager[Any]:
        """Return a context for TRL's forward and backward of this micro-batch."""
        del step
        return nullcontext()

    def after_backward(self, step: MicroStep, seen: Any) -> torch.Tensor | None:
        """Return a 0-dim loss whose gradient was added with :attr:`MicroStep.backward`, for the log, or None.

        Args:
            step: The micro-step.
            seen: What the context of :meth:`around` gave.
        """
        del step, seen
        return None

    def optimizer_step(self) -> None:
        """Act once per optimiser step, the same on every rank."""

    def report(self) -> dict[str, Any] | None:
        """Return what to write to ``OUTPUT_DIR/NAME.json`` when training ends, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be saved to resume exactly: numbers, strings, tensors and containers of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        del state

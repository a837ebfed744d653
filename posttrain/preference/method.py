"""The method protocol of preference optimisation.

A method is a pure function (tensors in, tensors out) and a small class that wires it to a stage. The class is
a pydantic model: its fields are the configuration, and they can be read without importing torch. A response y
of a batch of R has the score

.. code-block:: text

    S(y) = r sum_t w_t rho_t(y) + sum_t a_t(y),    rho_t = log pi(y_t | s_t) - log ref(y_t | s_t)

which takes the place of the sequence log-ratio sum_t rho_t in every loss of TRL. Stages, in order; each has a
default that does nothing:

===============  ================================================  =================================
stage            hook                                              in the formula
===============  ================================================  =================================
reference        :meth:`Method.watch_reference`, around its        what else it has to give
                 forward
token weight     :meth:`Method.token_weights`                      w_t, a product over methods
token score      :meth:`Method.token_scores`                       a_t, a sum over methods
row weight       :meth:`Method.row_weights`                        r, a product over methods
pair loss        :meth:`Method.loss`                               another loss of the scores
penalty          :meth:`Method.penalty`                            added to the loss
optimiser        :meth:`Method.optimizer_step`                     once per optimiser step
===============  ================================================  =================================

To add a method, write one file in ``posttrain/preference/`` with one subclass of :class:`Method`; it is found
by its ``name``. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from posttrain.rl.method import Conflict, Setup

if TYPE_CHECKING:
    import torch

    from posttrain.preference.lists import Lists
    from posttrain.rl.gauges import Gauges

Need = Literal["token_logps", "kl"]
"""What the trainer computes once for all methods that ask for it.

``token_logps``: :attr:`Batch.ref_logps` token by token, so references cannot be precomputed.
``kl``: :attr:`Batch.kl`, from the forwards that happen anyway; the same limit.
"""

MARGIN_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"})
"""TRL's losses that are functions of the difference of two scores."""


@dataclass(frozen=True)
class ListSettings:
    """How a method that trains on ranked lists wants them, see :mod:`posttrain.preference.lists`.

    Attributes:
        labels: ``"given"`` in [0, 1], or ``"min_max"`` to scale the scores of each list.
        size: Responses of a list that are used, the first ones; None for all.
        forward_rows: Responses that go through the model at a time; None for all.
        counts_pairs: Whether :attr:`Lists.pairs` has to be that of the whole optimiser step.
    """

    labels: Literal["given", "min_max"] = "given"
    size: int | None = None
    forward_rows: int | None = None
    counts_pairs: bool = False


@dataclass
class Batch:
    """One micro-batch of this rank. R rows: B chosen, then their B rejected ones. T token places.

    With a method that trains on lists (:attr:`lists` is not None) the R rows are the responses of B prompts,
    list after list.

    Attributes:
        logps: (R, T) log pi(y_t | s_t) in nats, with gradient; 0 where ``mask`` is False.
        mask: (R, T) bool, the completion tokens.
        lengths: (R,) what TRL divides by: completion tokens, also one that begins the text and that nothing
            predicts (an empty prompt, or one that truncation cut off).
        ref_logps: (R, T) log ref(y_t | s_t); None where only sums are known, see :data:`Need`.
        ref_sums: (R,) sums of the reference's over the completion, weighed as :attr:`sums` is.
        sums: (R,) sums of ``logps``; with ``ld_alpha`` of TRL, tokens beyond the shorter length are weighed.
        kl: (R, T) KL(ref || pi) of the next-token distributions, nats, with gradient to the policy; 0 where
            ``mask`` is False. None unless needed.
        beta: TRL's ``beta``.
        ids: (B,) place of each pair in the training data before anything was left out, or None.
        tokens: (R, T) the token ids y_t, or None.
        watched: What this method's :meth:`Method.watch_reference` gave.
        loss_types: TRL's ``loss_type``.
        gauges: Where a method logs numbers.
        training: False in an evaluation.
        lists: Which rows form a list, with their labels; None for pairs.
    """

    logps: torch.Tensor
    mask: torch.Tensor
    ref_logps: torch.Tensor | None
    ref_sums: torch.Tensor
    sums: torch.Tensor
    beta: float
    gauges: Gauges
    kl: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    watched: Any = None
    loss_types: tuple[str, ...] = ("sigmoid",)
    training: bool = True
    lists: Lists | None = None
    lengths: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def log_ratios(self) -> torch.Tensor:
        """(R, T) rho_t.

        Raises:
            ValueError: Only sums of the reference are known: the method has to say it needs token_logps.
        """
        if self.ref_logps is None:
            raise ValueError("token log-ratios need the method to declare the need 'token_logps'")
        return self.logps - self.ref_logps

    @property
    def chosen(self) -> torch.Tensor:
        """(R,) bool, True for the chosen rows; of a list that is the best one, the first of equals."""
        import torch

        if self.lists is not None:
            return self.lists.best_rows
        rows = self.logps.size(0)
        return torch.arange(rows, device=self.logps.device) < rows // 2


@dataclass(frozen=True)
class TokenPicture:
    """Numbers over the tokens of one response, for the report.

    Attributes:
        title: What the response is.
        ids: Its token ids.
        values: Lists of numbers >= 0 as long as ``ids``, by what they are.
    """

    title: str
    ids: list[int]
    values: dict[str, list[float]]


class Method(BaseModel):
    """Base class of every method.

    Subclasses set ``name``, ``title`` and ``paper``, declare their parameters as pydantic fields, and
    override the stages they take part in. The docstring of their module is their documentation page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None
    replaces_loss: ClassVar[bool] = False
    """Whether :meth:`loss` takes the place of TRL's loss; one method of a run may."""
    for_lists: ClassVar[bool] = False
    """Whether the method also goes with lists: it takes the rows by :attr:`Batch.chosen`, or all alike,
    and does not need the exact KL."""
    needs_margin: ClassVar[bool] = False
    """Whether only losses of the pair margin (:data:`MARGIN_LOSSES`) and the reverse KL go with it."""

    @property
    def neutral(self) -> bool:
        """Whether the parameters make the method do nothing; it is then skipped, bit for bit."""
        return False

    @property
    def needs(self) -> frozenset[Need]:
        """What the trainer has to compute for it."""
        return frozenset()

    @property
    def keeps_states(self) -> bool:
        """Whether the hidden states of every layer of the reference stay until the loss; for forecasts."""
        return False

    @property
    def lists(self) -> ListSettings | None:
        """How lists are to be read, for a method that trains on them; None for pairs."""
        return None

    @property
    def wants_ids(self) -> bool:
        """Whether the method reads :attr:`Batch.ids`."""
        return False

    def number_rows(self, count: int, fingerprint: str) -> None:
        """Learn how many training rows there are, before :meth:`start`; for a method that wants ids.

        Args:
            count: One more than the largest of :attr:`Batch.ids`.
            fingerprint: SHA-256 of the rows as the trainer was given them.
        """
        del count, fingerprint

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Yield what in ``setup`` does not go with this method. Called before anything is loaded."""
        trainer = setup.trainer
        if self.needs and trainer.get("precompute_ref_log_probs"):
            yield Conflict(
                f"{self.name} needs the reference token by token, precompute_ref_log_probs keeps sums only: "
                "set it to false",
                "precompute_ref_log_probs",
            )
        if self.needs and trainer.get("ld_alpha") is not None:
            yield Conflict(
                f"{self.name} gives tokens scores of its own, which ld_alpha does not define: drop one",
                "ld_alpha",
            )
        if not self.needs_margin:
            return
        losses = trainer.get("loss_type") or ["sigmoid"]
        wrong = [name for name in as_list(losses) if name not in MARGIN_LOSSES | {"sft"}]
        if wrong:
            yield Conflict(
                f"{self.name} changes the margin between two scores, which {', '.join(wrong)} does not use: "
                f"set loss_type to one of {', '.join(sorted(MARGIN_LOSSES))}",
                "loss_type",
            )
        if trainer.get("f_divergence_type") not in (None, "reverse_kl"):
            yield Conflict(
                f"{self.name} is defined for the reverse KL, found "
                f"f_divergence_type={trainer['f_divergence_type']}: drop one",
                "f_divergence_type",
            )

    def start(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """Prepare when the trainer is built; return a module of the method's own that trains, or None.

        Its parameters join the optimiser, keep fp32, are averaged over ranks and saved with checkpoints, but
        are no part of the model that is exported.

        Args:
            model: The policy, unwrapped.
        """
        del model
        return None

    def parameter_groups(self, module: torch.nn.Module) -> list[dict[str, Any]]:
        """Return optimiser groups of what :meth:`start` returned; the learning rate is the policy's."""
        return [{"params": list(module.parameters()), "weight_decay": 0.0}]

    def watch_reference(self, reference: torch.nn.Module, mask: torch.Tensor) -> AbstractContextManager[Any]:
        """Return a context for the forward of the reference; what it gives is :attr:`Batch.watched`.

        Args:
            reference: The reference model without wrappers, adapters set as for the forward.
            mask: (R, T) bool, see :attr:`Batch.mask`.
        """
        del reference, mask
        return nullcontext()

    def token_weights(self, batch: Batch) -> torch.Tensor | None:
        """Return w_t, (R, T) >= 0, or None for 1."""
        del batch
        return None

    def token_scores(self, batch: Batch) -> torch.Tensor | None:
        """Return a_t, (R, T), or None for 0; places outside the mask are ignored."""
        del batch
        return None

    def row_weights(self, batch: Batch) -> torch.Tensor | None:
        """Return r, (R,), or None for 1. It multiplies the weighed log-ratios, not the token scores."""
        del batch
        return None

    def loss(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        """Return the loss of a method that :attr:`replaces_loss`, 0-dim, mean over pairs.

        Args:
            batch: The micro-batch.
            scores: (R,) S with gradient, without beta.
        """
        raise NotImplementedError

    def penalty(self, batch: Batch) -> torch.Tensor | None:
        """Return a 0-dim term of the loss, mean over the pairs of the micro-batch, or None."""
        del batch
        return None

    def watch(self, batch: Batch, scores: torch.Tensor) -> None:
        """Log numbers of the finished scores, (R,), without beta."""
        del batch, scores

    def pictures(self) -> list[TokenPicture]:
        """Return a few responses with numbers over their tokens, for the report."""
        return []

    def optimizer_step(self) -> None:
        """Act once per optimiser step, the same on every rank."""

    def finish(self, model: torch.nn.Module) -> None:
        """Finish the model, unwrapped, when training has come to its end."""
        del model

    def report(self) -> dict[str, Any] | None:
        """Return what to write to ``OUTPUT_DIR/NAME.json`` when training ends, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be saved to resume exactly: numbers, strings, tensors and containers of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        del state


def as_list(value: Any) -> list[Any]:
    """Return TRL's ``loss_type`` as a list; it takes one name as well."""
    return list(value) if isinstance(value, (list, tuple)) else [value]

r"""Unlearning losses: GradDiff and NPO on marked rows (as in arXiv 2410.17509; NPO is arXiv 2404.05868).

Idea
    Rows to forget and rows to retain are trained in one run. GradDiff climbs the loss of the first and
    descends that of the second; climbing has no bottom, and breaks the model when it goes on for long. NPO
    (negative preference optimisation) climbs only as far as the row is still likelier than under the start
    model.

Formula
    l_i is the mean token NLL of row i (nats per token), l_i^ref the same under the model as training began,
    F and R the rows of an optimiser step that are to be forgotten and retained::

        graddiff   - mean_F l_i                                              + retain_weight * mean_R l_i
        npo        - (2/beta) mean_F log sigmoid(beta (l_i - l_i^ref))       + retain_weight * mean_R l_i

    The slope of NPO in l_i is -2 sigmoid(-beta (l_i - l_i^ref)): -1 at the start, towards 0 as the row is
    forgotten; beta -> 0 is GradDiff. Means are over all rows of the optimiser step, of all micro-batches and
    ranks, so neither the micro-batch size nor the number of ranks matters. A step without rows of one kind
    has no term of that kind: mix them, and take batches in which both occur.

Data
    A column ``forget`` says true for rows to forget and false for rows to retain, beside any kind of rows
    that supervised training takes (text, prompt and completion, messages). In a configuration a column of
    another name is renamed with ``data.columns: {forget: YOURS}``. l counts what TRL trains on: the
    completion, where there is one.

    PO, the third loss of that paper, is a matter of data and needs no method: give the rows to forget
    refusals as completions, and train.

Defaults and where they come from
    ``retain_weight`` 1 and ``beta`` 0.1 are the official code's (retain weights of 0.5 to 5, beta of 0.05 to
    0.5 are sensible). Published learning rates on TOFU: 7e-6 (GradDiff), 1e-5 (NPO), weight decay 0.1 there;
    we recommend 0.

Needs
    NPO: one forward over the rows to forget before training, without dropout; no copy of the model. A run
    that is resumed has to be built with the start model again, as usual; the scores are compared.

Composes with
    LoRA and full fine-tuning, accumulation, DDP, DeepSpeed, FSDP2, activation checkpointing, bf16,
    selections: with ``selection: wagle`` the run is that paper's. Refused: packing and padding-free batches
    (rows have to stay rows), label smoothing, ``loss_type`` other than nll. TRL's own entropy and token
    accuracy are still logged.

When not to use it
    When forgetting has to be certain: what was unlearned this way can often be relearned in a few steps.

What to watch
    ``unlearn/forget_nll`` and ``unlearn/retain_nll``: the first should rise and the second stay. ``unlearn/
    forget_rows``: the part of rows that are to be forgotten.

Official code
    OPTML-Group/WAGLE. Its l is the mean over the tokens of a micro-batch, which is one row there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Setup
from posttrain.sft.method import Method, MicroStep


def row_nll(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean token NLL of each row, (B,) in fp32 at least; 0 for a row without tokens.

    Args:
        log_probs: (B, T) log-probabilities of the labels, nats.
        mask: (B, T), where a label counts.
    """
    mask = mask.bool()
    wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)).masked_fill(~mask, 0.0)
    return -wide.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def graddiff_term(nll: torch.Tensor) -> torch.Tensor:
    """Return -l, the loss of rows to forget: plain ascent."""
    return -nll


def npo_term(nll: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Return -(2 / beta) log sigmoid(beta (l - l_ref)) per row (arXiv 2404.05868, per token as 2410.17509).

    Args:
        nll: (B,) l, nats per token.
        reference: (B,) l_ref under the start model.
        beta: > 0.
    """
    return -(2 / beta) * torch.nn.functional.logsigmoid(beta * (nll - reference.to(nll.dtype)))


class Unlearn(Method):
    """Ascend on rows to forget, descend on rows to retain. See the module page."""

    name = "unlearn"
    title = "Unlearning losses: GradDiff and NPO"
    paper = "2410.17509"
    replaces_loss: ClassVar[bool] = True
    any_launch: ClassVar[bool] = True

    loss_type: Literal["graddiff", "npo"] = Field("npo", description="Loss of the rows to forget.")
    retain_weight: float = Field(1.0, ge=0, description="Weight of the loss of the rows to retain.")
    beta: float = Field(0.1, gt=0, description="npo: how soon the ascent stops; towards 0 it is graddiff.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The mark; for NPO also the scores under the start model."""
        return ("forget",) if self.loss_type == "graddiff" else ("forget", "reference_nll")

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse what joins rows, or is a loss of its own."""
        for name in ("packing", "padding_free"):
            if setup.trainer.get(name):
                yield Conflict(
                    f"unlearn treats rows apart, and {name} joins them: set {name} to false", field=name
                )
        if setup.trainer.get("label_smoothing_factor"):
            yield Conflict(
                "unlearn replaces the loss, so label smoothing has no effect: drop label_smoothing_factor",
                field="label_smoothing_factor",
            )
        if setup.trainer.get("loss_type") not in (None, "nll"):
            yield Conflict("unlearn replaces the loss: set loss_type to nll", field="loss_type")

    def counts(self, inputs: Mapping[str, Any], columns: Mapping[str, torch.Tensor]) -> Sequence[float]:
        """Return the rows with labels that are to be forgotten, and to be retained."""
        valid = (inputs["labels"][:, 1:] != -100).any(dim=1)
        forget = _marks(columns).to(valid.device)
        return float((valid & forget).sum()), float((valid & ~forget).sum())

    def loss(self, step: MicroStep, outputs: Any) -> torch.Tensor:
        """Return this micro-batch's part of the loss of the optimiser step."""
        nll = row_nll(outputs.log_probs, outputs.label_mask)
        valid = outputs.label_mask.any(dim=1)
        forget = _marks(step.columns).to(nll.device)
        forgets, retains = step.totals[self.name].to(nll.device).clamp(min=1).unbind()
        if self.loss_type == "graddiff":
            terms = graddiff_term(nll)
        else:
            terms = npo_term(nll, step.columns["reference_nll"].to(nll.device), self.beta)
        step.gauges.mean("forget_nll", nll, where=valid & forget)
        step.gauges.mean("retain_nll", nll, where=valid & ~forget)
        step.gauges.mean("forget_rows", forget.float(), where=valid)
        zero = torch.zeros_like(nll)
        ascent = torch.where(valid & forget, terms, zero).sum() / forgets
        descent = torch.where(valid & ~forget, nll, zero).sum() / retains
        return ascent + self.retain_weight * descent


def _marks(columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
    marks = columns["forget"]
    if bool((marks < 0).any()):
        raise ValueError(
            "unlearn found a row whose column 'forget' is empty: say true (forget) or false (retain) for each"
        )
    return marks > 0

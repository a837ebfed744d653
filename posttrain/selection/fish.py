r"""FISH mask: the scalars with the highest Fisher information train, all others stay (arXiv 2111.09839).

Idea
    A weight matters for a task when the likelihood of its examples reacts to it. The diagonal of the Fisher
    information says how much; its B largest entries over *all* candidate tensors are chosen once, and then
    training goes on with that fixed mask.

Formula
    Over examples n with prompt x and completion y::

        F_i = sum_n ( d log p(y_n | x_n) / d theta_i )^2

    log p is the *sum* over completion tokens, the square is taken per example: squares of the gradients
    [1, .5, 0, .2] and [-1, .5, .1, .2] add up to [2, .5, .01, .08], while the square of their mean,
    [0, .25, .0025, .04], ranks the weights in another order. An example without completion tokens adds 0.
    Only the order of F matters, so sums and means over the examples select the same.

    ``kind="label"`` takes y from the data (the empirical Fisher). ``kind="expect"`` stands for the
    expectation over y: the paper's sum over all labels cannot be had for a language model, so one completion
    is sampled from the model (temperature 1, at most as many tokens as the one in the data), and p stays
    outside the square as in the paper. ``power="abs"`` adds up absolute values instead of squares.

Defaults and where they come from
    0.5 % of the scalars and 1,024 examples (paper and code), one global ranking (code), label and square
    (the paper's formula; the code's command line defaults to label and absolute values). Ties go to the
    first (tensor, flat position); theirs are settled by chance. Dropout is off, theirs is on.

Fresh heads
    ``always_train`` names tensors that train whole, such as a new classifier; they are charged to the budget,
    and a budget that is too small for them is an error, both as in the code.

Needs
    Examples (``Select.examples`` rows of the training data, or ``Select.batches``). Rows of a batch are
    scored one by one. Padding is taken out; rows that join several sequences (packing, padding-free) are
    refused. One forward and one backward per example, with 4 bytes per candidate for the sums and the
    gradient of one tensor at a time: nothing is left in ``.grad``.

    On several ranks all are given the same examples, each scores its share, and the sums are added, so the
    plan is the same everywhere. Whole weights are needed: with ZeRO-3 or FSDP make the plan in one process
    (``posttrain plan make``). Frozen and quantised parameters are no candidates; with LoRA the adapter's
    scalars are, of which a fresh B = 0 leaves A without gradient, so that B is chosen.

When not to use it
    - When the scores cost more than they bring: PaFi needs no data, and a random choice is a strong control.
    - On a handful of examples: F then says what these examples need.

What to watch
    The plan's table per kind of tensor (``posttrain plan inspect``): F is largest where gradients are, often
    in norms and in the embeddings of frequent tokens. ``norms`` and ``embeddings`` take them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.gradient_sums import Statistic, gradient_sums, scoring, single_rows
from posttrain.selection.plan import SelectionPlan
from posttrain.selection.selector import Budget, ElementSelector, Need
from posttrain.selection.top_b import top_b

if TYPE_CHECKING:
    from torch import nn

    from posttrain.selection.selector import Batch, Batches

Power = Literal["square", "abs"]

_IGNORED = -100


class FISH(ElementSelector):
    """Chooses the scalars with the highest diagonal Fisher information."""

    name: ClassVar[str] = "fish"
    title: ClassVar[str] = "FISH mask: the scalars with the highest Fisher information"
    paper: ClassVar[str | None] = "2111.09839"
    needs: ClassVar[Need] = "examples"

    budget: Budget = Field(
        0.005, description="B, scalars that train: a number, or a fraction of the candidates."
    )
    kind: Literal["label", "expect"] = Field(
        "label", description="Completions of the data, or one sampled from the model for each prompt."
    )
    power: Power = Field("square", description="What is added up per example: squares or absolute values.")
    seed: int = Field(0, ge=0, description="Of the sampled completions (kind expect); mixed with the round.")

    def select(self, model: nn.Module, *, round: int = 0, batches: Batches | None = None) -> SelectionPlan:
        """Score the candidates on ``batches`` and choose the best, see :meth:`Selector.select`.

        Raises:
            PlanError: There are no candidates, or a pattern matches nothing.
            ValueError: There are no examples with completion tokens, their shape is wrong, or the budget is.
            FloatingPointError: A score is not finite; the message names tensor and position.
        """
        if batches is None or isinstance(batches, Mapping):
            found = "none" if batches is None else f"several sets, {', '.join(batches)}"
            raise ValueError(f"fish needs one set of examples as batches, found {found}")
        ranked, whole, left = self.split(model)
        assert left is not None
        rank, ranks = _place()
        draw = self.generator(round, self.seed)
        with scoring(model, ranked):
            rows = self._rows(model, batches, draw, rank, ranks)
            scores, used = fisher(model, ranked, rows, power=self.power)
        count = torch.tensor([used], dtype=torch.float64, device=next(iter(ranked.values())).device)
        if ranks > 1:
            for tensor in [count, *scores.values()]:
                torch.distributed.all_reduce(tensor)
        if not count.item():
            raise ValueError(
                "fish found no example with completion tokens (labels other than -100): look at the data, or "
                "at a max_length that cuts completions off"
            )
        return self.elements(model, top_b(scores, left), whole, round=round, examples=int(count.item()))

    def _rows(
        self, model: nn.Module, batches: Iterable[Batch], draw: torch.Generator, rank: int, ranks: int
    ) -> Iterator[Batch]:
        """Yield this rank's rows, of ``expect`` with a sampled completion."""
        for number, row in enumerate(row for batch in batches for row in single_rows(batch)):
            seed = int(torch.randint(2**62, (), generator=draw))  # drawn for all rows, equal on all ranks
            if number % ranks == rank:
                yield row if self.kind == "label" else _sampled(model, row, seed)


def fisher(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: Iterable[Batch], *, power: Power
) -> tuple[dict[str, torch.Tensor], int]:
    """Return sums over rows of the squared (or absolute) gradient of a row's log-likelihood.

    Args:
        model: In the mode it is to be scored in; gives ``.logits`` of shape (1, T, V).
        parameters: Leaves that require gradients; their ``grad`` is None, and is None again afterwards.
        rows: One sequence each: ``input_ids`` and ``labels`` of shape (1, T), as :func:`single_rows` gives.
        power: ``square`` or ``abs``.

    Returns:
        Per name fp32 scores of the parameter's shape, and the number of rows that had completion tokens.
    """

    def loss(model: nn.Module, row: Batch) -> torch.Tensor | None:
        learned = bool((row["labels"][:, 1:] != _IGNORED).any())
        return negative_log_likelihood(model, row) if learned else None

    statistic: Statistic = "square" if power == "square" else "absolute"
    return gradient_sums(model, parameters, rows, loss=loss, statistic=statistic)


def negative_log_likelihood(model: nn.Module, row: Batch) -> torch.Tensor:
    """Return -log p of the completion tokens of a row, summed, in nats."""
    inputs = {name: value for name, value in row.items() if name != "labels"}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(
        logits[0, :-1].float(), row["labels"][0, 1:].to(logits.device), ignore_index=_IGNORED, reduction="sum"
    )


def _sampled(model: nn.Module, row: Batch, seed: int) -> Batch:
    """Return the row's prompt with a completion of the model's own, at most as long as the row's."""
    learned = (row["labels"][0, 1:] != _IGNORED).nonzero().flatten() + 1
    if not len(learned):
        return row
    if not hasattr(model, "generate"):
        raise ValueError(f"kind 'expect' samples completions, and {type(model).__name__} cannot generate")
    from transformers import GenerationConfig

    prompt = row["input_ids"][:, : int(learned[0])]
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    # nothing of the model's own settings: a temperature or a top-p would be another distribution
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=len(learned),
        eos_token_id=ends,
        pad_token_id=0,
    )
    devices = [prompt.device] if prompt.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        generate: Any = model.generate
        ids = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = _IGNORED
    return {"input_ids": ids, "labels": labels}


def _place() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
